"""Latents beside pixels, one trunk, equal seconds: cost and quality. Writes latents.md beside this file.

python benchmarks/latents.py [--seconds S] [--seeds K]

The same U-Net works on pixels, on pixels folded by 4 x 4 into channels, and on the latents of the shipped autoencoder.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from architectures import compare
from rows import Kept, fingerprint, step_times, table, untrained, write

from condiff_ref import checkpoints, data, recipes
from condiff_ref.autoencoder import kl_per_image
from condiff_ref.cost import unet_cost
from condiff_ref.metrics import Judge, class_accuracy
from condiff_ref.unet import UNet

TRUNK = dict(widths=(32, 64), classes=10, emb_dim=64)


def autoencoder_row() -> list[object]:
    """What the autoencoder keeps, on held-out digits."""
    model, judge = checkpoints.load("mnist-autoencoder"), Judge.mnist()
    images, label = (part[:2000] for part in data.mnist("test"))
    with torch.no_grad():
        rebuilt, mean, log_var = model.network.reconstruct(images, torch.Generator().manual_seed(0))
    bits = kl_per_image(mean, log_var).mean().item() / 0.6931471805599453
    error = (rebuilt - images).square().mean().item()
    numbers = images[0].numel() / mean[0].numel()
    read = class_accuracy(judge, rebuilt.clamp(-1, 1), label)
    return [f"{numbers:.3g}", f"{bits:.0f}", f"{error:.4f}", read, class_accuracy(judge, images, label)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    kept = Kept(Path("outputs/latents.json"))
    pixels = dataclasses.replace(recipes.MNIST_UNET, arguments=dict(channels=1, padding=2, **TRUNK))
    folded = dataclasses.replace(pixels, arguments=dict(channels=1, padding=2, patch=4, **TRUNK))
    latent = dataclasses.replace(recipes.MNIST_LATENT, arguments=TRUNK)
    networks = {"pixels, 1x32x32": pixels, "folded pixels, 16x8x8": folded, "latents, 2x8x8": latent}
    timed = kept("times", lambda: dict(seconds=step_times([untrained(r) for r in networks.values()])))["seconds"]
    entries = {
        title: (recipe, max(1, int(options.seconds / seconds)), seconds)
        for (title, recipe), seconds in zip(networks.items(), timed, strict=True)
    }
    key = Kept(Path(f"outputs/latents-{fingerprint('mnist-autoencoder')}.json"))
    quality = compare(key, entries, options.seeds, (1.0, 1.5, 2.0))
    costs = [
        ["pixels, 1x32x32", unet_cost(UNet(channels=1, padding=2, **TRUNK), 28, 28)],
        ["folded pixels, 16x8x8", unet_cost(UNet(channels=1, padding=2, patch=4, **TRUNK), 28, 28)],
        ["latents, 2x8x8", unet_cost(UNet(channels=2, **TRUNK), 8, 8)],
    ]
    write(
        __file__,
        "Latents beside pixels, one trunk",
        f"{options.seconds:g} s of training for each network by step times measured side by side, not counting the "
        f"autoencoder's own ({checkpoints.load('mnist-autoencoder').card['seconds']} s); n = 1,000, 10 Euler steps, "
        f"means over {options.seeds} seeds, Student's 95 % interval. fd: Fréchet distance in the judge's features.\n",
        table(
            ["works on", "million FLOPs per evaluation", "of latents", "ms per step", "of latents"],
            [
                [
                    title,
                    f"{cost.flops / 1e6:.1f}",
                    f"{cost.flops / costs[2][1].flops:.1f}",
                    f"{1000 * s:.0f}",
                    f"{s / timed[2]:.1f}",
                ]
                for (title, cost), s in zip(costs, timed, strict=True)
            ],
        ),
        "\n### Quality at equal seconds\n",
        quality,
        "\n### What the autoencoder keeps, on 2,000 held-out digits\n",
        table(
            ["times fewer numbers", "bits per image", "mean squared error", "read right", "originals read right"],
            [autoencoder_row()],
        ),
    )


if __name__ == "__main__":
    main()
