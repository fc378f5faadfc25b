"""Measure the shipped checkpoints and write the card beside each: python tools/card.py [CHECKPOINT ...]

Generators are sampled and judged as `condiff sample` and `condiff evaluate` do; classifiers read held-out digits, clean
and noised; pictures for captions and hints are measured as in benchmarks/text.py and benchmarks/control.py.
"""

import argparse
import hashlib
import math
from datetime import date
from pathlib import Path

import torch

from condiff_ref import checkpoints
from condiff_ref.adherence import adherence
from condiff_ref.autoencoder import kl_per_image
from condiff_ref.checkpoints import Checkpoint
from condiff_ref.generate import Guidance, generate
from condiff_ref.intervals import bootstrap, share
from condiff_ref.metrics import Judge, class_accuracy, evaluate
from condiff_ref.recipes import LOADERS, VOCABULARY
from condiff_ref.scenes import LENGTH, caption, scenes, skeletons
from condiff_ref.schedules import add_noise, draw_noise

PER_CLASS, STEPS = 100, 20
CAPTIONS, HINTS = 400, 500
SCALES = (1.0, 1.5, 2.0)
LEVELS = (0.0, 0.25, 0.5, 0.75)


def generator_rows(model: Checkpoint) -> list[str]:
    """Samples at several scales, in numbers; of a network that hides its label always, or never, at scale 0 or 1 alone.
    The first row says what was measured."""
    label = torch.arange(model.classes).repeat(PER_CLASS)
    rows = ["| scale | accuracy | Fréchet distance (real) | recall (real) | diversity |", "|---|---|---|---|---|"]
    for scale in {0.0: (1.0,), 1.0: (0.0,)}.get(model.recipe.drop, SCALES):
        figures = evaluate(model.recipe.data, generate(model, label, Guidance(scale=scale), steps=STEPS), label)
        fd, recall = (f"{figures[name]} ({figures[name + '_real'].value:.3f})" for name in ("fd", "recall"))
        rows.append(f"| {scale:g} | {figures['accuracy']} | {fd} | {recall} | {figures['diversity']} |")
    return [
        f"Measured {date.today()}, n = {len(label):,}, {STEPS} Euler steps, seed 0; brackets: 95 % intervals.",
        "",
        *rows,
    ]


def classifier_rows(model: Checkpoint) -> list[str]:
    """The share of held-out digits that it reads right at several t, on its own path. The first row says so."""
    load = LOADERS[model.recipe.data]
    x0, label = load("test")
    x0, gen = model.affine.encode(x0), torch.Generator().manual_seed(0)
    rows = ["| t | right on held-out digits |", "|---|---|"]
    for level in LEVELS:
        t = torch.full((len(x0),), level)
        xt = add_noise(x0, draw_noise(x0, gen), t, model.schedule)
        with torch.no_grad():
            read = torch.cat([model.network(*part).argmax(1) for part in zip(xt.split(500), t.split(500), strict=True)])
        rows.append(f"| {level:g} | {share((read == label).sum().item(), len(label))} |")
    return [f"Measured {date.today()} on {len(label):,} digits; brackets: 95 % intervals.", "", *rows]


