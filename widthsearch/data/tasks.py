"""Tasks: the data and the loss that networks learn by.

Both kinds have ``loss(network, batch)`` and ``batches(split, seed)``. :class:`Task` is of images
and labels, with their normalisation and augmentation, for the built-in trainer; :class:`OwnTask`
holds two functions of the user's own.

An image task consists of numpy arrays, so that processes can share it without a copy; images in
files may be read when they are needed, and the arrays then have their names. A seeded share of
train is held out as the validation split, of every class where the targets are classes; a search
compares networks on it. The test split is for final trainings only: :meth:`Task.for_search` removes
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.data import sources
from widthsearch.data.config import REPORTED, Augmentation, LossName, TaskConfig
from widthsearch.data.folders import ImageFiles, Loading, progress_bar
from widthsearch.data.loaders import StreamLoader, loader_of, samples
from widthsearch.data.losses import LOSSES
from widthsearch.data.sources import Split
from widthsearch.errors import DataError, did_you_mean
from widthsearch.utils.devices import cores, free_memory
from widthsearch.utils.references import check_takes, load_function, reference_of

_SAMPLE = 4096
"""Images in files of which mean and standard deviation are computed, where there are more."""

SplitName = Literal["train", "validation"]
"""The splits that a search reads."""


@dataclass(frozen=True, eq=False)
class OwnTask:
    """The loss and the batches of a study with a trainer of its own, for methods that read data.

    Attributes:
        loss_function: A function ``loss(network, batch)``. It calls the network itself, and returns
            the mean loss of the batch's samples as a tensor of one number.
        batch_function: A function ``batches(split, seed)``: an iterable, new at each call, of the
            batches of one pass over ``"train"``, in an order drawn by the seed, or
            ``"validation"``. A batch is a tensor, or tuples, lists and mappings of tensors; samples
            lie along the first dim of its first tensor. Its tensors are moved to the device. Where
            a layer sees several rows of a sample, such as tokens, ``fisher`` and ``naswot`` take
            those that lie together for one sample's: call the network once for each of two views.
        name: The reference of the loss, for messages.

    Raises:
        DataError: A function takes other arguments, or the loss is one of torch's.

    Example:
        >>> x = torch.linspace(0, 1, 8)[:, None]
        >>> def loss(network, batch):
        ...     return nn.functional.mse_loss(network(batch["x"]), batch["y"])
        >>> def batches(split, seed):
        ...     order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        ...     return [{"x": x[i], "y": 2 * x[i]} for i in order.split(4)]
        >>> task, net = OwnTask(loss, batches), nn.Linear(1, 1)
        >>> [task.loss(net, batch).shape for batch in task.batches("train", seed=0)]
        [torch.Size([]), torch.Size([])]
    """

    loss_function: Callable[[nn.Module, Any], Tensor]
    batch_function: Callable[[str, int], Iterable[Any]]
    name: str = "loss"
    measure: ClassVar[str] = "loss"
    minimized: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_takes("loss", self.name, self.loss_function, ("network", "batch"), DataError)
        check_takes("batches", self._batches, self.batch_function, ("split", "seed"), DataError)
        if str(getattr(self.loss_function, "__module__", "")).startswith("torch."):
            raise DataError(
                "a loss must call the network that it is given, but "
                f"{reference_of(self.loss_function)!r} is torch's, of outputs and targets; write a "
                "function of (network, batch) that calls both"
            )

    def loss(self, network: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch, ().

        Raises:
            DataError: The batch has no tensor, or the user's function returns something else, or a
                number without a gradient where gradients are on.
        """
        samples(batch)
        value = self.loss_function(network, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
            raise DataError(
                f"a loss must be a tensor of one number, but {self.name!r} returned "
                f"{_described(value)}; return the mean over the batch"
            )
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in network.parameters())
        if trained and not value.requires_grad:
            raise DataError(
                f"a loss must have a gradient, but {self.name!r} returned {_described(value)} "
                "without one; compute it from the outputs of the network that it is given, without "
                "`detach`, `item` or `no_grad`"
            )
        return value.reshape(())

    def batches(self, split: SplitName, seed: int) -> Iterable[Any]:
        """The batches of a pass over a split.

        Raises:
            DataError: The user's function returns no iterable, or a single batch.
        """
        found = self.batch_function(split, seed)
        single = isinstance(found, str | Mapping | Tensor | np.ndarray | np.generic)
        if single or not isinstance(found, Iterable):
            raise DataError(
                "`batches` must return the batches of a pass, as a list or by `yield`, but "
                f"{self._batches!r} returned {_described(found)}"
            )
        return found

    def without_batches(self, split: SplitName) -> DataError:
        """The error of a split without batches."""
        return DataError(
            f"`batches` must have a batch of {split!r} at each call, but {self._batches!r} had "
            "none; return a new list or generator each time"
        )

    @property
    def _batches(self) -> str:
        return reference_of(self.batch_function)

    def shown(self, value: float) -> str:
        """The mean loss on the validation split, in words."""
        return f"loss {value:.4g}"


