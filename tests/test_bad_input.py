"""Bad input: each case ends in success, or in one line of the package's own errors.

A case gives the package a file as a user or a stranger may have written it, most of them valid.
It must not leave a traceback, run for ever, run code of the file, or change a file that it was
given. ``WIDTHSEARCH_BAD_INPUT=50000 pytest tests/test_bad_input.py`` tries more cases.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import sqlite3
import tempfile
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import bad_files
import own
import pytest
import study_grammar as grammar
from bad_files import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from torch import nn

from widthsearch import cli, commands, errors, export
from widthsearch.data.config import TaskConfig
from widthsearch.data.folders import ImageFiles
from widthsearch.errors import WidthsearchError
from widthsearch.proposers import PROPOSERS, proposer_class
from widthsearch.space.search_space import SearchSpace
from widthsearch.study import driver
from widthsearch.study.config import StudyConfig
from widthsearch.study.sections import ProposerConfig
from widthsearch.study.storage import Store
from widthsearch.utils.files import VARIABLE
from widthsearch.utils.safe_yaml import load_yaml

DEFAULT = 2000
CASES = int(os.environ.get("WIDTHSEARCH_BAD_INPUT", DEFAULT))
SECONDS = 10
"""The most CPU time of a case."""

COMMANDS = ("space", "propose", "run", "pareto")
PNG = bad_files.IMAGE
SEEN: set[str] = set()
"""The places of the keys that the cases have used."""


class TrainingReached(Exception):  # noqa: N818 - no error
    """A study passed all checks: its storage would be opened, and training would begin."""


def _reached(*_: Any, **__: Any) -> NoReturn:
    raise TrainingReached


def _took_too_long(*_: Any) -> NoReturn:
    raise AssertionError(f"it took more than {SECONDS} s of CPU time")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """A context that must end within some CPU time."""
    numbers = (signal.SIGVTALRM, signal.SIGALRM)
    before = [signal.signal(number, _took_too_long) for number in numbers]
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    signal.alarm(12 * SECONDS)  # a case that waits takes no CPU time
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.alarm(0)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def contents(folder: Path) -> dict[str, bytes | str]:
    """The bytes of each file below a folder, and where each link leads."""
    return {
        str(path): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def outcome(case: Callable[[], object], folder: Path) -> type[WidthsearchError] | None:
    """The error of a case, which must be one line; None for success. No file may change."""
    before = contents(folder)
    found: type[WidthsearchError] | None = None
    try:
        with bounded():
            case()
    except TrainingReached:
        pass
    except WidthsearchError as error:
        assert str(error).isprintable() and 0 < len(str(error)) < 3000, str(error)
        found = type(error)
    after = contents(folder)
    assert {path: after.get(path) for path in before} == before
    assert not (folder / "CANARY").exists()
    return found


def command(*arguments: str) -> None:
    """Run a command: its error must be one line with exit code 2, and is raised."""
    raised: list[WidthsearchError] = []

    def recorded(function: Callable[[Any], int], options: Any) -> int:
        try:
            return function(options)
        except WidthsearchError as error:
            raised.append(error)
            raise

    out, err = io.StringIO(), io.StringIO()
    functions = {name: partial(recorded, getattr(commands, name)) for name in COMMANDS}
    with (
        mock.patch.multiple(commands, **functions),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
    line = err.getvalue()
    if code:
        assert code == 2 and line.startswith("error: ") and line.count("\n") == 1, (code, line)
        raise raised[0] if raised else WidthsearchError(line.strip())


# --- the kinds of cases ---


@st.composite
def study_files(draw: st.DrawFn) -> Case:
    """A study file: most are valid, a quarter has odd values, a quarter is damaged text."""
    kind = draw(st.sampled_from(["valid", "valid", "mutated", "damaged"]))
    documents = grammar.documents()
    if kind == "damaged":
        content = draw(grammar.damaged(documents, "CANARY"))
    else:
        document = draw(documents if kind == "valid" else grammar.mutated(documents))
        content = grammar.text_of(document).encode("utf-8", "surrogatepass")
        SEEN.update(keys_of(document))
    how = draw(st.sampled_from(["run", "run", "run", "space", "propose"]))
    more = {
        "run": ["--runs", "runs"],
        "space": [],
        "propose": ["--method", "uniform", "--budget", draw(st.sampled_from(["1", "1.5"]))],
    }[how]

    def case(folder: Path) -> Callable[[], object]:
        (folder / "study.yaml").write_bytes(content)
        grammar.space().save_widths(folder / "widths.json", 0.5)
        for each in ("train/a", "train/b", "test/a", "test/b"):
            (folder / "images" / each).mkdir(parents=True)
            for i in range(5):
                (folder / "images" / each / f"{i}.png").write_bytes(PNG)
        return lambda: valid(how) if kind == "valid" else command(how, "study.yaml", *more)

    def valid(how: str) -> None:
        try:
            command(how, "study.yaml", *more)
        except WidthsearchError as error:
            raise AssertionError(f"a valid study is refused: {error}") from error

    return case


ODD_ARGUMENTS = st.sampled_from(
    [text for text in grammar.ODD_TEXTS if "\x00" not in text]
    + ["3x8x8", "0x0", "1e400", "0.5", "9" * 5000, "uniform", "study_grammar:space", "--json"]
) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=5)


@st.composite
def arguments(draw: st.DrawFn) -> Case:
    """A command line of ``space`` or ``propose`` with up to two odd words."""
    seed, budget = draw(st.integers(0, 2**32)), draw(st.floats(0.1, 3))
    line = draw(st.sampled_from(LINES)).format(seed, budget).split()
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 2]))):
        line[draw(st.integers(1, len(line) - 1))] = draw(ODD_ARGUMENTS)
    return lambda folder: lambda: command(*line)


LINES = (
    "space study_grammar:space --json",
    "space study_grammar:narrow --check --device meta",
    "propose study_grammar:space --method random --budget {1} --seed {0} --set members=4",
    "propose study_grammar:space --method uniform --budget {1} --epochs 3 --seed {0} --json",
)


@st.composite
def stored_studies(draw: st.DrawFn) -> Case:
    """The front of a stored study."""
    storage = draw(bad_files.storages())
    form = draw(st.sampled_from([[], ["--json"], ["--csv"]]))

    def case(folder: Path) -> Callable[[], object]:
        study = storage(folder / "study")
        return lambda: command("pareto", str(study), *form)

    return case


def keys_of(document: Any, place: str = "") -> set[str]:
    """The places of the keys in a document."""
    found = {place}
    for key, value in document.items() if isinstance(document, dict) else ():
        found |= keys_of(value, f"{place}.{key}".lstrip("."))
    return found


KINDS: dict[str, tuple[float, st.SearchStrategy[Case]]] = {
    "study files": (0.64, study_files()),
    "arguments": (0.03, arguments()),
    "widths files": (0.06, bad_files.widths_files()),
    "space files": (0.06, bad_files.space_files()),
    "profiles": (0.05, bad_files.profiles()),
    "trained folders": (0.05, bad_files.trained_folders()),
    "checkpoints": (0.05, bad_files.checkpoints()),
    "image folders": (0.03, bad_files.image_folders()),
    "storages": (0.03, stored_studies()),
}
"""The share of each kind of cases, and its cases."""


def outcomes(kind: str, folder: Path) -> Counter[type[WidthsearchError] | None]:
    """How often cases of one kind, in a folder, end with each error, and with success (None)."""
    share, cases = KINDS[kind]
    found: Counter[type[WidthsearchError] | None] = Counter()

    @settings(
        max_examples=max(1, round(share * CASES)),
        deadline=None,
        database=None,
        derandomize=CASES == DEFAULT,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def run(case: Case) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as name, contextlib.chdir(name):
            os.environ[VARIABLE] = str(Path(name, "cache"))
            found[outcome(case(Path(name)), Path(name))] += 1

    with (
        mock.patch.dict(os.environ),
        mock.patch.object(driver.Store, "create", _reached),
        warnings.catch_warnings(),
    ):
        run()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_one_line(kind: str, tmp_path: Path) -> None:
    """Each case succeeds or has one line, and a third of all succeed."""
    found = outcomes(kind, tmp_path)
    print(kind, {error and error.__name__: count for error, count in found.items()})
    assert found[None] * 3 >= found.total()


def _untraceable() -> object:
    return SearchSpace.from_model(lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(9, 2)), (4,))


HITS: dict[type[WidthsearchError], Callable[[], object]] = {
    errors.WidthsError: lambda: grammar.space().widths({"first": 10**6}),
    errors.TraceError: _untraceable,
    errors.SpaceError: partial(command, "space", "torchvision:resnet19"),
    errors.DataError: lambda: TaskConfig("digits", folder="none"),
    errors.ImageError: lambda: ImageFiles.of("none", ["none.png"], size=None),
    errors.DeviceError: partial(
        command, "space", "study_grammar:space", "--check", "--device", "x"
    ),
    errors.StudyError: partial(command, "run", "none.yaml"),
    errors.StorageError: lambda: Store.open("no_such_database://", "none"),
    errors.CheckpointError: lambda: own.trial(Path("none")).load(),
}


def test_every_error_class_is_hit(tmp_path: Path) -> None:
    """Each class of ``errors.py`` is the error of some case, in one line."""
    known = {each for each in vars(errors).values() if isinstance(each, type)}
    kinds = {each for each in known if issubclass(each, WidthsearchError)} - {WidthsearchError}
    assert set(HITS) == kinds
    for kind, case in HITS.items():
        assert outcome(case, tmp_path) is kind


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a\nb", "a\\nb"),
        ("\x1b[31m\u202e\ud800é", "\\x1b[31m\\u202e\\ud800é"),
        ("x" * 5000 + "y", "x" * 1000 + " … " + "x" * 999 + "y"),
    ],
)
def test_a_message_is_one_line(given: str, message: str) -> None:
    """Of printable text, and of a bounded length."""
    assert str(errors.SpaceError(given)) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: 1, a: 2}", "key 'a' is given twice (line 1, column 8)"),
        ("a: 0x" + "f" * 5000, "whole numbers must be at most 2^64, but one is larger"),
        ("a: !!bool maybe", "'maybe'"),
        ("a: [!!binary /w==]", "values must be texts, numbers and the like, but one is binary"),
        ("a: &a [*a]", "it must have at most 10,000 values, aliases expanded"),
        ("[" * 5000, "maximum recursion depth exceeded"),
        (
            "a: !!python/object/apply:os.abort []",
            "could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.abort' (line 1, column 4)",
        ),
    ],
)
def test_unsafe_yaml_is_refused(text: str, message: str) -> None:
    """Also in the value of a field on the command line."""
    with pytest.raises(ValueError) as error:
        load_yaml(text)
    assert str(error.value).startswith(message)
    with pytest.raises(WidthsearchError, match="a field's value is YAML"):
        line = "propose", "own:space", "--method", "uniform", "--budget", "1", "--set", f"a={text}"
        command(*line)


@pytest.mark.parametrize("name", ["front.json", "front.png"])
def test_a_link_in_a_study_is_replaced_and_not_followed(name: str, tmp_path: Path) -> None:
    """A stranger's folder has a link where a command writes: the file that it leads to is safe."""
    mine = tmp_path / "mine"
    mine.write_text("precious")
    folder = tmp_path / "study"
    folder.mkdir()
    with sqlite3.connect(folder / "study.db") as connection:
        connection.executescript(bad_files.SCHEMA2.read_text())
    connection.close()
    (folder / "study.yaml").write_bytes(bad_files.SCHEMA2.with_suffix(".yaml").read_bytes())
    (folder / name).symlink_to(mine)
    command("pareto", str(folder), "--plot")
    assert mine.read_text() == "precious"
    assert (folder / name).is_file() and not (folder / name).is_symlink()


