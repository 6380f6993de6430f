"""One measurement of the PyTorch reference, in a process of its own; see compare_reference.py.

The reference is the user's own checkout (FoundationVision/VAR, FoundationVision/Infinity or a fork
of Infinity, see forks.py), found by its path. Weights are random. The transformer draws as the
reference's own demo does; pictures are not decoded. This process needs PyTorch and knows nothing of
amskv_jax.
"""

import argparse
import importlib.util
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forks import FORKS, SIZES
from torch.nn import functional

GUIDANCE = {"var": 1.5, "infinity": 4.0}
TOP_K, TOP_P = 900, {"var": 0.96, "infinity": 0.97}
TEMPERATURE = 0.5  # Infinity's; VAR has none


def main() -> None:
    """Measure, and write what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkout", type=Path, required=True, help="of the reference's code")
    parser.add_argument("--shape", required=True, help="JSON, see shapes.py")
    parser.add_argument("--method", choices=list(FORKS), help="of a fork, see forks.py")
    parser.add_argument("--size", choices=list(SIZES.values()), help="of the fork's model")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    checkout = options.checkout.resolve()
    sys.path.insert(0, str(checkout))
    shape = json.loads(options.shape)
    notes = stand_ins() if shape["kind"] == "infinity" else []  # VAR does without
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if options.eager or device.type == "cpu":  # where it needs a C++ compiler
        torch.compile = lambda *args, **_: args[0] if args else _same  # type: ignore[assignment]
        notes.append("torch.compile is switched off")
    build = {"var": var, "infinity": infinity}[shape["kind"]]
    try:
        model, call = build(shape, options.batch, options.text_tokens, device)
        if options.method:
            FORKS[options.method].apply(checkout, model, options.size, options.batch)
        result = measure(model, call, options.batch, options.repeats, device)
    except torch.OutOfMemoryError as error:
        result = {"error": "out of memory", "detail": str(error).partition("\n")[0]}
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    result |= {"device": name, "notes": notes, "versions": {"torch": torch.__version__}}
    options.out.write_text(json.dumps(result))


def measure(
    model: torch.nn.Module,
    call: Callable[[], Any],
    batch: int,
    repeats: int,
    device: torch.device,
) -> dict[str, Any]:
    """Time calls, after one that is not counted; peak memory is that of all calls.

    The cache is measured in the call that is not counted: the most that all attentions together
    keep of keys and values whenever one of them is done.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    attentions = [module for module in model.modules() if hasattr(module, "cached_k")]
    kept = [0]

    def weigh(*_: Any) -> None:
        pairs = [getattr(x, name) for x in attentions for name in ("cached_k", "cached_v")]
        kept.append(sum(cached.nbytes for cached in pairs if cached is not None))

    def seconds() -> float:
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    hooks = [module.register_forward_hook(weigh) for module in attentions]
    first = seconds()
    for hook in hooks:
        hook.remove()
    timed = [seconds() for _ in range(repeats)]
    return {
        "pictures_per_second": batch / sorted(timed)[repeats // 2],
        "seconds": timed,
        "first_call_seconds": first,
        "cache_bytes": max(kept),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
    }


def var(
    shape: dict[str, Any], batch: int, text_tokens: int, device: torch.device
) -> tuple[torch.nn.Module, Callable[[], Any]]:
    """Return VAR and a call that draws with it under float16 autocast, as its demo does."""
    import dist  # noqa: PLC0415

    import models  # noqa: PLC0415

    dist.set_gpu_id(0 if device.type == "cuda" else None)
    patches = tuple(height for height, _ in shape["grids"])
    with device:
        vae = models.VQVAE(
            vocab_size=shape["vocab_size"],
            z_channels=shape["latent_channels"],
            ch=shape["tokenizer_channels"],
            share_quant_resi=shape["num_phi"],
            v_patch_nums=patches,
        )
        model = models.VAR(
            vae_local=vae,
            num_classes=shape["num_classes"],
            depth=shape["depth"],
            embed_dim=shape["width"],
            num_heads=shape["num_heads"],
            mlp_ratio=shape["mlp_ratio"],
            shared_aln=shape["shared_aln"],
            attn_l2_norm=shape["attn_l2_norm"],
            norm_eps=1e-6,
            patch_nums=patches,
        )
        model.init_weights(init_adaln=0.5, init_adaln_gamma=1e-5, init_head=0.02, init_std=-1)
    for module in (vae, model):
        module.to(device).eval().requires_grad_(False)
    vae.fhat_to_img = lambda latent: latent  # the transformer alone
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    labels = torch.arange(batch, device=device) % shape["num_classes"]

    def call() -> Any:
        half = torch.autocast(device.type, torch.float16, enabled=device.type == "cuda")
        with torch.inference_mode(), half:
            return model.autoregressive_infer_cfg(
                B=batch, label_B=labels, g_seed=0, cfg=GUIDANCE["var"], top_p=TOP_P["var"],
                top_k=min(TOP_K, shape["vocab_size"]),
            )  # fmt: skip

    return model, call


def infinity(
    shape: dict[str, Any], batch: int, text_tokens: int, device: torch.device
) -> tuple[torch.nn.Module, Callable[[], Any]]:
    """Return Infinity and a call that draws: blocks in bfloat16, fused norms, as published."""
    torch._dynamo.config.cache_size_limit = 64  # as the reference's own tools
    from infinity.models.bsq_vae.multiscale_bsq import MultiScaleBSQ  # noqa: PLC0415
    from infinity.models.infinity import Infinity  # noqa: PLC0415
    from infinity.utils import dist  # noqa: PLC0415

    if hasattr(dist, "set_gpu_id") and device.type == "cuda":
        dist.set_gpu_id(0)
    cuda = device.type == "cuda"
    bits = shape["bits"] // (4 if shape["patchify"] else 1)
    # Of the tokenizer, the loop needs the quantiser alone.
    quantizer = MultiScaleBSQ(
        dim=bits, codebook_size=2**bits, new_quant=True, schedule_mode="dynamic"
    )
    vae = types.SimpleNamespace(quantizer=quantizer, embed_dim=bits, vocab_size=2**bits)
    schedule = [(1, height, width) for height, width in shape["grids"]]
    # Built on the CPU, as it asks for; random numbers come faster on the device.
    torch.nn.Linear.reset_parameters = lambda self: None  # type: ignore[method-assign]
    with torch.no_grad():
        model = Infinity(
            vae_local=vae,
            text_channels=shape["text_channels"],
            text_maxlen=shape["text_maxlen"],
            shared_aln=True,
            checkpointing="full-block",
            customized_flash_attn=False,
            fused_norm=True,
            pad_to_multiplier=128,
            use_bit_label=1,
            add_lvl_embeding_only_first_block=1,
            rope2d_each_sa_layer=1,
            rope2d_normalized_by_hw=2,
            pn="1M",
            apply_spatial_patchify=int(shape["patchify"]),
            inference_mode=True,
            train_h_div_w_list=[1.0],
            depth=shape["depth"],
            embed_dim=shape["width"],
            num_heads=shape["num_heads"],
            mlp_ratio=shape["mlp_ratio"],
            block_chunks=max(2, shape["block_chunks"]),
        )
    quantizer.to(device)
    model.to(device).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                module.bias.zero_()
    if cuda:
        for block in model.unregistered_blocks:
            block.bfloat16()
    model.rng = torch.Generator(device=device)
    features = torch.randn(batch * text_tokens, shape["text_channels"], device=device)
    lengths = [text_tokens] * batch
    offsets = torch.arange(batch + 1, device=device, dtype=torch.int32) * text_tokens
    scales = len(schedule)

    def call() -> Any:
        half = torch.autocast(device.type, torch.bfloat16, enabled=cuda)
        with torch.no_grad(), half:
            return model.autoregressive_infer_cfg(
                vae=vae, scale_schedule=schedule, B=batch, g_seed=0, returns_vemb=1, vae_type=bits,
                label_B_or_BLT=(features.clone(), lengths, offsets, text_tokens),
                cfg_list=[GUIDANCE["infinity"]] * scales, tau_list=[TEMPERATURE] * scales,
                top_k=TOP_K, top_p=TOP_P["infinity"], cfg_insertion_layer=[0], inference_mode=True,
                ret_img=False, sampling_per_bits=1,
            )  # fmt: skip

    return model, call


def stand_ins() -> list[str]:
    """Put modules in the place of those that the references import and this machine lacks.

    Returns:
      What was replaced, and by what.
    """
    notes = []
    for name, (make, what) in STAND_INS.items():
        if importlib.util.find_spec(name) is None:
            sys.modules.update(make())
            notes.append(f"{name} is not installed: {what}")
    return notes


def variable_length_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Attend from rows of equal length to keys and values of different length.

    Args:
      q: queries, [rows * max_seqlen_q, heads, channels].
      kv: keys and values of all rows, one row after the other, [tokens, 2, heads, channels].
      cu_seqlens_q: where the rows of queries begin; all have ``max_seqlen_q``.
      cu_seqlens_k: where those of keys begin, and the end, [rows + 1].
      max_seqlen_q: queries per row.
      max_seqlen_k: keys of the longest row.
      dropout_p: must be 0.
      softmax_scale: factor of the logits; by default channels ** -0.5.

    Returns:
      [rows * max_seqlen_q, heads, channels].
    """
    rows, mask = len(cu_seqlens_k) - 1, None
    if len(q) != rows * max_seqlen_q or dropout_p:
        raise ValueError("expected rows of queries of one length, and no dropout")
    if len(kv) == rows * max_seqlen_k:
        padded = kv
    else:
        positions = torch.arange(max_seqlen_k, device=kv.device)
        starts, stops = cu_seqlens_k[:-1, None], cu_seqlens_k[1:, None]
        index = starts + positions
        mask = (index < stops)[:, None, None]
        padded = kv[index.clamp(max=len(kv) - 1).reshape(-1).long()]
    keys, values = padded.unflatten(0, (rows, max_seqlen_k)).permute(2, 0, 3, 1, 4)
    queries = q.unflatten(0, (rows, max_seqlen_q)).transpose(1, 2)
    output = functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=softmax_scale
    )
    return output.transpose(1, 2).flatten(0, 1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Attend; queries, keys, values and the output are [rows, tokens, heads, channels]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output = functional.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout_p, scale=softmax_scale
    )
    return output.transpose(1, 2)


def _same(function: Any) -> Any:
    return function


def _module(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(content)
    return module


def _flash_attn() -> dict[str, types.ModuleType]:
    functions = {
        "flash_attn_func": attention,
        "flash_attn_varlen_kvpacked_func": variable_length_attention,
    }
    return {"flash_attn": _module("flash_attn", **functions)}


def _timm() -> dict[str, types.ModuleType]:
    """Return what of timm the references name; dropping whole paths does nothing when drawing."""

    class DropPath(torch.nn.Identity):
        def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
            super().__init__()

    layers = _module("timm.models.layers", DropPath=DropPath, drop_path=lambda x, *_: x)
    models = _module("timm.models", layers=layers, register_model=_same)
    loss = _module("timm.loss", SoftTargetCrossEntropy=type("SoftTargetCrossEntropy", (), {}))
    timm = _module("timm", models=models, loss=loss)
    return {module.__name__: module for module in (timm, models, layers, loss)}


def _einops() -> dict[str, types.ModuleType]:
    """Return the two patterns that the quantiser uses when it looks up codes."""
    patterns: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "... c d -> ... (c d)": lambda x: x.flatten(-2),
        "b ... d -> b d ...": lambda x: x.movedim(-1, 1),
    }

    def rearrange(x: torch.Tensor, pattern: str) -> torch.Tensor:
        return patterns[pattern](x)

    others = dict.fromkeys(("reduce", "pack", "unpack"))
    return {"einops": _module("einops", rearrange=rearrange, **others)}


STAND_INS: dict[str, tuple[Callable[[], dict[str, types.ModuleType]], str]] = {
    "flash_attn": (_flash_attn, "PyTorch's scaled_dot_product_attention does its work"),
    "timm": (_timm, "drop path is an identity, as it is when drawing"),
    "einops": (_einops, "PyTorch rearranges the codes"),
    "pytz": (lambda: {"pytz": _module("pytz")}, "drawing does not use it"),
    "tqdm": (lambda: {"tqdm": _module("tqdm", tqdm=iter)}, "drawing does not use it"),
}

if __name__ == "__main__":
    main()
