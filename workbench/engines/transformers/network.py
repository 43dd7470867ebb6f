"""Transformers' model, run by its own forward pass: rows are injected at its embedding, and states are read by hooks.

Nothing that the class computes is computed here: masks, positions, scales, caps and inputs beside the embeddings are its own.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import ModelError, reason
from .float64 import KeepFloat64


class _DecoderDone(Exception):
    """Ends a pass before the head."""


Inject = Callable[[torch.Tensor], torch.Tensor]
_CACHES = ("past_key_values", "cache_params", "state")
"""The names under which Transformers' models return their cache, and take it in the next call."""


@dataclass(frozen=True)
class Output:
    """What a forward pass returns.

    Attributes:
        hidden: `[seq, hidden]`, what the decoder returns: the states after the final norm.
        logits: `[kept, vocab]`.
        cache: the argument that continues the sequence in the next call; empty if the class returned no cache.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    cache: Mapping[str, Any]


class Network:
    """A model of Transformers.

    Attributes:
        module: the whole model, with its head.
        dtype, device: of its states; streamed weights are on the meta device between runs.
        decoder: its language decoder.
        layers: the decoder's layers; None if they are not one list of modules.
        layers_name: the list's name in the decoder.
        mrope_axes: the number of axes of its positions, 0 if they are plain: 3 with M-RoPE, 4 in HunYuan-VL.
        norm: what seems to be the norm after the last layer (`final_norm` makes sure); None if there is none.

    Raises:
        ModelError: the model has no decoder of its own, or no embedding table.
    """

    def __init__(self, module: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.module, self.dtype, self.device = module, dtype, device
        try:
            self.embedding = module.get_input_embeddings()
        except NotImplementedError:
            self.embedding = None
        self.decoder, self.layers_name = _find_decoder(module)
        if self.decoder is None or self.embedding is None:
            raise ModelError(
                f"{type(module).__name__} has no decoder and embedding table that can be told apart from the rest of the model: "
                "it cannot be a reference"
            )
        self.layers: nn.ModuleList | None = (
            self.decoder.get_submodule(self.layers_name) if self.layers_name is not None else None
        )
        self.mrope_axes = _mrope_axes(self.decoder)
        self.norm = _norm_after(self.decoder, self.layers_name)
        self._norm_works: bool | None = None
        parameters = inspect.signature(module.forward).parameters
        self._takes = set(parameters)
        if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
            self._takes.add("use_cache")  # multimodal models pass it on to their decoder without naming it
        self._decoder_signature = inspect.signature(self.decoder.forward)

    def like(self, module: Any) -> Network:
        """The same for another copy of the model."""
        other = Network(module, self.dtype, self.device)
        other._norm_works = self._norm_works
        return other

    def takes(self, name: str) -> bool:
        """Whether the class's forward has an argument of this name."""
        return name in self._takes

    def precision(self) -> contextlib.AbstractContextManager:
        """A context manager for forward passes: in it, Transformers' casts to float32 stay in float64 if that is the dtype."""
        return KeepFloat64() if self.dtype is torch.float64 else contextlib.nullcontext()

    def forward(
        self,
        ids: torch.Tensor,
        inject: Inject | None = None,
        *,
        decoder_inputs: Mapping[str, Any] | None = None,
        keep: int | torch.Tensor | None = 0,
        cache: Mapping[str, Any] | None = None,
        hidden: torch.Tensor | None = None,
        **inputs: Any,
    ) -> Output:
        """Run the class's own forward.

        Args:
            ids: int64 `[batch, seq]`.
            inject: called with hidden state 0, `[batch, seq, hidden]`; returns what takes its place.
            decoder_inputs: arguments of the decoder, in place of what the model passes to it.
            keep: logits of the last `keep` tokens (0: of all), or of the tokens with these indices; None: the pass ends before the head.
            cache: `Output.cache` of the call before, or {} for the first of several calls; None for a single call.
            hidden: `[seq, hidden]`, given to the head in place of what the decoder returns.
            inputs: further arguments of the model.
        """
        given = {"input_ids": ids, **inputs}
        if self.takes("use_cache"):
            given["use_cache"] = cache is not None
        if keep is not None and self.takes("logits_to_keep"):
            given["logits_to_keep"] = keep
        injected = self._injected(inject, decoder_inputs or {}, hidden, stop=keep is None)
        with self._own_errors(), injected as returned, self.precision(), contextlib.suppress(_DecoderDone):
            out = self.module(**given, **(cache or {}))
        if keep is None:
            states = first(returned[-1])[0]
            return Output(states, states[:0], {})
        logits = out.logits[0]
        if not self.takes("logits_to_keep"):
            logits = logits[-keep:] if isinstance(keep, int) else logits[keep]
        kept = {
            name: out[name] for name in _CACHES if cache is not None and self.takes(name) and out.get(name) is not None
        }
        return Output(first(returned[-1])[0], logits, kept)

    def final_norm(self) -> nn.Module:
        """The norm between the last layer and what the decoder returns, as a short pass shows.

        Raises:
            ModelError: the decoder has no such norm, or computes something else between its last layer and its output.
        """
        if self._norm_works is None:
            self._norm_works = self.norm is not None and self._try_norm()
        if not self._norm_works:
            raise ModelError(
                f"what {type(self.module).__name__} does between its last layer and its head is not one norm: choose other taps, or states "
                "after the norm"
            )
        assert self.norm is not None
        return self.norm

    @torch.no_grad()
    def _try_norm(self) -> bool:
        last: list[torch.Tensor] = []
        assert self.layers is not None
        assert self.norm is not None
        hook = self.layers[-1].register_forward_hook(lambda module, args, output: last.append(first(output)))
        try:
            ids = torch.zeros((1, 2), dtype=torch.long, device=self.device)
            hidden = self.forward(ids, keep=None, **self.text_positions(ids)).hidden
        finally:
            hook.remove()
        with self.precision():
            normed = self.norm(last[-1]).reshape(hidden.shape)
        return bool((normed - hidden).abs().max() <= 64 * torch.finfo(self.dtype).eps * hidden.abs().max())

    def text_positions(self, ids: torch.Tensor) -> dict[str, Any]:
        """The positions of text `[batch, seq]` as an argument, for models with M-RoPE, which would look for images; else {}."""
        if not self.mrope_axes or not self.takes("position_ids"):
            return {}
        return {"position_ids": torch.arange(ids.shape[1], device=ids.device).expand(self.mrope_axes, *ids.shape)}

    def new_cache(self) -> dict[str, Any]:
        """The cache for the first pass of several: {} if the class must make its own.

        With its configuration, Transformers' cache drops keys outside `sliding_window`, whether the class uses that window or not.
        """
        from transformers import DynamicCache

        if not self.takes("past_key_values"):
            return {}
        try:
            own = DynamicCache(config=self.decoder.config)
        except Exception:  # a configuration that only its class can read
            return {}
        plain = all(type(layer).__name__ in ("DynamicLayer", "DynamicSlidingWindowLayer") for layer in own.layers)
        return {"past_key_values": DynamicCache()} if plain else {}

    def run(self, **inputs: Any) -> Any:
        """Call the class's own forward, without a cache, and return what it returns.

        Raises:
            ModelError: the class raises an error.
        """
        given = {"use_cache": False, **inputs} if self.takes("use_cache") else inputs
        with self._own_errors(), self.precision():
            return self.module(**given)

    @contextlib.contextmanager
    def _own_errors(self) -> Iterator[None]:
        """Name errors of the class; those of hooks, which belong to callers, pass through."""
        try:
            yield
        except ModelError:
            raise
        except Exception as error:
            innermost = error.__traceback__
            while innermost is not None and innermost.tb_next is not None:
                innermost = innermost.tb_next
            assert innermost is not None
            module = innermost.tb_frame.f_globals.get("__name__", "").partition(".")[0]
            if module not in ("torch", "transformers"):
                raise
            raise ModelError(f"the forward pass of {type(self.module).__name__} fails: {reason(error)}") from error

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The class's own way from states after the final norm, `[tokens, hidden]`, to logits `[tokens, vocab]`.

        It is the class's forward, with a decoder that returns these states.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPast

        class States(BaseModelOutputWithPast):
            """An output whose other fields, which differ between classes, are None."""

            def __getattr__(self, name: str) -> None:
                if name.startswith("__"):
                    raise AttributeError(name)

        blocks = []
        own = self.decoder.forward
        for block in hidden.split(_LENS_TOKENS):
            self.decoder.forward = lambda *args, states=block, **kwargs: States(last_hidden_state=states[None])
            try:
                ids = torch.zeros((1, len(block)), dtype=torch.long, device=self.device)
                blocks.append(self.run(input_ids=ids, **self.text_positions(ids)).logits[0])
            finally:
                self.decoder.forward = own
        return torch.cat(blocks)

    @contextlib.contextmanager
    def _injected(
        self, inject: Inject | None, decoder_inputs: Mapping[str, Any], hidden: torch.Tensor | None, stop: bool
    ) -> Iterator[list[Any]]:
        """Hooks for one pass; yields a list to which the decoder's output is appended. With `stop` the pass ends there.

        A model that looks up embeddings itself passes them to its decoder; else the decoder looks them up.
        """
        waiting, returned = [False], []

        def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            bound = self._decoder_signature.bind_partial(*args, **kwargs)
            given = dict(bound.arguments)
            for name, parameter in self._decoder_signature.parameters.items():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    given |= given.pop(name, {})
            given |= decoder_inputs
            if inject is not None:
                if given.get("inputs_embeds") is not None:
                    given["inputs_embeds"] = inject(given["inputs_embeds"])
                else:
                    waiting[0] = True
            return (), given

        def looked_up(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
            if inject is None or not waiting[0]:
                return None
            waiting[0] = False
            return inject(output)

        def leave(module: nn.Module, args: tuple, output: Any) -> Any:
            returned.append(output)
            if stop:
                raise _DecoderDone
            return None if hidden is None else with_states(output, hidden[None])

        hooks = [
            self.decoder.register_forward_pre_hook(before, with_kwargs=True),
            self.decoder.register_forward_hook(leave),
            self.embedding.register_forward_hook(looked_up),
        ]
        try:
            yield returned
        finally:
            for hook in hooks:
                hook.remove()
        if waiting[0]:
            raise ModelError(
                f"{type(self.module).__name__} does not look up its token embeddings in a way in which rows can be injected"
            )


_LENS_TOKENS = 1024
"""Tokens per call of the head: models build masks of tokens x tokens even for states that they do not compute."""


def first(output: Any) -> torch.Tensor:
    """The states of a module's output, which is a tensor, a tuple or a `ModelOutput`."""
    if isinstance(output, torch.Tensor):
        return output
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


def with_states(output: Any, states: torch.Tensor) -> Any:
    """A module's output with other states in it."""
    if isinstance(output, torch.Tensor):
        return states
    if hasattr(output, "last_hidden_state"):
        changed = copy.copy(output)
        changed["last_hidden_state"] = states
        return changed
    return type(output)((states, *output[1:]))


def _find_decoder(module: Any) -> tuple[Any, str | None]:
    """The decoder, and the name of its list of layers in it (None if it has not exactly one list of that length)."""
    from transformers import PreTrainedModel

    config = module.config.get_text_config(decoder=True)
    lengths = {getattr(config, name, None) for name in ("decoder_layers", "num_decoder_layers", "num_hidden_layers")}
    candidates = [module.get_decoder(), module.base_model]
    if hasattr(module.base_model, "get_decoder"):
        candidates.append(module.base_model.get_decoder())
    candidates += [child for child in module.children() if isinstance(child, PreTrainedModel)]
    candidates = [each for each in candidates if each is not module and isinstance(each, nn.Module)]
    for candidate in candidates:
        name = _layer_list(candidate, lengths)
        if name is not None:
            return _innermost(candidate, name)
    whole = [each for each in candidates if not isinstance(each, nn.Linear)]
    return (whole[0], None) if whole else (None, None)


def _mrope_axes(decoder: nn.Module) -> int:
    """The number of position axes of a decoder, by its rotary embeddings: a configuration need not say what the class assumes."""
    sections = [getattr(each, "mrope_section", None) for each in decoder.modules()]
    sections += [(getattr(decoder.config, "rope_parameters", None) or {}).get("mrope_section")]  # type: ignore[union-attr]
    flat = [part for each in sections if each for part in (each.values() if isinstance(each, dict) else [each])]
    return max(map(len, flat), default=0)


def layers_path(module: Any) -> str:
    """The path of the decoder's list of layers in the whole model; "" if there is none."""
    decoder, name = _find_decoder(module)
    if decoder is None or name is None:
        return ""
    layers = decoder.get_submodule(name)
    return next(path for path, each in module.named_modules() if each is layers)


def _innermost(decoder: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The innermost model that has the list: what is called language model may have a head of its own (Llama 4)."""
    from transformers import PreTrainedModel

    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        inner = decoder.get_submodule(".".join(parts[:depth]))
        if isinstance(inner, PreTrainedModel):
            return inner, ".".join(parts[depth:])
    return decoder, name


def _layer_list(decoder: nn.Module, lengths: set[int | None]) -> str | None:
    lists = [(name, each) for name, each in decoder.named_modules() if isinstance(each, nn.ModuleList)]
    outer = [
        (name, each)
        for name, each in lists
        if len(each) in lengths and not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    return outer[0][0] if len(outer) == 1 else None


def _norm_after(decoder: nn.Module, layers: str | None) -> nn.Module | None:
    """The only norm that is defined beside the list of layers, after it."""
    if layers is None:
        return None
    parent = decoder.get_submodule(layers.rpartition(".")[0])
    names = [name for name, _ in parent.named_children()]
    after = names[names.index(layers.rpartition(".")[2]) + 1 :]
    norms = [
        parent.get_submodule(name) for name in after if "norm" in type(parent.get_submodule(name)).__name__.lower()
    ]
    return norms[0] if len(norms) == 1 else None
