"""A report's rows without a GPU: modelled times, resources as compiled, errors as interpreted. Nothing is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from concurrent.futures import Future

from .. import cost, dispatch
from ..children import Children, problem_json
from ..devices import Target
from .interpreted import shrunk
from .passes import reported, taken
from .rows import PRIOR, Layer, Timing, layer_row, limit_row, timing_fields


def count(layers: list[Layer], target: Target) -> int:
    """How many rows `rows` yields."""
    return 2 + sum(len(names) + 2 for layer in layers for _, names in reported(layer.problem, target))


def rows(layers: list[Layer], target: Target) -> Generator[dict, None, None]:
    """The target's assumed limits; then, for each layer and pass, each algorithm, F.conv2d's prior, and what "auto"
    would take.
    """
    dtype = layers[0].problem.dtype
    yield limit_row("copy_limit", dtype, target.copy_gbps, target.source)
    yield limit_row("matrix_limit", dtype, target.matrix_rate(dtype), target.source)
    interpreter = Children("groupconv.perf_reports.interpreted", interpret=True)
    compiler = Children("groupconv.compiled", interpret=False)
    with interpreter, compiler:
        pending: list[tuple[dict, Future[dict] | None, Future[dict] | None]] = []
        for layer in layers:
            for pass_, names in reported(layer.problem, target):
                for name in names:
                    pending.append(_submit(layer, pass_, name, target, interpreter, compiler))
                pending += [(_prior(layer, pass_, target), None, None), (_auto(layer, pass_, target), None, None)]
        for row, error, kernels in pending:
            if error is not None and kernels is not None:
                _add_error(row, error.result())
                _add_resources(row, kernels.result())
            yield row


def _submit(
    layer: Layer, pass_: str, name: str, target: Target, interpreter: Children, compiler: Children
) -> tuple[dict, Future[dict], Future[dict]]:
    problem = layer.problem
    _, config, estimate = dispatch.modelled(problem, pass_, target, name)
    small = shrunk(problem)
    floor = cost.floor_us(problem, pass_, target)
    row = {
        **_about(layer, pass_, name, target),
        "source": "modelled",
        "config": config,
        **timing_fields(problem, pass_, Timing(estimate.time_us), floor),
        "bound": estimate.bound,
        "err_on": f"interpreter {small}",
        "compiled_for": target.arch_name,
    }
    job = {"pass": pass_, "algorithm": name, "config": config}
    error = interpreter.submit({**job, "problem": problem_json(small)})
    kernels = compiler.submit({**job, "problem": problem_json(problem), "target": target.arch_name})
    return row, error, kernels


def _about(layer: Layer, pass_: str, provider: str, target: Target) -> dict:
    ungrouped = dataclasses.replace(layer.problem, groups=1)
    return {
        **layer_row(layer, pass_, provider),
        "floor_us": cost.floor_us(layer.problem, pass_, target),
        "ungrouped_floor_us": cost.floor_us(ungrouped, pass_, target),
    }


def _prior(layer: Layer, pass_: str, target: Target) -> dict:
    """F.conv2d, by its prior over the floor: what "auto" goes by where nobody measured."""
    row = _about(layer, pass_, PRIOR, target)
    time_us = cost.torch_prior_us(layer.problem, pass_, target)
    return {**row, "source": "prior", **timing_fields(layer.problem, pass_, Timing(time_us), row["floor_us"])}


def _auto(layer: Layer, pass_: str, target: Target) -> dict:
    """What dispatch would choose. It has a time only if that is modelled, or F.conv2d's prior."""
    row = _about(layer, pass_, "auto", target)
    plan = taken(layer.problem, pass_, target)
    if plan is None:
        return {**row, "note": "takes dgrad and wgrad"}
    row |= {"source": plan.source, "config": plan.config}
    if plan.time_source == "modelled" and plan.taken_us is not None:
        row |= timing_fields(layer.problem, pass_, Timing(plan.taken_us), row["floor_us"])
    takes = plan.algorithm
    if takes == "torch":
        takes = "F.conv2d (prior)" if plan.source == "modelled" else f"F.conv2d ({plan.source})"
    return {**row, "note": f"takes {takes}"}


def _add_error(row: dict, answer: dict) -> None:
    if "failed" in answer:
        row["note"] = f"not interpreted: {answer['failed']}"
        return
    row |= {"max_rel_err": answer["error"], "err_bound": answer["bound"]}
    if not answer["error"] <= row["err_bound"]:
        row["note"] = f"wrong: error {answer['error']:.2g} above the bound {row['err_bound']:.2g}"


def _add_resources(row: dict, answer: dict) -> None:
    if "failed" in answer:
        row["note"] = "; ".join(filter(None, [row.get("note"), f"not compiled: {answer['failed']}"]))
        return
    main = answer["kernels"][0]
    row |= {name: main[name] for name in ("registers", "spill_bytes", "shared_bytes")}
    row["matrix"] = f"{main['matrix']} {main['matrix_count']}" if main["matrix"] else ""
