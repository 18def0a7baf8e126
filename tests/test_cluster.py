"""A Ray cluster of two nodes on this machine, one of which dies in the middle of a study."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import tiny
from ray.cluster_utils import Cluster

from widthsearch.api import Study
from widthsearch.study.progress import Progress

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head with a place for one trial; nodes can be added."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


def test_a_node_that_dies_costs_no_trial(cluster: Cluster, tmp_path: Path) -> None:
    """Its trial goes on elsewhere; the study ends with every trial finished."""
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    settings = tiny.config(
        ray_address=cluster.address,
        trials=6,
        concurrency=2,
        recipe={"epochs": 60, "batch_size": 32, "lr": 0.01, "precision": "fp32"},
    )
    study = Study(settings, tiny.space(), tiny.task(), folder=tmp_path)
    heard: list[Progress] = []

    removed = False

    def hear(progress: Progress) -> None:
        nonlocal removed
        heard.append(progress)
        # Both have been training for a while: one on each node.
        both = sum(p.running == 2 and p.done >= 1 for p in heard)
        if not removed and both == 20:
            removed = True
            cluster.remove_node(node)

    study.run(hear)
    assert removed
    assert not ray.is_initialized()
    trials = study.trials()
    assert [trial.state for trial in trials] == ["finished"] * 6
    assert all(len(trial.curve) == 60 for trial in trials)
    assert len({trial.widths for trial in trials}) == 6
    assert any("worker process died" in progress.message for progress in heard)
