"""Trainings that start from the weights of a trained base, and their comparison with scratch."""

from __future__ import annotations

import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import own
import pytest
import tiny
import torch
from commands import CommandLine, small
from conformance import small_task
from rich.console import Console
from strategies import space_of
from test_worker import started
from torch import Tensor, nn

from widthsearch.api import Study
from widthsearch.bayesopt.metric import ACCURACY, Metric
from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.channels.masking import masked
from widthsearch.errors import StudyError
from widthsearch.export import load, train
from widthsearch.proposers.tuning import load_weights
from widthsearch.report.starts import base_epochs, compared, start_gains, start_lines, starts_json
from widthsearch.report.tables import front_json, front_tables
from widthsearch.runner.pickling import SharedData
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.config import StudyConfig
from widthsearch.study.starts import (
    BaseWeights,
    Extraction,
    scratch_epochs,
    start_network,
)
from widthsearch.study.trial import Trial, TrialState
from widthsearch.training.recipe import Recipe
from widthsearch.training.trainer import fit

MODELS = ("Residual", "Concatenated", "Grouped")


def trained(space: SearchSpace, seed: int = 3) -> nn.Module:
    """The base network with other statistics than at its start."""
    base = space.unconstrained.build(space.unconstrained.base, seed=seed)
    with torch.no_grad():
        for tensor in base.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand_like(tensor)
    return base.eval()


def weights_file(folder: Path, seed: int = 3) -> str:
    """The weights of the tiny base in a file."""
    path = folder / "base.pt"
    torch.save(trained(tiny.space(), seed).state_dict(), path)
    return str(path)


def images(space: SearchSpace) -> Tensor:
    """Four random inputs."""
    return torch.randn(4, *space.input_shape, generator=torch.Generator().manual_seed(0))


# --- networks ---


@pytest.mark.parametrize("model", MODELS)
def test_at_the_base_widths_it_is_the_base(model: str) -> None:
    """Its outputs, exactly, whatever the seed."""
    space = space_of(model)
    base = trained(space)
    weights = BaseWeights.of(space, base.state_dict(), "magnitude")
    network = Extraction(space, weights).network(space.base, seed=9)
    assert network.training
    with torch.no_grad():
        assert torch.equal(network.eval()(images(space)), base(images(space)))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("importance", ["magnitude", "slimming", "sensitivity", "fisher"])
