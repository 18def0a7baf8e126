"""A grammar of the study file: valid documents that use every key, and what people make of them.

``VALID`` has the valid values of each key by its place. :func:`documents` draws some keys and makes
them consistent (a latency section needs latency among the objectives, say). :func:`mutated` puts
odd values at random places, and :func:`damaged` changes the text. The functions at the end are
what the documents name: spaces, a trainer's data and datasets.
"""

from __future__ import annotations

import copy
import datetime
from functools import cache
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st
from torch import Tensor, nn

from widthsearch.bayesopt.metric import COSTS, EXACT_COSTS
from widthsearch.proposers import BASELINES, PROPOSERS
from widthsearch.space.search_space import SearchSpace
from widthsearch.utils import safe_yaml

Strategy = st.SearchStrategy[Any]
Document = dict[str, Any]


def one(*values: Any) -> Strategy:
    """One of these values."""
    return st.sampled_from(values)


def numbers(low: float, high: float) -> Strategy:
    """A float in between, both ends excluded."""
    return st.floats(low, high, exclude_min=True, exclude_max=True)


count, finite, share = st.integers(1, 40), numbers(0, 10), numbers(0, 1)
per, floor = one("macs", "channel", "params"), numbers(0, 0.5)
removal = {"per": one("channel", "macs"), "floor": floor, "members": count}
tuning = {
    "every": count,
    "lr": finite,
    "per": one("channel"),
    "pretrain": one(None, {"epochs": 2}),
    "weights": one(None, "base.pt"),
}
multiples = one(0.25, 0.5, 1, {"*": 0.5}, {"first": 2})

