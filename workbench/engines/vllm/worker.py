"""The other side of `engine.py`: vLLM, run by the Python of its own environment, which has none of the project's packages.

Requests come over stdin and answers go over stdout (`wire.py`); whatever libraries print goes to stderr. vLLM runs in this process, so
that hooks can read its layers; one thread steps it, and requests are added between steps.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import sys
import threading
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before vllm is imported: in this process, no usage report, little text.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # its graphs run no hooks
    "TRITON_F32_DEFAULT": "ieee",  # else float32 attention on GPUs is TF32
    "HF_HUB_OFFLINE": "1",
}

import torch


def _load_wire() -> Any:
    """The file beside this folder, by its path: on the path of imports that folder would hide vLLM behind this package."""
    spec = importlib.util.spec_from_file_location("wire", Path(__file__).parents[1] / "wire.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


wire = _load_wire()


class Taps:
    """Hooks on a vLLM model that keep what its layers compute, while `recording`.

    vLLM's layers return what the MLP computed and the stream before it apart (`(mlp, residual)`), reuse their buffers, and also run
    in warm-up passes: so sums are taken here, results are copied, and nothing is kept unless a trace runs.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.recording: set[str] = set()
        self.kept: dict[str, list[torch.Tensor]] = {}
        self.scales: dict[int, float] = {}
        self.inner = getattr(model, "model", None)
        layers = getattr(self.inner, "layers", None)
        self.layers = list(layers) if layers is not None else []
        for number, layer in enumerate(self.layers):
            layer.register_forward_hook(self._after_layer(number), with_kwargs=True)
            if number == 0:
                layer.register_forward_pre_hook(self._before_first, with_kwargs=True)
            for part, name in (("attention", "self_attn"), ("mlp", "mlp")):
                if hasattr(layer, name):
                    getattr(layer, name).register_forward_hook(self._after_part(f"layers.{number}.{part}"))
        self.norm = getattr(self.inner, "norm", None)
        if self.norm is not None:  # the model around it is called past its hooks
            self.norm.register_forward_hook(self._after_part("norm"))

    def _keep(self, tap: str, state: Any) -> None:
        if tap in self.recording and isinstance(state, torch.Tensor):
            self.kept.setdefault(tap, []).append(state.detach().to("cpu", copy=True))

    def _before_first(self, module: Any, args: tuple, kwargs: dict) -> None:
        if self.recording:
            states = kwargs.get(
                "hidden_states",
                next((each for each in args if isinstance(each, torch.Tensor) and each.ndim == 2), None),
            )
            self._keep("embed", states)

    def _after_layer(self, number: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
            if number in self.scales:  # a planted fault
                output = (
                    (output[0] * self.scales[number], *output[1:])
                    if isinstance(output, tuple)
                    else output * self.scales[number]
                )
            if self.recording:
                both = isinstance(output, tuple) and len(output) == 2 and output[1] is not None
                state = output[0] + output[1] if both else output[0] if isinstance(output, tuple) else output
                self._keep(f"layers.{number}", state)
            return output

        return hook

    def _after_part(self, tap: str) -> Any:
        def hook(module: Any, args: tuple, output: Any) -> None:
            self._keep(tap, output[0] if isinstance(output, tuple) else output)

        return hook

    def taps(self) -> list[str]:
        """The names of everything that the hooks can keep, in order."""
        if not self.layers:
            return []
        each = [f"layers.{number}{part}" for number in range(len(self.layers)) for part in (".attention", ".mlp", "")]
        return ["embed", *each, *(("norm", "logits") if self.norm is not None else ())]


class StepFailed(Exception):
    """A step of vLLM's engine failed, which is not usable after that."""


@dataclass
class Asked:
    """A request that wants states or logits while it generates.

    Attributes:
        length: its prompt's tokens.
        every: whether the rows of all tokens are wanted, not only those from which a new one is chosen.
        states, logits: which of the two.
        rows: what the final norm returned for it, by position; a preempted request computes some again, which are the same.
        delivered: how many rows were delivered.
    """

    length: int
    every: bool
    states: bool
    logits: bool
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    delivered: int = 0

    def keep(self, first: int, rows: torch.Tensor) -> None:
        """Keep the rows that are wanted of those that begin at position `first`."""
        for position, row in enumerate(rows, first):
            if self.every or position >= self.length - 1:
                self.rows.setdefault(position, row)

    def take(self, tokens: int) -> torch.Tensor:
        """The rows that were not delivered yet, up to that from which generated token number `tokens` was chosen."""
        start = self.delivered + (0 if self.every else self.length - 1)
        stop = self.length - 1 + tokens
        self.delivered += stop - start
        return torch.stack([self.rows.pop(position) for position in range(start, stop)])


class Worker:
    """One vLLM engine and its requests."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**options)
        self.engine = self.llm.llm_engine
        self.dtype = getattr(torch, options["dtype"])
        found: list[Any] = self.llm.apply_model(lambda model: Taps(model))
        self.hooks: Taps = found[0]
        self.given: dict[str, int] = {}
        self.asked: dict[str, Asked] = {}
        self._follow(self.engine.model_executor.driver_worker.worker.model_runner)

    def _follow(self, runner: Any) -> None:
        """After each pass of the model, give the rows of the final norm to the requests that they belong to."""
        execute = runner.execute_model

        def follow(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.asked or self.hooks.recording:  # nobody asked, or a trace runs, alone
                return execute(scheduled, *args, **kwargs)
            self.hooks.recording, self.hooks.kept = {"norm"}, {}
            try:
                result = execute(scheduled, *args, **kwargs)
                if "norm" in self.hooks.kept:
                    self._share(runner.input_batch, scheduled.num_scheduled_tokens, torch.cat(self.hooks.kept["norm"]))
            finally:
                self.hooks.recording, self.hooks.kept = set(), {}
            return result

        runner.execute_model = follow

    def _share(self, batch: Any, counts: dict[str, int], rows: torch.Tensor) -> None:
        start = 0
        for place, name in enumerate(batch.req_ids):
            count = counts.get(name, 0)
            own, start = rows[start : start + count], start + count
            asked = self.asked.get(name.split("-")[0])
            if asked is None or not count:
                continue
            first = int(batch.num_computed_tokens_cpu[place])
            asked.keep(first, own)

    def states_of(self, answer: dict[str, Any], number: str) -> dict[str, torch.Tensor]:
        """What request `number` asked for of an answer's new tokens: `last_hidden_state` and `logits`, `[tokens, width]`; {} if nothing."""
        asked = self.asked.get(number)
        if asked is None or not answer["token_ids"]:
            return {}
        new = asked.take(answer["num_token"])
        found = {}
        if asked.states:
            found["last_hidden_state"] = new
        if asked.logits:
            found["logits"] = self.llm.apply_model(lambda model: model.compute_logits(new))[0]
        return found

    def add(self, number: int, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        from vllm import SamplingParams

        self.given[str(number)] = 0
        if fields.get("states") or fields.get("logits"):
            every = "all" in (fields.get("states"), fields.get("logits"))
            asked = Asked(len(fields["input_ids"]), every, bool(fields.get("states")), bool(fields.get("logits")))
            self.asked[str(number)] = asked
        self.engine.add_request(str(number), self._prompt(fields, tensors), SamplingParams(**fields["sampling"]))

    def _prompt(self, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        ids = list(fields["input_ids"])
        own: dict[str, Any] = {}
        if "cache_salt" in fields:
            own["cache_salt"] = fields["cache_salt"]
        if not fields["ranges"]:
            return {"prompt_token_ids": ids, **own}
        # As wide as they are given: what vLLM does with a wrong width is for it to show.
        rows = torch.zeros(len(ids), tensors["item.0"].shape[-1], dtype=self.dtype)
        is_token = torch.ones(len(ids), dtype=torch.bool)
        for item, (start, stop) in enumerate(fields["ranges"]):
            rows[start:stop] = tensors[f"item.{item}"].to(self.dtype)
            is_token[start:stop] = False
            ids[start:stop] = [0] * (stop - start)
        return {"prompt_token_ids": ids, "prompt_embeds": rows, "prompt_is_token_ids": is_token, **own}

    def drop(self, number: int) -> None:
        """Forget a request that has ended."""
        self.given.pop(str(number), None)
        self.asked.pop(str(number), None)

    def step(self) -> list[tuple[int, dict[str, Any], dict[str, torch.Tensor]]]:
        """Run one step; return for each request that got something its number, new tokens, and states."""
        answers = []
        for output in self.engine.step():
            new = output.outputs[0]
            before = self.given.get(output.request_id)
            if before is None:  # cancelled meanwhile
                continue
            tokens = list(new.token_ids)
            self.given[output.request_id] = len(tokens)
            answer: dict[str, Any] = {
                "token_ids": tokens[before:],
                "num_token": len(tokens),
                "finished": bool(output.finished),
                "reason": new.finish_reason,
                "cached": output.num_cached_tokens,
            }
            if new.logprobs is not None:
                answer["logprobs"] = [
                    {str(token): entry.logprob for token, entry in each.items()} for each in list(new.logprobs)[before:]
                ]
            answers.append((int(output.request_id), answer, self.states_of(answer, output.request_id)))
            if output.finished:
                self.drop(int(output.request_id))
        return answers

    def trace(self, number: int, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run a prompt alone and return its states at the taps."""
        length, taps = len(fields["input_ids"]), list(fields["taps"])
        self.hooks.kept, self.hooks.recording = {}, {*taps, *(["norm"] if "logits" in taps else [])}
        try:
            self.add(number, fields, tensors)
            while self.engine.has_unfinished_requests():
                try:
                    self.step()
                except Exception as error:
                    raise StepFailed(f"{type(error).__name__}: {error}") from error
            states = {tap: torch.cat(parts)[:length] for tap, parts in self.hooks.kept.items()}
        finally:
            self.hooks.recording, self.hooks.kept = set(), {}
            self.drop(number)
        if "logits" in taps:
            states["logits"] = self.llm.apply_model(lambda model: model.compute_logits(states["norm"]))[0]
        return {tap: states[tap] for tap in taps}


def main() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with messages
    sending = threading.Lock()

    def reply(number: int, kind: str, fields: dict[str, Any] | None = None, tensors: Any = None) -> None:
        with sending:
            wire.write_message(replies, {"number": number, "kind": kind, **(fields or {})}, tensors)

    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        while True:
            try:
                requests.put(wire.read_message(sys.stdin.buffer))
            except wire.WireError:
                os._exit(0)  # the parent is gone

    try:
        options, _ = wire.read_message(sys.stdin.buffer)
        worker = Worker(options)
        import vllm

        reply(
            0,
            "ready",
            {
                "version": vllm.__version__,
                "taps": worker.hooks.taps(),
                "device": str(worker.llm.llm_engine.vllm_config.device_config.device_type),
            },
        )
    except BaseException as error:
        traceback.print_exc()
        reply(0, "error", {"name": type(error).__name__, "text": str(error)})
        return
    threading.Thread(target=listen, daemon=True).start()
    waiting: list[Any] = []
    while True:
        idle = not worker.engine.has_unfinished_requests()
        if idle and not waiting:
            waiting.append(requests.get())
        while not requests.empty():
            waiting.append(requests.get())
        tracing = False
        for message in list(waiting):
            if not any(message is each for each in waiting):
                continue  # cancelled by a later message
            fields, tensors = message
            number, what = fields["number"], fields["what"]
            if what == "trace" and not idle:
                tracing = True
                continue  # traces run alone, when the running requests have ended
            if what == "generate" and tracing:
                continue  # and are not overtaken
            waiting[:] = [each for each in waiting if each is not message]
            try:
                if what == "cancel":
                    held = [each for each in waiting if each[0]["number"] == number and each[0]["what"] == "generate"]
                    waiting[:] = [each for each in waiting if not any(each is other for other in held)]
                    if held:
                        reply(number, "end")
                    elif str(number) in worker.given:
                        worker.engine.abort_request([str(number)])
                        worker.drop(number)
                        reply(number, "end")
                elif what == "scale layer":
                    worker.hooks.scales = {fields["layer"]: fields["factor"]} if fields["factor"] != 1 else {}
                    reply(number, "end")
                elif what == "trace":
                    reply(number, "states", tensors=worker.trace(number, fields, tensors))
                    reply(number, "end")
                else:
                    worker.add(number, fields, tensors)
                    idle = False
            except StepFailed as error:
                traceback.print_exc()
                reply(0, "dead", {"name": "in a trace", "text": str(error)})
                os._exit(70)
            except Exception as error:
                traceback.print_exc()
                worker.drop(number)
                reply(number, "error", {"name": type(error).__name__, "text": str(error)})
        if worker.engine.has_unfinished_requests():
            try:
                for number, answer, states in worker.step():
                    reply(number, "output", answer, states)
                    if answer["finished"]:
                        reply(number, "end")
            except Exception as error:  # vLLM's engine is not usable after an error inside a step
                traceback.print_exc()
                reply(0, "dead", {"name": type(error).__name__, "text": str(error)})
                os._exit(70)


if __name__ == "__main__":
    main()
