# Every target sets up what it needs: a virtual environment in .venv with the pinned versions of constraints.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/pip --quiet --disable-pip-version-check
# The oldest transformers that we support, beside the newest in the environment itself.
OLDEST := $(VENV)/transformers-5.17.0
VLLM   := .venv-vllm
SGLANG := .venv-sglang
# The newest of everything, in an environment that goes afterwards.
NEWEST := .venv-newest
# Two processes; threads that wait don't keep a core busy.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: run environments test test-avx2 test-oldest test-newest test-vllm vllm-minors test-sglang test-gpu check-arch sglang fuzz bench check clean

run: $(READY)
	$(BIN)/zemoe generate

# Everything that `test` needs, side by side with `make --jobs 2 environments`.
environments: $(READY) $(OLDEST) $(VLLM)/.ready

test: $(READY) check-arch test-avx2 test-oldest test-vllm
	$(PYTEST)

test-oldest: $(READY) $(OLDEST)
	PYTHONPATH=$(OLDEST) $(PYTEST) tests/integrations/transformers tests/checkpoints tests/test_retrofit.py

# By hand for each issue: the newest transformers, triton and numba beside the torch of constraints.txt, then the newest
# torch, with the triton that it pins; its build is CUDA's, some gigabytes. What is newer than zemoe/versions.py says fails
# test_versions.py: then look, and move the table. TESTS=... takes other tests.
TESTS :=
test-newest:
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip --quiet --disable-pip-version-check install $(shell grep '^torch==' constraints.txt)
	$(NEWEST)/bin/pip --quiet --disable-pip-version-check install --upgrade --upgrade-strategy eager \
		$(shell grep '^torch==' constraints.txt) --editable '.[dev]'
	$(NEWEST)/bin/pip freeze --disable-pip-version-check | grep -iE '^(torch|transformers|triton|numba|numpy)=='
	$(subst $(BIN),$(NEWEST)/bin,$(PYTEST)) $(TESTS)
	$(NEWEST)/bin/pip --quiet --disable-pip-version-check install --upgrade torch
	$(NEWEST)/bin/pip freeze --disable-pip-version-check | grep -iE '^(torch|transformers|triton|numba|numpy)=='
	$(subst $(BIN),$(NEWEST)/bin,$(PYTEST)) $(TESTS)
	rm -rf $(NEWEST)

# Training and the CPU's kernels once more, with torch, MKL, oneDNN and numba kept to AVX2: what only such a machine shows.
AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \
	NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma,+f16c
AVX2_TESTS := training/test_run.py training/test_ways.py kernels/cpu kernels/test_topk.py ops/test_operators.py \
	test_bits.py test_experts.py test_autocast.py test_compile.py
test-avx2: $(READY)
	@if grep --quiet avx512f /proc/cpuinfo; then \
		$(AVX2) $(PYTEST) $(AVX2_TESTS:%=tests/%); \
	else echo "test-avx2: this CPU has no AVX-512, so the other tests ran with what it has"; fi

# vLLM for CPUs pins other versions than ours, so it has an environment of its own. Its compiled code needs a C++ compiler.
test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest tests/integrations/vllm

