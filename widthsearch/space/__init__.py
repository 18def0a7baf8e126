"""What may vary and what it costs: constraints, exact costs, networks at any widths.

May import: ``channels``, ``tracing`` and below.
"""
