"""Infinity's transformer: its table, and its configuration from the shapes in a checkpoint."""

import math
import re

import numpy as np

from amskv_jax.convert.architecture import Architecture, rows
from amskv_jax.convert.table import (
    LINEAR,
    Rule,
    Shape,
    StateDict,
    Table,
    Transform,
    module,
    norm,
    squeeze,
)
from amskv_jax.errors import AmskvError
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.schedules import SQUARE_1M
from amskv_jax.schedule import ScaleSchedule

HEADS = Transform(
    "1, heads, 1, 1 -> heads", lambda x: x.reshape(-1), lambda x: x.reshape(1, -1, 1, 1)
)
"""Also of 1, 1, heads, 1, as attention kernels with heads behind tokens need it."""

TEXT = (
    Rule("cfg_uncond", "unconditional_text"),
    Rule("text_norm.weight", "text_norm/scale"),
    Rule("text_proj_for_sos.ca.mat_q", "text_pooling/query", squeeze(0)),
    Rule("text_proj_for_sos.ca.mat_kv.weight", "text_pooling/key_value/kernel", LINEAR),
    Rule("text_proj_for_sos.ca.v_bias", "text_pooling/value_bias"),
    *module("text_proj_for_sos.ca.proj", "text_pooling/out", LINEAR),
    *module("text_proj_for_ca.0", "text_projection/up", LINEAR),
    *module("text_proj_for_ca.2", "text_projection/out", LINEAR),
)

WHOLE = (
    Rule("pos_start", "position_start", squeeze(0)),
    Rule("lvl_embed.weight", "scale_embedding/embedding"),
    *module("word_embed", "word_embedding", LINEAR),
    *module("shared_ada_lin.1", "shared_modulation", LINEAR),
    *module("head_nm.ada_lin.1", "head_modulation", LINEAR),
    *module("head", "head", LINEAR),
)


def _block(key: str, index: str) -> tuple[Rule, ...]:
    """Return the rules of the blocks whose names begin with ``key``."""
    return (
        Rule(f"{key}.ada_gss", f"blocks/modulation_offset{index}", squeeze(0, 1)),
        Rule(f"{key}.sa.mat_qkv.weight", f"blocks/attention/qkv/kernel{index}", LINEAR),
        Rule(f"{key}.sa.q_bias", f"blocks/attention/query_bias{index}"),
        Rule(f"{key}.sa.v_bias", f"blocks/attention/value_bias{index}"),
        Rule(f"{key}.sa.scale_mul_1H11", f"blocks/attention/log_temperature{index}", HEADS),
        *module(f"{key}.sa.proj", "blocks/attention/out", LINEAR, index),
        *norm(f"{key}.ca_norm", "blocks/cross_norm", index),
        *module(f"{key}.ca.mat_q", "blocks/cross/query", LINEAR, index),
        Rule(f"{key}.ca.mat_kv.weight", f"text_keys_values/kernel{index}", LINEAR),
        Rule(f"{key}.ca.v_bias", f"text_keys_values/value_bias{index}"),
        *module(f"{key}.ca.proj", "blocks/cross/out", LINEAR, index),
        *module(f"{key}.ffn.fc1", "blocks/mlp/up", LINEAR, index),
        *module(f"{key}.ffn.fc2", "blocks/mlp/down", LINEAR, index),
    )


TABLE = Table(
    (
        *TEXT,
        *WHOLE,
        *_block("blocks.{layer}", "[{layer}]"),
        *_block("block_chunks.{chunk}.module.{layer}", "[{chunk}.{layer}]"),
    )
)

BLOCK = re.compile(r"(?:block_chunks\.(\d+)\.module|blocks)\.(\d+)\.")


