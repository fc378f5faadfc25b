"""The reference's pages: which modules, in which order, and how docstrings and signatures are shown.

Docstrings here are plain sentences with formulas in them, not reStructuredText, and signatures read best as they are
written. So both are taken from the source, and only names of types become links.
"""

import ast
import importlib
import inspect
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

MODULES = {
    "The formulas": ["schedules", "predictions", "denoisers", "mixture", "guidance", "samplers", "shapes"],
    "Networks": ["layers", "unet", "controlnet", "dit", "dit_blocks", "text", "classifier", "autoencoder"],
    "Data and training": ["data", "scenes", "train", "recipes", "checkpoints", "files"],
    "Measuring": ["metrics", "judge", "adherence", "intervals", "cost"],
    "The frontier, lesson 10": ["frontier", "league", "museum"],
    "Pictures and commands": ["viz", "widgets", "pictures", "generate", "demo", "doctor", "cli"],
}
CHECKS = {
    "condiff_check": ["check", "reveal"],
    "condiff_check.exercise": ["Exercise", "Fact", "Mistake", "Answer", "Wrong", "need"],
    "condiff_check.xray": ["Formula"],
    "condiff_check.registry": ["lessons", "lesson", "exercises", "find"],
}
COMMANDS = {"condiff": "condiff_ref.cli", "condiff-grade": "condiff_check.cli"}

# --- pages ------------------------------------------------------------------------------------------------------------


def write(folder: Path) -> None:
    """All pages of the reference, as reStructuredText, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [heading("Reference", "=")]
    parts.append(
        "The package ``condiff_ref``, to be read beside the lessons. Names and shapes are the same everywhere: "
        ":doc:`shapes <condiff_ref.shapes>` has the types that the signatures use. Time runs from 0, the data, "
        "to 1, the noise.\n"
    )
    for title, names in MODULES.items():
        parts.append(heading(title, "-"))
        parts.append(".. list-table::\n   :widths: 25 75\n")
        for name in names:
            parts.append(f"   * - :doc:`condiff_ref.{name}`\n     - {escaped(summary('condiff_ref.' + name))}")
            (folder / f"condiff_ref.{name}.rst").write_text(module_page(f"condiff_ref.{name}"), encoding="utf-8")
        parts.append("")
    parts.append(heading("Checks", "-"))
    parts.append(".. list-table::\n   :widths: 25 75\n")
    parts.append(f"   * - :doc:`condiff_check`\n     - {escaped(summary('condiff_check'))}")
    parts.append(
        "   * - :doc:`commands`\n     - The two commands, ``condiff`` and ``condiff-grade``, and their options.\n"
    )
    pages = [f"condiff_ref.{name}" for names in MODULES.values() for name in names] + ["condiff_check", "commands"]
    parts.append(".. toctree::\n   :hidden:\n\n" + "".join(f"   {page}\n" for page in pages))
    (folder / "index.rst").write_text("\n".join(parts), encoding="utf-8")
    (folder / "condiff_check.rst").write_text(checks_page(), encoding="utf-8")
    (folder / "commands.rst").write_text(commands_page(), encoding="utf-8")


def heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"


def summary(name: str) -> str:
    """The first paragraph of a module's docstring."""
    return (inspect.getdoc(importlib.import_module(name)) or "").split("\n\n")[0]


def module_page(name: str) -> str:
    short = name.rpartition(".")[2]
    lines = [heading(short, "="), f".. automodule:: {name}\n"]
    if name == "condiff_ref.cli":
        return "\n".join(lines) + "\nThe commands and their options: :doc:`commands`.\n"
    for constant, value, comment in constants(name):
        lines.append(f".. py:data:: {constant}\n   :value: {value}\n\n   {escaped(comment)}\n")
    for member in members(name):
        lines.append(f".. auto{kind(member)}:: {member.__name__}")
        lines.append("   :members:\n   :special-members: __call__\n" if kind(member) == "class" else "")
    return "\n".join(lines)


def members(name: str) -> list:
    """The public functions and classes that a module defines, as they stand in its source."""
    module = importlib.import_module(name)
    tree = ast.parse(inspect.getsource(module))
    names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    return [getattr(module, n) for n in names if inspect.getdoc(getattr(module, n))]


def kind(thing: object) -> str:
    """Which of Sphinx's directives shows it."""
    if not inspect.isclass(thing):
        return "function"
    return "exception" if issubclass(thing, BaseException) else "class"


