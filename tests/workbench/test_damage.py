"""Damaged, hostile and unlucky surroundings: no code runs, nothing is silently wrong, nothing hangs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import workbench
from tests import crash
from tests.workbench.small_models import random_prompt, save_llama
from workbench import EmbeddingRangeError, GenerationConfig, ModelError, Prompt, PromptError, Span, Trace, TraceError
from workbench.models.cache import cached_folder
from workbench.models.chat_template import template_limits
from workbench.package_data import data_folder
from workbench.recording import Recording

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def changed(model, tmp_path, **fields) -> Path:
    """Return a copy of the model with other fields in its configuration."""
    folder = tmp_path / "changed"
    shutil.copytree(model.path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": np.float32(2.5)}, "max_new_tokens=.*it must be an integer"),
        ({"do_sample": "False"}, "do_sample='False': it must be True or False"),
        ({"top_k": [1]}, r"top_k=\[1\]: it must be an integer"),
        ({"temperature": 1j}, "temperature=1j: it must be a finite number"),
        ({"top_p": float("nan")}, "top_p=nan: it must be a finite number"),
        ({"stop_token_ids": {1: 2}}, "stop_token_ids=.*it must be a list of integers"),
        ({"output_logits": ["all"]}, "output_logits=.*use 'all', 'generation' or None"),
    ],
)
def test_settings_of_the_wrong_type_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        GenerationConfig(**settings)


def test_numpy_scalars_are_accepted_as_settings():
    made = GenerationConfig(
        max_new_tokens=np.int64(3), random_seed=np.uint8(4), do_sample=np.bool_(True), top_p=np.float32(0.5)
    )
    assert (made.max_new_tokens, made.random_seed, made.do_sample, made.top_p) == (3, 4, True, 0.5)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Prompt([5], position_ids=[None]), PromptError, "position_ids=.*give integers"),
        (lambda: Prompt([5], 5), EmbeddingRangeError, "input_embeddings=5: give a list"),
        (lambda: Span(block=("a", "b")), EmbeddingRangeError, "block=.*a pair"),
        (lambda: Span(grid="7x7"), EmbeddingRangeError, "grid=.*integers"),
        (lambda: Prompt([5, 6], position_ids=[2**62] * 2).check(), PromptError, "positions are below"),
        (lambda: Prompt([[5] * 10**6]), PromptError, "^.{1,300}$"),
    ],
)
def test_prompt_fields_of_the_wrong_type_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_item_with_too_small_a_storage_is_refused():
    rows = torch.zeros(4, 48)
    rows.untyped_storage().resize_(100)
    with pytest.raises(EmbeddingRangeError, match="a storage smaller than its shape"):
        Prompt([5] * 9, [rows], [(2, 6)]).check()
    assert len(Prompt([5] * 9, [rows], [(2, 6)]).digest) == 64


def test_request_keeps_its_rows_when_the_caller_reuses_the_buffer(llama):
    config = GenerationConfig(max_new_tokens=8, ignore_eos=True)
    prompt = random_prompt()
    clean = prompt.owned()
    with workbench.open_engine("numba", llama) as engine:
        expected = engine.generate(clean, config).token_ids
        engine.forget_prefixes()
        stream = engine.stream(prompt, config)
        for item in prompt.input_embeddings:
            item.zero_()
        assert [token for output in stream for token in output.token_ids] == expected
        assert engine.generate(clean, config).token_ids == expected
    assert prompt.digest != clean.digest


@pytest.mark.parametrize("kind", ["numba", "transformers"])
@pytest.mark.parametrize("layers", [2, 0, -1, 10**9])
def test_number_of_layers_is_compared_with_the_checkpoint(llama, tmp_path, kind, layers):
    folder = changed(llama, tmp_path, num_hidden_layers=layers)
    with pytest.raises(ModelError, match=f"{layers}.* checkpoint has 3"):
        workbench.open_engine(kind, workbench.load_model(folder))


@pytest.mark.parametrize("kind", ["numba", "transformers"])
def test_impossible_sizes_are_refused_before_memory_is_taken(llama, tmp_path, kind):
    folder = changed(llama, tmp_path, head_dim=10**9)
    with pytest.raises(ModelError, match="head_dim=1000000000 .*no dimension of a tensor"):
        workbench.open_engine(kind, workbench.load_model(folder))


def test_cache_larger_than_the_memory_is_refused(llama):
    with pytest.raises(ValueError, match=r"cache_max_entry_count=1000000000: .* GiB are free: give at most \d+ pages"):
        workbench.open_engine("numba", llama, cache_max_entry_count=10**9)


def test_both_engines_read_the_single_file_beside_an_index_of_other_weights(llama, tmp_path):
    folder = changed(llama, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in tensors.items()}, folder / "other.safetensors", metadata={"format": "pt"}
    )
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = workbench.load_model(folder)
    with workbench.open_engine("numba", model) as engine:
        assert workbench.check_engine(engine, random_prompt()).verdict in ("same", "noise")


def test_model_digest_covers_every_byte(llama, tmp_path):
    folder = changed(llama, tmp_path)
    before = workbench.load_model(folder).digest
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[len(content) // 2 + 777] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert workbench.load_model(folder).digest != before == llama.digest


def test_weights_cut_while_in_use_raise(llama, tmp_path):
    model = workbench.load_model(changed(llama, tmp_path))
    names = list(model.weights)
    model.weights.get(names[0])
    os.truncate(model.path / "model.safetensors", 5000)
    with pytest.raises(ModelError, match="was cut to 5000 bytes while it was in use"):
        model.weights.get(names[-1])


def test_template_that_does_not_end_is_stopped():
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = ImmutableSandboxedEnvironment().from_string(loop)
    began = time.monotonic()
    with (
        pytest.raises(ModelError, match="the chat template of 'x' failed: .*stopped after 0.5 s"),
        template_limits("x", 0.5),
    ):
        template.render()
    assert time.monotonic() - began < 5
    assert sys.gettrace() is None


def test_cancel_works_after_the_event_loop_is_closed(llama):
    engine = workbench.open_engine("numba", llama)

    async def first():
        stream = engine.async_stream(
            random_prompt(), GenerationConfig(max_new_tokens=60, ignore_eos=True), session_id=9
        )
        await anext(stream)
        return stream

    events = asyncio.new_event_loop()
    stream = events.run_until_complete(first())
    events.close()
    assert engine.cancel(9) in (True, False)
    engine.close()
    del stream


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("reopened", [False, True], ids=["used", "reopened"])
def test_forked_engine_raises_in_the_child(llama, reopened):
    engine = workbench.open_engine("numba", llama)
    engine.generate(random_prompt(), GenerationConfig(max_new_tokens=2))
    child = os.fork()
    if not child:
        status = 1
        try:
            workbench.open_engine("numba", llama) if reopened else engine.generate(random_prompt())
        except ModelError as error:
            status = 0 if "'spawn' method" in str(error) else 2
        finally:
            os._exit(status)
    until = time.monotonic() + 30
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < until:
        time.sleep(0.05)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0), "the child hangs, or got another error"
    engine.close()


@pytest.mark.parametrize(
    "damage", [lambda content: content[:100], lambda content: content[:-9] + b"x" + content[-8:], lambda content: b""]
)
def test_damaged_kernel_cache_is_compiled_again(tmp_path, damage):
    """One small kernel, which uses the cache as the engine's kernels do."""
    (tmp_path / "kernels_here.py").write_text(
        "from numba import njit\nfrom range_kernels.cpu.kernel_cache import checked_cache\n"
        "@checked_cache\n@njit(cache=True)\ndef double(x):\n    return 2 * x\nprint(double(21), sum(double.stats.cache_hits.values()))"
    )
    paths = os.pathsep.join((str(tmp_path), str(ROOT / "kernels")))
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": paths}

    def run() -> str:
        command = [sys.executable, "-c", "import kernels_here"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()

    assert (run(), run()) == ("42 0", "42 1")
    for file in (tmp_path / "cache").rglob("*.nb[ci]"):
        file.write_bytes(damage(file.read_bytes()))
    assert (run(), run()) == ("42 0", "42 1")


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_killed_writers_leave_the_old_or_the_new_file():
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    command = [sys.executable, "-m", "tests.crash", "--kills", "15"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.count(": 0 wrong") == len(crash.WRITERS)


def recorded(tmp_path) -> Path:
    folder = tmp_path / "recording"
    shutil.copytree(data_folder("data/runs") / crash.RECORDED, folder)
    return folder


def test_recording_with_another_prompt_is_refused(tmp_path):
    folder = recorded(tmp_path)
    prompt = Prompt.load(folder / "prompt.json")
    prompt.replace(input_ids=[*prompt.input_ids[:-1], 5]).save(folder / "prompt.json")
    with pytest.raises(TraceError, match="reference.safetensors is of another prompt than prompt.json"):
        Recording.load(folder)


def test_recording_with_a_changed_record_is_refused(tmp_path):
    folder = recorded(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**record, "verdict": "bug"}))
    with pytest.raises(TraceError, match="record.json was damaged or changed"):
        Recording.load(folder)


