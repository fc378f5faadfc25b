"""What changes between a file of the repository and its page: links, badges, and the words for a picture."""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath

from docutils import nodes
from sphinx.application import Sphinx

LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
BADGE = re.compile(r"\[!\[Open in Colab\]\([^()]*\)\]\(([^()]*)\)")
SETUP = re.compile(r'("tags": \[\s*"setup")')  # in a notebook
ANCHOR = re.compile(r'^<a id="(e\d+)"></a>$', re.M)
ERRATUM = re.compile(r"\]\((?:errata\.md)?#(e\d+)\)")
PICTURES = (".png", ".svg")
LONGEST = 240  # characters of an alternative text


def links(app: Sphinx, docname: str, content: list[str]) -> None:
    """A link to a page stays; one to any other file of the repository leads to it on GitHub.

    The set-up cell, the same in every lesson, is folded.
    """
    text = BADGE.sub(r"[Open in Colab](\1)", content[0])
    text = SETUP.sub(r'\1, "hide-input"', text)
    text = ANCHOR.sub(r"(\1)=", text)
    text = ERRATUM.sub(r"](#\1)", text)
    home = PurePosixPath(docname).parent
    content[0] = LINK.sub(lambda found: f"[{found[1]}]({address(app, home, found[2])})", text)


def address(app: Sphinx, home: PurePosixPath, link: str) -> str:
    """Where a link on a page in the folder `home` leads."""
    path, mark, fragment = link.partition("#")
    if not path or "://" in link or path.startswith("mailto:"):
        return link
    target = normpath(str(home / path))
    page = re.sub(r"^solutions/", "notebooks/", target) if app.tags.has("instructors") else target
    name = page.rsplit(".", 1)[0]
    if name in app.env.found_docs and str(app.env.doc2path(name, base=False)) == page:
        up = "../" * len(home.parts)
        return f"{up}{page}{mark}{fragment}"
    if target.endswith(PICTURES) or not (Path(app.config.root) / target).exists():
        return link  # a picture on the page; else Sphinx says that the link leads nowhere
    kind = "tree" if (Path(app.config.root) / target).is_dir() else "blob"
    return f"{app.config.repository}/{kind}/main/{target}{mark}{fragment}"


def alt_texts(app: Sphinx, doctree: nodes.document) -> None:
    """A figure that a cell drew has no words of its own; the lesson's next sentence says what is to be seen in it."""
    waiting, heading = [], ""
    for node in doctree.findall():
        if isinstance(node, nodes.title):
            heading = node.astext()
        elif isinstance(node, nodes.image) and "alt" not in node:
            waiting.append((node, heading))
        elif waiting and isinstance(node, nodes.paragraph) and not _in_output(node):
            for image, title in waiting:
                image["alt"] = short(f"Figure in “{title}”. {node.astext()}")
            waiting = []
    for image, title in waiting:
        image["alt"] = f"Figure in “{title}”"


def formulas(app: Sphinx, doctree: nodes.document) -> None:
    """Sphinx puts a formula that has line breaks into an environment of its own, in which TeX allows no number: one
    that brings its environment goes to MathJax as it is."""
    for node in list(doctree.findall(nodes.math_block)):
        text = node.astext().strip()
        if r"\\" in text and r"\begin{" in text and not node.get("no-wrap", node.get("nowrap")):
            node["no-wrap"] = node["nowrap"] = True
            node.clear()
            node += nodes.Text(rf"\[{text}\]")


def _in_output(node: nodes.Node) -> bool:
    while node is not None:
        if isinstance(node, nodes.container) and "cell_output" in node.get("classes", []):
            return True
        node = node.parent
    return False


def short(text: str) -> str:
    """The first sentences, as many as fit."""
    text = " ".join(text.split())
    if len(text) <= LONGEST:
        return text
    cut = text[:LONGEST]
    end = max(cut.rfind(". "), cut.rfind(": "), cut.rfind("; "))
    return cut[: end + 1] if end > LONGEST // 2 else cut[: cut.rfind(" ")] + " …"
