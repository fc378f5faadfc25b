"""Beside others: what a learner may take in this course's place, at equal seconds of training on the same machine,
before the same judge. Writes peers.md; needs an extra: .venv/bin/pip install -c constraints.txt -e ".[bench]".

python benchmarks/peers.py [--seconds S ...] [--seeds K] [--only FAMILY ...]

A peer's own settings are those that its authors publish. Beside them stand simple changes that a learner could make,
and the best of either is told. Weights and pictures are kept in outputs/peers, rows in outputs/peers.json: a run that
was cut off goes on.
"""

import argparse
import importlib.metadata
import re
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from lab_unet import LabUNet
from rows import Kept, over_seeds, table, write
from torch import Tensor, nn

from condiff_ref import checkpoints, data, pictures, recipes
from condiff_ref.generate import Guidance, generate
from condiff_ref.intervals import Interval
from condiff_ref.metrics import evaluate
from condiff_ref.train import uses_bf16

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FOLDER = Path("outputs/peers")
NONE = 10  # the label that stands for no label
CHUNK = 250  # samples drawn at once
OUR_SEEDS = 3
MEASURED = ("accuracy", "fd", "fd_real", "recall")
ABOUT = (
    "MNIST. Each trains on the same images for the same seconds, counted over the training steps alone; brackets: 95 % "
    "intervals, over seeds of training where there are several, else over samples. fd: Fréchet distance in the judge's "
    "features; fd_real: that of as many other real images (both grow as n shrinks: compare their difference). "
    '"its own": trained and sampled as its authors publish; "changed": the best that simple changes reached. Best is '
    "the least fd - fd_real. cut: contrast stretched so that each picture's median, its background, becomes black.\n"
)

SETTINGS = """
Where the settings come from, and what was changed:

- **condiff**: `condiff train mnist-unet`; samples as in training.md.
- **lab**: lab three of github.com/eje24/iap-diffusion-labs (commit 9d9dbe6): MNIST resized to 32x32, widths 32, 64 and
  128, two residual blocks each, embeddings of 40, 10 % of labels hidden, batches of 250, Adam at 1e-3; 5,000 steps
  there.
  Samples: Euler at 100 times, guidance scales 1, 3 and 5, shown clipped. Changed: batches of 32, hence more steps;
  20 Euler steps with the data clipped at each; other scales; averaged weights.
- **diffusers**: the class-conditional MNIST notebook of Hugging Face's course (github.com/huggingface/
  diffusion-models-class, unit 2, commit 8243e35): widths 32, 64, 64 with attention below 28x28, the label as four more
  input channels, batches of 128, Adam at 1e-3, cosine schedule; ten epochs there. Samples: DDPM, 1,000 steps. Changed:
  fewer steps, DDIM, averaged weights; and a second network with the library's own class embedding, 10 % of labels
  hidden, batches of 32 and guidance.
- **denoising-diffusion-pytorch**: its classifier_free_guidance module with its README's and its Trainer's settings: dim
  64 in four levels, half of the labels hidden, batches of 16, Adam at 1e-4, gradients clipped at 1, EMA 0.995 (MNIST
  padded to 32x32, which four levels need; not mirrored, as Trainer would do). Samples: 250 steps at scale 6. Changed:
  25 deterministic steps, other scales, no rescaling; and a smaller network at learning rate 1e-3 in batches of 32.

Where the hardware multiplies in bfloat16, condiff uses it, and so do the changed networks of lab and
denoising-diffusion-pytorch (with AMX a step took half of the time, and three quarters); diffusers' step takes half as
long again with it, so that it stays in float32.

Nobody pays for loading data: all read MNIST from memory, off the clock. The peers' networks are made for a GPU
and for longer training; this table says what they reach in the time that a learner's own processor may be given.
"""

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (network, x0 as the peer has it, label) -> ()


@dataclass(frozen=True)
class Way:
    """How to draw samples from trained weights: `draw` takes a network and labels (n,) and gives pictures as the peer
    has them. `own` if the peer's authors do it so, else a simple change. `n` is less where samples are dear."""

    draw: Callable[[nn.Module, Tensor], Tensor]
    n: int
    own: bool = False
    averaged: bool = False  # weights instead of the last


