"""Latency: measured relative to the base model, or predicted from a profile of a space.

May import: ``training``, ``space`` and below.
"""
