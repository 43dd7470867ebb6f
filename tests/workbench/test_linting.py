"""Lint beyond invalid prompts: casts, placeholders, spans, and the behaviour of each target."""

import pytest
import torch

import workbench
from tests.workbench.small_architectures import save
from workbench import EmbeddingRangeError, Prompt, Span, effective_prompt, lint
from workbench.vision import build_prompt, load_vision_tower


@pytest.fixture(scope="module")
def cards():
    return workbench.load_model("digit-cards")


@pytest.fixture(scope="module")
def images(cards):
    return build_prompt(
        cards, "Read the cards.", ["data/images/blue_7.png", "data/images/green_5.png"], tower=load_vision_tower(cards)
    )


def codes(findings, least="warning"):
    order = ["info", "warning", "error"]
    return [each.code for each in findings if order.index(each.severity) >= order.index(least)]


def rows(*values, width=576):
    return torch.tensor(values)[:, None].expand(-1, width).contiguous()


class TestCasts:
    def prompt(self, item):
        return Prompt([5] * 20, [item], [(3, 3 + len(item))])

    def test_exactly_representable_rows_give_no_finding(self, model):
        item = model.token_rows([7, 8]).half().float()
        assert codes(lint(self.prompt(item), dtype="float16"), "info") == []

    def test_rounded_rows_are_counted(self):
        item = rows(1.0, 1.0 + 2**-10)  # the second needs 11 significant bits: float16 has them, bfloat16 does not
        assert codes(lint(self.prompt(item), dtype="float16"), "info") == []
        (finding,) = lint(self.prompt(item), dtype="bfloat16")
        assert (finding.code, finding.severity) == ("row-rounding", "info")
        assert "1 of 2 rows change when cast to bfloat16" in finding.message

    def test_overflow_is_an_error_that_names_the_row(self):
        (finding,) = lint(self.prompt(rows(1.0, 70000.0)), dtype="float16")
        assert (finding.code, finding.severity, finding.item) == ("row-overflow", "error", 0)
        assert "1 of 2 rows overflow in float16, whose largest number is 65504 (row 1 has 70000)" in finding.message
        assert codes(lint(self.prompt(rows(1.0, 70000.0)), dtype="bfloat16")) == []

    @pytest.mark.parametrize("value", [65504.0, 65519.0])
    def test_values_that_round_to_the_largest_number_do_not_overflow(self, value):
        assert "row-overflow" not in codes(lint(self.prompt(rows(value)), dtype="float16"))

    def test_underflow_gives_a_warning_that_names_the_row(self):
        """Below the smallest normal number of float16, 6.1e-5, precision is lost: 1e-7 becomes 1.2e-7."""
        (finding, _) = lint(self.prompt(rows(1.0, 1e-7)), dtype="float16")
        assert (finding.code, finding.severity) == ("row-underflow", "warning")
        assert "1 of 2 rows" in finding.message
        assert "first row 1" in finding.message
        exact = rows(2.0**-24)  # a subnormal number that float16 represents exactly
        assert codes(lint(self.prompt(exact), dtype="float16"), "info") == []

    def test_float64_rows_that_overflow_in_float32_are_reported(self):
        assert codes(lint(self.prompt(torch.full((1, 576), 1e300, dtype=torch.float64)), dtype="float32")) == [
            "row-overflow"
        ]

    @pytest.mark.parametrize("kwargs", [{"dtype": "int8"}, {"max_prefill_token_num": 0}])
    def test_invalid_settings_are_refused_by_name(self, kwargs):
        with pytest.raises(ValueError, match=r"dtype='int8'|max_prefill_token_num=0"):
            lint(Prompt([1]), **kwargs)

    def test_deepstack_features_that_overflow_are_reported(self):
        levels = torch.zeros(2, 3, 4)
        levels[1, 2, 3] = 1e5
        prompt = Prompt([5] * 8, [torch.zeros(3, 4)], [(2, 5)], deepstack=[levels])
        (finding,) = (each for each in lint(prompt, dtype="float16") if each.code == "deepstack-overflow")
        assert (finding.severity, finding.item) == ("error", 0)
        assert "1 of 6 rows" in finding.message
        assert "level 1, row 2" in finding.message
        assert "deepstack-overflow" not in codes(lint(prompt, dtype="bfloat16"))


