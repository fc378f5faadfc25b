"""What a submission can import while it is graded holds no answer to its lesson's exercises, and all else works."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from torch import Generator

import condiff_check
import condiff_ref
from condiff_check.exercise import Answer, Exercise
from condiff_check.grading.redact import MARKER, build_view, hidden_by, python_command, python_path, redact
from condiff_check.guard import Guard
from condiff_check.invariants import first_facts, last_facts
from condiff_check.registry import find, lesson, lessons

PACKAGE = Path(condiff_ref.__file__).parent
SOLUTIONS = {path.name[:2]: path for path in (PACKAGE.parent / "solutions").glob("*.ipynb")}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The view of a lesson, built once."""
    return cache(lambda number: build_view(number, tmp_path_factory.mktemp("views") / number))


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path, str], types.ModuleType]]:
    """Import a copy of condiff_ref under another name, with all its modules: as it is seen, beside the real one."""
    root = tmp_path_factory.mktemp("seen")

    def load(package: Path, name: str) -> types.ModuleType:
        (root / name).mkdir()
        for path in package.glob("*.py"):
            (root / name / path.name).write_text(path.read_text().replace("from condiff_ref", f"from {name}"))
        importlib.invalidate_caches()
        modules = [path.stem for path in package.glob("*.py") if path.stem != "__init__"]
        for module in modules:
            importlib.import_module(f"{name}.{module}")
        return sys.modules[name]

    sys.path.insert(0, str(root))
    yield cache(load)
    sys.path.remove(str(root))


@pytest.fixture(scope="module")
def whole(load: Callable) -> types.ModuleType:
    return load(PACKAGE, "whole_ref")


@pytest.fixture(scope="module")
def seen(view: Callable, load: Callable) -> Callable[[str], types.ModuleType]:
    return lambda number: load(view(number) / "condiff_ref", f"seen_{number}")


def fault(exercise: Exercise, objects: tuple, seconds: float = 20.0) -> str:
    """What the first fact that does not hold says; nothing where all hold."""
    answer = Answer(dict(zip(exercise.names, objects, strict=True)), Guard(seconds))
    for number, fact in enumerate((*first_facts(exercise), *exercise.facts, *last_facts(exercise))):
        answer.reseed(3)
        try:
            fact.test(answer, Generator().manual_seed(300 + number))
        except Exception as error:
            return f"{fact.name}: {error!r}"
    return ""


# --- no answer by any other name -------------------------------------------------------------------------------------


def callables(package: types.ModuleType) -> dict[str, Callable]:
    """Everything that can be called in a package, private things, methods, closures and tables of functions too."""
    found, known, stack = {}, set(), [(package.__name__, package)]
    stack += [(name, module) for name, module in sys.modules.items() if name.startswith(f"{package.__name__}.")]
    while stack:
        path, thing = stack.pop()
        owner = thing if isinstance(thing, type | types.FunctionType | types.MethodType) else type(thing)
        ours = str(getattr(owner, "__module__", "")).startswith(package.__name__)
        if id(thing) in known or type(thing).__name__ == "Hidden":
            continue
        known.add(id(thing))
        if ours and callable(thing):
            found[path] = thing
        stack += [(f"{path}.{name}", part) for name, part in parts_of(thing, ours, package.__name__)]
    return found


def parts_of(thing: object, ours: bool, package: str) -> list[tuple[str, object]]:
    if isinstance(thing, types.ModuleType):
        named = vars(thing).items() if thing.__name__.startswith(package) else ()
        return [(name, part) for name, part in named if not name.startswith("__")]
    if isinstance(thing, dict):
        return [(str(name), part) for name, part in thing.items()]
    if isinstance(thing, list | tuple):
        return [(str(i), part) for i, part in enumerate(thing[:1])]  # one Recipe has the methods of all
    if not ours:
        return []
    if isinstance(thing, types.FunctionType):
        closed = [("closure", cell.cell_contents) for cell in thing.__closure__ or ()]
        return [*closed, *([("wrapped", thing.__wrapped__)] if hasattr(thing, "__wrapped__") else [])]
    if isinstance(thing, type):
        return [(name, getattr(thing, name)) for name in vars(thing) if not name.startswith("__")]
    return [(name, getattr(thing, name, None)) for name in dir(thing) if not name.startswith("__")]


