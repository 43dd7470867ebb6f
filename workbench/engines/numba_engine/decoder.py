"""A decoder written anew rather than taken from Transformers: an independent witness, for every family in `backbones.py`.

    hidden = splice(ids, table, items, ranges)
    for each layer:  hidden += attention(norm(hidden));  hidden += mlp(norm(hidden))
    logits = head(norm(hidden))

It runs a `Batch`: tokens of any number of sequences, packed end to end, whose keys and values lie in pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from range_kernels import KVPages, PagedPlan, StandingPlan, paged_attention

from ...models import Model
from .backbones import read_backbone
from .batch import Batch
from .loading import TensorReader
from .operations import Linear, operations
from .rope import Rope, choose_axes

if TYPE_CHECKING:
    from .captured import CapturedSteps

Tap = Callable[[str, torch.Tensor], None]


@dataclass
class Layer:
    """Weights of one layer; query, key and value projections are stacked, and so are gate and up."""

    attention_norm: torch.Tensor  # [hidden]
    qkv: Linear  # hidden -> (q_heads + 2 kv_heads) * head_dim
    head_norms: torch.Tensor | None  # [2, head_dim], of queries and keys
    output: Linear  # q_heads * head_dim -> hidden
    after_attention: torch.Tensor | None  # [hidden]
    mlp_norm: torch.Tensor
    gate_up: Linear  # hidden -> 2 * intermediate
    down: Linear  # intermediate -> hidden
    after_mlp: torch.Tensor | None


@dataclass
class Inputs:
    """What the layers compute from, on the decoder's device; rotations by kind of rope, first keys by window."""

    hidden: torch.Tensor  # [tokens, hidden], hidden state 0
    rotations: dict[Rope, tuple[torch.Tensor, torch.Tensor]]  # cosines and sines, float32 [tokens, pairs]
    lows: dict[int | None, torch.Tensor]  # int32 [tokens]
    reach: torch.Tensor  # int32 [tokens]
    plan: PagedPlan | StandingPlan
    deepstack: list[tuple[slice, torch.Tensor]]


