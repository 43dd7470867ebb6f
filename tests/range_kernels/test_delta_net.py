"""Gated delta rule and causal convolution against float64; chunks, slots, bad input."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from range_kernels import reference
from range_kernels.delta_net import Sequences, causal_convolution, gated_delta_rule

from tests.range_kernels.gpu_calls import NEEDS_GPU

DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def sequences_of(lengths, slots, fresh, device="cpu"):
    cu = torch.tensor([0, *np.cumsum(lengths).tolist()])
    return Sequences(*(each.to(device) for each in (cu, torch.tensor(slots), torch.tensor(fresh))))


def random_rule(tokens, key_heads=2, heads=4, key_dim=24, value_dim=20, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    decay, beta = -draw(tokens, heads).abs() * 0.2, torch.sigmoid(draw(tokens, heads))
    return (
        draw(tokens, key_heads, key_dim),
        draw(tokens, key_heads, key_dim),
        draw(tokens, heads, value_dim),
        decay,
        beta,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "sizes", [{}, {"key_dim": 128, "value_dim": 128}, {"key_heads": 1, "heads": 3, "value_dim": 33}]
)
def test_the_rule_equals_float64(device, sizes):
    """Three packed sequences in other slots than their order, one of them empty; used slots are reset."""
    lengths = [70, 0, 33]
    args = random_rule(sum(lengths), **sizes)
    heads, value_dim, key_dim = args[2].shape[1], args[2].shape[2], args[0].shape[2]
    states = torch.full((5, heads, key_dim, value_dim), torch.nan, device=device)
    found = gated_delta_rule(
        *(x.to(device) for x in args), sequences_of(lengths, [3, 0, 1], [True] * 3, device), states
    )
    for slot, part in ((3, slice(0, 70)), (1, slice(70, 103))):
        wanted, state = reference.gated_delta_rule(*(x[part].double().numpy() for x in args))
        assert np.abs(found[part].cpu().numpy() - wanted).max() < 3e-6 * np.abs(wanted).max()
        assert np.abs(states[slot].cpu().numpy() - state).max() < 3e-6 * np.abs(state).max()
    assert states[[2, 4]].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [3, 64, 130])
@pytest.mark.parametrize("kernel", [2, 4])
def test_the_convolution_equals_float64(device, channels, kernel):
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 1, 2]
    x, weight = (torch.randn(n, channels, generator=generator) for n in (12, kernel))
    states = torch.full((4, kernel - 1, channels), torch.nan, device=device)
    found = causal_convolution(
        x.to(device), weight.to(device), sequences_of(lengths, [2, 0, 3], [True] * 3, device), states
    )
    for part in (slice(0, 9), slice(9, 10), slice(10, 12)):
        wanted = reference.causal_convolution(x[part].double().numpy(), weight.double().numpy())
        assert np.abs(found[part].cpu().numpy() - wanted).max() < 1e-6 * np.abs(wanted).max()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=4))
def test_chunks_have_the_bits_of_the_whole(cuts):
    """On the CPU, with another sequence between the chunks."""
    tokens, other = 40, random_rule(6, seed=5)
    args = random_rule(tokens)
    x, weight = torch.randn(tokens, 50, generator=torch.Generator().manual_seed(1)), torch.ones(4, 50) * 0.3
    whole = gated_delta_rule(*args, sequences_of([tokens], [0], [True]), torch.zeros(2, 4, 24, 20))
    convolved = causal_convolution(x, weight, sequences_of([tokens], [0], [True]), torch.zeros(2, 3, 50))
    states, inputs = torch.ones(2, 4, 24, 20), torch.ones(2, 3, 50)
    ends = sorted({0, tokens, *cuts})
    for start, stop in pairwise(ends):
        both = sequences_of([6, stop - start], [1, 0], [True, start == 0])
        packed = [torch.cat([a, b[start:stop]]) for a, b in zip(other, args, strict=True)]
        assert torch.equal(gated_delta_rule(*packed, both, states)[6:], whole[start:stop])
        assert torch.equal(
            causal_convolution(torch.cat([x[:6], x[start:stop]]), weight, both, inputs)[6:], convolved[start:stop]
        )


def test_wrong_arguments_are_named():
    args, states = random_rule(5), torch.zeros(2, 4, 24, 20)
    good = sequences_of([5], [0], [True])
    for changed, words in [
        ((args[0].double(), *args[1:], good, states), "q is torch.float64"),
        ((args[0], args[1][:, :, :3], *args[2:], good, states), "k is"),
        ((*args[:4], args[4][:, :2], good, states), "beta is"),
        ((*args, sequences_of([4], [0], [True]), states), "rise from 0 to 5"),
        ((*args, sequences_of([5], [2], [True]), states), "different ones of 2"),
        ((*args, sequences_of([3, 2], [1, 1], [True, True]), states), "different ones of 2"),
        ((*args, sequences_of([5], [0], [True, False]), states), "entries"),
        ((*args, good, states[:, :, :, ::2]), "v is"),
    ]:
        with pytest.raises(ValueError, match=words):
            gated_delta_rule(*changed)
    x = torch.zeros(5, 8)
    with pytest.raises(ValueError, match="weight is"):
        causal_convolution(x, torch.zeros(4, 8, dtype=torch.float64), good, torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match="states is"):
        causal_convolution(x, torch.zeros(4, 8), good, torch.zeros(2, 2, 8))
