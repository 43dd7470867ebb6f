"""Transformers' whole multimodal model: it runs the vision tower itself and takes images, not embeddings.

LMDeploy's PyTorch engine has worked like this since 0.6.5, but silently ignores `input_embeddings` and generates from the
placeholder tokens; this engine rejects them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import EmbeddingRangeError, ModelError, PromptError
from ...models import Model
from ...models.model import placeholder_id
from ...prompt import MultimodalPrompt, Prompt
from ..types import Capabilities
from .network import Output
from .reference import TransformersReference


class TransformersMultimodal(TransformersReference):
    """Transformers' whole multimodal model as an engine; its prompts are `MultimodalPrompt`s with images or sounds.

    Raises:
        ModelError: the model has no vision or audio part, or cannot be loaded.
    """

    def __init__(self, model: Model, *, dtype: str | torch.dtype = "float32", device: str = "cpu") -> None:
        if all(getattr(model.config, part, None) is None for part in ("vision_config", "audio_config")):
            raise ModelError(f"{model.name!r} has no vision or audio part: open it with 'transformers' or 'numba'")
        super().__init__(model, dtype=dtype, device=device)
        self._taken = set(inspect.signature(self.network.model.forward).parameters)

    @property
    def capabilities(self) -> Capabilities:
        own = super().capabilities
        return Capabilities(
            "transformers-multimodal",
            own.taps,
            own.dtypes,
            own.devices,
            accepts_embeddings=False,
            mrope=own.mrope,
            vision_inside=True,
        )

    def check(self, prompt: Prompt, new_tokens: int = 0) -> None:
        if prompt.input_embeddings or prompt.embedding_ranges or prompt.deepstack:
            raise EmbeddingRangeError(
                "transformers-multimodal runs the vision model inside and takes images (multimodal=[...], from "
                "build_multimodal), not embeddings. LMDeploy's PyTorch engine, which this one mirrors, has ignored them since "
                "0.6.5: it answers from the placeholders. For embeddings open 'transformers', 'numba' or LMDeploy's "
                "TurboMind"
            )
        super().check(prompt, new_tokens)
        groups = prompt.multimodal if isinstance(prompt, MultimodalPrompt) else ()
        if groups and new_tokens > 1 and self._net.mrope_axes and prompt.position_ids is None:
            raise PromptError(
                "the positions of new tokens follow from those of the images: give position_ids, as build_multimodal computes them"
            )
        for number, group in enumerate(groups):
            values = group.values() if isinstance(group, dict) else ()
            if not any(isinstance(each, torch.Tensor) and each.is_floating_point() for each in values):
                # without pixels the model would answer from the placeholders
                given = sorted(group) if isinstance(group, dict) else type(group).__name__
                raise PromptError(
                    f"multimodal[{number}] is {given}: give a dict with pixel_values (input_features, ...), as "
                    "build_multimodal returns it"
                )
        placeholders = prompt.input_ids.count(placeholder_id(self.model.config))
        if placeholders and not groups:
            raise PromptError(f"the prompt has {placeholders} placeholders but no images: pass multimodal=[...]")

    def forward(
        self,
        prompt: Prompt,
        *,
        keep: int | torch.Tensor | None,
        cache: Mapping[str, Any] | None = None,
        new: Sequence[int] = (),
        hidden: torch.Tensor | None = None,
    ) -> Output:
        """Run the whole model on a prompt with its images; see `TransformersReference.forward`.

        Raises:
            PromptError: the images do not fit the placeholders.
        """
        groups = prompt.multimodal if isinstance(prompt, MultimodalPrompt) else ()
        ids = torch.tensor([[*prompt.input_ids, *new]], device=self.device)
        given = _join(groups, self.device, self.dtype)
        inputs: dict[str, Any] = {name: value for name, value in given.items() if name in self._taken}
        try:
            return self._net.forward(ids, keep=keep, cache=cache, hidden=hidden, **inputs)
        except (ValueError, IndexError, RuntimeError) as error:
            raise PromptError(f"the images do not fit the prompt: {error}") from error


def _join(groups: Sequence[dict[str, Any]], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Concatenate groups of processed images along the first axis of each tensor."""
    joined = {}
    for name in {name: None for group in groups for name in group}:
        values = [group[name] for group in groups if isinstance(group.get(name), torch.Tensor)]
        if values:
            value = torch.cat(values)
            joined[name] = value.to(device, dtype if value.is_floating_point() else None)
    return joined
