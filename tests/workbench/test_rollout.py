"""Log-probabilities that an engine reported: rounding, another meaning of the numbers, or a bug; files of five programs."""

import dataclasses
import json
import math

import pytest
import torch

import workbench
from tests.workbench.small_models import random_prompt, save_llama
from workbench import GenerationConfig, PromptError
from workbench.cli.main import main
from workbench.comparison.rollout import judge_rollout
from workbench.comparison.rollout_files import Rollout, read_rollouts, written


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def run_of(llama, dtype="float32", spliced=True, temperature=1.0, new=12):
    prompt = random_prompt(0, 30) if spliced else workbench.Prompt(range(5, 25))
    with workbench.open_engine("numba", llama, dtype=dtype) as engine:
        output = engine.generate(
            prompt, GenerationConfig(max_new_tokens=new, ignore_eos=True, logprobs=1, output_logits="generation")
        )
    logprobs = torch.log_softmax(output.logits.double() / temperature, dim=-1)
    chosen = [float(row[token]) for row, token in zip(logprobs, output.token_ids, strict=True)]
    return Rollout(prompt, tuple(output.token_ids), tuple(chosen), temperature), output.logits.double()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("spliced", [True, False])
def test_a_right_engine_is_noise(llama, dtype, spliced):
    run, _ = run_of(llama, dtype, spliced)
    found = judge_rollout(llama, run, dtype=dtype)
    assert found.verdict == "noise", str(found)
    assert not found.failed
    assert found.reads_as is None


def test_one_wrong_number_is_found_at_its_token(llama):
    run, _ = run_of(llama)
    wrong = list(run.logprobs)
    wrong[7] -= 0.01
    found = judge_rollout(llama, dataclasses.replace(run, logprobs=tuple(wrong)), dtype="float32")
    assert (found.verdict, found.first, found.failed) == ("bug", 7, True)
    assert "token 7 of 12 is the first that rounding does not explain" in str(found)
    assert "1 tokens are off" in str(found)


def test_a_wrong_prompt_is_a_bug_from_its_first_token(llama):
    run, _ = run_of(llama)
    moved = run.prompt.replace(embedding_ranges=[(start + 1, stop + 1) for start, stop in run.prompt.embedding_ranges])
    found = judge_rollout(llama, dataclasses.replace(run, prompt=moved), dtype="float32")
    assert (found.verdict, found.first) == ("bug", 0)


def test_other_meanings_of_the_numbers_are_named(llama):
    run, logits = run_of(llama, temperature=0.7)
    assert judge_rollout(llama, run, dtype="float32").verdict == "noise"
    tokens = torch.tensor(run.token_ids)
    rows = torch.arange(len(tokens))
    raw = torch.log_softmax(logits, dim=-1)[rows, tokens]
    scores = logits / 0.7
    best = scores.topk(5, dim=-1)
    kept = torch.full_like(scores, -torch.inf).scatter(-1, best.indices, best.values)
    renormalised = torch.log_softmax(kept, dim=-1)[rows, tokens]
    cases = (
        (raw, {}, "raw, before temperature 0.7"),
        (renormalised, {"top_k": 5}, "renormalised over the tokens that top_p=1, top_k=5 leave"),
        (torch.tensor(run.logprobs).roll(1), {}, "one token late"),
        (torch.tensor(run.logprobs).roll(-1), {}, "one token early"),
    )
    for numbers, settings, words in cases:
        changed = dataclasses.replace(run, logprobs=tuple(numbers.tolist()), **settings)
        found = judge_rollout(llama, changed, dtype="float32")
        assert found.verdict == "meaning", words
        assert words in str(found)
        assert found.failed


