"""Patches: an identity patch changes no bit, a patch of everything is the other run, and what does not fit is refused."""

import threading

import numpy as np
import pytest
import torch

import workbench
from tests.workbench.small_architectures import DISTINCT, save
from tests.workbench.test_architectures import prompt_for
from workbench.analysis.answer_lens import answer_lens
from workbench.analysis.attention import attention_of
from workbench.analysis.patching import patch_effects
from workbench.comparison.noise_floor import NoiseFloor
from workbench.faults import FAULTS, FaultyEngine

KINDS = ("numba", "transformers")
TAPS = ("embed", "layers.0", "layers.1.attention", "layers.0.mlp")


@pytest.fixture(scope="module", params=DISTINCT)
def family(request, tmp_path_factory):
    model = save(request.param, tmp_path_factory.mktemp("family"))
    engines = {kind: workbench.open_engine(kind, model) for kind in KINDS}
    yield engines, prompt_for(request.param, model.text_config)
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = save("llama", tmp_path_factory.mktemp("llama"))
    engine = workbench.open_engine("numba", model)
    yield engine, prompt_for("llama", model.text_config)
    engine.close()


def other_rows(prompt, seed=5):
    """The prompt with other embedding rows."""
    generator = torch.Generator().manual_seed(seed)
    items = [torch.randn(item.shape, generator=generator) * item.std() for item in prompt.input_embeddings]
    return prompt.replace(input_embeddings=items)


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_of_its_own_states_changes_no_bit(family, kind):
    engine, prompt = family[0][kind], family[1]
    taps = [tap for tap in TAPS if tap in engine.capabilities.taps]
    plain = engine.trace(prompt, [*taps, "layers.*", "logits"])
    every = range(len(prompt))
    patches = [workbench.Patch.of(plain, tap, every) for tap in taps]
    again = engine.trace(prompt, [*taps, "layers.*", "logits"], patches=patches)
    for tap in plain:
        assert torch.equal(again[tap], plain[tap]), tap


@pytest.mark.parametrize("kind", KINDS)
def test_all_states_of_another_run_give_its_logits(family, kind):
    engine, prompt = family[0][kind], family[1]
    if prompt.deepstack:
        pytest.skip("features are added after the patched layer")
    other = engine.trace(other_rows(prompt), ["layers.1", "logits"])
    patch = workbench.Patch.of(other, "layers.1", range(len(prompt)))
    patched = engine.trace(prompt, ["layers.1", "logits"], patches=[patch])
    assert torch.equal(patched["layers.1"], other["layers.1"])
    assert (patched["logits"] - other["logits"]).abs().max() < 1e-5 * other["logits"].abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_patched_embeddings_are_injected_rows(family, kind):
    engine, prompt = family[0][kind], family[1]
    changed = other_rows(prompt)
    start, stop = prompt.embedding_ranges[0]
    scale = getattr(engine.model.text_config, "embedding_multiplier", 1.0)  # Granite multiplies injected rows, too
    patch = workbench.Patch("embed", range(start, stop), changed.input_embeddings[0] * scale)
    items = [changed.input_embeddings[0], *prompt.input_embeddings[1:]]
    expected = engine.trace(prompt.replace(input_embeddings=items), ["layers.*", "logits"])
    found = engine.trace(prompt, ["layers.*", "logits"], patches=[patch])
    for tap in expected:
        assert torch.equal(found[tap], expected[tap]), tap


def test_both_engines_compute_the_same_patched_run(family):
    engines, prompt = family
    other = engines["numba"].trace(other_rows(prompt), ["layers.*.*"])
    taps = [tap for tap in ("layers.0.attention", "layers.1.mlp") if tap in engines["transformers"].capabilities.taps]
    patches = [workbench.Patch.of(other, tap, [3, 25, len(prompt) - 2]) for tap in taps]
    runs = [engine.trace(prompt, ["layers.*", "logits"], patches=patches) for engine in engines.values()]
    plain = engines["numba"].trace(prompt, ["logits"])
    assert not torch.equal(runs[0]["logits"], plain["logits"])
    for tap in runs[0]:
        assert (runs[0][tap] - runs[1][tap]).abs().max() < 2e-5 * runs[1][tap].abs().max(), tap


def test_attention_of_the_reference_is_that_of_the_engine(family):
    engines, prompt = family
    config = engines["numba"].decoder.config
    layers = [layer for layer in range(config.layers) if not config.is_linear(layer)]
    theirs = attention_of(engines["transformers"], prompt, layers, [0, -1])
    mine = attention_of(engines["numba"], prompt, layers, [0, -1])
    for layer in layers:
        assert (mine.layers[layer].weights - theirs.layers[layer].weights).abs().max() < 1e-5
    before = engines["transformers"].trace(prompt, ["logits"], [-1])["logits"]
    assert before.isfinite().all()


