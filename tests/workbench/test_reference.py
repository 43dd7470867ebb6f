"""The Transformers reference: generation ends as Transformers' does, causal prompts are causal, errors of classes are named."""

import json

import pytest
import torch
import transformers
from PIL import Image

import workbench
from tests.small_vlms import VLMS, save_vlm
from tests.workbench.small_models import BASE, random_prompt, save_llama
from workbench.faults import FAULTS

IDS = list(range(5, 25))


def rewrite(path, **changes):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


@pytest.mark.parametrize("kind", ["numba", "transformers"])
@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_generation_ends_where_transformers_ends(tmp_path, kind, place):
    save_llama(tmp_path)
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    greedy = {"do_sample": False, "max_new_tokens": 12}
    greedy["repetition_penalty"] = 1.5  # else it repeats one token
    free = network.generate(torch.tensor([IDS]), eos_token_id=None, **greedy)[0, len(IDS) :].tolist()
    stop = free[3]
    assert stop not in free[:3]
    if place == "config.json":
        (tmp_path / "generation_config.json").unlink()
    rewrite(tmp_path / place, eos_token_id=[2, stop])
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = network.generate(torch.tensor([IDS]), **greedy)[0, len(IDS) :].tolist()
    assert expected[-1] == stop
    engine = workbench.open_engine(kind, workbench.load_model(tmp_path))
    config = workbench.GenerationConfig(max_new_tokens=12, repetition_penalty=1.5)
    assert engine.generate(workbench.Prompt(IDS), config).token_ids == expected[:-1]


def test_stop_token_that_is_no_id_is_refused(tmp_path):
    save_llama(tmp_path)
    rewrite(tmp_path / "generation_config.json", eos_token_id=["</s>"])
    engine = workbench.open_engine("transformers", workbench.load_model(tmp_path))
    with pytest.raises(workbench.ModelError, match="eos_token_id"):
        engine.generate(workbench.Prompt(IDS))


def test_causal_prompt_is_causal_on_paligemma(tmp_path):
    """Its own mask is bidirectional unless it gets token types; the commonest bug of engines is a causal prefix."""
    model = save_vlm(tmp_path, VLMS["paligemma"])
    engine = workbench.open_engine("transformers", model)
    generator = torch.Generator().manual_seed(0)
    prompt = workbench.Prompt(IDS, [torch.randn(4, model.text_config.hidden_size, generator=generator)], [(2, 6)])
    changed = workbench.Prompt([*IDS[:-1], 40], prompt.input_embeddings, prompt.embedding_ranges)
    before, after = (engine.trace(each, ["norm"])["norm"] for each in (prompt, changed))
    torch.testing.assert_close(before[:-1], after[:-1])
    both = prompt.replace(spans=[workbench.Span(attention="bidirectional", block=(0, len(IDS)))])
    assert not torch.allclose(before[:-1], engine.trace(both, ["norm"])["norm"][:-1], atol=1e-3)


def test_mixture_of_experts_gets_a_verdict(tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**{**BASE, "num_local_experts": 4})
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    engine = workbench.open_engine("transformers", workbench.load_model(tmp_path))
    assert workbench.check_engine(engine, random_prompt()).verdict == "same"
    late = FAULTS["range +1"].inject(engine)
    assert "off by one" in workbench.first_divergence(late, random_prompt()).explanation.sentence


def test_splice_fault_is_named_behind_an_embedding_multiplier(tmp_path):
    torch.manual_seed(0)
    config = transformers.GraniteConfig(**BASE, embedding_multiplier=12.0)
    transformers.GraniteForCausalLM(config).save_pretrained(tmp_path)
    engine = workbench.open_engine("transformers", workbench.load_model(tmp_path))
    for fault, kind in (("range +1", "shifted"), ("placeholders used", "placeholders"), ("rows reversed", "reversed")):
        found = workbench.first_divergence(FAULTS[fault].inject(engine), random_prompt())
        assert found.explanation.kind == kind


def test_rows_are_refused_where_the_class_scales_lookups_only(tmp_path):
    torch.manual_seed(0)
    config = transformers.FalconH1Config(
        **{**BASE, "num_attention_heads": 4}, mamba_d_ssm=96, mamba_n_heads=6, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1,
        embedding_multiplier=5.0,
    )  # fmt: skip
    transformers.FalconH1ForCausalLM(config).save_pretrained(tmp_path)
    engine = workbench.open_engine("transformers", workbench.load_model(tmp_path))
    engine.trace(workbench.Prompt(IDS), ["logits"])
    with pytest.raises(workbench.EmbeddingRangeError, match="looks up otherwise"):
        engine.trace(random_prompt(), ["logits"])


def test_placeholder_ids_do_not_matter(tmp_path):
    """Not even the padding token's, which makes RoBERTa skip positions."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**{**BASE, "num_key_value_heads": None}, is_decoder=True, pad_token_id=0)
    transformers.RobertaForCausalLM(config).save_pretrained(tmp_path)
    engine = workbench.open_engine("transformers", workbench.load_model(tmp_path))
    prompt = random_prompt()
    padded = prompt.replace(input_ids=[0 if 4 <= i < 9 else token for i, token in enumerate(prompt.input_ids)])
    assert torch.equal(*(engine.trace(each, ["logits"])["logits"] for each in (prompt, padded)))


def test_new_positions_after_images_need_those_of_the_prompt(tmp_path):
    """A model with M-RoPE remembers the offset of the last prompt that it saw, which may be another request's."""
    model = save_vlm(tmp_path, VLMS["qwen2_vl"])
    picture = Image.radial_gradient("L").convert("RGB").resize((224, 56))
    prompt = workbench.build_multimodal(model, "caption this in words", [picture])
    engine = workbench.open_engine("transformers-multimodal", model)
    short = workbench.GenerationConfig(max_new_tokens=4)
    assert len(engine.generate(prompt, short).token_ids) <= 4
    without = prompt.replace(position_ids=None)
    with pytest.raises(workbench.PromptError, match="give position_ids"):
        engine.generate(without, short)
    assert torch.equal(*(engine.trace(each, ["logits"])["logits"] for each in (prompt, without)))
