"""The feature store returns the tower's features for the same image and tower only, despite killed writers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid

import numpy as np
import pytest
import torch
from PIL import Image

import workbench
from workbench.vision.feature_store import FeatureStore, content_digest
from workbench.vision.images import FORMATS, ImageError, open_image
from workbench.vision.tower import load_vision_tower


@pytest.fixture(scope="module")
def tower():
    return load_vision_tower(workbench.load_model("digit-cards"))


def counted(tower, monkeypatch):
    """A list that grows by one entry whenever the tower runs."""
    runs = []
    original = type(tower).run
    monkeypatch.setattr(type(tower), "run", lambda self, processed: runs.append(1) or original(self, processed))
    return runs


@pytest.mark.parametrize("kind", ["folder", "file", "memory"])
def test_hit_skips_the_tower_and_returns_equal_features(kind, tower, shown, tmp_path, monkeypatch):
    url = {"folder": str(tmp_path), "file": f"file://{tmp_path}/x", "memory": f"memory://{uuid.uuid4()}"}[kind]
    runs, store = counted(tower, monkeypatch), FeatureStore(url)
    first = store.features(tower, shown)
    again = FeatureStore(url).features(tower, [shown[1], shown[0]])
    assert len(runs) == 1
    for made, kept in zip(first, reversed(again), strict=True):
        assert torch.equal(made.rows, kept.rows)
        assert (made.grid, made.tiles, made.rows.dtype) == (kept.grid, kept.tiles, kept.rows.dtype)
    assert len(store) == 2
    assert store.stats.misses == 2


def test_only_missing_images_are_computed(tower, shown, tmp_path, monkeypatch):
    runs, store = counted(tower, monkeypatch), FeatureStore(tmp_path)
    store.features(tower, shown[:1])
    both = store.features(tower, shown)
    assert len(runs) == 2
    assert torch.equal(both[1].rows, tower.features(shown[1:])[0].rows)
    assert (store.stats.hits, store.stats.misses) == (1, 2)


def test_key_depends_on_image_dtype_tower_and_settings(tower, shown, tmp_path, small_vlm):
    store = FeatureStore(tmp_path)
    (key,) = store.keys(tower, shown[:1])
    image = Image.open(shown[0])
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    others = {*store.keys(tower, [changed]), *store.keys(tower, [image]), *store.keys(tower, shown[1:])}
    half = load_vision_tower(workbench.load_model("digit-cards"), dtype="bfloat16")
    others |= {*store.keys(half, shown[:1]), *store.keys(load_vision_tower(small_vlm("llava")), shown[:1])}
    assert len(others | {key}) == 6
    before, tower.processor.__dict__["settings"] = tower.processor.settings, {"image_mean": [0.1]}
    fingerprint = tower.__dict__.pop("fingerprint")
    assert store.keys(tower, shown[:1]) != [key]
    tower.processor.__dict__["settings"], tower.__dict__["fingerprint"] = before, fingerprint
    assert store.keys(tower, shown[:1]) == [key]


def test_deepstack_and_tiles_round_trip(small_vlm, images, tmp_path):
    for name in ("qwen3_vl", "idefics3"):
        own = load_vision_tower(small_vlm(name))
        store = FeatureStore(tmp_path)
        made, kept = store.features(own, images), FeatureStore(tmp_path).features(own, images)
        for a, b in zip(made, kept, strict=True):
            assert torch.equal(a.rows, b.rows)
            assert (a.grid, a.tiles) == (b.grid, b.tiles)
            assert (a.deepstack is None) == (b.deepstack is None)
            assert a.deepstack is None or torch.equal(a.deepstack, b.deepstack)


def test_onevision_stores_single_and_multi_image_features_separately(small_vlm, images, tmp_path):
    own, store = load_vision_tower(small_vlm("llava_onevision")), FeatureStore(tmp_path)
    alone = store.features(own, images[:1])[0].rows
    together = store.features(own, images)
    assert len(alone) != len(together[0].rows)
    for kept, made in zip(store.features(own, images), own.features(images), strict=True):
        assert torch.equal(kept.rows, made.rows)


def test_damaged_entries_are_recomputed(tower, shown, tmp_path):
    store = FeatureStore(tmp_path)
    (made,) = store.features(tower, shown[:1])
    (path,) = tmp_path.glob("*/*.safetensors")
    for damage in (b"", b"short", path.read_bytes()[:-7], b"\xff" * 300):
        path.write_bytes(damage)
        assert torch.equal(store.features(tower, shown[:1])[0].rows, made.rows)
    assert store.stats.damaged == 4
    assert store.get(path.stem) is not None


def test_eviction_drops_the_least_recently_used_entries(tower, shown, tmp_path):
    images = [Image.new("RGB", (8, 8), (number * 20, 0, 0)) for number in range(8)]
    size = 49 * 576 * 4
    store = FeatureStore(tmp_path, max_bytes=5 * (size + 1000))
    (first,) = store.keys(tower, images[:1])
    for number, image in enumerate(images):
        store.features(tower, [image])
        os.utime(next(tmp_path.glob(f"*/{store.keys(tower, [image])[0]}*")), (1000 + number, 1000 + number))
        if number == 3:
            assert store.get(first) is not None  # used: now the most recent
    store.evict()
    assert store.bytes <= store.max_bytes
    assert store.get(first) is not None
    assert store.get(store.keys(tower, images[1:2])[0]) is None
    assert store.stats.evicted > 0
    with pytest.raises(ValueError, match="max_bytes=0"):
        FeatureStore(tmp_path, max_bytes=0)


WRITER = """
import sys, torch
from workbench.vision.architectures import Features
from workbench.vision.feature_store import FeatureStore
store = FeatureStore(sys.argv[1])
print("ready", flush=True)
number = 0
while True:
    number += 1
    store.put(f"{number % 40:064x}", Features(torch.full((2000, 256), float(number % 40))))
