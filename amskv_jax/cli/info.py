"""``amskv info``: what a checkpoint is."""

from dataclasses import fields

from rich.table import Table

from amskv_jax.cli.console import make_console
from amskv_jax.cli.options import CheckpointOption


def info(checkpoint: CheckpointOption) -> None:
    """Say what a checkpoint holds: shapes, scales, type of numbers, fingerprint."""
    import math  # noqa: PLC0415

    from amskv_jax import configs  # noqa: PLC0415
    from amskv_jax.checkpoints.folder import param_shapes, read_info  # noqa: PLC0415

    found = read_info(checkpoint)
    model, schedule = found.model, found.model.schedule
    known = [other.name for other in map(configs.get, configs.names()) if other.model == model]
    height, width = model.picture_size(schedule)
    rows = {
        "kind": found.kind,
        "shape of": ", ".join(known) or "no known model",
        "weights": f"{found.dtype}, fingerprint {found.fingerprint}",
        "scales": f"{schedule} ({schedule.total} tokens)",
        "pictures": f"{height} x {width} pixels, {len(model.conditions(None))} classes",
        "guidance": f"{found.guidance:g} suits the model",
    }
    for name, config in found.configs.items():
        count = sum(math.prod(shape) for shape in param_shapes(config).values())
        values = [f"{f.name} {getattr(config, f.name)}" for f in fields(config)]
        shape = ", ".join(value for value in values if not value.startswith("schedule"))
        rows[name] = f"{count / 1e6:.2f} M parameters: {shape}"
    table = Table.grid(padding=(0, 2))
    for row in rows.items():
        table.add_row(*row)
    make_console().print(table)
