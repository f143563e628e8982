# report: the demo report in runs/demo · test: all tests but the long ones · test-all: all tests
# lint: check the style · format: fix the style · screenshot: pictures of the product, from runs/demo
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready

.PHONY: report lint format test test-all lab site screenshot clean
export PYTHONWARNINGS ?= ignore::DeprecationWarning

report: $(READY)
	$(BIN)/widedeep run --dataset demo --out runs/demo

lint: $(READY)
	$(BIN)/ruff check nbs tests tools templates index.ipynb
	$(BIN)/ruff format --check nbs tests tools templates index.ipynb

# in this order: ruff formats cells, nbdev_export writes the modules, the drawing follows their imports,
# nbdev_clean removes metadata that differs between runs
format: $(READY)
	$(BIN)/ruff check --fix nbs tests tools templates index.ipynb
	$(BIN)/ruff format nbs tests tools templates index.ipynb
	$(BIN)/nbdev_export
	$(BIN)/python tools/draw_architecture.py
	$(BIN)/nbdev_clean

# two workers with one thread each: more threads would wait for each other, which takes six times as long;
# tests that send signals (test_run.py) run alone, and the longest file, test_report.py, starts first
test test-all: export LOKY_MAX_CPU_COUNT = 1
# the chapters share tiny runs in a temporary folder
NOTEBOOKS = tiny=$$(mktemp -d) && trap 'rm -rf "$$tiny"' EXIT && WIDEDEEP_TINY="$$tiny" OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
REST = tests/test_report.py $(filter-out tests/test_report.py tests/test_run.py, $(wildcard tests/test_*.py))
test: lint
	$(NOTEBOOKS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long" $(REST)
	$(BIN)/python -m pytest -m "not long" tests/test_run.py

test-all: lint
	$(NOTEBOOKS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(REST)
	$(BIN)/python -m pytest tests/test_run.py

lab: $(READY)
	$(BIN)/jupyter lab nbs

site:
	@if command -v quarto >/dev/null; then PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH="$(CURDIR)" quarto render; \
	else echo "make site needs Quarto: pip install quarto-cli, or see quarto.org/docs/get-started" >&2; exit 2; fi

screenshot: $(READY)
	@test -e runs/demo/index.html || $(MAKE) report
	$(BIN)/python tests/screenshot.py runs/demo

clean:
	rm -rf $(VENV) _docs _proc .quarto build dist *.egg-info .pytest_cache .hypothesis

# torch is installed first, so that no other package installs another build of it
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"widedeep_nb needs Python 3.11 or newer, this is {v[0]}.{v[1]}: make PYTHON=python3.11" if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
