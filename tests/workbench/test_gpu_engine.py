"""The engines on a GPU: `make test-gpu`."""

import dataclasses
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from range_kernels import CUDAGraphPlan

import workbench
from tests.workbench.small_architectures import save
from tests.workbench.small_models import VARIANTS, random_prompt, save_llama
from workbench.comparison.verdict import compare

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
TAPS = ["embed", "layers.*", "layers.*.*", "norm", "logits"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_numba_engine_error_is_noise(tmp_path, name, dtype):
    model, prompt = save_llama(tmp_path, **VARIANTS[name]), random_prompt()
    reference = workbench.open_engine("transformers", model, dtype="float64", device="cuda").trace(prompt, TAPS)
    floor = workbench.open_engine("transformers", model, dtype=dtype, device="cuda").noise_floor(prompt, TAPS)
    engine = workbench.open_engine("numba", model, dtype=dtype, device="cuda")
    comparison = compare(reference, engine.trace(prompt, TAPS), floor=floor)
    assert comparison.verdict == "noise", str(comparison)


def test_greedy_tokens_equal_the_reference(tmp_path):
    model, prompt = save_llama(tmp_path), random_prompt()
    config = workbench.GenerationConfig(max_new_tokens=24, ignore_eos=True)
    engines = [workbench.open_engine(kind, model, device="cuda") for kind in ("numba", "transformers")]
    tokens = [engine.generate(prompt, config).token_ids for engine in engines]
    assert tokens[0] == tokens[1]


LONG = workbench.GenerationConfig(
    max_new_tokens=90, ignore_eos=True, output_logits="generation", output_last_hidden_state="generation"
)


def engines_of(model, dtype="bfloat16"):
    """One engine that replays decode steps from CUDA graphs, and one in eager mode."""
    return [
        workbench.open_engine("numba", model, dtype=dtype, device="cuda", eager_mode=each) for each in (False, True)
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_graph_replay_is_bit_identical_to_eager_mode(tmp_path, dtype):
    """A single request fills the batch of its graph; it grows from one KV split of the decode kernel to several."""
    replays, launches = engines_of(save_llama(tmp_path, head_dim=64, max_position_embeddings=1024), dtype)
    for length in (40, 240, 500):
        outputs = [list(engine.stream(random_prompt(length, length), LONG)) for engine in (replays, launches)]
        assert len(outputs[0]) == len(outputs[1])
        for ours, theirs in zip(*outputs, strict=True):
            assert ours.token_ids == theirs.token_ids
            assert torch.equal(ours.logits, theirs.logits)
            assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert len(replays.runner.graphs._graphs) > 1
    assert launches.runner.graphs is None


def test_batched_graph_replay_differs_only_by_noise(tmp_path):
    """Nine requests that start and end at different times, with unused rows in the graphs."""
    replays, launches = engines_of(save_llama(tmp_path, head_dim=64, max_position_embeddings=1024))
    requests = [
        (random_prompt(number, 40 + 70 * (number % 4)), dataclasses.replace(LONG, max_new_tokens=20 + 9 * number))
        for number in range(9)
    ]
    with ThreadPoolExecutor(9) as pool:
        together = list(pool.map(lambda request: list(replays.stream(*request)), requests))
    for (prompt, config), outputs in zip(requests, together, strict=True):
        alone = list(launches.stream(prompt, config))
        assert len(outputs) == len(alone)
        for ours, theirs in zip(outputs, alone, strict=True):
            assert float((ours.logits - theirs.logits).norm() / theirs.logits.norm()) < 0.03
            if ours.token_ids != theirs.token_ids:  # a tie in bfloat16: from here on the texts differ
                break
    assert max(sequences for sequences, *_ in replays.runner.graphs._graphs) >= 4


def test_tokens_of_steps_that_are_launched_ahead(tmp_path):
    """Greedy tokens alone, past 512 tokens, where another graph is needed; and of a batch that shrinks. Compared with the eager mode's logits."""
    replays, launches = engines_of(save_llama(tmp_path, head_dim=64, max_position_embeddings=1024))
    requests = [
        (random_prompt(3, 480), 60),
        *((random_prompt(number, 30 + number), 3 + 5 * number) for number in range(6)),
    ]

    def run(request):
        prompt, count = request
        return replays.generate(prompt, workbench.GenerationConfig(max_new_tokens=count, ignore_eos=True)).token_ids

    for together in ([each] for each in requests[:2]), [requests[1:]]:
        for batch in together:
            with ThreadPoolExecutor(len(batch)) as pool:
                found = list(pool.map(run, batch))
            for (prompt, count), tokens in zip(batch, found, strict=True):
                assert len(tokens) == count
                # Teacher-forced: each token must be as likely as the best one, up to a tie in bfloat16.
                ids = [*prompt.input_ids, *tokens]
                forced = workbench.Prompt(ids, prompt.input_embeddings, prompt.embedding_ranges, prompt.spans)
                logits = launches.trace(forced, ["logits"], range(len(prompt) - 1, len(ids) - 1))["logits"].float()
                chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
                spread = logits.std(dim=1)
                assert ((logits.amax(dim=1) - chosen) <= 0.1 * spread).all()


def test_replaced_weights_are_used_by_graph_and_eager_mode(tmp_path):
    engines = engines_of(save_llama(tmp_path, head_dim=64))
    before = [engine.generate(random_prompt(), LONG).logits for engine in engines]
    for engine in engines:
        down = engine.decoder.layers[1].down
        down.weight = -down.weight
    after = [engine.generate(random_prompt(), LONG).logits for engine in engines]
    assert torch.equal(before[0], before[1])
    assert torch.equal(after[0], after[1])
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize(
    "failing", [(0, 1), (1, 2), (0,), (1,)], ids=["warm-up", "capture", "warm-up once", "capture once"]
)
def test_steps_run_eagerly_if_graph_capture_fails(tmp_path, monkeypatch, failing):
    """Each attempt runs the layers twice, the second time captured. A failure must not affect the next request."""
    replays, launches = engines_of(save_llama(tmp_path, head_dim=64))
    decoder, calls = replays.decoder, []
    run_layers = decoder.run_layers

    def fails(inputs, pages, tap=None):
        if isinstance(inputs.plan, CUDAGraphPlan):
            calls.append(0)
            if len(calls) - 1 in failing:
                decoder.layers[0].qkv(inputs.hidden)
                raise torch.cuda.OutOfMemoryError("no room for a graph")
        return run_layers(inputs, pages, tap)

    monkeypatch.setattr(decoder, "run_layers", fails)
    if len(failing) == 2:
        with pytest.warns(UserWarning, match="without CUDA graphs from here on: no room for a graph"):
            result = replays.generate(random_prompt(), LONG)
        assert replays.runner.graphs is None
    else:
        result = replays.generate(random_prompt(), LONG)
        assert replays.runner.graphs is not None
    assert torch.equal(result.logits, launches.generate(random_prompt(), LONG).logits)
    torch.rand(3, device="cuda")
    engine = workbench.open_engine("numba", replays.model, dtype="bfloat16", device="cuda")
    assert torch.equal(engine.generate(random_prompt(), LONG).logits, result.logits)
    assert engine.runner.graphs is not None


@pytest.mark.parametrize("name", ["gemma3", "qwen3-vl", "smollm3, windows"])
def test_window_and_rope_variants_replay_bit_identically(tmp_path, name):
    """The second time all tokens but one come from the prefix cache; that one is replayed, too."""
    mrope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    more = {"rope_parameters": mrope} if name == "qwen3-vl" else {}
    engines = engines_of(save(name, tmp_path, head_dim=64, **more))
    for _ in range(2):
        result = [engine.generate(random_prompt(length=65), LONG) for engine in engines]
        assert result[0].token_ids == result[1].token_ids
        assert torch.equal(result[0].logits, result[1].logits)
    assert engines[0].stats().prefix_hits == 64
    assert engines[0].runner.graphs._graphs


def test_graphs_captured_in_inference_mode_work_outside_it(tmp_path):
    replays, launches = engines_of(save_llama(tmp_path, head_dim=64))
    with torch.inference_mode():
        inside = replays.generate(random_prompt(), LONG).logits
    assert torch.equal(inside, replays.generate(random_prompt(), LONG).logits)
    assert torch.equal(inside, launches.generate(random_prompt(), LONG).logits)


def test_deleted_engine_frees_its_weights_immediately(tmp_path):
    """Immediately, without the garbage collector: the next engine sizes its cache by the free memory."""
    engine = engines_of(save_llama(tmp_path, head_dim=64))[0]
    engine.generate(random_prompt(), LONG)
    decoder = weakref.ref(engine.decoder)
    gc.disable()
    try:
        del engine
        assert decoder() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_digit_cards_reads_images_on_the_gpu(dtype):
    model = workbench.load_model("digit-cards")
    tower = workbench.load_vision_tower(model, device="cuda")
    engine = workbench.open_engine("numba", model, dtype=dtype, device="cuda")
    names = ("blue_7", "green_5")
    prompt = workbench.build_prompt(
        model, "Read the cards in order.", [f"data/images/{name}.png" for name in names], tower=tower
    )
    result = engine.generate(prompt, workbench.GenerationConfig(max_new_tokens=12)).token_ids
    assert model.tokenizer.decode(result) == "blue 7, green 5"
    assert workbench.check_engine(engine, prompt).verdict in ("same", "noise")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("LlamaConfig", {}),
        ("MistralConfig", {"sliding_window": 70}),
        ("Gemma3TextConfig", {"sliding_window": 70, "query_pre_attn_scalar": 64}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_transformers_error_with_range_kernels_is_at_most_twice_sdpa(kind, changes, dtype):
    """Logits of a left-padded batch against float64, compared with torch's SDPA and its dense mask."""
    import transformers
    from range_kernels import register_with_transformers

    register_with_transformers()
    base = {
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000, "max_position_embeddings": 1024,
    }  # fmt: skip
    torch.manual_seed(0)
    network = (
        transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**base, **changes)).cuda().eval()
    )
    ids = torch.randint(3, 1000, (2, 300), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    seen = mask.bool()
    network.set_attn_implementation("sdpa")
    reference = network.double()(ids, attention_mask=mask).logits[seen]
    errors = {}
    network.to(dtype)
    for name in ("range_kernels", "sdpa"):
        network.set_attn_implementation(name)
        errors[name] = float(
            (network(ids, attention_mask=mask).logits[seen].double() - reference).norm() / reference.norm()
        )
    assert errors["range_kernels"] <= 2 * errors["sdpa"], errors
