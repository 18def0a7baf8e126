"""Faults at random moments of a real study, and an independent checker of what they leave.

``python -m tests.faults --faults 20 --seed 0`` plays histories: each is a small study under Ray
that is hit by some faults, started again after each of them until it is done, and then checked.
What is promised, and the figures, are in ``docs/reliability.md``.
"""
