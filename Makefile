# Everything a new machine needs: `make demo` and `make test` set up their own environment in .venv and reuse it.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SEED   ?= 0

.PHONY: demo demo-tune demo-emoji test test-all test-slow test-oldest oldest-tests oldest-inspect sanitize \
	sanitize-attention sanitize-rows gpu-pretend pretend-first pretend-second pretend-third hub docs docs-serve lint clean help

help:
	@echo "make demo        train a small MM-DiT on captioned shapes, score it, draw it (3 to 5 minutes on 2 CPU cores)"
	@echo "make demo-emoji  the same path on OpenMoji with a pretrained text encoder (about 22 minutes on 2 CPU cores)"
	@echo "make demo-tune   fine-tune the demo's model: a new word, a preference, editing"
	@echo "make test        run the tests, but for the slow ones"
	@echo "make test-all    run all tests (tests/README.md lists the slow ones)"
	@echo "make test-oldest run kernels, compiled blocks and checkpoints with the oldest supported PyTorch and Triton"
	@echo "make gpu-pretend try the script for a machine with a GPU on this CPU (about 4 minutes)"
	@echo "make sanitize    run the kernels' tests with every memory access checked"
	@echo "make lint        ruff, mypy, and the compiler's report on the kernels"
	@echo "make docs        build the documentation site into docs/site/built; make docs-serve shows it"
	@echo "make hub         write the ops as a kernel that Hugging Face's package kernels loads"
	@echo "make clean       remove what the demos made"

# One stamp per set of extras; a changed pyproject.toml installs again.
$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[$(subst +,$(comma),$*)]"
	touch $@
comma := ,

# Two jobs, unless whoever called make has said how many there are.
JOBS = $(if $(findstring jobserver,$(MAKEFLAGS)),,-j 2)

# The native code makes ops faster; without a compiler everything runs without it, and this says what is missing.
BUILD = $(BIN)/python -m rfkernels.build || true

demo: $(VENV)/.installed-train
	$(BUILD)
	$(BIN)/python -m train precompute --source shapes --cache cache/shapes
	$(BIN)/python -m train run shapes --run runs/shapes-$(SEED) --seed $(SEED) --minutes None --steps 2500
	$(BIN)/python -m train score runs/shapes-$(SEED)

# The demo's model fine-tuned: a new word from 20 pictures as a LoRA, clean edges preferred to ragged ones (DPO), editing.
demo-tune: demo
	$(BIN)/python -m train precompute --source new-colour --cache cache/new-colour
	$(BIN)/python -m train run shapes-word --run runs/word-$(SEED) --initial runs/shapes-$(SEED)/model.safetensors
	$(BIN)/python -m train score runs/word-$(SEED)
	$(BIN)/python -m train pairs runs/shapes-$(SEED) --out data/edges-$(SEED)
	$(BIN)/python -m train precompute --source data/edges-$(SEED) --cache cache/edges-$(SEED)
	$(BIN)/python -m train run shapes-preference --cache cache/edges-$(SEED) --run runs/preference-$(SEED) --initial runs/shapes-$(SEED)/model.safetensors
	$(BIN)/python -m train score runs/preference-$(SEED)
	$(BIN)/python -m train precompute --source shapes-edits --cache cache/shapes-edits
	$(BIN)/python -m train run shapes-edit --run runs/edit-$(SEED) --initial runs/shapes-$(SEED)/model.safetensors
	$(BIN)/python -m train score runs/edit-$(SEED)

demo-emoji: $(VENV)/.installed-train+emoji+minilm
	$(BUILD)
	$(BIN)/python -m train precompute --source openmoji --cache cache/openmoji --sizes 32 32 --encoders minilm
	$(BIN)/python -m train run openmoji --run runs/openmoji-$(SEED) --seed $(SEED)
	$(BIN)/python -m train score runs/openmoji-$(SEED)

# As many workers as cores, each with one thread. Of the kernels' tests each value of each parameter once; the rest of their
# product, `product`, is left to the sanitizer, and of the files that it does not run, to the slow tests.
SANITIZED := $(addprefix tests/rfkernels/test_,adaln_kernels.py drop_in.py flow_kernels.py gelu_mlp.py joint_attention_kernels.py \
	optim.py patch_kernels.py qk_norm.py)
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
# Workers for slow tests, which wait for processes half of their time.
WAITING = $(shell n=$$((3 * $$(nproc) / 2)); echo $$((n < 8 ? n : 8)))

test: $(VENV)/.installed-dev+train+emoji+minilm
	$(BUILD)
	$(PYTEST) -m "not slow and not product"

