"""A study keeps its model: the source of its classes, and its output on a fixed input."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from widthsearch.errors import StudyError
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.checks import _changed_code, _described


class Changed(tiny.Net):
    """The tensors of the tiny network, and another function of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1, 4, 4) to (N, 4)."""
        return 2 * super().forward(x)


class Renamed(tiny.Net):
    """The tiny network, by other code."""


class Longer(tiny.Net):
    """The tiny network with an output more."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 1, 4, 4) to (N, 4), twice."""
        return super().forward(x), super().forward(x)


def test_an_output_more_is_a_change() -> None:
    """Before the source is compared: it may not be there."""
    old, new = (
        _described(SearchSpace.from_model(model, (1, 4, 4), name="tiny"))
        for model in (tiny.Net, Longer)
    )
    assert _changed_code(old, new) == "its output on a fixed input has changed"
    assert _changed_code(old, old) is None


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (Changed, "its output on a fixed input has changed"),
        (Renamed, "the source of its classes has changed"),
    ],
)
def test_a_model_whose_code_changed_is_refused(
    tmp_path: Path, model: type[tiny.Net], change: str
) -> None:
    """Two models in one study would be compared as if they were one."""
    tiny.run(tiny.study(tmp_path), trials=1)
    tiny.run(tiny.study(tmp_path), trials=1)  # the same code goes on
    other = SearchSpace.from_model(model, (1, 4, 4), name="tiny", min_width=0.25, step=2)
    with pytest.raises(StudyError, match=f"a study keeps its model, but {change} since 'tiny' was"):
        tiny.run(tiny.study(tmp_path, other), trials=1)
