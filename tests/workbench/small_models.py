"""Small random Llama models on disk; their variants cover the options of the architecture."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import workbench

BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS = {
    "plain": {},
    "tied, one KV head, head size apart": {"tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama 3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 500000.0,
        }
    },
}


def save_llama(folder: Path, **changes) -> workbench.Model:
    """Save and load a Llama with random weights, including biases and norms."""
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**{**BASE, **changes}))
    for name, parameter in network.named_parameters():
        torch.nn.init.normal_(
            parameter, 1.0 if "norm" in name else 0.0, 0.1 if "norm" in name or "bias" in name else 0.08
        )
    network.save_pretrained(folder)
    return workbench.load_model(folder)


def random_prompt(seed: int = 0, length: int = 40) -> workbench.Prompt:
    """A random prompt with two items of injected rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (length,), generator=generator)
    items = [torch.randn(rows, 48, generator=generator) * 0.1 for rows in (5, 9)]
    return workbench.Prompt(ids, items, [(4, 9), (20, 29)])
