"""Prompts built here, run through `inputs_embeds`, against Transformers' own forward with `pixel_values`."""

from __future__ import annotations

import wave

import numpy as np
import pytest
import torch
import transformers

import workbench
from tests.small_vlms import SOUND, VLMS
from workbench.vision.prompt_builder import build_multimodal, build_prompt
from workbench.vision.tower import load_vision_tower

pytestmark = pytest.mark.slow


def whole_model(model):
    return getattr(transformers, model.config.architectures[0]).from_pretrained(model.path).eval()


def forward(network, **inputs):
    """Logits `[seq, vocab]` and hidden state 0 `[seq, hidden]` of Transformers' own forward pass."""
    seen = {}
    decoder = network.get_decoder()
    hook = decoder.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(state=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        logits = network(**inputs).logits[0]
    hook.remove()
    return logits, seen["state"][0]


def assert_close(mine, theirs):
    error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
    assert error < 1e-5, f"relative difference {error:.2e}"


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", VLMS)
def test_built_prompt_gives_the_same_logits_as_pixel_values(name, count, small_vlm, own_processor, images):
    vlm, model, shown = VLMS[name], small_vlm(name), images[:count]
    prompt = build_prompt(model, "What is shown?", shown)
    text = (vlm.marker or vlm.token) * count + "What is shown?"
    inputs = own_processor(model, vlm)(text=[text], images=[shown], return_tensors="pt")
    assert list(prompt.input_ids) == inputs["input_ids"][0].tolist()
    inputs.pop("labels", None)
    logits, state = forward(whole_model(model), **inputs)
    trace = workbench.open_engine("transformers", model).trace(prompt, ("embed", "logits"))
    assert_close(trace["embed"], state)
    assert_close(trace["logits"], logits)


@pytest.mark.parametrize("name", VLMS)
def test_ranges_shifted_by_one_change_the_logits(name, small_vlm, images):
    """The test above can fail: moving the ranges by one changes the logits far beyond its limit."""
    model = small_vlm(name)
    prompt = build_prompt(model, "What is shown?", images[:1])
    moved = [(start + 1, stop + 1) for start, stop in prompt.embedding_ranges]
    engine = workbench.open_engine("transformers", model)
    right, wrong = (
        engine.trace(each, ["logits"])["logits"] for each in (prompt, prompt.replace(embedding_ranges=moved))
    )
    assert (right - wrong).norm() / right.norm() > 1e-3


@pytest.mark.parametrize("name", VLMS)
def test_generated_tokens_equal_transformers(name, small_vlm, own_processor, images):
    vlm, model = VLMS[name], small_vlm(name)
    text = (vlm.marker or vlm.token) + "What is shown?"
    inputs = own_processor(model, vlm)(text=[text], images=[images[:1]], return_tensors="pt")
    inputs.pop("labels", None)
    wanted = whole_model(model).generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    engine = workbench.open_engine("transformers", model)
    config = workbench.GenerationConfig(max_new_tokens=6, ignore_eos=True)
    tokens = engine.generate(build_prompt(model, "What is shown?", images[:1]), config).token_ids
    assert tokens == wanted[0, -6:].tolist()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", VLMS)
def test_multimodal_engine_equals_tower_and_embeddings(name, count, small_vlm, images):
    """Vision inside the engine gives the same states and tokens as a separate tower and embedding injection."""
    model, shown = small_vlm(name), images[:count]
    one, two = workbench.open_engine("transformers-multimodal", model), workbench.open_engine("transformers", model)
    whole, spliced = build_multimodal(model, "What is shown?", shown), build_prompt(model, "What is shown?", shown)
    assert whole.input_ids == spliced.input_ids
    traces = [engine.trace(prompt) for engine, prompt in ((one, whole), (two, spliced))]
    for tap in traces[0]:
        assert_close(traces[0][tap], traces[1][tap])
    config = workbench.GenerationConfig(max_new_tokens=5, ignore_eos=True)
    assert one.generate(whole, config).token_ids == two.generate(spliced, config).token_ids


def test_each_engine_refuses_the_others_input(small_vlm, images):
    model = small_vlm("llava")
    one, two = workbench.open_engine("transformers-multimodal", model), workbench.open_engine("transformers", model)
    whole, spliced = build_multimodal(model, "What?", images), build_prompt(model, "What?", images)
    with pytest.raises(
        workbench.EmbeddingRangeError, match=r"takes images .* not embeddings.*answers from the placeholders"
    ):
        one.stream_infer(1, spliced.input_ids, spliced.input_embeddings, spliced.embedding_ranges)
    with pytest.raises(workbench.PromptError, match="no vision model inside"):
        two.stream_infer(1, whole.input_ids, multimodal=whole.multimodal)
    with pytest.raises(workbench.PromptError, match="32 placeholders but no images"):
        one.stream_infer(1, whole.input_ids)
    alone = build_multimodal(model, "What?", images[:1])
    with pytest.raises(workbench.PromptError, match="do not fit the prompt"):
        one.generate(whole.replace(multimodal=alone.multimodal), workbench.GenerationConfig(max_new_tokens=1))
    with pytest.raises(workbench.ModelError, match="no vision or audio part"):
        workbench.open_engine("transformers-multimodal", workbench.load_model("smollm2-135m"))
    config = workbench.GenerationConfig(max_new_tokens=2)
    tokens = [
        token
        for out in one.stream_infer(1, whole.input_ids, multimodal=whole.multimodal, gen_config=config)
        for token in out.token_ids
    ]
    assert tokens == two.generate(spliced, config).token_ids


@pytest.mark.parametrize("name", VLMS)
def test_tower_features_equal_the_full_model(name, small_vlm, images):
    tower = load_vision_tower(small_vlm(name))
    assert tower.check_parity(images) == 0.0


def test_audio_prompt_from_wav_files_equals_transformers(small_vlm, own_processor, tmp_path):
    """Qwen2-Audio: two audio files of different lengths against Transformers' forward with `input_features`."""
    model, rate = small_vlm("qwen2_audio"), 16000
    waves = []
    for number, seconds in enumerate((0.9, 0.4)):
        time = np.arange(int(rate * seconds)) / rate
        samples = (np.sin(2 * np.pi * 440 * (number + 1) * time) * np.exp(-3 * time) * 20000).astype("<i2")
        path = tmp_path / f"{number}.wav"
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
            file.writeframes(samples.tobytes())
        waves.append((path, samples.astype(np.float32) / 32768))
    content = [{"type": "audio", "audio": path} for path, _ in waves] + [{"type": "text", "text": "What is heard?"}]
    prompt = build_prompt(model, [{"role": "user", "content": content}])
    inputs = own_processor(model, SOUND)(
        text=[SOUND.marker * 2 + "What is heard?"],
        audio=[sound for _, sound in waves],
        return_tensors="pt",
        sampling_rate=rate,
    )
    assert list(prompt.input_ids) == inputs["input_ids"][0].tolist()
    logits, state = forward(whole_model(model), **inputs)
    trace = workbench.open_engine("transformers", model).trace(prompt, ("embed", "logits"))
    assert_close(trace["embed"], state)
    assert_close(trace["logits"], logits)
    assert [span.modality for span in prompt.spans] == ["audio", "audio"]


def test_image_marker_in_user_text_is_refused(small_vlm, images):
    model = small_vlm("llava")
    features = load_vision_tower(model).features(images[:1])
    with pytest.raises(workbench.PromptError, match="contains '<image>' in a text, which marks the positions"):
        build_prompt(model, "What <image> is", features=features)


def test_content_parts_must_match_images_and_modalities(small_vlm, images):
    model = small_vlm("llava")
    features = load_vision_tower(model).features(images[:1])
    places = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    by_features, by_image = build_prompt(model, places, features=features), build_prompt(model, places, images[:1])
    assert by_features.digest == by_image.digest
    for messages, given, message in (
        (places, [], "mark more images than were given"),
        ([{"role": "user", "content": "What?"}], images, "2 of 2 images have no part"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}], [], "llava takes parts of type 'text'"),
        ([{"role": "user", "content": [{"type": "text"}]}], [], "takes parts of type 'text'"),
        ([{"role": "user"}], [], "give a dict with role and content"),
    ):
        with pytest.raises(workbench.PromptError, match=message):
            build_prompt(model, messages, given)


def test_too_long_audio_is_refused(small_vlm):
    tower = load_vision_tower(small_vlm("qwen2_audio"))  # accepts one second of audio
    with pytest.raises(workbench.PromptError, match="sound 1 lasts 1.5 s but qwen2_audio takes 1 s"):
        tower.features([np.zeros(8000, np.float32), np.zeros(24000, np.float32)])
