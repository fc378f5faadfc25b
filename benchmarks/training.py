"""Train, sample, judge: what a minute of training reaches on this machine. Writes training.md beside this file.

python benchmarks/training.py [RECIPE:SECONDS ...]     default: digits-unet:15 digits-unet:30 mnist-unet:60
"""

import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from condiff_ref import checkpoints, recipes
from condiff_ref.generate import Guidance, generate
from condiff_ref.metrics import evaluate

PER_CLASS = 200
STEPS = 10
SCALES = (1.0, 1.5, 2.0)
COLUMNS = ("accuracy", "fd", "fd_real", "precision", "recall", "diversity", "copies")


def measure(name: str, seconds: float, device: torch.device, folder: Path) -> list[str]:
    """One table row per scale."""
    recipe = recipes.find(name)
    model = checkpoints.train_recipe(
        recipe, folder / f"{name}.safetensors", seconds=seconds, device=device, overwrite=True
    )
    label = torch.arange(10).repeat(PER_CLASS)
    rows = []
    for scale in SCALES:
        began = time.monotonic()
        images = generate(model, label, Guidance(scale=scale), steps=STEPS)
        per_hundred = (time.monotonic() - began) / len(label) * 100
        figures = evaluate(recipe.data, images, label)
        cells = [f"{name}, {model.card['seconds']} s", f"{model.card['images_per_second']}", f"{scale:g}"]
        rows.append(" | ".join([*cells, *(str(figures[c]) for c in COLUMNS), f"{per_hundred:.2f}"]))
    return rows


def main() -> None:
    wanted = sys.argv[1:] or ["digits-unet:15", "digits-unet:30", "mnist-unet:60"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for each in wanted for row in measure(*_parse(each), device, Path(folder))]
    head = ["recipe", "images/s", "scale", *COLUMNS, "s per 100 samples"]
    lines = [
        "# What a minute of training reaches\n",
        f"`make bench`, {date.today()}, {checkpoints.machine()}; seed 0, n = {10 * PER_CLASS}, {STEPS} Euler steps, "
        "brackets: 95 % intervals. fd: Fréchet distance in the judge's features; fd_real: that of other real images.\n",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *(f"| {row} |" for row in rows),
    ]
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _parse(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition(":")
    return name, float(seconds)


if __name__ == "__main__":
    main()
