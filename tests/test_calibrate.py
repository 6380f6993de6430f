"""Calibration: what is measured, against the reference and NumPy, and its files and command."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_stats import cache_shape
from reference_weights import GOLDEN, recipe_params

from amskv_jax.calibrate import attention
from amskv_jax.calibrate.attention import AttentionObserver, attention_shares, measure_attention
from amskv_jax.checkpoints.folder import read_info
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.generate import picture_keys
from amskv_jax.models.guidance import Drawing
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.pipeline import Pipeline, load
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies import AMSKV, Full
from amskv_jax.schedule import VAR_256, ScaleSchedule
from amskv_jax.similarity import key_similarity
from amskv_jax.testing import SCHEDULE, TINY_VAR, TOKENIZER, TRANSFORMER, sample

PLAN = Full().plan(TRANSFORMER.cache_shape)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "var" / "similarity.npz", allow_pickle=False) as data:
        return dict(data)


@pytest.fixture(scope="module")
def params():
    return {"transformer": recipe_params(TRANSFORMER), "tokenizer": recipe_params(TOKENIZER)}


@pytest.fixture(scope="module")
def stats(params):
    return measure(params, 5, batch=5, settings={"more": "said"})


def measure(params, count, **options):
    drawing = Drawing(cfg=2.0, top_k=8, top_p=0.9)
    pipe = Pipeline(TINY_VAR, params, SCHEDULE, "float32", drawing, fingerprint="abc")
    return measure_attention(pipe, pipe.conditions(None), count=count, seed=3, **options)


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_measures_what_the_reference_measured(golden):
    config, tokenizer = VARConfig(2, 128, 2, VAR_256, 10, 64), VQVAEConfig(VAR_256, 64, 32, 32)
    weights = {"transformer": recipe_params(config), "tokenizer": recipe_params(tokenizer)}
    cfg = json.loads(str(golden["meta"]))["cfg"]
    drawing = Drawing(cfg=cfg, top_k=1, top_p=0.0)
    pipe = Pipeline(VARModel(config, tokenizer), weights, VAR_256, "float32", drawing)
    stats = measure_attention(pipe, pipe.conditions(golden["labels"]), count=2, batch=2)
    np.testing.assert_allclose(stats.similarity, golden["neg_l2"], rtol=1e-5)
    np.testing.assert_allclose(stats.cosine, golden["cosine"], rtol=1e-5)
    np.testing.assert_allclose(stats.density, golden["density"], rtol=1e-5)
    assert stats.pictures == 2
    assert stats.settings["cfg"] == 1.5


def test_the_measure_alone_agrees_with_the_reference(golden):
    keys = golden["keys_b0"].astype(np.float32)  # [layer, heads, L, head_dim]
    for scale in range(1, VAR_256.num_scales):
        previous, own = (
            jnp.moveaxis(keys[:, :, VAR_256.slice(i)], 1, 2) for i in (scale - 1, scale)
        )
        found = key_similarity(previous, own, VAR_256.grids[scale - 1], VAR_256.grids[scale])
        np.testing.assert_allclose(
            np.stack(found, -1), golden["similarity_of_keys_b0"][:, scale], rtol=1e-5
        )


def dense_shares(query, keys, scale, top_counts):
    """The shares of attention from one whole attention matrix, in float64."""
    key = np.concatenate(keys, axis=1).astype(float)
    logits = scale * np.einsum("btnh,bsnh->bnts", query.astype(float), key)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    stops = np.cumsum([part.shape[1] for part in keys])
    density = np.stack([part.sum(-1).mean(-1) for part in np.split(weights, stops[:-1], -1)], -1)
    history = -np.sort(-weights[..., : stops[-1] - keys[-1].shape[1]], axis=-1)
    top = np.stack([history[..., :count].sum(-1).mean((1, 2)) for count in top_counts], -1)
    return density, top


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 2 * 3 * 27 * 2, 4 * 2 * 3 * 27 * 5, 2**28])
@pytest.mark.parametrize("lengths", [(1, 6, 20), (7, 20), (13,)])
def test_streaming_over_chunks_of_queries_changes_nothing(monkeypatch, chunk_bytes, lengths):
    monkeypatch.setattr(attention, "CHUNK_BYTES", chunk_bytes)
    random = np.random.default_rng(0)
    keys = [random.normal(size=(2, length, 3, 8)).astype(np.float32) for length in lengths]
    query = random.normal(size=(2, lengths[-1], 3, 8)).astype(np.float32)
    density, top = attention_shares(query, list(map(jnp.asarray, keys)), 0.7, (1, 4, 64))
    expected = dense_shares(query, keys, 0.7, (1, 4, 64))
    np.testing.assert_allclose(density, expected[0], rtol=1e-5)
    np.testing.assert_allclose(top, expected[1], rtol=1e-5)


def test_only_one_chunk_of_attention_is_held(monkeypatch):
    lengths, heads = (400, 1600), 4
    keys = [jax.ShapeDtypeStruct((2, length, heads, 8), jnp.float32) for length in lengths]
    query = keys[-1]

    def temporary_bytes(chunk_bytes):
        monkeypatch.setattr(attention, "CHUNK_BYTES", chunk_bytes)
        run = jax.jit(lambda query, *keys: attention_shares(query, list(keys), 1.0, (1, 4)))
        return run.lower(query, *keys).compile().memory_analysis().temp_size_in_bytes

    whole = 4 * 2 * heads * 1600 * 2000
    assert temporary_bytes(2**20) < whole / 8 < whole < temporary_bytes(2**40)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_filled_up_batches_count_every_picture_once(params, stats, batch):
    done = []
    other = measure(params, 5, batch=batch, progress=done.append)
    assert done == [min(5, end) for end in range(batch, 5 + batch, batch)]
    for name in ("similarity", "cosine", "head_density", "history_top"):
        np.testing.assert_allclose(getattr(other, name), getattr(stats, name), rtol=1e-5)


def test_shares_are_shares(stats):
    np.testing.assert_allclose(stats.head_density.sum(-1), 1, rtol=1e-5)
    assert not np.triu(stats.density, 1).any()
    past = 1 - np.diagonal(stats.density, axis1=1, axis2=2)
    assert (np.diff(stats.history_top, axis=-1) >= 0).all()
    np.testing.assert_allclose(stats.history_top[..., -1], past, atol=1e-6)  # 5 earlier tokens


def test_selectivity_is_own_attention_times_that_to_the_top(stats):
    own = np.diagonal(stats.density, axis1=1, axis2=2)
    np.testing.assert_allclose(stats.selectivity(1), own * stats.history_top[..., 0])
    assert not stats.selectivity(256)[:, 0].any()
    with pytest.raises(UsageError, match="to the 3 top tokens was not measured: expected 1, 4, 16"):
        stats.selectivity(3)


def test_observing_changes_no_token(params):
    keys, drawing = picture_keys(jax.random.key(0), 2), Drawing(top_k=8, top_p=0.9)
    arguments = (TINY_VAR, PLAN, params, jnp.array([1, 2]), keys, drawing)
    plain = sample(*arguments)
    seen = sample(*arguments, observe=AttentionObserver(SCHEDULE))
    np.testing.assert_array_equal(plain.tokens, seen.tokens)


# --- what cannot be measured, and files --------------------------------------------------------


def test_weights_that_give_no_numbers_are_refused(params):
    broken = jax.tree.map(np.array, params)
    broken["transformer"]["blocks"]["attention"]["qkv"]["kernel"][1] = np.nan
    with pytest.raises(AmskvError, match=r"of layer 1 holds no number .*calibrate again"):
        measure(broken, 2, batch=2)


def test_nothing_to_measure_is_refused(params):
    for count, batch in ((0, 2), (2, 0)):
        with pytest.raises(UsageError, match=f"cannot measure {count} pictures, {batch} at once"):
            measure(params, count, batch=batch)


def test_files_hold_everything(stats, tmp_path):
    path = tmp_path / "stats.npz"
    stats.save(path)
    again = LayerStats.load(path, "abc")
    for name in ("similarity", "cosine", "head_density", "history_top"):
        np.testing.assert_array_equal(getattr(again, name), getattr(stats, name))
    for name in ("schedule", "top_counts", "pictures", "fingerprint", "settings"):
        assert getattr(again, name) == getattr(stats, name)
    assert again.settings == {
        **{"cfg": 2.0, "tau": 1.0, "top_k": 8, "top_p": 0.9},
        **{"seed": 3, "dtype": "float32", "more": "said"},
    }
    assert [file.name for file in tmp_path.iterdir()] == ["stats.npz"]
    with pytest.raises(AmskvError, match=r"stats.npz: .* another model \(fingerprint abc, this"):
        LayerStats.load(path, "xyz")


def rewrite(path, **changes):
    with np.load(path) as content:
        np.savez(path, **{**content, **changes})


def test_damaged_files_are_refused(stats, tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(AmskvError, match="cannot read the layer statistics"):
        LayerStats.load(path)
    path.write_bytes(b"not a zip file")
    with pytest.raises(AmskvError, match="cannot read the layer statistics") as caught:
        LayerStats.load(path)
    assert "pickle" not in str(caught.value), "nobody is advised to load it unsafely"
    assert "write it again with `amskv calibrate`" in str(caught.value)
    np.savez(path, a=1)
    with pytest.raises(AmskvError, match="holds no layer statistics: write them with"):
        LayerStats.load(path)
    similarity = np.where(np.arange(3) == 1, np.nan, stats.similarity)
    for changes, message in (
        ({"version": 9}, "version 9, expected 1: calibrate again"),
        ({"similarity": similarity}, "similarity of layer 0 holds no number"),
        ({"cosine": stats.cosine[:, :2]}, r"cosine has shape \(3, 2\), not \(3, 3\)"),
        ({"meta": "{}"}, "damaged: 'schedule'"),
        ({"meta": "?"}, "damaged"),
    ):
        stats.save(path)
        rewrite(path, **changes)
        with pytest.raises(AmskvError, match=message):
            LayerStats.load(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AmskvError, match="cannot read the layer statistics"):
        LayerStats.load(path)
    with pytest.raises(AmskvError, match="cannot write"):
        stats.save(tmp_path / "nowhere" / "stats.npz")


def test_another_model_cannot_use_them(stats, checkpoint):
    stats.check(cache_shape(SCHEDULE, 3, TRANSFORMER.num_heads))
    with pytest.raises(AmskvError, match="3 layers, this one has 4: calibrate this model"):
        stats.check(cache_shape(SCHEDULE, 4, TRANSFORMER.num_heads))
    other = ScaleSchedule.square((1, 2, 4))
    with pytest.raises(AmskvError, match="the scales 1, 2, 3, this one has 1, 2, 4"):
        stats.check(cache_shape(other, 3))
    with pytest.raises(AmskvError, match="another model"):
        load(checkpoint).sampler(AMSKV(), stats=stats)


# --- the command -------------------------------------------------------------------------------


def test_command_writes_what_the_library_measures(amskv, checkpoint, tmp_path):
    out = tmp_path / "stats.npz"
    arguments = ("--checkpoint", checkpoint, "--out", out, "--samples", 3, "--batch-size", 2)
    done = amskv("calibrate", *arguments, "--labels", "7,2", "--seed", 5, "--top-k", 8)
    assert (done.code, done.err) == (0, "")
    assert "3 pictures measured" in done.out
    assert f"wrote {out}" in done.out
    pipe = load(checkpoint)
    stats = LayerStats.load(out, read_info(checkpoint).fingerprint)
    drawing = replace(pipe.drawing, top_k=8)
    conditions = pipe.conditions([7, 2, 7])
    expected = measure_attention(pipe, conditions, count=3, batch=3, seed=5, drawing=drawing)
    np.testing.assert_allclose(stats.head_density, expected.head_density, rtol=1e-5)
    assert stats.settings["conditions"] == ["class 7", "class 2"]
    again = amskv("calibrate", *arguments)
    assert again.code == 1
    assert "stats.npz exists: choose another name, or replace it with --force" in again.err
    # The statistics serve the commands which take them.
    sheet = tmp_path / "sheet.png"
    done = amskv(
        "sample", "--checkpoint", checkpoint, "--labels", "1", "--out", sheet, "--stats", out
    )
    assert done.code == 0


def test_command_spreads_labels_and_follows_the_dtype(amskv, checkpoint, tmp_path):
    out = tmp_path / "stats.npz"
    arguments = ("--checkpoint", checkpoint, "--out", out, "--samples", 4)
    assert amskv("calibrate", *arguments, "--dtype", "bfloat16").code == 0
    stats = LayerStats.load(out)
    assert stats.settings["conditions"] == [f"class {n}" for n in (0, 2, 5, 7)]
    assert stats.settings["dtype"] == "bfloat16"
    assert stats.pictures == 4


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--labels", "10"), 2, "unknown label 10: the model has classes 0-9"),
        (("--labels", "dog"), 2, "--labels 'dog': expected numbers"),
        (("--out", "stats.txt"), 2, "stats.txt is of an unknown type: expected .npz"),
        (("--out", "nowhere/stats.npz"), 1, "the folder nowhere does not exist"),
        (("--checkpoint", "nowhere"), 1, "nowhere"),
    ],
)
def test_command_refuses(amskv, checkpoint, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    given = {"--checkpoint": checkpoint, "--out": "stats.npz"} | dict([arguments])
    done = amskv("calibrate", *(part for option in given.items() for part in option))
    assert done.code == code
    assert message in done.err.replace("\n", "")
    assert not list(tmp_path.iterdir())
