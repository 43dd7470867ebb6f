"""Verdicts: rounding is noise, each injected fault is a bug at the right place, and incomparable traces are refused."""

from dataclasses import replace

import pytest
import torch

import workbench
from workbench import GenerationConfig, TraceError
from workbench.benchmarks.calibrate_verdict import clean_prompts, clean_runs
from workbench.comparison import check_engine, compare
from workbench.comparison.doubt import compare_with_doubt
from workbench.comparison.metrics import cosine, relative_error, unit_roundoff
from workbench.comparison.noise_floor import NoiseFloor
from workbench.comparison.reference_cache import reference_engine as cached_reference
from workbench.comparison.reference_cache import reference_run
from workbench.faults import FAULTS
from workbench.trace import Trace

pytestmark = pytest.mark.slow

TAPS = ["embed", "layers.*", "layers.*.*", "norm", "logits"]


@pytest.fixture(scope="module")
def prompt(model, japan):
    ids = japan[1].input_ids
    rows = model.embedding_table[model.tokenizer.encode(" green old river", add_special_tokens=False)]
    return workbench.Prompt(ids, [rows], [(26, 26 + len(rows))])


@pytest.fixture(scope="module")
def traces(model, engine, prompt):
    reference, floor = cached_reference(model, "float64"), cached_reference(model, "float32")
    return reference.trace(prompt, TAPS), engine.trace(prompt, TAPS), floor.trace(prompt, TAPS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_clean_engines_are_noise(model, dtype):
    engine = workbench.open_engine("numba", model, dtype=dtype)
    verdicts = [
        each.verdict
        for errors in clean_runs(engine, 2, seed=1, tokens=(8, 60))
        for each in (errors.accumulated, errors.local)
    ]
    assert verdicts == ["noise"] * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["range +1", "placeholders used", "rows reversed"])
def test_prompt_faults_are_bugs_at_the_splice(model, prompt, name, dtype):
    comparison = check_engine(FAULTS[name].inject(workbench.open_engine("numba", model, dtype=dtype)), prompt)
    assert comparison.verdict == "bug"
    first = comparison.first_divergence
    assert (first.tap, first.token, first.span) == ("embed", 26, 0)
    assert str(comparison).startswith("bug at tap embed, token 26, span 0")


@pytest.mark.parametrize(
    ("layer", "part", "tap"),
    [(7, "output", "layers.7.attention"), (12, "down", "layers.12.mlp"), (0, "qkv", "layers.0.attention")],
)
def test_wrong_weight_is_located_in_its_layer(model, prompt, layer, part, tap):
    """Forty rows of one weight matrix are off by half a percent, which is too little to change an answer."""
    broken = workbench.open_engine("numba", model)
    linear = getattr(broken.decoder.layers[layer], part)
    weight = linear.weight.clone()
    weight[:40] *= 1.005
    linear.weight = weight
    comparison = check_engine(broken, prompt)
    assert comparison.verdict == "bug"
    assert comparison.first_divergence.tap == tap


def test_one_wrong_token_of_one_tap_is_a_bug(model, engine, traces):
    reference, candidate, floor = traces
    states = {tap: state.clone() for tap, state in candidate.items()}
    states["layers.20"][31] *= 1.0001
    comparison = compare(reference, with_states(candidate, states), floor=floor)
    assert (comparison.verdict, comparison.first_divergence.tap, comparison.first_divergence.token) == (
        "bug",
        "layers.20",
        31,
    )
    assert comparison.first_divergence.span is None


def test_noise_floor_run_has_verdict_same(traces):
    reference, _, floor = traces
    comparison = compare(reference, floor, floor=floor)
    assert comparison.verdict == "same"
    assert comparison.first_divergence is None
    assert float(comparison.ratios.max()) <= 1.0


def test_several_floors_are_at_least_as_high_as_one(model, traces, prompt):
    reference, candidate, floor = traces
    several = cached_reference(model, "float32").noise_floor(prompt, TAPS)
    assert len(several) == 4
    assert all(torch.equal(several[0][tap], floor[tap]) for tap in floor)
    assert not torch.equal(several[1]["layers.3"], several[2]["layers.3"])
    one, more = compare(reference, candidate, floor=floor), compare(reference, candidate, floor=several)
    assert (more.floors >= one.floors).all()
    assert float(more.floors.mean()) < 3 * float(one.floors.mean())


def test_a_nan_is_a_bug_not_noise(traces):
    reference, candidate, floor = traces
    states = {tap: state.clone() for tap, state in candidate.items()}
    states["layers.3"][5, 2] = torch.nan
    comparison = compare(reference, with_states(candidate, states), floor=floor)
    assert (comparison.verdict, comparison.first_divergence.tap, comparison.first_divergence.token) == (
        "bug",
        "layers.3",
        5,
    )


