"""LMDeploy's PyTorch engine: vision runs inside it, and embeddings are rejected instead of ignored."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

import torch
from packaging.version import Version

from ...errors import EmbeddingRangeError, ModelError
from ...models import Model
from ...models.options import parse_dtype
from ...prompt import Prompt
from ...vision.images import open_image
from ..base import Engine, Sink
from ..cancellation import Cancellation
from ..sampling import stop_tokens
from ..types import Capabilities, EngineOutput, GenerationConfig, ResponseType
from .compat import explain_status, generation_config, installed_version

DTYPES = ("bfloat16", "float16")
_END = object()


class LMDeployPyTorch(Engine):
    """The PyTorch engine of the installed lmdeploy: it takes token ids, and images through `ask`. It returns no hidden states.

    Since 0.6.5 it silently ignores `input_embeddings` and generates from the placeholder tokens; here they are rejected.

    Args:
        dtype: "bfloat16" or "float16"; None: bfloat16 for a checkpoint in bfloat16, else float16.
        config: fields of lmdeploy's PytorchEngineConfig.

    Raises:
        ModelError: lmdeploy is not installed or cannot open this model, or PyTorch finds no GPU.
    """

    def __init__(
        self, model: Model, *, dtype: str | torch.dtype | None = None, device: str = "cuda", **config: Any
    ) -> None:
        super().__init__()
        self.version = installed_version()
        if not torch.cuda.is_available():
            raise ModelError("LMDeploy's PyTorch engine needs a GPU here, but PyTorch finds none: use the numba engine")
        self.model = model
        stored = model.embedding_table.dtype
        self.dtype = parse_dtype(
            dtype or ("bfloat16" if stored is torch.bfloat16 else "float16"), DTYPES, "lmdeploy-pytorch"
        )
        self.device = torch.device(device)
        try:
            from lmdeploy import PytorchEngineConfig, pipeline

            settings = PytorchEngineConfig(dtype=str(self.dtype).removeprefix("torch."), **config)
            self.pipeline = pipeline(str(model.path), backend_config=settings, log_level="ERROR")
        except ModuleNotFoundError as error:
            raise ModelError(f"LMDeploy's PyTorch engine lacks {error.name}: pip install {error.name}") from error
        except Exception as error:
            raise ModelError(
                f"LMDeploy's PyTorch engine cannot open {model.name!r}: {type(error).__name__}: {error}"
            ) from error
        self._numbers = itertools.count(1)
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, name="workbench-lmdeploy-pytorch", daemon=True)
        self._thread.start()

    def _release(self) -> None:
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join(10)
        self.pipeline.close()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            "lmdeploy-pytorch",
            (),
            DTYPES,
            ("cuda",),
            accepts_embeddings=False,
            bidirectional_spans=False,
            vision_inside=True,
        )

    def check(self, prompt: Prompt, new_tokens: int = 0) -> None:
        """See `Engine.check`; also rejects embeddings. The error names what LMDeploy would do with them."""
        if prompt.input_embeddings:
            if self.version >= Version("0.6.5"):
                does = "would silently ignore them and answer from the placeholders"
            else:
                does = "would accept them, as this version runs vision outside; it is opened here for images only"
            raise EmbeddingRangeError(
                f"lmdeploy-pytorch {self.version} takes no input_embeddings here: the engine {does}. Pass it images "
                "(engine.ask(question, images)), or use 'turbomind' for embeddings"
            )
        super().check(prompt, new_tokens)

    def ask(self, question: str, images: list[Any], gen_config: GenerationConfig | None = None) -> str:
        """Return the answer to a question about images, which LMDeploy's own processor and vision model process.

        Args:
            images: PIL images or paths. They are decoded here: LMDeploy's loader accepts formats whose decoders start other programs.

        Raises:
            ImageError: an image cannot be used; the message names it.
        """
        config = gen_config or GenerationConfig()
        request = generation_config(config, stop_tokens(self.model, config))
        answer = self.pipeline((question, [open_image(image) for image in images]), gen_config=request)
        return str(answer.text)

    def run_generation(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> Generator[EngineOutput, None, None]:
        channel: queue.SimpleQueue[Any] = queue.SimpleQueue()
        future = asyncio.run_coroutine_threadsafe(self._run(prompt, config, channel.put), self._events)
        cancelled.add_callback(lambda: bool(future.cancel()))
        try:
            while (output := channel.get()) is not _END:
                if isinstance(output, BaseException):
                    raise ModelError(f"LMDeploy's PyTorch engine failed: {output}") from output
                yield output
        finally:
            future.cancel()

    async def _run(self, prompt: Prompt, config: GenerationConfig, deliver: Callable[[Any], None]) -> None:
        num_generated = 0
        try:
            instance = self.pipeline.async_engine.engine.create_instance()
            request = generation_config(config, stop_tokens(self.model, config))
            async for output in instance.async_stream_infer(
                next(self._numbers), list(prompt.input_ids), gen_config=request
            ):
                name = output.status.name
                if name not in ("SUCCESS", "FINISH", "CANCEL"):
                    raise ModelError(explain_status(output.status, self.version))
                num_generated += len(output.token_ids)
                deliver(EngineOutput(ResponseType[name], list(output.token_ids), num_generated))
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            deliver(error)
        finally:
            deliver(_END)

    def run_trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor, sink: Sink) -> None:
        raise ModelError(
            "lmdeploy-pytorch does not return hidden states: compare its answers (compare_text), or use 'turbomind'"
        )
