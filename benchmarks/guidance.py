"""Every guidance at several scales, adherence against diversity: writes guidance.md and guidance.png beside this file.

python benchmarks/guidance.py [--per-class N] [--methods cfg apg ...]

Each row is what `condiff sample` and `condiff evaluate` give for the shipped MNIST checkpoints, from the same noise.
Rows are kept in outputs/guidance.json as they come: a run that was cut off goes on.
"""

import argparse
import hashlib
import json
import time
from datetime import date
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from condiff_ref import checkpoints, viz
from condiff_ref.generate import Guidance, generate
from condiff_ref.intervals import Interval
from condiff_ref.metrics import evaluate

STEPS = 10  # of Euler
KEEP = Path("outputs/guidance.json")
MEASURED = ("accuracy", "fd", "precision", "recall", "diversity")
# the Okabe-Ito colours, and a marker each, so that the lines can be told apart without colour
STYLES = ["#000000 o", "#E69F00 s", "#56B4E9 ^", "#009E73 v", "#D55E00 D", "#0072B2 P", "#CC79A7 X", "#999999 *"]


def methods() -> dict[str, tuple[str, dict, tuple[float, ...]]]:
    """name: (the checkpoint that draws, the settings of its Guidance, scales)."""
    load = checkpoints.load
    return {
        "cfg": ("mnist-unet", dict(rule="cfg"), (0, 1, 1.25, 1.5, 2, 3, 5)),
        "cfg, two networks": ("mnist-never", dict(rule="cfg", uncond=load("mnist-always")), (1, 1.5, 2, 3)),
        "classifier": ("mnist-always", dict(rule="classifier", classifier=load("mnist-classifier")), (1, 2, 4, 8)),
        "clean classifier": (
            "mnist-always",
            dict(rule="classifier", classifier=load("mnist-clean-classifier")),
            (0.25, 0.5, 1, 2),
        ),
        "interval": ("mnist-unet", dict(rule="interval", high=0.7), (1.5, 2, 3, 5)),
        "apg": ("mnist-unet", dict(rule="apg"), (1.5, 2, 3, 5)),
        "rescale": ("mnist-unet", dict(rule="rescale"), (1.5, 2, 3, 5)),
        "autoguidance": ("mnist-unet", dict(rule="autoguidance", uncond=load("mnist-small")), (1.25, 1.5, 2, 3)),
    }


def measure(model: str, settings: dict, scale: float, per_class: int) -> dict:
    """Samples in numbers, each as [value, low, high]; seconds per 100 samples."""
    label = torch.arange(10).repeat(per_class)
    began = time.monotonic()
    images = generate(checkpoints.load(model), label, Guidance(scale=scale, **settings), steps=STEPS)
    seconds = (time.monotonic() - began) / len(label) * 100
    figures = evaluate("mnist", images, label)
    row = {name: [f.value, f.low, f.high] for name, f in figures.items() if isinstance(f, Interval)}
    return row | {"n": len(label), "seconds": seconds}


def run(names: list[str], per_class: int) -> dict[str, dict[str, dict]]:
    """method: {scale: row}, measured now or by an earlier run with as many samples of the same checkpoints."""
    files = sorted(checkpoints.SHIPPED.glob("mnist-*.safetensors"))
    shipped = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    kept = json.loads(KEEP.read_text()) if KEEP.exists() else {}
    todo = [(name, scale) for name, (_, _, scales) in methods().items() if name in names for scale in scales]
    for name, scale in tqdm(todo, unit="row", disable=None):
        model, settings, _ = methods()[name]
        key = f"{name}|{scale:g}|{per_class}|{shipped}"
        if key not in kept:
            kept[key] = measure(model, settings, scale, per_class)
            KEEP.parent.mkdir(exist_ok=True)
            partial = KEEP.with_suffix(".partial")
            partial.write_text(json.dumps(kept))
            partial.replace(KEEP)  # in one move: a kill leaves the old file or the new
    result: dict[str, dict[str, dict]] = {}
    for name, scale in todo:
        result.setdefault(name, {})[f"{scale:g}"] = kept[f"{name}|{scale:g}|{per_class}|{shipped}"]
    return result


