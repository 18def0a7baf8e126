"""Which elements of which tensors belong to a channel: dependency graph, masks, extraction.

May import: ``tracing`` and below.
"""
