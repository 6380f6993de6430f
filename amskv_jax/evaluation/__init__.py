"""Evaluation: metrics, the networks they look through, and the study of all policies."""
