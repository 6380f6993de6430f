"""Known models, one file each."""
