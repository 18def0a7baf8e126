"""What a person reads: tables, plots, progress.

May import: ``api``, ``export`` and below.
"""
