"""Training: the loss, label dropout, and one loop that any network here is trained by."""

import hashlib
import math
import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from .data import batches
from .files import read_safetensors, write_safetensors
from .predictions import target
from .schedules import Schedule, add_noise, draw_noise
from .shapes import Data, Images, Network, Time, pad

Loss = Callable[[nn.Module, Tensor, Tensor, Generator], Tensor]  # (network, images, labels, generator) -> ()
DrawTime = Callable[[int, Generator | None], Tensor]  # (n, generator) -> (n,)


def drop(label: Tensor, null: int | Tensor, prob: float, generator: Generator | None = None) -> Tensor:
    """Replace each label by `null` with probability `prob`, independently per example (Ho & Salimans 2022, alg. 1).

    label (b,) with one null label, or captions (b, n) with a null caption (n,): those go as a whole.
    """
    device = label.device if generator is None else generator.device
    dropped = torch.rand(len(label), generator=generator, device=device) < prob
    return torch.where(pad(dropped, label).to(label.device), null, label)


def logit_normal(n: int, generator: Generator | None = None, *, mean: float = 0.0) -> Time:
    """t = sigmoid(z), z ~ N(mean, 1): mostly half-way, where there is most to learn, and nearer to the noise, where the
    class is decided, for mean > 0 (Esser et al. 2024, eq. 19)."""
    device = None if generator is None else generator.device
    return (mean + torch.randn(n, generator=generator, device=device)).sigmoid()


def uniform(n: int, generator: Generator | None = None) -> Time:
    """t uniform in [0, 1)."""
    device = None if generator is None else generator.device
    return torch.rand(n, generator=generator, device=device)


def diffusion_loss(
    network: Network,
    x0: Data,
    kind: str,
    schedule: Schedule,
    generator: Generator | None = None,
    *,
    label: Tensor | None = None,
    draw_time: DrawTime = logit_normal,
) -> Tensor:
    """E |network(xt, t) - target|^2 over t and eps, averaged over the batch and all its entries: ()
    (Ho et al. 2020, eq. 14, for any kind)."""
    t = draw_time(len(x0), generator).to(x0)
    eps = draw_noise(x0, generator)
    xt = add_noise(x0, eps, t, schedule)
    out = network(xt, t) if label is None else network(xt, t, label=label)
    return F.mse_loss(out.float(), target(kind, x0, eps, t, schedule).float())


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite. The message says at which step and what broke first."""


@dataclass(frozen=True)
class Fit:
    """What a training run leaves: the averaged network in eval mode, and how it got there."""

    network: nn.Module
    steps: int
    seconds: float
    losses: list[float]  # one per step


def fit(
    network: nn.Module,
    loss: Loss,
    images: Images,
    labels: Tensor,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    batch_size: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.01,
    ema: float = 0.999,
    seed: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "auto",
    checkpoint: Path | None = None,
    every: float = 5.0,
    progress: bool = True,
) -> Fit:
    """Train with AdamW for so many `steps`, or for so many `seconds`. The learning rate warms up over the first 5 % and
    falls linearly to zero at the end, by steps or by the clock.

    With a `checkpoint` path the whole state is written there every so many seconds, and a run that was cut off goes on
    from it: bit for bit as if it had never been cut off, where `steps` is given. The end is written too: the same call
    then trains no more. The file stays: remove it once the result is in safety.
    `precision` is "bf16", "fp32" or "auto": bf16 where the hardware multiplies in it.
    Raises ValueError unless exactly one of steps and seconds is given and positive, or where the checkpoint belongs to
    another run; TrainingDiverged where the loss stops being finite.
    """
    if (steps is None) == (seconds is None) or (steps or seconds or 0) <= 0:
        raise ValueError(f"give either steps or seconds, and more than 0: got {steps=}, {seconds=}")
    device, start = torch.device(device), _fingerprint(network)
    network = network.to(device, memory_format=torch.channels_last).train()
    images, labels = images.to(device), labels.to(device)
    run = _Run(network, lr, weight_decay, ema, seed, device)
    identity = dict(steps=steps, seconds=seconds, batch_size=batch_size, lr=lr, weight_decay=weight_decay, ema=ema)
    identity |= dict(seed=seed, examples=len(images), parameters=sum(p.numel() for p in network.parameters()))
    identity |= dict(start=start)
    if checkpoint is not None and checkpoint.exists():
        run.load(checkpoint, identity)
    taken_up = run.step
    precise = torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(precision, device))
    bar = tqdm(
        total=steps or seconds,
        disable=None if progress else True,
        bar_format=_BAR.format(unit="steps" if steps else "s"),
    )
    saved = time.monotonic()
    for x, y in batches(images, labels, batch_size, seed, start=run.step):
        done = run.step / steps if steps else run.elapsed / seconds
        if done >= 1:
            break
        with precise:
            run.advance(loss, x, y, rate=min(1, (done + 1e-3) / 0.05, (1 - done) / 0.95))
        bar.set_postfix_str(f"loss {run.recent_loss():.4f}", refresh=False)
        bar.update((run.step if steps else min(run.elapsed, seconds)) - bar.n)
        if checkpoint is not None and time.monotonic() - saved > every:
            run.save(checkpoint, identity)
            saved = time.monotonic()
    run.check()
    bar.close()
    if checkpoint is not None and run.step > taken_up:
        run.save(checkpoint, identity)
    return Fit(run.average.eval(), run.step, run.elapsed, run.losses)


def keep(name: str) -> Path | None:
    """The checkpoint of the run `name` for `fit`, in the folder $CONDIFF_CHECKPOINTS; None where that is not set.

    On Colab the set-up cell sets it: a run goes on after a disconnect, when its cell is run again.
    """
    folder = os.environ.get("CONDIFF_CHECKPOINTS")
    return Path(folder).expanduser() / f"{name}.resume" if folder else None


def uses_bf16(precision: str, device: str | torch.device) -> bool:
    """Whether networks run in bfloat16 there. "auto" asks the hardware: AMX on a CPU, native bf16 on a GPU.

    Older GPUs, such as the T4, run in fp32: float16 would need its losses scaled, and these networks are small.

    Raises ValueError for a precision that is not "auto", "bf16" or "fp32".
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"precision is auto, bf16 or fp32, not {precision!r}")
    if precision != "auto":
        return precision == "bf16"
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device(device).type == "cpu" and torch.cpu._is_amx_tile_supported()  # no public test in torch 2.11


