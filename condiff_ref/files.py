"""Files that are either whole or absent: safetensors with a description, written in one move."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent / "data" / "checkpoints"  # the home of the checkpoints
INSTALLED = PACKAGE / "shipped"  # where a wheel puts them
SHIPPED = INSTALLED if INSTALLED.is_dir() else CHECKOUT


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read. The message says which and what to do."""


def write_safetensors(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Write under a temporary name, then rename: a kill at any moment leaves the old file or the new one, never half.

    `about` is stored as JSON in the file's header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    content = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"about": json.dumps(about)})
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # otherwise the rename may reach the disk before the bytes do
    os.replace(partial, path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the description. Raises CheckpointError for a file that is missing, damaged or not ours."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}: train one with `condiff train`, or check the path")
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("about")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete it and train again") from error
    if about is None:
        raise CheckpointError(f"{path} is a safetensors file, but not one that `condiff train` wrote")
    return tensors, json.loads(about)
