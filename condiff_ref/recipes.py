"""What the course trains, as Python constants with what each costs and reaches, and the one function that runs them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from . import data, schedules
from .classifier import NoisyClassifier, classifier_loss, clean_loss
from .judge import JudgeNet, judge_loss
from .schedules import Schedule
from .train import diffusion_loss, drop, logit_normal
from .unet import UNet

ARCHITECTURES: dict[str, type[nn.Module]] = {cls.__name__: cls for cls in (UNet, NoisyClassifier, JudgeNet)}
SCHEDULES: dict[str, Callable[[], Schedule]] = {
    make.__name__: make for make in (schedules.cosine, schedules.linear_beta, schedules.flow)
}
LOADERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"digits": data.digits, "mnist": data.mnist}


@dataclass(frozen=True)
class Recipe:
    """A network, what it is trained on, and for how long. Plain values only: a checkpoint stores its recipe whole."""

    name: str
    about: str
    data: str = "digits"
    split: str = "train"
    architecture: str = "UNet"
    arguments: dict = field(default_factory=dict)
    kind: str = "flow"
    schedule: str = "flow"
    drop: float = 0.1  # probability that training hides the label
    time_mean: float = 0.0  # of the logit of t
    batch_size: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.01
    ema: float = 0.999
    seconds: float | None = 30.0
    steps: int | None = None

    def build(self, seed: int = 0) -> nn.Module:
        """The untrained network, its weights drawn from `seed`."""
        with torch.random.fork_rng(
            devices=[]
        ):  # torch's layers draw from the global generator: borrow it, give it back
            torch.manual_seed(seed)
            return ARCHITECTURES[self.architecture](**self.arguments)

    def path(self) -> Schedule:
        return SCHEDULES[self.schedule]()

    def load_data(self, root: str | Path | None = None) -> tuple[Tensor, Tensor]:
        """Images (n, 1, h, w) in [-1, 1] and labels (n,) of the split that this recipe trains on."""
        loader = LOADERS[self.data]
        return loader(self.split, root) if self.data == "mnist" else loader(self.split)

    def loss(self, network: nn.Module, x0: Tensor, label: Tensor, generator: Generator) -> Tensor:
        """One training loss (), on pictures that are encoded already."""
        if self.architecture == "JudgeNet":
            return judge_loss(network, x0, label, generator)
        if self.arguments.get("blind"):
            return clean_loss(network, x0, label)
        if self.architecture == "NoisyClassifier":
            return classifier_loss(network, x0, label, self.path(), generator)
        label = drop(label, network.null, self.drop, generator)
        draw_time = partial(logit_normal, mean=self.time_mean)
        return diffusion_loss(network, x0, self.kind, self.path(), generator, label=label, draw_time=draw_time)


# Results: seed 0, two cores of an AMD EPYC with AVX2, fp32, torch 2.13.0, 2026-11-21; brackets are 95 % intervals.
# At scale 2, 1,000 samples: accuracy 1.000 [0.996, 1.000], Frechet distance 3.2 [2.6, 3.8] (real: 1.06).
DIGITS_UNET = Recipe(
    name="digits-unet",
    about="class-conditional U-Net on the embedded 8x8 digits",
    arguments=dict(channels=1, widths=(32, 64), classes=10, emb_dim=64),
    seconds=30,
)
# 1,333 steps in 60 s. At scale 2, 2,000 samples: accuracy 0.992 [0.987, 0.995], Frechet distance 1.97 [1.72, 2.27]
# (real: 0.29). Small patches would draw finer lines, but cost four times as much per step.
MNIST_UNET = Recipe(
    name="mnist-unet",
    about="class-conditional U-Net on MNIST, patches of 4x4 pixels folded into channels",
    data="mnist",
    arguments=dict(channels=1, widths=(32, 64), classes=10, padding=2, patch=4),
    batch_size=32,
    time_mean=0.8,
    seconds=60,
)
DIGITS_CLASSIFIER = Recipe(
    name="digits-classifier",
    about="noise-aware classifier on the embedded 8x8 digits, for classifier guidance",
    architecture="NoisyClassifier",
    arguments=dict(channels=1, classes=10, widths=(16, 32), emb_dim=64),
    seconds=20,
)
MNIST_CLASSIFIER = Recipe(
    name="mnist-classifier",
    about="noise-aware classifier on MNIST, for classifier guidance",
    data="mnist",
    architecture="NoisyClassifier",
    arguments=dict(channels=1, classes=10, widths=(32, 64), patch=2),
    seconds=60,
)
# 12 minutes on one busy thread: right on 0.991 [0.991, 0.992] of the 60,000 digits that it has not seen.
MNIST_JUDGE = Recipe(
    name="mnist-judge",
    about="the judge of MNIST samples, trained on the test split that no generator here learns from",
    data="mnist",
    split="test",
    architecture="JudgeNet",
    steps=6000,
    seconds=None,
)
# The checkpoints that the course ships have cards with what they reach, in data/checkpoints.
# What lessons 03 and 04 compare: a classifier that knows no noise, networks whose label is never or always hidden, and
# a small one, for autoguidance.
DIGITS_CLEAN = replace(
    DIGITS_CLASSIFIER,
    name="digits-clean-classifier",
    about="classifier of clean 8x8 digits, blind to noise, to compare with",
    arguments=DIGITS_CLASSIFIER.arguments | dict(blind=True),
)
MNIST_CLEAN = replace(
    MNIST_CLASSIFIER,
    name="mnist-clean-classifier",
    about="classifier of clean MNIST digits, blind to noise, to compare with",
    arguments=MNIST_CLASSIFIER.arguments | dict(blind=True),
)
DIGITS_NEVER = replace(DIGITS_UNET, name="digits-never", about="digits-unet, its label never hidden", drop=0.0)
DIGITS_ALWAYS = replace(DIGITS_UNET, name="digits-always", about="digits-unet, its label always hidden", drop=1.0)
MNIST_NEVER = replace(MNIST_UNET, name="mnist-never", about="mnist-unet, its label never hidden", drop=0.0)
MNIST_ALWAYS = replace(MNIST_UNET, name="mnist-always", about="mnist-unet, its label always hidden", drop=1.0)
MNIST_SMALL = replace(
    MNIST_UNET,
    name="mnist-small",
    about="a small and briefly trained mnist-unet, for autoguidance",
    arguments=MNIST_UNET.arguments | dict(widths=(16, 32)),
    seconds=20,
)
RECIPES = (
    DIGITS_UNET,
    DIGITS_NEVER,
    DIGITS_ALWAYS,
    DIGITS_CLASSIFIER,
    DIGITS_CLEAN,
    MNIST_UNET,
    MNIST_NEVER,
    MNIST_ALWAYS,
    MNIST_SMALL,
    MNIST_CLASSIFIER,
    MNIST_CLEAN,
    MNIST_JUDGE,
)


def find(name: str, data: str | None = None) -> Recipe:
    """The recipe called "mnist-unet", or "unet" on data "mnist" (by default "digits").

    Raises ValueError, naming the recipes, where there is none of that name or it is for other data.
    """
    full = name if "-" in name else f"{data or 'digits'}-{name}"
    recipe = next((recipe for recipe in RECIPES if recipe.name == full), None)
    if recipe is None or (data and recipe.data != data):
        on = f" on {data}" if data else ""
        raise ValueError(f"there is no recipe {name!r}{on}: choose one of {', '.join(r.name for r in RECIPES)}")
    return recipe