def test_a_card_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function that it names is imported once the caller names it, too."""
    for name, content in bad_files.trained().items():
        (tmp_path / name).write_bytes(content)
    card = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "theirs.py").write_text(
        "from pathlib import Path\nfrom study_grammar import space\nPath('CANARY').touch()\n"
    )
    monkeypatch.chdir(tmp_path)
    reference = f"{tmp_path / 'theirs.py'}:space"
    card["space"]["reference"] = reference
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(errors.StudyError) as error:
        export.load(tmp_path)
    assert str(error.value) == (
        f"a card's code must be trusted before it is imported, but {str(tmp_path / 'card.json')!r} "
        f"names {reference!r}: if you trust that, load(folder, space={reference!r})"
    )
    assert not (tmp_path / "CANARY").exists()
    assert isinstance(export.load(tmp_path, reference), grammar.Net)
    assert (tmp_path / "CANARY").exists()


def leaves(section: Any, place: str = "") -> Iterator[str]:
    """The places of all keys of a model or dataclass, and of those that it holds."""
    model = issubclass(section, BaseModel)
    fields = section.model_fields if model else {f.name: f for f in dataclasses.fields(section)}
    hints = {name: f.annotation for name, f in fields.items()} if model else {}
    hints = hints or {name: typing.get_type_hints(section)[name] for name in fields}
    for name, annotation in hints.items():
        path = f"{place}.{name}".lstrip(".")
        inner = [c for c in classes(annotation) if section is StudyConfig]
        several = len(inner) > 1 and name != "recipe"
        for each in inner:
            yield from leaves(each, f"{path}.{each.__name__}" if several else path)
        if not inner:
            yield path
    if section is ProposerConfig:
        for method in PROPOSERS:
            yield from leaves(proposer_class(method), f"{place}.{method}")


def classes(annotation: Any) -> list[type]:
    """The models and dataclasses of the package in an annotation."""
    if isinstance(annotation, type) and annotation.__module__.startswith("widthsearch"):
        return [annotation]
    return [each for inner in typing.get_args(annotation) for each in classes(inner)]


def test_the_grammar_reaches_every_key() -> None:
    """Of the configuration and of its sections, by their fields; the cases have used them all."""
    assert set(grammar.VALID) == set(leaves(StudyConfig))