def test_a_narrower_network_is_the_base_without_its_least_channels(
    model: str, importance: Any
) -> None:
    """It computes what the base does with the others masked; by every importance."""
    space = space_of(model)
    base = trained(space)
    weights = BaseWeights.of(space, base.state_dict(), importance, small_task())
    narrow = space.widths([max(a.min_width, a.base - a.step) for a in space.axes])
    network = Extraction(space, weights).network(narrow, seed=0).eval()
    graph = build_dependency_graph(space.model, space.base)
    keep = {}
    for axis, traced, scores in zip(space.axes, space.trace.axes, weights.scores, strict=True):
        best = np.argsort(-scores, kind="stable")[: narrow[axis.name] // traced.divisor]
        keep[axis.name] = np.flatnonzero(np.isin(graph.group[traced.maker], best)).tolist()
    with torch.no_grad(), masked(space.model, base, keep):
        expected = base(images(space))
    with torch.no_grad():
        assert torch.allclose(network(images(space)), expected, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_a_wider_network_is_the_base_beside_new_channels(model: str) -> None:
    """With the new channels masked it is the base; they have the weights of their seed."""
    space = space_of(model)
    base = trained(space)
    weights = BaseWeights.of(space, base.state_dict(), "magnitude")
    wide = space.widths([axis.max_width for axis in space.axes])
    assert any(wide[name] > space.base[name] for name in space.names)
    extraction = Extraction(space, weights)
    network, scratch = extraction.network(wide, seed=4).eval(), space.build(wide, seed=4)
    graph = build_dependency_graph(space.model, wide)
    keep = {}
    for axis, traced in zip(space.axes, space.trace.axes, strict=True):
        first = np.arange(space.base[axis.name] // traced.divisor)
        keep[axis.name] = np.flatnonzero(np.isin(graph.group[traced.maker], first)).tolist()
    with torch.no_grad(), masked(space.model, network, keep):
        assert torch.allclose(network(images(space)), base(images(space)), atol=1e-5)
    pairs = zip(network.state_dict().values(), scratch.state_dict().values(), strict=True)
    assert any(((ours == theirs) & (theirs != 0)).any() for ours, theirs in pairs)


def test_the_most_important_channels_are_kept() -> None:
    """By hand: filters with a large norm, with their consumers' weights, in their order."""
    space = tiny.space()
    base = trained(space)
    with torch.no_grad():
        base.first.weight.fill_(0.01)  # type: ignore[union-attr, operator]
        base.first.weight[[1, 4, 6]] = 1.0  # type: ignore[index, operator]
        base.first.weight[2] = 0.5  # type: ignore[index, operator]
    weights = BaseWeights.of(space, base.state_dict(), "magnitude")
    network = Extraction(space, weights).network(tiny.widths(4, 8), seed=0)
    kept = [1, 2, 4, 6]
    assert torch.equal(network.first.weight, base.first.weight[kept])  # type: ignore[index, arg-type]
    assert torch.equal(network.second.weight, base.second.weight[:, kept])  # type: ignore[index, arg-type]
    assert torch.equal(network.fc.weight, base.fc.weight)  # type: ignore[arg-type]


def test_pinned_and_tied_axes_are_cut_in_the_unconstrained_space() -> None:
    """Of tied axes each keeps its own best channels."""
    space = tiny.space().constrained(tie=[["first", "second"]])
    base = trained(space)
    weights = BaseWeights.of(space, base.state_dict(), "magnitude")
    network = Extraction(space, weights).network(space.widths([4]), seed=0)
    assert network.first.weight.shape[:2] == (4, 1)
    assert network.second.weight.shape[:2] == (4, 4)


class Padded(nn.Module):
    """A shortcut by zero padding: its channels cannot be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 16, 1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 4, 4) to (N, 4)."""
        x = self.one(x)
        more = self.two.weight.shape[0] - x.shape[1]
        y = self.two(x) + nn.functional.pad(x, (0, 0, 0, 0, 0, more))
        return self.fc(y.mean((2, 3)))


def test_axes_that_cannot_be_cut_are_refused() -> None:
    """With the axis and the way out; pinned, the rest is cut."""
    space = SearchSpace.from_model(Padded, (1, 4, 4), name="padded")
    base = trained(space)
    with pytest.raises(StudyError, match=r"needs channels that can be removed one by one, .*pin"):
        BaseWeights.of(space, base.state_dict(), "magnitude")


# --- weights ---


def test_weights_of_other_files(tmp_path: Path) -> None:
    """Of a folder, or as safetensors; a file that is not there is refused in one line."""
    base = trained(tiny.space())
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(dict(base.state_dict()), tmp_path / "a.safetensors")
    torch.save(base.state_dict(), tmp_path / "weights.pt")
    for path in (tmp_path / "a.safetensors", tmp_path):
        other = tiny.space().build(tiny.space().base, seed=1)
        load_weights(other, str(path))
        assert torch.equal(other.first.weight, base.first.weight)  # type: ignore[arg-type]
    settings = {"start": "extract", "weights": str(tmp_path / "b.pt")}
    with pytest.raises(StudyError, match=r"weights must be a checkpoint .* b\.pt|'.*b\.pt' cannot"):
        _ = tiny.study(tmp_path, **settings).base_weights


# --- configurations ---


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"start": "extract"}, "start 'extract' and weights go together, but start is [extract] "),
        ({"weights": "a.pt"}, "start 'extract' and weights go together, but start is [scratch] "),
        ({"start": []}, "start must be scratch, extract, or a list without repetition that begin"),
        ({"start": ["scratch"] * 2}, "start must be scratch, extract, or a list without repetitio"),
        ({"start": ["scratch", "scratch_b"]}, "start 'scratch_b' is compared with 'extract', but"),
        (
            {"start": ["scratch", "extract"], "weights": "a.pt", "trials": 7},
            "trials must be a multiple of the number of starts, since each network is trained from",
        ),
        (
            {"start": "extract", "weights": "a.pt", "spaces": ["a:b", "c:d"]},
            "weights are of one space's base, but spaces are a:b, c:d: make a study of each",
        ),
        ({"start": "pruned"}, "start.0 must be 'scratch', 'extract' or 'scratch_b', but was 'pr"),
        ({"importance": "l1"}, "importance must be 'magnitude', 'slimming', 'sensitivity' or 'fi"),
    ],
)
def test_starts_that_break_a_rule(keys: dict[str, Any], message: str) -> None:
    """One line, when the configuration is made."""
    with pytest.raises(StudyError) as caught:
        StudyConfig(**{"name": "a", "trials": 4, **keys})
    assert message in str(caught.value)


