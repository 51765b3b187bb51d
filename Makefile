# Two commands matter: `make serve` and `make test`. Everything installs itself into .venv.
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
EXTRAS  := test,accuracy,benchmarks,dev
STAMP   := $(VENV)/.installed
MODEL   := sglang_minimax/assets/tiny-m2
HOST    ?= 127.0.0.1
PORT    ?= 30000

.PHONY: serve demo test test-all validate accuracy lint install clean help

help:
	@echo "make serve     a MiniMax-M2 server on http://$(HOST):$(PORT) (PORT=... to change)"
	@echo "make demo      start a server, ask two questions, stop it"
	@echo "make test      all tests of a CPU-only machine"
	@echo "make test-all  make test, the slow tests, then the shapes again with the trained tiny-m2"
	@echo "make validate  every topology of ci/topologies.yaml against transformers"
	@echo "make accuracy  answers of every topology, with drafts, in bf16, with planted mistakes"
	@echo "make lint      ruff and mypy"

# The version check is first: a venv made by an old Python would only fail later.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sglang-minimax needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing SGLang and sglang-minimax into $(VENV), once (about 11 GB, some minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@

install: $(STAMP)

serve: $(STAMP)
	@exec $(BIN)/sglang-minimax serve --host $(HOST) --port $(PORT) $(ARGS)

demo: $(STAMP)
	@exec $(BIN)/sglang-minimax demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(STAMP) lint
	$(BIN)/python -m pytest

validate: $(STAMP)
	$(BIN)/sglang-minimax validate $(ARGS)

# Goes on where it was stopped; ARGS=--fresh begins again.
accuracy: $(STAMP)
	$(BIN)/python -m benchmarks.bench_accuracy $(ARGS)

# Sure of its answers and far from random, the trained model weighs errors differently.
test-all: test
	$(BIN)/python -m pytest -m slow
	$(BIN)/sglang-minimax validate --checkpoint $(MODEL)

clean:
	rm -rf $(VENV) build *.egg-info