VALID: dict[str, Strategy] = {
    "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True),
    "space": one("study_grammar:space", "study_grammar:narrow"),
    "spaces": one(["study_grammar:space", "study_grammar:narrow"], ["study_grammar:space"]),
    "input": one([3, 32, 32]),
    "constraints.pin": one("first", ["first"], [], "f*t"),
    "constraints.tie": one([], ["*"], [["second", "third"]]),
    "constraints.min": multiples,
    "constraints.max": one(1, 1.5, 3, {"*": 2.0}, {"second": 32}),
    "constraints.step": one(1, 2, 4, {"*": 2}, {"second": 8}),
    "constraints.align": one("cpu", "cuda", "none", 4),
    "task.name": one("digits", "image_folder", "study_grammar:datasets"),
    "task.folder": one("images"),
    "task.image_size": one(8),
    "task.loading": one("resident", "stream"),
    "task.validation": numbers(0.05, 0.5),
    "task.split_seed": st.integers(0, 2**31),
    "task.crop_padding": st.integers(0, 7),
    "task.flip": st.booleans(),
    "task.cutout": st.integers(0, 8),
    "task.loss": one("cross_entropy"),  # the datasets have classes
    "trainer": one("own:train"),
    "data": one("own:data"),
    "final_data": one("own:data"),
    "loss": one("study_grammar:loss"),
    "batches": one("study_grammar:batches"),
    "recipe.epochs": st.integers(4, 10**6),
    "recipe.batch_size": st.integers(2, 6),
    "recipe.lr": finite,
    "recipe.momentum": share,
    "recipe.nesterov": st.booleans(),
    "recipe.optimizer": one("sgd", "SGD", "adamw", {"name": "RMSprop", "alpha": 0.9}),
    "recipe.clip_norm": st.none() | finite.filter(bool),
    "recipe.weight_decay": finite,
    "recipe.schedule": one("cosine", "one_cycle", "constant"),
    "recipe.warmup_epochs": one(None, 0, 1.5),
    "recipe.label_smoothing": share,
    "recipe.precision": one("auto", "fp32", "bf16"),
    "recipe.capture": st.booleans(),
    "start": one("scratch", ["scratch"]),
    "weights": one(None),  # tests/test_starts.py has files
    "importance": one("magnitude", "slimming", "sensitivity", "fisher"),
    "widths": one([], ["widths.json"]),
    "prior": one([]),  # tests/test_earlier.py has studies
    "proposers.method": one(*PROPOSERS, "own:small"),
    "proposers.activation_density.weights": one("reinit", "extract"),
    "proposers.activation_density.tolerance": share,
    "proposers.activation_density.patience": count,
    "proposers.activation_density.max_steps": st.none() | count,
    "proposers.activation_density.until": share,
    "proposers.activation_density.drop": finite,
    "proposers.activation_density.threshold": st.none() | finite,
    "proposers.sensitivity.batch_size": count,
    "proposers.sensitivity.batches": count,
    "proposers.sensitivity.cost": one("recomputed"),
    **{f"proposers.sensitivity.{key}": values for key, values in removal.items()},
    "proposers.synflow.rounds": count,
    "proposers.naswot.batch_size": count,
    "proposers.naswot.candidates": count,
    "proposers.naswot.members": count,
    **{f"proposers.synflow.{key}": values for key, values in removal.items()},
    "proposers.slimming.sparsity": st.none() | finite,
    "proposers.slimming.polarised": share,
    "proposers.slimming.trainings": count,
    "proposers.slimming.weights": one(None, "base.pt"),
    "proposers.slimming.recipe": one(None, {"epochs": 3, "lr": 0.1}),
    **{f"proposers.slimming.{key}": values for key, values in removal.items()},
    "proposers.filter_groups.groups": count,
    "proposers.filter_groups.penalty": finite,
    "proposers.filter_groups.group_lr": finite,
    "proposers.filter_groups.temperature": finite,
    "proposers.filter_groups.members": count,
    "proposers.filter_groups.learn": one(None, {"epochs": 2}),
    "proposers.filter_groups.pretrain": one(None, {"epochs": 2}),
    **{f"proposers.fisher.{key}": values for key, values in tuning.items()},
    **{f"proposers.magnitude.{key}": values for key, values in tuning.items()},
    "proposers.magnitude.norm": one("l1", "l2"),
    **{f"proposers.taylor.{key}": values for key, values in tuning.items()},
    "proposers.taylor.schedule": one("once", "turns"),
    "proposers.taylor.members": count,
    "proposers.uniform.members": count,
    "proposers.balanced.members": count,
    "proposers.constant.members": count,
    "proposers.taper.slope": st.floats(-3, 3),
    "proposers.taper.members": count,
    "proposers.random.lowest": share,
    "proposers.random.members": count,
    "budgets": st.lists(numbers(0, 2), min_size=1, max_size=5),
    "families": one(["linear"], ["power", "mixture"], ["mixture", "power", "linear", "copycat"]),
    "baselines": share,
    "metric.name": one("rmse", "val/f1", "accuracy"),
    "metric.goal": one("maximize", "minimize"),
    "metric.range": one([None, None], [0, 100], [None, 5.5], [-1, None]),
    "metric.transform": one(None, "linear"),
    "objectives": st.lists(one(*COSTS), unique=True, max_size=4),
    "limits": st.dictionaries(one(*EXACT_COSTS), one([0, 1e12], [None, None], [None, 2e9])),
    "latency.device": one("cpu"),
    "latency.backend": one("eager", "compile", "onnxruntime"),
    "latency.batch_size": count,
    "latency.threads": count,
    "latency.dtype": one("float32"),
    "latency.pairs": st.integers(4, 100),
    "early_stopping.FrontStopping.kind": one("front"),
    "early_stopping.FrontStopping.chance": share,
    "early_stopping.FrontStopping.finished": st.integers(3, 50),
    "early_stopping.FrontStopping.first_epoch": st.integers(1, 3),
    "early_stopping.Rungs.kind": one("rungs"),
    "early_stopping.Rungs.first_epoch": st.integers(1, 3),
    "early_stopping.Rungs.eta": st.integers(2, 9),
    "trials": st.integers(1, 10**6),
    "hours": st.floats(0.001, 1e9),
    "patience.suggestions": count,
    "patience.gain": share,
    "concurrency": st.integers(1, 64) | one("auto"),
    "resources.cpu": one(0.5, 1, 4, 1.0),
    "resources.gpu": one(0, 0.5, 1),
    "timeout": st.floats(0.001, 1e9),
    "device": one("cpu", "cuda", "cuda:0"),
    "seed": st.integers(0, 2**63 - 1),
    "storage": one("sqlite:///elsewhere.db", "postgresql+psycopg://me@localhost/studies"),
    "ray_address": one("auto", "10.0.0.1:6379"),
}


