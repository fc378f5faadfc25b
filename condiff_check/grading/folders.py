"""What the sandbox's processes can read, and the command that starts one: bubblewrap with as few mounts as will do."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

BOOT = (
    "import sys; sys.path[:] = [sys.argv[2], *sys.path, *sys.argv[3:]]; "
    "import site; site.setquit(); site.sethelper(); "
    "from condiff_agent.zygote import main; main(int(sys.argv[1]))"
)
ETC = ("ld.so.cache", "localtime", "fonts", "alternatives", "mime.types")


class SandboxError(RuntimeError):
    """There is no sandbox of the level that was asked for. The message says what to install or to enable."""


class Folders:
    """What a child needs to read: the interpreter, installed packages, the system's libraries and the view.

    Whatever of this course is installed among them is hidden: the child has the view instead.
    """

    def __init__(self, view: Path):
        self.view = view
        self.python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
        self.prefix = Path(os.path.realpath(sys.base_prefix))
        installed = (Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages"))
        self.packages = list(dict.fromkeys(p.resolve() for p in installed if p.is_dir()))
        self.system = [Path(p) for p in ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32") if Path(p).is_dir()]
        self.roots = [p for p in (self.prefix, *self.packages) if not p.is_relative_to("/usr")]
        self.boxed = {  # where bubblewrap puts the packages: a virtual environment may lie in somebody's home
            p: Path(f"/packages/{n}") for n, p in enumerate(self.packages) if not self._stays(p)
        }
        ours = [entry for folder in self.packages for entry in folder.iterdir() if "condiff" in entry.name.lower()]
        self.hidden = [*ours, *(p for p in (Path("/usr/src"), Path("/usr/local/src")) if p.is_dir())]
        self._open = list(self._expose())

    def _stays(self, packages: Path) -> bool:
        return packages.is_relative_to("/usr") or packages.is_relative_to(self.prefix)

    def inside(self, path: Path) -> str:
        """A path as it reads within bubblewrap."""
        for outer, inner in self.boxed.items():
            if path.is_relative_to(outer):
                return str(inner / path.relative_to(outer))
        return str(path)

    def _expose(self) -> Iterator[tuple[Path, bool]]:
        for root in (*self.system, *self.roots, self.view):
            yield from _expose(root, self.hidden)

    def readable(self) -> list[str]:
        etc = [f"/etc/{name}" for name in ETC]
        return [*(str(path) for path, whole in self._open if whole), *etc, "/sys/devices/system/cpu"]

    def listed(self) -> list[str]:
        return [str(path) for path, whole in self._open if not whole]

    def open_to_all(self) -> bool:
        """Could any user read all this?"""
        paths = (Path(self.python), self.prefix, *self.packages, self.view)
        return all(p.stat().st_mode & 0o005 == 0o005 for path in paths for p in (path, *path.parents))


def _expose(folder: Path, hidden: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """The folder (whole), or where something in it is hidden: the folder (its names only) and what else is in it."""
    inside = [path for path in hidden if path.is_relative_to(folder)]
    if not inside:
        yield folder, True
    elif folder not in hidden:
        yield folder, False
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                yield from _expose(entry, inside)
            elif entry not in hidden:
                yield entry, True


def command(folders: Folders, settings: dict[str, object], fd: int) -> tuple[list[str], dict[str, str]]:
    boxed = settings["level"] == "L2"
    view = "/view" if boxed else str(folders.view)
    packages = [folders.inside(p) if boxed else str(p) for p in folders.packages]
    line = [folders.python, "-I", "-S", "-B", "-c", BOOT, str(fd), view, *packages]
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(settings["work"]),
        "TMPDIR": "/tmp" if boxed else str(settings["work"]),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "TORCHDYNAMO_DISABLE": "1",
        "CONDIFF_BUDGET": "smoke",
    }
    return ([*_bubblewrap(folders), *line] if boxed else line), env


def _bubblewrap(folders: Folders) -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError("L2 needs bubblewrap: apt install bubblewrap")
    line = [program, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    line += ["--die-with-parent", "--new-session"]
    if os.geteuid() == 0:  # the zygote leaves root itself, after bubblewrap has bound what only root can reach
        line += [word for name in ("SETUID", "SETGID", "SYS_ADMIN") for word in ("--cap-add", f"CAP_{name}")]
    else:
        line += ["--unshare-user", "--uid", "0", "--gid", "0", "--cap-add", "ALL"]
    line += ["--tmpfs", "/tmp", "--dev", "/dev", "--proc", "/proc", "--dir", "/work", "--dir", "/view"]
    for path in folders.system:
        line += (
            ["--symlink", os.readlink(path), str(path)] if path.is_symlink() else ["--ro-bind", str(path), str(path)]
        )
    for name in ETC:
        line += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    for path in folders.roots:
        for parent in [*Path(folders.inside(path)).parents][-2::-1]:  # else bubblewrap closes those closed outside
            line += ["--dir", str(parent)]
        line += ["--ro-bind", str(path), folders.inside(path)]
    for path in folders.hidden:
        at = folders.inside(path)
        line += ["--tmpfs", at] if path.is_dir() else ["--ro-bind", os.devnull, at]
    for entry in folders.view.iterdir():  # one by one: the folder itself may be closed to other users
        line += ["--ro-bind", str(entry), f"/view/{entry.name}"]
    line += ["--ro-bind-try", "/sys/devices/system/cpu", "/sys/devices/system/cpu"]
    return [*line, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]
