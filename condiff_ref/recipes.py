"""What the course trains, as Python constants with what each costs and reaches, and the one function that runs them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from . import data, schedules
from .autoencoder import Autoencoder, LatentDiffusion, vae_loss
from .classifier import NoisyClassifier, classifier_loss, clean_loss
from .controlnet import Controlled, ControlNet
from .dit import DiT
from .judge import JudgeNet, judge_loss
from .scenes import DIGITS, LENGTH, WORDS, scenes, skeletons
from .schedules import Schedule
from .shapes import Images
from .text import TextEncoder, TextToImage, Vocabulary, bind
from .train import diffusion_loss, drop, logit_normal
from .unet import UNet

CHUNK = 1000  # pictures thinned at once
SCENES = 8000  # canvases to learn captions from
VOCABULARY = Vocabulary(WORDS)
SUBJECTS = VOCABULARY.encode(DIGITS, 1)[0][:, 0]
ABOUT = (0, -1, 3, 4)  # in "a large three at the top left": the digit itself, its size, and the two words of its place


def text_to_image(base: nn.Module | None, *, dim: int, depth: int, heads: int, **unet: object) -> TextToImage:
    """A text encoder and a U-Net that attends to it; needs no base."""
    text = TextEncoder(VOCABULARY, dim, depth, heads, length=LENGTH)
    return TextToImage(text, UNet(channels=1, context_dim=dim, **unet))


def controlled(base: nn.Module, *, hint_channels: int) -> Controlled:
    """A ControlNet on a U-Net."""
    return Controlled(base, ControlNet(base, hint_channels))


def latent_diffusion(base: nn.Module, **unet: object) -> LatentDiffusion:
    """A U-Net on the latents of an autoencoder."""
    return LatentDiffusion(base, UNet(channels=base.latent_channels, **unet))


def caption_data(split: str) -> tuple[Tensor, Tensor]:
    """Canvases (n, 1, 16, 16) of the digits of that split, and their captions as token ids (n, 15)."""
    drawn = scenes(SCENES, Generator().manual_seed(0), source=data.digits(split))
    return drawn.images, VOCABULARY.encode(drawn.captions, LENGTH)[0]


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    cls.__name__: cls for cls in (UNet, DiT, Autoencoder, NoisyClassifier, JudgeNet)
}
# made on a base, from its network and the arguments
COMPOSITES: dict[str, Callable[..., nn.Module]] = {
    "TextToImage": text_to_image,
    "Controlled": controlled,
    "LatentDiffusion": latent_diffusion,
}
SCHEDULES: dict[str, Callable[[], Schedule]] = {
    make.__name__: make for make in (schedules.cosine, schedules.linear_beta, schedules.flow)
}
LOADERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "digits": data.digits,
    "mnist": data.mnist,
    "scenes": caption_data,
}
SIDES = {"digits": 8, "mnist": 28, "scenes": 16}


@dataclass(frozen=True)
class Recipe:
    """A network, what it is trained on, and for how long. Plain values only: a checkpoint stores its recipe whole."""

    name: str
    about: str
    data: str = "digits"
    split: str = "train"
    architecture: str = "UNet"
    arguments: dict = field(default_factory=dict)
    base: str = ""  # the shipped checkpoint that it is built on, which stays as it is
    bind_steps: int = 0  # of teaching a text encoder alone, before it is frozen; 0: it learns along
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

    def build(self, seed: int = 0, base: nn.Module | None = None) -> nn.Module:
        """The untrained network, its weights drawn from `seed`; on a `base` where it needs one, else untrained."""
        with torch.random.fork_rng(
            devices=[]
        ):  # torch's layers draw from the global generator: borrow it, give it back
            torch.manual_seed(seed)
            if self.architecture in COMPOSITES:
                base = find(self.base).build(seed) if self.base and base is None else base
                return COMPOSITES[self.architecture](base, **self.arguments)
            return ARCHITECTURES[self.architecture](**self.arguments)

    @property
    def loop(self) -> dict:
        """How `train.fit` goes about it."""
        return dict(batch_size=self.batch_size, lr=self.lr, weight_decay=self.weight_decay, ema=self.ema)

    @property
    def reads_pixels(self) -> bool:
        """Whether the network takes pixels as they are, rather than scaled."""
        return self.architecture in ("JudgeNet", "Autoencoder")

    def path(self) -> Schedule:
        return SCHEDULES[self.schedule]()

    def load_data(self, root: str | Path | None = None) -> tuple[Tensor, Tensor]:
        """Images (n, 1, h, w) in [-1, 1] and labels (n,), or captions (n, 15), of this recipe's split."""
        loader = LOADERS[self.data]
        return loader(self.split, root) if self.data == "mnist" else loader(self.split)

    def prepare(self, network: nn.Module, label: Tensor, seed: int = 0) -> None:
        """What is learnt before the diffusion network, and then frozen."""
        if self.bind_steps:
            bind(network.text, label, SUBJECTS, ABOUT, self.bind_steps, seed=seed)
            network.text.requires_grad_(False)

    def with_hints(self, x0: Tensor, images: Images) -> Tensor:
        """What `loss` takes: the encoded pictures, and for a ControlNet the hints behind them, as further channels."""
        if self.architecture != "Controlled":
            return x0
        hints = torch.cat([skeletons(part) for part in images.split(CHUNK)])
        return torch.cat([x0, hints], dim=1)

    def loss(self, network: nn.Module, x0: Tensor, label: Tensor, generator: Generator) -> Tensor:
        """One training loss (), on pictures that are encoded already (and have their hints)."""
        if self.architecture == "JudgeNet":
            return judge_loss(network, x0, label, generator)
        if self.architecture == "Autoencoder":
            return vae_loss(network, x0, generator)
        if self.arguments.get("blind"):
            return clean_loss(network, x0, label)
        if self.architecture == "NoisyClassifier":
            return classifier_loss(network, x0, label, self.path(), generator)
        label = drop(label, network.null, self.drop, generator)
        draw_time = partial(logit_normal, mean=self.time_mean)
        if self.architecture == "Controlled":
            x0, hint = x0[:, :1], x0[:, 1:]
            network = partial(network, hint=hint)
        return diffusion_loss(network, x0, self.kind, self.path(), generator, label=label, draw_time=draw_time)


