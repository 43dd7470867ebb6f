"""What the reference can tell of a model: found by running a few tokens through one layer of each kind, never assumed."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import reason
from .layer_parts import LayerParts, find_parts, layer_kind
from .masks import span_mask, takes_masks
from .network import Network, first


@dataclass(frozen=True)
class Structure:
    """The findings about a model.

    Attributes:
        states: whether the layers' states are `[seq, hidden]`: not with hyper-connections, which keep several streams.
        parts: for each layer its two addends; None where they were not found.
        needs_mask: whether the model's own mask is not causal unless it gets images, as PaliGemma's; it is passed a mask then.
        injection_fault: why rows cannot be injected; None if they can.
        reads_ids: whether the decoder looks ids up in other tables than that of the embeddings, as Gemma 4's for each layer.
        fault: why the model cannot be a reference; None if it can.
    """

    states: bool
    parts: tuple[LayerParts | None, ...]
    needs_mask: bool
    injection_fault: str | None
    reads_ids: bool
    fault: str | None


_TOKENS = 6


class _Enough(Exception):
    """Ends a pass early: the layers after this one are of kinds that were seen."""


@torch.no_grad()
def examine(network: Network) -> Structure:
    """Run two short sequences that differ in their last token, up to the last layer of a new kind.

    In a causal model no state before the last token differs. The first layer of each kind is also run on random states
    (`find_parts`).
    """
    found = _examine(network, None)
    if found.fault is None:
        found = replace(found, injection_fault=_injection_fault(network))
    if not found.leaks:
        return found.structure(False)
    multimodal = any(
        getattr(network.module.config, part, None) is not None for part in ("vision_config", "audio_config")
    )
    if multimodal and takes_masks(network.decoder):
        mask = span_mask(network.decoder.config, _TOKENS, (), network.dtype, network.device)
        masked = _examine(network, mask)
        if not masked.leaks and masked.fault is None:
            return replace(masked, injection_fault=found.injection_fault).structure(True)
    return replace(
        found, fault="tokens attend to later tokens, so it is not a causal language model as configured"
    ).structure(False)


@dataclass(frozen=True)
class _Findings:
    states: bool
    parts: tuple[LayerParts | None, ...]
    leaks: bool
    fault: str | None
    reads_ids: bool
    injection_fault: str | None = None

    def structure(self, needs_mask: bool) -> Structure:
        return Structure(self.states, self.parts, needs_mask, self.injection_fault, self.reads_ids, self.fault)


def _examine(network: Network, mask: Any) -> _Findings:
    layers = list(network.layers or ())
    kinds = [layer_kind(layer) for layer in layers]
    earliest = {kind: number for number, kind in reversed(list(enumerate(kinds)))}
    last = max(earliest.values(), default=-1)
    config = network.module.config.get_text_config(decoder=True)
    found: dict[tuple, LayerParts | None] = {}
    seen: list[torch.Tensor] = []
    shapes: set[int] = set()
    called: set[str] = set()
    reads: list[str] = []

    def before(number: int) -> Any:
        def look(module: Any, args: tuple, kwargs: dict) -> None:
            found[kinds[number]] = find_parts(module, args, kwargs, config)

        return look

    def after(number: int) -> Any:
        def look(module: Any, args: tuple, output: Any) -> None:
            state = first(output)
            shapes.add(state.ndim)
            called.add(type(module).__name__)
            seen.append(state)
            if number == last:
                raise _Enough

        return look

    def by_id(module: Any, args: tuple) -> None:
        keys = args[0] if args else None  # of positions and token types they are those of both sequences
        if isinstance(keys, torch.Tensor) and len(keys) == 2 and not torch.equal(keys[0], keys[1]):
            reads.append(type(module).__name__)

    hooks = [layers[number].register_forward_pre_hook(before(number), with_kwargs=True) for number in earliest.values()]
    hooks += [layer.register_forward_hook(after(number)) for number, layer in enumerate(layers)]
    for table in network.decoder.modules():
        if isinstance(table, torch.nn.Embedding) and table is not network.embedding:
            hooks.append(table.register_forward_pre_hook(by_id))
    if not layers:
        hooks.append(network.decoder.register_forward_hook(lambda module, args, output: seen.append(first(output))))
    fault = None
    try:
        given = {} if mask is None else {"attention_mask": mask}
        ids = _two_sequences(network, config)
        network.forward(ids, decoder_inputs=given, keep=1, **network.text_positions(ids))
        if layers:
            unused = sorted({type(layer).__name__ for layer in layers} - called)
            fault = f"layers of kind {', '.join(unused) or type(layers[last]).__name__} do not run on tokens and embeddings alone"
    except _Enough:
        pass
    except Exception as error:  # classes raise errors of many types if they need more than token ids
        fault = f"its forward pass fails on plain tokens: {reason(error.__cause__ or error)}"
    finally:
        for hook in hooks:
            hook.remove()
    plain = bool(layers) and shapes == {3}
    parts = tuple(found.get(kind) if plain else None for kind in kinds)
    if fault is None and any(bool(state.isnan().any()) for state in seen):
        fault = "its states are NaN on plain tokens"
    return _Findings(plain, parts, fault is None and any(_leaks(state) for state in seen), fault, bool(reads))


def _injection_fault(network: Network) -> str | None:
    """Whether the class treats embeddings that it gets as it treats those that it looks up: their states before the first layer agree.

    Falcon-H1 scales only what it looks up, so engines differ in what they do to injected rows.
    """
    width = getattr(network.module.config.get_text_config(decoder=True), "hidden_size", None)
    if network.embedding.weight.shape[-1] != width:
        return f"its token embeddings have {network.embedding.weight.shape[-1]} columns, its hidden states {width}"
    if not network.layers or not network.takes("inputs_embeds"):
        return None
    entered: list[torch.Tensor] = []

    def enter(module: Any, args: tuple, kwargs: dict) -> None:
        entered.append(first(args[0] if args else kwargs["hidden_states"]))
        raise _Enough

    ids = _two_sequences(network, network.module.config.get_text_config(decoder=True))
    hook = network.layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        for given in ({"input_ids": ids}, {"inputs_embeds": network.embedding(ids)}):
            with contextlib.suppress(_Enough):
                network.run(**given, **network.text_positions(ids))
    except Exception:  # a class that needs ids: its rows are replaced where it looks them up
        return None
    finally:
        hook.remove()
    looked_up, given_rows = (state.double() for state in entered)
    if (looked_up - given_rows).abs().max() <= 64 * torch.finfo(network.dtype).eps * looked_up.abs().max():
        return None
    return "it treats embeddings that it looks up otherwise than those that it is given"


def plain_tokens(config: Any, count: int) -> list[int]:
    """Ids, from the middle of the vocabulary on, that a model's configuration does not name: no special tokens or placeholders."""
    text = config.get_text_config(decoder=True)
    named: set[int] = set()
    for part in (config.to_dict(), text.to_dict()):
        for name, value in part.items():
            if name.endswith(("token_id", "token_index", "token_ids")) and value is not None:
                named |= set(value) if isinstance(value, list | tuple) else {value}
    middle = text.vocab_size // 2
    plain = (token for token in itertools.chain(range(middle, text.vocab_size), range(middle)) if token not in named)
    return [next(plain, number % text.vocab_size) for number in range(count)]  # a tiny vocabulary may be all special


def _two_sequences(network: Network, config: Any) -> torch.Tensor:
    """Ids of two sequences `[2, _TOKENS]` of plain tokens that differ in the last one."""
    plain = plain_tokens(network.module.config, _TOKENS + 1)
    return torch.tensor([plain[:-1], [*plain[:-2], plain[-1]]], device=network.device)


def _leaks(state: torch.Tensor) -> bool:
    """Whether the states of a batch of two differ before the last token by more than rounding; streams may stand before the batch."""
    batch = next((axis for axis in range(state.ndim - 1) if state.shape[axis : axis + 2] == (2, _TOKENS)), None)
    if batch is None:
        return True  # a layout in which nothing can be told
    one, two = state.movedim((batch, batch + 1), (0, 1))[:, :-1].double()
    return bool((one - two).abs().max() > 64 * torch.finfo(state.dtype).eps * one.abs().max())
