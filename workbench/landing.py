"""Compute what the landing picture shows: an injected run against the plain one."""

from __future__ import annotations

from .engines.api import TAPS, Engine
from .plots.landing import Landing
from .prompt import Prompt
from .state_maps import state_maps
from .trace import Trace


def land(engine: Engine, prompt: Prompt, plain: Trace | None = None, words: int = 3) -> tuple[Landing, Trace]:
    """Run `prompt` with its injection and without; return what to draw and the plain trace, for the next call.

    Args:
        plain: the trace of the prompt without injection, if it is known already.
        words: how many of each run's likeliest next words to show.
    """
    bare = prompt.bare
    if plain is None or plain.provenance["prompt"] != bare.digest:
        plain = engine.trace(bare, TAPS)
    injected = engine.trace(prompt, TAPS)
    maps = state_maps(engine, injected, plain, prompt)
    chances = [trace["logits"][-1].float().softmax(dim=-1) for trace in (plain, injected)]
    likeliest = list(dict.fromkeys(token for chance in chances for token in chance.topk(words).indices.tolist()))
    landing = Landing(
        maps.tokens,
        maps.ranges,
        maps.taps,
        maps.values["change"],
        maps.values["cosine"],
        engine.model.tokens(likeliest),
        *(chance[likeliest].tolist() for chance in chances),
    )
    return landing, plain