def test_weights_that_changed_are_refused(tmp_path: Path) -> None:
    """Trials of one study start from the same weights; before one has begun they may change."""
    file = weights_file(tmp_path)
    settings = {"start": "extract", "weights": file, "trials": 2}
    tiny.run(tiny.study(tmp_path / "a", **settings), trials=1)
    weights_file(tmp_path, seed=4)
    message = "a study keeps the weights that it starts from, but the content of '.*base.pt' or its"
    with pytest.raises(StudyError, match=message), tiny.study(tmp_path / "a", **settings).search():
        pass
    changed = {**settings, "importance": "fisher"}
    other = tiny.study(tmp_path / "a", **changed)
    with pytest.raises(StudyError, match="keeps its importance"), other.search():
        pass


# --- trials ---


def test_trials_start_from_the_base_and_resume_exactly(tmp_path: Path) -> None:
    """A worker trains the cut network; a checkpoint of other weights is refused."""
    base = trained(tiny.space())
    weights = BaseWeights.of(tiny.space(), base.state_dict(), "magnitude")
    shared = SharedData.of(weights, "the weights")

    def worker(folder: Path, weights: SharedData = shared) -> Any:
        made = started(folder, weights=weights)
        made.start_trial(3, "tiny", [4, 6], seed=5, start="extract")
        return made

    whole = worker(tmp_path / "whole")
    curves = [whole.step().curve for _ in range(4)]
    network = Extraction(tiny.space(), weights).network(tiny.widths(4, 6), seed=5)
    recipe = Recipe(epochs=4, batch_size=32, precision="fp32")
    expected = fit(network, tiny.task(), recipe, seed=5)
    assert [r.value for r in curves[3]] == [r.value for r in expected]
    assert [r.loss for r in curves[3]] == [r.loss for r in expected]
    one = worker(tmp_path / "killed")
    one.step(), one.step()
    again = worker(tmp_path / "killed")
    assert again.step().curve[-1].loss == curves[1][-1].loss
    assert again.step().curve[-1].loss == curves[2][-1].loss
    others = BaseWeights.of(tiny.space(), trained(tiny.space(), 4).state_dict(), "magnitude")
    other = worker(tmp_path / "killed", SharedData.of(others, "the weights"))
    assert "run.weights=" in other.step().note


def test_scratch_b_lasts_longer(tmp_path: Path) -> None:
    """In the recipe, so that its schedule ends with the last epoch."""
    worker = started(tmp_path)
    worker.start_trial(3, "tiny", [4, 6], seed=5, start="scratch_b", epochs=7)
    curve = [worker.step().curve for _ in range(7)][-1]
    recipe = Recipe(epochs=7, batch_size=32, precision="fp32")
    expected = fit(tiny.space().build([4, 6], seed=5), tiny.task(), recipe, seed=5)
    assert [r.loss for r in curve] == [r.loss for r in expected]
    assert scratch_epochs(4, of_base=10, base_macs=300, macs=100) == 34


