"""LMDeploy's TurboMind engine behind the workbench's engine interface."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import queue
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from ...errors import ModelError, PromptError
from ...models import Model
from ...models.extract_language_model import extract_language_model
from ...models.options import parse_dtype
from ...models.truncate_checkpoint import truncate_checkpoint
from ...prompt import Prompt
from ..base import Engine, Sink
from ..cancellation import Cancellation
from ..sampling import stop_tokens
from ..types import Capabilities, EngineOutput, GenerationConfig, ResponseType
from .compat import embeddings_for, explain_status, generation_config, infer_arguments, installed_version

DTYPES = ("bfloat16", "float16")
_END = object()
_STATES = ("logits", "last_hidden_state")


class TurboMindEngine(Engine):
    """The TurboMind engine of the installed lmdeploy.

    It returns the hidden states `norm` (after the final norm) and `logits`. TurboMind does not expose its layers.

    Args:
        dtype: "bfloat16" or "float16"; None: bfloat16 for a checkpoint in bfloat16, else float16, as LMDeploy does.
        check: whether prompts are checked before they are passed on. If not, invalid prompts reach TurboMind unchanged; rows of the
            wrong width make it read outside its buffers, so open it with `isolated=True` (`open_engine`) then.
        depth_sweep: add the taps `depth.k`: the state after the final norm of the checkpoint truncated to its first k layers. A
            trace opens a second TurboMind for each depth.
        config: fields of lmdeploy's TurbomindEngineConfig: `tp`, `session_len`, `cache_max_entry_count`, `max_prefill_token_num`, ...

    Raises:
        ModelError: no lmdeploy, no GPU, a model that TurboMind does not run, or too little memory.
        TypeError: `config` has a field that this version's TurbomindEngineConfig lacks.
    """

    def __init__(
        self,
        model: Model,
        *,
        dtype: str | torch.dtype | None = None,
        device: str = "cuda",
        check: bool = True,
        depth_sweep: bool = False,
        **config: Any,
    ) -> None:
        super().__init__()
        if str(device) != "cuda":
            raise ModelError(
                f"device={device!r}: TurboMind runs only on NVIDIA GPUs; use device='cuda' (devices=[1] chooses one of several)"
            )
        self.version = installed_version()
        if not torch.cuda.is_available():
            raise ModelError(
                f"TurboMind needs an NVIDIA GPU, but PyTorch {torch.__version__} finds none: use the numba engine here, or open "
                "runs recorded on a machine that has one"
            )
        self.model, self.checks, self.depth_sweep = model, check, depth_sweep
        self.dtype = parse_dtype(dtype or _auto_dtype(model), DTYPES, "turbomind")
        self.device = torch.device("cuda")
        self._path = _supported_folder(model)
        self.config = {"session_len": model.context, "cache_max_entry_count": 0.2, "max_batch_size": 64, **config}
        self._engine: Any = self._open(self._path)
        self._instances: list[Any] = []
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, name="workbench-turbomind", daemon=True)
        self._thread.start()

    def _open(self, path: Path, **changes: Any) -> Any:
        from lmdeploy import TurbomindEngineConfig
        from lmdeploy.turbomind import TurboMind

        known = {field.name for field in dataclasses.fields(TurbomindEngineConfig)}
        unknown = sorted(set(self.config) - known)
        if unknown:
            raise TypeError(f"lmdeploy {self.version}'s TurbomindEngineConfig has no {', '.join(unknown)}")
        settings = TurbomindEngineConfig(dtype=str(self.dtype).removeprefix("torch."), **{**self.config, **changes})
        take = {"engine_config": settings, "trust_remote_code": self.model.trust_remote_code}
        try:
            if hasattr(TurboMind, "from_pretrained") and self.version < Version("0.15"):
                return TurboMind.from_pretrained(str(path), **take)
            return TurboMind(str(path), **take)
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            raise ModelError(
                f"TurboMind has too little GPU memory for {self.model.name!r} ({_free_gpu()}): lower cache_max_entry_count, raise tp, or "
                "free the GPU"
            ) from error
        except Exception as error:
            hint = f" ({_free_gpu()}: lower cache_max_entry_count)" if "memory" in str(error).lower() else ""
            raise ModelError(
                f"TurboMind cannot open {self.model.name!r}: {type(error).__name__}: {error}{hint}"
            ) from error

    @property
    def capabilities(self) -> Capabilities:
        layers = self.model.text_config.num_hidden_layers
        depths = tuple(f"depth.{k}" for k in range(1, layers + 1)) if self.depth_sweep else ()
        return Capabilities(
            "turbomind", (*depths, "norm", "logits"), DTYPES, ("cuda",), bidirectional_spans=False, mrope=0
        )

    def check(self, prompt: Prompt, new_tokens: int = 0) -> None:
        """See `Engine.check`; with `check=False` nothing is checked."""
        if not self.checks:
            return
        super().check(prompt, new_tokens)
        if prompt.position_ids is not None and not torch.equal(prompt.position_ids, torch.arange(len(prompt))):
            raise PromptError(
                f"lmdeploy {self.version} takes no positions with embeddings and would use 0, 1, 2, ...: leave position_ids out, or "
                "run effective_prompt(prompt, 'turbomind') on the reference to see the effect"
            )
        needed = len(prompt) + new_tokens
        if needed > self.config["session_len"]:
            raise PromptError(
                f"{len(prompt)} prompt tokens and {new_tokens} new ones exceed session_len={self.config['session_len']}: open the "
                "engine with a larger one"
            )

    def _release(self) -> None:
        asyncio.run_coroutine_threadsafe(_end_all(), self._events).result(30)
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join(10)
        self._events.close()
        self._instances.clear()
        with contextlib.suppress(Exception):  # an engine that died has nothing left to close
            self._engine.close()
        self._engine = None
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _instance(self) -> Iterator[Any]:
        """Borrow one of LMDeploy's instances; each runs one request at a time."""
        with self._lock:
            instance = self._instances.pop() if self._instances else None
        if instance is None:
            instance = self._engine.create_instance()
        yield instance
        with self._lock:  # not reached after an error: that instance is not reused
            self._instances.append(instance)

    def _start(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation, deliver: Callable[[Any], object]
    ) -> Callable[[], object]:
        """Run a request on the engine's event loop; return a function that ends it early."""
        if self._engine is None:
            raise ModelError("this engine was closed: open it again")

        async def run() -> None:
            try:
                with self._instance() as instance:
                    stop = asyncio.run_coroutine_threadsafe  # any thread may cancel
                    cancelled.add_callback(lambda: stop(instance.async_cancel(0), self._events))
                    async for output in _outputs(self, instance, prompt, config):
                        deliver(output)
            except asyncio.CancelledError:
                deliver(ModelError("the engine was closed, or the request was dropped, before it ended"))
                raise
            except BaseException as error:
                deliver(error)
            finally:
                deliver(_END)

        future = asyncio.run_coroutine_threadsafe(run(), self._events)
        return future.cancel

    def run_generation(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> Generator[EngineOutput, None, None]:
        channel: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stop = self._start(prompt, config, cancelled, channel.put)
        try:
            while (output := _unwrap(channel.get())) is not None:
                yield output
        finally:
            stop()

    async def run_generation_async(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> AsyncGenerator[EngineOutput, None]:
        events = asyncio.get_running_loop()
        channel: asyncio.Queue[Any] = asyncio.Queue()

        def deliver(output: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the consumer's event loop is closed, so nothing is waiting
                events.call_soon_threadsafe(channel.put_nowait, output)

        stop = self._start(prompt, config, cancelled, deliver)
        try:
            while (output := _unwrap(await channel.get())) is not None:
                yield output
        finally:
            stop()

    def run_trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor, sink: Sink) -> None:
        for tap in taps:
            if tap.startswith("depth."):
                sink(tap, self._at_depth(prompt, int(tap.removeprefix("depth.")))[positions])
        if "norm" in taps or "logits" in taps:
            output = self.generate(prompt, _config_for_states("logits" in taps))
            if "norm" in taps:
                sink("norm", _rows(output.last_hidden_state, len(prompt))[positions].to(self.dtype))
            if "logits" in taps:
                sink("logits", _rows(output.logits, len(prompt))[positions].to(self.dtype))

    def _at_depth(self, prompt: Prompt, depth: int) -> torch.Tensor:
        """Return `[seq, hidden]` after the first `depth` layers of the checkpoint and the final norm."""
        if self._engine is None:
            raise ModelError("this engine was closed: open it again")
        with tempfile.TemporaryDirectory(prefix="workbench-depth-") as folder:
            cut = truncate_checkpoint(self._path, Path(folder), depth)
            engine = self._open(cut, cache_max_entry_count=0.05, max_batch_size=1)
            try:
                instance = engine.create_instance()
                outputs: list[EngineOutput] = []

                async def run() -> None:
                    async for output in _outputs(self, instance, prompt, _config_for_states(False)):
                        outputs.append(output)

                try:
                    asyncio.run_coroutine_threadsafe(run(), self._events).result()
                except ModelError:
                    raise
                except Exception as error:
                    raise ModelError(f"TurboMind failed at depth {depth}: {type(error).__name__}: {error}") from error
                states = [output.last_hidden_state for output in outputs if output.last_hidden_state is not None]
                return _rows(torch.cat(states) if states else None, len(prompt)).to(self.dtype)
            finally:
                engine.close()


async def _end_all() -> None:
    """Cancel every request of this event loop and wait until each has notified its consumer."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _outputs(
    engine: TurboMindEngine, instance: Any, prompt: Prompt, config: GenerationConfig
) -> AsyncGenerator[EngineOutput, None]:
    """Run one request; yield LMDeploy's outputs as EngineOutputs, each with only what is new since the previous one."""
    # LMDeploy decodes greedily by top_k=1, after which only one token has a probability: take them from the logits instead.
    stops = stop_tokens(engine.model, config)
    own_logprobs = config.logprobs is not None and not config.do_sample
    asked = config
    if own_logprobs:
        asked = dataclasses.replace(config, logprobs=None, output_logits=config.output_logits or "generation")
    wanted: dict[str, Any] = {
        "session_id": next(engine._numbers),
        "input_ids": list(prompt.input_ids),
        "gen_config": generation_config(asked, stops),
    }
    if prompt.input_embeddings:
        wanted["input_embeddings"] = embeddings_for(engine.version, prompt.input_embeddings)
        wanted["input_embedding_ranges"] = [list(pair) for pair in prompt.embedding_ranges]
    call = instance.async_stream_infer
    num_generated, num_returned = 0, dict.fromkeys(_STATES, 0)
    stream = call(**infer_arguments(call, engine.version, wanted))
    try:
        async for output in stream:
            name = output.status.name
            if name not in ("SUCCESS", "FINISH", "CANCEL"):
                raise ModelError(explain_status(output.status, engine.version))
            tokens = list(output.token_ids)
            total = getattr(output, "num_token", None)
            if total is not None and total == len(tokens) and num_generated:  # early versions repeat all tokens
                tokens = tokens[num_generated:]
            chosen_from = len(tokens)
            if (
                name == "FINISH" and tokens and tokens[-1] in stops
            ):  # LMDeploy returns the stop token, the workbench does not
                tokens.pop()
            num_generated += len(tokens)
            states: dict[str, torch.Tensor | None] = {}
            for field in _STATES:
                whole = getattr(output, field, None)
                states[field] = None if whole is None else whole[num_returned[field] :].detach().clone().cpu()
                num_returned[field] = 0 if whole is None else len(whole)
            logits = None if states["logits"] is None else states["logits"].float()
            given = list(output.logprobs)[-chosen_from:][: len(tokens)] if output.logprobs and tokens else []
            yield EngineOutput(
                ResponseType[name],
                tokens,
                num_generated,
                None
                if config.logprobs is None
                else _logprobs(logits, chosen_from, tokens, config.logprobs)
                if own_logprobs
                else given,
                logits if config.output_logits else None,
                states["last_hidden_state"],
            )
    finally:
        await stream.aclose()


def _logprobs(logits: torch.Tensor | None, chosen_from: int, tokens: list[int], count: int) -> list[dict[int, float]]:
    """Log probabilities of each new token, from the logits that it was chosen from: the last `chosen_from` rows."""
    if logits is None or not tokens:
        return []
    report = []
    for token, row in zip(tokens, logits[-chosen_from:].log_softmax(dim=-1), strict=False):
        best = row.topk(min(count, len(row)))
        report.append({**dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)), token: float(row[token])})
    return report


