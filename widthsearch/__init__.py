"""Network pruning as a search over layer widths."""
