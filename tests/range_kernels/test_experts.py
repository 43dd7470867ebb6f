"""Experts of a mixture against float64, one product after the other; rows independent of the batch; bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from range_kernels import reference
from range_kernels.experts import ClippedGate, Experts

from tests.range_kernels.gpu_calls import NEEDS_GPU

GPU = pytest.param("cuda", marks=NEEDS_GPU)
CLIPPED = ClippedGate(1.702, 0.7)


def random_experts(count, hidden, intermediate, dtype=torch.float32, device="cpu", biased=False, seed=0, **options):
    """Experts, and their weights as float64 arrays on the host."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(shape, generator=generator) * 0.3).to(dtype)

    parts = [draw(count, 2 * intermediate, hidden), draw(count, hidden, intermediate)]
    parts += [draw(count, 2 * intermediate), draw(count, hidden)] if biased else []
    return Experts(*(each.to(device) for each in parts), **options), [each.double().numpy() for each in parts]


def random_rows(rows, hidden, count, chosen, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, hidden, generator=generator).to(dtype)
    experts = torch.rand(rows, count, generator=generator).topk(chosen, dim=1).indices.sort(dim=1).values
    return x, experts, torch.rand(rows, chosen, generator=generator)


def expected(parts, x, chosen, weights, **options):
    x, chosen, weights = (each.double().numpy() for each in (x, chosen, weights))
    return torch.from_numpy(reference.experts(*parts[:2], x, chosen.astype(int), weights, *parts[2:], **options))


OPTIONS = [{}, {"gelu": True}, {"clipped": CLIPPED}, {"scaled_input": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_experts_equal_float64(device, dtype, error, biased, options):
    experts, parts = random_experts(5, 48, 40, dtype, device, biased, **options)
    x, chosen, weights = random_rows(70, 48, 5, 2, dtype)
    found = experts(x.to(device), chosen.to(device), weights.to(device)).double().cpu()
    wanted = expected(parts, x, chosen, weights, **options)
    assert (found - wanted).norm() / wanted.norm() < error


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 33), st.integers(0, 300), st.data())
def test_any_shape_equals_float64(count, hidden, intermediate, rows, data):
    """Widths that do not fill a panel, experts without a row, and with many."""
    chosen = data.draw(st.integers(1, count))
    experts, parts = random_experts(count, hidden, intermediate, seed=rows)
    x, which, weights = random_rows(rows, hidden, count, chosen)
    wanted = expected(parts, x, which, weights)
    found = experts(x, which, weights)
    assert found.shape == wanted.shape
    assert not rows or float((found.double() - wanted).abs().max()) < 2e-5


@settings(deadline=None)
@given(st.integers(1, 600), st.data())
def test_rows_do_not_depend_on_the_batch(rows, data):
    experts, _ = random_experts(6, 48, 40)
    x, chosen, weights = random_rows(600, 48, 6, 3)
    whole = experts(x, chosen, weights)
    start = data.draw(st.integers(0, 600 - rows))
    part = slice(start, start + rows)
    assert torch.equal(experts(x[part], chosen[part], weights[part]), whole[part])


def test_nan_in_one_expert_stays_with_its_rows():
    _, parts = random_experts(4, 48, 40)
    gate_up, down = (torch.from_numpy(part).float() for part in parts)
    gate_up[2] = float("nan")
    x, chosen, weights = random_rows(50, 48, 4, 2)
    found = Experts(gate_up, down)(x, chosen, weights)
    assert torch.equal(found.isnan().any(dim=1), (chosen == 2).any(dim=1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_grouped_products_can_be_captured():
    """The number of rows of each expert is known on the GPU only."""
    experts, parts = random_experts(8, 64, 48, torch.bfloat16, "cuda")
    assert experts.grouped
    x, chosen, weights = (each.cuda() for each in random_rows(6, 64, 8, 2, torch.bfloat16))
    experts(x, chosen, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(x, chosen, weights)
    other = random_rows(6, 64, 8, 2, torch.bfloat16, seed=9)
    for into, values in zip((x, chosen, weights), other, strict=True):
        into.copy_(values)
    graph.replay()
    wanted = expected(parts, *other)
    assert (out.double().cpu() - wanted).norm() / wanted.norm() < 2e-2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda x, c, w: (x[:, :5], c, w), "expected torch.float32"),
        (lambda x, c, w: (x.double(), c, w), "float64"),
        (lambda x, c, w: (x, c.int(), w), "int32"),
        (lambda x, c, w: (x, c[:3], w), "chosen is"),
        (lambda x, c, w: (x, c, w[:, :1]), "weights"),
        (lambda x, c, w: (x, c + 1, w), "there are 4 experts"),
        (lambda x, c, w: (x, c - 4, w), "there are 4 experts"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    experts, _ = random_experts(4, 48, 40)
    with pytest.raises(ValueError, match=words):
        experts(*arguments(*random_rows(5, 48, 4, 2)))


def test_wrong_weights_are_named():
    gate_up, down = torch.zeros(3, 8, 6), torch.zeros(3, 6, 4)
    for wrong, words in [
        ((gate_up, down[:2]), "down is"), ((gate_up[:, :7], down), "down is"), ((gate_up, down.double()), "float64"),
        ((gate_up[0], down), "gate_up is"), ((gate_up, down, torch.zeros(3, 7)), "gate_up_bias"),
        ((gate_up, down, None, torch.zeros(2, 6)), "down_bias"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Experts(*wrong)
