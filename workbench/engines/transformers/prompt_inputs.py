"""What Transformers' model and decoder get for a prompt beside its embeddings: ids, positions, mask, deepstack features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...prompt import Prompt
from .masks import span_mask


@dataclass(frozen=True)
class PromptInputs:
    """The inputs of one model, dtype and device.

    Attributes:
        filler: the token that stands where rows are injected; None: the prompt's own.
        config: the decoder's configuration.
        mrope: whether positions have three axes.
        needs_mask: whether the model's own mask is not causal, so that it must be given one.
    """

    filler: int | None
    config: Any
    dtype: torch.dtype
    device: torch.device
    mrope: bool
    needs_mask: bool

    def ids(self, prompt: Prompt) -> list[int]:
        """The prompt's ids, with a plain token in place of all rows that are injected.

        Their own ids are placeholders of any value; some classes skip positions where they see the padding token.
        """
        ids = list(prompt.input_ids)
        if self.filler is None:
            return ids
        for start, stop in prompt.embedding_ranges:
            ids[start:stop] = [self.filler] * (stop - start)
        return ids

    def positions(self, prompt: Prompt, new: int = 0) -> torch.Tensor | None:
        """Positions of a prompt and of `new` tokens after it, `[1, seq]` or `[3, 1, seq]`; None: the model computes its own.

        A model with M-RoPE would compute them from images, which it does not get.
        """
        if prompt.position_ids is None and not self.mrope:
            return None
        positions = torch.arange(len(prompt)) if prompt.position_ids is None else prompt.position_ids
        after = (int(positions.max()) + 1 + torch.arange(new)).expand(*positions.shape[:-1], new)
        return torch.cat([positions, after], dim=-1).to(self.device)[..., None, :]

    def of_decoder(self, prompt: Prompt, new: int) -> dict[str, Any]:
        """Arguments of the decoder for a prompt and `new` tokens after it; what is left out the model makes itself."""
        own: dict[str, Any] = dict(self._deepstack(prompt))
        if prompt.bidirectional_ranges or self.needs_mask:
            length = len(prompt) + new
            own["attention_mask"] = span_mask(self.config, length, prompt.bidirectional_ranges, self.dtype, self.device)
        if (positions := self.positions(prompt, new)) is not None:
            own["position_ids"] = positions
        return own

    def _deepstack(self, prompt: Prompt) -> dict[str, Any]:
        """Extra arguments of Qwen3-VL's decoder: the positions of image tokens, and the features that each early layer adds there."""
        if not prompt.deepstack:
            return {}
        inside = torch.zeros((1, len(prompt)), dtype=torch.bool)
        for start, stop in prompt.embedding_ranges:
            inside[0, start:stop] = True
        levels = torch.cat(
            [levels.to(self.dtype) for levels in prompt.deepstack], dim=1
        )  # [levels, rows of all, hidden]
        return {
            "visual_pos_masks": inside.to(self.device),
            "deepstack_visual_embeds": list(levels.to(self.device)),
        }
