# Pestle: the commands. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON3 ?= python3
ACCEL   ?=
MODEL   ?=
TYPE    ?=
OUT     ?=
PORT    ?=
JOBS    ?= 2
VENV    := .venv
PYTHON  := $(VENV)/bin/python
PESTLE  := $(VENV)/bin/pestle
RUNTIME := $(VENV)/.runtime
DEV     := $(VENV)/.dev
KERNELS := $(wildcard quantize/native/*.c quantize/native/*.h)

.PHONY: help setup serve quantize test check oracle oracle-imatrix quality bounds faults-quantize bench bench-engine bench-api bench-embeddings prove-scheduler prove-grammars prove-kernels prove-kernels-arm64 check-kernels bench-quantize clean

help: ## list the commands
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make the environment; ACCEL=cpu|cuda|metal (found when not given)
	@PYTHON3="$(PYTHON3)" ACCEL="$(ACCEL)" scripts/setup.sh

$(RUNTIME): pyproject.toml constraints.txt scripts/setup.sh scripts/hatch_build.py scripts/compile_kernels.py $(KERNELS)
	@PYTHON3="$(PYTHON3)" ACCEL="$(ACCEL)" scripts/setup.sh

$(DEV): $(RUNTIME)
	@PYTHON3="$(PYTHON3)" scripts/setup.sh dev

serve: $(RUNTIME) ## chat with the default model, or MODEL=<folder or GGUF> TYPE=q8_0|q4_0|q4_k_m PORT=8080
	@model="$(MODEL)"; model="$${model:-$${LLM_MODEL_PATH:-}}"; \
	  if [ -z "$$model" ]; then model=$$($(PYTHON) scripts/rebuild_default_checkpoint.py); fi; \
	  exec $(PESTLE) serve --model-path "$$model" $(if $(TYPE),--quantization $(TYPE)) $(if $(PORT),--port $(PORT))

quantize: $(RUNTIME) ## grind MODEL=<folder> into a GGUF: TYPE=q4_k_m OUT=<file>; several: TYPE=q8_0,q4_k_m OUT=<folder>
	@[ -n "$(MODEL)" ] || { echo "say which: make quantize MODEL=<folder of safetensors> [TYPE=q4_k_m] [OUT=model.gguf]" >&2; exit 2; }
	@$(PESTLE) quantize "$(MODEL)" --type $(or $(TYPE),q8_0) $(if $(OUT),--out "$(OUT)")

test: $(DEV) ## run the whole suite
	@$(PYTHON) -m pytest

check: $(DEV) ## formatting, lint, types and the floors of the house
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports --no-cache

oracle: $(DEV) ## compare every byte with upstream's converter and quantizer, JOBS=2 checkpoints at a time (needs torch)
	@$(PYTHON) scripts/oracle.py --jobs $(JOBS) --write docs/oracle.md
	@$(PYTHON) scripts/oracle_variants.py
	@$(PYTHON) scripts/oracle_snapshots.py

quality: $(DEV) ## compare the card's figures with llama-perplexity (its path in LLAMA_PERPLEXITY)
	@$(PYTHON) scripts/check_quality.py --type q4_0
	@$(PYTHON) scripts/check_quality.py --type q4_k_m

faults-quantize: $(DEV) ## kill quantizations at their system calls, fill their disk, damage their files (needs strace)
	@$(PYTHON) scripts/faults_quantize.py

oracle-imatrix: $(DEV) ## compare importance matrices with llama-imatrix's (its folder in LLAMA_TOOLS)
	@$(PYTHON) scripts/oracle_imatrix.py --quality

# Each part is run, whatever the one before it found; then the worst counts.
bench: $(DEV) ## measure against llama-server (its path in LLAMA_SERVER) and upstream's converter
	@status=0; \
	  $(MAKE) bench-quantize || status=$$?; \
	  $(PYTHON) scripts/bench_together.py || status=$$?; \
	  $(PYTHON) scripts/bench_serving.py --peer --clients 1 --requests 8 --max-tokens 128 --ignore-eos --runs 5 || status=$$?; \
	  $(PYTHON) scripts/bench_serving.py --peer --clients 8 --requests 96 --ignore-eos --runs 5 || status=$$?; \
	  exit $$status

bench-engine: $(DEV) ## measure the engine against llama-server (LLAMA_SERVER) under every load: RUNS=5 LOADS="1-stream mixed"
	@status=0; \
	  $(PYTHON) scripts/bench_engine.py --runs $(or $(RUNS),5) $(foreach load,$(LOADS),--load $(load)) --write docs/benchmarks.md || status=$$?; \
	  $(PYTHON) scripts/bench_restart.py || status=$$?; \
	  exit $$status

bench-api: $(DEV) ## measure what an event costs the API process, alone on a core
	@$(PYTHON) scripts/bench_api.py

bench-embeddings: $(DEV) ## compare embeddings and their speed with llama-server's (its path in LLAMA_SERVER): MODEL=<GGUF>
	@[ -f "$(MODEL)" ] || { echo "say which: make bench-embeddings MODEL=<GGUF of an embedding model>" >&2; exit 2; }
	@$(PYTHON) scripts/compare_embeddings.py "$(MODEL)"
	@$(PYTHON) scripts/bench_embeddings.py "$(MODEL)"

prove-scheduler: $(DEV) ## try 100,000 random histories of the scheduler
	@PESTLE_SCHEDULES=100000 $(PYTHON) -m pytest -q -o timeout=0 tests/property/test_scheduler.py

bounds: $(DEV) ## prove the bounds of memory and reading on large random checkpoints, inside 1 GiB
	@$(PYTHON) scripts/prove_bounds.py

prove-kernels: $(DEV) ## compare the kernels with ggml on hostile and ordinary weights: GIGABYTES=1 for each
	@$(PYTHON) scripts/prove_kernels.py --gigabytes $(or $(GIGABYTES),1)

prove-kernels-arm64: $(DEV) ## the same for arm64, in an emulator (needs cross compilers and qemu-user): MEGABYTES=100
	@$(PYTHON) scripts/prove_kernels_arm64.py --megabytes $(or $(MEGABYTES),100)

check-kernels: $(DEV) ## warnings of GCC and Clang, sanitizers, and branches that no weights reach
	@$(PYTHON) scripts/check_kernels.py

bench-quantize: $(DEV) ## kernels against ggml's encoder, pestle quantize against upstream (LLAMA_QUANTIZE), and the chart
	@status=0; \
	  $(PYTHON) scripts/bench_kernels.py --write docs/benchmarks.md || status=$$?; \
	  $(PYTHON) scripts/bench_quantize.py --runs $(or $(RUNS),3) --write docs/benchmarks.md || status=$$?; \
	  $(PYTHON) scripts/draw_benchmarks.py || status=$$?; \
	  exit $$status

prove-grammars: $(DEV) ## send 1,000 mutated schemas and grammars through the real children: MODEL=<GGUF>
	@[ -f "$(MODEL)" ] || { echo "say which: make prove-grammars MODEL=<GGUF>" >&2; exit 2; }
	@$(PYTHON) scripts/prove_grammars.py "$(MODEL)"
	@$(PYTHON) scripts/bench_structured.py "$(MODEL)"

clean: ## remove the environment and what the tools left
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find app quantize tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
