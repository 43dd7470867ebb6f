"""References of many prompts, in files: the weights are read once for all prompts of a process, here or by Ray workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ModelError, PromptError, TraceError, reason
from ..models import load_model
from ..progress import Progress
from ..prompt import Prompt
from .floor_runs import reference_runs
from .noise_floor import floor_path
from .reference_cache import reference_pair
from .reference_pass import ReferencePass

TAPS = ("embed", "layers.*", "norm", "logits")


@dataclass
class ReferenceReport:
    """The outcome.

    Attributes:
        written: the trace files; the noise floor lies next to each.
        failed: path and reason of each prompt that could not be run.
    """

    written: list[Path] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{len(self.written)} written, {len(self.failed)} failed"


def write_references(
    model: str,
    prompts: Sequence[str | Path],
    folder: str | Path,
    dtype: str,
    *,
    taps: Sequence[str] = TAPS,
    device: str = "cpu",
    streamed: bool | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> ReferenceReport:
    """Write for every prompt the reference's float64 trace, and its noise floor in a dtype, to `folder`, named after the prompt's file.

    A prompt that cannot be run does not stop the others.

    Args:
        model: its name, for `load_model`.
        prompts: files that `Prompt.save` wrote, with different names.
        dtype: of the noise floors.
        taps: names or patterns.
        device, streamed: as for `check_engine`.
        workers: 0 to use this process only; else the number of Ray workers, each of which reads the weights once for its share.
        progress: called with the fraction done; without workers only.

    Raises:
        ValueError: `workers` is negative, or two prompts have the same name.
        ModelError: the model cannot be opened, or Ray is needed and not installed.
        TraceError: a file cannot be written.
    """
    paths = [Path(each) for each in prompts]
    twice = sorted({each.stem for each in paths if sum(other.stem == each.stem for other in paths) > 1})
    if workers < 0 or twice:
        raise ValueError(
            f"workers={workers}: give 0 or more" if workers < 0 else f"two prompts are named {twice[0]}: rename one"
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    if not workers:
        return _write(model, paths, Path(folder), dtype, taps, device, streamed, progress)
    try:
        import ray
    except ImportError as error:
        raise ModelError("workers need Ray: pip install 'embedding-workbench[ray]', or use no workers") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    write = ray.remote(num_cpus=1, num_gpus=1 if device.startswith("cuda") else 0)(_write)
    whole = [each.absolute() for each in paths]  # workers have their own working folders
    shares = [whole[number::workers] for number in range(workers)]
    target = Path(folder).expanduser().resolve()
    tasks = [write.remote(model, share, target, dtype, taps, device, streamed) for share in shares if share]
    report = ReferenceReport()
    for found in ray.get(tasks):
        report.written += found.written
        report.failed += found.failed
    return report


def _write(
    model: str,
    paths: Sequence[Path],
    folder: Path,
    dtype: str,
    taps: Sequence[str],
    device: str,
    streamed: bool | None,
    progress: Progress | None = None,
) -> ReferenceReport:
    exact, rounded = reference_pair(load_model(model), dtype, device, streamed)
    report = ReferenceReport()
    passes: list[ReferencePass] = []
    sources: dict[int, Path] = {}
    for path in paths:
        target = folder / f"{path.stem}.safetensors"
        try:
            what = ReferencePass(Prompt.load(path), taps, path=target)
            what.plan(exact)
            rounded.check(what.prompt)
        except (PromptError, TraceError, ValueError) as error:
            report.failed.append((str(path), reason(error)))
            continue
        passes.append(what)
        sources[id(what)] = path
    try:
        found = list(zip(passes, reference_runs(exact, rounded, passes, progress=progress), strict=True))
    except (ModelError, TraceError):  # of one prompt, such as NaN in its states: each is run alone, to find which
        found = []
        for what in passes:
            try:
                found += [(what, run) for run in reference_runs(exact, rounded, [what], progress=progress)]
            except (ModelError, TraceError) as error:
                report.failed.append((str(sources[id(what)]), reason(error)))
    for what, run in found:
        assert what.path is not None
        run.floor.save(floor_path(what.path, dtype))
        report.written.append(what.path)
    return report
