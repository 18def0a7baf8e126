"""Latency, measured beside the base model, and predicted from a profile of a space.

May import: ``training``, ``space`` and below.
"""
