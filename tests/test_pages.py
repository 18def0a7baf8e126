"""The pages on other libraries' trainers: their blocks run, and a trial of theirs goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_readme import blocks

from widthsearch.space.search_space import SearchSpace
from widthsearch.training.job import Job, TrainingTrial

pytestmark = pytest.mark.filterwarnings("ignore")  # of those libraries

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {"lightning": ("lightning",), "hugging-face": ("transformers", "accelerate")}


@pytest.fixture(params=PAGES)
def block(request: pytest.FixtureRequest) -> str:
    """The one block of a page, where its libraries are installed."""
    for library in PAGES[request.param]:
        pytest.importorskip(library, reason=f"needs {library}: pip install '.[pages]'")
    (found,) = blocks(DOCS / f"{request.param}.md")
    return found


@pytest.mark.ray
def test_a_page_runs(block: str, shared_ray: None, run_here: Callable[[str], list[str]]) -> None:
    """A study whose trainer is the library's prints a front of networks that learned something."""
    lines = run_here(block)
    assert 1 <= len(lines) <= 3
    assert all(float(line.split()[0]) < 0.6 for line in lines)


def test_a_trial_ends_where_it_is_stopped_and_goes_on(block: str, tmp_path: Path) -> None:
    """A stop ends the library's training; a new trial continues from the checkpoint."""
    page: dict[str, Any] = {"__name__": "page"}
    exec(block.partition("\nspace = ")[0], page)
    space = SearchSpace.from_model(page["make_model"], (8,))
    job = Job(page["train"], "page", {"epochs": 3, "lr": 0.01}, 3, "rmse")

    def trial(**more: Any) -> tuple[Any, TrainingTrial[Any]]:
        network = space.build(space.base, seed=0)
        values = {"seed": 0, "folder": tmp_path, **more}
        return network, TrainingTrial(job, network, page["data"](), space.base, **values)

    network, first = trial(on_report=lambda result: result.epoch < 2)
    job.run(network, first)
    assert [result.epoch for result in first.curve] == [1, 2]
    network, second = trial()
    second.load()
    job.run(network, second)
    assert [result.epoch for result in second.curve] == [1, 2, 3]
    assert second.curve[2].value < second.curve[0].value
