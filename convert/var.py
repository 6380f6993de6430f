"""VAR's transformer: its table, and its configuration from the shapes in a checkpoint."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from amskv_jax.convert.architecture import Architecture, count, rows
from amskv_jax.convert.table import LINEAR, Rule, Shape, StateDict, Table, module, squeeze
from amskv_jax.errors import AmskvError
from amskv_jax.models.var.config import VARConfig
from amskv_jax.schedule import VAR_256, VAR_512, ScaleSchedule

BLOCK = "blocks.{layer}"
LAYER = "[{layer}]"

TABLE = Table(
    (
        Rule("class_emb.weight", "class_embedding/embedding"),
        Rule("pos_start", "position_start", squeeze(0)),
        Rule("pos_1LC", "position_embedding", squeeze(0)),
        Rule("lvl_embed.weight", "scale_embedding/embedding"),
        *module("word_embed", "word_embedding", LINEAR),
        *module(f"{BLOCK}.ada_lin.1", "modulation", LINEAR, LAYER),
        *module("shared_ada_lin.1", "shared_modulation", LINEAR),
        Rule(f"{BLOCK}.ada_gss", f"modulation_offset{LAYER}", squeeze(0, 1)),
        Rule(f"{BLOCK}.attn.mat_qkv.weight", f"blocks/attention/qkv/kernel{LAYER}", LINEAR),
        Rule(f"{BLOCK}.attn.q_bias", f"blocks/attention/query_bias{LAYER}"),
        Rule(f"{BLOCK}.attn.v_bias", f"blocks/attention/value_bias{LAYER}"),
        Rule(
            f"{BLOCK}.attn.scale_mul_1H11",
            f"blocks/attention/log_temperature{LAYER}",
            squeeze(0, 2, 3),
        ),
        *module(f"{BLOCK}.attn.proj", "blocks/attention/out", LINEAR, LAYER),
        *module(f"{BLOCK}.ffn.fc1", "blocks/mlp/up", LINEAR, LAYER),
        *module(f"{BLOCK}.ffn.fc2", "blocks/mlp/down", LINEAR, LAYER),
        *module("head_nm.ada_lin.1", "head_modulation", LINEAR),
        *module("head", "head", LINEAR),
    )
)


def shapes(config: VARConfig) -> dict[str, Shape]:
    """Return the reference's entries, without buffers, with their shapes in PyTorch's layout."""
    width, schedule = config.width, config.schedule
    hidden = round(width * config.mlp_ratio)
    result: dict[str, Shape] = {
        "pos_start": (1, schedule.tokens[0], width),
        "pos_1LC": (1, schedule.total, width),
        "class_emb.weight": (config.num_classes + 1, width),
        "lvl_embed.weight": (schedule.num_scales, width),
        **_linear("word_embed", config.latent_channels, width),
    }
    if config.shared_aln:
        result |= _linear("shared_ada_lin.1", width, 6 * width)
    for layer in range(config.depth):
        block = BLOCK.format(layer=layer)
        if config.shared_aln:
            result[f"{block}.ada_gss"] = (1, 1, 6, width)
        else:
            result |= _linear(f"{block}.ada_lin.1", width, 6 * width)
        if config.attn_l2_norm:
            result[f"{block}.attn.scale_mul_1H11"] = (1, config.num_heads, 1, 1)
        result |= {
            f"{block}.attn.mat_qkv.weight": (3 * width, width),
            f"{block}.attn.q_bias": (width,),
            f"{block}.attn.v_bias": (width,),
            **_linear(f"{block}.attn.proj", width, width),
            **_linear(f"{block}.ffn.fc1", width, hidden),
            **_linear(f"{block}.ffn.fc2", hidden, width),
        }
    result |= _linear("head_nm.ada_lin.1", width, 2 * width)
    result |= _linear("head", width, config.vocab_size)
    return result


def buffers(config: VARConfig) -> dict[str, np.ndarray]:
    """Return the buffers which the reference's constructor makes and its strict loading wants."""
    schedule = config.schedule
    scale = np.repeat(np.arange(schedule.num_scales), schedule.tokens)
    mask = np.where(scale[:, None] >= scale, np.float32(0), np.float32(-np.inf))
    zeros = np.zeros(config.width, np.float32)
    return {
        "lvl_1L": scale[None],
        "attn_bias_for_masking": mask[None, None],
        **{f"{BLOCK.format(layer=i)}.attn.zero_k_bias": zeros for i in range(config.depth)},
    }


