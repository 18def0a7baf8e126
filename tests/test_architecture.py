"""``docs/architecture.md`` describes the package as it is, and pages name files that exist."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TREE, LAYERS = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)


def described_files() -> list[Path]:
    """The files in the tree of the page; each line has a description, but that of the root."""
    folders: list[str] = []
    files = []
    for line in TREE.splitlines():
        if not line:
            continue
        indent, name, description = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()  # type: ignore[union-attr]
        folders = folders[: len(indent) // 2]
        assert description or not folders, line
        if name.endswith("/"):
            folders.append(name)
        else:
            files.append(Path(*folders, name))
    return files


def test_the_tree_names_every_file_once() -> None:
    """No module is missing, and no line names a file that does not exist."""
    existing = [
        path.relative_to(ROOT)
        for path in (ROOT / "widthsearch").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    ]
    expected = [path for path in existing if len(path.parts) == 2 or path.name != "__init__.py"]
    described = described_files()
    assert len(described) == len(set(described))
    assert set(described) - set(expected) == set()
    assert set(expected) - set(described) == set()


def test_the_tree_names_every_package() -> None:
    """A package's own line stands for its ``__init__.py``."""
    packages = {path.parent.name for path in (ROOT / "widthsearch").rglob("__init__.py")}
    assert set(re.findall(r"(\w+)/ ", TREE.replace("/\n", "/ \n"))) == packages


def test_the_layers_are_those_of_the_contract() -> None:
    """The order on the page is the one that import-linter checks."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if each["type"] == "layers")
    shown = [set(layer.split(" | ")) for layer in LAYERS.strip().split(" < ")]
    assert shown == [set(layer.split(" | ")) for layer in reversed(layers)]


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, within functions too; not those for types."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(module):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name in MODULES}


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "widthsearch").rglob("*.py")
}
"""The files of the package by module."""


def test_no_import_is_circular() -> None:
    """Import-linter compares packages; within one, files import each other in one direction too."""
    left = {name: imports_of(path) - {name, "widthsearch"} for name, path in MODULES.items()}
    while ready := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in ready:
            del left[name]
    assert left == {}


PYTHONS_OWN = {"os._exit", "sys._getframe", "copy._deepcopy_dispatch", "copy._reconstruct"}


def test_private_symbols_of_torch_are_in_one_file() -> None:
    """Others name no attribute with an underscore that the package does not define itself."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES.values()}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    own = {n.name for _, n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.attr for _, n in nodes if isinstance(n, ast.Attribute) and is_stored(n)}
    own |= {n.id for _, n in nodes if isinstance(n, ast.Name) and is_stored(n)}
    found = []
    for path, node in nodes:
        names: list[str] = []
        if isinstance(node, ast.Attribute) and not ast.unparse(node).startswith("aten."):
            names = [] if ast.unparse(node) in PYTHONS_OWN else [node.attr]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        private = [n for n in names if re.match("_[^_]", n) and n not in own]
        if private and path.name != "torch_internals.py":
            found.append(f"{path.name}:{node.lineno}: {private}")  # type: ignore[attr-defined]
    assert found == []


def is_stored(node: ast.Attribute | ast.Name) -> bool:
    """Whether an assignment defines it."""
    return isinstance(node.ctx, ast.Store)


def test_the_page_names_the_files_that_import_optuna() -> None:
    """Those of the contract."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    ignored = next(c["ignore_imports"] for c in contracts if "optuna" in str(c))
    files = {each.split(" -> ")[0].split(".", 1)[1].replace(".", "/") + ".py" for each in ignored}
    (rule,) = re.findall(r"^- only ([^;]*) import Optuna", PAGE, re.MULTILINE)
    assert {*re.findall(r"`(\S+)`", rule)} == files


def test_the_walks_name_what_exists() -> None:
    """Each function or class that a walk names is defined in the file that it names."""
    named = re.findall(r"`([A-Z_a-z.]+)`\s+\(`([\w/]+\.py)`", PAGE)
    assert len(named) > 60
    for name, file in named:
        code = (ROOT / "widthsearch" / file).read_text(encoding="utf-8")
        for part in name.split("."):
            defined = rf"^( *(def|class) {part}\b|{part}\b.* = )"
            assert re.search(defined, code, re.MULTILINE), f"{name} in {file}"


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/design.md",
        "docs/methods.md",
        "docs/reliability.md",
        "docs/scale.md",
    ],
)
def test_pages_name_files_that_exist(page: str) -> None:
    """Paths are relative to the root or to the package; NAME and the like are placeholders."""
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]+\.[a-z]+)`", text)
    assert paths
    roots = (ROOT, ROOT / "widthsearch", ROOT / "benchmarks" / "results")
    missing = [path for path in paths if not any((root / path).exists() for root in roots)]
    assert missing == []


WITHOUT_EXAMPLE = {
    "interpreter.TraceInterrupted": "an exception",
    "kernel.CostedSpace": "a protocol; `Coordinates.of` takes any search space",
    "progress.Notify": "a protocol of one call",
    "protocol.Proposer": "a protocol; README.md has an implementation",
    "ray_tune.Session": "starts Ray, so its example does not run",
    "trial.TrialState": "an enumeration",
}
"""Classes without an example that runs, each with the reason; errors need none either."""


def test_every_public_class_has_an_example() -> None:
    """In its docstring or its module's, as a doctest, which the suite runs."""
    missing = set()
    for path in (ROOT / "widthsearch").rglob("*.py"):
        module = ast.parse(path.read_text(encoding="utf-8"))
        shown = re.findall(r"^ *(?:>>>|\.\.\.) .*", ast.get_docstring(module) or "", re.MULTILINE)
        for node in module.body:
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            used = any(re.search(rf"\b{node.name}\b", line) for line in shown)
            if not used and ">>> " not in (ast.get_docstring(node) or ""):
                missing.add(f"{path.stem}.{node.name}")
    assert {name for name in missing if not name.endswith("Error")} == WITHOUT_EXAMPLE.keys()


def test_each_promise_names_tests_that_exist() -> None:
    """``docs/reliability.md``: every bullet of a promise has a test, and each test is defined."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 20
    for file, name in named:
        code = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", code, re.MULTILINE), f"{name} in {file}"
    promises, _ = text.split("## What is not promised")
    for bullet in re.split(r"^- ", promises, flags=re.MULTILINE)[1:]:
        assert "::test_" in bullet, bullet


def test_files_and_classes_stay_small() -> None:
    """At most 500 lines a file, and 300 a class."""
    long = []
    for folder in ("widthsearch", "tests", "benchmarks", "studies", "search_spaces", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if text.count("\n") > 500:
                long.append(path.name)
            for node in ast.walk(ast.parse(text)):
                lines = (getattr(node, "end_lineno", 0) or 0) - getattr(node, "lineno", 0) + 1
                if folder == "widthsearch" and isinstance(node, ast.ClassDef) and lines > 300:
                    long.append(f"{path.name}: {node.name}")
    assert long == []
