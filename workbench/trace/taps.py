"""Taps: the named points of a decoder where a hidden state can be read, in the order they are computed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

EVERY_TAP = ("embed", "layers.*", "layers.*.*", "norm", "logits")
"""Patterns that match every tap of a decoder."""


def decoder_taps(layers: int) -> tuple[str, ...]:
    """Return all taps of a decoder of `layers` layers, in the order in which they are computed.

    `embed` is hidden state 0, after the splice; `layers.{i}.attention` and `layers.{i}.mlp` are what each adds to the residual
    stream; `layers.{i}` is the residual stream after layer i, before any final norm and before what deepstack adds
    between layers; `norm` is the state after the final norm; `logits` follow. Engines that do not expose layers may have
    `depth.{k}`: the state after the final norm of the same checkpoint truncated to its first k layers.
    """
    inner = [f"layers.{i}{part}" for i in range(layers) for part in (".attention", ".mlp", "")]
    return ("embed", *inner, "norm", "logits")


def select_taps(available: Sequence[str], patterns: Iterable[str], engine: str) -> list[str]:
    """Return the taps that match, in the order in which they are computed.

    Raises:
        ValueError: a pattern that matches none of the engine's taps.
    """
    try:
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    except TypeError as error:
        raise ValueError(f"taps={patterns!r}: give names or patterns, such as 'layers.*'") from error
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"taps={patterns!r}: give names or patterns, such as 'layers.*'")
    chosen = set()
    for pattern in patterns:
        shape = re.compile(r"[^.]+".join(map(re.escape, pattern.split("*"))))
        matches = {tap for tap in available if shape.fullmatch(tap)}
        if not matches:
            raise ValueError(
                f"the {engine} engine has no tap {pattern!r}; taps are embed, layers.0 to layers.N with .attention and .mlp, "
                f"norm and logits, and this engine has {len(available)} of these: "
                f"{', '.join([*available[:4], '...', available[-1]])}"
            )
        chosen |= matches
    return [tap for tap in available if tap in chosen]