def test_trace_with_changed_positions_is_refused(tmp_path):
    path = recorded(tmp_path) / "run.safetensors"
    content = path.read_bytes()
    positions = json.dumps(Trace.load(path).positions.tolist()).encode()
    changed = positions.replace(b"3, 4", b"3, 5", 1)
    assert content.count(positions) == 1
    assert changed != positions
    path.write_bytes(content.replace(positions, changed))
    with pytest.raises(TraceError, match=r"the metadata of .* was damaged or changed"):
        Trace.load(path)


def test_recording_does_not_replace_a_folder_with_other_files(llama, tmp_path):
    folder = recorded(tmp_path)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(TraceError, match=r"contains notes.txt, which is not part of a recording"):
        workbench.record("numba", llama, random_prompt(), folder)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(TraceError, match="the recording cannot be written"):
        workbench.record("numba", llama, random_prompt(), folder / "notes.txt" / "below")


def test_damaged_cached_model_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        folder.mkdir()
        (folder / "weights").write_bytes(b"0123456789")

    folder = cached_folder("small", make, {"of": "nothing"})
    os.utime(folder / "weights", (5, 5))  # another time, the same content
    assert cached_folder("small", make, {"of": "nothing"}) == folder
    assert len(made) == 1
    (folder / "weights").write_bytes(b"0123x56789")
    assert cached_folder("small", make, {"of": "nothing"}) == folder
    assert len(made) == 2
    assert (folder / "weights").read_bytes() == b"0123456789"


@pytest.mark.parametrize(
    "sizes",
    [{"crop_size": {"height": 10**6, "width": 10**6}}, {"size": {"shortest_edge": 10**6}, "do_center_crop": False}],
)
def test_image_processor_with_impossible_sizes_is_refused(tmp_path, sizes):
    from workbench.vision.processors import Processor

    model = workbench.load_model("digit-cards")
    for file in model.path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    settings = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, **sizes}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="1000000 x 1000000 pixels, over the limit"):
        Processor(tmp_path, model.config, False)
