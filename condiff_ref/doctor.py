"""One screen that says what a stuck learner's machine has, what is wrong with it, and what to type."""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from . import data
from .checkpoints import load as load_checkpoint
from .files import INSTALLED, SHIPPED, CheckpointError
from .train import uses_bf16

PAIRS = {"2.11": "0.26", "2.12": "0.27", "2.13": "0.28"}  # torch and the torchvision that was built with it


@dataclass(frozen=True)
class Finding:
    """One line of the screen. `level` is ok, note (works, but) or broken; `fix` is what to type."""

    what: str
    level: str
    found: str
    fix: str = ""


def examine(root: str | None = None) -> Iterator[Finding]:
    """Look at everything that the course needs, one finding at a time; never raises for what it finds."""
    yield _python()
    yield _torch()
    yield _device()
    yield load()
    yield _torchvision()
    yield _digits()
    yield _mnist(root)
    yield _checkpoints()
    yield _jupyter()
    yield _disk()


def screen(findings: list[Finding]) -> Table:
    """The findings as a table; signs as well as colours tell the levels apart."""
    signs = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[red bold]broken[/]"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        table.add_row(finding.what, signs[finding.level], finding.found)
        if finding.fix:
            table.add_row("", "", f"[bold]{finding.fix}[/]")
    return table


def _python() -> Finding:
    found = f"{platform.python_version()} in {sys.prefix}"
    if not (3, 11) <= sys.version_info < (3, 14):
        fix = "the course needs Python 3.11, 3.12 or 3.13: rm -rf .venv && make setup PY=python3.12"
        return Finding("python", "broken", found, fix)
    return Finding("python", "ok", found)


def _torch() -> Finding:
    version = torch.__version__
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < (2, 11):
        return Finding("torch", "broken", version, "the course needs torch 2.11 or newer: rm -rf .venv && make setup")
    return Finding("torch", "ok", f"{version}, {torch.get_num_threads()} threads")


def _device() -> Finding:
    if torch.cuda.is_available():
        bf16 = "bf16" if uses_bf16("auto", "cuda") else "fp32, no bf16"
        return Finding("device", "ok", f"GPU {torch.cuda.get_device_name()}, {bf16}: use it with --device cuda")
    kind = "with AMX: bf16" if uses_bf16("auto", "cpu") else "without AMX: fp32"
    found = f"CPU {kind}, {os.cpu_count()} cores; no GPU, and none is needed"
    if shutil.which("nvidia-smi"):
        fix = "an NVIDIA driver is here, but this torch cannot use it: rm -rf .venv && make setup (the default build)"
        return Finding("device", "note", found, fix)
    return Finding("device", "ok", found)


def load() -> Finding:
    """Whether other work keeps the cores busy, which makes several threads slower than one."""
    wanting, cores = os.getloadavg()[0], os.cpu_count() or 1
    found = f"{wanting:.1f} processes want {cores} cores"
    if wanting > cores / 2 and torch.get_num_threads() > 1:
        # two threads beside one busy process: 179 images/s of recipe mnist-unet, one thread: 570, both alone: 966
        fix = "if that goes on, one thread is several times faster than more: export OMP_NUM_THREADS=1"
        return Finding("load", "note", f"the machine is busy: {found}", fix)
    return Finding("load", "ok", found)


def _torchvision() -> Finding:
    try:
        import torchvision
    except Exception as error:  # beside another build of torch it raises RuntimeError or OSError, not ImportError
        pair = PAIRS.get(".".join(torch.__version__.split(".")[:2]))
        absent = isinstance(error, ModuleNotFoundError)
        found = "not installed" if absent else f"cannot be imported: {' '.join(str(error).split())[:70]}"
        fix = "only needed to download MNIST: make setup"
        if pair:
            fix += f", or install the torchvision {pair} that was built with this torch"
        return Finding("torchvision", "note", found, fix)
    return Finding("torchvision", "ok", torchvision.__version__)


def _digits() -> Finding:
    try:
        images, _ = data.digits("train")
    except Exception as error:
        fix = "scikit-learn brings them: rm -rf .venv && make setup"
        return Finding("digits", "broken", f"cannot be read: {error}", fix)
    return Finding("digits", "ok", f"{len(images)} to train on, embedded: no download")


def _mnist(root: str | None) -> Finding:
    try:
        data.mnist("train", root, download=False)
        data.mnist("test", root, download=False)
    except (data.DataError, ValueError) as error:
        fix = "condiff train mnist-unet downloads it; or set CONDIFF_MNIST to a folder with MNIST/raw"
        return Finding("MNIST", "note", str(error), fix)
    return Finding("MNIST", "ok", f"in {root or os.environ.get('CONDIFF_MNIST') or 'data'}, checksums right")


def _checkpoints() -> Finding:
    paths = sorted(SHIPPED.glob("*.safetensors"))
    for path in paths:
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            return Finding("checkpoints", "broken", str(error), _restore(path))
    if not paths:
        return Finding("checkpoints", "broken", f"none in {SHIPPED}", _restore(SHIPPED))
    return Finding("checkpoints", "ok", ", ".join(path.stem for path in paths))


def _restore(path: Path) -> str:
    if INSTALLED.is_dir():
        return "install the same version again: pip install --force-reinstall --no-deps, and its wheel"
    return f"git checkout -- {path.relative_to(SHIPPED.parents[1])}"


def _jupyter() -> Finding:
    if importlib.util.find_spec("jupyterlab") is None and "google.colab" not in sys.modules:
        return Finding("jupyterlab", "note", "not installed", "make setup")
    return Finding("jupyterlab", "ok", "installed")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    writable = os.access(Path.cwd(), os.W_OK)
    found = f"{free:.1f} GB free in {Path.cwd()}" + ("" if writable else ", which you may not write to")
    if not writable:
        return Finding("disk", "broken", found, "work in a folder of your own, or give --out a path there")
    if free < 1:
        return Finding("disk", "note", found, "runs and checkpoints need some 100 MB, MNIST 70 MB: make room")
    return Finding("disk", "ok", found)
