"""Images in files: torchvision's listing and pixels, streams that equal memory, faults."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from pictures import make_pictures, pictures
from PIL import Image
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from widthsearch.data import folders, tasks
from widthsearch.data.config import TaskConfig
from widthsearch.data.folders import ImageFiles, Loading, listed
from widthsearch.data.loaders import DeviceLoader, FileLoader
from widthsearch.data.tasks import Task, load_task, open_task
from widthsearch.errors import DataError, ImageError
from widthsearch.proposers import Proposer, Setting
from widthsearch.proposers.activation_density import ActivationDensity
from widthsearch.proposers.filter_groups.proposer import FilterGroups
from widthsearch.proposers.fisher import Fisher
from widthsearch.proposers.magnitude import Magnitude
from widthsearch.proposers.sensitivity import Sensitivity
from widthsearch.proposers.slimming import Slimming
from widthsearch.runner.pickling import SharedData
from widthsearch.runner.worker import Worker
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.checks import _differences
from widthsearch.study.job import study_job
from widthsearch.training.job import Job
from widthsearch.training.recipe import Recipe
from widthsearch.training.trainer import Trainer, evaluate, train_classifier
from widthsearch.utils.devices import free_memory

RECIPE = Recipe(epochs=3, batch_size=16, label_smoothing=0.1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures."""
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def network() -> nn.Module:
    """A network with dropout, which draws random numbers in training."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, 2),
    )


def trained(task: Task, epochs: int = 3, state: Any = None) -> Trainer:
    """A training with two threads, and so with two processes that decode."""
    trainer = Trainer(network(), task, RECIPE, seed=3, threads=2)
    if state is not None:
        trainer.restore(*state)
    while trainer.epoch < epochs:
        trainer.run_epoch()
    return trainer


def numbers(trainer: Trainer) -> list[tuple[float | None, float]]:
    """The loss and the accuracy of each epoch."""
    return [(result.loss, result.value) for result in trainer.curve]


# --- listing and pixels ---


@pytest.mark.parametrize("size", [None, 5])
def test_listing_and_pixels_are_those_of_torchvision(tmp_path: Path, size: int | None) -> None:
    """Files, classes, labels and pixels of ImageFolder with Resize and CenterCrop."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(("b/2.jpg", "b/1.PNG", "a/x/1.png", "a/0.jpeg", "a/x/y/é.png")):
        for half in ("train", "test"):
            path = tmp_path / half / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (9, 7, 3) if size is None else (6 + i, 11 - i, 3)
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
    scale = [] if size is None else [v2.Resize(size), v2.CenterCrop(size)]
    theirs = ImageFolder(str(tmp_path / "train"), v2.Compose([*scale, v2.PILToTensor()]))
    (files, labels), _, names = listed(str(tmp_path), size)
    order = {files.path(i): i for i in range(len(files))}
    assert list(names) == theirs.classes
    assert sorted(order) == sorted(path for path, _ in theirs.samples)
    read = files.read()
    for i, (path, label) in enumerate(theirs.samples):
        assert labels[order[path]] == label
        assert torch.equal(torch.from_numpy(read[order[path]]), theirs[i][0])
    assert read.shape == files.shape
    assert read.nbytes == files.nbytes


def test_splits_of_two_sizes_need_an_image_size(tmp_path: Path) -> None:
    """The error names the key."""
    for half, side in (("train", 9), ("test", 7)):
        for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
            path = tmp_path / half / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side, side)).save(path)
    with pytest.raises(DataError, match=r"\(3, 9, 9\) and \(3, 7, 7\); set `image_size`"):
        load_task(TaskConfig("image_folder", folder=str(tmp_path)))


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    """Two of them that form loops would be followed for ever; links to images are images."""
    root = make_pictures(tmp_path / "pictures", train=8, test=4)
    for name in ("loop", "loops"):
        (root / "train" / "dark" / name).symlink_to(root)
    (root / "train" / "dark" / "link.png").symlink_to(root / "train" / "dark" / "000.png")
    (files, _), _, _ = listed(str(root), None)
    assert len(files) == 9


