"""Trees of ``nn.Module``: their tensors, copies of them, their initialisation and source code.

May import: ``utils`` and below.
"""
