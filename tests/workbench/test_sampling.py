"""Sampling: the same token for the same logits, settings and seed on any device and in any batch, with the right frequencies."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import workbench
from tests.workbench.small_architectures import save
from tests.workbench.test_architectures import prompt_for
from workbench.engines.numba_engine.token_choice import choose_tokens
from workbench.engines.sampling import GenerationState, Sampler
from workbench.engines.sampling_rows import RowSettings, _likeliest, sample_rows, uniform

VOCAB = 3000
_needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
CONFIGS = (
    {"temperature": 1.0, "top_k": 50, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.5, "top_k": 400, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 1, "top_p": 1.0},
    {"temperature": 2.0, "top_k": VOCAB, "top_p": 0.5},
)


def logits_of(seed, dtype=torch.float32):
    x = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    return x.to(dtype).float()


def by_hand(logits, settings):
    """The token, computed in float64 with a stable sort."""
    x = logits.double().numpy()
    order = np.lexsort((np.arange(len(x)), -x))
    if settings.top_k > 0:
        order = order[: settings.top_k]
    scaled = x[order] / settings.temperature
    chances = np.exp(scaled - scaled.max())
    chances /= chances.sum()
    before = np.cumsum(chances) - chances
    kept = ((before <= settings.top_p) | (settings.top_p >= 1)) & (chances >= settings.min_p * chances[0])
    total = np.cumsum(np.where(kept, chances, 0.0))
    return int(order[min(np.searchsorted(total, settings.uniform * total[-1], side="right"), kept.nonzero()[0].max())])


def settings_of(number, seed):
    given = CONFIGS[number % len(CONFIGS)]
    return RowSettings(
        given["temperature"], given["top_k"], given["top_p"], given.get("min_p", 0.0), uniform(seed, number)
    )


def test_rows_are_chosen_as_by_hand():
    rows = 60
    logits = torch.stack([logits_of(seed, torch.bfloat16 if seed % 2 else torch.float32) for seed in range(rows)])
    settings = [settings_of(number, seed=number * 77) for number in range(rows)]
    found = sample_rows(logits, settings).tolist()
    wanted = [by_hand(row, each) for row, each in zip(logits, settings, strict=True)]
    # float32 softmax may put the boundary of a candidate elsewhere than float64 does, rarely
    assert sum(a != b for a, b in zip(found, wanted, strict=True)) <= 1


@pytest.mark.parametrize("count", [64, 1024])
@pytest.mark.parametrize("vocab", [40001, 49152])
def test_the_largest_of_a_large_vocabulary_come_in_a_fixed_order(count, vocab):
    """Many equal logits, infinities and both zeros; against a stable sort."""
    x = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)).mul(4).round().div(4)
    x[0, 77], x[1, 5:9], x[2] = torch.inf, -torch.inf, x[2] * 0.0
    values, ids = _likeliest(x, count)
    order = torch.sort(x, dim=1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(ids, order)
    assert torch.equal(values, x.gather(1, order))


def test_a_row_does_not_depend_on_the_rows_beside_it():
    settings = [settings_of(number, seed=5) for number in range(20)]
    logits = torch.stack([logits_of(seed) for seed in range(20)])
    together = sample_rows(logits, settings).tolist()
    alone = [int(sample_rows(logits[n : n + 1], settings[n : n + 1])) for n in range(20)]
    assert together == alone


def test_tokens_come_as_often_as_their_probability_says():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -8.0]])
    draws = 20000
    settings = [RowSettings(1.0, 4, 1.0, 0.0, uniform(seed, 3)) for seed in range(draws)]
    counts = np.bincount(sample_rows(logits.expand(draws, -1), settings).numpy(), minlength=5)
    expected = logits[0, :4].softmax(dim=0).numpy() * draws
    assert counts[4] == 0
    assert ((counts[:4] - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_random_numbers_are_even_and_differ_by_seed_and_token():
    numbers = np.array([[uniform(seed, index) for index in range(200)] for seed in range(200)])
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert len(np.unique(numbers)) == numbers.size
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.02


def states_for(device_count):
    """Requests of every kind, with seeds, some tokens generated."""
    prompt = workbench.Prompt([3, 5, 7])
    found = []
    for number in range(device_count):
        given = dict(CONFIGS[number % len(CONFIGS)], do_sample=number % 7 != 3, random_seed=1000 + number)
        if number % 3 == 0:
            given["repetition_penalty"] = 1.3
        if number % 4 == 1:
            given["bad_token_ids"] = [number, 11]
        if number % 5 == 2:
            given["min_new_tokens"] = 6
        found.append(
            GenerationState(prompt, workbench.GenerationConfig(max_new_tokens=20, **given), frozenset([2, 17]))
        )
    return found


@pytest.mark.gpu
@_needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_chooses_the_tokens_of_the_host(dtype):
    """Ten steps of 35 requests: alone, together, and on the host."""
    count = 35
    together, alone, host = states_for(count), states_for(count), states_for(count)
    differ = 0
    for step in range(10):
        logits = torch.stack([logits_of(100 * step + n, dtype) for n in range(count)]).cuda()
        likeliest = logits.argmax(dim=1)
        tokens = choose_tokens(logits, likeliest, together).tolist()
        ones = [int(choose_tokens(logits[n : n + 1], likeliest[n : n + 1], alone[n : n + 1])) for n in range(count)]
        assert tokens == ones
        for number, token in enumerate(tokens):
            sampler: Sampler = host[number].sampler
            wanted, _ = sampler.next(logits[number].cpu(), host[number].num_generated)
            differ += wanted != token
            sampler.seen.add(token)
            for states in (together, alone):
                states[number].next_token(token)
            host[number].num_generated = together[number].num_generated
    assert differ <= 3  # of 350: a softmax rounded otherwise may put the boundary of a candidate elsewhere


@pytest.mark.gpu
@_needs_gpu
def test_nan_in_one_row_is_reported_for_that_row():
    states = states_for(4)
    logits = torch.stack([logits_of(n) for n in range(4)]).cuda()
    logits[2, 40] = torch.nan
    best = logits.max(dim=1)
    likeliest = torch.where(best.values.isnan(), -1, best.indices)
    clean = choose_tokens(logits[:2], likeliest[:2], states_for(2)).tolist()
    tokens = choose_tokens(logits, likeliest, states).tolist()
    assert tokens[2] == -1
    assert tokens[:2] == clean


@pytest.mark.gpu
@_needs_gpu
def test_sampled_streams_are_those_of_the_host_path(tmp_path):
    """Generation through CUDA graphs, steps launched ahead, against the same requests with log probabilities, which are chosen on the host."""
    model = save("llama", tmp_path, head_dim=64)
    prompt = prompt_for("llama", model.text_config)
    settings = [
        {
            "do_sample": True,
            "random_seed": seed,
            "top_k": 20,
            "temperature": 1.3,
            "repetition_penalty": penalty,
            "min_new_tokens": 4,
        }
        for seed, penalty in ((1, 1.0), (2, 1.4), (3, 1.1))
    ]
    with workbench.open_engine("numba", model, device="cuda", dtype="bfloat16") as engine:
        for given in settings:
            on_device = engine.generate(prompt, workbench.GenerationConfig(max_new_tokens=24, ignore_eos=True, **given))
            on_host = engine.generate(
                prompt, workbench.GenerationConfig(max_new_tokens=24, ignore_eos=True, logprobs=0, **given)
            )
            assert on_device.token_ids == on_host.token_ids
        assert engine.runner.graphs is not None
        assert engine.runner.graphs._graphs  # decode steps ran as graphs
        configs = [workbench.GenerationConfig(max_new_tokens=24, ignore_eos=True, **given) for given in settings] * 2
        with ThreadPoolExecutor(len(configs)) as pool:
            together = [each.token_ids for each in pool.map(lambda config: engine.generate(prompt, config), configs)]
        assert [len(each) for each in together] == [24] * 6


def test_a_seed_gives_the_same_answer_again(tmp_path):
    model = save("llama", tmp_path)
    prompt = prompt_for("llama", model.text_config)
    with workbench.open_engine("numba", model) as engine:
        answers = []
        for seed in (4, 4, 5):
            config = workbench.GenerationConfig(
                max_new_tokens=16, do_sample=True, random_seed=seed, top_k=0, ignore_eos=True
            )
            answers.append(engine.generate(prompt, config).token_ids)
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]
