"""`groupconv tune`: the search against a stub clock and in the interpreter, its journal, its files, its refusals."""

import collections
import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from pretended import ENVIRONMENT, FakeLab

from groupconv import assembler, cli, configs, devices, dispatch
from groupconv.algorithms import REGISTRY, able
from groupconv.common import Layer
from groupconv.common.progress import Deadline
from groupconv.compiling import compiler, resources
from groupconv.measuring import contenders, journal, lab, results, search, stub, summary
from groupconv.measuring.contenders import Contender
from groupconv.perf_reports import layers
from groupconv.problem import PLANNED, ConvProblem

SMALL = ConvProblem(2, 8, 6, 5, 8, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 2, "fp32", "nchw", "nchw")
SUITE = {layer.name: layer for layer in layers.suite("bf16", "nhwc")}
SHIPPED_FOLDER = configs.shipped_folder  # which tests do not read otherwise
CHOSEN = [SUITE[name] for name in ("resnext50_32x4d.s1", "convnext_tiny.s0")]


@pytest.fixture
def shipped(monkeypatch):
    """What the package ships is read here as in other processes."""
    monkeypatch.setattr(configs, "shipped_folder", SHIPPED_FOLDER)
    configs.reset()
    yield
    configs.reset()


@pytest.fixture
def book(tmp_path):
    with journal.Journal(tmp_path / "stub.jsonl", {"device": "stub"}) as opened:
        yield opened


def searched(book, chosen, on=None, compiler=None):
    """A finished search, and what it said of each task."""
    on = on or stub.StubLab(devices.DEFAULT)
    said = {}
    done = search.Search(on, book, compiler, Deadline(None), lambda task, result, note: said.update({str(task): note}))
    done.run(search.tasks(chosen, on.target))
    return done, said


@pytest.fixture
def subject_that(monkeypatch):
    """Gives the stub's subjects a check of the test's own, which may ask for the true one."""

    def give(check):
        class Subject(stub.StubSubject):
            def check(self, pass_, contender):
                return check(self, contender) or super().check(pass_, contender)

        monkeypatch.setattr(stub, "StubSubject", Subject)

    return give


# --- Contenders ------------------------------------------------------------------------------------------------------


def test_pruning():
    """The best of an algorithm is always tried; of the others the fast ones, few of the same tile, and few in all."""

    def tried(*configurations, best_us=10.0):
        ranked = [(types.SimpleNamespace(time_us=us), {"BLOCK_M": m, "num_warps": w}) for us, m, w in configurations]
        return [config["BLOCK_M"] for _, config in contenders.worth_compiling(ranked, best_us)]

    assert tried((900.0, 16, 4), (901.0, 32, 4)) == [16]  # far from another algorithm's best
    assert tried((10.0, 16, 4), (15.0, 32, 4), (25.0, 64, 4)) == [16, 32]
    assert tried((10.0, 16, 1), (10.0, 16, 2), (10.0, 16, 4), (10.0, 32, 4)) == [16, 16, 32]
    assert len(tried(*((10.0, 2**i, 4) for i in range(12)))) == contenders.MOST_EACH


@pytest.mark.parametrize("layer", CHOSEN, ids=lambda layer: layer.name)
def test_contenders_are_of_every_algorithm_and_hold_the_planned(layer):
    for pass_ in PLANNED:
        own = contenders.ours(layer.problem, pass_, devices.DEFAULT)
        assert {contender.provider for contender in own} == set(able(layer.problem, pass_, devices.DEFAULT))
        assert len({contender.name for contender in own}) == len(own)
        if not own:  # nor is there a plan
            continue
        plan = dispatch.plan_pass(layer.problem, pass_, devices.DEFAULT, "triton")
        assert (plan.algorithm, plan.config) in [(contender.provider, contender.config) for contender in own]


@pytest.mark.usefixtures("shipped")
def test_what_was_measured_before_races_again():
    """Once, whatever the model says of it now."""
    (file,) = configs.device_files(devices.DEFAULT.slug)
    again = 0
    for layer in SUITE.values():
        for pass_ in PLANNED:
            entry, tier = file.lookup(layer.problem, pass_) or (None, "")
            if tier == "exact" and entry.algorithm in REGISTRY:
                own = contenders.ours(layer.problem, pass_, devices.DEFAULT)
                (contender,) = (c for c in own if (c.provider, c.config) == (entry.algorithm, entry.config))
                assert contender.modelled_us > 0
                again += contender is own[-1]  # the model would not try it any more
    assert again


