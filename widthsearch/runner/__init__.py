"""The engine of a study: Ray Tune trains its trials, Ray tasks run its proposers.

The only package that imports Ray. May import: ``study`` and below.
"""
