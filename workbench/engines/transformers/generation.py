"""Generation with the reference: the forward passes of one request, each by the class's own forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ...progress import Stopped
from ...prompt import Prompt
from ..cancellation import Cancellation

if TYPE_CHECKING:
    from .network import Output
    from .reference import TransformersReference


class CachedRun:
    """The forward passes of one request (`sampling.Run`), with the cache that the model itself makes.

    A class that returns no cache runs the whole sequence again for each token.
    """

    def __init__(self, engine: TransformersReference, prompt: Prompt, cancelled: Cancellation) -> None:
        self.engine, self.prompt, self.cancelled = engine, prompt, cancelled
        self._cache: dict[str, Any] = {}
        self._new: list[int] = []

    @torch.no_grad()
    def prefill(self, all_logits: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with self.engine._lock, self._ending():
            out = self.engine.forward(self.prompt, keep=0 if all_logits else 1, cache=self.engine._net.new_cache())
        return self._keep(out), out.hidden

    @torch.no_grad()
    def decode(self, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._new.append(token)
        with self.engine._lock, self._ending():
            if self._cache:
                out = self.engine.forward_one(self.prompt, self._new, self._cache)
            else:
                out = self.engine.forward(self.prompt, keep=1, new=self._new)
        return self._keep(out), out.hidden[-1:]

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """End a forward pass before its next layer, by `Stopped`, once the request is cancelled: a prefill can take seconds."""

        def look(*layer: object) -> None:
            if self.cancelled.is_set():
                raise Stopped

        hooks = [layer.register_forward_pre_hook(look) for layer in self.engine._net.layers or ()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, out: Output) -> torch.Tensor:
        self._cache = dict(out.cache)
        return out.logits