class Average:
    """A moving average of weights and of batch normalisation's statistics."""

    def __init__(self, network: nn.Module, decay: float = 0.999):
        self.network, self.decay, self.step = network, decay, 0
        self.ema_model = deepcopy(network).requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        for averaged, value in zip(
            self.ema_model.state_dict().values(), self.network.state_dict().values(), strict=True
        ):
            if averaged.is_floating_point():
                averaged.lerp_(value, 1 - decay)


@dataclass(frozen=True)
class Peer:
    """A network, how its authors (or, where not `own`, we) train it, and ways to sample it."""

    family: str
    name: str
    about: str
    own: bool
    build: Callable[[], nn.Module]
    loss: Loss
    ways: dict[str, Way]
    batch_size: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None  # of the gradient's norm
    average: Callable[[nn.Module], object] = Average
    bf16: bool = False  # under autocast, where the hardware multiplies in it and that makes its steps shorter
    packages: tuple[str, ...] = ()
    encode: Callable[[Tensor], Tensor] = lambda images: images  # pictures in [-1, 1] to what its loss takes
    decode: Callable[[Tensor], Tensor] = lambda x: x  # what its sampler gives to pictures in [-1, 1]

    def weights(self) -> int:
        return sum(p.numel() for p in self.build().parameters())

    def train(self, seconds: float, seed: int, path: Path) -> dict:
        """For so many seconds of the training steps alone: neither fetching batches nor averaging is on the clock."""
        images, label = data.mnist("train")
        x0, steps, elapsed = self.encode(images), 0, 0.0
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = self.build().to(DEVICE).train()
            average = self.average(network)
            optimizer = torch.optim.Adam(network.parameters(), self.lr, betas=self.betas)
            for x, y in data.batches(x0, label, self.batch_size, seed):
                x, y = x.to(DEVICE), y.to(DEVICE)
                began = time.perf_counter()
                with self.precise():
                    loss = self.loss(network, x, y)
                optimizer.zero_grad()
                loss.backward()
                if self.clip is not None:
                    nn.utils.clip_grad_norm_(network.parameters(), self.clip)
                optimizer.step()
                loss.item()  # waits for a GPU
                elapsed, steps = elapsed + time.perf_counter() - began, steps + 1
                average.update()
                if elapsed >= seconds:
                    break
        row = dict(steps=steps, seconds=elapsed, images_per_second=steps * self.batch_size / elapsed)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(last=network.state_dict(), average=average.ema_model.state_dict(), row=row), path)
        return row

    def sample(self, way: Way, path: Path, label: Tensor, seed: int) -> tuple[Tensor, float]:
        """Pictures (n, 1, 28, 28) in [-1, 1] from the weights in that file, and the seconds that they took."""
        network = self.build().to(DEVICE)
        kept = torch.load(path, map_location=DEVICE, weights_only=True)
        network.load_state_dict(kept["average" if way.averaged else "last"])
        with torch.random.fork_rng(), torch.no_grad(), self.precise():
            torch.manual_seed(seed)
            began = time.perf_counter()
            parts = [way.draw(network.eval(), part.to(DEVICE)).cpu() for part in label.split(CHUNK)]
            seconds = time.perf_counter() - began
        return self.decode(torch.cat(parts).float()).clamp(-1, 1), seconds

    def precise(self) -> torch.autocast:
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bf16 and uses_bf16("auto", DEVICE))


