"""Files that a stranger may give the package: each strategy draws one case of one kind.

A case is a function of a folder: it writes the files, and returns the call that reads them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import sqlite3
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import own
import study_grammar as grammar
import torch
from hypothesis import strategies as st
from PIL import Image

from widthsearch import export
from widthsearch.data.config import TaskConfig
from widthsearch.data.tasks import load_task
from widthsearch.latency.config import LatencyConfig
from widthsearch.latency.profiles import load_profile, profile_path
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.job import CHECKPOINT

LARGER = st.floats(1, 9)
Case = Callable[[Path], Callable[[], object]]
SCHEMA2 = Path(__file__).parent / "fixtures" / "schema2.sql"


class Code:
    """Touches a file when it is unpickled."""

    def __reduce__(self) -> Any:
        """The call."""
        return os.system, ("touch CANARY",)


PICKLES = tuple(pickle.dumps(Code(), protocol) for protocol in (0, 2, 4))


def saved(value: Any, **options: Any) -> bytes:
    """A value in torch's format."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


HOSTILE = (*PICKLES, saved(Code()), saved({"a": Code()}), saved({"a": Code()}, pickle_protocol=4))


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file that was cut, has a changed byte, or is another one."""
    at = draw(st.integers(0, len(content) - 1))
    how = draw(st.sampled_from(["cut", "byte", "other"]))
    if how == "cut":
        return content[:at]
    if how == "byte":
        return content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    others = (b"", b"null", b"[[]]", b"{}", b"[" * 50_000, b'{"a":' * 50_000, b"\xff\xfe", *HOSTILE)
    return draw(st.sampled_from(others) | st.binary(max_size=40))


def json_files(content: Any) -> st.SearchStrategy[bytes]:
    """A JSON file: as it was written, mostly, or with other values, or damaged."""
    whole = json.dumps(content).encode()
    other = grammar.mutated(st.builds(json.loads, st.just(whole)))
    as_json = other.map(lambda values: json.dumps(values, default=str, skipkeys=True).encode())
    return st.sampled_from([True, True, False]).flatmap(
        lambda valid: st.just(whole) if valid else as_json | damaged(whole)
    )


# --- widths and spaces ---


@st.composite
def widths_files(draw: st.DrawFn) -> Case:
    """A widths file, read by ``widthsearch space --widths``."""
    space = grammar.space()
    vector = [draw(st.sampled_from(axis.grid)) for axis in space.axes]
    content = {
        "space": space.name,
        "fingerprint": space.fingerprint,
        "base": {axis.name: axis.base for axis in space.axes},
        "widths": dict(zip(space.names, vector, strict=True)),
    }
    file = draw(json_files(content))

    def case(folder: Path) -> Callable[[], object]:
        (folder / "widths.json").write_bytes(file)
        return lambda: space.cost(space.load_widths(folder / "widths.json"))

    return case


@st.composite
def space_files(draw: st.DrawFn) -> Case:
    """A space file; of the changed ones half have the digest of their content."""
    constraints = {"pin": draw(st.sampled_from([(), "first", "second"])), "max_width": draw(LARGER)}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "space.json")
        grammar.space().constrained(**constraints).save(path)
        written = path.read_bytes()
    file = draw(json_files(json.loads(written)))
    if draw(st.booleans()):
        try:
            values = json.loads(file)
            text = json.dumps(values["content"], sort_keys=True)
            values["digest"] = hashlib.sha256(text.encode()).hexdigest()
            file = json.dumps(values).encode()
        except (ValueError, TypeError, KeyError, RecursionError):
            pass

    def read(path: Path) -> None:
        space = SearchSpace.load(path, grammar.Net)
        space.cost(space.base)
        space.build(space.base, initialise=False)

    def case(folder: Path) -> Callable[[], object]:
        (folder / "space.json").write_bytes(file)
        return lambda: read(folder / "space.json")

    return case


# --- latency profiles ---


@st.composite
def profiles(draw: st.DrawFn) -> Case:
    """A latency profile in the cache, which the environment puts into the folder."""
    space, config = grammar.space(), LatencyConfig()
    content = {
        "space": space.name,
        "fingerprint": space.fingerprint,
        "setting": {},
        "base_ms": 1.0,
        "vectors": [list(space.widths(size).vector) for size in (0.5, 1, 1.5)],
        "ms": [draw(LARGER), 1.0, draw(LARGER)],
        "sd": [0.1, 0.1, 0.0],
        "errors": None,
    }
    file = draw(json_files(content))

    def read() -> None:
        model = load_profile(space, config)
        assert model is not None
        model(space.base.vector)

    def case(folder: Path) -> Callable[[], object]:
        path = profile_path(space, config)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)
        return read

    return case


# --- trained folders ---


@cache
def trained() -> dict[str, bytes]:
    """The files of a trained folder."""
    space = grammar.space()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "widths.json")
        space.save_widths(path, space.base)
        widths = path.read_bytes()
    card = {
        "space": {
            "reference": None,
            "input": None,
            "classes": None,
            "constraints": {"pin": [], "tie": [], "min": None},
            "name": space.name,
        },
    }
    return {
        "widths.json": widths,
        "weights.pt": saved(space.build(space.base, seed=0).state_dict()),
        "card.json": json.dumps(card).encode(),
    }


REFERENCES = (
    *("evil.py:space", "{folder}/evil.py:space", "evil:space", "os:abort", "../evil.py:space"),
    *("study_grammar:space", "torchvision:resnet0", "torchvision:", "", 3, None, ["a"]),
)


@st.composite
def trained_folders(draw: st.DrawFn) -> Case:
    """A trained folder with a file changed, or a card that names code."""
    files, space = dict(trained()), draw(st.booleans())
    changed = draw(st.sampled_from([None, None, None, "reference", "kind", *files]))
    card = json.loads(files["card.json"])
    if changed == "card.json":
        files[changed] = draw(json_files(card))
    elif changed == "widths.json":
        files[changed] = draw(json_files(json.loads(files[changed])))
    elif changed == "weights.pt":
        files[changed] = draw(damaged(files[changed]))
    card["space"]["reference"] = draw(st.sampled_from(REFERENCES))
    kind = draw(st.sampled_from(["pipe", "link", "folder", "missing"]))
    name = draw(st.sampled_from(sorted(files)))

    def case(folder: Path) -> Callable[[], object]:
        for each, content in files.items():
            (folder / each).write_bytes(content)
        if changed == "reference":
            text = json.dumps(card).replace("{folder}", str(folder))
            (folder / "card.json").write_text(text)
            (folder / "evil.py").write_text("from pathlib import Path\nPath('CANARY').touch()\n")
        if changed == "kind":
            (folder / name).unlink()
            if kind == "pipe":
                os.mkfifo(folder / name)
            elif kind == "link":
                (folder / name).symlink_to("/dev/zero" if space else folder / name)
            elif kind == "folder":
                (folder / name).mkdir()
        return lambda: export.load(folder, None if changed == "reference" else grammar.space())

    return case


# --- checkpoints ---


@st.composite
def checkpoints(draw: st.DrawFn) -> Case:
    """A checkpoint with a changed header, or changed content whose digest fits."""
    net = own.space().build(own.space().base, seed=0)
    row = [1, 0.5, draw(LARGER), 0.1, "", {"rmse": 0.7}]
    state: Any = {"curve": [row], "state": {"network": net.state_dict()}}
    how = draw(
        st.sampled_from(
            ["whole", "whole", "whole", "whole", "whole", "state", "pickle", "bytes", "header"]
        )
    )
    if how == "state":
        state = draw(grammar.mutated(st.just({"curve": [row], "state": 1}).map(_copied)))
    try:
        payload = saved(state)
    except (OverflowError, RecursionError):  # a value that torch does not save
        payload = b""
    if how == "pickle":
        payload = draw(st.sampled_from(HOSTILE))
    elif how == "bytes":
        payload = draw(damaged(payload))
    trial = own.trial(Path("trial"))
    header: Any = {"format": 1, "run": trial._identity}
    header["sha256"] = hashlib.sha256(payload).hexdigest()
    first = draw(json_files(header)) if how == "header" else json.dumps(header).encode()

    def read(path: Path) -> None:
        training = own.trial(path)
        training.load()
        assert training.epoch == len(training.curve)

    def case(folder: Path) -> Callable[[], object]:
        (folder / CHECKPOINT).write_bytes(first + b"\n" + payload)
        return lambda: read(folder)

    return case


def _copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


# --- folders of images ---


def _image(mode: str = "RGB", size: tuple[int, int] = (8, 8), form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, form)
    return buffer.getvalue()


IMAGE = _image()


def _huge() -> bytes:
    """A PNG of a few bytes that claims to have 10^10 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


