"""Probes: experiments on an engine that each answer one yes-or-no question about how it uses the embeddings that it is given.

They use only the engine's public interface and need no reference. How large a change of states can be by rounding alone is
measured on the engine itself, by perturbing the injected rows (embedding vectors) with rounding errors.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ..engines.base import Engine
from ..engines.function_engine import require_engine
from ..engines.types import EngineOutput, GenerationConfig, ResponseType
from ..errors import ModelError, PromptError
from ..models.embedding_rows import noise_like
from ..prompt import Prompt
from ..prompt.prompt import Range
from .metrics import relative_error, unit_roundoff
from .verdict import FACTOR

_NEW_TOKENS = 4
_MAX_UNITS = 4096
"""Upper bound of the measured limits, in unit roundoffs of the dtype (a guess; 40 to 110 were measured on SmolLM2-135M)."""
_MAX_CHANGE = 0.25
"""Upper bound of the measured limits in any dtype, a relative change (a guess; 0.17 was measured in bfloat16)."""


@dataclass(frozen=True)
class ProbeResult:
    """The result of one probe.

    Attributes:
        name: a key of `PROBES`.
        question: a question that a correct engine answers with yes.
        passed: the answer; None if the question does not apply to this prompt or engine, and `evidence` is the reason.
        evidence: what was measured, with numbers.
    """

    name: str
    question: str
    passed: bool | None
    evidence: str

    def __str__(self) -> str:
        mark = {True: "yes", False: "NO", None: "not probed"}[self.passed]
        return f"{self.name}: {self.question} {mark}. {self.evidence}"


@dataclass(frozen=True)
class ProbeReport:
    """The results of the probes that were run on one engine and prompt; `report["canary"]` is one of them."""

    engine: str
    results: tuple[ProbeResult, ...]

    @property
    def passed(self) -> bool:
        """Whether no probe failed; probes that do not apply do not count."""
        return all(result.passed is not False for result in self.results)

    def __getitem__(self, name: str) -> ProbeResult:
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(f"{name!r} was not probed: choose one of {', '.join(result.name for result in self.results)}")

    def __str__(self) -> str:
        return "\n".join(map(str, self.results))


def probe(
    engine: Engine, prompt: Prompt, *, only: Sequence[str] | None = None, chunked: Engine | None = None
) -> ProbeReport:
    """Test by experiments whether an engine uses injected embeddings correctly; `PROBES` lists them with their questions.

    Each runs the engine a few times on variants of the prompt, for example with other rows in an item, and compares hidden states
    after the final norm.

    Args:
        prompt: a prompt with at least one item of embeddings; more probes apply if it has text before and after the item.
        only: names of the probes to run; None runs all.
        chunked: the same model in the same engine, opened with small prefill chunks, for the probe "chunks".

    Raises:
        PromptError: a prompt without items, or one that the engine rejects.
        ValueError: an unknown name in `only`, or an engine without the tap "norm".
    """
    require_engine(engine, "probe")
    if not prompt.input_embeddings:
        raise PromptError(
            "the prompt has no input_embeddings: there is nothing to probe; give at least one item and range"
        )
    unknown = sorted(set(only or ()) - set(PROBES))
    if unknown:
        raise ValueError(f"no probe {unknown[0]!r}: choose from {', '.join(PROBES)}")
    engine.check(prompt, _NEW_TOKENS)
    subject = _Subject(engine, prompt, chunked)
    results = []
    for name, (question, ask) in PROBES.items():
        if only is None or name in only:
            passed, evidence = ask(subject)
            results.append(ProbeResult(name, question, passed, evidence))
    return ProbeReport(engine.capabilities.name, tuple(results))


class _Subject:
    """An engine and a prompt under test, and per token the largest change that counts as rounding."""

    def __init__(self, engine: Engine, prompt: Prompt, chunked: Engine | None) -> None:
        self.engine, self.prompt, self.chunked = engine, prompt, chunked
        self.dtype = str(engine.dtype).removeprefix("torch.")
        self.generator = torch.Generator().manual_seed(0)
        # Ids below this have an embedding; placeholder ids may be larger, because ids under ranges must not matter.
        self.vocab = min(engine.model.text_config.vocab_size, len(engine.model.embedding_table))
        self.base = self.state(prompt)
        self.limits = self._limits()

    def state(self, prompt: Prompt, engine: Engine | None = None) -> torch.Tensor:
        """Hidden states after the final norm, `[seq, hidden]`."""
        return (engine or self.engine).trace(prompt, ["norm"])["norm"]

    def _limits(self) -> torch.Tensor:
        """`[seq]`: largest relative change that counts as rounding."""
        roundoff = unit_roundoff(self.dtype)
        errors = []
        for _ in range(2):
            items = [
                (item.double() * (1 + roundoff * torch.randn(item.shape, generator=self.generator))).to(item.dtype)
                for item in self.prompt.input_embeddings
            ]
            errors.append(relative_error(self.state(self.prompt.replace(input_embeddings=items)), self.base))
        worst = torch.stack(errors).amax(dim=0)
        first = min(start for start, _ in self.prompt.embedding_ranges)
        typical = float(worst[first:].median())
        # Bounded: a nondeterministic engine must not set its own limit.
        return (FACTOR * worst.clamp_min(max(typical, 4 * roundoff))).clamp_max(min(_MAX_UNITS * roundoff, _MAX_CHANGE))

    def changed(self, state: torch.Tensor) -> torch.Tensor:
        """bool `[seq]`: at which tokens a state `[seq, hidden]` differs from that of the unchanged prompt by more than rounding."""
        return ~(relative_error(state, self.base) <= self.limits)

    def largest(self, state: torch.Tensor) -> str:
        """The largest change and its limit, in words."""
        error = relative_error(state, self.base)
        if torch.equal(state, self.base):
            return "bit for bit the same"
        at = int((error / self.limits).argmax())
        return f"largest change {float(error[at]):.1e} at token {at}, rounding explains {float(self.limits[at]):.1e}"

    def other_rows(self, item: torch.Tensor) -> torch.Tensor:
        """Random rows with the norms of the item's rows."""
        return noise_like(item.float(), self.generator).to(item.dtype)

    def with_item(self, number: int, item: torch.Tensor) -> Prompt:
        """The prompt with one item replaced."""
        items = list(self.prompt.input_embeddings)
        items[number] = item
        return self.prompt.replace(input_embeddings=items)

    def block(self, number: int) -> Range | None:
        """The range that contains item `number` and attends bidirectionally; None if the item's attention is causal."""
        start, stop = self.prompt.embedding_ranges[number]
        return next(
            (block for block in self.prompt.bidirectional_ranges if block[0] <= start and stop <= block[1]), None
        )

    def generate(self, prompt: Prompt) -> EngineOutput:
        """Generate a few tokens, with the states they were chosen from."""
        return self.engine.generate(prompt, _CONFIG)


