"""Options which name policies, and their help; how they are spelled: see ``policies.grammar``."""

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.padding import Padding
from typer.core import TyperCommand

from amskv_jax.checkpoints.hub import fetch
from amskv_jax.cli.console import make_console
from amskv_jax.cli.options import finding
from amskv_jax.errors import UsageError

if TYPE_CHECKING:
    from amskv_jax.policies import Policy
    from amskv_jax.policies.grammar import PolicyRequest

METAVAR = "NAME:option=value,..."

PolicyOption = Annotated[
    str | None,
    typer.Option(
        "--policy", metavar=METAVAR, help="What the cache keeps, see below; full by default."
    ),
]
PlanFileOption = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        help="Plan file, or its address on the hub (hf://...); the same as --policy "
        "explicit:path=FILE.",
        parser=finding(fetch),
        metavar="PATH",
    ),
]
PoliciesOption = Annotated[
    str,
    typer.Option("--policies", metavar="full,ams:saving=0.8,...", help="What the caches keep."),
]


def choose_policy(policy: str | None, plan: Path | None, default: str = "full") -> "PolicyRequest":
    """Return what ``--policy`` and ``--plan`` ask for.

    Args:
      policy: as it is spelled, if given.
      plan: a plan file, if given.
      default: spelling of the policy if neither is given.

    Raises:
      UsageError: if both are given, or the policy is spelled wrongly.
    """
    from amskv_jax.policies import Explicit  # noqa: PLC0415
    from amskv_jax.policies.grammar import PolicyRequest, parse_policy  # noqa: PLC0415

    if plan is None:
        return parse_policy(default if policy is None else policy)
    if policy is not None:
        raise UsageError("give either --policy or --plan, which is a policy of its own")
    return PolicyRequest(f"explicit:path={plan}", Explicit(str(plan)))


class PolicyCommand(TyperCommand):
    """A command whose help ends with all policies, read only then, as they import much."""

    def format_help(self, *arguments: Any) -> None:
        """Write the help."""
        super().format_help(*arguments)
        print_policies()


def print_policies() -> None:
    """Print what every registered policy keeps and takes."""
    from amskv_jax.policies import REGISTRY  # noqa: PLC0415
    from amskv_jax.policies.budgets import has_budget  # noqa: PLC0415

    budgets = ", ".join(name for name, policy in REGISTRY.items() if has_budget(policy))
    limits = {
        "saving": "share to save of a bfloat16 cache of all scales, such as 0.85.",
        "bytes": "most that the cache of a batch may take, such as 2GiB.",
    }
    console = make_console()

    def show(heading: str, options: dict[str, str]) -> None:
        console.print(Padding(escape(heading), (0, 1), expand=False))
        for name, text in options.items():
            console.print(Padding(escape(f"{name}: {text}"), (0, 1, 0, 5), expand=False))

    show(f"Policies, each spelled NAME or {METAVAR}", {})
    for name, policy in REGISTRY.items():
        show(f"{name}: {_summary(policy)}", _attributes(policy))
    show(f"{budgets} also take one of:", limits)
    show("Numbers and ranges are joined by +, as in ams:demanding_layers=0-9+12.", {})


def _summary(policy: "type[Policy]") -> str:
    """Return the first sentence of a policy's docstring, and its paper if that comes later."""
    text = inspect.getdoc(policy) or ""
    first = _plain(text.partition("\n\n")[0])
    paper = re.search(r"arXiv [0-9.]*[0-9]", text)
    return first if paper is None or paper[0] in first else f"{first[:-1]} ({paper[0]})."


def _attributes(policy: "type[Policy]") -> dict[str, str]:
    """Return the attributes in a policy's docstring, and what it says about them."""
    section = re.search(r"^Attributes:\n((?:  .*\n?)+)", inspect.getdoc(policy) or "", re.MULTILINE)
    entries = re.findall(
        r"^  (\w+): (.*(?:\n    .*)*)", section[1] if section else "", re.MULTILINE
    )
    return {name: _plain(text) for name, text in entries}


def _plain(text: str) -> str:
    """Return a docstring's text in one line, without marks and where to read on in the code."""
    text = re.sub(r"[,;] see ``[\w.]+``", "", text)
    return " ".join(text.replace("``", "").split())
