"""Small steps which tests of files and conversion share."""

import numpy as np
import pytest

from amskv_jax.errors import AmskvError


def message(call, *arguments, **keywords):
    """Return the message of the AmskvError that a call raises."""
    with pytest.raises(AmskvError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


def assert_same_state(found, expected):
    """Check that two state dicts agree in names, types and every bit."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert np.asarray(found[key]).tobytes() == value.tobytes(), key


def to_torch(torch, state):
    """Return a state dict of tensors."""
    return {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
