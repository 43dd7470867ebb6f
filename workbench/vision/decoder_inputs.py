"""What a multimodal model hands to its decoder: recorded from the class's own forward pass, of which only the decoder is left out.

Rows, positions, masks and features for early layers are whatever the class computes, so nothing about a family is written down here.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, PromptError, reason

# A looked-up embedding is this number in every channel, so that whatever differs from it was injected. Exact in bfloat16 and float16.
_LOOKED_UP = 1536.0
# Arguments that say how the decoder runs, or that it computes from the ids alone if they are missing.
_PLAIN = {
    "input_ids", "inputs_embeds", "position_ids", "attention_mask", "past_key_values", "cache_position", "cache_params",
    "per_layer_inputs", "mm_token_type_ids", "token_type_ids", "labels",
}  # fmt: skip
_DEEPSTACK = {"visual_pos_masks", "deepstack_visual_embeds"}


class _Reached(Exception):
    """Ends the forward pass at the decoder."""


@dataclass(frozen=True)
class DecoderInputs:
    """The decoder's inputs for one prompt of `seq` tokens.

    Attributes:
        places: bool `[seq]`, the tokens whose embeddings were replaced by rows.
        rows: `[places, hidden]`.
        position_ids: `[seq]` or `[axes, seq]`; None if the decoder counts 0, 1, 2, ... itself.
        visible: bool `[seq, seq]`, which keys each token may attend to in layers without a window; None: the earlier ones.
        deepstack: `[levels, places, hidden]`; None if the model has none.
    """

    places: torch.Tensor
    rows: torch.Tensor
    position_ids: torch.Tensor | None
    visible: torch.Tensor | None
    deepstack: torch.Tensor | None


@torch.no_grad()
def record_decoder_inputs(network: Any, inputs: Mapping[str, Any]) -> DecoderInputs:
    """Run the class's own forward pass on a processor's output up to the decoder.

    Args:
        network: Transformers' model; its decoder's layers and vocabulary are not used and may be empty.
        inputs: of one prompt: `input_ids` `[1, seq]` and what belongs to its images, videos or sounds.

    Raises:
        PromptError: the class rejects the inputs.
        ModelError: the class has no decoder that takes embeddings, or hands it something that a Prompt cannot carry.
    """
    name = type(network).__name__
    decoder = _decoder(network)
    taken = inspect.signature(network.forward).parameters
    passes_on = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
    given = {key: value for key, value in inputs.items() if key != "labels" and (key in taken or passes_on)}
    random = _random_states()
    try:
        with _recorded(network, decoder) as seen, contextlib.suppress(_Reached):
            network(**given, use_cache=False) if "use_cache" in taken or passes_on else network(**given)
    except (ModelError, PromptError):
        raise
    except Exception as error:
        raise PromptError(f"{name} rejects what its processor made of the prompt: {reason(error)}") from error
    if not all(map(torch.equal, random, _random_states())):
        raise ModelError(
            f"{name} draws random numbers for its rows, which differ from run to run: run its sounds with "
            "'transformers-multimodal'"
        )
    if not seen:
        raise ModelError(
            f"{name} does not hand embeddings to its decoder {type(decoder).__name__}: rows cannot be injected"
        )
    # What a processor adds and no forward pass names goes through all of them unread.
    named = inspect.signature(type(decoder).forward).parameters
    seen = {key: value for key, value in seen.items() if key in named or key not in given}
    return _read(name, seen, torch.as_tensor(inputs["input_ids"])[0])


def _random_states() -> list[torch.Tensor]:
    """What torch's generators will draw next."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _decoder(network: Any) -> nn.Module:
    with contextlib.suppress(AttributeError, NotImplementedError):
        decoder = network.get_decoder()
        if isinstance(decoder, nn.Module) and decoder is not network:
            return decoder
    for path in ("model.language_model", "language_model", "model.text_model", "text_model"):
        with contextlib.suppress(AttributeError):
            return network.get_submodule(path)
    raise ModelError(
        f"{type(network).__name__} has no decoder apart from the rest of the model: rows cannot be injected"
    )


@contextlib.contextmanager
def _recorded(network: Any, decoder: nn.Module) -> Iterator[dict[str, Any]]:
    """In it, embeddings are the constant above, and the decoder writes its arguments into the dict and ends the pass."""
    seen: dict[str, Any] = {}
    signature = inspect.signature(type(decoder).forward)

    def reached(*args: Any, **kwargs: Any) -> None:
        named = dict(signature.bind_partial(decoder, *args, **kwargs).arguments)
        named.pop("self", None)
        further = next(
            (key for key, each in signature.parameters.items() if each.kind is inspect.Parameter.VAR_KEYWORD), ""
        )
        others = named.pop(further, {})
        seen.update({**named, **others})
        raise _Reached

    changed: list[nn.Module] = [decoder]
    decoder.forward = reached  # type: ignore[assignment]
    embeddings = {
        id(each): each
        for each in (network.get_input_embeddings(), *decoder.modules())
        if isinstance(each, nn.Embedding)
    }
    for embedding in embeddings.values():
        width, like = embedding.embedding_dim, embedding.weight

        def look_up(ids: torch.Tensor, width: int = width, like: torch.Tensor = like) -> torch.Tensor:
            return torch.full((*ids.shape, width), _LOOKED_UP, dtype=like.dtype, device=like.device)

        embedding.forward = look_up  # type: ignore[assignment]
        changed.append(embedding)
    try:
        yield seen
    finally:
        for module in changed:
            del module.forward  # of the instance: the class's own is back