_BAR = "training {{percentage:3.0f}}% |{{bar}}| {{n:.0f}}/{{total:.0f}} {unit}, {{remaining}} left, {{postfix}}"


class _Run:
    """The whole state of a training run, so that it can be written down and taken up again."""

    def __init__(self, network: nn.Module, lr: float, weight_decay: float, ema: float, seed: int, device: torch.device):
        self.network, self.average = network, deepcopy(network).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
        )
        self.generator = Generator(device).manual_seed(seed)
        self.lr, self.ema, self.device = lr, ema, device
        self.step, self.elapsed, self.losses = 0, 0.0, []
        self._unread: list[Tensor] = []  # losses still on the device: reading each one would stall a GPU

    def advance(self, loss: Loss, images: Tensor, labels: Tensor, rate: float) -> None:
        start = time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        value = loss(self.network, images, labels, self.generator)
        value.backward()
        self._unread.append(value.detach())
        self.step += 1
        if self.device.type == "cpu" or self.step % 20 == 0:
            self.check()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._update_average()
        self.elapsed += time.monotonic() - start

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.ema, (1 + self.step) / (10 + self.step))  # young averages forget faster
        for mean, value in zip(self.average.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)

    def recent_loss(self) -> float:
        recent = self.losses[-50:] or [float("nan")]
        return sum(recent) / len(recent)

    def check(self) -> None:
        """Read the losses that are still on the device; raise TrainingDiverged at the first that is not finite."""
        if not self._unread:
            return
        self.losses += torch.stack(self._unread).tolist()
        self._unread.clear()
        bad = next((i for i, value in enumerate(self.losses) if not math.isfinite(value)), None)
        if bad is not None:
            raise TrainingDiverged(self._diagnosis(bad))

    def _diagnosis(self, bad: int) -> str:
        named = list(self.network.named_parameters())
        weight = next((name for name, p in named if not p.isfinite().all()), None)
        gradient = next((name for name, p in named if p.grad is not None and not p.grad.isfinite().all()), None)
        where = (
            f"the weights of {weight}" if weight else f"the gradient of {gradient}" if gradient else "the loss alone"
        )
        before = f"{self.losses[bad - 1]:.4g}" if bad else "none"
        return (
            f"the loss became {self.losses[bad]} at step {bad + 1} (the loss before it: {before}). First thing that is "
            f"not finite: {where}. Try a smaller learning rate than {self.lr:g}, or --precision fp32."
        )

    def save(self, path: Path, identity: dict) -> None:
        """Write the state beside `path`, then put it in place in one move: a kill leaves the old file or the new."""
        self.check()
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
        tensors["generator"] = self.generator.get_state()
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        state = dict(identity=identity, step=self.step, elapsed=self.elapsed)
        write_safetensors(path, tensors, state)

    def load(self, path: Path, identity: dict) -> None:
        tensors, state = read_safetensors(path)
        if state["identity"] != identity:
            other = {k: v for k, v in state["identity"].items() if identity.get(k) != v}
            raise ValueError(
                f"{path} belongs to another run, with {other}: delete it to start afresh, or train to another file"
            )
        self.network.load_state_dict(_under("network", tensors))
        self.average.load_state_dict(_under("average", tensors))
        for i, parameter in enumerate(self.network.parameters()):
            moments = _under(f"optimizer.{i}", tensors)
            # as the optimizer itself would have made them: on the parameter's device, in its own memory format
            self.optimizer.state[parameter] = {
                k: v.to(parameter.device) if v.ndim == 0 else torch.empty_like(parameter).copy_(v)
                for k, v in moments.items()
            }
        self.generator.set_state(tensors["generator"])
        self.losses = tensors["losses"].tolist()
        self.step, self.elapsed = state["step"], state["elapsed"]


def _fingerprint(network: nn.Module) -> str:
    """Of the weights: another network, or another start, is another run."""
    weights = (value.detach().cpu().contiguous() for value in network.state_dict().values())
    return hashlib.sha256(b"".join(w.flatten().view(torch.uint8).numpy().tobytes() for w in weights)).hexdigest()[:12]


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix + "."): v for k, v in tensors.items() if k.startswith(prefix + ".")}
