# The two commands: make demo, make test. Each sets up everything it needs in .venv.
PYTHON ?= python3
# The small CPU build of torch: make dev TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# AUTO builds the CUDA kernels where nvcc is found.
GENAI_PERF_CUDA ?= AUTO
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.dev-stamp
SOURCES := $(shell find csrc -type f)

.PHONY: bench bench-gpu browser demo test aot dev native sanitize fuzz check check-gptqmodel clean

demo: dev
	$(VENV)/bin/genaiperf demo

# Two workers, whose waiting threads sleep: each would spin on the other's core.
test: dev native
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2 --dist loadfile

# Every shipped Triton configuration, compiled for four chips without a GPU. TRITON=newest: by the
# newest release, in a folder of its own, and what differs from aot.json, if that was written before.
TRITON ?= pinned
AOT := -m genai_perf.testing.aot --jobs 2
NEWEST := build/triton-newest
aot: dev
ifeq ($(TRITON),newest)
	$(PY) -m pip install -q --no-deps --upgrade --target $(NEWEST) triton
	PYTHONPATH=$(NEWEST) $(PY) $(AOT) --out aot-newest.json \
	  $(if $(wildcard aot.json),--against aot.json)
else
	$(PY) $(AOT) --out aot.json
endif

# The headline cases of every op on the CPU, in less than 10 minutes, and their page.
bench: dev native
	$(PY) -m genai_perf.cli bench run all --quick --phase all --budget 5 --total 480 \
	  --out results/bench.json
	$(PY) -m genai_perf.cli report results/bench.json -o results/bench.html

# On a host with a GPU: the oracle on every op, then every case against every peer at hand, at most
# 9 minutes; run again, it goes on with the ops that are not done. make bench-gpu OUT=folder
bench-gpu: dev native
	$(PY) benchmarks/gpu.py $(or $(OUT),results/gpu)

# What the test of the results page looks with; without it that test is skipped.
browser:
	command -v chromium || apt-get install -y chromium

dev: $(STAMP)

# Build isolation is off so that the compiled objects in build/native are kept between builds.
$(STAMP): pyproject.toml setup.py constraints.txt CMakeLists.txt $(SOURCES)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip 'setuptools>=77' cmake ninja pybind11
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	PATH="$(abspath $(VENV)/bin):$$PATH" GENAI_PERF_CUDA=$(GENAI_PERF_CUDA) \
	  $(PIP) --no-build-isolation -e '.[dev]'
	touch $(STAMP)

CMAKE = $(PY) -m cmake -S . -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_MAKE_PROGRAM=$$($(PY) -c 'import ninja; print(ninja.BIN_DIR)')/ninja \
	  -DPython_EXECUTABLE=$(abspath $(PY)) -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir) \
	  -DGENAI_PERF_TESTS=ON

# The extension and the C++ tests, incrementally; the extension goes into genai_perf/.
native:
	@$(CMAKE) -B build/native -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/genai_perf \
	  -DGENAI_PERF_CUDA=$(GENAI_PERF_CUDA) > /dev/null
	$(PY) -m cmake --build build/native

# The native kernels under AddressSanitizer and UBSan: the C++ tests, then what every backend promises
# and attention's options in pairs, through Python. Leaks are not looked for: Python leaves many.
SANITIZED := build/sanitize/python
sanitize: dev
	@$(CMAKE) -B build/sanitize -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/$(SANITIZED) \
	  -DGENAI_PERF_CUDA=OFF -DGENAI_PERF_SANITIZE=ON > /dev/null
	$(PY) -m cmake --build build/sanitize
	for t in $$(find build/sanitize -maxdepth 1 -name 'test_*' -type f -executable); do \
	  ASAN_OPTIONS=detect_leaks=0 $$t || exit 1; done
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(PY) tests/sanitize.py $(SANITIZED) -x -p no:cacheprovider tests/test_conformance.py \
	  tests/ops/test_attention_pairs.py tests/ops/test_attention_direct.py \
	  tests/ops/test_decode_attention_direct.py tests/ops/test_quant_matmul_fixed.py \
	  tests/ops/test_quant_matmul_int8.py

# N random attention calls against the float64 oracle; a failure prints its case.
N ?= 200
SEED ?= 0
fuzz: dev native
	$(PY) tests/ops/attention_fuzz.py --n $(N) --seed $(SEED)

# GPTQModel's torch kernel reads our GPTQ files. It needs torch 2.14 or newer, so it has an
# environment of its own; its package has no wheel and builds with what is installed there.
GPTQMODEL := .venv-gptqmodel
check-gptqmodel: native
	test -x $(GPTQMODEL)/bin/python || $(PYTHON) -m venv $(GPTQMODEL)
	$(GPTQMODEL)/bin/python -m pip install -q 'torch>=2.14.1' numpy 'setuptools>=84.2.1,<85' wheel
	$(GPTQMODEL)/bin/python -m pip install -q --no-build-isolation gptqmodel==7.7.0
	PYTHONPATH=. $(GPTQMODEL)/bin/python tests/io/gptqmodel_reader.py

check:
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf build dist *.egg-info genai_perf/*.so