test-all: $(VENV)/.installed-dev+train+emoji+minilm
	$(BUILD)
	$(PYTEST)

test-slow: $(VENV)/.installed-dev+train+emoji+minilm
	$(BUILD)
	$(PYTEST) -n $(WAITING) -m "slow or product" $(SANITIZED:%=--ignore=%)

# The lower bounds in pyproject.toml, as a machine with nothing else has them: no diffusers. Of the kernels' tests each value
# of each parameter once.
OLDEST       := .venv-oldest
OLDEST_TESTS := $(addprefix tests/rfkernels/test_,adaln_kernels.py flow_kernels.py gelu_mlp.py joint_attention_kernels.py \
	joint_attention_operator.py patch_kernels.py qk_norm.py inspect.py native.py launcher.py join.py low_rank_mlp.py optim.py \
	sanitize.py::test_planted_faults_are_named_and_nothing_else) \
	tests/train/test_adapters.py::test_in_bf16_the_base_is_stored_in_bf16_and_adapters_in_fp32 \
	tests/mmdit/test_graphs.py tests/train/test_run.py \
	tests/train/test_parallel.py::test_blocks_are_compiled_whole_whatever_is_computed_again \
	tests/bench/test_bench.py::test_a_compiled_model_trains_where_warnings_are_errors

$(OLDEST)/.installed: pyproject.toml
	test -x $(OLDEST)/bin/pip || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check "torch==2.11.0" "triton==3.6.0" --editable ".[oldest,train]"
	touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m rfkernels.build || true
	$(OLDEST)/bin/python -m pytest --collect-only -qq tests/rfkernels >/dev/null            # nothing stops for diffusers
	$(MAKE) $(JOBS) oldest-tests oldest-inspect

oldest-tests:
	$(OLDEST)/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m "not slow and not product" $(OLDEST_TESTS)

oldest-inspect:
	$(OLDEST)/bin/python -m rfkernels.inspect --check --targets sm_90 > $(OLDEST)/inspect.txt || (grep FAIL $(OLDEST)/inspect.txt; false)

# Each call's parts run one after the other, so two calls share two cores. In the first one part is made to hang: its
# deadline ends it, the call fails and says so, and the archive is there all the same.
PRETEND := .venv-oldest/pretend
gpu-pretend: $(OLDEST)/.installed
	rm -rf $(PRETEND)
	$(OLDEST)/bin/python -m rfkernels.build || true
	$(MAKE) $(JOBS) pretend-first pretend-second pretend-third
	test $$(find $(PRETEND) -name '*.tgz' -size -16M | wc -l) = 3

pretend-first:
	! PYTHON=$(OLDEST)/bin/python bench/gpu.sh first --pretend --out $(PRETEND) --hang profile

pretend-second pretend-third: pretend-%:
	PYTHON=$(OLDEST)/bin/python bench/gpu.sh $* --pretend --out $(PRETEND)

# Two at a time, each on one core.
ATTENTION := tests/rfkernels/test_joint_attention_kernels.py
sanitize: $(VENV)/.installed-dev+train+emoji+minilm
	$(MAKE) $(JOBS) sanitize-attention sanitize-rows

sanitize-attention:
	$(BIN)/python -m rfkernels.sanitize -m pytest -p no:cacheprovider $(ATTENTION)

sanitize-rows:
	$(BIN)/python -m rfkernels.sanitize -m pytest -p no:cacheprovider $(filter-out $(ATTENTION),$(SANITIZED))

# The ops as a kernel that Hugging Face's package `kernels` loads, into the folder hub: upload that.
hub: $(VENV)/.installed-dev+train+emoji+minilm
	$(BIN)/python -m rfkernels.hub hub

# The documentation site, into docs/site/built; a link or anchor that leads nowhere fails it.
SITE := cd docs/site && NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true PYTHONPATH=$(CURDIR) $(abspath $(BIN))/python -W ignore -m mkdocs
docs: $(VENV)/.installed-dev+train+emoji+minilm
	$(SITE) build --strict --quiet

docs-serve: $(VENV)/.installed-dev+train+emoji+minilm
	$(SITE) serve

lint: $(VENV)/.installed-dev+train+emoji+minilm
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) $(JOBS) $(addprefix inspect-,sm_80 sm_90 sm_100)

# Each compiles on one core.
inspect-%:
	$(BIN)/python -m rfkernels.inspect --check --targets $* > $(VENV)/inspect-$*.txt || (grep FAIL $(VENV)/inspect-$*.txt; false)

clean:
	rm -rf runs cache
