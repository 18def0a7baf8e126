"""Settings of all tests and doctests: one thread, a cache of their own, GPU tests only on a GPU.

The file lies at the root so that it also serves the doctests of the package.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from tempfile import TemporaryDirectory

import pytest
import torch


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main() -> Iterator[None]:
    """Give the tests a cache folder of their own instead of the user's."""
    with TemporaryDirectory(prefix="widthsearch-cache") as folder:
        os.environ["WIDTHSEARCH_CACHE"] = folder
        return (yield)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Run torch on one thread, so that results are the same on any machine.

    For each test: the built-in trainer sets the threads of its process.
    """
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU tests on a machine without a GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
