"""Checkpoints that are pushed to the Hugging Face hub and loaded from it."""

import jax
import numpy as np
import pytest
from hub_server import end_sessions
from made_stats import random_stats

import amskv_jax as amskv
from amskv_jax.checkpoints.address import Address
from amskv_jax.checkpoints.folder import load_checkpoint, read_info
from amskv_jax.checkpoints.hub import fetch, fetch_checkpoint, fetch_stats
from amskv_jax.checkpoints.packed import pack_checkpoint
from amskv_jax.checkpoints.publish import push
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.policies import AMSKV
from amskv_jax.testing import SCHEDULE

constants = pytest.importorskip("huggingface_hub.constants")

# Its upload by git-lfs calls the HTTP library in a way that this calls outdated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def refused(expect, call, *arguments, **options):
    with pytest.raises(AmskvError) as caught:
        call(*arguments, **options)
    assert expect in str(caught.value), caught.value
    return str(caught.value)


@pytest.fixture
def stats(checkpoint, tmp_path):
    """Statistics of the small checkpoint."""
    from dataclasses import replace

    made = random_stats(0, SCHEDULE, 3, 2)
    path = tmp_path / "measured.npz"
    replace(made, fingerprint=read_info(checkpoint).fingerprint).save(path)
    return path


@pytest.fixture
def plan(checkpoint, tmp_path):
    path = tmp_path / "small.json"
    path.write_text(AMSKV().plan(read_info(checkpoint).model.cache_shape(SCHEDULE)).to_json())
    return path


def same(params, others):
    jax.tree.map(np.testing.assert_array_equal, params, others)


def test_push_and_load_again(hub, checkpoint, stats, plan):
    address = push(checkpoint, "user/small", stats=[stats], plans=[plan], license="mit")
    assert address == Address("user/small", "", hub.repositories["user/small"].refs["main"])
    for source in ("hf://user/small", str(address)):
        pipe = amskv.load(source)
        assert pipe.fingerprint == read_info(checkpoint).fingerprint
        same(pipe.params, load_checkpoint(checkpoint).params)
    measured = amskv.LayerStats.load(fetch_stats(Address("user/small")), pipe.fingerprint)
    np.testing.assert_array_equal(measured.density, amskv.LayerStats.load(stats).density)
    assert fetch("hf://user/small/plans/small.json").read_text() == plan.read_text()


def test_push_packed_and_load_again(hub, checkpoint, tmp_path):
    pack_checkpoint(checkpoint, tmp_path / "packed.safetensors")
    push(tmp_path / "packed.safetensors", "user/packed")
    pipe = amskv.load("hf://user/packed")
    same(pipe.params, load_checkpoint(tmp_path / "packed.safetensors").params)
    assert sorted(hub.repositories["user/packed"].files("main")[1]) == [
        ".gitattributes",
        "README.md",
        "model.safetensors",
    ]


def test_a_checkpoint_is_read_without_network(hub, checkpoint, monkeypatch, tmp_path):
    pack_checkpoint(checkpoint, tmp_path / "packed.safetensors")
    push(checkpoint, "user/small")
    push(tmp_path / "packed.safetensors", "user/packed")
    names = ("user/small", "user/packed")
    online = [fetch_checkpoint(Address(name)) for name in names]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    end_sessions()  # older versions look at this when they begin one
    before = len(hub.requests)
    assert [fetch_checkpoint(Address(name)) for name in names] == online
    assert len(hub.requests) == before
    refused("HF_HUB_OFFLINE", fetch_checkpoint, Address("user/other"))


def test_a_push_replaces_the_checkpoint(hub, checkpoint, stats, plan, tmp_path):
    """Statistics and plans stay; nothing of the former checkpoint does."""
    pack_checkpoint(checkpoint, tmp_path / "packed.safetensors")
    first = push(checkpoint, "user/small", stats=[stats])
    push(tmp_path / "packed.safetensors", "user/small", plans=[plan])
    names = sorted(hub.repositories["user/small"].files("main")[1])
    assert names == [
        ".gitattributes",
        "README.md",
        "model.safetensors",
        "plans/small.json",
        "stats/measured.npz",
    ]
    card = hub.repositories["user/small"].files("main")[1]["README.md"].decode()
    assert "hf://user/small/stats/measured.npz" in card
    assert "hf://user/small/plans/small.json" in card
    assert amskv.load("hf://user/small").fingerprint != read_info(checkpoint).fingerprint
    assert amskv.load(str(first)).fingerprint == read_info(checkpoint).fingerprint
    push(checkpoint, "user/small")
    assert "model.safetensors" not in hub.repositories["user/small"].files("main")[1]
    assert amskv.load("hf://user/small").fingerprint == read_info(checkpoint).fingerprint


