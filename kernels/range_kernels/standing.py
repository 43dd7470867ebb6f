"""A decode step's plan that stays where it is: what is captured with it in a CUDA graph computes whichever step it holds."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import torch

from .pages import KVPages, PagedPlan, check_kind


class StandingPlan:
    """Room on a GPU for the plans of decode steps, one after the other, in place of a `PagedPlan`.

    `paged_attention` with it takes `sequences` queries, one a sequence, and `low` and `reach` must be given. Rows of sequences that
    a step does not have are not computed; what stands there is arbitrary.

    Args:
        sequences, most_pages, items: the most that a step may have of them; `PagedPlan.items` says how many items one has.
        pages: where the keys lie.
        q_heads: a multiple of the pages' KV heads.

    Raises:
        ValueError: such steps do not run without the host; see `possible`.
    """

    most_queries = 1

    def __init__(self, sequences: int, most_pages: int, items: int, pages: KVPages, q_heads: int) -> None:
        if not self.possible(pages, q_heads):
            raise ValueError(
                f"{pages.dtype} with {q_heads} query and {pages.kv_heads} KV heads of {pages.head_dim} on {pages.device}: plans stand "
                "where the tensor-core path of a GPU runs decode steps of up to 16 query heads a KV head"
            )
        from .cuda.pages import ITEM, DevicePlan

        def room(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=pages.device)

        self.queries, self.q_heads, self.kind = sequences, q_heads, pages.kind
        nowhere = np.zeros(0, np.int32)
        self.device_plan = DevicePlan(
            room(sequences, most_pages), room(0).long(), nowhere, nowhere, nowhere, pages.page_size, pages.kv_heads,
            q_heads // pages.kv_heads, items=room(items, ITEM), partials=items, counters=room(sequences * pages.kv_heads),
        )  # fmt: skip

    @staticmethod
    def possible(pages: KVPages, q_heads: int, scale: float = 1.0) -> bool:
        """Whether decode steps over such pages run without the host, once they are planned."""
        if pages.device.type != "cuda" or q_heads % pages.kv_heads or q_heads // pages.kv_heads > 16:
            return False
        from .cuda.paths import choose

        q = torch.empty(1, q_heads, pages.head_dim, dtype=pages.dtype, device=pages.device)
        return choose(q, scale) == "tensor-core"

    def bounds(self, low: object, reach: object, window: int | None, q: torch.Tensor) -> NoReturn:
        """Raises ValueError."""
        raise ValueError("a standing plan does not know its steps' lengths: give low and reach, on the pages' device")

    def check(self, pages: KVPages, scale: float, path: str | None) -> None:
        """Raises ValueError for a call that would ask the host, or over pages of another kind."""
        check_kind(self.kind, pages.kind)
        if path not in (None, "tensor-core") or not self.possible(pages, self.q_heads, scale):
            raise ValueError(
                f"path={path!r}, scale={scale}: a standing plan is for the tensor-core path, whose scale is positive; use a PagedPlan"
            )

    def take(self, plan: PagedPlan) -> None:
        """Hold this step from now on: copies on the current stream.

        Raises:
            ValueError: there is no room for it, a sequence has several queries, or it is over other pages.
        """
        check_kind(self.kind, plan.kind)
        mine, its = self.device_plan, plan.device_plan
        assert mine.items is not None
        if its is None or plan.q_heads != self.q_heads:
            raise ValueError(
                f"a step of {plan.q_heads} query heads over pages on the {'CPU' if its is None else 'GPU'}: this plan is for "
                f"{self.q_heads} on a GPU"
            )
        sequences, pages = its.table.shape
        room = (self.queries, mine.table.shape[1], len(mine.items))
        needed = (sequences, pages, plan.items)
        if plan.most_queries > 1 or any(n > most for n, most in zip(needed, room, strict=True)):
            raise ValueError(
                f"a step of (sequences, pages of one, items) {needed} with up to {plan.most_queries} queries a sequence: there is room "
                f"for {room} and one query each; make a larger one, or run the step with its own plan"
            )
        mine.items[plan.items :].zero_()
        if its.items is not None:
            mine.items[: plan.items].copy_(its.items)
        mine.table[:sequences, :pages].copy_(its.table)
