"""Train digit-cards: `python -m data.digit_cards.training.train OUT` (minutes on one data-centre GPU).

Two stages. First the tower alone, with probes that name the cards it sees. Then tower and projector through the frozen language
model, on the answers. Both draw from one pool of images with the handwriting of the training part of the split, and are tested
on images with the held-out handwriting.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.digit_cards.training.cards import SIZE, Scene, draw_scene, render, split
from data.digit_cards.training.network import IGNORED, CardReader, Probes, probe_targets
from data.digit_cards.training.questions import QUESTIONS, Question
from workbench.models.pypi import SMOLLM2

CARDS_SHARE = {1: 0.66, 2: 0.17, 3: 0.17}  # of the pool, by cards per image
QUESTION_SHARE = {"digit": 0.15, "colour": 0.1, "corner": 0.1, "order": 0.25, "row": 0.3, "count": 0.1}


@dataclass
class Pool:
    """Rendered images: uint8 `[images, 3, 224, 224]`, their scenes, and the image indices by number of cards."""

    pixels: torch.Tensor
    scenes: list[Scene]
    of_cards: dict[int, np.ndarray]

    def pose(self, question: Question, generator: np.random.Generator) -> tuple[list[int], str]:
        """Draw images (by their index) for a question; return them and the right answer."""
        images, cards = question.sizes(generator)
        chosen = [int(index) for index in generator.choice(self.of_cards[cards], images)]
        return chosen, question.answer([self.scenes[index] for index in chosen])


def make_pool(size: int, held_out: bool, seed: int, workers: int, device: str) -> Pool:
    """Draw and render `size` images in `workers` processes; the same seed gives the same pool."""
    counts = [cards for cards, share in CARDS_SHARE.items() for _ in range(round(size * share))]
    jobs = [(seed, number, part.tolist(), held_out) for number, part in enumerate(np.array_split(counts, workers * 4))]
    pixels = torch.empty((len(counts), 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    scenes: list[Scene] = []
    with ProcessPoolExecutor(workers) as pool:
        for drawn, images in pool.map(_render_part, jobs):
            pixels[len(scenes) : len(scenes) + len(drawn)] = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
            scenes += drawn
    of_cards = {cards: np.flatnonzero(np.asarray(counts) == cards) for cards in CARDS_SHARE}
    return Pool(pixels, scenes, of_cards)


def _render_part(job: tuple[int, int, list[int], bool]) -> tuple[list[Scene], np.ndarray]:
    seed, number, counts, held_out = job
    generator = np.random.default_rng([seed, number])
    indices = split(held_out)
    scenes = [draw_scene(generator, indices, cards) for cards in counts]
    return scenes, np.stack([np.asarray(render(scene)) for scene in scenes])


class Log:
    """A log of JSON lines, written to a file and to the screen."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")
        self.start = time.monotonic()

    def write(self, **entry: object) -> None:
        line = json.dumps({"seconds": round(time.monotonic() - self.start, 1), **entry})
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def vary(pixels: torch.Tensor) -> torch.Tensor:
    """Augment images: bend, tilt and light each a little differently; uint8 in, uint8 out.

    1,437 handwritten digits are few: bending the strokes (a smooth field of displacements, Simard et al. 2003) keeps the tower
    from memorising them.
    """
    images, device = len(pixels), pixels.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.empty((images, *shape), device=device).uniform_(low, high)

    angle, scale, shear = uniform(-0.09, 0.09), uniform(0.93, 1.07), uniform(-0.06, 0.06)
    zero = torch.zeros_like(angle)
    turn = torch.stack((angle.cos() * scale, shear - angle.sin(), zero, angle.sin(), angle.cos() * scale, zero), 1)
    grid = F.affine_grid(turn.view(-1, 2, 3), [images, 1, SIZE, SIZE], align_corners=False)
    knots = torch.randn((images, 2, 10, 10), device=device) * uniform(0.0, 0.028, 1, 1, 1)
    grid = grid + F.interpolate(knots, (SIZE, SIZE), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    bent = F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
    lit = bent * uniform(0.85, 1.15, 1, 1, 1) + uniform(-14, 14, 3, 1, 1)
    return lit.clamp(0, 255).to(torch.uint8)


def schedule(optimizer: torch.optim.Optimizer, steps: int, warm: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then half a cosine down to 2 %."""

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_tower(
    reader: CardReader, probes: Probes, pool: Pool, tried: Pool, steps: int, batch: int, rate: float, log: Log
) -> None:
    """Stage one: the tower learns to see cards, through probes."""
    tower = reader.parts["tower"]
    targets, tried_targets = (probe_targets(each.scenes).to(each.pixels.device) for each in (pool, tried))
    optimizer = torch.optim.AdamW([*tower.parameters(), *probes.parameters()], rate, (0.9, 0.98), weight_decay=0.05)
    plan = schedule(optimizer, steps, steps // 20)
    for step in range(steps):
        chosen = torch.randint(len(pool.scenes), (batch,), device=targets.device)
        with _autocast(reader):
            loss, right = probes.loss(reader.features(vary(pool.pixels[chosen])), targets[chosen])
        _update(loss, optimizer, plan, [*tower.parameters(), *probes.parameters()])
        if step % 250 == 249 or step == steps - 1:
            with torch.no_grad(), _autocast(reader):
                parts = zip(tried.pixels.split(512), tried_targets.split(512), strict=True)
                shares = [float(probes.loss(reader.features(pixels), wanted)[1]) for pixels, wanted in parts]
            entry = {"loss": round(loss.item(), 4), "digits": round(right.item(), 4)}
            log.write(stage="tower", step=step + 1, **entry, held_out_digits=round(float(np.mean(shares)), 4))


def train_answers(
    reader: CardReader,
    probes: Probes,
    pool: Pool,
    tried: Pool,
    steps: int,
    batch: int,
    rate: float,
    log: Log,
    out: Path,
) -> None:
    """Stage two: tower and projector learn to make the frozen language model answer."""
    single = {kind: share for kind, share in QUESTION_SHARE.items() if QUESTIONS[kind].images[1] == 1}
    several = {kind: share for kind, share in QUESTION_SHARE.items() if kind not in single}
    generator = np.random.default_rng(1)
    targets = probe_targets(pool.scenes).to(pool.pixels.device)
    groups = [
        {"params": reader.parts["projector"].parameters(), "lr": rate},
        {"params": reader.parts["tower"].parameters(), "lr": rate / 3},
        {"params": probes.parameters(), "lr": rate / 3},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)
    plan = schedule(optimizer, steps, steps // 30)
    trained = [*reader.parts.parameters(), *probes.parameters()]
    for step in range(steps):
        # Prompts with one image and with several go into separate batches: mixed, half of the tokens would be padding.
        shares, prompts = (several, batch // 2) if generator.random() < 0.35 else (single, batch)
        weights = np.array(list(shares.values()))
        posed = [QUESTIONS[kind] for kind in generator.choice(list(shares), prompts, p=weights / weights.sum())]
        ids, labels, images, _ = encode_batch(reader, pool, posed, generator)
        with _autocast(reader):
            features = reader.features(vary(pool.pixels[images]))
            loss, right = reader.answer_loss(ids, labels, reader.rows(features))
            seen, _ = probes.loss(features, targets[images])
        _update(loss + 0.2 * (1 - step / steps) * seen, optimizer, plan, trained)
        if step % 250 == 249 or step == steps - 1:
            entry = {"loss": round(loss.item(), 4), "right": round(float(right.float().mean()), 4)}
            log.write(stage="answers", step=step + 1, **entry, held_out=try_answers(reader, tried, 256))
            reader.save(out / "vision.safetensors")  # so that an interrupted run leaves weights


@torch.no_grad()
def try_answers(reader: CardReader, pool: Pool, questions: int) -> dict[str, float]:
    """Share of greedy answers that are exactly right, for each kind of question."""
    generator = np.random.default_rng(2)
    shares = {}
    for kind, question in QUESTIONS.items():
        right: list[bool] = []
        for _ in range(questions // 128):
            ids, labels, images, _ = encode_batch(reader, pool, [question] * 128, generator)
            with _autocast(reader):
                rows = reader.rows(reader.features(pool.pixels[images]))
                right += reader.answer_loss(ids, labels, rows)[1].tolist()
        shares[kind] = round(float(np.mean(right)), 4)
    return shares


def encode_batch(
    reader: CardReader, pool: Pool, questions: Sequence[Question], generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Ids and labels `[prompts, tokens]` padded on the right, the images in their order, and the right answers."""
    encoded, images, answers = [], [], []
    for question in questions:
        chosen, answer = pool.pose(question, generator)
        encoded.append(reader.encode(question.text, len(chosen), answer))
        images += chosen
        answers.append(answer)
    longest = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in encoded])
    labels = torch.tensor([row + [IGNORED] * (longest - len(row)) for _, row in encoded])
    device = pool.pixels.device
    return ids.to(device), labels.to(device), torch.tensor(images, device=device), answers


