"""Small tools that know nothing of networks' widths: devices, files, references to code.

May import: ``errors``, ``torch_internals``.
"""