class TestPlaceholders:
    def test_built_prompt_has_no_warnings(self, cards, images):
        assert codes(lint(images, cards)) == []

    def test_shift_is_reported_with_the_exact_fix(self, cards, images):
        moved = images.replace(embedding_ranges=[(start + 2, stop + 2) for start, stop in images.embedding_ranges])
        over, bare = (each for each in lint(moved, cards) if each.severity == "warning")
        assert (over.code, bare.code) == ("range-over-text", "placeholder-bare")
        assert "move every range by -2, and each covers its placeholders exactly" in over.message
        assert "2 of 98 placeholders '<image>' (16) are outside every range (first at position 3)" in bare.message

    def test_uneven_shifts_report_the_place_of_each_item(self, cards, images):
        (a, b), (c, d) = images.embedding_ranges
        over = next(
            each
            for each in lint(images.replace(embedding_ranges=[(a, b), (c + 3, d + 3)]), cards)
            if each.code == "range-over-text"
        )
        assert f"their placeholders are at [{a}, {b}), [{c}, {d})" in over.message
        assert over.item == 1

    def test_missing_item_is_reported(self, cards, images):
        one = images.replace(
            input_embeddings=images.input_embeddings[:1], embedding_ranges=images.embedding_ranges[:1], spans=()
        )
        (finding,) = (each for each in lint(one, cards) if each.severity == "warning")
        assert finding.code == "placeholder-bare"
        assert "49 of 98" in finding.message

    def test_range_over_a_control_token_is_reported(self, model, japan):
        moved = japan[0].replace(embedding_ranges=[(0, 1)])
        (finding,) = (each for each in lint(moved, model) if each.code == "range-over-control")
        assert "'<|im_start|>' (1) at 0" in finding.message


