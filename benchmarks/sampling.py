"""Sampling: seconds and quality against sampler and steps. Writes sampling.md.

python benchmarks/sampling.py [--checkpoint NAME] [--per-class N]
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rows import Kept, fingerprint, table, write

from condiff_ref import checkpoints
from condiff_ref.generate import SAMPLERS, Guidance, generate
from condiff_ref.metrics import evaluate

SCALE, TURNS = 1.5, 3
STEPS = (4, 6, 8, 10, 16, 25, 50)
MEASURED = ("accuracy", "fd", "recall")


def quality(name: str, sampler: str, steps: int, per_class: int) -> dict:
    """Numbers with intervals."""
    model, label = checkpoints.load(name), torch.arange(10).repeat(per_class)
    images = generate(model, label, Guidance(scale=SCALE), sampler=sampler, steps=steps)
    figures = evaluate(model.recipe.data, images, label)
    return {each: f"{figures[each]}" for each in (*MEASURED, "fd_real")}


def times(name: str, ways: Sequence[tuple[str, int]]) -> list[float]:
    """Seconds per 100 pictures of each (sampler, steps): medians of turns taken side by side."""
    model, label = checkpoints.load(name), torch.arange(10).repeat(10)
    seconds = [[] for _ in ways]
    for turn in range(TURNS + 1):
        for taken, (sampler, steps) in zip(seconds, ways, strict=True):
            began = time.perf_counter()
            generate(model, label, Guidance(scale=SCALE), sampler=sampler, steps=steps)
            if turn:  # the first warms up
                taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="mnist-unet")
    parser.add_argument("--per-class", type=int, default=200)
    options = parser.parse_args()
    kept, lines, floor = Kept(Path("outputs/sampling.json")), [], ""
    made = fingerprint(options.checkpoint)
    ways = [(sampler, steps) for sampler in SAMPLERS for steps in STEPS]
    rows = [
        kept(f"{way}|{options.per_class}|{made}", lambda w=way: quality(options.checkpoint, *w, options.per_class))
        for way in ways
    ]
    for (sampler, steps), row, seconds in zip(ways, rows, times(options.checkpoint, ways), strict=True):
        evaluations = 2 * (2 * steps - 1 if sampler == "heun" else steps)
        lines.append([sampler, steps, evaluations, *(row[each] for each in MEASURED), f"{seconds:.2f}"])
        floor = row["fd_real"]
    write(
        __file__,
        "Sampling: quality against time",
        f"shipped {options.checkpoint}, guidance scale {SCALE}, seed 0, n = {10 * options.per_class}; brackets: 95 % "
        f"intervals. fd: Fréchet distance in the judge's features; that of other real digits: {floor}. Evaluations are "
        "of the network, with label and without.\n",
        table(["sampler", "steps", "evaluations", *MEASURED, "s per 100 samples"], lines),
    )


if __name__ == "__main__":
    main()
