"""Processes and shared memory, as Linux lists them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

SHARED = Path("/dev/shm")

_WORKER = re.compile(r"ray::(?!IDLE|DashboardAgent|RuntimeEnvAgent)")


@dataclass(frozen=True)
class Process:
    """A process of a driver's session: the driver, Ray's daemons, or a worker of Ray.

    Attributes:
        pid: Its number.
        session: The session, whose number is the driver's.
        command: Its command line, cut.
    """

    pid: int
    session: int
    command: str

    @property
    def role(self) -> str:
        """``driver``, ``raylet``, ``worker`` (it trains or proposes), or empty."""
        if self.pid == self.session:
            return "driver"
        if _WORKER.match(self.command):
            return "worker"
        return "raylet" if "/raylet " in self.command else ""

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def processes(sessions: Collection[int]) -> list[Process]:
    """The living processes of some sessions."""
    return sorted(_living(sessions), key=lambda process: process.pid)


def _living(sessions: Collection[int]) -> Iterator[Process]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            state, *fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if state not in "ZX" and int(fields[2]) in sessions:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                yield Process(int(folder.name), int(fields[2]), f"{command[:300]} ")


def shared_memory() -> set[str]:
    """The names of the segments of shared memory."""
    return {path.name for path in SHARED.iterdir()} if SHARED.is_dir() else set()


def unused(segments: Collection[str]) -> list[str]:
    """Those of some segments that no process has mapped or open: their owner has left them."""
    used = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                used.update(re.findall(r"/dev/shm/(\S+)", (folder / "maps").read_text()))
                used.update(link.readlink().name for link in (folder / "fd").iterdir())
    return sorted(name for name in set(segments) - used if (SHARED / name).exists())
