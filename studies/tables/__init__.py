"""Proposals judged on tables of trained networks: nothing is trained."""