# Reads vLLM's wheels, of each minor version that docs/vllm.md names, without installing them.
MINORS := 0.26.0 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0 0.33.0
vllm-minors: $(READY)
	set -e; for version in $(MINORS); do \
		rm -rf $(VENV)/vllm-wheel; \
		$(PIP) download --no-deps --only-binary :all: --dest $(VENV)/vllm-wheel vllm==$$version; \
		$(BIN)/python tests/tools/vllm_minors.py $(VENV)/vllm-wheel/*.whl; done
	rm -r $(VENV)/vllm-wheel

# SGLang on a CPU, in an environment of its own too. Not part of `test`: setting it up takes minutes. Older versions are
# laid over the newest, each with the transformers that it pins.
ON_CPU := $(CURDIR)/tests/helpers/sglang_cpu
ENGINE := OMP_WAIT_POLICY=passive $(SGLANG)/bin/python -m pytest tests/integrations/sglang/test_engine.py
test-sglang: $(SGLANG)/.ready $(SGLANG)/0.5.14 $(SGLANG)/0.5.11
	PYTHONPATH=$(ON_CPU) $(ENGINE)
	PYTHONPATH=$(ON_CPU):$(CURDIR)/$(SGLANG)/0.5.14 $(ENGINE)
	PYTHONPATH=$(ON_CPU):$(CURDIR)/$(SGLANG)/0.5.11 $(ENGINE)

$(SGLANG)/0.5.14: OLDER := transformers==5.8.1
$(SGLANG)/0.5.11: OLDER := transformers==5.6.0
$(SGLANG)/0.5.%: $(SGLANG)/.ready
	rm -rf $@ $@.partial
	$(SGLANG)/bin/pip --quiet --disable-pip-version-check install --no-deps --target $@.partial \
		sglang==$(@F) $(OLDER) tokenizers==0.22.2 huggingface_hub==1.9.0
	mv $@.partial $@

# Runs on a machine with a GPU and its own torch, so with the Python that is named and no set-up of ours. One process
# a file, and one each for the parts of the fuzz: most of the time goes to compiling kernels.
GPU_TESTS := $(foreach part,0 1 2 3 4 5 6 7 8 9,$(foreach backend,triton torch, \
	tests/kernels/triton/test_gpu_fuzz.py::test_values_and_gradients[$(backend)-$(part)])) \
	$(filter-out tests/kernels/triton/test_gpu_fuzz.py,$(shell grep -rlE --include='test_*.py' "mark\.(gpu|triton)" tests))
GPU_PROCESSES := 16
test-gpu:
	printf '%s\n' $(GPU_TESTS) | PYTHONPATH=src:tests xargs -P $(GPU_PROCESSES) -n 1 $(PYTHON) -m pytest -m "gpu or triton" --require-gpu

# Compiles every kernel at every tile size for every GPU that we name, without one; ALL=1 in all variants, which takes long.
check-arch: $(READY)
	ALL=$(ALL) PYTHONPATH=tests $(BIN)/python -m tools.check_arch

# Reads SGLang's wheels, of the versions that docs/sglang.md names, without installing them, into
# tests/tools/sglang_facts.json.
WHEELS := $(VENV)/sglang
sglang: $(READY)
	mkdir -p $(WHEELS)
	set -e; for version in 0.5.11 0.5.14 0.5.23; do \
		$(PIP) download --no-deps --only-binary :all: --dest $(WHEELS) sglang==$$version; done
	$(BIN)/python tests/tools/sglang_facts.py $(WHEELS)
	$(BIN)/python -m pytest tests/integrations/sglang/test_plugin.py

# Damaged folders through everything that reads them; the tests draw a few hundred.
N ?= 2000
SEED ?= 1
fuzz: $(READY)
	PYTHONPATH=tests $(BIN)/python -m tools.fuzz_folders --cases $(N) --seed $(SEED)

bench: $(READY)
	$(BIN)/zemoe bench

# What needs no test run: style, types, who imports whom, and the docs' links and lines. CI runs it before the tests.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest tests/test_imports.py tests/test_public_api.py $(wildcard tests/docs)

clean:
	rm -rf $(VENV) $(VLLM) $(SGLANG) $(NEWEST) build dist

# torch comes first and alone: with it in place no later step pulls in a much larger build as a dependency.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@

$(OLDEST): $(READY)
	rm -rf $@ $@.partial
	$(PIP) install --target $@.partial transformers==5.17.0
	mv $@.partial $@

.venv-%/.ready: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip --quiet --disable-pip-version-check install --no-deps --requirement constraints-$*.txt
	.venv-$*/bin/pip --quiet --disable-pip-version-check install --no-deps --editable .
	touch $@
