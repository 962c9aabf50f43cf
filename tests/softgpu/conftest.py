"""The tests of the software GPU need a C compiler, and nothing else that the others do not."""

import pathlib

import pytest

import softgpu

FOLDER = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    if softgpu.compiler() is None:
        for item in items:
            if FOLDER in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no C compiler: neither $CC nor cc nor gcc"))
