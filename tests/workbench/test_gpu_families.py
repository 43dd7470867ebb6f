"""Every decoder family on a GPU: states of the CPU engine, and decode steps as CUDA graphs."""

import pytest
import torch
import transformers

import workbench
from tests.workbench.small_architectures import FAMILIES, save
from tests.workbench.test_architectures import prompt_for
from workbench.comparison.metrics import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
TAPS = ["embed", "layers.*", "layers.*.*", "norm", "logits"]


@pytest.mark.parametrize("name", FAMILIES)
def test_states_and_tokens_equal_the_cpu_engine(name, tmp_path):
    if not hasattr(transformers, FAMILIES[name][0]):
        pytest.skip(f"Transformers {transformers.__version__} lacks {FAMILIES[name][0]}")
    model = save(name, tmp_path)
    on_cpu = workbench.open_engine("numba", model)
    if on_cpu.decoder.config.sinks or on_cpu.decoder.config.latent:
        with pytest.raises(workbench.ModelError, match="attention sinks|latent attention"):
            workbench.open_engine("numba", model, device="cuda")
        return
    prompt = prompt_for(name, model.text_config)
    on_gpu = workbench.open_engine("numba", model, device="cuda")
    a, b = on_gpu.trace(prompt, TAPS), on_cpu.trace(prompt, TAPS)
    for tap in a:
        assert relative_error(a[tap], b[tap]).max() < 3e-5, tap
    config = workbench.GenerationConfig(max_new_tokens=20, ignore_eos=True)
    assert on_gpu.generate(prompt, config).token_ids == on_cpu.generate(prompt, config).token_ids


@pytest.mark.parametrize(
    "name", ["qwen3-moe", "glm4-moe", "olmoe", "mixtral", "ministral3", "cohere2", "granite", "llama4"]
)
def test_graphs_equal_eager_mode(name, tmp_path):
    """Experts, positions that scale queries, other norms and blocks inside a captured decode step."""
    changes = {"head_dim": 64} if name != "olmoe" else {"hidden_size": 256, "num_attention_heads": 4}
    model = save(name, tmp_path, **changes)
    prompt = workbench.Prompt(list(range(3, 40)))
    engines = [
        workbench.open_engine("numba", model, dtype="bfloat16", device="cuda", eager_mode=each)
        for each in (False, True)
    ]
    assert engines[0].runner.graphs is not None
    config = workbench.GenerationConfig(max_new_tokens=40, ignore_eos=True, output_logits="generation")
    a, b = (engine.generate(prompt, config) for engine in engines)
    assert engines[0].runner.graphs is not None  # capturing did not fail
    assert a.token_ids == b.token_ids
    assert torch.equal(a.logits, b.logits)


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3.5", "qwen3-next"])
def test_many_requests_at_once_get_their_own_answers(name, tmp_path):
    """Requests of several lengths, more than run at once, against each alone: logits differ by rounding only."""
    model = save(name, tmp_path)
    engine = workbench.open_engine("numba", model, device="cuda", max_batch_size=4, max_prefill_token_num=48)
    prompts = [workbench.Prompt(list(range(3, 10 + 7 * number))) for number in range(9)]
    config = workbench.GenerationConfig(max_new_tokens=12, ignore_eos=True)
    alone = [engine.generate(prompt, config).token_ids for prompt in prompts]
    streams = [engine.stream(prompt, config) for prompt in prompts]
    together = [[token for output in stream for token in output.token_ids] for stream in streams]
    assert together == alone
