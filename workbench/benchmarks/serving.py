"""Speed of several engines on prompts with injected images: time to first token, and decoding rate, greedy and sampled.

Run it with `python -m workbench.benchmarks serving --engines turbomind transformers numba --device cuda --model PATH`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import torch

from ..engines import open_engine
from ..engines.base import Engine
from ..engines.transformers.reference import TransformersReference
from ..engines.types import GenerationConfig
from ..models import Model, load_model
from ..models.embedding_rows import noise_like
from ..prompt import Prompt
from ..trace.provenance import versions

PROMPTS = ((1024, 1), (4096, 4))
"""Number of tokens of a prompt, and number of images of 576 rows in it."""
ROWS = 576
BATCHES = (1, 16, 64)
NEW_TOKENS = 64
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95}


def spliced_prompt(model: Model, tokens: int, images: int, seed: int = 0) -> Prompt:
    """Return a prompt of `tokens` random ids, with `images` items spliced in at equal distances.

    Each item has 576 rows of random directions, with the norms of token embeddings, in place of image features.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab = model.text_config.vocab_size
    ids = torch.randint(10, vocab - 10, (tokens,), generator=generator).tolist()
    spacing = tokens // max(images, 1)
    starts = [number * spacing + (spacing - ROWS) // 2 for number in range(images)]
    own = model.token_rows(torch.randint(10, vocab - 10, (ROWS,), generator=generator).tolist())
    return Prompt(ids, [noise_like(own, generator) for _ in starts], [(start, start + ROWS) for start in starts])


def run(kinds: Sequence[str], model_name: str, dtype: str, device: str, rounds: int = 3) -> dict[str, Any]:
    """Measure every engine in this process, one after the other; print a table and return all figures.

    `numba+deterministic` is the Numba engine with that option.

    Figures are medians: of ten times to the first token, and of three decoding rates (of `rounds`, if more). A figure is None if the
    engine runs out of memory.
    """
    model = load_model(model_name)
    figures: dict[str, Any] = {"model": model_name, "dtype": dtype, "rounds": rounds, "engines": {}}
    figures["versions"] = versions()
    if device == "cuda":
        figures["device"] = torch.cuda.get_device_name()
        figures["copied bytes per second"] = copy_speed()
    figures |= bytes_read(model, getattr(torch, dtype).itemsize)
    for kind in kinds:
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        if kind != "transformers":
            options |= {"max_batch_size": max(BATCHES), "cache_max_entry_count": 0.5, "enable_prefix_caching": False}
        name, _, option = kind.partition("+")
        if name == "numba":
            options["max_prefill_token_num"] = 8192
        if option:
            options[option] = True
        with open_engine(name, model, **options) as engine:
            figures["engines"][kind] = _measure(engine, model, rounds)
        del engine
        torch.cuda.empty_cache()
    print(_table(figures))
    print(json.dumps(figures))
    return figures


def copy_speed() -> float:
    """Bytes per second, read and written together, of a plain copy of 1 GB on the GPU: the median of nine."""
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(11):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return 2 * source.nbytes / median(times[2:])


def bytes_read(model: Model, size: int) -> dict[str, int]:
    """What a decode step of a dense language model reads at least: weights but the embedding table, keys and values of every token.

    Empty for a mixture of experts and a multimodal model, of which a step reads a part.

    Args:
        size: bytes per number.
    """
    config = model.text_config
    if config is not model.config or getattr(config, "num_experts_per_tok", None):
        return {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shapes = (entry.shape for name, entry in model.weights.entries(model.weights).items() if "embed_tokens" not in name)
    numbers = sum(math.prod(shape) for shape in shapes)
    if getattr(config, "tie_word_embeddings", False):
        numbers += config.vocab_size * config.hidden_size
    return {
        "weight bytes": numbers * size,
        "KV bytes per token": 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * size,
    }


def _measure(engine: Engine, model: Model, rounds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    one = GenerationConfig(max_new_tokens=1, ignore_eos=True)
    for tokens, images in PROMPTS:
        prompt = spliced_prompt(model, tokens, images)
        for _ in range(3):  # compiles, fills caches, raises clocks
            engine.generate(prompt, one)
        times = [_seconds(engine.generate, prompt, one) for _ in range(max(rounds, 10))]
        figures[f"first token, {tokens}"] = median(times)
    for batch in BATCHES:
        prompts = [spliced_prompt(model, *PROMPTS[0], seed=seed) for seed in range(batch)]
        together: Callable[..., None]
        together = _generate_batch if isinstance(engine, TransformersReference) else _generate_together
        for name, sampling in (("decode", {}), ("sampled", SAMPLING)):
            try:
                together(engine, prompts, 4 + NEW_TOKENS, sampling)  # engines that capture graphs have them then
                rates = []
                for _ in range(max(rounds, 3)):
                    few, many = (
                        _seconds(together, engine, prompts, tokens, sampling) for tokens in (4, 4 + NEW_TOKENS)
                    )
                    rates.append(batch * NEW_TOKENS / (many - few))
                figures[f"{name}, {batch} at once"] = median(rates)
            except torch.cuda.OutOfMemoryError:
                figures[f"{name}, {batch} at once"] = None
    return figures


def _seconds(job: Callable[..., object], *arguments: object) -> float:
    _wait()
    start = time.perf_counter()
    job(*arguments)
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _generate_together(engine: Engine, prompts: Sequence[Prompt], tokens: int, sampling: dict[str, Any]) -> None:
    config = GenerationConfig(max_new_tokens=tokens, ignore_eos=True, **sampling)
    with ThreadPoolExecutor(len(prompts)) as pool:
        outputs = list(pool.map(lambda prompt: engine.generate(prompt, config), prompts))
    counts = [len(output.token_ids) for output in outputs]
    if counts != [tokens] * len(prompts):
        raise RuntimeError(f"requests generated {counts} tokens instead of {tokens} each: no speed can be measured")


@torch.no_grad()
def _generate_batch(engine: Any, prompts: Sequence[Prompt], tokens: int, sampling: dict[str, Any]) -> None:
    """Run Transformers' `generate` on all prompts as one batch. They have equal lengths, so no padding is needed."""
    states = torch.stack([engine.splice(prompt) for prompt in prompts])
    engine.network.generate(
        inputs_embeds=states,
        attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        **(sampling or {"do_sample": False}),
        pad_token_id=0,
    )


def _table(figures: dict[str, Any]) -> str:
    names = list(figures["engines"])
    rows = list(next(iter(figures["engines"].values())))
    lines = [f"{'':24s}" + "".join(f"{name:>16s}" for name in names)]
    for row in rows:
        cells = []
        for name in names:
            value = figures["engines"][name].get(row)
            unit = (
                f"{1e3 * value:.1f} ms" if value and "first" in row else f"{value:.0f} tok/s" if value else "no memory"
            )
            cells.append(f"{unit:>16s}")
        lines.append(f"{row:24s}" + "".join(cells))
    return "\n".join(lines)
