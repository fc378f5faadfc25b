"""The view: the packages that a submission's code can import while it is graded, without an answer to its exercises."""

import ast
import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from .. import agent
from ..registry import lesson as exercises_of

MARKER = "is not available while grading"  # in the message of every ForbiddenWhileGrading
TERMINAL = ("cli", "demo", "doctor")  # modules of condiff_ref that no notebook needs
NEEDED = ("torch", "numpy", "matplotlib", "IPython", "sklearn", "safetensors", "jaxtyping", "tqdm", "ipywidgets")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

FORBIDDEN = f'''"""What stands where an answer stood."""


class ForbiddenWhileGrading(RuntimeError):
    """The submission asked the reference package for what its exercise asks for."""


class Hidden:
    """It can be imported and mentioned; whatever is done with it raises."""

    __slots__ = ("__name__", "__exercise__")

    def __init__(self, name, exercise):
        object.__setattr__(self, "__name__", name)
        object.__setattr__(self, "__exercise__", exercise)

    def __call__(self, *args, **kwargs):
        raise ForbiddenWhileGrading(f"{{self!r}}: exercise {{self.__exercise__}} asks you to write it")

    def __getattr__(self, name):
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # as inspect, copy and isinstance expect
        self()

    def __repr__(self):
        return f"{{self.__name__}} {MARKER}"

    def __or__(self, other):
        return self  # in annotations

    __ror__ = __or__
    __setattr__ = __getitem__ = __iter__ = __len__ = __enter__ = __call__
    __mro_entries__ = __instancecheck__ = __subclasscheck__ = __call__
'''

STUB = '''"""While grading there is nothing to check here: the answers are judged elsewhere."""

__all__ = ["check", "reveal"]


def check(id, *objects, hint=1, seed=None):
    """The objects, as they are."""
    return objects[0] if len(objects) == 1 else objects


def reveal(guess, measured, unit="", *, close=0.0):
    """Nothing."""
'''

# The command line of a clean interpreter: no site, hence no .pth file and no finder of an editable install.
START = """
import runpy, site, sys
sys.path[:] = {path!r}
site.setquit()
site.sethelper()
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


class Asked(NamedTuple):
    """Why something is hidden: its full name, and the exercise that asks for it."""

    name: str
    exercise: str


class Part(NamedTuple):
    """A statement of a module or of a class in it: its name, that of the class, and the words in it."""

    name: str
    inside: str
    private: bool
    words: frozenset[str]


Hidden = dict[str, Asked]  # by "module.name" or "module.Class.method"
Imports = Mapping[str, Mapping[str, str]]  # by module, its own name for "module.name"


def build_view(lesson: str, folder: Path) -> Path:
    """Write what a submission for this lesson can import into `folder`, new or empty, and return it.

    condiff_agent; a condiff_check that hands back what it is given; condiff_ref less all that the lesson's exercises
    hide; beside it the shipped checkpoints; and `libraries`, links to the installed packages but for the course's own.
    Everybody may read it. Raises KeyError for a lesson without exercises and FileExistsError for a folder in use.
    """
    hidden = hidden_by(lesson)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(Path(agent.__file__).parent, folder / "condiff_agent", ignore=shutil.ignore_patterns("__pycache__"))
    package = _reference()
    texts = {path.stem: path.read_text(encoding="utf-8") for path in package.glob("*.py") if path.stem not in TERMINAL}
    _write(folder / "condiff_ref", redact(texts, hidden) | {"forbidden": FORBIDDEN})
    _write(folder / "condiff_check", {"__init__": STUB})
    shipped = [*package.glob("shipped/*.safetensors"), *package.parent.glob("data/checkpoints/*.safetensors")]
    for file in shipped:  # the first in an installed course, the second in a checkout
        target = folder / "data" / "checkpoints" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)  # a link could be written through, by a child that runs as root
    (folder / "libraries").mkdir()
    for package in libraries():
        (folder / "libraries" / package.name).symlink_to(package)
    _let_everybody_read(folder)
    return folder


def hidden_by(lesson: str) -> dict[str, str]:
    """What the exercises of a lesson hide, with the first exercise that does. Raises KeyError for another lesson."""
    hidden: dict[str, str] = {}
    for exercise in exercises_of(lesson):
        for name in exercise.hides:
            hidden.setdefault(name, exercise.id)
    return hidden


def redact(texts: Mapping[str, str], hidden: Mapping[str, str]) -> dict[str, str]:
    """The modules of a package without the source of what is hidden; a module that holds none of it stays as it is.

    Also gone: what a module makes of a hidden thing while it is imported, and private helpers that nothing else needs.
    Raises KeyError for a name that the package does not have.
    """
    trees = {module: ast.parse(text) for module, text in texts.items()}
    imports = {module: _imported(tree) for module, tree in trees.items()}
    parts = list(_parts(trees))
    asked: Hidden = {}
    for alias, exercise in hidden.items():
        name = _defined(alias, trees, imports)
        asked.setdefault(name, Asked(f"condiff_ref.{name}", exercise))
    found = asked
    while found:
        found = {**_made_of(trees, imports, asked), **_left_over(parts, asked)}
        asked |= found
    changed = {name.partition(".")[0] for name in asked}
    return {m: _rewritten(m, trees[m], asked) if m in changed else text for m, text in texts.items()}


def _defined(name: str, trees: Mapping[str, ast.Module], imports: Imports) -> str:
    """The name under which the package defines what "module.name" may have imported from elsewhere in it."""
    module, first, *rest = name.split(".")
    if module not in trees:
        raise KeyError(f"condiff_ref has no module {module}")
    if imports[module].get(first, "").partition(".")[0] in trees:
        return _defined(".".join((imports[module][first], *rest)), trees, imports)
    body = trees[module].body
    for part in (first, *rest):
        found = next((node for node in body if part in _names(node)), None)
        if found is None:
            raise KeyError(f"condiff_ref has no {name}")
        body = found.body if isinstance(found, ast.ClassDef) else []
    return name


def _imported(tree: ast.Module) -> dict[str, str]:
    """Names that a module imports from its own package, as "module.name" or, for a module, "module"."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("condiff_ref")):
            module = (node.module or "").removeprefix("condiff_ref").removeprefix(".")
            for alias in node.names:
                found[alias.asname or alias.name] = f"{module}.{alias.name}" if module else alias.name
    return found