def _config_for_states(logits: bool) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=1, ignore_eos=True, output_last_hidden_state="all", output_logits="all" if logits else None
    )


def _rows(states: torch.Tensor | None, length: int) -> torch.Tensor:
    if states is None or len(states) < length:
        got = "none" if states is None else str(len(states))
        raise ModelError(f"TurboMind returned {got} of {length} states: open it with enable_prefix_caching=False")
    return states[:length]


def _unwrap(delivered: Any) -> EngineOutput | None:
    if delivered is _END:
        return None
    if isinstance(delivered, ModelError):
        raise delivered
    if isinstance(delivered, BaseException):
        raise ModelError(f"TurboMind failed in this request: {type(delivered).__name__}: {delivered}") from delivered
    output: EngineOutput = delivered
    return output


def _auto_dtype(model: Model) -> str:
    return "bfloat16" if model.embedding_table.dtype is torch.bfloat16 else "float16"


def _supported_folder(model: Model) -> Path:
    """The folder that TurboMind opens: the model's, or if TurboMind does not run that, one with its language model alone.

    Raises:
        ModelError: TurboMind does not run the language model either.
    """
    try:
        from lmdeploy.turbomind.supported_models import SUPPORTED_ARCHS, is_supported
    except ImportError:  # another version: whether it runs the model is only known after opening it
        return model.path

    def runs(folder: Path) -> bool:
        try:
            return bool(is_supported(str(folder), trust_remote_code=model.trust_remote_code))
        except TypeError:  # an older version without that parameter
            return bool(is_supported(str(folder)))

    if runs(model.path):
        return model.path
    if model.config is not model.text_config and runs(part := extract_language_model(model)):
        return part
    name = (model.config.architectures or [model.config.model_type])[0]
    raise ModelError(
        f"TurboMind does not run {name}: it runs {', '.join(sorted(SUPPORTED_ARCHS))}. Use the numba or transformers engine"
    )


def _free_gpu() -> str:
    free, total = torch.cuda.mem_get_info()
    return f"{free / 2**30:.1f} of {total / 2**30:.0f} GiB are free"
