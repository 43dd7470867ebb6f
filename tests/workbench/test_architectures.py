"""Every decoder family against Transformers: all states of a spliced prompt, greedy tokens, chunked prefill."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

import workbench
from tests.workbench.small_architectures import FAMILIES, REPEATED, WITH_IMAGES, internlm2_of, save
from tests.workbench.small_models import random_prompt, save_llama
from workbench import EmbeddingRangeError, GenerationConfig, ModelError, Prompt, Span
from workbench.comparison.metrics import relative_error

TAPS = ["embed", "layers.*", "layers.*.*", "norm", "logits"]
SPANS = [Span(), Span(attention="bidirectional")]
WITHOUT_SPANS = (
    "llama4",
    "qwen3.5",
    "qwen3.5-moe",
    "qwen3-next",
)  # no bidirectional spans in blocks and linear attention


def limit(engine) -> float:
    """Allowed relative difference; Transformers runs the delta rule of linear attention in blocks of 64 tokens, in float32."""
    return 3e-5 if engine.decoder.config.delta_net else 1e-5


def prompt_for(name: str, config) -> Prompt:
    """Two injected items; with M-RoPE their rows have grid positions, and Qwen3-VL's have features for two layers."""
    prompt = random_prompt()
    if name in WITH_IMAGES:
        positions = torch.arange(40).expand(3, -1).clone()
        positions[:, 20:29] = 20 + torch.stack([torch.zeros(9), torch.arange(9) // 3, torch.arange(9) % 3]).long()
        positions[:, 29:] = torch.arange(11) + 23
        prompt = prompt.replace(position_ids=positions)
    if name.startswith("qwen3-vl"):
        generator = torch.Generator().manual_seed(1)
        prompt = prompt.replace(deepstack=[torch.randn(2, rows, 48, generator=generator) for rows in (5, 9)])
    return prompt


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    model = save(request.param, tmp_path_factory.mktemp("family"))
    engines = [workbench.open_engine(kind, model) for kind in ("numba", "transformers")]
    return request.param, *engines, prompt_for(request.param, model.text_config)


def test_every_state_equals_transformers(pair):
    _, ours, theirs, prompt = pair
    a, b = ours.trace(prompt, TAPS), theirs.trace(prompt, TAPS)
    assert list(a) == list(b)
    for tap in a:
        assert relative_error(a[tap], b[tap]).max() < limit(ours), tap


def test_bidirectional_spans_equal_transformers(pair):
    name, ours, theirs, prompt = pair
    prompt = prompt.replace(spans=SPANS)
    if name in WITHOUT_SPANS:
        for engine in (ours, theirs):
            with pytest.raises(EmbeddingRangeError, match="bidirectional spans"):
                engine.trace(prompt, ["logits"])
        return
    a, b = ours.trace(prompt, ["layers.*", "logits"]), theirs.trace(prompt, ["layers.*", "logits"])
    assert max(float(relative_error(a[tap], b[tap]).max()) for tap in a) < 1e-5


def test_greedy_tokens_and_logits_equal_transformers(pair):
    _, ours, theirs, prompt = pair
    config = GenerationConfig(max_new_tokens=20, ignore_eos=True, output_logits="all")
    a, b = ours.generate(prompt, config), theirs.generate(prompt, config)
    assert a.token_ids == b.token_ids
    assert relative_error(a.logits, b.logits).max() < limit(ours)


@pytest.mark.parametrize("budget", [1, 7, 32])
def test_chunked_prefill_and_batching_are_bit_identical(pair, budget):
    name, ours, _, prompt = pair
    if name in REPEATED and budget != 7:
        pytest.skip("another family with the same layers has this budget")
    chunked = workbench.open_engine("numba", ours.model, max_prefill_token_num=budget, enable_prefix_caching=False)
    chunked.runner.decoder = ours.decoder
    config = GenerationConfig(max_new_tokens=6, ignore_eos=True, output_logits="all")
    spans = [Span(), Span()] if name in WITHOUT_SPANS else SPANS
    prompts = [prompt, prompt.replace(spans=spans), Prompt(prompt.input_ids[:23]), prompt]
    streams = [chunked.stream(each, config) for each in prompts]
    firsts = [next(stream) for stream in streams]  # all are in the engine now
    together = [[first, *stream] for first, stream in zip(firsts, streams, strict=True)]
    for each, outputs in zip(prompts, together, strict=True):
        alone = ours.generate(each, config)
        assert [token for output in outputs for token in output.token_ids] == alone.token_ids
        assert torch.equal(torch.cat([output.logits for output in outputs]), alone.logits)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WITH_IMAGES])
