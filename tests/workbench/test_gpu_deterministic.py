"""`deterministic=True` on a GPU: every bit of a request's logits, whatever the other requests do."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import workbench
from tests.workbench.small_architectures import save
from tests.workbench.small_models import save_llama
from workbench import GenerationConfig, Prompt
from workbench.engines.numba_engine.ops import InvariantLinear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
# Large enough that cuBLAS chooses other kernels for other numbers of rows.
LARGE = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 24, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 1000, "max_position_embeddings": 2048,
}  # fmt: skip
ALL = GenerationConfig(max_new_tokens=24, ignore_eos=True, output_logits="all")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("large"), **LARGE)


def spliced(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 1000, (length,), generator=generator)
    rows = torch.randn(5, 3072, generator=generator) * 0.1
    return Prompt(ids, [rows], [(1, 6)])


def together(engine, prompts, config=ALL):
    """All requests at once: tokens and logits of each."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        outputs = list(pool.map(lambda prompt: engine.generate(prompt, config), prompts))
    return [(output.token_ids, output.logits) for output in outputs]


def differing(model, prompts, **options):
    """The number of requests whose logits differ between running alone and together."""
    options = {"dtype": "bfloat16", "device": "cuda", "enable_prefix_caching": False, **options}
    with workbench.open_engine("numba", model, max_prefill_token_num=100, **options) as engine:
        crowd = together(engine, prompts)
    count = 0
    with workbench.open_engine("numba", model, **options) as engine:
        for prompt, (tokens, logits) in zip(prompts, crowd, strict=True):
            alone = engine.generate(prompt, ALL)
            count += not (alone.token_ids == tokens and torch.equal(alone.logits, logits))
    return count


PROMPTS = [spliced(length, length) for length in (7, 8, 40, 65, 130, 300, 301, 700)]


def test_results_do_not_depend_on_the_batch(large):
    assert differing(large, PROMPTS, deterministic=True) == 0
    assert differing(large, PROMPTS, deterministic=True, eager_mode=True) == 0


def test_without_it_they_do(large):
    """So that the test above can fail."""
    assert differing(large, PROMPTS) > 0


def test_preemption_and_prefix_cache_change_nothing(large):
    options = {"dtype": "bfloat16", "device": "cuda", "deterministic": True}
    prompts = [spliced(length, length) for length in range(88, 96)]
    config = GenerationConfig(max_new_tokens=70, ignore_eos=True, output_logits="generation")
    with workbench.open_engine("numba", large, **options, enable_prefix_caching=False) as engine:
        alone = [engine.generate(prompt, config) for prompt in prompts]
    with workbench.open_engine("numba", large, **options, cache_max_entry_count=16) as engine:
        crowd = together(engine, prompts, config)
        assert engine.stats().preemptions > 0
        again = together(engine, prompts[:2], config)
        # A prompt that continues an answer: pages of generated tokens are not shared with it.
        longer = prompts[0].replace(input_ids=[*prompts[0].input_ids, *alone[0].token_ids[:40]])
        after = engine.generate(longer, config)
    with workbench.open_engine("numba", large, **options, enable_prefix_caching=False) as engine:
        fresh = engine.generate(longer, config)
    for each, (tokens, logits) in zip([*alone, *alone[:2]], [*crowd, *again], strict=True):
        assert each.token_ids == tokens
        assert torch.equal(each.logits, logits)
    assert torch.equal(after.logits, fresh.logits)


def test_experts_do_not_depend_on_the_batch(tmp_path):
    model = save("qwen3-moe", tmp_path, head_dim=64)
    prompts = [Prompt(list(range(3, 3 + length))) for length in (5, 17, 40, 90)]
    assert differing(model, prompts, deterministic=True) == 0


@pytest.mark.parametrize(("inputs", "outputs"), [(3072, 3072), (8192, 3072), (576, 968)])
def test_rows_of_a_product_do_not_depend_on_their_number(inputs, outputs):
    generator = torch.Generator("cuda").manual_seed(0)
    weight = (torch.randn(outputs, inputs, generator=generator, device="cuda") * 0.02).bfloat16()
    x = torch.randn(1100, inputs, generator=generator, device="cuda").bfloat16()
    linear = InvariantLinear(weight, torch.ones(outputs, device="cuda").bfloat16())
    whole = linear(x)
    for count in (1, 2, 7, 16, 63, 64, 65, 128, 129, 500, 1024):
        for start in (0, 3, 70):
            assert torch.equal(linear(x[start : start + count].contiguous()), whole[start : start + count])
    exact = x.double() @ weight.double().T + 1
    assert (whole.double() - exact).norm() / exact.norm() < 3e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float16", "device": "cuda"}, "bfloat16"),
        ({"dtype": "float32", "device": "cuda"}, "bfloat16"),
        ({"dtype": "bfloat16", "device": "cpu"}, "float32"),
    ],
)
def test_what_cannot_be_deterministic_is_refused(large, options, words):
    with pytest.raises((ValueError, workbench.ModelError), match=words):
        workbench.open_engine("numba", large, deterministic=True, **options)
