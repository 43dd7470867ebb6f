"""Taps: the names of a decoder's hidden states that an engine can return, in the order in which they are computed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

EVERY_TAP = ("embed", "layers.*", "layers.*.*", "norm", "logits")
"""Patterns that match every tap of a decoder."""


def decoder_taps(layers: int) -> tuple[str, ...]:
    """Return all taps of a decoder of `layers` layers, in the order in which they are computed.

    - `embed`: hidden state 0, the input of the first layer, with embeddings spliced in
    - `layers.{i}.attention`, `layers.{i}.mlp`: what the attention and the MLP of layer i add to the residual stream
    - `layers.{i}`: the residual stream after layer i, before deepstack features are added to it
    - `norm`: after the final norm
    - `logits`
    - `depth.{k}` (not in the result; for engines that do not expose their layers): the state after the final norm of the same
      checkpoint truncated to its first k layers
    """
    inner = [f"layers.{i}{part}" for i in range(layers) for part in (".attention", ".mlp", "")]
    return ("embed", *inner, "norm", "logits")


def select_taps(available: Sequence[str], patterns: Iterable[str], engine: str) -> list[str]:
    """Return the taps that match any of the patterns, in the order of `available`.

    Args:
        available: an engine's taps.
        patterns: names, or patterns in which `*` matches one part of a name.
        engine: the engine's name, for error messages.

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
                f"{', '.join(available if len(available) < 7 else [*available[:4], '...', available[-1]])}"
            )
        chosen |= matches
    return [tap for tap in available if tap in chosen]
