"""Whole decoder layers in one call, and linear layers: the bits of a row are the same whatever is computed with it, and however."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import torch
from range_kernels import KVPages, PagedPlan, paged_attention
from range_kernels.cpu.simd import COLUMNS, ROWS
from range_kernels.ops import LayerSettings, Linear, decoder_layers, gate, rms_norm, rotate

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS = 2 * COLUMNS, 4, 2, COLUMNS, 3 * COLUMNS, 3
PAGE_SIZE = 32
EPSILON, SCALE = 1e-5, 0.2
EVERYTHING = {"biased": True, "head_norms": True, "after": True, "gelu": True, "softcap": 20.0, "interleaved": True}


def some_layers(biased=False, head_norms=False, after=False, **_):
    shapes = {"qkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), "output": (HIDDEN, HEADS * HEAD_DIM)}
    shapes |= {"gate_up": (2 * INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}

    def norm(wanted=True):
        return torch.rand(HIDDEN) + 0.5 if wanted else None

    return [
        SimpleNamespace(
            **{name: Linear(torch.randn(shape) * 0.2, torch.randn(shape[0]) if biased else None) for name, shape in shapes.items()},
            attention_norm=norm(), mlp_norm=norm(), after_attention=norm(after), after_mlp=norm(after),
            head_norms=torch.rand(2, HEAD_DIM) + 0.5 if head_norms else None,
        )
        for _ in range(LAYERS)
    ]  # fmt: skip


def some_batch(lengths, gelu=False, softcap=0.0, interleaved=False, **_):
    """Requests of `lengths`, pairs of new tokens and tokens before them; returns hidden states, settings, pages and a plan."""
    tokens = sum(new for new, _ in lengths)
    counts = [-(-(new + before) // PAGE_SIZE) for new, before in lengths]
    table = np.zeros((len(lengths), max(counts)), np.int32)
    order, first = np.random.default_rng(0).permutation(sum(counts)), 0
    for row, count in enumerate(counts):
        table[row, :count] = order[first : first + count]
        first += count
    pages = KVPages(LAYERS, sum(counts), PAGE_SIZE, KV_HEADS, HEAD_DIM)
    pages.keys[:] = np.random.default_rng(1).standard_normal(pages.keys.shape)
    pages.values[:] = np.random.default_rng(2).standard_normal(pages.values.shape)
    cu = np.concatenate([[0], np.cumsum([new for new, _ in lengths])]).astype(np.int32)
    plan = PagedPlan(table, cu, [new + before for new, before in lengths], pages, HEADS)
    positions = torch.from_numpy(
        np.concatenate([np.arange(before, before + new) for new, before in lengths]).astype(np.int32)
    )
    angles = torch.rand(tokens, HEAD_DIM // 4)
    settings = LayerSettings(
        EPSILON, gelu, softcap, SCALE, rotations=[(angles.cos(), angles.sin(), interleaved), (angles.sin(), angles.cos(), not interleaved)],
        rope_of=[0, -1, 1], key_starts=[torch.zeros(tokens, dtype=torch.int32), (positions - 20).clamp(min=0).int()], window_of=[1, 0, 1],
        key_stop=positions + 1,
    )  # fmt: skip
    return torch.randn(tokens, HIDDEN), settings, pages, plan


def one_by_one(hidden, layers, settings, pages, plan):
    """The same by separate operations."""
    for number, layer in enumerate(layers):
        x = layer.qkv(rms_norm(hidden, layer.attention_norm, EPSILON))
        x = x.view(len(x), HEADS + 2 * KV_HEADS, HEAD_DIM)
        heads, values = x[:, : HEADS + KV_HEADS], x[:, HEADS + KV_HEADS :]
        if layer.head_norms is not None:
            parts = zip(heads.split([HEADS, KV_HEADS], dim=1), layer.head_norms, strict=True)
            heads = torch.cat([rms_norm(part, weight, EPSILON) for part, weight in parts], dim=1)
        if settings.rope_of[number] >= 0:
            heads = rotate(heads, *settings.rotations[settings.rope_of[number]])
        seen = paged_attention(
            heads[:, :HEADS], pages, number, plan, new=(heads[:, HEADS:], values), key_start=settings.key_starts[settings.window_of[number]],
            key_stop=settings.key_stop, softcap=settings.softcap, scale=settings.scale,
        )  # fmt: skip
        added = layer.output(seen.flatten(1))
        if layer.after_attention is not None:
            added = rms_norm(added, layer.after_attention, EPSILON)
        hidden = hidden + added
        added = layer.down(gate(layer.gate_up(rms_norm(hidden, layer.mlp_norm, EPSILON)), settings.gelu))
        if layer.after_mlp is not None:
            added = rms_norm(added, layer.after_mlp, EPSILON)
        total, hidden = hidden, hidden + added
    return total, added


@pytest.mark.parametrize("options", [{}, *({name: value} for name, value in EVERYTHING.items()), EVERYTHING], ids=str)
@pytest.mark.parametrize(
    "lengths", [[(1, 40)], [(1, 0), (1, 70)], [(5, 3), (1, 9)], [(130, 0), (1, 64), (33, 31)]], ids=str
)
def test_whole_layers_have_the_bits_of_separate_operations(options, lengths):
    torch.manual_seed(3)
    layers, (hidden, settings, pages, plan) = some_layers(**options), some_batch(lengths, **options)
    before, given = (pages.keys.copy(), pages.values.copy()), hidden.clone()
    wanted = one_by_one(hidden, layers, settings, pages, plan)
    written = pages.keys.copy(), pages.values.copy()
    pages.keys[:], pages.values[:] = before
    got = decoder_layers(hidden, layers, settings, pages, plan)
    assert torch.equal(hidden, given)
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))
    assert np.array_equal(pages.keys, written[0])
    assert np.array_equal(pages.values, written[1])


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="Numba has one thread here; the next test starts more")
def test_whole_layers_do_not_depend_on_the_number_of_threads():
    layers, batch = some_layers(**EVERYTHING), some_batch([(37, 5), (1, 9)], **EVERYTHING)
    results = []
    for threads in (1, 2):
        numba.set_num_threads(threads)
        results.append(decoder_layers(batch[0], layers, *batch[1:]))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def run_python(code, **environment):
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_three_threads_and_fewer_than_numba_believes():
    """Three threads give the bits of one; where OpenMP starts fewer than asked for, nothing is run, instead of waiting forever."""
    code = """
