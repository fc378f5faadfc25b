"""Read the formula out of a function that is linear in its tensors, by calling it.

At several times the coefficient of each tensor is measured with random inputs; the curve of coefficients is then looked
up among products, quotients and differences of the schedule's own expressions, such as sqrt(1 - abar[t]).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product

import torch
from torch import Generator, Tensor

Atoms = dict[str, Tensor]  # name of an expression: its value at each of the probed times (n,)
POWERS = (0.5, 1.0, -0.5, -1.0)
MORE_POWERS = (*POWERS, 1.5, 2.0, -1.5, -2.0)  # of one or two factors, for roots and squares that are too many
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Formula:
    """A function whose result is linear in the arguments `terms`, with coefficients made of the schedule.

    function: its name; out: what its result is called. `probes(generator)` draws one set of the other arguments per
    time, with the atoms at these times. `expected` names the right coefficient of each term, in atoms, and is shown
    with the last hint only.
    """

    function: str
    out: str
    terms: tuple[str, ...]
    expected: str
    probes: Callable[[Generator], tuple[list[dict[str, object]], Atoms]]


@dataclass(frozen=True)
class Reading:
    """What the x-ray saw: the coefficients (n times, terms), how far from linear (0: exactly), and their names."""

    formula: Formula
    coefficients: Tensor
    residual: float
    names: tuple[str | None, ...]

    @property
    def told(self) -> bool:
        """Whether there is a formula to show: it is linear, and not all of its coefficients are unknown."""
        return self.residual < TOLERANCE and any(name is not None for name in self.names)

    def __str__(self) -> str:
        parts = [(name, term) for name, term in zip(self.names, self.formula.terms, strict=True) if name != "0"]
        if not parts:
            return f"{self.formula.out} = 0"
        text = " + ".join(_times(name or "(?)", term) for name, term in parts).replace("+ -", "- ")
        return f"{self.formula.out} = {text}"


def read(formula: Formula, call: Callable[..., Tensor], order: tuple[str, ...], generator: Generator) -> Reading:
    """X-ray the function; `order` is that of its arguments. Errors of the function pass through."""
    probes, atoms = formula.probes(generator)
    rows, residual = [], 0.0
    for others in probes:
        terms = {name: torch.randn(3, 2, 3, 2, generator=generator, dtype=torch.float64) for name in formula.terms}
        out = call(*[(terms[name].clone() if name in terms else others[name]) for name in order])
        if not out.isfinite().all():
            return Reading(formula, torch.zeros(0), math.inf, (None,) * len(formula.terms))
        design = torch.stack([terms[name].flatten() for name in formula.terms], dim=1)
        wanted = out.detach().double().flatten()
        row = torch.linalg.lstsq(design, wanted[:, None]).solution[:, 0]
        rows.append(row)
        residual = max(residual, float((design @ row - wanted).abs().max() / (1 + wanted.abs().max())))
    coefficients = torch.stack(rows)
    grammar = _Grammar(atoms)
    names = tuple(grammar.name(column) if residual < TOLERANCE else None for column in coefficients.T)
    return Reading(formula, coefficients, residual, names)


class _Grammar:
    """Expressions in the atoms, the simplest first."""

    def __init__(self, atoms: Atoms):
        self._atoms = list(atoms)
        self._logs = torch.stack(list(atoms.values())).double().log()

    def name(self, curve: Tensor) -> str | None:
        """The simplest expression that has these values, or None."""
        return self._constant(curve) or self._product(curve) or self._sum(curve)

    def _constant(self, curve: Tensor) -> str | None:
        for value in (0, 1, -1, 2, -2, 0.5, -0.5):
            if torch.allclose(curve, torch.full_like(curve, value), rtol=TOLERANCE, atol=TOLERANCE):
                return f"{value:g}"
        return None

    def _product(self, curve: Tensor) -> str | None:
        for names, values in self._products:
            for factor, text in ((1, ""), (-1, "-"), (2, "2*"), (-2, "-2*"), (0.5, "0.5*"), (-0.5, "-0.5*")):
                hit = torch.isclose(curve / factor, values, rtol=TOLERANCE, atol=0).all(1).nonzero()
                if len(hit):
                    return text + names[int(hit[0])]
        return None

    def _sum(self, curve: Tensor) -> str | None:
        names, values = self._short
        scale = 1 + curve.abs().max()
        for sign_one, sign_two in ((1, -1), (1, 1), (-1, -1)):
            rest = sign_two * (curve - sign_one * values)
            distance = torch.cdist(rest, values, p=float("inf")) / scale
            one, two = divmod(int(distance.argmin()), len(values))
            if distance[one, two] < TOLERANCE / 10:
                first = names[one] if sign_one > 0 else "-" + names[one]
                return f"({first} {'+' if sign_two > 0 else '-'} {names[two]})"
        return None

    @cached_property
    def _products(self) -> list[tuple[list[str], Tensor]]:
        """Products of one, two and three atoms, each to a power."""
        return [self._of(1, MORE_POWERS), self._of(2, MORE_POWERS), self._of(3, POWERS)]

    @cached_property
    def _short(self) -> tuple[list[str], Tensor]:
        """What sums are made of: 1, products of one or two atoms, and of three square roots."""
        parts = [self._of(1, POWERS), self._of(2, POWERS), self._of(3, (0.5, -0.5))]
        one = torch.ones(1, self._logs.shape[1], dtype=torch.float64)
        return ["1", *(name for names, _ in parts for name in names)], torch.cat(
            [one, *(values for _, values in parts)]
        )

    def _of(self, count: int, powers: tuple[float, ...]) -> tuple[list[str], Tensor]:
        names, exponents = [], []
        for chosen in combinations(range(len(self._atoms)), count):
            for taken in product(powers, repeat=count):
                row = [0.0] * len(self._atoms)
                for index, power in zip(chosen, taken, strict=True):
                    row[index] = power
                names.append(_fraction([(self._atoms[i], p) for i, p in zip(chosen, taken, strict=True)]))
                exponents.append(row)
        return names, (torch.tensor(exponents, dtype=torch.float64) @ self._logs).exp()


def _fraction(factors: list[tuple[str, float]]) -> str:
    """sqrt(1 - abar[t])/alpha[t] for [("1 - abar[t]", 0.5), ("alpha[t]", -1.0)]."""

    def text(atom: str, power: float) -> str:
        if power == 0.5:
            return f"sqrt({atom})"
        base = f"({atom})" if " " in atom else atom
        return base if power == 1 else f"{base}**{power:g}"

    above = [text(atom, power) for atom, power in factors if power > 0]
    below = [text(atom, -power) for atom, power in factors if power < 0]
    if not below:
        return "*".join(above)
    return f"{'*'.join(above) or '1'}/{below[0] if len(below) == 1 else '(' + '*'.join(below) + ')'}"


def _times(coefficient: str, term: str) -> str:
    sign, size = ("-", coefficient[1:]) if coefficient.startswith("-") else ("", coefficient)
    if size == "1":
        return sign + term
    return f"{sign}({size})*{term}" if "/" in size and not size.startswith("(") else f"{sign}{size}*{term}"


def ddpm_atoms(abar: Tensor, t: Tensor, s: Tensor | None = None) -> Atoms:
    """The expressions that DDPM and DDIM are written in, at the integer times t (n,), and s for an earlier time."""
    alpha = abar[t] / abar[t - 1]
    atoms = {"abar[t]": abar[t], "1 - abar[t]": 1 - abar[t]}
    if s is not None:
        atoms |= {"abar[s]": abar[s], "1 - abar[s]": 1 - abar[s]}
    atoms |= {"alpha[t]": alpha, "beta[t]": 1 - alpha}
    atoms |= {"abar[t-1]": abar[t - 1], "1 - abar[t-1]": 1 - abar[t - 1]}
    if s is None:
        atoms |= {"abar[t+1]": abar[t + 1], "1 - abar[t+1]": 1 - abar[t + 1]}
    return atoms


def random_abar(generator: Generator, steps: int = 40) -> Tensor:
    """A table abar (steps + 1,), abar[0] = 1, from random betas: no two expressions agree on it by accident."""
    betas = 0.01 + 0.15 * torch.rand(steps, generator=generator, dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])


def ddpm_probes(
    generator: Generator, extra: Mapping[str, object] | None = None, earlier: bool = False
) -> tuple[list[dict[str, object]], Atoms]:
    """Nine times on a random table, for functions of (..., t, abar), or (..., t, s, abar) if `earlier`."""
    abar = random_abar(generator)
    t = 4 + torch.randperm(35, generator=generator)[:9]
    s = (t * torch.rand(9, generator=generator)).long().clamp(min=1)
    s = torch.where(s >= t - 1, t - 2, s)  # never t - 1: that has a name of its own
    probes = []
    for i in range(9):
        probe = dict(t=t[i].expand(3).clone(), abar=abar.clone(), **(extra or {}))
        probes.append(probe | (dict(s=s[i].expand(3).clone()) if earlier else {}))
    return probes, ddpm_atoms(abar, t, s if earlier else None)
