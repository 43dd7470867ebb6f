"""Input that once crashed, was silently misread, or raised something raw."""

import json
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import workbench
from tests.workbench.small_models import random_prompt, save_llama
from workbench import (
    EmbeddingRangeError,
    GenerationConfig,
    ModelError,
    Prompt,
    PromptError,
    ResponseType,
    Span,
    TraceError,
)
from workbench.comparison import check_engine

KINDS = ["numba", "transformers"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=KINDS)
def engine(request, model):
    return workbench.open_engine(request.param, model)


def test_arrays_and_tensors_give_the_same_prompt_as_lists():
    rows = torch.randn(2, 3, 48)
    plain = Prompt([5, 6, 7, 8, 9, 10], [rows[0], rows[1]], [(0, 3), (3, 6)])
    for ids, items, ranges in (
        (np.array(plain.input_ids), rows, np.array([[0, 3], [3, 6]])),
        (torch.tensor(plain.input_ids), rows, torch.tensor([[0, 3], [3, 6]])),
    ):
        assert Prompt(ids, items, ranges).digest == plain.digest
    assert Prompt([5, 6], position_ids=[0, 1]).digest == Prompt([5, 6], position_ids=torch.tensor([0, 1])).digest
    assert plain != Prompt([1])


@pytest.mark.parametrize("ranges", [[(1.5, 3)], [("1", "3")], [(False, True)], [(0, float("inf"))], ["13"]])
def test_ranges_that_are_not_integers_are_refused(ranges):
    with pytest.raises(EmbeddingRangeError, match="integers"):
        Prompt([1, 2, 3, 4], [torch.zeros(2, 48)], ranges)


@pytest.mark.parametrize("ids", [5, None, "abc", torch.zeros(1, 4, dtype=torch.int64), torch.tensor(3)])
def test_ids_that_are_not_one_list_are_refused(ids):
    with pytest.raises(PromptError, match="one list of token ids"):
        Prompt(ids)


def test_invalid_spans_are_refused_by_name():
    with pytest.raises(EmbeddingRangeError, match="'bidir': a span is 'causal' or 'bidirectional'"):
        Span(attention="bidir")
    with pytest.raises(EmbeddingRangeError, match=r"spans\[0\] is 'image'"):
        Prompt([1, 2], [torch.zeros(1, 4)], [(0, 1)], ["image"])


@pytest.mark.parametrize(
    "item",
    [
        torch.zeros(2, 48).to_sparse(),
        torch.zeros(2, 48).to(torch.float8_e4m3fn),
        torch.zeros(2, 48, device="meta"),
        torch.tensor(1.0),
        np.zeros((2, 48)),
        None,
        [[0.0] * 48] * 2,
    ],
    ids=["sparse", "float8", "meta", "no dimensions", "array", "None", "list"],
)
def test_items_that_are_not_dense_tensors_are_refused(engine, item):
    prompt = Prompt([5] * 6, [item], [(1, 3)])
    with pytest.raises(EmbeddingRangeError, match=r"input_embeddings\[0\]"):
        engine.generate(prompt)
    assert workbench.lint(prompt, engine.model, "turbomind")


@pytest.mark.parametrize("positions", [torch.zeros(6), torch.zeros(6, dtype=torch.bool), [0.5] * 6])
def test_positions_that_are_not_integers_are_refused(engine, positions):
    with pytest.raises(PromptError, match="positions are integers"):
        engine.generate(Prompt([5] * 6, position_ids=positions))


def test_a_huge_placeholder_is_never_looked_up(engine):
    rows = torch.randn(2, 48)
    config = GenerationConfig(max_new_tokens=4, ignore_eos=True, repetition_penalty=3.0)
    answers = [
        engine.generate(Prompt([5, 6, *fill, 7], [rows], [(2, 4)]), config).token_ids for fill in ([2**70, -1], [9, 10])
    ]
    assert answers[0] == answers[1]  # the repetition penalty ignores placeholders, too


