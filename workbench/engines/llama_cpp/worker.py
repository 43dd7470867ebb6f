"""The other side of `engine.py`: llama.cpp by its Python binding, run by the Python of its own environment.

Requests come over stdin and answers go over stdout (`wire.py`), one at a time. A prompt is fed in runs of ids and runs of rows, as
llama.cpp takes them, with the position of every token set: a batch whose positions are unset computes garbage.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch


def _load_wire() -> Any:
    spec = importlib.util.spec_from_file_location("wire", Path(__file__).parents[1] / "wire.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


wire = _load_wire()
_F32, _F16 = 0, 1  # of ggml's types
_NAMES = {"result_norm": "norm", "result_output": "logits"}
_FIRST = "norm-0"  # computed from the embeddings; rows from outside are not computed, so the callback does not see them
_SOURCES = 152  # byte offset of `src` in `struct ggml_tensor`; checked by `_find_embeddings`
_PARTS = {"l_out": "", "attn_out": ".attention", "ffn_out": ".mlp"}


def _tap_of(name: str, last: int) -> str | None:
    """The tap that a tensor of llama.cpp's graph is, by its name: `l_out-3` is what layer 3 returns."""
    if name in _NAMES:
        return _NAMES[name]
    part, _, number = name.rpartition("-")
    return f"layers.{number}{_PARTS[part]}" if part in _PARTS and number.isdecimal() and int(number) <= last else None


class Worker:
    """One model and its context."""

    def __init__(self, options: dict[str, Any]) -> None:
        import llama_cpp

        self.lib = llama_cpp
        self.base = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base*"))))
        self.base.ggml_get_name.restype = ctypes.c_char_p
        for name in ("ggml_nbytes", "ggml_nelements"):
            getattr(self.base, name).restype = ctypes.c_size_t
        self.base.ggml_is_contiguous.restype = ctypes.c_bool
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        # Weights in their own layout: with q8_0 and q4_0 in that of `CPU_REPACK`, 0.3.36 crashes on a step of three tokens.
        loading.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(options["path"].encode(), loading)
        if not self.model:
            raise OSError(f"llama.cpp cannot load {options['path']}")
        self.layers = llama_cpp.llama_model_n_layer(self.model)
        self.hidden = llama_cpp.llama_model_n_embd(self.model)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = options["context"] * options["sequences"]
        params.n_seq_max = options["sequences"]
        params.n_batch = params.n_ubatch = options["batch"]
        params.n_threads = params.n_threads_batch = options["threads"]
        params.flash_attn_type = 1 if options["flash_attention"] else 0
        params.type_k = params.type_v = _F16 if options["flash_attention"] else _F32
        params.kv_unified = True
        self.wanted: set[str] = set()
        self.begun = False
        self.kept: dict[str, list[torch.Tensor]] = {}
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._seen)
        params.cb_eval = self.callback
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise MemoryError(f"llama.cpp cannot make a context of {params.n_ctx} tokens")
        self.batch = options["batch"]
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.shows_embeddings = self._find_embeddings()

    def _find_embeddings(self) -> bool:
        """Whether the embeddings can be read: whether a row that is handed over comes back unchanged."""
        row = np.linspace(-1, 1, self.hidden, dtype=np.float32)[None]
        self.wanted, self.kept, self.begun = {"embed"}, {}, False
        self.feed(0, 0, None, row)
        found = self._states().get("embed")
        self.lib.llama_memory_seq_rm(self.memory, 0, -1, -1)
        return found is not None and bool((found.numpy() == row).all())

    def _seen(self, tensor: int, ask: bool, data: int) -> bool:
        """Called by llama.cpp before (`ask`) and after each tensor of the graph is computed."""
        pointer = ctypes.c_void_p(tensor)
        name = self.base.ggml_get_name(pointer).decode(errors="replace")
        tap: str | None = _tap_of(name, self.layers - 1)
        if name == _FIRST and "embed" in self.wanted and not self.begun:
            tap = "embed"
        if tap not in self.wanted:
            return not ask  # not interested; or go on
        if ask:
            return True
        if tap == "embed":
            self.begun = True  # the layer has a second norm of this name
            pointer = ctypes.c_void_p(ctypes.c_void_p.from_address(tensor + _SOURCES).value)
        count, size = self.base.ggml_nelements(pointer), self.base.ggml_nbytes(pointer)
        if size == 4 * count and self.base.ggml_is_contiguous(pointer):
            values = np.empty(count, np.float32)
            self.base.ggml_backend_tensor_get(
                pointer, ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(0), ctypes.c_size_t(size)
            )
            self.kept.setdefault(str(tap), []).append(torch.from_numpy(values))
        return True

    def feed(self, sequence: int, start: int, ids: list[int] | None, rows: np.ndarray | None) -> None:
        """Decode a run of ids or of rows that begins at position `start` of a sequence; logits of every token are computed."""
        length = len(ids) if ids is not None else len(rows)  # type: ignore[arg-type]
        for first in range(0, length, self.batch):
            stop = min(first + self.batch, length)
            self.begun = False
            batch = self.lib.llama_batch_init(stop - first, 0 if ids is not None else self.hidden, 1)
            try:
                batch.n_tokens = stop - first
                if rows is not None:
                    part = np.ascontiguousarray(rows[first:stop], np.float32)
                    ctypes.memmove(batch.embd, part.ctypes.data, part.nbytes)
                for place in range(stop - first):
                    if ids is not None:
                        batch.token[place] = ids[first + place]
                    batch.pos[place] = start + first + place
                    batch.n_seq_id[place] = 1
                    batch.seq_id[place][0] = sequence
                    batch.logits[place] = 1
                status = self.lib.llama_decode(self.context, batch)
            finally:
                self.lib.llama_batch_free(batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status} for tokens {start + first} to {start + stop}")

    def run(
        self, sequence: int, fields: dict[str, Any], tensors: dict[str, torch.Tensor], taps: list[str]
    ) -> dict[str, torch.Tensor]:
        """Run a prompt in an empty sequence and return `[seq, width]` at each tap."""
        self.lib.llama_memory_seq_rm(self.memory, sequence, -1, -1)
        self.wanted, self.kept = set(taps), {}
        ids, done = fields["input_ids"], 0
        for item, (start, stop) in enumerate(fields["ranges"]):
            if start > done:
                self.feed(sequence, done, ids[done:start], None)
            self.feed(sequence, start, None, tensors[f"item.{item}"].float().numpy())
            done = stop
        if done < len(ids):
            self.feed(sequence, done, ids[done:], None)
        return self._states()

    def _states(self) -> dict[str, torch.Tensor]:
        widths = {"logits": self.vocab}
        found = {tap: torch.cat(parts).view(-1, widths.get(tap, self.hidden)) for tap, parts in self.kept.items()}
        self.wanted, self.kept = set(), {}
        return found

    def step(self, sequence: int, position: int, token: int) -> dict[str, torch.Tensor]:
        """Run one generated token."""
        self.wanted, self.kept = {"norm", "logits"}, {}
        self.feed(sequence, position, [token], None)
        return self._states()

    def taps(self) -> list[str]:
        each = [f"layers.{number}{part}" for number in range(self.layers) for part in (".attention", ".mlp", "")]
        return [*(["embed"] if self.shows_embeddings else []), *each, "norm", "logits"]


