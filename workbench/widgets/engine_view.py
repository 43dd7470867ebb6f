"""A live view of the Numba engine: requests, KV cache, prefix cache, speed, and the last steps of its schedule."""

from __future__ import annotations

import threading
from html import escape

import ipywidgets as w

from ..engines.numba_engine.engine import NumbaEngine
from ..engines.numba_engine.stats import EngineStats
from ..plots.figure import Figure
from ..plots.schedule import schedule_figure
from . import components
from .view import Composite

_TEAL, _AMBER, _SLATE, _EMPTY = "#00798c", "#edae49", "#b0bec5", "#ececea"


class EngineView(Composite):
    """A view that polls the engine in a thread from `open` to `stop`, and redraws only what has changed.

        with EngineView(engine) as live:
            display(live)
            ...  # send requests to the engine, from any thread

    Args:
        seconds: time between two polls.
        steps: how many of the last steps are drawn; 0 omits the figure of the schedule.

    Raises:
        TypeError: the engine is not a `NumbaEngine`. ValueError: `seconds` or `steps` is out of range.
    """

    def __init__(self, engine: NumbaEngine, seconds: float = 0.25, steps: int = 48) -> None:
        if not isinstance(engine, NumbaEngine):
            raise TypeError(
                f"EngineView shows the numba engine, not {type(engine).__name__}: open_engine('numba', ...)"
            )
        if seconds <= 0 or steps < 0:
            raise ValueError(f"seconds={seconds}, steps={steps}: give seconds above 0 and steps of at least 0")
        self.engine, self.seconds, self.steps = engine, seconds, steps
        self.numbers, self.image, self.error = w.HTML(), components.FigureImage(), w.HTML()
        self.view = w.VBox([self.error, self.numbers] + ([self.image] if steps else []))
        self.view.add_class("workbench-view").add_class("workbench-engine")
        self._shown: EngineStats | None = None
        self._drawn_steps = -1
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.refresh()

    def __enter__(self) -> EngineView:
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def open(self) -> None:
        """Start polling in a separate thread; does nothing if the view is already open."""
        if self._thread is None:
            self._ended.clear()
            self._thread = threading.Thread(target=self._watch, name="workbench-engine-view", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop polling, remove the view from the page and free its widgets."""
        self.stop()
        super().close()

    def stop(self) -> None:
        """Stop polling and show the engine's current state once more. The view can be opened again."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None
        self.refresh()

    def refresh(self) -> None:
        """Show the engine's current state."""
        stats = self.engine.stats()
        if stats != self._shown:
            self._shown = stats
            self.numbers.value = _numbers(stats)
        if self.steps and stats.steps != self._drawn_steps and stats.steps:
            self._drawn_steps = stats.steps
            self.image.show(self.figure(), f"the last steps of the schedule, up to step {stats.steps}")

    def figure(self) -> Figure:
        """Return the last steps of the schedule as a matplotlib figure, for papers.

        Raises:
            RuntimeError: the engine has not run a step yet.
        """
        if not self.engine.history:
            raise RuntimeError("the engine has not run a step yet, so it has no schedule to draw: send it a request")
        return schedule_figure(self.engine.history[-(self.steps or 48) :])

    def snapshot(self) -> Figure | None:
        return super().snapshot() if self.steps else None

    def _watch(self) -> None:
        while not self._ended.wait(self.seconds):
            try:
                self.refresh()
            except Exception as error:  # a view that failed silently would make the engine look idle
                self.error.value = components.note("bad", f"{type(error).__name__}: {escape(str(error))}")
                return


def _numbers(stats: EngineStats) -> str:
    looked_up = stats.prefix_hits + stats.prefix_misses
    share = stats.prefix_hits / looked_up if looked_up else 0.0
    cells = [
        _cell("waiting", str(stats.waiting), ""),
        _cell("running", str(stats.running), f"{stats.finished} finished"),
        _cell(
            "KV cache",
            f"{stats.pages_used} / {stats.pages} pages",
            f"of {stats.page_size} tokens each; {stats.pages_known} with known content",
            _bar([(stats.pages_used / stats.pages, _TEAL), (stats.pages_known / stats.pages, _SLATE)]),
        ),
        _cell(
            "prefix cache",
            f"{share:.0%} of {looked_up} tokens",
            f"{stats.prefix_hits} not computed again; {stats.evictions} pages evicted",
            _bar([(share, _AMBER)]),
        ),
        _cell(
            "speed", f"{stats.tokens_per_second:.0f} tokens/s", f"{stats.prompt_tokens} prompt, {stats.new_tokens} new"
        ),
        _cell("steps", str(stats.steps), f"{stats.overhead:.1%} outside the model; {stats.preemptions} preempted"),
    ]
    return f'<div role="status" style="display:flex;flex-wrap:wrap;gap:10px;max-width:{components.WIDTH}">{"".join(cells)}</div>'


def _cell(name: str, value: str, more: str, bar: str = "") -> str:
    return (
        f'<div style="background:{components.tint("#888888")};color:{components.INK};border-radius:4px;padding:6px 12px;min-width:118px;line-height:1.4">'
        f'<div style="font-size:11px;color:{components.QUIET}">{name}</div><div style="font-size:15px;font-weight:600">{value}</div>'
        f'{bar}<div style="font-size:11px;color:{components.QUIET}">{more}&nbsp;</div></div>'
    )


def _bar(shares: list[tuple[float, str]]) -> str:
    """Overlaid bars, the shortest on top; a share of 1 fills the cell."""
    layers = "".join(
        f'<div style="position:absolute;left:0;top:0;height:100%;width:{100 * min(share, 1):.1f}%;background:{colour}"></div>'
        for share, colour in sorted(shares, reverse=True)
    )
    return f'<div style="position:relative;height:6px;background:{_EMPTY};margin:3px 0">{layers}</div>'