import numba, torch
from tests.range_kernels.test_decoder_layers import EVERYTHING, decoder_layers, some_batch, some_layers
torch.manual_seed(0)
layers, batch = some_layers(**EVERYTHING), some_batch([(37, 5), (1, 9)], **EVERYTHING)
together = decoder_layers(batch[0], layers, *batch[1:])
numba.set_num_threads(1)
alone = decoder_layers(batch[0], layers, *batch[1:])
print(numba.threading_layer(), together is not None and all(map(torch.equal, together, alone)), together is None)
"""
    layer, same, _ = run_python(code, NUMBA_NUM_THREADS="3", OMP_NUM_THREADS="3")
    assert same == "True"
    if layer == "omp":
        assert run_python(code, NUMBA_NUM_THREADS="3", OMP_THREAD_LIMIT="1")[1:] == ["False", "True"]


@pytest.mark.parametrize(("inputs", "outputs"), [(576, 960), (100, 70), (64, 32), (1, 5), (200, 333)])
def test_rows_of_a_linear_layer_do_not_depend_on_their_number_or_place(inputs, outputs):
    torch.manual_seed(inputs)
    linear, x = Linear(torch.randn(outputs, inputs)), torch.randn(600, inputs)
    whole = linear(x)
    exact = x.double() @ linear.weight.double().T
    error, of_torch = ((y.double() - exact).abs().max() for y in (whole, x @ linear.weight.T))
    assert error <= max(1.5 * of_torch, 1e-6)
    counts = [*range(1, 3 * ROWS), 255, 256, 257, 300, 512, 599]
    for count in counts:
        for first in {0, 1, 5, 600 - count} & set(range(601 - count)):
            assert torch.equal(linear(x[first : first + count]), whole[first : first + count]), (count, first)


def test_whole_layers_refuse_what_does_not_fit():
    layers, (hidden, settings, pages, plan) = some_layers(), some_batch([(3, 0)])
    with pytest.raises(ValueError, match="make the numbers of tokens equal"):
        decoder_layers(hidden[:2], layers, settings, pages, plan)
    with pytest.raises(ValueError, match="2 layers, rotations for 3"):
        decoder_layers(hidden, layers[:2], settings, pages, plan)
    narrow = Linear(torch.randn(HIDDEN - 1, HEADS * HEAD_DIM))
    layers[1].output = narrow
    with pytest.raises(ValueError, match="output of layer 1"):
        decoder_layers(hidden, layers, settings, pages, plan)
    layers = some_layers()
    layers[2].mlp_norm = torch.ones(HIDDEN).double()
    with pytest.raises(ValueError, match="a weight of layer 2 is torch.float64"):
        decoder_layers(hidden, layers, settings, pages, plan)


def test_the_digest_of_the_kernels_is_current():
    from range_kernels.cpu import layer, ops
    from range_kernels.cpu.simd import DIGEST

    assert ops.SIMD_DIGEST == DIGEST, f"simd.py changed: set SIMD_DIGEST in cpu/ops.py to {DIGEST!r}"
    assert layer.KERNELS_DIGEST == layer.SOURCES_DIGEST, (
        f"attention.py, ops.py or simd.py changed: set KERNELS_DIGEST in cpu/layer.py to {layer.SOURCES_DIGEST!r}"
    )


@pytest.mark.parametrize("outputs", [70, 4 * COLUMNS])
@pytest.mark.parametrize("inputs", [64, 200])
def test_weights_kept_in_bfloat16_give_the_bits_of_float32(inputs, outputs):
    torch.manual_seed(outputs)
    weight, x = torch.randn(outputs, inputs).bfloat16(), torch.randn(300, inputs)
    small, large = Linear(weight), Linear(torch.cat([weight.float(), torch.full((1, inputs), 0.1)]))
    assert small.panels.dtype == np.uint16
    assert large.panels.dtype == np.float32
    assert torch.equal(small.weight, weight.float())
    for rows in (1, 2, 3, 7, 8, 9, 47, 48, 49, 57, 256, 300):
        assert torch.equal(small(x[:rows]), large(x[:rows])[:, :outputs]), rows
    small.weight = weight.float() + 0.1
    assert small.panels.dtype == np.float32


@pytest.mark.parametrize("lengths", [[(1, 40)], [(130, 0), (1, 64), (33, 31)]], ids=str)
def test_whole_layers_take_both_kinds_of_weights(lengths):
    torch.manual_seed(4)
    layers, (hidden, settings, pages, plan) = some_layers(**EVERYTHING), some_batch(lengths, **EVERYTHING)
    for layer, names in zip(layers, [("qkv", "down"), ("output",), ("gate_up", "output", "qkv", "down")], strict=True):
        for name in names:
            linear = getattr(layer, name)
            linear.weight = linear.weight.bfloat16()
    wanted = one_by_one(hidden, layers, settings, pages, plan)
    assert all(
        torch.equal(*pair) for pair in zip(decoder_layers(hidden, layers, settings, pages, plan), wanted, strict=True)
    )
