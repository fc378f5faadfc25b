"""The shape of the package, read from its source: who imports whom, one vocabulary, and where randomness comes from."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from condiff_check.registry import lesson

PACKAGE = Path(__file__).parents[1] / "condiff_ref"
TREES = {path.stem: ast.parse(path.read_text()) for path in sorted(PACKAGE.glob("*.py"))}

# module: the modules it stands on; it may import these and whatever they stand on. A new module must be entered here.
CORE = {
    "__init__": (),
    "shapes": (),
    "schedules": ("shapes",),
    "predictions": ("schedules",),
    "denoisers": ("predictions",),
    "mixture": ("denoisers",),
    "guidance": ("denoisers",),
    "samplers": ("denoisers",),
    "layers": ("shapes",),
    "unet": ("layers",),
    "controlnet": ("unet",),
    "dit_blocks": ("layers",),
    "dit": ("dit_blocks", "layers"),
    "text": ("layers",),
    "classifier": ("layers", "schedules"),
    "autoencoder": ("layers", "schedules"),
    "files": (),
    "data": ("shapes",),
    "scenes": ("data",),
    "train": ("predictions", "data", "files"),
}
# These put the others together: they may import the core and one another, without a circle.
TOP = {
    "adherence",
    "checkpoints",
    "cli",
    "cost",
    "demo",
    "doctor",
    "frontier",
    "generate",
    "intervals",
    "judge",
    "league",
    "metrics",
    "museum",
    "pictures",
    "recipes",
    "viz",
    "widgets",
}

# Other code bases' words for what is called x0, eps, xt, t, sigma, scale, label, denoiser here.
# fmt: off
SYNONYMS = {
    "x_start", "x_0", "x_t", "xT", "x_noisy", "noisy_images", "img", "imgs", "noise_pred", "pred_noise",
    "predicted_noise", "model_output", "model_pred", "pred_x0", "pred_xstart", "pred_original_sample", "x_recon",
    "temb", "t_emb", "timestep", "timesteps", "num_timesteps", "num_inference_steps", "cfg_scale", "guidance_scale",
    "guidance_weight", "guidance_strength", "cond_scale", "alphas_cumprod", "alpha_cumprod", "alpha_prod", "alphas_bar",
    "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "class_labels", "class_label", "y_cond", "cond_fn",
    "uncond_emb", "prediction_type", "param_type", "parameterization",
}
# fmt: on

HEAVY = {"sklearn", "torchvision", "matplotlib", "scipy", "diffusers", "typer", "rich"}
DRAWS = {"rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal", "poisson"}
DRAWS |= {"rand_like", "randn_like", "randint_like", "normal_", "uniform_", "bernoulli_", "random_", "exponential_"}


def below(module: str) -> set[str]:
    """Everything that the module stands on."""
    parents = set(CORE[module])
    return parents.union(*(below(parent) for parent in parents))


def imports(tree: ast.Module) -> Iterator[str]:
    """Full names of all that is imported, also inside functions; the package's own as condiff_ref.module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = ("condiff_ref." if node.level else "") + (node.module or "")
            if origin.rstrip(".") == "condiff_ref":
                yield from (f"condiff_ref.{name.name}" for name in node.names)
            else:
                yield origin


def siblings(module: str) -> set[str]:
    return {name.split(".")[1] for name in imports(TREES[module]) if name.startswith("condiff_ref.")}


def dotted(node: ast.expr) -> str:
    """torch.random.fork_rng for such an expression; "" where it is not made of names alone."""
    if isinstance(node, ast.Attribute):
        origin = dotted(node.value)
        return f"{origin}.{node.attr}" if origin else ""
    return node.id if isinstance(node, ast.Name) else ""


def calls(node: ast.AST, forked: bool = False) -> Iterator[tuple[ast.Call, bool]]:
    """All calls, and whether each stands in a `with torch.random.fork_rng(...)` block."""
    if isinstance(node, ast.Call):
        yield node, forked
    if isinstance(node, ast.With):
        heads = (item.context_expr for item in node.items)
        forked = forked or any(isinstance(h, ast.Call) and dotted(h.func) == "torch.random.fork_rng" for h in heads)
    for child in ast.iter_child_nodes(node):
        yield from calls(child, forked)


