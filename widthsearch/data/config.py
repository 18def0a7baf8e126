"""The configuration of a study's data. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from widthsearch.errors import DataError
from widthsearch.utils.validation import validated_dataclass

LossName = Literal["cross_entropy", "bce", "mse", "l1"]
"""Classes; labels that may each be true; values, by the mean square or absolute error."""

REPORTED: Mapping[LossName, tuple[str, ...]] = {
    "cross_entropy": ("accuracy",),
    "bce": ("map", "label_accuracy"),
    "mse": ("rmse", "mae"),
    "l1": ("rmse", "mae"),
}
"""The numbers that an evaluation reports for each loss; the first is what methods compare by."""

IMAGE_FOLDER_LAYOUT = "<folder>/train/<class>/*.jpg and <folder>/test/<class>/*.jpg"


@validated_dataclass("augmentation", DataError)
class Augmentation:
    """The random changes to training images, drawn for each image in each epoch.

    Attributes:
        crop_padding: Images are shifted by up to this many pixels each way; the border is
            reflected.
        flip: Whether half of the images are mirrored left to right, and the other half in the next
            epoch (alternating flip, Jordan 2024, arXiv 2404.00498).
        cutout: The side in pixels of a square that is blanked. Its centre is drawn over the whole
            image, so parts of it may lie outside (DeVries and Taylor 2017, arXiv 1708.04552).

    Raises:
        DataError: A value is negative.

    Example:
        >>> Augmentation(crop_padding=4, flip=True).cutout
        0
        >>> Augmentation(cutout=-1)
        Traceback (most recent call last):
        widthsearch.errors.DataError: augmentation.cutout must be greater than or equal to 0, but \
was -1
    """

    crop_padding: int = Field(default=0, ge=0)
    flip: bool = False
    cutout: int = Field(default=0, ge=0)


@validated_dataclass("task", DataError)
class TaskConfig:
    """Names a task and overrides its preparation; None leaves a choice to the task.

    Attributes:
        name: ``digits``, ``cifar10``, ``image_folder``, or a function that returns two datasets
            (train, test) as ``package.module:function`` or ``path/to/file.py:function``.
        loss: What the targets of datasets of your own are, and the loss: ``cross_entropy`` of a
            class, an integer; ``bce`` of labels that may each be true, a vector of 0 and 1; ``mse``
            or ``l1``, the mean square or absolute error of a number or a vector of numbers.
        folder: The folder of ``image_folder``; or where ``cifar10`` lies or is downloaded to.
        image_size: The side in pixels to which the images of ``image_folder`` are scaled (the
            shorter side) and cropped (the longer side, centred); needed if their sizes differ.
        loading: Whether the images of ``image_folder`` are decoded once and kept in memory
            (``resident``), or read from their files in each epoch (``stream``); by default
            resident where they take at most a quarter of the free memory. The numbers are the same.
        validation: The share of train that is held out, with ``cross_entropy`` the share of every
            class; by default 0.25 for ``digits`` (it is small), else 0.1.
        split_seed: Seeds the choice of the images that are held out.
        crop_padding: See :class:`Augmentation`. By default 1 for ``digits``, an eighth of the image
            for ``cifar10`` (4) and ``image_folder``, 0 for datasets of your own.
        flip: See :class:`Augmentation`. By default on for ``cifar10`` and ``image_folder``.
        cutout: See :class:`Augmentation`. By default 0.

    Raises:
        DataError: A value breaks a rule.

    Example:
        >>> TaskConfig("digits", validation=0.1).validation
        0.1
        >>> TaskConfig("digits", validation=1.0)
        Traceback (most recent call last):
        widthsearch.errors.DataError: task.validation must be less than 1, but was 1.0
    """

    name: str
    folder: str | None = None
    image_size: int | None = Field(default=None, ge=1)
    loading: Literal["resident", "stream"] | None = None
    validation: float | None = Field(default=None, gt=0, lt=1)
    split_seed: int = Field(default=0, ge=0)
    crop_padding: int | None = Field(default=None, ge=0)
    flip: bool | None = None
    cutout: int | None = Field(default=None, ge=0)
    loss: LossName = "cross_entropy"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == "image_folder" and self.folder is None:
            raise ValueError(
                "'image_folder' needs a folder, but has none; write `task: {name: image_folder, "
                f"folder: path}}` for a folder with {IMAGE_FOLDER_LAYOUT}"
            )
        if self.loss != "cross_entropy" and ":" not in self.name:
            raise ValueError(
                f"loss is for datasets of your own, `name: module:function`, but task "
                f"{self.name!r} has classes and loss={self.loss!r}; remove it"
            )
        for key, tasks in (
            ("folder", ("cifar10", "image_folder")),
            ("image_size", ("image_folder",)),
            ("loading", ("image_folder",)),
        ):
            value = getattr(self, key)
            if value is not None and self.name not in tasks:
                raise ValueError(
                    f"{key} is for {' and '.join(tasks)} only, but task {self.name!r} has "
                    f"{key}={value!r}; remove it"
                )
        return self
