"""Processes that answer jobs: one JSON line in, one JSON line out.

Interpreted kernels and compiled ones cannot live in one process: Triton decides which they are when they are imported.
Nor does a caller wait for a compiler.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import IO, Any

from .problem import ConvProblem

Fields = dict[str, Any]  # as JSON carries them
HIDDEN_GPUS = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), "")
BACKGROUND = "--background"  # to a worker: whatever else this machine does goes first
WATCH_SECONDS = 1.0


def problem_of(fields: Fields) -> ConvProblem:
    """The problem of which JSON carried the fields."""
    sizes: Fields = {name: tuple(size) if isinstance(size, list) else size for name, size in fields.items()}
    return ConvProblem(**sizes)


def in_a_line(error: BaseException) -> str:
    """What was raised, and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def local_processes() -> int:
    """The processes of a job that share this machine, as torchrun counts them."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(said)) if said.isdecimal() else 1


def processes(wanted: int | None = None) -> int:
    """How many may compile: all processes of a job on this machine one a core, but the one that asks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wanted or max(1, cores // local_processes() - 1)


# --- The worker's side -----------------------------------------------------------------------------------------------


def serve(answer: Callable[[Fields], Fields]) -> None:
    """Answer jobs until the input ends, or the process that asks. What a job raises is its answer."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if BACKGROUND in sys.argv and hasattr(os, "nice"):
        os.nice(19)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints must not end up among the answers
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:  # the finding of this job; the next one may do better
            reply = {"failed": in_a_line(error)}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
    os._exit(0)  # at the lowest priority a process that takes itself apart may be long about it


def _end_with(parent: int) -> None:
    """A parent that is killed closes the input, which a worker does not see before it has done its job."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def rerun_compiling(argv: list[str]) -> int | None:
    """The exit status of the command `groupconv ARGV` run again without TRITON_INTERPRET; None where it is not set.

    Interpreted kernels can be neither compiled nor timed, and whether they are is settled when they are imported.
    """
    if not os.environ.get("TRITON_INTERPRET"):
        return None
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with subprocess.Popen([sys.executable, "-m", "groupconv", *argv], env=environment) as process:
        while True:
            with contextlib.suppress(KeyboardInterrupt):  # which the command had too, and ends by
                return process.wait()


# --- The asking side -------------------------------------------------------------------------------------------------


# For a package that no search finds by its name, as a Hub build's: loaded from its file under that name, so that its
# kernels are the caller's.
_FROM_FILE = """
import importlib.util, sys
file, module = sys.argv[1:3]
name = module.partition(".")[0]
spec = importlib.util.spec_from_file_location(name, file)
sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
importlib.import_module(module).main()
"""


def _python(module: str) -> list[str]:
    """Python's arguments that run a module."""
    name = module.partition(".")[0]
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    if os.path.basename(os.path.dirname(file)) in (name, ""):
        return ["-m", module]
    return ["-c", _FROM_FILE, file, module]


def _search_path() -> str:
    """What the caller imports from, as PYTHONPATH has it; Python itself looks at strings only."""
    return os.pathsep.join(path for path in sys.path if isinstance(path, str))


class Workers:
    """`count` processes of one module, each answering a job at a time, started when they are needed.

    Use it as a context manager, or `close` it.

    background: they have the lowest priority and see no GPU. seconds: a job that takes longer ends its process.
    """

    def __init__(
        self, module: str, interpret: bool, count: int = 1, background: bool = False, seconds: float | None = None
    ):
        self._command = [sys.executable, *_python(module), *([BACKGROUND] if background else [])]
        self._name = module.rsplit(".", 1)[-1]
        self._environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if interpret:
            self._environment["TRITON_INTERPRET"] = "1"
        if background:
            # What the caller can import its processes can, and nothing that only lies where it runs.
            self._environment |= HIDDEN_GPUS | {"PYTHONPATH": _search_path(), "PYTHONSAFEPATH": "1"}
        self._count, self._seconds, self._background = count, seconds, background
        self._jobs: queue.SimpleQueue[tuple[Fields, concurrent.futures.Future[Fields]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._started: list[subprocess.Popen[str]] = []
        self._unanswered = 0
        self._closed = False

    @property
    def unanswered(self) -> int:
        """Jobs that were submitted and have no answer yet."""
        return self._unanswered

    def submit(self, job: Fields) -> concurrent.futures.Future[Fields]:
        """The answer to come; {"failed": why} if the job raised or its process died, and "unstarted" with it if it has
        none. RuntimeError once it is closed.
        """
        answer: concurrent.futures.Future[Fields] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("closed")
            self._unanswered += 1
            self._jobs.put((job, answer))
            if len(self._threads) < min(self._count, self._unanswered):
                # Daemons: a worker that hangs does not keep its caller from ending.
                self._threads.append(threading.Thread(target=self._serve, daemon=True))
                self._threads[-1].start()
        return answer

    def _serve(self) -> None:
        """Of one thread: jobs in, answers out, by one process after another."""
        process: tuple[subprocess.Popen[str], IO[str]] | None = None
        while (item := self._jobs.get()) is not None:
            job, answer = item
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                process = process or self._start()
            except Exception as error:
                reply = {"failed": in_a_line(error), "unstarted": not self._closed}
            else:
                reply, process = self._ask(*process, job)
            with self._lock:
                self._unanswered -= 1
            answer.set_result(reply)
        if process is not None:
            process[1].close()

    def _ask(self, process: subprocess.Popen[str], errors: IO[str], job: Fields):
        """(the answer, the process and its errors if it lives)."""
        assert process.stdin is not None
        assert process.stdout is not None
        clock = None if self._seconds is None else threading.Timer(self._seconds, process.kill)
        try:
            if clock is not None:
                clock.daemon = True
                clock.start()
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            if clock is not None:
                clock.cancel()
        said: Any = None
        if line:
            with contextlib.suppress(ValueError):
                said = json.loads(line)
            if isinstance(said, dict):
                return said, (process, errors)
            process.kill()  # something prints where answers belong
            process.wait()
            errors.close()
            return {"failed": f"{self._name}: no answer but {line.strip()[:100]!r}"}, None
        status = process.wait()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
        errors.close()
        return {"failed": f"{self._name}: the process ended with status {status} {last}".rstrip()}, None

    def _start(self) -> tuple[subprocess.Popen[str], IO[str]]:
        with self._lock:
            if self._closed:
                raise RuntimeError("closed")
            errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=self._environment,
                start_new_session=self._background,  # it is the caller that Ctrl-C means
            )  # fmt: skip
            self._started.append(process)
        return process, errors

    def close(self) -> None:
        """End the processes; what they have not answered they never will."""
        with self._lock:
            self._closed = True
            with contextlib.suppress(queue.Empty):
                while item := self._jobs.get_nowait():
                    item[1].cancel()
            for _ in self._threads:
                self._jobs.put(None)
        for process in self._started:
            process.kill()
            process.wait()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
