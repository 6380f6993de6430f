"""``amskv info``: what a checkpoint is."""

from dataclasses import fields

from rich.table import Table

from amskv_jax.cli.console import make_console
from amskv_jax.cli.options import CheckpointOption


def info(checkpoint: CheckpointOption) -> None:
    """Say what a checkpoint holds: shapes, scales, type of numbers, fingerprint."""
    import math  # noqa: PLC0415

    from amskv_jax import configs  # noqa: PLC0415
    from amskv_jax.checkpoints.folder import check_checkpoint  # noqa: PLC0415
    from amskv_jax.models.kinds import param_shapes  # noqa: PLC0415

    found = check_checkpoint(checkpoint)
    model, schedule = found.model, found.model.schedule
    known = [
        one.name
        for one in map(configs.get, configs.names())
        # A checkpoint may lack the text encoder.
        if all(one.model.parts.get(part) == config for part, config in model.parts.items())
    ]
    height, width = model.picture_size(schedule)
    classes = getattr(model.parts["transformer"], "num_classes", 0)
    cfg = found.drawing.cfg
    strengths = ", ".join(f"{number:g}" for number in (cfg if isinstance(cfg, tuple) else (cfg,)))
    rows = {
        "kind": found.kind,
        "shape of": ", ".join(known) or "no known model",
        "weights": f"{found.dtype}, fingerprint {found.fingerprint}",
        "scales": f"{schedule} ({schedule.total} tokens)",
        "pictures": f"{height} x {width} pixels"
        + (f", {classes} classes" if classes else ", from text"),
        "guidance": f"{strengths} suits the model",
    }
    for name, config in found.configs.items():
        count = sum(math.prod(shape) for shape in param_shapes(config).values())
        values = [f"{f.name} {getattr(config, f.name)}" for f in fields(config)]
        shape = ", ".join(value for value in values if not value.startswith("schedule"))
        rows[name] = f"{count / 1e6:.2f} M parameters: {shape}"
        if len(found.fingerprints) > 1:
            rows[name] += f"; fingerprint {found.fingerprints[name]}"
    table = Table.grid(padding=(0, 2))
    for row in rows.items():
        table.add_row(*row)
    make_console().print(table)