def table(rows: dict[str, dict[str, dict]]) -> str:
    """The results as markdown."""
    first = next(iter(next(iter(rows.values())).values()))
    floors = ", ".join(f"{name} {first[f'{name}_real'][0]:.3f}" for name in ("accuracy", "fd", "precision", "recall"))
    lines = [
        "# Adherence against diversity, every guidance\n",
        f"`python benchmarks/guidance.py`, {date.today()}, {checkpoints.machine()}; the shipped MNIST checkpoints, "
        f"seed 0, n = {first['n']}, {STEPS} Euler steps, brackets: 95 % intervals. fd: Fréchet distance in the judge's "
        f"features. Real digits in the samples' place: {floors}, diversity 1.\n",
        "![Class accuracy against diversity and against Fréchet distance, a line per method](guidance.png)\n",
        "| method | scale | " + " | ".join(MEASURED) + " | s per 100 samples |",
        "|" + "---|" * (len(MEASURED) + 3),
    ]
    for name, scales in rows.items():
        for scale, row in scales.items():
            cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*row[column]) for column in MEASURED]
            lines.append(f"| {name} | {scale} | " + " | ".join(cells) + f" | {row['seconds']:.2f} |")
    return "\n".join(lines) + "\n"


def picture(rows: dict[str, dict[str, dict]]) -> Figure:
    """Two panels: adherence against diversity, and against the Fréchet distance."""
    figure = Figure(figsize=(11, 5.5), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, across in ((left, "diversity"), (right, "fd")):
        for (name, scales), style in zip(rows.items(), STYLES, strict=False):
            draw(axes, name, scales, across, *style.split())
        axes.grid(alpha=0.3)
    left.set(yscale="log", ylim=(1, LEAST), ylabel="read as another class (log; up is better)")
    left.axvline(1, color=viz.COLOURS["data"], lw=0.8, ls=":")
    left.set(xlabel="diversity within a class (real digits: 1)")
    left.set_title("adherence against diversity, 95 % intervals; numbers: scales", fontsize=10, loc="left")
    floor = next(iter(next(iter(rows.values())).values()))["fd_real"][0]
    right.axvline(floor, color=viz.COLOURS["data"], lw=0.8, ls=":")
    right.set(xscale="log", xticks=(0.5, 1, 2, 5, 10), xticklabels=("0.5", "1", "2", "5", "10"))
    right.set(xlabel="Fréchet distance (log; dotted: other real digits)")
    right.set_title("the same samples, against the distance to real digits", fontsize=10, loc="left")
    right.legend(fontsize=8, loc="lower left")
    return figure


LEAST = 7e-4  # the share of errors at which the axis ends; n = 1,000 without one is shown there


def draw(axes: Axes, name: str, scales: dict[str, dict], across: str, colour: str, marker: str) -> None:
    """One line, a point for each scale, with both intervals."""
    points = []
    for scale, row in scales.items():
        x, low_x, high_x = row[across]
        y, high_y, low_y = (max(1 - accuracy, LEAST) for accuracy in row["accuracy"])
        axes.plot([low_x, high_x], [y, y], color=colour, lw=0.8)
        axes.plot([x, x], [low_y, high_y], color=colour, lw=0.8)
        axes.annotate(scale, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7, color=colour)
        points.append((x, y))
    axes.plot(*zip(*points, strict=True), f"{marker}-", color=colour, ms=5, lw=1.2, label=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--methods", nargs="+", choices=list(methods()), default=list(methods()))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    rows = run(options.methods, options.per_class)
    options.out.write_text(table(rows))
    alt = "Class accuracy against diversity, and against Fréchet distance, for each kind of guidance at several scales."
    viz.save_png(picture(rows), options.out.with_suffix(".png"), alt)
    print(table(rows))


if __name__ == "__main__":
    main()
