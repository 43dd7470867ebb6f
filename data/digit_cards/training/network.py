"""The network in training: Transformers' LLaVA with the language part frozen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from data.digit_cards.training.cards import COLOURS, Scene
from workbench.models.digit_cards import IMAGE_TOKEN_ID, ROWS, configuration

IGNORED = -100  # PyTorch's label for "no loss here"


class CardReader(nn.Module):
    """Vision tower, projector and frozen language model, with the training loss on answers."""

    def __init__(self, language: Path, device: str) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

        config = configuration(language)
        with torch.device("meta"):
            whole = LlavaForConditionalGeneration(config)
        parts = {"tower": whole.model.vision_tower, "projector": whole.model.multi_modal_projector}
        self.parts = nn.ModuleDict({name: type(part)(_config_of(name, config)) for name, part in parts.items()})
        self.language = AutoModelForCausalLM.from_pretrained(language, dtype=torch.bfloat16).requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(language)
        with torch.no_grad():  # start with rows of about a word's norm
            deviation = float(self.language.get_parameter("model.embed_tokens.weight").float().std())
            self.parts["projector"].get_parameter("linear_2.weight").mul_(deviation * 4)
        self.to(device)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 `[images, 3, 224, 224]` -> last hidden state of the tower, `[images, 49, 192]`."""
        scaled = pixels.float() / 127.5 - 1.0  # what the processor does: x / 255, mean and deviation 0.5
        return self.parts["tower"](scaled, output_hidden_states=True).hidden_states[-1]

    def rows(self, features: torch.Tensor) -> torch.Tensor:
        """The rows that enter the language model, `[images, 49, 576]`."""
        return self.parts["projector"](features)

    def answer_loss(
        self, ids: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy of the answers, and for each prompt whether greedy decoding would give exactly the answer.

        Args:
            ids, labels: `[prompts, tokens]`, padded on the right; labels are `IGNORED` outside answers.
            rows: `[images, 49, 576]`, in the order of the placeholders in `ids`.
        """
        with torch.no_grad():
            states = self.language.get_input_embeddings()(ids)
        states = states.masked_scatter((ids == IMAGE_TOKEN_ID)[..., None], rows.to(states.dtype))
        # Padding is on the right and attention is causal, so no mask is needed.
        hidden = self.language.model(inputs_embeds=states, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        asked = targets != IGNORED
        logits = self.language.lm_head(hidden[asked]).float()
        right = torch.ones_like(asked)
        right[asked] = logits.argmax(dim=-1) == targets[asked]
        return F.cross_entropy(logits, targets[asked]), right.all(dim=1)

    def encode(self, text: str, images: int, answer: str) -> tuple[list[int], list[int]]:
        """Ids and labels of one question with its answer."""
        before, after = "<|im_start|>user\n", f"{text}<|im_end|>\n<|im_start|>assistant\n"  # as CHAT_TEMPLATE writes it
        ids = [*self._ids(before), *[IMAGE_TOKEN_ID] * (ROWS * images), *self._ids(after)]
        said = self._ids(f"{answer}<|im_end|>")
        return ids + said, [IGNORED] * len(ids) + said

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def save(self, path: Path) -> None:
        """Write tower and projector under the names of a LLaVA checkpoint, in bfloat16."""
        names = {"tower": "vision_tower", "projector": "multi_modal_projector"}
        tensors = {
            f"{names[part]}.{name}": tensor.detach().to("cpu", torch.bfloat16).contiguous()
            for part, module in self.parts.items()
            for name, tensor in module.state_dict().items()
            if "position_ids" not in name
        }
        save_file(tensors, path, metadata={"format": "pt"})


class Probes(nn.Module):
    """Training-only heads: three learned queries over the tower's rows, each of which names one card or none."""

    def __init__(self, width: int = 192, places: int = 3) -> None:
        super().__init__()
        self.looks = nn.Parameter(torch.randn(places, width) * 0.1)
        self.digit = nn.Linear(width, 11)
        self.colour = nn.Linear(width, len(COLOURS) + 1)
        self.place = nn.Linear(width, 2)

    def loss(self, features: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, and the share of digits named correctly.

        Args:
            features: `[images, 49, 192]`.
            targets: from `probe_targets`, `[images, 3, 4]`.
        """
        seen = torch.einsum("pw,nrw->npr", self.looks, features).softmax(dim=-1) @ features
        digit, colour = self.digit(seen), self.colour(seen)
        there = targets[..., 0] < 10
        wanted = targets[..., 0].long(), targets[..., 1].long()
        place = F.mse_loss(self.place(seen)[there].float(), targets[..., 2:][there])
        named = F.cross_entropy(digit.flatten(0, 1).float(), wanted[0].flatten())
        named = named + F.cross_entropy(colour.flatten(0, 1).float(), wanted[1].flatten())
        return named + place, (digit.argmax(-1) == wanted[0])[there].float().mean()


def probe_targets(scenes: Sequence[Scene]) -> torch.Tensor:
    """Digit (10: no card), colour, and centre from -1 to 1, of the cards from left to right: `[scenes, 3, 4]`."""
    colours = list(COLOURS)
    targets = torch.tensor([10.0, len(colours), 0.0, 0.0]).repeat(len(scenes), 3, 1)
    for row, scene in enumerate(scenes):
        for place, card in enumerate(scene.cards):
            x, y = (value / 112 - 1 for value in card.centre)
            targets[row, place] = torch.tensor([float(card.digit), float(colours.index(card.colour)), x, y])
    return targets


def _config_of(part: str, config: Any) -> Any:
    return config.vision_config if part == "tower" else config
