"""The GPU kernels between a decoder's matrix products, against float64; needs a GPU: `make test-gpu`."""

import pytest
import torch
from range_kernels import ops

from tests.range_kernels.gpu_calls import NEEDS_GPU

pytestmark = NEEDS_GPU

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


def check(found, exact, dtype, roundings=1.0):
    """At most `roundings` roundings to `dtype`, and a few of float32."""
    info = torch.finfo(dtype)
    limit = (roundings * info.eps / 2 + 16 * torch.finfo(torch.float32).eps) * exact.abs()
    assert ((found.double() - exact).abs() <= limit + 0.51 * info.smallest_normal * info.eps).all()


def normed(x, weight, epsilon):
    return x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * weight


@pytest.mark.parametrize("width", [8, 64, 1032, 3072, 16384])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_sum(dtype, width):
    x, added = drawn(37, width, dtype=dtype), drawn(37, width, dtype=dtype, seed=1)
    for weight in (drawn(width, dtype=dtype, seed=2), drawn(width, seed=3)):
        check(ops.rms_norm(x, weight, 1e-6), normed(x.double(), weight.double(), 1e-6), dtype)
        total, norm = ops.add_rms_norm(x, added, weight, 1e-6)
        assert torch.equal(total, x + added)
        assert torch.equal(norm, ops.rms_norm(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_other_rows_and_nan_stays_in_its_row(dtype):
    x, weight, both = (
        drawn(64, 2048, dtype=dtype),
        drawn(2048, dtype=dtype, seed=1),
        drawn(64, 2048, dtype=dtype, seed=2),
    )
    x[5, 7] = both[5, 7] = float("nan")
    for function in (lambda rows: ops.rms_norm(rows, weight, 1e-6), ops.gate):
        given = x if function is not ops.gate else both
        whole = function(given)
        assert whole[5].isnan().any()
        assert not whole[[0, 4, 6, 63]].isnan().any()
        alone = function(given[6:7])
        assert torch.equal(alone[0], whole[6])


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate(dtype, gelu):
    both = drawn(19, 2 * 8200, dtype=dtype) * 4
    both[0, :6] = torch.tensor([0.0, -0.0, 60.0, -60.0, 1e3, -1e3]).to(dtype)
    first, second = both.double().chunk(2, dim=1)
    activated = torch.nn.functional.gelu(first, approximate="tanh") if gelu else torch.nn.functional.silu(first)
    found, exact = ops.gate(both, gelu), activated * second
    info = torch.finfo(dtype)
    limit = (info.eps / 2 + 4e-6) * exact.abs() + 2e-6 * second.abs() + 0.51 * info.smallest_normal * info.eps
    close = (found.double() - exact).abs() <= limit
    assert close.all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("head_dim", "pairs"), [(64, 32), (128, 64), (80, 40), (96, 24), (256, 128)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_are_normed_and_rotated_in_place(dtype, head_dim, pairs, norms, interleaved):
    stacked = drawn(21, 9, head_dim, dtype=dtype)  # five query heads, two key heads, two that stay as they are
    before, heads = stacked.clone(), stacked[:, :7]
    angles = torch.rand(21, pairs, generator=torch.Generator().manual_seed(4)) * 6.3
    cosine, sine = angles.cos().cuda(), angles.sin().cuda()
    weights = drawn(2, head_dim, dtype=dtype, seed=5) if norms else None
    found = ops.rotate_heads(heads, cosine, sine, interleaved, norms=weights, queries=5, epsilon=1e-6)
    assert found.data_ptr() == stacked.data_ptr()
    assert torch.equal(stacked[:, 7:], before[:, 7:])
    x = before[:, :7].double()
    if weights is not None:
        parts = [normed(x[:, :5], weights[0].double(), 1e-6), normed(x[:, 5:], weights[1].double(), 1e-6)]
        x = torch.cat(parts, dim=1).to(dtype).double()
    a, b = (
        (x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]) if interleaved else x[..., : 2 * pairs].chunk(2, dim=-1)
    )
    c, s = cosine.double()[:, None], sine.double()[:, None]
    pair = (a * c - b * s, b * c + a * s)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    exact = torch.cat([turned, x[..., 2 * pairs :]], dim=-1)
    scale = exact.abs() + x.norm(dim=-1, keepdim=True) * 0.05
    assert ((found.double() - exact).abs() <= 1.6 * torch.finfo(dtype).eps * scale + 1e-6 * scale).all()
    if not norms:
        assert torch.equal(ops.rotate(before[:, :7], cosine, sine, interleaved), found)


@pytest.mark.parametrize(("head_dim", "pairs", "norms"), [(64, 32, False), (96, 24, True), (128, 64, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_and_values_are_written_to_the_cache(dtype, head_dim, pairs, norms):
    from range_kernels.cuda import layer_ops

    stacked = drawn(21, 9, head_dim, dtype=dtype)  # five query heads, two of keys, two of values
    plain, cache = stacked.clone(), [drawn(40, 2, head_dim, dtype=dtype, seed=each) for each in (7, 8)]
    before = [each.clone() for each in cache]
    angles = torch.rand(21, pairs, generator=torch.Generator().manual_seed(4)) * 6.3
    cosine, sine = angles.cos().cuda(), angles.sin().cuda()
    weights = drawn(2, head_dim, dtype=dtype, seed=5) if norms else None
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(6))[:21].cuda()
    layer_ops.launch_rotate(stacked[:, :7], cosine, sine, False, weights, 5, 1e-6, (*cache, slots))
    layer_ops.launch_rotate(plain[:, :7], cosine, sine, False, weights, 5, 1e-6)
    assert torch.equal(stacked, plain)
    assert torch.equal(cache[0][slots], plain[:, 5:7])
    assert torch.equal(cache[1][slots], plain[:, 7:])
    others = torch.ones(40, dtype=torch.bool, device="cuda").index_fill(0, slots, False)
    assert all(torch.equal(now[others], was[others]) for now, was in zip(cache, before, strict=True))


def test_bad_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match="multiple of 8 wide"):
        ops.rms_norm(drawn(3, 12), drawn(12), 1e-6)
    with pytest.raises(ValueError, match="make the widths equal"):
        ops.rms_norm(drawn(3, 16), drawn(8), 1e-6)
    with pytest.raises(ValueError, match="make shapes, dtypes and devices equal"):
        ops.add_rms_norm(drawn(3, 16), drawn(2, 16), drawn(16), 1e-6)
    with pytest.raises(ValueError, match="expected float32"):
        ops.rotate_heads(drawn(3, 2, 16), drawn(3, 8, dtype=torch.float16), drawn(3, 8))
    with pytest.raises(ValueError, match="contiguous heads"):
        ops.rotate_heads(drawn(3, 2, 16).transpose(0, 1).contiguous().transpose(0, 1), drawn(3, 8), drawn(3, 8))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 1), (264, 17), (1024, 16), (1032, 33), (3072, 300), (4104, 5)])
def test_products_of_few_rows(dtype, rows, inputs, outputs):
    """Widths that end inside a piece, with and without a bias; nothing is written past the last output."""
    from range_kernels.cuda import row_products

    x, weight = drawn(rows, inputs, dtype=dtype), drawn(outputs, inputs, dtype=dtype, seed=1) * 0.1
    for bias in (None, drawn(outputs, dtype=dtype, seed=2)):
        whole = x.new_full((rows * outputs + 8,), torch.nan)
        out = whole[: rows * outputs].view(rows, outputs)
        row_products.launch(x, weight, bias, out)
        exact = x.double() @ weight.double().T
        size = x.double().abs() @ weight.double().abs().T
        exact, size = (exact, size) if bias is None else (exact + bias.double(), size + bias.double().abs())
        assert ((out.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6 * size).all()
        assert whole[rows * outputs :].isnan().all()
        for row in range(rows):  # a row's bits do not depend on the others
            alone = x.new_empty(1, outputs)
            row_products.launch(x[row : row + 1].contiguous(), weight, bias, alone)
            assert torch.equal(alone[0], out[row])
