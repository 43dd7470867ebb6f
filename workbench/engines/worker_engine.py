"""An engine that runs in another environment: its worker is a program of that environment, and messages cross by pipes (`wire.py`)."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import secrets
import subprocess
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from ..errors import EngineDied, ModelError, reason
from ..models import Model
from ..prompt import Prompt
from .base import Engine, Sink
from .cancellation import Cancellation
from .process_engine import describe_exit
from .types import EngineOutput, GenerationConfig, ResponseType
from .wire import WireError, read_message, write_message

_CLEAN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
"""Variables of this environment that would change what the other Python imports."""
Message = tuple[dict[str, Any], dict[str, torch.Tensor]]


class WorkerEngine(Engine):
    """The part of such engines that is the same for all: process, messages, time limits.

    Args:
        kind: the engine's kind, for messages.
        python: the Python of its environment.
        worker: the program to run.
        options: sent to it first.
        patience: seconds without any message from a worker that has work, after which it counts as hung and is killed.
        start_patience: the same while it starts and loads the model.

    Raises:
        ModelError: the worker cannot open the model.
        EngineDied: it ended, or did not answer in time.
    """

    def __init__(
        self,
        kind: str,
        model: Model,
        python: Path,
        worker: Path,
        options: dict[str, Any],
        *,
        patience: float,
        start_patience: float,
    ) -> None:
        super().__init__()
        if not patience > 0:
            raise ValueError(f"patience={patience}: give a positive number of seconds")
        self.kind, self.model, self.patience = kind, model, patience
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed with the engine
        self._process = subprocess.Popen(
            [str(python), "-P", str(worker)],  # its folder is not searched for modules
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={name: value for name, value in os.environ.items() if name not in _CLEAN},
            start_new_session=True,  # an interrupted notebook cell must not interrupt it
        )
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._heard = time.monotonic()
        self._numbers = itertools.count(1)
        self._dead = ""
        opened: queue.Queue[Message] = queue.Queue()
        self._channels: dict[int, queue.Queue[Message]] = {0: opened}
        self._reader = threading.Thread(target=self._read, name=f"workbench-{kind}", daemon=True)
        self._reader.start()
        try:
            self._send(options)
            self.ready, _ = self._wait(opened, start_patience, "while it opened the model")
        except BaseException:
            self.close()
            raise

    def _release(self) -> None:
        self._process.kill()
        self._process.wait(30)
        self._reader.join(10)
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was not sent yet cannot be sent any more
                    stream.close()

    def _send(self, fields: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
        try:
            with self._sending:
                write_message(cast(BinaryIO, self._process.stdin), fields, tensors)
        except WireError:  # the process is gone; the reader reports it to every request
            pass

    def _read(self) -> None:
        while True:
            try:
                fields, tensors = read_message(cast(BinaryIO, self._process.stdout))
                self._heard = time.monotonic()
            except Exception:  # the process is gone or sends garbage: no request may wait forever
                break
            if fields.get("kind") == "dead":
                self._dead = f"{self.kind} failed inside a step ({fields.get('name')}: {fields.get('text')}) and its process ended"
                break
            channel = self._channels.get(fields.get("number", -1))
            if channel is not None:
                channel.put((fields, tensors))
        self._process.kill()
        code = self._process.wait(30)
        with self._lock:
            how = "was closed" if self.closed else describe_exit(code)
            self._dead = (
                f"{self._dead or f'the process of {self.kind} {how}'}{self._last_words()}: open the engine again"
            )
            waiting = list(self._channels.values())
        for channel in waiting:
            channel.put(({"kind": "gone"}, {}))

    def _last_words(self) -> str:
        """The last line that the process printed, for messages."""
        try:
            self._log.seek(0, os.SEEK_END)
            self._log.seek(max(0, self._log.tell() - 4000))
            lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        except (OSError, ValueError):
            return ""
        return f" (it last said: {lines[-1].strip()[:300]})" if lines else ""

    def _wait(self, channel: queue.Queue[Message], patience: float, when: str) -> Message:
        """Return the next message of a request.

        Raises:
            ModelError: the worker reports an error. EngineDied: it is gone, or silent for too long.
        """
        asked = time.monotonic()
        while True:
            # A request may wait for others, which are answered meanwhile: only a worker that answers nobody is hung.
            left = max(self._heard, asked) + patience - time.monotonic()
            try:
                fields, tensors = channel.get(timeout=max(left, 0.01))
                break
            except queue.Empty:
                if max(self._heard, asked) + patience > time.monotonic():
                    continue
                with self._lock:
                    self._dead = self._dead or f"{self.kind} did not answer for {patience:g} s {when} and was killed"
                self._process.kill()
                raise EngineDied(
                    f"{self._dead}: open the engine again, with a larger patience if it only was slow"
                ) from None
        if fields["kind"] == "gone":
            raise EngineDied(self._dead)
        if fields["kind"] == "error":
            raise ModelError(f"{self.kind} failed {when}: {fields['name']}: {reason(ModelError(fields['text']))}")
        return fields, tensors

    def _request(self, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[int, queue.Queue[Message]]:
        channel: queue.Queue[Message] = queue.Queue()
        with self._lock:
            if self._dead:
                raise EngineDied(self._dead)
            number = next(self._numbers)
            self._channels[number] = channel
        self._send({"number": number, **fields}, tensors)
        return number, channel

    def _messages(self, channel: queue.Queue[Message], when: str) -> Iterator[Message]:
        while True:
            message = self._wait(channel, self.patience, when)
            if message[0]["kind"] == "end":
                return
            yield message

    def ask(self, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Send one request and return the tensors of its last answer.

        Raises:
            ModelError: the worker reports an error. EngineDied: it is gone, or hung.
        """
        number, channel = self._request(fields, tensors)
        found: dict[str, torch.Tensor] = {}
        try:
            for _, states in self._messages(channel, "while it ran"):
                found = states
        finally:
            self._channels.pop(number, None)
        return found

    def request_fields(self, prompt: Prompt) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """A prompt as fields and tensors of a message."""
        # Copies: safetensors refuses tensors that share memory, as one image that is used twice does.
        items = {f"item.{number}": rows.detach().clone() for number, rows in enumerate(prompt.input_embeddings)}
        ranges = [list(pair) for pair in prompt.embedding_ranges]
        return {"input_ids": list(prompt.input_ids), "ranges": ranges}, items

    def sampling(self, config: GenerationConfig) -> dict[str, Any]:
        """The engine's own settings for a configuration.

        Raises:
            PromptError: it cannot do what is asked.
        """
        raise NotImplementedError

    def run_generation(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> Generator[EngineOutput, None, None]:
        stops = {*(config.stop_token_ids or ()), *(() if config.ignore_eos else self.model.stop_token_ids)}
        only_states = config.max_new_tokens == 0
        if only_states and not (config.output_logits or config.output_last_hidden_state):
            yield EngineOutput(ResponseType.FINISH)
            return
        fields, tensors = self.request_fields(prompt)
        asked = {"logits": config.output_logits, "states": config.output_last_hidden_state}
        if "all" in asked.values():
            fields |= {"cache_salt": secrets.token_hex(8)}  # rows that a prefix cache has are not computed again
        number, channel = self._request(
            {"what": "generate", "sampling": self.sampling(config), **asked, **fields}, tensors
        )
        cancelled.add_callback(lambda: self._send({"number": number, "what": "cancel"}))
        done = False
        try:
            for answer, states in self._messages(channel, "while it generated"):
                done = done or answer["finished"]
                output = _output(answer, states, stops)
                if only_states:  # one token was generated to run the prompt
                    yield EngineOutput(
                        ResponseType.FINISH, logits=output.logits, last_hidden_state=output.last_hidden_state
                    )
                    return
                yield output
        finally:
            if not done:
                self._send({"number": number, "what": "cancel"})
            self._channels.pop(number, None)

    def run_trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor, sink: Sink) -> None:
        fields, tensors = self.request_fields(prompt)
        settings = self.sampling(GenerationConfig(max_new_tokens=1))
        number, channel = self._request(
            {"what": "trace", "taps": taps, "sampling": settings, "cache_salt": secrets.token_hex(8), **fields}, tensors
        )
        try:
            for _, states in self._messages(channel, "while it traced"):
                for tap in taps:
                    if tap not in states or len(states[tap]) != len(prompt):
                        found = "nothing" if tap not in states else f"{len(states[tap])} rows"
                        raise ModelError(f"{self.kind} returned {found} at {tap} for {len(prompt)} tokens")
                    sink(tap, states[tap][positions].to(self.dtype))
        finally:
            self._channels.pop(number, None)


def _output(answer: dict[str, Any], states: dict[str, torch.Tensor], stops: set[int]) -> EngineOutput:
    tokens, logprobs, count = answer["token_ids"], answer.get("logprobs"), answer["num_token"]
    if answer["finished"] and tokens and tokens[-1] in stops and answer["reason"] == "stop":
        tokens, count = tokens[:-1], count - 1
        logprobs = logprobs[:-1] if logprobs is not None else None
    return EngineOutput(
        ResponseType.FINISH if answer["finished"] else ResponseType.SUCCESS,
        tokens,
        count,
        None if logprobs is None else [{int(token): value for token, value in each.items()} for each in logprobs],
        states["logits"].float() if "logits" in states else None,
        states.get("last_hidden_state"),
    )
