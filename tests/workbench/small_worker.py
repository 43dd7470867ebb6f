"""A worker for `WorkerEngine` whose "engine" counts: what goes wrong is chosen by its options."""

import importlib.util
import os
import sys
import time
from pathlib import Path

import torch

spec = importlib.util.spec_from_file_location("wire", Path(__file__).parents[2] / "workbench" / "engines" / "wire.py")
wire = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wire)

answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
options, _ = wire.read_message(sys.stdin.buffer)
print("starting", flush=True)
if options["fault"] == "no start":
    wire.write_message(answers, {"number": 0, "kind": "error", "name": "OSError", "text": "no such model"})
    sys.exit(1)
wire.write_message(answers, {"number": 0, "kind": "ready"})
while True:
    fields, tensors = wire.read_message(sys.stdin.buffer)
    number, what = fields["number"], fields["what"]
    if what == "cancel":
        continue
    if options["fault"] == "crash":
        print("segmentation fault ahead", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    if options["fault"] == "hang":
        time.sleep(1000)
    if options["fault"] == "garbage":
        answers.write(b"text that a library printed into the stream, longer than a header")
        answers.flush()
        time.sleep(1000)
    if options["fault"] == "error":
        wire.write_message(answers, {"number": number, "kind": "error", "name": "ValueError", "text": "not today"})
        continue
    if what == "trace":
        rows = len(fields["input_ids"]) - (options["fault"] == "short")
        states = {tap: torch.arange(rows).float()[:, None].expand(-1, 4).contiguous() for tap in fields["taps"]}
        wire.write_message(answers, {"number": number, "kind": "states"}, states)
    else:
        first = int(sum(float(each.sum()) for each in tensors.values())) + sum(fields["input_ids"])
        tokens = [first % 50, (first + 1) % 50, 2]
        for place, token in enumerate(tokens):
            last = place == len(tokens) - 1
            answer = {
                "token_ids": [token],
                "num_token": place + 1,
                "finished": last,
                "reason": "stop" if last else None,
            }
            wire.write_message(answers, {"number": number, "kind": "output", **answer})
    wire.write_message(answers, {"number": number, "kind": "end"})
