"""Flax models: VAR and its multi-scale VQVAE."""
