"""What the benchmarks share: rows that are kept as they come, timings side by side, and tables in markdown."""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
from scipy.stats import t as student

from condiff_ref import checkpoints
from condiff_ref.data import Affine
from condiff_ref.intervals import Interval
from condiff_ref.recipes import Recipe
from condiff_ref.schedules import draw_noise


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


def step_times(recipes: Sequence[Recipe], rounds: int = 15) -> list[float]:
    """Seconds per training step of each recipe's network, forward and backward: medians of turns taken side by side, so
    that whatever else this machine does slows all of them alike."""
    tries = []
    for recipe in recipes:
        network, shape = recipe.build().train(), checkpoints.Checkpoint(recipe.build(), recipe, Affine(0, 1), {}).shape
        generator = torch.Generator().manual_seed(0)
        x0 = draw_noise(torch.empty(recipe.batch_size, *shape), generator)
        label = torch.zeros(recipe.batch_size, dtype=torch.long)
        tries.append((recipe, network, x0, label, generator, []))
    for turn in range(rounds + 3):
        for recipe, network, x0, label, generator, seconds in tries:
            began = time.perf_counter()
            recipe.loss(network, x0, label, generator).backward()
            if turn >= 3:  # the first turns warm up
                seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds) for *_, seconds in tries]


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def write(script: str, title: str, about: str, *parts: str) -> None:
    """SCRIPT.md beside the script: title, how it was measured, and the parts. Prints it too."""
    command = f"`python benchmarks/{Path(script).name}`, {date.today()}, {checkpoints.machine()}; {about}\n"
    text = "\n".join([f"# {title}\n", command, *parts])
    Path(script).with_suffix(".md").write_text(text)
    print(text)