def studied(folder: Path, starts: list[str], trials: int, **changes: Any) -> Study:
    """A study from several starts with the weights of a trained folder of ten epochs."""
    trained_folder = folder / "trained"
    trained_folder.mkdir(parents=True, exist_ok=True)
    torch.save(trained(tiny.space()).state_dict(), trained_folder / "weights.pt")
    (trained_folder / "card.json").write_text(json.dumps({"recipe": {"epochs": 10}}))
    settings = {"start": starts, "weights": str(trained_folder), "trials": trials, **changes}
    return tiny.study(folder / "study", **settings)


def by_start(trial: Trial, epoch: int) -> float:
    """Extracted weights are two points better, and scratch_b three, with some scatter."""
    gain = {"scratch": 0.0, "extract": 2.0, "scratch_b": 3.0}[trial.start]
    return 50 + gain + 0.1 * (trial.widths.vector[0] % 3) * (gain > 0) + sum(trial.widths.vector)


def test_each_network_is_trained_from_each_start(tmp_path: Path) -> None:
    """With one seed, the first start first; the search and the front see that one alone."""
    study = studied(tmp_path, ["scratch", "extract", "scratch_b"], 12)
    tiny.run(study, by_start)
    trials = study.trials()
    assert len(trials) == 12
    networks = compared(trials)
    assert len(networks) == 4
    base = tiny.space().cost(tiny.space().base).macs
    for of in networks:
        assert list(of) == ["scratch", "extract", "scratch_b"]
        assert len({(t.widths, t.seed) for t in of.values()}) == 1
        longer = scratch_epochs(4, 10, base, of["scratch"].cost.macs)
        assert [len(t.curve) for t in of.values()] == [4, 4, longer]
    posterior = study.posterior()
    assert {t.start for t in posterior.members} == {"scratch"}
    assert posterior.value(posterior.members[0]) == posterior.members[0].value
    assert all(posterior[t].trainings == 1 for t in posterior.members)
    assert base_epochs(study) == 10
    gains = {gain.rival: gain for gain in start_gains(networks, ACCURACY)}
    assert 2 < gains["scratch"].mean < 2.3
    assert -1.3 < gains["scratch_b"].mean < -0.9
    content = front_json(study, posterior)["starts"]
    assert content["gains"]["scratch"]["equal"] == "cost"
    assert len(content["networks"]) == 4
    printed = io.StringIO()
    Console(file=printed, width=250).print(front_tables(study, posterior))
    text = printed.getvalue()
    assert "the same networks from several starts" in text
    assert "points at equal training compute, the base's included (mean over 4 networks" in text


def test_a_killed_comparison_goes_on(tmp_path: Path) -> None:
    """After any trial a new driver trains what is left, each network once a start."""
    for done in range(1, 6):
        study = studied(tmp_path / str(done), ["extract", "scratch"], 6)
        tiny.run(study, by_start, trials=done)
        tiny.run(study, by_start)
        networks = compared(study.trials())
        assert [len(of) for of in networks] == [2, 2, 2]
        assert len(study.trials()) == 6
        assert {t.start for t in study.posterior().members} == {"extract"}


