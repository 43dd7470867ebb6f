"""Findings about the rows themselves: their size beside the embedding table's, and what a cast to the engine's dtype does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numba
import numpy as np
import torch

from ..findings import Finding
from ..models import Model, embedding_scale
from ..prompt import Prompt, is_item


@lru_cache(maxsize=8)
def _table_norms(model: Model) -> tuple[float, float, float]:
    """Least (0.1 %), median and largest norm of hidden-state rows that come from the embedding table."""
    norms = torch.linalg.vector_norm(model.embedding_table.float(), dim=1) * embedding_scale(model.text_config)
    return float(norms.quantile(0.001)), float(norms.median()), float(norms.max())


def norm_findings(prompt: Prompt, model: Model) -> Iterator[Finding]:
    """Rows far longer or shorter than any token embedding usually come from a missing projector, norm or scale."""
    least, middle, most = _table_norms(model)
    scale = embedding_scale(model.text_config)
    for number, item in enumerate(prompt.input_embeddings):
        if not is_item(item) or not len(item):
            continue
        sizes = _norms(item)
        if not np.isfinite(sizes).all():
            continue
        own = float(np.median(sizes))
        if scale != 1.0 and middle / scale / 3 < own < middle / scale * 3:
            yield Finding(
                "embedding-scale",
                "warning",
                f"input_embeddings[{number}]: rows have a median norm of {own:.3g}; the model multiplies looked-up rows by sqrt(hidden) "
                f"= {scale:.4g}, after which they have {middle:.3g}. Injected rows come ready: multiply them by {scale:.4g}",
                number,
            )
            continue
        outside = ((sizes > 10 * most) | (sizes < least / 10)).nonzero()[0]
        if len(outside):
            # Projectors that work make rows ten and more times as long as tokens (digit-cards' up to 22 times): a hint, no alarm.
            far = bool(((sizes > 100 * most) | (sizes < least / 100)).any())
            yield Finding(
                "row-norm",
                "warning" if far else "info",
                f"input_embeddings[{number}]: {len(outside)} of {len(item)} rows have a norm far from the embedding table's "
                f"{least:.3g} to {most:.3g} (row {outside[0]}: {sizes[outside[0]]:.3g}): is a projector, a norm or the "
                "embedding scale missing?",
                number,
            )


def cast_findings(prompt: Prompt, dtype: str) -> Iterator[Finding]:
    """What is lost when rows are cast to the engine's dtype: overflow, underflow, and the ordinary rounding."""
    wanted = getattr(torch, dtype)
    info = torch.finfo(wanted)
    changed = total = 0
    for number, item in enumerate(prompt.input_embeddings):
        if not is_item(item) or item.dtype == wanted or not len(item):
            continue
        total += len(item)
        least, most = torch.aminmax(item)
        if max(-float(least), float(most)) > info.max:
            overflows = (torch.isinf(item.to(wanted)) & ~torch.isinf(item)).any(dim=1)
            row = int(overflows.nonzero()[0]) if overflows.any() else None
            if row is not None:
                yield Finding(
                    "row-overflow",
                    "error",
                    f"input_embeddings[{number}]: {int(overflows.sum())} of {len(item)} rows overflow in {dtype}, whose largest number "
                    f"is {info.max:.5g} (row {row} holds {float(item[row].abs().max()):.5g}): scale the rows, or run the engine in bfloat16",
                    number,
                )
                continue
        if (
            item.dtype is torch.float32 and wanted is torch.bfloat16
        ):  # the same exponents: what is lost is the lower half
            changed += int(((item.contiguous().view(torch.int32) & 0xFFFF) != 0).any(dim=1).sum())
            continue
        back, sizes = item.to(wanted).to(item.dtype), item.abs()
        changed += int((back != item).any(dim=1).sum())
        if float(torch.where(item == 0, info.max, sizes).min()) >= info.smallest_normal:
            continue
        # Rounding moves a number by half a unit in its last place at most; only below the least normal number it moves further.
        lost = ((back - item).abs() > sizes * (info.eps / 2)).any(dim=1)
        if lost.any():
            row = int(lost.nonzero()[0])
            yield Finding(
                "row-underflow",
                "warning",
                f"input_embeddings[{number}]: {int(lost.sum())} of {len(item)} rows hold numbers below {dtype}'s {info.smallest_normal:.2g} "
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


@numba.njit(cache=True, fastmath={"reassoc", "contract"})
def _row_norms(rows, out):
    for row in range(rows.shape[0]):
        total = 0.0
        for at in range(rows.shape[1]):
            total += np.float64(rows[row, at]) * np.float64(rows[row, at])
        out[row] = np.sqrt(total)
