"""Compute what the landing picture shows: an injected run against the plain one."""

from __future__ import annotations

import numpy as np

from .compare.metrics import cosine, relative_error
from .engines.api import Engine
from .plots.landing import Landing
from .prompt import Prompt
from .trace import Trace

TAPS = ("embed", "layers.*", "norm", "logits")


def land(engine: Engine, prompt: Prompt, plain: Trace | None = None, words: int = 3) -> tuple[Landing, Trace]:
    """Run `prompt` with its injection and without; return what to draw and the plain trace, for the next call.

    Args:
        plain: the trace of the prompt without injection, if it is known already.
        words: how many of each run's likeliest next words to show.
    """
    bare = Prompt(prompt.input_ids, position_ids=prompt.position_ids)
    if plain is None or plain.provenance["prompt"] != bare.digest:
        plain = engine.trace(bare, TAPS)
    injected = engine.trace(prompt, TAPS)
    taps = [tap for tap in plain if tap != "logits"]
    chances = [trace["logits"][-1].float().softmax(dim=-1) for trace in (plain, injected)]
    likeliest = list(dict.fromkeys(token for chance in chances for token in chance.topk(words).indices.tolist()))
    model = engine.model
    landing = Landing(
        model.tokens(prompt.input_ids),
        prompt.embedding_ranges,
        taps,
        np.stack([relative_error(injected[tap], plain[tap]).numpy() for tap in taps]),
        np.stack([cosine(injected[tap], plain[tap]).numpy() for tap in taps]),
        model.tokens(likeliest),
        *(chance[likeliest].tolist() for chance in chances),
    )
    return landing, plain