IMAGES = (
    *(_image("L"), _image("P"), _image("RGBA"), _image("1"), _image(form="JPEG")),
    *(_image(form="GIF"), _image(form="TIFF"), _image("I;16"), _image("F", form="TIFF")),
    *(_image(size=(1, 9)), _image(size=(3000, 1)), _huge(), b"", b"GIF89a", b"P6 9999999 9 255 "),
)
NAMES = (
    "é 名.png",
    "a\nb.png",
    "%s.png",
    ".hidden.png",
    "no image.txt",
    "x" * 200 + ".png",
    "_.JPG",
)


@st.composite
def image_folders(draw: st.DrawFn) -> Case:
    """A folder of images with one file, link, pipe or folder more."""
    content = draw(st.sampled_from([_image(), *IMAGES]) | damaged(_image()))
    kind = draw(st.sampled_from(["none", "none", "file", "file", "link", "loop", "pipe", "folder"]))
    name, half = draw(st.sampled_from(NAMES)), draw(st.sampled_from(["train/a", "test/b", "train"]))
    size = draw(st.sampled_from([None, 8, 1, 100]))

    def case(folder: Path) -> Callable[[], object]:
        for each in ("train/a", "train/b", "test/a", "test/b"):
            (folder / each).mkdir(parents=True)
            for i in range(3):
                (folder / each / f"{i}.png").write_bytes(_image())
        path = folder / half / name
        if kind == "file":
            path.write_bytes(content)
        elif kind == "link":
            path.symlink_to("/dev/zero")
        elif kind == "loop":
            path.symlink_to(folder)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        return lambda: load_task(TaskConfig("image_folder", str(folder), image_size=size))

    return case