def test_survivors_keep_the_faster_half_and_what_auto_falls_back_on():
    own = [Contender("implicit_gemm", {"BLOCK_M": size}) for size in (16, 32, 64)]
    torchs = contenders.peers(SMALL)
    medians = {own[0].name: 3.0, own[1].name: 1.0, own[2].name: 2.0, "torch_contiguous": 9.0, "torch_channels_last": 5}
    kept = search.survivors(SMALL, [*own, *torchs], medians)
    assert kept == [own[1], own[2], *torchs]
    medians["torch_contiguous"] = 4.0
    assert search.survivors(SMALL, [*own, *torchs], medians) == [own[1], own[2], torchs[0]]
    assert search.survivors(SMALL, [*own, *torchs], medians, 1) == [own[1], torchs[0]]


# --- The search ------------------------------------------------------------------------------------------------------


def test_search_finds_the_fastest(book):
    """On the stub, whose times are known: the finalists' best is as fast as any, but for the noise."""
    done, said = searched(book, CHOSEN)
    tasks = search.tasks(CHOSEN, devices.DEFAULT)
    assert [result.task for result in done.results] == tasks
    assert set(said.values()) == {""}
    for result in done.results:
        own = [contender for contender in result.raced if contender.ours]
        assert result.best in own
        fastest = min(result.first_us[contender.name] for contender in own)
        assert result.time_us <= fastest * (1 + 5 * stub.NOISE)
        assert result.torch_us == result.medians_us["torch_channels_last"]
        assert result.best_torch_us <= result.torch_us
        assert sum(contender.ours for contender in result.finalists) <= search.FINALISTS
    rounds = collections.Counter(n for (_, n) in book.races)
    assert rounds[search.FIRST_ROUNDS] == rounds[search.LAST_ROUNDS] == len(tasks)


def test_numbers_are_checked_before_anything_is_timed(book, monkeypatch):
    """A configuration whose numbers are wrong, or that fails, is recorded and listed, and never raced."""
    algorithm = REGISTRY["implicit_gemm"]
    prepare, configurations = algorithm.prepare, []

    def faulty(problem, pass_, config, *others):
        call = prepare(problem, pass_, config, *others)
        if config not in configurations:
            configurations.append(config)
        number = configurations.index(config)
        if number == 0:
            raise RuntimeError("out of luck\nat length")

        def run(*tensors):
            return torch.zeros_like(call(*tensors)) if number == 1 else call(*tensors)

        run.launches = call.launches
        return run

    monkeypatch.setattr(algorithm, "prepare", faulty)
    monkeypatch.setattr(search, "PLANNED", ("fprop",))
    monkeypatch.setattr(search.contenders_, "MOST_EACH", 3)
    on = FakeLab()
    done, _ = searched(book, [Layer("small", SMALL)], on)
    (result,) = done.results
    dropped = dict(result.dropped)
    failed, wrong = (Contender("implicit_gemm", config).name for config in configurations[:2])
    assert dropped[failed] == "failed: RuntimeError: out of luck"
    assert dropped[wrong].startswith("wrong: error 1 above the bound")
    assert all(failed not in runs and wrong not in runs for runs in on.raced)
    assert any(name.startswith("implicit_gemm") for name in result.first_us)
    lines = summary.faults(done.results, {})
    assert f"small fprop, {failed}: failed: RuntimeError: out of luck" in lines
    assert len(lines) == 2
    for name in result.first_us:
        assert book.findings[str(result.task), name].error < (1e-6 if name.startswith("implicit") else 1e-5)


def test_out_of_memory_is_of_one_layer(book, subject_that, monkeypatch):
    """The others go on, and a second run does not try what did not fit again."""

    def check(subject, contender):
        if subject.problem == CHOSEN[0].problem:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB")

    subject_that(check)
    done, said = searched(book, CHOSEN)
    assert {result.task.layer for result in done.results} == {"convnext_tiny.s0"}
    failures = [note for note in said.values() if note]
    assert len(failures) == 4
    assert all("out of memory" in note for note in failures)
    monkeypatch.setattr(stub.StubSubject, "check", None)
    again, said_again = searched(book, CHOSEN)
    assert said_again == said
    assert [result.medians_us for result in again.results] == [result.medians_us for result in done.results]


