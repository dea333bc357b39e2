# The two commands: make demo, make test. Each sets up everything it needs in .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# A stamp newer than what decides the set-up; C++ changes rebuild through `make native`.
STAMP := $(VENV)/.dev-stamp
NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt

.PHONY: demo test dev native check bench clean

demo: dev
	$(VENV)/bin/genaiperf demo

test: dev
	$(PY) -m pytest

dev: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(NATIVE_SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt --upgrade pip setuptools wheel
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# The extension alone, incrementally, into genai_perf/.
native:
	$(PY) -m cmake -S . -B build/native -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_MAKE_PROGRAM=$$($(PY) -c 'import ninja; print(ninja.BIN_DIR)')/ninja \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/genai_perf -DPython_EXECUTABLE=$(abspath $(PY)) \
	  -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir) -DGENAI_PERF_TESTS=ON >/dev/null
	$(PY) -m cmake --build build/native

check:
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf build dist *.egg-info genai_perf/*.so
