"""Metrics against brute force; first divergence and its diagnosis; reports."""

import math
import re

import numpy as np
import pytest
import torch
from transformers import AutoModel

import workbench
from tests.workbench.small_models import random_prompt, save_llama
from workbench import GenerationConfig, Prompt, Span, TraceError
from workbench.cli.html_report import html_report
from workbench.comparison import NoiseFloor, check_engine, compare_logits, compare_text, first_divergence
from workbench.comparison.check import shared_taps
from workbench.comparison.diagnosis import explain
from workbench.comparison.metrics import measure, ulp_distance
from workbench.comparison.reference_cache import reference_engine, reference_run
from workbench.engines.types import EngineOutput, ResponseType
from workbench.faults import FAULTS, FaultyEngine
from workbench.faults.prompt_faults import off_by_one
from workbench.progress import Stopped

TAPS = ["embed", "layers.*", "layers.*.*", "norm", "logits"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


class TestMetrics:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_metrics_equal_numpy(self, dtype):
        generator = torch.Generator().manual_seed(0)
        reference = torch.randn(7, 33, generator=generator, dtype=torch.float64)
        state = (reference * 1.01).to(dtype)
        a, b = state.double().numpy(), reference.numpy()
        expected = {
            "relative": np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1),
            "cosine": (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1),
            "max_abs": np.abs(a - b).max(axis=1),
            "mean_abs": np.abs(a - b).mean(axis=1),
        }
        found = measure(state, reference, "float32")
        for name, values in expected.items():
            assert found[name].numpy() == pytest.approx(values, rel=1e-12, abs=1e-15), name

    def test_nan_and_infinity_are_kept_in_the_metrics(self):
        reference = torch.ones(3, 4, dtype=torch.float64)
        state = reference.clone()
        state[0, 1], state[1, 2] = torch.nan, torch.inf
        found = measure(state, reference, "float32")
        assert math.isnan(found["relative"][0])
        assert math.isnan(found["max_abs"][0])
        assert found["relative"][1] == found["max_abs"][1] == torch.inf
        assert found["relative"][2] == 0

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_adjacent_numbers_are_one_ulp_apart(self, dtype):
        kind = getattr(torch, dtype)
        numbers = torch.tensor([1.0, 1.5, 3.0, -0.3, 1e-3, 200.0]).to(kind)
        up = torch.nextafter(numbers, torch.full_like(numbers, torch.inf))
        assert ulp_distance(up[None], numbers[None], dtype).tolist() == [[1.0] * len(numbers)]

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_rounding_is_at_most_half_an_ulp(self, dtype):
        generator = torch.Generator().manual_seed(0)
        size = torch.logspace(-3, 3, 4000)
        numbers = torch.randn(1, 4000, generator=generator) * size  # torch rounds float64 to half types twice
        if dtype == "float32":
            numbers = numbers.double() * (1 + 2.0**-25)
        distance = ulp_distance(numbers.to(getattr(torch, dtype)), numbers, dtype)
        assert 0.4 < float(distance.max()) <= 0.5

    def test_subnormal_numbers_share_one_ulp(self):
        least = torch.finfo(torch.float16).smallest_normal
        state, reference = torch.tensor([[2 * 2.0**-24]]), torch.tensor([[0.0]])
        assert ulp_distance(state, reference, "float16").tolist() == [[2.0]]
        assert least == 2.0**-14


class TestLogits:
    def test_logit_metrics_equal_torch(self):
        generator = torch.Generator().manual_seed(1)
        reference, other = torch.randn(6, 50, generator=generator), torch.randn(6, 50, generator=generator)
        found = compare_logits(reference, other)
        p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
        kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        assert torch.allclose(found.kl, kl, rtol=1e-10)
        for row in range(6):
            order = other[row].argsort(descending=True).tolist()
            assert found.rank[row] == order.index(int(reference[row].argmax()))
            both = set(reference[row].topk(5).indices.tolist()) & set(other[row].topk(5).indices.tolist())
            assert found.agreement[5][row] == len(both) / 5
        assert found.disagreements == [row for row in range(6) if reference[row].argmax() != other[row].argmax()]

    def test_equal_logits_agree(self):
        logits = torch.randn(4, 20)
        found = compare_logits(logits, logits.clone(), torch.tensor([5, 6, 7, 8]))
        assert str(found) == "the same next token everywhere; KL at most 0.00e+00 nats"
        assert found.disagreements == []

    def test_masked_logits_agree_and_nan_is_a_disagreement(self):
        reference = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, 2.0]])
        other = reference.clone()
        other[1, 0] = torch.nan
        found = compare_logits(reference, other)
        assert found.kl[0] == 0
        assert math.isnan(found.kl[1])
        assert found.agreement[1].tolist() == [1.0, 0.0]
        assert found.disagreements == [1]

    def test_ties_agree_only_if_the_first_token_is_the_same(self):
        reference = torch.tensor([[0.0, 2.0, 1.0], [2.0, 0.0, 1.0]])
        flat = compare_logits(reference, torch.zeros(2, 3))
        assert flat.disagreements == [0]  # of equal logits the first wins, which is right for the second row

    def test_chunked_comparison_equals_the_whole(self):
        generator = torch.Generator().manual_seed(2)
        reference, other = torch.randn(300, 20, generator=generator), torch.randn(300, 20, generator=generator)
        whole, parts = (
            compare_logits(reference, other),
            [compare_logits(reference[i : i + 1], other[i : i + 1]) for i in range(300)],
        )
        assert torch.allclose(whole.kl, torch.cat([part.kl for part in parts]))
        assert whole.rank.tolist() == [int(part.rank) for part in parts]

    def test_different_shapes_are_refused(self):
        with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
            compare_logits(torch.zeros(2, 3), torch.zeros(2, 4))