def test_the_finalists_of_a_dtype_are_tried_for_its_sister(book):
    chosen = [Layer("a", dataclasses.replace(CHOSEN[0].problem, dtype=dtype)) for dtype in ("bf16", "fp16", "tf32")]
    done, _ = searched(book, chosen)
    bf16, fp16, tf32 = ([r for r in done.results if r.task.problem == layer.problem] for layer in chosen)
    assert len(bf16) == len(fp16) == 4
    for first, second in zip(bf16, fp16, strict=True):
        finalists = {contender.name for contender in first.finalists if contender.ours}
        assert {contender.name for contender in second.raced if contender.ours} == finalists
    assert any(sum(contender.ours for contender in result.raced) > search.FINALISTS for result in tf32)


def test_a_lost_device_ends_the_run_and_is_remembered(book, subject_that):
    def check(subject, contender):
        if contender.ours:
            raise lab.DeviceLost("an illegal memory access")

    subject_that(check)
    with pytest.raises(lab.DeviceLost):
        searched(book, CHOSEN)
    ((_, name),) = book.findings
    assert book.findings[str(search.tasks(CHOSEN, devices.DEFAULT)[0]), name].note.startswith("lost the device")


@pytest.mark.parametrize("answers", [True, False], ids=["answers", "is-lost"])
def test_a_failing_call_is_told_from_a_lost_device(monkeypatch, answers):
    """What is raised while the device still answers is the call's own fault."""

    def fails(runs, rounds):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def synchronize():
        if not answers:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    subject = lab.GpuSubject(SMALL, lab.GpuLab(devices.DEFAULT, "Pretended GPU", "cpu", fails))
    assert subject.given.x.device.type == "cpu"  # made before the lab says that it is on a GPU
    subject.lab.device = "cuda"
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    bad = Contender("implicit_gemm", {"BLOCK_M": 1})
    for call in (lambda: subject.check("fprop", bad), lambda: subject.race("fprop", contenders.peers(SMALL), 1)):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            call()
        assert isinstance(caught.value, lab.DeviceLost) != answers


def test_compiled_faults():
    kernel = resources.Resources(90, 0, 1000, "HGMMA", 8, 64, 4, 4, 2, 2)
    spilling = dataclasses.replace(kernel, spill_bytes=8)
    large = dataclasses.replace(kernel, shared_bytes=10**6)
    for compiled, faults in (
        (compiler.Compiled((kernel,)), ()),
        (compiler.Compiled((kernel, spilling)), ("8 bytes of spills",)),
        (compiler.Compiled((large,)), ("1000000 bytes of shared memory of 232448",)),
        (compiler.Compiled(failed="X: y"), ("not compiled: X: y",)),
        (compiler.Compiled(), ()),
    ):
        assert compiled.faults(devices.DEFAULT) == faults


def test_compiles_where_there_is_no_disassembler(monkeypatch):
    """Triton's package may lack NVIDIA's tools: a kernel is compiled all the same, and what it takes is not known."""
    launch = types.SimpleNamespace(compiled=types.SimpleNamespace(asm={"cubin": b""}))
    monkeypatch.setattr(compiler, "launched", lambda *job: (launch,))
    monkeypatch.setattr(assembler, "tool", "/no/such/folder/{}".format)
    assert compiler.compiled(compiler.Job("", "fprop", {}, SMALL, "sm_90")) == compiler.Compiled()


