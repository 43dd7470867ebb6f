"""The interface that both engines implement: streaming, sessions, sampling, outputs, and bad input."""

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import workbench
from tests.workbench.small_models import random_prompt, save_llama
from workbench import EmbeddingRangeError, GenerationConfig, Prompt, PromptError, ResponseType

CONFIG = GenerationConfig(max_new_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module", params=["numba", "transformers"])
def small(request, tmp_path_factory):
    return workbench.open_engine(request.param, save_llama(tmp_path_factory.mktemp("llama")))


def arguments(prompt):
    return prompt.input_ids, prompt.input_embeddings, prompt.embedding_ranges


def test_each_token_is_streamed_once(small):
    outputs = list(small.stream_infer(1, *arguments(random_prompt()), CONFIG))
    assert [len(output.token_ids) for output in outputs] == [1] * 10
    assert [output.num_token for output in outputs] == list(range(1, 11))
    assert [output.status for output in outputs] == [ResponseType.SUCCESS] * 9 + [ResponseType.FINISH]
    assert [output.token_ids[0] for output in outputs] == small.generate(random_prompt(), CONFIG).token_ids


def test_lmdeploy_argument_names_are_accepted(small):
    prompt = random_prompt()
    instance = small.create_instance()
    theirs = instance.stream_infer(
        1,
        prompt.input_ids,
        input_embeddings=prompt.input_embeddings,
        input_embedding_ranges=prompt.embedding_ranges,
        gen_config=CONFIG,
    )
    assert [t for output in theirs for t in output.token_ids] == small.generate(prompt, CONFIG).token_ids
    with pytest.raises(EmbeddingRangeError, match="name the same argument"):
        small.stream_infer(1, [1], embedding_ranges=[], input_embedding_ranges=[])
    with pytest.raises(TypeError, match="embeding_ranges"):
        small.stream_infer(1, [1], embeding_ranges=[(0, 1)])


def test_concurrent_async_requests_equal_single_requests(small):
    prompts = [random_prompt(seed, 34 + seed) for seed in range(4)]
    alone = [small.generate(prompt, CONFIG).token_ids for prompt in prompts]

    async def collect(session, prompt):
        return [
            t
            async for output in small.async_stream_infer(session, *arguments(prompt), CONFIG)
            for t in output.token_ids
        ]

    async def everything():
        return await asyncio.gather(*(collect(i, prompt) for i, prompt in enumerate(prompts)))

    assert asyncio.run(everything()) == alone


def test_a_cancelled_task_frees_its_session(small):
    async def run():
        async def consume():
            async for _ in small.async_stream_infer(
                5, *arguments(random_prompt()), GenerationConfig(max_new_tokens=200, ignore_eos=True)
            ):
                started.set()

        started = asyncio.Event()
        task = asyncio.create_task(consume())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert next(small.stream_infer(5, *arguments(random_prompt()), CONFIG)).status is ResponseType.SUCCESS


def test_concurrent_threads_equal_single_requests(small):
    prompts = [random_prompt(seed) for seed in range(4)]
    alone = [small.generate(prompt, CONFIG).token_ids for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda prompt: small.generate(prompt, CONFIG).token_ids, prompts)) == alone


def test_cancel_ends_a_session_and_repeated_sessions_are_refused(small):
    stream = small.stream_infer(7, *arguments(random_prompt()), CONFIG)
    next(stream)
    repeated = list(small.stream_infer(7, *arguments(random_prompt()), CONFIG))
    assert [output.status for output in repeated] == [ResponseType.SESSION_REPEAT]
    assert small.cancel(7)
    rest = list(stream)
    assert rest[-1].status is ResponseType.CANCEL
    assert rest[-1].num_token < 10
    assert not small.cancel(7)
    assert len(list(small.stream_infer(7, *arguments(random_prompt()), CONFIG))) == 10


def test_an_unread_repeated_session_does_not_block_cancel(small):
    first = small.stream_infer(9, *arguments(random_prompt()), CONFIG)
    next(first)
    repeated = small.stream_infer(9, *arguments(random_prompt()), CONFIG)
    assert next(repeated).status is ResponseType.SESSION_REPEAT
    assert small.cancel(9)  # would deadlock if the unread stream still held a lock
    first.close()
    assert len(list(small.stream_infer(9, *arguments(random_prompt()), CONFIG))) == 10


def test_stream_that_is_never_started_leaves_no_session(small):
    stream = small.stream_infer(10, *arguments(random_prompt()), CONFIG)
    del stream
    gc.collect()
    assert not small.cancel(10)


def test_a_closed_stream_frees_its_session(small):
    stream = small.stream_infer(8, *arguments(random_prompt()), CONFIG)
    next(stream)
    stream.close()
    assert next(small.stream_infer(8, *arguments(random_prompt()), CONFIG)).status is ResponseType.SUCCESS


def test_logits_and_hidden_states_equal_the_trace(small):
    prompt = random_prompt()
    everything = GenerationConfig(
        max_new_tokens=3, ignore_eos=True, output_logits="all", output_last_hidden_state="all"
    )
    output = small.generate(prompt, everything)
    assert output.logits.shape == (len(prompt) + 2, 97)
    assert output.last_hidden_state.shape == (len(prompt) + 2, 48)
    trace = small.trace(prompt, ["norm", "logits"])
    assert torch.allclose(output.logits[: len(prompt)], trace["logits"], atol=1e-5)
    assert torch.allclose(output.last_hidden_state[: len(prompt)], trace["norm"], atol=1e-5)
    generation = small.generate(prompt, GenerationConfig(max_new_tokens=3, ignore_eos=True, output_logits="generation"))
    assert torch.allclose(generation.logits, output.logits[len(prompt) - 1 :], atol=1e-5)
    none = small.generate(prompt, GenerationConfig(max_new_tokens=0, output_logits="all"))
    assert none.token_ids == []
    assert none.logits.shape == (len(prompt), 97)