_CONFIG = GenerationConfig(max_new_tokens=_NEW_TOKENS, ignore_eos=True, output_last_hidden_state="generation")
_Answer = tuple[bool | None, str]


def _determinism(subject: _Subject) -> _Answer:
    again = subject.state(subject.prompt)
    if torch.equal(again, subject.base):
        return True, "bit for bit the same"
    return not subject.changed(again).any(), f"not bit for bit; {subject.largest(again)}"


def _used(subject: _Subject) -> _Answer:
    silent = []
    for number, item in enumerate(subject.prompt.input_embeddings):
        other = subject.state(subject.with_item(number, subject.other_rows(item)))
        start, stop = subject.prompt.embedding_ranges[number]
        if not subject.changed(other)[start:stop].all():
            silent.append(number)
    count = len(subject.prompt.input_embeddings)
    if silent:
        return (
            False,
            f"other rows in item {silent[0]} do not change all states in its range ({len(silent)} of {count} items)",
        )
    return True, f"other rows change every token of the range, for each of {count} items"


def _identity(subject: _Subject) -> _Answer:
    model, prompt = subject.engine.model, subject.prompt
    ids = list(prompt.input_ids)
    for start, stop in prompt.embedding_ranges:
        for position in range(start, stop):
            if not 0 <= ids[position] < subject.vocab:
                ids[position] = position % subject.vocab
    plain = Prompt(ids, position_ids=prompt.position_ids)
    own = plain.replace(
        input_embeddings=[model.token_rows(ids[start:stop]) for start, stop in prompt.embedding_ranges],
        embedding_ranges=prompt.embedding_ranges,
    )
    text, injected = subject.state(plain), subject.state(own)
    if torch.equal(text, injected):
        return True, "the tokens' own rows give the text's states bit for bit"
    error = relative_error(injected, text)
    at = int((error / subject.limits).argmax())
    evidence = (
        f"largest difference {float(error[at]):.1e} at token {at}, rounding explains {float(subject.limits[at]):.1e}"
    )
    return bool((error <= subject.limits).all()), evidence


def _placeholders(subject: _Subject) -> _Answer:
    ids = list(subject.prompt.input_ids)
    for start, stop in subject.prompt.embedding_ranges:
        for position in range(start, stop):
            ids[position] = (7 * position + 3) % subject.vocab
    other = subject.state(subject.prompt.replace(input_ids=ids))
    return not subject.changed(other).any(), subject.largest(other)


