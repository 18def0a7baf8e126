"""Plays histories until enough faults have hit; exit code 1 if a promise was broken."""

from __future__ import annotations

import argparse
import platform
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from . import places
from .history import play
from .plans import KINDS, PLACES, Plan, plans


def main() -> int:
    """Play histories, and print a line for each, then the figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--faults", type=int, default=20, help="the number of faults (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="their seed (%(default)s)")
    parser.add_argument("--only", action="append", help="a kind of fault; may be repeated")
    parser.add_argument("--keep", type=Path, help="keeps the files of bad histories in a folder")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores SIGINT
        signal.signal(number, signal.default_int_handler)
    kinds, where = set(options.only or KINDS), {*PLACES.values()}
    for name, reason in places.missing().items():
        print(f"skipped: {name}: {reason}")
        kinds -= {kind for kind in kinds if kind.startswith(name)}
        where -= {PLACES.get(name, name)}
    begun = time.monotonic()
    undisturbed = play(Plan("folder", 1, ()))
    print(
        f"undisturbed: {undisturbed.seconds:.0f} s", *undisturbed.complaints, sep="\n  ", flush=True
    )
    hit: Counter[str] = Counter()
    broken: Counter[str] = Counter(complaint.kind for complaint in undisturbed.complaints)
    histories = 0
    for plan in plans(options.seed, kinds, where):
        if hit.total() >= options.faults:
            break
        played = play(plan, undisturbed.outcomes, keep=options.keep)
        histories += 1
        hit.update(fault.kind for fault in played.injected)
        broken.update(complaint.kind for complaint in played.complaints)
        faults = ", ".join(f"{fault.kind} ({fault.moment})" for fault in played.injected)
        verdict = f"{len(played.complaints)} BROKEN" if played.complaints else "ok"
        print(
            f"{hit.total():4} {plan.place}, {plan.concurrency} at once: {faults}: {verdict}", end=""
        )
        print(f", {played.seconds:.0f} s", flush=True)
        for complaint in played.complaints:
            print(f"  {complaint.kind}: {complaint.text}", flush=True)
    print(
        f"{hit.total()} faults in {histories} histories, {time.monotonic() - begun:.0f} s, ", end=""
    )
    print(f"{platform.machine()}, seed {options.seed}")
    for kind, count in sorted(hit.items()):
        print(f"{count:4} {kind}")
    names = ("lost", "doubled", "changed", "left", "end")
    print(", ".join(f"{name} {broken[name]}" for name in names))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
