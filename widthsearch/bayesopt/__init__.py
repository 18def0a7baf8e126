"""The search in numpy: Pareto sets, the surrogate, acquisition, early stopping.

May import: ``space`` for its torch-free files. Imports no torch.
"""
