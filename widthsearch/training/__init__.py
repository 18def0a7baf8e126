"""How a network is trained: the recipe, the trainer, CUDA graphs, checkpoints, autotuning.

May import: ``data``, ``space`` and below.
"""
