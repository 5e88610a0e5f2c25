# `make demo` and `make test` each do the whole set-up on a machine that has only Python 3.11 or newer and make.
# On Linux without a configured index of CPU wheels, pip takes torch's CUDA build (a few GB): it runs on a CPU as well.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := worker,api,embedded,dev

.DEFAULT_GOAL := help
.PHONY: help demo test lint fmt bench faults fuzz mutants docker-lint images clean

help: ## What there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-12s %s\n", $$1, $$2 }'

demo: $(STAMP) ## Start the whole stack on this machine, generate a dozen pictures, write them to out/
	$(BIN)/latentline demo

# Two processes: most tests wait, for services or for a worker, as long as they compute. Files stay whole, since their tests share fixtures.
test: $(STAMP) ## Run every test
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(STAMP) docker-lint ## Style, format, types, import contracts, Lua scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy docker/imagecheck
	$(BIN)/lint-imports --no-cache
	@if command -v luacheck >/dev/null; then luacheck -q producer/latentline/scripts; \
	else echo "luacheck (Debian: lua-check) is not installed: the Lua scripts are not linted"; [ -z "$$CI" ]; fi

fmt: $(STAMP) ## Format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Measure throughput and latency of the engine on this machine
	$(BIN)/pip install -e '.[bench]' -c constraints.txt
	$(BIN)/python -m benchmarks --json benchmark.json --plot benchmark.png

faults: $(STAMP) ## Break everything that can break, at full counts (an hour); writes faults.json
	LATENTLINE_FAULTS_JSON=faults.json $(BIN)/pytest tests/faults

fuzz: $(STAMP) ## Generate many more requests from the API's and its dialects' own documents than `make test` does (long)
	LATENTLINE_FUZZ_EXAMPLES=500 $(BIN)/pytest tests/integration/test_schemathesis.py

mutants: $(STAMP) ## Mutate the core and see whether a test notices (hours; continues where it stopped)
	$(BIN)/pip install -e '.[mutants]' -c constraints.txt
	tests/mutants

docker-lint: $(STAMP) ## Check the Dockerfiles
	$(BIN)/hadolint docker/Dockerfile.api docker/Dockerfile.worker

images: $(STAMP) ## Build both images, run them as deploy/ says, weigh them; with docker or podman, or as root with buildah
	$(BIN)/python docker/check

clean: ## Remove the environment and everything generated
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache

# Written last, so that an interrupted install is done again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"latentline needs Python 3.11 or newer; $(PYTHON) is {sys.version.split()[0]}")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[$(EXTRAS)]' -c constraints.txt
	@touch $@
