"""Taps: the named points of a decoder where a hidden state can be read, in the order they are computed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

EVERY_TAP = ("embed", "layers.*", "layers.*.*", "norm", "logits")
"""Patterns that match every tap of a decoder."""


def decoder_taps(layers: int) -> tuple[str, ...]:
    """All taps of a decoder of `layers` layers, in the order they are computed.

    `embed` is hidden state 0, after the splice; `layers.{i}.attention` and `layers.{i}.mlp` what each adds to the residual
    stream; `layers.{i}` the stream after layer i, before any final norm and before what deepstack adds
    between layers; `norm` after the final norm; `logits`. Engines that show no layers may have `depth.{k}`: the state after the
    final norm of the same checkpoint cut to its first k layers.
    """
    inner = [f"layers.{i}{part}" for i in range(layers) for part in (".attention", ".mlp", "")]
    return ("embed", *inner, "norm", "logits")


def select_taps(available: Sequence[str], patterns: Iterable[str], engine: str) -> list[str]:
    """The taps that match, in the order they are computed.

    Raises:
        ValueError: a pattern that matches nothing this engine has.
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
                f"the {engine} engine has no tap {pattern!r}; it has embed, layers.0 to layers.N with .attention and .mlp, norm "
                f"and logits as far as they are among its {len(available)} taps: {', '.join([*available[:4], '...', available[-1]])}"
            )
        chosen |= matches
    return [tap for tap in available if tap in chosen]
