"""The pictures that demo, command line and lessons share: one colour per role, and a description beside each.

Figures are built without pyplot, so that they may be drawn on any thread.
"""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from .shapes import Images

# The Okabe-Ito palette, told apart with every common colour blindness.
COLOURS = {
    "data": "#000000",
    "noise": "#999999",
    "conditional": "#0072B2",
    "unconditional": "#E69F00",
    "guided": "#D55E00",
}


def tile(images: Images, columns: int, gap: int = 1) -> Tensor:
    """One picture (height, width) in [-1, 1] of all the images in rows of `columns`, set apart by white lines.

    Raises ValueError where the images do not fill the rows.
    """
    n, _, h, w = images.shape
    if n % columns:
        raise ValueError(f"{n} images do not fill rows of {columns}")
    cells = torch.ones(n, h + gap, w + gap)
    cells[:, :h, :w] = -images[:, 0].float().cpu()  # ink on paper, as the digits were written
    rows = cells.reshape(n // columns, columns, h + gap, w + gap).permute(0, 2, 1, 3)
    return rows.reshape(n // columns * (h + gap), columns * (w + gap))[:-gap, :-gap]


def show_tile(axes: Axes, images: Images, columns: int, title: str = "") -> None:
    """Draw a tile into matplotlib axes, ink on paper, without ticks."""
    axes.imshow(tile(images, columns).numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_axis_off()


def show_trade_off(axes: Axes, points: dict[float, tuple]) -> None:
    """Draw, for each guidance scale, diversity across and class accuracy up, with their intervals as crosses."""
    for i, (scale, (accuracy, diversity)) in enumerate(points.items()):
        colour = COLOURS[{0.0: "unconditional", 1.0: "conditional"}.get(scale, "guided")]
        axes.plot([diversity.low, diversity.high], [accuracy.value] * 2, color=colour, lw=2)
        axes.plot([diversity.value] * 2, [accuracy.low, accuracy.high], color=colour, lw=2)
        below = (0, -16 - 12 * (i % 2))  # neighbours take turns, so that their names stay apart
        where = dict(xytext=below, textcoords="offset points", ha="center", fontsize=9)
        axes.annotate(f"scale {scale:g}", (diversity.value, accuracy.value), color=colour, **where)
    axes.axvline(1, color=COLOURS["data"], lw=0.8, ls=":")
    axes.margins(x=0.15)
    axes.set(xlabel="diversity within a class (real digits: 1)", ylabel="class accuracy", ylim=(-0.1, 1.05))
    axes.set_title("adherence against diversity, 95 % intervals", fontsize=10, loc="left")


def save_png(figure: Figure, path: Path, alt: str) -> None:
    """Write a figure with its description in the file's header, for screen readers and for search."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path, metadata={"Title": alt, "Description": alt})


def save_tile(images: Images, columns: int, path: Path, alt: str) -> None:
    """Write a tile as a PNG, each pixel enlarged so that a digit is about 56 pixels high."""
    picture = tile(images, columns)
    zoom = max(1, round(56 / images.shape[-1]))
    height, width = picture.shape
    figure = Figure(figsize=(width * zoom / 100, height * zoom / 100), dpi=100, facecolor="white")
    figure.figimage(picture.kron(torch.ones(zoom, zoom)).numpy(), cmap="gray", vmin=-1, vmax=1)
    save_png(figure, path, alt)
