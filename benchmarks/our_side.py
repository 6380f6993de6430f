"""One measurement of this package, in a process of its own; see compare_reference.py.

``arm`` measures a sampler, ``compile`` only compiles it into the persistent compilation cache,
``ceiling`` measures the fastest product of matrices that this device can do.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from shapes import model_of

from amskv_jax.benchmark import measure
from amskv_jax.checkpoints.weights import part_structs
from amskv_jax.drawing import Drawer
from amskv_jax.errors import OutOfMemoryError
from amskv_jax.generate import Sampler, picture_keys
from amskv_jax.pipeline import Pipeline
from amskv_jax.plan.memory import MemoryReport
from amskv_jax.policies.grammar import parse_policy


def main() -> None:
    """Measure, and write what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["arm", "compile", "ceiling"])
    parser.add_argument("--model")
    parser.add_argument("--policy", default="full")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache-dtype")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=8192, help="of the ceiling's matrices")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    task = {"arm": arm, "compile": compile_only, "ceiling": ceiling}[options.task]
    result = task(options)
    result["versions"] = {"jax": jax.__version__}
    options.out.write_text(json.dumps(result))


def arm(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a sampler without decoding."""
    sampler = sampler_of(options)
    try:
        result = asdict(measure(sampler, options.batch, options.repeats, decode=False))
    except OutOfMemoryError as error:
        return {"error": "out of memory", "detail": str(error), "plan": sampler.plan.note}
    result["plan"] = sampler.plan.note
    result["cache_bytes"] = MemoryReport.of(sampler.plan, sampler.geometry(options.batch)).plan
    result["product_operations"] = product_operations(sampler, options.batch)
    return result


def compile_only(options: argparse.Namespace) -> dict[str, Any]:
    """Compile what ``arm`` runs, for weights that are not there."""
    sampler = sampler_of(options)
    params, _, _, controls = example_shapes(sampler, options.batch)
    conditions = sampler.model.conditions(None)
    drawer = Drawer(sampler, params, conditions, controls, options.batch, decode=False)
    return {"compile_seconds": drawer.compile_seconds, "trace_seconds": drawer.trace_seconds}


def ceiling(options: argparse.Namespace) -> dict[str, Any]:
    """Time a large product of bfloat16 matrices: operations per second, best of five runs."""
    size, runs, calls = options.size, 5, 20
    left, right = (
        jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1)
    )
    product = jax.jit(lambda left, right: left @ right)
    product(left, right).block_until_ready()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(calls):
            result = product(left, right)
        result.block_until_ready()
        seconds.append((time.perf_counter() - start) / calls)
    device = jax.devices()[0].device_kind
    return {"operations_per_second": 2 * size**3 / min(seconds), "size": size, "device": device}


def sampler_of(options: argparse.Namespace) -> Sampler:
    """Return the sampler that the command line asks for."""
    model = model_of(options.model)
    pipe = Pipeline(
        model=model,
        params=None,
        schedule=model.schedule,
        dtype=options.dtype,
        drawing=model.drawing,
        cache_dtype=options.cache_dtype,
    )
    plan = parse_policy(options.policy).plan(pipe.shape, pipe.geometry(options.batch))
    return pipe.sampler(plan, attention=options.attention)


def example_shapes(sampler: Sampler, batch: int) -> tuple[Any, Any, Any, Any]:
    """Return the arguments of a sampler, weights and keys as structs of their shapes."""
    model = sampler.model
    shapes = {
        part: part_structs(model, part, sampler.dtype) for part in ("transformer", "tokenizer")
    }
    keys = jax.eval_shape(lambda: picture_keys(jax.random.key(0), batch))
    condition = model.conditions(None).batch(np.arange(batch))
    controls = model.controls(sampler.plan.schedule, model.drawing)
    return shapes, condition, keys, controls


def product_operations(sampler: Sampler, batch: int) -> int:
    """Return the operations of all products of matrices in a call, two per multiplication.

    Attention counts as the two products that it is, over the keys that the plan keeps.
    """
    plain = replace(sampler, attention="xla")  # whose products can be seen

    def call(*arguments: Any) -> Any:
        return plain(*arguments)

    return _operations(jax.make_jaxpr(call)(*example_shapes(plain, batch)).jaxpr)


def _operations(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inner = [_operations(found) for found in _jaxprs(equation.params)]
        name = equation.primitive.name
        if name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            left, output = (
                variable.aval.shape  # type: ignore[attr-defined]
                for variable in (equation.invars[0], equation.outvars[0])
            )
            total += 2 * int(np.prod(output)) * int(np.prod([left[axis] for axis in contracted]))
        elif name == "scan":
            total += equation.params["length"] * sum(inner)
        elif name == "cond":
            total += max(inner)
        else:
            total += sum(inner)
    return total


def _jaxprs(params: dict[str, Any]) -> list[Jaxpr]:
    found = []
    for value in jax.tree.leaves(
        list(params.values()), is_leaf=lambda leaf: isinstance(leaf, (Jaxpr, ClosedJaxpr))
    ):
        if isinstance(value, ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, Jaxpr):
            found.append(value)
    return found


if __name__ == "__main__":
    main()