"""


def test_killed_writers_leave_no_partial_entries(tmp_path):
    """Writers are killed at random times; meanwhile and afterwards a reader finds only complete, correct entries."""
    store = FeatureStore(tmp_path)

    def whole():
        found = 0
        for number in range(40):
            kept = store.get(f"{number:064x}")
            if kept is not None:
                found += 1
                assert kept.rows.shape == (2000, 256)
                assert bool((kept.rows == float(number)).all())
        return found

    for round_number in range(3):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for writer in writers:
            assert writer.stdout.readline().strip() == "ready"
        until = time.monotonic() + 0.15 + 0.15 * round_number
        while time.monotonic() < until:
            whole()
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait()
        whole()
    assert whole() > 0
    assert store.stats.damaged == 0


def test_old_temporary_files_of_killed_writers_are_deleted(tower, shown, tmp_path):
    store = FeatureStore(tmp_path, max_bytes=10**9)
    store.features(tower, shown[:1])
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    old, young = (folder / f".{folder.name}{letter * 62}.safetensors.1.{'f' * 16}.tmp" for letter in "ab")
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    store.evict()
    assert not old.exists()
    assert young.exists()
    assert len(store) == 1


def test_invalid_stores_and_images_are_refused(tower, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(workbench.ModelError, match="cannot be created"):
        FeatureStore(tmp_path / "file")
    with pytest.raises(workbench.ModelError, match="nosuch"):
        FeatureStore("nosuch://bucket")
    with pytest.raises(workbench.PromptError, match="missing.png does not exist"):
        content_digest(tmp_path / "missing.png")
    with pytest.raises(workbench.PromptError, match="is not an image"):
        content_digest(7)


def test_eviction_keeps_files_of_other_programs(tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / ".git").mkdir()
    theirs = [tmp_path / "llama" / "model.safetensors", tmp_path / "llama" / ".env"]
    for path in theirs:
        path.write_bytes(b"x" * 5000)
        os.utime(path, (1000, 1000))
    store = FeatureStore(tmp_path, max_bytes=3000)
    store.evict()
    assert all(path.exists() for path in theirs)
    assert len(store) == 0


def test_content_digest_depends_on_the_palette():
    first = Image.new("P", (4, 4))
    second = first.copy()
    first.putpalette([0, 0, 0] * 256)
    second.putpalette([250, 0, 0] * 256)
    assert content_digest(first) != content_digest(second)


def test_16_bit_images_are_scaled_to_8_bits(tmp_path):
    eight = Image.linear_gradient("L")
    sixteen = Image.fromarray(np.asarray(eight).astype(np.uint16) * 257)
    shown, wide = (np.asarray(open_image(each)).astype(int) for each in (eight, sixteen))
    assert abs(shown - wide).max() <= 1
    with pytest.raises(workbench.PromptError, match="mode 'F'"):
        open_image(Image.new("F", (3, 3)))


_POSTSCRIPT = b"""%%!PS-Adobe-3.0 EPSF-3.0
%%%%BoundingBox: 0 0 10 10
%%%%EndComments
(%s) deletefile (%s) (w) file dup (hello) writestring closefile showpage
%%%%EOF
"""


@pytest.mark.parametrize("opened_by_caller", [False, True], ids=["path", "PIL image"])
def test_postscript_named_png_is_refused_and_not_run(tmp_path, opened_by_caller):
    precious, made, image = tmp_path / "precious", tmp_path / "made", tmp_path / "cat.png"
    precious.write_text("kept")
    image.write_bytes(_POSTSCRIPT % (bytes(precious), bytes(made)))
    with pytest.raises(ImageError, match=r"cat\.png.*PNG, JPEG, WEBP, BMP, GIF"):
        open_image(Image.open(image) if opened_by_caller else image)
    assert precious.read_text() == "kept"
    assert not made.exists()


def test_image_formats_outside_the_list_are_refused(tmp_path):
    Image.init()
    image = Image.new("RGB", (8, 8), "red")
    for name in sorted(set(Image.SAVE) - {*FORMATS, "MPO"}):
        other, path = tmp_path / f"image.{name.lower()}", tmp_path / f"{name}.png"
        try:
            image.save(other, name)  # not to `path`: saving as SPIDER makes its suffix SPIDER's for the whole process
        except (OSError, ValueError, KeyError, AttributeError):  # encoders that lack a library or do not take RGB
            continue
        other.rename(path)
        with pytest.raises(ImageError, match="by its content"):
            open_image(path)


@pytest.mark.parametrize("name", FORMATS)
def test_listed_formats_open_under_any_file_name(tmp_path, name):
    path = tmp_path / "image.dat"
    Image.new("RGB", (8, 8), "red").save(path, name)
    assert open_image(path).size == (8, 8)
    assert open_image(Image.open(path)).size == (8, 8)


def test_key_depends_on_settings_outside_the_vision_config(tower, shown, tmp_path):
    store, before = FeatureStore(tmp_path), tower.config.vision_feature_layer
    (key,) = store.keys(tower, shown[:1])
    kept = tower.__dict__.pop("fingerprint")
    tower.config.vision_feature_layer = -2
    assert store.keys(tower, shown[:1]) != [key]
    tower.config.vision_feature_layer, tower.__dict__["fingerprint"] = before, kept
