"""Files of the Hugging Face hub, through its own client, from a hub on this machine."""

import hashlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hub_server import TOKEN, end_sessions
from safetensors.numpy import save

from amskv_jax.checkpoints import published
from amskv_jax.checkpoints.address import Address
from amskv_jax.checkpoints.folder import load_checkpoint, read_info
from amskv_jax.checkpoints.hub import fetch
from amskv_jax.convert import convert, fetch_sources
from amskv_jax.convert.download import fetch_source
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.testing import TRANSFORMER

constants = pytest.importorskip("huggingface_hub.constants")

WEIGHTS = bytes(np.random.default_rng(0).bytes(300_000))
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
FILE = "hf://user/model/weights.pth"


@pytest.fixture
def impatient(monkeypatch):
    """Let the client try again at once."""
    quick = SimpleNamespace(sleep=lambda _: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", quick)


def refused(expect, call, *arguments, **options):
    with pytest.raises(AmskvError) as caught:
        call(*arguments, **options)
    assert expect in str(caught.value), caught.value
    return str(caught.value)


# Addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://user/model", Address("user/model")),
        ("hf://user/model@v1", Address("user/model", "", "v1")),
        ("hf://user/model/a/b.pth", Address("user/model", "a/b.pth")),
        (
            f"hf://us-er/mo.del@refs%2Fpr%2F1/b.pth#sha256={SHA256}",
            Address("us-er/mo.del", "b.pth", "refs/pr/1", SHA256),
        ),
    ],
)
def test_addresses_are_read_and_written(text, expected):
    assert Address.parse(text) == expected
    assert str(expected) == text


def test_an_address_survives_being_a_path(tmp_path):
    """The command line makes paths of what it is given."""
    from pathlib import Path

    text = f"hf://user/model@v1/b.pth#sha256={SHA256}"
    assert Address.parse(Path(text)) == Address.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "hf://model",
        "hf://user/model@",
        "hf://user/model/../../other",
        "hf://user/model/a//b",
        "hf://user/model/b.pth#sha256=123",
        "hf://../model",
    ],
)
def test_what_is_no_address(text):
    with pytest.raises(UsageError, match="no address of the Hugging Face hub: expected hf://"):
        Address.parse(text)


# Downloads


def test_a_file_is_downloaded_once(hub):
    hub.add("user/model", {"weights.pth": WEIGHTS, "a/b.json": b"{}"})
    assert fetch(FILE).read_bytes() == WEIGHTS
    assert fetch(FILE).name == "weights.pth"
    assert fetch("hf://user/model/a/b.json").read_bytes() == b"{}"
    assert hub.downloads() == 2


def test_a_path_stays_what_it_is(tmp_path):
    assert fetch(tmp_path / "a") == tmp_path / "a"


def test_endpoint_argument(hub, turn_to):
    hub.add("user/model", {"weights.pth": WEIGHTS})
    turn_to("http://127.0.0.1:9")
    assert fetch(FILE, endpoint=hub.url).read_bytes() == WEIGHTS


def test_revisions(hub):
    first = hub.add("user/model", {"weights.pth": b"first"})
    hub.add("user/model", {"weights.pth": b"tagged"}, "v1")
    hub.add("user/model", {"weights.pth": b"newest"})
    at = "hf://user/model@{}/weights.pth"
    assert fetch(FILE).read_bytes() == b"newest"
    assert fetch(at.format("v1")).read_bytes() == b"tagged"
    assert fetch(at.format(first)).read_bytes() == b"first"
    refused(
        f"has no revision v2 on the hub ({hub.url}): expected a branch, a tag or a commit",
        fetch,
        at.format("v2"),
    )


def test_a_download_that_is_cut_goes_on(hub, monkeypatch):
    # The client goes on after the last whole piece, of 10 MB otherwise.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add("user/model", {"weights.pth": WEIGHTS})
    hub.cuts = [100_000, 50_000]
    assert fetch(f"{FILE}#sha256={SHA256}").read_bytes() == WEIGHTS
    ranges = [headers.get("range") for _, path, headers in hub.requests if "/lfs/" in path]
    assert len(ranges) == 3
    assert ranges[0] is None
    starts = [int(text.removeprefix("bytes=").rstrip("-")) for text in ranges[1:]]
    assert 0 < starts[0] <= 100_000
    assert starts[0] < starts[1] <= 150_000