def test_comparisons_wait_for_their_networks(tmp_path: Path) -> None:
    """With several trials at once no budget is left for a network without its comparison."""
    study = studied(tmp_path, ["scratch", "extract"], 4, concurrency=4)
    with study.search() as search:
        first, second = tiny.ask(search), tiny.ask(search)
        assert search.ask() is None
        for trial in (second, first):
            search.report(trial.number, tiny.curve(1, 2, 3, 50.0 + trial.number))
        comparisons = [tiny.ask(search), tiny.ask(search)]
        assert [t.origin["compares"] for t in comparisons] == [first.number, second.number]
        assert search.ask() is None
        search.fail(comparisons[0].number, "it is broken")
        search.report(comparisons[1].number, tiny.curve(1, 2, 3, 60))
        assert search.done
    with study.search(retry=True) as search:  # the comparison that failed, and nothing else
        again = tiny.ask(search)
        assert (again.origin, again.seed) == (comparisons[0].origin, comparisons[0].seed)
        assert search.ask() is None


def test_gains_by_hand() -> None:
    """The mean of the differences and its t interval; a lower value is better for an error."""
    rmse = Metric("rmse", "minimize")
    trials = []
    for i, (scratch, extract) in enumerate([(2.0, 1.0), (3.0, 2.5), (4.0, 4.0)]):
        own = tiny.finished(2 * i, tiny.widths(2, 2 + 2 * i), scratch)
        trials.append(own)
        origin = {"compares": 2 * i, "start": "extract"}
        trials.append(tiny.finished(2 * i + 1, own.widths, extract, origin=origin))
    lost = {"compares": 0, "start": "extract"}
    trials.append(replace(trials[1], number=9, origin=lost, state=TrialState.STOPPED))
    (gain,) = start_gains(compared(trials), rmse)
    assert gain.mean == pytest.approx(0.5)
    assert gain.half == pytest.approx(2.92 * 0.5 / 3**0.5, rel=1e-3)
    lines = start_lines(compared(trials), rmse, None, None)
    assert lines[0].startswith(
        "Gain of extracted weights over scratch: +0.500 ±0.843 rmse at equal"
    )
    assert "its epochs are unknown" in lines[1]
    lines = start_lines(compared(trials), rmse, 10, 1000)
    assert "took 100.0 times the compute" in lines[1]
    content = starts_json(compared(trials), rmse)
    assert content["gains"]["scratch"]["networks"] == 3
    assert start_gains(compared(trials[:2]), rmse)[0].half is None


def test_a_pick_is_trained_in_full_from_the_base(tmp_path: Path) -> None:
    """The folder's weights are those of a training that started from the cut network."""
    file = weights_file(tmp_path)
    study = tiny.study(tmp_path / "a", start="extract", weights=file, trials=2)
    tiny.run(study)
    pick = study.pick("best")
    assert pick.start == "extract"
    card = train(study, pick, seeds=1, epochs=1, folder=tmp_path / "out")
    assert card["origin"]["start"] == "extract"
    (seed,) = map(int, card["test_accuracy"]["by_seed"])
    network = start_network(study.space, pick.widths, study.base_weights, seed)
    task = replace(tiny.task(), train=tiny.task().train.joined(tiny.task().validation))
    recipe = replace(study.resolve_recipe(), epochs=1)  # type: ignore[type-var]
    fit(network, task, recipe, seed=seed)  # type: ignore[arg-type]
    got = load(tmp_path / "out", tiny.space()).state_dict()
    assert all(torch.equal(got[key], value) for key, value in network.state_dict().items())


