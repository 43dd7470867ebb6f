"""The reference that other engines are compared with: Transformers' own model, with the spliced embeddings as `inputs_embeds`.

It splices by slice assignment into looked-up rows, and passes a dense attention mask if spans are bidirectional. It shares no
code with the Numba engine except the sampler.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch

from ...errors import EmbeddingRangeError, ModelError
from ...models import Model
from ...models.options import parse_device, parse_dtype
from ...models.sizes import check_sizes
from ...models.transformers_logging import silenced_transformers
from ...progress import Progress, part
from ...prompt import Prompt
from ...trace import Trace
from ...trace.taps import decoder_taps
from ..base import Engine, Sink
from ..cancellation import Cancellation
from ..sampling import generate, stop_tokens
from ..types import Capabilities, EngineOutput, GenerationConfig
from .float64 import KeepFloat64, rebuild_rotary_embeddings, widen
from .streamed_weights import RESIDENT_BYTES, StreamedWeights, checkpoint_names

DTYPES = ("float64", "float32", "bfloat16", "float16")


class TransformersReference(Engine):
    """Transformers' model as an engine. In float64 every operation is computed in float64 (see `float64.py`).

    On the CPU, large weights are read from the checkpoint layer by layer during each run (see `streamed_weights.py`). Forward passes
    of several threads run one at a time.

    Args:
        dtype: "float64", "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".

    Raises:
        ModelError: Transformers cannot load the model, tensors are missing, or the device is not available.
        ValueError: another dtype.
    """

    def __init__(self, model: Model, *, dtype: str | torch.dtype = "float32", device: str = "cpu") -> None:
        super().__init__()
        self.model = model
        self.dtype = parse_dtype(dtype, DTYPES, "transformers")
        self.device = parse_device(device, "transformers")
        self._jitter: torch.Generator | None = None
        self._lock = threading.RLock()  # hooks and jitter belong to one request, but the network is shared
        self.network = _load(model, self.dtype, self.device)
        self.decoder = self.network.get_decoder()
        self._capabilities = self._find_capabilities()

    def _release(self) -> None:
        del self.network, self.decoder

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that stay in memory between runs; 0 if they are streamed from the checkpoint."""
        parameters = (parameter for parameter in self.network.parameters() if parameter.device.type != "meta")
        return sum(parameter.nbytes for parameter in parameters)

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def _find_capabilities(self) -> Capabilities:
        plain = all(hasattr(layer, "self_attn") and hasattr(layer, "mlp") for layer in self.decoder.layers)
        taps = decoder_taps(len(self.decoder.layers))
        if not plain:  # a layer without these parts has no such taps
            taps = tuple(tap for tap in taps if not tap.endswith((".attention", ".mlp")))
        config = self.decoder.config
        depths = tuple(f"depth.{k}" for k in range(1, len(self.decoder.layers) + 1)) if self._norm is not None else ()
        return Capabilities(
            "transformers",
            (*taps[:-2], *depths, *taps[-2:]),
            DTYPES,
            ("cpu", "cuda"),
            mrope="mrope_section" in (getattr(config, "rope_parameters", None) or {}),
            deepstack=hasattr(self.decoder, "_deepstack_process"),
        )

    @property
    def _norm(self) -> Any:
        """The norm after the last layer, under any of its names in Transformers; None if it has another name."""
        return next(
            (
                getattr(self.decoder, name)
                for name in ("norm", "final_layernorm", "ln_f")
                if hasattr(self.decoder, name)
            ),
            None,
        )

    def precision(self) -> contextlib.AbstractContextManager:
        """A context manager for forward passes: in it, Transformers' casts to float32 stay in float64 if that is the dtype."""
        return KeepFloat64() if self.dtype is torch.float64 else contextlib.nullcontext()

    def run_generation(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> Generator[EngineOutput, None, None]:
        yield from generate(_Run(self, prompt), prompt, config, stop_tokens(self.model, config))

    def noise_floor(
        self,
        prompt: Prompt,
        taps: Iterable[str],
        positions: slice | Sequence[int] = slice(None),
        samples: int = 4,
        progress: Progress | None = None,
    ) -> list[Trace]:
        """Run the prompt `samples` times in this dtype; the traces' errors against a float64 run are its noise floor.

        The first run is unperturbed. In the others, each element of hidden state 0 gets a random relative error of about one
        unit roundoff. They are needed for ill-conditioned states (sums that nearly cancel, mostly at tokens with massive
        activations), at which a single run may be accurate by chance.

        Args:
            taps, positions: as for `trace`.
            samples: number of runs, at least 1.
            progress: called with the completed fraction of all runs; an exception that it raises stops them.
        """
        with self._lock:
            traces = [self.trace(prompt, taps, positions, progress=part(progress, 0.0, 1 / samples))]
            for seed in range(1, samples):
                self._jitter = torch.Generator().manual_seed(seed)
                subprogress = part(progress, seed / samples, (seed + 1) / samples)
                try:
                    traces.append(self.trace(prompt, taps, positions, progress=subprogress))
                finally:
                    self._jitter = None
        return traces

    @torch.no_grad()
    def run_trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor, sink: Sink) -> None:
        rows = positions.to(self.device)

        def read(name: str, state) -> None:
            state = state[0] if isinstance(state, tuple) else state
            if name in wanted:
                sink(name, state.reshape(-1, state.shape[-1])[rows])
            kind, _, number = name.partition(".")
            if kind == "layers" and number.isdecimal() and (depth := f"depth.{int(number) + 1}") in wanted:
                sink(depth, self._norm(state.reshape(-1, state.shape[-1]))[rows])

        def after(module: torch.nn.Module, name: str) -> None:
            hooks.append(module.register_forward_hook(lambda module, args, output: read(name, output)))

        wanted, hooks = set(taps), []
        with self._lock:
            try:
                hooks.append(
                    self.decoder.layers[0].register_forward_pre_hook(
                        lambda module, args, kwargs: read("embed", args[0] if args else kwargs["hidden_states"]),
                        with_kwargs=True,
                    )
                )
                for number, layer in enumerate(self.decoder.layers):
                    after(layer, f"layers.{number}")
                    if hasattr(layer, "self_attn") and hasattr(layer, "mlp"):
                        after(_last(layer, layer.self_attn, _AFTER_ATTENTION), f"layers.{number}.attention")
                        after(_last(layer, layer.mlp, _AFTER_MLP), f"layers.{number}.mlp")
                hidden = self.hidden(prompt)
            finally:
                for hook in hooks:
                    hook.remove()
        read("norm", hidden)
        if "logits" in wanted:
            sink("logits", self.head(hidden[rows]))

    def hidden(self, prompt: Prompt, cache=None) -> torch.Tensor:
        """Run the whole prompt; return `[seq, hidden]` after the final norm. `cache`: Transformers' KV cache to fill, or None."""
        with self.precision():
            return self.decoder(
                inputs_embeds=self.splice(prompt)[None],
                attention_mask=self._mask(prompt),
                position_ids=self._positions(prompt)[..., None, :],  # [1, seq], or [3, 1, seq]
                past_key_values=cache,
                use_cache=cache is not None,
                **self._deepstack(prompt),
            ).last_hidden_state[0]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the head, and the softcap if the model has one: `[tokens, hidden]` after the final norm -> `[tokens, vocab]`."""
        with self.precision():
            logits = self.network.get_output_embeddings()(hidden)
            # Gemma models cap the logits after the head.
            cap = getattr(self.network.config, "final_logit_softcapping", None)
            return torch.tanh(logits / cap) * cap if cap else logits

    @torch.no_grad()
    def logit_lens(self, states: torch.Tensor, *, normed: bool = False) -> torch.Tensor:
        if self._norm is None:
            return super().logit_lens(states)
        with self.precision():
            states = states.to(self.device, self.dtype)
            return self.head(states if normed else self._norm(states))

    def splice(self, prompt: Prompt) -> torch.Tensor:
        """Hidden state 0, `[seq, hidden]`: token embeddings, with each item assigned to its range; perturbed for `noise_floor`."""
        ids = torch.tensor(prompt.lookup_ids, device=self.device)
        state = self.network.get_input_embeddings()(ids).clone()
        for item, (start, stop) in zip(prompt.input_embeddings, prompt.embedding_ranges, strict=True):
            state[start:stop] = item.to(state)
        if self._jitter is not None:
            noise = torch.randn(state.shape, generator=self._jitter) * (torch.finfo(self.dtype).eps / 2)
            state = (state.double() * (1.0 + noise.to(self.device))).to(state.dtype)
        return state

    def _positions(self, prompt: Prompt) -> torch.Tensor:
        positions = torch.arange(len(prompt)) if prompt.position_ids is None else prompt.position_ids
        return positions.to(self.device)

    def _deepstack(self, prompt: Prompt) -> dict[str, Any]:
        """Extra arguments of Qwen3-VL's decoder: the positions of image tokens, and the features that each early layer adds there."""
        if not prompt.deepstack:
            return {}
        inside = torch.zeros((1, len(prompt)), dtype=torch.bool)
        for start, stop in prompt.embedding_ranges:
            inside[0, start:stop] = True
        levels = torch.cat(
            [levels.to(self.dtype) for levels in prompt.deepstack], dim=1
        )  # [levels, rows of all items, hidden]
        return {
            "visual_pos_masks": inside.to(self.device),
            "deepstack_visual_embeds": list(levels.to(self.device)),
        }

    def _mask(self, prompt: Prompt) -> torch.Tensor | dict[str, torch.Tensor] | None:
        """None if all spans are causal, else an additive mask `[1, 1, seq, seq]`, or one mask for each kind of layer.

        A token attends to a key if the key is not later or in the same bidirectional span, and inside the layer's window.
        Transformers also limits spans to the window (`create_sliding_window_causal_mask`); in vLLM a span may extend beyond it.
        """
        if not prompt.bidirectional_ranges:
            return None
        visible = torch.ones(len(prompt), len(prompt), dtype=torch.bool).tril()
        for start, stop in prompt.bidirectional_ranges:
            visible[start:stop, start:stop] = True
        config = self.decoder.config
        window = getattr(config, "sliding_window", None)
        positions = torch.arange(len(prompt))
        near = visible & (positions[:, None] - positions < window) if window else visible
        kinds = set(getattr(config, "layer_types", None) or ())
        if kinds <= {"full_attention"}:
            return self._additive(near if window and not kinds else visible)
        unknown = kinds - {"full_attention", "sliding_attention"}
        if unknown:
            raise EmbeddingRangeError(f"bidirectional spans on layers of kind {sorted(unknown)[0]!r} are not supported")
        return {"full_attention": self._additive(visible), "sliding_attention": self._additive(near)}

    def _additive(self, visible: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(visible.shape, dtype=self.dtype).masked_fill(~visible, torch.finfo(self.dtype).min)
        return mask[None, None].to(self.device)


# Norms between attention or MLP and the residual stream: Gemma 2 and 3, GLM-4.
_AFTER_ATTENTION = {
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_self_attn_layernorm": "post_self_attn_layernorm",
}
_AFTER_MLP = {"post_feedforward_layernorm": "post_feedforward_layernorm", "post_mlp_layernorm": "post_mlp_layernorm"}


def _last(layer: torch.nn.Module, part: torch.nn.Module, norms: dict[str, str]) -> torch.nn.Module:
    """The module whose output is added to the residual stream: `part`, or the norm after it if the layer has one.

    `norms` maps the name of a module that only layers with such a norm have to the norm's name. The norm's own name is not enough:
    post_attention_layernorm follows attention in Gemma 2, but precedes the MLP in Llama.
    """
    return next((getattr(layer, norm) for marker, norm in norms.items() if hasattr(layer, marker)), part)


class _Run:
    """The forward passes of one request (`sampling.Run`), with Transformers' KV cache and the position of the next token."""

    def __init__(self, engine: TransformersReference, prompt: Prompt) -> None:
        from transformers import DynamicCache

        self.engine, self.prompt = engine, prompt
        # Without the config: with it, the cache drops keys outside a sliding_window even if the model does not use the window.
        self.cache = DynamicCache()
        positions = engine._positions(prompt)
        self.axes = positions.shape[:-1]  # M-RoPE has three
        self.next_position = int(positions.max()) + 1

    @torch.no_grad()
    def prefill(self, all_logits: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with self.engine._lock:
            hidden = self.engine.hidden(self.prompt, self.cache)
        return self.engine.head(hidden if all_logits else hidden[-1:]), hidden

    @torch.no_grad()
    def decode(self, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        engine = self.engine
        with engine._lock, engine.precision():
            hidden = engine.decoder(
                input_ids=torch.tensor([[token]], device=engine.device),
                position_ids=torch.full((*self.axes, 1, 1), self.next_position, device=engine.device),
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state[0]
        self.next_position += 1
        return engine.head(hidden), hidden


def _load(model: Model, dtype: torch.dtype, device: torch.device) -> Any:
    """Transformers' model, with its weights in memory or, on the CPU, streamed if they are large."""
    check_sizes(model.config, model.weights, model.name)
    size = sum(entry.bytes // entry.dtype.itemsize for entry in model.weights.entries(model.weights).values())
    streamed = None
    if device.type == "cpu" and size * dtype.itemsize > RESIDENT_BYTES:
        streamed = _streamed(model, dtype)
    return _resident(model, dtype).to(device).eval() if streamed is None else streamed


def _streamed(model: Model, dtype: torch.dtype) -> Any:
    """The model with streamed weights; None if its checkpoint must be loaded by Transformers."""
    network_class = _class_for(model)
    if any(getattr(network_class, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")):
        return None
    build = getattr(network_class, "_from_config", None) or network_class.from_config
    with torch.device("meta"):
        network = build(copy.deepcopy(model.config), dtype=torch.float32)
    names = checkpoint_names(network, model)
    if names is None:
        return None
    for parent in list(network.modules()):  # buffers are computed from the configuration, as Transformers does
        for name, child in list(parent.named_children()):
            if "inv_freq" in dict(child.named_buffers(recurse=False)) and hasattr(child, "config"):
                setattr(parent, name, type(child)(child.config))
    if any(buffer.device.type == "meta" for buffer in network.buffers()):
        return None
    if dtype is torch.float64:
        rebuild_rotary_embeddings(network)
    StreamedWeights(network, model, names, dtype)
    return network.eval()


def _resident(model: Model, dtype: torch.dtype) -> Any:
    try:
        narrow = torch.float32 if dtype is torch.float64 else dtype
        with silenced_transformers():  # a memory-mapped load takes a second or two
            pair: Any = _class_for(model).from_pretrained(
                model.path,
                dtype=narrow,
                trust_remote_code=model.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # rejected below, by name
            )
    except Exception as error:  # Transformers raises many kinds of errors for a damaged or foreign folder
        raise ModelError(f"Transformers cannot load {model.name!r} from {model.path}: {error}") from error
    network, loaded = pair
    lacking = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
    if lacking:  # Transformers would only warn, and fill them with random numbers
        raise ModelError(
            f"{model.path} lacks {len(lacking)} tensors that {model.name!r} needs, or has them in another shape: "
            f"{', '.join(lacking[:3])}{' ...' * (len(lacking) > 3)}. Fetch the checkpoint again"
        )
    return widen(network) if dtype is torch.float64 else network


def _class_for(model: Model) -> Any:
    """The class to load: for a multimodal model its own class, of which only the language part runs here."""
    import transformers

    multimodal = any(getattr(model.config, part, None) is not None for part in ("vision_config", "audio_config"))
    names = [name for name in model.config.architectures or () if hasattr(transformers, name)]
    return getattr(transformers, names[0]) if multimodal and names else transformers.AutoModelForCausalLM
