"""What the Linux kernel offers to confine a process: namespaces, seccomp, Landlock, capabilities.

Standard library and ctypes only: it is loaded by `runner.py` in a clean `python -I`. Every function
raises OSError where the kernel refuses. Knows nothing of programs, tests or protocols.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Callable, Iterable

NOBODY = 65534
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
ANY_NAMESPACE = 0x7E020000  # the above, and the cgroup and UTS namespaces
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
SECCOMP_MODE_FILTER = 2

_libc = ctypes.CDLL(None, use_errno=True)


def call(function: str, *arguments) -> int:
    """A C library function by name; strings are encoded, -1 becomes an OSError."""
    ready = [os.fsencode(a) if isinstance(a, str) else a for a in arguments]
    ready = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in ready]
    result = getattr(_libc, function)(*ready)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int = 0, third: object = 0) -> None:
    call("prctl", option, value, third, 0, 0)


# -- namespaces --


def enter_namespaces(new_user: bool) -> int:
    """Leave the host's mount, network, IPC and (for children) PID namespaces.

    With `new_user` also its user namespace, which needs no privilege. Root maps ids 0 and 65534, so
      that a
    program can run as 65534; anybody else has one id to map, and what separates a program from its
      runner is
    then the PID namespace and the missing capabilities. Returns the number of ids mapped (2 without
      a user
    namespace: root then has every id).
    """
    flags = NEWNS | NEWNET | NEWIPC | NEWPID
    if not new_user:
        call("unshare", flags)
        return 2
    two = f"0 0 1\n{NOBODY} {NOBODY} 1\n"
    uid_one, gid_one = f"{NOBODY} {os.geteuid()} 1\n", f"{NOBODY} {os.getegid()} 1\n"
    writer = _MapWriter(two) if os.geteuid() == 0 else None
    call("unshare", flags | NEWUSER)
    if writer and writer.write():
        return 2
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", uid_one)
    _write("/proc/self/gid_map", gid_one)
    return 1


class _MapWriter:
    """A child that stays in the old user namespace: only from there may two ids be mapped."""

    def __init__(self, ids: str) -> None:
        parent = os.getpid()
        go_read, self._go = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._go)
                os.read(go_read, 1)
                _write(f"/proc/{parent}/uid_map", ids)
                _write(f"/proc/{parent}/gid_map", ids)
                os._exit(0)
            except OSError:
                os._exit(1)
        os.close(go_read)

    def write(self) -> bool:
        os.close(self._go)
        return os.waitpid(self._pid, 0)[1] == 0


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    call("mount", source, target, kind, flags, data or None)


def private_root(folders: Iterable[str], scratch: str) -> None:
    """Replace this mount namespace's root by an empty one that shows `folders` read-only.

    `scratch`, a folder below /, is left as a mount point. Ends in a chroot below the namespace's
    own root: there the kernel grants no further user namespaces, so nothing inside can gain the
    right to mount.
    """
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    devices = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")]
    sources, links = {}, {}
    for path in [*folders, *devices]:
        if os.path.islink(path):
            links[path] = os.readlink(path)
        elif os.path.exists(path):
            sources[path] = os.open(path, os.O_PATH), os.path.isdir(path)
    base = "/tmp"  # covered in this namespace only
    mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    root = f"{base}/root"
    for path, (descriptor, is_folder) in sources.items():
        target = root + path
        if is_folder:
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        mount(f"/proc/self/fd/{descriptor}", target, None, MS_BIND | MS_REC)
        os.close(descriptor)
    for path, target in links.items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.symlink(target, root + path)
    for name, target in (("stdin", "stdin"), ("shm", "work")):
        os.symlink(f"..{scratch}/{target}", f"{root}/dev/{name}")
    for path in (root + scratch, f"{base}/old"):
        os.mkdir(path)
    _protect(root + "/")
    call("pivot_root", base, f"{base}/old")
    os.chdir("/")
    call("umount2", "/old", MNT_DETACH)
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chroot("/root")
    os.chdir("/")


_LOCKED = {
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "noatime": 1024,
    "nodiratime": 2048,
    "relatime": 1 << 21,
}


def _protect(prefix: str) -> None:
    """Make every mount below `prefix` read-only; flags that the kernel has locked are kept."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        rows = [line.split() for line in file]
    for row in rows:
        # white space in a path is written in octal
        path = row[4].encode("utf-8", "surrogateescape").decode("unicode_escape")
        path = path.encode("latin-1").decode("utf-8", "surrogateescape")
        if path.startswith(prefix):
            kept = sum(_LOCKED.get(option, 0) for option in row[5].split(","))
            device = MS_NODEV if not path.startswith(prefix + "dev/") else 0
            flags = kept | MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | device
            mount(None, path, None, flags)


