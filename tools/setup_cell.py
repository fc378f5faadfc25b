"""What is the same in every notebook: the badge with the measured minutes under the title, the set-up cell, and for
students the cell that hands in."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]

# Google Colab has the other dependencies (tests/colab-pins.txt). jaxtyping needs wadler-lindig, and nothing else.
NOT_ON_COLAB = ("jaxtyping", "wadler-lindig")

SETUP = f'''\
# Set-up, the same in every lesson. On Colab it installs condiff; torch stays as it is (--no-deps).
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable

KEEP = None  # for long runs of your own, a folder such as "/content/drive/MyDrive/condiff": docs/colab.md

if "google.colab" in sys.modules:
    if importlib.util.find_spec("condiff_ref") is None:
        source = os.path.abspath("condiff")  # the repository: the trained networks come with it
        if not os.path.exists(source):
            subprocess.run(["git", "clone", "-q", "--depth=1", "{REPOSITORY}", source], check=True)
        packages = ["-e", source, {", ".join(f'"{name}"' for name in NOT_ON_COLAB)}]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", *packages], check=True)
        sys.path.append(source)  # after a restart of the kernel it is found without this
    if KEEP and KEEP.startswith("/content/drive"):
        from google.colab import drive

        drive.mount("/content/drive")
if KEEP:
    os.environ["CONDIFF_CHECKPOINTS"] = KEEP

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from condiff_check import check, reveal

SMOKE = os.environ.get("CONDIFF_BUDGET") == "smoke"  # the quick run of the tests: fewer steps, the same cells
device = "cuda" if torch.cuda.is_available() else "cpu"'''

SUBMIT = """\
# To hand in: run this cell. On Colab it downloads the notebook as it stands; elsewhere save first.
import json
from pathlib import Path

if "google.colab" in sys.modules:
    try:  # Colab has no public way to ask for it, and may change this one
        from google.colab import _message, files

        answer = _message.blocking_request("get_ipynb", request="", timeout_sec=120)
    except (ImportError, AttributeError, TypeError):
        answer = None
    if answer:
        Path("{stem}.ipynb").write_text(json.dumps(answer["ipynb"]), encoding="utf-8")
        files.download("{stem}.ipynb")
    else:
        print("Colab did not answer: choose File, Download, Download .ipynb, and hand in that file.")
else:
    print("Hand in this file:", os.path.abspath(os.environ.get("JPY_SESSION_NAME", "{stem}.ipynb")))"""


def submit(stem: str) -> str:
    """The last cell of that lesson's student notebook."""
    return SUBMIT.format(stem=stem)


def badge(stem: str) -> str:
    """Opens the student notebook of that lesson on Colab."""
    address = REPOSITORY.replace("https://github.com/", "https://colab.research.google.com/github/")
    picture = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({picture})]({address}/blob/main/notebooks/{stem}.ipynb)"


def minutes_line(measured: dict | None) -> str | None:
    """One sentence from an entry of lessons/minutes.json; None where nothing has been measured."""
    tiers = {"full": "runs in", "smoke": "quick run"}
    told = [f"{words} {_duration(measured[tier])}" for tier, words in tiers.items() if measured and tier in measured]
    return f"The solution {', '.join(told)}, measured on {measured['machine']}." if told else None


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"
