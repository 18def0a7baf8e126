"""A study: found by name, claimed once, compared with its storage, read without a space."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import tiny
import torch
import yaml
from torch import nn

import widthsearch.study.checks
import widthsearch.study.driver
from widthsearch.api import Study
from widthsearch.errors import (
    DataError,
    DeviceError,
    SpaceError,
    StorageError,
    StudyError,
    WidthsError,
)
from widthsearch.proposers import Proposal, Setting
from widthsearch.proposers.sensitivity import Sensitivity
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.progress import Progress
from widthsearch.study.storage import Store
from widthsearch.training.autotune import ConcurrencyProbe, PrecisionProbe
from widthsearch.training.trainer import check_input_shape


def test_trials_and_front_are_read_without_space_or_task(tmp_path: Path) -> None:
    """A study made in Python, found again by its name."""
    tiny.run(tiny.study(tmp_path / "tiny"))
    study = Study.load("tiny", runs=tmp_path)
    assert [trial.number for trial in study.trials()] == list(range(6))
    front = study.front()
    assert [member.cost.macs for member in front] == sorted(m.cost.macs for m in front)
    assert {member.number for member in front} <= set(range(6))
    assert study.trials()[0].widths == tiny.space().base
    with pytest.raises(
        StudyError, match=r"study 'tiny' names no space: add `space: torchvision:NAME` or"
    ):
        study.run()


def test_a_study_is_found_by_name_folder_or_yaml(tmp_path: Path) -> None:
    """All three are the same study, with the same folder."""
    runs = tmp_path / "runs"
    file = tmp_path / "anything.yaml"
    file.write_text(yaml.safe_dump({"name": "tiny", "trials": 3}))
    study = Study.load(file, runs=runs)
    assert study.folder == runs / "tiny"
    tiny.run(tiny.study(runs / "tiny", trials=3))
    for reference in ("tiny", runs / "tiny", str(runs / "tiny")):
        found = Study.load(reference, runs=runs)
        assert found.folder == runs / "tiny"
        assert len(found.trials()) == 3


def test_a_missing_study_is_an_error(tmp_path: Path) -> None:
    """The message suggests the closest name."""
    with pytest.raises(StudyError, match=f"in '{tmp_path}', but there is no 'tiny'; give a"):
        Study.load("tiny", runs=tmp_path)
    tiny.run(tiny.study(tmp_path / "tiny", trials=1))
    with pytest.raises(StudyError, match="there is no 'tinny'; did you mean 'tiny'"):
        Study.load("tinny", runs=tmp_path)


def test_a_study_without_a_run_has_no_trials(tmp_path: Path) -> None:
    """The error says so, and reading makes no files."""
    study = tiny.study(tmp_path / "tiny")
    place = tmp_path / "tiny" / "study.db"
    message = rf"has no trials yet: run it first, or .* --runs FOLDER \(looked in .*{place}\)"
    with pytest.raises(StudyError, match=message):
        study.trials()
    assert not (tmp_path / "tiny").exists()


def test_another_space_under_the_same_name_is_refused(tmp_path: Path) -> None:
    """The study does not change."""
    tiny.run(tiny.study(tmp_path, trials=2))
    before = (tmp_path / "study.yaml").read_text()
    with pytest.raises(StudyError) as caught:
        tiny.run(tiny.study(tmp_path, tiny.space("other"), trials=9))
    assert str(caught.value) == (
        "a study keeps its space, but 'tiny' was begun with 'tiny' (2 axes, 10,400 MACs) and is "
        "now given 'other' (2 axes, 10,400 MACs): put the space back, or give the study another "
        "name"
    )
    assert (tmp_path / "study.yaml").read_text() == before
    tiny.run(tiny.study(tmp_path, trials=3))


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"recipe": {"epochs": 5, "batch_size": 32}}, "recipe.epochs=4 and now has 5"),
        ({"objectives": ["accuracy", "params"]}, r"objectives=\['accuracy', 'macs'\]"),
        ({"seed": 1}, "seed=0 and now has 1"),
        ({"task": "digits"}, "task=None and now has"),
    ],
)
def test_changes_that_make_trials_incomparable_are_refused(
    tmp_path: Path, changes: dict[str, Any], place: str
) -> None:
    """With the place, what it was, and what it is now."""
    tiny.run(tiny.study(tmp_path, trials=2))
    with pytest.raises(StudyError, match=place) as caught:
        tiny.run(tiny.study(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_network_is_picked(tmp_path: Path) -> None:
    """By estimated accuracy from the front; by its ID any finished trial."""
    study = tiny.study(tmp_path, trials=12)
    tiny.run(study)
    front = study.front()
    assert study.pick("best") == max(front, key=study.posterior().value)
    assert study.pick() in front
    assert [study.pick(trial.number) for trial in study.trials()] == study.trials()
    with pytest.raises(StudyError, match="99"):
        study.pick(99)


def test_before_its_first_trial_a_study_may_become_another(tmp_path: Path) -> None:
    """Until then only the objectives are fixed."""
    with tiny.study(tmp_path).search():
        pass
    recipe = {"epochs": 3, "batch_size": 16}
    study = tiny.study(tmp_path, tiny.space(min_width=0.5), recipe=recipe, seed=5, trials=2)
    tiny.run(study)
    assert [len(trial.curve) for trial in study.trials()] == [3, 3]
    with pytest.raises(StudyError, match="a study keeps its seed"):
        tiny.run(tiny.study(tmp_path, recipe=recipe))
    with tiny.study(tmp_path / "other").search():
        pass
    with pytest.raises(StudyError, match="a study keeps its objectives"):
        tiny.run(tiny.study(tmp_path / "other", objectives=["accuracy", "params"]))


def test_budgets_below_every_network_are_left_out(tmp_path: Path) -> None:
    """A message names them; if none is left, that is an error."""
    study = tiny.study(tmp_path, budgets=[0.001, 0.5])
    progress = tiny.run(study)
    assert {t.origin["budget"] for t in study.trials() if "budget" in t.origin} == {0.5}
    narrowest = "budgets 0.001 are left out: the narrowest network has 0.084 of the base's MACs"
    assert narrowest in [each.message for each in progress]
    with pytest.raises(WidthsError, match="is below the narrowest network"):
        tiny.run(tiny.study(tmp_path / "other", budgets=[0.001]))


def test_limits_bind_what_is_trained_and_the_front(tmp_path: Path) -> None:
    """All but the base, which is on no front; and some network must fit."""
    sizes = {"limits": {"macs": (0, 4000)}, "budgets": [0.3, 2.0]}
    study = tiny.study(tmp_path, proposers=["sensitivity"], trials=9, **sizes)
    messages = [each.message for each in tiny.run(study)]
    left = (
        "1 proposed and 1 baseline candidates are left out, of budgets 2: their costs are outside"
    )
    assert f"{left} the limits (macs [0, 4000])" in messages
    base, *others = study.trials()
    assert base.cost.macs > 4000
    assert all(trial.cost.macs <= 4000 for trial in others)
    assert any("baseline" in trial.origin for trial in others)
    assert all(trial.cost.macs <= 4000 for trial in study.front())
    with pytest.raises(StudyError, match=r"limits.macs is \[0, 10\] and networks have 872 to "):
        tiny.run(tiny.study(tmp_path / "other", limits={"macs": (0, 10)}))


@pytest.mark.parametrize("classes", [3, 5])
def test_a_network_that_does_not_fit_the_data_is_refused(tmp_path: Path, classes: int) -> None:
    """Four outputs for three or five classes: before anything is written."""
    task = replace(tiny.task(), classes=classes)
    study = Study(tiny.config(), tiny.space(), task, folder=tmp_path / "x")
    with pytest.raises(DataError, match=f"give its last layer {classes} outputs"):
        tiny.run(study)
    assert not (tmp_path / "x").exists()


def test_a_torchvision_model_has_the_classes_of_the_task(tmp_path: Path) -> None:
    """Four outputs instead of ImageNet's thousand; those where a study names no task."""
    config = tiny.config(space="torchvision:resnet18", input=(3, 32, 32))
    for task, outputs in ((tiny.task(), 4), (None, 1000)):
        space = Study(config, task=task, folder=tmp_path).space
        assert space.build(space.base, initialise=False).fc.out_features == outputs


