"""Read quantized checkpoints as plain weights: weight = (code - zero point) x scale, in float64, in which that product is exact.

Formats: AWQ ("gemm" layout, AutoAWQ), GPTQ (AutoGPTQ, GPTQModel), block-wise FP8 (DeepSeek-V3), compressed-tensors (vLLM's llm-compressor)
with FP8, int8 or packed int4 weights, bitsandbytes with 4 bits (nf4, fp4) or int8, and MXFP4 (gpt-oss). What else exists is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from ..errors import ModelError, foreign_errors
from .checkpoint import Checkpoint
from .stored_tensor import StoredTensor

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of the eight in a packed integer that each group of four bits, from the lowest, belongs to."""


def plain_weights(checkpoint: Checkpoint, settings: Mapping[str, Any], model: str) -> dict[str, StoredTensor]:
    """Return every weight by name; those that were quantized are read as float64 `[out, in]`, others as they are stored.

    Args:
        settings: `quantization_config`.
        model: its name, for messages.

    Raises:
        ModelError: here, or when a weight is read: a format or setting that is not known, a tensor that is missing, or scales of a shape
            that does not fit.
    """
    method = settings.get("quant_method")
    formats = {
        "awq": _awq,
        "gptq": _gptq,
        "fp8": _fp8,
        "compressed-tensors": _compressed,
        "bitsandbytes": _bitsandbytes,
        "mxfp4": _mxfp4,
    }
    if method not in formats:
        raise ModelError(
            f"the weights of {model!r} are quantized as {method!r}; of quantized weights {', '.join(formats)} are read: dequantize the "
            "checkpoint, or give the one that it was made from"
        )
    source = _Source(checkpoint, settings, model)
    found: dict[str, StoredTensor] = {}
    taken: set[str] = set()
    for suffix, parts, decode, shape in formats[method](source):
        joint = "" if suffix.startswith("_") else "."
        for name in [name for name in checkpoint if name.endswith(f"{joint}{suffix}")]:
            base = name.removesuffix(f"{joint}{suffix}")
            present = {f"{base}{joint}{part}" for part in parts} & source.names
            if not present:  # a plain weight among quantized ones
                continue
            taken |= {name, *present}
            stored = tuple(source.entries[each] for each in (name, *sorted(present)))
            found[f"{base}.weight" if joint else base] = StoredTensor(
                shape(base), torch.float64, partial(decode, base), stored
            )
    for name, entry in source.entries.items():
        if name not in taken:
            if not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
                source.refuse(f"{name} is {entry.dtype} and has no scales")
            found[name] = StoredTensor(entry.shape, entry.dtype, partial(checkpoint.get, name), (entry,))
    return found


class _Source:
    """The tensors and settings of a quantized checkpoint."""

    def __init__(self, checkpoint: Checkpoint, settings: Mapping[str, Any], model: str) -> None:
        self.entries = checkpoint.entries(checkpoint)
        self.names, self._read, self.settings, self.model = set(self.entries), checkpoint.get, settings, model

    def refuse(self, why: str) -> None:
        """Raise ModelError."""
        raise ModelError(f"the quantized weights of {self.model!r} cannot be read: {why}")

    def get(self, name: str) -> torch.Tensor:
        """A tensor that must exist."""
        if name not in self.names:
            self.refuse(f"{name} is missing. Fetch the checkpoint again")
        return self._read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that must exist and have two dimensions."""
        if name not in self.names:
            self.refuse(f"{name} is missing. Fetch the checkpoint again")
        shape = self.entries[name].shape
        if len(shape) != 2:
            self.refuse(f"{name} has shape {shape} where [out, in] is needed")
        return shape

    def need(self, setting: str, value: Any, *allowed: Any) -> None:
        """Refuse a setting's value unless it is one of those allowed."""
        if value not in allowed:
            self.refuse(f"{setting} is {value!r}; known are {', '.join(map(repr, allowed))}")

    def fit(self, name: str, tensor: torch.Tensor, *shape: int) -> torch.Tensor:
        """The tensor, if it has this shape."""
        if tuple(tensor.shape) != shape:
            self.refuse(f"{name} has shape {tuple(tensor.shape)} where {shape} fits the weight")
        return tensor


