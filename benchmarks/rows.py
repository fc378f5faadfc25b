"""What the benchmarks share: rows that are kept as they come, timings side by side, and tables in markdown."""

import hashlib
import json
import re
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from pathlib import Path

import torch
from scipy.stats import t as student

from condiff_ref import checkpoints
from condiff_ref.checkpoints import Checkpoint
from condiff_ref.data import Affine
from condiff_ref.intervals import Interval
from condiff_ref.recipes import Recipe
from condiff_ref.train import fit


class Kept:
    """Measured rows in a JSON file: a run that was cut off goes on, and a finished one is written out again at once.

    A key must say all that a row depends on.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, key: str, measure: Callable[[], dict]) -> dict:
        if key not in self.rows:
            self.rows[key] = measure()
            self.path.parent.mkdir(exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.rows))
            partial.replace(self.path)  # in one move: a kill leaves the old file or the new
        return self.rows[key]


def fingerprint(*names: str) -> str:
    """Of shipped checkpoints, for a key."""
    return hashlib.sha256("".join(map(checkpoints.fingerprint, names)).encode()).hexdigest()[:12]


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean and Student's 95 % interval. Raises statistics.StatisticsError for a single value."""
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return Interval(mean, mean - half, mean + half)


def untrained(recipe: Recipe) -> Checkpoint:
    """Its network as it begins, for pictures that are scaled already."""
    return Checkpoint(recipe.build(), recipe, Affine(0, 1), {})


def step_times(
    models: Sequence[Checkpoint],
    options: Sequence[dict] | None = None,
    around: Sequence[Callable[[], AbstractContextManager]] | None = None,
    *,
    rounds: int = 5,
    steps: int = 10,
) -> list[float]:
    """Seconds per training step of each untrained model, the whole loop: medians of turns taken side by side, so that
    whatever else this machine does slows all of them alike. `options` of the loop, one dictionary per model, and what
    it runs in `around`."""
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 1):
        for model, more, context, taken in zip(
            models, options or [{}] * len(models), around or [nullcontext] * len(models), seconds, strict=True
        ):
            recipe = model.recipe
            x0 = torch.randn(2 * recipe.batch_size, *model.shape, generator=torch.Generator().manual_seed(0))
            label = torch.zeros(len(x0), dtype=torch.long)
            settings = dict(batch_size=recipe.batch_size, progress=False) | more
            with context():
                result = fit(model.network, recipe.loss, x0, label, steps=steps, **settings)
            if turn:  # the first warms up
                taken.append(result.seconds / steps)
    return [statistics.median(taken) for taken in seconds]


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def write(script: str, title: str, about: str, *parts: str) -> None:
    """SCRIPT.md beside the script: its title, and a section for this machine, saying how it was measured. Sections of
    other machines stay as they are: delete those that no longer hold. Prints its own too."""
    path = Path(script).with_suffix(".md")
    heading = f"## {checkpoints.hardware()}\n"
    command = f"`python benchmarks/{path.with_suffix('.py').name}`, {date.today()}, {checkpoints.machine()}; {about}\n"
    section = "\n".join([heading, command, *parts])
    _, *sections = re.split("^(?=## )", path.read_text() if path.exists() else "", flags=re.MULTILINE)
    others = [other.strip() + "\n" for other in sections if not other.startswith(heading)]
    path.write_text("\n".join([f"# {title}\n", section, *others]))
    print(section)
