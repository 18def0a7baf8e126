"""Ten drivers at once, each in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commands import CommandLine, small, study_file
from databases import new_database, postgres_server

from widthsearch.study.driver_lock import DriverLock
from widthsearch.study.storage import Store

TEN = r"""
import os
import sys

from widthsearch.errors import WidthsearchError
from widthsearch.study.driver_lock import DriverLock
from widthsearch.study.storage import Store

end, _open = os.pipe()
for _ in range(10):
    if os.fork():
        continue
    os.close(_open)
    try:
        with DriverLock(Store.create(sys.argv[1], "tiny", ("accuracy", "macs"))) as lock:
            lock.store.set_attribute("driver", os.getpid())
            os.write(1, b"drives %d\n" % os.getpid())
            os.read(end, 1)  # until the others have ended
    except WidthsearchError as error:
        os.write(1, f"error: {error}\n".encode())
        os._exit(2)
    os._exit(0)
codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(9)]
os.close(_open)
print("codes", *codes, os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_ten_drivers_at_once(kind: str, tmp_path: Path) -> None:
    """On a database without tables: one drives, and nine say which one does."""
    if kind == "sqlite":
        race(f"sqlite:///{tmp_path / 'study.db'}")
    else:
        with postgres_server() as server, new_database(server) as url:
            race(url)


def race(url: str) -> None:
    """Start ten drivers, and check what they say."""
    done = subprocess.run(
        [sys.executable, "-c", TEN, url], capture_output=True, text=True, timeout=120
    )
    lines = done.stdout.splitlines()
    assert (done.stderr, len(lines)) == ("", 11)
    (driver,) = (line.split()[1] for line in lines if line.startswith("drives "))
    refusal = f"'tiny' is being run by process {driver} on {socket.gethostname()} since 20"
    assert sum(line.startswith("error: ") and refusal in line for line in lines) == 9
    assert lines[-1] == "codes 2 2 2 2 2 2 2 2 2 0"
    store = Store.open(url, "tiny")
    assert store.attribute("driver") == int(driver)
    row = store.fence.read()
    assert (row.token, row.holder) == (1, None)


def test_the_command_line_names_the_driver(command: CommandLine, tmp_path: Path) -> None:
    """One line, exit code 2."""
    study = small(tmp_path)
    study.folder.mkdir(parents=True)
    with DriverLock(Store.create(study.storage, "small", study.config.objectives)):
        error = command.refusal("run", study_file(tmp_path), "--runs", tmp_path / "runs")
    assert f"is being run by process {os.getpid()} on {socket.gethostname()} since 20" in error
