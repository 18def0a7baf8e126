"""The search in numpy: Pareto sets, the surrogate, acquisition, early stopping.

May import: ``widths``, ``utils`` and below. Imports no torch.
"""
