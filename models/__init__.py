"""Flax models: VAR and its multi-scale VQVAE, and the T5 encoder of text."""