def test_statistics_of_many_files_are_of_a_sample(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same one for each loading; with as many images as in the sample they are exact."""
    exact = pictures(root)
    pixels = exact.train.images / 255
    assert exact.mean == pytest.approx(pixels.mean((0, 2, 3)), abs=1e-9)
    assert exact.std == pytest.approx(pixels.std((0, 2, 3)), abs=1e-9)
    monkeypatch.setattr(tasks, "_SAMPLE", 60)
    some = pictures(root)
    assert some.mean != exact.mean
    assert some.mean == pytest.approx(exact.mean, abs=0.05)
    assert pictures(root, loading="stream").mean == some.mean


# --- streams ---


def test_a_stream_has_the_numbers_of_memory(root: Path) -> None:
    """Losses, accuracies and weights, bit for bit; steps do not draw other random numbers."""
    memory, stream = (pictures(root, loading=mode) for mode in ("resident", "stream"))
    assert isinstance(memory.train.images, np.ndarray)
    assert isinstance(stream.train.images, ImageFiles)
    ours, theirs = trained(stream), trained(memory)
    assert numbers(ours) == numbers(theirs)
    weights = zip(ours.state()["model"].items(), theirs.state()["model"].items(), strict=True)
    assert all(torch.equal(one, other) for (_, one), (_, other) in weights)
    model = network()
    assert evaluate(model, stream, "test") == evaluate(model, memory, "test")


def test_a_resumed_stream_equals_an_uninterrupted_one(root: Path) -> None:
    """Order and augmentation follow from the seed and the epoch."""
    task = pictures(root, loading="stream")
    whole, first = trained(task), trained(task, epochs=1)
    state = pickle.loads(pickle.dumps((first.state(), first.curve)))
    assert numbers(trained(task, state=state)) == numbers(whole)


def test_batches_of_several_passes_equal_those_of_memory(root: Path) -> None:
    """Also where a stretch of steps is longer than a pass, and with a new one before its end."""
    memory, stream = (pictures(root, loading=mode) for mode in ("resident", "stream"))
    resident = DeviceLoader(memory.train, memory, 20)
    files = FileLoader(stream.train, stream, 20)
    for seed in range(2):
        for loader in (resident, files):
            loader.begin(7, torch.Generator().manual_seed(seed))
        for step in range(7 if seed else 3):
            images, labels = files.batch()
            expected = resident.batch(torch.tensor([step]))
            assert torch.equal(images, expected[0])
            assert torch.equal(labels, expected[1])
    assert multiprocessing.active_children() == []


def test_passes_may_be_read_at_the_same_time(root: Path) -> None:
    """Each pass has processes of its own, which end with it, or where it is left."""
    task = pictures(root, loading="stream")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = zip(task.batches("train", 0), task.batches("train", 0), strict=True)
        assert all(torch.equal(one, other) for (one, _), (other, _) in together)
        loader = FileLoader(task.train, task, 16)
        left = loader.plain_batches(torch.arange(len(loader)))
        next(left)
        assert multiprocessing.active_children() != []
        del left
    finally:
        torch.set_num_threads(before)
    assert multiprocessing.active_children() == []


METHODS: list[Proposer] = [
    Sensitivity(batch_size=20),
    Slimming(recipe=replace(RECIPE, epochs=1)),
    ActivationDensity(max_steps=4),
    FilterGroups(groups=2),
    Fisher(every=2),
    Magnitude(every=2),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_every_method_proposes_the_same_on_a_stream(root: Path, method: Proposer) -> None:
    """Methods that read data get it from the files."""
    space = SearchSpace.from_model(network, (3, 8, 8), step=4)
    setting = Setting(seed=1, recipe=replace(RECIPE, epochs=1), lowest=0.5)
    found = [
        method(space, pictures(root, loading=mode).for_search(), setting).to_json()
        for mode in ("resident", "stream")
    ]
    assert found[0] == found[1]


LEFT = """
import multiprocessing, sys
import numpy as np
from widthsearch.data.folders import listed
(files, _), _, _ = listed(sys.argv[1], None)
batches = files.batches([np.arange(len(files))] * 100, processes=2)
next(batches)
print(len(multiprocessing.active_children()), flush=True)
sys.stdin.read()
"""


def test_a_kill_leaves_no_processes(root: Path) -> None:
    """Those that decode hold the pipe open until they have ended."""
    command = [sys.executable, "-c", LEFT, str(root)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as process:
        assert int(process.stdout.readline()) > 0
        process.kill()
        assert process.stdout.read() == b""


# --- faults ---


def test_a_damaged_image_stops_a_study_and_fails_no_trial(tmp_path: Path) -> None:
    """The file is no candidate's fault; the line names it, from whichever process."""
    root = make_pictures(tmp_path / "pictures")
    task = pictures(root, loading="stream")
    assert isinstance(task.train.images, ImageFiles)
    damaged = Path(task.train.images.path(70))
    damaged.write_bytes(damaged.read_bytes()[:60])
    message = rf"every image must be readable, but .*{damaged.name} is not \(.*\); repair or remove"
    with pytest.raises(ImageError, match=message) as error:
        trained(task)
    assert "\n" not in str(error.value)
    with pytest.raises(ImageError, match=message):
        pictures(root)
    space = SearchSpace.from_model(network, (3, 8, 8), name="net")
    job = Job(train_classifier, "the built-in trainer", RECIPE, RECIPE.epochs)
    shared = SharedData.of(task, "data"), {"net": pickle.dumps(space)}, pickle.dumps(job)
    worker = Worker(*shared, "cpu", 2, tmp_path / "checkpoints")
    worker.start_trial(0, "net", space.base.vector, seed=0)
    report = worker.step()
    assert report.failure is None
    assert report.machine_error is not None
    assert damaged.name in report.machine_error


def test_a_process_that_is_killed_is_a_lack_of_memory(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system kills the largest process where memory is short."""
    driver = os.getpid()
    decoded = ImageFiles.decoded

    def killed(files: ImageFiles, chosen: Any) -> Any:
        if os.getpid() != driver:
            os.kill(os.getpid(), signal.SIGKILL)
        return decoded(files, chosen)

    monkeypatch.setattr(ImageFiles, "decoded", killed)
    with pytest.raises(MemoryError, match="a process that decodes images died"):
        trained(pictures(root, loading="stream"))


# --- in memory, or from the files ---


@pytest.mark.parametrize(
    ("free", "wanted", "resident", "reason"),
    [
        ({"memory": 4 * 10**9}, None, True, "kept in memory: 1.0 GB, and a quarter of the free m"),
        ({"memory": 4 * 10**9 - 4}, None, False, "because in memory they would take 1.0 GB, and a"),
        ({"memory": 9**12, "memory of cuda:0": 10**9}, None, False, "memory of cuda:0 is 250.0 MB"),
        ({"memory": 1}, "resident", True, "1,000 images of 1×1000×1000 are kept in memory, 1.0 GB"),
        ({"memory": 9**12}, "stream", False, "1,000 images of 1×1000×1000 are streamed from th"),
    ],
)
def test_the_loading_follows_from_free_memory(
    free: dict[str, int], wanted: str | None, resident: bool, reason: str
) -> None:
    """A quarter is the limit, of the smallest memory; the user's choice goes before it."""
    loading = Loading.chosen((1000, 1, 1000, 1000), free, wanted)
    assert loading.resident == resident
    assert reason in loading.reason


def test_free_memory_is_at_most_that_of_the_machine() -> None:
    """In bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**20 < free_memory("cpu")["memory"] <= total


def test_a_folder_that_does_not_fit_is_streamed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are those of decoded images; a task that was opened has read none."""
    images = 144 * 3 * 8 * 8
    config = TaskConfig("image_folder", str(root))
    for free, resident in ((4 * images, True), (4 * images - 1, False)):
        monkeypatch.setattr(tasks, "free_memory", lambda *_, free=free: {"memory": free})
        opened, loaded = open_task(config), load_task(config)
        assert isinstance(opened.train.images, ImageFiles)
        assert isinstance(loaded.train.images, np.ndarray) == resident
        assert opened.unread == (144 if resident else 0)
        lines: list[str] = []
        opened.read(lines.append)
        assert lines[-1:] == ["reading images ▕████████████████████▏ 144 of 144"] * resident


def test_the_loading_may_change(root: Path) -> None:
    """It changes no number, so a study and its checkpoints go on."""
    one, other = (
        tiny.config(task={"name": "image_folder", "folder": str(root), "loading": mode})
        for mode in ("resident", "stream")
    )
    assert list(_differences("task", one.to_json()["task"], other.to_json()["task"])) == []
    assert study_job(one).identity == study_job(other).identity
    with pytest.raises(DataError, match="loading is for image_folder only"):
        TaskConfig("digits", loading="stream")


def test_few_images_start_no_process(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process takes as long to start as some images to decode."""
    monkeypatch.setattr(folders, "cores", lambda: 64)
    (files, _), _, _ = listed(str(root), None)
    before = multiprocessing.active_children()  # of other tests, until they are collected
    few = files.batches([np.arange(30), np.arange(30)], processes=2)
    next(few)
    assert {*multiprocessing.active_children()} <= {*before}
    assert len(list(few)) == 1
