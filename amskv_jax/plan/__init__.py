"""Retention plans and what they cost: what is kept, without buffers."""
