"""What a study says of its data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from widthsearch.errors import DataError


@dataclass(frozen=True)
class TaskConfig:
    """Which task, and how to prepare it; None leaves a choice to the task.

    Attributes:
        name: ``digits``, ``cifar10``, ``image_folder``, or ``package.module:function`` or
            ``path/to/file.py:function``, a function that returns two datasets (train, test).
        folder: Where ``image_folder`` lies, or where ``cifar10`` lies or is downloaded to.
        image_size: Side in pixels to which the images of ``image_folder`` are scaled (the shorter
            side) and cropped (the longer one, about the centre); needed where they differ in size.
        validation: The share of every class of train that is held out; by default 0.25 for
            ``digits`` (it is small), else 0.1.
        split_seed: Decides which images are held out.
        crop_padding: See :class:`Augmentation`. By default 1 for ``digits``, an eighth of the image
            for ``cifar10`` (4) and ``image_folder``, none for datasets of your own.
        flip: See :class:`Augmentation`. By default on for ``cifar10`` and ``image_folder``.
        cutout: See :class:`Augmentation`. By default none.
    """

    name: str
    folder: str | None = None
    image_size: int | None = None
    validation: float | None = None
    split_seed: int = 0
    crop_padding: int | None = None
    flip: bool | None = None
    cutout: int | None = None

    def __post_init__(self) -> None:
        for field, rule, holds in (
            ("image_size", "image_size >= 1", self.image_size is None or self.image_size >= 1),
            (
                "validation",
                "0 < validation < 1",
                self.validation is None or 0 < self.validation < 1,
            ),
            ("split_seed", "split_seed >= 0", self.split_seed >= 0),
            ("crop_padding", "crop_padding >= 0", (self.crop_padding or 0) >= 0),
            ("cutout", "cutout >= 0", (self.cutout or 0) >= 0),
        ):
            if not holds:
                value = getattr(self, field)
                raise DataError(f"`{rule}` must hold, but task {self.name!r} has {field}={value!r}")
        for field, takers in (
            ("folder", ("cifar10", "image_folder")),
            ("image_size", ("image_folder",)),
        ):
            value = getattr(self, field)
            if value is not None and self.name not in takers:
                raise DataError(
                    f"`{field}` is for {' and '.join(takers)} alone, but task {self.name!r} has "
                    f"{field}={value!r}; leave it out"
                )
