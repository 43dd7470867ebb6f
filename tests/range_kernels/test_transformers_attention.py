"""`attn_implementation="range_kernels"` in Transformers models: same logits and tokens as with their dense masks."""

from __future__ import annotations

import pytest
import torch
import transformers
from range_kernels import register_with_transformers
from range_kernels.transformers_attention import attend, interval_mask
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from tests.small_vlms import VLMS
from tests.workbench.small_architectures import DISTINCT, WITH_IMAGES, save

pytestmark = pytest.mark.slow

register_with_transformers()
TEXT = [name for name in DISTINCT if name not in WITH_IMAGES and not name.startswith("internlm3")]


def load_both(path, kind="AutoModelForCausalLM", theirs="sdpa", **options):
    load = getattr(transformers, kind).from_pretrained
    return [load(path, attn_implementation=name, **options).eval() for name in ("range_kernels", theirs)]


def assert_close(mine, theirs):
    error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
    assert error < 2e-5, f"relative difference {error:.2e}"


@pytest.mark.parametrize("name", TEXT)
@torch.no_grad()
def test_decoder_logits_and_tokens_equal_dense_masks(name, tmp_path):
    """Plain, left-padded and right-padded batches; greedy tokens with a growing cache."""
    without_sdpa = name.startswith("gemma2") or name == "gpt-oss"
    ours, theirs = load_both(save(name, tmp_path).path, theirs="eager" if without_sdpa else "sdpa")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (2, 40), generator=generator)
    if name == "gpt-oss" or name.startswith(("deepseek", "glm4-moe-lite")):
        with pytest.raises(ValueError, match="s_aux|values are .* wide"):
            ours(ids)
        return
    assert_close(ours(ids).logits, theirs(ids).logits)
    for padded in (slice(0, 7), slice(33, 40)):
        mask = torch.ones_like(ids)
        mask[0, padded] = 0
        seen = mask.bool()
        assert_close(ours(ids, attention_mask=mask).logits[seen], theirs(ids, attention_mask=mask).logits[seen])
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_vision_language_logits_and_tokens_equal_dense_masks(name, small_vlm, own_processor, images):
    """Includes Gemma 3 and PaliGemma, whose image tokens attend bidirectionally; vision towers use it as well."""
    vlm, model = VLMS[name], small_vlm(name)
    ours, theirs = load_both(model.path, model.config.architectures[0])
    text = (vlm.marker or vlm.token) * 2 + "What is shown?"
    inputs = own_processor(model, vlm)(text=[text], images=[images], return_tensors="pt")
    inputs.pop("labels", None)
    assert_close(ours(**inputs).logits, theirs(**inputs).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))


def dense(key_start, key_stop, keys):
    at = torch.arange(keys)
    return (at >= key_start[..., None]) & (at < key_stop[..., None])


@pytest.mark.parametrize(
    "function",
    [
        causal_mask_function,
        sliding_window_causal_mask_function(5),
        chunked_causal_mask_function(6, torch.zeros(2, dtype=torch.int)),
        or_masks(causal_mask_function, lambda b, h, q, k: q // 4 == k // 4),
        and_masks(causal_mask_function, lambda b, h, q, k: k >= 3),
    ],
)
@pytest.mark.parametrize(
    ("queries", "keys", "q_offset", "kv_offset"), [(20, 20, 0, 0), (4, 20, 16, 0), (1, 9, 19, 11), (7, 20, 5, 0)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_intervals_equal_the_dense_mask(function, queries, keys, q_offset, kv_offset, padded):
    padding = torch.ones(2, 20, dtype=torch.bool)
    padding[0, :4] = not padded
    common = {
        "batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": function, "attention_mask": padding, "allow_is_causal_skip": False,
    }  # fmt: skip
    mask = interval_mask(**common)
    expected = sdpa_mask(**common).expand(2, 1, queries, keys)[:, 0]
    found = dense(mask[:, 0, :, 0], mask[:, 0, :, 1], keys)
    own = torch.arange(queries) + q_offset
    blind = padded & (own < 4)[None] & (torch.arange(2) == 0)[:, None]
    assert torch.equal(found & ~blind[..., None], expected & ~blind[..., None])


def test_plain_causal_attention_has_no_mask():
    assert interval_mask(2, 8, 8) is None
    assert interval_mask(2, 1, 8, q_offset=7) is None
    assert interval_mask(2, 8, 12) is not None  # a static cache with more slots than tokens


def test_decode_step_with_a_gap_in_its_keys_is_refused():
    padding = torch.ones(1, 2048, dtype=torch.bool)
    padding[0, 700] = False
    with pytest.raises(ValueError, match="are not one interval"):
        interval_mask(1, 1, 2048, q_offset=2047, attention_mask=padding)


def test_masks_that_are_not_intervals_are_refused():
    with pytest.raises(ValueError, match="are not one interval"):
        interval_mask(1, 30, 30, mask_function=lambda b, h, q, k: (k <= q) & ((k % 2 == 0) | (k == q)))


def test_unsupported_arguments_are_refused_by_name():
    module = torch.nn.Module()
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"dropout=0.1"):
        attend(module, q, q, q, None, dropout=0.1)
    with pytest.raises(ValueError, match="no backward pass"):
        attend(module, q.requires_grad_(), q, q, None)
    with pytest.raises(ValueError, match="does not compute s_aux"):
        attend(module, q, q, q, None, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="values are 4 wide and keys 8"):
        attend(module, q, q, q[..., :4], None)
    with torch.no_grad(), pytest.raises(ValueError, match="made for another attention implementation"):
        attend(module, q, q, q, torch.zeros(1, 1, 3, 3))
