"""The spelling of policies, and the memory which they are solved for."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_stats import cache_shape, random_stats

from amskv_jax import policies
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.plan.memory import CacheGeometry, MemoryReport
from amskv_jax.policies import (
    AMSKV,
    H2O,
    REGISTRY,
    Explicit,
    Full,
    Heads,
    Optimal,
    ScaleKV,
    Sink,
    Window,
)
from amskv_jax.policies.budgets import has_budget, memory_report, with_saving, within_bytes
from amskv_jax.policies.grammar import (
    PolicyRequest,
    option_readers,
    parse_policies,
    parse_policy,
)
from amskv_jax.schedule import VAR_256

SHAPE = cache_shape(VAR_256, 6, 1, 64)
STATS = random_stats(0, VAR_256, 6, damage=True)
GEOMETRY = CacheGeometry.of(SHAPE, 8, "float32", rows_per_picture=1)
BUDGETED = [name for name, policy in REGISTRY.items() if has_budget(policy)]


# --- spelling ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("full", Full()),
        (" window ", Window()),
        ("ams:c_min=174,c_max=338,theta=-0.5", AMSKV(174, 338, theta=-0.5)),
        ("ams: demanding_layers = 0-3+5 , condensed = 1", AMSKV(None, None, 1, (0, 1, 2, 3, 5))),
        ("ams:saving=0.8,allocation=uniform", AMSKV(saving=0.8, allocation="uniform")),
        ("h2o:recent=0.25,budget=300", H2O(300, 0.25)),
        (
            "scalekv:mode=reference,budget_file=a/b.json",
            ScaleKV(mode="reference", budget_file="a/b.json"),
        ),
        ("optimal:formats=bfloat16+int8", Optimal(formats=("bfloat16", "int8"))),
        ("explicit:path=with:colon=and equals.json", Explicit("with:colon=and equals.json")),
    ],
)
def test_a_policy_is_spelled_by_its_fields(text, expected):
    assert parse_policy(text) == PolicyRequest(text.strip(), expected)


def test_saving_and_bytes_are_options_of_every_policy_with_a_budget():
    names = ["ams", "ams-fitted", "window", "sink", "h2o", "scalekv", "heads", "heatkv", "optimal"]
    assert names == BUDGETED
    for name in BUDGETED:
        assert {"saving", "bytes"} <= option_readers(REGISTRY[name]).keys()
        assert parse_policy(f"{name}:bytes=1.5KiB").max_bytes == 1536
    request = parse_policy("h2o:saving=0.85,recent=0.4")
    assert (request.policy, request.saving, request.max_bytes) == (H2O(recent=0.4), 0.85, None)


def test_lists_are_split_where_a_policy_begins():
    text = "full, ams:c_min=174,c_max=338,sink:sink=5,window=200,window,explicit:path=plan.json"
    assert [request.policy for request in parse_policies(text)] == [
        Full(),
        AMSKV(174, 338),
        Sink(5, 200),
        Window(),
        Explicit("plan.json"),
    ]


def test_names_are_fit_for_files():
    texts = (
        "full,window:saving=0.75,ams:saving=0.787,h2o:budget=9,recent=0.1,explicit:path=a/b c.json"
    )
    assert [request.name for request in parse_policies(texts)] == [
        "full",
        "window-75%",
        "ams-78.7%",
        "h2o-budget=9-recent=0.1",
        "explicit-path=a-b-c.json",
    ]


NUMBERS = {
    "int": st.integers(0, 10**6),
    "float": st.floats(0, 1, allow_subnormal=False),
    "tuple": st.lists(st.integers(0, 99), min_size=1, unique=True).map(sorted).map(tuple),
}


@given(st.sampled_from(["window", "sink", "h2o", "ams"]), st.data())
def test_what_is_spelled_is_read(name, data):
    policy = REGISTRY[name]
    chosen = {}
    for field in data.draw(st.sets(st.sampled_from(fields(policy)), min_size=1)):
        kind = next((kind for kind in NUMBERS if str(field.type).startswith(kind)), None)
        if kind and field.name not in ("c_max", "saving"):
            chosen[field.name] = data.draw(NUMBERS[kind])
    if chosen.keys() >= {"demanding_layers", "theta"}:
        del chosen["theta"]
    spelled = ",".join(
        f"{key}={'+'.join(map(str, value)) if isinstance(value, tuple) else repr(value)}"
        for key, value in chosen.items()
    )
    text = f"{name}:{spelled}" if spelled else name
    assert parse_policy(text).policy == policy(**chosen)
    assert [request.text for request in parse_policies(f"full,{text},heads")] == [
        "full",
        text,
        "heads",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty name: expected one such as full"),
        ("lru", "unknown policy 'lru': expected full, ams, ams-fitted, ams-online"),
        ("plan.json", "a plan file is spelled explicit:path=plan.json"),
        ("ams:", "expected option=value after the colon, not ''; ams has the options c_min, c_max"),
        ("h2o:300", "not '300'; h2o has the options budget, recent, saving, bytes"),
        ("h2o:c_min=3", "h2o has no option 'c_min'; h2o has the options budget, recent"),
        ("full:c_min=3", "full has no option 'c_min'; full has no options"),
        ("full:saving=0.5", "full has no budget, so that it takes no saving"),
        ("ams-online:bytes=1GB", "ams-online has no budget, so that it takes no bytes"),
        ("h2o:budget=1,budget=2", "gives budget twice"),
        ("h2o:budget=many", "h2o: budget 'many': expected a whole number"),
        ("h2o:budget=1.5", "budget '1.5': expected a whole number"),
        ("h2o:budget=", "budget '': expected a whole number"),
        (f"h2o:budget={10**20}", "expected a whole number up to 2147483647"),
        (f"h2o:budget={'9' * 5000}", "expected a whole number up to 2147483647"),
        ("h2o:recent=half", "recent 'half': expected a number"),
        ("h2o:recent=nan", "recent share must lie between 0 and 1, not nan"),
        ("scalekv:mode=other", "mode 'other': expected paper or reference"),
        ("ams:demanding_layers=a", "demanding_layers 'a': expected numbers and ranges such as"),
        ("ams:demanding_layers=5-3", "the range 5-3 is empty"),
        ("ams:saving=2", "the saving must lie between 0 and 1, not 2"),
        ("h2o:saving=1", "saving '1': expected a share of at least 0 and below 1"),
        ("h2o:saving=nan", "saving 'nan': expected a share"),
        ("h2o:bytes=much", "bytes 'much': expected bytes such as 2GiB"),
        ("h2o:saving=0.5,bytes=2GiB", "give either saving or bytes, not both"),
        ("ams:saving=0.5,bytes=2GiB", "give either saving or bytes, not both"),
        ("explicit", "the policy explicit needs path: explicit:path=..."),
        ("explicit:path=", "path '': expected a text"),
    ],
)
def test_wrong_spellings_get_one_clear_message(text, message):
    with pytest.raises(UsageError) as caught:
        parse_policy(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("full,,ams", "empty name"),
        ("c_min=3", "'c_min=3' is no policy; a policy's options follow a colon"),
        ("full,ams,c_min=3", "as in ams:c_min=3"),
        ("full,amz:saving=0.3,x=2", "unknown policy 'amz'"),
        ("full,h2o:budget=3,full", "has full twice"),
    ],
)
def test_wrong_lists_get_one_clear_message(text, message):
    with pytest.raises(UsageError) as caught:
        parse_policies(text)
    assert message in str(caught.value)


def test_a_registered_policy_is_known_with_all_its_options(monkeypatch):
    @dataclass(frozen=True)
    class Own(policies.Policy):
        """Keeps what it likes."""

        flag: bool = False
        kind: Literal["a", "b"] = "a"
        file: Path | None = None

    monkeypatch.setitem(policies.REGISTRY, "own", Own)
    request = parse_policy("own:flag=true,kind=b,file=x/y")
    assert request.policy == Own(True, "b", Path("x/y"))
    assert not request.policy.uses_stats
    with pytest.raises(UsageError, match="flag 'yes': expected true or false"):
        parse_policy("own:flag=yes")
    with pytest.raises(UsageError, match="own has no budget"):
        parse_policy("own:saving=0.5")


def test_policies_say_whether_statistics_are_wanted():
    uses = {
        text: parse_policy(text).policy.uses_stats
        for text in (
            "full",
            "window",
            "h2o",
            "ams",
            "ams:demanding_layers=0",
            "ams-online",
            "ams-online:theta=1",
            "scalekv",
            "scalekv:budget_file=x",
            "heads",
            "explicit:path=x",
        )
    }
    assert [text for text, wanted in uses.items() if wanted] == [
        "ams",
        "ams-online",
        "scalekv",
        "heads",
    ]


# --- budgets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("saving", [0.5, 0.85])
@pytest.mark.parametrize("name", BUDGETED)
def test_policies_get_the_largest_budget_that_saves_enough(name, saving):
    plan = parse_policy(f"{name}:saving={saving}").plan(SHAPE, GEOMETRY, STATS)
    report = memory_report(plan, SHAPE)
    assert saving <= report.saving(report.full) < saving + 0.05


@pytest.mark.parametrize("name", BUDGETED)
def test_policies_stay_within_bytes_of_the_batch(name):
    plan = parse_policy(f"{name}:bytes=4MiB").plan(SHAPE, GEOMETRY, STATS)
    assert 0.8 * 2**22 < MemoryReport.of(plan, GEOMETRY).plan <= 2**22


@pytest.mark.parametrize("name", ["window", "sink", "h2o", "scalekv", "heads", "heatkv"])
def test_no_larger_budget_fits(name):
    for max_bytes in (2**22, 2**22 + 12345):
        policy = within_bytes(REGISTRY[name](), max_bytes, GEOMETRY, SHAPE, STATS)
        field = "window" if name in ("window", "sink") else "budget"
        one = 1 / SHAPE.schedule.offsets[-2] if name == "heatkv" else 1  # its budget is a share
        more = {field: getattr(policy, field) + one}
        larger = type(policy)(**(vars(policy) | more)).plan(SHAPE, STATS)
        assert MemoryReport.of(larger, GEOMETRY).plan > max_bytes


def test_a_saving_is_exact_to_the_byte():
    # A tenth of the schedule is 68 tokens; as 1 - 0.9 in floats it would be a little less.
    assert with_saving(Window(), 0.7, SHAPE) == Window(204)
    assert with_saving(Window(), 0.9, SHAPE) == Window(68)
    assert with_saving(Window(), 0, SHAPE) == Window(VAR_256.total - 1)


def test_other_options_stay_and_the_solved_one_is_not_given_as_well():
    solved = with_saving(H2O(recent=0.25), 0.8, SHAPE)
    assert solved.recent == 0.25
    for policy in (H2O(budget=30), Window(3), Sink(window=3), Heads(9), AMSKV(max_tokens=9)):
        with pytest.raises(
            UsageError, match=r"give either (budget|window|max_tokens) or the memory"
        ):
            within_bytes(policy, 2**22, GEOMETRY, SHAPE, STATS)


def test_memory_out_of_reach_says_why():
    with pytest.raises(AmskvError, match=r"no budget saves 99\.9%.*protected scales need 5"):
        with_saving(Heads(), 0.999, SHAPE, STATS)
    with pytest.raises(AmskvError, match=r"no budget keeps the cache of the batch within 9 bytes"):
        within_bytes(Sink(), 9, GEOMETRY, SHAPE)
    with pytest.raises(AmskvError, match="no AMS-KV plan holds at most 0 tokens"):
        within_bytes(AMSKV(), 9, GEOMETRY, SHAPE).plan(SHAPE)
    with pytest.raises(UsageError, match="Full has no budget"):
        within_bytes(Full(), 9, GEOMETRY, SHAPE)
    with pytest.raises(UsageError, match="at least 0 and below 1, not 1"):
        with_saving(H2O(), 1, SHAPE)