def test_compiles_ahead_in_other_processes(book, monkeypatch, tmp_path):
    """What is compiled is what races; what fails there never reaches the device."""
    monkeypatch.setattr(contenders, "MOST_EACH", 1)
    monkeypatch.setattr(search, "PLANNED", ("fprop", "no such pass"))
    monkeypatch.setattr(search, "able", lambda problem, pass_, target: ["row_march"])
    ours = contenders.ours
    monkeypatch.setattr(
        contenders, "ours", lambda p, _, t: [c for c in ours(p, "fprop", t) if c.provider == "row_march"]
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    with compiler.Compiler(2) as ahead:
        done, said = searched(book, CHOSEN[:1], compiler=ahead)
    (result,) = done.results
    assert [contender.provider for contender in result.raced if contender.ours] == ["row_march"]
    assert len(list(tmp_path.glob("cache/*/*.cubin"))) == 1  # of one process, as another finds it there
    good, bad = said
    assert said[good] == ""
    assert said[bad].startswith("failed: ")
    notes = [finding.note for (task, _), finding in book.findings.items() if task == bad]
    assert any(note.startswith("not compiled: ") for note in notes)


# --- The journal -----------------------------------------------------------------------------------------------------


def test_journal_knows_what_was_measured(tmp_path):
    path = tmp_path / "stub.jsonl"
    with journal.Journal(path, {"a": (1, 2)}) as book:
        book.examined("task", "one", journal.Finding(1e-3, 4e-3, {"registers": 90}, ""))
        book.raced("task", 4, {"one": [1.0, 2.0]})
    other = {"a": [1, 3]}
    with journal.Journal(path, other) as book:
        assert not book.findings
        assert not book.races
        book.raced("task", 4, {"one": [7.0]})
    with journal.Journal(tmp_path / "stub.rank1.jsonl", {"a": (1, 2)}) as book:  # another rank reads the first's
        assert book.findings == {("task", "one"): journal.Finding(1e-3, 4e-3, {"registers": 90}, "")}
        assert book.race("task", 4, ["one"]) == {"one": [1.0, 2.0]}
        assert book.race("task", 4, ["one", "two"]) is None
        assert book.race("task", 8, ["one"]) is None
    with journal.Journal(tmp_path / "stub_2.jsonl", {"a": (1, 2)}) as book:  # another device's does not
        assert not book.findings


def test_a_line_cut_short_is_passed_over(tmp_path):
    path = tmp_path / "stub.jsonl"
    with journal.Journal(path, {}) as book:
        book.raced("task", 4, {"one": [1.0]})
        book.raced("task", 8, {"one": [1.0]})
    whole = path.read_text()
    path.write_text(whole[:-9])
    with pytest.warns(UserWarning, match="stub.jsonl: passing over 1 damaged lines"):
        book = journal.Journal(path, {})
    with book:
        assert list(book.races) == [("task", 4)]
        book.raced("task", 8, {"one": [2.0]})
    with pytest.warns(UserWarning, match="1 damaged"), journal.Journal(path, {}) as book:
        assert book.races["task", 8] == {"one": [2.0]}
    assert path.read_text().startswith(whole[:-9] + "\n")


@pytest.mark.parametrize("times", ["[]", "[-1.0]", "[NaN]", '["fast"]', "3"])
def test_times_that_are_none_are_not_trusted(tmp_path, times):
    path = tmp_path / "stub.jsonl"
    with journal.Journal(path, {}):
        pass
    with path.open("a") as file:
        file.write(f'{{"task": "a", "rounds": 4, "times_us": {{"one": {times}}}}}\n')
    with pytest.warns(UserWarning, match="1 damaged"), journal.Journal(path, {}) as book:
        assert not book.races


# --- Files -----------------------------------------------------------------------------------------------------------


def test_written_files_are_read_by_plans(book, tmp_path, monkeypatch):
    """What was measured is what a plan takes, exactly; and a second run keeps what it does not measure anew."""
    done, _ = searched(book, CHOSEN)
    path = tmp_path / "nvidia_h200.json"
    results.write(path, "NVIDIA H200", "measured", {}, done.results, devices.DEFAULT)
    monkeypatch.setenv("GROUPCONV_CONFIG_DIR", str(tmp_path))
    configs.reset()
    try:
        for result in done.results:
            plan = dispatch.plan_pass(result.task.problem, result.task.pass_, devices.DEFAULT)
            assert plan.source == "exact"
            assert plan.torch_time_us == pytest.approx(result.torch_us, abs=1e-3)
            if result.torch_us <= result.time_us:
                assert plan.algorithm == "torch"
            else:
                assert (plan.algorithm, plan.config) == (result.best.provider, result.best.config)
    finally:
        configs.reset()
    before = json.loads(path.read_text())["entries"]
    results.write(path, "NVIDIA H200", "measured", {}, done.results[:1], devices.DEFAULT)
    assert json.loads(path.read_text())["entries"] == before
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".old"] == []


@pytest.mark.parametrize("earlier", ["damaged", "of other kernels", "of another device", "of a stub clock"])
def test_nothing_of_an_earlier_file_is_lost(book, tmp_path, earlier):
    done, _ = searched(book, CHOSEN[:1])
    path = tmp_path / "nvidia_h200.json"
    results.write(
        path,
        "Another" if earlier == "of another device" else "NVIDIA H200",
        "stub" if earlier == "of a stub clock" else "measured",
        {},
        done.results,
        devices.DEFAULT,
    )
    text = path.read_text()
    if earlier == "damaged":
        text = text[:-30]
    elif earlier == "of other kernels":
        text = text.replace(configs.kernels_sha256()["tiles.py"], "0" * 64)
    path.write_text(text)
    says = pytest.warns(UserWarning, match="not continuing") if earlier == "damaged" else contextlib.nullcontext()
    with says:
        results.write(path, "NVIDIA H200", "measured", {}, done.results[:1], devices.DEFAULT)
    (aside,) = tmp_path.glob("nvidia_h200.json.*.old")
    assert aside.read_text() == text
    assert len(json.loads(path.read_text())["entries"]) == 1


