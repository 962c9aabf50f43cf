"""What is asked of packages beside PyTorch and Triton. A Hub build (hub/) asks none, and has a file of its own here."""

from __future__ import annotations

import contextlib
import pathlib


def user_config_path() -> pathlib.Path:
    """Where the platform has a user's configurations."""
    import platformdirs

    return platformdirs.user_config_path("groupconv", appauthor=False)


def alone(path: str | pathlib.Path, seconds: float = -1) -> contextlib.AbstractContextManager[object]:
    """A context while which no other process is in one of this path, a file that is made.

    OSError or NotImplementedError where there are no locks; TimeoutError, which is one, after so many seconds.
    """
    import filelock

    return filelock.FileLock(path, timeout=seconds)
