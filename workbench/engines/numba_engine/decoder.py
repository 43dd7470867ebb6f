"""A decoder written independently of Transformers, so that the two can be compared; for every family in `architectures.py`.

    hidden = splice(ids, table, items, ranges)
    for each layer:  hidden += attention(norm(hidden));  hidden += mlp(norm(hidden))
    logits = head(norm(hidden))

It runs a `Batch`: tokens of any number of requests, packed end to end, whose keys and values are in pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from range_kernels import CUDAGraphPlan, PagedPlan, paged_attention
from range_kernels.ops import LayerSettings, decoder_layers, sigmoid

from ...errors import ModelError
from ...models import Model
from ...models.quantization import quantization_settings
from .batch import DecoderInputs
from .delta_net import DeltaNet
from .families import read_decoder_config
from .latent_attention import LatentAttention
from .mixture import Mixture
from .model_cache import ModelCache
from .ops import Centred, KVCache, Layer, Rotation, Sum, Unnormed, layer_norm, operations
from .weights import Pair, TensorReader

Tap = Callable[[str, torch.Tensor], torch.Tensor | None]
"""Called as `tap(name, state)` with each named hidden state, `[tokens, width]`; names as in `trace.taps`. It may return the state to go
on with, except after the final norm."""


class Heads(NamedTuple):
    """What a layer's input product yields, `[tokens, heads, head_dim]` each.

    Attributes:
        gate: `[tokens, heads * head_dim]`, whose sigmoid multiplies what attention returns; None for most models.
        written: whether keys and values were written to the cache.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    gate: torch.Tensor | None
    written: bool


