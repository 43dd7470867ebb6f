"""A decoder of the Llama family, written anew rather than taken from Transformers: an independent witness.

    hidden = splice(ids, table, items, ranges)
    for each layer:  hidden += attention(norm(hidden));  hidden += mlp(norm(hidden))
    logits = head(norm(hidden))

Matrix products are torch's; splice and attention are `range_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from range_kernels import attention

from ...errors import ModelError
from ...models import Model
from .kv_cache import KVCache, PackedCache
from .rope import inverse_frequencies, rotate, rotation

Tap = Callable[[str, torch.Tensor], None]


@dataclass
class Layer:
    """Weights of one layer; query, key and value projections are stacked, and so are gate and up."""

    attention_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(q_heads + 2 kv_heads) * head_dim, hidden]
    qkv_bias: torch.Tensor | None
    output: torch.Tensor  # [hidden, q_heads * head_dim]
    output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor  # [hidden, intermediate]
    down_bias: torch.Tensor | None


class Decoder:
    """The weights of a model on one device in one dtype, and the forward pass over them."""

    def __init__(self, model: Model, dtype: torch.dtype, device: torch.device) -> None:
        config = model.text_config
        _refuse_unknown(model)
        self.dtype, self.device = dtype, device
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.epsilon = config.rms_norm_eps
        self.frequencies = inverse_frequencies(config)

        hidden, intermediate, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim

        def get(name: str, *shape: int) -> torch.Tensor:
            tensor = model.weights.get(name)
            if tensor.shape != shape:
                raise ModelError(
                    f"tensor {name} of {model.name!r} is {tuple(tensor.shape)}, its configuration needs {shape}"
                )
            return tensor.to(device, dtype)

        def weight(parts: dict[str, int], width: int) -> torch.Tensor:
            """The weights of projections `{name: rows}`, stacked along their rows."""
            return torch.cat([get(f"{name}.weight", rows, width) for name, rows in parts.items()])

        def bias(parts: dict[str, int], wanted: bool) -> torch.Tensor | None:
            extra = [name for name in parts if f"{name}.bias" in model.weights]
            if extra and not wanted:
                raise ModelError(
                    f"{model.name!r} has {extra[0]}.bias, but its configuration says that there is none: correct one of them"
                )
            return torch.cat([get(f"{name}.bias", rows) for name, rows in parts.items()]) if wanted else None

        base, head = _prefixes(model)
        self.table = get(f"{base}embed_tokens.weight", vocab, hidden)
        self.norm = get(f"{base}norm.weight", hidden)
        self.head = self.table
        tied = config.tie_word_embeddings or model.config.tie_word_embeddings
        if not tied or head in model.weights:
            self.head = get(head, vocab, hidden)
            if tied and not torch.equal(self.head, self.table):
                raise ModelError(
                    f"{model.name!r} says tie_word_embeddings, but its lm_head.weight is not its embedding table: which holds? "
                    "Set tie_word_embeddings to false, or drop lm_head.weight"
                )
        self.layers = []
        for number in range(config.num_hidden_layers):
            at = f"{base}layers.{number}"
            qkv = {f"{at}.self_attn.{part}_proj": rows for part, rows in (("q", queries), ("k", keys), ("v", keys))}
            output = {f"{at}.self_attn.o_proj": hidden}
            gate_up = {f"{at}.mlp.{part}_proj": intermediate for part in ("gate", "up")}
            down = {f"{at}.mlp.down_proj": hidden}
            self.layers.append(
                Layer(
                    get(f"{at}.input_layernorm.weight", hidden),
                    weight(qkv, hidden),
                    bias(qkv, config.attention_bias),
                    weight(output, queries),
                    bias(output, config.attention_bias),
                    get(f"{at}.post_attention_layernorm.weight", hidden),
                    weight(gate_up, hidden),
                    bias(gate_up, config.mlp_bias),
                    weight(down, intermediate),
                    bias(down, config.mlp_bias),
                )
            )

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for one request of up to `capacity` tokens."""
        return KVCache(len(self.layers), capacity, self.kv_heads, self.head_dim, self.dtype, self.device)

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        low: torch.Tensor,
        reach: torch.Tensor,
        cache: KVCache | PackedCache,
        tap: Tap | None = None,
    ) -> torch.Tensor:
        """Run new tokens through every layer.

        Args:
            hidden: `[tokens, hidden]`, hidden state 0 of the new tokens; left as it is.
            positions: `[tokens]`, rotary positions.
            low, reach: int32 `[tokens]`, first and last key position each token sees.
            cache: holds the tokens before; the new ones are added.
            tap: called as `tap(name, state)` at every tap; it must copy what it keeps.

        Returns:
            `[tokens, hidden]` after the final norm.
        """
        cosine, sine = rotation(self.frequencies, positions, self.device)
        cu_queries, cu_keys = cache.bounds(len(hidden))
        if tap:
            tap("embed", hidden)
        for number, layer in enumerate(self.layers):
            x = F.linear(self._normalise(hidden, layer.attention_norm), layer.qkv, layer.qkv_bias)
            x = x.view(len(hidden), self.heads + 2 * self.kv_heads, self.head_dim)
            turned = rotate(x[:, : self.heads + self.kv_heads], cosine, sine)
            keys, values = cache.extend(number, turned[:, self.heads :], x[:, self.heads + self.kv_heads :])
            seen = attention(turned[:, : self.heads], keys, values, cu_queries, cu_keys, low=low, reach=reach)
            added = F.linear(seen.reshape(len(hidden), -1), layer.output, layer.output_bias)
            hidden = hidden + added
            if tap:
                tap(f"layers.{number}.attention", added)
            gate, up = F.linear(self._normalise(hidden, layer.mlp_norm), layer.gate_up, layer.gate_up_bias).chunk(
                2, dim=-1
            )
            added = F.linear(F.silu(gate) * up, layer.down, layer.down_bias)
            hidden = hidden + added
            if tap:
                tap(f"layers.{number}.mlp", added)
                tap(f"layers.{number}", hidden)
        cache.advance(len(hidden))
        hidden = self._normalise(hidden, self.norm)
        if tap:
            tap("norm", hidden)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden]` after the final norm -> `[tokens, vocab]`."""
        return F.linear(hidden, self.head)

    def _normalise(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), the mean of squares in float32."""
        return F.rms_norm(x, weight.shape, weight, self.epsilon)


def _prefixes(model: Model) -> tuple[str, str]:
    """What stands before the decoder's tensor names, and the output head's name: `model.`, or longer in a VLM's checkpoint."""
    ending = "embed_tokens.weight"
    names = [name for name in model.weights if name.endswith(ending)]
    if len(names) != 1:
        raise ModelError(f"{model.path} has {len(names)} tensors named *{ending}: which is the language model's?")
    base = names[0].removesuffix(ending)
    heads = [name for name in model.weights if name.endswith("lm_head.weight")]
    return base, heads[0] if heads else "lm_head.weight"


_REQUIRED = {"hidden_act": "silu", "pretraining_tp": 1}


def _refuse_unknown(model: Model) -> None:
    """An architecture or a flag that this decoder does not compute is refused by name, never approximated."""
    config = model.text_config
    if config.model_type != "llama":
        raise ModelError(
            f"the numba engine runs Llama models; {model.name!r} is {config.model_type!r}: use 'transformers'"
        )
    for name, needed in _REQUIRED.items():
        value = getattr(config, name, needed)
        if value != needed:
            raise ModelError(f"the numba engine needs {name}={needed!r}; {model.name!r} has {name}={value!r}")
    if getattr(config, "quantization_config", None):
        raise ModelError(f"the numba engine reads plain weights; {model.name!r} is quantized: dequantize it first")