def test_rows_that_overflow_in_the_engines_dtype_are_refused(model):
    prompt = random_prompt()
    big = prompt.replace(input_embeddings=[prompt.input_embeddings[0] * 1e8, prompt.input_embeddings[1]])
    for kind in KINDS:
        with pytest.raises(
            EmbeddingRangeError, match=r"input_embeddings\[0\], row 0, .* overflows in the engine's float16"
        ):
            workbench.open_engine(kind, model, dtype="float16").generate(big)


def test_nan_logits_raise_model_error(tmp_path):
    model = save_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][:] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for kind in KINDS:
        with pytest.raises(ModelError, match="logits of new token 0 contain NaN"):
            workbench.open_engine(kind, model).generate(random_prompt())


@pytest.mark.parametrize("kind", KINDS)
def test_missing_or_misshapen_tensor_is_refused_by_name(tmp_path, kind):
    save_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed in (None, tensors[name][:3].contiguous()):
        damaged = {**tensors, name: changed}
        save_file(
            {k: v for k, v in damaged.items() if v is not None},
            tmp_path / "model.safetensors",
            metadata={"format": "pt"},
        )
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
            workbench.open_engine(kind, workbench.load_model(tmp_path))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "configuration excludes it"),
        ("lm_head.weight", "differs from its embedding table"),
    ],
)
def test_checkpoint_that_contradicts_its_configuration_is_refused(tmp_path, extra, words):
    save_llama(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[extra] = torch.randn(48) if "bias" in extra else torch.randn(97, 48)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=words):
        workbench.open_engine("numba", workbench.load_model(tmp_path))


def test_reference_is_reloaded_if_the_model_changes(tmp_path):
    verdicts = []
    for epsilon in (1e-6, 1e-2):
        model = save_llama(tmp_path, rms_norm_eps=epsilon)
        verdicts.append(check_engine(workbench.open_engine("numba", model), random_prompt()).verdict)
    assert verdicts == ["noise", "noise"]


def test_sliding_window_in_a_llama_configuration_is_ignored(tmp_path):
    model = save_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": 2}))
    model = workbench.load_model(tmp_path)
    short = GenerationConfig(max_new_tokens=6, ignore_eos=True)
    tokens = [workbench.open_engine(kind, model).generate(random_prompt(), short).token_ids for kind in KINDS]
    assert tokens[0] == tokens[1]


def test_bidirectional_spans_stay_inside_the_references_window(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    small = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
    }
    MistralForCausalLM(MistralConfig(**small, num_key_value_heads=2, sliding_window=4)).save_pretrained(tmp_path)
    engine = workbench.open_engine("transformers", workbench.load_model(tmp_path))
    engine.generate(random_prompt(), GenerationConfig(max_new_tokens=1))
    both = random_prompt().replace(spans=[Span(attention="bidirectional")] * 2)
    # With a window of 4 only tokens 20 to 23 attend to position 20, with or without the span.
    changed = [both.input_embeddings[0], both.input_embeddings[1].clone()]
    changed[1][0] += 1.0
    before, after = (
        engine.trace(each, ["layers.0"])["layers.0"] for each in (both, both.replace(input_embeddings=changed))
    )
    assert [int(row) for row in (before != after).any(dim=1).nonzero()] == [20, 21, 22, 23]