def test_effects_are_those_of_single_patches(llama):
    engine, prompt = llama
    other = other_rows(prompt)
    tokens = (3, 9)
    seen = []
    effects = patch_effects(engine, prompt, other, tokens, part="mlp", progress=seen.append)
    assert effects.complete
    assert seen[-1] == 1.0
    assert sorted(position for group in effects.positions for position in group) == list(range(len(prompt)))
    states = engine.trace(other, ["layers.1.mlp"])
    column = effects.groups.index("last token")
    patch = workbench.Patch.of(states, "layers.1.mlp", [len(prompt) - 1])
    logits = engine.trace(prompt, ["logits"], [-1], patches=[patch])["logits"][0].double()
    row = effects.taps.index("layers.1.mlp")
    assert effects.values[row, column] == float(logits[3] - logits[9])
    assert "layers.1.mlp" in str(effects)


def test_ranges_of_the_same_label_are_groups_of_their_own(llama):
    engine, prompt = llama
    spans = [workbench.Span("image", label="sinks"), workbench.Span("image", label="sinks")]
    effects = patch_effects(engine, prompt.replace(spans=spans), other_rows(prompt), (3, 9), layers=[0])
    assert {"sinks 0", "sinks 1"} <= set(effects.groups)
    assert sorted(position for group in effects.positions for position in group) == list(range(len(prompt)))


def test_a_patch_of_every_token_moves_the_whole_answer(llama):
    engine, prompt = llama
    every = {"everything": range(len(prompt)), "nothing new": [0]}
    effects = patch_effects(engine, prompt, other_rows(prompt), (3, 9), groups=every)
    shares = effects.shares()
    assert np.allclose(shares[:, 0], 1.0, atol=1e-3)
    assert np.abs(shares[:, 1]).max() < 1e-6  # token 0 is before the first range


def test_a_cancelled_run_returns_what_it_has(llama):
    engine, prompt = llama
    stop = threading.Event()

    def after_two(share):
        if share * 3 * 4 >= 2:
            stop.set()

    effects = patch_effects(engine, prompt, other_rows(prompt), (3, 9), progress=after_two, cancelled=stop)
    assert not effects.complete
    assert 0 < np.isfinite(effects.values).sum() < effects.values.size
    assert "cancelled" in str(effects)


def test_states_of_another_engine_can_be_put_in(family):
    engines, prompt = family
    taps = ["layers.0", "logits"]
    theirs = engines["transformers"].trace(other_rows(prompt), taps)
    effects = patch_effects(engines["numba"], prompt, theirs, (3, 9), layers=[0])
    assert np.isfinite(effects.values).all()


def test_the_lens_of_an_answer_ends_in_what_was_said(llama):
    engine, prompt = llama
    found = answer_lens(engine, prompt, max_tokens=4)
    assert found.taps[0] == "embed"
    assert found.taps[-1] == "norm"
    assert found.words[-1] == list(found.texts)
    assert np.allclose(found.chances[-1], found.said[-1])
    assert found.reads is not None
    assert np.allclose(found.reads.sum(axis=-1), 1.0)
    logits = engine.generate(prompt, workbench.GenerationConfig(max_new_tokens=4, output_logits="generation")).logits
    chance = logits.double().softmax(dim=-1).max(dim=-1).values.numpy()
    assert np.abs(found.chances[-1][: len(chance)] - chance).max() < 1e-5
    assert all(found.decided(number) for number in range(len(found.tokens)))