def test_missing_file(hub):
    commit = hub.add("user/model", {"weights.pth": WEIGHTS})
    message = refused("has no other.pth in its revision main", fetch, "hf://user/model/other.pth")
    assert f"{hub.url}/user/model/tree/main" in message
    at = f"hf://user/model@{commit}/other.pth"
    refused(f"has no other.pth in its revision {commit}", fetch, at)


def test_missing_repository(hub):
    refused("has no repository user/none", fetch, "hf://user/none/weights.pth")
    refused("log in with `hf auth login`, or set HF_TOKEN", fetch, "hf://user/none/weights.pth")


def test_a_repository_is_no_file(hub):
    with pytest.raises(UsageError, match="is a repository, expected a file in it"):
        fetch("hf://user/model")


def test_no_network(hub, impatient, turn_to):
    hub.add("user/model", {"weights.pth": WEIGHTS})
    turn_to("http://127.0.0.1:9")
    message = refused(f"{FILE} is not in the cache", fetch, FILE)
    assert "the hub (http://127.0.0.1:9) cannot be reached: look at your connection" in message
    # What is in the cache needs no network.
    fetch(FILE, endpoint=hub.url)
    assert fetch(FILE).read_bytes() == WEIGHTS


def test_offline(hub, monkeypatch):
    hub.add("user/model", {"weights.pth": WEIGHTS, "other.pth": b"other"})
    fetch(FILE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    end_sessions()  # older versions look at this when they begin one
    before = len(hub.requests)
    assert fetch(FILE).read_bytes() == WEIGHTS
    refused("as HF_HUB_OFFLINE is set", fetch, "hf://user/model/other.pth")
    assert len(hub.requests) == before


def test_a_broken_hub(hub, impatient):
    hub.add("user/model", {"weights.pth": WEIGHTS})
    hub.broken = 500
    message = refused("cannot be reached", fetch, FILE)
    assert "500" in message


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused('install the extra "hub", pip install "amskv-jax[hub]"', fetch, FILE)


def test_wrong_checksum(hub):
    commit = hub.add("user/model", {"weights.pth": WEIGHTS})
    wrong = "0" * 64
    message = refused(f"has the SHA-256 {SHA256}, but {wrong} is", fetch, f"{FILE}#sha256={wrong}")
    pinned = f"hf://user/model@{commit}/weights.pth#sha256={SHA256}"
    assert message.endswith(f"give its address with that checksum: {pinned}")
    assert fetch(pinned).read_bytes() == WEIGHTS


def test_a_download_that_is_damaged(hub):
    """The hub names a file by its checksum, and sends another."""
    hub.add("user/model", {"weights.pth": WEIGHTS})
    hub.served[SHA256] = WEIGHTS[:-1] + b"?"
    message = refused(f"but {SHA256} the hub says", fetch, f"{FILE}#sha256={SHA256}")
    # What the message says to do helps.
    damaged = message.partition("Remove ")[2].partition(" and download it again")[0]
    os.remove(damaged)
    hub.served.clear()
    assert fetch(f"{FILE}#sha256={SHA256}").read_bytes() == WEIGHTS


# Conversion


@pytest.fixture
def reference(hub, files):
    """The reference's weights of a small VAR on the hub."""
    contents = {path.name: path.read_bytes() for path in files}
    commit = hub.add("maker/var", contents)
    return commit, {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}


def converted(path):
    return load_checkpoint(path).info


def test_convert_from_the_hub(hub, amskv, reference, files, tmp_path):
    commit, checksums = reference
    convert("var", dict(zip(("transformer", "tokenizer"), files, strict=True)), tmp_path / "local")
    places = [f"hf://maker/var/{path.name}" for path in files]
    command = ("convert", "var", "--from", places[0], "--tokenizer", places[1])
    done = amskv(*command, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert converted(tmp_path / "out") == converted(tmp_path / "local")
    # Without a checksum in the address, the command says which to write there.
    for name, checksum in checksums.items():
        pinned = f"hf://maker/var@{commit}/{name}#sha256={checksum}"
        assert f"unchecked, as no checksum is known; to have it checked, give {pinned}" in done.out
    pinned = [f"hf://maker/var@{commit}/{name}#sha256={c}" for name, c in checksums.items()]
    again = amskv(
        *("convert", "var", "--from", pinned[0], "--tokenizer", pinned[1]),
        *("--out", tmp_path / "again"),
    )
    assert again.code == 0
    assert "unchecked" not in again.out


def test_nothing_is_downloaded_where_nothing_can_be_written(hub, amskv, reference, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    place = "hf://maker/var/transformer.safetensors"
    done = amskv("convert", "var", "--from", place, "--tokenizer", place, "--out", tmp_path / "out")
    assert done.code == 1
    assert "exists: remove it" in done.err
    assert not hub.requests


def test_convert_presets(hub, amskv, reference, monkeypatch, tmp_path):
    commit, checksums = reference
    parts = {
        name.partition(".")[0]: f"hf://maker/var@{commit}/{name}#sha256={checksum}"
        for name, checksum in checksums.items()
    }
    preset = published.Published("a small VAR", "var", parts)
    monkeypatch.setitem(published.PUBLISHED, "var-d30", preset)
    done = amskv("convert", "var-d30", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "unchecked" not in done.out
    assert read_info(tmp_path / "out").model.transformer == TRANSFORMER

    # The owners replace a file.
    changed = dict(hub.repositories["maker/var"].commits[commit])
    changed["tokenizer.safetensors"] = save({"other": np.zeros(3)})
    hub.repositories["maker/var"].commits[commit] = changed
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    done = amskv("convert", "var-d30", "--out", tmp_path / "changed")
    assert done.code == 1
    assert f"but {checksums['tokenizer.safetensors']} is expected" in done.err
    assert not (tmp_path / "changed").exists()

    done = amskv("convert", "var-d30", "--parts", "encoder", "--out", tmp_path / "changed")
    assert done.code == 2
    assert "var-d30 has no part 'encoder': expected transformer, tokenizer" in done.err


def test_published_addresses():
    for name, model in published.PUBLISHED.items():
        assert set(model.parts) >= {"transformer", "tokenizer"}, name
        for part, text in model.parts.items():
            assert str(Address.parse(text)) == text, (name, part)
    checked = [
        name
        for name, m in published.PUBLISHED.items()
        if all("#sha" in a for a in m.parts.values())
    ]
    assert checked == ["var-d16", "var-d20", "var-d24", "var-d30"]


def test_of_a_folder_only_the_weights_are_downloaded(hub):
    shards = {f"model-{i}-of-2.safetensors": bytes([i]) * 100 for i in (1, 2)}
    index = {"weight_map": {str(i): name for i, name in enumerate(shards)}}
    hub.add(
        "google/t5",
        shards
        | {
            "model.safetensors.index.json": json.dumps(index).encode(),
            "pytorch_model.bin": b"the same again",
            "flax_model.msgpack": b"and again",
            "config.json": b"{}",
            "tokenizer.json": b"[]",
        },
    )
    said = []
    folder = fetch_source("hf://google/t5", ["tokenizer.json"], said.append)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        *shards,
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert len(said) == 2
    assert hashlib.sha256(b"\1" * 100).hexdigest() in said[0]


def test_a_folder_in_a_repository(hub):
    hub.add("maker/var", {"big/pytorch_model.bin": b"weights", "config.json": b"{}"})
    folder = fetch_source("hf://maker/var/big")
    assert (folder / "pytorch_model.bin").read_bytes() == b"weights"
    assert not (folder / "config.json").exists()


def test_a_folder_without_weights(hub):
    hub.add("maker/var", {"config.json": b"{}"})
    refused("hf://maker/var holds no weights under the names", fetch_source, "hf://maker/var")


def test_a_folder_lacks_what_belongs_to_the_weights(hub):
    hub.add("google/t5", {"model.safetensors": b"weights"})
    refused("has no tokenizer.json", fetch_source, "hf://google/t5", ["tokenizer.json"])


def test_unknown_part(hub):
    with pytest.raises(UsageError, match="it has no vae"):
        fetch_sources("var", {"transformer": FILE, "tokenizer": FILE, "vae": FILE})
    assert not hub.requests


def test_environment_variables(hub, tmp_path):
    """As a user sets them, in a process of its own."""
    hub.add("user/model", {"weights.pth": WEIGHTS})
    script = f"from amskv_jax.checkpoints.hub import fetch; print(fetch({FILE!r}))"
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path / "home"))
    assert any(headers.get("authorization") == f"Bearer {TOKEN}" for _, _, headers in hub.requests)
