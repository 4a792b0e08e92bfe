# Needs nothing but Python 3.10 or newer and make: each target makes .venv by itself.

PYTHON ?= python3
ARGS ?=

.PHONY: help demo sweep test recipes integrations suites peft-suite zoo bench compile-report matrix machine prove release-check docs lint clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

GEMMA = $(if $(filter gemma --model=gemma,$(ARGS)),.venv/demo-gemma)

demo: .venv/demo$(if $(filter --quantized --experts,$(ARGS)),-quantized) $(GEMMA) ## Fine-tune a real model, with fastlora and with PEFT, and compare them (ARGS=--quick, ARGS="--steps 40 …")
	.venv/bin/python examples/finetune.py $(ARGS)

sweep: .venv/demo $(GEMMA) ## Train eight LoRA configurations at once, and keep the best (ARGS="--steps 200 …")
	.venv/bin/python examples/sweep.py $(ARGS)

test: .venv/test ## Run all tests, in two processes (ARGS="-k dropout …", ARGS="-n 0 --pdb …" in one)
	.venv/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

recipes: .venv/test .venv/recipes ## Run the recipes of examples/ (TRL, FSDP2, diffusers), and TRL's weights for vLLM, on tiny models (ARGS="-k grpo …")
	.venv/bin/pytest tests/project/test_recipes.py tests/test_vllm.py $(ARGS)

integrations: .venv/matrix ## Train a tiny model in LlamaFactory, axolotl, ms-swift, verl and TRL, each in its own environment (ARGS="-s axolotl", --list)
	.venv/bin/nox -f tools/integrations.py $(ARGS)

suites: .venv/suites ## Run other projects' LoRA tests, without fastlora and with it, and compare (ARGS="trl PATH", "diffusers PATH", "peft --quick")
	.venv/bin/python -m tools.suites.run $(ARGS)

peft-suite: .venv/suites ## Run PEFT's own, which need no checkout (ARGS="--quick …")
	.venv/bin/python -m tools.suites.run peft $(ARGS)

zoo: .venv/test ## Compare lazy heads with standard ones, on tiny models of all classes of transformers (ARGS="LlamaForCausalLM …")
	.venv/bin/python -m tools.zoo $(ARGS)

bench: .venv/bench ## Measure fastlora, PEFT and the frozen layer side by side (ARGS="-k quick", "--base REF", host …)
	.venv/bin/pytest benchmarks $(patsubst host,--host,$(ARGS))

compile-report: .venv/bench ## Compile the kernels for GPUs that needn't be here, and read the code (ARGS="--target sm_90 …")
	.venv/bin/python -m tools.compile_report $(ARGS)

matrix: .venv/matrix $(if $(findstring triton,$(ARGS)),.venv/test) ## Try the wheel under the versions that people have, with nox (ARGS="-s oldest-torch", "-t quick", --list), or the kernels under a Triton (ARGS="-s triton-3.7.1")
	.venv/bin/nox -f tools/matrix/noxfile.py $(ARGS)

machine: .venv/test ## Run the kernels as compiled for every NVIDIA card on the CPU, and look for races (ARGS="--quick …")
	.venv/bin/python -m tools.machine $(ARGS)

prove: .venv/prove ## Prove for all sizes that the kernels touch only their operands and store each element once (ARGS="project", --faults, --launches, --all)
	.venv/bin/python -m tools.prove $(ARGS)

release-check: .venv/release ## Build sdist and wheel into dist/, and try the wheel in an empty environment (ARGS=--built …)
	.venv/bin/python -m tools.release_check $(ARGS)

docs: .venv/docs ## Build the documentation site into out/site, and check its links (ARGS=serve: at localhost)
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs $(or $(ARGS),build --strict)

lint: .venv/dev ## Check format, style and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

clean: ## Remove the virtual environment, the converted model and everything that was built
	rm -rf .venv .cache build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache

# A stamp for each set of extras, made anew when the package's description changes.
.venv/%: pyproject.toml setup.py | .venv/bin/python
	.venv/bin/python -m pip install --quiet --no-compile --editable '.[$*]'
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv
