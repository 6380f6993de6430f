"""Infinity's tokenizer: its table, and its configuration from the shapes in a checkpoint."""

import re

import numpy as np

from amskv_jax.convert.architecture import Architecture, count, rows
from amskv_jax.convert.table import CONVOLUTION, Rule, Shape, StateDict, Table, module, norm
from amskv_jax.errors import AmskvError
from amskv_jax.models.infinity.bsq_config import BSQConfig

# {side} is encoder or decoder; {way} down or up.
LEVEL, LEVEL_PATH = "{side}.{way}.{i}", "{side}/{way}_{i}"


def _residual(key: str, path: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{key}.norm{{n}}.norm", f"{path}/norm{{n}}"),
        *module(f"{key}.conv{{n}}.conv", f"{path}/conv{{n}}", CONVOLUTION),
        *module(f"{key}.nin_shortcut.conv", f"{path}/shortcut", CONVOLUTION),
    )


TABLE = Table(
    (
        *_residual(f"{LEVEL}.block.{{j}}", f"{LEVEL_PATH}/block_{{j}}"),
        *module(f"{LEVEL}.{{resample}}.conv.conv", f"{LEVEL_PATH}/{{resample}}", CONVOLUTION),
        *_residual("{side}.mid.block_{j}", "{side}/middle/block_{j}"),
        *module("{side}.conv_{end}.conv", "{side}/conv_{end}", CONVOLUTION),
        *norm("{side}.norm_out.norm", "{side}/norm_out"),
    )
)


def shapes(config: BSQConfig) -> dict[str, Shape]:
    """Return the reference's entries, without buffers, with their shapes in PyTorch's layout."""
    levels = [config.channels * multiplier for multiplier in config.channel_multipliers]
    last = len(levels) - 1
    result: dict[str, Shape] = {}

    def add_blocks(keys: list[str], channels: int, outputs: int) -> None:
        for key in keys:
            result.update(_residual_shapes(key, channels, outputs))
            channels = outputs

    def add_middle(side: str) -> None:
        add_blocks([f"{side}.mid.block_{block}" for block in (1, 2)], levels[last], levels[last])

    result |= _convolution("encoder.conv_in", 3, config.channels)
    channels = config.channels
    for i, outputs in enumerate(levels):
        key = f"encoder.down.{i}"
        blocks = [f"{key}.block.{block}" for block in range(config.num_res_blocks)]
        add_blocks(blocks, channels, outputs)
        if i < last:
            result |= _convolution(f"{key}.downsample.conv", outputs, outputs)
        channels = outputs
    add_middle("encoder")
    result |= _norm("encoder.norm_out", channels)
    result |= _convolution("encoder.conv_out", channels, config.codebook_dim)

    result |= _convolution("decoder.conv_in", config.codebook_dim, channels)
    add_middle("decoder")
    for i, outputs in reversed(list(enumerate(levels))):
        key = f"decoder.up.{i}"
        blocks = [f"{key}.block.{block}" for block in range(config.num_res_blocks + 1)]
        add_blocks(blocks, channels, outputs)
        if i > 0:
            result |= _convolution(f"{key}.upsample.conv", outputs, outputs)
        channels = outputs
    result |= _norm("decoder.norm_out", channels)
    result |= _convolution("decoder.conv_out", channels, 3)
    return result


def buffers(config: BSQConfig) -> dict[str, np.ndarray]:
    """Return the weights of bits in an index, which the reference keeps under two names.

    With 64 bits the first one is -2^63, as integers of 64 bits have it.
    """
    mask = np.left_shift(np.int64(1), np.arange(config.codebook_dim - 1, -1, -1))
    return {"quantizer.lfq.mask": mask, "quantize.lfq.mask": mask}


def describe(config: BSQConfig) -> str:
    """Return the configuration in words."""
    multipliers = ", ".join(map(str, config.channel_multipliers))
    return (
        f"an Infinity tokenizer with {config.channels} x ({multipliers}) channels, "
        f"{config.num_res_blocks} residual blocks per level and {config.codebook_dim} bits"
    )


def rename(key: str) -> str:
    """Return an entry's name as the reference's modules have it.

    There, convolutions and norms lie in wrappers, so that their names end in ``conv.weight`` and
    ``norm.weight``; some checkpoints lack this last step.
    """
    key = re.sub(
        r"((?:^|\.)(?:conv_in|conv_out|conv\d|nin_shortcut|(?:down|up)sample\.conv))"
        r"\.(weight|bias)$",
        r"\1.conv.\2",
        key,
    )
    return re.sub(r"((?:^|\.)norm(?:\d|_out))\.(weight|bias)$", r"\1.norm.\2", key)


BSQ = Architecture(
    name="an Infinity tokenizer",
    keys=("encoder.conv_in.conv.weight", "encoder.conv_in.weight"),
    table=TABLE,
    shapes=shapes,
    buffers=buffers,
    describe=describe,
    rename=rename,
    infer=lambda source, before: infer_config(source.state, source=str(source.path)),
)


def infer_config(
    state: StateDict, patchify: bool | None = None, source: str = "the state dict"
) -> BSQConfig:
    """Return the configuration of a tokenizer from the shapes of its entries.

    Args:
      state: the reference's entries.
      patchify: whether four positions of the latent make a token, which no shape tells. None takes
        it from the patch size: a token of all published models stands for 16 x 16 pixels, so it is
        true for a patch size of 8.
      source: what to call the state dict in messages.

    Raises:
      AmskvError: if this is another architecture, or a variant that is not supported.
    """
    BSQ.check_kind(state.keys(), source)
    state = BSQ.weights(state)
    defaults = BSQConfig()
    channels = rows(state, "encoder.conv_in.conv.bias", 1, default=defaults.channels)
    levels = [
        rows(state, f"encoder.down.{i}.block.0.conv1.conv.bias", 1, default=channels)
        for i in range(count(state, r"encoder\.down\.(\d+)\.block\."))
    ]
    if not levels or any(level % channels or level % 32 for level in levels):
        raise AmskvError(
            f"{source} has levels of {levels} channels, expected multiples of 32 and of the "
            f"{channels} channels of encoder.conv_in"
        )
    return BSQConfig(
        codebook_dim=rows(state, "encoder.conv_out.conv.bias", 1, default=defaults.codebook_dim),
        channels=channels,
        channel_multipliers=tuple(level // channels for level in levels),
        num_res_blocks=count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        patchify=len(levels) == 4 if patchify is None else patchify,
    )


def _convolution(key: str, inputs: int, outputs: int, size: int = 3) -> dict[str, Shape]:
    return {f"{key}.conv.weight": (outputs, inputs, size, size), f"{key}.conv.bias": (outputs,)}


def _norm(key: str, channels: int) -> dict[str, Shape]:
    return {f"{key}.norm.weight": (channels,), f"{key}.norm.bias": (channels,)}


def _residual_shapes(key: str, inputs: int, outputs: int) -> dict[str, Shape]:
    result = {
        **_norm(f"{key}.norm1", inputs),
        **_convolution(f"{key}.conv1", inputs, outputs),
        **_norm(f"{key}.norm2", outputs),
        **_convolution(f"{key}.conv2", outputs, outputs),
    }
    if inputs != outputs:
        result |= _convolution(f"{key}.nin_shortcut", inputs, outputs, size=1)
    return result