def fixed(task, times, modelled=None):
    """A result with these medians; `modelled` times of ours by name."""
    raced = tuple(
        Contender(name)
        if name.startswith("torch")
        else Contender(name, {"BLOCK_M": 16}, (modelled or {}).get(name, 1.0))
        for name in times
    )
    medians = {contender.name: time for contender, time in zip(raced, times.values(), strict=True)}
    return search.Result(task, raced, medians, raced, medians, ())


def test_entries():
    task = search.Task("a", SMALL, "fprop")
    slower = search.Task("b", dataclasses.replace(SMALL, h_in=7, w_in=5), "fprop")
    assert slower.problem.config_key("fprop") == SMALL.config_key("fprop")
    quick = fixed(task, {"implicit_gemm": 2.0, "torch_contiguous": 3.0})
    (entry,) = results.entries([quick, fixed(slower, {"implicit_gemm": 4.0, "torch_contiguous": 5.0})]).values()
    assert (entry.time_us, entry.torch_time_us, entry.algorithm) == (4.0, 5.0, "implicit_gemm")
    assert results.entry(fixed(task, {"implicit_gemm": 2.0})).torch_time_us is None
    torch_only = results.entry(fixed(task, {"torch_contiguous": 3.0, "torch_channels_last": 1.0}))
    assert (torch_only.algorithm, torch_only.time_us, torch_only.torch_time_us) == ("torch", 3.0, 3.0)
    assert results.entry(fixed(task, {"torch_channels_last": 3.0})) is None


def test_calibration_and_rank_correlation():
    assert results.rank_correlation([(1, 10), (2, 20), (3, 90)]) == pytest.approx(1.0)
    assert results.rank_correlation([(1, 30), (2, 20), (3, 10)]) == pytest.approx(-1.0)
    assert results.rank_correlation([(1, 5), (2, 5), (3, 6), (4, 1)]) == pytest.approx(-0.316, abs=1e-3)
    assert results.rank_correlation([(1, 1), (2, 2)]) is None
    assert results.rank_correlation([(1, 1), (2, 1), (3, 1)]) is None
    problems = [dataclasses.replace(SMALL, batch=batch) for batch in (1, 4, 16)]
    measured = [
        fixed(
            search.Task("", problem, "fprop"), {"implicit_gemm": time, "torch_contiguous": 7.0}, {"implicit_gemm": 2.0}
        )
        for problem, time in zip(problems, (2.0, 6.0, 8.0), strict=True)
    ]
    calibration = results.calibration(measured, devices.DEFAULT)
    assert calibration.ours == {"implicit_gemm fprop": 3.0}
    assert set(calibration.torch) == {"narrow fprop"}
    assert results.calibration(measured[:2], devices.DEFAULT) == configs.Calibration()
    assert results.model_correlations(measured) == {"implicit_gemm": (None, None)}


# --- The command -----------------------------------------------------------------------------------------------------


def tune(folder, *arguments):
    """`groupconv tune --stub`, in this process."""
    return cli.main(["tune", "--stub", "--out", str(folder), *arguments])


def tune_apart(folder, *arguments):
    """The same in a process that interprets no kernels, and so plans those too that have no interpreter."""
    command = [sys.executable, "-m", "groupconv", "tune", "--stub", "--out", str(folder), *arguments]
    return subprocess.run(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT, timeout=300).returncode


def lines_of(path):
    """The journal's results, by what they are of."""
    lines = collections.Counter()
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut short by a kill
        if "measured_with" not in record:
            lines[record["task"], record.get("contender"), record.get("rounds")] += 1
    return lines


def entries_of(path):
    return json.loads(path.read_text())["entries"]