def test_a_base_must_not_have_seen_the_validation_split(tmp_path: Path) -> None:
    """A final training has; one on the search's data learns from the training split alone."""
    study = tiny.study(tmp_path / "a", trials=1)
    tiny.run(study)
    base, trained = study.pick("best"), tmp_path / "a" / "trained"
    train(study, base, seeds=1, epochs=1, program=False)
    settings = {"start": "extract", "weights": str(trained / "0"), "trials": 1}
    for weights in (trained / "0", trained / "0" / "weights.pt"):
        settings["weights"] = str(weights)
        with pytest.raises(StudyError, match="have seen the validation split of task 'tiny'"):
            _ = tiny.study(tmp_path / "b", **settings).base_weights
    others = replace(tiny.task(), names=("ant", "bee", "cat", "dog"))  # another folder of images
    other = Study(tiny.config(**settings), tiny.space(), others, folder=tmp_path / "other")
    assert other.base_weights is not None
    card = train(study, base, seeds=1, epochs=1, program=False, search_data=True)
    settings["weights"] = str(trained / "0-search-data")
    assert card["split"] == "validation"
    (seed,) = map(int, card["validation_accuracy"]["by_seed"])
    network = study.space.build(study.space.base, seed=seed)
    recipe = replace(study.resolve_recipe(), epochs=1)  # type: ignore[type-var]
    (result,) = fit(network, tiny.task(), recipe, seed=seed)  # type: ignore[arg-type]
    assert card["validation_accuracy"]["mean"] == result.value
    found = tiny.study(tmp_path / "c", **settings).base_weights
    assert found is not None
    assert all(torch.equal(found.state[key], value) for key, value in network.state_dict().items())


def test_importances_that_read_data_need_a_loss(tmp_path: Path) -> None:
    """Of a study with a trainer of its own."""
    config = StudyConfig(
        name="a",
        trainer="own:train",
        recipe={"epochs": 1},
        trials=1,
        start="extract",
        weights=weights_file(tmp_path),
        importance="fisher",
    )
    with pytest.raises(StudyError, match="importance 'fisher' reads data, but the study has a tra"):
        _ = Study(config, tiny.space(), folder=tmp_path).base_weights
    config = config.model_copy(update={"importance": "magnitude"})
    assert Study(config, tiny.space(), folder=tmp_path).base_weights is not None
    both = config.model_copy(update={"start": ("extract", "scratch_b")})
    with pytest.raises(StudyError, match="`scratch_b` needs the epochs of the base's training"):
        _ = Study(both, tiny.space(), folder=tmp_path).base_weights


def test_the_way_out_of_weights_of_another_network_works_as_written(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A final training of a narrower network names a training of the base, and the base's as well.

    That of the narrower network on the search's data would not do.
    """
    monkeypatch.chdir(tmp_path)
    recipe = {"epochs": 1, "precision": "fp32"}
    study = small(tmp_path, trials=2, recipe=recipe)
    tiny.run(study)
    for number in (0, 1):
        train(study, study.pick(number), seeds=1, program=False)
    settings = {"name": "cut", "start": "extract", "trials": 1, "recipe": recipe}
    fault = "weights must be of the space's base network, whose 'conv1.weight' has the shape (16, "
    for number, reason in ((1, fault), (0, "have seen the validation split of task 'digits'")):
        with pytest.raises(StudyError) as caught:
            _ = small(tmp_path, **settings, weights=f"runs/small/trained/{number}").base_weights
        assert reason in str(caught.value)
        (way,) = re.findall("train the base by `widthsearch (.*)`, and name", str(caught.value))
        assert way == "train small --pick 0 --search-data --out FOLDER"
    command(*shlex.split(way), "--seeds", 1, "--no-program")
    assert small(tmp_path, **settings, weights="FOLDER").base_weights is not None


def test_weights_of_a_final_training_of_an_own_trainer_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether its data has the validation split is not known; the search's data has it not."""
    study = own.study(tmp_path / "own", trials=1, final_data=own.data)
    with study.search() as search:
        tiny.drive(search)
    for search_data in (True, False):
        folder = tmp_path / f"base-{search_data}"
        train(study, study.pick(0), seeds=1, folder=folder, program=False, search_data=search_data)
        settings = {"start": "extract", "weights": str(folder), "name": "cut"}
        assert own.study(tmp_path / "cut", **settings).base_weights is not None
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == (not search_data)
    assert lines == [
        f"the weights of {str(folder)!r} are of a final training; if its data has the validation "
        "split, on which networks are compared, train the base by `widthsearch train own --pick 0 "
        "--search-data --out FOLDER`, and name that folder"
    ]
