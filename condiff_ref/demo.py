"""The main job: train on real handwriting, guide at several scales, and look at what guidance gives and takes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.table import Table

from . import recipes, viz
from .checkpoints import Checkpoint, train_recipe
from .generate import Guidance, generate
from .metrics import Judge, evaluate
from .shapes import Images

SCALES = (0.0, 1.0, 2.0, 4.0)
PER_CLASS = 100
ROWS = 5  # of each picture's panel
