"""Do controlled pictures keep to their hints, and what do they owe to the label? Writes control.md beside this file.

python benchmarks/control.py [--hints N]; the hints are skeletons of held-out digits
"""

import argparse
from pathlib import Path

import torch
from rows import Kept, fingerprint, table, write
from torch import Tensor

from condiff_ref import checkpoints
from condiff_ref.checkpoints import Checkpoint
from condiff_ref.generate import Guidance, generate
from condiff_ref.intervals import bootstrap
from condiff_ref.metrics import Judge, class_accuracy
from condiff_ref.recipes import LOADERS
from condiff_ref.scenes import skeletons

MODELS = {"digits-control": Judge.digits, "mnist-control": Judge.mnist}
SCALE, STEPS = 1.5, 20


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Pixels of both over pixels of either, picture by picture."""
    return (a * b).flatten(1).sum(1) / torch.maximum(a, b).flatten(1).sum(1).clamp(min=1)


def cases(model: Checkpoint, label: Tensor) -> dict[str, tuple[Tensor, float, int]]:
    """name: (labels, strength, by how many the hints are shifted)."""
    null, wrong = torch.full_like(label, model.network.null), (label + 1) % model.classes
    strengths = {f"strength {strength:g}": (label, strength, 0) for strength in (0.25, 0.5, 0.75, 1.5)}
    return {
        "without control": (label, 0.0, 0),
        "with control": (label, 1.0, 0),
        "no label": (null, 1.0, 0),
        "no label, without control": (null, 0.0, 0),
        "another label than the hint's": (wrong, 1.0, 0),
        "the hint of another picture": (label, 1.0, 7),
        **strengths,
    }


def measure(name: str, n: int) -> dict:
    """All cases of one checkpoint: the same noise, labels and hints in each."""
    model, judge = checkpoints.load(name), MODELS[name]()
    images, digit = (part[:n] for part in LOADERS[model.recipe.data]("test"))
    hints, rows = skeletons(images), {}
    for case, (label, strength, shift) in cases(model, digit).items():
        given = hints.roll(shift, 0)
        pictures = generate(model, label, Guidance(scale=SCALE), steps=STEPS, hint=given, strength=strength)
        drawn = skeletons(pictures)
        chance = torch.stack([iou(drawn, hints.roll(k, 0)) for k in range(11, 31)]).mean(0)
        rows[case] = {
            "IoU with the hint": str(bootstrap(lambda x: x.mean().item(), iou(drawn, hints))),
            "chance": f"{chance.mean():.3f}",
            "read as the hint's digit": str(class_accuracy(judge, pictures, digit)),
            "read as the label": "-" if case.startswith("no label") else str(class_accuracy(judge, pictures, label)),
        }
    rows["real pictures"] = {
        "IoU with the hint": "1",
        "chance": "-",
        "read as the hint's digit": str(class_accuracy(judge, images, digit)),
        "read as the label": "-",
    }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hints", type=int, default=500)
    n = parser.parse_args().hints
    kept, parts = Kept(Path("outputs/control.json")), []
    for name in MODELS:
        rows = kept(f"{name}|{n}|{fingerprint(name)}", lambda n_=name: measure(n_, n))
        columns = next(iter(rows.values()))
        parts += [f"\n### {name}\n", table(["case", *columns], [[case, *row.values()] for case, row in rows.items()])]
    write(
        __file__,
        "ControlNet: fidelity to the hint, with and without control",
        f"{n} skeletons of held-out digits as hints, guidance scale {SCALE}, {STEPS} Euler steps, the same noise in "
        "each row, brackets: 95 % intervals. IoU: intersection over union of the drawn digit's skeleton with the hint; "
        "chance: with the hints of 20 other pictures. Shifted rows compare with the hint that they were *not* given.\n",
        *parts,
    )


if __name__ == "__main__":
    main()
