"""Read a decoder's tensors from a checkpoint, by its family's names and layout."""

from __future__ import annotations

import torch

from ...errors import ModelError
from ...models import Model
from ...models.sizes import IN_LAYER
from .architectures import DecoderConfig, DeltaNetConfig, LatentConfig, MixtureConfig

Pair = tuple[torch.Tensor, torch.Tensor | None]
"""A weight `[outputs, inputs]` and its bias `[outputs]`, or None if it has none."""


class TensorReader:
    """Reads a decoder's tensors from a checkpoint, checks their shapes against its configuration, and converts dtype and device.

    The argument `at` of its methods is the prefix of a layer's tensor names, such as `layers.3.`.

    Raises:
        ModelError: a tensor is missing, has another shape, or exists although the configuration excludes it.
    """

    def __init__(self, model: Model, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.config, self.dtype, self.device = model, config, dtype, device
        ending = f"{config.names.table}.weight"
        # A layer that predicts further tokens may have a table of its own.
        names = [name for name in model.weights if name.endswith(ending) and not IN_LAYER.search(name)]
        if len(names) != 1:
            raise ModelError(f"{model.path} has {len(names)} tensors named *{ending}: exactly one is needed")
        self.base = names[0].removesuffix(ending)

    def _get(self, name: str, *shape: int) -> torch.Tensor:
        tensor = self.model.weights.get(name)
        if tensor.shape != shape:
            raise ModelError(
                f"tensor {name} of {self.model.name!r} has shape {tuple(tensor.shape)}, but its configuration needs {shape}"
            )
        return tensor.to(self.device, self.dtype)

    def table(self) -> torch.Tensor:
        """The token embedding table `[vocab, hidden]`, without the family's embedding scale."""
        return self._get(f"{self.base}{self.config.names.table}.weight", self.config.vocab, self.config.hidden)

    def head(self, table: torch.Tensor) -> torch.Tensor:
        """The output head `[vocab, hidden]`; if it is tied to the token embeddings, `table` itself."""
        model, ending = self.model, f"{self.config.names.head}.weight"
        heads = [name for name in model.weights if name == ending or name.endswith(f".{ending}")]
        # Published Qwen-VL configurations say it beside their text part only.
        tied = any(getattr(each, "tie_word_embeddings", False) for each in (model.text_config, model.config))
        if tied and not heads:
            return table
        head = self._get(heads[0] if heads else ending, *table.shape)
        if tied and not torch.equal(head, table):
            raise ModelError(
                f"{model.name!r} sets tie_word_embeddings, but its {ending} differs from its embedding table: "
                f"set tie_word_embeddings to false, or drop {ending}"
            )
        return table if tied else head

    def norm(self, name: str) -> torch.Tensor:
        """The weights `[hidden]` of the norm `name`, such as `layers.3.input_layernorm`, with the family's `norm_offset` added."""
        return self._norm(f"{self.base}{name}.weight", self.config.hidden)

    def optional_norm(self, at: str, name: str | None) -> torch.Tensor | None:
        """The norm `name` of a layer; None if the family has none."""
        return None if name is None else self.norm(at + name)

    def _norm(self, name: str, width: int) -> torch.Tensor:
        if not self.config.norm_offset:
            return self._get(name, width)
        self._get(name, width)
        return self.model.weights.get(name).to(self.device, torch.float32) + self.config.norm_offset

    def head_norms(self, at: str) -> torch.Tensor | None:
        """Weights of the norms of queries and of keys, `[2, head_dim]`; None if the family has none.

        With `wide_head_norms` the weights of all query heads, then of all key heads, `[(heads + kv_heads) * head_dim]`.
        """
        config = self.config
        if not config.head_norms:
            return None
        width = config.head_dim
        if config.wide_head_norms:
            widths = zip("qk", (config.heads * width, config.kv_heads * width), strict=True)
            return torch.cat([self._norm(f"{self.base}{at}self_attn.{x}_norm.weight", size) for x, size in widths])
        return torch.stack([self._norm(f"{self.base}{at}self_attn.{x}_norm.weight", width) for x in "qk"])

    def qkv(self, at: str) -> Pair:
        """The projections to queries, keys and values, stacked: `[(heads + 2 * kv_heads) * head_dim, hidden]`, and their bias."""
        b, names = self.config, self.config.names
        queries, keys = b.heads * b.head_dim, b.kv_heads * b.head_dim
        if b.qkv == "separate":
            return self._stack({at + names.q: queries, at + names.k: keys, at + names.v: keys}, b.hidden, b.qkv_bias)
        weight, bias = self._stack({at + names.qkv: queries + 2 * keys}, b.hidden, b.qkv_bias)
        if b.qkv == "fused":
            return weight, bias
        return self._ungroup(weight), None if bias is None else self._ungroup(bias)

    def _ungroup(self, rows: torch.Tensor) -> torch.Tensor:
        """Reorder InternLM2's rows, grouped by KV head (queries, key, value), to all queries, then keys, then values."""
        b = self.config
        group = b.heads // b.kv_heads
        grouped = rows.view(b.kv_heads, group + 2, b.head_dim, *rows.shape[1:])
        parts = (grouped[:, :group], grouped[:, group : group + 1], grouped[:, group + 1 :])
        return torch.cat([part.reshape(-1, *rows.shape[1:]) for part in parts])

    def gated_qkv(self, at: str) -> Pair:
        """The projections to queries, keys, values and gate, stacked: `[(2 * heads + 2 * kv_heads) * head_dim, hidden]`, and their bias.

        A head's queries and gate are next to each other in the checkpoint.
        """
        b, names = self.config, self.config.names
        queries, keys = b.heads * b.head_dim, b.kv_heads * b.head_dim
        parts = {at + names.q: 2 * queries, at + names.k: keys, at + names.v: keys}
        weight, bias = self._stack(parts, b.hidden, b.qkv_bias)

        def ungated(rows: torch.Tensor) -> torch.Tensor:
            both = rows[: 2 * queries].view(b.heads, 2, b.head_dim, *rows.shape[1:])
            each = [both[:, which].reshape(queries, *rows.shape[1:]) for which in (0, 1)]
            return torch.cat([each[0], rows[2 * queries :], each[1]])

        return ungated(weight), None if bias is None else ungated(bias)

    def latent_input(self, at: str, latent: LatentConfig) -> Pair:
        """The first product of latent attention: rows of queries or their latent, of the latent of keys and values, and of rotated keys."""
        b = self.config
        queries = b.heads * (latent.plain_dim + latent.rotated_dim)
        first = {f"{at}self_attn.q_proj": queries}
        second = {f"{at}self_attn.kv_a_proj_with_mqa": latent.kv_rank + latent.rotated_dim}
        if latent.query_rank is not None:
            return self._stack({f"{at}self_attn.q_a_proj": latent.query_rank} | second, b.hidden, b.qkv_bias)
        weight, bias = self._stack(second, b.hidden, b.qkv_bias)
        plain = self._stack(first, b.hidden, False)[0]
        return torch.cat([plain, weight]), None if bias is None else torch.cat([bias.new_zeros(queries), bias])

    def latent_norms(self, at: str, latent: LatentConfig) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The norms of the latents of queries (None if they have none) and of keys and values."""
        at = f"{self.base}{at}self_attn."
        queries = None if latent.query_rank is None else self._get(f"{at}q_a_layernorm.weight", latent.query_rank)
        return queries, self._get(f"{at}kv_a_layernorm.weight", latent.kv_rank)

    def latent_up(self, at: str, latent: LatentConfig) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The products from the latents to queries (None if they have none), and to keys and values."""
        heads, at = self.config.heads, f"{self.base}{at}self_attn."
        rows = heads * (latent.plain_dim + latent.value_dim)
        keys = self._get(f"{at}kv_b_proj.weight", rows, latent.kv_rank)
        if latent.query_rank is None:
            return None, keys
        rows = heads * (latent.plain_dim + latent.rotated_dim)
        return self._get(f"{at}q_b_proj.weight", rows, latent.query_rank), keys

    def delta_net_input(self, at: str, net: DeltaNetConfig) -> Pair:
        """The input product of linear attention: rows of the convolved channels, the output gate, beta and a, one below the other."""
        at, inner = f"{at}linear_attn.", net.heads * net.value_dim
        if not net.grouped:
            parts = {"in_proj_qkv": net.channels, "in_proj_z": inner, "in_proj_b": net.heads, "in_proj_a": net.heads}
            return self._stack({at + name: rows for name, rows in parts.items()}, self.config.hidden, False)
        whole = self._stack({f"{at}in_proj_qkvz": net.channels + inner}, self.config.hidden, False)[0]
        small = self._stack({f"{at}in_proj_ba": 2 * net.heads}, self.config.hidden, False)[0]
        per_key = net.heads // net.key_heads
        widths = [net.key_dim, net.key_dim, per_key * net.value_dim, per_key * net.value_dim]
        rows = [*whole.view(net.key_heads, sum(widths), -1).split(widths, dim=1)]
        rows += small.view(net.key_heads, 2 * per_key, -1).split([per_key, per_key], dim=1)
        return torch.cat([each.flatten(0, 1) for each in rows]), None

    def delta_net_output(self, at: str, net: DeltaNetConfig) -> Pair:
        """The output product of linear attention, `[hidden, heads * value_dim]`."""
        return self._stack({f"{at}linear_attn.out_proj": self.config.hidden}, net.heads * net.value_dim, False)

    def delta_net(self, at: str, net: DeltaNetConfig) -> tuple[torch.Tensor, ...]:
        """The tensors of `DeltaNet`, in the order of its attributes, in float32."""

        def get(name: str, *shape: int) -> torch.Tensor:
            self._get(f"{self.base}{at}linear_attn.{name}", *shape)
            return self.model.weights.get(f"{self.base}{at}linear_attn.{name}").to(self.device, torch.float32)

        convolution = get("conv1d.weight", net.channels, 1, net.kernel)[:, 0].T.contiguous()
        return convolution, -get("A_log", net.heads).exp(), get("dt_bias", net.heads), get("norm.weight", net.value_dim)

    def output(self, at: str) -> Pair:
        """The output projection of attention, `[hidden, heads * value_dim]`, and its bias."""
        b = self.config
        return self._stack({at + b.names.output: b.hidden}, b.heads * b.value_dim, b.output_bias)

    def gate_up(self, at: str) -> Pair:
        """The MLP's gate and up projections, stacked: `[2 * intermediate, hidden]`, and their bias."""
        b, names = self.config, self.config.names
        if b.fused_gate_up:
            return self._stack({at + names.gate_up: 2 * b.intermediate}, b.hidden, b.mlp_bias)
        return self._stack({at + names.gate: b.intermediate, at + names.up: b.intermediate}, b.hidden, b.mlp_bias)

    def down(self, at: str) -> Pair:
        """The MLP's down projection, `[hidden, intermediate]`, and its bias."""
        b = self.config
        return self._stack({at + b.names.down: b.hidden}, b.intermediate, b.mlp_bias)

    def _stack(self, parts: dict[str, int], width: int, biased: bool) -> Pair:
        """Projections `{name: rows}`, stacked along their rows, and their biases."""
        names = {f"{self.base}{name}": rows for name, rows in parts.items()}
        weight = torch.cat([self._get(f"{name}.weight", rows, width) for name, rows in names.items()])
        extra = [name for name in names if f"{name}.bias" in self.model.weights]
        if extra and not biased:
            raise ModelError(
                f"{self.model.name!r} has {extra[0]}.bias, but its configuration excludes it: correct one of them"
            )
        return weight, torch.cat([self._get(f"{name}.bias", rows) for name, rows in names.items()]) if biased else None

    def sinks(self, at: str) -> torch.Tensor | None:
        """The logits of attention sinks, float32 `[heads]`; None if the family has none."""
        if not self.config.sinks:
            return None
        return self._get(f"{self.base}{at}{self.config.names.sinks}", self.config.heads).float()

    def router(self, at: str, mixture: MixtureConfig) -> Pair:
        """The router `[experts, hidden]` and its bias."""
        weight, bias = self._stack({at + mixture.router: mixture.count}, self.config.hidden, mixture.router_bias)
        if not mixture.wide_router:
            return weight, bias
        exact = self.model.weights.get(f"{self.base}{at}{mixture.router}.weight").to(self.device, torch.float32)
        return exact, bias

    def choice_bias(self, at: str, mixture: MixtureConfig) -> torch.Tensor | None:
        """What is added to scores for choosing experts, float32 `[experts]`."""
        if mixture.choice_bias is None:
            return None
        bias = self.model.weights.get(f"{self.base}{at}{mixture.choice_bias}")
        if bias.numel() != mixture.count:
            raise ModelError(
                f"tensor {self.base}{at}{mixture.choice_bias} of {self.model.name!r} has shape {tuple(bias.shape)}, but its "
                f"configuration needs {mixture.count} numbers"
            )
        return bias.flatten().to(self.device, torch.float32)

    def experts(self, at: str, mixture: MixtureConfig) -> tuple[Pair, Pair]:
        """All experts' gate and up weights `[experts, 2 * intermediate, hidden]` and down weights `[experts, hidden, intermediate]`."""
        inner, hidden, count = mixture.intermediate, self.config.hidden, mixture.count
        if f"{self.base}{at}{mixture.stacked[0]}" in self.model.weights:
            return (
                self._stacked_experts(at + mixture.stacked[0], (count, 2 * inner, hidden), mixture),
                self._stacked_experts(at + mixture.stacked[1], (count, hidden, inner), mixture),
            )
        gate, up, down = mixture.parts
        prefixes = [f"{at}{mixture.experts}.{number}." for number in range(count)]
        both = [
            self._stack({prefix + gate: inner, prefix + up: inner}, hidden, mixture.expert_bias) for prefix in prefixes
        ]
        last = [self._stack({prefix + down: hidden}, inner, mixture.expert_bias) for prefix in prefixes]
        return self._joined(both), self._joined(last)

    def _stacked_experts(self, name: str, shape: tuple[int, int, int], mixture: MixtureConfig) -> Pair:
        count, outputs, inputs = shape
        transposed = mixture.stored == "transposed" or (
            mixture.stored == "either" and self.model.weights.get(self.base + name).shape != shape
        )
        weight = self._get(self.base + name, *((count, inputs, outputs) if transposed else shape))
        bias = self._get(f"{self.base}{name}_bias", count, outputs) if mixture.expert_bias else None
        return weight.transpose(1, 2).contiguous() if transposed else weight, bias

    @staticmethod
    def _joined(pairs: list[Pair]) -> Pair:
        biases = [bias for _, bias in pairs if bias is not None]
        return torch.stack([weight for weight, _ in pairs]), torch.stack(biases) if biases else None

    def shared_expert(self, at: str, mixture: MixtureConfig) -> tuple[Pair, Pair]:
        """The shared expert's gate and up projections, stacked, and its down projection, as `gate_up` and `down`."""
        names = [f"{at}{mixture.shared}.{part}_proj" for part in ("gate", "up", "down")]
        inner, hidden, biased = mixture.shared_intermediate, self.config.hidden, mixture.shared_bias
        both = self._stack({names[0]: inner, names[1]: inner}, hidden, biased)
        return both, self._stack({names[2]: hidden}, inner, biased)

    def shared_gate(self, at: str, mixture: MixtureConfig) -> torch.Tensor | None:
        """The shared expert's gate, `[1, hidden]`; None if it has none."""
        if mixture.shared_gate is None:
            return None
        return self._get(f"{self.base}{at}{mixture.shared_gate}.weight", 1, self.config.hidden)