class TestText:
    @staticmethod
    def answer(ids, logprobs=None):
        return EngineOutput(ResponseType.FINISH, ids, len(ids), logprobs)

    def test_greedy_texts_of_both_engines_are_equal(self, llama):
        config = GenerationConfig(max_new_tokens=12, ignore_eos=True, logprobs=5)
        engines = [workbench.open_engine(kind, llama) for kind in ("transformers", "numba")]
        found = compare_text(*(engine.generate(random_prompt(), config) for engine in engines))
        assert (found.close, found.at, str(found)) == (True, None, "the same 12 tokens")

    def test_texts_are_close_if_each_token_is_among_the_others_top(self):
        mine = self.answer([1, 2, 3], [{1: 0.0}, {2: -0.7, 9: -0.8}, {3: 0.0}])
        theirs = self.answer([1, 9, 4], [{1: 0.0}, {9: -0.6, 2: -0.9}, {4: 0.0}])
        found = compare_text(mine, theirs)
        assert (found.close, found.at, found.tokens) == (True, 1, (2, 9))
        far = self.answer([1, 9, 4], [{1: 0.0}, {9: -0.1, 7: -3.0}, {4: 0.0}])
        assert not compare_text(mine, far).close

    def test_missing_token_of_a_shorter_text_is_none(self):
        assert compare_text(self.answer([1, 2]), self.answer([1, 2, 3])).tokens == (None, 3)
        assert compare_text(self.answer([1, 2, 3]), self.answer([1, 2])).tokens == (3, None)

    def test_missing_logprobs_are_reported(self):
        with pytest.raises(ValueError, match="the reference has no logprobs"):
            compare_text(self.answer([1]), self.answer([2]))


class TestFirstDivergence:
    """Bisection gives the same result as comparing all taps at once."""

    @pytest.mark.parametrize(
        "name",
        ["range +1", "rotary base", "gate and up exchanged", "a dead row", "final norm", "head", "positions from one"],
    )
    def test_bisection_equals_one_full_comparison(self, llama, name):
        engine = workbench.open_engine("numba", llama)
        engine = FAULTS[name].inject(engine)
        whole = first_divergence(engine, random_prompt())
        bisected = first_divergence(engine, random_prompt(), max_bytes=1)
        assert bisected.divergence is not None
        assert (bisected.divergence.tap, bisected.divergence.token) == (whole.divergence.tap, whole.divergence.token)
        assert (bisected.last_good, bisected.explanation) == (whole.last_good, whole.explanation)
        assert whole.runs == 1
        assert bisected.runs > 1

    def test_correct_engine_has_no_divergence(self, llama):
        for room in (1, 1 << 30):
            found = first_divergence(workbench.open_engine("numba", llama), random_prompt(), max_bytes=room)
            assert found.divergence is None
            assert str(found).startswith("no divergence: noise")

    def test_residual_stream_alone_gives_an_unknown_diagnosis(self, llama):
        """The residual stream alone cannot distinguish attention from MLP."""
        engine = FAULTS["gate and up exchanged"].inject(workbench.open_engine("numba", llama))
        reference, floor = reference_run(llama, random_prompt(), "float32", ["embed", "layers.*", "norm", "logits"])
        run = engine.trace(random_prompt(), ["embed", "layers.*", "norm", "logits"])
        found = explain(workbench.compare(reference, run, floor=floor), reference, run)
        assert found.kind == "unknown"
        assert found.sentence.startswith("wrong from layers.2 on")
        assert "'layers.*.*'" in found.sentence

    def test_changed_head_weights_are_not_reported_as_a_softcap(self, llama):
        engine = workbench.open_engine("numba", llama)
        weight = engine.decoder.head.weight.clone()
        weight[7] *= -3
        engine.decoder.head.weight = weight
        assert first_divergence(engine, random_prompt()).explanation.sentence.endswith("the head's weights")

    def test_by_span_reports_the_first_wrong_tap_of_each_span(self, llama):
        prompt = random_prompt().replace(spans=[Span("image"), Span("audio")])
        changed = FaultyEngine(
            workbench.open_engine("numba", llama),
            lambda p: p.replace(input_embeddings=[p.input_embeddings[0], p.input_embeddings[1].flip(0)]),
        )
        rows = check_engine(changed, prompt, ["embed", "layers.*"]).by_span()
        assert [(row["span"], row["kind"], row["tokens"]) for row in rows] == [
            (None, "text", 26),
            (0, "image", 5),
            (1, "audio", 9),
        ]
        assert [row["first_wrong"] for row in rows] == ["layers.0", None, "embed"]

    def test_depth_taps_equal_a_truncated_checkpoint(self, llama, tmp_path):
        from workbench.models.truncate_checkpoint import truncate_checkpoint

        whole = reference_engine(llama, "float32").trace(random_prompt(), ["depth.*", "norm"])
        prompt = random_prompt()
        network = AutoModel.from_pretrained(truncate_checkpoint(llama.path, tmp_path, 2), dtype=torch.float32)
        rows = llama.embedding_table[torch.tensor(prompt.lookup_ids)].clone()
        for item, (start, stop) in zip(prompt.input_embeddings, prompt.embedding_ranges, strict=True):
            rows[start:stop] = item
        with torch.no_grad():
            short = network(inputs_embeds=rows[None]).last_hidden_state[0]
        assert torch.equal(whole["depth.2"], short)
        assert torch.equal(whole["depth.3"], whole["norm"])


