# Each target does all of its own set-up in .venv: `make report` and `make test` work on a fresh machine with Python 3.10+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
OLDEST_TRITON := $(VENV)/triton-3.6.0
NEWEST_TRITON := $(VENV)/triton-3.9.0
# Of the numeric tests, those of two sizes of kernels: every algorithm has some of them in every pass.
NEWEST_SLICE := test_pass and (k3x3 or k9x9)
OLDEST_SLICE := test_pass and fp16 and (k3x3 or (k9x9 and (map or toeplitz)))
# Gluon is experimental: what it can do is tried with each version.
GLUON := tests/test_fragments.py
GLUON_SLICE := (numbers and (7x7 or stride or whole)) or silu

# What compiles kernels in its own process, and so cannot be where they are interpreted.
COMPILED := tests/softgpu tests/test_compiled_code.py tests/test_compiled_fuzz.py $(GLUON)
# What a change is tried with first: how calls are planned, differentiated, converted, packed.
SHORT := $(foreach name,problem devices planning configs package torch_private ops autograd modules,tests/test_$(name).py)
WHEELS := dist

.PHONY: report test test-full test-short test-compiled test-newest versions planted softgpu fuzz registers waits lint wheel hub gpu-test gpu ship clean
report: $(INSTALLED)
	$(BIN)/groupconv report $(ARGS)

test: $(INSTALLED) $(OLDEST_TRITON)
	GROUPCONV_OLDEST_TRITON=$(abspath $(OLDEST_TRITON)) $(BIN)/python -m pytest -n auto $(ARGS)
	$(if $(ARGS),,$(MAKE) test-compiled)

# Also every named problem by every algorithm.
test-full: $(INSTALLED) $(OLDEST_TRITON)
	GROUPCONV_OLDEST_TRITON=$(abspath $(OLDEST_TRITON)) $(BIN)/python -m pytest -n auto -m "full or not full" $(ARGS)
	$(if $(ARGS),,$(MAKE) test-compiled)

# Whether the tests see faults that are planted in a copy of the package.
planted: $(INSTALLED)
	$(BIN)/python tests/planted_faults.py $(ARGS)

test-short: $(INSTALLED)
	$(BIN)/python -m pytest -n auto $(SHORT) $(ARGS)

# Compiled kernels on a software GPU, and their machine code.
test-compiled: $(INSTALLED)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -n auto $(COMPILED) $(ARGS)

# A slice of the interpreter, and what is compiled, with the newest Triton that is supported; and less with the oldest,
# with which test_compile.py compiles, too.
test-newest: $(INSTALLED) $(NEWEST_TRITON) $(OLDEST_TRITON)
	PYTHONPATH=$(abspath $(NEWEST_TRITON)) $(BIN)/python -m pytest -n auto tests/test_numerics.py -k "$(NEWEST_SLICE)"
	PYTHONPATH=$(abspath $(NEWEST_TRITON)) $(BIN)/python -m pytest -n auto tests/test_compile.py -k "vectorised or wide"
	PYTHONPATH=$(abspath $(NEWEST_TRITON)) TRITON_INTERPRET=0 $(BIN)/python -m pytest -n auto tests/softgpu
	PYTHONPATH=$(abspath $(NEWEST_TRITON)) TRITON_INTERPRET=0 $(BIN)/python -m pytest -n auto $(GLUON) -k "$(GLUON_SLICE)"
	PYTHONPATH=$(abspath $(OLDEST_TRITON)) $(BIN)/python -m pytest -n auto tests/test_numerics.py -k "$(OLDEST_SLICE)"
	PYTHONPATH=$(abspath $(OLDEST_TRITON)) TRITON_INTERPRET=0 $(BIN)/python -m pytest -n auto $(GLUON) -k "$(GLUON_SLICE)"

# A slice with every version of torch and Triton that there is for CPUs: a line for each pair.
versions: $(INSTALLED)
	$(BIN)/python tests/versions.py $(ARGS)

# What tiles take of registers, compiled for SECONDS and then fitted: autotune_configs/registers.csv and .json. And what
# the model, which goes by them, is over and under what was measured.
registers: $(INSTALLED)
	$(BIN)/python -m groupconv.perf_reports.registers --seconds $(or $(SECONDS),0) $(ARGS)
	$(BIN)/python -m groupconv.perf_reports.calibration --write

# Every configuration that is planned for the suite, on the software GPU; run again, it goes on.
softgpu: $(INSTALLED)
	$(BIN)/python tests/compiled_code.py run $(ARGS)

# Random calls, passes, layers and compiled kernels for MINUTES, against float64; run again, it goes on with new ones.
fuzz: $(INSTALLED)
	$(BIN)/python tests/fuzz.py --minutes $(or $(MINUTES),10) $(ARGS)

# Whether machine code waits for products of warp groups more often than its PTX.
waits: $(INSTALLED)
	$(BIN)/python tests/compiled_code.py waits $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The only wheel in WHEELS, of nothing that an older build left, and what it holds.
wheel: $(INSTALLED)
	rm -rf build $(WHEELS)/groupconv-*.whl
	$(BIN)/python -m build --wheel --outdir $(WHEELS)
	$(BIN)/python .ci/inspect_wheel.py $(WHEELS)

# The same kernels for Hugging Face's Hub: kernel-builder's project, and what it makes of that, in dist/hub.
hub: $(INSTALLED)
	$(BIN)/python hub/build.py $(ARGS)

gpu-test: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu $(ARGS)

# All that needs a GPU, in OUT, within BUDGET seconds; run again, it goes on. Where all is installed: INSTALLED= BIN=...
gpu: $(INSTALLED)
	$(BIN)/python3 -m groupconv.perf_reports.gpu_run --out $(OUT) $(if $(BUDGET),--budget-seconds $(BUDGET)) $(ARGS)

# What a GPU's folder OUT holds, as the project's own: configurations, CSV files, plots.
ship: $(INSTALLED)
	$(BIN)/python -m groupconv.perf_reports.gpu_run ship $(OUT)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The oldest and the newest Triton that are supported, beside the pinned one: found through PYTHONPATH. The oldest
# interprets kernels with older versions of NumPy only.
$(OLDEST_TRITON) $(NEWEST_TRITON): $(INSTALLED)
	$(PIP) install --quiet --no-deps --upgrade --target $@ triton==$(subst $(VENV)/triton-,,$@) \
		$(if $(filter $(OLDEST_TRITON),$@),"numpy<2.4")
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
