"""Drawing many pictures into files, killed at any moment and going on where it was."""
