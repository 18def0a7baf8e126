"""Where a history's study lies: a folder, a small disk that can be full, a PostgreSQL server."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

DISK_MEBIBYTES = 16

# A process of root's ignores permissions, so the drivers run without that capability.
_UNPRIVILEGED = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def prefix() -> list[str]:
    """The beginning of a driver's command, after which permissions hold for it."""
    return list(_UNPRIVILEGED) if os.getuid() == 0 and shutil.which("setpriv") else []


def missing() -> dict[str, str]:
    """Why some faults cannot be tried here, by their kind."""
    found = {}
    if not _can_mount():
        found["full disk"] = "a small tmpfs cannot be mounted here"
    if os.getuid() == 0 and not prefix():
        found["read-only folder"] = "root ignores permissions, and setpriv is not installed"
    if programs() is None or importlib.util.find_spec("psycopg") is None:
        found["PostgreSQL"] = "PostgreSQL's programs or psycopg are not installed"
    return found


def programs() -> Path | None:
    """The folder of PostgreSQL's ``initdb`` and ``postgres``: on the path, or Debian's newest."""
    found = shutil.which("initdb")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return Path(found).parent if found else debian[-1].parent if debian else None


def _can_mount() -> bool:
    if os.getuid() != 0 or not shutil.which("mount"):
        return False
    probe = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    )
    return probe.returncode == 0


@dataclass
class Postgres:
    """A server of its own, on a socket in a folder; root starts it as another user.

    Attributes:
        folder: The folder of its data and its socket.
    """

    folder: Path
    _server: subprocess.Popen[str] | None = None
    _user: str | None = None

    def __post_init__(self) -> None:
        if os.getuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            self._user = "postgres" if "postgres" in names else "nobody"
            shutil.chown(self.folder, self._user)
            self.folder.chmod(0o755)
        make = ["-D", self.folder / "data", "-U", "postgres", "-A", "trust", "--no-sync"]
        self._run("initdb", *make).communicate()

    @property
    def url(self) -> str:
        """Its address."""
        return f"postgresql+psycopg://postgres@/postgres?host={self.folder}"

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        serve = ["-D", self.folder / "data", "-k", self.folder, "-c", "listen_addresses="]
        self._server = self._run("postgres", *serve, "-c", "fsync=off", "-c", "logging_collector=0")
        assert self._server.stderr is not None
        assert any("ready to accept connections" in line for line in self._server.stderr)
        # It logs each failed statement, and would wait for ever on a pipe that is full.
        threading.Thread(target=self._server.stderr.read, daemon=True).start()

    def stop(self, number: signal.Signals) -> None:
        """Stop it: SIGINT ends its sessions, SIGQUIT ends it at once."""
        if self._server is not None:
            self._server.send_signal(number)
            self._server.wait()
            self._server = None

    def _run(self, program: str, *arguments: str | Path) -> subprocess.Popen[str]:
        folder = programs()
        assert folder is not None
        return subprocess.Popen(
            [folder / program, *arguments],
            user=self._user,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@dataclass
class Place:
    """A folder for runs, and a storage.

    Attributes:
        kind: ``folder``, ``small disk`` or ``PostgreSQL``.
        runs: The folder of runs.
        postgres: The server of the storage; None for SQLite in the study's folder.
    """

    kind: str
    runs: Path
    postgres: Postgres | None = None
    _modes: dict[Path, int] = field(default_factory=dict)

    def fill(self) -> None:
        """Fill the disk to its last byte."""
        with (self.runs / "filler").open("ab", buffering=0) as file:
            for block in (b"\0" * 2**16, b"\0" * 512):
                with contextlib.suppress(OSError):
                    while file.write(block):
                        pass

    def empty(self) -> None:
        """Remove what filled the disk."""
        (self.runs / "filler").unlink()

    def protect(self) -> None:
        """Make every folder read-only."""
        for path in [self.runs, *self.runs.rglob("*")]:
            with contextlib.suppress(OSError):
                if path.is_dir():
                    self._modes[path] = path.stat().st_mode
                    path.chmod(0o555)

    def unprotect(self) -> None:
        """Give the folders their modes back."""
        for path, mode in self._modes.items():
            with contextlib.suppress(OSError):
                path.chmod(mode)
        self._modes.clear()


@contextmanager
def place(kind: str, folder: Path) -> Iterator[Place]:
    """A place of some kind, within a folder that exists."""
    runs = folder / "runs"
    runs.mkdir()
    with contextlib.ExitStack() as stack:
        made = Place(kind, runs)
        if kind == "small disk":
            size = f"size={DISK_MEBIBYTES}m,mode=755"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", runs], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", runs], check=True)
        elif kind == "PostgreSQL":
            (folder / "pg").mkdir()
            made.postgres = Postgres(folder / "pg")
            made.postgres.start()
            stack.callback(made.postgres.stop, signal.SIGQUIT)
        yield made
