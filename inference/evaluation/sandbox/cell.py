"""Where tests run: the isolation that was reached, a scratch folder for each test, and the process
tree.

Standard library only, for a clean `python -I` (see `runner.py`). Knows nothing of programs,
verdicts or protocols.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import NamedTuple

import isolation as kernel

SLACK_BYTES = 64 << 10
MOST_FILES = 4096


class Look(NamedTuple):
    """A program's process tree at one moment."""

    processes: int = 0
    memory_bytes: int = 0  # of its own
    cpu_seconds: float = 0.0
    waited_seconds: float = 0.0  # runnable, but without a CPU


def visible_folders() -> list[str]:
    """What a program may read: the interpreter, its packages, and shared libraries."""
    paths = [sys.base_prefix, sys.base_exec_prefix, sys.prefix, sys.exec_prefix]
    paths += [os.path.realpath(path) for path in paths]
    paths += ["/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache"]
    paths = [path for path in dict.fromkeys(paths) if path != "/" and os.path.lexists(path)]
    return [path for path in paths if not any(path.startswith(f"{other}/") for other in paths)]


class Cell:
    """Isolation of one zygote. Its init moves the calling process into it and cannot be undone."""

    def __init__(self, namespaces: bool, new_user: bool, base: str) -> None:
        """`base`: the folder for scratch folders; not used with namespaces, which have a root of
        their own.
        """
        self.namespaces, self.new_user, self.base = namespaces, new_user, base
        self.folders = visible_folders()
        # the host's view of processes; no program inherits it
        self.procfs = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        ids = 2 if os.geteuid() == 0 else 1
        if namespaces:
            ids = kernel.enter_namespaces(new_user)
            _continue_in_child()  # only a child is inside the new PID namespace
            # /tmp, as programs expect, unless the interpreter or its packages lie there
            covered = any(f"{folder}/".startswith("/tmp/") for folder in self.folders)
            self.top = "/scratch" if covered else "/tmp"
            kernel.private_root(self.folders, self.top)
            self.pid_namespace = os.open("self/ns/pid", os.O_RDONLY, dir_fd=self.procfs)
        else:
            kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
            self.top = ""
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        self.drops_user = ids == 2
        self.pid = int(os.readlink("self", dir_fd=self.procfs))
        self.runs = 0
        self.seccomp = not kernel.attempt(self.filter_system_calls)
        self.landlock = not namespaces and not kernel.attempt(self.confine_files)
        self.other_tasks = self._other_tasks()
        pages = list(map(int, self._read("self/statm").split()))
        self.address_space = pages[0] * os.sysconf("SC_PAGE_SIZE")
        self.own_pages = pages[1] - pages[2]  # a fork has them too, for nothing

    def describe(self) -> dict[str, object]:
        """What confines a program, in words for a report."""
        files = "landlock" if self.landlock else "other user" if self.drops_user else "open"
        return {
            "level": "namespaces" if self.namespaces else "rlimits",
            "user": "nobody" if self.drops_user else "the caller, without capabilities",
            "user_namespace": self.namespaces and self.new_user,
            "processes": "PID namespace" if self.namespaces else "subreaper",
            "files": "private root" if self.namespaces else files,
            "network": "namespace" if self.namespaces else "seccomp" if self.seccomp else "open",
            "seccomp": self.seccomp,
        }

    def filter_system_calls(self) -> None:
        """To try whether it can be done; capabilities go first, as in a program."""
        kernel.drop_capabilities()
        kernel.deny_system_calls(in_the_open=not self.namespaces)

    def confine_files(self) -> None:
        """To try whether it can be done."""
        kernel.confine_files(self.folders, self.top or self.base)

    # -- scratch: `work` is the program's folder, `stdin` its input --

    def open_scratch(self, stdin: bytes, file_bytes: int) -> None:
        if self.namespaces:
            size = file_bytes + len(stdin) + SLACK_BYTES
            options = f"size={size},nr_inodes={MOST_FILES},mode=1777"
            kernel.mount("tmpfs", self.top, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
        else:
            self.runs += 1
            self.top = f"{self.base}/{self.runs}"
            os.mkdir(self.top, 0o711)
        with open(f"{self.top}/stdin", "wb") as file:
            file.write(stdin)
        os.chmod(f"{self.top}/stdin", 0o444)
        self.work = f"{self.top}/work"
        os.mkdir(self.work, 0o700)
        if self.drops_user:
            os.chown(self.work, kernel.NOBODY, kernel.NOBODY)

    def scratch_is_full(self, file_bytes: int) -> bool:
        if self.namespaces:
            room = os.statvfs(self.top)
            return room.f_bavail * room.f_bsize < SLACK_BYTES or room.f_favail == 0
        total = entries = 0
        hidden = []  # folders that cannot be listed, whatever they hold

        def note(error: OSError) -> None:
            if isinstance(error, PermissionError):
                hidden.append(error)

        for folder, folders, files, descriptor in os.fwalk(self.work, onerror=note):
            for name in files:
                with contextlib.suppress(OSError):  # it may be gone again
                    total += os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_blocks * 512
            entries += len(folders) + len(files)
            if total > file_bytes or entries > MOST_FILES or folder.count("/") > 500:
                return True
        return bool(hidden)

    def close_scratch(self) -> None:
        """Leave nothing of what was written. Raises OSError where something still holds it."""
        if not self.namespaces:
            remove_tree(self.top)
            return
        for pause in (0.001, 0.01, 0.1, 0):
            try:
                kernel.call("umount2", self.top, 0)
                return
            except OSError:
                if not pause:
                    raise
                time.sleep(pause)

    # -- processes --

    def fork(self) -> int:
        """As os.fork; with namespaces the child is the init of a PID namespace of its own."""
        if not self.namespaces:
            return os.fork()
        kernel.call("unshare", kernel.NEWPID)
        pid = -1
        try:
            pid = os.fork()
        finally:
            if pid:
                kernel.call("setns", self.pid_namespace, kernel.NEWPID)
        return pid

    def look(self) -> Look:
        """What the program's tree uses now."""
        tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
        tree = self._descendants()
        ticks = sum(int(field) for fields in tree.values() for field in fields[11:15])
        pages = waited = 0
        for pid in tree:
            counts = self._read(f"{pid}/statm").split()
            pages += max(0, int(counts[1]) - int(counts[2]) - self.own_pages) if counts else 0
            schedule = self._read(f"{pid}/schedstat").split()
            waited += int(schedule[1]) if len(schedule) > 1 else 0
        # one of them is init, not the program's
        return Look(len(tree) - 1, pages * page, ticks / tick, waited / 1e9)

    def reap(self) -> None:
        """End every process below the zygote. A PID namespace has done so by the time its init is
        gone.
        """
        while not self.namespaces:
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    continue
            except ChildProcessError:  # a subreaper without children has no descendants
                return
            for step in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: none forks meanwhile
                for pid in self._descendants():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, step)
            time.sleep(0.001)

    def _descendants(self) -> dict[int, list[str]]:
        """Every process below the zygote: pid as the host has it -> the fields of its stat after
        the name.
        """
        stats, children = {}, {}
        for pid in self._pids():
            fields = self._read(f"{pid}/stat").rpartition(")")[2].split()
            if fields:
                stats[pid] = fields
                children.setdefault(int(fields[1]), []).append(pid)
        found, queue = {}, [self.pid]
        while queue:
            below = children.get(queue.pop(), [])
            queue += below
            found.update((pid, stats[pid]) for pid in below)
        return found

    def _other_tasks(self) -> int:
        """Threads that RLIMIT_NPROC counts besides the program's own; some may start later."""
        release = [int(part) for part in os.uname().release.split(".")[:2] if part.isdigit()]
        if (
            self.namespaces and self.new_user and release >= [5, 14]
        ):  # counted in each user namespace apart
            return 0 if self.drops_user else 8
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
        try:
            with open(os.open(path, os.O_RDONLY, dir_fd=self.procfs), errors="replace") as file:
                return file.read()
        except OSError:  # the process has ended
            return ""


def _continue_in_child() -> None:
    """Fork; the parent waits for the child and ends with it, the child returns and ends with the
    parent.
    """
    if pid := os.fork():
        os.closerange(3, 256)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)


def remove_tree(top: str) -> None:
    """Remove a folder of any depth and any modes: inner folders are lifted to the top before they
    are read.
    """
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
