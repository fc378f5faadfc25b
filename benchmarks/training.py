"""Train, sample, judge: what seconds of training reach on this machine. Writes training.md beside this file.

python benchmarks/training.py [--runs RECIPE:SECONDS:SEEDS ...]

Seconds are of the training loop, by the clock: leave the machine alone meanwhile. Runs are kept as they come.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from rows import Kept, over_seeds, table, write

from condiff_ref import checkpoints, recipes
from condiff_ref.generate import Guidance, generate
from condiff_ref.metrics import evaluate

PER_CLASS, STEPS = 200, 10
SCALES = (1.0, 1.5, 2.0)
MEASURED = ("accuracy", "fd", "fd_real", "precision", "recall", "diversity", "copies")
RUNS = (
    "digits-unet:15:3",
    "digits-unet:30:3",
    "mnist-unet:15:3",
    "mnist-unet:30:3",
    "mnist-unet:60:3",
    "mnist-unet:120:3",
    "mnist-unet:300:1",
    "mnist-unet:600:1",
)


def measure(name: str, seconds: float, seed: int) -> dict:
    """Images per second, and for each scale the numbers with their intervals as [value, low, high]."""
    recipe = recipes.find(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.safetensors"
        model = checkpoints.train_recipe(recipe, file, seconds=seconds, seed=seed, device=device)
    label = torch.arange(10).repeat(PER_CLASS)
    row = dict(images=model.card["images_per_second"], steps=model.card["steps"])
    for scale in SCALES:
        began = time.perf_counter()
        images = generate(model, label, Guidance(scale=scale), steps=STEPS, seed=seed)
        row[f"sampling {scale:g}"] = (time.perf_counter() - began) / len(label) * 100
        figures = evaluate(recipe.data, images, label)
        row[f"{scale:g}"] = {each: [figures[each].value, figures[each].low, figures[each].high] for each in MEASURED}
    return row


def together(values: list[list[float]]) -> str:
    """Over seeds; the interval of the only one, or of what is the same for all."""
    if len({value for value, _, _ in values}) > 1:
        return f"{over_seeds([value for value, _, _ in values])}"
    return "{:.3f} [{:.3f}, {:.3f}]".format(*values[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="+", default=RUNS, help="such as mnist-unet:60:3, for three seeds")
    options = parser.parse_args()
    kept, lines = Kept(Path("outputs/training.json")), []
    for run in options.runs:
        name, seconds, seeds = run.split(":")
        key = f"{recipes.find(name)}|{seconds}|{PER_CLASS}|{STEPS}|{checkpoints.machine()}"
        rows = [
            kept(f"{key}|{seed}", lambda n=name, s=float(seconds), k=seed: measure(n, s, k))
            for seed in range(int(seeds))
        ]
        speed = sum(row["images"] for row in rows) / len(rows)
        steps = sum(row["steps"] for row in rows) / len(rows)
        for scale in (f"{scale:g}" for scale in SCALES):
            sampling = sum(row[f"sampling {scale}"] for row in rows) / len(rows)
            cells = [together([row[scale][each] for row in rows]) for each in MEASURED]
            lines.append([name, seconds, seeds, f"{steps:,.0f}", f"{speed:,.0f}", scale, *cells, f"{sampling:.2f}"])
    write(
        __file__,
        "What seconds of training reach",
        f"n = {10 * PER_CLASS}, {STEPS} Euler steps. Several seeds: means, with Student's 95 % interval; one: that "
        "of its samples. fd: Fréchet distance in the judge's features; fd_real: that of other real images, the same "
        "for all seeds.\n",
        table(["recipe", "seconds", "seeds", "steps", "images/s", "scale", *MEASURED, "s per 100 samples"], lines),
    )


if __name__ == "__main__":
    main()