# --- storages ---

ATTRIBUTES = st.sampled_from(["study_user_attributes", "trial_user_attributes"])
STATEMENTS = (
    *("DROP TABLE studies", "DROP TABLE trial_params", "UPDATE version_info SET schema_version=99"),
    *("UPDATE alembic_version SET version_num='v9'", "DELETE FROM trial_params", "SELECT 1"),
    *("DELETE FROM study_user_attributes", "DELETE FROM trial_user_attributes", "SELECT 2"),
    *("UPDATE trials SET state='RUNNING'", "UPDATE trials SET state='ODD'", "SELECT 3"),
    *("UPDATE trial_values SET value=NULL", "UPDATE trial_params SET param_value=1e300"),
    *("UPDATE studies SET study_name='other'", "DELETE FROM study_directions", "VACUUM"),
    "UPDATE study_user_attributes SET value_json='99' WHERE key='schema'",
)


@st.composite
def storages(draw: st.DrawFn) -> Callable[[Path], Path]:
    """A study's folder whose storage another program, another version or a fault has changed."""
    how = draw(st.sampled_from([*["none"] * 5, "sql", "value", "value", "bytes", "alien"]))
    statement, table = draw(st.sampled_from(STATEMENTS)), draw(ATTRIBUTES)
    which, value = draw(st.integers(0, 60)), draw(grammar.ODD_VALUES)
    garbage = draw(st.binary(min_size=1, max_size=300))

    def case(folder: Path) -> Path:
        folder.mkdir()
        path = folder / "study.db"
        with sqlite3.connect(path) as connection:
            if how == "alien":
                connection.execute("CREATE TABLE other (a)")
            else:
                connection.executescript(SCHEMA2.read_text())
            if how == "sql":
                connection.isolation_level = None
                connection.execute(statement)
            if how == "value":
                rows = connection.execute(f"SELECT rowid, value_json FROM {table}").fetchall()
                row, text = rows[which % len(rows)]
                changed = json.dumps(_spoiled(json.loads(text), value), default=str, skipkeys=True)
                update = f"UPDATE {table} SET value_json=? WHERE rowid=?"
                connection.execute(update, (changed, row))
        connection.close()
        if how == "bytes":
            path.write_bytes(path.read_bytes()[:100] + garbage)
        (folder / "study.yaml").write_bytes(SCHEMA2.with_suffix(".yaml").read_bytes())
        return folder

    def _spoiled(content: Any, other: Any) -> Any:
        """The content with one of its values exchanged."""
        found = grammar.places(content)
        if not found or which % 3 == 0:
            return other
        *place, last = found[which * 7 % len(found)]
        inner = content
        for key in place:
            inner = inner[key]
        inner[last] = other
        return content

    return case
