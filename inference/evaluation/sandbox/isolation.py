"""What the Linux kernel offers to confine a process: namespaces, seccomp, Landlock, capabilities.

Standard library and ctypes only. Every function raises OSError where the kernel refuses.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import struct
from collections.abc import Callable, Iterable

NOBODY = 65534
DEVICES = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")]
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
ANY_NAMESPACE = 0x7E020000  # the above, and the cgroup and UTS namespaces
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
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


def attempt(action: Callable[[], None]) -> bool:
    """Whether `action` can be done, tried in a child."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def enter_namespaces() -> bool:
    """Leave the host's user, mount, network, IPC and (for children) PID namespaces.
    Root maps two ids, 0 and 65534, so that a program can run as the latter; the result says so.
    That may only be done from outside, by a child that stays there. Anybody else has one id to map;
    what separates a program from its runner is then the PID namespace and the missing capabilities.
    """
    uid, gid, own = os.geteuid(), os.getegid(), os.getpid()
    wait, go = os.pipe()
    outside = os.fork() if uid == 0 else -1
    if outside == 0:
        try:
            os.close(go)
            os.read(wait, 1)
            for name in ("uid_map", "gid_map"):
                _write(f"/proc/{own}/{name}", f"0 0 1\n{NOBODY} {NOBODY} 1\n")
            os._exit(0)
        finally:
            os._exit(1)
    call("unshare", NEWUSER | NEWNS | NEWNET | NEWIPC | NEWPID)
    os.close(wait)
    os.close(go)
    if outside > 0 and os.waitpid(outside, 0)[1] == 0:
        return True
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{NOBODY} {uid} 1\n")
    _write("/proc/self/gid_map", f"{NOBODY} {gid} 1\n")
    return False


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def mount(source: str | None, target, kind: str | None, flags: int, data: str = "") -> None:
    call("mount", source, target, kind, flags, data or None)


def private_root(folders: Iterable[str], scratch: str) -> None:
    """Replace this mount namespace's root by an empty one that shows `folders` read-only.
    `scratch`, a folder below /, is left as a mount point. Ends in a chroot below the namespace's
    own root: there the kernel grants no further user namespaces, so nothing inside can gain the
    right to mount."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    sources, links = {}, {"/dev/stdin": f"..{scratch}/stdin", "/dev/shm": f"..{scratch}/work"}
    for path in [*folders, *DEVICES]:
        if os.path.islink(path):
            links[path] = os.readlink(path)
        elif os.path.exists(path):
            sources[path] = os.open(path, os.O_PATH), os.path.isdir(path)
    base = "/tmp"  # covered in this namespace only
    mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    root = f"{base}/root"
    for path, (descriptor, is_folder) in sources.items():
        os.makedirs(root + (path if is_folder else os.path.dirname(path)), exist_ok=True)
        if not is_folder:
            open(root + path, "w").close()
        mount(f"/proc/self/fd/{descriptor}", root + path, None, MS_BIND | MS_REC)
        os.close(descriptor)
    for path, target in links.items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.symlink(target, root + path)
    for path in (root + scratch, f"{base}/old"):
        os.mkdir(path)
    _protect(f"{root}/")
    call("pivot_root", base, f"{base}/old")
    os.chdir("/")
    call("umount2", "/old", MNT_DETACH)
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chroot("/root")
    os.chdir("/")


def _protect(prefix: str) -> None:
    """Make every mount below `prefix` read-only; flags that the kernel may have locked are kept."""
    with open("/proc/self/mountinfo", "rb") as file:
        rows = [line.split() for line in file]
    for row in rows:
        # white space in a path is written in octal
        path = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), row[4])
        if path.startswith(prefix.encode()):
            kept = {b"nodev": MS_NODEV, b"noexec": MS_NOEXEC}
            flags = sum(kept.get(option, 0) for option in row[5].split(b","))
            if not path.startswith(f"{prefix}dev/".encode()):
                flags |= MS_NODEV
            mount(None, path, None, flags | MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID)


def drop_capabilities() -> None:
    """No capabilities, and none to be had through exec."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    call("capset", header, ctypes.create_string_buffer(24))


