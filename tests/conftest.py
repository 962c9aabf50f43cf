"""What every test starts from: kernels on the GPU if there is one, else in Triton's interpreter; poisoned outputs."""

import dataclasses
import os
import pathlib
import signal
import tempfile

import pytest
import torch

ON_GPU = torch.cuda.is_available()
# No configuration of the user's decides what a test plans: the folder does not exist.
NO_CONFIGURATIONS = pathlib.Path(__file__).parent / "no-configurations"
os.environ["GROUPCONV_CONFIG_DIR"] = str(NO_CONFIGURATIONS)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # In a background job; what tests start, and interrupt, would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
if ON_GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when groupconv.kernels is imported
# What compiles kernels in its own process runs in another one than what interprets them: `make test-compiled`.
COMPILED = ["softgpu", "test_compiled_code.py", "test_compiled_fuzz.py", "test_fragments.py"]
collect_ignore = COMPILED if os.environ.get("TRITON_INTERPRET") == "1" else []


def pytest_collection_modifyitems(items):
    if not ON_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def modelled_plans(monkeypatch):
    """Nor do the measurements that the package ships, which are not the same next year; on a GPU they do."""
    from groupconv import configs

    if not ON_GPU:
        monkeypatch.setattr(configs, "shipped_folder", lambda: NO_CONFIGURATIONS)
        configs.reset()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and its relatives give NaN, so that an element left unwritten shows."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=ON_GPU)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was[0], warn_only=was[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def few_programs(monkeypatch):
    """Calls are planned for a GPU of one multiprocessor, so that the interpreter has few programs to run."""
    from groupconv import devices, prepared

    if not ON_GPU:
        small = dataclasses.replace(devices.DEFAULT, multiprocessors=1)
        monkeypatch.setattr(prepared, "target_of", lambda device: small)
        prepared.reset()
    yield
    prepared.reset()


@pytest.fixture
def unpoisoned_memory(poisoned_memory):
    """Memory that nobody fills, for tensors of gigabytes of which a test touches a few pages."""
    torch.utils.deterministic.fill_uninitialized_memory = False


@pytest.fixture
def folder():
    """A folder that whoever is not root may enter, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)
        yield pathlib.Path(made)


@pytest.fixture
def device():
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture
def ieee():
    """fp32 convolutions in fp32; PyTorch's own default is TF32."""
    settings = torch.backends.cudnn.conv, torch.backends.cudnn.rnn  # older readers want the two equal
    was = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    yield
    for setting, value in zip(settings, was, strict=True):
        setting.fp32_precision = value
