"""Output: spaces, fronts and forecasts as tables, JSON, CSV and pictures, and live progress.

May import: ``api``, ``export`` and below.
"""