def test_logprobs_are_of_the_chosen_token(small):
    output = small.generate(
        random_prompt(), GenerationConfig(max_new_tokens=4, ignore_eos=True, logprobs=3, output_logits="generation")
    )
    assert len(output.logprobs) == 4
    for token, report, logits in zip(output.token_ids, output.logprobs, output.logits, strict=True):
        assert len(report) == 3
        assert report[token] == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-5)


def test_stop_tokens_end_generation_and_are_not_returned(small):
    tokens = small.generate(random_prompt(), CONFIG).token_ids
    stop = tokens[4]
    first = tokens.index(stop)
    output = small.generate(
        random_prompt(), GenerationConfig(max_new_tokens=10, ignore_eos=True, stop_token_ids=[stop])
    )
    assert output.token_ids == tokens[:first]
    assert output.status is ResponseType.FINISH
    later = GenerationConfig(max_new_tokens=10, ignore_eos=True, stop_token_ids=[stop], min_new_tokens=10)
    assert stop not in small.generate(random_prompt(), later).token_ids
    banned = GenerationConfig(max_new_tokens=10, ignore_eos=True, bad_token_ids=tokens)
    assert not set(small.generate(random_prompt(), banned).token_ids) & set(tokens)


def test_sampling_depends_only_on_its_seed(small):
    def sample(**changes):
        config = GenerationConfig(
            max_new_tokens=20, ignore_eos=True, do_sample=True, temperature=1.0, top_k=0, **changes
        )
        return small.generate(random_prompt(), config).token_ids

    assert sample(random_seed=5) == sample(random_seed=5)
    assert sample(random_seed=5) != sample(random_seed=6)
    greedy = small.generate(random_prompt(), GenerationConfig(max_new_tokens=20, ignore_eos=True)).token_ids
    for narrow in ({"top_p": 0.0}, {"min_p": 1.0}):
        assert sample(random_seed=5, **narrow) == greedy
    one = GenerationConfig(max_new_tokens=20, ignore_eos=True, do_sample=True, top_k=1)
    assert small.generate(random_prompt(), one).token_ids == greedy


@pytest.mark.parametrize(
    "changes", [{"top_p": 1.5}, {"top_k": -1}, {"temperature": 3.0}, {"max_new_tokens": -1}, {"output_logits": "some"}]
)
def test_invalid_generation_settings_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        GenerationConfig(**changes)


BAD = [
    (Prompt([]), PromptError, "no tokens"),
    (Prompt([5, 97]), PromptError, "vocabulary of 97"),
    (Prompt([5] * 300), PromptError, "context of 256"),
    (Prompt([5] * 9, [torch.zeros(2, 48)], [(8, 10)]), EmbeddingRangeError, "leaves the prompt"),
    (Prompt([5] * 9, [torch.zeros(2, 48)] * 2, [(4, 6), (1, 3)]), EmbeddingRangeError, "sort ranges"),
    (Prompt([5] * 9, [torch.zeros(2, 48)] * 2, [(4, 6), (5, 7)]), EmbeddingRangeError, "overlaps"),
    (Prompt([5] * 9, [torch.zeros(2, 48)], [(4, 2)]), EmbeddingRangeError, "backwards"),
    (Prompt([5] * 9, [torch.zeros(3, 48)], [(4, 6)]), EmbeddingRangeError, "has 3 rows"),
    (Prompt([5] * 9, [torch.zeros(2, 64)], [(4, 6)]), EmbeddingRangeError, "64 wide"),
    (Prompt([5] * 9, [torch.full((2, 48), torch.nan)], [(4, 6)]), EmbeddingRangeError, "NaN"),
    (Prompt([5] * 9, position_ids=torch.zeros(3, 9, dtype=torch.long)), PromptError, "M-RoPE"),
    (Prompt([5] * 9, position_ids=torch.arange(-1, 8)), PromptError, "positions start at 0"),
]


@pytest.mark.parametrize(("prompt", "error", "words"), BAD)
def test_bad_input_raises_at_the_call_and_the_engine_keeps_running(small, prompt, error, words):
    running = small.stream_infer(1, *arguments(random_prompt()), CONFIG)
    tokens = next(running).token_ids
    for call in (small.stream, small.trace, small.generate):
        with pytest.raises(error, match=words):
            call(prompt, CONFIG) if call is not small.trace else call(prompt)
    tokens += [t for output in running for t in output.token_ids]
    assert tokens == small.generate(random_prompt(), CONFIG).token_ids


def test_trace_returns_the_selected_taps_and_positions(small):
    prompt = random_prompt()
    trace = small.trace(prompt, ["layers.*.mlp", "embed"], positions=[3, -1])
    assert list(trace) == ["embed", "layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]
    assert trace.positions.tolist() == [3, 39]
    assert torch.equal(trace["embed"], small.trace(prompt, ["embed"])["embed"][[3, 39]])
    with pytest.raises(ValueError, match=r"no tap 'layers.9'"):
        small.trace(prompt, ["layers.9"])
    with pytest.raises(ValueError, match="leave the prompt of 40 tokens"):
        small.trace(prompt, ["embed"], positions=[40])


def test_unknown_engine_is_refused(model):
    with pytest.raises(workbench.ModelError, match="no engine 'bogus': choose one of numba, transformers"):
        workbench.open_engine("bogus", model)
