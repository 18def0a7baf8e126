"""The command line, as ``python -m widthsearch``."""

from widthsearch.cli import process

if __name__ == "__main__":
    raise SystemExit(process())
