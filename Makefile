PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BACKENDS := .venv-backends
BENCHMARKS := .venv-benchmarks
JOBS ?= 2

.PHONY: setup setup-benchmarks demo test test-all test-backends lint clean

setup: $(VENV)/.done

$(VENV)/.done: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/medattn demo

test: setup
	PYTHONUTF8=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadscope --durations=30 --durations-min=5

test-all: setup
	PYTHONUTF8=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadscope

$(BACKENDS)/.done: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(BACKENDS)
	$(BACKENDS)/bin/pip install --quiet --editable . "jax==0.10.2" "torch==2.13.0" "pytest>=8.3,<10"
	touch $@

test-backends: $(BACKENDS)/.done
	KERAS_BACKEND=jax $(BACKENDS)/bin/python -m pytest tests/backends
	KERAS_BACKEND=torch $(BACKENDS)/bin/python -m pytest tests/backends

setup-benchmarks: $(BENCHMARKS)/.done

# TensorFlow, PyTorch and OpenCV side by side, for benchmarks against peers
$(BENCHMARKS)/.done: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(BENCHMARKS)
	$(BENCHMARKS)/bin/pip install --quiet --editable ".[train,serve]" "torch==2.13.0" "opencv-python-headless>=4.10,<6"
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) $(BACKENDS) $(BENCHMARKS) build dist *.egg-info
