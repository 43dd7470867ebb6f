"""vLLM as an engine: a Prompt maps onto its mixed token and embedding prompts one to one, and hooks read its layers.

Facts about vLLM stand in `linting/targets/vllm.py`; this adapter passes on what it is given after the checks of every engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...errors import PromptError
from ...models import Model
from ...models.extract_language_model import extract_language_model
from ...models.options import parse_dtype
from ...prompt import Prompt
from ..environments import python_of
from ..types import Capabilities, GenerationConfig
from ..worker_engine import WorkerEngine

DTYPES = ("float32", "bfloat16")
_PROBE = [0, 1, 2, 3]


class VllmEngine(WorkerEngine):
    """vLLM on the CPU, in the environment that `workbench engines install vllm` makes.

    Args:
        dtype: "float32" or "bfloat16".
        prefix_cache: whether prompts share keys and values of equal beginnings. A trace never does.
        max_prefill_tokens: tokens of a step; longer prompts are computed in chunks of it. None: vLLM's default.
        cache_gigabytes: memory for keys and values.
        check: whether prompts are checked before they are passed on; if not, ids and rows reach vLLM unchanged, and positions, spans and
            deepstack are left out. Rows of a wrong width end vLLM 0.32's process.
        patience, start_patience: seconds, see `WorkerEngine`.
        settings: further arguments of `vllm.LLM`.

    Raises:
        ModelError: vLLM is not installed, or cannot open the model.
        EngineDied: its process ended, or did not answer in time.
    """

    def __init__(
        self,
        model: Model,
        *,
        dtype: str | torch.dtype = "float32",
        device: str = "cpu",
        prefix_cache: bool = False,
        max_prefill_tokens: int | None = None,
        cache_gigabytes: int = 1,
        check: bool = True,
        patience: float = 300.0,
        start_patience: float = 600.0,
        **settings: Any,
    ) -> None:
        if str(device) != "cpu":
            raise PromptError(
                f"device={device!r}: vLLM runs on the CPU here; its GPU build is not among the installed environments"
            )
        self.dtype, self.device = parse_dtype(dtype, DTYPES, "vllm"), torch.device("cpu")
        self._checks = check
        options: dict[str, Any] = {
            "model": str(extract_language_model(model)),  # vision runs outside
            "dtype": str(self.dtype).removeprefix("torch."),
            "enable_prompt_embeds": True,
            "enforce_eager": True,
            "enable_prefix_caching": prefix_cache,
            "max_model_len": min(model.context, 8192),
            "max_num_seqs": 64,
            "max_logprobs": 100,
            "kv_cache_memory_bytes": cache_gigabytes << 30,
            "trust_remote_code": model.trust_remote_code,
            "generation_config": "vllm",  # our settings, not the checkpoint's
            "disable_log_stats": True,
            **({} if max_prefill_tokens is None else {"max_num_batched_tokens": max_prefill_tokens}),
            **settings,
        }
        self._length = int(options["max_model_len"])
        super().__init__(
            "vllm",
            model,
            python_of("vllm"),
            Path(__file__).with_name("worker.py"),
            options,
            patience=patience,
            start_patience=start_patience,
        )
        self.version = str(self.ready["version"])
        try:
            self._taps = self._confirmed(tuple(self.ready["taps"]))
        except BaseException:
            self.close()
            raise

    def _confirmed(self, taps: tuple[str, ...]) -> tuple[str, ...]:
        """The taps, without attention and MLP if they do not sum up to the layers on a prompt of four tokens (Gemma norms them first)."""
        if not taps:
            return ()
        states: dict[str, torch.Tensor] = {}
        self.run_trace(
            Prompt(_PROBE), list(taps), torch.arange(len(_PROBE)), lambda tap, state: states.update({tap: state})
        )
        before = states["embed"].double()
        layers = sum(tap.count(".") == 1 for tap in taps)
        sums = True
        for number in range(layers):
            after = states[f"layers.{number}"].double()
            total = before + states[f"layers.{number}.attention"].double() + states[f"layers.{number}.mlp"].double()
            sums &= bool((total - after).abs().max() <= 16 * torch.finfo(self.dtype).eps * after.abs().max())
            before = after
        return tuple(tap for tap in taps if sums or tap.count(".") != 2)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("vllm", self._taps, DTYPES, ("cpu",), bidirectional_spans=False)

    def check(self, prompt: Prompt, new_tokens: int = 0) -> None:
        """See `Engine.check`; with `check=False` only whether the engine is open."""
        if not self._checks:
            self._check_usable()
            return
        super().check(prompt, new_tokens)
        if prompt.position_ids is not None and not torch.equal(prompt.position_ids, torch.arange(len(prompt))):
            raise PromptError(
                f"vllm {self.version} takes no positions with embeddings and would use 0, 1, 2, ...: leave position_ids out, or run "
                "effective_prompt(prompt, 'vllm') on the reference to see the effect"
            )
        if len(prompt) + new_tokens > self._length:
            raise PromptError(
                f"{len(prompt)} prompt tokens and {new_tokens} new ones exceed max_model_len={self._length}: open the engine with a larger one"
            )

    def scale_layer(self, layer: int, factor: float) -> None:
        """Multiply what the MLP of a layer adds by a factor in every later pass: a fault to plant, taken back by the factor 1."""
        self.ask({"what": "scale layer", "layer": layer, "factor": factor}, {})

    def sampling(self, config: GenerationConfig) -> dict[str, Any]:
        if config.bad_token_ids:
            raise PromptError("vllm bans words, not token ids: leave bad_token_ids empty")
        stops = [*(config.stop_token_ids or ()), *(() if config.ignore_eos else self.model.stop_token_ids)]
        settings: dict[str, Any] = {
            "max_tokens": max(1, config.max_new_tokens),
            "min_tokens": config.min_new_tokens or 0,
            "temperature": config.temperature if config.do_sample else 0.0,
            "repetition_penalty": config.repetition_penalty,
            "ignore_eos": True,  # the tokens that end generation are those of the workbench's other engines
            "stop_token_ids": sorted(set(stops)),
            "detokenize": False,
            "logprobs": config.logprobs,
        }
        if config.do_sample:
            settings |= {
                "top_p": config.top_p,
                "top_k": config.top_k,
                "min_p": config.min_p,
                "seed": config.random_seed,
            }
        return settings