def fits(function: Callable, reference: Callable) -> bool:
    """Whether it takes as many arguments."""
    wanted = inspect.signature(reference).parameters.values()
    for number in {len(wanted), sum(p.default is p.empty for p in wanted)}:
        try:
            inspect.signature(function).bind(*range(number))
        except (TypeError, ValueError):
            continue
        return True
    return False


SLOW = ("_reader", "reader_accuracy", "load_data", "_torchvision_mnist", "digits", "scenes", "caption_data")  # of data


def answers_among(candidates: dict[str, Callable], number: str) -> set[tuple[str, str]]:
    """(name of the function asked for, what answers it)."""
    return {
        (name, path.partition(".")[2])
        for exercise in lesson(number)
        for i, (name, reference) in enumerate(zip(exercise.names, exercise.references, strict=True))
        for path, candidate in candidates.items()
        if path.rpartition(".")[2] not in SLOW
        and fits(candidate, reference)
        and not fault(exercise, (*exercise.references[:i], candidate, *exercise.references[i + 1 :]))
    }


@pytest.mark.slow
@pytest.mark.parametrize("number", lessons())
def test_no_callable_of_the_view_answers_an_exercise(number: str, seen: Callable):
    assert answers_among(callables(seen(number)), number) == set()


def test_such_answers_are_found_where_there_are_some(whole: types.ModuleType):
    found = {name for _, path in answers_among(callables(whole), "09") for name in [path.rpartition(".")[2]]}
    assert {"draw", "kl_per_image"} <= found


def constant(x: torch.Tensor) -> Callable:
    return lambda xt, t: x


def table(ref: types.ModuleType, abar: torch.Tensor) -> object:
    return ref.schedules.discrete(abar)


def world_of(ref: types.ModuleType, points: torch.Tensor) -> object:
    """Points of data, each as a component without width."""
    n, d = points.shape
    return ref.mixture.GaussianMixture(torch.ones(n).to(points), points, torch.zeros(n, d, d).to(points), torch.ones(n))


def eps_of_score(score: torch.Tensor, t: int, abar: torch.Tensor) -> torch.Tensor:
    return -((1 - abar[t]) ** 0.5) * score[0]


def constants(ref: types.ModuleType, *curves: object) -> object:
    """A schedule from its values at the times in question: functions of t, or tensors."""
    return ref.schedules.Schedule(*(curve if callable(curve) else constant_curve(curve) for curve in curves))


def constant_curve(value: torch.Tensor) -> Callable:
    return lambda t: value


def parts_01_7(ref: types.ModuleType, xt, eps, t, abar):
    on_xt, on_x0, _ = ref.samplers.posterior(table(ref, abar), t, t - 1, xt)
    a, sigma = table(ref, abar).at(t, xt)
    return on_xt * xt + on_x0 * (xt - sigma * eps) / a


def guided_eps(ref: types.ModuleType, eps, grad, t, s, abar):
    a, sigma = table(ref, abar).at(t, eps)
    guided = ref.guidance.classifier_guidance(
        constant(-sigma * eps / a), lambda x, t: (x * grad).reshape(len(x), -1).sum(1), s, table(ref, abar)
    )
    return -a * guided(0 * eps, t) / sigma


def by_ddim(ref: types.ModuleType, model, y, steps, shape, abar, gen):
    times = torch.linspace(len(abar) - 1, 0, steps + 1).round()
    x, mode = torch.randn(len(y), *shape, generator=gen), model.training

    def denoiser(x, t):
        a, sigma = table(ref, abar).at(t, x)
        return (x - sigma * model(x, t.long(), y)) / a

    model.eval()
    with torch.no_grad():
        for t, s in pairwise(times):
            x = ref.samplers.ddim_step(table(ref, abar))(denoiser, x, t.expand(len(x)), s.expand(len(x)))
    model.train(mode)
    return x


def solve_ode(step: Callable, f: Callable, x: torch.Tensor, ts: torch.Tensor) -> torch.Tensor:
    for t, s in pairwise(ts):
        x = step(f, x, t.expand(len(x)), s.expand(len(x)))
    return x


