"""Images in files: the speed of streams, the memory that they take, and the speed of memory.

    python -m benchmarks.data [--images 20000] [--side 96] [--processes 2] [--base FOLDER]

JPEGs are generated in a temporary folder. Three tables, each of measurements that take turns:

- Throughput: batches of a stream, augmented and normalised, over those of torchvision's recipe, an
  ``ImageFolder`` with v2 transforms in a ``DataLoader`` of as many processes, which it keeps.
- Memory: the peak of a training's process and of those that decode for it, with a quarter of the
  images and with all of them; as proportional set sizes, so that shared pages count once.
- Resident: epochs of a small network with images in memory, over those of another checkout of this
  project, ``--base``, where it is given. Each turn is two processes.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from widthsearch.data.config import TaskConfig
from widthsearch.data.loaders import FileLoader
from widthsearch.data.tasks import Task, open_task
from widthsearch.utils.devices import hardware_name

BATCH = 128


def generate(folder: Path, first: int, last: int, side: int) -> None:
    """JPEGs of blurred noise in ten classes: about as large as photographs of that size."""
    for i in range(first, last):
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        noisy = np.asarray(image) + rng.normal(0, 8, (side, side, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / str(i % 10) / f"{i}.jpg")


def folder_of(root: Path, images: int, side: int) -> Path:
    """A folder with so many images for train, and 20 for test."""
    for half, count in (("train", images), ("test", 20)):
        for label in range(10):
            (root / half / str(label)).mkdir(parents=True)
        parts = range(0, count, 500)
        with ProcessPoolExecutor() as processes:
            ends = [min(count, first + 500) for first in parts]
            made = [
                processes.submit(generate, root / half, first, last, side)
                for first, last in zip(parts, ends, strict=True)
            ]
            for each in made:
                each.result()
    return root


def task_of(root: Path, loading: str) -> Task:
    return open_task(TaskConfig("image_folder", str(root), loading=loading, validation=0.02))


# --- throughput ---


def recipe(root: Path, task: Task, processes: int) -> DataLoader[tuple[torch.Tensor, int]]:
    """torchvision's recipe, with this task's augmentation."""
    _, height, width = task.input_shape
    padding = task.augmentation.crop_padding
    transform = v2.Compose(
        [
            v2.RandomCrop((height, width), padding, padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(task.mean, task.std),
        ]
    )
    return DataLoader(
        ImageFolder(str(root / "train"), transform),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=processes,
        persistent_workers=True,
    )


def throughput(root: Path, processes: int, turns: int, steps: int) -> None:
    """Images per second of both, in turns of so many batches, with the start of each pass."""
    task = task_of(root, "stream")
    torch.set_num_threads(processes)  # so many processes decode
    ours = FileLoader(task.train, task, BATCH)
    theirs = recipe(root, task, processes)
    steps = min(steps, ours.steps, len(theirs))

    def stream(turn: int) -> float:
        started = time.perf_counter()
        ours.begin(steps, torch.Generator().manual_seed(turn), turn)
        for _ in range(steps):
            ours.batch()
        return steps * BATCH / (time.perf_counter() - started)

    def torchvisions() -> float:
        started = time.perf_counter()
        for step, _ in enumerate(theirs, 1):
            if step == steps:
                break
        return steps * BATCH / (time.perf_counter() - started)

    stream(0), torchvisions()  # files into the system's cache, processes started
    rates = [(stream(turn), torchvisions()) for turn in range(1, turns + 1)]
    ratios = [one / other for one, other in rates]
    print("| loader | images/s |\n| --- | --- |")
    for name, found in zip(("stream", "torchvision's"), zip(*rates, strict=True), strict=True):
        print(f"| {name} | {statistics.median(found):,.0f} |")
    print(
        f"\nStream over torchvision's: {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.2f} in {turns} turns of {steps} batches of {BATCH}, {processes} processes)."
    )


# --- memory ---

TRAINING = """
import sys
import torch
from torch import nn
from widthsearch import Recipe, TaskConfig
from widthsearch.data.tasks import load_task
from widthsearch.training.trainer import Trainer