def section(place: str) -> Strategy:
    """Mappings of some of the keys below a place."""
    start = len(place) + 1
    keys = {key[start:]: values for key, values in VALID.items() if key.startswith(f"{place}.")}
    return st.fixed_dictionaries({}, optional={k: v for k, v in keys.items() if "." not in k})


def proposer(method: str) -> Strategy:
    """A method by its name alone, or with some of its fields."""
    return st.just(method) | section(f"proposers.{method}").map(lambda f: {"method": method, **f})


SECTIONS = ("constraints", "recipe", "latency", "resources", "task", "patience")
PLAIN = sorted(key for key in VALID if "." not in key)


@st.composite
def documents(draw: st.DrawFn) -> Document:
    """Valid documents."""
    drawn = {key: draw(VALID[key]) for key in PLAIN if key in ("name", "trials")}
    drawn |= {key: draw(VALID[key]) for key in draw(st.sets(one(*PLAIN), max_size=9))}
    drawn |= {key: draw(section(key)) for key in draw(st.sets(one(*SECTIONS), max_size=4))}
    own = (
        bool({"trainer", "data", "final_data", "loss", "batches"} & drawn.keys())
        or "input" in drawn
    )
    _choose_space(draw, drawn, own)
    _choose_data(draw, drawn, own)
    _choose_search(draw, drawn, own)
    _choose_machine(drawn, own)
    if "patience" in drawn:
        drawn["patience"].setdefault("suggestions", 3)
    if drawn.get("space") != "study_grammar:space" or "constraints" in drawn:
        drawn.pop("widths", None)  # the file is of that space
    return drawn


def _choose_space(draw: st.DrawFn, drawn: Document, own: bool) -> None:
    """One of space and spaces, and constraints that fit each other."""
    if "input" in drawn:
        drawn["space"] = "torchvision:squeezenet1_1"
    if "spaces" not in drawn:
        drawn.setdefault("space", draw(VALID["space"]))
    elif "input" in drawn or draw(st.booleans()):
        del drawn["spaces"]
        drawn.setdefault("space", draw(VALID["space"]))
    else:
        drawn.pop("space", None)
    constraints = drawn.get("constraints", {})
    if constraints.get("align", "none") != "none" and not isinstance(constraints.get("step"), dict):
        constraints.pop("step", None)
    if constraints.get("pin") and constraints.get("tie") == ["*"]:
        del constraints["tie"]
    if "input" in drawn:  # the axes of a torchvision model have other names
        drawn.pop("constraints", None)


def _choose_data(draw: st.DrawFn, drawn: Document, own: bool) -> None:
    """A task with the keys that it takes, or a trainer with a recipe of its own."""
    recipe = drawn.get("recipe", {})
    if own:
        drawn.pop("task", None)
        drawn["trainer"] = "own:train"
        if {"loss", "batches"} & drawn.keys():
            drawn |= {"loss": "study_grammar:loss", "batches": "study_grammar:batches"}
        drawn["recipe"] = {"epochs": draw(VALID["recipe.epochs"]), "lr": 0.1}
        return
    task = drawn.setdefault("task", {})
    name = task.setdefault("name", draw(VALID["task.name"]))
    if name == "image_folder":
        task["folder"] = "images"
    else:
        task.pop("folder", None), task.pop("image_size", None), task.pop("loading", None)
    if task.keys() == {"name"} and draw(st.booleans()):
        drawn["task"] = name
    if name == "image_folder":
        drawn.pop("spaces", None), drawn.pop("constraints", None)
        drawn["space"] = "study_grammar:coloured"
    if recipe.get("optimizer", "sgd") not in ("sgd", "SGD"):
        recipe.pop("momentum", None), recipe.pop("nesterov", None)
        recipe.setdefault("lr", 0.01)
    elif recipe.get("momentum") == 0 or name != "digits":
        recipe["nesterov"] = False
    drawn["recipe"] = {"batch_size": 2, **recipe}