def identifiers(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        for field in ("id", "arg", "attr", "name", "asname"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield name


@pytest.fixture(params=TREES)
def module(request: pytest.FixtureRequest) -> str:
    return request.param


# --- imports ---------------------------------------------------------------------------------------------------------


def test_every_module_is_in_the_table(module: str):
    assert module in CORE or module in TOP, f"enter {module}.py in CORE or TOP, with what it stands on"


def test_nothing_imports_upward(module: str):
    allowed = below(module) if module in CORE else (set(CORE) | TOP) - {module}
    assert siblings(module) <= allowed


def test_nothing_imports_in_a_circle():
    TopologicalSorter({module: siblings(module) for module in TREES}).prepare()  # raises CycleError
    TopologicalSorter(CORE).prepare()


def test_guidance_samplers_and_networks_know_nothing_of_one_another():
    networks = {"unet", "dit", "controlnet", "classifier", "text", "autoencoder", "layers"}
    for group in ({"guidance"}, {"samplers"}, networks):
        others = {"guidance", "samplers", *networks} - group
        for member in group & set(TREES):
            assert not siblings(member) & others
            assert not below(member) & others


def test_the_package_imports_nothing_else_of_ours(module: str):
    ours = {path.stem for path in PACKAGE.parent.iterdir()} - {"condiff_ref"}
    assert not {name.split(".")[0] for name in imports(TREES[module])} & (ours | {"condiff_check"})


def test_importing_the_core_imports_nothing_heavy():
    modules = ", ".join(f"condiff_ref.{module}" for module in CORE if module in TREES)
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert not {name.split(".")[0] for name in loaded.stdout.split()} & HEAVY


# --- words -----------------------------------------------------------------------------------------------------------


def test_one_vocabulary(module: str):
    assert not set(identifiers(TREES[module])) & SYNONYMS


def test_no_module_is_a_drawer_for_everything():
    drawers = {"utils", "util", "misc", "helpers", "common", "tools"}
    assert not {module for module in TREES if module in drawers or len(module) == 1}


def test_everything_public_is_documented(module: str):
    if module != "__init__":
        assert ast.get_docstring(TREES[module])
    parts = [node for node in TREES[module].body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not [node.name for node in parts if not node.name.startswith("_") and not ast.get_docstring(node)]


def test_no_base_class_has_a_single_child():
    classes = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    bases = [dotted(base) for node in classes for base in node.bases]
    children = Counter(base.split(".")[-1] for base in bases if not base.startswith("nn."))  # torch's may share a name
    assert not [node.name for node in classes if children[node.name] == 1]


# --- randomness ------------------------------------------------------------------------------------------------------


def test_no_global_seeding_but_in_a_fork(module: str):
    seeds = {"seed", "manual_seed", "manual_seed_all", "set_rng_state", "seed_everything"}
    origins = {"torch", "numpy", "np", "random"}
    for call, forked in calls(TREES[module]):
        origin, _, name = dotted(call.func).rpartition(".")
        if name in seeds and origin.split(".")[0] in origins:
            assert forked, f"line {call.lineno} seeds for everyone"


def test_no_torch_setting_changes_on_import(module: str):
    on_import = [node for node in TREES[module].body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in on_import:
        for call, _ in calls(node):
            assert not dotted(call.func).startswith(("torch.set_", "torch.use_", "torch.backends."))
        if isinstance(node, ast.Assign):
            assert not any(dotted(target).startswith("torch.") for target in node.targets)


def test_every_draw_takes_a_generator(module: str):
    for call, forked in calls(TREES[module]):
        drawn = dotted(call.func).startswith("torch.") or isinstance(call.func, ast.Attribute)
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if drawn and name in DRAWS and not forked:
            assert "generator" in {keyword.arg for keyword in call.keywords}, f"line {call.lineno}"


# --- the checks ------------------------------------------------------------------------------------------------------

CHECKS = PACKAGE.parent / "condiff_check"


def test_the_checks_import_the_reference_and_nothing_else_of_ours():
    ours = {path.stem for path in PACKAGE.parent.iterdir()} - {"condiff_ref", "condiff_check"}
    for path in CHECKS.glob("*.py"):
        found = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
        assert not found & (ours | {"lessons", "tools"}), path.name


def test_every_module_of_the_checks_and_everything_public_in_the_engine_is_documented():
    for path in CHECKS.glob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path.name
        parts = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        bare = [node.name for node in parts if not node.name.startswith("_") and not ast.get_docstring(node)]
        assert path.name.startswith("lesson") or not bare, (path.name, bare)


def test_lessons_import_nothing_that_their_exercises_hide():
    """Provided cells must run while grading, where what an exercise hides is not to be had."""
    for path in (PACKAGE.parent / "lessons").glob("*.py"):
        number = path.stem[:2]
        hidden = {name for exercise in lesson(number) for name in exercise.hides}
        cells = re.split(r"^# %%", path.read_text(), flags=re.M)
        graded = [cell for cell in cells if "skip-grading" not in cell.partition("\n")[0]]
        tree = ast.parse("\n".join(cell.partition("\n")[2] for cell in graded))
        found = {name.removeprefix("condiff_ref.") for name in imports_of_names(tree)}
        assert not found & hidden, path.name


def imports_of_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)
