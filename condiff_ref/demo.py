"""The main job: train on real handwriting, guide at several scales, and look at what guidance gives and takes."""

import json
import os
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import guidance, recipes, viz
from .checkpoints import train_recipe
from .generate import Guidance, generate
from .metrics import Interval, evaluate
from .shapes import Images

SCALES = (0.0, 1.0, 2.0, 4.0)
MEANING = {0.0: "no guidance, the class is ignored", 1.0: "conditional", 2.0: "guided", 4.0: "guided hard"}
PER_CLASS = 100
STEPS = 10  # of Euler
ROWS = 6  # of ten digits, in each panel of the picture


def run(
    data: str,
    out: Path,
    messages: Console,
    results: Console,
    *,
    seconds: float | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    root: Path | None = None,
) -> None:
    """Train, sample, judge; print the table and write picture, figures and checkpoint: `out`/demo-`data`.*"""
    recipe, began = recipes.find("unet", data), time.monotonic()
    file = out / f"demo-{data}.safetensors"
    seconds = seconds or recipe.seconds
    messages.print(f"1/3 Training for {seconds:.0f} s: {recipe.about}.")
    model = train_recipe(recipe, file, seconds=seconds, seed=seed, device=device, root=root, overwrite=True)
    label = torch.arange(10).repeat(PER_CLASS)
    messages.print(
        f"2/3 Sampling {len(label)} digits at each of the guidance scales {', '.join(map('{:g}'.format, SCALES))}."
    )
    samples = {s: generate(model, label, Guidance(scale=s), steps=STEPS, seed=seed, progress=True) for s in SCALES}
    messages.print("3/3 Judging them, with bootstrap intervals.")
    judged = {s: evaluate(data, images, label, seed=seed, root=root) for s, images in samples.items()}

    real, real_label = recipe.load_data(root)
    rows = torch.stack([real[real_label == k][:ROWS] for k in range(10)], dim=1).flatten(0, 1)
    viz.save_png(picture(rows, samples, judged, recipe.about), file.with_suffix(".png"), alt(judged))
    figures = dict(card=model.card, scales={f"{s:g}": judged[s] for s in SCALES})
    file.with_suffix(".json").write_text(json.dumps(figures, indent=1, default=vars) + "\n")
    results.print(table(judged))
    program = os.path.relpath(sys.argv[0]) if os.sep in sys.argv[0] else sys.argv[0]
    messages.print(
        f"Done in {time.monotonic() - began:.0f} s. Open next:\n"
        f"  {file.with_suffix('.png')}: the samples, and what guidance gives and takes\n"
        f"  {program} sample {file} --scale 3 --out mine.png: samples of your own; --help lists every guidance\n"
        f"  {os.path.relpath(guidance.__file__)}: how it is done",
        soft_wrap=True,
    )


def table(judged: dict[float, dict]) -> Table:
    """A row per scale and one for real digits; under each value its 95 % interval. Fits into 80 columns."""
    first = next(iter(judged.values()))
    title = f"{first['n']} samples per scale, and real digits under the same judge; 95 % intervals"
    result = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
    for heading in ("scale", "accuracy", "diversity", "Frechet distance", "recall", "copies"):
        result.add_column(heading)
    for scale, f in judged.items():
        result.add_row(f"{scale:g}", *(_cell(f[name]) for name in ("accuracy", "diversity", "fd", "recall", "copies")))
    result.add_row(
        "real", _cell(first["accuracy_real"]), "1", _cell(first["fd_real"]), _cell(first["recall_real"]), "0.010"
    )
    return result


def _cell(interval: Interval) -> str:
    digits = 3 if interval.high < 10 else 2
    return f"{interval.value:.{digits}f}\n[dim]{interval.low:.{digits}f} - {interval.high:.{digits}f}[/]"


def picture(real: Images, samples: dict[float, Tensor], judged: dict[float, dict], about: str) -> Figure:
    """Six panels: real digits, samples at each scale, and accuracy against diversity."""
    figure = Figure(figsize=(9, 9), facecolor="white", layout="constrained")
    figure.suptitle(f"What guidance gives and takes: a {about}", fontsize=12, x=0.01, ha="left")
    panels = list(figure.subplots(3, 2).flat)
    viz.show_tile(panels[0], real, 10, "real digits")
    for axes, (scale, images) in zip(panels[1:], samples.items(), strict=False):
        title = f"scale {scale:g}, {MEANING[scale]}: {judged[scale]['accuracy'].value:.1%} right"
        viz.show_tile(axes, images[: 10 * ROWS], 10, title)
    viz.show_trade_off(panels[-1], {s: (f["accuracy"], f["diversity"]) for s, f in judged.items()})
    return figure


def alt(judged: dict[float, dict]) -> str:
    """The picture in words."""
    rows = (
        f"scale {s:g}: {f['accuracy'].value:.1%} right, diversity {f['diversity'].value:.2f}" for s, f in judged.items()
    )
    return "Handwritten digits, real and sampled at four guidance scales. " + "; ".join(rows) + "."
