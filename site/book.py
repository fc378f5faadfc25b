"""Build the site, for learners and for instructors, from what the repository has. Nothing is run or downloaded.

python site/book.py                     both editions, into outputs/site/learners and outputs/site/instructors
python site/book.py learners -o FOLDER  one edition

Both have the lessons, the results, the errata, the reference; the instructors' has the solutions in place of the
learners' notebooks, and the guide to grading.
"""

import argparse
import re
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "site"
EDITIONS = {"learners": "notebooks", "instructors": "solutions"}
PAGES = ("docs/*.md", "benchmarks/*.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md", "README.md")
PICTURES = ("docs/*.png", "benchmarks/*.png")
FOR_INSTRUCTORS = ("docs/grading.md",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("editions", nargs="*", metavar="EDITION", help=f"{' or '.join(EDITIONS)}; both by default")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "outputs" / "site", help="default: outputs/site")
    chosen = parser.parse_args()
    if unknown := set(chosen.editions) - set(EDITIONS):
        parser.error(f"no edition {', '.join(sorted(unknown))}; there are {', '.join(EDITIONS)}")
    for edition in chosen.editions or EDITIONS:
        began = time.perf_counter()
        failed = build(edition, chosen.out)
        if failed:
            return failed
        pages = len(list((chosen.out / edition).rglob("*.html")))
        print(f"{chosen.out / edition}/index.html: {pages} pages in {time.perf_counter() - began:.0f} s")
    return 0


def build(edition: str, out: Path) -> int:
    """Gather and build one edition; Sphinx's exit status. Warnings are errors."""
    try:
        from sphinx.cmd.build import main as sphinx
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed. What the site is built with comes with: pip install -e '.[site]'")

    sources, cache = out / "sources" / edition, out / "cache" / edition
    gather(edition, sources)
    tags = ["-t", "instructors"] if edition == "instructors" else []
    folders = [str(sources), str(out / edition)]
    shutil.rmtree(out / edition, ignore_errors=True)
    status = sphinx(
        ["-q", "-E", "-W", "--keep-going", "-b", "html", "-c", str(SITE), "-d", str(cache), *tags, *folders]
    )
    for left in (out / "sources", out / "cache", out / "jupyter_execute"):
        shutil.rmtree(left, ignore_errors=True)
    return status


def gather(edition: str, folder: Path) -> None:
    """All sources of one edition, in one folder, each where the links of the others expect it."""
    shutil.rmtree(folder, ignore_errors=True)
    for file in files(edition):
        name = file.relative_to(ROOT)
        target = folder / ("notebooks" if file.suffix == ".ipynb" else name.parent) / name.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    for page in SITE.glob("*.md"):
        text = spliced(page.read_text(encoding="utf-8"), (ROOT / "README.md").read_text(encoding="utf-8"))
        (folder / page.name).write_text(for_edition(text, edition), encoding="utf-8")
    sys.path.insert(0, str(SITE))
    import reference

    reference.write(folder / "api")


def files(edition: str) -> list[Path]:
    """The files of the repository that are pages or pictures of this edition."""
    patterns = [*PAGES, *PICTURES, f"{EDITIONS[edition]}/*.ipynb"]
    found = [file for pattern in patterns for file in sorted(ROOT.glob(pattern))]
    skipped = () if edition == "instructors" else FOR_INSTRUCTORS
    return [file for file in found if file.relative_to(ROOT).as_posix() not in skipped]


def spliced(page: str, readme: str) -> str:
    """`<!-- README: from A to B -->` becomes the README between lines that begin so: numbers stand in one place."""

    def part(found: re.Match) -> str:
        lines = readme.splitlines()
        start, end = (next(i for i, line in enumerate(lines) if line.startswith(begins)) for begins in found.groups())
        return "\n".join(lines[max(start, 1) : end]).strip()  # without the title

    return re.sub(r"<!-- README: from (.*?) to (.*?) -->", part, page)


def for_edition(page: str, edition: str) -> str:
    """Lines between `<!-- instructors -->` and `<!-- /instructors -->` are for that edition, and so for learners."""
    for other in EDITIONS:
        keep = r"\1" if other == edition else ""
        page = re.sub(rf"<!-- {other} -->\n(.*?)<!-- /{other} -->\n", keep, page, flags=re.S)
    return page


if __name__ == "__main__":
    sys.exit(main())
