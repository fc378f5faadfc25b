"""What training and sampling cost as picture, batch, width and steps grow, and where the time goes: writes growth.md.

python benchmarks/growth.py

Each row runs in a process of its own, so that its peak of memory is its own.
"""

import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rows import Kept, table, write
from torch import Generator, Tensor
from torch.profiler import ProfilerActivity, profile

from condiff_ref import checkpoints, viz
from condiff_ref.cost import unet_cost
from condiff_ref.guidance import cfg
from condiff_ref.recipes import MNIST_UNET, Recipe
from condiff_ref.samplers import euler_step, sample
from condiff_ref.schedules import time_grid
from condiff_ref.train import fit

BASE = replace(MNIST_UNET, arguments=MNIST_UNET.arguments | dict(padding=0))  # sizes below are multiples of the patch
SIZE = 32
STEPS, TURNS = 10, 3
TRAINING = {
    "side": (16, 32, 64, 128),
    "batch": (8, 16, 32, 64, 128, 256),
    "widths": ((16, 32), (32, 64), (64, 128), (128, 256)),
}
SAMPLING = {"side": (16, 32, 64, 128), "steps": (5, 10, 20, 50)}
COMPILED = Path("outputs/compiled")
PARTS = ("#0072b2", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#f0e442", "#999999")  # told apart by everybody
GROUPS = {
    "convolutions": ("convolution",),
    "group norms": ("group_norm",),
    "activations": ("silu",),
    "linear layers": ("addmm", "aten::mm", "aten::bmm"),
    "optimiser and average": ("adamw", "_foreach", "lerp"),
    "copies and concatenation": ("copy", "cat", "pad", "shuffle", "clone", "contiguous"),
}


def grown(name: str, value: object) -> tuple[Recipe, int]:
    """The recipe with one thing changed, and the side of its pictures."""
    match name:
        case "side":
            return BASE, value
        case "batch":
            return replace(BASE, batch_size=value), SIZE
        case "widths":
            return replace(BASE, arguments=BASE.arguments | dict(widths=value)), SIZE
    raise ValueError(name)


def training_row(name: str, value: object) -> dict:
    """Seconds and bytes of a training step, loop and all."""
    recipe, side = grown(name, value)
    images, labels, device = _pictures(recipe, side)
    network = recipe.build()
    cost = unet_cost(network, side, side)
    before = _peak(device)
    seconds = []
    for steps in (2, *[STEPS] * TURNS):  # the first turn warms up
        result = fit(
            network,
            recipe.loss,
            images,
            labels,
            steps=steps,
            batch_size=recipe.batch_size,
            device=device,
            progress=False,
        )
        seconds.append(result.seconds / steps)
    flops = 6 * cost.macs * recipe.batch_size  # forward two per multiply-add, backward twice that
    return dict(
        seconds=statistics.median(seconds[1:]),
        bytes=_peak(device) - before,
        flops=flops,
        weights=cost.weights,
        batch=recipe.batch_size,
    )


def sampling_row(name: str, value: int) -> dict:
    """Seconds and bytes of sampling 100 pictures with guidance."""
    side, steps = (value, 10) if name == "side" else (SIZE, value)
    device = _device()
    model = checkpoints.Checkpoint(BASE.build().eval().to(device), BASE, checkpoints.Affine(0.0, 1.0), {})
    guided = cfg(model.denoiser(torch.arange(10, device=device).repeat(10)), model.denoiser(), 2.0)
    noise = torch.randn(100, 1, side, side).to(device)
    before, seconds = _peak(device), []
    for _ in range(TURNS + 1):
        began = time.perf_counter()
        sample(euler_step(model.schedule), guided, noise, time_grid(steps)).cpu()
        seconds.append(time.perf_counter() - began)
    return dict(seconds=statistics.median(seconds[1:]), bytes=_peak(device) - before)


def peak_flops(_: str, side: int) -> dict:
    """FLOPs per second of this machine's best matrix product (side, side) x (side, side) in float32."""
    device = _device()
    a, best = torch.randn(side, side, device=device), 0.0
    for _ in range(20):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return dict(flops_per_second=best)


def where(_: str, batch: int) -> dict:
    """The share of a training step that each group of operations takes."""
    recipe = replace(BASE, batch_size=batch)
    images, labels, device = _pictures(recipe, SIZE)
    network = recipe.build()
    options = dict(batch_size=batch, device=device, progress=False)
    fit(network, recipe.loss, images, labels, steps=3, **options)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as profiler:
        fit(network, recipe.loss, images, labels, steps=STEPS, **options)
    shares = dict.fromkeys([*GROUPS, "the rest"], 0.0)
    for event in profiler.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        shares[_group(event.key.lower())] += own
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def compiled_row(name: str, batch: int) -> dict:
    """Seconds of a training step as it is and compiled, turn by turn, and until the first compiled one is done: "new"
    to this machine, or when it was compiled "before"."""
    if name == "new":
        shutil.rmtree(COMPILED, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(COMPILED.resolve())
    recipe = replace(BASE, batch_size=batch)
    images, labels, device = _pictures(recipe, SIZE)
    plain, compiled = recipe.build(), recipe.build()
    compiled.compile()
    options = dict(batch_size=batch, device=device, progress=False)
    began = time.perf_counter()
    fit(compiled, recipe.loss, images, labels, steps=1, **options)
    first = time.perf_counter() - began
    seconds = {plain: [], compiled: []}
    for turn in range(TURNS + 1):
        for network, taken in seconds.items():
            result = fit(network, recipe.loss, images, labels, steps=STEPS, **options)
            if turn:  # the first warms up
                taken.append(result.seconds / STEPS)
    return dict(first=first, plain=statistics.median(seconds[plain]), compiled=statistics.median(seconds[compiled]))


def _group(operation: str) -> str:
    return next((name for name, parts in GROUPS.items() if any(part in operation for part in parts)), "the rest")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _pictures(recipe: Recipe, side: int) -> tuple[Tensor, Tensor, torch.device]:
    images = torch.randn(2 * recipe.batch_size, 1, side, side, generator=Generator().manual_seed(0))
    return images, torch.arange(2 * recipe.batch_size) % 10, _device()


def _peak(device: torch.device) -> int:
    """Bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def alone(kept: Kept, function: Callable[[str, object], dict], name: str, value: object) -> dict:
    """The row, measured in a fresh process."""

    def measure() -> dict:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, name, value).result()

    return kept(f"{function.__name__}|{name}|{value}|{BASE}|{_device()}|{torch.get_num_threads()}", measure)


def training_table(kept: Kept, peak: float) -> str:
    rows = []
    for name, values in TRAINING.items():
        for value in values:
            row = alone(kept, training_row, name, value)
            rows.append(
                [
                    f"{name} {value}",
                    f"{row['weights']:,}",
                    f"{1000 * row['seconds']:.0f}",
                    f"{row['batch'] / row['seconds']:,.0f}",
                    f"{row['flops'] / row['batch'] / 1e6:.0f}",
                    f"{row['flops'] / row['seconds'] / peak:.0%}",
                    f"{row['bytes'] / 1e6:.0f}",
                ]
            )
    columns = ["changed", "weights", "ms per step", "images/s", "MFLOP per image", "of the peak", "MB"]
    return table(columns, rows)


def sampling_table(kept: Kept) -> str:
    rows = []
    for name, values in SAMPLING.items():
        for value in values:
            row = alone(kept, sampling_row, name, value)
            rows.append([f"{name} {value}", f"{row['seconds']:.2f}", f"{row['bytes'] / 1e6:.0f}"])
    return table(["changed", "s per 100 pictures", "MB"], rows)


def compiled_table(kept: Kept) -> str:
    rows = []
    for batch in (32, 128):
        new, before = (alone(kept, compiled_row, name, batch) for name in ("new", "before"))
        steps = [f"{1000 * new[name]:.0f}" for name in ("plain", "compiled")]
        even = new["first"] / (new["plain"] - new["compiled"]) if new["plain"] > new["compiled"] else None
        spent = f"about {float(f'{even:.1g}'):,.0f} steps" if even else "never"
        rows.append([f"batch {batch}", *steps, f"{new['first']:.0f}", f"{before['first']:.0f}", spent])
    return table(["", "ms per step", "compiled", "s to the first step", "s, when it is cached", "pays after"], rows)


def picture(shares: dict[int, dict[str, float]]) -> Figure:
    """A bar per batch size, its parts in the same order."""
    figure = Figure(figsize=(9, 1.2 + 0.6 * len(shares)), facecolor="white", layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(shares, 0.0)
    for (name, _), colour in zip(next(iter(shares.values())).items(), PARTS, strict=True):
        widths = [100 * parts[name] for parts in shares.values()]
        bars = axes.barh([f"batch {batch}" for batch in shares], widths, left=list(left.values()), color=colour)
        axes.bar_label(
            bars, [f"{width:.0f}" if width >= 4 else "" for width in widths], label_type="center", fontsize=8
        )
        bars.set_label(name)
        left = {batch: left[batch] + width for batch, width in zip(left, widths, strict=True)}
    axes.set(xlabel="per cent of a training step", xlim=(0, 100))
    axes.set_title("Where the time of a training step goes", fontsize=10, loc="left")
    figure.legend(fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    return figure


def main() -> None:
    kept = Kept(Path("outputs/growth.json"))
    peak = alone(kept, peak_flops, "side", 1024)["flops_per_second"]
    shares = {batch: alone(kept, where, "batch", batch) for batch in (32, 128)}
    training, sampling, compiled = training_table(kept, peak), sampling_table(kept), compiled_table(kept)
    alt = "; ".join(
        f"batch {batch}: " + ", ".join(f"{name} {share:.0%}" for name, share in parts.items())
        for batch, parts in shares.items()
    )
    viz.save_png(picture(shares), Path(__file__).with_suffix(".png"), alt)
    write(
        __file__,
        "How cost grows, and where the time goes",
        f"{BASE.name} on pictures of side {SIZE}, batch {BASE.batch_size}, widths {BASE.arguments['widths']} where the "
        f"row says nothing else, float32. Peak: {peak / 1e9:.0f} GFLOP/s, the best product of 1024 x 1024 matrices. "
        "MFLOP: forward and backward, three times the forward pass. MB: what the process needs beyond its start. Three "
        "rows of training and two of sampling are one setting, measured again: they differ by what else the machine "
        "did, so smaller differences mean nothing.\n",
        "\n### Training: a step, the whole loop\n",
        training,
        "\n### Sampling: 100 pictures, guidance (two evaluations per step), 10 Euler steps\n",
        sampling,
        "\n### torch.compile: a training step, plain and compiled\n",
        compiled,
        f"\n![{alt}](growth.png)\n",
    )


if __name__ == "__main__":
    main()
