"""Many requests in one engine: each gets the same output as alone, whatever happens to the others."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import workbench
from tests.workbench.small_architectures import save
from tests.workbench.small_models import random_prompt, save_llama
from tests.workbench.soak import Soak
from workbench import GenerationConfig, ModelError, Prompt, PromptError, ResponseType, Span

CONFIG = GenerationConfig(max_new_tokens=12, ignore_eos=True, output_logits="generation")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def alone(llama):
    """An engine that runs one request at a time."""
    return workbench.open_engine("numba", llama, enable_prefix_caching=False)


def prompts(count: int = 12) -> list[Prompt]:
    """Prompts of different lengths, with and without items; some spans attend bidirectionally."""
    made = []
    for number in range(count):
        prompt = random_prompt(number, 30 + 7 * (number % 5))
        if number % 3 == 0:
            prompt = prompt.replace(spans=[Span(), Span(attention="bidirectional")])
        made.append(Prompt(prompt.input_ids[: 3 + number]) if number % 4 == 3 else prompt)
    return made


def together(engine, made, configs):
    """Run all prompts concurrently on one event loop; returns the joined output of each."""

    async def one(number):
        prompt = made[number]
        return [output async for output in engine.async_stream(prompt, configs[number])]

    async def every():
        tasks = [asyncio.create_task(one(number)) for number in range(len(made))]
        return await asyncio.gather(*tasks)

    return [workbench.engines.types.join_outputs(outputs) for outputs in asyncio.run(every())]


@pytest.mark.parametrize(
    "options", [{}, {"max_prefill_token_num": 16}, {"cache_max_entry_count": 8}, {"max_batch_size": 2}]
)
def test_batching_is_bit_identical(llama, alone, options):
    """Default settings, small prefill chunks, a cache so small that requests are preempted, and a batch size of two."""
    engine = workbench.open_engine("numba", llama, **options)
    made = prompts()
    for prompt, output in zip(made, together(engine, made, [CONFIG] * len(made)), strict=True):
        expected = alone.generate(prompt, CONFIG)
        assert output.token_ids == expected.token_ids
        assert torch.equal(output.logits, expected.logits)
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.pages_used) == (0, 0, 0)
    assert stats.finished == len(made)
    # Preemption in a small cache depends on arrival times; in a large cache no request is preempted.
    assert "cache_max_entry_count" in options or not stats.preemptions
    assert "max_batch_size" not in options or max(len(step.chunks) for step in engine.history) == 2


def test_preempted_requests_keep_their_generated_tokens(llama, alone):
    """Each token is returned once, and the logits of the prompt equal those of an uninterrupted run."""
    engine = workbench.open_engine("numba", llama, cache_max_entry_count=6)
    config = GenerationConfig(max_new_tokens=40, ignore_eos=True, output_logits="all", logprobs=2)
    made = [random_prompt(seed) for seed in range(5)]
    for prompt, output in zip(made, together(engine, made, [config] * 5), strict=True):
        expected = alone.generate(prompt, config)
        assert output.token_ids == expected.token_ids
        assert output.logprobs == expected.logprobs
        assert torch.equal(output.logits, expected.logits)
    assert engine.stats().preemptions > 0


def test_sampled_tokens_depend_on_the_seed_not_on_the_batch(llama, alone):
    engine = workbench.open_engine("numba", llama)
    configs = [
        GenerationConfig(max_new_tokens=12, ignore_eos=True, do_sample=True, temperature=1.0, top_k=0, random_seed=seed)
        for seed in range(8)
    ]
    made = [random_prompt()] * 8
    outputs = together(engine, made, configs)
    assert [output.token_ids for output in outputs] == [alone.generate(made[0], c).token_ids for c in configs]
    assert len({tuple(output.token_ids) for output in outputs}) > 4


def test_threads_and_an_event_loop_get_the_expected_tokens(llama, alone):
    engine = workbench.open_engine("numba", llama)
    made = prompts(8)
    expected = [alone.generate(prompt, CONFIG).token_ids for prompt in made]
    results = {}

    def loop():
        results["loop"] = [output.token_ids for output in together(engine, made, [CONFIG] * 8)]

    thread = threading.Thread(target=loop)
    thread.start()
    with ThreadPoolExecutor(4) as pool:
        results["threads"] = list(pool.map(lambda prompt: engine.generate(prompt, CONFIG).token_ids, made))
    thread.join(60)
    assert results == {"loop": expected, "threads": expected}


def test_a_new_request_runs_alongside_a_long_one(llama):
    engine = workbench.open_engine("numba", llama, max_prefill_token_num=8)
    long = engine.stream(random_prompt(), GenerationConfig(max_new_tokens=200, ignore_eos=True))
    next(long)
    assert len(list(engine.stream(random_prompt(1), CONFIG))) == 12
    assert [output.status for output in long][-1] is ResponseType.FINISH
    ran = [{chunk.request for chunk in step.chunks} for step in engine.history]
    shared = [number for number, requests in enumerate(ran) if 1 in requests]
    # It ran in every step from its arrival to its end, each time together with the long one, which continued long after.
    assert shared == list(range(shared[0], shared[-1] + 1))
    assert all(0 in ran[number] for number in shared)
    assert ran[shared[-1] + 1 :] == [{0}] * (len(ran) - shared[-1] - 1)
    assert len(ran) - shared[-1] > 100


@pytest.fixture
def slow(llama, monkeypatch):
    """An engine with steps so slow that a request of 200 tokens is still running when the test checks."""
    engine = workbench.open_engine("numba", llama, max_batch_size=2)
    run_batch = engine.runner.run_batch

    def sleeping(batch, pages, tap=None):
        time.sleep(0.03)
        return run_batch(batch, pages, tap)

    monkeypatch.setattr(engine.runner, "run_batch", sleeping)
    return engine


def test_close_and_cancel_free_their_pages(slow):
    engine = slow
    config = GenerationConfig(max_new_tokens=200, ignore_eos=True)
    closed, cancelled = engine.stream(random_prompt(), config), engine.stream(random_prompt(1), config, session_id=3)
    next(closed), next(cancelled)
    assert engine.stats().running == 2
    closed.close()
    assert engine.cancel(3)
    assert list(cancelled)[-1].status is ResponseType.CANCEL
    wait_until(lambda: engine.stats().pages_used == 0)
    assert engine.stats().running == 0


def test_close_ends_unfinished_requests_with_an_error(slow):
    config = GenerationConfig(max_new_tokens=200, ignore_eos=True)
    streams = [slow.stream(random_prompt(number), config) for number in range(3)]  # two run, one waits
    next(streams[0]), next(streams[1])
    waiting = threading.Thread(target=lambda: errors.append(error_of(streams[2])))
    errors: list[str] = []
    waiting.start()
    wait_until(lambda: slow.stats().waiting == 1)
    slow.close()
    waiting.join(30)
    errors += [error_of(stream) for stream in streams[:2]]
    assert errors == ["the engine was closed before this request finished"] * 3


def error_of(stream) -> str:
    with pytest.raises(workbench.ModelError) as raised:
        list(stream)
    return str(raised.value)


def test_cancel_ends_a_waiting_request(slow):
    engine = slow
    config = GenerationConfig(max_new_tokens=200, ignore_eos=True)
    first, second = engine.stream(random_prompt(), config), engine.stream(random_prompt(2), config)
    next(first), next(second)
    waiting = engine.stream(random_prompt(1), config, session_id=4)
    outputs = []
    thread = threading.Thread(target=lambda: outputs.extend(waiting))
    thread.start()
    wait_until(lambda: engine.stats().waiting == 1)
    assert engine.cancel(4)
    thread.join(20)
    assert [output.status for output in outputs] == [ResponseType.CANCEL]
    assert next(first).status is ResponseType.SUCCESS
    first.close(), second.close()


def test_a_failing_forward_pass_ends_only_the_request_that_causes_it(llama, alone, monkeypatch):
    """A failed step is run again, one request at a time; the request that fails gets the error, with its cause."""
    engine = workbench.open_engine("numba", llama, enable_prefix_caching=False)
    run_batch = engine.runner.run_batch

    def failing(batch, pages, tap=None):
        if 66 in batch.seq_lens:  # the request that has just generated its sixth token
            raise FloatingPointError("injected")
        return run_batch(batch, pages, tap)

    monkeypatch.setattr(engine.runner, "run_batch", failing)
    made = [random_prompt(0), random_prompt(1, 60), random_prompt(2)]
    results = [None] * 3

    def run(number):
        try:
            results[number] = engine.generate(made[number], CONFIG).token_ids
        except ModelError as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert isinstance(results[1], ModelError)
    assert "FloatingPointError: injected" in str(results[1])
    for number in (0, 2):
        assert results[number] == alone.generate(made[number], CONFIG).token_ids
    assert engine.stats().pages_used == 0


def test_a_request_larger_than_the_cache_is_refused(llama):
    engine = workbench.open_engine("numba", llama, cache_max_entry_count=3)
    with pytest.raises(PromptError, match=r"90 prompt tokens and 12 new ones take 4 pages of 32 tokens.*has 3"):
        engine.stream(random_prompt(0, 90), CONFIG)
    assert engine.generate(random_prompt(0, 85), CONFIG).num_token == 12  # 85 + 11 tokens fill three pages exactly


def test_short_soak_covers_every_outcome(llama):
    """`make soak` runs ten thousand requests."""
    soak = Soak(llama, 400)
    soak.run(120)
    assert set(soak.counts) == {"finish", "cancel", "close", "bad", "drop"}
    assert soak.engine.stats().evictions > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_max_entry_count": 0}, "cache_max_entry_count=0"),
        ({"cache_max_entry_count": 1.5}, "between 0 and 1"),
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"max_prefill_token_num": 2.5}, "max_prefill_token_num=2.5"),
        ({"cache_block_seq_len": 48}, "32, 64, 128, 256"),
    ],
)
def test_invalid_options_are_refused_by_name(llama, options, words):
    with pytest.raises(ValueError, match=words):
        workbench.open_engine("numba", llama, **options)


class TestPrefixCache:
    """Keys are made of the content: ids, bytes of injected rows, positions and the attention mask."""

    @pytest.fixture
    def engine(self, llama):
        return workbench.open_engine("numba", llama)

    @staticmethod
    def prompt(seed=0, **changes):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(50, 48, generator=generator) * 0.1
        return Prompt([5] * 100, [rows], [(10, 60)]).replace(**changes)

    def hits(self, engine, prompt):
        before = engine.stats().prefix_hits
        tokens = engine.generate(prompt, CONFIG).token_ids
        return engine.stats().prefix_hits - before, tokens

    def test_same_image_hits_and_another_image_misses(self, engine, alone):
        same, other = self.prompt(), self.prompt(1)
        assert self.hits(engine, same)[0] == 0
        assert self.hits(engine, same)[0] == 96  # three pages of 32; the last token must run
        saved, tokens = self.hits(engine, other)
        assert saved == 0
        assert tokens == alone.generate(other, CONFIG).token_ids
        assert tokens != alone.generate(same, CONFIG).token_ids

    @pytest.mark.parametrize(
        "change",
        [
            {"spans": [Span(attention="bidirectional")]},
            {"position_ids": torch.arange(100) * 2},
            {"input_ids": [6] + [5] * 99},
            {"embedding_ranges": [(11, 61)]},
            {"input_embeddings": "the same rows in bfloat16"},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_key_contains_everything_the_states_depend_on(self, engine, alone, change):
        base = self.prompt()
        if "input_embeddings" in change:
            change = {"input_embeddings": [base.input_embeddings[0].bfloat16()]}
        self.hits(engine, base)
        changed = base.replace(**change)
        saved, tokens = self.hits(engine, changed)
        assert saved == 0
        assert tokens == alone.generate(changed, CONFIG).token_ids

    def test_key_ignores_ids_inside_ranges(self, engine):
        self.hits(engine, self.prompt())
        others = self.prompt(input_ids=[5] * 10 + [9] * 50 + [5] * 40)
        assert self.hits(engine, others)[0] == 96

    def test_changed_last_row_reuses_the_pages_before_it(self, engine, alone):
        base = self.prompt()
        self.hits(engine, base)
        rows = base.input_embeddings[0].clone()
        rows[-1] += 0.01  # token 59, in the second page
        changed = base.replace(input_embeddings=[rows])
        saved, tokens = self.hits(engine, changed)
        assert saved == 32
        assert tokens == alone.generate(changed, CONFIG).token_ids

    def test_bidirectional_span_is_cached_as_a_whole(self, engine, alone):
        """The states in its first page depend on its last row."""
        spans = [Span(attention="bidirectional")]
        base = self.prompt(spans=spans)
        self.hits(engine, base)
        assert self.hits(engine, base) == (96, alone.generate(base, CONFIG).token_ids)
        rows = base.input_embeddings[0].clone()
        rows[-1] += 0.01
        changed = base.replace(input_embeddings=[rows])
        saved, tokens = self.hits(engine, changed)
        assert saved == 0
        assert tokens == alone.generate(changed, CONFIG).token_ids

    def test_generated_tokens_are_cached_for_the_next_prompt(self, engine, alone):
        first = random_prompt()
        generated = engine.generate(first, GenerationConfig(max_new_tokens=60, ignore_eos=True)).token_ids
        follow = first.replace(input_ids=[*first.input_ids, *generated, 7, 8, 9])
        saved, tokens = self.hits(engine, follow)
        assert saved == 96  # of 40 + 59 tokens that were computed
        assert tokens == alone.generate(follow, CONFIG).token_ids

    def test_requesting_all_logits_bypasses_the_cache(self, engine):
        prompt = self.prompt()
        everything = GenerationConfig(max_new_tokens=2, ignore_eos=True, output_logits="all")
        first = engine.generate(prompt, everything)
        again = engine.generate(prompt, everything)
        assert torch.equal(first.logits, again.logits)
        assert len(again.logits) == 101
        assert engine.stats().prefix_hits == 0

    def test_unused_pages_are_evicted_if_the_cache_is_full(self, llama, alone):
        engine = workbench.open_engine("numba", llama, cache_max_entry_count=4)
        for seed in (0, 1, 0):
            assert self.hits(engine, self.prompt(seed))[1] == alone.generate(self.prompt(seed), CONFIG).token_ids
        assert engine.stats().evictions > 0
        engine.forget_prefixes()
        assert (engine.stats().pages_known, engine.stats().pages_used) == (0, 0)

    def test_disabled_cache_has_no_hits(self, llama):
        engine = workbench.open_engine("numba", llama, enable_prefix_caching=False)
        for _ in range(2):
            assert self.hits(engine, self.prompt())[0] == 0
        assert engine.stats().pages_known == 0

    def test_prefixes_are_not_shared_between_short_and_long_rope_factors(self, tmp_path):
        """Phi-3's long factors: in a longer prompt the same prefix has other rotation angles."""
        model = save("phi3, short", tmp_path)  # longer than 128 tokens: the long factors
        engine, plain = (workbench.open_engine("numba", model, enable_prefix_caching=on) for on in (True, False))
        ids = [5 + number % 50 for number in range(140)]
        for prompt in (Prompt(ids[:100]), Prompt(ids), Prompt(ids[:100])):
            assert engine.generate(prompt, CONFIG).token_ids == plain.generate(prompt, CONFIG).token_ids


def test_history_records_the_tokens_of_each_step(llama):
    engine = workbench.open_engine("numba", llama, max_prefill_token_num=16, enable_prefix_caching=False)
    engine.generate(random_prompt(), GenerationConfig(max_new_tokens=3, ignore_eos=True))
    chunks = [(chunk.start, chunk.stop, chunk.decoding) for step in engine.history for chunk in step.chunks]
    assert chunks == [(0, 16, False), (16, 32, False), (32, 40, False), (40, 41, True), (41, 42, True)]
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.new_tokens, stats.steps, stats.finished) == (40, 2, 5, 1)
    assert 0.0 < stats.model_seconds < stats.step_seconds


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