_Format = Iterator[tuple[str, tuple[str, ...], Callable[[str], torch.Tensor], Callable[[str], tuple[int, ...]]]]
"""Suffix of the codes' names, suffixes of what belongs to them, and for the name before the suffix the weight and its shape.

Suffixes are parts of the names after a dot; those that begin with "_" end a name themselves, and what is before them is the weight's name.
"""


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes `[..., 32 / bits]` of int32 numbers, from the lowest bits."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int64)
    return (packed.to(torch.int64)[..., None] >> shifts) & ((1 << bits) - 1)


def _awq(source: _Source) -> _Format:
    """`qweight` `[in, out / 8]`, `qzeros` `[groups, out / 8]`, `scales` `[groups, out]`; one zero point and scale per group of inputs."""
    source.need("bits", source.settings.get("bits", source.settings.get("w_bit")), 4)
    source.need("version", str(source.settings.get("version", "gemm")).lower(), "gemm")

    def decode(base: str) -> torch.Tensor:
        codes, zeros = (_awq_columns(source.get(f"{base}.{part}")) for part in ("qweight", "qzeros"))
        groups = len(zeros)
        size = _group_size(source, base, len(codes), groups)
        scales = source.fit(f"{base}.scales", source.get(f"{base}.scales"), groups, codes.shape[1])
        source.fit(f"{base}.qzeros", zeros, groups, codes.shape[1])
        group = torch.arange(len(codes)) // size
        return ((codes - zeros[group]).double() * scales.double()[group]).T.contiguous()

    def shape(base: str) -> tuple[int, ...]:
        inputs, packed = source.shape(f"{base}.qweight")
        return packed * 8, inputs

    yield "qweight", ("qzeros", "scales"), decode, shape


def _awq_columns(packed: torch.Tensor) -> torch.Tensor:
    codes = _unpack(packed, 4)
    ordered = torch.empty_like(codes)
    ordered[..., list(_AWQ_ORDER)] = codes
    return ordered.flatten(1)


def _gptq(source: _Source) -> _Format:
    """`qweight` `[in x bits / 32, out]`, `qzeros` `[groups, out x bits / 32]`, `scales` `[groups, out]`, `g_idx` `[in]`, the group of each input.

    The older layout stores zero points less one.
    """
    source.need("bits", source.settings.get("bits"), 2, 4, 8)
    bits = int(source.settings["bits"])
    layout = source.settings.get("checkpoint_format", "gptq")
    source.need("checkpoint_format", layout, "gptq", "gptq_v2")

    def decode(base: str) -> torch.Tensor:
        codes = _unpack(source.get(f"{base}.qweight"), bits).movedim(-1, 1).flatten(0, 1)
        zeros = _unpack(source.get(f"{base}.qzeros"), bits).flatten(1) + (layout == "gptq")
        scales = source.get(f"{base}.scales")
        groups = len(scales)
        source.fit(f"{base}.scales", scales, groups, codes.shape[1])
        source.fit(f"{base}.qzeros", zeros, groups, codes.shape[1])
        if f"{base}.g_idx" in source.names:
            group = source.fit(f"{base}.g_idx", source.get(f"{base}.g_idx"), len(codes)).long()
            if int(group.min()) < 0 or int(group.max()) >= groups:
                source.refuse(f"{base}.g_idx names group {int(group.max())} of {groups}")
        else:
            group = torch.arange(len(codes)) // _group_size(source, base, len(codes), groups)
        return ((codes - zeros[group]).double() * scales.double()[group]).T.contiguous()

    def shape(base: str) -> tuple[int, ...]:
        packed, outputs = source.shape(f"{base}.qweight")
        return outputs, packed * 32 // bits

    yield "qweight", ("qzeros", "scales", "g_idx"), decode, shape


