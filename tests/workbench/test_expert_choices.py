"""Mixtures of experts: a choice that rounding can turn is named, and is neither a bug nor hides one."""

import pytest
import torch
import transformers

import workbench
from tests.workbench.small_models import BASE, random_prompt
from workbench.cli.main import main
from workbench.comparison.noise_floor import NoiseFloor
from workbench.comparison.reference_cache import reference_run
from workbench.engines.transformers.routers import Exchange, RouterWatch

TAPS = ["embed", "layers.0", "layers.1", "layers.2", "norm", "logits"]


def save(folder, config, close: bool) -> workbench.Model:
    """A random mixture of experts; with `close`, experts 0 and 1 of layer 1 have scores that differ by less than rounding."""
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    if close:
        gate = network.model.layers[1].mlp.gate.weight.data
        gate[0] = gate[1] * (1 + 2.4e-7)
    network.save_pretrained(folder)
    return workbench.load_model(folder)


@pytest.fixture(scope="module")
def close(tmp_path_factory):
    config = transformers.MixtralConfig(**{**BASE, "num_local_experts": 4, "num_experts_per_tok": 1})
    return save(tmp_path_factory.mktemp("close"), config, close=True)


def exchanged(model, tokens, experts):
    """An engine whose router of layer 1 chooses other experts at these tokens."""
    engine = workbench.open_engine("transformers", model, dtype="float32")
    engine._watch = RouterWatch({1: Exchange(torch.tensor(tokens), torch.tensor(experts))})
    return engine


def choices(model, dtype):
    """The router of layer 1."""
    engine, watch = workbench.open_engine("transformers", model, dtype=dtype), RouterWatch()
    with engine.watching(watch):
        engine.trace(random_prompt(), ["norm"])
    return watch.passes[0][1]


def close_choice(model):
    """The first token at which the engine chooses expert 0 or 1, and the other of the two."""
    chosen = choices(model, "float32").chosen[:, 0]
    token = int((chosen <= 1).nonzero()[0])
    return token, 1 - int(chosen[token])


def test_choice_that_rounding_turns_is_noise_and_named(close):
    token, other = close_choice(close)
    engine = exchanged(close, [token], [other])
    found = workbench.check_engine(engine, random_prompt(), TAPS)
    assert found.verdict == "noise", found
    assert (1, token) in {(each.layer, each.token) for each in found.expert_choices}
    assert "expert choice flips at layer" in str(found)
    # The two experts' outputs differ by far more than rounding: a floor from one choice alone calls the other a bug.
    reference, _ = reference_run(close, random_prompt(), "float32", TAPS)
    plain = workbench.open_engine("transformers", close, dtype="float32").trace(random_prompt(), TAPS)
    ways = plain, engine.trace(random_prompt(), TAPS)
    verdicts = {
        workbench.compare(reference, one, floor=NoiseFloor.measure(reference, other)).verdict
        for one, other in (ways, ways[::-1])
    }
    assert "bug" in verdicts


def test_wrong_expert_at_a_decided_token_is_a_bug(close):
    _, floor = reference_run(close, random_prompt(), "float32", TAPS)
    undecided = {each.token for each in floor.expert_choices}
    read = choices(close, "float64")
    token = next(token for token in range(len(read.chosen)) if token not in undecided)
    worst = int(read.scores[token].argmin())
    found = workbench.check_engine(exchanged(close, [token], [worst]), random_prompt(), TAPS)
    assert (found.verdict, found.first_divergence.tap, found.first_divergence.token) == ("bug", "layers.1", token)


def test_local_error_knows_undecided_choices(close):
    token, other = close_choice(close)
    errors = workbench.local_error(exchanged(close, [token], [other]), random_prompt())
    assert (errors.accumulated.verdict, errors.local.verdict) == ("noise", "noise")
    assert (1, token) in {(each.layer, each.token) for each in errors.local.expert_choices}


def test_choices_are_stored_with_the_floor(close, tmp_path):
    _, floor = reference_run(close, random_prompt(), "float32", TAPS)
    floor.save(tmp_path / "floor.safetensors")
    assert floor.expert_choices
    assert NoiseFloor.load(tmp_path / "floor.safetensors").expert_choices == floor.expert_choices


def test_sigmoid_routers_with_a_bias_are_understood(tmp_path):
    config = transformers.Dots1Config(
        **{**BASE, "num_attention_heads": 4, "head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
        first_k_dense_replace=1, n_group=1, topk_group=1, moe_intermediate_size=32, pad_token_id=0,
    )  # fmt: skip
    model = save(tmp_path, config, close=False)
    engine, watch = workbench.open_engine("transformers", model, dtype="float64"), RouterWatch()
    with engine.watching(watch):
        engine.trace(random_prompt(), ["norm"])
    assert sorted(watch.passes[0]) == [1, 2]
    assert all(read.scores is not None for read in watch.passes[0].values())


def test_command_line_keeps_undecided_choices(close, tmp_path):
    random_prompt().save(tmp_path / "p.json")
    arguments = ["trace", str(tmp_path / "p.json"), "--model", str(close.path), "--reference", "float32"]
    assert main([*arguments, "--out", str(tmp_path / "t.safetensors")]) == 0
    (stored,) = tmp_path.glob("*floor*")
    assert NoiseFloor.load(stored).expert_choices
