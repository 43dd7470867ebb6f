"""Load a model by its name: a built-in one, a local folder, or a Hugging Face id."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, foreign_errors, reason
from ..schema import shortened
from . import digit_cards, internlm2
from .chat_template import template_limits
from .checkpoint import Checkpoint
from .pypi import GEMMA3, SMOLLM2
from .remote_code import python_files
from .sizes import IN_LAYER
from .sources import FolderSource
from .token_texts import token_texts
from .weight_checksums import weight_checksums

BUILT_IN: dict[str, Callable[[], Path]] = {
    **{each.name: each.folder for each in (SMOLLM2, GEMMA3)},
    digit_cards.NAME: digit_cards.folder,
}
"""Models that need no hub, by name; each function returns the model's folder, fetched or assembled on first use."""


UNLIMITED = 1 << 20
"""The context of models whose configuration names none."""


@dataclass(frozen=True)
class Model:
    """A model on disk; configuration, tokenizer and weights are read on first use.

    Attributes:
        name: the name it was loaded by.
        path: its folder with config, tokenizer and safetensors weights.
        trust_remote_code: whether Python files in that folder may be run.

    Raises:
        ModelError: on first use of a part whose files are missing or damaged.
    """

    name: str
    path: Path
    trust_remote_code: bool = False

    def __reduce__(self) -> tuple:
        """Pickle only the arguments: other processes read the files again."""
        return type(self), (self.name, self.path, self.trust_remote_code)

    @cached_property
    def config(self):
        """Transformers' configuration object."""
        from transformers import AutoConfig

        return self._read(AutoConfig, "configuration")

    @cached_property
    def text_config(self):
        """The language model's part of the configuration (all of it for a text-only model)."""
        return self.config.get_text_config()

    @cached_property
    def tokenizer(self):
        """Transformers' tokenizer."""
        from transformers import AutoTokenizer

        return self._read(AutoTokenizer, "tokenizer")

    @cached_property
    def weights(self) -> Checkpoint:
        """The checkpoint's tensors by name."""
        return Checkpoint(FolderSource(self.path))

    @cached_property
    def embedding_table(self) -> torch.Tensor:
        """The token embedding table `[vocab, hidden]`, in its stored dtype."""
        tables = [name for name in self.weights if name.endswith(("embed_tokens.weight", "tok_embeddings.weight"))]
        names = [
            name for name in tables if not IN_LAYER.search(name)
        ]  # layers that predict further tokens may have their own
        if len(names) != 1:
            raise ModelError(f"{self.path} has {len(names)} tensors that look like a token embedding table: {names}")
        return self.weights.get(names[0])

    @cached_property
    def digest(self) -> str:
        """SHA-256 that identifies the checkpoint: of the number of layers, and of the name, dtype, shape and bytes of every tensor.

        It does not depend on the sharding, or on the version of Transformers that wrote the configuration. The checksums of the
        bytes are kept in the cache folder (`weight_checksums.py`), so that they are computed again only if a file changes.
        """
        sha = hashlib.sha256(repr(self.text_config.num_hidden_layers).encode())
        entries, sums = self.weights.entries(self.weights), weight_checksums(self.path, self.weights)
        for name, entry in sorted(entries.items()):
            sha.update(repr((name, entry.dtype_name, list(entry.shape), sums[name])).encode())
        return sha.hexdigest()

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids that end generation, where Transformers' `generate` takes them from: generation_config.json, else the configuration."""
        from transformers import GenerationConfig

        if (self.path / "generation_config.json").exists():
            with foreign_errors(
                ModelError,
                f"generation_config.json of model {self.name!r} in {self.path} cannot be read",
                "Fetch it again",
            ):
                ends = GenerationConfig.from_pretrained(self.path).eos_token_id
        else:
            ends = GenerationConfig.from_model_config(self.config).eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        if not all(isinstance(each, int) and not isinstance(each, bool) for each in ends):
            raise ModelError(
                f"eos_token_id of model {self.name!r} is {shortened(ends)}: it must be an id or a list of ids"
            )
        return tuple(ends)

    @property
    def context(self) -> int:
        """The largest number of tokens of a sequence: the trained length, times the factor of dynamic NTK scaling if it has that.

        Models without such a limit (recurrent ones, ALiBi) get `UNLIMITED`.
        """
        config = self.text_config
        if getattr(config, "max_position_embeddings", None) is None:
            return UNLIMITED
        rope = getattr(config, "rope_parameters", None) or {}
        factor = rope.get("factor", 1.0) if rope.get("rope_type") == "dynamic" else 1.0
        return int(config.max_position_embeddings * factor)

    def token_rows(self, ids: Sequence[int]) -> torch.Tensor:
        """The embeddings of tokens as an engine takes them in `input_embeddings`, float32 `[tokens, hidden]`.

        They are scaled if the model scales what it looks up (Gemma). A model that multiplies all embeddings, injected ones as well
        (Granite), does that with these, too.
        """
        rows = self.embedding_table[list(ids)]
        scale = torch.tensor(embedding_scale(self.text_config)).to(rows.dtype)
        return (rows * scale).float()

    def _read(self, auto_class, what: str):
        internlm2.register()
        fix = "Fetch its files again"
        if not self.trust_remote_code and python_files(self.path):
            fix = "If the model needs its own Python code, pass trust_remote_code=True, if you trust its author"
        with foreign_errors(ModelError, f"the {what} of model {self.name!r} in {self.path} cannot be read", fix):
            return auto_class.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)

    def chat_ids(self, text: str | list[dict]) -> list[int]:
        """Token ids of a chat by the model's chat template, ready for its answer.

        `text` is the text of one user turn, or a list of messages `{"role": ..., "content": ...}`.
        """
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        tokenizer = self.tokenizer
        with template_limits(self.name):
            encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            return list(encoded["input_ids"])

    def position_of(self, text: str, ids: list[int], otherwise: int) -> int:
        """Index of the first occurrence in `ids` of the first token of `text`, whose leading space counts; `otherwise` if absent."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return ids.index(tokens[0]) if tokens and tokens[0] in ids else otherwise

    def tokens(self, ids) -> list[str]:
        """The text of each token id, decoded separately; a token that is part of a character is `<0xF0>`, one per byte."""
        return token_texts(self.tokenizer, ids)


def embedding_scale(text_config: Any) -> float:
    """The factor that the model applies to looked-up token embeddings, and not to injected rows; 1 for most.

    sqrt(hidden) in Gemma and in BART's family with `scale_embedding`; `scale_emb` in MiniCPM 3.
    """
    if text_config.model_type.startswith("gemma") or getattr(text_config, "scale_embedding", False):
        return float(text_config.hidden_size) ** 0.5
    return float(getattr(text_config, "scale_emb", 1.0)) if text_config.model_type == "minicpm3" else 1.0


_PLACEHOLDERS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")


def placeholder_id(config: Any) -> int | None:
    """The id of the placeholder token for the rows of images or sounds; None if the configuration names none."""
    return next((getattr(config, name) for name in _PLACEHOLDERS if getattr(config, name, None) is not None), None)


def load_model(name: str | os.PathLike, *, trust_remote_code: bool = False) -> Model:
    """Find a model, and fetch it once if it is not on this machine. Its files are read on first use.

    Args:
        name: a built-in name (`"smollm2-135m"`), a local folder in Hugging Face's layout, or a Hugging Face id (`"org/name"`).
        trust_remote_code: whether Python files that come with the model may run.

    Raises:
        ModelError: no model of that name, or it cannot be fetched; the message names the fix.
    """
    name = os.fspath(name)
    if name in BUILT_IN:
        return Model(name, BUILT_IN[name](), trust_remote_code)
    try:
        folder = Path(name).expanduser()
        is_folder = bool(name) and folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"no model {name[:80]!r}: {error}") from error
    if is_folder:
        if not (folder / "config.json").exists():
            raise ModelError(f"{folder} has no config.json, so it is not a model folder in Hugging Face's layout")
        return Model(name, folder.resolve(), trust_remote_code)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return Model(name, _from_hub(name, trust_remote_code), trust_remote_code)
    near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ModelError(
        f"no model {name!r}: it is neither built in ({', '.join(BUILT_IN)}), nor a folder on this machine, nor a Hugging "
        f"Face id of the form org/name.{hint}"
    )


_HUB_SECONDS = 20.0


def _from_hub(name: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"] + ["*.py"] * trust_remote_code
    try:
        try:
            # The client sets no limit for this request, so a server that never answers would be waited for without end.
            revision = None if HF_HUB_OFFLINE else HfApi().model_info(name, timeout=_HUB_SECONDS).sha
        except HfHubHTTPError:
            raise
        except Exception as offline:  # what was fetched before can be used
            try:
                return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
            except Exception:
                raise offline from None
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HfHubHTTPError as error:
        raise ModelError(
            f"Hugging Face refuses model {name!r}: {str(error).splitlines()[0]} Check the id; for a gated model "
            "accept its terms and log in with `hf auth login`"
        ) from error
    except Exception as error:  # the hub client raises many error types without a network; wrap them all
        raise ModelError(
            f"model {name!r} is not a folder on this machine and could not be fetched from Hugging Face "
            f"({reason(error)}). Check the network, or pass the path of a folder you already have"
        ) from error
