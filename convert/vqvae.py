"""VAR's tokenizer: its table, and its configuration from the shapes in a checkpoint."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from amskv_jax.convert.architecture import Architecture, count, rows
from amskv_jax.convert.table import CONVOLUTION, Rule, Shape, StateDict, Table, module, norm
from amskv_jax.errors import AmskvError
from amskv_jax.models.var.config import VQVAEConfig
from amskv_jax.schedule import VAR_256, ScaleSchedule

# {side} is encoder or decoder; {way} down or up.
LEVEL, LEVEL_PATH = "{side}.{way}.{i}", "{side}/{way}_{i}"
MIDDLE, MIDDLE_PATH = "{side}.mid", "{side}/middle"


def _residual(key: str, path: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{key}.norm{{n}}", f"{path}/norm{{n}}"),
        *module(f"{key}.conv{{n}}", f"{path}/conv{{n}}", CONVOLUTION),
        *module(f"{key}.nin_shortcut", f"{path}/shortcut", CONVOLUTION),
    )


def _attention(key: str, path: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{key}.norm", f"{path}/norm"),
        *module(f"{key}.qkv", f"{path}/qkv", CONVOLUTION),
        *module(f"{key}.proj_out", f"{path}/out", CONVOLUTION),
    )


TABLE = Table(
    (
        *_residual(f"{LEVEL}.block.{{j}}", f"{LEVEL_PATH}/block_{{j}}"),
        *_attention(f"{LEVEL}.attn.{{j}}", f"{LEVEL_PATH}/attention_{{j}}"),
        *module(f"{LEVEL}.{{resample}}.conv", f"{LEVEL_PATH}/{{resample}}", CONVOLUTION),
        *_residual(f"{MIDDLE}.block_{{j}}", f"{MIDDLE_PATH}/block_{{j}}"),
        *_attention(f"{MIDDLE}.attn_{{j}}", f"{MIDDLE_PATH}/attention_{{j}}"),
        *module("{side}.conv_{end}", "{side}/conv_{end}", CONVOLUTION),
        *norm("{side}.norm_out", "{side}/norm_out"),
        *module("quant_conv", "quant_conv", CONVOLUTION),
        *module("post_quant_conv", "post_quant_conv", CONVOLUTION),
        Rule("quantize.embedding.weight", "quantizer/codebook"),
        Rule("quantize.quant_resi.qresi_ls.{k}.weight", "quantizer/phi_kernel[{k}]", CONVOLUTION),
        Rule("quantize.quant_resi.qresi_ls.{k}.bias", "quantizer/phi_bias[{k}]"),
        Rule("quantize.quant_resi.qresi.weight", "quantizer/phi_kernel[0]", CONVOLUTION),
        Rule("quantize.quant_resi.qresi.bias", "quantizer/phi_bias[0]"),
    )
)


def shapes(config: VQVAEConfig) -> dict[str, Shape]:
    """Return the reference's entries, without buffers, with their shapes in PyTorch's layout."""
    latent = config.latent_channels
    levels = [config.channels * multiplier for multiplier in config.channel_multipliers]
    last = len(levels) - 1
    result: dict[str, Shape] = {}

    def add_level(key: str, channels: int, outputs: int, blocks: int, attention: bool) -> None:
        for block in range(blocks):
            result.update(_residual_shapes(f"{key}.block.{block}", channels, outputs))
            if attention:
                result.update(_attention_shapes(f"{key}.attn.{block}", outputs))
            channels = outputs

    def add_middle(key: str) -> None:
        for block in (1, 2):
            result.update(_residual_shapes(f"{key}.block_{block}", levels[last], levels[last]))
        result.update(_attention_shapes(f"{key}.attn_1", levels[last]))

    result |= _convolution("encoder.conv_in", 3, config.channels)
    channels = config.channels
    for i, outputs in enumerate(levels):
        key = f"encoder.down.{i}"
        add_level(key, channels, outputs, config.num_res_blocks, attention=i == last)
        if i < last:
            result |= _convolution(f"{key}.downsample.conv", outputs, outputs)
        channels = outputs
    add_middle("encoder.mid")
    result |= _norm("encoder.norm_out", channels)
    result |= _convolution("encoder.conv_out", channels, latent)

    result |= _convolution("decoder.conv_in", latent, channels)
    add_middle("decoder.mid")
    for i, outputs in reversed(list(enumerate(levels))):
        key = f"decoder.up.{i}"
        add_level(key, channels, outputs, config.num_res_blocks + 1, attention=i == last)
        if i > 0:
            result |= _convolution(f"{key}.upsample.conv", outputs, outputs)
        channels = outputs
    result |= _norm("decoder.norm_out", channels)
    result |= _convolution("decoder.conv_out", channels, 3)

    result["quantize.embedding.weight"] = (config.vocab_size, latent)
    for k in range(config.num_phi):
        name = f"qresi_ls.{k}" if config.num_phi > 1 else "qresi"
        result |= _convolution(f"quantize.quant_resi.{name}", latent, latent)
    result |= _convolution("quant_conv", latent, latent)
    result |= _convolution("post_quant_conv", latent, latent)
    return result


def buffers(config: VQVAEConfig) -> dict[str, np.ndarray]:
    """Return the buffer which the reference's strict loading wants.

    It counts how often codes occurred in training, which nothing but training uses: zeros, as the
    constructor leaves it.
    """
    size = (config.schedule.num_scales, config.vocab_size)
    return {"quantize.ema_vocab_hit_SV": np.zeros(size, np.float32)}


def describe(config: VQVAEConfig) -> str:
    """Return the configuration in words."""
    multipliers = ", ".join(map(str, config.channel_multipliers))
    return (
        f"a VAR tokenizer with {config.channels} x ({multipliers}) channels, "
        f"{config.vocab_size} codes of {config.latent_channels} channels and "
        f"{config.num_phi} phi convolutions"
    )


def rename(key: str) -> str:
    """Return the name which a phi convolution of one scale has where several scales share it.

    With one for every scale (``share_quant_resi=0`` in the reference) the two mean the same.
    """
    return re.sub(r"^quantize\.quant_resi\.(?=\d+\.)", "quantize.quant_resi.qresi_ls.", key)


VQVAE = Architecture(
    name="a VAR tokenizer",
    keys=("quantize.embedding.weight", "encoder.conv_in.weight", "post_quant_conv.weight"),
    table=TABLE,
    shapes=shapes,
    buffers=buffers,
    describe=describe,
    rename=rename,
    infer=lambda source, before: infer_config(
        source.state,
        before["transformer"].config.schedule,
        before["transformer"].settings.get("vae_kwargs"),
        str(source.path),
    ),
)


def infer_config(
    state: StateDict,
    schedule: ScaleSchedule = VAR_256,
    settings: Mapping[str, Any] | None = None,
    source: str = "the state dict",
) -> VQVAEConfig:
    """Return the configuration of a tokenizer from the shapes of its entries.

    Args:
      state: the reference's entries.
      schedule: the token maps, which are the transformer's; no shape tells them.
      settings: the arguments of the tokenizer's constructor, if found beside the weights.
      source: what to call the state dict in messages.

    Raises:
      AmskvError: if this is another architecture, or a variant that is not supported.
    """
    VQVAE.check_kind(state.keys(), source)
    settings = settings or {}
    if settings.get("using_znorm"):
        raise AmskvError(f"{source} normalises its codes (using_znorm), which is not supported")
    state = VQVAE.weights(state)
    defaults = VQVAEConfig()
    channels = rows(state, "encoder.conv_in.bias", 1, default=defaults.channels)
    levels = [
        rows(state, f"encoder.down.{i}.block.0.conv1.bias", 1, default=channels)
        for i in range(count(state, r"encoder\.down\.(\d+)\.block\."))
    ]
    if not levels or any(level % channels for level in levels):
        raise AmskvError(
            f"{source} has levels of {levels} channels, expected multiples of the {channels} "
            "channels of encoder.conv_in"
        )
    latent = rows(state, "quant_conv.bias", 1, default=defaults.latent_channels)
    shared = "quantize.quant_resi.qresi.weight" in state
    num_phi = 1 if shared else count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    return VQVAEConfig(
        schedule=schedule,
        vocab_size=rows(state, "quantize.embedding.weight", latent, default=defaults.vocab_size),
        latent_channels=latent,
        channels=channels,
        channel_multipliers=tuple(level // channels for level in levels),
        num_res_blocks=count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        num_phi=num_phi or defaults.num_phi,
        phi_ratio=abs(settings.get("quant_resi", defaults.phi_ratio)),
    )


def _convolution(key: str, inputs: int, outputs: int, size: int = 3) -> dict[str, Shape]:
    return {f"{key}.weight": (outputs, inputs, size, size), f"{key}.bias": (outputs,)}


def _norm(key: str, channels: int) -> dict[str, Shape]:
    return {f"{key}.weight": (channels,), f"{key}.bias": (channels,)}


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


def _attention_shapes(key: str, channels: int) -> dict[str, Shape]:
    return {
        **_norm(f"{key}.norm", channels),
        **_convolution(f"{key}.qkv", channels, 3 * channels, size=1),
        **_convolution(f"{key}.proj_out", channels, channels, size=1),
    }