class TestSpans:
    def test_mrope_without_positions_is_reported(self, tmp_path):
        model = save("qwen2-vl", tmp_path)
        item = model.token_rows([5, 6, 7])
        prompt = Prompt([5] * 10, [item], [(2, 5)])
        assert "positions-missing" in codes(lint(prompt, model))
        assert "positions-missing" in codes(lint(prompt.replace(position_ids=torch.arange(10)), model))
        whole = prompt.replace(position_ids=torch.arange(10).expand(3, -1))
        assert "positions-missing" not in codes(lint(whole, model))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda at: at, None),
            (lambda at: at[[0, 2, 1]], "leave it at row 1"),
            (lambda at: torch.cat([at[:1], torch.arange(8).expand(2, -1) + 4]), "count on as in text"),
            (lambda at: at[:, :1].expand(-1, 8), "are the same for all rows"),
            (
                lambda at: torch.stack([at[0], 4 + torch.arange(8) // 2, 4 + torch.arange(8) % 2]),
                "height and width are exchanged",
            ),
            (lambda at: at.roll(1, dims=1), "leave it at row 1"),
        ],
        ids=["right", "axes exchanged", "as text", "one place", "transposed", "shifted"],
    )
    def test_positions_of_an_image_are_compared_with_its_grid(self, tmp_path, change, words):
        model = save("qwen2-vl", tmp_path)
        grid = torch.stack([torch.full((8,), 4), 4 + torch.arange(8) // 4, 4 + torch.arange(8) % 4])
        positions = torch.arange(16).expand(3, -1).clone()
        positions[:, 4:12] = change(grid)
        item = model.token_rows([5, 6, 7, 8, 9, 10, 11, 12])
        prompt = Prompt([5] * 16, [item], [(4, 12)], [Span(grid=(1, 2, 4))], position_ids=positions)
        found = [each for each in lint(prompt, model) if each.code == "positions-grid"]
        assert [each.item for each in found] == ([] if words is None else [0])
        assert words is None or words in found[0].message

    def test_bidirectional_span_cut_by_chunks_is_reported(self):
        prompt = Prompt([5] * 100, [torch.ones(30, 4)], [(50, 80)], [Span(attention="bidirectional")])
        (finding,) = lint(prompt, max_prefill_token_num=64)
        assert (finding.code, finding.item) == ("span-cut", 0)
        assert "cuts them at 64" in finding.message
        assert lint(prompt, max_prefill_token_num=80) == []
        assert lint(prompt.replace(spans=[Span()]), max_prefill_token_num=64) == []

    def test_missing_embedding_scale_is_reported(self, tmp_path):
        model = save("gemma", tmp_path)
        ready = model.token_rows([5, 6, 7])
        bare = ready / model.text_config.hidden_size**0.5
        assert codes(lint(Prompt([5] * 10, [ready], [(2, 5)]), model)) == []
        (finding,) = lint(Prompt([5] * 10, [bare], [(2, 5)]), model)
        assert finding.code == "embedding-scale"


class TestTargets:
    prompt = Prompt([5] * 12, [torch.ones(3, 4), torch.full((3, 4), 2.0)], [(1, 4), (6, 9)])

    @pytest.mark.parametrize(
        ("target", "changes", "code", "words"),
        [
            ("turbomind==0.13.0", {}, "target-accepts", "unchanged"),
            ("turbomind", {"embedding_ranges": [(6, 9), (1, 4)]}, "target-rejects", "SESSION_NOT_EXIST"),
            ("turbomind", {"input_embeddings": [torch.ones(3, 4), torch.ones(3, 5)]}, "target-rejects", "4, 5 wide"),
            ("turbomind", {"position_ids": torch.arange(12) * 2}, "target-differs", "0.9.2 to 0.15 only"),
            ("turbomind", {"input_embeddings": []}, "target-ignores", "2 ranges without input_embeddings"),
            ("turbomind", {"position_ids": torch.arange(12)}, "target-accepts", "unchanged"),
            ("turbomind", {"embedding_ranges": [(1, 4)]}, "target-rejects", "2 input_embeddings and 1 ranges"),
            ("sglang==0.3.0", {}, "target-differs", "older than these rules"),
            ("lmdeploy-pytorch==0.6.4", {}, "target-accepts", "unchanged"),
            ("lmdeploy-pytorch==0.6.5", {}, "target-ignores", "silently ignored"),
            ("vllm", {}, "target-accepts", "unchanged"),
            ("vllm==0.8.5", {}, "target-differs", "older than these rules"),
            (
                "vllm==0.23.0",
                {"position_ids": torch.zeros(3, 12, dtype=torch.long)},
                "target-rejects",
                "takes the engine down",
            ),
            (
                "vllm==0.24.0",
                {"position_ids": torch.zeros(3, 12, dtype=torch.long)},
                "target-differs",
                "positions cannot",
            ),
            ("vllm", {"spans": [Span(attention="bidirectional")] * 2}, "target-differs", "causal everywhere"),
            ("vllm", {"embedding_ranges": [(1, 4), (3, 6)]}, "target-rejects", "overlaps"),
            ("sglang", {}, "target-accepts", "unchanged"),
            ("sglang", {"input_embeddings": [torch.full((3, 4), 0.1)] * 2}, "target-differs", "6 of 6 rows change"),
            ("transformers", {"spans": [Span(attention="bidirectional")] * 2}, "target-accepts", "unchanged"),
            ("transformers", {"embedding_ranges": [(1, 4), (6, 19)]}, "target-rejects", "leaves the prompt"),
        ],
    )
    def test_findings_describe_the_behaviour_of_each_target(self, target, changes, code, words):
        findings = [
            each for each in lint(self.prompt.replace(**changes), target=target) if each.code.startswith("target")
        ]
        assert code in [each.code for each in findings]
        assert any(words in each.message for each in findings if each.code == code), findings

    @pytest.mark.parametrize(
        ("target", "code"),
        [("turbomind==0.12.0", "prefix-cache"), ("turbomind==0.14.0", "prefix-cache"), ("vllm", "prefix-cache")],
    )
    def test_prefix_cache_hazard_is_reported_for_affected_versions(self, target, code):
        assert code in codes(lint(self.prompt, target=target))
        assert code not in codes(lint(self.prompt, target="turbomind==0.15.0"))

    def test_bidirectional_spans_give_a_flash_attention_finding(self):
        spans = [Span(attention="bidirectional")] * 2
        assert "flash-causal" in codes(lint(self.prompt.replace(spans=spans), target="transformers"))

    def test_vision_models_lose_their_rows_in_early_vllm(self, cards, images):
        assert "target-differs" in codes(lint(images, cards, "vllm==0.20.0"))
        with pytest.raises(EmbeddingRangeError, match="computes something undefined: models with vision inside"):
            effective_prompt(images, "vllm==0.20.0", cards)
        assert effective_prompt(images, "vllm==0.24.0", cards).digest == images.digest

    @pytest.mark.parametrize(
        ("name", "target", "ignores"),
        [("gemma", "turbomind", True), ("gemma", "turbomind==0.17.0", False), ("qwen3-moe", "turbomind", False)],
    )
    def test_turbomind_is_judged_by_the_models_that_it_runs(self, tmp_path, name, target, ignores):
        model = save(name, tmp_path)
        prompt = Prompt([5] * 10, [model.token_rows([5, 6, 7])], [(2, 5)])
        assert ("target-ignores" in codes(lint(prompt, model, target=target))) is ignores

    def test_a_wrong_width_is_undefined_in_turbomind(self, model):
        prompt = Prompt([5] * 12, [torch.ones(3, 64)], [(1, 4)])
        with pytest.raises(EmbeddingRangeError, match="undefined: items are 64 wide and the model 576"):
            effective_prompt(prompt, "turbomind", model)

    def test_effective_prompt_of_sglang_is_rounded_to_bfloat16(self):
        """SGLang rounds to bfloat16, whatever the model's dtype is."""
        items = [torch.full((3, 4), 0.1)] * 2
        computed = effective_prompt(self.prompt.replace(input_embeddings=items), "sglang")
        assert computed.input_embeddings[0].dtype is torch.bfloat16
        assert effective_prompt(self.prompt, "sglang").digest == self.prompt.digest
