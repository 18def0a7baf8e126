"""The command line, as ``python -m widthsearch``."""

from widthsearch.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
