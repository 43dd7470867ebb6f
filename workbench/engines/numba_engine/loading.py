"""Read a decoder's tensors from a checkpoint, whatever the family calls and stacks them."""

from __future__ import annotations

import torch

from ...errors import ModelError
from ...models import Model
from .backbones import Backbone

Pair = tuple[torch.Tensor, torch.Tensor | None]


class TensorReader:
    """Tensors of one checkpoint, checked against its configuration, on a device in a dtype.

    Raises:
        ModelError: a tensor is missing, has another shape, or stands where the configuration says that there is none.
    """

    def __init__(self, model: Model, backbone: Backbone, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.backbone, self.dtype, self.device = model, backbone, dtype, device
        ending = f"{backbone.names.table}.weight"
        names = [name for name in model.weights if name.endswith(ending)]
        if len(names) != 1:
            raise ModelError(f"{model.path} has {len(names)} tensors named *{ending}: which is the language model's?")
        self.base = names[0].removesuffix(ending)

    def _get(self, name: str, *shape: int) -> torch.Tensor:
        tensor = self.model.weights.get(name)
        if tensor.shape != shape:
            raise ModelError(
                f"tensor {name} of {self.model.name!r} is {tuple(tensor.shape)}, its configuration needs {shape}"
            )
        return tensor.to(self.device, self.dtype)

    def table(self) -> torch.Tensor:
        """The token embedding table `[vocab, hidden]` as stored."""
        return self._get(f"{self.base}{self.backbone.names.table}.weight", self.backbone.vocab, self.backbone.hidden)

    def head(self, table: torch.Tensor) -> torch.Tensor:
        """The output head `[vocab, hidden]`: the table where they are tied."""
        model, ending = self.model, f"{self.backbone.names.head}.weight"
        heads = [name for name in model.weights if name == ending or name.endswith(f".{ending}")]
        tied = model.text_config.tie_word_embeddings or model.config.tie_word_embeddings
        if tied and not heads:
            return table
        head = self._get(heads[0] if heads else ending, *table.shape)
        if tied and not torch.equal(head, table):
            raise ModelError(
                f"{model.name!r} says tie_word_embeddings, but its {ending} is not its embedding table: which holds? "
                f"Set tie_word_embeddings to false, or drop {ending}"
            )
        return table if tied else head

    def norm(self, name: str) -> torch.Tensor:
        """A norm's weights `[hidden]`, what the family takes off them added again."""
        return self._norm(f"{self.base}{name}.weight", self.backbone.hidden)

    def _norm(self, name: str, width: int) -> torch.Tensor:
        if not self.backbone.norm_offset:
            return self._get(name, width)
        self._get(name, width)
        return self.model.weights.get(name).to(self.device, torch.float32) + self.backbone.norm_offset

    def head_norms(self, at: str) -> torch.Tensor | None:
        """Norms of queries and keys `[2, head_dim]`, where there are any."""
        if not self.backbone.head_norms:
            return None
        width = self.backbone.head_dim
        return torch.stack([self._norm(f"{self.base}{at}self_attn.{x}_norm.weight", width) for x in "qk"])

    def qkv(self, at: str) -> Pair:
        """Queries, keys and values stacked: `[(q_heads + 2 kv_heads) * head_dim, hidden]`."""
        b, names = self.backbone, self.backbone.names
        queries, keys = b.heads * b.head_dim, b.kv_heads * b.head_dim
        if b.qkv == "separate":
            return self._stack({at + names.q: queries, at + names.k: keys, at + names.v: keys}, b.hidden, b.qkv_bias)
        weight, bias = self._stack({at + names.qkv: queries + 2 * keys}, b.hidden, b.qkv_bias)
        if b.qkv == "fused":
            return weight, bias
        return self._ungroup(weight), None if bias is None else self._ungroup(bias)

    def _ungroup(self, rows: torch.Tensor) -> torch.Tensor:
        """InternLM2 stores each KV head's queries, key and value together: all queries first, then keys, then values."""
        b = self.backbone
        group = b.heads // b.kv_heads
        grouped = rows.view(b.kv_heads, group + 2, b.head_dim, *rows.shape[1:])
        parts = (grouped[:, :group], grouped[:, group : group + 1], grouped[:, group + 1 :])
        return torch.cat([part.reshape(-1, *rows.shape[1:]) for part in parts])

    def output(self, at: str) -> Pair:
        b = self.backbone
        return self._stack({at + b.names.output: b.hidden}, b.heads * b.head_dim, b.output_bias)

    def gate_up(self, at: str) -> Pair:
        b, names = self.backbone, self.backbone.names
        if b.fused_gate_up:
            return self._stack({at + names.gate_up: 2 * b.intermediate}, b.hidden, b.mlp_bias)
        return self._stack({at + names.gate: b.intermediate, at + names.up: b.intermediate}, b.hidden, b.mlp_bias)

    def down(self, at: str) -> Pair:
        b = self.backbone
        return self._stack({at + b.names.down: b.hidden}, b.intermediate, b.mlp_bias)

    def _stack(self, parts: dict[str, int], width: int, biased: bool) -> Pair:
        """Projections `{name: rows}`, stacked along their rows, and their biases."""
        names = {f"{self.base}{name}": rows for name, rows in parts.items()}
        weight = torch.cat([self._get(f"{name}.weight", rows, width) for name, rows in names.items()])
        extra = [name for name in names if f"{name}.bias" in self.model.weights]
        if extra and not biased:
            raise ModelError(
                f"{self.model.name!r} has {extra[0]}.bias, but its configuration says that there is none: correct one of them"
            )
        return weight, torch.cat([self._get(f"{name}.bias", rows) for name, rows in names.items()]) if biased else None
