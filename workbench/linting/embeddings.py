"""Findings about the injected rows (embedding vectors): their norms, and the effect of a cast to the engine's dtype."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numba
import numpy as np
import torch
from range_kernels.cpu.kernel_cache import checked_cache

from ..models import Model
from ..models.model import embedding_scale
from ..prompt import Finding, Prompt
from ..prompt.checks import is_item


@lru_cache(maxsize=8)
def _table_norms(model: Model) -> tuple[float, float, float]:
    """The 0.1 % quantile, median and maximum of the norms of looked-up rows, scaled as the model scales them."""
    norms = torch.linalg.vector_norm(model.embedding_table.float(), dim=1) * embedding_scale(model.text_config)
    model.weights.release()  # the whole table was read; its pages need not stay in memory
    return float(norms.quantile(0.001)), float(norms.median()), float(norms.max())


def norm_findings(prompt: Prompt, model: Model) -> Iterator[Finding]:
    """Yield a finding for items whose rows have norms far from those of all token embeddings: a projector or scale may be missing."""
    low, middle, high = _table_norms(model)
    scale = embedding_scale(model.text_config)
    for number, item in enumerate(prompt.input_embeddings):
        if not is_item(item) or not len(item):
            continue
        sizes = _norms(item)
        if not np.isfinite(sizes).all():
            continue
        median = float(np.median(sizes))
        if scale != 1.0 and middle / scale / 3 < median < middle / scale * 3:
            yield Finding(
                "embedding-scale",
                "warning",
                f"input_embeddings[{number}]: rows have a median norm of {median:.3g}; the model multiplies looked-up rows by sqrt(hidden) "
                f"= {scale:.4g}, which gives {middle:.3g}, but not injected rows: multiply them by {scale:.4g}",
                number,
            )
            continue
        outside = ((sizes > 10 * high) | (sizes < low / 10)).nonzero()[0]
        if len(outside):
            # Only a hint: rows of working projectors can have ten or more times the norms of tokens (digit-cards: up to 22 times).
            far = bool(((sizes > 100 * high) | (sizes < low / 100)).any())
            yield Finding(
                "row-norm",
                "warning" if far else "info",
                f"input_embeddings[{number}]: {len(outside)} of {len(item)} rows have a norm far from the embedding table's "
                f"{low:.3g} to {high:.3g} (row {outside[0]}: {sizes[outside[0]]:.3g}): is a projector, a norm or the "
                "embedding scale missing?",
                number,
            )


def _deepstack_overflow(prompt: Prompt, wanted: torch.dtype) -> Iterator[Finding]:
    """Features that are added after the first layers and that the dtype cannot represent."""
    info = torch.finfo(wanted)
    for number, levels in enumerate(prompt.deepstack):
        if not isinstance(levels, torch.Tensor) or levels.ndim != 3 or not levels.numel() or levels.dtype == wanted:
            continue
        lost = (torch.isinf(levels.to(wanted)) & ~torch.isinf(levels)).any(dim=2)
        if lost.any():
            level, row = (int(at[0]) for at in lost.nonzero(as_tuple=True))
            yield Finding(
                "deepstack-overflow",
                "error",
                f"deepstack[{number}]: {int(lost.sum())} of {lost.numel()} rows overflow in {str(wanted).removeprefix('torch.')}, whose largest "
                f"number is {info.max:.5g} (level {level}, row {row} has {float(levels[level, row].abs().max()):.5g}): scale them, or run "
                "the engine in bfloat16",
                number,
            )


def cast_findings(prompt: Prompt, dtype: str) -> Iterator[Finding]:
    """Yield findings on what is lost when rows are cast to the engine's dtype: overflow, underflow, and ordinary rounding."""
    wanted = getattr(torch, dtype)
    info = torch.finfo(wanted)
    yield from _deepstack_overflow(prompt, wanted)
    changed = total = 0
    for number, item in enumerate(prompt.input_embeddings):
        if not is_item(item) or item.dtype == wanted or not len(item):
            continue
        total += len(item)
        low, high = torch.aminmax(item)
        if max(-float(low), float(high)) > info.max:
            overflows = (torch.isinf(item.to(wanted)) & ~torch.isinf(item)).any(dim=1)
            row = int(overflows.nonzero()[0]) if overflows.any() else None
            if row is not None:
                yield Finding(
                    "row-overflow",
                    "error",
                    f"input_embeddings[{number}]: {int(overflows.sum())} of {len(item)} rows overflow in {dtype}, whose largest number "
                    f"is {info.max:.5g} (row {row} has {float(item[row].abs().max()):.5g}): scale the rows, or run the engine in bfloat16",
                    number,
                )
                continue
        if item.dtype is torch.float32 and wanted is torch.bfloat16:  # the same exponents: only the lower half is lost
            changed += int(((item.contiguous().view(torch.int32) & 0xFFFF) != 0).any(dim=1).sum())
            continue
        back, sizes = item.to(wanted).to(item.dtype), item.abs()
        changed += int((back != item).any(dim=1).sum())
        if float(torch.where(item == 0, info.max, sizes).min()) >= info.smallest_normal:
            continue
        # Rounding changes a number by at most half a unit in its last place; only below the smallest normal number by more.
        lost = ((back - item).abs() > sizes * (info.eps / 2)).any(dim=1)
        if lost.any():
            row = int(lost.nonzero()[0])
            yield Finding(
                "row-underflow",
                "warning",
                f"input_embeddings[{number}]: {int(lost.sum())} of {len(item)} rows contain numbers below {dtype}'s smallest normal {info.smallest_normal:.2g} "
                f"that change by more than half a unit in the last place (first row {row}): they lose digits, or become 0",
                number,
            )
    if changed:
        yield Finding(
            "row-rounding",
            "info",
            f"{changed} of {total} rows change when cast to {dtype}, by at most half a unit in the last place ({info.eps / 2:.2g} of each "
            "number): compare the engine with a reference in the same dtype",
        )


def _norms(item: torch.Tensor) -> np.ndarray:
    wide = item.detach().cpu()
    out = np.empty(len(wide))
    _row_norms((wide.float() if wide.dtype.itemsize == 2 else wide).contiguous().numpy(), out)
    return out


@checked_cache
@numba.njit(cache=True, fastmath={"reassoc", "contract"})
def _row_norms(rows, out):
    for row in range(rows.shape[0]):
        total = 0.0
        for at in range(rows.shape[1]):
            total += np.float64(rows[row, at]) * np.float64(rows[row, at])
        out[row] = np.sqrt(total)