@cache
def constants(name: str) -> list[tuple[str, str, str]]:
    """A module's public names for types and numbers, with the comment that stands behind them."""
    source, found = inspect.getsource(importlib.import_module(name)), []
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        line = source.splitlines()[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
        value, comment = ast.unparse(node.value), line.partition("#")[2].strip()
        if comment and len(value) <= 90 and not node.targets[0].id.startswith("_"):
            found.append((node.targets[0].id, value, comment))
    return found


def checks_page() -> str:
    lines = [heading("condiff_check", "="), ".. automodule:: condiff_check\n   :no-index:\n"]
    for module, names in CHECKS.items():
        lines += [heading(module, "-"), f".. py:currentmodule:: {module}\n"]
        for name in names:
            found = kind(getattr(importlib.import_module(module), name))
            lines.append(f".. auto{found}:: {module}.{name}\n" + ("   :members:\n" if found == "class" else ""))
    return "\n".join(lines)


def commands_page() -> str:
    """What the commands say of themselves when asked with --help."""
    import typer

    lines = [heading("Commands", "=")]
    for program, module in COMMANDS.items():
        command = typer.main.get_command(importlib.import_module(module).app)
        lines += [heading(program, "-"), *command_help(command, program)]
        for name, sub in getattr(command, "commands", {}).items():
            if not sub.hidden:
                lines += [heading(f"{program} {name}", "~"), *command_help(sub, f"{program} {name}")]
    return "\n".join(lines)


def command_help(command, program: str) -> list[str]:
    """A command's docstring, and a list of its arguments and options."""
    lines = [escaped(part) + "\n" for part in inspect.cleandoc(command.help or "").split("\n\n")]
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        option = parameter.param_type_name == "option"
        label = ", ".join([*parameter.opts, *parameter.secondary_opts]) if option else parameter.name.upper()
        default = parameter.default
        plain = default is None or default is False or default == () or callable(default) or default is ...
        shown = "" if plain or not option else f" Default: {getattr(default, 'value', default)}."
        lines.append(
            f"``{label}``\n   {escaped(getattr(parameter, 'help', None) or '')}{escaped(shown)}".rstrip() + "\n"
        )
    return lines


# --- docstrings -------------------------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    """Plain text as reStructuredText: code between backticks stays code, all other signs stand for themselves."""
    pieces = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(f"`{p}`" if p.startswith("`") and len(p) > 2 else _plain(p) for p in pieces)


def _plain(text: str) -> str:
    return re.sub(r"([\\*`|_<>:])", r"\\\1", text)


def paragraphs(app, what, name, thing, options, lines: list[str]) -> None:
    """A docstring's paragraphs; not those that a class inherits or Python writes itself."""
    text = "\n".join(lines)
    if what == "class" and text.startswith(f"{name.rpartition('.')[2]}("):  # written by dataclass
        text = ""
    lines[:] = [line for part in text.split("\n\n") for line in (escaped(part), "")]


# --- signatures -------------------------------------------------------------------------------------------------------


def signature(app, what, name, thing, options, found, returns):
    """The signature as it is written in the source, with the full names of our own types, which become links."""
    if what not in ("function", "method", "class"):
        return None
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    module = sys.modules[inspect.unwrap(thing).__module__]
    if isinstance(node, ast.ClassDef):
        return class_signature(node, module)
    static = any(getattr(d, "id", "") == "staticmethod" for d in node.decorator_list)
    args = node.args
    if what == "method" and not static:
        args = without_first(args)
    return f"({ast.unparse(Full(module).visit(args))})", annotation(node.returns, module)


def class_signature(node: ast.ClassDef, module):
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            return f"({ast.unparse(Full(module).visit(without_first(method.args)))})", None
    if not any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        return "", None
    fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and not f.target.id.startswith("_")]
    shown = []
    for field in fields:
        default = "" if field.value is None else f" = {ast.unparse(field.value)}"
        shown.append(f"{field.target.id}: {annotation(field.annotation, module)}{default}")
    return f"({', '.join(shown)})", None


def without_first(args: ast.arguments) -> ast.arguments:
    (args.posonlyargs or args.args).pop(0)
    return args


def annotation(node: ast.expr | None, module) -> str | None:
    return None if node is None else ast.unparse(Full(module).annotation(node))


class Full(ast.NodeTransformer):
    """Names in annotations become full ones where the package defines them."""

    def __init__(self, module):
        self.module = module

    def visit_arg(self, node: ast.arg) -> ast.arg:
        if node.annotation is not None:
            node.annotation = self.annotation(node.annotation)
        return node

    def annotation(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a type that is defined further down
            node = ast.parse(node.value, mode="eval").body
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name):
                inner.id = self.full(inner.id)
        return node

    def full(self, name: str) -> str:
        thing = getattr(self.module, name, None)
        home = getattr(thing, "__module__", "")
        if inspect.isclass(thing) and home.startswith("condiff_") and getattr(thing, "__name__", "") == name:
            return f"{home}.{name}"
        for place in ("condiff_ref.shapes", self.module.__name__, "condiff_ref.schedules", "condiff_ref.text"):
            if place in sys.modules and any(name == constant for constant, *_ in constants(place)):
                return f"{place}.{name}"
        return name