def euler_by_ddim(ref: types.ModuleType, f, x, ts):
    path = ref.schedules.Schedule(lambda t: t, torch.ones_like, torch.ones_like, torch.zeros_like)
    return solve_ode(ref.samplers.ddim_step(path), f, x, ts)


def euler(ref: types.ModuleType, f, x, ts):
    path = ref.schedules.Schedule(torch.zeros_like, torch.ones_like, torch.ones_like, torch.zeros_like)
    return solve_ode(ref.samplers.euler_step(path), f, x, ts)


def convert(ref: types.ModuleType, pred, src, dst, x, *curves):
    src, dst = ("flow" if kind == "u" else kind for kind in (src, dst))
    return ref.predictions.convert(src, dst, pred, x, torch.zeros(len(x)), constants(ref, *curves))


def encode(ref: types.ModuleType, captions, vocab, length):
    words = [word for word in vocab if word not in ("<pad>", "<null>")]
    known = ref.text.Vocabulary(words)
    ids, mask = known.encode(captions, length)
    return torch.tensor([vocab[token] for token in known.tokens])[ids], mask


def heads(ref: types.ModuleType, x, heads):
    return ref.layers.Attention(x.shape[-1], heads)._split(x)


def merge(ref: types.ModuleType, x):
    return ref.layers.Attention(x.shape[1] * x.shape[3], x.shape[1])._merge(x)


def attn_cost(ref: types.ModuleType, n, tokens, dim, heads, context_dim, bytes_per):
    core = ref.cost.attention_cost(n, tokens, dim, heads, bytes_per)
    layer = ref.cost.attention_layer_cost(n, tokens, dim, heads, bytes_per, context_dim=context_dim)
    return dict(core=core.macs, proj=layer.macs - core.macs, flops=layer.flops, matrix_bytes=core.score_bytes)


def build_control(ref: types.ModuleType, base, channels, hint_channels):
    copy, like = deepcopy(base).requires_grad_(), next(base.parameters())
    base.requires_grad_(False)
    return copy, *(ref.controlnet.ZeroConv(n, channels).to(like) for n in (hint_channels, channels))


def with_strength(ref: types.ModuleType, base, control, strength):
    def network(xt, t, y, hint):
        return ref.controlnet.controlled(
            lambda xt, t, residuals, y: base(xt, t, y, residuals),
            lambda xt, t, hint, y: control(xt, t, y, hint),
            hint,
            strength,
        )(xt, t, y=y)

    return network


def dit_cfg(guided: Callable, out, channels, scale):
    c, u = out[:, :channels].chunk(2)
    eps = guided(constant(c), constant(u), scale)(c, torch.zeros(len(c)))
    return torch.cat([torch.cat([eps, eps]), out[:, channels:]], dim=1)


def ledger(ref: types.ModuleType, encoder, network, decoder, steps, scale):
    passes = 1 if scale in (0, 1) else 2
    run = ref.cost.sampling_cost(ref.cost.Cost(network), steps, passes).flops
    return dict(encoder=0, network=run, decoder=2 * decoder, total=run + 2 * decoder)


def negative(ref: types.ModuleType, p, n, u, s, form):
    if form == "two-pass":
        return ref.guidance.cfg(constant(p), constant(n), s)(p, None)
    if form == "perp":
        return ref.guidance.perp_neg(constant(p), constant(n), constant(u), s, 1.0)(p, None)
    return ref.guidance.negative(constant(p), constant(n), constant(u), s)(p, None) + u - u


def class_accuracy(ref: types.ModuleType, judge, images, y):
    mode = judge.training
    judge.eval()
    with torch.no_grad():
        reader = SimpleNamespace(classify=lambda images: judge(images).argmax(1))
        found = ref.metrics.class_accuracy(reader, images, y)
    judge.train(mode)
    return found.value, found.low, found.high


def measured(ref: types.ModuleType, z):
    """The scale of an autoencoder whose latents these are."""
    blank = SimpleNamespace(posterior=lambda images: (images, None), scale=torch.ones((), dtype=z.dtype))
    return ref.autoencoder.Autoencoder.measure_scale(blank, z)


