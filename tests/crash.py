"""Kill every writer at random moments, and let its disk be full: `python -m tests.crash --kills 200`.

After each kill the file must be the old one or a new one, whole. Children are forked, so a kill costs milliseconds.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from workbench import ModelError, Prompt, PromptError, TraceError
from workbench.atomic_write import atomic_folder
from workbench.comparison.noise_floor import NoiseFloor
from workbench.package_data import data_folder
from workbench.recording import Recording
from workbench.trace import Trace
from workbench.trace.files import TraceWriter
from workbench.vision.architectures import Features
from workbench.vision.feature_store import FeatureStore

RECORDED = "digit-cards-turbomind-h100"
KEY = "cd" * 32


@dataclass(frozen=True)
class Writer:
    """A writer: `write(folder, version)` writes version 0 or 1; `read(folder)` returns the version that it finds, or raises."""

    name: str
    write: Callable[[Path, int], object]
    read: Callable[[Path], int]


def prompt(version: int) -> Prompt:
    return Prompt([10 + version] * 3000, [torch.full((2000, 64), float(version))], [(2, 2002)])


def read_prompt(folder: Path) -> int:
    found = Prompt.load(folder / "p.json")
    assert found.input_ids[0] - 10 == found.input_embeddings[0].mean().item(), "ids and rows of two prompts"
    return found.input_ids[0] - 10


def write_trace(folder: Path, version: int) -> None:
    provenance = {
        **Trace.load(data_folder("data/runs") / RECORDED / "run.safetensors").provenance,
        "dtype": "float32",
        "tokens": 500,
        "words": ["word"] * 500,
        "ranges": [],
    }
    with TraceWriter(
        folder / "t.safetensors", {"embed": (500, 64)}, torch.float32, torch.arange(500), provenance
    ) as writer:
        writer.write("embed", torch.full((500, 64), float(version)))


def read_trace(folder: Path) -> int:
    return int(Trace.load(folder / "t.safetensors")["embed"].mean())


def write_floor(folder: Path, version: int) -> None:
    floor = NoiseFloor.load(data_folder("data/runs") / RECORDED / "floor.safetensors")
    errors = {tap: torch.full_like(error, float(version)) for tap, error in floor.errors.items()}
    NoiseFloor(errors, floor.digests, floor.positions, floor.provenance, floor.typical).save(folder / "f.safetensors")


def read_floor(folder: Path) -> int:
    return int(next(iter(NoiseFloor.load(folder / "f.safetensors").errors.values()))[0])


def write_entry(folder: Path, version: int) -> None:
    FeatureStore(folder / "store").put(KEY, Features(torch.full((500, 64), float(version))))


def read_entry(folder: Path) -> int:
    found = FeatureStore(folder / "store").get(KEY)
    assert found is not None, "the entry is damaged"
    return int(found.rows.mean())


def write_recording(folder: Path, version: int) -> None:
    """As `record` does: all files into a new folder that takes the place of the old one."""
    source = folder.parent / f"recording-{version}"
    with atomic_folder(folder / "recording") as work:
        for file in source.iterdir():
            shutil.copy(file, work)


def read_recording(folder: Path) -> int:
    recording = Recording.load(folder / "recording")
    found = recording.prompt.input_ids[0] % 2
    assert {path.name for path in (folder / "recording").iterdir()} == {
        path.name for path in (folder.parent / f"recording-{found}").iterdir()
    }
    return found


WRITERS = (
    Writer("prompt", lambda folder, version: prompt(version).save(folder / "p.json"), read_prompt),
    Writer("trace", write_trace, read_trace),
    Writer("floor", write_floor, read_floor),
    Writer("entry", write_entry, read_entry),
    Writer("recording", write_recording, read_recording),
)


def prepare(base: Path) -> None:
    """Make two recordings that differ in their prompts (and, by their digests, in everything else)."""
    original = data_folder("data/runs") / RECORDED
    for version in range(2):
        target = base / f"recording-{version}"
        target.mkdir()
        loaded = Recording.load(original)
        ids = [(loaded.prompt.input_ids[0] // 2) * 2 + version, *loaded.prompt.input_ids[1:]]
        changed = loaded.prompt.replace(input_ids=ids)
        changed.save(target / "prompt.json")
        for name, trace in (("reference", loaded.reference), ("run", loaded.run)):
            states = {tap: trace[tap] for tap in list(trace)[:2]}
            shapes = {tap: (state.shape[0], state.shape[1]) for tap, state in states.items()}
            provenance = {**trace.provenance, "prompt": changed.digest}
            dtype = next(iter(states.values())).dtype
            with TraceWriter(target / f"{name}.safetensors", shapes, dtype, trace.positions, provenance) as writer:
                for tap, state in states.items():
                    writer.write(tap, state)
        floor = loaded.floor
        provenance = {**floor.provenance, "prompt": changed.digest}
        NoiseFloor(floor.errors, floor.digests, floor.positions, provenance, floor.typical).save(
            target / "floor.safetensors"
        )
        shutil.copy(original / "record.json", target)


def kill_writers(writer: Writer, base: Path, kills: int, dice: random.Random) -> tuple[int, list[str]]:
    """Kill a child that writes versions 0 and 1 in turn; return how many kills were survived and what was wrong."""
    folder, wrong = base / writer.name, []
    folder.mkdir()
    began = time.monotonic()
    writer.write(folder, 0)
    once = time.monotonic() - began
    for number in range(kills):
        child = os.fork()
        if not child:
            try:
                for step in range(10_000):
                    writer.write(folder, (step + number) % 2)
            finally:
                os._exit(1)
        time.sleep(dice.uniform(0, 4 * once))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            assert writer.read(folder) in (0, 1)
        except Exception as error:
            wrong.append(f"{writer.name}, kill {number}: {type(error).__name__}: {error}")
    left = sum(1 for path in folder.rglob("*") if ".tmp" in path.name or ".making" in path.name)
    return left, wrong


def fill_disks(writer: Writer, base: Path, times: int, dice: random.Random) -> list[str]:
    """Let every write above a random size fail, as on a full disk; the old version must stay, and the error be the project's."""
    folder, wrong = base / writer.name, []
    for number in range(times):
        before = writer.read(folder)
        child = os.fork()
        if not child:
            status = 2
            try:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                limit = dice.randrange(0, 20_000)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                writer.write(folder, 1 - before)
                status = 0
            except (PromptError, ModelError, TraceError, OSError):
                status = 1
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        status = os.waitstatus_to_exitcode(ended)
        dice.random()
        try:
            assert status in (0, 1), f"another error, or a crash ({status})"
            assert writer.read(folder) == (before if status else 1 - before)
        except Exception as error:
            wrong.append(f"{writer.name}, full disk {number}: {type(error).__name__}: {error}")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="kills, and full disks, per writer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    dice, failed = random.Random(options.seed), []
    with tempfile.TemporaryDirectory(prefix="crash-") as name:
        prepare(Path(name))
        for writer in WRITERS:
            left, wrong = kill_writers(writer, Path(name), options.kills, dice)
            wrong += fill_disks(writer, Path(name), options.kills, dice)
            print(
                f"{writer.name:10} {options.kills} kills, {options.kills} full disks: {len(wrong)} wrong ({left} temporary files left)"
            )
            failed += wrong
    print("\n".join(failed[:20]) or "nothing was wrong")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
