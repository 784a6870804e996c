# make demo | test | lint | test-interop | test-kernels | test-clip-retrieval | test-clients | wheel: each makes what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Threads that wait do not spin: on a busy machine spinning made the training of the tiny CLIP three times slower.
export OMP_WAIT_POLICY := PASSIVE
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint format test-interop test-kernels wheel clean test-clip-retrieval test-clients

demo: $(VENV)/.ready
	$(BIN)/python -m hub.demo --out runs/demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto --maxprocesses 4

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-interop: $(VENV)/.ready .venv-saelens/.ready
	SAELENS_PYTHON=.venv-saelens/bin/python SPARSIFY_PYTHON=.venv-saelens/bin/python \
		$(BIN)/python -m pytest tests/test_interop.py

# The GPU's kernels, interpreted on the CPU and compiled for a GPU; the CPU build of torch comes without Triton.
test-kernels: $(VENV)/.ready .triton/.ready
	TRITON_PATH=.triton $(BIN)/python -m pytest tests/test_sae_kernels.py tests/test_solver_kernels.py tests/test_retrieval_kernels.py tests/test_top_k.py

test-clip-retrieval: $(VENV)/.ready .venv-clip-retrieval/.ready
	CLIP_RETRIEVAL_BIN=$(CURDIR)/.venv-clip-retrieval/bin $(BIN)/python -m pytest tests/test_clip_retrieval.py -s

test-clients: $(VENV)/.ready .venv-clients/.ready
	CLIENTS_PYTHONS="$$(echo $(CURDIR)/.venv-clients/*/bin/python)" $(BIN)/python -m pytest tests/test_clients.py -s

wheel: $(VENV)/.ready
	$(BIN)/python tests/check_wheel.py

clean:
	rm -rf $(VENV) .venv-saelens .triton .venv-clip-retrieval .venv-clients runs dist

# torchvision's wheel asks for the exact torch it was built with, CUDA and all, and timm for torchvision; without their
# dependencies they take what is there. timm holds the vision towers of a few models of the table.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --upgrade "pip>=25.1"
	$(BIN)/python $(PIP) --constraint constraints.txt --editable . --group dev
	$(BIN)/python $(PIP) --constraint constraints.txt --no-deps torchvision timm
	touch $@

.venv-saelens/.ready: constraints.txt
	$(PYTHON) -m venv .venv-saelens
	.venv-saelens/bin/python $(PIP) "$$(grep '^torch==' constraints.txt)" sae-lens==6.54.0 eai-sparsify==1.3.3
	touch $@

.triton/.ready: constraints.txt
	rm -rf .triton
	$(BIN)/python $(PIP) --no-deps --target .triton triton==3.7.1
	touch $@

.venv-clip-retrieval/.ready: builders/clip_retrieval_env.sh
	rm -rf .venv-clip-retrieval
	builders/clip_retrieval_env.sh .venv-clip-retrieval $(PYTHON)
	touch $@

.venv-clients/.ready: tests/clients_env.sh
	rm -rf .venv-clients
	tests/clients_env.sh .venv-clients $(PYTHON)
	touch $@
