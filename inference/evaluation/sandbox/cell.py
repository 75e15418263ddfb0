"""Where tests run: what confines a program at each of the two levels, a scratch folder for each
test, and a view of the program's processes.

Making a cell moves the calling process, a zygote, into it for good.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import sys
import time
from typing import NamedTuple

from . import isolation as kernel

SLACK_BYTES = 64 << 10
MOST_FILES = 4096
STACK_BYTES = 128 << 20


class Look(NamedTuple):
    """A program's process tree at one moment."""

    processes: int = 0
    memory_bytes: int = 0  # of its own
    cpu_seconds: float = 0.0
    waited_seconds: float = 0.0  # runnable, but without a CPU


class Cell:
    """What both levels share: limits, user, capabilities, system calls, and /proc."""

    level: str
    means: dict[str, str] = {}  # of this level
    landlock = False

    def __init__(self, base: str) -> None:
        """`base`: an empty folder for scratch folders, where the level has no root of its own."""
        self.base, self.top, self.work = base, "", ""
        self.folders = visible_folders()
        self.drops_user = os.geteuid() == 0
        # the host's view of processes; no program inherits it
        self.procfs = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        self.enter()
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        self.pid = int(os.readlink("self", dir_fd=self.procfs))
        self.seccomp = kernel.attempt(self.filter_system_calls)
        self.other_tasks = self.count_other_tasks()
        pages = list(map(int, self._read("self/statm").split()))
        self.address_space = pages[0] * os.sysconf("SC_PAGE_SIZE")
        self.own_pages = pages[1] - pages[2]  # a fork has them too, for nothing

    def describe(self) -> dict[str, object]:
        """What confines a program, in words for a report."""
        open_files = "other user" if self.drops_user else "open"
        return {
            "level": self.level,
            "user": "nobody" if self.drops_user else "the caller, without capabilities",
            "processes": "subreaper",
            "files": "landlock" if self.landlock else open_files,
            "network": "seccomp" if self.seccomp else "open",
            "seccomp": self.seccomp,
            **self.means,
        }

    def filter_system_calls(self) -> None:
        """Capabilities go first: without them the kernel asks for no_new_privs only."""
        kernel.drop_capabilities()
        kernel.deny_system_calls(in_the_open=self.level == "rlimits")

    def confine(self, limits: dict) -> None:
        """The calling process: session, limits, files, user, capabilities, system calls."""
        os.setsid()
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        os.chdir(self.work)
        bounds = {
            resource.RLIMIT_AS: limits["memory_bytes"] + self.address_space,
            resource.RLIMIT_CPU: int(limits["kill_cpu_seconds"]) + 2,
            resource.RLIMIT_FSIZE: limits["file_bytes"],
            resource.RLIMIT_NOFILE: limits["open_files"],
            resource.RLIMIT_NPROC: limits["processes"] + self.other_tasks,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_STACK: STACK_BYTES,
        }
        for which, value in bounds.items():
            allowed = resource.getrlimit(which)[1]
            value = value if allowed == resource.RLIM_INFINITY else min(value, allowed)
            # programs like to raise their stack
            hard = allowed if which == resource.RLIMIT_STACK else value
            resource.setrlimit(which, (value, hard))
        if self.landlock:
            kernel.confine_files(self.folders, self.work)
        if self.drops_user:
            os.setgroups([])
            os.setresgid(kernel.NOBODY, kernel.NOBODY, kernel.NOBODY)
            os.setresuid(kernel.NOBODY, kernel.NOBODY, kernel.NOBODY)
        kernel.drop_capabilities()
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)  # with its init
        if self.seccomp:
            self.filter_system_calls()

    def open_scratch(self, stdin: bytes, file_bytes: int) -> None:
        """An empty folder `work` for the program, and its input in `top`."""
        self.make_top(file_bytes + len(stdin))
        with open(f"{self.top}/stdin", "wb") as file:
            file.write(stdin)
        os.chmod(f"{self.top}/stdin", 0o444)
        self.work = f"{self.top}/work"
        os.mkdir(self.work, 0o700)
        if self.drops_user:
            os.chown(self.work, kernel.NOBODY, kernel.NOBODY)

    def look(self) -> Look:
        """What the program's tree uses now."""
        tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
        tree = self.descendants()
        ticks = sum(int(field) for fields in tree.values() for field in fields[11:15])
        pages = waited = 0
        for pid in tree:
            counts = self._read(f"{pid}/statm").split()
            pages += max(0, int(counts[1]) - int(counts[2]) - self.own_pages) if counts else 0
            schedule = self._read(f"{pid}/schedstat").split()
            waited += int(schedule[1]) if len(schedule) > 1 else 0
        # one of them is init, not the program's
        return Look(len(tree) - 1, pages * page, ticks / tick, waited / 1e9)

    def descendants(self) -> dict[int, list[str]]:
        """Every process below the zygote: its pid on the host -> its stat, from the state on."""
        stats, children = {}, {}
        for pid in self._pids():
            fields = self._read(f"{pid}/stat").rpartition(")")[2].split()
            if fields:  # else it has ended
                stats[pid] = fields
                children.setdefault(int(fields[1]), []).append(pid)
        found, queue = {}, [self.pid]
        while queue:
            below = children.get(queue.pop(), [])
            queue += below
            found.update((pid, stats[pid]) for pid in below)
        return found

    def reap(self) -> None:
        """End every process below the zygote."""
        while True:
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    continue
            except ChildProcessError:  # a subreaper without children has no descendants
                return
            for step in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: none forks meanwhile
                for pid in self.descendants():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, step)
            time.sleep(0.001)

    def count_other_tasks(self) -> int:
        """Threads that RLIMIT_NPROC counts besides the program's own; some may start later."""
        uid = kernel.NOBODY if self.drops_user else os.geteuid()
        total = 64
        for pid in self._pids():
            with contextlib.suppress(OSError):  # it may have ended
                if os.stat(f"{pid}", dir_fd=self.procfs).st_uid == uid:
                    total += os.stat(f"{pid}/task", dir_fd=self.procfs).st_nlink - 2
        return total

    def _pids(self) -> list[int]:
        return [int(name) for name in os.listdir(self.procfs) if name.isdigit()]

    def _read(self, path: str) -> str:
        with contextlib.suppress(OSError):  # the process has ended
            with open(os.open(path, os.O_RDONLY, dir_fd=self.procfs), errors="replace") as file:
                return file.read()
        return ""


