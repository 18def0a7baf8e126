"""Databases for tests: SQLite, and a PostgreSQL server where its programs are installed."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy

_NUMBERS = itertools.count()


def _postgres_programs() -> Path | None:
    """The folder of ``initdb`` and ``postgres``: on the path, or Debian's newest."""
    found = shutil.which("initdb")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return Path(found).parent if found else debian[-1].parent if debian else None


@contextmanager
def postgres_server() -> Iterator[str]:
    """A server of its own, on a socket in a temporary folder; yields its address.

    PostgreSQL refuses to run as root, so there it runs as the user ``postgres`` or ``nobody``.
    """
    programs = _postgres_programs()
    if programs is None:
        pytest.skip("needs PostgreSQL's programs initdb and postgres")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("needs psycopg")
    with tempfile.TemporaryDirectory(prefix="postgres") as name:
        folder, data, user = Path(name), Path(name, "data"), None
        if os.getuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            user = "postgres" if "postgres" in names else "nobody"
            shutil.chown(folder, user)
        options = {"user": user, "cwd": folder, "stdout": subprocess.PIPE, "text": True}
        initialise = ["initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"]
        subprocess.run([programs / initialise[0], *initialise[1:]], check=True, **options)
        serve = ["-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
        server = subprocess.Popen(
            [programs / "postgres", *serve], **{**options, "stderr": subprocess.PIPE}
        )
        try:
            assert server.stderr is not None
            assert any("ready to accept connections" in line for line in server.stderr)
            yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
        finally:
            server.send_signal(signal.SIGINT)  # ends sessions, then itself
            server.communicate()


@contextmanager
def new_database(server: str) -> Iterator[str]:
    """The address of a new and empty database of a server; all engines are disposed of after."""
    name = f"test{next(_NUMBERS)}"
    engines = set()

    def keep(connection: sqlalchemy.Connection) -> None:
        engines.add(connection.engine)

    sqlalchemy.event.listen(sqlalchemy.Engine, "engine_connect", keep)
    try:
        engine = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
        yield server.replace("/postgres?", f"/{name}?")
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "engine_connect", keep)
        for engine in engines:
            engine.dispose()