def test_budget_is_kept(tmp_path, capsys):
    """More work than the time is enough for: it ends in time, with what there is."""
    began = time.monotonic()
    assert tune(tmp_path, "--budget-seconds", "5", "--dtypes", "bf16", "fp32", "--layouts", "nhwc", "nchw") == 0
    assert 5 <= time.monotonic() - began < 5 + 5  # and a table
    said = capsys.readouterr().out
    assert "The time budget ended with" in said
    assert "Stub clock: not measurements" in said
    assert entries_of(tmp_path / "stub.json")


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_run_goes_on_where_it_was(sign, tmp_path):
    """In the middle: nothing measured is lost or measured again, and the end is that of a run of one piece. An
    interrupted one leaves its journal whole, and a file of what there is.
    """
    ended, whole = tmp_path / "ended", tmp_path / "whole"
    path = ended / "stub.jsonl"
    command = [sys.executable, "-m", "groupconv", "tune", "--stub", "--out", str(ended), "--quick"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (path.exists() and path.read_bytes().count(b"\n") >= 60):
        time.sleep(0.002)
    process.send_signal(sign)
    out, _ = process.communicate(timeout=120)
    before = lines_of(path)
    assert sum(before.values()) >= 50
    assert (ended / "stub.json").exists() == (sign == signal.SIGINT)
    if sign == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted" in out
        assert [json.loads(line) for line in path.read_text().splitlines()]
        assert entries_of(ended / "stub.json")
    assert tune_apart(ended, "--quick") == tune_apart(whole, "--quick") == 0
    after = lines_of(path)
    assert before <= after
    assert set(after.values()) == {1}
    assert after == lines_of(whole / "stub.jsonl")
    assert entries_of(ended / "stub.json") == entries_of(whole / "stub.json")
    assert tune_apart(ended, "--quick") == 0
    assert lines_of(path) == after


@pytest.mark.usefixtures("shipped")
def test_two_ranks_find_what_one_does(tmp_path):
    """Under torchrun two processes share the layers, and one file is written: that of a run alone."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "groupconv",
        "tune", "--stub", "--out", str(together), "--quick",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert tune_apart(alone, "--quick") == 0
    ranks = [lines_of(together / f"stub.rank{rank}.jsonl") for rank in range(2)]
    assert all(ranks)
    assert ranks[0] + ranks[1] == lines_of(alone / "stub.jsonl")
    assert entries_of(together / "stub.json") == entries_of(alone / "stub.json")
    assert done.stdout.count("Rank correlation of modelled and pretended times") == 1
    assert tune_apart(together, "--quick") == 0  # alone, it goes on from what both measured
    assert not lines_of(together / "stub.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no GPU here"),
        (["--stub"], "--stub: its times are pretended, so it needs --out"),
        (["--target", "sm_80"], "--target: sm_80 is for --compile-only and --stub"),
        (["--stub", "--out", "OUT", "--target", "sm_12"], "target 'sm_12' is not known"),
        (["--stub", "--out", "OUT", "--budget-seconds", "-1"], "--budget-seconds: -1.0 is not a positive number"),
        (["--stub", "--out", "OUT", "--jobs", "0"], "--jobs: 0 is not a positive number"),
        (["--stub", "--out", "OUT", "--model", "timm:x", "--groups", "2"], "--groups: timm:x has its own"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    assert cli.main(["tune", *(str(out) if word == "OUT" else word for word in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_compile_only(tmp_path, monkeypatch, capsys):
    """Resources alone, of a GPU that is not here: nothing is written."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # else another process does it
    monkeypatch.setattr(contenders, "MOST_EACH", 1)
    monkeypatch.chdir(tmp_path)
    layer = ["--layers", "groups", "--groups", "1", "--channels", "16", "--kernel", "1", "--size", "7", "--batch", "1"]
    assert cli.main(["tune", "--compile-only", "--target", "sm_80", "--jobs", "1", *layer]) == 0
    said = capsys.readouterr().out
    assert "Worth timing on nvidia_a100_sxm (sm_80), as modelled and compiled" in said
    kept, left_out = map(int, re.search(r"(\d+) configurations of 4 passes are worth timing, (\d+) are", said).groups())
    assert kept >= 4
    assert left_out == said.count("bytes of spills")
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_tunes_on_the_gpu(tmp_path):
    """For real: every contender's numbers checked, a file that plans read, and a second run that measures nothing."""
    arguments = ["tune", "--out", str(tmp_path), "--layers", "groups", "--groups", "8", "128", "--batch", "16"]
    assert cli.main(arguments) == 0
    slug = devices.of_device(torch.cuda.current_device()).slug
    first = lines_of(tmp_path / f"{slug}.jsonl")
    assert cli.main(arguments) == 0
    assert lines_of(tmp_path / f"{slug}.jsonl") == first
    file = configs.parse_device((tmp_path / f"{slug}.json").read_text(), slug)
    assert len(file.entries) >= 6
    assert not file.stale
