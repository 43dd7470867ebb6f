"""Checkpoints as they are published: Pixtral as a LLaVA, SigLIP without a class token, flags beside the text part, deepstack."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import workbench
from tests.small_vlms import SIGLIP, VLMS, save_vlm
from workbench.faults import FaultyEngine
from workbench.vision.tower import load_vision_tower

pytestmark = pytest.mark.slow


def picture(width=64, height=48):
    return Image.fromarray(np.random.default_rng(3).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_pixtral_has_a_token_after_each_line_of_rows_and_images_of_any_size(tmp_path):
    """Published as model_type "llava"; LLaVA's own processor would leave out [IMG_BREAK] and [IMG_END]."""
    vision = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 64, "patch_size": 16,
    }  # fmt: skip
    vlm = dataclasses.replace(
        VLMS["llava"],
        preprocessor="PixtralImageProcessorPil",
        preprocessor_settings={"size": {"longest_edge": 64}, "patch_size": {"height": 16, "width": 16}},
        token="[IMG]",
        tokens=("[IMG_BREAK]", "[IMG_END]"),
        settings={
            **VLMS["llava"].settings, "vision_config": vision, "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        },
    )  # fmt: skip
    model = save_vlm(tmp_path, vlm)
    prompt = workbench.build_prompt(model, "Hello", [picture(), picture(32, 64)])
    line, short = "[IMG]" * 4, "[IMG]" * 2
    wanted = "[IMG_BREAK]".join([line] * 3) + "[IMG_END]" + "[IMG_BREAK]".join([short] * 4) + "[IMG_END]Hello"
    assert "".join(model.tokens(prompt.input_ids)) == wanted
    assert list(prompt.embedding_ranges) == [(0, 4), (5, 9), (10, 14), (15, 17), (18, 20), (21, 23), (24, 26)]
    assert [span.label.split(",")[0] for span in prompt.spans] == ["image 0"] * 3 + ["image 1"] * 4
    assert load_vision_tower(model).check_parity([picture()]) == 0.0


def test_default_selection_of_siglip_drops_its_first_row(tmp_path):
    vlm = VLMS["llava"]
    settings = {**vlm.settings, "vision_config": SIGLIP, "vision_feature_select_strategy": "default"}
    model = save_vlm(tmp_path, dataclasses.replace(vlm, settings=settings))
    prompt, pixels = (
        make(model, "Hello", [picture()]) for make in (workbench.build_prompt, workbench.build_multimodal)
    )
    assert len(prompt.input_embeddings[0]) == 15
    assert pixels.input_ids == prompt.input_ids
    config = workbench.GenerationConfig(max_new_tokens=3, ignore_eos=True)
    inside = workbench.open_engine("transformers-multimodal", model).generate(pixels, config).token_ids
    assert workbench.open_engine("transformers", model).generate(prompt, config).token_ids == inside


def test_a_text_part_without_tie_word_embeddings_opens_in_the_numba_engine(tmp_path):
    """As Qwen publishes it, and as Transformers 5 saves it."""
    text = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "patch_size": 4, "out_hidden_size": 48,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(tmp_path)
    model = workbench.load_model(tmp_path)
    assert not hasattr(model.text_config, "tie_word_embeddings")
    prompt = workbench.Prompt(range(5, 25), position_ids=torch.arange(20).expand(3, 20))
    with workbench.open_engine("numba", model) as engine:
        found = workbench.check_engine(engine, prompt)
    assert found.verdict in ("same", "noise"), str(found)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    model = save_vlm(tmp_path_factory.mktemp("qwen3_vl"), VLMS["qwen3_vl"])
    return model, workbench.build_prompt(model, "What is this?", [picture(180, 70), picture(180, 70).rotate(180)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda deep: (), "rows were not added after layer 0"),
        (lambda deep: [each.roll(3, dims=1) for each in deep], "the deepstack features after layer 0 are "),
        (lambda deep: [each.flip(0) for each in deep], "of level 1 were added, not of level 0"),
        (lambda deep: [each.flip(1) for each in deep], "in reverse order"),
        (lambda deep: [deep[1], deep[0]], "of items 0 and 1 are exchanged after layer 0"),
        (lambda deep: [each * 2 for each in deep], "are 2 times the right ones"),
        (lambda deep: [torch.randn_like(each) for each in deep], "are not their deepstack features"),
    ],
)
def test_deepstack_that_is_wrong_is_named(qwen, change, words):
    model, prompt = qwen
    engine = workbench.open_engine("transformers", model)
    faulty = FaultyEngine(engine, lambda each: each.replace(deepstack=change(each.deepstack)))
    explanation = workbench.first_divergence(faulty, prompt).explanation
    assert explanation.kind == "deepstack", str(explanation)
    assert words in str(explanation)


def test_lint_misses_deepstack_and_counts_its_levels(qwen):
    model, prompt = qwen
    assert not [each for each in workbench.lint(prompt, model) if "deepstack" in each.code]
    (missing,) = [each for each in workbench.lint(prompt.replace(deepstack=()), model) if "deepstack" in each.code]
    assert missing.code == "deepstack-missing"
    cut = prompt.replace(deepstack=[each[:1] for each in prompt.deepstack])
    assert [each.code for each in workbench.lint(cut, model) if "deepstack" in each.code] == ["deepstack-levels"] * 2


def test_a_placeholder_of_minus_200_has_a_text(tmp_path):
    """LLaVA's own; the tokenizer's ids are 32-bit and not negative."""
    model = workbench.load_model("smollm2-135m")
    assert model.tokens([-200, 5, 1 << 40]) == ["<-200>", model.tokens([5])[0], f"<{1 << 40}>"]


def test_a_process_that_ends_while_a_view_computes_ends_cleanly():
    """A daemon thread that runs native code while the interpreter ends aborts the process."""
    script = (
        "import torch\nfrom workbench.widgets.latest_job import LatestJob\n"
        "def job():\n"
        "    while True:\n"
        "        torch.randn(600, 600) @ torch.randn(600, 600)\n"
        "        yield\n"
        "running = LatestJob(print)\nrunning.submit(job)\nrunning.wait(0.3)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
