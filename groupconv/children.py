"""Child processes that answer jobs: one JSON line in, one JSON line out.

Interpreted kernels and compiled ones cannot live in one process: Triton decides which they are when they are imported.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import IO, Any

from .problem import ConvProblem


def problem_json(problem: ConvProblem) -> dict:
    """A problem as JSON carries it."""
    return dataclasses.asdict(problem)


def problem_of(fields: dict) -> ConvProblem:
    """The problem that `problem_json` wrote."""
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    return ConvProblem(**values)


def serve(answer: Callable[[dict], dict]) -> None:
    """The child's side: answer jobs until the input ends. What a job raises is its answer."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints must not end up among the answers
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:  # the finding of this job; the next one may do better
            reply = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
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


class Children:
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

    def submit(self, job: dict) -> concurrent.futures.Future[dict]:
        """The answer to come; {"failed": why} if the job raised or its process died."""
        return self._pool.submit(self._ask, job)

    def _ask(self, job: dict) -> dict:
        child, errors = self._child()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(job) + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except OSError:
            line = ""
        if line:
            return json.loads(line)
        self._local.child = None
        status = child.wait()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
        return {"failed": f"{self._module.rsplit('.', 1)[-1]}: the process ended with status {status} {last}".rstrip()}

    def _child(self) -> tuple[subprocess.Popen[str], IO[str]]:
        if getattr(self._local, "child", None) is None:
            with self._lock:
                if self._closed:
                    raise RuntimeError("closed")
                errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
                self._files.callback(errors.close)
                child = subprocess.Popen(
                    [sys.executable, "-m", self._module],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=self._environment,
                )  # fmt: skip
                self._started.append(child)
            self._local.child = child, errors
        return self._local.child

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *exception) -> None:
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for child in self._started:
            child.kill()
            child.wait()
        self._pool.shutdown(wait=True)
        self._files.close()