class Ours:
    """The recipe mnist-unet, as `condiff train` trains and `condiff generate` samples it."""

    family = name = "condiff"
    about, own, packages, recipe = "mnist-unet", True, ("condiff",), recipes.MNIST_UNET

    def __init__(self) -> None:
        draw = partial(generate, steps=10, chunk=CHUNK)
        self.ways = {
            f"Euler 10, scale {s}": Way(partial(draw, rule=Guidance(scale=s)), n=1000, own=True) for s in (1, 1.5, 2, 3)
        }

    def weights(self) -> int:
        return sum(p.numel() for p in self.recipe.build().parameters())

    def train(self, seconds: float, seed: int, path: Path) -> dict:
        model = checkpoints.train_recipe(self.recipe, path, seconds=seconds, seed=seed, device=DEVICE, overwrite=True)
        return {name: model.card[name] for name in ("steps", "seconds", "images_per_second")}

    def sample(self, way: Way, path: Path, label: Tensor, seed: int) -> tuple[Tensor, float]:
        model = checkpoints.load(path, DEVICE)
        began = time.perf_counter()
        return way.draw(model, label, seed=seed), time.perf_counter() - began


def hide(label: Tensor, prob: float = 0.1) -> Tensor:
    """Some labels replaced by none."""
    return torch.where(torch.rand(len(label), device=label.device) < prob, NONE, label)


def guided(network: Callable[[Tensor], Tensor], label: Tensor, scale: float) -> Tensor:
    """scale times the answer with labels, and 1 - scale times that without."""
    cond = network(label)
    return cond if scale == 1 else torch.lerp(network(torch.full_like(label, NONE)), cond, scale)


def cut(images: Tensor) -> Tensor:
    """Contrast stretched so that the background, which is each picture's median, becomes -1."""
    grey = images.flatten(1).median(1).values[:, None, None, None]
    return (2 * (images - grey) / (1 - grey).clamp(min=0.1) - 1).clamp(-1, 1)


def padded(images: Tensor) -> Tensor:
    """28 x 28 to 32 x 32 with background."""
    return F.pad(images, (2, 2, 2, 2), value=-1.0)


# --- a lab in the style of MIT 6.S184's -------------------------------------------------------------------------------


def enlarged(images: Tensor) -> Tensor:
    """28 x 28 to 32 x 32, as torchvision's Resize does it (but for its rounding to whole grey levels)."""
    return F.interpolate(images, (32, 32), mode="bilinear", antialias=True, align_corners=False)


def reduced(images: Tensor) -> Tensor:
    """And back: bicubic, which of the usual ways loses least. Real images that went there and back lie 0.87 from others
    in Fréchet distance, untouched ones 0.75, at n = 2000."""
    return F.interpolate(images, (28, 28), mode="bicubic", align_corners=False)


def lab_loss(network: nn.Module, x0: Tensor, label: Tensor) -> Tensor:
    """The squared error of the velocity, summed over pixels; t runs from noise at 0 to data at 1."""
    t, eps = torch.rand(len(x0), device=x0.device), torch.randn_like(x0)
    xt = torch.lerp(eps, x0, t[:, None, None, None])
    return (network(xt, t, hide(label)) - (x0 - eps)).square().sum((1, 2, 3)).mean()


def lab_draw(network: nn.Module, label: Tensor, *, steps: int, scale: float, clip: bool = False) -> Tensor:
    """Euler steps; `clip` keeps the data that each velocity points to within [-1, 1]."""
    x = torch.randn(len(label), 1, 32, 32, device=label.device)
    for t in torch.arange(steps, device=label.device) / steps:
        velocity = guided(lambda y, x=x, t=t: network(x, t.expand(len(x)), y), label, scale)
        if clip:
            velocity = ((x + (1 - t) * velocity).clamp(-1, 1) - x) / (1 - t)
        x = x + velocity / steps
    return x


LAB_OWN = {f"Euler 99, scale {s}": Way(partial(lab_draw, steps=99, scale=s), n=100, own=True) for s in (1, 3, 5)}
LAB_CHANGED = {
    f"Euler 20, clipped{', averaged' * averaged}, scale {s}": Way(
        partial(lab_draw, steps=20, scale=s, clip=True), n=200, averaged=averaged
    )
    for s, averaged in [(1, False), (1.5, False), (2, False), (3, False), (1.5, True)]
}