def drop_capabilities() -> None:
    """No capabilities, and none to be had through exec."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    call("capset", header, ctypes.create_string_buffer(24))


# -- seccomp: system calls that a contest program never needs --

_X86, _ARM = 0xC000003E, 0xC00000B7
_ARCHITECTURE = {"x86_64": _X86, "aarch64": _ARM}.get(platform.machine())
# name: (x86_64, aarch64); None where the architecture has no such call
_DENIED = {
    "socket": (41, 198),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "fsopen": (430, 430),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "mount_setattr": (442, 442),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "open_by_handle_at": (304, 265),
}
# where programs share the host's PID namespace and files: signals to others, and metadata of files
_DENIED_IN_THE_OPEN = {
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}
_CLONE, _CLONE3, _KILL, _TGKILL, _PRLIMIT = (
    (56, 220),
    (435, 435),
    (62, 129),
    (234, 131),
    (302, 261),
)

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026


def deny_system_calls(in_the_open: bool) -> None:
    """Install a filter: no sockets (pairs are allowed), IPC objects, keys, tracing, limits of
    others, mounts, namespaces.

    `in_the_open`: also no signals to other processes and no changes of owner, mode or time of a
    file. For this process and what it starts; `drop_capabilities` comes first. Raises on an
    architecture without a table.
    """
    if _ARCHITECTURE is None:
        raise OSError(38, f"no table of system calls for {platform.machine()}")
    column = 0 if _ARCHITECTURE == _X86 else 1
    deny, load = (_RETURN, 0, 0, _EPERM), (_LOAD, 0, 0, 16)
    rules = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCHITECTURE), deny, (_LOAD, 0, 0, 0)]
    if column == 0:  # the x32 numbers of the same calls
        rules += [(_AT_LEAST, 0, 1, 0x40000000), deny]
    table = {**_DENIED, **(_DENIED_IN_THE_OPEN if in_the_open else {})}
    for numbers in table.values():
        if numbers[column] is not None:
            rules += [(_EQUAL, 0, 1, numbers[column]), deny]
    # clone3 hides its flags in memory; C libraries fall back to clone
    rules += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ENOSYS)]
    allow = (_RETURN, 0, 0, _ALLOW)
    rules += [(_EQUAL, 0, 4, _CLONE[column]), load, (_ANY_BIT, 0, 1, ANY_NAMESPACE), deny, allow]
    only_own = [(_PRLIMIT, 0)]
    if in_the_open:
        only_own += [(_KILL, os.getpid()), (_TGKILL, os.getpid())]
    for numbers, own in only_own:
        rules += [(_EQUAL, 0, 4, numbers[column]), load, (_EQUAL, 1, 0, own), deny, allow]
    rules.append(allow)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code))
    )
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program)


# -- Landlock: files, where there is no private root --

_CREATE_RULESET, _ADD_RULE, _RESTRICT = 444, 445, 446  # the same on every architecture
_READ, _WRITE_FILE, _FILE_RIGHTS = 0b1101, 0b10, 0b1100000000000111


def confine_files(readable: Iterable[str], writable: str) -> None:
    """From now on this process and its children read below `readable` only and write below
    `writable` only.

    Sets no_new_privs, without which an unprivileged process may not confine itself. Other users'
    rights still count. `readable` may name what does not exist.
    """
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    version = call("syscall", _CREATE_RULESET, None, 0, 1)
    rights = (1 << (13 + (version >= 2) + (version >= 3))) - 1  # refer, truncate
    rights |= 1 << 15 if version >= 5 else 0  # device ioctl
    ruleset = call(
        "syscall", _CREATE_RULESET, ctypes.create_string_buffer(struct.pack("Q", rights)), 8, 0
    )
    devices = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
    allowed = [(path, _READ) for path in readable] + [(writable, rights)]
    for path, mask in allowed + [(path, _READ | _WRITE_FILE) for path in devices]:
        if path == writable or os.path.exists(path):
            beneath = os.open(path, os.O_PATH)
            mask &= rights if os.path.isdir(path) else rights & _FILE_RIGHTS
            rule = ctypes.create_string_buffer(struct.pack("=Qi", mask, beneath))
            call("syscall", _ADD_RULE, ruleset, 1, rule, 0)
            os.close(beneath)
    call("syscall", _RESTRICT, ruleset, 0)
    os.close(ruleset)


def attempt(action: Callable[[], None]) -> str:
    """Run `action` in a child of its own; the reason why it cannot be done here, empty where it
    can.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:
            os.write(write, str(error).encode()[:500] or b"failed")
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        reason = file.read().decode("utf-8", "replace")
    status = os.waitpid(pid, 0)[1]
    return reason or (f"ended with status {status}" if status else "")
