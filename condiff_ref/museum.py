"""The museum of bugs: short programs with mistakes of kinds that are made, some of them reported of well-known
repositories.

All code here was written for this course, and none of it is theirs. Each exhibit comes with the report of a user, and
breaks one property of MUSEUM_WORDS, or none. Which one is exercise 10.9.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

MUSEUM_WORDS = {
    "agreement": "where the predictions with and without label are equal, the guided one is the same",
    "scale one": "at scale 1 the guided prediction is the one with the label",
    "scale counts": "the result depends on the scale",
    "all channels": "every channel is guided alike, however many there are",
    "null label": "a share of the labels is replaced in training, so that the network learns to do without",
    "round trip": "x0 comes back from xt and the noise that made it",
    "last step": "what the sampler returns has no noise left in it",
    "derivative": "for a single example the result is the derivative that its name promises",
    "examples apart": "an example comes out the same alone and within a batch",
    "can learn": "after some steps of training, every weight has moved",
    "arguments kept": "what was passed in is not changed",
    "repeatable": "equal arguments give equal results",
    "nothing": "nothing is broken: it does what it should, and the report is mistaken",
}


def _a(eps_c: Tensor, eps_u: Tensor, s: float) -> Tensor:
    return s * eps_c + (s - 1) * eps_u


def _b(hint: Tensor, h: Tensor, block: nn.Module, zero: nn.Linear) -> Tensor:
    # zero was built with nn.init.zeros_ on its weight and its bias
    return h + zero(block(h + hint))


def _c(net: Callable, x: Tensor, t: Tensor, y: Tensor, s: float) -> Tensor:
    twice = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y]))
    eps_c, eps_u = twice.chunk(2)
    return eps_u + s * (eps_c - eps_u)


def _d(xt: Tensor, eps: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    a = abar[t].view(-1, 1, 1, 1)
    return (xt - (1 - a) * eps) / a.sqrt()


def _e(eps_c: Tensor, eps_u: Tensor, s: float) -> Tensor:
    return eps_c + s * (eps_c - eps_u)


def _f(log_prob: Callable, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    # grad log p(y | xt)
    x = x.detach().requires_grad_()
    total = log_prob(x, t, y).sum()
    return torch.autograd.grad(total, x)[0]


def _g(net: Callable, x0: Tensor, y: Tensor, null: int, abar: Tensor, gen: Generator) -> Tensor:
    t = torch.randint(1, len(abar), (len(x0),), generator=gen)
    eps = torch.randn(x0.shape, generator=gen)
    a = abar[t].view(-1, 1, 1, 1)
    xt = a.sqrt() * x0 + (1 - a).sqrt() * eps
    dropped = torch.rand(len(y), generator=gen) < 0.1
    labels = torch.where(dropped, null, y)
    assert labels.shape == y.shape
    return F.mse_loss(net(xt, t, y), eps)


def _h(eps_c: Tensor, eps_u: Tensor, s: float) -> Tensor:
    guided = eps_u[:, :3] + s * (eps_c[:, :3] - eps_u[:, :3])
    return torch.cat([guided, eps_c[:, 3:]], dim=1)


def _i(net: Callable, x: Tensor, levels: Sequence[int], abar: Tensor) -> Tensor:
    # abar[i] belongs to the noise level i + 1 of len(abar): the table does not hold the 1 of clean data
    for i, after in pairwise([*levels, -1]):
        after = max(after, 0)
        eps = net(x, i)
        x0 = (x - (1 - abar[i]).sqrt() * eps) / abar[i].sqrt()
        x = abar[after].sqrt() * x0 + (1 - abar[after]).sqrt() * eps
    return x


def _j(log_prob: Callable, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    # grad log p(y | xt)
    x = x.detach().requires_grad_()
    loss = -log_prob(x, t, y).mean()
    return -torch.autograd.grad(loss, x)[0]


def _k(v_c: Tensor, v_u: Tensor, s: float) -> Tensor:
    shift = v_c - v_u
    ratio = (v_c * v_u).flatten(1).sum(1) / v_u.flatten(1).square().sum(1)
    v_u = ratio.view(-1, 1, 1, 1) * v_u
    return v_u + s * shift


def _l(denoise: Callable, log_prob: Callable, xt: Tensor) -> Tensor:
    # grad log p(y | x0_hat(xt)) with respect to xt
    x0 = denoise(xt).detach().requires_grad_()
    return torch.autograd.grad(log_prob(x0).sum(), x0)[0]


def _m(c: int) -> nn.Module:
    gate = nn.Sequential(nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1))
    for parameter in gate.parameters():
        nn.init.zeros_(parameter)
    return gate


@dataclass(frozen=True)
class Exhibit:
    """A function, under a name that says what it is for, and what a user reported of it."""

    name: str
    report: str
    function: Callable

    @property
    def code(self) -> str:
        """The source, with the name of the exhibit in place of the letter."""
        source = inspect.getsource(self.function)
        return source.replace(f"def {self.function.__name__}(", f"def {self.name}(", 1).rstrip()

    def __str__(self) -> str:
        return f'"{self.report}"\n\n{self.code}\n'


EXHIBITS = {
    "A": Exhibit(
        "guide",
        "At scale 1 the pictures are fine. At 3 they are grey mush, and at 7 every pixel is far out of range.",
        _a,
    ),
    "B": Exhibit(
        "control",
        "I have just built the adapter. Whatever drawing I feed in as the hint, what it adds is 0 everywhere. It is "
        "broken.",
        _b,
    ),
    "C": Exhibit("guided", "I tried scales from 0 to 20. The pictures show the right class, but all look alike.", _c),
    "D": Exhibit("clean", "x0 looks washed out, worst in the middle of sampling. The network's loss is excellent.", _d),
    "E": Exhibit(
        "guide",
        "I use the best scale of the paper, and get pictures more saturated than theirs, with less variety.",
        _e,
    ),
    "F": Exhibit(
        "class_gradient",
        "The log-probabilities of the whole batch are summed before the derivative is taken, so each picture gets the "
        "gradients of all the others mixed in.",
        _f,
    ),
    "G": Exhibit("loss", "The conditional samples are good. With any guidance, even 1.5, they turn strange.", _g),
    "H": Exhibit("guide", "With RGB pictures it worked. On latents the class gets clearer, colours get odd.", _h),
    "I": Exhibit("sample", "A faint grain lies on all samples, and it does not vanish with more steps.", _i),
    "J": Exhibit(
        "class_gradient", "I tuned the scale on 4 pictures at a time. On 64 at a time it seems to have no effect.", _j
    ),
    "K": Exhibit(
        "zero_star",
        "This should be plain CFG with a better-fitting unconditional part. At low scales it drifts off.",
        _k,
    ),
    "L": Exhibit(
        "measurement_gradient", "Inpainting works near the end. At high noise it pulls, but not where it should.", _l
    ),
    "M": Exhibit("gate", "To be safe I start with two zero layers one after the other. Only a bias ever changes.", _m),
}
