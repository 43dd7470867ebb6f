"""One engine of the benchmark of CPU engines, each as its own users run it: `python cpu_worker.py KIND MODEL DTYPE THREADS [GGUF TABLE]`.

Runs in the environment of its engine, so it imports nothing of the workbench unless that is the engine. It reads jobs as lines of JSON,
`{"requests": n, "tokens": t, "rows": r, "new": k, "seed": s}`, and answers each with its seconds. Prompts are the same for all engines:
random ids, in which `r` random rows are spliced from a quarter of the prompt on.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Request = tuple[list[int], np.ndarray, tuple[int, int]]
"""Ids, rows float32 `[rows, hidden]`, and the half-open range that the rows take."""
Run = Callable[[list[Request], int], list[int]]
"""Generates so many tokens for each request; returns how many there were."""


def requests_of(job: dict[str, int], vocab: int, hidden: int) -> list[Request]:
    """The prompts of a job."""
    generator = np.random.default_rng(job["seed"])
    made = []
    for _ in range(job["requests"]):
        ids = generator.integers(10, vocab - 10, job["tokens"]).tolist()
        rows = (generator.standard_normal((job["rows"], hidden)) * 0.1).astype(np.float32)
        start = job["tokens"] // 4
        made.append((ids, rows, (start, start + job["rows"])))
    return made


def numba_engine(model_name: str, dtype: str, threads: int, *_: str) -> tuple[Run, int, int]:
    """The workbench's own engine, all requests at once by its asynchronous interface."""
    import asyncio

    import torch

    from workbench.engines import open_engine
    from workbench.engines.types import GenerationConfig
    from workbench.models import load_model
    from workbench.prompt import Prompt

    model = load_model(model_name)
    packed = {"packed_decode": True} if dtype == "bfloat16" else {}
    engine = open_engine("numba", model, dtype=dtype, enable_prefix_caching=False, max_batch_size=64, **packed)

    def run(batch: list[Request], new: int) -> list[int]:
        config = GenerationConfig(max_new_tokens=new, ignore_eos=True)

        async def one(ids: list[int], rows: np.ndarray, pair: tuple[int, int]) -> int:
            made = 0
            async for output in engine.async_stream(Prompt(ids, [torch.from_numpy(rows)], [pair]), config):
                made = output.num_token
            return made

        async def every() -> list[int]:
            return list(await asyncio.gather(*(one(*request) for request in batch)))

        return asyncio.run(every())

    return run, model.text_config.vocab_size, model.text_config.hidden_size


