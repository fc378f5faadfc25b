"""The command line: demo, train, sample, evaluate, doctor. Messages go to stderr, results to stdout."""

import json
import sys
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from typer import Argument, Option

from . import checkpoints, demo, doctor, generate, metrics, pictures, recipes
from .data import DataError
from .files import CheckpointError
from .train import TrainingDiverged

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
messages = Console(stderr=True, highlight=False)
results = Console(highlight=False)


class DataSet(StrEnum):
    """What to train on and to judge by."""

    digits = "digits"
    mnist = "mnist"


Rule = StrEnum("Rule", {rule.replace("-", "_"): rule for rule in generate.RULES})
Sampler = StrEnum("Sampler", list(generate.SAMPLERS))

DataRoot = Annotated[Path | None, Option(help="Folder that holds MNIST/raw; else CONDIFF_MNIST, else data.")]
Json = Annotated[Path | None, Option("--json", help="Write all figures to this file too.")]
Device = Annotated[str, Option(help="cpu, cuda, or auto: the GPU if there is one.")]
Seed = Annotated[int, Option(min=0)]


def _tell_version(asked: bool) -> bool:
    if asked:
        results.print(f"condiff {metadata.version('condiff')}")
        raise typer.Exit
    return asked


@app.callback()
def condiff(
    version: Annotated[
        bool, Option("--version", callback=_tell_version, is_eager=True, help="Print the version and stop.")
    ] = False,
):
    """Conditional diffusion models: train, sample with any guidance, judge."""


