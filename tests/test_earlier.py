"""A study that learns from earlier ones: which trials it takes, keeps, and what they change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import tiny
from commands import CommandLine
from strategies import refused

from widthsearch.api import Study
from widthsearch.bayesopt.observation import Observation
from widthsearch.errors import StudyError
from widthsearch.report.tables import front_json, prior_lines
from widthsearch.study.earlier import EarlierStudy
from widthsearch.study.storage import Store
from widthsearch.study.trial import Trial


def first_counts(trial: Trial, epoch: int) -> float:
    """An accuracy that only the first axis raises."""
    return 20 + 4.0 * trial.widths.vector[0] + epoch / 10


def cheap(runs: Path, name: str = "cheap", trials: int = 20) -> Study:
    """An earlier study of the tiny space, of few epochs."""
    made = tiny.study(runs / name, name=name, trials=trials, recipe={"epochs": 2, "batch_size": 32})
    tiny.run(made, first_counts)
    return made


def learner(runs: Path, name: str = "full", **changes: object) -> Study:
    """A study without candidates of its own but the base, which learns from ``cheap``."""
    options = {"prior": "cheap", "proposers": [], "baselines": 0.0, "trials": 12, **changes}
    return tiny.study(runs / name, name=name, **options)


def test_a_study_learns_from_the_finished_trials_of_earlier_ones(tmp_path: Path) -> None:
    """Their widths and values; its suggestions and its estimates know them."""
    before = cheap(tmp_path)
    informed, alone = learner(tmp_path), learner(tmp_path, "alone", prior=[])
    (earlier,) = informed.earlier
    assert (earlier.name, earlier.size) == ("cheap", 20)
    assert earlier.trials["tiny"] == tuple(
        Observation(trial.widths.vector, trial.value) for trial in before.trials()
    )
    lines = [p.message for p in tiny.run(informed, first_counts) if p.level == "event"]
    assert "learning from 20 trials of study 'cheap'" in lines
    tiny.run(alone, first_counts)
    posterior = informed.posterior()
    (correlation,) = posterior.correlations
    assert correlation is not None
    assert correlation > 0.8
    assert alone.posterior().correlations == []
    assert posterior.surrogate is not None
    assert len(posterior.surrogate.fitted.loadings) == 2

    def unneeded(study: Study) -> int:
        """Suggestions that widen the second axis, which is of no use."""
        sampled = [t for t in study.trials() if "sampler" in t.origin]
        return sum(t.widths.vector[1] > 4 for t in sampled)

    assert unneeded(informed) < unneeded(alone) / 2, (unneeded(informed), unneeded(alone))


def test_the_trials_are_kept_as_they_were(tmp_path: Path) -> None:
    """In pieces, with the earlier study changed and removed meanwhile: the same trials."""
    cheap(tmp_path)
    whole = learner(tmp_path, "whole")
    tiny.run(whole, first_counts)
    tiny.run(learner(tmp_path), first_counts, trials=2)
    more = tiny.study(
        tmp_path / "cheap", name="cheap", trials=24, recipe={"epochs": 2, "batch_size": 32}
    )
    tiny.run(more, first_counts)
    tiny.run(learner(tmp_path), first_counts, trials=4)
    shutil.rmtree(tmp_path / "cheap")
    tiny.run(learner(tmp_path), first_counts)
    again = learner(tmp_path)
    assert [t.widths for t in again.trials()] == [t.widths for t in whole.trials()]
    assert again.earlier[0].size == 20
    assert [t.number for t in again.front()] == [t.number for t in whole.front()]
    with again.confirmation(seeds=2) as confirmed:
        assert "confirms" in tiny.ask(confirmed).origin
    with refused(StudyError, "a study keeps its prior", whole=False):
        tiny.run(learner(tmp_path, prior=[]), first_counts)


def test_until_it_begins_the_earlier_study_may_grow(tmp_path: Path) -> None:
    """A driver that began no trial leaves nothing that binds."""
    cheap(tmp_path, trials=8)
    with learner(tmp_path).search():
        pass
    cheap(tmp_path, trials=12)
    tiny.run(learner(tmp_path), first_counts, trials=1)
    store = Store.open(learner(tmp_path).storage, "full")
    assert [study.size for study in store.earlier()] == [12]


def test_several_spaces_learn_from_their_namesakes(tmp_path: Path) -> None:
    """The trials of each space go to the space of that name, those of others are left out."""
    spaces = [tiny.space("tiny"), tiny.space("second")]
    options = {"proposers": [], "baselines": 0.0, "recipe": {"epochs": 2, "batch_size": 32}}
    before = tiny.study(tmp_path / "cheap", spaces, name="cheap", trials=16, **options)
    tiny.run(before, first_counts)
    counts = {
        name: sum(trial.space == name for trial in before.trials()) for name in ("tiny", "second")
    }
    both = tiny.study(
        tmp_path / "both", spaces[::-1], name="both", prior=["cheap"], trials=12, **options
    )
    assert {name: len(own) for name, own in both.earlier[0].trials.items()} == counts
    tiny.run(both, first_counts)
    (correlation,) = both.posterior().correlations
    assert correlation is not None
    assert correlation > 0.5
    one = learner(tmp_path)
    assert {name: len(own) for name, own in one.earlier[0].trials.items()} == {
        "tiny": counts["tiny"]
    }
    last = tiny.study(
        tmp_path / "last", spaces[1], name="last", prior=["cheap"], trials=1, **options
    )
    assert {name: len(own) for name, own in last.earlier[0].trials.items()} == {
        "second": counts["second"]
    }


def test_earlier_studies_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """From two folders: each has a correlation of its own."""
    cheap(tmp_path)
    other = tiny.study(tmp_path / "old" / "cheap", name="cheap", trials=12)
    (tmp_path / "old").mkdir()
    tiny.run(other, lambda trial, epoch: 90 - 4.0 * trial.widths.vector[1])
    study = learner(tmp_path, prior=["cheap", str(tmp_path / "old" / "cheap")])
    tiny.run(study, first_counts)
    posterior = study.posterior()
    first, second = posterior.correlations
    assert first is not None
    assert second is not None
    assert first > 0.8 > second + 0.2
    lines = [line.split(": ")[1] for line in prior_lines(posterior)]
    assert lines == [f"correlation {first:.2f}.", f"correlation {second:.2f}."]
    shown = front_json(study, posterior)["prior"]
    assert [each["correlation"] for each in shown] == [first, second]


def test_an_earlier_study_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """One line each, before anything is stored."""
    cheap(tmp_path)
    rmse = {"name": "rmse", "goal": "minimize"}
    other = tiny.study(tmp_path / "other", tiny.narrower(), name="other", trials=2)
    tiny.run(other, first_counts)
    failing = tiny.study(tmp_path / "failing", name="failing", trials=1)
    with failing.search() as search:
        search.fail(tiny.ask(search).number, "a bug")
    with learner(tmp_path, "begun", trials=1).search():
        pass
    cheap_folder, itself = str(tmp_path / "cheap"), str(tmp_path / "begun")
    iou = {"name": "iou", "goal": "maximize"}
    named = {"metric": iou, "objectives": ["iou", "macs"]}
    tiny.run(tiny.study(tmp_path / "iou", name="iou", trials=2, **named), first_counts)
    narrow = {**named, "metric": {**iou, "range": [0, 1]}}
    cases = {
        f"each once, but {cheap_folder!r} is 'cheap' once more": {"prior": ["cheap", cheap_folder]},
        f"each once, but {itself!r} is this one": {"name": "begun", "prior": [itself]},
        "values within metric.range, [0, 1], but 'iou' has": {"prior": "iou", **narrow},
        "must be a YAML file or have a folder": {"prior": ["chaep"]},
        "did you mean 'cheap'": {"prior": ["chaep"]},
        "prior must name other studies, but 'full' is this one": {"prior": ["cheap", "full"]},
        "must have the metric of this one, but 'cheap' has accuracy to maximize": {"metric": rmse},
        "another base width of axis 'first' (4, not 8)": {"prior": "other"},
        "must have finished trials, but 'failing' has none": {"prior": ["failing"]},
    }
    for message, changes in cases.items():
        with refused(StudyError, message, whole=False):
            tiny.run(learner(tmp_path, **{"name": "full", **changes}), first_counts)
    assert not (tmp_path / "full").exists()


def test_pareto_shows_what_was_learned(tmp_path: Path, command: CommandLine) -> None:
    """The number of trials and the correlation, in the table and as JSON."""
    cheap(tmp_path)
    tiny.run(learner(tmp_path), first_counts)
    shown = command("pareto", "full", "--runs", tmp_path)
    assert (
        "Learned from 20 trials of cheap: correlation 0.9" in shown or "correlation 1.00" in shown
    )
    (prior,) = json.loads(command("pareto", "full", "--json", "--runs", tmp_path))["prior"]
    assert (prior["study"], prior["trials"]) == ("cheap", 20)
    assert 0.8 < prior["correlation"] <= 1


def test_an_earlier_study_goes_through_json() -> None:
    """Widths stay tuples of integers."""
    vector = tuple(np.array([8, 16]).tolist())
    earlier = EarlierStudy("a", {"x": (Observation(vector, 1.5),), "y": (Observation((4,), 2.0),)})
    assert EarlierStudy.from_json(json.loads(json.dumps(earlier.to_json()))) == earlier
