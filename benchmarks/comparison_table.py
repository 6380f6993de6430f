"""The table of a comparison, from what compare_reference.py found."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from forks import FORKS

HEAD = (
    "arm",
    "pictures/s",
    "of reference",
    "peak GiB",
    "of reference",
    "cache GiB",
    "cold start s",
    "cached start s",
    "share of ceiling",
)


def markdown(found: Mapping[str, Any]) -> str:
    """Return a table for every model and batch, and what one must know to read them."""
    ceiling = (found["ceiling"] or {}).get("operations_per_second")
    arms = found["arms"]
    measured = [arm for arm in arms if "error" not in arm]
    devices = dict.fromkeys(arm["device"] for arm in measured)
    lines = ["# Comparison with the PyTorch references", ""]
    lines += [f"Device: {', '.join(devices) or 'none'}. {_how(found)}", ""]
    if ceiling:
        size = found["ceiling"]["size"]
        lines += [
            f"Ceiling: {ceiling / 1e12:.3g} TFLOP/s, a product of bfloat16 matrices of {size} x "
            f"{size}, measured in the same run. Shares count the operations of all products, "
            "attention's among them; the reference's are those of our full cache.",
            "",
        ]
    for model, batch in dict.fromkeys((arm["model"], arm["batch"]) for arm in arms):
        group = [arm for arm in arms if (arm["model"], arm["batch"]) == (model, batch)]
        lines += [f"## {model}, batch {batch}", "", *_table(group, ceiling), ""]
    notes = dict.fromkeys(note for arm in measured for note in arm.get("notes", ()))
    lines += [f"- {note}." for note in notes]
    return "\n".join(lines).rstrip() + "\n"


def _how(found: Mapping[str, Any]) -> str:
    settings = found["settings"]
    cache = settings["cache_dtype"] or settings["dtype"]
    parallel = settings["compiled_in_parallel"]
    return (
        f"Random weights, guidance on, the transformer without the decoder; medians of "
        f"{settings['repeats']} calls; one process per arm, nothing set aside beforehand. Ours: "
        f"{settings['dtype']}, cache in {cache}. Cold start: ours traces and compiles"
        + (f" ({parallel} arms at a time)" if parallel else "")
        + ", the reference's is its first call."
    )


def _table(arms: Sequence[Mapping[str, Any]], ceiling: float | None) -> list[str]:
    reference = next((arm for arm in arms if _is_reference(arm)), {})
    full = next((arm for arm in arms if arm.get("policy") == "full"), {})
    rows = [_row(arm, reference, full, ceiling) for arm in arms]
    aligned = ["---", *["---:"] * (len(HEAD) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (HEAD, aligned, *rows)]


def _row(
    arm: Mapping[str, Any],
    reference: Mapping[str, Any],
    full: Mapping[str, Any],
    ceiling: float | None,
) -> list[str]:
    if "error" in arm:
        return [_name(arm), arm["error"].replace("|", "/"), *["-"] * (len(HEAD) - 2)]
    speed, peak = arm["pictures_per_second"], arm["peak_bytes"]
    operations = (full if _is_reference(arm) else arm).get("product_operations")
    achieved = operations and speed * operations / arm["batch"]
    cold = arm.get("cold_compile_seconds", arm.get("first_call_seconds"))
    return [
        _name(arm),
        f"{speed:.4g}",
        _show(_ratio(speed, reference.get("pictures_per_second")), "{:.2f}".format),
        _show(_ratio(peak, 2**30), "{:.2f}".format),
        _show(_ratio(peak, reference.get("peak_bytes")), "{:.3f}".format),
        _show(_ratio(arm.get("cache_bytes"), 2**30), "{:.3f}".format),
        _show(cold, "{:.1f}".format),
        _show(arm.get("cached_compile_seconds"), "{:.1f}".format),
        _show(_ratio(achieved, ceiling), "{:.1%}".format),
    ]


def _is_reference(arm: Mapping[str, Any]) -> bool:
    """Say whether an arm is the reference itself, rather than a fork of it or ours."""
    return arm["side"] == "reference" and not arm["method"]


def _name(arm: Mapping[str, Any]) -> str:
    if arm["method"]:
        return f"{FORKS[arm['method']].title}'s code"
    return "reference" if _is_reference(arm) else f"ours, {arm['policy']}"


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _show(value: float | None, text: Callable[[float], str]) -> str:
    return "-" if value is None else text(value)