def caption_rows(model: Checkpoint) -> list[str]:
    """Adherence to captions at several scales. The first row says what was measured."""
    objects = scenes(CAPTIONS, torch.Generator().manual_seed(11)).objects
    ids = VOCABULARY.encode([caption(some) for some in objects], LENGTH)[0]
    found = {s: adherence(generate(model, ids, Guidance(scale=s), steps=STEPS), objects) for s in (1.0, 2.0, 4.0)}
    names = list(found[1.0])
    rows = [f"| scale | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    rows += [f"| {s:g} | {' | '.join(str(row[name]) for name in names)} |" for s, row in found.items()]
    return [f"Measured {date.today()}, {CAPTIONS} captions, {STEPS} Euler steps; brackets: 95 % intervals.", "", *rows]


def control_rows(model: Checkpoint) -> list[str]:
    """Fidelity to skeletons of held-out digits, with and without control. The first row says what was measured."""
    images, label = (part[:HINTS] for part in LOADERS[model.recipe.data]("test"))
    judge = Judge.digits() if model.recipe.data == "digits" else Judge.mnist()
    hints, rows = skeletons(images), ["| strength | IoU with the hint | read as the label |", "|---|---|---|"]
    for strength in (0.0, 1.0):
        drawn = generate(model, label, Guidance(scale=1.5), steps=STEPS, hint=hints, strength=strength)
        lines = skeletons(drawn)
        iou = (lines * hints).flatten(1).sum(1) / torch.maximum(lines, hints).flatten(1).sum(1).clamp(min=1)
        fidelity = bootstrap(lambda x: x.mean().item(), iou)
        rows.append(f"| {strength:g} | {fidelity} | {class_accuracy(judge, drawn, label)} |")
    about = (
        f"Measured {date.today()}, {HINTS} hints, guidance scale 1.5, {STEPS} Euler steps; brackets: 95 % intervals."
    )
    return [about, "", *rows]


def autoencoder_rows(model: Checkpoint) -> list[str]:
    """What is kept of held-out digits. The first row says what was measured."""
    images, label = (part[:2000] for part in LOADERS[model.recipe.data]("test"))
    judge = Judge.digits() if model.recipe.data == "digits" else Judge.mnist()
    with torch.no_grad():
        rebuilt, mean, log_var = model.network.reconstruct(images, torch.Generator().manual_seed(0))
    bits = kl_per_image(mean, log_var).mean().item() / math.log(2)
    error, read = (rebuilt - images).square().mean().item(), class_accuracy(judge, rebuilt.clamp(-1, 1), label)
    return [
        f"Measured {date.today()} on {len(label):,} held-out digits (the judge knows them); brackets: 95 % intervals.",
        "",
        "| mean squared error | read right (originals) | bits per image | scale |",
        "|---|---|---|---|",
        f"| {error:.4f} | {read} ({class_accuracy(judge, images, label).value:.3f}) | {bits:.0f} | "
        f"{model.network.scale.item():.4f} |",
    ]


ROWS = {
    "TextToImage": caption_rows,
    "Controlled": control_rows,
    "Autoencoder": autoencoder_rows,
    "NoisyClassifier": classifier_rows,
}


def card(path: Path) -> str:
    """The whole text."""
    model = checkpoints.load(path)
    recipe, trained = model.recipe, model.card
    stored = [p for p in model.network.state_dict().values() if p.is_floating_point()]
    half = " --half" if path.stat().st_size < 3 * sum(p.numel() for p in stored) else ""
    rows = ROWS.get(recipe.architecture, generator_rows)(model)
    command = f"condiff train {recipe.name} --steps {trained['steps']}{half} --out data/checkpoints/{path.name}"
    return "\n".join(
        [
            f"# {recipe.name}",
            "",
            f"{recipe.about[0].upper()}{recipe.about[1:]}.",
            "",
            "| | |",
            "|---|---|",
            f"| command | `{command}` |",
            f"| seed, steps | {trained['seed']}, {trained['steps']:,} of {recipe.batch_size} images |",
            f"| time | {trained['seconds']} s, {trained['precision']}, {trained['machine']} |",
            *([f"| built on | {recipe.base} |"] if recipe.base else []),
            f"| loss at the end | {trained['loss']:.4f} |",
            f"| SHA-256 | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |",
            "",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="*", type=Path, help="all but the judge, if none is named")
    every = [path for path in sorted(checkpoints.SHIPPED.glob("*.safetensors")) if not path.stem.endswith("judge")]
    for path in parser.parse_args().checkpoints or every:
        path.with_suffix(".md").write_text(card(path))
        print(path.with_suffix(".md"))


if __name__ == "__main__":
    main()
