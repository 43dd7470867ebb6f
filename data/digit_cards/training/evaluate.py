"""Ask digit-cards about images of held-out handwriting: `python -m data.digit_cards.training.evaluate OUT`.

Every question is processed like a user's: image, tower, prompt with ranges, engine, greedy tokens, text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data.digit_cards.training.cards import SIZE, render, split
from data.digit_cards.training.questions import QUESTIONS
from workbench.engines import open_engine
from workbench.engines.types import GenerationConfig
from workbench.models import load_model
from workbench.vision.prompt_builder import build_prompt
from workbench.vision.tower import load_vision_tower

_GREEDY = GenerationConfig(max_new_tokens=24)


def evaluate(questions: int, kind: str = "numba", device: str = "cpu", seed: int = 7) -> dict:
    """Ask `questions` of each kind; return counts of right answers, the digits' confusion, and the failures with their scenes."""
    model = load_model("digit-cards")
    tower, engine = load_vision_tower(model, device=device), open_engine(kind, model, device=device)
    generator = np.random.default_rng(seed)
    indices = split(held_out=True)
    right: dict[str, int] = dict.fromkeys(QUESTIONS, 0)
    confusion = np.zeros((10, 10), dtype=int)
    failures = []
    for name, question in QUESTIONS.items():
        for _ in range(questions):
            scenes, wanted = question.pose(generator, indices)
            prompt = build_prompt(model, question.text, [render(scene) for scene in scenes], tower=tower)
            said = model.tokenizer.decode(engine.generate(prompt, _GREEDY).token_ids).strip()
            right[name] += said == wanted
            if name == "digit" and said.isdigit() and len(said) == 1:
                confusion[int(wanted), int(said)] += 1
            if said != wanted:
                failures.append({"question": name, "wanted": wanted, "said": said, "scenes": scenes})
        print(f"{name}: {right[name]} of {questions}", flush=True)
    return {"questions": questions, "right": right, "confusion": confusion.tolist(), "failures": failures}


def draw_failures(failures: list[dict], most: int = 6) -> Image.Image:
    """Draw the first failures: each row has the images, and below them the wanted and the given answer."""
    shown = failures[:most]
    widest = max(len(failure["scenes"]) for failure in shown)
    sheet = Image.new("RGB", (SIZE * widest, (SIZE + 18) * len(shown)), "white")
    for row, failure in enumerate(shown):
        top = row * (SIZE + 18)
        for column, scene in enumerate(failure["scenes"]):
            sheet.paste(render(scene), (column * SIZE, top))
        ImageDraw.Draw(sheet).text((4, top + SIZE + 3), f"wanted {failure['wanted']} - said {failure['said']}", "black")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.digit_cards.training.evaluate", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for evaluation.json and failures.png")
    parser.add_argument("--questions", type=int, default=360, help="of each kind")
    parser.add_argument("--engine", default="numba")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    result = evaluate(options.questions, options.engine, options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    if result["failures"]:
        draw_failures(result["failures"]).save(options.out / "failures.png")
    result["failures"] = [
        {**failure, "scenes": [[card.name for card in scene.cards] for scene in failure["scenes"]]}
        for failure in result["failures"]
    ]
    (options.out / "evaluation.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
