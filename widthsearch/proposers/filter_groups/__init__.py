"""Learned filter groups (DSP): the proposer, the learning of groups, and the branched space.

Nothing outside this package imports it, except by its name in the table of proposers.
"""
