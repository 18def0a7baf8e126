"""Fixtures that several files share."""

from __future__ import annotations

import os
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import torch
from commands import CommandLine
from hypothesis import settings

# A busy machine fails no test. A continuous integration fails by a change, never by chance: there
# hypothesis draws the same examples each time, elsewhere new ones.
settings.register_profile("patient", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("patient")

# Tests commit to hundreds of SQLite files, which is slow on a disk: `tmp_path` is in memory where
# that has room. A suite leaves some 20 MB.
_MEMORY = Path("/dev/shm")
if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 2**31:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line."""
    return CommandLine(capsys)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A database that does not exist yet."""
    return f"sqlite:///{tmp_path / 'study.db'}"


@pytest.fixture(scope="session")
def _end_of_ray() -> Iterator[None]:
    """At the end of the session no Ray is left."""
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file into which the workers of `shared_ray` write each step of the tiny network."""
    return tmp_path_factory.mktemp("steps") / "steps"


@pytest.fixture(scope="module")
def shared_ray(_end_of_ray: None, steps: Path) -> None:
    """Ray with two CPUs, in this process: a study uses it and leaves it running.

    A start of Ray takes 5 s, so all modules that do not test it share one.
    """
    if not ray.is_initialized():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WIDTHSEARCH_TEST_WITNESS", str(steps))
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)


@pytest.fixture(scope="module")
def no_ray() -> None:
    """This process is connected to no Ray: a study starts or joins one."""
    ray.shutdown()


@pytest.fixture
def run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], list[str]]:
    """Runs a block as a script in a folder, but in this process; returns the lines it prints.

    Imports are shared, and with the fixture `shared_ray` Ray is.
    """

    def run_block(block: str) -> list[str]:
        (tmp_path / "example.py").write_text(block)
        monkeypatch.chdir(tmp_path)
        runpy.run_path("example.py", run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run_block