def schedule_test(ref: types.ModuleType, q_sample):
    gen = Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, generator=gen, dtype=torch.float64)
    abar, t = torch.linspace(1, 0.1, 10, dtype=torch.float64), torch.tensor([1, 9, 4, 6, 2])
    due, before = ref.schedules.add_noise(x0, eps, t, table(ref, abar)), x0.clone()
    assert torch.allclose(q_sample(x0, t, eps, abar), due) and torch.equal(x0, before)


def p_of(number: str) -> tuple:
    return find(number).references


# By exercise: functions of the package and the arguments asked for. None: the reference, for what has no counterpart.
ANSWERS: list[tuple[str, str, tuple[Callable | None, ...]]] = [
    (
        "00.1",
        "log_prob",
        (
            lambda ref, x, w, mu, S: ref.mixture.GaussianMixture(w, mu, S, torch.zeros(len(w)).long()).log_prob(
                x, torch.zeros(len(x)), ref.schedules.cosine()
            ),
        ),
    ),
    (
        "00.3",
        "sample",
        (lambda ref, w, mu, S, n, gen: ref.mixture.GaussianMixture(w, mu, S, torch.arange(len(w))).sample(n, gen),),
    ),
    ("00.4", "energy_distance", (lambda ref, x, y: ref.metrics.energy_distance(x, y),)),
    ("00.5", "add_noise", (schedule_test,)),
    (
        "01.1",
        "ddpm_alpha_bar",
        (
            lambda ref, T, kind: (
                torch.cat(
                    [
                        torch.ones(1).double(),
                        ref.schedules.ddpm_alpha_bar(torch.linspace(1e-4, 0.02, T, dtype=torch.float64)),
                    ]
                )
                if kind == "linear"
                else p_of("01.1")[0](T, kind)
            ),
        ),
    ),
    ("01.2", "add_noise", (lambda ref, x0, t, eps, abar: ref.schedules.add_noise(x0, eps, t, table(ref, abar)),)),
    (
        "01.3",
        "convert",
        (
            None,
            lambda ref, eps, t, abar: ref.predictions.convert("eps", "score", eps, eps, t, table(ref, abar)),
        ),
    ),
    (
        "01.3",
        "basis",
        (None, lambda ref, eps, t, abar: ref.predictions.basis("score", t, eps, table(ref, abar))[1] * eps),
    ),
    (
        "01.4",
        "solve",
        (
            lambda ref, xt, eps, t, abar: ref.predictions.solve("eps", eps, xt, t, table(ref, abar))[0],
            lambda ref, xt, x0, t, abar: ref.predictions.solve("x0", x0, xt, t, table(ref, abar))[1],
            lambda ref, x0, eps, t, abar: ref.predictions.target("v", x0, eps, t, table(ref, abar)),
        ),
    ),
    (
        "01.5",
        "posterior_mean",
        (
            lambda ref, x, x0s, t, abar: (
                (
                    x
                    - abar[t].sqrt()
                    * world_of(ref, x0s).posterior_mean(x[None], torch.tensor([t]), table(ref, abar))[0]
                )
                / (1 - abar[t]).sqrt()
            ),
        ),
    ),
    (
        "01.5",
        "GridDensity",
        (
            lambda ref, x, x0s, t, abar: eps_of_score(
                ref.mixture.GridDensity(x0s, torch.ones(len(x0s)).to(x0s), x0s[0]).score(
                    x[None], torch.tensor([t]), table(ref, abar)
                ),
                t,
                abar,
            ),
        ),
    ),
    ("01.7", "posterior", (parts_01_7, None)),
    (
        "01.8",
        "ddim_step",
        (
            lambda ref, xt, eps, t, s, abar: ref.samplers.ddim_step(table(ref, abar))(
                lambda x, t: (x - table(ref, abar).at(t, x)[1] * eps) / table(ref, abar).at(t, x)[0], xt, t, s
            ),
        ),
    ),
    ("02.1", "time_embedding", (lambda ref, t, d: ref.layers.time_embedding(t, d),)),
    (
        "02.2",
        "modulate",
        (lambda ref, h, e: ref.dit_blocks.modulate(h, *e[:, :, None, None].chunk(2, dim=1)[::-1]),),
    ),
    ("02.3", "drop", (lambda ref, y, p, null, gen: ref.train.drop(y, null, p, gen),)),
    ("02.6", "ddim_step", (by_ddim,)),
    ("02.7", "class_accuracy", (class_accuracy,)),
    (
        "03.3",
        "log_prob_of",
        (
            lambda ref, clf, x, t, y: torch.func.grad(lambda x: ref.classifier.log_prob_of(clf, y)(x, t).sum())(
                x
            ).detach(),
        ),
    ),
    ("03.4", "classifier_guidance", (guided_eps,)),
    ("04.1", "cfg", (lambda ref, c, u, s: ref.guidance.cfg(constant(c), constant(u), s)(c, None),)),
    (
        "04.1",
        "perp_neg",
        (lambda ref, c, u, s: ref.guidance.perp_neg(constant(c), constant(u), constant(u), s, 0.0)(c, None),),
    ),
    (
        "04.4",
        "tilted_gaussian",
        (
            lambda ref, vc, vu, s, kind: (
                ref.mixture.tilted_gaussian(
                    *(
                        ref.mixture.GaussianMixture(
                            torch.ones(1),
                            torch.zeros(1, 1).double(),
                            torch.full((1, 1, 1), float(v)).double(),
                            torch.zeros(1),
                        )
                        for v in (vc, vu)
                    ),
                    s,
                ).covs.item()
                if kind == "tilt"
                else p_of("04.4")[0](vc, vu, s, kind)
            ),
        ),
    ),
    (
        "04.6",
        "interval",
        (
            lambda ref, noise, s, low, high: ref.guidance.interval(
                constant(s * torch.ones_like(noise)), constant(torch.ones_like(noise)), low, high
            )(noise, noise),
            None,
        ),
    ),
    (
        "04.7",
        "rescale",
        (lambda ref, guided, cond, phi: ref.guidance.rescale(constant(guided), constant(cond), phi)(cond, None), None),
    ),
    (
        "04.8",
        "apg",
        (lambda ref, c, u, s, eta=0.0, r=float("inf"): ref.guidance.apg(constant(c), constant(u), s, eta, r)(c, None),),
    ),
    ("04.9", "negative", (negative,)),
    (
        "05.1",
        "add_noise",
        (
            lambda ref, x0, eps, t: (
                ref.schedules.add_noise(x0, eps, t, ref.schedules.flow()),
                ref.predictions.target("flow", x0, eps, t, ref.schedules.flow()),
            ),
        ),
    ),
    ("05.2", "convert", (convert,)),
    (
        "05.3",
        "convert",
        (
            lambda ref, *curves: convert(
                ref, torch.ones_like(curves[0]), "score", "u", torch.zeros_like(curves[0]), *curves
            ),
            None,
        ),
    ),
    *(
        ("05.3", name, (None, lambda ref, u, c, w, rule=rule: rule(ref, c, u, w)(c, torch.zeros(len(c)))))
        for name, rule in {
            "cfg": lambda ref, c, u, w: ref.guidance.cfg(constant(c), constant(u), w),
            "negative": lambda ref, c, u, w: ref.guidance.negative(constant(c), constant(u), constant(u), w),
            "perp_neg": lambda ref, c, u, w: ref.guidance.perp_neg(constant(c), constant(u), constant(u), w, 0.0),
            "apg": lambda ref, c, u, w: ref.guidance.apg(constant(c), constant(u), w, 1.0),
        }.items()
    ),
    ("05.4", "euler_step", (euler, None)),
    ("05.4", "ddim_step", (euler_by_ddim, None)),
    ("06.1", "Vocabulary", (encode,)),
    ("06.3", "Attention", (heads, merge)),
    ("06.4", "attention_cost", (attn_cost,)),
    ("07.2", "ZeroConv", (build_control,)),
    ("07.4", "outlines", (lambda ref, x: ref.scenes.outlines(x), None)),
    ("07.6", "controlled", (None, None, with_strength)),
    (
        "08.1",
        "patchify",
        (
            lambda ref, x, patch: ref.dit.patchify(x, patch),
            lambda ref, tokens, patch, h, w: ref.dit.unpatchify(tokens, patch, h, w),
        ),
    ),
    ("08.2", "position_embedding", (lambda ref, *sizes: ref.layers.position_embedding(*sizes),)),
    *(
        ("08.7", name, (lambda ref, *args, rule=rule: dit_cfg(rule(ref), *args),))
        for name, rule in {
            "cfg": lambda ref: ref.guidance.cfg,
            "negative": lambda ref: lambda c, u, s: ref.guidance.negative(c, u, u, s),
            "perp_neg": lambda ref: lambda c, u, s: ref.guidance.perp_neg(c, u, u, s, 0.0),
            "apg": lambda ref: lambda c, u, s: ref.guidance.apg(c, u, s, 1.0),
        }.items()
    ),
    ("09.1", "kl_per_image", (lambda ref, mu, logvar: ref.autoencoder.kl_per_image(mu, logvar),)),
    ("09.2", "draw", (lambda ref, mu, logvar, gen: ref.autoencoder.draw(mu, logvar, gen),)),
    (
        "09.3",
        "error_per_image",
        (
            lambda ref, x, rec, mu, logvar, beta: (
                ref.autoencoder.error_per_image(x, rec) + beta * ref.autoencoder.kl_per_image(mu, logvar)
            ).mean(),
        ),
    ),
    ("09.4", "measure_affine", (lambda ref, z: ref.data.measure_affine(z).scale, None, None)),
    ("09.4", "measure_scale", (measured, None, None)),
    ("09.6", "sampling_cost", (ledger,)),
    (
        "09.7",
        "kl_per_image",
        (
            lambda ref, x, rec, mu, logvar: (
                float(ref.autoencoder.kl_per_image(mu, logvar).mean()) / 0.6931471805599453,
                float(ref.autoencoder.error_per_image(x, rec).mean() / x[0].numel()),
            ),
        ),
    ),
]


