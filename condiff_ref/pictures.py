"""Samples as files: npz for `condiff evaluate`, png to look at."""

import zipfile
from pathlib import Path

import numpy as np
import torch

from . import viz
from .shapes import Images, Labels


def write(path: Path, images: Images, label: Labels) -> None:
    """FILE.npz holds `images` float32 (n, 1, h, w) in [-1, 1] and `labels` int64 (n,); FILE.png shows a row per class.

    Raises ValueError for another ending.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, images=images.float().numpy(), labels=label.long().numpy())
        return
    if path.suffix != ".png":
        raise ValueError(f"samples are written as .npz or .png, not {path.suffix or 'without an ending'}: {path}")
    order = label.argsort(stable=True)
    per_class = len(label) // len(label.unique())
    viz.save_tile(images[order], per_class, path, f"{len(images)} samples, a row for each of the classes in order")


def read(path: Path) -> tuple[Images, Labels]:
    """The images and labels of an npz. Raises ValueError that names what is wrong with the file."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, label = (torch.from_numpy(arrays[name]) for name in ("images", "labels"))
    except (KeyError, TypeError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an npz with `images` and `labels`: {error}") from error
    if images.ndim != 4 or label.shape != images.shape[:1] or not len(label):
        raise ValueError(
            f"{path}: images must be (n, 1, h, w) and labels (n,), got {tuple(images.shape)} and {tuple(label.shape)}"
        )
    if not images.is_floating_point() or label.is_floating_point():
        raise ValueError(f"{path}: images must be floats and labels integers, got {images.dtype} and {label.dtype}")
    if not images.isfinite().all() or images.min() < -1.001 or images.max() > 1.001:
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"{path}: pixels must lie in [-1, 1], these go from {low:g} to {high:g}")
    return images.float(), label.long()
