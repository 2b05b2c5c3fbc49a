# make run | test | lab | student | bench | readme | site | clean: each does all the set-up that it
# needs, from a bare Python. Variables: PROFILE=smoke|cpu|gpu, ARGS="--only 04" (more for the command
# behind run, student, bench, test), OUT=dir (student), WORKERS=n (test), PYTHON=path, VENV=dir

VENV = .venv
PROFILE = cpu
ARGS =
OUT = runs/workshop
WORKERS = 2
PYTHON =
BIN = $(VENV)/bin
STAMP = $(VENV)/steerkit-installed
EXTRAS = notebooks,gatt,test
FIRST = /lab/tree/notebooks/00_start_here.ipynb

.PHONY: run test lab student bench readme site venv clean

run: $(STAMP)
	$(BIN)/python -m steerkit run --profile $(PROFILE) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lab: $(STAMP)
	$(BIN)/python -m jupyter lab --ServerApp.root_dir=. --LabApp.default_url=$(FIRST)

student: $(STAMP)
	$(BIN)/python -m steerkit student $(OUT) $(ARGS)

readme: $(STAMP)
	$(BIN)/python docs/readme.py

site: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[site]"
	$(BIN)/python docs/site/build.py

bench: $(STAMP)
	$(BIN)/python benchmarks/collect.py $(ARGS)

venv: $(STAMP)

# The stamp is written last, so an install that was interrupted starts again; .venv itself is made
# only if it has no working pip.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    probe='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'; \
	    for python in $(PYTHON) python3.13 python3.12 python3.11 python3 python none; do \
	        if "$$python" -c "$$probe" >/dev/null 2>&1; then break; fi; \
	    done; \
	    if [ "$$python" = none ]; then \
	        echo "No Python 3.11, 3.12 or 3.13 with the venv module on the PATH." >&2; \
	        echo "Install one (Debian, Ubuntu: apt install python3-venv; macOS: brew install" >&2; \
	        echo "python@3.12; any: https://www.python.org/downloads), or name it:" >&2; \
	        echo "make run PYTHON=/path/to/python3.12" >&2; \
	        exit 1; \
	    fi; \
	    echo "Making $(VENV) with $$python"; \
	    "$$python" -m venv --clear $(VENV) || exit 1; \
	fi
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) runs build dist *.egg-info .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
