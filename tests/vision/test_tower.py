"""Only the vision bytes are read, from folders and over HTTP, sharded or not; errors name damaged files and tensors."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import workbench
from tests.vision.server import serve
from workbench import ModelError
from workbench.vision.tower import load_vision_tower
from workbench.vision.tower_weights import load_full

REMOTE = Path(__file__).parent / "remote_model"


@pytest.fixture(scope="module")
def cards():
    return workbench.load_model("digit-cards")


@pytest.fixture
def folder(cards, tmp_path):
    """digit-cards in a folder of symbolic links, whose files a test may replace."""
    for path in cards.path.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def whole(cards, tmp_path):
    """digit-cards in a single file, with vision tensors between language tensors."""
    target = tmp_path / "single"
    target.mkdir()
    for path in cards.path.iterdir():
        if "safetensors" not in path.name:
            shutil.copy(path, target)
    tensors = {}
    for shard in cards.path.glob("*.safetensors"):
        tensors |= load_file(shard)
    kept = {name: value for name, value in tensors.items() if "layers.2" not in name or "vision" in name}
    save_file(
        {name: value.contiguous() for name, value in kept.items()}, target / "model.safetensors", {"format": "pt"}
    )
    return target


def test_reads_the_vision_bytes_and_at_most_one_percent_more(cards):
    report = load_vision_tower(cards).report
    stored = (cards.path / "model-00001-of-00002.safetensors").stat().st_size
    assert report.tensor_bytes < stored
    assert report.bytes_read <= report.tensor_bytes * 1.01
    assert report.bytes_skipped > 500e6
    assert report.bytes_read + report.bytes_skipped == sum(f.stat().st_size for f in cards.path.glob("model-*"))
    assert report.peak_bytes < 200e6  # the language weights alone are 538 MB


def test_http_reads_only_the_vision_bytes_and_gives_equal_features(cards, shown):
    with serve(cards.path) as (address, log):
        far = load_vision_tower(address)
    near = load_vision_tower(cards)
    assert torch.equal(far.features(shown)[0].rows, near.features(shown)[0].rows)
    assert far.weights_digest == near.weights_digest
    vision = near.report.tensor_bytes
    assert sum(sent for name, sent in log["bytes"].items() if "safetensors" in name) <= vision * 1.01
    assert log["bytes"].get("model-00002-of-00002.safetensors", 0) <= 1
    assert log["requests"] < 30


def test_single_file_checkpoint_reads_only_the_vision_bytes(cards, whole, shown):
    tower = load_vision_tower(whole)
    assert tower.report.bytes_read <= tower.report.tensor_bytes * 1.02
    assert torch.equal(tower.features(shown)[0].rows, load_vision_tower(cards).features(shown)[0].rows)
    with serve(whole) as (address, log):
        load_vision_tower(address)
    assert log["bytes"]["model.safetensors"] == tower.report.bytes_read + 1  # one byte is read to learn the size


def test_features_equal_those_of_the_full_model(cards, shown):
    tower = load_vision_tower(cards)
    full = load_full(tower.config, cards.path, torch.float32)
    assert tower.check_parity(shown, full) == 0.0
    with torch.no_grad():
        full.model.multi_modal_projector.linear_2.bias += 0.01
    assert tower.check_parity(shown, full) == pytest.approx(0.01, rel=1e-3)


def test_empty_file_on_a_server_is_accepted(folder):
    (folder / "special_tokens_map.json").write_bytes(b"")
    with serve(folder) as (address, _):
        assert load_vision_tower(address).report.tensors == 89


def test_unknown_dtypes_and_devices_are_refused_by_name(cards):
    with pytest.raises(ValueError, match="dtype='bogus'"):
        load_vision_tower(cards, dtype="bogus")
    with pytest.raises(ModelError, match="device='bogus' is not a device"):
        load_vision_tower(cards, device="bogus")


def test_built_in_model_names_are_accepted():
    assert load_vision_tower("digit-cards").report.tensors == 89
    with pytest.raises(ModelError, match="has no vision or audio part"):
        load_vision_tower("smollm2-135m")


def test_requests_are_repeated_after_status_503(cards):
    with serve(cards.path, fail_first=2) as (address, _):
        assert load_vision_tower(address).report.tensors == 89


def test_server_without_range_requests_is_refused_before_download(cards):
    with (
        serve(cards.path, ranges=False) as (address, log),
        pytest.raises(ModelError, match="ignores range requests and would send the whole file"),
    ):
        load_vision_tower(address)
    assert log["bytes"].get("model-00002-of-00002.safetensors", 0) == 0


def test_truncated_response_is_refused(cards):
    with (
        serve(cards.path, cut=50_000) as (address, _),
        pytest.raises(ModelError, match=r"tokenizer.json cannot be read: RemoteProtocolError"),
    ):
        load_vision_tower(address)


def test_unreachable_server_raises_model_error():
    with pytest.raises(
        ModelError, match=r"http://127.0.0.1:9/config.json cannot be read: ConnectError.*Check the network"
    ):
        load_vision_tower("http://127.0.0.1:9")


def test_missing_folder_raises_model_error():
    with pytest.raises(ModelError, match="give a folder on this machine, the http"):
        load_vision_tower("/no/such/folder")


def test_language_model_without_tower_is_refused():
    with pytest.raises(ModelError, match=r"smollm2-135m' \(llama\) has no vision or audio part"):
        load_vision_tower(workbench.load_model("smollm2-135m"))


def test_index_with_a_missing_shard_is_refused(folder):
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"index.json names model-00001-of-00002.safetensors, which is missing"):
        load_vision_tower(folder)


def test_index_with_a_path_outside_the_folder_is_refused(folder):
    index = folder / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    stored["weight_map"]["vision_tower.embeddings.patch_embedding.bias"] = "../../etc/passwd"
    index.unlink()
    index.write_text(json.dumps(stored))
    with pytest.raises(ModelError, match="must name files of this folder"):
        load_vision_tower(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda data: data[: len(data) // 2],
            r"model-00001.* is cut short: tensor '.*' ends at byte \d+, the file at \d+",
        ),
        (lambda data: data[:5], "is cut short: 5 bytes are not a safetensors file"),
        (lambda data: b"\xff" * 8 + data[8:], "its header claims 18446744073709551615 bytes"),
        (lambda data: data[:8] + b"{" * (len(data) - 8), "has a damaged header"),
        (lambda data: data.replace(b'"BF16"', b'"Q4_K"', 1), "has dtype 'Q4_K', which is not supported here"),
        (
            lambda data: data.replace(b'"shape":[', b'"shape":[9', 1),
            r"tensor '.*' of .*model-00001.*is \d+ bytes, but its header gives",
        ),
    ],
)
def test_damaged_shards_are_refused_by_name(folder, damage, message):
    shard = folder / "model-00001-of-00002.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(damage(data))
    with pytest.raises(ModelError, match=message):
        load_vision_tower(folder)


def test_missing_and_misshapen_tensors_are_refused_by_name(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    shard.unlink()
    index = folder / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    index.unlink()

    def save(tensors):
        save_file(tensors, shard, {"format": "pt"})
        names = {name: file for name, file in stored["weight_map"].items() if "language" in name}
        index.write_text(json.dumps({"weight_map": names | dict.fromkeys(tensors, shard.name)}))

    lost = "multi_modal_projector.linear_1.weight"
    save({name: value for name, value in tensors.items() if name != lost})
    with pytest.raises(ModelError, match=rf"lacks 1 vision tensors.*{lost}"):
        load_vision_tower(folder)
    save(tensors | {lost: tensors[lost][:, :-1].contiguous()})
    with pytest.raises(ModelError, match=rf"1 have another shape.*{lost}"):
        load_vision_tower(folder)


def test_bin_checkpoints_load_as_plain_tensors_or_are_refused(small_vlm, tmp_path, images):
    model = small_vlm("llava")
    for path in model.path.iterdir():
        if "safetensors" not in path.name:
            shutil.copy(path, tmp_path)
    torch.save(load_file(model.path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    near = load_vision_tower(model).features(images)[0].rows
    assert torch.equal(load_vision_tower(tmp_path).features(images)[0].rows, near)
    with serve(tmp_path) as (address, _), pytest.raises(ModelError, match="is a pickle, which cannot be read in parts"):
        load_vision_tower(address)

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"vision_tower.weight": Evil()}))
    with pytest.raises(ModelError, match="is not a plain file of tensors"):
        load_vision_tower(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def remote(small_vlm, tmp_path):
    """A model folder with its own modeling file."""
    shutil.copytree(REMOTE, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_vlm("paligemma").path / name, tmp_path)
    transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "vision.weight": (32, 3 * 14 * 14),
        "vision.bias": (32,),
        "bridge.weight": (config["text_config"]["hidden_size"], 32),
    }
    tensors = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    text = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config["text_config"]))
    tensors |= {f"language_model.{name}": value.contiguous() for name, value in text.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path, tensors


def test_remote_code_runs_only_with_trust_remote_code(remote, images):
    folder, tensors = remote
    with pytest.raises(
        ModelError,
        match=r"runs its own Python code: configuration_tiny.py, modeling_tiny.py in .*trust_remote_code=True",
    ):
        load_vision_tower(folder)
    tower = load_vision_tower(folder, trust_remote_code=True)
    assert tower.report.tensors == 3
    pixels = tower.process(images)["pixel_values"]
    patches = pixels.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).reshape(2, 4, -1)
    wanted = (patches @ tensors["vision.weight"].T + tensors["vision.bias"]) @ tensors["bridge.weight"].T
    for features, rows in zip(tower.features(images), wanted, strict=True):
        torch.testing.assert_close(features.rows, rows)