def _autocast(reader: CardReader) -> torch.autocast:
    device = next(reader.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def _update(
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    plan: torch.optim.lr_scheduler.LRScheduler,
    trained: Iterator | list,
) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    plan.step()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.digit_cards.training.train", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for vision.safetensors and train_log.jsonl")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--tower-steps", type=int, default=4_500)
    parser.add_argument("--tower-batch", type=int, default=512)
    parser.add_argument("--tower-rate", type=float, default=1e-3)
    parser.add_argument("--answer-steps", type=int, default=1_600)
    parser.add_argument("--answer-batch", type=int, default=192)
    parser.add_argument("--answer-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--resume", action="store_true", help="continue from OUT/tower.pt, which stage one writes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    log = Log(options.out / "train_log.jsonl")
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "workers")}
    log.write(settings=settings, torch=torch.__version__, device=_device_name(options.device))
    pool = make_pool(options.images, False, options.seed, options.workers, options.device)
    tried = make_pool(4096, True, options.seed + 1, options.workers, options.device)
    log.write(images=len(pool.scenes), held_out_images=len(tried.scenes))
    reader = CardReader(SMOLLM2.folder(), options.device)
    probes = Probes().to(options.device)
    state = options.out / "tower.pt"
    both = torch.nn.ModuleDict({"tower": reader.parts["tower"], "probes": probes})
    if options.resume:
        both.load_state_dict(torch.load(state, weights_only=True))
    else:
        train_tower(reader, probes, pool, tried, options.tower_steps, options.tower_batch, options.tower_rate, log)
        torch.save(both.state_dict(), state)
    if options.answer_steps:
        train_answers(
            reader,
            probes,
            pool,
            tried,
            options.answer_steps,
            options.answer_batch,
            options.answer_rate,
            log,
            options.out,
        )
        log.write(stage="done", held_out=try_answers(reader, tried, 1024))


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


if __name__ == "__main__":
    main()