def test_the_float64_run_is_shared_by_all_dtypes(llama):
    prompt = random_prompt(2)

    def stop_after_float64(share):
        if share > 0.4:
            raise Stopped

    with pytest.raises(Stopped):
        reference_run(llama, prompt, "float32", TAPS, progress=stop_after_float64)
    shares = []
    reference, floor = reference_run(llama, prompt, "float32", TAPS, progress=shares.append)
    assert min(shares) > 0.4  # the float64 run before the stop was kept
    other, coarse = reference_run(llama, prompt, "bfloat16", TAPS)
    assert other is reference
    assert coarse.provenance["dtype"] == "bfloat16"
    assert reference_run(llama, prompt, "float32", TAPS)[1] is floor


def test_noise_floor_file_round_trip(llama, tmp_path):
    reference, floor = reference_run(llama, random_prompt(), "float32", TAPS)
    floor.save(tmp_path / "f.safetensors")
    again = NoiseFloor.load(tmp_path / "f.safetensors")
    engine = workbench.open_engine("numba", llama)
    trace = engine.trace(random_prompt(), TAPS)
    assert str(workbench.compare(reference, trace, floor=again)) == str(
        workbench.compare(reference, trace, floor=floor)
    )
    plain = reference_engine(llama, "float32").trace(random_prompt(), TAPS)
    assert workbench.compare(reference, plain, floor=again).verdict == "same"
    changed = bytearray((tmp_path / "f.safetensors").read_bytes())
    changed[-1] ^= 0x40  # an exponent: the last floor becomes enormous, and anything would be noise
    (tmp_path / "f.safetensors").write_bytes(changed)
    with pytest.raises(TraceError, match="was damaged or changed"):
        NoiseFloor.load(tmp_path / "f.safetensors")
    for content in (b"", b"x" * 100, (tmp_path / "f.safetensors").read_bytes()[:-9]):
        (tmp_path / "f.safetensors").write_bytes(content)
        with pytest.raises(TraceError, match="cannot be read as a noise floor"):
            NoiseFloor.load(tmp_path / "f.safetensors")


def test_a_floor_of_another_prompt_is_refused(llama):
    reference, _ = reference_run(llama, random_prompt(), "float32", TAPS)
    _, other = reference_run(llama, random_prompt(1), "float32", TAPS)
    trace = workbench.open_engine("numba", llama).trace(random_prompt(), TAPS)
    with pytest.raises(TraceError, match="different prompts"):
        workbench.compare(reference, trace, floor=other)


def test_taps_that_an_engine_lacks_are_skipped(llama):
    engine = workbench.open_engine("numba", llama)
    assert shared_taps(engine, ["depth.*", "norm"]) == ["norm"]
    with pytest.raises(ValueError, match=r"no tap 'depth.\*'"):
        shared_taps(engine, ["depth.*"])


def test_report_is_complete_and_self_contained(llama, tmp_path):
    engine, prompt = workbench.open_engine("numba", llama), random_prompt()
    reference, floor = reference_run(llama, prompt, "float32", TAPS)
    run = FaultyEngine(engine, off_by_one).trace(prompt, TAPS, path=tmp_path / "run.safetensors")
    comparison = workbench.compare(reference, run, floor=floor)
    page = html_report(comparison, reference, run, "every row <late>")
    assert "bug at tap embed, token 4, span 0" in page
    assert "every row &lt;late&gt;" in page
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=.(?!data:)", page)
    assert all(tap in page for tap in comparison.taps)


def test_words_in_a_report_are_escaped(model, engine, japan):
    prompt = Prompt([*japan[0].input_ids[:28], 44, *japan[0].input_ids[29:]], japan[0].input_embeddings, [(29, 30)])
    reference, floor = reference_run(model, prompt, "float32", ["embed"])
    run = FaultyEngine(engine, off_by_one).trace(prompt, ["embed"])
    run.provenance["words"] = ["<script>"] * len(prompt)
    assert "<script>" not in html_report(workbench.compare(reference, run, floor=floor), reference, run)
