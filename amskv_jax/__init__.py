"""Next-scale visual autoregressive image models in JAX, with a cache that keeps only what matters.

    import amskv_jax as amskv

    pipe = amskv.load(directory)
    samples = pipe.sample([207, 360], key=jax.random.key(0), policy=amskv.AMSKV())

Names are imported on first use, so that importing the package takes no time and no device.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amskv_jax.cache.layout import CacheLayout
    from amskv_jax.cache.store import KVCache
    from amskv_jax.checkpoints.folder import CheckpointInfo, load_checkpoint, save_checkpoint
    from amskv_jax.checkpoints.hub import fetch
    from amskv_jax.checkpoints.initialize import init_checkpoint
    from amskv_jax.checkpoints.publish import push
    from amskv_jax.configs import ModelConfig
    from amskv_jax.convert import convert_var, export_checkpoint
    from amskv_jax.errors import AmskvError, UsageError
    from amskv_jax.generate import Sampler, Samples, picture_keys
    from amskv_jax.mesh import MeshShape
    from amskv_jax.models.guidance import Controls, Drawing, Guidance
    from amskv_jax.models.var.config import VARConfig, VQVAEConfig
    from amskv_jax.models.var.model import VARModel
    from amskv_jax.models.var.transformer import VAR
    from amskv_jax.models.var.vqvae import VQVAE
    from amskv_jax.pipeline import Pipeline, load
    from amskv_jax.plan.memory import CacheGeometry, MemoryReport
    from amskv_jax.plan.retention import RetentionPlan
    from amskv_jax.plan.stats import LayerStats
    from amskv_jax.policies import (
        AMSKV,
        H2O,
        Explicit,
        FittedAMSKV,
        Full,
        Heads,
        HeatKV,
        OnlineAMSKV,
        Optimal,
        Policy,
        ScaleKV,
        Sink,
        Window,
    )
    from amskv_jax.sampling import TokenSampling
    from amskv_jax.schedule import ScaleSchedule

__version__ = version("amskv-jax")

_MODULE_OF = {
    name: module
    for module, names in {
        "cache.layout": ("CacheLayout",),
        "cache.store": ("KVCache",),
        "checkpoints.folder": ("CheckpointInfo", "load_checkpoint", "save_checkpoint"),
        "configs": ("ModelConfig",),
        "convert": ("convert_var", "export_checkpoint"),
        "errors": ("AmskvError", "UsageError"),
        "generate": ("Sampler", "Samples", "picture_keys"),
        "checkpoints.hub": ("fetch",),
        "checkpoints.initialize": ("init_checkpoint",),
        "checkpoints.publish": ("push",),
        "mesh": ("MeshShape",),
        "plan.memory": ("CacheGeometry", "MemoryReport"),
        "models.guidance": ("Controls", "Drawing", "Guidance"),
        "models.var.config": ("VARConfig", "VQVAEConfig"),
        "models.var.model": ("VARModel",),
        "models.var.transformer": ("VAR",),
        "models.var.vqvae": ("VQVAE",),
        "pipeline": ("Pipeline", "load"),
        "plan.retention": ("RetentionPlan",),
        "policies": (
            "AMSKV",
            "H2O",
            "Explicit",
            "FittedAMSKV",
            "Full",
            "Heads",
            "HeatKV",
            "OnlineAMSKV",
            "Optimal",
            "Policy",
            "ScaleKV",
            "Sink",
            "Window",
        ),
        "sampling": ("TokenSampling",),
        "schedule": ("ScaleSchedule",),
        "plan.stats": ("LayerStats",),
    }.items()
    for name in names
}

__all__ = [
    "AMSKV",
    "H2O",
    "VAR",
    "VQVAE",
    "AmskvError",
    "CacheGeometry",
    "CacheLayout",
    "CheckpointInfo",
    "Controls",
    "Drawing",
    "Explicit",
    "FittedAMSKV",
    "Full",
    "Guidance",
    "Heads",
    "HeatKV",
    "KVCache",
    "LayerStats",
    "MemoryReport",
    "MeshShape",
    "ModelConfig",
    "OnlineAMSKV",
    "Optimal",
    "Pipeline",
    "Policy",
    "RetentionPlan",
    "Sampler",
    "Samples",
    "ScaleKV",
    "ScaleSchedule",
    "Sink",
    "TokenSampling",
    "UsageError",
    "VARConfig",
    "VARModel",
    "VQVAEConfig",
    "Window",
    "convert_var",
    "export_checkpoint",
    "fetch",
    "init_checkpoint",
    "load",
    "load_checkpoint",
    "picture_keys",
    "push",
    "save_checkpoint",
]

if not TYPE_CHECKING:  # type checkers have the imports above, and would take any name for known

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
