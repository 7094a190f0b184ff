# make demo: compile the bundled model and let it write. make test: the whole suite. Both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WEBGPU := webgpu@0.6.2

.PHONY: demo test quick lint install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[test]'
	@if command -v npm >/dev/null; then npm install --silent --no-fund --no-audit --ignore-scripts --prefix $(VENV) $(WEBGPU) \
	  || echo "npm could not install $(WEBGPU): tests of WGSL shaders will be skipped"; \
	else echo "npm is not installed: tests of WGSL shaders will be skipped"; fi
	touch $@

demo: install
	@mkdir -p build
	$(BIN)/stemma compile examples/models/target -o build/demo.stemma --preset small
	$(BIN)/stemma run build/demo.stemma -p "def read(self, size):" --max-new-tokens 120 --temperature 0.7 --seed 2

test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

quick: install
	$(BIN)/python -m pytest -q -m quick

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build
