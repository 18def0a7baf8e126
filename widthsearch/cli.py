"""The command line: parses the arguments and runs one of :mod:`widthsearch.commands`.

Exit codes: 0 success; 1 some trial or proposer failed; 2 invalid input, or no trial finished (one
line names the cause); 130 interrupted (one line has the command that resumes).
"""

from __future__ import annotations

import argparse
import errno
import math
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any

from widthsearch import __version__
from widthsearch.errors import WidthsearchError, printable

SHARES = 16
"""Budgets up to this are shares of the base's MACs; larger ones are MACs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        arguments: Those of the command line; by default the process's own.

    Example:
        >>> main(["space", "torchvision:resnet19"])  # one line on standard error
        2
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    again = shlex.join(["widthsearch", *arguments])
    from widthsearch import commands  # after the arguments: --help needs none of its imports

    try:
        code: int = getattr(commands, options.command)(options)
    except WidthsearchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES):
            raise
        print(f"error: {error}; fix this and run again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; resume with: {again}", file=sys.stderr)
        return 130
    return code


def process() -> int:
    """Run the command of this process; returns the exit code.

    From the end of the command on, Ctrl-C does nothing: it could only break off what Ray still ends
    at the exit of the process.
    """
    try:
        return main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split("x"))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"an input shape is like 3x224x224, not {text!r}")
    return shape


def _budget(text: str) -> tuple[float, bool]:
    """The amount, and whether it is a share."""
    try:
        budget = float(text)
    except ValueError:
        budget = 0.0
    if not 0 < budget < math.inf:
        raise argparse.ArgumentTypeError(
            f"a budget is a share of the base's MACs such as 0.5, or MACs such as 4e6, not {text!r}"
        )
    return budget, budget <= SHARES


def _field(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"a field is like batch_size=64, not {text!r}")
    from widthsearch.utils.safe_yaml import load_yaml

    try:
        return key, load_yaml(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a field's value is YAML, not {value!r}") from None


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all errors of the package."""

    def error(self, message: str) -> None:  # type: ignore[override]
        print(f"error: {printable(message)}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="widthsearch", description="Network pruning as a search over layer widths."
    )
    parser.add_argument("--version", action="version", version=f"widthsearch {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, about: str, line: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=line, description=line)
        made.set_defaults(command=name)
        if about == "study":
            made.add_argument("study", help="a study's name, its folder or its YAML file")
            made.add_argument(
                "--runs", default="runs", help="the folder of the studies (default: runs)"
            )
        else:
            made.add_argument(
                "space",
                help="torchvision:NAME, package.module:function, path/to/file.py:function, or a "
                "study's YAML file",
            )
            made.add_argument("--input", type=_shape, help="the shape of one sample: 3x224x224")
        return made

    add = command("run", "study", "Run a study, or resume it, and print its front.").add_argument
    add("--retry", action="store_true", help="train the failed trials again")
    add(
        "--dry-run",
        action="store_true",
        help="print what would be trained, with the measured time and memory of an epoch, and keep "
        "nothing",
    )
    add("--json", action="store_true", help="print JSON (with --dry-run)")

    add = command(
        "space",
        "space",
        "Print a space: its axes with their shares of MACs, and its pinned widths with reasons.",
    ).add_argument
    add("--widths", metavar="FILE", help="print the costs of a widths file too")
    add(
        "--check",
        action="store_true",
        help="build and run the narrowest, the widest and random networks, and compare their costs",
    )
    add("--device", help="device of --check; meta computes shapes (default: cpu)")
    add("--json", action="store_true", help="print JSON")

    add = command(
        "propose", "space", "Print one method's widths at a budget beside the base's."
    ).add_argument
    add("--method", required=True, help="a proposer such as sensitivity, or your own: module:name")
    add(
        "--budget",
        type=_budget,
        required=True,
        help=f"a share of the base's MACs (up to {SHARES}), or MACs: 0.5 or 4e6",
    )
    add("--task", help="the data: digits, cifar10, image_folder, or your own as module:function")
    add("--folder", help="the folder of the task's data")
    add(
        "--set",
        type=_field,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the method, such as batch_size=64",
    )
    add("--epochs", type=int, help="epochs of a method that trains (default: the recipe's)")
    add("--seed", type=int, help="seed of the method (default: the study's, or 0)")
    add("--device", default="cpu", help="device of the method (default: cpu)")
    add("--json", action="store_true", help="print JSON")
    add("--out", metavar="FILE", help="write the widths as JSON")
    add("--plot", metavar="FILE", help="draw the widths beside the base as a PNG")

    add = command(
        "profile",
        "space",
        "Measure networks of a space on a device, to predict the latency of all others.",
    ).add_argument
    add("--device", help="cpu, cuda or cuda:N (default: cpu, or the study's)")
    add("--backend", help="eager, graph, compile or onnxruntime (default: eager)")
    add("--batch-size", type=int, help="samples a run (default: 1)")
    add("--threads", type=int, help="CPU threads (default: 1)")
    add("--dtype", help="float32 or bfloat16 (default: float32)")
    add("--pairs", type=int, help="blocks of each network, in turn with the base (default: 40)")
    add("--vectors", type=int, default=40, help="networks in the profile (default: 40)")

    pareto = command(
        "pareto", "study", "Print a study's front and the best baselines, and write front.json."
    )
    add, form = pareto.add_argument, pareto.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV")
    add("--families", action="store_true", help="forecast each proposal's family at every size")
    add(
        "--show",
        nargs="+",
        default=(),
        metavar="NAME",
        help="further columns: costs, or numbers that trainings reported, such as loss",
    )
    add(
        "--plot",
        nargs="?",
        const="",
        metavar="FILE",
        help="draw the front as a PNG (default: front.png in the study's folder)",
    )

    add = command(
        "confirm",
        "study",
        "Train the front again with fresh seeds, where it is uncertain, and print it.",
    ).add_argument
    add("--seeds", type=int, default=3, help="mean trainings of a member of the front (default: 3)")

    add = command(
        "train",
        "study",
        "Train a network of a study in full, test it, and write a folder that loads.",
    ).add_argument
    add(
        "--pick",
        help="the ID of a finished trial, or from the front: knee, best, cheapest, the best within "
        "limits such as 'macs<=2e6', or the cheapest that keeps one on the metric such as "
        "'accuracy>=90' (default: knee)",
    )
    add("--seeds", type=int, default=3, help="networks to train (default: 3)")
    add("--epochs", type=int, help="epochs of training (default: the recipe's)")
    add("--device", help="device of training, such as cuda:0 (default: the study's)")
    add(
        "--out",
        help="the folder to write (default: trained/ID in the study's folder; with --search-data "
        "trained/ID-search-data)",
    )
    add("--base", action="store_true", help="train the base alike, to compare with it")
    add("--no-program", dest="program", action="store_false", help="write no torch.export program")
    add(
        "--search-data",
        action="store_true",
        help="train on the search's data, so that the weights have not seen the validation split, "
        "as `start: extract` needs them; the test split is not read",
    )
    add(
        "--rank-check",
        action="store_true",
        help="train members of the front by the study's recipe, by --epochs, and at half and twice "
        "the learning rate, and print the rank correlations",
    )
    add("--members", type=int, help="networks of --rank-check (default: 6)")
    return parser
