"""An engine in a separate process: the notebook's kernel survives a crash there."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Generator, Iterator
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..errors import EmbeddingRangeError, EngineDied, ModelError, PromptError, TraceError
from ..models import Model
from ..prompt import Prompt
from .base import Engine, Sink
from .cancellation import Cancellation
from .types import Capabilities, EngineOutput, GenerationConfig

_ERRORS: dict[str, type[Exception]] = {
    each.__name__: each for each in (EmbeddingRangeError, PromptError, ModelError, TraceError, ValueError, TypeError)
}
_UNGUARDED = (
    "isolated=True starts a new process, which imports your script and would open the engine again: put the script's code under "
    '`if __name__ == "__main__":`'
)
_END, _OUTPUT, _STATE, _ERROR, _READY = range(5)


class ProcessEngine(Engine):
    """Any engine of `open_engine`, opened in a child process.

    Requests run there concurrently, one thread per request. If the process dies, every running and every later request raises
    EngineDied, whose message names the signal or exit code.

    Args:
        kind, options: as for `open_engine`.
        engine_class: module and name of the class to open.

    Raises:
        ModelError, ValueError, TypeError: the engine cannot be opened in the child process.
        EngineDied: the process ended while the engine was being opened.
    """

    def __init__(self, kind: str, engine_class: tuple[str, str], model: Model, **options: Any) -> None:
        super().__init__()
        if getattr(
            multiprocessing.current_process(), "_inheriting", False
        ):  # a child that is importing its parent's script
            raise ModelError(_UNGUARDED)
        self.model, self.kind = model, kind
        self._checks = bool(options.get("check", True))
        context = multiprocessing.get_context("spawn")  # a forked CUDA context does not work
        self._pipe, child_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(child_end, engine_class, model, options), daemon=True)
        self._process.start()
        child_end.close()
        self._send_lock, self._state_lock = threading.Lock(), threading.Lock()
        self._channels: dict[int, queue.SimpleQueue[tuple[int, Any]]] = {}
        self._numbers, self._dead = 0, ""
        opened: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._channels[0] = opened
        self._reader = threading.Thread(target=self._read, name="workbench-child", daemon=True)
        self._reader.start()
        kind_of, value = opened.get()
        if kind_of == _ERROR:
            self.close()
            if isinstance(value, EngineDied):
                raise EngineDied(
                    f'{value}. A script must open it under `if __name__ == "__main__":` (messages of the process are above)'
                )
            raise value
        self._capabilities, self.dtype, self.device = value

    @property
    def capabilities(self) -> Capabilities:
        found: Capabilities = self._capabilities
        return found

    def check(self, prompt: Prompt, new_tokens: int = 0) -> None:
        """See `Engine.check`; checks of the engine's own class run in its process. With the option `check=False` nothing is checked."""
        if self._checks:
            super().check(prompt, new_tokens)

    def _release(self) -> None:
        """Terminate the process; running requests raise EngineDied."""
        self._process.terminate()
        self._reader.join(15)
        if self._process.is_alive():
            self._process.kill()
            self._reader.join(5)
        self._pipe.close()

    def run_generation(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> Generator[EngineOutput, None, None]:
        number, channel = self._start_request("generate", prompt, config)
        cancelled.add_callback(lambda: self._send((number, "cancel")))
        try:
            yield from _results(channel)
        finally:
            self._send((number, "cancel"))
            self._channels.pop(number, None)

    def run_trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor, sink: Sink) -> None:
        number, channel = self._start_request("trace", prompt, taps, positions)
        try:
            for tap, state in _results(channel):
                sink(tap, state)
        finally:
            self._channels.pop(number, None)

    def _start_request(self, what: str, *arguments: Any) -> tuple[int, queue.SimpleQueue[tuple[int, Any]]]:
        channel: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        with self._state_lock:
            if self._dead:
                raise EngineDied(self._dead)
            self._numbers += 1
            number = self._numbers
            self._channels[number] = channel
        self._send((number, what, *arguments))
        return number, channel

    def _send(self, message: tuple) -> None:
        try:
            with self._send_lock:
                self._pipe.send_bytes(pickle.dumps(message))
        except (OSError, ValueError):  # the process is gone; the reader reports it to every request
            pass

    def _read(self) -> None:
        while True:
            try:
                number, kind, value = pickle.loads(self._pipe.recv_bytes())
            except Exception:  # the process is gone or sends garbage: no request may wait forever
                break
            if kind == _ERROR:
                name, text = value
                value = _ERRORS[name](text) if name in _ERRORS else ModelError(f"{name}: {text}")
            channel = self._channels.get(number)
            if channel is not None:
                channel.put((kind, value))
        self._process.join(5)
        with self._state_lock:
            how = "was closed" if self._closed else describe_exit(self._process.exitcode)
            self._dead = f"the {self.kind} engine's process {how}: open the engine again"
            waiting = list(self._channels.values())
        for channel in waiting:
            channel.put((_ERROR, EngineDied(self._dead)))


def _results(channel: queue.SimpleQueue[tuple[int, Any]]) -> Iterator[Any]:
    """Yield what the child sends for one request until it ends; raise its error."""
    while True:
        kind, value = channel.get()
        if kind == _END:
            return
        if kind == _ERROR:
            raise value
        yield value


def describe_exit(code: int | None) -> str:
    """How a process ended, by its exit code, in words; None: it has not."""
    if code is None:
        return "does not respond"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}" + (
            ", typical of a crash in native code" if -code in (signal.SIGSEGV, signal.SIGABRT) else ""
        )
    return f"exited with code {code}"


def _serve(pipe: Connection, engine_class: tuple[str, str], model: Model, options: dict[str, Any]) -> None:
    """Run in the child: open the engine, then serve each request in a thread."""
    sending = threading.Lock()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent handles an interrupted notebook cell

    def send(number: int, what: int, value: Any = None) -> None:
        message = pickle.dumps((number, what, value))
        try:
            with sending:
                pipe.send_bytes(message)
        except OSError:  # the parent is gone
            os._exit(0)

    try:
        module, name = engine_class
        engine: Engine = getattr(import_module(module), name)(model, **options)
        send(0, _READY, (engine.capabilities, engine.dtype, engine.device))
    except BaseException as error:
        send(0, _ERROR, (type(error).__name__, str(error)))
        return

    def run(number: int, what: str, arguments: tuple) -> None:
        try:
            if what == "generate":
                prompt, config = arguments
                stream = engine.stream(prompt, config, session_id=number)
                if number in cancelled:  # cancelled before the engine had the request
                    engine.cancel(number)
                for output in stream:
                    send(number, _OUTPUT, output)
            else:
                prompt, taps, positions = arguments
                engine.check(prompt)
                engine.run_trace(prompt, taps, positions, lambda tap, state: send(number, _STATE, (tap, state.cpu())))
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
