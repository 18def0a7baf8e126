"""Output: spaces, fronts and forecasts as tables, JSON, CSV and pictures, and live progress.

May import: ``runner`` and below; a ``Study`` is passed in.
"""