def lab(batch_size: int) -> Peer:
    own = batch_size == 250
    return Peer(
        family="lab",
        name="lab" if own else f"lab-{batch_size}",
        about=f"batches of {batch_size}",
        own=own,
        build=LabUNet,
        loss=lab_loss,
        ways=LAB_OWN | LAB_CHANGED if own else LAB_CHANGED,
        batch_size=batch_size,
        lr=1e-3,
        bf16=not own,
        encode=enlarged,
        decode=reduced,
    )


# --- diffusers --------------------------------------------------------------------------------------------------------


class ByChannels(nn.Module):
    """diffusers' UNet2DModel with the label's embedding as four more channels of its input."""

    def __init__(self):
        super().__init__()
        self.labels, self.unet = nn.Embedding(10, 4), unet2d(in_channels=5)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        channels = self.labels(label)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.unet(torch.cat([x, channels], dim=1), t).sample


class ByTime(nn.Module):
    """diffusers' UNet2DModel with the label's embedding, its own, added to that of time; label 10 is none."""

    def __init__(self):
        super().__init__()
        self.unet = unet2d(in_channels=1, num_class_embeds=11)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.unet(x, t, label).sample


def unet2d(**options: int) -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=28,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        **options,
    )


def scheduler(name: str) -> object:
    import diffusers

    return getattr(diffusers, name)(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")


def diffusers_loss(network: nn.Module, x0: Tensor, label: Tensor, *, drop: float, scheduler: object) -> Tensor:
    eps, t = torch.randn_like(x0), torch.randint(0, 999, (len(x0),), device=x0.device)
    label = hide(label, drop) if drop else label
    return F.mse_loss(network(scheduler.add_noise(x0, eps, t), t, label), eps)


def diffusers_draw(network: nn.Module, label: Tensor, *, name: str, steps: int, scale: float = 1.0) -> Tensor:
    steps_of = scheduler(name)
    steps_of.set_timesteps(steps)
    x = torch.randn(len(label), 1, 28, 28, device=label.device)
    for t in steps_of.timesteps:
        eps = guided(lambda y, x=x, t=t: network(x, t.to(x.device), y), label, scale)
        x = steps_of.step(eps, t, x).prev_sample
    return x


DIFFUSERS_OWN = {
    "DDPM 1000": Way(partial(diffusers_draw, name="DDPMScheduler", steps=1000), n=50, own=True),
    "DDPM 100, averaged": Way(partial(diffusers_draw, name="DDPMScheduler", steps=100), n=200, averaged=True),
    "DDIM 50": Way(partial(diffusers_draw, name="DDIMScheduler", steps=50), n=200),
    "DDIM 50, averaged": Way(partial(diffusers_draw, name="DDIMScheduler", steps=50), n=200, averaged=True),
}
DIFFUSERS_GUIDED = {
    f"DDIM 25, averaged, scale {s}": Way(
        partial(diffusers_draw, name="DDIMScheduler", steps=25, scale=s), n=200, averaged=True
    )
    for s in (1, 1.5, 2, 3)
}


def by_diffusers(own: bool) -> Peer:
    return Peer(
        family="diffusers",
        name="diffusers" if own else "diffusers-guided",
        about="label as channels, batches of 128" if own else "num_class_embeds, batches of 32",
        own=own,
        build=ByChannels if own else ByTime,
        loss=lambda *batch: diffusers_loss(*batch, drop=0 if own else 0.1, scheduler=scheduler("DDPMScheduler")),
        ways=DIFFUSERS_OWN if own else DIFFUSERS_GUIDED,
        batch_size=128 if own else 32,
        lr=1e-3,
        packages=("diffusers",),
    )


# --- denoising-diffusion-pytorch --------------------------------------------------------------------------------------


def ddp_build(side: int, dim: int, dim_mults: tuple[int, ...], **sampling: object) -> nn.Module:
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet

    unet = Unet(dim=dim, dim_mults=dim_mults, num_classes=10, cond_drop_prob=0.5, channels=1)
    return GaussianDiffusion(unet, image_size=side, timesteps=1000, **sampling)


def ddp_draw(network: nn.Module, label: Tensor, *, steps: int, eta: float, scale: float, phi: float) -> Tensor:
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion

    sampling = dict(sampling_timesteps=steps, ddim_sampling_eta=eta)
    again = GaussianDiffusion(network.model, image_size=network.image_size, timesteps=1000, **sampling).to(label.device)
    # at scale 1 itself version 2.3.4 fails: its network then gives one tensor, where its sampler unpacks two
    return again.sample(label, cond_scale=scale if scale != 1 else 1 + 1e-6, rescaled_phi=phi)


def ddp_average(network: nn.Module) -> object:
    from ema_pytorch import EMA

    return EMA(network, beta=0.995, update_every=10)


def ddp_changed(scale: float, n: int) -> dict[str, Way]:
    draw = partial(ddp_draw, steps=25, eta=0.0, scale=scale, phi=0.0)
    return {f"DDIM 25, eta 0, EMA, scale {scale}, phi 0": Way(draw, n=n, averaged=True)}


DDP_OWN = {
    "DDIM 250, eta 1, EMA, scale 6, phi 0.7": Way(
        partial(ddp_draw, steps=250, eta=1.0, scale=6.0, phi=0.7), n=30, own=True, averaged=True
    ),
    **ddp_changed(1.5, n=50),
}
DDP_CHANGED = ddp_changed(1, n=200) | ddp_changed(1.5, n=200) | ddp_changed(2, n=200) | ddp_changed(3, n=200)


def ddp(own: bool) -> Peer:
    side, dim, dim_mults = (32, 64, (1, 2, 4, 8)) if own else (28, 32, (1, 2, 4))
    return Peer(
        family="denoising-diffusion-pytorch",
        name="ddp" if own else "ddp-small",
        about=f"dim {dim}, {len(dim_mults)} levels, "
        + ("batches of 16, rate 1e-4" if own else "batches of 32, rate 1e-3"),
        own=own,
        build=partial(ddp_build, side, dim, dim_mults),
        loss=lambda network, x, label: network(x, classes=label),
        ways=DDP_OWN if own else DDP_CHANGED,
        batch_size=16 if own else 32,
        lr=1e-4 if own else 1e-3,
        betas=(0.9, 0.99),
        clip=1.0,
        bf16=not own,
        average=ddp_average,
        packages=("denoising-diffusion-pytorch", "ema-pytorch"),
        encode=lambda images: (padded(images) if side == 32 else images) / 2 + 0.5,
        decode=lambda x: (x[..., 2:30, 2:30] if side == 32 else x) * 2 - 1,
    )


# --- all of them ------------------------------------------------------------------------------------------------------


def peers() -> list[Peer | Ours]:
    return [Ours(), lab(250), lab(32), by_diffusers(True), by_diffusers(False), ddp(True), ddp(False)]


def versions(*chosen: Peer | Ours) -> str:
    """Of the packages that they come from."""
    names = {name: None for peer in chosen for name in peer.packages}
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def rows_of(peer: Peer | Ours, kept: Kept, seconds: float, seed: int, folder: Path = FOLDER) -> dict[str, dict]:
    """What training did, under "training", and each way's figures. Trains only where a figure is missing."""
    key = f"{checkpoints.machine()}|{versions(peer)}|{peer.name}|{peer.about}|{seconds:g}|{seed}"
    path = folder / f"{peer.name}-{seconds:g}-{seed}.weights"

    @cache
    def trained() -> dict:
        if path.exists() and f"{key}|training" in kept.rows:
            return kept.rows[f"{key}|training"]
        path.parent.mkdir(parents=True, exist_ok=True)
        kept.rows.pop(f"{key}|training", None)  # of weights that are gone
        return kept(f"{key}|training", lambda: peer.train(seconds, seed, path))

    def judged(name: str, way: Way) -> dict:
        trained()
        label = torch.arange(way.n) % 10
        images, taken = peer.sample(way, path, label, seed)
        plain = re.sub("[^a-zA-Z0-9.]+", "-", name)
        pictures.write(path.with_name(f"{path.stem}-{plain}.png"), images[:100], label[:100])
        told = {"n": way.n, "own": peer.own and way.own, "seconds per 100": 100 * taken / way.n}
        looks = {"": images} if way.own else {"": images, ", cut": cut(images)}
        return {suffix: told | figures(look, label, seed) for suffix, look in looks.items()}

    found = {name: kept(f"{key}|{name}|{way.n}", partial(judged, name, way)) for name, way in peer.ways.items()}
    flat = {name + suffix: row for name, rows in found.items() for suffix, row in rows.items()}
    return flat | {"training": kept.rows[f"{key}|training"]}


def figures(images: Tensor, label: Tensor, seed: int) -> dict:
    """MEASURED, each as [value, low, high]."""
    found = evaluate("mnist", images, label, seed=seed)
    return {name: [found[name].value, found[name].low, found[name].high] for name in MEASURED}


def over(rows: Sequence[dict], name: str) -> Interval:
    """Over seeds of training; of a single one, over its samples."""
    return over_seeds([row[name][0] for row in rows]) if len(rows) > 1 else Interval(*rows[0][name])


def excess(rows: Sequence[dict]) -> float:
    """Frechet distance above that of as many real images: what ways with different n may be compared by."""
    return mean(row["fd"][0] - row["fd_real"][0] for row in rows)


COLUMNS = ["peer", "trained", "sampled", "seeds", "n", *MEASURED, "s per 100 samples"]
TRAINING = ["weights", "steps", "images/s"]


def line(peer: Peer | Ours, way: str, rows: Sequence[dict]) -> list[object]:
    taken = mean(row["seconds per 100"] for row in rows)
    judged = [over(rows, name) for name in MEASURED]
    return [peer.family, peer.about, way, len(rows), rows[0]["n"], *judged, f"{taken:.2g}"]


def measure(chosen: Sequence[Peer | Ours], kept: Kept, seconds: float, seeds: int) -> tuple[str, str]:
    """Two tables: the best of each family's own settings and of the changed ones, with what training did; and all."""
    entries, best, trainings = [], {}, {}
    for peer in chosen:
        found = [rows_of(peer, kept, seconds, seed) for seed in range(OUR_SEEDS if peer.family == "condiff" else seeds)]
        done = [rows.pop("training") for rows in found]
        steps, speed = (mean(row[name] for row in done) for name in ("steps", "images_per_second"))
        trainings[peer.name] = [f"{peer.weights():,}", f"{steps:,.0f}", f"{speed:,.0f}"]
        entries += [(peer, way, [rows[way] for rows in found]) for way in found[0]]
    for entry in entries:
        peer, _, rows = entry
        kind = (peer.family, "its own" if rows[0]["own"] else "changed")
        best[kind] = min(best.get(kind, entry), entry, key=lambda each: excess(each[2]))
    chosen_lines = [[*kind, *line(*entry)[1:], *trainings[entry[0].name]] for kind, entry in best.items()]
    return (
        table(["peer", "settings", *COLUMNS[1:], *TRAINING], chosen_lines),
        table(COLUMNS, [line(*entry) for entry in entries]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, nargs="+", default=[60.0])
    parser.add_argument("--seeds", type=int, default=1, help=f"of the peers; of condiff always {OUR_SEEDS}")
    parser.add_argument("--only", nargs="+", help="these families, printed and not written")
    options = parser.parse_args()
    chosen = [peer for peer in peers() if options.only is None or peer.family in options.only]
    kept = Kept(FOLDER.with_suffix(".json"))
    parts = []
    for seconds in options.seconds:
        best, everything = measure(chosen, kept, seconds, options.seeds)
        parts += [f"\n### {seconds:g} seconds of training each\n", best]
        parts += ["<details><summary>Every way of sampling that was tried</summary>\n", everything, "</details>\n"]
    if options.only:
        print(*parts, sep="\n")
        return
    write(__file__, "Beside others", f"{versions(*chosen)}. {ABOUT}", *parts, SETTINGS)


if __name__ == "__main__":
    main()
