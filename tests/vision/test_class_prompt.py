"""Any multimodal class of Transformers, from a checkpoint's files to a prompt, against the class's own forward with pixels."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import workbench
from tests.sweep.multimodal import judge
from tests.sweep.small_multimodal import save_multimodal
from tests.vision.test_videos import write_clip
from workbench.vision.messages import Item
from workbench.vision.tower import load_vision_tower
from workbench.vision.videos import VideoError

pytestmark = pytest.mark.slow

# Those that people run most, and one of each kind of layout; `make sweep` has all.
RIGHT = {
    "Gemma4ForConditionalGeneration": ("gemma4", "image, two images, video, two videos, audio, two audios"),
    "Glm4vForConditionalGeneration": ("glm4v", "image, two images, video, two videos"),
    "InternVLForConditionalGeneration": ("internvl", "image, two images, video"),
    "Llama4ForConditionalGeneration": ("llama4", "image, two images"),
    "LlavaNextForConditionalGeneration": ("llava_next", "image, two images"),
    "Mistral3ForConditionalGeneration": ("mistral3", "image, two images"),
    "Qwen2_5OmniThinkerForConditionalGeneration": (
        "qwen2_5_omni_thinker",
        "image, two images, video, two videos, audio, two audios",
    ),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", "image, two images, video, two videos"),
    "Qwen3VLMoeForConditionalGeneration": ("qwen3_vl_moe", "image, two images, video, two videos"),
    "HunYuanVLForConditionalGeneration": ("hunyuan_vl", "image, two images"),
}
REFUSED = {
    "Molmo2ForConditionalGeneration": ("molmo2", "adds its rows to the embeddings of the tokens"),
    "VibeVoiceAsrForConditionalGeneration": ("vibevoice_asr", "draws random numbers for its rows"),
    "Ernie4_5_VLMoeForConditionalGeneration": ("ernie4_5_vl_moe", "hands its decoder moe_mm_token_type_ids beside"),
    "MllamaForConditionalGeneration": ("mllama", "cross_attention_states"),
    "Emu3ForConditionalGeneration": ("emu3", "replaces the embedding of no token"),
    "Florence2ForConditionalGeneration": ("florence2", "is an encoder-decoder"),
    "ShieldGemma2": ("shieldgemma2", "makes 3 prompts of its own from one"),
}


@pytest.mark.parametrize("class_name", RIGHT)
def test_rows_and_logits_are_those_of_the_class(class_name):
    model_type, what = RIGHT[class_name]
    outcome = judge(class_name, model_type)
    assert outcome.kind == "right", outcome.detail
    assert outcome.detail.startswith(what), outcome.detail


@pytest.mark.parametrize("class_name", REFUSED)
def test_what_a_prompt_cannot_express_is_refused_by_name(class_name):
    model_type, words = REFUSED[class_name]
    real = "Gemma3ForConditionalGeneration" if class_name == "ShieldGemma2" else class_name
    outcome = judge(real, model_type)
    assert outcome.kind == "refused", outcome.detail
    assert words in outcome.detail


CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<vision_start_token><{{ part['type'] }}_token><vision_end_token>{% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_5")
    save_multimodal(folder, "Qwen3_5ForConditionalGeneration", "qwen3_5")
    (folder / "chat_template.jinja").write_text(CHAT)
    return workbench.load_model(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=10, size=(64, 48))


def picture(width=52, height=40):
    return Image.fromarray(np.random.default_rng(3).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_a_chat_with_an_image_and_a_video_gives_spans_and_the_answer_of_the_whole_model(qwen, clip):
    content = [
        {"type": "image", "image": picture()},
        {"type": "text", "text": "and"},
        {"type": "video", "video": clip},
        {"type": "text", "text": "differ how?"},
    ]
    messages = [{"role": "user", "content": content}]
    prompt = workbench.build_prompt(qwen, messages)
    assert prompt.spans[0].label == "image 0"
    assert {span.modality for span in prompt.spans} == {"image", "video"}
    frames = [span for span in prompt.spans if span.modality == "video"]
    assert [span.label for span in frames] == [f"video 0, part {number + 1} of 2" for number in range(2)]
    assert all(span.grid[0] == 1 for span in frames)
    assert prompt.position_ids.shape == (3, len(prompt))
    whole = workbench.build_multimodal(qwen, messages)
    assert whole.input_ids == prompt.input_ids
    config = workbench.GenerationConfig(max_new_tokens=5, ignore_eos=True)
    inside = workbench.open_engine("transformers-multimodal", qwen).generate(whole, config).token_ids
    assert workbench.open_engine("transformers", qwen).generate(prompt, config).token_ids == inside


def test_the_explorer_shows_an_image_and_the_frames_of_a_video(qwen, clip):
    content = [
        {"type": "video", "video": clip},
        {"type": "text", "text": "Then"},
        {"type": "image", "image": Image.new("RGB", (48, 40), (9, 200, 9))},
        {"type": "text", "text": "What happens?"},
    ]
    explorer = workbench.explore(qwen, [{"role": "user", "content": content}], judge=False, new_tokens=1)
    try:
        items = explorer.patches.items
        assert [item["label"] for item in items][:2] == ["video 0, part 1 of 2", "video 0, part 2 of 2"]
        shown = [np.asarray(Image.open(io.BytesIO(explorer.patches.images[item["image"]]))).mean() for item in items]
        assert shown[0] < shown[1]  # the clip becomes brighter
        assert shown[2] == pytest.approx((9 + 200 + 9) / 3, abs=1)
        (start, _), *others = explorer.prompt.embedding_ranges
        emptied = replace(explorer.prompt, embedding_ranges=[(start, start), *others])
        explorer.patches.show(emptied)
        assert [item["image"] for item in explorer.patches.items] == [item["image"] for item in items][1:]
    finally:
        explorer.close()


def test_known_families_take_videos_by_their_combined_processor(tmp_path, clip):
    save_multimodal(tmp_path, "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl")
    model = workbench.load_model(tmp_path)
    video = [{"type": "video", "video": clip}, {"type": "text", "text": "What happens?"}]
    prompt = workbench.build_prompt(model, [{"role": "user", "content": video}])
    assert prompt.spans[0].modality == "video"
    assert prompt.spans[0].grid is not None
    assert prompt.position_ids.ndim == 2


def test_without_a_chat_template_the_parts_follow_each_other(qwen, tmp_path):
    save_multimodal(tmp_path, "Mistral3ForConditionalGeneration", "mistral3")
    model = workbench.load_model(tmp_path)
    prompt = workbench.build_prompt(model, "What is it?", [picture()])
    text = "".join(model.tokens(prompt.input_ids))
    assert text.endswith("What is it?")
    assert text.count("[IMG_BREAK]") == len(prompt.embedding_ranges) - 1
    assert text.count("[IMG_END]") == 1
    assert len({span.grid for span in prompt.spans}) == 1
    assert prompt.spans[0].grid[0] == 1


def test_features_of_several_items_are_those_of_their_prompt(qwen):
    tower = load_vision_tower(qwen)
    one, other = picture(), picture(33, 64)
    features = tower.features([one, other])
    prompt = workbench.build_prompt(qwen, "Look", [one, other], tower=tower)
    assert [len(each.rows) for each in features] == [len(rows) for rows in prompt.input_embeddings]
    assert all(torch.equal(each.rows, rows) for each, rows in zip(features, prompt.input_embeddings, strict=True))
    assert tower.check_parity([one, other]) == 0.0
    with pytest.raises(workbench.ModelError, match="features alone do not say how 'qwen3_5' lays out"):
        workbench.build_prompt(qwen, "Look", features=features)


def test_bad_items_are_refused_by_name(qwen, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    with pytest.raises(VideoError, match=r"broken.mp4 is not a video"):
        workbench.build_prompt(qwen, [{"role": "user", "content": [{"type": "video", "video": broken}]}])
    for messages, given, words in (
        ([{"role": "user", "content": [{"type": "audio", "audio": np.zeros(100)}]}], [], "takes parts of type 'text'"),
        ("a <image_token> b", [], "contains '<image_token>' in a text, which marks the positions of images"),
        ([{"role": "user", "content": [{"type": "video"}]}], [], "mark more videos than were given"),
    ):
        with pytest.raises(workbench.PromptError, match=words):
            workbench.build_prompt(qwen, messages, given)
    with pytest.raises(workbench.PromptError, match="has the content None: give a text or a list of parts"):
        workbench.build_prompt(qwen, [{"role": "assistant", "content": None}])
    with pytest.raises(workbench.PromptError, match="processor rejects the prompt"):
        workbench.build_prompt(qwen, "thin", [picture(5000, 1)])


def test_settings_and_sounds_beyond_a_processor_are_refused(qwen, tmp_path):
    """A damaged size would take all memory, and Whisper's extractor cuts a longer sound without a word."""
    save_multimodal(tmp_path, "Qwen2_5OmniThinkerForConditionalGeneration", "qwen2_5_omni_thinker")
    tower = load_vision_tower(tmp_path)
    reader = tower.own_processor.own.feature_extractor
    sound = np.zeros(reader.n_samples + 1, np.float32)
    with pytest.raises(
        workbench.PromptError, match=r"sound 0 lasts .* s but .* takes .* s: cut it into shorter sounds"
    ):
        tower.features([Item("audio", sound)])
    settings = json.loads((qwen.path / "processor_config.json").read_text())
    settings["image_processor"]["size"] = {"height": 10**6, "width": 10**6}
    damaged = tmp_path / "damaged"
    shutil.copytree(qwen.path, damaged)
    (damaged / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(workbench.ModelError, match="1000000 x 1000000 pixels, over the limit"):
        load_vision_tower(damaged)
