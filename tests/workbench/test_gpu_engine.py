"""The engines on a GPU: `make test-gpu`."""

import pytest
import torch

import workbench
from workbench.compare.verdict import compare

from .small import VARIANTS, random_prompt, save_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
TAPS = ["embed", "layers.*", "layers.*.*", "norm", "logits"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_numba_engine_is_noise(tmp_path, name, dtype):
    model, prompt = save_llama(tmp_path, **VARIANTS[name]), random_prompt()
    truth = workbench.open_engine("transformers", model, dtype="float64", device="cuda").trace(prompt, TAPS)
    floor = workbench.open_engine("transformers", model, dtype=dtype, device="cuda").noise_floor(prompt, TAPS)
    engine = workbench.open_engine("numba", model, dtype=dtype, device="cuda")
    comparison = compare(truth, engine.trace(prompt, TAPS), floor=floor)
    assert comparison.verdict == "noise", str(comparison)


def test_greedy_tokens_equal_the_reference(tmp_path):
    model, prompt = save_llama(tmp_path), random_prompt()
    config = workbench.GenerationConfig(max_new_tokens=24, ignore_eos=True)
    engines = [workbench.open_engine(kind, model, device="cuda") for kind in ("numba", "transformers")]
    tokens = [engine.generate(prompt, config).token_ids for engine in engines]
    assert tokens[0] == tokens[1]
