"""What the installed package asks platformdirs and filelock, by the standard library: the same folder and the same lock
on Linux, where Triton is.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WAIT_SECONDS = 0.05


def user_config_path() -> pathlib.Path:
    """Where a user's configurations are, as XDG has it."""
    named = os.environ.get("XDG_CONFIG_HOME", "")
    return pathlib.Path(named if os.path.isabs(named) else os.path.expanduser("~/.config"), "groupconv")


@contextlib.contextmanager
def alone(path: str | pathlib.Path, seconds: float = -1) -> Iterator[None]:
    """A context while which no other process is in one of this path, a file that is made.

    OSError or NotImplementedError where there are no locks; TimeoutError, which is one, after so many seconds.
    """
    if fcntl is None:
        raise NotImplementedError("no locks on this platform")
    end = time.monotonic() + seconds
    with open(path, "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if seconds >= 0 and end < time.monotonic():
                    raise TimeoutError(f"{path} is locked") from None
            time.sleep(WAIT_SECONDS)
        yield
