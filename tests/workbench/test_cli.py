"""The command line: exit statuses for scripts."""

import json

import pytest

import workbench
from tests.workbench.small_models import random_prompt, save_llama
from workbench.cli.main import main
from workbench.faults import FaultyEngine
from workbench.faults.prompt_faults import off_by_one
from workbench.recording import Recording


def test_fetch_and_check_return_status_0(capsys):
    assert main(["fetch", "smollm2-135m"]) == 0
    assert "is ready in" in capsys.readouterr().out
    assert main(["check", "smollm2-135m", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.startswith("noise")


def test_bad_input_returns_status_2_and_a_one_line_error(capsys):
    for arguments in (
        ["fetch", "no-such-model"],
        ["check", "smollm2-135m", "--engine", "x"],
        ["check", "smollm2-135m", "--dtype", "int8"],
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("workbench: ")
        assert captured.err.count("\n") == 1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A prompt, its reference trace, a correct trace and a faulty one."""
    folder = tmp_path_factory.mktemp("files")
    model = save_llama(folder / "llama")
    random_prompt().save(folder / "p.json")
    arguments = ["--model", str(model.path), "--taps", "embed", "layers.*", "norm", "logits"]
    assert (
        main(
            [
                "trace",
                str(folder / "p.json"),
                *arguments,
                "--reference",
                "float32",
                "--out",
                str(folder / "ref.safetensors"),
            ]
        )
        == 0
    )
    assert main(["trace", str(folder / "p.json"), *arguments, "--out", str(folder / "run.safetensors")]) == 0
    faulty = FaultyEngine(workbench.open_engine("numba", model), off_by_one)
    faulty.trace(random_prompt(), ["embed", "layers.*", "norm", "logits"], path=folder / "bad.safetensors")
    return folder


def run(files, *arguments):
    return main(
        [
            str(files / part) if part.endswith((".json", ".safetensors", ".html")) or part == "llama" else part
            for part in arguments
        ]
    )


def test_lint_prints_findings_and_sets_the_exit_status(files, capsys):
    assert run(files, "lint", "p.json", "--target", "turbomind==0.18.0") == 0
    assert "computes this prompt unchanged" in capsys.readouterr().out
    assert run(files, "lint", "p.json", "--target", "lmdeploy-pytorch", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["findings"][-1]["code"]) == (False, "target-ignores")


def test_compare_prints_verdict_and_explanation(files, capsys):
    assert run(files, "compare", "ref.safetensors", "run.safetensors") == 0
    assert capsys.readouterr().out.startswith("noise: at most")
    assert (
        run(
            files,
            "compare",
            "ref.safetensors",
            "bad.safetensors",
            "--prompt",
            "p.json",
            "--model",
            "llama",
            "--html",
            "r.html",
        )
        == 1
    )
    out = capsys.readouterr().out
    assert out.startswith("bug at tap embed, token 4, span 0")
    assert "every row is 1 token too late: the range is off by one" in out
    assert "<!doctype html>" in (files / "r.html").read_text()
    assert run(files, "compare", "ref.safetensors", "bad.safetensors", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["first_divergence"]["tap"] == "embed"
    assert found["first_divergence_metrics"]["ulp"] > 1000
    assert found["logits"]["disagreements"]
    assert found["logits"]["agreement"]["1"] < 1
    assert {row["kind"] for row in found["spans"]} == {"text", "embeddings"}


def test_probe_passes_a_correct_engine(files, capsys):
    assert run(files, "probe", "p.json", "--model", "llama", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["passed"] for each in found["results"]] == [True] * 12


def test_recording_can_be_loaded_and_compared(files, capsys):
    arguments = [
        "--model",
        str(files / "llama"),
        "--engine",
        "numba",
        "--dtype",
        "bfloat16",
        "--out",
        str(files / "kept"),
        "--no-invalid-prompts",
    ]
    # The small model has no tokenizer, which is needed to store answers as text.
    assert main(["record", str(files / "p.json"), *arguments]) == 2
    assert "tokenizer" in capsys.readouterr().err
    ids = workbench.load_model("smollm2-135m").chat_ids("Hi")
    rows = workbench.load_model("smollm2-135m").token_rows(ids[3:6])
    workbench.Prompt(ids, [rows], [(3, 6)]).save(files / "hi.json")
    arguments[1] = "smollm2-135m"
    assert main(["record", str(files / "hi.json"), *arguments, "--taps", "layers.*", "norm"]) == 0
    kept = Recording.load(files / "kept")
    assert kept.compare().verdict == "noise"
    assert kept.record["answers"]["engine"]["status"] == "FINISH"
    assert kept.prompt.digest == kept.run.provenance["prompt"]
    modes = {file.name: file.stat().st_mode & 0o777 for file in (files / "kept").iterdir()}
    assert set(modes.values()) == {modes["record.json"]}, "all files of a recording have the same permissions"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lint", "gone.json"], "cannot be read as a prompt"),
        (["lint", "p.json", "--target", "llama.cpp"], "no rules for target"),
        (
            ["trace", "p.json", "--model", "llama", "--out", "x.safetensors", "--positions", "a:b"],
            "write a slice such as 0:40",
        ),
        (
            ["trace", "p.json", "--model", "llama", "--out", "x.safetensors", "--max-bytes", "10"],
            "do not fit into max_bytes",
        ),
        (["trace", "p.json", "--model", "llama", "--out", "x.safetensors", "--set", "pages"], "write NAME=VALUE"),
        (["trace", "p.json", "--model", "llama", "--out", "x.safetensors", "--set", "tp=2"], "tp"),
        (["compare", "run.safetensors", "ref.safetensors"], "record it with dtype='float64'"),
        (["compare", "ref.safetensors", "p.json"], "cannot be read as a trace"),
        (["compare", "ref.safetensors", "run.safetensors", "--floor", "run.safetensors"], "not a noise floor"),
        (["compare", "ref.safetensors", "run.safetensors", "--factor", "0.5"], "factor=0.5"),
        (["probe", "p.json", "--model", "llama", "--only", "luck"], "no probe 'luck'"),
        (["probe", "p.json", "--model", "llama", "--engine", "turbomind"], "lmdeploy is not installed"),
    ],
)
def test_bad_input_to_subcommands_is_reported_on_stderr(files, capsys, arguments, words):
    assert run(files, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("workbench: ")
    assert words in captured.err