def bound(ref: types.ModuleType, id: str, answers: tuple) -> tuple[Callable, ...]:
    """Answers that use this package. Not functools.partial, which has no name."""
    filled = zip(answers, find(id).references, strict=True)
    return tuple(theirs if ours is None else lambda *args, f=ours: f(ref, *args) for ours, theirs in filled)


@pytest.mark.parametrize(("id", "by", "answers"), ANSWERS, ids=[f"{id}-{by}" for id, by, _ in ANSWERS])
def test_what_answers_with_the_package_is_forbidden_in_the_view(
    id: str, by: str, answers: tuple, whole: types.ModuleType, seen: Callable
):
    assert fault(find(id), bound(whole, id, answers)) == ""
    assert MARKER in fault(find(id), bound(seen(id[:2]), id, answers))


def bayes(ref: types.ModuleType, x, y, s, a, sigma, weights, means, covs, labels):
    world = ref.mixture.GaussianMixture(weights, means, covs, labels)
    path, t = constants(ref, a * torch.ones(1), sigma * torch.ones(1), *[torch.zeros(1)] * 2), torch.zeros(1)
    score, score_of_class = (world.score(x[None], t, path, label)[0] for label in (None, y))
    grad = score_of_class - score
    return world.class_log_prob(x[None], t, path, y).exp()[0], grad, -sigma * (score + s * grad)


