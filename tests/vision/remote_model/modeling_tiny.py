"""A model that brings its own code."""

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from tests.vision.remote_model.configuration_tiny import TinyConfig


class TinyVlm(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        patch = config.vision_config.patch_size
        self.patch = patch
        self.vision = nn.Linear(3 * patch * patch, config.vision_config.hidden_size)
        self.bridge = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size, bias=False)
        self.language_model = LlamaForCausalLM(config.text_config)
        self.post_init()

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        size = self.patch
        patches = pixel_values.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5)
        return self.bridge(self.vision(patches.flatten(3).flatten(1, 2)))