def _read(name: str, seen: Mapping[str, Any], ids: torch.Tensor) -> DecoderInputs:
    embeddings = seen.get("inputs_embeds")
    if embeddings is None:
        beside = sorted(key for key, value in seen.items() if key not in _PLAIN and _has_tensors(value))
        raise ModelError(
            f"{name} hands its decoder {', '.join(['ids', *beside])} instead of embeddings: it makes no rows of images that take the "
            "place of tokens, as a Prompt needs. Run its images with 'transformers-multimodal'"
        )
    if embeddings.shape[1] != len(ids):
        shape = tuple(embeddings.shape)
        raise ModelError(
            f"{name} hands embeddings of shape {shape} to its decoder for {len(ids)} tokens: rows cannot be injected"
        )
    states = embeddings[0]
    places = (states != _LOOKED_UP).any(dim=-1)
    # Added to the constant, every channel is about as large as it; put in its place, none is.
    if (states[places] > _LOOKED_UP / 2).all(dim=-1).any():
        raise ModelError(
            f"{name} adds its rows to the embeddings of the tokens, which a Prompt cannot express: run its images with "
            "'transformers-multimodal'"
        )
    unknown = sorted(key for key, value in seen.items() if key not in _PLAIN | _DEEPSTACK and _has_tensors(value))
    if unknown:
        raise ModelError(
            f"{name} hands its decoder {', '.join(unknown)} beside the embeddings, which a Prompt cannot carry: run its images with "
            "'transformers-multimodal'"
        )
    return DecoderInputs(
        places.cpu(),
        states[places].cpu(),
        _positions(seen.get("position_ids")),
        _visible(name, seen.get("attention_mask"), len(ids)),
        _deepstack(name, seen, places),
    )


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_tensors(each) for each in value.values())
    return isinstance(value, torch.Tensor) or (isinstance(value, list | tuple) and any(map(_has_tensors, value)))


def _positions(given: torch.Tensor | None) -> torch.Tensor | None:
    if given is None:
        return None
    positions = given.cpu().long()
    positions = positions[:, 0] if positions.ndim == 3 else positions[0] if positions.ndim == 2 else positions
    return positions


def _visible(name: str, mask: Any, length: int) -> torch.Tensor | None:
    """What a mask allows, as booleans `[seq, seq]`; None if it is causal.

    Of masks for several kinds of layers, what layers without a window allow. The others must differ by a window only.
    """
    if isinstance(mask, Mapping):
        kinds = {kind: _visible(name, each, length) for kind, each in mask.items()}
        if all(each is None or not bool(each.triu(1).any()) for each in kinds.values()):
            return None
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        allowed = {kind: causal if each is None else each for kind, each in kinds.items()}
        whole = allowed.get("full_attention", next(iter(allowed.values())))
        steps = torch.arange(length)
        back = steps[:, None] - steps
        for kind, each in allowed.items():
            if not torch.equal(each, whole & (back <= back[each].max())):
                raise ModelError(
                    f"{name} lets tokens attend to later ones in layers of kind {kind!r} in another way than spans, which hold in all "
                    "layers, but inside a layer's window: run its images with 'transformers-multimodal'"
                )
        return whole
    if not isinstance(mask, torch.Tensor) or mask.ndim == 2:
        return None
    if mask.ndim != 4 or mask.shape[-2:] != (length, length):
        raise ModelError(
            f"{name} hands its decoder a mask of shape {tuple(mask.shape)} for {length} tokens, whose meaning is not known here"
        )
    each = mask[0, 0].cpu()
    seen = each if each.dtype is torch.bool else each == 0
    return None if torch.equal(seen, torch.ones_like(seen).tril()) else seen


def _deepstack(name: str, seen: Mapping[str, Any], places: torch.Tensor) -> torch.Tensor | None:
    levels = seen.get("deepstack_visual_embeds")
    if levels is None or not len(levels):
        return None
    mask = seen.get("visual_pos_masks")
    if not isinstance(mask, torch.Tensor) or not torch.equal(mask[0].reshape(len(places), -1).any(-1), places):
        raise ModelError(
            f"{name} adds features to other tokens than those it injects rows at: a Prompt cannot carry that"
        )
    return torch.stack([level.cpu() for level in levels])
