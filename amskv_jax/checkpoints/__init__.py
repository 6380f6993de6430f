"""Checkpoints: folders, packed files, and those which come with the package."""