def test_a_space_traced_at_a_sample_tensor_is_driven(tmp_path: Path) -> None:
    """A float tensor of the images' shape; several inputs are refused in one line."""
    space = SearchSpace.from_model(tiny.Net, torch.zeros(1, 4, 4), name="tiny")
    study = tiny.study(tmp_path / "tensor", space, trials=2)
    tiny.run(study)
    assert len(study.trials()) == 2

    class Pair(tiny.Net):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(x + y)

    pair = SearchSpace.from_model(Pair, ((1, 4, 4), (1, 4, 4)))
    with pytest.raises(DataError, match=r"was traced at \[\[1, 4, 4\], \[1, 4, 4\]\]") as caught:
        tiny.run(tiny.study(tmp_path / "pair", pair))
    assert "\n" not in str(caught.value)
    assert "a study takes one image-like input" in str(caught.value)
    assert "set `input:" not in str(caught.value)
    assert not (tmp_path / "pair").exists()


@pytest.mark.parametrize(
    ("shape", "way"),
    [
        ((3, 4, 4), r"the model takes 3 channels and the task's images have 1: use another task"),
        ((1, 8, 8), r"set `input: \[1, 4, 4\]` for a torchvision model"),
    ],
)
def test_another_size_can_be_set_but_other_channels_cannot(
    shape: tuple[int, ...], way: str
) -> None:
    """A model's first layer has its channels; only the size of the images is free."""
    net = torch.nn.Sequential(torch.nn.Conv2d(shape[0], 8, 3), torch.nn.Conv2d(8, 4, 1))
    with pytest.raises(DataError, match=way):
        check_input_shape(SearchSpace.from_model(net, shape), tiny.task())