class Namespaces(Cell):
    """A root and a network of its own; each test has a PID namespace and a memory file system."""

    level = "namespaces"
    means = {"processes": "PID namespace", "files": "private root", "network": "namespace"}

    def enter(self) -> None:
        self.drops_user = kernel.enter_namespaces()
        _continue_in_child()  # only a child is inside the new PID namespace
        # /tmp, as programs expect, unless the interpreter or its packages lie there
        covered = any(f"{folder}/".startswith("/tmp/") for folder in self.folders)
        self.top = "/scratch" if covered else "/tmp"
        kernel.private_root(self.folders, self.top)
        self.pid_namespace = os.open("self/ns/pid", os.O_RDONLY, dir_fd=self.procfs)

    def make_top(self, size: int) -> None:
        options = f"size={size + SLACK_BYTES},nr_inodes={MOST_FILES},mode=1777"
        kernel.mount("tmpfs", self.top, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)

    def scratch_is_full(self, file_bytes: int) -> bool:
        room = os.statvfs(self.top)
        return room.f_bavail * room.f_bsize < SLACK_BYTES or room.f_favail == 0

    def close_scratch(self) -> None:
        """Raises OSError where something still holds it."""
        for pause in (0.001, 0.01, 0.1):
            with contextlib.suppress(OSError):
                kernel.call("umount2", self.top, 0)
                return
            time.sleep(pause)
        kernel.call("umount2", self.top, 0)

    def fork(self) -> int:
        """As os.fork; the child is the init of a PID namespace of its own."""
        kernel.call("unshare", kernel.NEWPID)
        if pid := os.fork():  # where it cannot be done, the zygote ends
            kernel.call("setns", self.pid_namespace, kernel.NEWPID)
        return pid

    def count_other_tasks(self) -> int:
        if list(map(int, re.findall(r"\d+", os.uname().release)[:2])) < [5, 14]:
            return super().count_other_tasks()
        return 0 if self.drops_user else 8  # counted in each user namespace apart


class Rlimits(Cell):
    """On the host's file system and among its processes: Landlock, seccomp, and /proc."""

    level = "rlimits"
    runs = 0

    def enter(self) -> None:
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        self.landlock = kernel.attempt(lambda: kernel.confine_files(self.folders, self.base))

    def make_top(self, size: int) -> None:
        self.runs += 1
        self.top = f"{self.base}/{self.runs}"
        os.mkdir(self.top, 0o711)

    def scratch_is_full(self, file_bytes: int) -> bool:
        """A folder that cannot be listed counts as full, whatever it holds."""
        total, entries, errors = 0, 0, []
        for folder, folders, files, descriptor in os.fwalk(self.work, onerror=errors.append):
            for name in files:
                with contextlib.suppress(OSError):  # it may be gone again
                    total += os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_blocks * 512
            entries += len(folders) + len(files)
            if total > file_bytes or entries > MOST_FILES or folder.count("/") > 500:
                return True
        return any(isinstance(error, PermissionError) for error in errors)

    def close_scratch(self) -> None:
        remove_tree(self.top)

    def fork(self) -> int:
        return os.fork()


LEVELS = {level.level: level for level in (Namespaces, Rlimits)}


def visible_folders() -> list[str]:
    """What a program may read: the interpreter, its packages, and shared libraries."""
    paths = [sys.base_prefix, sys.base_exec_prefix, sys.prefix, sys.exec_prefix]
    paths += [os.path.realpath(path) for path in paths]
    paths += ["/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache"]
    paths = [path for path in dict.fromkeys(paths) if path != "/" and os.path.lexists(path)]
    return [path for path in paths if not any(path.startswith(f"{other}/") for other in paths)]


def remove_tree(top: str) -> None:
    """Remove a folder of any depth and any modes: inner folders are moved to the top first."""
    folders = [top]
    for folder in folders:  # grows on the way
        with os.scandir(folder) as entries:
            rows = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for path, is_folder in rows:
            if not is_folder:
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            target = path if folder == top else f"{top}/{len(folders)}"
            os.rename(path, target)
            folders.append(target)
    for folder in reversed(folders):
        os.rmdir(folder)


def _continue_in_child() -> None:
    """Fork; the parent waits for the child, which goes on, and each ends with the other."""
    if pid := os.fork():
        os.closerange(3, 256)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
