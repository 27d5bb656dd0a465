# Every command of the project. `make help` lists them; nothing here needs more than Python 3.11 and make.
#
# On an ordinary machine pip's default build of torch brings CUDA along (gigabytes). To get the CPU build, point pip
# at an index that holds it: PIP_EXTRA_INDEX_URL=<address> make env. Any other setting of pip is honoured as well.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --warn-undefined-variables --no-builtin-rules

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.locked

# What `export`, `serve`, `chat` and `demo` work on; a demo of another checkpoint is `make demo CHECKPOINT=... OUT=...`.
CHECKPOINT ?= checkpoints/pocket
OUT ?= build/$(notdir $(CHECKPOINT:/=))
ADDRESS ?= 127.0.0.1:50051
# Extra arguments of the command behind a target: make test ARGS="-k layers".
ARGS ?=

SOURCES := export plugins_trt runtime/bundle.py
BUNDLE := $(OUT)/manifest.json

.PHONY: help env lock demo test check export serve chat proto bench soak chaos fuzz clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do printf '%-8s %s\n' "$$name" "$$text"; done

env: $(STAMP) ## Make .venv with the locked versions (does nothing when it is up to date)

$(STAMP): pyproject.toml requirements/serve.txt requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed (make PYTHON=...), not " + sys.version if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements/dev.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lock: $(STAMP) ## Resolve the newest versions that pyproject.toml allows and write requirements/*.txt
	$(BIN)/python requirements/lock.py

demo: $(STAMP) $(BUNDLE) ## Export the pocket checkpoint, serve it and watch it answer prompts over a real stream
	$(BIN)/python -m benchmarks.demo --bundle $(OUT) $(ARGS)

test: $(STAMP) ## Run all tests
	$(BIN)/python -m pytest $(ARGS)

check: $(STAMP) ## Format, lint, types, contract, generated code; never writes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy proto/generate.py requirements/lock.py
	bash -n .ci/run
	bash -n proto/check_breaking.sh
	$(BIN)/buf lint proto
	$(BIN)/buf format --diff --exit-code proto
	proto/check_breaking.sh $(BIN)/buf
	$(BIN)/python proto/generate.py --check

export: $(STAMP) ## Export CHECKPOINT to a bundle in OUT
	$(BIN)/dgemma export $(CHECKPOINT) $(OUT) $(ARGS)

$(BUNDLE): $(STAMP) $(shell find $(CHECKPOINT) $(SOURCES) -type f -not -name '*.pyc' 2>/dev/null)
	$(BIN)/dgemma export --force $(CHECKPOINT) $(OUT)

serve: $(STAMP) $(BUNDLE) ## Serve the bundle in OUT on ADDRESS
	$(BIN)/dgemma serve $(OUT) --address $(ADDRESS) $(ARGS)

chat: $(STAMP) ## Talk to the server at ADDRESS
	$(BIN)/dgemma chat --address $(ADDRESS) $(ARGS)

proto: $(STAMP) ## Regenerate the Python code of the contract
	$(BIN)/python proto/generate.py

bench: $(STAMP) $(BUNDLE) ## Measure speed, memory and start-up as ratios to the reference
	$(BIN)/python -m benchmarks --bundle $(OUT) --checkpoint $(CHECKPOINT) $(ARGS)

# The three below take long, print their seed, and end with an error where a promise was broken; `make test` runs short
# versions of them. What gRPC itself logs of broken connections is left out.
soak: $(STAMP) $(BUNDLE) ## Hold 1,000 streams on the fake engine and 64 on the bundle open for minutes, and watch memory
	GRPC_VERBOSITY=NONE $(BIN)/python -m tests.reliability.soak --bundle $(OUT) $(ARGS)

chaos: $(STAMP) ## 10,000 misbehaving clients, then clients and servers that are killed, and SIGTERM under load
	GRPC_VERBOSITY=NONE $(BIN)/python -m tests.reliability.chaos $(ARGS)

fuzz: $(STAMP) ## Send 100,000 mutated requests to the handlers, and garbage to a socket
	GRPC_VERBOSITY=NONE $(BIN)/python -m tests.reliability.fuzz $(ARGS)

clean: ## Remove the environment and everything that was built
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