def _names(node: ast.stmt) -> tuple[str, ...]:
    """What a statement defines."""
    if isinstance(node, Definition):
        return (node.name,)
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return tuple(part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))


def _made_of(trees: Mapping[str, ast.Module], imports: Imports, asked: Hidden) -> Hidden:
    """What modules make of hidden things while they are imported: it would raise there, and is hidden too."""
    found: Hidden = {}
    for module, tree in trees.items():
        known = {name: asked[full] for name, full in imports[module].items() if full in asked}
        known |= {full.partition(".")[2]: why for full, why in asked.items() if full.partition(".")[0] == module}
        for node in tree.body if known else ():
            used = next((known[name] for name in _evaluated(node) if name in known), None)
            if used:
                found |= {f"{module}.{name}": used for name in _names(node) if f"{module}.{name}" not in asked}
    return found


def _evaluated(node: ast.AST) -> Iterator[str]:
    """Names with which a module's statement does more than mention them, in the order in which they stand."""
    if isinstance(node, ast.ClassDef):
        yield from (base.id for base in node.bases if isinstance(base, ast.Name))
    elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        yield from _worked_on(node.value)


def _worked_on(value: ast.expr) -> Iterator[str]:
    """Names in an expression, but for those that it only collects and those that wait in a lambda."""
    if isinstance(value, ast.Name | ast.Lambda):
        return
    parts = value.values if isinstance(value, ast.Dict) else getattr(value, "elts", None)
    if parts is not None:
        for part in parts:
            yield from _worked_on(part)
        return
    yield from (node.id for node in ast.walk(value) if isinstance(node, ast.Name))


def _left_over(parts: list[Part], asked: Hidden) -> Hidden:
    """Private functions and methods that hidden code uses and no other."""
    kept: set[str] = set()
    gone: Hidden = {}
    for part in parts:
        why = asked.get(part.name) or asked.get(part.inside)
        if why:
            gone |= dict.fromkeys(part.words, why)
        else:
            kept |= part.words
    helpers = [part for part in parts if part.private and part.name not in asked and part.inside not in asked]
    found = {part.name: part.name.rpartition(".")[2] for part in helpers}
    return {name: gone[short] for name, short in found.items() if short in gone and short not in kept}


