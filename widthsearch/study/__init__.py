"""A study without an engine: configuration, trials, storage, the driver's lock, the loop.

May import: ``proposers``, ``latency``, ``training``, ``bayesopt`` and below.
"""
