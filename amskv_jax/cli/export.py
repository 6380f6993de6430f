"""``amskv export``: back to the layout of the PyTorch reference."""

from amskv_jax.cli.console import print_line, progress
from amskv_jax.cli.options import CheckpointOption, OutFolderOption


def export(checkpoint: CheckpointOption, out: OutFolderOption) -> None:
    """Write a checkpoint as transformer.safetensors and tokenizer.safetensors of the reference."""
    from amskv_jax.convert import export_var  # noqa: PLC0415

    with progress("reading") as update:
        export_var(checkpoint, out, progress=update)
    print_line(f"wrote {out}")