def _parts(trees: Mapping[str, ast.Module]) -> Iterator[Part]:
    for module, tree in trees.items():
        for node in tree.body:
            name = ".".join((module, *_names(node)[:1]))
            yield _part(name, "", node)
            if isinstance(node, ast.ClassDef):
                yield from (_part(".".join((name, *_names(inner)[:1])), name, inner) for inner in node.body)


def _part(name: str, inside: str, node: ast.stmt) -> Part:
    short = name.rpartition(".")[2]
    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    head = [*node.bases, *node.keywords, *node.decorator_list] if isinstance(node, ast.ClassDef) else [node]
    words = frozenset(word for part in head for word in _words(part)) - {short}  # its own: it may call itself
    return Part(name, inside, function and short.startswith("_") and not short.startswith("__"), words)


def _words(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.alias):
            yield part.name


def _rewritten(module: str, tree: ast.Module, asked: Hidden) -> str:
    """The module's source with a Hidden in the place of each hidden thing."""
    body = _replaced(module, tree.body, asked)
    start = next((i for i, node in enumerate(body) if isinstance(node, ast.Import | ast.ImportFrom)), 0)
    body.insert(start, ast.parse("from .forbidden import Hidden as _Hidden").body[0])
    return ast.unparse(ast.Module(body, [])) + "\n"


def _replaced(prefix: str, body: list[ast.stmt], asked: Hidden) -> list[ast.stmt]:
    after: list[ast.stmt] = []
    for node in body:
        names = [name for name in _names(node) if f"{prefix}.{name}" in asked]
        after += (_stand_in(name, asked[f"{prefix}.{name}"]) for name in names)
        if isinstance(node, ast.ClassDef):
            node = copy.copy(node)
            node.body = _replaced(f"{prefix}.{node.name}", node.body, asked)
        if not names:
            after.append(node)
    return after


def _stand_in(name: str, why: Asked) -> ast.stmt:
    return ast.parse(f"{name} = _Hidden({why.name!r}, {why.exercise!r})").body[0]


def _reference() -> Path:
    return Path(find_spec("condiff_ref").origin).parent


def _write(folder: Path, modules: Mapping[str, str]) -> None:
    folder.mkdir()
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")


def _let_everybody_read(folder: Path) -> None:
    """Whatever the umask says: the child may run as another user."""
    folder.chmod(0o755)
    for root, folders, files in os.walk(folder):
        for name, mode in (*((name, 0o755) for name in folders), *((name, 0o644) for name in files)):
            path = Path(root, name)
            if not path.is_symlink():
                path.chmod(mode)


# --- the interpreter -------------------------------------------------------------------------------------------------


@cache
def libraries() -> tuple[Path, ...]:
    """The installed packages and modules that a child may read: all but those of the course, and no .pth file."""
    found: dict[str, Path] = {}
    for folder in _site_folders():
        for path in sorted(folder.iterdir()):
            if path.suffix != ".pth" and path.name != "__pycache__" and "condiff" not in path.name:
                found.setdefault(path.name, path)
    return tuple(found.values())


def _site_folders() -> list[Path]:
    """Where packages are installed, and wherever else what the child needs comes from."""
    folders = [Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    specs = [find_spec(name) for name in NEEDED]
    folders += [Path(spec.origin).parents[1] for spec in specs if spec and spec.origin]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


@cache
def _standard_library() -> tuple[str, ...]:
    """sys.path of an interpreter that has read neither its environment nor site-packages."""
    code = "import sys; print(*sys.path, sep='\\n')"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, capture_output=True, text=True)
    return tuple(done.stdout.splitlines())


def python_path(view: Path) -> list[str]:
    """sys.path of the child: the view, the standard library, the installed packages; nothing that leads to the course.

    `view` is the folder as the child sees it: a sandbox may mount it elsewhere than where it was built.
    """
    return [str(view), *_standard_library(), str(view / "libraries")]


def python_command(view: Path) -> list[str]:
    """The start of a command line: followed by a module's name and arguments, it runs that module with this path."""
    return [sys.executable, "-I", "-S", "-B", "-c", START.format(path=python_path(view))]
