"""Ray Tune trains the trials of a study; the only package that imports Ray.

May import: ``study`` and below.
"""