def test_a_faulty_engine_also_generates_from_the_wrong_prompt(engine, japan):
    injected, plain = japan
    config = GenerationConfig(max_new_tokens=6)
    faulty = FAULTS["placeholders used"].inject(engine)
    assert faulty.generate(injected, config).token_ids == engine.generate(plain, config).token_ids


def with_states(trace: Trace, states=None, **provenance) -> Trace:
    return Trace(dict(trace if states is None else states), trace.positions, {**trace.provenance, **provenance})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c, f: (f, c, f), "float32 trace: record it with dtype='float64'"),
        (lambda t, c, f: (t, with_states(c, prompt="other"), f), "different prompts"),
        (lambda t, c, f: (t, with_states(c, model_digest="other"), f), "different models"),
        (lambda t, c, f: (t, with_states(c, dtype="bfloat16"), f), "rounding differs"),
        (lambda t, c, f: (t, with_states(c, {"x": c["embed"]}), f), "share no tap"),
        (lambda t, c, f: (t, c, with_states(f, {"embed": f["embed"]})), "lacks tap"),
        (lambda t, c, f: (t, with_states(c, {"embed": c["embed"][:, :5]}), f), "tap 'embed' is"),
        (lambda t, c, f: (t, c, []), "no noise floor"),
        (lambda t, c, f: (t, c, with_states(f, {**f, "embed": f["embed"] * torch.nan})), "NaN"),
    ],
)
def test_incomparable_traces_are_refused(traces, change, words):
    reference, candidate, floor = change(*traces)
    with pytest.raises(TraceError, match=words):
        compare(reference, candidate, floor=floor)


def test_different_positions_are_refused(engine, traces, prompt):
    reference, _, floor = traces
    with pytest.raises(TraceError, match="different positions"):
        compare(reference, engine.trace(prompt, ["embed"], positions=[1, 2]), floor=floor)


def test_relative_error_cosine_and_roundoff_have_known_values():
    a, b = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 5.0], [0.0, 0.0], [1.0, 0.0]])
    assert relative_error(b, a).tolist() == [pytest.approx(0.2), 0.0, torch.inf]
    assert cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item() == 0.0
    assert unit_roundoff("bfloat16") == 2**-8


def test_states_in_files_give_the_same_verdict(model, prompt, monkeypatch, capsys, tmp_path):
    """More states than fit are kept in files, which are deleted; errors, floors and verdict are the same bits."""
    from workbench.comparison import check

    engine = workbench.open_engine("numba", model)
    expected = workbench.check_engine(engine, prompt)
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(check, "ROOM", 1 << 20)
    (tmp_path / "runs" / "check-2000000000-of-a-killed-process").mkdir(parents=True)
    found = workbench.check_engine(engine, prompt)
    assert torch.equal(found.errors, expected.errors)
    assert torch.equal(found.floors, expected.floors)
    assert found.verdict == expected.verdict == "noise"
    assert "GB of states: kept in files" in capsys.readouterr().err
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_doubtful_bug_is_judged_by_more_runs(model):
    """At token 1 of this prompt, whose state is a massive activation, the largest of four runs is ten times smaller than usual."""
    prompt = list(clean_prompts(model, 22, 3, (8, 2048)))[3]
    engine = workbench.open_engine("numba", model)
    first = compare(
        (expected := reference_run(model, prompt, "float32", ["layers.11"]))[0],
        engine.trace(prompt, ["layers.11"]),
        floor=expected[1],
    )
    judged = workbench.check_engine(engine, prompt, ["layers.11"])
    assert judged.verdict == "noise"
    if first.failed:  # which of four runs are small depends on the processor
        assert (judged.floors >= first.floors).all()
        assert (judged.floors > first.floors)[first.wrong].all()


@pytest.mark.parametrize(("size", "asked", "verdict"), [(4.0, [], "noise"), (20.0, [16], "noise"), (1e4, [], "bug")])
def test_only_a_doubtful_bug_asks_for_more_runs(traces, size, asked, verdict):
    """An error of `size` floors of a floor that is made too small; sixteen runs give the right one, ten times as large."""
    exact, run, rounded = traces
    right = NoiseFloor.measure(exact, [rounded], ["layers.3"])
    small = replace(
        right, errors={"layers.3": torch.full_like(right.errors["layers.3"], 1e-6)}, typical={"layers.3": 1e-6}
    )
    large = replace(small, errors={"layers.3": small.errors["layers.3"] * 10}, typical={"layers.3": 1e-5})
    state = exact["layers.3"].clone()
    state[5] *= 1 + size * 1e-6
    provenance = run.provenance
    asked_for = []

    def more(runs):
        asked_for.append(runs)
        return large

    given = Trace({"layers.3": state.float()}, run.positions, provenance)
    expected = Trace({"layers.3": exact["layers.3"]}, exact.positions, exact.provenance)
    assert compare_with_doubt(expected, given, small, 8.0, more).verdict == verdict
    assert asked_for == asked
