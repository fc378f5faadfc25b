"""The recipe for MNIST with one thing changed at a time, at equal seconds of training: writes ablations.md.

python benchmarks/ablations.py [--seconds S] [--seeds K] [--only WORD ...]

Steps are timed side by side first; each variant is then trained for as many steps as take it S seconds, so that what
else this machine does changes no row.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from rows import Kept, over_seeds, step_times, table, write
from torch import Tensor

from condiff_ref import checkpoints, data
from condiff_ref.checkpoints import Checkpoint
from condiff_ref.generate import Guidance, generate
from condiff_ref.metrics import evaluate
from condiff_ref.recipes import MNIST_UNET, Recipe
from condiff_ref.train import fit, uniform, uses_bf16

SCALE, STEPS, PER_CLASS = 1.5, 10, 100
MEASURED = ("accuracy", "fd", "recall")


@dataclass(frozen=True)
class Variant:
    """The recipe, but for `changes` to it, `arguments` of its network, `options` of the loop, a frame of `crop` pixels
    around each picture that is cut off, because nearly all of it is black, and a function of ours or torch's that
    another one stands `instead` of, where the recipe has no word for it."""

    changes: Mapping[str, object] = field(default_factory=dict)
    arguments: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    crop: int = 0
    instead: tuple[str, Callable] | None = None

    @property
    def recipe(self) -> Recipe:
        return replace(MNIST_UNET, **{**self.changes, "arguments": MNIST_UNET.arguments | self.arguments})

    @property
    def key(self) -> str:
        """All that it is, for the file of rows. What stands instead goes by its name: give it another one when it does
        something else."""
        other = f"|{self.instead[1].__name__}" if self.instead else ""
        return f"{self.recipe}|{self.options}|{self.crop}{other}"

    def untrained(self) -> "Cropped":
        return Cropped(self.recipe.build(), self.recipe, data.Affine(0, 1), {}, self.crop)

    def swapped(self) -> AbstractContextManager:
        return mock.patch(*self.instead) if self.instead else nullcontext()


@dataclass(frozen=True)
class Cropped(Checkpoint):
    """A network of pictures without their frame, which is put around its samples again."""

    crop: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = super().shape
        return channels, height - 2 * self.crop, width - 2 * self.crop

    def decode(self, x0: Tensor) -> Tensor:
        return F.pad(super().decode(x0), [self.crop] * 4, value=-1.0)


def variants() -> dict[str, dict[str, Variant]]:
    """By what is changed."""
    base = MNIST_UNET
    return {
        "": {"the recipe": Variant()},
        "patch": {
            "2, widths 16, 32, 64": Variant(arguments=dict(patch=2, widths=(16, 32, 64))),
            "2, widths 16, 64": Variant(arguments=dict(patch=2, widths=(16, 64))),
            "8, one width of 64": Variant(arguments=dict(patch=8, widths=(64,))),
        },
        "side and patch": {
            "24, 3": Variant(arguments=dict(padding=0, patch=3), crop=2),
            "24, 4": Variant(arguments=dict(padding=0, patch=4), crop=2),
            "24, 2": Variant(arguments=dict(padding=0, patch=2), crop=2),
        },
        "widths": {
            "24, 48": Variant(arguments=dict(widths=(24, 48))),
            "48, 96": Variant(arguments=dict(widths=(48, 96))),
            "64, 128": Variant(arguments=dict(widths=(64, 128))),
            "64 alone": Variant(arguments=dict(widths=(64,))),
        },
        "batch": {str(n): Variant(dict(batch_size=n)) for n in (16, 32, 64, 128) if n != base.batch_size},
        "widths and batch": {
            f"{a}, {b}; 64": Variant(dict(batch_size=64), arguments=dict(widths=(a, b)))
            for a, b in ((48, 96), (64, 128))
        },
        "learning rate": {f"{lr:g}": Variant(dict(lr=lr)) for lr in (1e-3, 2e-3, 3e-3, 5e-3) if lr != base.lr},
        "optimiser": {
            "AdamW, betas 0.9, 0.999": Variant(instead=(ADAMW, slow_adamw)),
            "SGD, momentum 0.9, lr 0.1": Variant(dict(lr=0.1), instead=(ADAMW, sgd)),
            "SGD, momentum 0.9, lr 0.3": Variant(dict(lr=0.3), instead=(ADAMW, sgd)),
        },
        "weight decay": {"0": Variant(dict(weight_decay=0.0))},
        "average": {f"{ema:g}": Variant(dict(ema=ema)) for ema in (0.0, 0.99, 0.995, 0.999) if ema != base.ema},
        "mean of logit t": {f"{m:g}": Variant(dict(time_mean=m)) for m in (0.0, 0.4, 0.8, 1.2) if m != base.time_mean},
        "t": {"uniform": Variant(instead=("condiff_ref.recipes.logit_normal", uniform_time))},
        "target": {
            "noise, cosine path": Variant(dict(kind="eps", schedule="cosine")),
            "x0": Variant(dict(kind="x0")),
            "x0, cosine path": Variant(dict(kind="x0", schedule="cosine")),
            "v, cosine path": Variant(dict(kind="v", schedule="cosine")),
        },
        "label hidden": {f"{p:g}": Variant(dict(drop=p)) for p in (0.05, 0.1, 0.2) if p != base.drop},
        "precision": {other_precision(): Variant(options=dict(precision=other_precision()))},
    }


def other_precision() -> str:
    """Than the one that is chosen here."""
    return "fp32" if uses_bf16("auto", "cpu") else "bf16"


ADAMW = "torch.optim.AdamW"


def slow_adamw(parameters: Iterable, lr: float, *, weight_decay: float, **_: object) -> torch.optim.Optimizer:
    return ADAM(parameters, lr, betas=(0.9, 0.999), weight_decay=weight_decay, fused=True)


ADAM = torch.optim.AdamW  # while `slow_adamw` stands in its place


def sgd(parameters: Iterable, lr: float, *, weight_decay: float, **_: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay, fused=True)


def uniform_time(n: int, generator: torch.Generator | None = None, *, mean: float = 0.0) -> Tensor:
    return uniform(n, generator)


def train_and_judge(variant: Variant, steps: int, seed: int) -> dict:
    """Numbers without intervals: those come from the seeds."""
    recipe = variant.recipe
    images, labels = recipe.load_data()
    images = F.pad(images, [-variant.crop] * 4)
    affine = data.measure_affine(images)
    with variant.swapped():
        result = fit(
            recipe.build(seed),
            recipe.loss,
            affine.encode(images),
            labels,
            steps=steps,
            **recipe.loop,
            seed=seed,
            progress=False,
            **dict(variant.options),
        )
    label = torch.arange(10).repeat(PER_CLASS)
    model = Cropped(result.network, recipe, affine, {}, variant.crop)
    figures = evaluate(recipe.data, generate(model, label, Guidance(scale=SCALE), steps=STEPS, seed=seed), label)
    return {name: figures[name].value for name in MEASURED} | dict(fd_real=figures["fd_real"].value)


def times(kept: Kept, chosen: Sequence[Variant]) -> list[float]:
    """Seconds per step on this machine. New variants are timed beside the recipe, and told in the seconds that it took
    alone."""
    here = checkpoints.machine()
    alone = kept(f"seconds|{here}", lambda: dict(seconds=step_times([Variant().untrained()])[0]))["seconds"]
    share = {variant.key: f"share|{here}|{variant.key}" for variant in chosen}
    new = [variant for variant in chosen if share[variant.key] not in kept.rows]
    if new:
        beside, *seconds = step_times(
            [variant.untrained() for variant in (Variant(), *new)],
            [{}, *(dict(variant.options) for variant in new)],
            [variant.swapped for variant in (Variant(), *new)],
        )
        for variant, taken in zip(new, seconds, strict=True):
            kept(share[variant.key], lambda s=taken: dict(share=s / beside))
    return [alone * kept.rows[share[variant.key]]["share"] for variant in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="what is changed, of the first column")
    options = parser.parse_args()
    kept = Kept(Path("outputs/ablations.json"))
    chosen = {k: v for k, v in variants().items() if not options.only or k in options.only or k == ""}
    entries = [(group, name, variant) for group, named in chosen.items() for name, variant in named.items()]
    timed = times(kept, [variant for _, _, variant in entries])
    lines, floor = [], 0.0
    for (group, name, variant), seconds in zip(entries, timed, strict=True):
        steps = round(options.seconds / seconds)
        key = f"{checkpoints.hardware()}|{variant.key}|{PER_CLASS}|{steps}"
        rows = [
            kept(f"{key}|{seed}", lambda v=variant, n=steps, k=seed: train_and_judge(v, n, k))
            for seed in range(options.seeds)
        ]
        weights = sum(p.numel() for p in variant.recipe.build().parameters())
        means = [over_seeds([row[each] for row in rows]) for each in MEASURED]
        lines.append([group, name, f"{weights:,}", f"{1000 * seconds:.0f}", f"{steps:,}", *means])
        floor = rows[0]["fd_real"]
    write(
        __file__,
        f"Training on MNIST: the recipe, and what else was tried, {options.seconds:g} seconds each",
        f"guidance scale {SCALE}, {STEPS} Euler steps, n = {10 * PER_CLASS}; means over {options.seeds} seeds of "
        "training and sampling, with Student's 95 % interval. fd: Fréchet distance in the judge's features; that of "
        f"other real digits is {floor:.2f}. A row differs from the recipe in what its first column names. Times "
        "of steps that do equal work differ by some per cent: the noise of the machine.\n",
        table(["changed", "to", "weights", "ms per step", "steps", *MEASURED], lines),
    )


if __name__ == "__main__":
    main()
