"""Precompute features: run a tower on many images and store the results, in this process or in several with Ray Data.

Of an image that is already in the store only the bytes are read, so a run that was stopped can be started again and
continues.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ModelError, PromptError
from .feature_store import FeatureStore, read_once
from .tower import load_vision_tower

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass
class Report:
    """The outcome of one run.

    Attributes:
        computed: number of images whose features were computed.
        found: number of images whose features were in the store.
        failed: path and reason of each image that could not be used.
        seconds: time from the start of the first image to the end of the last one; the loading of towers is not
            included.
    """

    computed: int = 0
    found: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Images per second."""
        return (self.computed + self.found + len(self.failed)) / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return f"{self.computed} computed, {self.found} found in the store, {len(self.failed)} failed; {self.rate:.1f} images/s"


def find_images(names: Iterable[str | Path]) -> list[str]:
    """Return the given files and the images in the given folders and their subfolders, each once, in order.

    Raises:
        PromptError: a name is neither a file nor a folder, or no image was found.
    """
    found: dict[str, None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = (each for each in sorted(path.rglob("*")) if each.suffix.lower() in SUFFIXES and each.is_file())
            found |= {str(each): None for each in inside}
        elif path.is_file():
            found[str(path)] = None
        else:
            raise PromptError(f"{name} is neither an image nor a folder")
    if not found:
        raise PromptError(f"no images ({', '.join(SUFFIXES)}) in {', '.join(map(str, names))}")
    return list(found)


class Worker:
    """A tower and a store in one process; callable on batches of paths, as Ray Data requires.

    Args:
        model, device: for `load_vision_tower`.
        store, max_bytes: for `FeatureStore`.
        threads: number of torch threads of this process, or None to leave it.
    """

    def __init__(self, model: str, store: str, max_bytes: int | None, device: str, threads: int | None = None) -> None:
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.tower = load_vision_tower(model, device=device)
        self.store = FeatureStore(store, max_bytes)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Process the images at `batch["path"]`.

        Returns:
            lists of equal length: "path"; "outcome" ("found", "computed", or the reason of failure); "began" and
            "ended", the times of the whole batch in seconds since the epoch.
        """
        began = time.time()
        paths = [str(path) for path in batch["path"]]
        outcomes = [self._one(path) for path in paths]
        times = {"began": [began] * len(outcomes), "ended": [time.time()] * len(outcomes)}
        return {"path": paths, "outcome": outcomes, **times}

    def _one(self, path: str) -> str:
        try:
            content = read_once(path)
            (key,) = self.store.keys(self.tower, [content])
            if self.store.get(key) is not None:
                return "found"
            self.store.put(key, self.tower.features([content])[0])
            return "computed"
        except PromptError as error:  # only this image fails; the others go on
            return str(error)


def compute_features(
    images: Sequence[str],
    model: str,
    store: str,
    *,
    workers: int = 0,
    device: str = "cpu",
    max_bytes: int | None = None,
    batch: int = 16,
    progress: bool = True,
) -> Report:
    """Compute the features of images and put them into a store. An image that cannot be used does not stop the others.

    Args:
        images: paths of image files.
        model, device: for `load_vision_tower`.
        store, max_bytes: folder or URL, and size limit, for `FeatureStore`.
        workers: 0 to use this process only; else the number of Ray Data workers, on this machine or the cluster it is
            connected to.
        batch: number of images that a worker gets at a time.
        progress: show a progress bar.

    Raises:
        ValueError: `workers` is negative, or `batch` below 1.
        ModelError: the model or the store cannot be opened, or Ray is needed and not installed.
    """
    from tqdm.auto import tqdm

    if workers < 0 or batch < 1:
        raise ValueError(f"workers={workers}, batch={batch}: give 0 or more workers and a batch of at least one image")
    report = Report()
    batches = (
        _ray(images, model, store, workers, device, max_bytes, batch)
        if workers
        else _here(images, Worker(model, store, max_bytes, device), batch)
    )
    began, ended = float("inf"), 0.0
    with tqdm(total=len(images), unit="image", disable=not progress) as bar:
        for outcome in batches:
            began, ended = min(began, *outcome["began"]), max(ended, *outcome["ended"])
            for path, what in zip(outcome["path"], outcome["outcome"], strict=True):
                if what == "computed":
                    report.computed += 1
                elif what == "found":
                    report.found += 1
                else:
                    report.failed.append((str(path), str(what)))
                bar.update()
    report.seconds = ended - began
    return report


def _here(images: Sequence[str], worker: Worker, batch: int) -> Iterator[dict[str, list[Any]]]:
    for start in range(0, len(images), batch):
        yield worker({"path": list(images[start : start + batch])})


def _ray(
    images: Sequence[str], model: str, store: str, workers: int, device: str, max_bytes: int | None, batch: int
) -> Iterator[dict[str, Any]]:
    try:
        import ray
    except ImportError as error:
        raise ModelError("workers need Ray: pip install 'embedding-workbench[ray]', or use --workers 0") from error
    if "://" not in store:
        store = str(Path(store).expanduser().resolve())  # workers have their own working folders
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts images
    rows = [{"path": str(Path(path).absolute())} for path in images]
    blocks = max(workers, min(len(rows), 4 * workers, -(-len(rows) // batch)))
    data = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        Worker,
        fn_constructor_args=(model, store, max_bytes, device, 1),
        compute=ray.data.ActorPoolStrategy(size=workers),
        batch_size=batch,
        batch_format="numpy",
        num_gpus=1 if device.startswith("cuda") else 0,
        num_cpus=1,
    )
    yield from data.iter_batches(batch_size=None, batch_format="numpy")
