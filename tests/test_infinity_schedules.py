"""Infinity's schedules and rotary positions against the reference's tables."""

import json

import numpy as np
import pytest
from checks import message
from infinity_golden import FOLDER

from amskv_jax.models.infinity import rotary
from amskv_jax.models.infinity.schedules import RATIOS, SIZES, schedule_of, whole_of
from amskv_jax.schedule import ScaleSchedule

REFERENCE = json.loads((FOLDER / "dynamic_resolution.json").read_text())


def test_schedules_are_those_of_the_reference():
    assert list(RATIOS) == list(REFERENCE)
    for aspect, sizes in REFERENCE.items():
        assert list(SIZES) == list(sizes)
        for size, expected in sizes.items():
            schedule = schedule_of(aspect, size)
            assert [list(grid) for grid in schedule.grids] == [s[1:] for s in expected["scales"]]
            assert [16 * side for side in schedule.grids[-1]] == expected["pixel"]
            assert whole_of(schedule) == schedule_of(aspect)
    assert schedule_of().total == 10521


@pytest.mark.parametrize(
    ("aspect", "name"),
    [
        ("1:1", "1.0"),
        ("16:9", "0.571"),
        ("9:16", "1.75"),
        ("4:3", "0.75"),
        ("1.5:1", "0.666"),
        ("1:3", "3.0"),
        ("1", "1.0"),
        ("1.333", "1.333"),
        ("0.667", "0.666"),
    ],
)
def test_an_aspect_ratio_is_width_to_height_or_a_number_of_the_table(aspect, name):
    assert schedule_of(aspect, "0.06M") == schedule_of(name, "0.06M")


@pytest.mark.parametrize(
    "aspect", ["21:9", "7:5", "1.4", "nan", "inf", "0:1", "1:0", "-1:1", "a:b"]
)
def test_an_unknown_aspect_ratio_lists_what_there_is(aspect):
    said = message(schedule_of, aspect)
    assert repr(aspect) in said
    assert "4:3 (0.75)" in said
    assert "7:4 (0.571)" in said


def test_an_unknown_size_lists_what_there_is():
    assert "expected one of 0.06M, 0.25M, 0.60M, 1M" in message(schedule_of, "1:1", "2M")


def test_any_beginning_of_a_schedule_can_be_drawn_if_it_tells_the_ratio():
    assert whole_of(ScaleSchedule.square((1, 2, 4))) == RATIOS["1.0"]
    assert "beginning of several" in message(whole_of, ScaleSchedule.square((1, 2, 3)))
    said = message(whole_of, ScaleSchedule(((1, 1), (4, 7), (20, 36))))
    assert "no schedule of Infinity" in said
    assert "aspect 0.571 of size 0.25M" in said


def test_positions_are_those_of_the_reference():
    for aspect, scales in json.loads((FOLDER / "rope2d_index.json").read_text()).items():
        for scale, expected in enumerate(scales):
            rows, columns = rotary.positions(RATIOS[aspect], scale)
            assert (rows.tolist(), columns.tolist()) == (expected["iy"], expected["ix"])


def test_positions_follow_the_largest_size_whatever_is_drawn():
    rows, columns = rotary.positions(schedule_of("1:2", "0.06M"), 6)
    assert (rows.max(), columns.max()) == (86, 41)  # 21 of 22, 10 of 11 on a grid of 90 x 45


@pytest.mark.parametrize(("name", "aspect"), [("r1.000", "1.0"), ("r0.500", "0.5")])
def test_turns_are_those_of_the_reference(name, aspect):
    schedule = RATIOS[aspect]
    with np.load(FOLDER / "rope2d.npz") as data:
        golden = {key.removeprefix(f"{name}_"): data[key] for key in data if key.startswith(name)}
    tables = [rotary.turns(schedule, scale, 128) for scale in range(schedule.num_scales)]
    flat = [row[1] * schedule.grids[row[0]][1] + row[2] for row in golden["pos"]]
    for which, table in enumerate(("cos", "sin")):
        found = [
            tables[row[0]][which][index] for row, index in zip(golden["pos"], flat, strict=True)
        ]
        np.testing.assert_allclose(np.stack(found), golden[table], atol=4e-6)
    for probe in ("q", "k"):
        x = np.swapaxes(golden[f"probe_{probe}"], 1, 2)
        expected = np.swapaxes(golden[f"probe_{probe}_out"], 1, 2)
        np.testing.assert_allclose(rotary.rotate(x, *tables[2]), expected, atol=1e-5)
