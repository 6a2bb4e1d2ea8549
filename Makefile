# Every verb sets up what it needs (a virtual environment in .venv), then does it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip's options for versions; test-newest has its own
VERSIONS := -c constraints.txt
# options of the command behind a verb: make train ARGS="--preset glyphs-5w5s --run.seed 1"
ARGS ?=

.PHONY: help setup train test test-all test-newest test-sanitize lint precision compare compare-precisions roofline bench bench-algorithms bench-full bench-report bench-compare
.PHONY: bench-operators bench-peers contact-sheet clean

help:
	@echo "make train            meta-train CxGrad on glyphs, test it (ARGS=\"--inner.algorithm maml\" for MAML)"
	@echo "make test             the tests that are quick;  make test-all: all of them;  make lint: ruff and mypy"
	@echo "make test-newest      all tests with pip's newest torch, triton and numpy, in .venv-newest"
	@echo "make test-sanitize    the operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make compare          the README's table: CxGrad and MAML, 1 and 5 shots"
	@echo "make precision        errors of dL/dnu and dL/dw in every precision, against float64"
	@echo "make compare-precisions  the README's table of accuracies in every precision, an hour"
	@echo "make roofline         FLOPs, least bytes and time floor of a meta-step on this machine"
	@echo "make bench            episodes per second of every algorithm against its per-task loop, and other programs, 28x28"
	@echo "make bench-algorithms every algorithm against its loop at 84x84, 5-way 5-shot"
	@echo "make bench-full       CxGrad and MAML against other programs at 84x84;  make bench-peers: install these"
	@echo "make bench-report     the README's speed table and docs/bench/, from bench/results/"
	@echo "make bench-compare    two commits against each other: ARGS=\"BASE HEAD\""
	@echo "make bench-operators  time of every operator, small cases"
	@echo "make contact-sheet    docs/contact_sheet.png"

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(VERSIONS) setuptools
	$(BIN)/python -m pip install -q $(VERSIONS) --no-build-isolation -e '.[test]'
	touch $@

train: setup
	$(BIN)/python -m cxgrad_fast.train --compile $(ARGS)

# a process a core, each with one thread: two threads each would wait for each other; files in the order of conftest.py
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
test: setup
	$(PYTEST) -m "not slow" $(ARGS)

test-all: setup
	$(PYTEST) $(ARGS)

# Versions are looked up at every call. PIP_CONSTRAINT: pip's configuration may cap them too, and takes no empty value.
NEWEST := VENV=.venv-newest VERSIONS="--upgrade --upgrade-strategy eager"
test-newest:
	rm -f .venv-newest/installed
	PIP_CONSTRAINT=/dev/null $(MAKE) setup $(NEWEST)
	.venv-newest/bin/python -m cxgrad_fast.info
	$(MAKE) test-all $(NEWEST)

# The runtimes come first in the process, which python itself was not built with; what it leaks is not ours to find.
SANITIZE := CXGRAD_SANITIZE=address,undefined
RUNTIMES = $(foreach name,asan ubsan,$(shell $${CXX:-g++} -print-file-name=lib$(name).so))
test-sanitize: setup
	$(SANITIZE) $(BIN)/python -c "from cxgrad_fast.kernels import building; print(building.library())"
	$(SANITIZE) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD="$(RUNTIMES)" \
	    $(BIN)/python -m pytest tests/test_registration.py tests/test_scale_weights.py tests/test_patch_statistics.py \
	    tests/test_conv_block.py tests/test_conv_block_cpp.py tests/test_residual_end.py tests/test_residual_end_cpp.py \
	    tests/test_scaling_factors.py tests/test_recompute.py tests/test_tiles.py \
	    tests/test_linear_cross_entropy.py tests/test_linear_cross_entropy_cpp.py \
	    -k "not opcheck and not gradcheck and not traced and not compiled" $(ARGS)

# mypy sees the package as it is installed: a tree of links with kernels/ in its place
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types
	cp -rs $(CURDIR)/cxgrad_fast build/types/ && cp -rs $(CURDIR)/kernels build/types/cxgrad_fast/kernels
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml cxgrad_fast

compare: setup
	$(BIN)/python bench/compare_algorithms.py $(ARGS)

compare-precisions: setup
	$(BIN)/python bench/compare_precisions.py $(ARGS)

precision: setup
	$(BIN)/python bench/context_gradient.py $(ARGS)

roofline: setup
	$(BIN)/python bench/roofline.py $(ARGS)

# every algorithm against its loop (a preset that is added is measured), then other programs where they know the algorithm
OURS_AND_LOOP := --sides ours-cpp-compiled,loop --rounds 5
bench: setup
	$(BIN)/python bench/episodes.py --preset 'glyphs*-5w1s,glyphs*-5w5s' $(OURS_AND_LOOP) --turn 1 --limit 60 $(ARGS)
	$(BIN)/python bench/episodes.py --preset glyphs-5w1s,glyphs-maml-5w1s,glyphs-anil-5w1s,glyphs-mamlpp-5w1s \
	    --rounds 5 --turn 1 --limit 30 $(ARGS)

# every algorithm as it was released, two tasks of it
bench-algorithms: setup
	$(BIN)/python bench/episodes.py --preset 'released*-mini-5w5s' --outer.meta_batch 2 $(OURS_AND_LOOP) --limit 600 $(ARGS)

OF_MAML := ours-reference,ours-cpp,ours-cpp-compiled,loop,higher,learn2learn,parallel-metalearn
bench-full: setup
	$(BIN)/python bench/episodes.py --preset released-mini-5w1s,released-mini-5w5s --outer.meta_batch 2 --limit 900 $(ARGS)
	$(BIN)/python bench/episodes.py --preset released-maml-mini-5w1s,released-maml-mini-5w5s --outer.meta_batch 2 \
	    --limit 300 --sides $(OF_MAML) $(ARGS)

bench-report: setup
	$(BIN)/python bench/report.py $(ARGS)

bench-compare: setup
	$(BIN)/python bench/compare.py $(ARGS)

bench-peers: setup
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[peers]'

bench-operators: setup
	$(BIN)/python -m pytest bench/test_operators.py -k quick $(ARGS)

contact-sheet: setup
	$(BIN)/python bench/contact_sheet.py

clean:
	rm -rf .venv .venv-newest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