def test_bad_patches_are_refused(llama):
    engine, prompt = llama
    hidden = engine.model.text_config.hidden_size
    row = torch.zeros(1, hidden)
    for patch, message in (
        (workbench.Patch("norm", [0], row), "cannot be replaced"),
        (workbench.Patch("layers.99", [0], row), "cannot be replaced"),
        (workbench.Patch("layers.0", [0, 1], row), r"states \(1, \d+\) for 2 positions"),
        (workbench.Patch("layers.0", [0], row[:, :3]), r"give \[1, "),
        ("layers.0", "give workbench.Patch"),
        (workbench.Patch("layers.0", [0], row.numpy()), "states are ndarray"),
        (workbench.Patch("layers.0", [0], [[0.0]]), "states are list"),
    ):
        with pytest.raises(workbench.TraceError, match=message):
            engine.trace(prompt, ["logits"], patches=[patch])
    with pytest.raises(workbench.TraceError, match="give a list"):
        engine.trace(prompt, ["logits"], patches=workbench.Patch("embed", [3], row))
    large, small = workbench.Patch("embed", [3], row + 1e6), workbench.Patch("embed", [4], row.half())
    both = engine.trace(prompt, ["embed"], patches=[large, small])["embed"]
    assert torch.equal(both[3:5], torch.cat([row + 1e6, row]))  # dtypes do not meet
    with pytest.raises(ValueError, match="ids are 0 to"):
        answer_lens(engine, prompt, [10**6])
    with pytest.raises(workbench.TraceError, match="patched twice"):
        engine.trace(prompt, ["logits"], patches=[workbench.Patch("embed", [3], row)] * 2)
    with pytest.raises(ValueError, match="leave the prompt"):
        engine.trace(prompt, ["logits"], patches=[workbench.Patch("embed", [1000], row)])
    with pytest.raises(workbench.TraceError, match="lacks tap"):
        workbench.Patch.of(engine.trace(prompt, ["embed"]), "layers.0", [0])
    small = workbench.open_engine("numba", engine.model, dtype="bfloat16")
    with pytest.raises(workbench.TraceError, match="overflow in bfloat16"):
        small.trace(prompt, ["logits"], patches=[workbench.Patch("embed", [3], row + 3.4e38)])
    small.close()


def test_patches_never_enter_a_comparison_or_a_faulty_batch(llama):
    engine, prompt = llama
    reference = workbench.open_engine("transformers", engine.model, dtype="float64")
    expected = reference.trace(prompt)
    patched = engine.trace(prompt, patches=[workbench.Patch("embed", [3], torch.ones(1, expected["embed"].shape[1]))])
    floor = reference_floor(engine.model, prompt)
    with pytest.raises(workbench.TraceError, match="run with patches"):
        workbench.compare(expected, patched, floor=floor)
    wrapped = FaultyEngine(engine, FAULTS["range +1"].change)
    assert wrapped.trace(prompt, ["logits"], patches=[workbench.Patch.of(expected, "embed", [3])]) is not None


def reference_floor(model, prompt):
    same = workbench.open_engine("transformers", model)
    expected = workbench.open_engine("transformers", model, dtype="float64").trace(prompt)
    return NoiseFloor.measure(expected, same.noise_floor(prompt, list(expected)))


def test_bad_runs_of_effects_are_refused(llama):
    engine, prompt = llama
    other = other_rows(prompt)
    longer = prompt.replace(input_ids=[*prompt.input_ids, 3])
    with pytest.raises(workbench.PromptError, match="has"):
        patch_effects(engine, prompt, longer)
    with pytest.raises(ValueError, match="nothing can move"):
        patch_effects(engine, prompt, prompt, (3, 9))
    with pytest.raises(ValueError, match="part='heads'"):
        patch_effects(engine, prompt, other, part="heads")
    with pytest.raises(ValueError, match="has layers 0 to"):
        patch_effects(engine, prompt, other, (3, 9), layers=[77])
    with pytest.raises(ValueError, match="ids are 0 to"):
        patch_effects(engine, prompt, other, (3, 10**6))
    with pytest.raises(ValueError, match="leave the prompt"):
        patch_effects(engine, prompt, other, (3, 9), groups={"x": [1000]})
    with pytest.raises(workbench.TraceError, match="all positions and logits"):
        patch_effects(engine, prompt, engine.trace(other, ["layers.0"]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_patches_and_attention_on_a_gpu(kind, llama):
    engine, prompt = llama
    with workbench.open_engine(kind, engine.model, device="cuda") as on_gpu:
        plain = on_gpu.trace(prompt, ["layers.*", "layers.*.*", "logits"])
        same = [workbench.Patch.of(plain, tap, range(len(prompt))) for tap in ("layers.0.attention", "layers.1")]
        again = on_gpu.trace(prompt, ["layers.*", "logits"], patches=same)
        for tap in again:
            assert torch.equal(again[tap], plain[tap]), tap
        found = patch_effects(on_gpu, prompt, other_rows(prompt), (3, 9))
        expected = patch_effects(engine, prompt, other_rows(prompt), (3, 9))
        assert np.abs(found.values - expected.values).max() < 1e-3
        rows = attention_of(on_gpu, prompt, [1], [-1]).layers[1].weights
        assert (rows - attention_of(engine, prompt, [1], [-1]).layers[1].weights).abs().max() < 1e-4
        lens = answer_lens(on_gpu, prompt, max_tokens=3)
        assert lens.words[-1] == list(lens.texts)
