"""Validation of configurations with pydantic, with errors of one line.

A line has the place, the rule, the value and, where there is one, the way out:
``recipe.epochs must be greater than or equal to 1, but was 0``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, dataclass_transform

import pydantic.dataclasses
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from widthsearch.errors import StudyError, WidthsearchError, did_you_mean

T = TypeVar("T")

_KINDS: Mapping[str, str] = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("tuple_type", "list_type", "is_instance_of"), "a list"),
    **dict.fromkeys(
        ("dict_type", "model_type", "model_attributes_type", "dataclass_type"),
        "a mapping of keys to values",
    ),
    "string_type": "text",
}
"""The kind of value that each of pydantic's error types asks for."""


@dataclass_transform(frozen_default=True)
def validated_dataclass(
    place: str, error: type[WidthsearchError] = StudyError
) -> Callable[[type[T]], type[T]]:
    """Make a class a frozen pydantic dataclass whose constructor raises one-line errors.

    As a field of another pydantic model the class is validated by that model, whose errors then
    name the whole path.

    Args:
        place: The name of the section that the class describes; begins each message.
        error: The type of the error.

    Example:
        >>> from pydantic import Field
        >>> @validated_dataclass("cooking")
        ... class Cooking:
        ...     minutes: int = Field(default=3, gt=0)
        >>> Cooking(minutes="5")
        Cooking(minutes=5)
        >>> Cooking(minutes=0)
        Traceback (most recent call last):
        widthsearch.errors.StudyError: cooking.minutes must be greater than 0, but was 0
        >>> Cooking(minute=5)
        Traceback (most recent call last):
        widthsearch.errors.StudyError: unknown key 'cooking.minute'; did you mean 'minutes'?
    """

    def decorate(cls: type[T]) -> type[T]:
        made: Any = pydantic.dataclasses.dataclass(
            cls, frozen=True, config=ConfigDict(extra="forbid")
        )
        validate = made.__init__

        @functools.wraps(validate)
        def construct(self: T, *args: Any, **fields: Any) -> None:
            try:
                validate(self, *args, **fields)
            except ValidationError as cause:
                raise error(explain(cause, {place: made}, place)) from None
            given = {**dict(zip(_keys(made), args, strict=False)), **fields}
            if fault := boolean_as_number(given, self, place):
                raise error(fault)

        made.__init__ = construct
        return made  # type: ignore[no-any-return]

    return decorate


def filled(cls: Any, values: Mapping[str, Any], place: str) -> Any:
    """An instance of a user's dataclass with these values, each checked by its annotation.

    Args:
        cls: The dataclass.
        values: The values by field.
        place: The place of the values in the configuration, for messages.

    Raises:
        StudyError: A key is no field, a field is missing, or a value is of another type.

    Example:
        >>> @dataclasses.dataclass
        ... class Cooking:
        ...     minutes: int
        >>> filled(Cooking, {"minutes": 5}, "cooking")
        Cooking(minutes=5)
        >>> filled(Cooking, {"minutes": "long"}, "cooking")
        Traceback (most recent call last):
        widthsearch.errors.StudyError: cooking.minutes must be a whole number, but was 'long'
    """
    known = _keys(cls)
    for key in values.keys() - set(known):
        raise StudyError(f"unknown key {f'{place}.{key}'.lstrip('.')!r}{hint(key, known)}")
    try:
        made = TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise StudyError(explain(error, {place: cls}, place)) from None
    if fault := boolean_as_number(values, made, place):
        raise StudyError(fault)
    return made


def boolean_as_number(given: Any, made: Any, place: str) -> str | None:
    """The fault of the first true or false that a validation took for a number; None without one.

    A bool of Python is an int, so that pydantic takes ``epochs: true`` for one epoch.

    Args:
        given: The value before its validation.
        made: The value after it.
        place: Its place in the configuration.

    Example:
        >>> boolean_as_number({"lr": True, "flip": True}, {"lr": 1.0, "flip": True}, "recipe")
        'recipe.lr must be a number, but was True'
    """
    if isinstance(given, bool):
        number = isinstance(made, int | float) and not isinstance(made, bool)
        kind = "a whole number" if isinstance(made, int) else "a number"
        return f"{place} must be {kind}, but was {given!r}" if number else None
    inner: Iterable[tuple[Any, Any, Any]] = ()
    if isinstance(given, Mapping):
        inner = (
            (k, v, made.get(k) if isinstance(made, Mapping) else getattr(made, str(k), None))
            for k, v in given.items()
        )
    elif isinstance(given, list | tuple) and isinstance(made, list | tuple):
        inner = zip(itertools.count(), given, made, strict=False)
    faults = (boolean_as_number(v, m, f"{place}.{k}".lstrip(".")) for k, v, m in inner)
    return next(filter(None, faults), None)


