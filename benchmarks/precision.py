"""Does bfloat16 pay? Training steps and sampling of the course's networks in both precisions. Writes precision.md.

python benchmarks/precision.py [--pictures N]
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from unittest import mock

import torch
from rows import step_times, table, untrained, write

from condiff_ref import checkpoints, recipes
from condiff_ref.generate import Guidance, generate
from condiff_ref.recipes import Recipe

PRECISIONS = ("fp32", "bf16")
ELSEWHERE = ("TextToImage", "Controlled")  # they need captions, or hints
SAMPLED = ("digits-unet", "mnist-unet", "digits-dit", "mnist-dit", "digits-latent", "mnist-latent")
SCALE, STEPS, TURNS = 1.5, 10, 3


def networks() -> Iterator[Recipe]:
    """One recipe for each network."""
    seen = []
    for recipe in recipes.RECIPES:
        what = (recipe.architecture, recipe.arguments, recipe.data, recipe.batch_size)
        if recipe.architecture not in ELSEWHERE and what not in seen:
            seen.append(what)
            yield recipe


def training(recipe: Recipe) -> list[float]:
    """Seconds per step in each precision."""
    return step_times([untrained(recipe)] * len(PRECISIONS), [dict(precision=each) for each in PRECISIONS])


def sampling(name: str, pictures: int) -> list[float]:
    """Seconds for so many pictures in each precision: medians of turns taken side by side."""
    model, label = checkpoints.load(name), torch.arange(pictures) % 10
    seconds: list[list[float]] = [[] for _ in PRECISIONS]
    for turn in range(TURNS + 1):
        for precision, taken in zip(PRECISIONS, seconds, strict=True):
            with mock.patch.object(checkpoints, "uses_bf16", lambda *_, p=precision: p == "bf16"):
                began = time.perf_counter()
                generate(model, label, Guidance(scale=SCALE), steps=STEPS)
            if turn:  # the first warms up
                taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=1000)
    options = parser.parse_args()
    steps, samples = [], []
    for recipe in networks():
        full, half = training(recipe)
        cells = (f"{1000 * full:.1f}", f"{1000 * half:.1f}", f"{full / half:.2f}")
        steps.append([recipe.name, recipe.batch_size, *cells])
    for name in SAMPLED:
        full, half = sampling(name, options.pictures)
        samples.append([name, f"{full:.2f}", f"{half:.2f}", f"{full / half:.2f}"])
    write(
        __file__,
        "float32 and bfloat16",
        "autocast, channels_last, group norms in float32; medians of turns taken side by side. gain: how many times "
        "faster bfloat16 is.\n",
        "### Training: a step, the whole loop\n",
        table(["network of", "batch", "float32, ms", "bfloat16, ms", "gain"], steps),
        f"### Sampling: {options.pictures:,} pictures, {STEPS} Euler steps, guidance scale {SCALE}\n",
        table(["network of", "float32, s", "bfloat16, s", "gain"], samples),
    )


if __name__ == "__main__":
    main()