def test_files_of_several_programs_are_read(llama, tmp_path):
    run, _ = run_of(llama, spliced=False)
    ids, tokens, logprobs = list(run.prompt.input_ids), list(run.token_ids), list(run.logprobs)
    lines = [
        {"prompt_token_ids": ids, "token_ids": tokens, "logprobs": [{str(t): {"logprob": x, "rank": 1}} for t, x in zip(tokens, logprobs, strict=True)]},
        {"input_ids": ids, "output_ids": tokens, "output_token_logprobs": [[x, t, None] for t, x in zip(tokens, logprobs, strict=True)]},
        {"input_ids": ids, "token_ids": tokens, "logprobs": [{str(t): x} for t, x in zip(tokens, logprobs, strict=True)]},
        {"prompts": ids, "responses": tokens, "rollout_log_probs": logprobs},
        {"prompt_ids": ids, "completion_ids": tokens, "sampling_per_token_logps": logprobs, "temperature": 1.0},
    ]  # fmt: skip
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert all(
        (each.prompt.input_ids, each.token_ids, each.logprobs) == (tuple(ids), tuple(tokens), tuple(logprobs))
        for each in read_rollouts(path)
    )
    assert len(read_rollouts(path)) == 5
    path.write_text("\n".join(written([run])))
    assert read_rollouts(path)[0].logprobs == run.logprobs
    spliced, _ = run_of(llama)
    spliced.prompt.save(tmp_path / "prompt.json")
    path.write_text(
        json.dumps({"prompt": "prompt.json", "token_ids": list(spliced.token_ids), "logprobs": list(spliced.logprobs)})
    )
    assert judge_rollout(llama, read_rollouts(path)[0], dtype="float32").verdict == "noise"


def test_the_command_prints_a_line_per_run_and_fails_for_a_bug(llama, tmp_path, capsys):
    run, _ = run_of(llama, spliced=False)
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(written([run, dataclasses.replace(run, logprobs=(-9.0, *run.logprobs[1:]))])))
    assert main(["rollout", str(path), "--model", str(llama.path), "--dtype", "float32"]) == 1
    first, second = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("runs.jsonl, line 1: noise, at most")
    assert "runs.jsonl, line 2: token 0 of 12 is the first" in second
    path.write_text("\n".join(written([run])))
    assert main(["rollout", str(path), "--model", str(llama.path), "--dtype", "float32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "noise"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "has no runs"),
        ("{broken", "line 1 is not JSON"),
        ("[1]", "give an object"),
        ('{"token_ids": [1], "logprobs": [-1]}', "has none of prompt_token_ids"),
        ('{"prompt_ids": "text", "token_ids": [1], "logprobs": [-1]}', "give a list of token ids"),
        ('{"prompt_ids": [1], "token_ids": [1, 2], "logprobs": [-1]}', "has 2 tokens and 1 logprobs"),
        ('{"prompt_ids": [1], "token_ids": [1], "logprobs": [0.5]}', r"logprobs\[0\] is 0.5 for token 1"),
        ('{"prompt_ids": [1], "token_ids": [1], "logprobs": [NaN]}', r"logprobs\[0\] is nan"),
        ('{"prompt_ids": [1], "token_ids": [1], "logprobs": [true]}', r"logprobs\[0\] is True"),
        ('{"prompt_ids": [1], "token_ids": [1], "logprobs": [-1], "temperature": "hot"}', "temperature is 'hot'"),
        ('{"prompt": "missing.json", "token_ids": [1], "logprobs": [-1]}', "missing.json"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, line, words):
    path = tmp_path / "runs.jsonl"
    path.write_text(line)
    with pytest.raises(PromptError, match=words):
        read_rollouts(path)


def test_bad_runs_are_refused_by_name(llama):
    run, _ = run_of(llama, spliced=False, new=3)
    for change, words in (
        ({"temperature": 0.0}, "temperature=0, top_p=1: give a positive temperature"),
        ({"token_ids": (1, 2, 10**6)}, "token 1000000 is outside the vocabulary"),
        ({"logprobs": (-math.inf, -1.0, -1.0)}, None),
    ):
        changed = dataclasses.replace(run, **change)
        if words is None:
            assert judge_rollout(llama, changed, dtype="float32").first == 0
        else:
            with pytest.raises(PromptError, match=words):
                judge_rollout(llama, changed, dtype="float32")
    with pytest.raises(PromptError, match="cannot be read"):
        read_rollouts("/nowhere/runs.jsonl")