def _choose_search(draw: st.DrawFn, drawn: Document, own: bool) -> None:
    """Methods, and the metric, objectives, limits and early stopping that go together."""
    without_data = (*BASELINES, "synflow", "own:small")
    methods = without_data if own else (*PROPOSERS, "own:small")
    if own or "proposers" in drawn or draw(st.booleans()):
        chosen = one(*methods).flatmap(proposer)
        drawn["proposers"] = draw(st.lists(chosen, max_size=3))
    metric: Any = None
    if own and draw(st.booleans()):
        metric = {"name": "rmse", "goal": "minimize", **draw(section("metric"))}
    elif draw(st.booleans()):
        metric = draw(one("accuracy", {"name": "accuracy"}))
    if metric is not None:
        drawn["metric"] = metric
    name = metric["name"] if isinstance(metric, dict) else "accuracy"
    if "objectives" in drawn or "latency" in drawn:
        costs = drawn.get("objectives", [])
        if "latency" in drawn and "latency_ms" not in costs:
            costs = [*costs, "latency_ms"]
        reported = ["loss"] if draw(st.booleans()) and name != "loss" else []
        drawn["objectives"] = draw(st.permutations([name, *costs, *reported]))
    objectives = drawn.get("objectives", [name, "macs"])
    if name in objectives and draw(st.booleans()):
        drawn["limits"] = {**drawn.get("limits", {}), name: draw(one([None, 90], [1, None]))}
    if len(objectives) > 1 and "loss" not in objectives and draw(st.booleans()):
        kind = draw(one("FrontStopping", "Rungs"))
        stopping = draw(section(f"early_stopping.{kind}"))
        drawn["early_stopping"] = {**stopping, "kind": "rungs"} if kind == "Rungs" else stopping
        if not stopping and kind == "FrontStopping":
            drawn["early_stopping"] = "front"


def _choose_machine(drawn: Document, own: bool) -> None:
    """Devices that exist here, unless the trials run elsewhere."""
    if drawn.get("concurrency") == "auto" and (own or "ray_address" in drawn):
        drawn["concurrency"] = 2
    if "ray_address" not in drawn:
        drawn["device"] = "cpu"
    elif drawn.get("device", "cpu") != "cpu":
        drawn["resources"] = {**drawn.get("resources", {}), "gpu": 1}


