"""What a fork of the sandbox does to itself before a student's code runs in it: on Linux, by ctypes; elsewhere rlimits.

Each function either does what it says or raises OSError: a layer that is asked for and fails ends the child.
Written against the kernel's documentation (seccomp, landlock, user_namespaces) rather than on a binding, because a
grader must not lose a layer where libseccomp happens to be missing, and the filter is one list of numbers.
"""

import ctypes
import fcntl
import os
import platform
import resource
import struct
from collections.abc import Iterable, Sequence

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWIPC = 0x20000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_NAMESPACES = 0x7E020080  # every CLONE_NEW... flag, time and cgroup namespaces among them

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 16384, 1 << 18, 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_MM, PR_SET_SECCOMP = 1, 4, 8, 35, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_SET_PTRACER = 36, 38, 0x59616D61
CAP_DAC_READ_SEARCH = 2
MADV_COLLAPSE = 25


def _call(name: str, *arguments: object) -> int:
    result = getattr(_libc, name)(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def _syscall(number: int, *arguments: object) -> int:
    return _call("syscall", ctypes.c_long(number), *arguments)


def prctl(option: int, value: int) -> None:
    _call("prctl", option, *(ctypes.c_ulong(n) for n in (value, 0, 0, 0)))


def unshare(flags: int) -> None:
    _call("unshare", flags)


def setns(fd: int, kind: int) -> None:
    _call("setns", fd, kind)


def mount(kind: str, at: str, flags: int, options: str = "") -> None:
    _call("mount", kind.encode(), at.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode() or None)


def unmount(at: str) -> None:
    _call("umount2", at.encode(), MNT_DETACH)


def limit(resources: dict[str, int]) -> None:
    """Set both the soft and the hard limit; a name that the platform lacks is passed over."""
    for name, value in resources.items():
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is None:
            continue
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(number, (value, value))
        except (ValueError, OSError):
            if platform.system() == "Linux":  # macOS knows RLIMIT_AS and refuses to set it
                raise


def map_ids(inside: int, outside_uid: int, outside_gid: int) -> None:
    """Give a new user namespace its one user and one group."""
    prctl(PR_SET_DUMPABLE, 1)  # else the three files belong to root
    for name, line in (
        ("uid_map", f"{inside} {outside_uid} 1"),
        ("setgroups", "deny"),
        ("gid_map", f"{inside} {outside_gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def become(uid: int, keep: Iterable[int] = ()) -> None:
    """Leave root for good; `keep` are capabilities that stay."""
    keep = tuple(keep)
    prctl(PR_SET_KEEPCAPS, 1 if keep else 0)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    set_capabilities(keep)


def set_capabilities(keep: Iterable[int] = ()) -> None:
    bits = sum(1 << cap for cap in keep)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    header = struct.pack("Ii", 0x20080522, 0)
    _call("capset", header, struct.pack("6I", low, low, 0, high, high, 0))


def enclose(work: str, disk: int) -> None:
    """L2: in namespaces of its own, with its own /proc, and sized private folders as the only ones that can be written.

    Called by the first process of a new pid namespace, which the zygote's user namespace owns. What is mounted here
    belongs to that namespace; the student's code comes to live in one further down and has no power over it.
    """
    unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWNET)
    mount("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    sized = f"size={disk},nr_inodes={max(64, disk // 4096)},mode=0700"
    for folder in (work, "/tmp", "/dev/shm"):
        mount("tmpfs", folder, MS_NOSUID | MS_NODEV, sized)
    uid, gid = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER)
    map_ids(1000, uid, gid)
    set_capabilities()


def collapse() -> None:
    """Move this process's own memory to huge pages, where the kernel can (6.1): a fork copies a table of pages, and
    this makes the table short. A fork and its end then take a third of the time."""
    with open("/proc/self/maps") as file:
        lines = [line.split() for line in file]
    for span, mode, _, _, inode, *_ in lines:
        start, end = (int(address, 16) for address in span.split("-"))
        if mode == "rw-p" and inode == "0" and end - start >= 4 << 20:
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_COLLAPSE)


# ---------------------------------------------------------------------------------------------------------------------
# seccomp

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_NEWEST = 462  # mseal; what came later answers as an older kernel does

# name: (number on x86_64, number on aarch64), None where it does not exist
_REFUSED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "seccomp": (317, 277),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "statmount": (457, 457),
    "listmount": (458, 458),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "acct": (163, 89),
    "syslog": (103, 116),
    "personality": (135, 92),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "ioprio_set": (251, 30),
    # no network, and no way to a named or abstract socket of the host's; what is handed over comes connected
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    # memory that no process need map, and that would outlive them
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semctl": (66, 191),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgctl": (71, 187),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
}
# where the kernel cannot keep signals within the child: none at all
_SIGNALS = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
}
# refused unless the first argument is 0, that is, unless a process means itself
_ONLY_ITSELF = {
    "prlimit64": (302, 261),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "setpriority": (141, 140),
}
_CLONE, _CLONE3, _SOCKETPAIR, _PRCTL, _IOCTL = (56, 220), 435, (53, 199), (157, 167), (16, 29)

_LOAD, _EQUAL, _GREATER, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x54, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38


def seccomp_filter(machine: str | None = None, *, signals: bool = True) -> bytes:
    """The program; `signals=False` refuses those too. Raises OSError on a machine that it has no numbers for."""
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(f"no seccomp filter for {machine}")
    architecture, column = _ARCHITECTURES[machine]
    lines = [_line(_LOAD, 4), _line(_EQUAL, architecture, 1, 0), _line(_RETURN, _KILL)]
    lines += [_line(_LOAD, 0), _line(_GREATER, _NEWEST, 0, 1), _line(_RETURN, _ENOSYS)]  # x32's numbers are above too
    # threads ask for clone3 first, and take clone when it does not exist; its flags cannot be read by a filter
    lines += [_line(_EQUAL, _CLONE3, 0, 1), _line(_RETURN, _ENOSYS)]
    for numbers in (*_REFUSED.values(), *(() if signals else _SIGNALS.values())):
        if numbers[column] is not None:
            lines += [_line(_EQUAL, numbers[column], 0, 1), _line(_RETURN, _EPERM)]
    lines += _when(_CLONE[column], 0, [_line(_ANY_BIT, _NAMESPACES, 0, 1), _line(_RETURN, _EPERM)])
    for numbers in _ONLY_ITSELF.values():
        lines += _when(numbers[column], 0, [_line(_EQUAL, 0, 1, 0), _line(_RETURN, _EPERM)])
    # a datagram socket could be sent to any address
    stream = [_line(_AND, 0xF), _line(_EQUAL, 1, 1, 0), _line(_RETURN, _EPERM)]
    lines += _when(_SOCKETPAIR[column], 1, stream)
    lines += _when(_PRCTL[column], 0, _refuse(PR_SET_DUMPABLE, PR_SET_MM, PR_SET_PTRACER, PR_SET_SECCOMP))
    lines += _when(_IOCTL[column], 1, _refuse(0x5412, 0x541C))  # TIOCSTI, TIOCLINUX
    return b"".join([*lines, _line(_RETURN, _ALLOW)])


def _line(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, value)


def _refuse(*values: int) -> list[bytes]:
    return [line for value in values for line in (_line(_EQUAL, value, 0, 1), _line(_RETURN, _EPERM))]


def _when(number: int, argument: int, body: list[bytes]) -> list[bytes]:
    """For one system call: look at an argument (its low half; the kernel reads no more of these), else go on."""
    inner = [_line(_LOAD, 16 + 8 * argument), *body, _line(_RETURN, _ALLOW)]
    return [_line(_EQUAL, number, 0, len(inner)), *inner]


def install_seccomp(program: bytes) -> None:
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    header = Program(len(program) // 8, ctypes.addressof(buffer))
    _call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(header))


# ---------------------------------------------------------------------------------------------------------------------
# Landlock

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_MAKE = 0b1_1111_1011_0000  # remove and make, all but character and block devices, which ask for a capability anyway
_REFER = 1 << 13


def landlock_abi() -> int:
    """Which Landlock the kernel has; 0 for none."""
    try:
        return _syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError:
        return 0


class Landlock:
    """A set of rules about files. Where the kernel can, signals to what is outside, TCP and abstract sockets too."""

    def __init__(self) -> None:
        abi = landlock_abi()
        if not abi:
            raise OSError("this kernel has no Landlock")
        self._all = (1 << 13) - 1 | (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0)
        self._all |= _IOCTL_DEV if abi >= 5 else 0
        fields = struct.pack("QQQ", self._all, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0)
        size = 24 if abi >= 6 else 16 if abi >= 4 else 8
        fd = _syscall(444, fields, ctypes.c_size_t(size), ctypes.c_uint32(0))
        self.fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100)  # the low numbers are for the fork's own
        os.close(fd)

    def read(self, path: str) -> None:
        self._allow(path, _EXECUTE | _READ_FILE | _READ_DIR)

    def list(self, path: str) -> None:
        """The names in a folder and below, not what the files hold."""
        self._allow(path, _READ_DIR)

    def use(self, path: str) -> None:
        """A device: read and write, nothing made."""
        self._allow(path, _READ_FILE | _WRITE_FILE | _READ_DIR | _TRUNCATE)

    def write(self, path: str) -> None:
        self._allow(path, _READ_FILE | _READ_DIR | _WRITE_FILE | _TRUNCATE | _MAKE | _REFER)

    def _allow(self, path: str, rights: int) -> None:
        """Where there is no such file there is nothing to allow."""
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return
        try:
            if not os.path.isdir(f"/proc/self/fd/{fd}"):
                rights &= _EXECUTE | _READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV
            rule = struct.pack("=Qi", rights & self._all, fd)
            _syscall(445, ctypes.c_int(self.fd), ctypes.c_int(1), rule, ctypes.c_uint32(0))
        finally:
            os.close(fd)

    def enforce(self) -> None:
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        _syscall(446, ctypes.c_int(self.fd), ctypes.c_uint32(0))
        os.close(self.fd)


DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
KERNEL = (
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/version",
    "/proc/filesystems",
    "/proc/sys/kernel/osrelease",
)


def file_rules(read: Sequence[str], listed: Sequence[str], write: Sequence[str]) -> Landlock:
    """Read and run what is under `read`, write under `write`, and nothing else."""
    rules = Landlock()
    for path in (*read, *KERNEL):
        rules.read(path)
    for path in listed:
        rules.list(path)
    for path in write:
        rules.write(path)
    for path in DEVICES:
        rules.use(path)
    return rules
