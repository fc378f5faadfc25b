"""Do pictures show what captions say? Writes text.md beside this file.

python benchmarks/text.py [--captions N]
"""

import argparse
from pathlib import Path

import torch
from rows import Kept, fingerprint, table, write
from torch import Generator, Tensor

from condiff_ref import adherence as adhere
from condiff_ref import checkpoints
from condiff_ref.generate import Guidance, generate
from condiff_ref.intervals import share
from condiff_ref.recipes import SUBJECTS, VOCABULARY
from condiff_ref.scenes import DIGITS, LENGTH, by_quadrant, caption, scenes
from condiff_ref.schedules import add_noise, draw_noise

MODELS = {"scenes-unet": "text encoder taught first, then frozen", "scenes-joint": "text encoder learns along"}
SCALES, STEPS = (1.0, 2.0, 4.0), 16
COLUMNS = ("place", "whole 1", "whole 2", "size", "empty", "binding error")


def tokens(objects: list) -> Tensor:
    return VOCABULARY.encode([caption(some) for some in objects], LENGTH)[0]


def draw(model: checkpoints.Checkpoint, objects: list, scale: float) -> Tensor:
    return generate(model, tokens(objects), Guidance(scale=scale), steps=STEPS)


def measure(name: str, scale: float, n: int) -> dict:
    """Adherence, the token-swap test and the confusion table of one model at one scale."""
    model = checkpoints.load(name)
    asked = scenes(n, Generator().manual_seed(11)).objects
    pictures = draw(model, asked, scale)
    found = adhere.adherence(pictures, asked)
    two = [some for some in asked if len(some) == 2 and some[0].digit != some[1].digit]
    right = [whole(draw(model, some, scale), some) for some in (two, adhere.swap(two))]
    found["token swap"] = share(int((right[0] & right[1]).sum()), len(two))
    row = {name: str(interval) for name, interval in found.items()}
    return row | {"confusion": adhere.confusion(pictures, asked).tolist()}


def whole(pictures: Tensor, objects: list) -> Tensor:
    return (adhere.read(pictures)[0] == by_quadrant(objects)[0]).all(dim=1)


def attention(name: str, n: int) -> dict:
    """How much of a digit word's attention lies in its own quadrant, at several t; chance is 1/4."""
    model = checkpoints.load(name)
    drawn = scenes(n, Generator().manual_seed(12))
    ids, x0 = tokens(drawn.objects), model.encode(drawn.images)
    row = {}
    for level in (0.25, 0.5, 0.75, 0.95):
        t = torch.full((n,), level)
        xt = add_noise(x0, draw_noise(x0, Generator().manual_seed(13)), t, model.schedule)
        heat = model.network.weights(xt, t, ids).mean(1).unflatten(1, (8, 8))  # (n, 8, 8, tokens)
        inside = []
        for i, objects in enumerate(drawn.objects):
            places = torch.isin(ids[i], SUBJECTS).nonzero()[:, 0]
            for o, place in zip(objects, places, strict=True):
                top, left = 4 * (o.quadrant // 2), 4 * (o.quadrant % 2)
                part = heat[i, :, :, place]
                inside.append((part[top : top + 4, left : left + 4].sum() / part.sum()).item())
        row[f"{level:g}"] = f"{sum(inside) / len(inside):.2f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--captions", type=int, default=400)
    n = parser.parse_args().captions
    kept = Kept(Path("outputs/text.json"))
    columns = (*COLUMNS, "token swap")
    rows, places = [], []
    for name, about in MODELS.items():
        for scale in SCALES:
            row = kept(f"{name}|{scale}|{n}|{fingerprint(name)}", lambda n_=name, s=scale: measure(n_, s, n))
            rows.append([f"{name}: {about}", f"{scale:g}", *(row.get(column, "-") for column in columns)])
        heat = kept(f"{name}|attention|{fingerprint(name)}", lambda n_=name: attention(n_, 100))
        places.append([name, *heat.values()])
    ceiling = adhere.reader_accuracy()
    rows.append(["real scenes, as read", "-", *(str(ceiling.get(column, "-")) for column in columns)])
    best = kept(f"scenes-unet|4.0|{n}|{fingerprint('scenes-unet')}", dict)["confusion"]
    names = [*DIGITS, "empty"]
    write(
        __file__,
        "Text to image: do pictures show what captions say?",
        f"{n} captions, half of one digit, half of two, {STEPS} Euler steps, seed 0, brackets: 95 % intervals. place: "
        "the digit is in the quadrant asked for; chance for a digit there is 1/10. whole: all four quadrants right. "
        "token swap: both pictures right after the two digits of a caption are exchanged, from the same noise.\n",
        table(["network", "scale", *columns], rows),
        "\nShare of a digit word's attention inside its own quadrant, by t (chance .25):\n",
        table(["network", *(f"t = {level}" for level in heat)], places),
        "\nConfusion of scenes-unet at scale 4: asked for in a quadrant (rows), read there (columns).\n",
        table(["asked", *names], [[name, *row] for name, row in zip(names, best, strict=True)]),
    )


if __name__ == "__main__":
    main()