def test_a_proposers_fields_are_checked_before_anything_begins(tmp_path: Path) -> None:
    """Not where the configuration is read, since that would import the method."""
    study = tiny.study(tmp_path / "x", proposers=["uniform", {"method": "uniform", "member": 2}])
    with pytest.raises(StudyError, match=r"unknown key 'proposers\.1\.member'; did you mean"):
        tiny.run(study)
    assert not (tmp_path / "x").exists()


def test_a_kill_leaves_the_old_configuration_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a part of a file, which no later run could read."""
    tiny.run(tiny.study(tmp_path, trials=1))
    before = (tmp_path / "study.yaml").read_text()

    def killed(self: Path, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tiny.study(tmp_path, trials=2))
    assert (tmp_path / "study.yaml").read_text() == before


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    """Before anything is written."""
    study = tiny.study(tmp_path / "large", recipe={"epochs": 4, "batch_size": 64})
    with pytest.raises(StudyError, match="batch_size=64 and task 'tiny' has 32 training images"):
        tiny.run(study)
    assert not (tmp_path / "large").exists()


def test_no_proposers_and_no_baselines_leave_the_sampler(tmp_path: Path) -> None:
    """The base, and then suggestions."""
    study = tiny.study(tmp_path, proposers=[], baselines=0.0)
    tiny.run(study)
    assert [trial.origin for trial in study.trials()[1:]] == 5 * [{"sampler": "search"}]


def test_the_extent_of_a_search_may_change(tmp_path: Path) -> None:
    """More trials, another concurrency, other rungs, other budgets, other bounds."""
    tiny.run(tiny.study(tmp_path, trials=2))
    rungs = {"kind": "rungs", "first_epoch": 1, "eta": 2}
    extent = {"trials": 7, "concurrency": 2, "budgets": [0.3], "proposers": ["random"]}
    study = tiny.study(tmp_path, tiny.space(min_width=0.5), early_stopping=rungs, **extent)
    tiny.run(study)
    assert len(study.trials()) == 7


def test_a_space_of_another_input_shape_is_refused(tmp_path: Path) -> None:
    """Its costs would be wrong for the task's images."""
    study = Study(tiny.config(task="digits"), tiny.space(), folder=tmp_path / "x")
    with pytest.raises(DataError, match=r"traced at \[1, 4, 4\] and the images of 'digits' are"):
        tiny.run(study)
    assert not (tmp_path / "x").exists()


def test_a_study_without_a_task_is_an_error(tmp_path: Path) -> None:
    """The message shows both forms of the section."""
    with pytest.raises(StudyError, match=r"`task: digits` or `task: \{name: image_folder, folder:"):
        tiny.run(Study(tiny.config(), tiny.space(), folder=tmp_path))