def main() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with messages

    def reply(number: int, kind: str, fields: dict[str, Any] | None = None, tensors: Any = None) -> None:
        wire.write_message(replies, {"number": number, "kind": kind, **(fields or {})}, tensors)

    try:
        options, _ = wire.read_message(sys.stdin.buffer)
        worker = Worker(options)
        reply(0, "ready", {"version": worker.lib.__version__, "taps": worker.taps(), "vocab": worker.vocab})
    except BaseException as error:
        traceback.print_exc()
        reply(0, "error", {"name": type(error).__name__, "text": str(error)})
        return
    while True:
        try:
            fields, tensors = wire.read_message(sys.stdin.buffer)
        except wire.WireError:
            os._exit(0)  # the parent is gone
        number, what = fields["number"], fields["what"]
        try:
            if what == "trace":
                reply(number, "states", tensors=worker.run(0, fields, tensors, fields["taps"]))
            elif what == "prefill":
                states = worker.run(fields["sequence"], fields, tensors, ["norm", "logits"])
                kept = slice(None) if fields["every"] else slice(-1, None)
                reply(number, "states", tensors={name: value[kept].contiguous() for name, value in states.items()})
            elif what == "decode":
                reply(number, "states", tensors=worker.step(fields["sequence"], fields["position"], fields["token"]))
            elif what == "free":
                worker.lib.llama_memory_seq_rm(worker.memory, fields["sequence"], -1, -1)
            if what != "cancel":
                reply(number, "end")
        except Exception as error:
            traceback.print_exc()
            reply(number, "error", {"name": type(error).__name__, "text": str(error)})


if __name__ == "__main__":
    main()