def test_model_card(hub, checkpoint, stats):
    push(checkpoint, "user/small", stats=[stats], license="mit")
    card = hub.repositories["user/small"].files("main")[1]["README.md"].decode()
    metadata, _, text = card.removeprefix("---\n").partition("\n---\n")
    import yaml

    assert yaml.safe_load(metadata) == {
        "license": "mit",
        "library_name": "amskv-jax",
        "tags": ["jax", "flax", "image-generation", "var"],
    }
    info = read_info(checkpoint)
    count = sum(
        leaf.size for leaf in jax.tree.leaves(load_checkpoint(checkpoint).params["transformer"])
    )
    for line in (
        "# small",
        'pipe = amskv.load("hf://user/small")',
        "amskv sample --checkpoint hf://user/small --policy ams",
        f"- Weights: float32; fingerprint `{info.fingerprint}`.",
        f"- Pictures of 6 x 6 pixels; token maps {SCHEDULE}, 14 tokens.",
        "- `--stats hf://user/small/stats/measured.npz`: layer statistics of this model.",
    ):
        assert line in text.splitlines()
    assert f"| transformer | {count / 1e6:.2f} M | depth 3, width 128, num_heads 2" in text


def test_a_card_that_somebody_wrote_stays(hub, checkpoint):
    push(checkpoint, "user/small")
    _, files = hub.repositories["user/small"].files("main")
    hub.add("user/small", files | {"README.md": b"# Mine\n"})
    push(checkpoint, "user/small")
    assert hub.repositories["user/small"].files("main")[1]["README.md"] == b"# Mine\n"


def test_another_programs_repository_is_not_overwritten(hub, checkpoint):
    hub.add("user/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x"})
    refused("Push to another repository, or clear this one", push, checkpoint, "user/bert")
    assert len(hub.repositories["user/bert"].commits) == 1


def test_loading_another_programs_repository(hub):
    hub.add("user/bert", {"config.json": b'{"model_type": "bert"}', "params/big": b"weights"})
    refused("this is not a checkpoint of this package", amskv.load, "hf://user/bert")
    assert not any("/lfs/" in path for _, path, _ in hub.requests)
    hub.add("user/empty", {"README.md": b""})
    refused("hf://user/empty holds no checkpoint", amskv.load, "hf://user/empty")


def test_statistics_of_another_model_are_not_pushed(hub, checkpoint, stats, tmp_path):
    random_stats(0, SCHEDULE, 3, 2).save(tmp_path / "other.npz")
    refused("of another model", push, checkpoint, "user/small", stats=[tmp_path / "other.npz"])
    refused("have the same name", push, checkpoint, "user/small", stats=[stats, stats])
    assert not hub.requests


def test_several_statistics(hub, checkpoint, stats, tmp_path):
    refused("holds no statistics", fetch_stats, push(checkpoint, "user/small"))
    more = tmp_path / "more.npz"
    more.write_bytes(stats.read_bytes())
    push(checkpoint, "user/small", stats=[stats, more])
    message = refused("holds several statistics", fetch_stats, Address("user/small"))
    assert "hf://user/small/stats/measured.npz" in message
    assert fetch_stats(Address("user/small", "stats/more.npz")).name == "more.npz"


@pytest.mark.parametrize("repo", ["small", "user/small/sub", "hf://user/small@v1"])
def test_push_to_no_repository(checkpoint, repo):
    with pytest.raises(UsageError):
        push(checkpoint, repo)


def test_push_without_a_token(hub, checkpoint, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    message = refused("does not let you write to user/small", push, checkpoint, "user/small")
    assert "hf auth login" in message
    hub.add("user/there", {"a.json": b""})
    refused("does not let you write to user/there", push, checkpoint, "user/there")


def test_push_offline(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    end_sessions()  # older versions look at this when they begin one
    refused("HF_HUB_OFFLINE is set", push, checkpoint, "user/small")


def test_commands(hub, amskv, checkpoint, stats, plan, tmp_path):
    done = amskv(
        *("push", "--checkpoint", checkpoint, "--repo", "user/small"),
        *("--stats", stats, "--plan", plan, "--license", "mit"),
    )
    assert done.code == 0, done.err
    commit = hub.repositories["user/small"].refs["main"]
    assert done.out == f"wrote hf://user/small@{commit}\n"
    assert read_info(checkpoint).fingerprint in amskv("info", "--checkpoint", "hf://user/small").out
    done = amskv(
        "plan",
        "--checkpoint",
        "hf://user/small",
        "--stats",
        "hf://user/small",
        "--policy",
        "heads:budget=6",
    )
    assert done.code == 0, done.err
    done = amskv(
        "plan", "--checkpoint", "hf://user/small", "--plan", "hf://user/small/plans/small.json"
    )
    assert done.code == 0, done.err


def test_errors_of_options_are_those_of_commands(hub, amskv):
    done = amskv("info", "--checkpoint", "hf://user/none")
    assert done.code == 1
    assert done.err.startswith(f"error: the hub ({hub.url}) has no repository user/none")
    done = amskv("info", "--checkpoint", "hf://none")
    assert done.code == 2
    assert done.err.startswith("error: hf://none is no address")
