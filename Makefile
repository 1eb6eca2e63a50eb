# Everything a new machine needs: `make demo` and `make test` set up their own environment in .venv and reuse it.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SEED   ?= 0

.PHONY: demo demo-emoji test lint clean help

help:
	@echo "make demo        train a small MM-DiT on captioned shapes, score it, draw it (about 8 minutes on 2 CPU cores)"
	@echo "make demo-emoji  the same path on OpenMoji with a pretrained text encoder (about 45 minutes on 2 CPU cores)"
	@echo "make test        run the tests"
	@echo "make lint        ruff, mypy, and the compiler's report on the kernels"
	@echo "make clean       remove what the demos made"

# One stamp per set of extras; a changed pyproject.toml installs again.
$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[$(subst +,$(comma),$*)]"
	touch $@
comma := ,

demo: $(VENV)/.installed-train
	$(BIN)/python -m train precompute --source shapes --cache cache/shapes
	$(BIN)/python -m train run shapes --run runs/shapes-$(SEED) --seed $(SEED)
	$(BIN)/python -m train score runs/shapes-$(SEED)

demo-emoji: $(VENV)/.installed-train+emoji+minilm
	$(BIN)/python -m train precompute --source openmoji --cache cache/openmoji --sizes 32 32 --encoders minilm
	$(BIN)/python -m train run openmoji --run runs/openmoji-$(SEED) --seed $(SEED)

test: $(VENV)/.installed-dev+train+emoji+minilm
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev+train+emoji+minilm
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m rfkernels.inspect --check --targets sm_80 sm_90 sm_100

clean:
	rm -rf runs cache
