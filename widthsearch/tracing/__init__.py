"""One symbolic run of a model: its free, tied and pinned widths, and its costs as polynomials.

May import: ``modules`` and below.
"""
