"""One symbolic run of a model: which sizes are free, which are tied, and what each run costs.

May import: ``modules`` and below.
"""