@dataclass(frozen=True, eq=False)
class Task:
    """The images and targets that networks are trained and evaluated on.

    Attributes:
        name: As in the task's configuration.
        train: The training split.
        validation: The split that a search compares networks on; held out of train by class.
        test: The split for final trainings; None in a search's workers.
        classes: The number of outputs of a network: of classes, labels or target values.
        mean: The mean of each channel over train, where black is 0 and white is 1.
        std: The standard deviation of each channel over train, likewise.
        augmentation: The random changes to training images.
        names: The names of the classes; empty if unknown.
        loss_name: The loss, see :class:`~widthsearch.data.config.TaskConfig`.
        loading: Whether images in files are to be read into memory; None where they never were in
            files.

    Example:
        >>> task = load_task("digits")
        >>> task.input_shape, task.classes, len(task.train), len(task.validation)
        ((1, 8, 8), 10, 1079, 359)
        >>> task.for_search().test is None
        True
    """

    name: str
    train: Split
    validation: Split
    test: Split | None
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    names: tuple[str, ...] = ()
    loss_name: LossName = "cross_entropy"
    loading: Loading | None = None

    @property
    def measure(self) -> str:
        """The number on the validation split that methods compare networks by."""
        return REPORTED[self.loss_name][0]

    @property
    def minimized(self) -> bool:
        """Whether lower values of ``measure`` are better."""
        return self.loss_name in ("mse", "l1")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of one image, (C, H, W)."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width

    def for_search(self) -> Task:
        """The task without its test split."""
        return replace(self, test=None)

    def for_final_training(self) -> Task:
        """The task with the training and validation splits together as its training split."""
        return replace(self, train=self.train.joined(self.validation))

    @property
    def unread(self) -> int:
        """The number of images in files that are to be read into memory."""
        if self.loading is None or not self.loading.resident:
            return 0
        splits = (self.train, self.validation, self.test)
        return sum(len(s) for s in splits if s and isinstance(s.images, ImageFiles))

    def read(self, report: Callable[[str], object] = lambda message: None) -> Task:
        """The task with its images in memory, unless they are to be streamed.

        Args:
            report: Called with a bar, as images are read.

        Raises:
            ImageError: An image cannot be used.
        """
        if not (total := self.unread):
            return self
        done = 0

        def on_read(count: int) -> None:
            nonlocal done
            done += count
            report(progress_bar(done, total))

        test = self.test and self.test.read(on_read)
        train, validation = self.train.read(on_read), self.validation.read(on_read)
        return replace(self, train=train, validation=validation, test=test)

    def loss(
        self, network: nn.Module, batch: tuple[Tensor, Tensor], label_smoothing: float = 0.0
    ) -> Tensor:
        """The mean loss of a batch of normalised images and targets, ()."""
        images, targets = batch
        outputs: Tensor = network(images)
        return LOSSES[self.loss_name].value(outputs.float(), targets, label_smoothing)

    def batches(self, split: SplitName, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a pass over a split, not augmented: train in an order drawn by the seed.

        A batch has at most 256 normalised images, float32 (N, C, H, W), and targets: int64 (N,) or
        float32 (N, K).
        """
        chosen = self.train if split == "train" else self.validation
        order = torch.arange(count := len(chosen))
        if split == "train":
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return loader_of(chosen, self, batch_size=256).plain_batches(order)

    def shown(self, value: float) -> str:
        """The number on the validation split that methods compare networks by, in words."""
        return f"{self.measure} {f'{value:.4g}' if self.minimized else f'{value:.1f}%'}"


def _described(value: Any) -> str:
    """A value that a user's function returned, in a few words."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(value, Tensor) else "an array"
        return f"{kind} of shape {tuple(value.shape)} and {value.dtype}"
    short = value is None or isinstance(value, bool | int | float | complex | str)
    return repr(value) if short else f"a {type(value).__name__}"


AnyTask = Task | OwnTask
"""The data and the loss of a study, as methods that read data see them."""


def steps_of_epoch(task: AnyTask, batch_size: int) -> int:
    """The number of training steps in an epoch, without data on a device.

    Args:
        task: The data.
        batch_size: Images per batch; an own task has batches of its own.

    Example:
        >>> steps_of_epoch(load_task("digits"), batch_size=128)  # of 1,079 images
        8
    """
    if isinstance(task, OwnTask):
        return StreamLoader(task).steps
    return len(task.train) // min(batch_size, len(task.train))


def load_task(config: TaskConfig | str) -> Task:
    """Load the task of a configuration or a name; streamed images stay in their files.

    Raises:
        DataError: The task does not exist, or its data is missing or cannot be used.
    """
    return open_task(TaskConfig(config) if isinstance(config, str) else config).read()


def open_task(config: TaskConfig, device: str = "cpu", share: float = 1.0) -> Task:
    """The task of a configuration, before images in files are read.

    Args:
        config: The task's name and choices.
        device: The device that networks are trained on, whose memory resident images take as well.
        share: The share of that memory that one training has.

    Raises:
        DataError: As :func:`load_task`.
    """
    if config.name == "digits":
        train, test = stratified(sources.digits(), share=0.2, seed=0)
        task = _task(config, train, test, validation=0.25, augmentation=Augmentation(1))
        return replace(task, names=tuple(map(str, range(10))))
    if config.name in ("cifar10", "image_folder"):
        loading = None
        if config.name == "cifar10":
            train, test, names = sources.cifar10(config.folder)
        else:
            assert config.folder is not None, "TaskConfig requires it"
            train, test, names = sources.image_folder(config.folder, config.image_size)
            shape = (len(train) + len(test), *train.images.shape[1:])
            loading = Loading.chosen(shape, free_memory(device, share), config.loading)
        augmentation = Augmentation(min(train.images.shape[2:]) // 8, flip=True)
        task = _task(config, train, test, validation=0.1, augmentation=augmentation)
        return replace(task, names=names, loading=loading)
    if ":" not in config.name:
        meant = did_you_mean(config.name, ("digits", "cifar10", "image_folder"), "")
        raise DataError(
            "a task must be digits, cifar10, image_folder, package.module:function or "
            f"path/to/file.py:function, but was {config.name!r}{meant and '; ' + meant}"
        )
    function = load_function(config.name, DataError)
    try:
        pair = function()
    except (Exception, SystemExit) as error:
        raise DataError(
            f"task {config.name!r} failed: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise DataError(
            f"task {config.name!r} must return two datasets (train, test), but returned {pair!r}"
        )
    train_set, test_set = pair
    return task_from_datasets(train_set, test_set, config)


def task_from_datasets(train: Any, test: Any, config: TaskConfig) -> Task:
    """Make a task of two map-style torch datasets; each is read once, from 0 to its length.

    Normalisation and augmentation are done later, on the device. A random transform in a dataset
    would be applied only once.

    Args:
        train: Items (image, target). An image is a PIL image, a uint8 tensor of 0 to 255 or a float
            tensor of 0 to 1; all have one shape (C, H, W) or (H, W). A target is an integer, with
            ``bce`` a vector of 0 and 1, with ``mse`` and ``l1`` a number or a vector of numbers.
        test: Likewise.
        config: The task's name, loss and choices.

    Raises:
        DataError: An item has another form, or a class has too few images.
    """
    train_half = sources.read_dataset(train, f"train of task {config.name!r}", config.loss)
    test_half = sources.read_dataset(test, f"test of task {config.name!r}", config.loss)
    return _task(config, train_half, test_half, validation=0.1, augmentation=Augmentation())


def _task(
    config: TaskConfig, train: Split, test: Split, *, validation: float, augmentation: Augmentation
) -> Task:
    """A task with a configuration's choices, or the given defaults where it has none."""
    name, shape = config.name, train.images.shape[1:]
    if test.images.shape[1:] != shape:
        raise DataError(
            f"train and test must have images of one shape (C, H, W), but those of task {name!r} "
            f"have {shape} and {test.images.shape[1:]}"
            + "; set `image_size`"
            * (name == "image_folder")
        )
    outputs = _outputs(config, train, test)
    for key in ("crop_padding", "flip", "cutout"):
        if (chosen := getattr(config, key)) is not None:
            augmentation = replace(augmentation, **{key: chosen})
    if augmentation.crop_padding >= min(shape[1:]):
        raise DataError(
            "`crop_padding` must be less than the image's side, but task "
            f"{name!r} has crop_padding={augmentation.crop_padding} and images of {shape}"
        )
    share = validation if config.validation is None else config.validation
    of_classes = config.loss == "cross_entropy"
    train, held_out = (stratified if of_classes else divided)(train, share, config.split_seed)
    if config.loss == "bce" and not held_out.labels.any():
        raise DataError(
            f"some image must have a label, but the {len(held_out)} that task {name!r} holds out "
            "for validation have none; raise `validation`"
        )
    mean, std = _channel_statistics(train.images)
    sizes = train, held_out, test, outputs, mean, std, augmentation
    return Task(name, *sizes, loss_name=config.loss)


def _outputs(config: TaskConfig, train: Split, test: Split) -> int:
    """The number of outputs of a network for these targets.

    Raises:
        DataError: A class or a label has too few images, or test has other targets than train.
    """
    name = config.name
    if config.loss != "cross_entropy":
        of_train, of_test = (half.labels.shape[1] for half in (train, test))
        if of_train != of_test:
            raise DataError(
                f"train and test must have targets of one length, but those of task {name!r} have "
                f"{of_train} and {of_test}"
            )
        if len(train) < 2:
            raise DataError(f"train needs 2 images or more, but task {name!r} has {len(train)}")
        if config.loss == "bce" and not (found := train.labels.any(axis=0)).all():
            raise DataError(
                f"every label needs an image of train that has it, but task {name!r} has none of "
                f"label {int(found.argmin())} of {of_train}"
            )
        return int(of_train)
    counts = np.bincount(train.labels.astype(np.int64))
    classes = len(counts)
    if classes < 2 or counts.min() < 2:
        rare = int(counts.argmin())
        raise DataError(
            "train needs 2 classes or more, numbered from 0, and 2 images or more of each (some "
            f"are held out), but task {name!r} has {counts[rare]} images of class {rare} of "
            f"{classes}"
        )
    if (most := int(test.labels.max())) >= classes:
        raise DataError(
            f"test must have no other classes than train, but task {name!r} has label {most} in "
            f"test and {classes} classes in train"
        )
    return classes


def divided(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """The images to keep and those to hold out, at least one each, in the order of the split."""
    count = len(split)
    out = np.zeros(count, dtype=np.bool_)
    held_out = min(max(round(share * count), 1), count - 1)
    out[np.random.default_rng(seed).permutation(count)[:held_out]] = True
    return split.subset(~out), split.subset(out)


def stratified(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """The images to keep and those to hold out, each in the order of the split.

    A share of every class is held out: at least one image, and at most all but one.
    """
    rng = np.random.default_rng(seed)
    out = np.zeros(len(split), dtype=np.bool_)
    for label in range(int(split.labels.max()) + 1):
        members = rng.permutation(np.flatnonzero(split.labels == label))
        out[members[: min(max(round(share * len(members)), 1), len(members) - 1)]] = True
    return split.subset(~out), split.subset(out)


def _channel_statistics(
    images: NDArray[np.uint8] | ImageFiles,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, from exact counts of the 256 pixel values."""
    counts = np.zeros((images.shape[1], 256), dtype=np.int64)
    for batch in _parts(images):
        for of, pixels in zip(counts, batch.swapaxes(0, 1), strict=True):
            of += np.bincount(pixels.ravel(), minlength=256)
    values = np.arange(256) / 255
    means, stds = [], []
    for of in counts:
        mean = float(of @ values / of.sum())
        means.append(mean)
        # A constant channel becomes 0, not NaN.
        stds.append(float(np.sqrt(of @ (values - mean) ** 2 / of.sum())) or 1.0)
    return tuple(means), tuple(stds)


def _parts(images: NDArray[np.uint8] | ImageFiles) -> Iterator[NDArray[np.uint8]]:
    """The images in parts, for bincount converts its input to int64; a sample of many files."""
    count = len(images)
    if not isinstance(images, ImageFiles):
        yield from (images[start : start + 1024] for start in range(0, count, 1024))
        return
    chosen = np.arange(count)
    if count > _SAMPLE:
        chosen = np.sort(np.random.default_rng(0).choice(count, _SAMPLE, replace=False))
    parts = np.split(chosen, range(64, len(chosen), 64))
    yield from (batch.numpy() for batch in images.batches(parts, cores()))