def _position(subject: _Subject) -> _Answer:
    for number, item in enumerate(subject.prompt.input_embeddings):
        start, _ = subject.prompt.embedding_ranges[number]
        pair = next((i for i in range(len(item) - 1) if not torch.equal(item[i], item[i + 1])), None)
        if pair is None:
            continue
        swapped = item.clone()
        swapped[[pair, pair + 1]] = item[[pair + 1, pair]]
        changed = subject.changed(subject.state(subject.with_item(number, swapped)))
        block = subject.block(number)
        first = block[0] if block else start + pair
        before = int(changed[:first].sum())
        there = bool(changed[start + pair : start + pair + 2].all())
        evidence = f"rows {pair} and {pair + 1} of item {number} exchanged: {before} tokens before {first} change"
        return not before and there, evidence + (
            "" if there else f", and tokens {start + pair}, {start + pair + 1} do not"
        )
    return None, "no item has two rows that differ"


def _causality(subject: _Subject) -> _Answer:
    number = max(range(len(subject.prompt.embedding_ranges)), key=lambda i: subject.prompt.embedding_ranges[i])
    block = subject.block(number)
    first = block[0] if block else subject.prompt.embedding_ranges[number][0]
    if first == 0:
        return None, "the range begins with the prompt: there is nothing before it"
    item = subject.prompt.input_embeddings[number]
    other = subject.state(subject.with_item(number, subject.other_rows(item)))
    changed = subject.changed(other)[:first]
    return not changed.any(), f"{int(changed.sum())} of {first} tokens before item {number} change with its rows"


