"""An engine in a process of its own: whatever it does to its memory, the notebook's kernel survives."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Generator, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..errors import EmbeddingRangeError, EngineDied, ModelError, PromptError, TraceError
from ..models import Model
from ..prompt import Prompt
from .api import Engine, Keep
from .cancellation import Cancellation
from .messages import Capabilities, EngineOutput, GenerationConfig

_ERRORS: dict[str, type[Exception]] = {
    each.__name__: each for each in (EmbeddingRangeError, PromptError, ModelError, TraceError, ValueError, TypeError)
}
_END, _OUTPUT, _STATE, _ERROR, _READY = range(5)


class ChildEngine(Engine):
    """Any engine of `open_engine`, opened in a child process.

    Requests run there at the same time, each in a thread. When the process dies, every request that was running gets an error with
    the signal or exit code, and so does every later one.

    Args:
        kind, options: as for `open_engine`.
    """

    def __init__(self, kind: str, model: Model, **options: Any) -> None:
        super().__init__()
        self.model, self.kind = model, kind
        self._checks = bool(options.get("check", True))
        context = multiprocessing.get_context("spawn")  # a forked CUDA context does not work
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, model, options), daemon=True)
        self._process.start()
        theirs.close()
        self._sending, self._changing = threading.Lock(), threading.Lock()
        self._channels: dict[int, queue.SimpleQueue[tuple[int, Any]]] = {}
        self._numbers, self._dead, self._closed = 0, "", False
        opened: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._channels[0] = opened
        self._reader = threading.Thread(target=self._read, name="workbench-child", daemon=True)
        self._reader.start()
        kind_of, value = opened.get()
        if kind_of == _ERROR:
            self.close()
            raise value
        self._capabilities, self.dtype, self.device = value

    @property
    def capabilities(self) -> Capabilities:
        found: Capabilities = self._capabilities
        return found

    def check(self, prompt: Prompt, new_tokens: int = 0) -> None:
        """See `Engine.check`; what only the engine itself can check is checked in its process."""
        if self._checks:
            super().check(prompt, new_tokens)

    def close(self) -> None:
        """End the process; requests that run get an error."""
        self._closed = True
        self._process.terminate()
        self._reader.join(15)
        if self._process.is_alive():
            self._process.kill()
            self._reader.join(5)
        self._pipe.close()

    def __enter__(self) -> ChildEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _generate(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> Generator[EngineOutput, None, None]:
        number, channel = self._ask("generate", prompt, config)
        cancelled.tell(lambda: self._send((number, "cancel")))
        try:
            yield from _answers(channel)
        finally:
            self._send((number, "cancel"))
            self._channels.pop(number, None)

    def _trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor, keep: Keep) -> None:
        number, channel = self._ask("trace", prompt, taps, positions)
        try:
            for tap, state in _answers(channel):
                keep(tap, state)
        finally:
            self._channels.pop(number, None)

    def _ask(self, what: str, *arguments: Any) -> tuple[int, queue.SimpleQueue[tuple[int, Any]]]:
        channel: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        with self._changing:
            if self._dead:
                raise EngineDied(self._dead)
            self._numbers += 1
            number = self._numbers
            self._channels[number] = channel
        self._send((number, what, *arguments))
        return number, channel

    def _send(self, message: tuple) -> None:
        try:
            with self._sending:
                self._pipe.send_bytes(pickle.dumps(message))
        except (OSError, ValueError):  # it is gone; the reader tells everyone
            pass

    def _read(self) -> None:
        while True:
            try:
                number, kind, value = pickle.loads(self._pipe.recv_bytes())
            except Exception:  # it is gone, or what comes is no message: nobody may wait for ever
                break
            if kind == _ERROR:
                name, text = value
                value = _ERRORS[name](text) if name in _ERRORS else ModelError(f"{name}: {text}")
            channel = self._channels.get(number)
            if channel is not None:
                channel.put((kind, value))
        self._process.join(5)
        with self._changing:
            how = "was closed" if self._closed else _how(self._process.exitcode)
            self._dead = f"the {self.kind} engine's process {how}: open the engine again"
            waiting = list(self._channels.values())
        for channel in waiting:
            channel.put((_ERROR, EngineDied(self._dead)))


def _answers(channel: queue.SimpleQueue[tuple[int, Any]]) -> Iterator[Any]:
    """What the child sends about one request, until its end; its error is raised."""
    while True:
        kind, value = channel.get()
        if kind == _END:
            return
        if kind == _ERROR:
            raise value
        yield value


def _how(code: int | None) -> str:
    if code is None:
        return "does not answer"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}" + (
            ", which a crash in native code does" if -code in (signal.SIGSEGV, signal.SIGABRT) else ""
        )
    return f"ended with exit code {code}"


def _serve(pipe: Connection, kind: str, model: Model, options: dict[str, Any]) -> None:
    """The child: opens the engine, then a thread a request."""
    from . import open_engine

    sending = threading.Lock()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted notebook cell is the parent's affair

    def send(number: int, what: int, value: Any = None) -> None:
        message = pickle.dumps((number, what, value))
        try:
            with sending:
                pipe.send_bytes(message)
        except OSError:  # the parent is gone
            os._exit(0)

    try:
        engine = open_engine(kind, model, **options)
        send(0, _READY, (engine.capabilities, engine.dtype, engine.device))
    except BaseException as error:
        send(0, _ERROR, (type(error).__name__, str(error)))
        return

    def run(number: int, what: str, arguments: tuple) -> None:
        try:
            if what == "generate":
                prompt, config = arguments
                stream = engine.stream(prompt, config, session_id=number)
                if number in cancelled:  # before the engine knew of it
                    engine.cancel(number)
                for output in stream:
                    send(number, _OUTPUT, output)
            else:
                prompt, taps, positions = arguments
                engine.check(prompt)
                engine._trace(prompt, taps, positions, lambda tap, state: send(number, _STATE, (tap, state.cpu())))
            send(number, _END)
        except BaseException as error:
            send(number, _ERROR, (type(error).__name__, str(error)))
        finally:
            cancelled.discard(number)

    cancelled: set[int] = set()
    while True:
        try:
            number, what, *arguments = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        if what == "cancel":
            cancelled.add(number)
            engine.cancel(number)
        else:
            threading.Thread(target=run, args=(number, what, tuple(arguments)), daemon=True).start()
