"""Ray clusters on this machine: a node that dies while a study trains, and a head with tokens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import own
import pytest
import ray
import tiny
from ray.cluster_utils import Cluster

from widthsearch.runner import cluster as cluster_module
from widthsearch.runner.signals import Interrupts
from widthsearch.study.progress import Progress
from widthsearch.utils.references import load_function

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster(no_ray: None) -> Iterator[Cluster]:
    """A head that can hold one trial; tests add nodes."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


def test_a_node_that_dies_costs_no_trial(cluster: Cluster, tmp_path: Path) -> None:
    """Two are lost: one while its first trial starts, the other amid training. The head is left."""
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    cluster.wait_for_nodes()
    recipe = {"epochs": 60, "batch_size": 32, "lr": 0.01, "precision": "fp32"}
    study = tiny.study(tmp_path, ray_address=cluster.address, concurrency=3, recipe=recipe)
    history: list[Progress] = []

    def on_progress(progress: Progress) -> None:
        history.append(progress)
        everywhere = sum(p.running == 3 and p.done >= 1 for p in history)
        if (len(nodes) == 2 and progress.running == 3) or (len(nodes) == 1 and everywhere == 20):
            cluster.remove_node(nodes.pop(0))

    study.run(on_progress)
    assert not nodes
    assert not ray.is_initialized()
    trials = study.trials()
    assert [trial.state for trial in trials] == ["finished"] * 6
    assert all(len(trial.curve) == 60 for trial in trials)
    assert len({trial.widths for trial in trials}) == 6
    assert any("worker process died" in progress.message for progress in history)


WITH_NODES = '''
import helper


def train(network, trial):
    """Reports the node on which it runs, by a module beside this file."""
    x, y = trial.data
    node = helper.node(trial.recipe["meeting"])
    for _ in range(trial.epochs):
        error = (network(x) - y).square().mean().item()
        if not trial.report({"accuracy": 100 / (1 + error), "node": node}):
            return
'''

HELPER = '''
import time
from pathlib import Path

import ray


def node(meeting):
    """The number of this node, once trials run on two."""
    name = ray.get_runtime_context().get_node_id()
    Path(meeting, name).touch()
    deadline = time.monotonic() + 60
    while len(list(Path(meeting).iterdir())) < 2 and time.monotonic() < deadline:
        pass
    return int(name[:12], 16)
'''


def test_own_code_and_data_reach_every_node(cluster: Cluster, tmp_path: Path) -> None:
    """No worker can import the trainer: its file and the module beside it are gone."""
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    files = {"nodes_of_a_cluster.py": WITH_NODES, "helper.py": HELPER}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    train = load_function(f"{tmp_path / 'nodes_of_a_cluster.py'}:train")
    for name in files:
        (tmp_path / name).unlink()
    (tmp_path / "meeting").mkdir()
    study = own.study(
        tmp_path / "study",
        trainer=train,
        recipe={"epochs": 2, "meeting": str(tmp_path / "meeting")},
        ray_address=cluster.address,
        concurrency=2,
    )
    study.run()
    trials = study.trials()
    assert [trial.state for trial in trials] == ["finished"] * 5
    assert len({trial.curve[0].metrics["node"] for trial in trials}) == 2


HEAD_WITH_TOKENS = """
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
print(cluster.address, flush=True)
input()
cluster.shutdown()
"""


TOKEN = "0123456789abcdef" * 4

DRIVER = """
import sys
from pathlib import Path

import tiny

from widthsearch.errors import StudyError

try:
    tiny.study(Path(sys.argv[2]), ray_address=sys.argv[1], trials=1, proposers=[]).run(quiet=True)
    print("trained")
except StudyError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def head_with_tokens() -> Iterator[str]:
    """The address of a head that wants a token."""
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD_WITH_TOKENS],
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert head.stdout is not None
    yield head.stdout.readline().strip()
    head.communicate("end\n")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "RPC error: InvalidAuthToken: Authentication token is missing or incorrect"),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ff" * 32},
            "RPC error: InvalidAuthToken: Authentication token is missing or incorrect",
        ),
        (
            {"RAY_AUTH_MODE": "token"},
            "Token authentication is enabled but no authentication token was found",
        ),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, None),
    ],
    ids=["no mode", "another token", "no token", "the token"],
)
def test_a_cluster_that_wants_a_token_is_joined_or_refused_at_once(
    environment: dict[str, str], reason: str | None, head_with_tokens: str, tmp_path: Path
) -> None:
    """Ray itself repeats its question for half a minute and prints each refusal, or aborts."""
    own_variables = {key: v for key, v in os.environ.items() if not key.startswith("RAY_AUTH")}
    paths = [Path(__file__).parent, Path(cluster_module.__file__).parents[2]]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, head_with_tokens, str(tmp_path / "study")],
        env={
            **own_variables,
            "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
            "HOME": str(tmp_path),  # without a token of its user
            **environment,
        },
        capture_output=True,
        text=True,
    )
    expected = (
        "trained"
        if reason is None
        else f"the Ray cluster at {head_with_tokens!r} cannot be joined: AuthenticationError: "
        f"{reason}; if it was started with a token, set RAY_AUTH_MODE=token and the RAY_AUTH_TOKEN "
        "of the cluster in the environment"
    )
    assert done.stdout == f"{expected}\n"
    assert done.returncode == 0
    assert done.stderr.count("\n") <= 1


def test_a_sigterm_while_ray_starts_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """ray.init sets a handler that raises at once, also where Python ignores exceptions."""
    started, before = [], signal.getsignal(signal.SIGINT)

    def init(**_: object) -> None:
        ray._private.utils.set_sigterm_handler(lambda *_: sys.exit("by Ray's own handler"))
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # blocked
        started.append(True)

    monkeypatch.setattr(ray, "init", init)
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        cluster_module._init(None, interrupts)
    assert started == [True]
    assert signal.getsignal(signal.SIGINT) is before


def test_rays_own_handler_of_sigterm_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its native code sets one that prints a stack, and may abort the process."""

    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    monkeypatch.setattr(ray, "init", init)
    with Interrupts() as interrupts:
        cluster_module._init(None, interrupts)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_ctrl_c_at_the_exit_of_a_command_does_nothing() -> None:
    """Ray ends its processes then; a second Ctrl-C would show a traceback of it."""
    code = (
        "import atexit, signal, sys\n"
        "from widthsearch import cli\n"
        "atexit.register(signal.raise_signal, signal.SIGINT)\n"
        "sys.argv[1:] = ['pareto', 'nowhere']\n"
        "raise SystemExit(cli.process())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