def explain(error: ValidationError, sections: Mapping[str, Any], root: str = "") -> str:
    """The first fault that a validation found, in one line.

    Args:
        error: Pydantic's error.
        sections: The model or dataclass at each place that has keys, to suggest a key; ``""`` is
            the outermost.
        root: The place of the object that was validated, which pydantic does not know.
    """
    faults: list[dict[str, Any]] = [
        {**fault, "place": _place(fault["loc"], sections, root)}
        for fault in error.errors(include_url=False)
    ]
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    if faults[0]["type"] in ("missing", "missing_argument"):  # perhaps it is misspelt
        section = _section(faults[0])
        misspelt = [f for f in faults if f["type"] in unknown and _section(f) == section]
        faults = misspelt or faults
    # A union has a fault for each of its types: the deepest one belongs to the closest type.
    inside = [f for f in faults if f"{f['place']}.".startswith(f"{faults[0]['place']}.")]
    first = max(inside, key=lambda f: f["place"].count("."))
    place, kind = first["place"], first["type"]
    if kind in unknown:
        key = str(first["loc"][-1])
        return f"unknown key {place!r}{hint(key, _keys(sections[_section(first)]))}"
    if kind in ("missing", "missing_argument"):
        return f"key {place!r} is missing"
    if kind == "value_error":
        message = str(first["ctx"]["error"])
        if not place or message.startswith("must "):
            return f"{place} {message}".strip()
        return f"{place}: {message}"
    return (
        f"{place} {_rule([f for f in faults if f['place'] == place])}, but was {first['input']!r}"
    )


def hint(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: the closest known name, or all of them."""
    known = sorted(known)
    return "; " + did_you_mean(name, known, f"known are {', '.join(known)}")


def _section(fault: Mapping[str, Any]) -> str:
    """The place of the object that a key is in; a key may hold dots."""
    place: str = fault["place"]
    return place.removesuffix(str(fault["loc"][-1])).removesuffix(".")


def _keys(section: Any) -> list[str]:
    if issubclass(section, BaseModel):
        return list(section.model_fields)
    return [field.name for field in dataclasses.fields(section)]


def _place(location: tuple[int | str, ...], sections: Mapping[str, Any], root: str) -> str:
    """The path to a fault, without the names of the types that a union tried there."""
    types, made = (
        ("str", "int", "float"),
        ("[", "dict[", "json-or-python[", "function-", "callable"),
    )
    parts = [str(part) for part in location]
    if location and isinstance(location[0], int):  # a positional argument
        parts[0] = _keys(sections[root])[location[0]]
    return ".".join(
        part for part in (root, *parts) if part and part not in types and not part.startswith(made)
    )


def _rule(faults: list[Any]) -> str:
    """The rule at one place, where a union has a fault for each of its types."""
    kind, context = faults[0]["type"], faults[0].get("ctx", {})
    if kind in _KINDS:
        kinds = (_KINDS[fault["type"]] for fault in faults if fault["type"] in _KINDS)
        return f"must be {' or '.join(dict.fromkeys(kinds))}"
    if kind in ("too_short", "too_long"):
        bound, word = ("min_length", "least") if kind == "too_short" else ("max_length", "most")
        count = context[bound]
        return f"must have at {word} {count} item{'s' * (count != 1)}"
    if kind == "union_tag_invalid":
        key, tags = context["discriminator"].strip("'"), context["expected_tags"]
        return f"must have the {key} {tags.replace(', ', ' or ')}"
    rule = str(faults[0]["msg"]).replace("Input should", "must")
    return f"{rule[0].lower()}{rule[1:]}"
