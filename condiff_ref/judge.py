"""Who says whether a generated image is a good 7: classifiers that have never seen the training split.

Generators learn from the training split. A judge that had learnt from it too would forgive them its oddities, so judges
learn from the test split and are themselves tested on the training split, which neither side can then be said to know.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from . import data
from .files import SHIPPED, read_safetensors
from .intervals import Interval, share
from .layers import GroupNorm
from .shapes import Features, Images, Labels, PerClass

CHECKPOINT = SHIPPED / "mnist-judge.safetensors"
CHUNK = 1000  # images read at once


@dataclass(frozen=True)
class Judge:
    """Reads images in [-1, 1] as classes, and as features to compare distributions in.

    `test_accuracy` is measured on images that it has not seen; `about` says in a sentence what it saw.
    """

    name: str
    size: int  # images are (n, 1, size, size)
    classifier: Callable[[Images], Labels]
    extractor: Callable[[Images], Features]
    test_accuracy: Interval
    about: str

    def classify(self, images: Images) -> Labels:
        """(n, 1, size, size) -> classes (n,), on the CPU. Raises ValueError for images it cannot read."""
        return self._read(self.classifier, images)

    def features(self, images: Images) -> Features:
        """(n, 1, size, size) -> (n, f), on the CPU, scaled by one number so that over real images the features' mean
        variance is 1. Raises ValueError for images it cannot read."""
        return self._read(self.extractor, images)

    @torch.no_grad()
    def _read(self, reader: Callable[[Tensor], Tensor], images: Images) -> Tensor:
        expected = (1, self.size, self.size)
        if len(images) == 0 or images.shape[1:] != expected:
            raise ValueError(
                f"the {self.name} judge reads images (n, 1, {self.size}, {self.size}), got {tuple(images.shape)}"
            )
        if not images.isfinite().all():
            raise ValueError("the images hold NaN or infinite pixels")
        if (images >= 0).all():  # the background is -1
            raise ValueError("no pixel is below 0: images are in [-1, 1], and these look as if they were in [0, 1]")
        return torch.cat([reader(chunk) for chunk in images.float().cpu().split(CHUNK)])

    @classmethod
    def digits(cls) -> "Judge":
        """For `data.digits`: a support vector machine, fitted on the test split here and now. Features: the pixels."""
        from sklearn.svm import SVC  # here, because it takes a second that few callers need

        images, labels = data.digits("test")
        generator = torch.Generator().manual_seed(0)
        varied = torch.cat([images, *(jitter(images, generator) for _ in range(4))])
        svc = SVC(C=10, gamma=0.125).fit(varied.flatten(1).numpy(), labels.repeat(5).numpy())
        scale = images.flatten(1).var(0).mean().rsqrt()

        def classify(images: Images) -> Labels:
            return torch.from_numpy(svc.predict(images.flatten(1).numpy()))

        unseen, unseen_labels = data.digits("train")
        accuracy = share((classify(unseen) == unseen_labels).sum().item(), len(unseen))
        about = (
            f"support vector machine fitted on the {len(images)} images of the digits' test split and four jittered "
            f"copies of each, tested on the {len(unseen)} images of the training split; its features are the pixels"
        )
        return cls("digits", 8, classify, lambda images: images.flatten(1) * scale, accuracy, about)

    @classmethod
    def mnist(cls) -> "Judge":
        """For `data.mnist`: the shipped JudgeNet. Raises CheckpointError where its weights are missing or damaged."""
        weights, written = read_safetensors(CHECKPOINT)
        network = JudgeNet()
        network.load_state_dict(weights)
        hits, tested = written["card"]["hits"], written["card"]["tested"]
        about = (
            "convolutional network trained on jittered copies of MNIST's 10,000 test images, tested on "
            f"{tested} of its training images; its features are its 64 penultimate activations"
        )
        return cls("mnist", 28, lambda x: network(x).argmax(1), network.features, share(hits, tested), about)


class JudgeNet(nn.Module):
    """28x28 digits to 64 features and 10 logits. No batch normalisation: a verdict must not depend on the others."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(_conv(1, 24, 5, 2), _conv(24, 32), _conv(32, 64, 3, 2), _conv(64, 64)),
            *(nn.Conv2d(64, 64, 7, groups=64), nn.SiLU(), nn.Flatten()),  # each channel's own average over places
        )
        self.head = nn.Linear(64, 10)
        self.register_buffer("scale", torch.ones(()))  # `certify` sets it

    def features(self, images: Images) -> Features:
        return self.scale * self.body(images)

    def forward(self, images: Images) -> PerClass:
        return self.head(self.body(images))


def judge_loss(network: nn.Module, images: Images, labels: Labels, generator: Generator | None = None) -> Tensor:
    """Cross-entropy on jittered images."""
    return F.cross_entropy(network(jitter(images, generator)), labels)


@torch.no_grad()
def certify(network: JudgeNet, images: Images, labels: Labels) -> dict[str, int]:
    """Test a trained JudgeNet on images (n, 1, 28, 28) and labels (n,) that it has not seen, and scale its features to
    a mean variance of 1 over them. Returns what its card says of that: hits, of so many tested."""
    network.scale.fill_(1)
    logits, features = (torch.cat([f(x) for x in images.split(CHUNK)]) for f in (network, network.features))
    network.scale.copy_(features.var(0).mean().rsqrt())
    return {"hits": (logits.argmax(1) == labels).sum().item(), "tested": len(labels)}


def jitter(images: Images, generator: Generator | None = None) -> Images:
    """Each image turned, stretched, slanted and moved a little, at random; what comes in from outside is background."""
    device = images.device if generator is None else generator.device
    angle, wide, high, slant, right, down = (
        torch.empty(6, len(images), device=device).uniform_(-1, 1, generator=generator).to(images)
    )
    angle, wide, high, slant = 0.2 * angle, 1 + 0.1 * wide, 1 + 0.1 * high, 0.1 * slant
    right, down = 0.14 * right, 0.14 * down  # of half a width: 2 pixels of 28
    rows = [angle.cos() * wide, slant - angle.sin() * wide, right, angle.sin() * high, angle.cos() * high, down]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # grid_sample fills with 0, the background is -1


def _conv(channels: int, out: int, size: int = 3, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, size, stride, padding=size // 2), GroupNorm(out // 8, out), nn.SiLU())