def test_concurrent_traces_equal_single_traces(engine):
    prompts = [random_prompt(seed) for seed in range(2)]
    expected = [engine.trace(prompt, ["embed", "layers.1"]) for prompt in prompts]
    wrong = []

    def run(number):
        for _ in range(15):
            trace = engine.trace(prompts[number], ["embed", "layers.1"])
            wrong.extend(tap for tap in trace if not torch.equal(trace[tap], expected[number][tap]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_cancel_before_the_first_step_ends_the_stream(engine):
    prompt = random_prompt()
    stream = engine.stream_infer(3, prompt.input_ids, prompt.input_embeddings, prompt.embedding_ranges)
    assert engine.cancel(3)
    assert [output.status for output in stream] == [ResponseType.CANCEL]
    assert not engine.cancel(3)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 2.5},
        {"max_new_tokens": None},
        {"logprobs": True},
        {"top_k": None},
        {"temperature": None},
        {"temperature": float("nan")},
        {"random_seed": -1},
        {"random_seed": 2**70},
        {"random_seed": "a"},
        {"stop_token_ids": "a"},
        {"bad_token_ids": [1.5]},
        {"bad_token_ids": 3},
    ],
)
def test_settings_of_the_wrong_type_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        GenerationConfig(**changes)


@pytest.mark.parametrize("changes", [{"bad_token_ids": [-90]}, {"stop_token_ids": [97]}, {"bad_token_ids": range(97)}])
def test_token_id_settings_outside_the_vocabulary_are_refused(engine, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        engine.generate(random_prompt(), GenerationConfig(max_new_tokens=2, **changes))


@pytest.mark.parametrize("device", ["cuda", "mps", "bogus", "", None, "meta"])
def test_unavailable_devices_are_refused(model, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    for kind in KINDS:
        with pytest.raises(ModelError, match="device="):
            workbench.open_engine(kind, model, device=device)


def test_model_name_instead_of_a_loaded_model_is_refused():
    with pytest.raises(ModelError, match="needs a model from workbench.load_model"):
        workbench.open_engine("numba", "smollm2-135m")


@pytest.mark.parametrize("positions", [3, [[1, 2]], [], [1.0], None, "ab", slice(0, 0)])
def test_invalid_positions_are_refused(engine, positions):
    with pytest.raises(ValueError, match="positions"):
        engine.trace(random_prompt(), ["embed"], positions)


@pytest.mark.parametrize("taps", [3, None, [3]])
def test_invalid_taps_are_refused(engine, taps):
    with pytest.raises(ValueError, match="taps="):
        engine.trace(random_prompt(), taps)


@pytest.mark.parametrize("factor", [float("nan"), -1.0, 0.5, float("inf")])
def test_invalid_factors_are_refused(engine, factor):
    with pytest.raises(ValueError, match="factor"):
        check_engine(engine, random_prompt(), factor=factor)


def test_saving_a_trace_to_a_missing_folder_raises_trace_error(engine, tmp_path):
    trace = engine.trace(random_prompt(), ["embed"])
    with pytest.raises(TraceError, match="cannot be written"):
        trace.save(tmp_path / "missing" / "run.safetensors")


@pytest.mark.parametrize("files", [{"a": "../x.safetensors"}, {"a": "/etc/passwd"}, {"a": 3}, {"a": None}, None, [], 3])
def test_hostile_indexes_are_refused(tmp_path, files):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    if files == []:
        assert list(workbench.load_model(tmp_path).weights) == []
        return
    with pytest.raises(ModelError, match="not a safetensors index"):
        _ = workbench.load_model(tmp_path).weights


@pytest.mark.parametrize("name", ["", "~nosuchuser/x", "x" * 5000])
def test_invalid_model_names_are_refused(name):
    with pytest.raises(ModelError, match="no model"):
        workbench.load_model(name)


@pytest.mark.parametrize("text", ["null", "[]", '{"model_type": "llama", "hidden_size": "big"}', "{"])
def test_invalid_configurations_are_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match="configuration of model"):
        _ = workbench.load_model(tmp_path).config


def test_effective_prompt_of_turbomind_keeps_item_dtypes():
    items = [torch.randn(2, 8, dtype=torch.float64), torch.randn(1, 8) * 1e5]
    computed = workbench.effective_prompt(Prompt(range(9), items, [(0, 2), (4, 5)]), "turbomind")
    assert [item.dtype for item in computed.input_embeddings] == [torch.float64, torch.float32]
    assert torch.equal(computed.input_embeddings[0], items[0])
