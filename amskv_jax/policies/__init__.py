"""Retention policies, one small file each, and their registry."""

from amskv_jax.errors import UsageError
from amskv_jax.policies.ams import AMSKV
from amskv_jax.policies.ams_fitted import FittedAMSKV
from amskv_jax.policies.ams_online import OnlineAMSKV
from amskv_jax.policies.base import Policy
from amskv_jax.policies.explicit import Explicit
from amskv_jax.policies.full import Full
from amskv_jax.policies.h2o import H2O
from amskv_jax.policies.heads import Heads
from amskv_jax.policies.heatkv import HeatKV
from amskv_jax.policies.optimal import Optimal
from amskv_jax.policies.scalekv import ScaleKV
from amskv_jax.policies.window import Sink, Window

REGISTRY: dict[str, type[Policy]] = {
    "full": Full,
    "ams": AMSKV,
    "ams-fitted": FittedAMSKV,
    "ams-online": OnlineAMSKV,
    "window": Window,
    "sink": Sink,
    "h2o": H2O,
    "scalekv": ScaleKV,
    "heads": Heads,
    "heatkv": HeatKV,
    "optimal": Optimal,
    "explicit": Explicit,
}
"""Name on the command line -> policy. What is registered here is known to every command."""


def policy_class(name: str) -> type[Policy]:
    """Return the policy of that name; raises UsageError if there is none."""
    try:
        return REGISTRY[name]
    except KeyError:
        raise UsageError(f"unknown policy {name!r}: expected {', '.join(REGISTRY)}") from None


__all__ = [
    "AMSKV",
    "H2O",
    "REGISTRY",
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
    "policy_class",
]