def _fp8(source: _Source) -> _Format:
    """`weight` FP8 `[out, in]`, `weight_scale_inv` one number per block of `weight_block_size`."""
    block = source.settings.get("weight_block_size") or (128, 128)

    def decode(base: str) -> torch.Tensor:
        weight, name = source.get(f"{base}.weight"), f"{base}.weight_scale_inv"
        source.need(f"{base}.weight", weight.dtype, torch.float8_e4m3fn, torch.float8_e5m2)
        rows, columns = weight.shape
        scales = source.fit(name, source.get(name), -(-rows // block[0]), -(-columns // block[1])).double()
        wide = scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        return weight.double() * wide

    yield "weight", ("weight_scale_inv",), decode, lambda base: source.shape(f"{base}.weight")


def _compressed(source: _Source) -> _Format:
    """`weight` FP8 or int8 with `weight_scale` per tensor, row or group; or `weight_packed` int32 `[out, in x bits / 32]`, codes plus 2^(bits - 1)."""
    groups = source.settings.get("config_groups") or {}
    weights = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, Mapping) else []
    for settings in weights:
        source.need("symmetric", settings.get("symmetric", True), True)
        source.need("num_bits", settings.get("num_bits"), 4, 8)
    for settings in weights:
        source.need("strategy", settings.get("strategy", "tensor"), "tensor", "channel", "group")
    if len({settings.get("num_bits") for settings in weights}) > 1:
        source.refuse("config_groups of 4 and of 8 bits in one checkpoint are not known")
    sizes = {settings.get("group_size") if settings.get("strategy") == "group" else None for settings in weights}
    sparsity = (source.settings.get("sparsity_config") or {}).get("format", "dense")
    source.need("sparsity_config.format", sparsity, "dense")

    def scaled(base: str, codes: torch.Tensor) -> torch.Tensor:
        scales = source.get(f"{base}.weight_scale").double()
        if f"{base}.weight_zero_point" in source.names:
            source.refuse(f"{base}.weight_zero_point: weights with zero points are not known")
        rows, columns = codes.shape
        if scales.numel() == 1:
            return codes.double() * scales.reshape(())
        counts = {columns // size if size and columns % size == 0 else 1 for size in sizes}
        if scales.ndim != 2 or len(scales) != rows or scales.shape[1] not in counts:
            source.refuse(
                f"{base}.weight_scale has shape {tuple(scales.shape)}, which fits no weight of {tuple(codes.shape)}"
            )
        if f"{base}.weight_g_idx" in source.names:
            group = source.fit(f"{base}.weight_g_idx", source.get(f"{base}.weight_g_idx"), columns).long()
            if int(group.min()) < 0 or int(group.max()) >= scales.shape[1]:
                source.refuse(
                    f"{base}.weight_g_idx names groups {int(group.min())} to {int(group.max())} of {scales.shape[1]}"
                )
        else:
            group = torch.arange(columns) // (columns // scales.shape[1])
        return codes.double() * scales[:, group]

    def whole(base: str) -> torch.Tensor:
        weight = source.get(f"{base}.weight")
        source.need(f"{base}.weight", weight.dtype, torch.float8_e4m3fn, torch.int8)
        return scaled(base, weight)

    def packed(base: str) -> torch.Tensor:
        (bits,) = {settings["num_bits"] for settings in weights} or {4}
        codes = _unpack(source.get(f"{base}.weight_packed"), bits).flatten(1) - (1 << (bits - 1))
        rows, columns = source.get(f"{base}.weight_shape").tolist()
        if rows != len(codes) or columns > codes.shape[1]:
            source.refuse(f"{base}.weight_shape is {rows} x {columns}, but {tuple(codes.shape)} codes are stored")
        return scaled(base, codes[:, :columns])

    def packed_shape(base: str) -> tuple[int, ...]:
        return tuple(source.fit(f"{base}.weight_shape", source.get(f"{base}.weight_shape"), 2).tolist())

    beside = ("weight_scale", "weight_zero_point", "weight_g_idx")
    yield "weight", (*beside, "input_scale"), whole, lambda base: source.shape(f"{base}.weight")
    yield "weight_packed", (*beside, "weight_shape"), packed, packed_shape


def _bitsandbytes(source: _Source) -> _Format:
    """4 bits: `weight` uint8, two codes a byte, the first in its upper half, in the weight's row-major order; `weight.quant_map` `[16]` has
    what they mean, `weight.absmax` the scale of each block, which may be quantized too; `weight.quant_state...` is JSON with the sizes.
    int8: `weight` int8 `[out, in]`, `SCB` `[out]`; the weight is code x SCB / 127.
    """
    kinds = ("nf4", "fp4")
    states = [f"weight.quant_state.bitsandbytes__{kind}" for kind in kinds]

    def state_of(base: str) -> dict[str, Any]:
        name = next((f"{base}.{each}" for each in states if f"{base}.{each}" in source.names), None)
        if name is None:
            source.refuse(f"{base}.weight.quant_state is missing. Fetch the checkpoint again")
        text = bytes(source.get(str(name)).flatten().to(torch.uint8).tolist())
        with foreign_errors(
            ModelError, f"{name} of {source.model!r} is not its quantization state", "Fetch the checkpoint again"
        ):
            state = json.loads(text)
            shape = tuple(int(size) for size in state["shape"])
            if len(shape) != 2 or min(shape) < 1 or not 1 <= int(state["blocksize"]) <= 1 << 20:
                raise ValueError(f"shape {shape}, blocks of {state['blocksize']}")
        return {**state, "shape": shape}

    def four_bits(base: str) -> torch.Tensor:
        state, packed = state_of(base), source.get(f"{base}.weight")
        source.need(f"{base}.weight", packed.dtype, torch.uint8)
        count = state["shape"][0] * state["shape"][1]
        flat = packed.flatten().to(torch.int64)
        if len(flat) != (count + 1) // 2:
            source.refuse(f"{base}.weight has {len(flat)} bytes for {count} codes of four bits")
        codes = torch.stack([flat >> 4, flat & 15], dim=1).flatten()[:count]
        blocks = -(-count // int(state["blocksize"]))
        stored = source.fit(f"{base}.weight.absmax", source.get(f"{base}.weight.absmax"), blocks)
        scales = stored.double()
        if not stored.is_floating_point() or "nested_blocksize" in state:
            source.need(f"{base}.weight.absmax", stored.dtype, torch.uint8)
            if not {"nested_blocksize", "nested_offset"} <= set(state):
                source.refuse(f"{base}.weight.quant_state does not say how its scales are quantized")
            size = int(state["nested_blocksize"])
            outer = source.get(f"{base}.weight.nested_absmax").double()
            source.fit(f"{base}.weight.nested_absmax", outer, -(-blocks // size))
            meaning = source.fit(f"{base}.weight.nested_quant_map", source.get(f"{base}.weight.nested_quant_map"), 256)
            scales = meaning.double()[scales.long()] * outer[torch.arange(blocks) // size] + float(
                state["nested_offset"]
            )
        values = source.fit(f"{base}.weight.quant_map", source.get(f"{base}.weight.quant_map"), 16).double()[codes]
        return (values * scales[torch.arange(count) // int(state["blocksize"])]).view(state["shape"])

    def eight_bits(base: str) -> torch.Tensor:
        codes = source.get(f"{base}.weight")
        source.need(f"{base}.weight", codes.dtype, torch.int8)
        scales = source.fit(f"{base}.SCB", source.get(f"{base}.SCB"), len(codes))
        if f"{base}.weight_format" in source.names:
            source.need(f"{base}.weight_format", int(source.get(f"{base}.weight_format")), 0)
        return codes.double() * scales.double()[:, None] / 127

    beside = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    yield "weight", (*(f"weight.{each}" for each in beside), *states), four_bits, lambda base: state_of(base)["shape"]
    yield "weight", ("SCB", "weight_format"), eight_bits, lambda base: source.shape(f"{base}.weight")


_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of FP4 E2M1 by code; the fourth bit is the sign."""


def _mxfp4(source: _Source) -> _Format:
    """`..._blocks` uint8 `[..., out, blocks, 16]`, two FP4 codes a byte, the first in its lower half; `..._scales` uint8 `[..., out, blocks]`,
    exponents of two plus 127. The weight is `[..., in, out]`, as gpt-oss multiplies with it.
    """
    values = torch.tensor([*_FP4, *(-each for each in _FP4)], dtype=torch.float64)

    def decode(base: str) -> torch.Tensor:
        blocks, scales = source.get(f"{base}_blocks"), source.get(f"{base}_scales")
        source.need(f"{base}_blocks", blocks.dtype, torch.uint8)
        source.need(f"{base}_scales", scales.dtype, torch.uint8)
        source.fit(f"{base}_scales", scales, *blocks.shape[:-1])
        codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
        wide = torch.ldexp(values[codes], scales.to(torch.int32)[..., None] - 127)
        return wide.flatten(-2).transpose(-1, -2).contiguous()

    def shape(base: str) -> tuple[int, ...]:
        found = source.entries[f"{base}_blocks"].shape
        if len(found) < 3:
            source.refuse(f"{base}_blocks has shape {found}, which is not [..., out, blocks, 16]")
        return (*found[:-3], found[-2] * found[-1] * 2, found[-3])

    yield "_blocks", ("_scales",), decode, shape


def _group_size(source: _Source, base: str, inputs: int, groups: int) -> int:
    size = source.settings.get("group_size", source.settings.get("q_group_size", 128))
    size = inputs if size in (-1, None) else size
    if not isinstance(size, int) or size <= 0 or -(-inputs // size) != groups:
        source.refuse(f"{base} has {inputs} inputs in {groups} groups, which is not group_size={size}")
    return size
