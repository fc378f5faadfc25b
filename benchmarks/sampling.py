"""Sampling: seconds and quality against sampler and steps. Writes sampling.md.

python benchmarks/sampling.py [--checkpoint NAME] [--per-class N]
"""

import argparse
import time
from pathlib import Path

import torch
from rows import Kept, fingerprint, table, write

from condiff_ref import checkpoints
from condiff_ref.generate import SAMPLERS, Guidance, generate
from condiff_ref.metrics import evaluate

SCALE = 1.5
STEPS = (4, 6, 8, 10, 16, 25, 50)
MEASURED = ("accuracy", "fd", "recall")


def row(name: str, sampler: str, steps: int, per_class: int) -> dict:
    """Numbers with intervals, and seconds per 100 pictures."""
    model, label = checkpoints.load(name), torch.arange(10).repeat(per_class)
    generate(model, label[:100], Guidance(scale=SCALE), sampler=sampler, steps=2)  # warms up
    began = time.perf_counter()
    generate(model, label[:100], Guidance(scale=SCALE), sampler=sampler, steps=steps)
    seconds = time.perf_counter() - began
    images = generate(model, label, Guidance(scale=SCALE), sampler=sampler, steps=steps)
    figures = evaluate(model.recipe.data, images, label)
    return dict(seconds=seconds, fd_real=f"{figures['fd_real']}") | {each: f"{figures[each]}" for each in MEASURED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="mnist-unet")
    parser.add_argument("--per-class", type=int, default=200)
    options = parser.parse_args()
    kept, lines, floor = Kept(Path("outputs/sampling.json")), [], ""
    made = fingerprint(options.checkpoint)
    for sampler in SAMPLERS:
        for steps in STEPS:
            key = f"{sampler}|{steps}|{options.per_class}|{made}|{torch.get_num_threads()}"
            found = kept(key, lambda a=sampler, b=steps: row(options.checkpoint, a, b, options.per_class))
            evaluations = 2 * (2 * steps - 1 if sampler == "heun" else steps)
            lines.append([sampler, steps, evaluations, *(found[each] for each in MEASURED), f"{found['seconds']:.2f}"])
            floor = found["fd_real"]
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
