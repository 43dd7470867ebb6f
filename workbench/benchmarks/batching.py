"""Speed of the Numba engine under load, compared with Transformers' `generate`: `python -m workbench.benchmarks batching`.

All jobs are timed in one run, interleaved, and medians are reported: only ratios within a run are meaningful.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import torch
from range_kernels.benchmarks.harness import time_interleaved

from ..engines.base import Engine
from ..engines.numba_engine.engine import NumbaEngine
from ..engines.transformers.reference import TransformersReference
from ..engines.types import GenerationConfig
from ..models import load_model
from ..models.embedding_rows import noise_like
from ..prompt import Prompt

PROMPTS, NEW_TOKENS = 16, 32
CROWD = 64  # concurrent requests while the scheduler's share of a step is measured
IMAGE_ROWS = 576


def run(model_name: str, rounds: int) -> dict[str, float]:
    """Time all jobs, print a table, and return `{job: median seconds}`.

    The result also has the key "share of a step that is not the model's", the value of `overhead`.
    """
    model = load_model(model_name)
    engine, reference = NumbaEngine(model), TransformersReference(model)
    ids = model.chat_ids("Tell me a story about a fox and the moon, please. " * 40)
    prompts = uneven_prompts(ids, model.embedding_table, PROMPTS)
    alone = Prompt(ids[:64], [model.token_rows(ids[30:34])], [(30, 34)])
    rows = noise_like(model.token_rows(ids[:1] * IMAGE_ROWS), torch.Generator().manual_seed(0))
    image = Prompt([*ids[:8], *ids[8:9] * IMAGE_ROWS, *ids[9:40]], [rows], [(8, 8 + IMAGE_ROWS)])

    def fresh(job: Callable[[], object]) -> Callable[[], object]:
        """Return the job, preceded by emptying the prefix cache."""

        def run() -> object:
            engine.forget_prefixes()
            return job()

        return run

    def first_token() -> None:
        engine.generate(image, _tokens(1))

    jobs: dict[str, Callable[[], object]] = {
        f"{PROMPTS} prompts, numba": fresh(lambda: generate_together(engine, prompts, NEW_TOKENS)),
        f"{PROMPTS} prompts, transformers one by one": lambda: [_generate(reference, [each]) for each in prompts],
        f"{PROMPTS} prompts, transformers padded": lambda: _generate(reference, prompts),
        "one sequence, numba": fresh(lambda: engine.generate(alone, _tokens(NEW_TOKENS))),
        "one sequence, transformers": lambda: _generate(reference, [alone]),
        "first token after an image, numba": fresh(first_token),
        "first token after the same image again, numba": first_token,
    }
    medians = time_interleaved(jobs, rounds)
    generated = {name: NEW_TOKENS * (PROMPTS if "prompts" in name else 1) for name in jobs if "token" not in name}
    print(f"{model.name}, float32, {torch.get_num_threads()} threads, {rounds} interleaved rounds, medians")
    for name, value in medians.items():
        rate = f"{generated[name] / value:8.1f} new tokens/s" if name in generated else ""
        print(f"{name:46} {value * 1000:9.1f} ms {rate}")
    share = overhead(engine, ids)
    print(f"{CROWD} requests at once: {share:.1%} of a step is spent outside the model")
    return {**medians, "share of a step that is not the model's": share}


def uneven_prompts(ids: Sequence[int], table: torch.Tensor, count: int) -> list[Prompt]:
    """Return `count` prompts of 20 to 340 tokens; every other one has a range of up to 49 tokens, as for an image.

    `ids` are the tokens that they are cut from, `table` the embedding table.
    """
    prompts = []
    for number in range(count):
        length = 20 + (number * 7 % 16) * 64 // 3
        ranges = [(4, min(length, 53))] if number % 2 else []
        prompts.append(Prompt(ids[:length], [table[list(ids[a:b])] for a, b in ranges], ranges))
    return prompts


def generate_together(engine: Engine, prompts: Sequence[Prompt], new_tokens: int) -> list[list[int]]:
    """Run all prompts concurrently in one event loop; return the new tokens of each."""

    async def answer(number: int, prompt: Prompt) -> list[int]:
        outputs = engine.async_stream_infer(
            number, prompt.input_ids, prompt.input_embeddings, prompt.embedding_ranges, _tokens(new_tokens)
        )
        return [token async for output in outputs for token in output.token_ids]

    async def every() -> list[list[int]]:
        return await asyncio.gather(*[answer(number, prompt) for number, prompt in enumerate(prompts)])

    return asyncio.run(every())


def overhead(engine: NumbaEngine, ids: Sequence[int]) -> float:
    """Return the fraction of a step's time that is spent outside the model, while `CROWD` requests decode."""
    prompts = [Prompt([*ids[number : number + 40]]) for number in range(CROWD)]
    before = engine.stats().steps
    generate_together(engine, prompts, NEW_TOKENS)
    crowded = [step for step in engine.history[before - engine.stats().steps :] if len(step.chunks) == CROWD]
    return 1.0 - sum(step.model_seconds for step in crowded) / sum(step.seconds for step in crowded)


def _tokens(count: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=count, ignore_eos=True)


@torch.no_grad()
def _generate(reference: TransformersReference, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Run Transformers' `generate` on spliced prompts as one batch, padded on the left to the longest."""
    longest = max(map(len, prompts))
    states = torch.zeros(len(prompts), longest, reference.model.text_config.hidden_size)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        states[row, longest - len(prompt) :] = reference.splice(prompt)
        mask[row, longest - len(prompt) :] = 1
    return reference.network.generate(
        inputs_embeds=states,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