def _canary(subject: _Subject) -> _Answer:
    seen, wrong = 0, []
    for number, item in enumerate(subject.prompt.input_embeddings):
        start, _ = subject.prompt.embedding_ranges[number]
        block = subject.block(number)
        for row in sorted({0, len(item) // 2, len(item) - 1}):
            marked = item.clone()
            marked[row] = noise_like(item[row : row + 1].float(), subject.generator)[0].to(item.dtype)
            state = subject.state(subject.with_item(number, marked))
            seen += 1
            error = relative_error(state, subject.base)
            changed = ~(error <= subject.limits)
            if not changed.any():
                wrong.append(f"row {row} of item {number} shows at no token, it belongs at {start + row}")
                continue
            # In a bidirectional range all tokens change; the token whose embedding is the changed row must change most.
            found = int(error.argmax()) if block else int(changed.nonzero()[0])
            if found != start + row:
                wrong.append(f"row {row} of item {number} shows at token {found}, it belongs at {start + row}")
    if wrong:
        return False, f"{wrong[0]} ({len(wrong)} of {seen} rows are misplaced)"
    return True, f"each of {seen} marked rows shows first at its own token"


def _batch(subject: _Subject) -> _Answer:
    prompt = subject.prompt
    others = [
        prompt.replace(input_embeddings=[subject.other_rows(item) for item in prompt.input_embeddings])
        for _ in range(2)
    ] + [Prompt([token % subject.vocab for token in range(3, 3 + max(len(prompt) // 2, 1))])]
    alone = subject.generate(prompt)
    crowd = [prompt, *others, prompt]
    with ThreadPoolExecutor(len(crowd)) as pool:
        outputs = list(pool.map(subject.generate, crowd))
    return _same_answer(subject, alone, [outputs[0], outputs[-1]], f"with {len(crowd)} requests at once")


def _chunks(subject: _Subject) -> _Answer:
    if subject.chunked is None:
        return None, "needs chunked=, the same engine opened with small prefill chunks"
    alone = subject.generate(subject.prompt)
    return _same_answer(subject, alone, [subject.chunked.generate(subject.prompt, _CONFIG)], "in small chunks")


def _same_answer(subject: _Subject, alone: EngineOutput, others: Sequence[EngineOutput], how: str) -> _Answer:
    limit = float(subject.limits[-1])
    worst = 0.0
    for output in others:
        if output.status is not ResponseType.FINISH:
            return False, f"{how}: the request ended with {output.status.name}"
        # A state depends on all tokens before it, so states after the first different token cannot be compared.
        same = len(
            list(
                itertools.takewhile(
                    lambda pair: pair[0] == pair[1], zip(alone.token_ids, output.token_ids, strict=False)
                )
            )
        )
        assert alone.last_hidden_state is not None
        assert output.last_hidden_state is not None
        rows = min(same + 1, len(alone.last_hidden_state), len(output.last_hidden_state))
        error = relative_error(output.last_hidden_state[:rows].cpu(), alone.last_hidden_state[:rows].cpu())
        worst = max(worst, float(torch.where(torch.isnan(error), torch.inf, error).max()))
    differing = [output.token_ids for output in others if output.token_ids != alone.token_ids]
    if worst == 0.0 and differing:
        return False, f"{how}: the same states, but different tokens: {differing[0]} instead of {alone.token_ids}"
    if worst == 0.0:
        return True, f"{how}: {_NEW_TOKENS} new tokens and their states bit for bit the same"
    return worst <= limit, f"{how}: states differ by at most {worst:.1e}, rounding explains {limit:.1e}"


def _prefix_cache(subject: _Subject) -> _Answer:
    prompt = subject.prompt
    other = prompt.replace(input_embeddings=[subject.other_rows(item) for item in prompt.input_embeddings])
    reference = subject.state(other)[-1:]  # a trace computes all states, so it does not use the prefix cache
    subject.generate(prompt)
    subject.generate(prompt)
    after = subject.generate(other).last_hidden_state
    assert after is not None
    error = float(relative_error(after[:1].cpu(), reference)[0])
    stale = float(relative_error(after[:1].cpu(), subject.base[-1:])[0])
    limit = float(subject.limits[-1])
    if error <= limit:
        return True, f"the same ids with other rows: {error:.1e} from its own state, rounding explains {limit:.1e}"
    what = "the first rows' state is served" if stale <= limit else "neither rows' state is served"
    return False, f"the same ids with other rows: {what} ({error:.1e} from its own state, {stale:.1e} from the first's)"


def _nan(subject: _Subject) -> _Answer:
    """Requests with NaN rows beside and before the prompt, and a text after them, which may get their memory."""
    prompt = subject.prompt
    text = Prompt([token % subject.vocab for token in range(3, 3 + len(prompt))])
    broken = prompt.replace(input_embeddings=[torch.full_like(item, torch.nan) for item in prompt.input_embeddings])
    try:
        subject.engine.check(broken, _NEW_TOKENS)
    except PromptError:
        return True, "the engine refuses rows that are not finite"
    alone, text_alone = subject.generate(prompt), subject.generate(text)

    def spoil() -> None:
        with contextlib.suppress(ModelError):  # an engine may end such a request with an error
            subject.generate(broken)

    try:
        with ThreadPoolExecutor(3) as pool:
            spoiling = [pool.submit(spoil) for _ in range(2)]
            beside = pool.submit(subject.generate, prompt).result()
        for each in spoiling:
            each.result()
        passed, evidence = _same_answer(subject, alone, [beside, subject.generate(prompt)], "beside and after NaN rows")
        after, found = _same_answer(subject, text_alone, [subject.generate(text)], "a text after NaN rows")
    except ModelError as error:
        return False, f"after NaN rows of another request it fails: {error}"
    return (after, found) if passed else (passed, evidence)


def _decode(subject: _Subject) -> _Answer:
    """The states of generated tokens, against those of the same tokens in a prompt."""
    output = subject.generate(subject.prompt)
    assert output.last_hidden_state is not None
    tokens = output.token_ids[:-1]
    positions = subject.prompt.position_ids
    if positions is not None:
        further = positions.amax() + 1 + torch.arange(len(tokens))
        positions = torch.cat([positions, further.expand(*positions.shape[:-1], -1)], dim=-1)
    whole = subject.prompt.replace(input_ids=[*subject.prompt.input_ids, *tokens], position_ids=positions)
    prefilled = subject.state(whole)[len(subject.prompt) - 1 :]
    error = relative_error(output.last_hidden_state[: len(prefilled)].cpu(), prefilled)
    worst = float(torch.where(torch.isnan(error), torch.inf, error).max())
    limit = float(subject.limits[-1])
    return (
        worst <= limit,
        f"{len(prefilled)} tokens: states differ by at most {worst:.1e}, rounding explains {limit:.1e}",
    )


PROBES: dict[str, tuple[str, Callable[[_Subject], _Answer]]] = {
    "determinism": ("Does the same prompt give the same states?", _determinism),
    "used": ("Do the injected rows change the states?", _used),
    "identity": ("Do the tokens' own rows give the same states as the text?", _identity),
    "placeholders": ("Do the ids under a range have no effect?", _placeholders),
    "position": ("Do exchanged rows change their own tokens and no earlier ones?", _position),
    "causality": ("Are tokens before a range unaffected by its rows?", _causality),
    "canary": ("Is every row at its own token?", _canary),
    "batch": ("Is a request unaffected by concurrent requests?", _batch),
    "chunks": ("Does a chunked prefill give the same states as a whole one?", _chunks),
    "decode": ("Do generated tokens get the states that they have in a prompt?", _decode),
    "nan": ("Is a request unaffected by NaN rows of others?", _nan),
    "prefix cache": ("Does the prefix cache distinguish the same ids with other rows?", _prefix_cache),
}
