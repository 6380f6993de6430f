"""Small steps which tests of files and conversion share."""

import io
import re
import shlex

import numpy as np
import pytest
from PIL import Image

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


def pack_pictures(path, pixels, classes, labels):
    """Write pictures as `amskv score --real` takes them."""
    encoded = []
    for picture in pixels:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "png")
        encoded.append(np.frombuffer(file.getvalue(), np.uint8))
    np.savez(
        path,
        jpeg=np.concatenate(encoded),
        offsets=np.cumsum([0, *map(len, encoded)]),
        labels=labels[: len(pixels)],
        classes=list(classes),
    )
    return path


def page_commands(page):
    """Yield the words after ``amskv`` of every command in the shell blocks of a page."""
    for block in re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        yield from (shlex.split(line)[1:] for line in block.splitlines())