def test_two_drivers_are_refused(tmp_path: Path) -> None:
    """The second one changes nothing."""
    with (
        tiny.study(tmp_path).search(),
        pytest.raises(StudyError, match="is being run by process"),
        tiny.study(tmp_path, trials=9).search(),
    ):
        pass
    assert Study.load(tmp_path).config.trials == 6


def test_proposers_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed study reads their proposals from its storage, unless their fields changed."""
    asked: list[int] = []

    def counted(self: Sensitivity, space: Any, task: Any, setting: Setting) -> Proposal:
        assert task.test is None
        asked.append(setting.seed)
        return Proposal("sensitivity", (space.base,), {})

    monkeypatch.setattr(Sensitivity, "__call__", counted)
    tiny.run(tiny.study(tmp_path, trials=2, proposers=["sensitivity"]))
    tiny.run(tiny.study(tmp_path, trials=3, proposers=["sensitivity"]))
    assert asked == [0]


def test_latency_is_measured_where_it_is_an_objective(tmp_path: Path) -> None:
    """On the scale of one measurement of the base model, also after a resume."""
    settings: dict[str, Any] = {
        "objectives": ["accuracy", "macs", "latency_ms"],
        "latency": {"pairs": 4},
    }
    tiny.run(tiny.study(tmp_path, trials=2, **settings), trials=1)
    study = tiny.study(tmp_path, trials=4, **settings)
    tiny.run(study)
    latencies = [trial.latency for trial in study.trials()]
    assert len({latency.base_ms for latency in latencies if latency is not None}) == 1
    assert len(latencies) == 4


def test_precision_is_decided_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one probe, for all trials, proposers and the final training; one that is named stays."""

    def probe(*_: Any, **__: Any) -> PrecisionProbe:
        monkeypatch.setattr(widthsearch.study.driver, "probe_precision", None)  # never again
        return PrecisionProbe("bf16", 2.0, 5, "cpu", 1)

    monkeypatch.setattr(widthsearch.study.driver, "probe_precision", probe)
    study = tiny.study(tmp_path / "a", trials=4)
    tiny.run(study, trials=1)
    for again in (study, tiny.study(tmp_path / "a", trials=4)):
        with again.search() as search:
            assert search.config.recipe.precision == again.resolve_recipe().precision == "bf16"
        assert again.config.recipe.precision == "auto"
    stored = Store.open(study.storage, "tiny").attribute("precision")
    assert (stored["precision"], stored["speedup"]) == ("bf16", 2.0)
    recipe = {**tiny.config().to_json()["recipe"], "precision": "fp32"}
    with tiny.study(tmp_path / "b", recipe=recipe).search() as search:
        assert search.config.recipe.precision == "fp32"


def test_concurrency_is_probed_once_per_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one probe of as many as the cores allow, reported and kept; another machine probes."""
    asked: list[Sequence[int]] = []

    def probe(*_: Any, numbers: Sequence[int], **__: Any) -> ConcurrencyProbe:
        asked.append(list(numbers))
        return ConcurrencyProbe({1: 100.0, 2: 150.0, 4: 140.0}, "cpu", 1, None)

    monkeypatch.setattr(widthsearch.study.driver, "probe_concurrency", probe)
    monkeypatch.setattr(widthsearch.study.driver, "cores", lambda: 6)
    progress: list[Progress] = []
    for _ in range(2):
        with tiny.study(tmp_path, concurrency="auto").search(progress.append) as search:
            assert search.config.at_once == 2
    assert asked == [[1, 2, 4, 6]]
    assert progress[-1].message == (
        "concurrency 2 on each device; base networks an hour: 100 by 1 at once, 150 by 2 at once, "
        "140 by 4 at once"
    )
    monkeypatch.setattr(widthsearch.study.driver, "cores", lambda: 2)
    with tiny.study(tmp_path, concurrency="auto").search():
        assert asked[1:] == [[1, 2]]
    with pytest.raises(StudyError, match="is decided when a study is run"):
        tiny.config(concurrency="auto").at_once  # noqa: B018
    with pytest.raises(StudyError, match="probes this machine"):
        tiny.config(concurrency="auto", ray_address="10.0.0.1:6379")


def test_concurrent_trials_share_a_gpu_equally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs, three on each."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(widthsearch.study.checks, "check_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(
        widthsearch.study.driver,
        "probe_concurrency",
        lambda *_, **__: ConcurrencyProbe({1: 1.0, 2: 1.5, 3: 2.0}, "cuda", 1, None),
    )
    settings = {"device": "cuda", "resources": {"gpu": 1}, "proposers": ["uniform"]}
    with tiny.study(tmp_path, concurrency="auto", **settings).search() as search:
        assert search.config.at_once == 6
        assert search.config.resources.gpu == 0.3333


def test_a_missing_device_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any file is made."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    study = tiny.study(tmp_path / "tiny", device="cuda:0", resources={"gpu": 1})
    with pytest.raises(DeviceError, match="cuda:0"):
        tiny.run(study)
    assert not (tmp_path / "tiny").exists()


def test_a_space_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    """The error is the space's own."""
    study = Study(tiny.config(space="nowhere.at:all"), task=tiny.task(), folder=tmp_path)
    with pytest.raises(SpaceError, match="nowhere"):
        tiny.run(study)


