"""The two faces of a reference answer: its source for the solution, its signature and docstring for the student."""

import ast
import inspect
import textwrap
import tokenize
from collections.abc import Callable, Sequence

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
KEPT = ("property", "classmethod", "staticmethod")
BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def answer(references: Sequence[Callable]) -> str:
    """The definitions as they were written, comments and decorators included.

    Raises TypeError for a reference that is no `def` and no `class` in a file.
    """
    return "\n\n\n".join(_source(reference) for reference in references)


def stub(references: Sequence[Callable]) -> str:
    """What the student starts from: signatures and docstrings, each body `raise NotImplementedError`."""
    return "\n\n\n".join(_stub_of(_source(reference)) for reference in references)


def _source(reference: Callable) -> str:
    name = getattr(reference, "__name__", repr(reference))
    try:
        text = textwrap.dedent(inspect.getsource(inspect.unwrap(reference)))
        (node,) = ast.parse(text).body
    except (OSError, TypeError, SyntaxError, ValueError) as error:
        raise TypeError(f"{name} has no source of its own: {error}") from error
    if not isinstance(node, (*FUNCTION, ast.ClassDef)) or node.name != name:  # a lambda has its whole line for a source
        raise TypeError(f"{name} is neither a function nor a class with a definition")
    return text.rstrip()


def _stub_of(source: str) -> str:
    (node,) = ast.parse(source).body
    return "\n".join(_stub_lines(source, node))


def _stub_lines(source: str, node: ast.AST) -> list[str]:
    head = _signature(source, node) + _docstring(source, node)
    indent = " " * (node.col_offset + 4)
    if isinstance(node, FUNCTION):
        return [*head, f"{indent}raise NotImplementedError"]
    methods = [_method(source, child) for child in node.body if isinstance(child, FUNCTION)]
    if not methods:
        return [*head, f"{indent}..."]
    first, *others = methods
    gap = [""] if ast.get_docstring(node) else []
    return head + gap + first + [line for method in others for line in ["", *method]]


def _method(source: str, node: ast.AST) -> list[str]:
    """A method keeps what says how it is called; other decorators, such as no_grad, are part of the answer."""
    kept = [d for d in node.decorator_list if isinstance(d, ast.Name) and d.id in KEPT]
    lines = source.splitlines()
    return [lines[d.lineno - 1] for d in kept] + _stub_lines(source, node)


def _signature(source: str, node: ast.AST) -> list[str]:
    """The lines up to the colon that ends the signature, as they were broken by hand, and nothing after that colon."""
    lines = source.splitlines()[node.lineno - 1 :]
    depth = 0
    for token in tokenize.generate_tokens(iter([line + "\n" for line in lines]).__next__):
        if token.type == tokenize.OP:
            depth += BRACKETS.get(token.string, 0)
            if token.string == ":" and depth == 0:
                row, column = token.end
                return [*lines[: row - 1], lines[row - 1][:column]]
    raise AssertionError("Python has parsed it, so the signature has an end")


def _docstring(source: str, node: ast.AST) -> list[str]:
    if ast.get_docstring(node, clean=False) is None:
        return []
    return (" " * (node.col_offset + 4) + ast.get_source_segment(source, node.body[0])).splitlines()
