"""DiT beside U-Net at equal seconds, and four ways to condition a DiT at equal steps: writes architectures.md.

python benchmarks/architectures.py [--seconds S] [--steps N] [--seeds K]

Training steps are timed side by side first; each network is then trained for as many steps as take it S seconds.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
from rows import Kept, over_seeds, step_times, table, untrained, write

from condiff_ref import checkpoints, recipes
from condiff_ref.dit import BLOCKS
from condiff_ref.generate import Guidance, generate
from condiff_ref.metrics import evaluate
from condiff_ref.recipes import Recipe

MEASURED = ("accuracy", "fd", "recall")
PER_CLASS = 100


def train_and_judge(recipe: Recipe, steps: int, seed: int, scales: tuple[float, ...]) -> dict:
    """Accuracy, Frechet distance and recall at each scale."""
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoints.train_recipe(recipe, Path(folder) / "file.safetensors", steps=steps, seed=seed)
    label = torch.arange(10).repeat(PER_CLASS)
    row = {"loss": model.card["loss"]}
    for scale in scales:
        figures = evaluate(recipe.data, generate(model, label, Guidance(scale=scale), steps=10, seed=seed), label)
        row |= {f"{name} {scale:g}": figures[name].value for name in MEASURED}
    return row


def compare(
    kept: Kept,
    entries: dict[str, tuple[Recipe, int, float]],
    seeds: int,
    scales: tuple[float, ...],
    with_loss: bool = False,
) -> str:
    """One row per entry {title: (recipe, steps, seconds per step)}: means over seeds. Losses may be compared between
    networks of one kind of target and data."""
    lines = []
    for title, (recipe, steps, seconds) in entries.items():
        key = f"{recipe}|{steps}|{PER_CLASS}"
        rows = [
            kept(f"{key}|{seed}", lambda r=recipe, n=steps, k=seed: train_and_judge(r, n, k, scales))
            for seed in range(seeds)
        ]
        weights = sum(p.numel() for p in recipe.build().parameters())
        means = {name: over_seeds([row[name] for row in rows]) for name in rows[0]}
        means = {name: value for name, value in means.items() if name != "loss" or with_loss}
        lines.append([title, f"{weights:,}", f"{1000 * seconds:.0f}", f"{steps:,}", *means.values()])
        columns = ["network", "weights", "ms per step", "steps", *means]
    return table(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    kept = Kept(Path("outputs/architectures.json"))
    pair = [recipes.MNIST_UNET, recipes.MNIST_DIT]
    timed = kept("times of the pair", lambda: dict(seconds=step_times([untrained(r) for r in pair])))["seconds"]
    entries = {
        r.architecture: (r, int(options.seconds / seconds), seconds) for r, seconds in zip(pair, timed, strict=True)
    }
    equal_seconds = compare(kept, entries, options.seeds, (1.0, 1.5, 2.0))
    designs = [
        dataclasses.replace(recipes.DIGITS_DIT, arguments=recipes.DIGITS_DIT.arguments | dict(conditioning=name))
        for name in BLOCKS
    ]
    timed = kept("times of the designs", lambda: dict(seconds=step_times([untrained(r) for r in designs])))["seconds"]
    entries = {
        r.arguments["conditioning"]: (r, options.steps, seconds) for r, seconds in zip(designs, timed, strict=True)
    }
    conditionings = compare(kept, entries, options.seeds, (1.0, 2.0), with_loss=True)
    write(
        __file__,
        "DiT and U-Net; four ways to condition a DiT",
        f"n = {10 * PER_CLASS}, 10 Euler steps; means over {options.seeds} seeds of training and sampling, with "
        "Student's 95 % interval. fd: Fréchet distance in the judge's features; numbers after names: guidance scale.\n",
        f"\n### MNIST, {options.seconds:g} seconds of training each\n",
        equal_seconds,
        f"\n### Digits, 8x8, {options.steps} steps each\n",
        conditionings,
    )


if __name__ == "__main__":
    main()
