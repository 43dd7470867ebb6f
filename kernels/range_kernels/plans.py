"""Plans of paged attention: which pages a batch reads and how its work is divided, made once per step and used by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np
import torch

from .attention import cumulative, query_bounds
from .kv_cache import KVPages, check_layout

if TYPE_CHECKING:
    from .cuda.paged_launch import DevicePlan


class PagedPlan:
    """The pages that a batch reads and how its work is divided: checked and built once per step, used by every layer.

    On a GPU, calls with one plan must not overlap (use one stream, or streams that wait for each other), because they
    share the plan's counters of finished KV splits.

    Args:
        block_table: int32 `[sequences, max_pages]`: entry j of a sequence is the page of its keys from `j * page_size`
            on; entries past its last key are not read.
        cu_seqlens_q: `[sequences + 1]`, from 0 to the number of queries, which are the last positions of each sequence.
        seq_lens: `[sequences]`, number of keys of each sequence, the new ones included.
        pages: the KV cache.
        q_heads: number of query heads, a multiple of the pages' KV heads.
        invariant: on a GPU, whether no bit of a sequence's result may depend on the other sequences: "prefill" or "decode" (one query per
            sequence), whose kernels differ; empty: work is divided as is fastest.

    Raises:
        ValueError: the arguments do not fit together, or an entry that is read is not a page number of `pages`.
    """

    def __init__(
        self,
        block_table: np.ndarray,
        cu_seqlens_q: Sequence[int] | np.ndarray,
        seq_lens: Sequence[int] | np.ndarray,
        pages: KVPages,
        q_heads: int,
        invariant: Literal["", "prefill", "decode"] = "",
    ) -> None:
        if q_heads < 1 or q_heads % pages.kv_heads:
            raise ValueError(f"{q_heads} query heads do not divide into groups over {pages.kv_heads} KV heads")
        self.queries, self.q_heads, self.layout = int(cu_seqlens_q[-1]), q_heads, pages.layout
        self.cu_seqlens_q = cumulative("cu_seqlens_q", cu_seqlens_q, self.queries)
        self.seq_lens = np.ascontiguousarray(seq_lens, np.int32)
        self.block_table = np.ascontiguousarray(block_table, np.int32)
        _check_table(self.block_table, np.diff(self.cu_seqlens_q), self.seq_lens, pages)
        self.max_seqlen_k, self.max_seqlen_q = int(self.seq_lens.max()), int(np.diff(self.cu_seqlens_q).max())
        self.device_plan: DevicePlan | None = None
        slots = _last_slots(self.block_table, np.diff(self.cu_seqlens_q), self.seq_lens, pages.page_size)
        if pages.device.type == "cpu":
            from .cpu.launch import plan_tasks

            self.slots = slots
            self.tasks = plan_tasks(self.cu_seqlens_q, self.seq_lens, q_heads // pages.kv_heads, pages.kv_heads)
        else:
            from .cuda.paged_launch import plan_device

            self.device_plan = plan_device(
                self.block_table, self.cu_seqlens_q, self.seq_lens, slots, pages, q_heads, invariant
            )
            if invariant == "decode" and self.max_seqlen_q > 1:
                raise ValueError(f"a decode step of sequences with up to {self.max_seqlen_q} queries: give one each")

    @property
    def kv_splits(self) -> int:
        """Number of KV splits: ranges of keys, of sequences with few queries, for the decode kernel; 0 on the CPU."""
        plan = self.device_plan
        return 0 if plan is None or plan.kv_splits is None else len(plan.kv_splits)

    @property
    def slots_to_write(self) -> torch.Tensor | None:
        """On a GPU, the slots of the queries' own keys, int64 `[queries]`, if attention's kernels do not write all of them themselves.

        None if they do, as in decode steps, and on the CPU.
        """
        plan = self.device_plan
        return None if plan is None or self.max_seqlen_q * plan.group <= plan.decode_rows else plan.slots

    def bounds(
        self, key_start: torch.Tensor | None, key_stop: torch.Tensor | None, window: int | None, q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both bounds on the device of `q`, with causal ones for None; see `attention.query_bounds`."""
        cu_keys = np.concatenate([[0], np.cumsum(self.seq_lens)]).astype(np.int32)
        return query_bounds(key_start, key_stop, self.cu_seqlens_q, cu_keys, window, q)

    def check(self, pages: KVPages, scale: float, path: str | None) -> None:
        """Raise ValueError if the pages' layout is not that of the plan; any `scale` and `path` are accepted."""
        check_layout(self.layout, pages.layout)


