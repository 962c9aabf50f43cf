"""Every pass of every algorithm against float64: named problems, layouts, types, tilings; then through autograd."""

import itertools

import cases
import pytest
import torch
import torch.nn.functional as F

from groupconv import triton_conv
from groupconv.algorithms import REGISTRY

RUNS = cases.runs(cases.target("cuda" if torch.cuda.is_available() else "cpu"))


def test_case_names_are_distinct():
    assert len({str(case) for case in cases.CASES}) == len(cases.CASES)


@pytest.mark.parametrize(("case", "pass_", "name"), RUNS, ids=lambda value: str(value))
def test_pass(case, pass_, name, device):
    given = cases.operands(case, device)
    problem = cases.actual(case, given)
    target, algorithm, strides = cases.target(device), REGISTRY[name], given.strides(problem)
    config = cases.config(algorithm, problem, pass_, target, case.tiles)
    with cases.guarded():
        out = algorithm.prepare(problem, pass_, config, target, strides)(*given.of(pass_))
    assert out.stride() == strides[{"fprop": "y", "dgrad": "dx", "wgrad": "dw"}[pass_]]
    assert out.dtype == cases.MODES[problem.dtype]
    expected = cases.references(problem, given)[pass_]
    assert cases.error(out, expected) <= cases.bound(problem.dtype, cases.terms(problem, pass_))
