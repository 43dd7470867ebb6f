"""bfloat16 on the CPU: decode steps of few rows run in one native call, with the same weights, within bfloat16's rounding."""

import pytest
import torch

import workbench
from tests.workbench.small_architectures import save
from workbench.engines.numba_engine import ops


def decode_logits(engine, prompt, count=6):
    """Logits of `count` greedy steps, `[count, vocab]`, and the tokens."""
    config = workbench.GenerationConfig(max_new_tokens=count, ignore_eos=True, output_logits="generation")
    steps = list(engine.stream(prompt, config))
    return torch.cat([step.logits for step in steps]), [token for step in steps for token in step.token_ids]


WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
"""Widths that fill the panels of the native kernels."""


def small_prompt(length=40):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 90, (length,), generator=generator).tolist()
    return workbench.Prompt(ids, [torch.randn(9, 64, generator=generator) * 0.08], [(5, 14)])


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma2", "gemma3", "smollm3, windows"])
def family(request, tmp_path_factory):
    return save(request.param, tmp_path_factory.mktemp("family"), **WIDE), small_prompt()


def test_native_decode_steps_are_within_the_rounding_of_bfloat16(family, monkeypatch):
    """The first step against float64, and all steps until the tokens differ against torch's operations."""
    model, prompt = family
    ran = []
    whole = ops.CpuHalfOperations.whole_layers

    def noted(self, layers, rotations, rows):
        found = whole(self, layers, rotations, rows)
        ran.append(found is not None)
        return found

    monkeypatch.setattr(ops.CpuHalfOperations, "whole_layers", noted)
    with (
        workbench.open_engine("transformers", model, dtype="float64") as reference,
        workbench.open_engine("numba", model, dtype="bfloat16", packed_decode=True) as native,
        workbench.open_engine("numba", model, dtype="bfloat16", eager_mode=True) as eager,
    ):
        exact, _ = decode_logits(reference, prompt)
        found, tokens = decode_logits(native, prompt)
        assert any(ran)
        plain, same = decode_logits(eager, prompt)
    size = exact[0].abs().max()
    assert (found[0] - exact[0]).abs().max() <= max(1.5 * (plain[0] - exact[0]).abs().max(), 0.02 * size)
    shared = next((n for n, pair in enumerate(zip(tokens, same, strict=True)) if pair[0] != pair[1]), len(tokens) - 1)
    assert (found[: shared + 1] - plain[: shared + 1]).abs().max() < 0.1 * size


def test_replaced_and_changed_weights_are_used_at_once(tmp_path):
    model, prompt = save("llama", tmp_path, **WIDE), small_prompt()
    with workbench.open_engine(
        "numba", model, dtype="bfloat16", packed_decode=True, enable_prefix_caching=False
    ) as engine:
        before, _ = decode_logits(engine, prompt)
        layer = engine.decoder.layers[0]
        kept = layer.down.weight
        layer.down.weight = torch.zeros_like(kept)  # as faults do
        replaced, _ = decode_logits(engine, prompt)
        layer.down.weight = kept
        again, _ = decode_logits(engine, prompt)
        layer.mlp_norm.mul_(3.0)  # in place
        changed, _ = decode_logits(engine, prompt)
    assert torch.equal(before, again)
    assert (before - replaced).abs().max() > 0.05 * before.abs().max()
    assert (before - changed).abs().max() > 0.05 * before.abs().max()


def test_a_weight_that_was_replaced_twice_between_steps_is_used(tmp_path):
    """The second may get the address and the number of the first."""
    model, prompt = save("qwen3", tmp_path, **WIDE), small_prompt()
    with workbench.open_engine(
        "numba", model, dtype="bfloat16", packed_decode=True, enable_prefix_caching=False
    ) as engine:
        layer = engine.decoder.layers[0]
        kept = layer.down.weight
        layer.down.weight = kept * 2
        double, _ = decode_logits(engine, prompt)
        layer.down.weight = kept
        layer.down.weight = kept * -3
        other, _ = decode_logits(engine, prompt)
        with torch.inference_mode():
            layer.down.weight = kept * 2  # a tensor without a version
        again, _ = decode_logits(engine, prompt)
    assert torch.equal(double, again)
    assert (double - other).abs().max() > 0.05 * double.abs().max()


def test_packed_decode_is_refused_where_it_means_nothing(tmp_path):
    with pytest.raises(ValueError, match="packed_decode is for bfloat16 on the CPU, not for float32 on cpu"):
        workbench.open_engine("numba", save("llama", tmp_path), packed_decode=True)
    with pytest.raises(ValueError, match="do not compute those of 'granite'"):
        workbench.open_engine("numba", save("granite", tmp_path / "granite"), dtype="bfloat16", packed_decode=True)
