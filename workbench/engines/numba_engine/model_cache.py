"""What a model keeps of the tokens it has run: keys and values in pages, and for linear attention a state of each running request."""

from __future__ import annotations

import torch
from range_kernels import KVPages

from .architectures import DecoderConfig


class ModelCache(KVPages):
    """The KV cache of a model's attention layers, and slots for the states of its linear attention.

    Args:
        pages: number of pages; page_size: tokens per page.
        sequences: number of slots; each running request has one of its own.

    Attributes:
        convolution: float32 `[layers, slots, K - 1, channels]` of the layers with linear attention: the last inputs of the convolution.
        recurrent: float32 `[layers, slots, heads, key_dim, value_dim]`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        pages: int,
        page_size: int,
        sequences: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(config.attention_layers, pages, page_size, config.kv_heads, config.head_dim, dtype, device)
        net = config.delta_net
        self.convolution = self.recurrent = torch.empty(0)
        if net is not None:
            layers = sum(net.layers)
            self.convolution = torch.zeros(layers, sequences, net.kernel - 1, net.channels, device=device)
            self.recurrent = torch.zeros(layers, sequences, net.heads, net.key_dim, net.value_dim, device=device)