def empirical(ref: types.ModuleType, x, x0s, t, abar):
    return eps_of_score(world_of(ref, x0s).score(x[None], torch.tensor([t]), table(ref, abar)), t, abar)


@pytest.mark.parametrize(("id", "answers"), [("01.5", (empirical,)), ("03.1", (bayes,))])
def test_what_provided_cells_need_stays_though_it_can_be_made_an_answer(id: str, answers: tuple, seen: Callable):
    """The exact world is what these lessons draw and measure against: its score, and its class posterior in lesson 03.

    Where this fails because a lesson no longer needs them, hide them.
    """
    assert fault(find(id), bound(seen(id[:2]), id, answers)) == ""


# --- what stands in the place of an answer ---------------------------------------------------------------------------


def lines_of(*nodes: ast.AST) -> Counter[str]:
    return Counter(line.strip() for node in nodes for line in ast.unparse(node).splitlines() if len(line.strip()) > 25)


def source_of(name: str, trees: dict[str, ast.Module]) -> list[ast.stmt]:
    """The code behind a hidden name, with its docstring, without its signature."""
    module, *parts = name.split(".")
    body = trees[module].body
    for part in parts:
        node = next((node for node in body if getattr(node, "name", None) == part), None)
        body = node.body if node else []
    return body


@pytest.mark.parametrize("number", lessons())
def test_no_file_of_the_view_holds_a_line_of_what_is_hidden(number: str, view: Callable):
    trees = {path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py")}
    everything = lines_of(*trees.values())
    hidden = {name: lines_of(*source_of(name, trees)) for name in hidden_by(number)}
    files = [path for path in view(number).rglob("*.py") if "libraries" not in path.parts]
    left = lines_of(*(ast.parse(path.read_text()) for path in files))
    together = sum(hidden.values(), Counter())
    for name, lines in hidden.items():
        telling = {line for line in lines if together[line] == everything[line]}  # it stands nowhere else
        assert telling or "AdaLNZeroBlock" in name, name
        assert not telling & set(left), name


def test_a_hidden_thing_can_be_imported_and_mentioned_and_nothing_else(seen: Callable):
    cfg, world = seen("04").guidance.cfg, seen("00").mixture.archipelago()
    forbidden = seen("04").forbidden.ForbiddenWhileGrading
    said = f"condiff_ref.guidance.cfg {MARKER}: exercise 04.1 asks you to write it"
    assert issubclass(forbidden, RuntimeError) and repr(cfg) == f"condiff_ref.guidance.cfg {MARKER}"
    uses = [cfg, lambda: cfg(1, 2, 3.0), lambda: cfg.formula, lambda: setattr(cfg, "x", 1), lambda: cfg[0]]
    uses += [lambda: list(cfg), lambda: isinstance(1, cfg), lambda: types.new_class("Mine", (cfg,))]
    for use in uses:
        with pytest.raises(forbidden, match=said):
            use()
    with pytest.raises(RuntimeError, match="GaussianMixture.log_prob is not available while grading: exercise 00.1"):
        world.log_prob(torch.zeros(1, 2), torch.zeros(1), None)
    assert isinstance(world.sample, object) and (cfg | None) is cfg and not hasattr(cfg, "__wrapped__")
    for look in (inspect.getsource, inspect.getfile, lambda thing: thing.__code__):
        with pytest.raises((TypeError, AttributeError, RuntimeError)):
            look(cfg)
    assert "x_u" not in str(inspect.getmembers_static(cfg))


def test_what_uses_a_hidden_thing_fails_alike(seen: Callable):
    model = SimpleNamespace(denoiser=lambda *label: None, recipe=None, schedule=None, affine=None)
    with pytest.raises(RuntimeError, match="guidance.cfg is not available"):
        seen("04").generate.Guidance("cfg", 2.0).denoiser(model, torch.zeros(1))
    with pytest.raises(RuntimeError, match="text.Vocabulary is not available"):
        seen("06").recipes.VOCABULARY.encode([""], 1)


def test_names_lead_to_where_they_are_defined_and_helpers_go_with_what_they_help():
    texts = {
        "a": '"""Formulas."""\nimport math\n\ndef _half(x):\n    return x / 2\n\ndef _both(x):\n    return x\n\n'
        "def mean(x):\n    return _half(_both(x))\n\ndef other(x):\n    return _both(x)\n",
        "b": "from .a import mean\n\n"
        "TABLE = {'mean': mean, 'late': lambda x: mean(x)}\nDONE = mean(1)\nMORE = [DONE + 1]\n",
        "c": "KEPT = 1  # as it was\n",
    }
    after = redact(texts, {"b.mean": "01.1"})
    assert "/ 2" not in after["a"] and "_half(_both" not in after["a"] and "def _both" in after["a"]
    assert ast.get_docstring(ast.parse(after["a"])) == "Formulas."
    assert "TABLE = {" in after["b"] and "DONE = _Hidden('condiff_ref.a.mean', '01.1')" in after["b"]
    assert "MORE = _Hidden" in after["b"] and after["c"] == texts["c"]
    for missing in ("b.median", "d.mean"):
        with pytest.raises(KeyError, match="condiff_ref has no"):
            redact(texts, {missing: "01.1"})


def test_the_stub_of_the_checks_hands_back_what_it_is_given(view: Callable, capsys: pytest.CaptureFixture):
    assert [path.name for path in (view("04") / "condiff_check").iterdir()] == ["__init__.py"]
    stub: dict = {}
    exec((view("04") / "condiff_check" / "__init__.py").read_text(), stub)
    f, g = abs, len
    assert stub["check"]("04.1", f, hint=3) is f and stub["check"]("01.4", f, g, seed=1) == (f, g)
    assert stub["reveal"](2, 3, " %", close=1) is None and capsys.readouterr().out == ""
    for name in condiff_check.__all__:
        real = inspect.signature(getattr(condiff_check, name)).parameters.values()
        ours = inspect.signature(stub[name]).parameters.values()
        assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in real]


