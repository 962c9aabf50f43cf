"""groupconv advise: which choices it compares, its fronts and traps, and what it writes."""

import sys
import types

import hypothesis
import pytest
from hypothesis import strategies as st
from torch import nn

from groupconv import cli, devices
from groupconv.common import files
from groupconv.measuring.stub import StubLab
from groupconv.perf_reports import advise, layers
from groupconv.problem import PASSES, ConvProblem

LAYER = ConvProblem(8, 64, 14, 14, 64, 3, 3, pad=(1, 1, 1, 1), groups=4)


def choice(c, groups, us):
    problem = ConvProblem(8, c, 14, 14, c, 3, 3, pad=(1, 1, 1, 1), groups=groups)
    return advise.Choice(problem, False, us, 0.0, "modelled", "", 1.0)


def test_problems():
    """Its own, and near widths by each count that divides them; of counts that are asked for, those alone."""
    found = advise.problems(LAYER, None)
    assert LAYER in found
    assert {problem.c_in for problem in found} == {48, 64, 80}
    for problem in found:
        assert problem.c_in % problem.groups == 0
    assert {p.groups for p in found if p.c_in == 48} == {1, 2, 3, 4, 6, 8, 12, 16, 24, 48}
    assert {p.groups for p in advise.problems(LAYER, [8, 16])} == {4, 8, 16}


@hypothesis.given(
    st.lists(st.tuples(st.sampled_from([48, 64]), st.sampled_from([1, 2, 4, 16]), st.integers(1, 20)), min_size=1)
)
def test_front_and_traps(drawn):
    """By their definitions, whatever the order."""
    swept = [choice(*each) for each in drawn]
    best = advise.front(swept)
    for each in swept:
        beaten = [
            other for other in swept
            if (other.step_us <= each.step_us and other.problem.params > each.problem.params)
            or (other.step_us < each.step_us and other.problem.params >= each.problem.params)
        ]  # fmt: skip
        same = [(b.step_us, b.problem.params) for b in best]
        assert ((each.step_us, each.problem.params) in same) == (not beaten)
        better = advise.trap(each, swept)
        slow = [o for o in swept if o.no_less_than(each) and o.step_us <= advise.TRAP * each.step_us]
        assert (better is None) == (not slow)
        assert better is None or better.step_us == min(o.step_us for o in slow)


def test_times_are_of_one_kind():
    """On a lab all are of its clock, by what calls are planned to run; else all are modelled."""
    target = devices.DEFAULT
    problems = advise.problems(LAYER, [4, 64])
    modelled = advise.choices(problems, LAYER, target)
    timed = advise.choices(problems, LAYER, target, StubLab(target))
    for kind, swept in (("modelled", modelled), ("stub", timed)):
        assert {each.times for each in swept} == {kind}
        assert [each.own for each in swept].count(True) == 1
        for each in swept:
            floor = sum(each.problem.min_bytes(pass_) for pass_ in PASSES) / target.copy_gbps / 1e3
            assert each.step_us > 0.5 * floor
            assert each.takes.count(",") in (1, 2)
            assert each.shuffle_us > 0
    assert any(a.step_us != b.step_us for a, b in zip(modelled, timed, strict=True))


def test_shuffle():
    grouped, depthwise = choice(64, 4, 1).problem, choice(64, 64, 1).problem
    assert advise.shuffle(choice(64, 1, 1).problem, True) == advise.shuffle(depthwise, True) == "no"
    assert [advise.shuffle(grouped, f) for f in (True, False, None)] == ["yes", "no", "if the next is grouped"]


def test_command(tmp_path, capsys):
    arguments = ["--channels", "64", "--size", "14", "--batch", "8", "--target", "h100", "--out", str(tmp_path)]
    assert cli.main(["advise", *arguments, "--groups", "16", "4"]) == 0
    printed = capsys.readouterr().out
    assert "g16: a training step, modelled for nvidia_h100" in printed
    assert "own" in printed
    rows = files.read(tmp_path / "advise.csv", advise.FIELDS)
    assert {(row["c_in"], row["groups"]) for row in rows} == {(c, g) for c in ("48", "64", "80") for g in ("4", "16")}
    assert [row["groups"] for row in rows if row["own"]] == ["16"]
    assert {row["kind"] for row in rows} == {"modelled"}
    assert (tmp_path / "advise.png").stat().st_size > 10_000
    assert cli.main(["advise", *arguments, "--quick"]) == 0
    rows = files.read(tmp_path / "advise.csv", advise.FIELDS)
    assert {row["groups"] for row in rows} == {"1", *map(str, layers.QUICK_GROUPS)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--groups", "16", "3"], "--groups: 3 does not divide the 128 input channels"),
        (["--groups", "0"], "--groups: 0 is not a positive number"),
        (["--target", "h999"], "h999"),
        (["--model", "timm:resnext", "--groups", "2"], "--groups: timm:resnext has its own; 2 is for --layers groups"),
        (["--layers", "suite", "--channels", "64", "32"], "--channels: a list of layers has its own; 64 32 is for"),
    ],
)
def test_refused(arguments, said, tmp_path, capsys):
    """Before any work."""
    assert cli.main(["advise", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Shuffled(nn.Module):
    """The first grouped layer is followed by another one, the second by an ungrouped one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 32, 1, groups=2), nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.stem, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(32, 8, 1)

    def forward(self, x):
        return self.last(self.second(self.first(self.stem(x)))).mean((2, 3))


def test_of_a_model(monkeypatch, tmp_path):
    timm = types.ModuleType("timm")
    timm.list_models = lambda: ["shuffled"]
    timm.create_model = lambda name, pretrained: Shuffled()
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert layers.followed_by_groups("timm:shuffled", 2, 16) == {"shuffled.first": True, "shuffled.second": False}
    assert cli.main(["advise", "--model", "timm:shuffled", "--batch", "2", "--size", "16", "--out", str(tmp_path)]) == 0
    rows = files.read(tmp_path / "advise.csv", advise.FIELDS)
    own = {row["layer"]: row["shuffle"] for row in rows if row["own"]}
    assert own == {"shuffled.first": "yes", "shuffled.second": "no"}