# Results: seed 0, two cores of an AMD EPYC with AVX2, fp32, torch 2.13.0, 2026-11-21; brackets are 95 % intervals.
# At scale 2, 1,000 samples: accuracy 1.000 [0.996, 1.000], Frechet distance 3.2 [2.6, 3.8] (real: 1.06).
DIGITS_UNET = Recipe(
    name="digits-unet",
    about="class-conditional U-Net on the embedded 8x8 digits",
    arguments=dict(channels=1, widths=(32, 64), classes=10, emb_dim=64),
    seconds=30,
)
# 1,375 steps in 60 s. At scale 2, 2,000 samples: accuracy 0.994 [0.989, 0.999], Frechet distance 2.1 [1.6, 2.5] over
# three seeds (real: 0.29); with AMX, in bfloat16, 3,270 steps: 0.996 [0.990, 1.001], 2.0 [1.8, 2.1]. Of what else was
# tried (benchmarks/ablations.md) only one comes clearly closer to real digits in 30 s, by a sixth: predicting x0 on a
# cosine path. The lessons teach the velocity of a straight one.
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
# Lessons 06 to 09.
SCENES_UNET = Recipe(
    name="scenes-unet",
    about="text to image: captioned canvases of digits; the text encoder learns to bind words first, then is frozen",
    data="scenes",
    architecture="TextToImage",
    arguments=dict(dim=64, depth=2, heads=4, widths=(32, 64), emb_dim=64),
    bind_steps=500,
    time_mean=0.5,
    steps=2000,
    seconds=None,
)
SCENES_JOINT = replace(
    SCENES_UNET,
    name="scenes-joint",
    about="text to image as scenes-unet, but its text encoder learns along, from scratch",
    bind_steps=0,
)
DIGITS_CONTROL = Recipe(
    name="digits-control",
    about="ControlNet on digits-unet: hints are the digits' skeletons",
    architecture="Controlled",
    arguments=dict(hint_channels=1),
    base="digits-unet",
    drop=0.3,  # so that it cannot lean on the class
    seconds=30,
)
MNIST_CONTROL = replace(
    DIGITS_CONTROL,
    name="mnist-control",
    about="ControlNet on mnist-unet: hints are the digits' skeletons",
    data="mnist",
    base="mnist-unet",
    batch_size=32,
    time_mean=0.8,
    seconds=60,
)
DIGITS_DIT = Recipe(
    name="digits-dit",
    about="class-conditional DiT on the embedded 8x8 digits, 2x2 patches",
    architecture="DiT",
    arguments=dict(channels=1, size=8, patch=2, dim=48, depth=3, heads=4, classes=10),
    seconds=30,
)
MNIST_DIT = Recipe(
    name="mnist-dit",
    about="class-conditional DiT on MNIST, 4x4 patches",
    data="mnist",
    architecture="DiT",
    arguments=dict(channels=1, size=28, patch=4, dim=80, depth=3, heads=4, classes=10),
    batch_size=32,
    time_mean=0.8,
    lr=2e-3,
    seconds=60,
)
DIGITS_AUTOENCODER = Recipe(
    name="digits-autoencoder",
    about="variational autoencoder of the embedded 8x8 digits, latents of 2x4x4",
    architecture="Autoencoder",
    arguments=dict(channels=1, latent_channels=2, factor=2, width=16),
    seconds=20,
)
MNIST_AUTOENCODER = Recipe(
    name="mnist-autoencoder",
    about="variational autoencoder of MNIST, latents of 2x8x8",
    data="mnist",
    architecture="Autoencoder",
    arguments=dict(channels=1, latent_channels=2, factor=4, width=16, padding=2),
    seconds=60,
)
DIGITS_LATENT = Recipe(
    name="digits-latent",
    about="class-conditional U-Net on the latents of digits-autoencoder",
    architecture="LatentDiffusion",
    arguments=dict(widths=(24, 48), classes=10, emb_dim=64),
    base="digits-autoencoder",
    seconds=20,
)
MNIST_LATENT = Recipe(
    name="mnist-latent",
    about="class-conditional U-Net on the latents of mnist-autoencoder",
    data="mnist",
    architecture="LatentDiffusion",
    arguments=dict(widths=(32, 64), classes=10, emb_dim=64),
    base="mnist-autoencoder",
    batch_size=32,
    time_mean=0.5,
    seconds=60,
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
    SCENES_UNET,
    SCENES_JOINT,
    DIGITS_CONTROL,
    MNIST_CONTROL,
    DIGITS_DIT,
    MNIST_DIT,
    DIGITS_AUTOENCODER,
    MNIST_AUTOENCODER,
    DIGITS_LATENT,
    MNIST_LATENT,
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