def test_a_view_is_written_into_a_folder_of_its_own_for_everybody_to_read(view: Callable, tmp_path: Path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(FileExistsError):
        build_view("04", tmp_path)
    with pytest.raises(KeyError):
        build_view("99", tmp_path / "new")
    inside = [path for path in view("04").rglob("*") if not path.is_symlink() and "__pycache__" not in path.parts]
    assert all(path.stat().st_mode & 0o004 and not path.stat().st_mode & 0o022 for path in inside)
    assert all(path.stat().st_nlink == 1 for path in inside if path.is_file())  # a write reaches no file of ours


# --- in an interpreter of its own ------------------------------------------------------------------------------------

LOOK = """
import importlib.util, json, sys
from pathlib import Path
import torch, numpy, matplotlib, IPython, sklearn.svm, scipy, safetensors.torch, jaxtyping, tqdm, ipywidgets
import condiff_agent, condiff_check, condiff_ref.checkpoints
torch.nn.functional.conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2))
condiff_ref.checkpoints.find("digits-unet").read_bytes()
here = Path(sys.path[0])
print(json.dumps({
    "path": sys.path,
    "course": [m.__file__ for n, m in list(sys.modules.items()) if "condiff" in n],
    "checks": [n for n in ("exercise", "lesson04", "agent") if importlib.util.find_spec("condiff_check." + n)],
    "strange": [n for n in sys.modules if n.startswith("__editable__") or n == "sitecustomize"],
    "visible": [str(p) for d in sys.path[1:] if Path(d).is_dir() for p in Path(d).iterdir() if "condiff" in p.name],
    "args": sys.argv[1:],
}))
"""


def run(view: Path, module: str, *args: str, cwd: Path) -> str:
    command = [*python_command(view), module, *args]
    env = {"PATH": os.environ["PATH"], "HOME": str(cwd), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    env |= {"CONDIFF_BUDGET": "smoke", "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_interpreter_finds_the_view_and_the_libraries_and_no_other_part_of_the_course(tmp_path: Path):
    view = build_view("04", tmp_path / "view")
    (view / "look.py").write_text(LOOK)
    found = json.loads(run(view, "look", "one", "--two", cwd=tmp_path))
    assert found["path"] == python_path(view)
    assert found["args"] == ["one", "--two"]
    assert found["course"] and all(Path(file).is_relative_to(view) for file in found["course"])
    assert found["checks"] == [] and found["strange"] == [] and found["visible"] == []


CELLS = """
import io, json, sys
from contextlib import redirect_stdout
from IPython.core.interactiveshell import InteractiveShell

shell, failed = InteractiveShell.instance(), []
with redirect_stdout(io.StringIO()):
    for number, source in json.load(open(sys.argv[1])):
        ran = shell.run_cell(source, silent=True)
        error = ran.error_before_exec or ran.error_in_exec
        if error:
            failed.append(f"cell {number}: {type(error).__name__}: {error}")
print(json.dumps(failed))
"""


def graded_cells(path: Path) -> list[tuple[int, str]]:
    cells = nbformat.read(path, 4).cells
    graded = [cell.cell_type == "code" and "skip-grading" not in cell.metadata.get("tags", ()) for cell in cells]
    return [(i, cell.source) for i, (cell, run) in enumerate(zip(cells, graded, strict=True)) if run]


@pytest.mark.parametrize("number", [n if n == "06" else pytest.param(n, marks=pytest.mark.slow) for n in lessons()])
def test_the_cells_of_the_solution_run_in_the_view(number: str, tmp_path: Path):
    view = build_view(number, tmp_path / "view")
    (view / "cells.py").write_text(CELLS)
    (tmp_path / "cells.json").write_text(json.dumps(graded_cells(SOLUTIONS[number])))
    assert json.loads(run(view, "cells", str(tmp_path / "cells.json"), cwd=tmp_path).splitlines()[-1]) == []
