"""Guidance, sampler and checkpoint put together: from labels to pictures."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from . import guidance
from .checkpoints import Checkpoint
from .classifier import log_prob_of
from .controlnet import Controlled
from .samplers import ddim_step, ddpm_step, euler_step, heun_step, sample
from .schedules import Schedule, draw_noise, time_grid
from .shapes import Denoiser, Images, Step

SAMPLERS: dict[str, Callable[[Schedule, Generator], Step]] = {
    "euler": lambda schedule, generator: euler_step(schedule),
    "heun": lambda schedule, generator: heun_step(schedule),
    "ddim": lambda schedule, generator: ddim_step(schedule),
    "ddpm": lambda schedule, generator: ddpm_step(schedule, generator=generator),
}


RULES = ("cfg", "classifier", "autoguidance", "apg", "interval", "rescale", "negative", "perp-neg")


@dataclass(frozen=True)
class Guidance:
    """A rule of guidance.py with its settings; a rule ignores the settings that it does not use.

    `uncond` is another model for the unconditional pass (for autoguidance: a worse one, asked with the same label),
    `classifier` a noise-aware one, `avoid` a class to keep away from.
    """

    rule: str = "cfg"
    scale: float = 1.0
    uncond: Checkpoint | None = None
    classifier: Checkpoint | None = None
    avoid: int | None = None
    low: float = 0.0
    high: float = 1.0
    parallel: float = 0.0
    max_norm: float = math.inf
    phi: float = 0.7
    negative_scale: float = 1.0

    def __post_init__(self):
        if self.rule not in RULES:
            raise ValueError(f"there is no guidance {self.rule!r}: choose one of {', '.join(RULES)}")
        for rules, setting, option in (
            (("classifier",), self.classifier, "--classifier CHECKPOINT"),
            (("autoguidance",), self.uncond, "--uncond CHECKPOINT"),
            (("negative", "perp-neg"), self.avoid, "--avoid CLASS"),
        ):
            if self.rule in rules and setting is None:
                raise ValueError(f"guidance {self.rule!r} needs {option}")

    def denoiser(self, model: Checkpoint, label: Tensor, **conditions: object) -> Denoiser:
        """The guided denoiser for these labels or captions; further conditions, such as a hint, hold for every pass.

        Raises ValueError where the models do not belong together.
        """
        for other in (self.uncond, self.classifier):
            if other is not None and _world(other) != _world(model):
                raise ValueError("models that work together must share data, scaling and schedule")
        cond, uncond = model.denoiser(label, **conditions), (self.uncond or model).denoiser(**conditions)
        match self.rule:
            case "classifier":
                log_prob = log_prob_of(self.classifier.network, label)
                return guidance.classifier_guidance(uncond, log_prob, self.scale, model.schedule)
            case "autoguidance":
                return guidance.cfg(cond, self.uncond.denoiser(label), self.scale)
            case "apg":
                return guidance.apg(cond, uncond, self.scale, self.parallel, self.max_norm)
            case "negative" | "perp-neg":
                avoided = model.denoiser(torch.full_like(label, self.avoid))
                if self.rule == "negative":
                    return guidance.negative(cond, avoided, uncond, self.scale)
                return guidance.perp_neg(cond, avoided, uncond, self.scale, self.negative_scale)
        guided = guidance.cfg(cond, uncond, self.scale)
        match self.rule:
            case "interval":
                return guidance.interval(guided, cond, self.low, self.high)
            case "rescale":
                return guidance.rescale(guided, cond, self.phi)
        return guided


def _world(model: Checkpoint) -> tuple:
    return model.recipe.data, model.recipe.schedule, model.affine


def generate(
    model: Checkpoint,
    label: Tensor,
    rule: Guidance,
    *,
    hint: Images | None = None,
    strength: float = 1.0,
    sampler: str = "euler",
    steps: int = 20,
    seed: int = 0,
    clip: bool = True,
    chunk: int = 500,
    progress: bool = False,
) -> Images:
    """One picture per label (n,), or caption (n, tokens): (n, c, h, w) in [-1, 1], on the CPU. A ControlNet needs a
    hint (n, 1, h, w) too, and gives way to the network beneath at a `strength` under 1.

    The noise is drawn on the CPU from `seed`, so that every device starts from the same. Raises ValueError for a
    sampler that does not exist, for fewer than one step, and for labels outside the classes.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"there is no sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    if (hint is not None) != isinstance(model.network, Controlled):
        needs = "needs a" if hint is None else "takes no"
        raise ValueError(f"{model.recipe.name} is {model.recipe.about}: it {needs} hint")
    device = next(model.network.parameters()).device
    generator = Generator().manual_seed(seed)
    step, times = SAMPLERS[sampler](model.schedule, generator), time_grid(steps)
    pictures = []
    rows = torch.arange(len(label)).split(chunk)
    for part in tqdm(rows, desc="sampling", disable=None if progress else True, unit="batch"):
        noise = draw_noise(torch.empty(len(part), *model.shape), generator).to(device)
        conditions = {} if hint is None else {"hint": hint[part].to(device), "strength": strength}
        denoiser = rule.denoiser(model, label[part].to(device), **conditions)
        x0 = sample(step, model.clip(denoiser) if clip else denoiser, noise, times)
        pictures.append(model.decode(x0).cpu())
    return torch.cat(pictures)
