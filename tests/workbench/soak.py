"""Soak test of the Numba engine: thousands of short requests with cancels, early closes, bad input and a small cache.

    python -m tests.workbench.soak --requests 10000

Each finished output must equal that of the same request alone; at the end no page is in use and memory has not grown.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import gc
import random
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

import workbench
from tests.workbench.small_models import random_prompt, save_llama
from workbench import GenerationConfig, Prompt, PromptError, ResponseType, Span
from workbench.engines.numba_engine.engine import NumbaEngine

WORKERS = 12
FATES = ("finish", "finish", "finish", "finish", "cancel", "close", "bad", "drop")


class Soak:
    """Requests from an event loop and from threads, each with a fate drawn at random.

    Args:
        pages: pages of the KV cache; 14 fit two or three of the longest requests, so requests wait and are preempted.
    """

    def __init__(self, model: workbench.Model, requests: int, seed: int = 0, pages: int = 14) -> None:
        self.engine = workbench.open_engine(
            "numba", model, max_prefill_token_num=48, cache_max_entry_count=pages, max_batch_size=8
        )
        assert isinstance(self.engine, NumbaEngine)
        alone = workbench.open_engine("numba", model, enable_prefix_caching=False)
        self.requests, self.seed = requests, seed
        self.cases = [(_prompt(number), _config(number)) for number in range(48)]
        self.expected = [alone.generate(prompt, config).token_ids for prompt, config in self.cases]
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self._numbers = iter(range(requests))
        self._lock = threading.Lock()

    def run(self, seconds: float) -> None:
        """Run all requests; raises AssertionError if they take longer than `seconds` or a result is wrong."""
        threads = [threading.Thread(target=self._thread, daemon=True) for _ in range(WORKERS // 2)]
        loop = threading.Thread(target=lambda: asyncio.run(self._tasks()), daemon=True)
        until = time.monotonic() + seconds
        for thread in (*threads, loop):
            thread.start()
        for thread in (*threads, loop):
            thread.join(max(until - time.monotonic(), 0.1))
            assert not thread.is_alive(), f"a worker hangs; {dict(self.counts)}, {self.engine.stats()}"
        assert not self.wrong, self.wrong[:3]
        while (
            self.engine.stats().running or self.engine.stats().waiting
        ):  # requests closed last are removed before the next step
            assert time.monotonic() < until, self.engine.stats()
            time.sleep(0.01)
        self.engine.forget_prefixes()
        stats = self.engine.stats()
        assert (stats.pages_used, stats.pages_known) == (0, 0), stats
        assert self.engine._blocks.available == stats.pages
        assert sum(self.counts.values()) == self.requests

    def _next(self) -> tuple[int, random.Random] | None:
        with self._lock:
            number = next(self._numbers, None)
        return None if number is None else (number, random.Random(self.seed * 1_000_003 + number))

    def _thread(self) -> None:
        while (drawn := self._next()) is not None:
            number, dice = drawn
            fate, case = dice.choice(FATES), dice.randrange(len(self.cases))
            prompt, config = self.cases[case]
            try:
                if fate == "bad":
                    self._expect_refusal(prompt, config, dice)
                    continue
                stream = self.engine.stream(prompt, config, session_id=number)
                if fate == "drop":  # never read
                    del stream
                    self._count("drop")
                    continue
                after, tokens, status = dice.randrange(1, 6), [], None
                for read, output in enumerate(stream, start=1):
                    tokens += output.token_ids
                    status = output.status
                    if read == after and fate == "close":
                        stream.close()
                        break
                    if read == after and fate == "cancel":
                        self.engine.cancel(number)
                self._check_result(fate, case, tokens, status)
            except Exception as error:
                self._record_failure(f"request {number}, {fate}: {type(error).__name__}: {error}")

    async def _tasks(self) -> None:
        await asyncio.gather(*(self._task() for _ in range(WORKERS)))

    async def _task(self) -> None:
        while (drawn := self._next()) is not None:
            number, dice = drawn
            fate, case = dice.choice(FATES), dice.randrange(len(self.cases))
            prompt, config = self.cases[case]
            try:
                if fate == "bad":
                    self._expect_refusal(prompt, config, dice)
                    continue
                stream = self.engine.async_stream(prompt, config, session_id=number)
                if fate == "drop":
                    task = asyncio.ensure_future(anext(stream))
                    await asyncio.sleep(dice.random() * 0.01)
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    await stream.aclose()
                    self._count("drop")
                    continue
                after, read, tokens, status = dice.randrange(1, 6), 0, [], None
                async for output in stream:
                    read += 1
                    tokens += output.token_ids
                    status = output.status
                    if read == after and fate == "close":
                        break
                    if read == after and fate == "cancel":
                        self.engine.cancel(number)
                await stream.aclose()
                self._check_result(fate, case, tokens, status)
            except Exception as error:
                self._record_failure(f"request {number}, {fate}: {type(error).__name__}: {error}")

    def _expect_refusal(self, prompt: Prompt, config: GenerationConfig, dice: random.Random) -> None:
        invalid = dice.choice(
            [
                {"embedding_ranges": [(len(prompt), len(prompt) + 5)], "input_embeddings": [torch.zeros(5, 48)]},
                {"embedding_ranges": [(3, 3)], "input_embeddings": [torch.zeros(0, 48)]},
                {"embedding_ranges": [(0, 2)], "input_embeddings": [torch.zeros(2, 47)]},
                {"embedding_ranges": [(0, 2)], "input_embeddings": [torch.full((2, 48), float("nan"))]},
                {"input_ids": [*prompt.input_ids[:-1], 97]},
                {"input_ids": [5] * 600, "input_embeddings": [], "embedding_ranges": []},
            ]
        )
        try:
            self.engine.stream(prompt.replace(spans=[], **invalid), config)
        except PromptError:
            self._count("bad")
        else:
            self._record_failure(f"accepted {list(invalid)}")

    def _check_result(self, fate: str, case: int, tokens: list[int], status: ResponseType | None) -> None:
        expected = self.expected[case]
        if fate == "finish" and tokens == expected and status is ResponseType.FINISH:
            self._count("finish")
        elif fate in ("close", "cancel") and tokens == expected[: len(tokens)]:
            self._count(fate)
        else:
            self._record_failure(f"case {case}, {fate}: {status}, {tokens} instead of {expected}")

    def _count(self, fate: str) -> None:
        with self._lock:
            self.counts[fate] += 1

    def _record_failure(self, what: str) -> None:
        with self._lock:
            self.wrong.append(what)


def _prompt(number: int) -> Prompt:
    prompt = random_prompt(number // 2, 30 + 9 * (number % 6))
    if number % 5 == 0:
        prompt = prompt.replace(spans=[Span(), Span(attention="bidirectional")])
    return Prompt(prompt.input_ids[: 4 + number]) if number % 4 == 3 else prompt


def _config(number: int) -> GenerationConfig:
    sampled = number % 3 == 0
    return GenerationConfig(
        max_new_tokens=4 + 7 * (number % 5),
        do_sample=sampled,
        temperature=0.9 if sampled else 1.0,
        top_k=0 if sampled else 1,
        random_seed=number,
        ignore_eos=number % 2 == 0,
        logprobs=2 if number % 7 == 0 else None,
    )


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30.0, help="fail if the run takes longer")
    arguments = parser.parse_args()
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        model = save_llama(Path(folder))
        Soak(model, 200, seed=arguments.seed + 1).run(60 * arguments.minutes)  # warm-up: compiles, fills pools
        gc.collect()
        before = process.memory_info().rss
        soak = Soak(model, arguments.requests, arguments.seed)
        began = time.monotonic()
        soak.run(60 * arguments.minutes)
        seconds = time.monotonic() - began
        gc.collect()
        grown = (process.memory_info().rss - before) / 2**20
        stats = soak.engine.stats()
        print(f"{arguments.requests} requests in {seconds:.0f} s: {dict(soak.counts)}")
        print(
            f"{stats.steps} steps, {stats.preemptions} preemptions, {stats.evictions} evictions, {stats.prefix_hits} tokens hit"
        )
        print(f"memory grew by {grown:.0f} MiB; no page in use, no wrong token")
        assert grown < 200, "memory grows"
        assert min(stats.preemptions, stats.evictions, stats.prefix_hits) > 0, "the cache was never under pressure"


if __name__ == "__main__":
    main()
