"""Ray's memory monitor kills workers while a node is low on memory, as it does here at 1%."""

from __future__ import annotations

import threading
from pathlib import Path

import own
import pytest
from torch import nn

from widthsearch.errors import StudyError
from widthsearch.training.job import TrainingTrial

pytestmark = pytest.mark.ray


def test_a_kill_by_rays_memory_monitor_is_named(
    no_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial is trained once more, alone, then fails with the reason; the next one begins."""

    def train(network: nn.Module, trial: TrainingTrial) -> None:
        threading.Event().wait()

    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    messages: list[str] = []
    study = own.study(tmp_path, trainer=train, proposers=[], trials=2, concurrency=2)
    with pytest.raises(StudyError, match="no finished trial; the last failed: Ray killed its"):
        study.run(lambda progress: messages.append(progress.message))
    for number, trial in enumerate(study.trials()):
        assert str(trial.error).startswith(
            "Ray killed its worker process: 1 worker(s) were killed due to the node running low on "
            "memory. Memory on the node (IP: "
        )
        assert "GB limit" in str(trial.error)
        again = f"trial {number} ran out of memory; it will be trained again by itself"
        assert messages.count(again) == 1
    assert len(study.trials()) == 2
    assert not any("process died" in message for message in messages)
