# make demo: see it work.  make test: run the tests.  make bench: measure it against others.
# make bench-gpu-PART: one of the parts of benchmarks/gpu.sh, such as tests, on a GPU.
# make compile-report: what compilers make of the kernels, for five GPUs, without one.
# make rehearse-gpu: kernels' tests as on a GPU, all but the computing, without one.
# make sanitize, fuzz, fuzz-call, cross: try to break the tokenizer.
PYTHON ?= python3
RUN := .venv/bin/python -P
# By the environment, which also holds what builds seqeval's source to these versions.
INSTALL := PIP_CONSTRAINT=$(CURDIR)/requirements/dev.txt .venv/bin/pip install --quiet --disable-pip-version-check

demo: .venv/installed-demo
	HF_HUB_OFFLINE=1 $(RUN) benchmarks/demo.py

test: .venv/installed-test
	.venv/bin/pytest

# With a GPU that first, then the CPU as if there was none.
HAS_GPU := $(RUN) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"
bench: .venv/installed-bench
	if $(HAS_GPU); then PYTHON=.venv/bin/python benchmarks/gpu.sh; fi
	CUDA_VISIBLE_DEVICES= .venv/bin/pytest benchmarks --benchmark-json=.benchmarks/run.json
	CUDA_VISIBLE_DEVICES= .venv/bin/python benchmarks/report.py .benchmarks/run.json

bench-gpu-%: .venv/installed-bench
	PYTHON=.venv/bin/python benchmarks/gpu.sh $*

lint: .venv/installed-test .venv/installed-lint
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h tests/fuzz/*.cpp tests/fuzz/*.h)

CHIPS ?= sm_80 sm_89 sm_90 sm_100 gfx942
compile-report: .venv/installed-test
	$(RUN) benchmarks/compile_report.py --chips $(CHIPS)

rehearse-gpu: .venv/installed-test
	PYTHONPATH=tests/support $(RUN) -m pytest -q -p compiling_gpu tests/kernels

# Everything of the project that an installation copies or compiles.
SOURCES := pyproject.toml setup.py requirements/dev.txt $(wildcard csrc/*.cpp csrc/*.h)

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed-%: .venv/bin/python $(SOURCES)
	$(INSTALL) -e .[$*]
	touch $@

# The C++ core alone, built to be checked. Arrow's reader is by itself.
CORE = $(filter-out csrc/bindings.cpp,$(wildcard csrc/*.cpp))
%/arrow: CORE = csrc/arrow.cpp
BUILD = mkdir -p $(@D) && $(COMPILER) -std=c++17 -pthread -g -O1 -Wall -Wextra -Icsrc $(FLAGS) \
	$(filter tests/%.cpp,$^) $(CORE) -o $@
CHECKS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
CORPUS := tests/fuzz/corpus

# The corpus under AddressSanitizer and UndefinedBehaviorSanitizer, threads under ThreadSanitizer.
sanitize: build/sanitize/tokenizer build/sanitize/arrow build/sanitize/threads
	build/sanitize/tokenizer $(CORPUS)/tokenizer
	build/sanitize/arrow $(CORPUS)/arrow
	build/sanitize/threads

build/sanitize/%: COMPILER = $(CXX)
build/sanitize/%: FLAGS = $(CHECKS)
build/sanitize/threads: FLAGS = -fsanitize=thread
build/sanitize/threads: tests/fuzz/threads.cpp $(SOURCES) tests/fuzz/small.h
	$(BUILD)
build/sanitize/%: tests/fuzz/fuzz_%.cpp tests/fuzz/replay.cpp $(SOURCES) tests/fuzz/small.h
	$(BUILD)

# What is found is in build/fuzz.
FUZZ_SECONDS ?= 600
fuzz: build/fuzz/tokenizer build/fuzz/arrow
	mkdir -p build/fuzz/found/arrow build/fuzz/found/tokenizer
	build/fuzz/arrow -max_total_time=$$(($(FUZZ_SECONDS) / 10)) -max_len=512 \
		-artifact_prefix=build/fuzz/arrow- build/fuzz/found/arrow $(CORPUS)/arrow
	build/fuzz/tokenizer -max_total_time=$(FUZZ_SECONDS) -max_len=1024 \
		-artifact_prefix=build/fuzz/tokenizer- build/fuzz/found/tokenizer $(CORPUS)/tokenizer

build/fuzz/%: COMPILER = clang++
build/fuzz/%: FLAGS = $(CHECKS) -fsanitize=fuzzer -fno-sanitize-coverage=trace-cmp
build/fuzz/%: tests/fuzz/fuzz_%.cpp $(SOURCES) tests/fuzz/small.h
	@command -v clang++ > /dev/null || { echo "make fuzz needs clang++, for libFuzzer"; exit 1; }
	$(BUILD)

# The whole call against transformers, by atheris.
fuzz-call: .venv/installed-test
	.venv/bin/pip install --quiet atheris
	$(RUN) tests/fuzz/fuzz_call.py -max_total_time=$(FUZZ_SECONDS)

# For ARM; the corpus too, where it can be emulated.
cross: build/cross/tokenizer
	if command -v qemu-aarch64-static; then \
		qemu-aarch64-static build/cross/tokenizer $(CORPUS)/tokenizer; fi

build/cross/%: COMPILER = aarch64-linux-gnu-g++
build/cross/%: FLAGS = -static
build/cross/%: tests/fuzz/fuzz_%.cpp tests/fuzz/replay.cpp $(SOURCES) tests/fuzz/small.h
	$(BUILD)

clean:
	rm -rf .venv .benchmarks build dist *.egg-info fastbert/*.so

.PHONY: demo test bench lint compile-report sanitize fuzz fuzz-call cross clean
