"""The comparison with the PyTorch references: its arms, its table, what goes wrong."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("compare_reference", "comparison_table", "forks", "our_side", "reference_side", "shapes")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Let the scripts be imported as they import each other."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def comparison(tmp_path):
    """Return a function from a command line to its arms and its comparison."""
    import compare_reference

    def made(*options):
        options = compare_reference.parser().parse_args([*options, "--out", str(tmp_path)])
        return compare_reference.arms_of(options), compare_reference.Comparison(options)

    return made


def test_arms_are_models_with_their_batches_and_policies(comparison):
    checkout = ("--var-checkout", "VAR", "--models", "var-d30,infinity-2b", "--batches", "64,1")
    policies = ("--policies", "full,h2o:budget=300,recent=0.4")
    arms, _ = comparison(*checkout, *policies)
    assert [(arm.side, arm.model, arm.batch, arm.policy) for arm in arms] == [
        ("reference", "var-d30", 64, ""),
        ("ours", "var-d30", 64, "full"),
        ("ours", "var-d30", 64, "h2o:budget=300,recent=0.4"),
        ("ours", "infinity-2b", 1, "full"),
        ("ours", "infinity-2b", 1, "h2o:budget=300,recent=0.4"),
    ]
    assert {arm.side for arm in comparison(*checkout, "--ours-only")[0]} == {"ours"}
    assert {arm.side for arm in comparison(*checkout, "--reference-only")[0]} == {"reference"}
    with pytest.raises(SystemExit, match="3 numbers: expected 1 or 2"):
        comparison("--batches", "1,2,3")


def test_forks_of_infinity_are_arms_where_they_serve_the_model(comparison):
    checkouts = ("--infinity-checkout", "I", "--scalekv-checkout", "S", "--heatkv-checkout", "H")
    arms, found = comparison(*checkouts, "--models", "var-d30,infinity-2b", "--policies", "full")
    assert [(arm.side, arm.model, arm.method) for arm in arms] == [
        ("ours", "var-d30", ""),
        ("reference", "infinity-2b", ""),
        ("reference", "infinity-2b", "scalekv"),
        ("reference", "infinity-2b", "heatkv"),
        ("ours", "infinity-2b", ""),
    ]
    commands = [found.reference(arm) for arm in arms if arm.side == "reference"]
    assert [command[2] for command in commands] == ["I", "S", "H"]
    assert "--method" not in commands[0]
    where = commands[2].index("--method")
    assert commands[2][where : where + 4] == ["--method", "heatkv", "--size", "2b"]
    with pytest.raises(SystemExit, match=r"ScaleKV's code serves .* not infinity-tiny: leave"):
        comparison(*checkouts, "--models", "infinity-tiny", "--batches", "1")


def test_a_fork_finds_its_files_in_its_folder(tmp_path, monkeypatch):
    from forks import FORKS

    code = """from pathlib import Path
def enable_scale_kv(model, **settings):
    model.update(settings, budget=Path("budget").read_text())
