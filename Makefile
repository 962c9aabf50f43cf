# Each target does all of its own set-up in .venv: `make report` and `make test` work on a fresh machine with Python 3.10+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
OLDEST_TRITON := $(VENV)/triton-3.6.0

.PHONY: report test lint gpu-test gpu ship clean
report: $(INSTALLED)
	$(BIN)/groupconv report $(ARGS)

test: $(INSTALLED) $(OLDEST_TRITON)
	GROUPCONV_OLDEST_TRITON=$(abspath $(OLDEST_TRITON)) $(BIN)/python -m pytest -n auto $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-test: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu $(ARGS)

# All that needs a GPU, in OUT, within BUDGET seconds; run again, it goes on. Where all is installed: INSTALLED= BIN=...
gpu: $(INSTALLED)
	$(BIN)/python3 -m groupconv.perf_reports.gpu --out $(OUT) $(if $(BUDGET),--budget-seconds $(BUDGET)) $(ARGS)

# What a GPU's folder OUT holds, as the project's own: configurations, CSV files, plots.
ship: $(INSTALLED)
	$(BIN)/python -m groupconv.perf_reports.ship $(OUT)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The oldest Triton that is supported, beside the pinned one: only the compile checks use it, through PYTHONPATH.
$(OLDEST_TRITON): $(INSTALLED)
	$(PIP) install --quiet --no-deps --upgrade --target $@ triton==3.6.0
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