def block_names(config: InfinityConfig) -> list[str]:
    """Return what the names of every block's entries begin with."""
    if config.block_chunks == 1:
        return [f"blocks.{layer}" for layer in range(config.depth)]
    layers = range(config.depth // config.block_chunks)
    chunks = range(config.block_chunks)
    return [f"block_chunks.{chunk}.module.{layer}" for chunk in chunks for layer in layers]


def shapes(config: InfinityConfig) -> dict[str, Shape]:
    """Return the reference's entries, without buffers, with their shapes in PyTorch's layout."""
    width, channels, hidden = config.width, config.text_channels, config.hidden
    result: dict[str, Shape] = {
        "cfg_uncond": (config.text_maxlen, channels),
        "pos_start": (1, 1, width),
        "text_norm.weight": (channels,),
        "text_proj_for_sos.ca.mat_q": (1, config.pooling_heads, width // config.pooling_heads),
        "text_proj_for_sos.ca.v_bias": (width,),
        "text_proj_for_sos.ca.mat_kv.weight": (2 * width, channels),
        **_linear("text_proj_for_sos.ca.proj", width, width),
        **_linear("text_proj_for_ca.0", channels, width),
        **_linear("text_proj_for_ca.2", width, width),
        "lvl_embed.weight": (config.num_levels, width),
        **_linear("word_embed", config.bits, width),
        **_linear("shared_ada_lin.1", width, 6 * width),
        **_linear("head_nm.ada_lin.1", width, 2 * width),
        **_linear("head", width, 2 * config.bits),
    }
    for block in block_names(config):
        result |= {
            f"{block}.ada_gss": (1, 1, 6, width),
            f"{block}.sa.scale_mul_1H11": (1, config.num_heads, 1, 1),
            f"{block}.sa.q_bias": (width,),
            f"{block}.sa.v_bias": (width,),
            f"{block}.sa.mat_qkv.weight": (3 * width, width),
            **_linear(f"{block}.sa.proj", width, width),
            f"{block}.ca.v_bias": (width,),
            **_linear(f"{block}.ca.mat_q", width, width),
            f"{block}.ca.mat_kv.weight": (2 * width, width),
            **_linear(f"{block}.ca.proj", width, width),
            **_linear(f"{block}.ffn.fc1", width, hidden),
            **_linear(f"{block}.ffn.fc2", hidden, width),
            f"{block}.ca_norm.weight": (width,),
            f"{block}.ca_norm.bias": (width,),
        }
    return result


def buffers(config: InfinityConfig) -> dict[str, np.ndarray]:
    """Return the buffers which the reference's constructor makes and its strict loading wants."""
    attentions = [f"{block}.{part}" for block in block_names(config) for part in ("sa", "ca")]
    zeros = np.zeros(config.width, np.float32)
    return {f"{key}.zero_k_bias": zeros for key in ("text_proj_for_sos.ca", *attentions)}


def describe(config: InfinityConfig) -> str:
    """Return the configuration in words."""
    return (
        f"an Infinity transformer of depth {config.depth}, width {config.width}, "
        f"{config.num_heads} heads, {config.bits} bits per token and texts of "
        f"{config.text_channels} channels"
    )


def reshape(key: str, shape: Shape) -> Shape:
    """Return the usual shape of an entry: in some checkpoints heads lie on the third axis."""
    heads = key.endswith(".sa.scale_mul_1H11") and sorted(shape)[:3] == [1, 1, 1]
    return (1, math.prod(shape), 1, 1) if heads else shape


INFINITY = Architecture(
    name="an Infinity transformer",
    keys=("text_norm.weight", "cfg_uncond", "text_proj_for_ca.0.weight"),
    table=TABLE,
    shapes=shapes,
    buffers=buffers,
    describe=describe,
    reshape=reshape,
    infer=lambda source, before: infer_config(source.state, source=str(source.path)),
)


def infer_config(
    state: StateDict, schedule: ScaleSchedule = SQUARE_1M, source: str = "the state dict"
) -> InfinityConfig:
    """Return the configuration of a transformer from the names and shapes of its entries.

    Args:
      state: the reference's entries.
      schedule: the token maps to draw unless others are asked for; nothing in the weights tells.
      source: what to call the state dict in messages.

    Raises:
      AmskvError: if this is another architecture, or the shapes do not fit together.
    """
    INFINITY.check_kind(state.keys(), source)
    width = next(
        (
            state[key].shape[-1]
            for key in ("word_embed.bias", "pos_start", "lvl_embed.weight", "head.weight")
            if key in state
        ),
        None,
    )
    if not width:
        raise AmskvError(f"{source} has neither word_embed nor head: it is not complete")
    channels = rows(state, "text_norm.weight", 1, default=InfinityConfig.text_channels)
    blocks = {match.groups() for match in map(BLOCK.match, state) if match}
    temperatures = [key for key in state if key.endswith(".sa.scale_mul_1H11")]
    if not temperatures:
        raise AmskvError(
            f"{source} has no scale_mul_1H11: Infinity without normalised queries is not supported"
        )
    hidden = next(
        (v.shape[0] for key, v in state.items() if key.endswith(".ffn.fc1.bias")), 4 * width
    )
    try:
        return InfinityConfig(
            depth=len(blocks),
            width=width,
            num_heads=math.prod(state[temperatures[0]].shape),
            bits=rows(state, "word_embed.weight", width, default=InfinityConfig.bits),
            schedule=schedule,
            text_channels=channels,
            text_maxlen=rows(state, "cfg_uncond", channels, default=InfinityConfig.text_maxlen),
            num_levels=rows(state, "lvl_embed.weight", width, default=InfinityConfig.num_levels),
            mlp_ratio=hidden / width,
            block_chunks=len({chunk for chunk, _ in blocks}),
        )
    except ValueError as error:
        raise AmskvError(f"{source} does not fit together: {error}") from error


def _linear(key: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{key}.weight": (outputs, inputs), f"{key}.bias": (outputs,)}