@app.command("demo")
def run_demo(
    data: Annotated[DataSet, Option(help="digits needs no download.")] = DataSet.digits,
    seconds: Annotated[float | None, Option(min=1, help="Training time, instead of the recipe's own.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path, Option(help="Folder for picture, table and checkpoint.")] = Path("outputs"),
    data_root: DataRoot = None,
):
    """Train on handwritten digits, sample each class at guidance scales 0, 1, 2 and 4, and show the results."""
    warn_if_busy()
    demo.run(data, out, messages, results, seconds=seconds, seed=seed, device=pick_device(device), root=data_root)


@app.command()
def train(
    recipe: Annotated[str, Argument(help="One of " + ", ".join(r.name for r in recipes.RECIPES) + "; or unet, ...")],
    data: Annotated[DataSet | None, Option(help="Which data a short name such as unet means.")] = None,
    seconds: Annotated[float | None, Option(help="Train for so long; the learning rate follows the clock.")] = None,
    steps: Annotated[int | None, Option(help="Train for so many steps: repeatable to the bit.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path | None, Option(help="The checkpoint to write. [default: outputs/RECIPE.safetensors]")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the checkpoint if it exists.")] = False,
    precision: Annotated[str, Option(help="bf16, fp32, or auto: what the hardware multiplies in.")] = "auto",
    checkpoint_every: Annotated[float, Option(min=0, help="Seconds between saved states.")] = 5.0,
    half: Annotated[bool, Option("--half", help="Store the weights in 16 bits: half the size.")] = False,
    data_root: DataRoot = None,
    json_file: Json = None,
):
    """Train a recipe into a checkpoint. A run that was cut off goes on where it stopped: type the same again."""
    chosen = recipes.find(recipe, data)
    out = out or Path("outputs") / f"{chosen.name}.safetensors"
    if (resume := checkpoints.resume_file(out)).exists():
        messages.print(f"Going on with the run that was cut off ({resume}).")
    warn_if_busy()
    result = checkpoints.train_recipe(
        chosen,
        out,
        steps=steps,
        seconds=seconds,
        seed=seed,
        device=pick_device(device),
        precision=precision,
        every=checkpoint_every,
        root=data_root,
        overwrite=overwrite,
        half=half,
    )
    report(result.card | {"recipe": chosen.name, "checkpoint": str(out)}, json_file)


@app.command()
def sample(
    checkpoint: Annotated[str, Argument(help="A file, or the name of one that the course ships.")],
    out: Annotated[Path, Option(help="FILE.npz (images, labels) or FILE.png.")],
    per_class: Annotated[int, Option(min=1, help="Samples of each class, or of the caption.")] = 10,
    caption: Annotated[str | None, Option(help='For text to image: "a large three at the top left".')] = None,
    scale: Annotated[float, Option(help="0 unconditional, 1 conditional, above 1 guided.")] = 2.0,
    guidance: Annotated[Rule, Option()] = Rule.cfg,
    uncond: Annotated[str | None, Option(help="Another checkpoint for the unconditional pass.")] = None,
    classifier: Annotated[str | None, Option(help="A noise-aware classifier, for --guidance classifier.")] = None,
    avoid: Annotated[int | None, Option(min=0, help="Class to keep away from, for negative and perp-neg.")] = None,
    low: Annotated[float, Option(help="interval: guide where low < t <= high.")] = 0.0,
    high: Annotated[float, Option()] = 1.0,
    parallel: Annotated[float, Option(help="apg: share of the parallel part that stays.")] = 0.0,
    max_norm: Annotated[float, Option(help="apg: cap on the length of the update.")] = float("inf"),
    phi: Annotated[float, Option(help="rescale: 0 not at all, 1 fully.")] = 0.7,
    negative_scale: Annotated[float, Option(help="perp-neg: weight of the negative part.")] = 1.0,
    sampler: Annotated[Sampler, Option()] = Sampler.euler,
    steps: Annotated[int, Option(min=1)] = 20,
    clip: Annotated[bool, Option(help="Clamp estimates of x0 to the range of pixels.")] = True,
    seed: Seed = 0,
    device: Device = "auto",
):
    """Draw samples of every class, or of a caption, from a trained checkpoint."""
    if out.suffix not in (".npz", ".png"):
        raise ValueError(f"--out must end in .npz or .png, got {out}")
    where = pick_device(device)
    model, other, noise_aware = (path and checkpoints.load(path, where) for path in (checkpoint, uncond, classifier))
    settings = dict(uncond=other, classifier=noise_aware, avoid=avoid, low=low, high=high, parallel=parallel)
    settings |= dict(max_norm=max_norm, phi=phi, negative_scale=negative_scale)
    rule = generate.Guidance(guidance, scale, **settings)
    label = torch.arange(1 if caption is not None else model.classes).repeat(per_class)
    asked = label if caption is None else model.read_caption(caption).repeat(per_class, 1)
    images = generate.generate(model, asked, rule, sampler=sampler, steps=steps, seed=seed, clip=clip, progress=True)
    pictures.write(out, images, label)
    messages.print(f"{len(images)} samples at scale {scale:g} ({guidance}, {sampler}, {steps} steps) in {out}")


@app.command()
def evaluate(
    file: Annotated[Path, Argument(help="FILE.npz with images (n, 1, h, w) in [-1, 1] and labels (n,).")],
    data: Annotated[DataSet, Option(help="What the samples should look like.")],
    seed: Annotated[int, Option(min=0, help="Of the real subsets and of the bootstrap.")] = 0,
    data_root: DataRoot = None,
    json_file: Json = None,
):
    """Judge samples: class accuracy, Frechet distance, precision, recall, diversity and copies, with intervals."""
    images, label = pictures.read(file)
    figures = metrics.evaluate(data, images, label, seed=seed, root=data_root)
    report(figures, json_file)


@app.command("doctor")
def run_doctor(data_root: DataRoot = None):
    """Look at this machine and say what is wrong and what to type."""
    findings = list(doctor.examine(data_root))
    results.print(doctor.screen(findings))
    if any(finding.level == "broken" for finding in findings):
        raise typer.Exit(1)


def warn_if_busy() -> None:
    """Say before training, not after, that other work on this machine will spoil it."""
    finding = doctor.load()
    if finding.level != "ok":
        messages.print(f"[yellow]Note:[/] {finding.found}; {finding.fix}")


def pick_device(name: str) -> torch.device:
    """Raises ValueError for a device that this machine or this torch does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: take cpu, or see `condiff doctor`") from error
    return device


def report(figures: dict, path: Path | None) -> None:
    """One figure per line to stdout, and all of them as JSON to the file."""
    for name, value in figures.items():
        results.print(f"{name}: {value}", soft_wrap=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1, default=vars) + "\n")


def main() -> None:
    """Entry point: errors that we foresee become one line and exit code 1, without a traceback."""
    try:
        app()
    except (DataError, CheckpointError, TrainingDiverged, ValueError, OSError) as error:
        messages.print(f"[red bold]condiff:[/] {error}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        messages.print("stopped; the same command goes on from the last saved state")
        sys.exit(130)


if __name__ == "__main__":
    main()
