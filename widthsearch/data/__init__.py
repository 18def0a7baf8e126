"""Tasks: the images and labels that networks learn from, and how they are loaded.

May import: ``utils`` and below.
"""
