"""Sampling of one token per row of logits, on any device; a row's token depends on its own logits, settings and random number only.

Temperature, then top-k, top-p (Holtzman et al. 2019, arXiv:1904.09751) and min-p, in that order; the token is where the cumulative
probability of the candidates, from the likeliest on, passes the random number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

_WIDTHS = (64, 1024)
"""Numbers of candidates that are looked at together: a row is always computed at one width, whatever rows are beside it."""


_CHUNKS = {64: 128, 1024: 16}  # logits in a chunk, by the number of candidates
_MOST = (1 << 31) - 1


class RowSettings(NamedTuple):
    """Settings of one row: as in `GenerationConfig`, and a random number in [0, 1)."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of a request's new token `index`: SplitMix64 of the seed (Steele et al. 2014, doi:10.1145/2660193.2660195).

    It depends on nothing else, so a token that is computed again, or in another batch, gets the same number.
    """
    mask = (1 << 64) - 1
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def sample_rows(logits: torch.Tensor, settings: Sequence[RowSettings]) -> torch.Tensor:
    """Choose a token for each row of `logits` `[rows, vocab]`, return int64 `[rows]` on their device; any id for a row with NaN.

    The host does not wait for the device.
    """
    vocab, device = logits.shape[1], logits.device
    groups: dict[int, list[int]] = {}
    for row, each in enumerate(settings):
        groups.setdefault(_width(each.top_k, vocab), []).append(row)
    tokens = torch.empty(len(settings), dtype=torch.int64, device=device)
    for width, rows in groups.items():
        numbers = on_device(torch.tensor([settings[row] for row in rows], dtype=torch.float64).T.contiguous(), device)
        if len(rows) == len(settings):
            tokens = _sample(logits.float(), numbers, width)
        else:
            at = on_device(torch.tensor(rows), device)
            tokens[at] = _sample(logits[at].float(), numbers, width)
    return tokens


def _width(top_k: int, vocab: int) -> int:
    """The number of candidates that a row with this top-k is computed with."""
    return next((width for width in _WIDTHS if 0 < top_k <= width < vocab), vocab)


def on_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device; the host does not wait for a GPU."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _sample(logits: torch.Tensor, numbers: torch.Tensor, width: int) -> torch.Tensor:
    """`sample_rows` for rows of one width, float32; `numbers` are the settings, float64 `[5, rows]`."""
    if len(logits) == 1 and logits.device.type == "cuda":  # torch adds up a single row with another kernel than several
        return _sample(logits.expand(2, -1), numbers.expand(2, *numbers.shape).permute(1, 2, 0).reshape(5, 2), width)[
            :1
        ]
    temperature, top_k, top_p, min_p, number = numbers[:, :, None]
    values, ids = _likeliest(logits, width)
    rank = torch.arange(width, device=logits.device)
    allowed = (top_k <= 0) | (rank < top_k)
    chances = (values / temperature.float()).masked_fill(~allowed, -torch.inf).softmax(dim=-1).double()
    before = chances.cumsum(dim=-1) - chances
    kept = (before <= top_p) | (top_p >= 1.0)  # the token that crosses top_p stays
    kept &= chances >= min_p * chances[:, :1]
    chances = torch.where(kept, chances, 0.0)
    total = chances.cumsum(dim=-1)
    chosen = (total <= number * total[:, -1:]).sum(dim=-1, keepdim=True).clamp(max=width - 1)
    return ids.gather(1, chosen)[:, 0]


def _likeliest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest logits of each row, float32, and their ids, largest first, of equal ones the lowest id first.

    A large vocabulary is cut into chunks: the `count` largest are in the `count` chunks with the largest maxima, so only those are
    ordered.
    """
    rows, vocab = logits.shape
    logits = logits + 0.0  # -0.0 becomes 0.0: they are equal, but their bits are not
    size = _CHUNKS.get(count)
    if size is None or vocab < 2 * count * size:
        ids = torch.arange(vocab, device=logits.device).expand(rows, -1)
        return _ordered(logits, ids, count)
    padded = torch.nn.functional.pad(logits, (0, -vocab % size), value=-torch.inf)
    chunks = padded.view(rows, -1, size)
    maxima = chunks.amax(dim=-1)
    numbers = torch.arange(maxima.shape[1], device=logits.device).expand(rows, -1)
    _, best = _ordered(maxima, numbers, count)
    candidates = chunks.gather(1, best[:, :, None].expand(-1, -1, size)).flatten(1)
    ids = (best[:, :, None] * size + torch.arange(size, device=logits.device)).flatten(1)
    return _ordered(candidates, ids, count)


def _ordered(values: torch.Tensor, ids: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest values of each row and their ids below 2**31, largest first, of equal ones the lowest id first.

    Keys of 64 bits, the value's bits above the id, make every key different: the order of equal values depends on no algorithm.
    """
    bits = values.contiguous().view(torch.int32)
    high = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # integers in the order of the floats
    keys = (high << 32) | (_MOST - ids)
    best = keys.topk(count, dim=1).values if count < keys.shape[1] else keys.sort(dim=1, descending=True).values
    high = best >> 32
    found = (high ^ ((high >> 31) & 0x7FFFFFFF)).int().view(torch.float32)
    return found, _MOST - (best & 0xFFFFFFFF)