def test_layers_that_fill_whole_panels_equal_transformers(name, tmp_path):
    """Widths of published models, for which a step without taps may be one native call."""
    wide = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    own = FAMILIES[name][1]
    wide |= {"head_dim": 32} if "head_dim" in own or name.startswith("llama") else {}
    wide |= {
        key: 64
        for key in ("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp")
        if key in own
    }
    if "kv_lora_rank" in own:
        wide |= {
            "num_key_value_heads": 4,
            "q_lora_rank": own["q_lora_rank"] and 64,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 24,
        }
    if name.startswith("phi3") and "rope_parameters" in own:
        pytest.skip("its rope factors are for heads of eight channels")
    model = save(name, tmp_path, **wide)
    generator = torch.Generator().manual_seed(0)
    prompt = Prompt(
        torch.randint(3, 97, (40,), generator=generator), [torch.randn(5, 128, generator=generator) * 0.1], [(4, 9)]
    )
    config = GenerationConfig(max_new_tokens=6, ignore_eos=True, output_logits="all")
    ours = workbench.open_engine("numba", model)
    found, wanted = (engine.generate(prompt, config) for engine in (ours, workbench.open_engine("transformers", model)))
    assert found.token_ids == wanted.token_ids
    assert relative_error(found.logits, wanted.logits).max() < limit(ours)


def test_a_step_that_is_run_again_does_not_advance_the_states_of_linear_attention_twice(tmp_path):
    """The head fails once, after the layers have run: in a chunk of a prompt, in a decode step, and in a step of two requests."""
    model = save("qwen3.5", tmp_path)
    config = GenerationConfig(max_new_tokens=8, ignore_eos=True, output_logits="all")
    prompts = [Prompt(list(range(3, 3 + length))) for length in (30, 41)]
    options = {"max_prefill_token_num": 16}
    alone = [workbench.open_engine("numba", model, **options).generate(prompt, config) for prompt in prompts]
    for failing in (1, 2, 4, 6):
        with workbench.open_engine("numba", model, **options) as engine:
            calls, logits = itertools.count(), engine.decoder.logits

            def fails_once(hidden, calls=calls, logits=logits, failing=failing):
                if next(calls) == failing:
                    raise RuntimeError("out of memory, say")
                return logits(hidden)

            engine.decoder.logits = fails_once
            with ThreadPoolExecutor(2) as pool:
                found = list(pool.map(lambda prompt, engine=engine: engine.generate(prompt, config), prompts))
        for each, wanted in zip(found, alone, strict=True):
            assert each.token_ids == wanted.token_ids
            assert torch.equal(each.logits, wanted.logits)


def test_the_table_of_a_layer_that_predicts_further_tokens_is_not_the_models(tmp_path):
    """Published GLM-4.5 has one in its last layer."""
    model = save("glm4-moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.embed_tokens.weight"] = torch.zeros(97, 48)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 1})
    )
    prompt = Prompt(list(range(3, 20)))
    again = workbench.open_engine("numba", workbench.load_model(tmp_path)).trace(prompt, ["logits"])["logits"]
    assert torch.equal(again, workbench.open_engine("numba", model).trace(prompt, ["logits"])["logits"])
    assert torch.equal(workbench.load_model(tmp_path).embedding_table, tensors["model.embed_tokens.weight"])


def test_internlm2_equals_a_llama_with_the_same_weights(tmp_path):
    """InternLM2 stores its weights grouped by KV head under other names; Transformers has no class for it."""
    llama = save_llama(tmp_path / "llama", attention_bias=True)
    internlm2 = internlm2_of(llama, tmp_path / "internlm2")
    prompt = random_prompt()
    ours = workbench.open_engine("numba", internlm2).trace(prompt, TAPS)
    theirs = workbench.open_engine("transformers", llama).trace(prompt, TAPS)
    assert max(float(relative_error(ours[tap], theirs[tap]).max()) for tap in ours) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("LlamaConfig", {"hidden_act": "gelu"}, "hidden_act"),
        ("LlamaConfig", {"is_causal": False}, "is_causal"),
        ("Gemma3TextConfig", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Qwen3Config", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
        ("OlmoeConfig", {"clip_qkv": 8.0}, "clip_qkv"),
        ("Qwen3NextConfig", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act=silu in the convolution"),
        ("Qwen3NextConfig", {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2}, "all 2 of"),
        ("Qwen3MoeConfig", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ("Qwen3MoeConfig", {"num_experts_per_tok": 200}, "chooses 200 of 128 experts"),
        ("Glm4MoeConfig", {"n_group": 3}, "128 experts in 3 groups"),
        ("GraniteConfig", {"logits_scaling": 0.0}, "logits_scaling=0.0"),
        ("Ministral3Config", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "llama_4_scaling_beta"),
        ("DeepseekV2Config", {"topk_method": "noaux_tc"}, "topk_method"),
        ("CohereConfig", {"use_qk_norm": True}, "use_qk_norm"),
        ("JambaConfig", {}, "'jamba': use 'transformers'"),
    ],
)
def test_unsupported_configurations_are_refused_by_name(tmp_path, name, changes, words):
    import transformers

    getattr(transformers, name)(**changes).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    with pytest.raises(ModelError, match=words):
        workbench.open_engine("numba", workbench.load_model(tmp_path))