# system calls that a contest program never needs: name, number on x86-64, on arm64 (-: none)
_DENIED = """socket 41 198, shmget 29 194, semget 64 190, msgget 68 186, mq_open 240 180,
add_key 248 217, request_key 249 218, keyctl 250 219, ptrace 101 117, process_vm_readv 310 270,
process_vm_writev 311 271, pidfd_getfd 438 438, unshare 272 97, setns 308 268, mount 165 40,
umount2 166 39, pivot_root 155 41, chroot 161 51, fsopen 430 430, open_tree 428 428,
move_mount 429 429, mount_setattr 442 442, bpf 321 280, perf_event_open 298 241,
userfaultfd 323 282, io_uring_setup 425 425, open_by_handle_at 304 265"""
# where programs share the host's PID namespace and files: signals to others, metadata of files
_DENIED_IN_THE_OPEN = """tkill 200 130, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
pidfd_send_signal 424 424, chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452,
chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54, utime 132 -, utimes 235 -,
futimesat 261 -, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7,
removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16"""
_SPECIAL = "clone 56 220, clone3 435 435, kill 62 129, tgkill 234 131, prlimit64 302 261"
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026


def deny_system_calls(in_the_open: bool) -> None:
    """Install a filter, for this process and what it starts: no sockets (pairs are allowed), IPC
    objects, keys, tracing, limits of others, mounts, namespaces. `in_the_open`: also no signals to
    others and no changes of a file's owner, mode or time. `drop_capabilities` comes first."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(38, f"no table of system calls for {machine}")
    deny, allow, load = (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, 16)
    rules = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCHITECTURES[machine]), deny, (_LOAD, 0, 0, 0)]
    if machine == "x86_64":  # the x32 numbers of the same calls
        rules += [(_AT_LEAST, 0, 1, 0x40000000), deny]
    denied = _DENIED + ("," + _DENIED_IN_THE_OPEN if in_the_open else "")
    for number in _numbers(denied, machine).values():
        rules += [(_EQUAL, 0, 1, number), deny]
    special = _numbers(_SPECIAL, machine)
    # clone3 hides its flags in memory; C libraries fall back to clone
    rules += [(_EQUAL, 0, 1, special["clone3"]), (_RETURN, 0, 0, _ENOSYS)]
    rules += [(_EQUAL, 0, 4, special["clone"]), load, (_ANY_BIT, 0, 1, ANY_NAMESPACE), deny, allow]
    own = {"prlimit64": 0}  # the only process that may be named
    if in_the_open:
        own.update(kill=os.getpid(), tgkill=os.getpid())
    for name, pid in own.items():
        rules += [(_EQUAL, 0, 4, special[name]), load, (_EQUAL, 1, 0, pid), deny, allow]
    rules.append(allow)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(program))


def _numbers(table: str, machine: str) -> dict[str, int]:
    rows = [row.split() for row in table.split(",")]
    column = 1 if machine == "x86_64" else 2
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


# Landlock: files, where there is no private root; the same numbers on every architecture
_CREATE_RULESET, _ADD_RULE, _RESTRICT = 444, 445, 446
_READ, _WRITE_FILE, _FILE_RIGHTS = 0b1101, 0b10, 0b1100000000000111


def confine_files(readable: Iterable[str], writable: str) -> None:
    """From now on this process and its children read below `readable` and write below `writable`.
    Sets no_new_privs, without which an unprivileged process may not confine itself. Other users'
    rights still count. `readable` may name what does not exist."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    version = call("syscall", _CREATE_RULESET, None, 0, 1)
    rights = (1 << (13 + (version >= 2) + (version >= 3))) - 1  # refer, truncate
    rights |= 1 << 15 if version >= 5 else 0  # device ioctl
    attributes = ctypes.create_string_buffer(struct.pack("Q", rights))
    ruleset = call("syscall", _CREATE_RULESET, attributes, 8, 0)
    allowed = [(path, _READ) for path in readable if os.path.exists(path)]
    allowed += [(path, _READ | _WRITE_FILE) for path in DEVICES if os.path.exists(path)]
    for path, mask in [*allowed, (writable, rights)]:
        beneath = os.open(path, os.O_PATH)
        mask &= rights if os.path.isdir(path) else rights & _FILE_RIGHTS
        rule = ctypes.create_string_buffer(struct.pack("=Qi", mask, beneath))
        call("syscall", _ADD_RULE, ruleset, 1, rule, 0)
        os.close(beneath)
    call("syscall", _RESTRICT, ruleset, 0)
    os.close(ruleset)
