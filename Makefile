# `make demo` trains the embedded tiny model; `make test` runs every check. Both make their own environment.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: demo test check proofs clean

demo: .make/local
	$(BIN)/retrain demo

test: .make/dev
	$(BIN)/ruff check src tests scripts benches
	$(BIN)/lint-imports
	$(BIN)/basedpyright
	$(BIN)/pytest -n auto --dist loadscope

check: .make/dev
	$(BIN)/ruff check src tests scripts benches && $(BIN)/lint-imports && $(BIN)/basedpyright

proofs: .make/dev
	$(BIN)/python scripts/proofs.py

# torch goes first and pinned: an open range can pull gigabytes of CUDA packages onto a machine without a GPU.
.make/torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "retrain needs Python 3.11 or newer on PATH"; exit 2; }
	@mkdir -p .make
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@touch $@

.make/local: .make/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[local]"
	@touch $@

.make/dev: .make/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@ .make/local

clean:
	rm -rf $(VENV) .make
