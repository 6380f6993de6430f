"""Converters between checkpoints of the PyTorch references and this package."""

from amskv_jax.convert.api import convert_var, export_var, to_params, to_state_dict

__all__ = ["convert_var", "export_var", "to_params", "to_state_dict"]