root, loading, epochs, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
values = {"loading": loading} if loading != "base" else {}
task = load_task(TaskConfig("image_folder", root, validation=0.02, **values))
net = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                    nn.Linear(8, task.classes))
recipe = Recipe(epochs=epochs, batch_size=128, precision="fp32")
trainer = Trainer(net, task, recipe, seed=0, threads=threads)
while not trainer.finished:
    result = trainer.run_epoch()
    print(result.seconds, flush=True)
"""


def tree(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*"):
        for child in (task / "children").read_text().split():
            yield from tree(int(child))


def proportional(pid: int) -> int:
    """The proportional set size of a process and its descendants, in bytes."""
    found = 0
    for each in tree(pid):
        lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        found += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return found


def peak(root: Path, processes: int) -> int:
    """The peak of a streamed training of one epoch, sampled ten times a second."""
    command = [sys.executable, "-c", TRAINING, str(root), "stream", "1", str(processes)]
    most = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        ended = threading.Event()
        threading.Thread(target=lambda: (process.wait(), ended.set()), daemon=True).start()
        while not ended.wait(0.1):
            try:
                most = max(most, proportional(process.pid))
            except (OSError, StopIteration):  # one of them has just ended
                continue
        assert process.returncode == 0
    return most


def memory(few: Path, many: Path, counts: tuple[int, int], processes: int, turns: int) -> None:
    """Peaks with few and with many images, in turns."""
    peaks = [[peak(root, processes) for root in (few, many)] for _ in range(turns)]
    medians = [statistics.median(found) for found in zip(*peaks, strict=True)]
    print("| images | peak memory |\n| --- | --- |")
    for count, found in zip(counts, medians, strict=True):
        print(f"| {count:,} | {found / 1e6:,.0f} MB |")
    print(
        f"\nMany over few: {medians[1] / medians[0]:.3f} (medians of {turns} trainings of an "
        f"epoch; a process and {processes} that decode)."
    )


# --- images in memory ---


def epoch_seconds(checkout: Path, root: Path, loading: str) -> float:
    """The median time of an epoch but the first, in a process with a checkout's package."""
    command = [sys.executable, "-c", TRAINING, str(root), loading, "6", "1"]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "WIDTHSEARCH_CACHE": cache}
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment, cwd=checkout
        )
    return statistics.median(map(float, done.stdout.split()[1:]))


def resident(base: Path, root: Path, turns: int) -> None:
    """Epochs with images in memory, here and in another checkout."""
    here = Path(__file__).resolve().parent.parent
    pairs = [
        (epoch_seconds(base, root, "base"), epoch_seconds(here, root, "resident"))
        for _ in range(turns)
    ]
    ratios = [before / now for before, now in pairs]
    print(
        f"Resident speed over that of the base: {statistics.median(ratios):.2f} ({min(ratios):.2f} "
        f"to {max(ratios):.2f} in {turns} turns of 5 epochs)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=96, help="pixels")
    parser.add_argument("--processes", type=int, default=2, help="processes that decode")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40, help="batches a turn of throughput")
    parser.add_argument("--base", type=Path, help="a checkout to compare resident speed with")
    options = parser.parse_args()
    print(f"{hardware_name(torch.device('cpu'))}, {os.cpu_count()} cores")
    print(f"torch {torch.__version__}, Python {platform.python_version()}\n")
    counts = options.images // 4, options.images
    with tempfile.TemporaryDirectory() as name:
        few, many = (folder_of(Path(name, str(count)), count, options.side) for count in counts)
        print(f"{options.images:,} JPEGs of {options.side}×{options.side} pixels\n")
        throughput(many, options.processes, options.turns, options.steps)
        print(flush=True)
        memory(few, many, counts, options.processes, max(1, options.turns // 3))
        if options.base:
            print(flush=True)
            resident(options.base.resolve(), few, max(3, options.turns // 2))


if __name__ == "__main__":
    main()
