"""Quantized checkpoints: each format is packed here, number by number, and the reference must compute with the weights that the codes mean."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import workbench
from tests.workbench.small_models import BASE, random_prompt
from workbench.engines.transformers.reference import TransformersReference
from workbench.models.quantization import quantization_settings

GROUP = 16
SMALL = {**BASE, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_hidden_layers": 2}
generator = torch.Generator().manual_seed(0)


def codes(rows: int, columns: int, top: int) -> list[list[int]]:
    return torch.randint(0, top, (rows, columns), generator=generator).tolist()


def scales(rows: int, columns: int, dtype=torch.float16) -> torch.Tensor:
    return (torch.rand(rows, columns, generator=generator) * 0.02 + 0.001).to(dtype)


def packed(values: list[int], bits: int = 4) -> int:
    """One int32 of codes, the first in the lowest bits."""
    number = sum(value << (bits * place) for place, value in enumerate(values))
    return number - (1 << 32) if number >= 1 << 31 else number


def awq(out: int, inputs: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Columns 0 2 4 6 1 3 5 7 of each eight, from the lowest bits."""
    order, q, z, s = (
        (0, 2, 4, 6, 1, 3, 5, 7),
        codes(inputs, out, 16),
        codes(inputs // GROUP, out, 16),
        scales(inputs // GROUP, out),
    )

    def pack(rows):
        return torch.tensor(
            [[packed([row[c + o] for o in order]) for c in range(0, out, 8)] for row in rows], dtype=torch.int32
        )

    weight = [[(q[i][o] - z[i // GROUP][o]) * float(s[i // GROUP, o]) for i in range(inputs)] for o in range(out)]
    return {"qweight": pack(q), "qzeros": pack(z), "scales": s}, torch.tensor(weight, dtype=torch.float64)


def gptq(out: int, inputs: int, shuffled: bool = False) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Eight inputs in an integer; zero points are stored less one."""
    q, z, s = codes(inputs, out, 16), codes(inputs // GROUP, out, 15), scales(inputs // GROUP, out)
    group = [i // GROUP for i in range(inputs)]
    if shuffled:
        group = [group[i] for i in torch.randperm(inputs, generator=generator).tolist()]
    tensors = {
        "qweight": torch.tensor(
            [[packed([q[r + k][o] for k in range(8)]) for o in range(out)] for r in range(0, inputs, 8)],
            dtype=torch.int32,
        ),
        "qzeros": torch.tensor([[packed(row[c : c + 8]) for c in range(0, out, 8)] for row in z], dtype=torch.int32),
        "scales": s,
        "g_idx": torch.tensor(group, dtype=torch.int32),
    }
    weight = [[(q[i][o] - (z[group[i]][o] + 1)) * float(s[group[i], o]) for i in range(inputs)] for o in range(out)]
    return tensors, torch.tensor(weight, dtype=torch.float64)


def gptq_act_order(out: int, inputs: int):
    return gptq(out, inputs, shuffled=True)


def fp8(out: int, inputs: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    weight = torch.randn(out, inputs, generator=generator).to(torch.float8_e4m3fn)
    inverse = scales(-(-out // 32), -(-inputs // 32), torch.float32)
    plain = [[float(weight[o, i]) * float(inverse[o // 32, i // 32]) for i in range(inputs)] for o in range(out)]
    return {"weight": weight, "weight_scale_inv": inverse}, torch.tensor(plain, dtype=torch.float64)


def compressed_fp8(out: int, inputs: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    weight, s = torch.randn(out, inputs, generator=generator).to(torch.float8_e4m3fn), scales(out, 1, torch.bfloat16)
    plain = [[float(weight[o, i]) * float(s[o, 0]) for i in range(inputs)] for o in range(out)]
    return {"weight": weight, "weight_scale": s}, torch.tensor(plain, dtype=torch.float64)


def compressed_int4(out: int, inputs: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Codes plus eight, eight inputs in an integer."""
    q, s = codes(out, inputs, 16), scales(out, inputs // GROUP, torch.bfloat16)
    tensors = {
        "weight_packed": torch.tensor(
            [[packed(row[c : c + 8]) for c in range(0, inputs, 8)] for row in q], dtype=torch.int32
        ),
        "weight_scale": s,
        "weight_shape": torch.tensor([out, inputs]),
    }
    weight = [[(q[o][i] - 8) * float(s[o, i // GROUP]) for i in range(inputs)] for o in range(out)]
    return tensors, torch.tensor(weight, dtype=torch.float64)


NF4 = [-1.0, -0.696, -0.525, -0.395, -0.284, -0.185, -0.091, 0.0, 0.08, 0.161, 0.246, 0.338, 0.441, 0.563, 0.723, 1.0]
BLOCK = 64


def nf4(out: int, inputs: int, nested: bool = False) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Two codes a byte in row-major order, the first in the upper half; one scale per block of 64."""
    flat = [each for row in codes(out, inputs, 16) for each in row]
    meaning = torch.tensor(NF4, dtype=torch.float32)
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [out, inputs]}
    count = -(-len(flat) // BLOCK)
    tensors = {
        "weight": torch.tensor([[(a << 4) + b] for a, b in zip(flat[::2], flat[1::2], strict=True)], dtype=torch.uint8),
        "weight.quant_map": meaning,
    }
    if nested:
        tensors["weight.absmax"] = torch.randint(0, 256, (count,), generator=generator).to(torch.uint8)
        tensors["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
        tensors["weight.nested_absmax"] = scales(-(-count // 16), 1, torch.float32)[:, 0]
        state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.05}
        s = [
            float(tensors["weight.nested_quant_map"][int(code)]) * float(tensors["weight.nested_absmax"][n // 16])
            + 0.05
            for n, code in enumerate(tensors["weight.absmax"])
        ]
    else:
        tensors["weight.absmax"] = scales(count, 1, torch.float32)[:, 0]
        s = tensors["weight.absmax"].tolist()
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    plain = [float(meaning[code]) * s[place // BLOCK] for place, code in enumerate(flat)]
    return tensors, torch.tensor(plain, dtype=torch.float64).view(out, inputs)


def nf4_nested(out: int, inputs: int):
    return nf4(out, inputs, nested=True)


def int8(out: int, inputs: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    q, s = (
        torch.randint(-127, 128, (out, inputs), generator=generator).to(torch.int8),
        scales(out, 1, torch.float32)[:, 0],
    )
    plain = [[int(q[o, i]) * float(s[o]) / 127 for i in range(inputs)] for o in range(out)]
    tensors = {"weight": q, "SCB": s, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, torch.tensor(plain, dtype=torch.float64)


def _group(**weights):
    return {"config_groups": {"group_0": {"weights": {"symmetric": True, **weights}, "targets": ["Linear"]}}}


FORMATS = {
    "bitsandbytes nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "bitsandbytes nf4, nested": (
        nf4_nested,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    ),
    "bitsandbytes int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}),
    "gptq, act order": (
        gptq_act_order,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False},
    ),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}),
    "compressed-tensors fp8": (
        compressed_fp8,
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            **_group(num_bits=8, type="float", strategy="channel"),
        },
    ),
    "compressed-tensors int4": (
        compressed_int4,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            **_group(num_bits=4, type="int", strategy="group", group_size=GROUP),
        },
    ),
}


def save(folder, name):
    """A random Llama whose linear layers are quantized; returns the plain network in float64, too."""
    make, settings = FORMATS[name]
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    network.save_pretrained(folder)
    network = network.double().eval()
    tensors = load_file(folder / "model.safetensors")
    for path, module in network.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, torch.nn.Linear):
            parts, plain = make(*module.weight.shape)
            del tensors[f"{path}.weight"]
            tensors |= {f"{path}.{part}": tensor for part, tensor in parts.items()}
            module.weight.data = plain
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return workbench.load_model(folder), network


@pytest.mark.parametrize("name", FORMATS)
def test_reference_computes_with_the_weights_that_the_codes_mean(tmp_path, name):
    model, network = save(tmp_path, name)
    ids = list(range(5, 25))
    with torch.no_grad():
        expected = network(torch.tensor([ids])).logits[0]
    engine = workbench.open_engine("transformers", model, dtype="float64")
    for path, parameter in network.named_parameters():
        assert torch.equal(parameter, engine.network.get_parameter(path)), path
    logits = engine.trace(workbench.Prompt(ids), ["logits"])["logits"]
    assert float((logits - expected).norm() / expected.norm()) < 1e-6  # float32 inside Transformers' own run
    assert workbench.check_engine(workbench.open_engine("transformers", model), random_prompt()).verdict == "same"


def test_mxfp4_experts_of_gpt_oss(tmp_path):
    """Code by code: sign, and 0, 0.5, 1, 1.5, 2, 3, 4 or 6, the first of a byte in its lower half; scales are powers of two."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=128, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2,
        experts_implementation="eager",
    )  # fmt: skip
    network = transformers.GptOssForCausalLM(config)
    network.save_pretrained(tmp_path)
    network = network.double().eval()
    tensors = load_file(tmp_path / "model.safetensors")
    magnitudes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    for layer in range(2):
        for name in ("gate_up_proj", "down_proj"):
            path = f"model.layers.{layer}.mlp.experts.{name}"
            count, inputs, out = tensors.pop(path).shape
            blocks = torch.randint(0, 256, (count, out, inputs // 32, 16), generator=generator).to(torch.uint8)
            exponents = torch.randint(118, 124, (count, out, inputs // 32), generator=generator).to(torch.uint8)
            tensors |= {f"{path}_blocks": blocks, f"{path}_scales": exponents}
            plain = torch.empty(count, inputs, out, dtype=torch.float64)
            for e in range(count):
                for o in range(out):
                    for i in range(inputs):
                        byte = int(blocks[e, o, i // 32, i % 32 // 2])
                        code = byte & 15 if i % 2 == 0 else byte >> 4
                        sign = -1.0 if code & 8 else 1.0
                        plain[e, i, o] = sign * magnitudes[code & 7] * 2.0 ** (int(exponents[e, o, i // 32]) - 127)
            network.get_parameter(path).data = plain
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model, ids = workbench.load_model(tmp_path), list(range(5, 25))
    for streamed in (False, True):
        engine = TransformersReference(model, dtype="float64", streamed=streamed)
        logits = engine.trace(workbench.Prompt(ids), ["logits"])["logits"]
        with torch.no_grad():
            expected = network(torch.tensor([ids])).logits[0]
        assert float((logits - expected).norm() / expected.norm()) < 3e-6  # float32 inside Transformers' own run
        if not streamed:
            parameter = engine.network.get_parameter("model.layers.1.mlp.experts.down_proj")
            assert torch.equal(parameter, network.get_parameter("model.layers.1.mlp.experts.down_proj"))
    broken = {**tensors, "model.layers.0.mlp.experts.down_proj_scales": exponents[:, :, :-1].contiguous()}
    save_file(broken, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(workbench.ModelError, match=r"layers\.0\.mlp\.experts\.down_proj_scales"):
        workbench.open_engine("transformers", workbench.load_model(tmp_path))


@pytest.mark.parametrize("name", [name for name in FORMATS if "act order" not in name])
def test_streamed_weights_are_the_same(tmp_path, name):
    model, _ = save(tmp_path, name)
    whole, streamed = (TransformersReference(model, dtype="float64", streamed=each) for each in (False, True))
    taps = ["layers.*", "logits"]
    expected, found = (each.trace(workbench.Prompt(list(range(5, 25))), taps) for each in (whole, streamed))
    assert all(torch.equal(found[tap], expected[tap]) for tap in expected)


def test_wrong_group_scale_is_a_bug_at_its_layer(tmp_path):
    model, _ = save(tmp_path / "right", "awq")
    wrong, _ = save(tmp_path / "wrong", "awq")
    for each in (tmp_path / "right", tmp_path / "wrong"):
        tensors = load_file(tmp_path / "right" / "model.safetensors")
        if each.name == "wrong":
            tensors["model.layers.1.mlp.down_proj.scales"][2] *= 1.1
        save_file(tensors, each / "model.safetensors", metadata={"format": "pt"})
    model, wrong = workbench.load_model(tmp_path / "right"), workbench.load_model(tmp_path / "wrong")
    engine = workbench.open_engine("transformers", wrong)
    engine.model = model  # an engine that misreads one scale
    assert workbench.first_divergence(engine, random_prompt()).divergence.tap == "layers.1.mlp"


def test_numba_engine_refuses_quantized_weights_wherever_their_settings_are(tmp_path):
    model, _ = save(tmp_path, "gptq")
    with pytest.raises(workbench.ModelError, match=r"quantized \(gptq\)"):
        workbench.open_engine("numba", model)
    whole = transformers.LlavaConfig(text_config={"model_type": "llama", "quantization_config": FORMATS["awq"][1]})
    assert quantization_settings(whole)["quant_method"] == "awq"
    assert quantization_settings(transformers.LlavaConfig()) is None


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("awq", {"bits": 3}, "bits is 3"),
        ("awq", {"version": "gemv"}, "version is 'gemv'"),
        ("awq", {"group_size": 32}, "group_size=32"),
        ("gptq", {"quant_method": "hqq"}, "'hqq'"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ("fp8", {"weight_block_size": [16, 16]}, "weight_scale_inv has shape"),
        ("compressed-tensors int4", _group(num_bits=4, type="int", symmetric=False), "symmetric is False"),
        ("bitsandbytes nf4", {"quant_method": "eetq"}, "'eetq'"),
        (
            "compressed-tensors int4",
            {"config_groups": {str(bits): {"weights": {"num_bits": bits, "strategy": "channel"}} for bits in (4, 8)}},
            "4 and of 8 bits",
        ),
        ("compressed-tensors fp8", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    ],
)
def test_unknown_settings_are_refused_by_name(tmp_path, name, change, words):
    save(tmp_path, name)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(workbench.ModelError, match=words):
        workbench.open_engine("transformers", workbench.load_model(tmp_path))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("awq", "scales"),
        ("gptq", "qzeros"),
        ("compressed-tensors int4", "weight_scale"),
        ("bitsandbytes nf4", "weight.absmax"),
        ("bitsandbytes nf4", "weight.quant_state.bitsandbytes__nf4"),
        ("bitsandbytes nf4, nested", "weight.nested_absmax"),
        ("bitsandbytes int8", "SCB"),
    ],
)
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_scales_that_are_missing_or_of_the_wrong_shape_are_refused_by_name(tmp_path, name, part, how):
    save(tmp_path, name)
    tensors = load_file(tmp_path / "model.safetensors")
    key = f"model.layers.0.mlp.up_proj.{part}"
    tensors[key] = tensors[key][..., :-1].contiguous()
    if how == "missing":
        del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(workbench.ModelError, match=r"layers\.0\.mlp\.up_proj"):
        workbench.open_engine("transformers", workbench.load_model(tmp_path))
