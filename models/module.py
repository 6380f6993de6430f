"""What the modules of all models have in common."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn


class Module(nn.Module):
    """A flax module that takes the parameters it is given.

    Flax compares each with what its initializer would make, which it traces for that: a tenth of
    the time to trace a sampler. Shapes are compared when a checkpoint is read, and a parameter may
    also stand for an array, such as ``stacked.StackedWeight``.
    """

    @nn.nowrap
    def param(
        self, name: str, init_fn: Callable[..., Any], *init_args: Any, **keywords: Any
    ) -> Any:
        """Return a parameter, or what its initializer makes; see ``nn.Module.param``."""
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        return super().param(name, init_fn, *init_args, **keywords)