def places(document: Any, so_far: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of each value within a document."""
    items = document.items() if isinstance(document, dict) else ()
    items = enumerate(document) if isinstance(document, list | tuple) else items
    found = [so_far] if so_far else []
    return found + [each for key, inner in items for each in places(inner, (*so_far, key))]


ODD_TEXTS = (
    *("", " ", "~", "..", "../..", "/", "/dev/zero", "a b", "a\nb", "\x00", "\x1b[31m", "nan", "-"),
    *("é", "名前", "🦄", "\u202e", "e\u0301", "x" * 3000, "%s %d {} {0}", "'\"`$(:;", "CON", "*"),
    *(":", "a:", ":b", "os:getpid", "a.py:b", "no_such:f", "..py:f", "torchvision:", "[", "con[v"),
    *("sqlite:///", "sqlite:////proc/x", "redis://", "://", "postgresql://127.0.0.1:1/x"),
)
ODD_NUMBERS = (0, -1, 1, 2, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**63, 2**64, 10**400)
ODD_FLOATS = (float("nan"), float("inf"), -float("inf"))
ODD_VALUES: Strategy = st.recursive(
    one(None, True, False, *ODD_NUMBERS, *ODD_FLOATS)
    | one(*ODD_TEXTS)
    | one(b"\xff", {1, 2}, datetime.date(2020, 2, 30 - 1), datetime.datetime(1, 1, 1))
    | st.text(max_size=8)
    | st.integers()
    | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(one(*ODD_TEXTS, 1), inner),
    max_leaves=4,
)


@st.composite
def mutated(draw: st.DrawFn, documents: Strategy) -> Any:
    """Documents with one to three values replaced, removed, renamed or added."""
    document = copy.deepcopy(draw(documents))
    for _ in range(draw(st.integers(1, 3))):
        found = places(document)
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        inner = document
        for key in path:
            inner = inner[key]
        how = draw(one("replace", "replace", "remove", "rename", "add"))
        if how == "replace" or isinstance(inner, list):
            inner[last] = draw(ODD_VALUES)
        elif how == "add":
            inner[draw(one("trails", "", "a b", "é", "method", 1, None, True))] = draw(ODD_VALUES)
        else:
            value = inner.pop(last)
            if how == "rename":
                inner[f"{last}s"] = value
    return document


class _Dumper(safe_yaml._Dumper):
    """Writes integers of any length, which Python refuses as decimals; quotes texts like 0e0."""


_Dumper.add_representer(
    int, lambda dumper, n: dumper.represent_scalar("tag:yaml.org,2002:int", hex(n))
)
_Dumper.add_representer(tuple, lambda dumper, values: dumper.represent_list(values))


def text_of(document: Any) -> str:
    """A document as YAML."""
    return yaml.dump(document, Dumper=_Dumper, allow_unicode=True, sort_keys=False)


def _bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels)]
    return "\n".join(lines) + f"\nbudgets: *a{levels - 1}\nrecipe: {{epochs: *a{levels - 1}}}\n"


LINES = (
    *("trials: 3", "name: twice", "? [a]\n: b", "<<: {trials: 4}", "<<: 3", "budgets: &b [*b]"),
    *("seed: !!int ''", "seed: !!bool maybe", "seed: !!timestamp x", "seed: !!float .", "x: !!x y"),
    *("seed: !!binary '%'", "seed: !!python/name:os.system", "seed: !!set [1]", "seed: !!omap 3"),
    *("seed: 0x" + "f" * 6000, "seed: 1:1:1:1:1:1:1:1", "seed: " + "1" * 6000, "seed: 1e999"),
    *("seed: 2020-99-99", "seed: =", "seed: *no", "%YAML 9.9", "--- 1", "...", "\tx", "{", "]"),
    *("x: " + "[" * 500, "x: " + "{a: " * 90 + "}" * 90, "x: " + "[" * 90 + "]" * 90),
    *("limits: {macs: [0, .nan]}", "recipe: {epochs: 3, epochs: 4}", "constraints: {}"),
    *(_bomb(30), "\x07", "\ufeff", "x: \ud800", "\x85", "# nothing", "\r", "seed: '\\"),
)


@st.composite
def damaged(draw: st.DrawFn, documents: Strategy, code: str) -> bytes:
    """The bytes of documents with a line added, a part cut out or a byte changed."""
    text = text_of(draw(documents))
    tag = f"seed: !!python/object/apply:os.system ['touch {code}']"
    lines = text.splitlines()
    where = draw(st.integers(0, len(lines)))
    how = draw(one("line", "line", "cut", "byte", "encoding"))
    if how == "line":
        lines.insert(where, draw(one(*LINES, tag, *lines)))
    content = "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"
    if how == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if how == "byte":
        at = draw(st.integers(0, len(content) - 1))
        return content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    return content.decode().encode(draw(one("utf-16", "latin-1"))) if how == "encoding" else content


# --- what the documents name ---


class Net(nn.Module):
    """Three convolutions and a linear layer."""

    def __init__(self, first: int = 8, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, first, 3, padding=1)
        self.second, self.third = nn.Conv2d(first, 16, 1), nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, 8, 8) to (N, classes)."""
        return self.fc(self.third(self.second(self.first(x)).relu()).relu().mean((2, 3)))


@cache
def space() -> SearchSpace:
    """Three axes, for digits."""
    return SearchSpace.from_model(Net, (1, 8, 8), name="net")


@cache
def narrow() -> SearchSpace:
    """The same with a narrower first layer."""
    return SearchSpace.from_model(lambda: Net(4), (1, 8, 8), name="narrow")


@cache
def coloured() -> SearchSpace:
    """For images in colour, of two classes."""
    return SearchSpace.from_model(lambda: Net(8, 3, 2), (3, 8, 8), name="coloured")


@cache
def datasets() -> tuple[Any, Any]:
    """Two datasets of ten classes."""
    from torch import from_numpy

    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    items = [(from_numpy(image), i % 10) for i, image in enumerate(pixels)]
    return items, items[:10]


def loss(network: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch."""
    return network(batch).mean()


def batches(split: str, seed: int) -> list[Any]:
    """The batches of a pass."""
    return []
