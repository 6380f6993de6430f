"""Every policy's options on the command line: what they announce, and what they refuse."""

import re
import shlex
from dataclasses import fields, replace

import numpy as np
import pytest
from made_stats import random_stats

from amskv_jax import configs
from amskv_jax.policies import REGISTRY

D16 = configs.get("var-d16").model.transformer


@pytest.fixture
def plan(amskv):
    def plan(options):
        return amskv("plan", "--model", "var-d16", *shlex.split(options))

    return plan


@pytest.fixture
def stats(tmp_path):
    path, made = tmp_path / "stats.npz", random_stats(0, D16.schedule, D16.depth)
    replace(made, head_density=made.head_density.repeat(D16.num_heads, 1)).save(path)
    return path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--policy full", "37.6%"),
        ("--policy ams", "C_min 174, C_max 338, condensed 2; demanding layers: the first third"),
        ("--policy ams:saving=0.8", "capacities fitted to save 80.0%"),
        ("--policy ams:bytes=2GiB --batch 64", "fitted to hold at most 4096 tokens"),
        ("--policy ams:allocation=uniform", "allocated uniformly: 235 tokens in every layer"),
        ("--policy ams-online:theta=-1", "theta -1 as given; layers are classified while"),
        ("--policy window:window=200", "200"),
        ("--policy h2o:saving=0.8", "H2O: 133 tokens"),
        ("--policy scalekv:bytes=2GiB --batch 64", "ScaleKV (paper): mean budget"),
        ("--policy sink:sink=5,window=200", "205"),
        ("--policy h2o:budget=200", "H2O: 200 tokens, the latest 100 and 100 heavy hitters"),
        ("--policy scalekv:budget=200", "ScaleKV (paper): mean budget 200 tokens"),
        ("--policy scalekv:budget=200,mode=reference", "ScaleKV (reference)"),
    ],
)
def test_policies_announce_their_plans(plan, options, expected):
    done = plan(options)
    assert (done.code, done.err) == (0, "")
    assert expected in done.out


def test_without_guidance_a_picture_has_one_row(plan):
    guided, unguided = (plan(f"--policy ams --batch 2 {option}") for option in ("", "--cfg 0"))
    assert "Key/value cache for 2 pictures, with guidance:" in guided.out
    assert "for 2 pictures, without guidance (one row per picture):" in unguided.out
    size = re.search(r"this plan +(\d.*?iB)", unguided.out)[1]
    assert re.search(r"this plan +(\d.*?iB)", plan("--policy ams --batch 1 --cfg 3").out)[1] == size
    assert re.search(r"this plan +(\d.*?iB)", guided.out)[1] != size


def test_calibrated_policies_take_statistics(plan, stats):
    for options, expected in (
        ("--policy ams", "calibrated, theta -"),
        ("--policy ams:theta=-0.5", "calibrated, theta -0.5 as given, demanding layers"),
        ("--policy ams:saving=0.8", "capacities fitted to save 80.0%"),
        ("--policy scalekv:budget=200", "layer-scale pairs, by selectivity"),
        (
            "--policy heads:budget=200,patterns=3",
            "heads: mean budget 200 tokens, 2 scales protected",
        ),
    ):
        done = plan(f"{options} --stats {stats}")
        assert (done.code, done.err) == (0, ""), options
        assert expected in done.out, options


@pytest.mark.parametrize(
    ("code", "options", "expected"),
    [
        (2, "--policy scalekv:window=7", "the window must be a square grid of tokens"),
        (1, "--policy scalekv:budget=10,window=16", "does not fit the 3x3 map"),
        (2, "--policy scalekv:mode=other", "mode 'other': expected paper or reference"),
        (1, "--policy scalekv:budget_file=missing.json", "cannot read the budget file"),
        (1, "--policy ams:saving=0.999", "(99.3% saved of the full cache"),
        (1, "--policy ams:bytes=1MiB --batch 64", "the smallest with condensed 2"),
        (2, "--policy ams:bytes=much", "bytes 'much': expected bytes such as 2GiB"),
        (2, "--policy ams:theta=-1", "theta needs the similarities of a calibration run"),
        (2, "--policy heads", "needs the attention of a calibration run"),
        (2, "--policy h2o:budget=-3", "the budget must be 0 or more tokens, not -3"),
        (
            2,
            "--policy h2o:window=3",
            "no option 'window'; h2o has the options budget, recent, saving, bytes",
        ),
        (2, "--policy window:window=-4", "the window must be 0 or more tokens, not -4"),
    ],
)
def test_what_policies_refuse(plan, code, options, expected):
    done = plan(options)
    assert done.code == code
    assert expected in done.err
    assert done.err.count("error:") == 1


def test_statistics_that_do_not_fit(plan, amskv, stats, checkpoint, tmp_path):
    done = plan(f"--policy heads:budget=4 --stats {stats}")
    assert done.code == 1
    assert "the 2 protected scales need 5: raise the budget or protect fewer" in done.err

    done = amskv("plan", "--checkpoint", checkpoint, "--policy", "ams", "--stats", stats)
    assert done.code == 1
    assert "the layer statistics are of another model (fingerprint unknown" in done.err

    other = tmp_path / "other.npz"
    random_stats(0, D16.schedule, 4).save(other)
    done = plan(f"--policy ams --stats {other}")
    assert done.code == 1
    assert "a model with 4 layers, this one has 16: calibrate this model" in done.err

    with np.load(stats) as content:
        arrays = dict(content)
    arrays["similarity"][3, 4] = np.nan
    np.savez(other, **arrays)
    done = plan(f"--policy ams --stats {other}")
    assert done.code == 1
    assert "similarity of layer 3 holds no number (NaN or infinity)" in done.err


def test_help_explains_every_policy(amskv):
    for command in ("plan", "sample", "bench", "eval"):
        text = amskv(command, "--help").out
        for name, policy in REGISTRY.items():
            assert re.search(rf"^ {name}: Keeps\b", text, re.MULTILINE)
            for option in fields(policy):
                assert f"\n     {option.name}: " in text, option
        assert "(arXiv 2511.16047)." in text
        assert "``" not in text