"""
    (tmp_path / "enable_scale_kv_8b.py").write_text(code)
    (tmp_path / "budget").write_text("650")
    monkeypatch.syspath_prepend(tmp_path)
    model, here = {}, Path.cwd()
    FORKS["scalekv"].apply(tmp_path, model, "8b", batch=1)
    assert (model["budget"], model["window_size"]) == ("650", 16)
    assert Path.cwd() == here


def test_the_reference_is_told_the_shape_of_the_model():
    from shapes import model_of, shape_of

    var = shape_of(model_of("var-d36"))
    assert (var["depth"], var["width"], var["num_heads"]) == (36, 2304, 36)
    assert var["shared_aln"]
    assert var["grids"][-1] == [32, 32]
    infinity = shape_of(model_of("infinity-2b"))
    assert (infinity["depth"], infinity["width"], infinity["bits"]) == (32, 2048, 32)
    assert infinity["grids"][-1] == [64, 64]
    assert shape_of(model_of("infinity-8b"))["patchify"]
    json.dumps([var, infinity])


def test_the_table_has_ratios_and_failures(comparison, tmp_path):
    _, found = comparison("--warm", "2")
    arms = [
        found_arm("reference", "", 10.0, 2**32, first_call_seconds=3.0),
        found_arm("ours", "full", 20.0, 2**31, product_operations=8e12, cold_compile_seconds=60.0),
        found_arm("ours", "ams", 25.0, 2**30, product_operations=6e12, cached_compile_seconds=5.0),
    ]
    fork = found_arm("reference", "", 5.0, 2**31, method="scalekv", cache_bytes=2**29)
    failed = {"side": "ours", "model": "var-d30", "batch": 8, "policy": "h2o", "method": ""}
    found.found["ceiling"] = {"operations_per_second": 1e14, "size": 8192}
    found.found["arms"] = [fork, *arms, {**failed, "error": "out of memory"}]
    found.write({})
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert cells[2:] == [
        ["ScaleKV's code", "5", "0.50", "2.00", "0.500", "0.500", "-", "-", "-"],
        ["reference", "10", "1.00", "4.00", "1.000", "-", "3.0", "-", "10.0%"],
        ["ours, full", "20", "2.00", "2.00", "0.500", "-", "60.0", "-", "20.0%"],
        ["ours, ams", "25", "2.50", "1.00", "0.250", "-", "-", "5.0", "18.8%"],
        ["ours, h2o", "out of memory", *["-"] * 7],
    ]
    assert "## var-d30, batch 8" in lines
    assert "(2 arms at a time)" in "\n".join(lines)
    assert json.loads((tmp_path / "comparison.json").read_text()) == found.found


def found_arm(side, policy, speed, peak, **more):
    arm = {"side": side, "model": "var-d30", "batch": 8, "policy": policy, "method": ""}
    return {**arm, "device": "GPU", "pictures_per_second": speed, "peak_bytes": peak, **more}


def test_processes_that_fail_are_entries(comparison, tmp_path):
    _, found = comparison()
    scripts = {
        "crashes.py": "raise ValueError('one thing\\nanother')",
        "hangs.py": "import time; time.sleep(60)",
        "dies.py": "import os; os.kill(os.getpid(), 9)",
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
    results = {name: found.process([str(tmp_path / name)], 3)["error"] for name in scripts}
    assert results == {
        "crashes.py": "ValueError: one thing",
        "hangs.py": "not done after 3 s",
        "dies.py": "killed, most likely for want of memory",
    }
    found.deadline = 0.0
    assert "not begun" in found.process(["our_side.py"], 3)["error"]


def test_products_are_counted_in_loops():
    import our_side

    from amskv_jax.generate import Sampler
    from amskv_jax.policies import Full
    from amskv_jax.testing import TINY_VAR, TRANSFORMER

    sampler = Sampler(TINY_VAR, Full().plan(TRANSFORMER.cache_shape))
    counted = our_side.product_operations(sampler, batch=3)
    config, rows = TRANSFORMER, 6
    tokens = config.schedule.tokens
    blocks = 12 * config.width**2 * sum(tokens)
    attention = sum(2 * config.width * own * sum(tokens[: i + 1]) for i, own in enumerate(tokens))
    least = 2 * rows * config.depth * (blocks + attention)
    assert least < counted < 1.3 * least  # modulation, head and the tokenizer's besides
    assert our_side.product_operations(sampler, batch=6) == pytest.approx(2 * counted, rel=0.01)


@pytest.mark.parametrize("lengths", [(5, 5, 5), (2, 5, 1)])
def test_the_stand_in_for_varied_lengths_attends_row_by_row(lengths):
    torch = pytest.importorskip("torch")
    import reference_side

    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(3 * 4, 2, 8, generator=generator)
    pairs = torch.randn(sum(lengths), 2, 2, 8, generator=generator)
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    found = reference_side.variable_length_attention(
        queries, pairs, torch.arange(0, 16, 4), offsets, 4, max(lengths), softmax_scale=0.3
    )
    for row in range(3):
        keys, values = pairs[offsets[row] : offsets[row + 1]].unbind(1)
        logits = 0.3 * torch.einsum("qhc,khc->hqk", queries[4 * row : 4 * row + 4], keys)
        expected = torch.einsum("hqk,khc->qhc", logits.softmax(-1), values)
        torch.testing.assert_close(found[4 * row : 4 * row + 4], expected)
