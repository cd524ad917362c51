# make demo   trains, slims and evaluates on real handwritten digits; the report is runs/demo/report.html
# make test   the whole test suite
# Both make their own virtual environment first. VENV=DIR takes another one, PYTHON=... makes it with another Python.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?= --quiet --disable-pip-version-check
RUN ?= runs/demo

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help venv demo test lint clean

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev,digits]'
	touch $@

# Threads that wait without spinning train several times faster where other programs run too. Exit code 4 is a
# measurement that such load has made inconclusive: the report says so.
demo: venv
	OMP_WAIT_POLICY=passive $(BIN)/prune-onnx run examples/demo.toml -o $(RUN) || test $$? -eq 4

test: venv
	@$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) .venv-ci build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