class CUDAGraphPlan:
    """A plan at fixed GPU addresses, for CUDA graphs; `copy_from` overwrites it with a decode step's `PagedPlan`.

    `paged_attention` with this plan takes exactly `sequences` queries, one per sequence, and requires `key_start` and
    `key_stop`. If the copied step has fewer sequences, the output rows of the others are undefined.

    Args:
        sequences, max_pages, kv_splits: maximum number of sequences, of pages per sequence and of KV splits in a step
            (see `PagedPlan.kv_splits`).
        pages: the KV cache.
        q_heads: number of query heads, a multiple of the pages' KV heads.
        block_table, splits: int32 tensors on the GPU that the plan reads, `[sequences, max_pages]` and `[kv_splits, split_fields()]`; the
            caller writes them instead of `copy_from`. None: the plan has its own.

    Raises:
        ValueError: `supported` is False for these pages.
    """

    max_seqlen_q = 1
    slots_to_write: torch.Tensor | None = None  # the decode kernel writes new keys itself

    def __init__(
        self,
        sequences: int,
        max_pages: int,
        kv_splits: int,
        pages: KVPages,
        q_heads: int,
        *,
        block_table: torch.Tensor | None = None,
        splits: torch.Tensor | None = None,
    ) -> None:
        if not self.supported(pages, q_heads):
            raise ValueError(
                f"{pages.dtype} with {q_heads} query and {pages.kv_heads} KV heads of {pages.head_dim} on {pages.device}: a "
                "CUDAGraphPlan needs the tensor-core path of a GPU and at most 16 query heads per KV head"
            )
        from .cuda.paged_launch import SPLIT_FIELDS, DevicePlan

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=pages.device)

        self.queries, self.q_heads, self.layout = sequences, q_heads, pages.layout
        empty = np.zeros(0, np.int32)
        self.device_plan = DevicePlan(
            zeros(sequences, max_pages) if block_table is None else block_table, zeros(0).long(), empty, empty, empty,
            pages.page_size, pages.kv_heads, q_heads // pages.kv_heads,
            kv_splits=zeros(kv_splits, SPLIT_FIELDS) if splits is None else splits, partials=kv_splits,
            counters=zeros(sequences * pages.kv_heads),
        )  # fmt: skip

    @staticmethod
    def split_fields() -> int:
        """Number of int32 fields of a KV split."""
        from .cuda.paged_launch import SPLIT_FIELDS

        return SPLIT_FIELDS

    @staticmethod
    def kv_splits_of(seq_lens: Sequence[int], pages: KVPages, q_heads: int, invariant: bool = False) -> np.ndarray:
        """The KV splits of a step of one query per sequence, int32 `[splits, split_fields()]`, on the host.

        With `invariant` those of a sequence do not depend on the others.
        """
        from .cuda.device import multiprocessors
        from .cuda.paged_launch import plan_kv_splits

        lengths = np.asarray(seq_lens, np.int32)
        blocks = 0 if invariant else 2 * multiprocessors(pages.device.index or 0)
        cumulated = np.arange(len(lengths) + 1, dtype=np.int32)
        return plan_kv_splits(cumulated, lengths, q_heads // pages.kv_heads, pages.kv_heads, blocks)[0]

    @staticmethod
    def supported(pages: KVPages, q_heads: int, scale: float = 1.0) -> bool:
        """Whether decode steps over these pages can be captured in a CUDA graph.

        They can if they run on the tensor-core path of a GPU with at most 16 query heads per KV head.
        """
        if pages.device.type != "cuda" or q_heads % pages.kv_heads or q_heads // pages.kv_heads > 16:
            return False
        from .cuda.dispatch import choose_path

        q = torch.empty(1, q_heads, pages.head_dim, dtype=pages.dtype, device=pages.device)
        return choose_path(q, scale) == "tensor-core"

    def bounds(self, key_start: object, key_stop: object, window: int | None, q: torch.Tensor) -> NoReturn:
        """Raise ValueError always: lengths are not on the host, so `key_start` and `key_stop` must be passed."""
        raise ValueError(
            "a CUDAGraphPlan has no sequence lengths on the host: give key_start and key_stop on the pages' device"
        )

    def check(self, pages: KVPages, scale: float, path: str | None) -> None:
        """Check that a call of `paged_attention` can use this plan.

        Raises:
            ValueError: `path` is neither None nor "tensor-core", that path does not support these pages, `scale` is not positive, or
                the layout of the pages is not the one that the plan was made for.
        """
        check_layout(self.layout, pages.layout)
        if path not in (None, "tensor-core") or not self.supported(pages, self.q_heads, scale):
            raise ValueError(
                f"path={path!r}, scale={scale}: a CUDAGraphPlan is for the tensor-core path with a positive scale; use a PagedPlan"
            )

    def copy_from(self, plan: PagedPlan) -> None:
        """Overwrite this plan with a step's plan, on the current stream.

        Raises:
            ValueError: the step is too large, has several queries per sequence, or has other pages or query heads.
        """
        check_layout(self.layout, plan.layout)
        own, step = self.device_plan, plan.device_plan
        assert own.kv_splits is not None
        if step is None or plan.q_heads != self.q_heads:
            raise ValueError(
                f"a step of {plan.q_heads} query heads over pages on the {'CPU' if step is None else 'GPU'}: this plan is for "
                f"{self.q_heads} on a GPU"
            )
        sequences, pages = step.block_table.shape
        capacity = (self.queries, own.block_table.shape[1], len(own.kv_splits))
        needed = (sequences, pages, plan.kv_splits)
        if plan.max_seqlen_q > 1 or any(n > limit for n, limit in zip(needed, capacity, strict=True)):
            raise ValueError(
                f"a step of (sequences, pages per sequence, KV splits) {needed} with up to {plan.max_seqlen_q} queries per sequence: "
                f"this plan takes at most {capacity} and one query each; make a larger one, or run the step with its own plan"
            )
        own.kv_splits[plan.kv_splits :].zero_()
        if step.kv_splits is not None:
            own.kv_splits[: plan.kv_splits].copy_(step.kv_splits)
        own.block_table[:sequences, :pages].copy_(step.block_table)


def _check_table(table: np.ndarray, queries: np.ndarray, keys: np.ndarray, pages: KVPages) -> None:
    if keys.shape != queries.shape or (queries > keys).any():
        raise ValueError(
            f"seq_lens {keys.tolist()} for sequences of {queries.tolist()} queries: each needs at least one key per query"
        )
    needed = -(-keys // pages.page_size)
    if table.ndim != 2 or len(table) != len(keys) or (len(needed) and needed.max() > table.shape[1]):
        raise ValueError(f"block_table is {table.shape}: {len(keys)} sequences need up to {needed.max()} pages each")
    read = table[np.arange(table.shape[1]) < needed[:, None]]
    if len(read) and not 0 <= read.min() <= read.max() < pages.pages:
        raise ValueError(
            f"block_table has page numbers from {read.min()} to {read.max()}, but the cache has {pages.pages} pages"
        )


def _last_slots(table: np.ndarray, queries: np.ndarray, keys: np.ndarray, page_size: int) -> np.ndarray:
    """Return the slots of the last `queries` keys of each sequence, int64: page times `page_size` plus the offset in the page."""
    sequence = np.repeat(np.arange(len(queries)), queries)
    position = np.arange(len(sequence)) + np.repeat(keys - np.cumsum(queries), queries)
    return table[sequence, position // page_size].astype(np.int64) * page_size + position % page_size
