"""The real TurboMind compared with Transformers; needs an NVIDIA GPU and lmdeploy: `make test-gpu`."""

import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

import workbench
from tests.workbench.small_architectures import internlm2_of
from workbench import GenerationConfig, ModelError, Prompt, PromptError, ResponseType, Span
from workbench.benchmarks.serving import spliced_prompt
from workbench.comparison import compare, compare_text, first_divergence
from workbench.comparison.reference_cache import reference_engine
from workbench.faults import FAULTS, faults_of, observe
from workbench.trace import Trace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("lmdeploy") is None, reason="lmdeploy is not installed"),
]
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {"max_batch_size": 8, "cache_max_entry_count": 0.03}
CONFIG = GenerationConfig(max_new_tokens=16, ignore_eos=True, logprobs=5)


def save(folder, kind="LlamaConfig", **changes):
    import transformers
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    config = getattr(transformers, kind)(
        **{name: value for name, value in {**SHAPE, **changes}.items() if value is not None}
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SHAPE["vocab_size"])}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2").save_pretrained(folder)
    return workbench.load_model(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(llama):
    with workbench.open_engine("turbomind", llama, **SMALL) as engine:
        yield engine


@pytest.fixture(scope="module")
def prompt(llama):
    long = spliced_prompt(llama, 1300, 2)
    items = [item[:40] for item in long.input_embeddings]
    return Prompt(long.input_ids[:160], items, [(10, 50), (80, 120)])


@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen2Config", "Qwen3Config"])
def test_turbomind_error_is_noise_at_every_depth(tmp_path, kind):
    model = save(tmp_path, kind)
    prompt = spliced_prompt(model, 1300, 2)
    with workbench.open_engine("turbomind", model, depth_sweep=True, **SMALL) as engine:
        found = first_divergence(engine, prompt, device="cuda")
        assert found.divergence is None, str(found)
        assert found.comparison.taps == ("depth.1", "depth.2", "depth.3", "depth.4", "norm", "logits")
        text = compare_text(
            reference_engine(model, "bfloat16", "cuda").generate(prompt, CONFIG), engine.generate(prompt, CONFIG)
        )
        assert text.close, str(text)


def test_internlm2_error_is_noise(tmp_path, llama, prompt):
    """Transformers has no class for it, so it is compared with the Llama whose weights it has, in its own layout."""
    model = internlm2_of(llama, tmp_path)
    with workbench.open_engine("turbomind", model, **SMALL) as engine:
        run = engine.trace(prompt, ["norm", "logits"])
    reference = reference_engine(llama, "float64", "cuda").trace(prompt, ["norm", "logits"])
    floor = reference_engine(llama, "bfloat16", "cuda").noise_floor(prompt, ["norm", "logits"])
    comparison = compare(
        reference, Trace(run, run.positions, {**run.provenance, "model_digest": llama.digest}), floor=floor
    )
    assert comparison.verdict == "noise", str(comparison)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_differ_from_one_only_by_noise(llama, engine, prompt):
    """LMDeploy's tensor parallelism: the sums of two halves round differently, and nothing else may differ."""
    with workbench.open_engine("turbomind", llama, tp=2, communicator="nccl", depth_sweep=True, **SMALL) as two:
        found = first_divergence(two, prompt, device="cuda")
        assert found.divergence is None, str(found)
        text = compare_text(engine.generate(prompt, CONFIG), two.generate(prompt, CONFIG))
        assert text.close, str(text)
        with ThreadPoolExecutor(8) as pool:
            outputs = list(pool.map(lambda _: two.generate(prompt, CONFIG).token_ids, range(8)))
    assert [tokens[:1] for tokens in outputs] == [engine.generate(prompt, CONFIG).token_ids[:1]] * 8


def test_a_shifted_range_diverges_at_the_first_depth(llama, prompt):
    """One layer after the splice is the earliest state that TurboMind exposes."""
    with workbench.open_engine("turbomind", llama, depth_sweep=True, **SMALL) as engine:
        found = first_divergence(FAULTS["range +1"].inject(engine), prompt, device="cuda")
    assert (found.divergence.tap, found.divergence.token, found.divergence.span) == ("depth.1", 10, 0)


def test_turbomind_passes_every_probe(llama, engine, prompt):
    with workbench.open_engine("turbomind", llama, max_prefill_token_num=64, **SMALL) as chunked:
        report = workbench.probe(engine, prompt, chunked=chunked)
    assert [result.passed for result in report.results] == [True] * 10, str(report)


@pytest.mark.parametrize("name", [fault.name for fault in faults_of("invalid prompt")])
def test_invalid_prompts_do_what_lint_predicts(llama, prompt, name):
    with workbench.open_engine("turbomind", llama, isolated=True, check=False, **SMALL) as engine:
        seen = observe(engine, prompt, "turbomind", FAULTS[name], "cuda")
    assert seen.agrees is (None if name == "wrong width" else True), str(seen)


def test_invalid_prompts_are_refused_by_our_check(engine, prompt):
    with pytest.raises(PromptError, match="leaves the prompt of 160 tokens"):
        engine.generate(prompt.replace(embedding_ranges=[(10, 50), (130, 170)]), CONFIG)
    with pytest.raises(PromptError, match="takes no positions"):
        engine.generate(prompt.replace(position_ids=torch.arange(160) * 2), CONFIG)
    with pytest.raises(PromptError, match="no bidirectional attention"):
        engine.generate(prompt.replace(spans=[Span(attention="bidirectional")] * 2), CONFIG)


def test_states_logits_and_tokens_are_returned_once(engine, prompt):
    config = GenerationConfig(
        max_new_tokens=6, ignore_eos=True, output_last_hidden_state="all", output_logits="generation", logprobs=3
    )
    output = engine.generate(prompt, config)
    assert len(output.token_ids) == output.num_token == 6
    assert output.last_hidden_state.shape == (165, 512)
    assert output.logits.shape == (6, 1024)
    assert output.logits.argmax(dim=1).tolist() == output.token_ids
    assert [max(each, key=each.get) for each in output.logprobs] == output.token_ids
    assert all(-20 < value < 0 for each in output.logprobs for value in each.values())


def test_concurrent_requests_match_after_cancel_and_early_close(engine, prompt):
    long = GenerationConfig(max_new_tokens=1500, ignore_eos=True)
    stream = engine.stream(prompt, long, session_id=3)
    next(stream)
    assert engine.cancel(3)
    assert list(stream)[-1].status is ResponseType.CANCEL
    stream = engine.stream(prompt, long)
    next(stream)
    stream.close()
    alone = engine.generate(prompt, CONFIG).token_ids
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda _: engine.generate(prompt, CONFIG).token_ids, range(8)))
    assert [tokens[:1] for tokens in outputs] == [alone[:1]] * 8