def test_a_folder_that_is_read_only_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, before anything is trained; root itself may write into any folder."""

    def denied(path: Path, _: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(widthsearch.study.driver, "write_atomically", denied)
    with pytest.raises(StorageError, match=r"writable, but .*study.yaml is not: Permission"):
        tiny.run(tiny.study(tmp_path))


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    """One line with the system's reason."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"'.*file/tiny' cannot be made: Not a directory"):
        tiny.run(tiny.study(tmp_path / "file" / "tiny"))


def test_a_storage_elsewhere_holds_several_studies(tmp_path: Path) -> None:
    """Any Optuna URL; each study under its name."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    for name in ("one", "two"):
        tiny.run(tiny.study(tmp_path / name, name=name, storage=url, trials=2))
    assert not (tmp_path / "one" / "study.db").exists()
    assert len(Store.open(url, "one").trials({"tiny": tiny.space()})) == 2
    assert len(Study.load(tmp_path / "two").trials()) == 2


def test_another_programs_study_of_that_name_is_refused(tmp_path: Path) -> None:
    """A plain Optuna study in a shared database."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    optuna.create_study(storage=url, study_name="tiny")
    with pytest.raises(StudyError, match="already has an Optuna study 'tiny' that is not"):
        tiny.run(tiny.study(tmp_path, storage=url))


def test_several_spaces_make_one_front(tmp_path: Path) -> None:
    """Each base, then candidates of each space at the first one's budgets."""
    spaces = [tiny.space(), tiny.space("other", min_width=0.5)]
    study = tiny.study(tmp_path, spaces, trials=9)
    tiny.run(study)
    trials = study.trials()
    assert [o.space for o in trials[:2]] == ["tiny", "other"]
    assert all(o.origin == {"base": True} for o in trials[:2])
    assert len({(o.space, o.widths) for o in trials}) == 9
    assert {o.space for o in trials if "sampler" in o.origin} == {"tiny", "other"}
    assert [o.number for o in Study.load(tmp_path).trials()] == list(range(9))
    tiny.run(tiny.study(tmp_path, spaces, trials=10))
    with pytest.raises(StudyError, match="begun with tiny, other and is now given tiny: put them"):
        tiny.run(tiny.study(tmp_path, trials=11))


def test_spaces_of_one_name_are_refused(tmp_path: Path) -> None:
    """A trial refers to its space by name."""
    with pytest.raises(StudyError, match="must have different names, but are tiny, tiny"):
        tiny.run(tiny.study(tmp_path, [tiny.space(), tiny.space()]))


def test_the_device_decides_the_default_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where latency is measured, or else where candidates train; a step that was given stays."""
    wide = SearchSpace.from_model(
        lambda: nn.Sequential(nn.Conv2d(1, 256, 1), nn.Conv2d(256, 4, 1)), (1, 4, 4)
    )
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")

    def step(space: SearchSpace = wide, **changes: Any) -> int:
        return tiny.study(tmp_path, space, **changes).space.axes[0].step

    assert step() == 16
    assert step(constraints={"align": "none"}) == 8
    assert step(wide.constrained(step=4)) == 4
    gpu: dict[str, Any] = {"device": "cuda", "resources": {"gpu": 1}}
    assert step(**gpu) == 8
    assert step(**gpu, objectives=["accuracy", "latency_ms"], latency={"device": "cpu"}) == 16