class Decoder:
    """The weights of a model on one device in one dtype, and the forward pass over them.

    Attributes:
        table: `[vocab, hidden]`, looked-up rows as they stand in hidden state 0: the embedding scale is in them.
        context: tokens that a sequence may have.
        captured: decode steps that run as CUDA graphs, where an engine wants them.
    """

    def __init__(self, model: Model, dtype: torch.dtype, device: torch.device) -> None:
        self.backbone = backbone = read_backbone(model.text_config, model.name)
        self.dtype, self.device = dtype, device
        self.context = model.context
        self.run = operations(dtype, device)
        read = TensorReader(model, backbone, dtype, device)
        table = read.table()
        self.head = self.run.linear(read.head(table))
        scale = torch.tensor(backbone.embedding_scale).to(dtype)
        self.table = table if backbone.embedding_scale == 1.0 else table * scale.to(device)
        self.norm = read.norm("norm")
        self.layers = [self._layer(read, number) for number in range(backbone.layers)]
        self.captured: CapturedSteps | None = None

    def _layer(self, read: TensorReader, number: int) -> Layer:
        names, at, linear = self.backbone.names, f"layers.{number}.", self.run.linear
        norms: dict[str, Any] = {
            part: read.norm(at + name) if (name := getattr(names, part)) else None
            for part in ("attention_norm", "after_attention", "mlp_norm", "after_mlp")
        }
        return Layer(
            qkv=linear(*read.qkv(at)),
            head_norms=read.head_norms(at),
            output=linear(*read.output(at)),
            gate_up=linear(*read.gate_up(at)),
            down=linear(*read.down(at)),
            **norms,
        )

    def new_pages(self, pages: int, page_size: int) -> KVPages:
        """Empty pages for this model's keys and values."""
        backbone = self.backbone
        return KVPages(backbone.layers, pages, page_size, backbone.kv_heads, backbone.head_dim, self.dtype, self.device)

    @torch.no_grad()
    def forward(self, batch: Batch, pages: KVPages, tap: Tap | None = None) -> torch.Tensor:
        """Run new tokens through all layers; their keys and values go into `pages`.

        Args:
            tap: called as `tap(name, state)` at every tap; it must copy what it keeps.

        Returns:
            `[tokens, hidden]` after the final norm; good until the next call.
        """
        inputs = Inputs(
            hidden=batch.hidden,
            rotations={rope: self._rotation(rope, batch) for rope in set(self.backbone.ropes) if rope is not None},
            lows={window: batch.low(window) for window in set(self.backbone.windows)},
            reach=batch.reach,
            plan=PagedPlan(batch.block_table, batch.cu_queries, batch.lengths, pages, self.backbone.heads),
            deepstack=batch.deepstack,
        )
        captured = self.captured
        if tap is None and captured is not None and captured.fits(inputs, pages):
            return captured.run(self, inputs)
        return self.run_layers(inputs, pages, tap)

    @torch.no_grad()
    def run_layers(self, inputs: Inputs, pages: KVPages, tap: Tap | None = None) -> torch.Tensor:
        """What `forward` does once its inputs are laid out; a decode step on tensor cores does not ask the host again."""
        hidden = inputs.hidden
        if tap:
            tap("embed", hidden)
        for number, layer in enumerate(self.layers):
            added = self._attention(number, layer, hidden, inputs, pages)
            hidden = hidden + added
            if tap:
                tap(f"layers.{number}.attention", added)
            both = layer.gate_up.of_norm(hidden, layer.mlp_norm, self.backbone.epsilon)
            added = layer.down.of_gate(both, self.backbone.gelu)
            if layer.after_mlp is not None:
                added = self._normalise(added, layer.after_mlp)
            hidden = hidden + added
            if tap:
                tap(f"layers.{number}.mlp", added)
                tap(f"layers.{number}", hidden)
            for rows, levels in inputs.deepstack:
                if number < len(levels):
                    hidden = hidden.clone()  # what the tap saw stays
                    hidden[rows] += levels[number]
        hidden = self.normalise(hidden)
        if tap:
            tap("norm", hidden)
        return hidden

    def parts(self) -> list[object]:
        """All that `run_layers` computes with beside its inputs: settings, operations and weights."""
        parts: list[object] = [self.backbone, self.norm]
        for layer in self.layers:
            parts += [layer.attention_norm, layer.head_norms, layer.after_attention, layer.mlp_norm, layer.after_mlp]
            for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
                parts += [linear, linear.weight, linear.bias]
        return parts

    def _attention(
        self, number: int, layer: Layer, hidden: torch.Tensor, inputs: Inputs, pages: KVPages
    ) -> torch.Tensor:
        backbone, run = self.backbone, self.run
        turned = backbone.heads + backbone.kv_heads
        x = layer.qkv.of_norm(hidden, layer.attention_norm, backbone.epsilon)
        x = x.view(hidden.shape[0], turned + backbone.kv_heads, backbone.head_dim)
        heads, values = x[:, :turned], x[:, turned:]
        if layer.head_norms is not None:
            parts = heads.split([backbone.heads, backbone.kv_heads], dim=1)
            normed = [self._normalise(part, weight) for part, weight in zip(parts, layer.head_norms, strict=True)]
            heads = torch.cat(normed, dim=1)
        rope = backbone.ropes[number]
        if rope is not None:
            heads = run.rotate(heads, *inputs.rotations[rope], rope.interleaved)
        seen = paged_attention(
            heads[:, : backbone.heads], pages, number, inputs.plan, new=(heads[:, backbone.heads :], values),
            low=inputs.lows[backbone.windows[number]], reach=inputs.reach, softcap=backbone.softcap, scale=backbone.scale,
        )  # fmt: skip
        added = layer.output(seen.flatten(1))
        return added if layer.after_attention is None else self._normalise(added, layer.after_attention)

    @torch.no_grad()
    def normalise(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm, `[tokens, hidden]`."""
        return self._normalise(hidden, self.norm)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden]` after the final norm -> `[tokens, vocab]`."""
        logits = self.head(hidden)
        cap = self.backbone.final_softcap
        if not cap:
            return logits
        # Row by row: how torch's tanh rounds an element may depend on where it stands.
        return torch.stack([torch.tanh(row / cap) * cap for row in logits]) if len(logits) else logits

    def _rotation(self, rope: Rope, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the batch's tokens, `[tokens, pairs]`."""
        cosine, sine = rope.rotation(batch.positions, batch.rope_lengths)
        if batch.positions.ndim == 2:
            sections, turns = self.backbone.mrope, self.backbone.interleaved_mrope
            cosine, sine = choose_axes(cosine, sections, turns), choose_axes(sine, sections, turns)
        return cosine.to(self.device), sine.to(self.device)

    def _normalise(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.run.norm(x, weight, self.backbone.epsilon)
