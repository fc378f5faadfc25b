"""A trained network and all that it takes to use it again, as one safetensors file."""

import dataclasses
import hashlib
import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from . import data, recipes
from .autoencoder import LatentDiffusion
from .controlnet import Controlled
from .data import Affine, measure_affine
from .denoisers import as_denoiser, clip_x0
from .files import SHIPPED, CheckpointError, read_safetensors, write_safetensors
from .judge import certify
from .predictions import solve
from .recipes import SIDES, VOCABULARY, Recipe
from .scenes import LENGTH
from .schedules import Schedule
from .shapes import Denoiser, Images, Labels, pad
from .text import TextToImage
from .train import fit, uses_bf16

CHUNK = 1000  # pictures encoded at once


@dataclass(frozen=True)
class Checkpoint:
    """A network in eval mode, the recipe that made it, the scaling of its pictures, and the card of its training."""

    network: nn.Module
    recipe: Recipe
    affine: Affine
    card: dict

    @property
    def schedule(self) -> Schedule:
        return self.recipe.path()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the network works with: one picture, or one latent."""
        side = SIDES[self.recipe.data]
        if isinstance(self.network, LatentDiffusion):
            return self.network.autoencoder.latent_shape(side, side)
        return 1, side, side

    @property
    def classes(self) -> int:
        """How many. Raises ValueError for a network that knows captions, or nothing, but no classes."""
        recipe = recipes.find(self.recipe.base) if isinstance(self.network, Controlled) else self.recipe
        if "classes" not in recipe.arguments:
            captions = ", but captions" if isinstance(self.network, TextToImage) else ""
            raise ValueError(f"{self.recipe.name} is {self.recipe.about}: it knows no classes{captions}")
        return recipe.arguments["classes"]

    def read_caption(self, caption: str) -> Tensor:
        """Token ids (1, n). Raises ValueError for a network that reads no captions, and for unknown words."""
        if not isinstance(self.network, TextToImage):
            raise ValueError(f"{self.recipe.name} is {self.recipe.about}: it reads no captions")
        return VOCABULARY.encode([caption], LENGTH)[0]

    def to(self, device: str | torch.device) -> "Checkpoint":
        return dataclasses.replace(self, network=self.network.to(device))

    def denoiser(self, label: Tensor | None = None, **conditions: object) -> Denoiser:
        """The network as an estimate of x0 for these labels (b,), or captions (b, n), one per example; without labels
        for none. A ControlNet also needs `hint` (b, 1, h, w), and takes `strength`.

        Raises ValueError for a network that does not denoise, such as a classifier.
        """
        if not hasattr(self.network, "null"):
            raise ValueError(f"{self.recipe.name} is {self.recipe.about}: it cannot draw samples")
        return as_denoiser(partial(self.raw, label=label, **conditions), self.recipe.kind, self.schedule)

    def clip(self, denoiser: Denoiser) -> Denoiser:
        """Keep estimates of x0 within the range of pixels, which is [-1, 1] before scaling. Latents have no range."""
        if isinstance(self.network, LatentDiffusion):
            return denoiser
        black, white = self.affine.encode(torch.tensor([-1.0, 1.0])).tolist()
        return clip_x0(denoiser, black, white)

    @torch.no_grad()
    def encode(self, pixels: Images) -> Tensor:
        """Pixels in [-1, 1] to what the network works with."""
        if not isinstance(self.network, LatentDiffusion):
            return self.affine.encode(pixels)
        return torch.cat([self.network.autoencoder.encode(part) for part in pixels.split(CHUNK)])

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Images:
        """What the network works with, to pixels in [-1, 1]."""
        latent = isinstance(self.network, LatentDiffusion)
        return (self.network.autoencoder.decode(x0) if latent else self.affine.decode(x0)).clamp(-1, 1)

    def raw(self, xt: Tensor, t: Tensor, label: Tensor | None, **conditions: object) -> Tensor:
        """The network's own output, of the recipe's kind."""
        with torch.autocast(xt.device.type, torch.bfloat16, enabled=uses_bf16("auto", xt.device)):
            return self.network(xt, t, label=label, **conditions).to(xt.dtype)


class TableNetwork(nn.Module):
    """A checkpoint asked as in the lessons: at integer t of a table abar (T + 1,), x_t = sqrt(abar_t) x0 +
    sqrt(1 - abar_t) eps. A generator answers with eps, a classifier with logits.

    The checkpoint lives on the straight path. Divided by alpha + sigma, x_t is on that path, at the time
    sigma / (alpha + sigma) of the same signal-to-noise ratio, with the same x0 and the same eps; both stay in the
    network's own scaling (`encode`, `decode`). Raises ValueError for a checkpoint of another path.
    """

    def __init__(self, model: Checkpoint, abar: Tensor):
        super().__init__()
        if model.recipe.schedule != "flow":
            raise ValueError(f"{model.recipe.name} was trained on the path {model.recipe.schedule!r}, not on 'flow'")
        self.model, self.network = model, model.network
        self.null = getattr(model.network, "null", None)
        self.register_buffer("abar", abar)

    def forward(self, xt: Tensor, t: Tensor, y: Labels | None = None) -> Tensor:
        """xt (b, c, h, w), integer t (b,), y (b,) or None for no label -> eps like xt, or logits (b, classes)."""
        alpha, sigma = (root.to(xt) for root in (self.abar[t].sqrt(), (1 - self.abar[t]).sqrt()))
        straight, x = sigma / (alpha + sigma), xt / pad(alpha + sigma, xt)
        if self.null is None:
            return self.network(x, straight)
        out = self.model.raw(x, straight, y)
        return solve(self.model.recipe.kind, out, x, straight, self.model.schedule)[1]

    def encode(self, pixels: Images) -> Tensor:
        """Pixels in [-1, 1] to what the network works with."""
        return self.model.encode(pixels)

    def decode(self, x0: Tensor) -> Images:
        """And back."""
        return self.model.decode(x0)


def train_recipe(
    recipe: Recipe,
    out: Path,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "auto",
    every: float = 5.0,
    root: str | Path | None = None,
    overwrite: bool = False,
    half: bool = False,
    progress: bool = True,
) -> Checkpoint:
    """Train a recipe into the file `out`, for its own time unless steps or seconds are given. `half` stores the weights
    in 16 bits.

    The state is kept beside it, in `out`.resume, while training runs; the same call takes a run that was cut off up
    again. Raises FileExistsError where `out` exists, unless told to overwrite it.
    """
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: add --overwrite to replace it, or name another file with --out")
    if steps is None and seconds is None:
        steps, seconds = recipe.steps, recipe.seconds
    images, labels = recipe.load_data(root)
    base = _base(recipe)
    network = recipe.build(seed, base and base.network)
    recipe.prepare(network, labels, seed)
    affine = base.affine if base else Affine(0.0, 1.0) if recipe.reads_pixels else measure_affine(images)
    untrained = Checkpoint(network, recipe, affine, {})
    result = fit(
        network,
        recipe.loss,
        recipe.with_hints(untrained.encode(images), images),
        labels,
        steps=steps,
        seconds=seconds,
        **recipe.loop,
        seed=seed,
        device=device,
        precision=precision,
        checkpoint=resume_file(out),
        every=every,
        progress=progress,
    )
    recent = result.losses[-200:]
    card = dict(seed=seed, steps=result.steps, seconds=round(result.seconds, 1), loss=sum(recent) / len(recent))
    card |= dict(
        images_per_second=round(result.steps * recipe.batch_size / result.seconds),
        precision="bf16" if uses_bf16(precision, device) else "fp32",
        machine=machine(),
        condiff=importlib.metadata.version("condiff"),
    )
    if recipe.architecture == "JudgeNet":
        card |= certify(result.network.cpu(), *data.mnist("train", root))
    if recipe.architecture == "Autoencoder":
        result.network.measure_scale(images.to(device))
    if base:
        card["base"] = fingerprint(recipe.base)
    checkpoint = Checkpoint(result.network, recipe, affine, card)
    save(out, checkpoint, half=half)
    resume_file(out).unlink(missing_ok=True)  # only now: a kill before this line loses nothing
    return checkpoint


def save(path: Path, checkpoint: Checkpoint, *, half: bool = False) -> None:
    """Write the weights, in 16 bits if `half`, with recipe, scaling and card in the header."""
    about = dict(recipe=asdict(checkpoint.recipe), affine=asdict(checkpoint.affine), card=checkpoint.card)
    frozen = f"{checkpoint.network.frozen}." if checkpoint.recipe.base else None  # in a file of its own
    weights = {k: w for k, w in checkpoint.network.state_dict().items() if not (frozen and k.startswith(frozen))}
    write_safetensors(path, {name: w.half() if half else w for name, w in weights.items()}, about)


def load(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint; a bare name such as "mnist" means the one that the course ships.

    Raises CheckpointError, with what to do, for a file that is missing, damaged or of another version of the course.
    """
    path = find(path)
    tensors, about = read_safetensors(path)
    try:
        recipe = Recipe(**about["recipe"])
        base = _base(recipe)
        if base and fingerprint(recipe.base) != about["card"]["base"]:
            raise CheckpointError(f"{path} was trained on another {recipe.base} than the one there is: train it again")
        network = recipe.build(base=base and base.network)
        missing, surplus = network.load_state_dict(tensors, strict=False)
        if surplus or not all(recipe.base and name.startswith(f"{network.frozen}.") for name in missing):
            raise KeyError(f"weights {[*missing, *surplus][:3]} ...")
        affine = Affine(**about["affine"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this version of the course ({error}): train it again") from error
    return Checkpoint(network.eval().requires_grad_(False), recipe, affine, about["card"]).to(device)


def fingerprint(name: str) -> str:
    """SHA-256 of a shipped checkpoint: what was trained on it works with no other."""
    return hashlib.sha256(find(name).read_bytes()).hexdigest()


def _base(recipe: Recipe) -> Checkpoint | None:
    """What the recipe's network is built on, if on anything."""
    return load(recipe.base) if recipe.base else None


def resume_file(out: Path) -> Path:
    """Where the state of an unfinished run is kept."""
    return out.with_name(out.name + ".resume")


def find(path: str | Path) -> Path:
    """The file itself, or the shipped checkpoint of that name. Raises CheckpointError, naming those there are, for a
    bare name that is neither."""
    shipped = SHIPPED / f"{path}.safetensors"
    if Path(path).suffix or Path(path).exists():
        return Path(path)
    if not shipped.exists():
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.safetensors")))
        raise CheckpointError(f"there is no checkpoint {path}: the course ships {names}; of your own, name the file")
    return shipped


def machine() -> str:
    """Processor or GPU, cores and versions, for a card."""
    return f"{hardware()}, torch {torch.__version__}, python {platform.python_version()}"


def hardware() -> str:
    """Processor or GPU, and what the processor's threads can do."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    amx = ", AMX" if uses_bf16("auto", "cpu") else ""
    return f"{name} ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}{amx})"