def transformers(model_name: str, dtype: str, threads: int, *_: str) -> tuple[Run, int, int]:
    """Transformers' `generate` on the whole batch; prompts are equally long, so nothing is padded."""
    import torch

    import workbench.models  # noqa: F401  # before Transformers: it makes torchvision importable beside a CPU build of torch

    torch.set_num_threads(threads)
    from transformers import AutoModelForCausalLM

    network: Any = AutoModelForCausalLM.from_pretrained(model_name, dtype=getattr(torch, dtype)).eval()
    table = network.get_input_embeddings()

    @torch.no_grad()
    def run(batch: list[Request], new: int) -> list[int]:
        embedded = []
        for ids, rows, (start, stop) in batch:
            states = table(torch.tensor(ids)).clone()
            states[start:stop] = torch.from_numpy(rows).to(states.dtype)
            embedded.append(states)
        states = torch.stack(embedded)
        out = network.generate(
            inputs_embeds=states, attention_mask=torch.ones(states.shape[:2], dtype=torch.long), max_new_tokens=new,
            min_new_tokens=new, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        return [out.shape[1]] * len(batch)

    return run, network.config.vocab_size, network.config.hidden_size


def vllm(model_name: str, dtype: str, threads: int, *_: str) -> tuple[Run, int, int]:
    """vLLM's offline interface, with prompt embeddings of which only the marked positions are used."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        model_name, enable_prompt_embeds=True, dtype=dtype, enforce_eager=True, max_model_len=2048, enable_prefix_caching=False,
        max_num_seqs=64,
    )  # fmt: skip
    config = llm.llm_engine.model_config.hf_text_config

    def run(batch: list[Request], new: int) -> list[int]:
        prompts = []
        for ids, rows, (start, stop) in batch:
            embeds = torch.zeros(len(ids), rows.shape[1])
            embeds[start:stop] = torch.from_numpy(rows)
            is_token = torch.ones(len(ids), dtype=torch.bool)
            is_token[start:stop] = False
            embeds = embeds.to(getattr(torch, dtype))
            prompts.append({"prompt_token_ids": ids, "prompt_embeds": embeds, "prompt_is_token_ids": is_token})
        sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    return run, config.vocab_size, config.hidden_size


def llama_cpp(model_name: str, dtype: str, threads: int, gguf: str, table_path: str) -> tuple[Run, int, int]:
    """llama.cpp's C interface: rows of each prompt (looked up outside), then one token of every request per call."""
    import llama_cpp as api

    api.llama_backend_init()
    quiet = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    weights = api.llama_model_load_from_file(gguf.encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 64 * 256, 2048, 512, 64
    params.n_threads = params.n_threads_batch = threads
    params.kv_unified = True
    context = api.llama_init_from_model(weights, params)
    memory = api.llama_get_memory(context)
    table = np.load(table_path)
    vocab, hidden = table.shape

    def feed(tokens: Any, sequences: list[int], positions: list[int], wanted: list[bool]) -> list[int]:
        """One pass over ids, or over rows `[n, hidden]`; the likeliest next token of the wanted ones."""
        count, embedded = len(tokens), isinstance(tokens, np.ndarray)
        batch = api.llama_batch_init(count, hidden if embedded else 0, 1)
        batch.n_tokens = count
        if embedded:
            ctypes.memmove(batch.embd, np.ascontiguousarray(tokens, np.float32).ctypes.data, count * hidden * 4)
        for place in range(count):
            if not embedded:
                batch.token[place] = tokens[place]
            batch.pos[place], batch.n_seq_id[place] = positions[place], 1
            batch.seq_id[place][0], batch.logits[place] = sequences[place], wanted[place]
        if api.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        best = [
            int(np.ctypeslib.as_array(api.llama_get_logits_ith(context, place), (vocab,)).argmax())
            for place in range(count)
            if wanted[place]
        ]
        api.llama_batch_free(batch)
        return best

    def run(batch: list[Request], new: int) -> list[int]:
        api.llama_memory_clear(memory, True)
        last: list[int] = []
        for sequence, (ids, rows, (start, stop)) in enumerate(batch):
            states = table[ids].copy()
            states[start:stop] = rows
            count = len(ids)
            last += feed(states, [sequence] * count, list(range(count)), [False] * (count - 1) + [True])
        length, made = len(batch[0][0]), 1
        while made < new:
            last = feed(last, list(range(len(batch))), [length + made - 1] * len(batch), [True] * len(batch))
            made += 1
        return [made] * len(batch)

    run.quiet = quiet  # type: ignore[attr-defined]  # llama.cpp calls it as long as it runs
    return run, vocab, hidden


ENGINES: dict[str, Callable[..., tuple[Run, int, int]]] = {
    "numba": numba_engine,
    "transformers": transformers,
    "vllm": vllm,
    "llama-cpp": llama_cpp,
}


def main() -> None:
    """Open the engine that the command line names and serve jobs until standard input ends."""
    sys.path.remove(str(Path(__file__).resolve().parent))  # the modules beside this one are not what the engines mean
    kind, model, dtype, threads, *rest = sys.argv[1:]
    run, vocab, hidden = ENGINES[kind](model, dtype, int(threads), *rest)
    print("READY", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        batch = requests_of(job, vocab, hidden)
        started = time.perf_counter()
        made = run(batch, job["new"])
        seconds = time.perf_counter() - started
        if made != [job["new"]] * len(batch):
            raise RuntimeError(f"{kind} generated {made} tokens instead of {job['new']} each")
        print("RESULT " + json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
