"""The reference that other engines are compared with: Transformers' own model, run by its own forward, with embeddings injected.

The class computes masks, positions, scales and logits itself. Only if spans are bidirectional, or positions are given, the
decoder gets the prompt's own. It shares no code with the Numba engine except the sampler.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...errors import EmbeddingRangeError, ModelError, TraceError
from ...models import Model
from ...models.options import parse_device, parse_dtype
from ...progress import Progress, Stopped, part
from ...prompt import Prompt
from ...trace import Trace
from ...trace.patch import Patches
from ...trace.taps import decoder_taps
from ..base import Engine, Sink
from ..cancellation import Cancellation
from ..sampling import generate, stop_tokens
from ..types import Capabilities, EngineOutput, GenerationConfig
from .generation import CachedRun
from .layer_hooks import Given, layer_hooks
from .layer_progress import LayerProgress
from .loading import load_network
from .masks import takes_masks
from .network import Inject, Network, Output
from .prompt_inputs import PromptInputs
from .routers import RouterWatch
from .streamed_weights import Arrive, StreamedWeights
from .structure import examine, plain_tokens

DTYPES = ("float64", "float32", "bfloat16", "float16")
_NO_PATCHES = Patches({})


class TransformersReference(Engine):
    """Transformers' model as an engine. In float64 every operation is computed in float64 (see `float64.py`).

    Large weights are read from the checkpoint layer by layer during each run (see `streamed_weights.py`). Forward passes of several
    threads run one at a time.

    Args:
        dtype: "float64", "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
        streamed: whether to stream the weights; None: if they take more than 256 MB on the CPU, or 80 % of what is free on a GPU.

    Raises:
        ModelError: Transformers cannot load the model, tensors are missing, the device is not available, or the class is not a
            causal language model whose embeddings can be replaced.
        ValueError: another dtype.
    """

    def __init__(
        self,
        model: Model,
        *,
        dtype: str | torch.dtype = "float32",
        device: str = "cpu",
        streamed: bool | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.dtype = parse_dtype(dtype, DTYPES, "transformers")
        self.device = parse_device(device, "transformers")
        self._jitter: torch.Generator | None = None
        self._watch: RouterWatch | None = None
        self._progress: LayerProgress | None = None
        self._lock = threading.RLock()  # hooks and jitter belong to one request, but the network is shared
        network, self._weights = load_network(model, self.dtype, self.device, streamed)
        self._net = Network(network, self.dtype, self.device)
        self._structure = examine(self._net)
        if self._structure.fault is not None and self._weights is not None:  # a class may use weights in unusual places
            if streamed:
                raise ModelError(
                    f"the weights of {model.name!r} cannot be streamed: {self._structure.fault}. Leave streamed=True out"
                )
            network, self._weights = load_network(model, self.dtype, self.device, False)
            self._net = Network(network, self.dtype, self.device)
            self._structure = examine(self._net)
        if self._structure.fault is not None:
            raise ModelError(
                f"{type(self.network).__name__} of {model.name!r} cannot be a reference: {self._structure.fault}"
            )
        self._capabilities = self._find_capabilities()
        # A class that also looks up something else by id knows its placeholders, and what stands for them there.
        filler = None if self._structure.reads_ids else plain_tokens(self.network.config, 1)[0]
        self._inputs = PromptInputs(
            filler, self.decoder.config, self.dtype, self.device, bool(self._net.mrope_axes), self._structure.needs_mask
        )

    def _release(self) -> None:
        del self._net, self._weights

    @property
    def streamed(self) -> StreamedWeights | None:
        """The weights that are read during each run; None if they are in memory."""
        return self._weights

    def one_of_many(self, arrive: Arrive, progress: LayerProgress) -> TransformersReference:
        """This engine for one of several passes that read streamed weights together (`lockstep.py`).

        Args:
            arrive: called with a unit's name before it is read.
            progress: is told how far the pass has come; the layers that it skips are not read.
        """
        assert self._weights is not None
        other = copy.copy(self)
        network = self._weights.new_network(arrive, progress.skipped)
        other._net = self._net.like(network)
        other._jitter, other._watch, other._lock = None, None, threading.RLock()
        other._progress = progress
        return other

    def exclusive(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which no other thread runs this engine."""
        return self._lock

    def check_final_norm(self) -> None:
        """Make sure that the taps `depth.*` can be computed, by a short pass.

        Raises:
            ModelError: what the class does after its last layer is not one norm.
        """
        self._net.final_norm()

    @property
    def network(self) -> Any:
        """Transformers' model."""
        return self._net.module

    @property
    def decoder(self) -> Any:
        """Its language decoder."""
        return self._net.decoder

    @property
    def decoder_layers(self) -> Sequence[Any]:
        """The decoder's layers.

        Raises:
            ModelError: its layers are not one list of modules.
        """
        if self._net.layers is None:
            raise ModelError(f"the layers of {type(self.network).__name__} are not one list of modules")
        return list(self._net.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that stay in memory between runs; 0 if they are streamed from the checkpoint."""
        return 0 if self._weights is not None else sum(each.nbytes for each in self.network.parameters())

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def _find_capabilities(self) -> Capabilities:
        structure = self._structure
        layers = len(structure.parts) if structure.states else 0
        taps = [
            tap
            for tap in decoder_taps(layers)
            if not tap.endswith((".attention", ".mlp")) or structure.parts[int(tap.split(".")[1])] is not None
        ]
        taps = taps if structure.states else taps[1:]
        depths = [f"depth.{k}" for k in range(1, layers + 1)] if self._net.norm is not None else []
        return Capabilities(
            "transformers",
            (*taps[:-2], *depths, *taps[-2:]),
            DTYPES,
            ("cpu", "cuda"),
            bidirectional_spans=takes_masks(self.decoder),
            mrope=self._net.mrope_axes,
            deepstack=hasattr(self.decoder, "_deepstack_process"),
        )

    def check(self, prompt: Prompt, new_tokens: int = 0) -> None:
        super().check(prompt, new_tokens)
        if prompt.input_embeddings and self._structure.injection_fault is not None:
            raise EmbeddingRangeError(
                f"rows cannot be injected into {type(self.network).__name__}: {self._structure.injection_fault}"
            )

    def run_generation(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> Generator[EngineOutput, None, None]:
        with contextlib.suppress(Stopped):
            yield from generate(CachedRun(self, prompt, cancelled), prompt, config, stop_tokens(self.model, config))

    @contextlib.contextmanager
    def watching(self, watch: RouterWatch) -> Iterator[None]:
        """Read the routers of the runs inside this context; those of a mixture of experts."""
        with self._lock:
            self._watch = watch
            try:
                yield
            finally:
                self._watch = None

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
        steps = [part(progress, seed / samples, (seed + 1) / samples) for seed in range(samples)]
        runs = []
        for seed, step in enumerate(steps):
            with self._jittering(seed):
                runs.append(self.trace(prompt, taps, positions, progress=step))
        return runs

    @contextlib.contextmanager
    def _jittering(self, seed: int) -> Iterator[None]:
        """A context whose runs are perturbed by this seed's errors; with seed 0 they are not."""
        with self._lock:
            self._jitter = torch.Generator().manual_seed(seed) if seed else None
            try:
                yield
            finally:
                self._jitter = None

    def run_trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor, sink: Sink) -> None:
        self._run(prompt, taps, positions, sink)

    def run_patched(
        self, prompt: Prompt, taps: list[str], positions: torch.Tensor, sink: Sink, patches: Patches
    ) -> None:
        self._run(prompt, taps, positions, sink, patches=patches)

    def run_seed(self, prompt: Prompt, taps: list[str], positions: torch.Tensor, seed: int, sink: Sink) -> None:
        """`run_trace` of one run of `noise_floor`."""
        with self._jittering(seed):
            self.run_trace(prompt, taps, positions, sink)

    def local_taps(self, prompt: Prompt, run: Trace) -> list[str]:
        """The taps of another engine's trace at which `run_local` can measure what a layer adds.

        Raises:
            TraceError: the trace lacks positions, `embed` or a layer.
        """
        layers = [f"layers.{number}" for number in range(len(self._structure.parts))]
        lacking = [tap for tap in ("embed", *layers) if tap not in run]
        if lacking or len(run.positions) != len(prompt):
            what = (
                f"tap {lacking[0]!r}" if lacking else f"{len(prompt) - len(run.positions)} of {len(prompt)} positions"
            )
            raise TraceError(f"local errors need the engine's states before every layer: its trace lacks {what}")
        return [tap for tap in self.capabilities.taps if tap in run]

    def run_local(self, prompt: Prompt, run: Trace, seed: int, sink: Sink) -> None:
        """Run each layer on another engine's states: its input is what that engine had before the layer, not what came of this run.

        Args:
            run: the other engine's trace of all positions; its taps are traced (`local_taps`). The norm gets its last layer, the head
                its norm.
            seed: unless 0, each element of those states gets a random relative error of about one unit roundoff.
        """

        def given(tap: str) -> torch.Tensor | None:
            if tap not in run:
                return None
            state = run[tap].to(self.device, self.dtype)
            return self._jittered(state, _generator(seed, tap)) if seed else state

        self._run(prompt, self.local_taps(prompt, run), run.positions, sink, given)

    @torch.no_grad()
    def _run(
        self,
        prompt: Prompt,
        taps: list[str],
        positions: torch.Tensor,
        sink: Sink,
        given: Given = lambda tap: None,
        patches: Patches = _NO_PATCHES,
    ) -> None:
        """Run the prompt; `given` states take the place of those of the run, after the run's own were passed on."""
        rows, wanted = positions.to(self.device), set(taps)

        def pass_on(tap: str, state: torch.Tensor) -> None:
            if tap in wanted:
                sink(tap, state.reshape(-1, state.shape[-1])[rows])

        def layer_done(number: int, state: torch.Tensor) -> None:
            pass_on(f"layers.{number}", state)
            if (depth := f"depth.{number + 1}") in wanted:
                sink(depth, self._net.final_norm()(state.reshape(-1, state.shape[-1]))[rows])

        if any(tap.startswith("depth.") for tap in taps):
            self._net.final_norm()  # not inside the pass: it runs one of its own
        watched = contextlib.nullcontext() if self._watch is None else self._watch.hooks(self._net)
        progress = self._progress or LayerProgress()
        hooks = layer_hooks(self._net, self._structure, wanted, pass_on, layer_done, given, progress, patches)
        with self._lock, hooks, watched:
            out = self.forward(prompt, keep=rows if "logits" in wanted else None, hidden=given("norm"))
        pass_on("norm", out.hidden)
        if "logits" in wanted:
            sink("logits", out.logits)

    def forward(
        self,
        prompt: Prompt,
        *,
        keep: int | torch.Tensor | None,
        cache: Mapping[str, Any] | None = None,
        new: Sequence[int] = (),
        hidden: torch.Tensor | None = None,
    ) -> Output:
        """Run the model's own forward on a prompt.

        Args:
            keep: the tokens whose logits are returned: the last `keep` (0: all), or these indices; None: no logits.
            cache: {} if the pass is continued by others, None if not (`Network.forward`).
            new: generated tokens that follow the prompt.
            hidden: given to the head in place of the states after the final norm.
        """
        ids = torch.tensor([[*self._inputs.ids(prompt), *new]], device=self.device)
        own = self._inputs.of_decoder(prompt, len(new))
        given = {name: own[name] for name in ("position_ids",) if name in own and self._net.takes(name)}
        return self._net.forward(
            ids, self._inject(prompt), decoder_inputs=own, keep=keep, cache=cache, hidden=hidden, **given
        )

    def forward_one(self, prompt: Prompt, new: Sequence[int], cache: Mapping[str, Any]) -> Output:
        """Run the last of the tokens `new`, which follow the prompt, with the cache of the pass before."""
        ids = torch.tensor([[new[-1]]], device=self.device)
        positions = self._inputs.positions(prompt, len(new))
        own = {} if positions is None else {"position_ids": positions[..., -1:]}
        given: dict[str, Any] = dict(own) if self._net.takes("position_ids") else {}
        return self._net.forward(ids, decoder_inputs=own, keep=1, cache=cache, **given)

    @torch.no_grad()
    def logit_lens(self, states: torch.Tensor, *, normed: bool = False) -> torch.Tensor:
        with self._lock:
            norm = None if normed else self._net.final_norm()
            with self._net.precision():
                states = states.to(self.device, self.dtype)
                return self._net.logits(states if norm is None else norm(states))

    @torch.no_grad()
    def splice(self, prompt: Prompt) -> torch.Tensor:
        """The embeddings that enter the model, `[seq, hidden]`: of the tokens, with each item assigned to its range."""
        ids = torch.tensor([self._inputs.ids(prompt)], device=self.device)
        return self._inject(prompt)(self._net.embedding(ids))[0]

    def _inject(self, prompt: Prompt) -> Inject:
        """Return the function that replaces looked-up rows `[1, seq, hidden]` by the items, perturbed for `noise_floor`."""

        def inject(rows: torch.Tensor) -> torch.Tensor:
            rows = rows.clone()
            for item, (start, stop) in zip(prompt.input_embeddings, prompt.embedding_ranges, strict=True):
                rows[0, start:stop] = item.to(rows)
            return rows if self._jitter is None else self._jittered(rows[0], self._jitter)[None]

        return inject

    def _jittered(self, state: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(state.shape, generator=generator) * (torch.finfo(self.dtype).eps / 2)
        return (state.double() * (1.0 + noise.to(self.device))).to(state.dtype)


def _generator(seed: int, tap: str) -> torch.Generator:
    """A generator for the errors of one state in one run."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {tap}".encode()))