def test_unsupported_options_and_models_are_refused_by_name(llama, tmp_path):
    with pytest.raises(TypeError, match="TurbomindEngineConfig has no max_batch"):
        workbench.open_engine("turbomind", llama, max_batch=3)
    with pytest.raises(ValueError, match="dtype='float32'"):
        workbench.open_engine("turbomind", llama, dtype="float32")
    phi = save(tmp_path / "phi", "PhiConfig", head_dim=None)
    with pytest.raises(ModelError, match="does not run PhiForCausalLM: it runs"):
        workbench.open_engine("turbomind", phi)


def test_closed_engine_refuses_requests(llama, prompt):
    engine = workbench.open_engine("turbomind", llama, **SMALL)
    engine.close()
    with pytest.raises(ModelError, match="was closed"):
        engine.generate(prompt, CONFIG)


def test_lmdeploy_pytorch_engine_refuses_embeddings(llama, prompt):
    try:
        engine = workbench.open_engine("lmdeploy-pytorch", llama)
    except ModelError as error:
        pytest.skip(str(error))
    with pytest.raises(workbench.EmbeddingRangeError, match="silently ignore them"):
        engine.generate(prompt, CONFIG)
    config = json.loads((llama.path / "config.json").read_text())
    assert len(engine.generate(Prompt([5] * 20), CONFIG).token_ids) == 16, config


GROUP = 128  # the only group size of TurboMind's AWQ
COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]  # of the eight of an integer, from its lowest bits


def _packed(codes):
    """int32 `[rows, columns / 8]` of codes of four bits."""
    groups = codes.view(len(codes), -1, 8)[:, :, COLUMNS]
    numbers = sum(groups[:, :, place] << (4 * place) for place in range(8))
    return torch.where(numbers >= 1 << 31, numbers - (1 << 32), numbers).to(torch.int32)


def _save_awq(folder):
    """A random Llama whose linear layers are quantized; returns its tensors."""
    shape = {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    model = save(folder, **shape)
    generator, tensors = torch.Generator().manual_seed(0), load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        out, inputs = tensors.pop(name).shape
        base, groups = name.removesuffix(".weight"), inputs // GROUP
        tensors[f"{base}.qweight"] = _packed(torch.randint(0, 16, (inputs, out), generator=generator))
        tensors[f"{base}.qzeros"] = _packed(torch.randint(6, 10, (groups, out), generator=generator))
        spread = torch.rand(groups, out, generator=generator) * 0.5 + 0.75
        tensors[f"{base}.scales"] = (spread * inputs**-0.5 / 4.6).half()
    tensors = {name: each.half() if each.dtype is torch.bfloat16 else each for name, each in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model.path / "config.json").read_text())
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16", "quantization_config": settings}))
    return tensors


def test_awq_weights_are_noise_and_a_wrong_group_scale_is_a_bug_at_its_layer(tmp_path):
    tensors = _save_awq(tmp_path / "right")
    shutil.copytree(tmp_path / "right", tmp_path / "wrong")
    tensors["model.layers.3.mlp.down_proj.scales"][2] *= 1.5
    save_file(tensors, tmp_path / "wrong" / "model.safetensors", metadata={"format": "pt"})
    right, wrong = (workbench.load_model(tmp_path / name) for name in ("right", "wrong"))
    ids = torch.randint(10, 1000, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    prompt = Prompt(ids, [right.token_rows(ids[:12])], [(20, 32)])
    verdicts = []
    for opened in (right, wrong):
        engine = workbench.open_engine("turbomind", opened, dtype="float16", device="cuda", depth_sweep=True, **SMALL)
        engine.model = right  # compared with what the codes and scales mean
        verdicts.append(workbench.check_engine(engine, prompt, ["depth.*", "norm", "logits"], device="cuda"))
        engine.close()
    assert verdicts[0].verdict == "noise"
    assert (verdicts[1].verdict, verdicts[1].first_divergence.tap) == ("bug", "depth.4")
