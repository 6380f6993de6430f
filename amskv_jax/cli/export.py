"""``amskv export``: back to the layout of the PyTorch reference."""

from amskv_jax.cli.console import print_line, progress
from amskv_jax.cli.options import CheckpointOption, OutFolderOption


def export(checkpoint: CheckpointOption, out: OutFolderOption) -> None:
    """Write every part of a checkpoint as the reference has it, such as transformer.safetensors."""
    from amskv_jax.convert import export_checkpoint  # noqa: PLC0415

    with progress("reading") as update:
        export_checkpoint(checkpoint, out, progress=update)
    print_line(f"wrote {out}")
