"""Precomputed features: folders, damaged images, resuming, Ray workers, and the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import workbench
from tests.conftest import IMAGES
from workbench.cli.main import main
from workbench.vision.feature_store import FeatureStore
from workbench.vision.precompute import compute_features, find_images
from workbench.vision.tower import load_vision_tower

pytestmark = pytest.mark.slow


@pytest.fixture
def album(tmp_path):
    """Five valid images in two folders, a damaged one, a truncated one, and a text file."""
    inner = tmp_path / "album" / "inner"
    inner.mkdir(parents=True)
    for number, path in enumerate(sorted(IMAGES.glob("*_*.png"))[:5]):
        shutil.copy(path, (inner if number % 2 else inner.parent) / f"{number}.png")
    (inner / "broken.png").write_bytes(b"not an image")
    whole = (inner.parent / "0.png").read_bytes()
    (inner / "cut.png").write_bytes(whole[: len(whole) // 2])
    (inner / "notes.txt").write_text("no image")
    return inner.parent


def test_damaged_images_are_reported_and_the_rest_computed(album, tmp_path, capsys):
    store = tmp_path / "store"
    assert main(["features", str(album), "--store", str(store)]) == 1
    output = capsys.readouterr()
    assert "5 computed, 0 found in the store, 2 failed" in output.out
    assert "inner/broken.png: " in output.err
    assert "is damaged or cut short" in output.err
    assert main(["features", str(album / "0.png"), "--store", str(store)]) == 0
    assert "0 computed, 1 found" in capsys.readouterr().out
    tower = load_vision_tower(workbench.load_model("digit-cards"))
    (kept,) = FeatureStore(store).features(tower, [album / "0.png"])
    assert torch.equal(kept.rows, tower.features([album / "0.png"])[0].rows)


def test_second_run_computes_only_missing_features(album, tmp_path):
    images, store = find_images([album]), str(tmp_path / "store")
    compute_features(images[:2], "digit-cards", store, progress=False)
    report = compute_features(images, "digit-cards", store, progress=False)
    assert (report.computed, report.found, len(report.failed)) == (3, 2, 2)


RUN_RAY = """
import json, sys
from workbench.vision.precompute import compute_features, find_images

report = compute_features(find_images([sys.argv[1]]), "digit-cards", sys.argv[2], workers=2, progress=False)
print("REPORT", json.dumps([report.computed, report.found, sorted(report.failed)]))
"""


def test_ray_workers_store_the_same_features(album, tmp_path):
    """In a process of its own: Ray hung when memory was short, and must then not take the other tests with it."""
    pytest.importorskip("ray")
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    alone = compute_features(find_images([album]), "digit-cards", here, progress=False)
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", RUN_RAY, str(album), there],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    computed, found, failed = json.loads(done.stdout.rsplit("REPORT", 1)[1].splitlines()[0])
    # Ray runs a batch again if its worker had to be restarted; what it had stored is then found.
    assert computed + found == alone.computed
    assert [tuple(each) for each in failed] == sorted(alone.failed)
    names = [{path.name for path in (tmp_path / store).glob("*/*.safetensors")} for store in ("here", "there")]
    assert names[0] == names[1]


def test_missing_paths_and_empty_folders_are_refused(tmp_path, capsys):
    assert main(["features", str(tmp_path / "none"), "--store", str(tmp_path / "s")]) == 2
    assert "is neither an image nor a folder" in capsys.readouterr().err
    assert main(["features", str(tmp_path), "--store", str(tmp_path / "s")]) == 2
    assert "no images (.png" in capsys.readouterr().err


def test_decompression_bombs_are_reported_as_failures(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    Image.new("1", (9_000, 9_000)).save(tmp_path / "large.png")
    report = compute_features(find_images([tmp_path]), "digit-cards", str(tmp_path / "s"), progress=False)
    assert report.computed == 0
    assert all("decompression bomb" in reason for _, reason in report.failed), report.failed
    assert len(report.failed) == 2