def describe(config: VARConfig) -> str:
    """Return the configuration in words."""
    return (
        f"a VAR transformer of depth {config.depth}, width {config.width}, "
        f"{config.num_heads} heads, {config.num_classes} classes, {config.vocab_size} codes and "
        f"{config.schedule.total} tokens"
    )


VAR = Architecture(
    name="a VAR transformer",
    keys=("pos_1LC", "class_emb.weight", "head_nm.ada_lin.1.weight"),
    table=TABLE,
    shapes=shapes,
    buffers=buffers,
    describe=describe,
    infer=lambda source, before: infer_config(
        source.state, settings=source.settings, source=str(source.path)
    ),
)


def infer_config(
    state: StateDict,
    patch_nums: Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    source: str = "the state dict",
) -> VARConfig:
    """Return the configuration of a transformer from the shapes of its entries.

    Args:
      state: the reference's entries.
      patch_nums: sides of the token maps, if known.
      settings: what was found beside the weights; ``patch_nums`` and ``num_heads`` are used where
        the shapes do not tell.
      source: what to call the state dict in messages.

    Raises:
      AmskvError: if this is another architecture, or the shapes leave the schedule open.
    """
    VAR.check_kind(state.keys(), source)
    settings = settings or {}
    width = next(
        state[key].shape[-1]
        for key in ("word_embed.bias", "pos_1LC", "class_emb.weight", "head_nm.ada_lin.1.weight")
        if key in state
    )
    temperatures = [key for key in state if key.endswith(".attn.scale_mul_1H11")]
    if temperatures:
        heads = state[temperatures[0]].size
    else:
        heads = int(settings.get("num_heads", max(width // 64, 1)))
    if width % heads:
        raise AmskvError(f"{source} has width {width}, which is not a multiple of {heads} heads")
    hidden = rows(state, "blocks.0.ffn.fc1.bias", 1, default=4 * width)
    return VARConfig(
        depth=count(state, r"blocks\.(\d+)\.(?:attn|ffn)\."),
        width=width,
        num_heads=heads,
        schedule=_infer_schedule(state, width, patch_nums or settings.get("patch_nums"), source),
        num_classes=rows(state, "class_emb.weight", width, default=1001) - 1,
        vocab_size=rows(state, "head.bias", 1, default=4096),
        latent_channels=rows(state, "word_embed.weight", width, default=32),
        mlp_ratio=hidden / width,
        attn_l2_norm=bool(temperatures),
        shared_aln="shared_ada_lin.1.weight" in state,
    )


def _infer_schedule(
    state: StateDict, width: int, patch_nums: Sequence[int] | None, source: str
) -> ScaleSchedule:
    total = rows(state, "pos_1LC", width, default=0)
    num_scales = rows(state, "lvl_embed.weight", width, default=0)
    size = f"{total} tokens in {num_scales} scales"

    def fits(schedule: ScaleSchedule) -> bool:  # as far as the entries are there
        return total in (0, schedule.total) and num_scales in (0, schedule.num_scales)

    if patch_nums:
        schedule = ScaleSchedule.square(patch_nums)
        if not fits(schedule):
            raise AmskvError(
                f"{source} has {size}, but the patch numbers {schedule} make "
                f"{schedule.total} tokens in {schedule.num_scales} scales"
            )
        return schedule
    candidates = [VAR_256, VAR_512]
    if "lvl_1L" in state:  # the scale of every token
        tokens = np.bincount(np.asarray(state["lvl_1L"]).reshape(-1)).tolist()
        candidates.insert(0, ScaleSchedule.square([max(math.isqrt(n), 1) for n in tokens]))
    for schedule in candidates:
        if fits(schedule):
            return schedule
    raise AmskvError(
        f"{source} has {size}, which is no known schedule: "
        "pass the sides of its token maps, --patch-nums 1,2,3,..."
    )


def _linear(key: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{key}.weight": (outputs, inputs), f"{key}.bias": (outputs,)}
