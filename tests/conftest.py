"""Fixtures which several files share. Goldens were made on CPUs, so tests run there by default."""

import os
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

# Before anything imports JAX. Compiling takes most of the time, running next to nothing.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    # Take half the time, and a fifth of the rest: the emitters, and splitting programs up for many
    # cores. Later versions may not know the flags.
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * version("jaxlib").startswith("0.10."),
)

import jax
import numpy as np
import pytest
from hub_server import TOKEN, end_sessions, serving
from reference_weights import recipe_state
from safetensors.numpy import save_file

from amskv_jax.checkpoints.initialize import init_checkpoint
from amskv_jax.cli import main
from amskv_jax.testing import TINY_VAR, TOKENIZER, TRANSFORMER

# Axes are added where they are meant, or a mistake in a shape broadcasts into a wrong number.
jax.config.update("jax_numpy_rank_promotion", "raise")


@dataclass(frozen=True)
class Finished:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory):
    """Keep commands from writing into the user's cache folder, and compile equal programs once."""
    directory = tmp_path_factory.mktemp("cache")
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(directory / "jax"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory))
        yield


@pytest.fixture(scope="module", autouse=True)
def programs_do_not_pile_up():
    """Drop compiled programs once they take 4 GiB, as several processes test side by side."""
    yield
    memory = Path("/proc/self/statm")
    if memory.exists():
        pages = int(memory.read_text().split()[1])
        if pages * os.sysconf("SC_PAGE_SIZE") > 4 * 2**30:
            jax.clear_caches()


@pytest.fixture(scope="module")
def quickly_compiled():
    """Compile in a third of the time, for many programs which have little to do."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def amskv(monkeypatch, capsys):
    """Run ``amskv`` with the given arguments in this process."""
    monkeypatch.delenv("AMSKV_DEBUG", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["amskv", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        return Finished(exit_.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of ``TINY_VAR`` with random weights; not to be changed."""
    directory = tmp_path_factory.mktemp("small") / "checkpoint"
    init_checkpoint(TINY_VAR, directory)
    return directory


@pytest.fixture(scope="session")
def transformer():
    """The reference's state dict of ``TRANSFORMER``."""
    return recipe_state(TRANSFORMER)


@pytest.fixture(scope="session")
def tokenizer():
    """The reference's state dict of ``TOKENIZER``."""
    return recipe_state(TOKENIZER)


@pytest.fixture
def write(tmp_path):
    """Write a state dict as .safetensors and return the path."""

    def write(state, name):
        path = tmp_path / f"{name}.safetensors"
        save_file({key: np.ascontiguousarray(value) for key, value in state.items()}, path)
        return path

    return write


@pytest.fixture
def files(transformer, tokenizer, write):
    """The reference's files of transformer and tokenizer, which a test may damage."""
    return write(transformer, "transformer"), write(tokenizer, "tokenizer")


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def turn_to(monkeypatch):
    """Let the hub's client turn to another server, as if HF_ENDPOINT had always named it."""
    constants = pytest.importorskip("huggingface_hub.constants")
    file_download = pytest.importorskip("huggingface_hub.file_download")

    def turn_to(url):
        rest = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        for place in (constants, file_download):  # older versions copy it
            monkeypatch.setattr(place, "HUGGINGFACE_CO_URL_TEMPLATE", url + rest, raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", url)

    return turn_to


@pytest.fixture
def hub(tmp_path, monkeypatch, turn_to):
    """A hub, to which the client turns, with a cache of its own and the token of the tests."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with serving() as server:
        turn_to(server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Another protocol, for which there is no small server.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        end_sessions()
