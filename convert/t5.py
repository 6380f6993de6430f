"""T5's encoder: its table, and its configuration from the shapes in a checkpoint."""

from collections.abc import Mapping
from typing import Any

from amskv_jax.convert.architecture import Architecture, count, rows
from amskv_jax.convert.table import LINEAR, Rule, Shape, StateDict, Table
from amskv_jax.errors import AmskvError
from amskv_jax.models.t5 import FLAN_T5_XL, T5Config

BLOCK = "encoder.block.{layer}"
ATTENTION, MLP = f"{BLOCK}.layer.0.SelfAttention", f"{BLOCK}.layer.1.DenseReluDense"
POSITION_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
LAYER = "[{layer}]"

TABLE = Table(
    (
        Rule("shared.weight", "embedding/embedding"),
        Rule(POSITION_BIAS, "position_bias"),
        Rule(f"{ATTENTION}.q.weight", f"blocks/attention/query/kernel{LAYER}", LINEAR),
        Rule(f"{ATTENTION}.k.weight", f"blocks/attention/key/kernel{LAYER}", LINEAR),
        Rule(f"{ATTENTION}.v.weight", f"blocks/attention/value/kernel{LAYER}", LINEAR),
        Rule(f"{ATTENTION}.o.weight", f"blocks/attention/out/kernel{LAYER}", LINEAR),
        Rule(f"{BLOCK}.layer.0.layer_norm.weight", f"blocks/attention_norm/scale{LAYER}"),
        Rule(f"{MLP}.wi_0.weight", f"blocks/mlp/gate/kernel{LAYER}", LINEAR),
        Rule(f"{MLP}.wi_1.weight", f"blocks/mlp/up/kernel{LAYER}", LINEAR),
        Rule(f"{MLP}.wo.weight", f"blocks/mlp/down/kernel{LAYER}", LINEAR),
        Rule(f"{BLOCK}.layer.1.layer_norm.weight", f"blocks/mlp_norm/scale{LAYER}"),
        Rule("encoder.final_layer_norm.weight", "norm/scale"),
    )
)


def shapes(config: T5Config) -> dict[str, Shape]:
    """Return the reference's entries, the alias left out, with their shapes in PyTorch's layout."""
    width, hidden = config.width, config.hidden
    inner = config.num_heads * config.head_dim
    result: dict[str, Shape] = {
        "shared.weight": (config.vocab_size, width),
        POSITION_BIAS: (config.num_buckets, config.num_heads),
    }
    for layer in range(config.depth):
        block = BLOCK.format(layer=layer)
        attention, mlp = ATTENTION.format(layer=layer), MLP.format(layer=layer)
        result |= {
            f"{attention}.q.weight": (inner, width),
            f"{attention}.k.weight": (inner, width),
            f"{attention}.v.weight": (inner, width),
            f"{attention}.o.weight": (width, inner),
            f"{block}.layer.0.layer_norm.weight": (width,),
            f"{mlp}.wi_0.weight": (hidden, width),
            f"{mlp}.wi_1.weight": (hidden, width),
            f"{mlp}.wo.weight": (width, hidden),
            f"{block}.layer.1.layer_norm.weight": (width,),
        }
    return result | {"encoder.final_layer_norm.weight": (width,)}


def describe(config: T5Config) -> str:
    """Return the configuration in words."""
    return (
        f"a T5 encoder of depth {config.depth}, width {config.width}, {config.num_heads} heads of "
        f"{config.head_dim} channels, {config.hidden} hidden channels and {config.vocab_size} "
        "tokens"
    )


T5 = Architecture(
    name="a T5 text encoder",
    keys=("shared.weight", "encoder.embed_tokens.weight", "encoder.final_layer_norm.weight"),
    table=TABLE,
    shapes=shapes,
    buffers=lambda config: {},
    describe=describe,
    aliases={"encoder.embed_tokens.weight": "shared.weight"},
    foreign=("decoder.", "lm_head."),
    infer=lambda source, before: infer_config(source.state, source.settings, str(source.path)),
    files=("tokenizer.json",),
)


def infer_config(
    state: StateDict,
    settings: Mapping[str, Any] | None = None,
    source: str = "the state dict",
) -> T5Config:
    """Return the configuration of an encoder from the shapes of its entries.

    Args:
      state: the reference's entries; those of a decoder are ignored.
      settings: the content of config.json beside the weights, if there is one. It tells the largest
        distance and the norms' epsilon, which no shape does, and is checked against the shapes.
      source: what to call the state dict in messages.

    Raises:
      AmskvError: if this is another architecture or another version of T5, or the settings are
        those of another encoder.
    """
    state = T5.weights(state)
    T5.check_kind(state.keys(), source)
    settings = settings or {}
    _check_version(state, settings, source)
    defaults = FLAN_T5_XL
    vocab_size, width = _matrix_shape(state, "shared.weight", source)
    buckets, heads = _matrix_shape(state, POSITION_BIAS, source)
    inner = rows(state, f"{ATTENTION.format(layer=0)}.q.weight", width, default=width)
    if inner % heads:
        raise AmskvError(
            f"{source} has queries of {inner} channels, which is not a multiple of {heads} heads"
        )
    hidden = rows(state, f"{MLP.format(layer=0)}.wi_0.weight", width, default=defaults.hidden)
    fields = {
        "depth": count(state, r"encoder\.block\.(\d+)\."),
        "width": width,
        "num_heads": heads,
        "head_dim": inner // heads,
        "hidden": hidden,
        "vocab_size": vocab_size,
        "num_buckets": buckets,
    }
    _check_settings(fields, settings, source)
    try:
        return T5Config(
            **fields,
            max_distance=int(
                settings.get("relative_attention_max_distance", defaults.max_distance)
            ),
            norm_epsilon=float(settings.get("layer_norm_epsilon", defaults.norm_epsilon)),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise AmskvError(f"{source} has a config.json that cannot be used: {error}") from error


SETTINGS = {
    "num_layers": "depth",
    "d_model": "width",
    "num_heads": "num_heads",
    "d_kv": "head_dim",
    "d_ff": "hidden",
    "relative_attention_num_buckets": "num_buckets",
}
"""Names in config.json -> ours. The embedding often has more rows than ``vocab_size`` says."""


def _check_settings(fields: Mapping[str, int], settings: Mapping[str, Any], source: str) -> None:
    wrong = [
        f"{name} is {settings[name]}, the weights have {fields[field]}"
        for name, field in SETTINGS.items()
        if name in settings and settings[name] != fields[field]
    ]
    if wrong:
        raise AmskvError(f"config.json in {source} is of another encoder: {'; '.join(wrong)}")


def _check_version(state: StateDict, settings: Mapping[str, Any], source: str) -> None:
    """Raise an AmskvError unless the feed-forward part is that of T5 v1.1."""
    kind = settings.get("feed_forward_proj", "gated-gelu")
    if kind == "gated-gelu" and f"{MLP.format(layer=0)}.wi.weight" in state:
        kind = "relu"
    if kind != "gated-gelu":
        raise AmskvError(
            f"{source} is a T5 with the feed-forward part {kind}, expected gated-gelu, as T5 v1.1 "
            "and Flan-T5 have it"
        )


def _matrix_shape(state: StateDict, key: str, source: str) -> tuple[int, int]:
    if key not in state:
        raise AmskvError(f"{source} does not hold a whole T5 encoder: {key} is missing")
    shape = state[key].shape
    if len(shape) != 2 or 0 in shape:
        raise AmskvError(f"{source} does not fit a T5 encoder: {key} {shape} is no matrix")
    return shape[0], shape[1]
