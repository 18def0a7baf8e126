"""What every test shares: one thread, a cache of its own, and no GPU test without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from tempfile import TemporaryDirectory

import pytest
import torch


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main() -> Iterator[None]:
    """Keep the tests' files out of the user's own cache."""
    with TemporaryDirectory(prefix="widthsearch-cache") as folder:
        os.environ["WIDTHSEARCH_CACHE"] = folder
        return (yield)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests measure behaviour, not speed: one thread keeps them repeatable on any machine."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU tests where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
