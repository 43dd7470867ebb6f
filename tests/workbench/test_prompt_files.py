"""Prompt files: save and load round-trip, ranges can be edited by hand, and hostile files are refused by name."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from tests.workbench.small_models import random_prompt
from workbench import MultimodalPrompt, Prompt, PromptError, Span
from workbench.checksums import checksum


def full_prompt() -> Prompt:
    prompt = random_prompt()
    spans = [Span(grid=(1, 5), label="first"), Span("audio", (9,), "bidirectional", block=(18, 30))]
    deepstack = [torch.randn(2, len(item), 48) for item in prompt.input_embeddings]
    return prompt.replace(spans=spans, deepstack=deepstack, position_ids=torch.arange(120).reshape(3, 40))


@pytest.mark.parametrize("make", [full_prompt, random_prompt, lambda: Prompt([1, 2, 3])], ids=["full", "plain", "text"])
def test_save_and_load_round_trip(make, tmp_path):
    prompt = make()
    prompt.save(tmp_path / "p.json")
    again = Prompt.load(tmp_path / "p.json")
    assert again.digest == prompt.digest
    assert again.spans == prompt.spans
    assert len(rows_files(tmp_path)) == bool(prompt.input_embeddings)


def rows_files(folder):
    return sorted(folder.glob("*.safetensors"))


def test_loaded_rows_are_unchanged_when_the_file_is_replaced(tmp_path):
    items = [torch.randn(40_000, 4) for _ in range(2)]
    Prompt([1] * 80_000, items, [(0, 40_000), (40_000, 80_000)]).save(tmp_path / "p.json")
    loaded = Prompt.load(tmp_path / "p.json")
    Prompt([1] * 5, [torch.zeros(5, 4)], [(0, 5)]).save(tmp_path / "p.json")
    assert all(torch.equal(mine, item) for mine, item in zip(loaded.input_embeddings, items, strict=True))


def test_a_failed_write_leaves_the_old_files_unchanged(tmp_path, monkeypatch):
    random_prompt().save(tmp_path / "p.json")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(PromptError, match="No space left"):
        random_prompt().save(tmp_path / "p.json")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype, tmp_path):
    Prompt([1, 2, 3], [torch.randn(2, 4).to(dtype)], [(0, 2)]).save(tmp_path / "p.json")
    assert Prompt.load(tmp_path / "p.json").input_embeddings[0].dtype is dtype


def test_edited_ranges_load_even_if_invalid(tmp_path):
    random_prompt().save(tmp_path / "p.json")
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["embedding_ranges"] == [[4, 9], [20, 29]]
    record["embedding_ranges"][0] = [90, 95]
    (tmp_path / "p.json").write_text(json.dumps(record))
    wrong = Prompt.load(tmp_path / "p.json")
    assert next(finding.code for finding in wrong.findings()) == "range-bounds"
    wrong.save(tmp_path / "again.json")
    assert Prompt.load(tmp_path / "again.json").digest == wrong.digest


def test_views_of_one_tensor_can_be_saved(tmp_path):
    rows = torch.randn(10, 4)
    prompt = Prompt([1] * 12, [rows[:5], rows[5:]], [(0, 5), (6, 11)])
    prompt.save(tmp_path / "p.json")
    assert Prompt.load(tmp_path / "p.json").digest == prompt.digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "workbench-prompt-9"}, "not a prompt of this version"),
        ({"input_ids": "abc"}, "input_ids is 'abc': input should be a valid list"),
        ({"input_ids": [1, 2.5]}, r"input_ids\[1\] is 2.5: input should be a valid integer"),
        ({"input_ids": [True]}, r"input_ids\[0\] is True: input should be a valid integer"),
        ({"input_ids": [2**80]}, r"input_ids\[0\] is 1208925819614629174706176: input should be less than"),
        ({"embedding_ranges": [[1]]}, r"embedding_ranges\[0\] is \[1\]: list should have at least 2 items"),
        ({"embedding_ranges": {"a": 1}}, "embedding_ranges is .*: input should be a valid list"),
        ({"embedding_ranges": [[0, 10**30]]}, r"embedding_ranges\[0\]\[1\] is 10{30}: input should be less than"),
        ({"spans": [{"modality": 3}]}, r"spans\[0\].modality is 3: input should be a valid string"),
        ({"spans": [{"grid": "7x7"}]}, r"spans\[0\].grid is '7x7': input should be a valid list"),
        ({"spans": [{"block": [1, 2, 3]}]}, r"spans\[0\].block is \[1, 2, 3\]: list should have at most 2 items"),
        ({"spans": [{"colour": "red"}]}, r"the field spans\[0\].colour is unknown"),
        (
            {"spans": [{"attention": "sideways"}]},
            r"spans\[0\].attention is 'sideways': input should be 'causal' or 'bidirectional'",
        ),
        ({"spans": 3}, "spans is 3: input should be a valid list"),
        ({"tensors": "../p.safetensors"}, "in the same folder"),
        ({"tensors": "/etc/passwd"}, "in the same folder"),
        ({"tensors": "p.pkl"}, "must name a .safetensors file in the same folder"),
        ({"tensors": "gone.safetensors"}, "Copy both files"),
        ({"pickle": "gASV"}, "the field pickle is unknown"),
    ],
)
def test_hostile_json_is_refused(change, words, tmp_path):
    random_prompt().save(tmp_path / "p.json")
    record = {**json.loads((tmp_path / "p.json").read_text()), **change}
    (tmp_path / "p.json").write_text(json.dumps(record))
    with pytest.raises(PromptError, match=words):
        Prompt.load(tmp_path / "p.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"[" * 100_000, b"null", b'{"format": NaN}'])
def test_files_that_are_not_prompts_are_refused(content, tmp_path):
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(PromptError):
        Prompt.load(tmp_path / "p.json")


def test_damaged_or_foreign_tensor_files_are_refused(tmp_path):
    random_prompt().save(tmp_path / "p.json")
    (path,) = rows_files(tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[:-10], whole[:-5] + bytes([whole[-5] ^ 0x40]) + whole[-4:]):
        path.write_bytes(damaged)
        with pytest.raises(PromptError, match="its checksum is .*Copy both files"):
            Prompt.load(tmp_path / "p.json")
    save_file({"item.0": torch.zeros(2, 3), "item.2": torch.zeros(2, 3)}, path)
    record = json.loads((tmp_path / "p.json").read_text())
    record["tensors_checksum"] = checksum(path.read_bytes())
    (tmp_path / "p.json").write_text(json.dumps(record))
    with pytest.raises(PromptError, match="not numbered from 0 without a gap"):
        Prompt.load(tmp_path / "p.json")


def test_prompts_with_one_stem_keep_their_own_rows(tmp_path):
    first, second = (Prompt([5] * 9, [torch.full((4, 8), value)], [(2, 6)]) for value in (1.0, 2.0))
    first.save(tmp_path / "run.a")
    second.save(tmp_path / "run.b")
    (tmp_path / "run.safetensors").write_bytes(b"a trace")
    first.save(tmp_path / "run.json")
    assert Prompt.load(tmp_path / "run.a").digest == first.digest
    assert Prompt.load(tmp_path / "run.b").digest == second.digest
    assert (tmp_path / "run.safetensors").read_bytes() == b"a trace"


def test_rows_of_the_replaced_prompt_are_removed(tmp_path):
    for value in (1.0, 2.0):
        Prompt([5] * 9, [torch.full((4, 8), value)], [(2, 6)]).save(tmp_path / "p.json")
    assert len(rows_files(tmp_path)) == 1
    Prompt([5]).save(tmp_path / "p.json")
    assert not rows_files(tmp_path)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_links_pipes_and_folders_are_not_replaced(kind, tmp_path):
    path = tmp_path / "p.json"
    if kind == "link":
        (tmp_path / "target").write_text("precious")
        path.symlink_to(tmp_path / "target")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(PromptError, match=f"it is a {kind}, not a file, and is not replaced"):
        Prompt([1, 2]).save(path)
    assert path.is_symlink() or not path.is_file()


def test_save_refuses_what_load_could_not_read(tmp_path):
    with pytest.raises(PromptError, match="give the name of the JSON file"):
        random_prompt().save(tmp_path / "p.safetensors")
    with pytest.raises(PromptError, match="cannot be written"):
        random_prompt().save(tmp_path / "no" / "such" / "folder.json")
    with pytest.raises(PromptError, match="MultimodalPrompt cannot be saved"):
        MultimodalPrompt.of(random_prompt(), [{}]).save(tmp_path / "p.json")
    with pytest.raises(PromptError, match="cannot be saved"):
        Prompt([1, 2], ["no tensor"], [(0, 1)]).save(tmp_path / "p.json")
