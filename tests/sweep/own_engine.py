"""What the Numba engine makes of a model: nothing (refused by name), or the reference's states."""

from __future__ import annotations

import workbench
from workbench.engines.numba_engine.engine import NumbaEngine

TOLERANCE = 5e-5


def own_engine_faults(model: workbench.Model, prompt: workbench.Prompt) -> list[str] | None:
    """Taps of the prompt at which the Numba engine differs from the reference, in float32; None if it refuses the model or prompt by name."""
    try:
        engine = NumbaEngine(model)
    except workbench.ModelError:
        return None
    with engine, workbench.open_engine("transformers", model) as reference:
        taps = [tap for tap in reference.capabilities.taps if tap in engine.capabilities.taps]
        try:
            engine.check(prompt)
        except (workbench.PromptError, workbench.EmbeddingRangeError):
            return None
        ours, theirs = engine.trace(prompt, taps), reference.trace(prompt, taps)
        # Without taps other kernels may run.
        config = workbench.GenerationConfig(max_new_tokens=1, ignore_eos=True, output_logits="generation")
        last = engine.generate(prompt, config).logits[0].double()
    wanted = theirs["logits"][-1].double()
    error = float((last - wanted).norm() / wanted.norm())
    faults = [] if error < TOLERANCE else [f"the numba engine's generated logits are off by {error:.1e}"]
    for tap in taps:
        a, b = ours[tap].double(), theirs[tap].double()
        error = float((a - b).norm() / b.norm().clamp(min=1e-30)) if a.shape == b.shape else float("inf")
        if not error < TOLERANCE:
            faults.append(f"the numba engine's {tap} is off by {error:.1e}")
    return faults
