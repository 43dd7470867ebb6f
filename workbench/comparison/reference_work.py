"""The runs of the reference for one prompt: their states are compared as they come, so that only the float64 run's are kept."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checksums import checksum
from ..engines.transformers.layer_progress import LayerProgress
from ..engines.transformers.reference import TransformersReference
from ..engines.transformers.routers import Exchange, RouterRead, RouterWatch, has_routers
from ..trace import Trace
from ..trace.files import TraceWriter, raw_bytes
from .expert_choices import undecided_choices
from .noise_floor import FloorMeasurement, NoiseFloor
from .reference_pass import ReferencePass, RunningTrace

FLOOR_RUNS = 4
"""Runs in the engine's dtype from which a noise floor is measured."""
EXACT, EXCHANGED = "float64", "exchanged"


@dataclass(frozen=True)
class ReferenceRun:
    """The outcome of the runs.

    Attributes:
        trace: the float64 trace.
        routers: what the routers did in that run, by layer (empty without experts).
        floor: the noise floor in the engine's dtype.
    """

    trace: Trace
    routers: Mapping[int, RouterRead]
    floor: NoiseFloor


class ReferenceWork:
    """The runs of one pass.

    Attributes:
        floor_runs: how many runs measure the floor.
        is_known: whether the float64 trace is known, and only the floor is measured.
        jobs: names of the runs that can be made together: the float64 one, those in the engine's dtype, and, with experts, the one in
            which undecided experts are exchanged.
    """

    def __init__(
        self,
        exact: TransformersReference,
        rounded: TransformersReference,
        what: ReferencePass,
        known: tuple[Trace, Mapping[int, RouterRead]] | None,
        floor_runs: int = FLOOR_RUNS,
    ) -> None:
        self.floor_runs = floor_runs
        self.is_known = known is not None
        self._pass, self._known = what, known
        self._plan = what.plan(exact)
        rounded.check(what.prompt)  # rows may overflow in its dtype
        self._running = RunningTrace(self._plan, what.provenance(exact))
        self._writer: TraceWriter | None = None
        self._measurement = FloorMeasurement(self._running if known is None else known[0])
        self._measurement.begin(RunningTrace(self._plan, what.provenance(rounded)))
        self._exact_watch, self._watch = RouterWatch(), RouterWatch()
        self.exchanges = _Exchanges(self)
        names = [*([] if self.is_known else [EXACT]), *(f"seed {seed}" for seed in range(floor_runs))]
        self._dtype = str(rounded.dtype).removeprefix("torch.")
        self.jobs = [*names, *([EXCHANGED] if has_routers(rounded.network) else [])]
        self._reached = {job: LayerProgress() for job in self.jobs}
        self._complete = 0
        self._together = False
        self._states: dict[str, torch.Tensor] = {}
        self._saved_taps: set[str] = set()
        self._measured: collections.Counter[str] = collections.Counter()

    @property
    def routers(self) -> Mapping[int, RouterRead]:
        """What the routers did in the float64 run, as far as it has come."""
        return self._known[1] if self._known is not None else self._exact_watch.passes[-1]

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Write the float64 run's states to the pass's file, if it has one; afterwards they are read from there."""
        path, plan = self._pass.path, self._plan
        if path is None or self.is_known:
            yield
            return
        with TraceWriter(path, plan.shapes, plan.dtype, plan.positions, self._running.provenance) as self._writer:
            yield
        self._writer, self._running.states = None, Trace.load(path)

    def run_exact(self, engine: TransformersReference) -> None:
        """The float64 run."""
        with engine.watching(self._exact_watch):
            self._pass.run(engine, self._plan, 0, self._keep)

    def _keep(self, tap: str, state: torch.Tensor) -> None:
        if self._writer is not None:
            self._writer.write(tap, state)
        if self._writer is None or self._together:  # else the floor's runs read the file
            self._running.states[tap] = state.cpu()

    def run_rounded(self, engine: TransformersReference, seed: int) -> None:
        """A run in the engine's dtype."""

        def add(tap: str, state: torch.Tensor) -> None:
            self._measurement.add_state(tap, state.cpu())
            self._measured[tap] += 1

        with engine.watching(self._watch):
            self._pass.run(engine, self._plan, seed, add)

    def run_exchanged(self, engine: TransformersReference) -> None:
        """A run in which undecided experts are exchanged."""

        def add(tap: str, state: torch.Tensor) -> None:
            self._measurement.add_state(tap, state.cpu(), exchanged=True)
            self._measured[tap] += 1

        with engine.watching(RouterWatch(self.exchanges)):
            self._pass.run(engine, self._plan, 0, add)

    def run_job(
        self, job: str, exact: TransformersReference, rounded: TransformersReference, arrive: Callable[[str], None]
    ) -> None:
        """Make one of `jobs`, as one of several runs that read streamed weights together."""
        self._together = True
        reached = self._reached[job]
        if reached.state is not None:  # of an interrupted run
            reached.state = reached.state.to(rounded.device)
        engine = (exact if job == EXACT else rounded).one_of_many(arrive, reached)
        if job == EXACT:
            self.run_exact(engine)
        elif job == EXCHANGED:
            self.run_exchanged(engine)
        else:
            self.run_rounded(engine, int(job.split()[1]))

    @property
    def what(self) -> dict[str, Any]:
        """JSON values that name what is run."""
        own = self._pass.states
        return {
            "reference": self._running.provenance | {"words": None},
            "dtype": self._dtype,
            "taps": {tap: list(shape) for tap, shape in self._plan.shapes.items()},
            "positions": self._plan.positions.tolist(),
            "jobs": self.jobs,
            "states": None if own is None else {tap: checksum(raw_bytes(own[tap])) for tap in own},
        }

    @property
    def taps(self) -> list[str]:
        """The taps that are traced."""
        return list(self._plan.shapes)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._pass.prompt)

    @property
    def complete(self) -> int:
        """Number of layers that all jobs have finished."""
        return self._complete

    def layer_done(self) -> None:
        """Note that all jobs have gone through the same layers."""
        reached = {each.done for each in self._reached.values()}
        if len(reached) == 1:
            (self._complete,) = reached
            self._states = {job: each.state for job, each in self._reached.items() if each.state is not None}
        if self._writer is not None:  # states that are in the file, and kept for the next call, need no memory
            runs = len(self.jobs) - 1
            keeps = self.resumable
            for tap in [tap for tap in self._running.states if self._measured[tap] >= runs]:
                if tap in self._saved_taps or not keeps:
                    self._running.states.pop(tap)

    @property
    def resumable(self) -> bool:
        """Whether the runs can go on from the states of the last layer that all have finished."""
        return self._complete > 0 and all(each.fault is None for each in self._reached.values())

    def save(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
        """What must be kept to go on after the last layer that all jobs have finished: states, new traced states, other values."""
        done = [tap for tap in self._plan.shapes if layer_of(tap) < self._complete]
        new = {} if self.is_known else {tap: self._running[tap] for tap in done if tap not in self._saved_taps}
        self._saved_taps |= set(new)
        tensors = {f"state {job}": state for job, state in self._states.items()}
        errors, rest = self._measurement.so_far(done)
        tensors |= {f"error {tap}": error for tap, error in errors.items()}
        reads = {} if self.is_known else {EXACT: self._exact_watch.passes[-1]}
        reads |= {f"seed {seed}": read for seed, read in enumerate(self._watch.passes)}
        for job, read in reads.items():
            for layer, router in read.items():
                if layer < self._complete:
                    parts = {"scores": router.scores, "chosen": router.chosen, "weights": router.weights}
                    tensors |= {f"router {job} {layer} {n}": each for n, each in parts.items() if each is not None}
        widths = {job: each.width for job, each in self._reached.items()}
        return tensors, new, {"complete": self._complete, "widths": widths, **rest}

    def go_on(
        self, tensors: Mapping[str, torch.Tensor], taps: Mapping[str, torch.Tensor], rest: Mapping[str, Any]
    ) -> None:
        """Begin where runs were interrupted, with what `save` returned; inside `writing`, before any job runs."""
        self._complete = rest["complete"]
        for tap, state in taps.items():
            self._saved_taps.add(tap)
            self._keep(tap, state)
        self._measured.update(dict.fromkeys(taps, len(self.jobs)))
        self._measurement.go_on({tap: tensors[f"error {tap}"] for tap in rest["typical"]}, rest)
        for job, reached in self._reached.items():
            state = tensors[f"state {job}"].clone()  # aligned as torch allocates: products may round otherwise
            reached.done, reached.skipped, reached.width = self._complete, self._complete, rest["widths"][job]
            reached.state = self._states[job] = state
        for name in tensors:
            if name.startswith("router ") and name.endswith(" chosen"):
                job, layer = name.removeprefix("router ").removesuffix(" chosen").rsplit(" ", 1)
                base = f"router {job} {layer}"
                read = RouterRead(tensors.get(f"{base} scores"), tensors[name], tensors[f"{base} weights"])
                watch, at = (self._exact_watch, 0) if job == EXACT else (self._watch, int(job.split()[1]))
                watch.earlier.setdefault(at, {})[int(layer)] = read

    def result(self) -> ReferenceRun:
        choices, _ = undecided_choices(self.routers, self._watch.passes)
        floor = self._measurement.floor(choices)
        return ReferenceRun(self.trace(), self.routers, floor)

    def trace(self) -> Trace:
        """The float64 trace."""
        return self._running.trace() if self._known is None else self._known[0]


class _Exchanges(Mapping[int, Exchange]):
    """The exchanges of a pass by layer, found when a layer needs them: the other runs have gone through it then."""

    def __init__(self, work: ReferenceWork) -> None:
        self._work = work

    def _all(self, layers: Sequence[int]) -> dict[int, Exchange]:
        routers = {layer: self._work.routers[layer] for layer in layers if layer in self._work.routers}
        return undecided_choices(routers, self._work._watch.passes)[1]

    def __getitem__(self, layer: int) -> Exchange:
        return self._all([layer])[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._all(list(self._work.routers)))

    def __len__(self) -> int:
        return len(self._all(list(self._work.routers)))


def layer_of(tap: str) -> int:
    """The number of the layer after which a tap is known: -1 for `embed`, a number above all layers for norm and logits."""
    if tap == "embed":
        return -1
    kind, _, rest = tap.partition(".")
    if kind == "layers":
        return int(rest.partition(".")[0])
    return int(rest) - 1 if kind == "depth" else 1 << 30
