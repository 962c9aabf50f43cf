"""Processes that answer jobs: one JSON line in, one JSON line out.

Interpreted kernels and compiled ones cannot live in one process: Triton decides which they are when they are imported.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import IO, Any

from ..problem import ConvProblem

Fields = dict[str, Any]  # as JSON carries them


def problem_of(fields: Fields) -> ConvProblem:
    """The problem of which JSON carried the fields."""
    sizes: Fields = {name: tuple(size) if isinstance(size, list) else size for name, size in fields.items()}
    return ConvProblem(**sizes)


def in_a_line(error: Exception) -> str:
    """What was raised, and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def serve(answer: Callable[[Fields], Fields]) -> None:
    """The worker's side: answer jobs until the input ends. What a job raises is its answer."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints must not end up among the answers
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:  # the finding of this job; the next one may do better
            reply = {"failed": in_a_line(error)}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


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


class Workers:
    """`count` processes of one module, each answering a job at a time. Use it as a context manager."""

    def __init__(self, module: str, interpret: bool, count: int = 1):
        self._module = module
        self._environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if interpret:
            self._environment["TRITON_INTERPRET"] = "1"
        self._local = threading.local()
        self._lock = threading.Lock()
        self._started: list[subprocess.Popen[str]] = []
        self._closed = False
        self._files = contextlib.ExitStack()
        self._pool = concurrent.futures.ThreadPoolExecutor(count)

    def submit(self, job: Fields) -> concurrent.futures.Future[Fields]:
        """The answer to come; {"failed": why} if the job raised or its process died."""
        return self._pool.submit(self._ask, job)

    def _ask(self, job: Fields) -> Fields:
        process, errors = self._process()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if line:
            return json.loads(line)
        self._local.process = None
        status = process.wait()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
        return {"failed": f"{self._module.rsplit('.', 1)[-1]}: the process ended with status {status} {last}".rstrip()}

    def _process(self) -> tuple[subprocess.Popen[str], IO[str]]:
        if getattr(self._local, "process", None) is None:
            with self._lock:
                if self._closed:
                    raise RuntimeError("closed")
                errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
                self._files.callback(errors.close)
                process = subprocess.Popen(
                    [sys.executable, "-m", self._module],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=self._environment,
                )  # fmt: skip
                self._started.append(process)
            self._local.process = process, errors
        return self._local.process

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._started:
            process.kill()
            process.wait()
        self._pool.shutdown(wait=True)
        self._files.close()
