"""Converters between checkpoints of the PyTorch references and this package."""

from amskv_jax.convert.api import (
    convert,
    convert_var,
    export_checkpoint,
    fetch_sources,
    to_params,
    to_state_dict,
)

__all__ = [
    "convert",
    "convert_var",
    "export_checkpoint",
    "fetch_sources",
    "to_params",
    "to_state_dict",
]
