"""The panel of notebook 05: a token budget, and how prompts are packed into batches within it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from typing import Literal

import ipywidgets as w

from ..plots.figure import Figure
from ..plots.packing import plan_figure
from ..prompt import Prompt
from ..prompt.packing import BatchPlan, plan_batch
from . import components
from .key_guard import KeyGuard
from .panel import Panel


class PackingPanel(Panel):
    """Batch plans for one list of prompts; controls set tokens per batch, splitting and attention.

    Args:
        prompts: at least one.
        max_tokens: initial number of tokens per batch.
    """

    def __init__(self, prompts: Sequence[Prompt], max_tokens: int = 128) -> None:
        super().__init__()
        self.prompts = list(prompts)
        self._drawn: tuple[BatchPlan, list[Prompt]] | None = None
        longest = max(map(len, self.prompts))
        self._budget = components.slider("Tokens per batch", max_tokens, 16, max(512, longest), "tokens per step")
        self.budget = self._budget.children[0]
        self.split = w.Checkbox(value=True, description="prompts may be split", indent=False)
        self.bidirectional = w.Checkbox(value=False, description="images attend bidirectionally", indent=False)
        self.words, self.image = w.HTML(), components.FigureImage()
        self.view = w.VBox(
            [w.HBox([self._budget, self.split, self.bidirectional], layout={"flex_flow": "row wrap"}), self.status, self.image, self.words, KeyGuard()]
        )  # fmt: skip
        self.view.add_class("workbench-view").add_class("workbench-plan")
        self._observe(self.budget, self.split, self.bidirectional)
        self._changed()

    @property
    def laid_out(self) -> list[Prompt]:
        """The prompts, with the attention of all spans set to causal or bidirectional by the checkbox."""
        attention: Literal["causal", "bidirectional"] = "bidirectional" if self.bidirectional.value else "causal"
        return [
            prompt.replace(spans=[replace(span, attention=attention) for span in prompt.spans])
            for prompt in self.prompts
        ]

    @property
    def plan(self) -> BatchPlan:
        """The plan for the current settings; raises the errors of `plan_batch`."""
        return plan_batch(self.laid_out, self.budget.value, split=self.split.value)

    def figure(self) -> Figure:
        """Return the plan as a matplotlib figure, after everything has been drawn.

        Raises:
            RuntimeError: no plan could be made.
        """
        self.wait()
        if self._drawn is None:
            raise RuntimeError("no plan yet: see the message above the figure")
        return plan_figure(*self._drawn)

    def _draw(self) -> Iterator[None]:
        plan = self.plan
        self._drawn = plan, self.laid_out
        full = sum(plan.fill) / len(plan.fill)
        said = (
            f"batches of the plan, one per row: {len(plan.batches)} batches, {full:.0%} full; the text below lists them"
        )
        self.image.show(plan_figure(*self._drawn), said)
        self.status.value = components.note(
            "plain",
            f"{len(plan.batches)} batches, {full:.0%} full on average, no padding. One padded batch would compute "
            f"{plan.padded_tokens} tokens, not {sum(plan.lengths)}: {plan.padding / plan.padded_tokens:.0%} of them padding.",
        )
        self.words.value = f"<details><summary>The plan as text</summary><pre>{escape(str(plan))}</pre></details>"
        yield
