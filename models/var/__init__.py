"""VAR: class-conditional next-scale models (arXiv 2404.02905)."""
