"""Search spaces over a model's widths: constraints, exact costs, networks at any widths.

May import: ``channels``, ``tracing`` and below.
"""