class Decoder:
    """The weights of a model on one device in one dtype, and the forward pass over them.

    Attributes:
        table: `[vocab, hidden]`, token embeddings with the embedding scale already applied, as in hidden state 0 (before `input_scale`).
        context: maximum number of tokens of a request.
        deterministic: whether no bit of a request may depend on the others, on a GPU too.
        whole_layers: whether the layers are one native call where the device has it and nobody taps them; in float32 the bits are the same.

    Raises:
        ModelError: an architecture or setting that this engine does not support, or tensors that do not fit the configuration.
    """

    def __init__(self, model: Model, dtype: torch.dtype, device: torch.device, deterministic: bool = False) -> None:
        quantized = quantization_settings(model.config)
        if quantized is not None:
            raise ModelError(
                f"the numba engine reads plain weights; {model.name!r} is quantized ({quantized['quant_method']}): dequantize it first"
            )
        self.config = config = read_decoder_config(model)
        lacking = "attention sinks" if config.sinks else "latent attention" if config.latent else ""
        if lacking and device.type != "cpu":
            raise ModelError(
                f"{model.name!r} has {lacking}, which this engine runs on the CPU only: use device='cpu', or 'transformers' on the GPU"
            )
        self.dtype, self.device = dtype, device
        self.whole_layers = config.plain
        self.context = model.context
        widths = [config.hidden, config.intermediate, config.head_dim]
        if config.mixture is not None:
            widths += [config.mixture.intermediate, config.mixture.shared_intermediate]
        self.deterministic = deterministic
        self.ops = operations(dtype, device, widths, deterministic)
        if deterministic and device.type != "cpu":
            reasons = {
                "its router computes in float32": config.mixture is not None and config.mixture.wide_router,
                "linear attention was not measured": config.delta_net is not None,
                "sliding windows were not measured": any(window is not None for window in config.windows),
            }
            for reason in (each for each, applies in reasons.items() if applies):
                raise ModelError(
                    f"deterministic=True is not available on a GPU for {model.name!r}: {reason}; leave deterministic out"
                )
        read = TensorReader(model, config, dtype, device)
        table = read.table()
        self.head = self.ops.linear(read.head(table))
        scale = torch.tensor(config.embedding_scale).to(dtype)
        self.table = table if config.embedding_scale == 1.0 else table * scale.to(device)
        self.norm = read.norm("norm")
        self.layers = []
        for number in range(config.layers):
            self.layers.append(self._layer(read, number))
            model.weights.release()  # tensors are packed or copied, so the file need not stay in memory

    def _layer(self, read: TensorReader, number: int) -> Layer:
        config, at, linear = self.config, f"layers.{number}.", self.ops.linear
        names, mixture = config.names, config.mixture
        sparse = mixture is not None and mixture.layers[number]
        net = config.delta_net if config.is_linear(number) else None
        if net is not None:
            delta_net = DeltaNet(read, at, net, config.cache_layer(number), config.epsilon)
            qkv, output = read.delta_net_input(at, net), read.delta_net_output(at, net)
        else:
            qkv = read.gated_qkv(at) if config.gated_attention else self._first_product(read, at)
            delta_net, output = None, read.output(at)
        return Layer(
            attention_norm=read.optional_norm(at, names.attention_norm),
            qkv=linear(*qkv),
            head_norms=None if net is not None else read.head_norms(at),
            output=linear(*output),
            after_attention=read.optional_norm(at, names.after_attention),
            mlp_norm=read.optional_norm(at, names.mlp_norm),
            gate_up=None if sparse else linear(*read.gate_up(at)),
            down=None if sparse else linear(*read.down(at)),
            after_mlp=read.optional_norm(at, names.after_mlp),
            mixture=Mixture(read, at, config, mixture, self.ops) if sparse and mixture is not None else None,
            delta_net=delta_net,
            latent=None if config.latent is None else LatentAttention(read, at, config.heads, config.latent, self.ops),
            sinks=read.sinks(at),
        )

    def _first_product(self, read: TensorReader, at: str) -> Pair:
        return read.qkv(at) if self.config.latent is None else read.latent_input(at, self.config.latent)

    def new_pages(self, pages: int, page_size: int, sequences: int = 1) -> ModelCache:
        """Allocate a cache for this model: `pages` pages of `page_size` tokens, and for linear attention states of `sequences` requests."""
        return ModelCache(self.config, pages, page_size, sequences, self.dtype, self.device)

    @torch.no_grad()
    def run_layers(self, inputs: DecoderInputs, pages: ModelCache, tap: Tap | None = None) -> torch.Tensor:
        """Run all layers and the final norm; write keys and values into `pages`; return `[tokens, hidden]` after the final norm.

        All inputs are on the device, so a decode step on tensor cores does not synchronise with the host and can be captured as a
        CUDA graph. `tap(name, state)` is called with every named hidden state; it must copy what it keeps.
        """
        if self.config.input_scale != 1.0:
            inputs = replace(inputs, hidden=inputs.hidden * self.config.input_scale)
        whole = None
        if tap is None and not inputs.deepstack and self.whole_layers:
            whole = self.ops.whole_layers(self.layers, inputs.rotations.values(), len(inputs.hidden))
        if whole is not None:
            normed = self._run_whole_layers(whole, inputs, pages)
            if normed is not None:
                return normed
            self.whole_layers = False  # this process has fewer threads than Numba believes
        hidden = inputs.hidden
        pending: torch.Tensor | None = None  # what the layer before adds; added with the next norm, in one kernel
        if tap:
            hidden = _tapped(tap, "embed", hidden)
        for number, layer in enumerate(self.layers):
            entered = self.enter(hidden, pending, layer.attention_norm)
            added = self._scaled(self._attention(number, layer, entered, inputs, pages))
            if tap:
                added = _tapped(tap, f"layers.{number}.attention", added)
            if self.config.parallel:
                pending, hidden = layer.mlp(entered, self.config.gelu), entered.total + added
            else:
                between = self.enter(entered.total, added, layer.mlp_norm)
                pending, hidden = layer.mlp(between, self.config.gelu), between.total
            if layer.after_mlp is not None:
                pending = self._normalise(pending, layer.after_mlp)
            pending = self._scaled(pending)
            if tap:
                pending = _tapped(tap, f"layers.{number}.mlp", pending)
            if tap or inputs.deepstack:
                hidden, pending = hidden + pending, None
            if tap:
                hidden = _tapped(tap, f"layers.{number}", hidden)
            for rows, levels in inputs.deepstack:
                if number < len(levels):
                    hidden = hidden.clone()  # do not modify the tensor passed to the tap
                    hidden[rows] += levels[number]
        hidden = self.enter(hidden, pending, self.norm).normed()
        if tap:
            tap("norm", hidden)
        return hidden

    def enter(self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor | None) -> Sum:
        """Add to the residual stream, for attention or MLP to read through the norm `weight`; None: it reads the stream itself."""
        if weight is not None and not self.config.layer_norms:
            return self.ops.add(hidden, added, weight, self.config.epsilon)
        total = hidden if added is None else hidden + added
        return Unnormed(total) if weight is None else Centred(total, weight, self.config.epsilon)

    def _scaled(self, added: torch.Tensor) -> torch.Tensor:
        scale = self.config.residual_scale
        return added if scale == 1.0 else added * scale

    def _run_whole_layers(
        self, layers: Sequence[Layer], inputs: DecoderInputs, pages: ModelCache
    ) -> torch.Tensor | None:
        """`run_layers` in one native call, in float32 with the same bits; None if `decoder_layers` cannot run here."""
        config, plan = self.config, inputs.plan
        assert isinstance(plan, PagedPlan)  # a CUDAGraphPlan is on a GPU
        ropes, windows = list(inputs.rotations), list(inputs.key_starts)
        settings = LayerSettings(
            config.epsilon, config.gelu, config.softcap, config.scale,
            rotations=[(*inputs.rotations[rope], rope.interleaved) for rope in ropes],
            rope_of=[-1 if rope is None else ropes.index(rope) for rope in config.ropes],
            key_starts=[inputs.key_starts[window] for window in windows],
            window_of=[windows.index(window) for window in config.windows],
            key_stop=inputs.key_stop,
        )  # fmt: skip
        done = decoder_layers(inputs.hidden.float(), layers, settings, pages, plan)
        if done is None:
            return None
        return self.ops.add(*done, self.norm.float(), config.epsilon).normed().to(self.dtype)

    def parts(self) -> list[object]:
        """All objects that `run_layers` uses besides its inputs (settings, layers, weights), so that a replaced one can be noticed."""
        parts: list[object] = [self.config, self.norm]
        for layer in self.layers:
            parts += [*layer.linears, *layer.tensors()]
        return parts

    def _attention(
        self, number: int, layer: Layer, entered: Sum, inputs: DecoderInputs, pages: ModelCache
    ) -> torch.Tensor:
        config, at = self.config, self.config.cache_layer(number)
        if layer.delta_net is not None:
            assert inputs.sequences is not None
            return layer.output(layer.delta_net(entered.into(layer.qkv), inputs.sequences, pages))
        queries, keys, values, gate, written = self.heads(number, entered, inputs, _cache_of(at, inputs.plan, pages))
        seen = paged_attention(
            queries, pages, at, inputs.plan, new=None if written else (keys, values), key_start=inputs.key_starts[config.windows[number]],
            key_stop=inputs.key_stop, softcap=config.softcap, scale=config.scale, sinks=layer.sinks,
        )  # fmt: skip
        seen = seen[..., : config.value_dim].flatten(1)
        added = layer.output(seen if gate is None else seen * sigmoid(gate))
        return added if layer.after_attention is None else self._normalise(added, layer.after_attention)

    def heads(self, number: int, entered: Sum, inputs: DecoderInputs, cache: KVCache | None = None) -> Heads:
        """Queries, keys and values of a layer with attention, normed and rotated as attention takes them."""
        config, layer = self.config, self.layers[number]
        rotated = config.heads + config.kv_heads
        x, gate = entered.into(layer.qkv), None
        if config.gated_attention:
            x, gate = x.split([(rotated + config.kv_heads) * config.head_dim, config.heads * config.head_dim], dim=1)
        if layer.latent is not None:
            heads, values = layer.latent(x)
            cache = None  # values do not follow keys in memory
        else:
            x = x.view(len(x), rotated + config.kv_heads, config.head_dim)
            heads, values = x[:, :rotated], x[:, rotated:]
        norms, split = layer.head_norms, config.heads
        if config.wide_head_norms and norms is not None:
            widths = [config.heads * config.head_dim, config.kv_heads * config.head_dim]
            parts = zip(heads.flatten(1).split(widths, dim=1), norms.split(widths), strict=True)
            normed = [self.ops.norm(part.contiguous(), weight, config.epsilon) for part, weight in parts]
            heads, norms, cache = torch.cat(normed, dim=1).view(heads.shape), None, None
        if config.unit_heads and config.unit_heads[number]:
            cache = None  # what is cached is not what is rotated
        rope = config.ropes[number]
        rotation = None if rope is None else Rotation(*inputs.rotations[rope], rope.interleaved)
        heads, written = self.ops.position(heads, norms, split, config.epsilon, rotation, cache)
        if config.unit_heads and config.unit_heads[number]:
            heads = self.ops.norm(heads.contiguous(), heads.new_ones(config.head_dim), config.epsilon)
        if layer.latent is not None:
            heads, values = (layer.latent.padded(each, config.head_dim) for each in (heads, values))
        queries, keys = heads[:, :split], heads[:, split:]
        if inputs.query_scale is not None and config.scaled_queries[number]:
            queries = (queries * inputs.query_scale[:, None, None]).to(queries.dtype)
        return Heads(queries, keys, values, gate, written)

    @torch.no_grad()
    def normalise(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the final norm to `[tokens, hidden]`."""
        return self._normalise(hidden, self.norm)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head, its factor and the final softcap if the model has them: `[tokens, hidden]` after the final norm -> `[tokens, vocab]`."""
        logits = self.head(hidden)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        cap = self.config.final_softcap
        if not cap:
            return logits
        if self.device.type == "cuda":
            return torch.tanh(logits / cap) * cap
        # Row by row: how torch's tanh rounds an element may depend on its position in the tensor.
        return torch.stack([torch.tanh(row / cap) * cap for row in logits]) if len(logits) else logits

    def _normalise(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.config.layer_norms:
            return layer_norm(x, weight, self.config.epsilon)
        return self.ops.norm(x, weight, self.config.epsilon)


def _tapped(tap: Tap, name: str, state: torch.Tensor) -> torch.Tensor:
    """Call the tap; return the state to go on with."""
    changed = tap(name, state)
    return state if changed is None else changed


def _cache_of(number: int, plan: PagedPlan | CUDAGraphPlan, pages: ModelCache) -> KVCache | None:
    """The layer's KV cache, if keys and values must be written before attention: a decode step's kernel writes them itself."""
    slots = plan.slots_to_write
    if slots is None:
        return None
    return KVCache(pages.keys[number].flatten(0, 1), pages.values[number].flatten(0, 1), slots)
