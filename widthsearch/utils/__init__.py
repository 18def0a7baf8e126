"""General tools: devices, files, references to functions, validation.

May import: ``errors``, ``torch_internals``.
"""
