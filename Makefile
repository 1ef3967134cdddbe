# Everything creates what it needs: `make demo` and `make test` work on a fresh checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Two OpenMP threads make GPTQ's column loop up to 10x slower on a busy machine.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

# A process per core, four at most: each holds torch and a model. Tests that follow one another stay
# in one process, for the models that they share; who is done first takes over from the others.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

.PHONY: help venv demo test lint format docs test-serving test-browser test-faults test-gpu fuzz bench-speed bench-quality bench-ablation clean

help:
	@echo "make demo          train, merge and quantize small experts; print one table"
	@echo "make test          the tests (no network, CPU)"
	@echo "make test-serving  serve an E-PMQ checkpoint with real vLLM on the CPU"
	@echo "make test-browser  the regret report in a headless Chromium"
	@echo "make test-faults   kills, full disks, bad numbers, by real means (docs/reliability.md)"
	@echo "make test-gpu      kernels, resuming and lack of memory on a GPU"
	@echo "make fuzz          strangers' files, mutated at random, for about 5 minutes (FUZZ_EXAMPLES=400)"
	@echo "make lint          ruff, and which folder may import which"
	@echo "make docs          the pages of docs/ as a site in out/docs; every link is checked"
	@echo "make bench-speed   time and memory against stock GPTQModel (40 minutes)"
	@echo "make bench-ablation which part of E-PMQ pays: suites, mergers, bits, seeds (an hour)"
	@echo "make bench-quality the quality tables of the three suites (CSV, Markdown, docs/quality.md)"

venv: $(READY)

# The constraints name the torch to install; without them pip may fetch several GB.
$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	touch $(READY)

demo: venv
	$(BIN)/epmq-gptq demo --out out/demo-4bit --overwrite $(ARGS)

test: venv
	$(TEST_ENV) $(BIN)/python -m pytest -q $(PARALLEL) $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Not --quiet: mkdocs then does not count the warnings that --strict is for.
docs: venv
	$(BIN)/python docs/mkdocs/links.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/mkdocs/mkdocs.yml

test-serving: venv
	tests/serving/setup_env.sh
	$(TEST_ENV) EPMQ_SERVING=1 $(BIN)/python -m pytest -q tests/serving $(ARGS)

test-faults: venv
	$(TEST_ENV) $(BIN)/python -m pytest -q tests/faults $(PARALLEL) $(ARGS)

# Kernels, resuming and lack of memory on a GPU; alone there, for some fill its memory.
test-gpu: venv
	$(TEST_ENV) EPMQ_TEST_DEVICE=cuda $(BIN)/python -m pytest -q tests/faults/test_gpu_faults.py \
		tests/test_kernels.py tests/host/test_resume.py $(ARGS)

# Other mutations in every run. Keep what is found in tests/fuzz/corpus/found.
FUZZ_EXAMPLES ?= 400
fuzz: venv
	$(TEST_ENV) HYPOTHESIS_PROFILE=search FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) \
		$(BIN)/python -m pytest -q tests/fuzz --timeout 3600 $(ARGS)

test-browser: venv
	tests/browser/setup.sh
	$(TEST_ENV) EPMQ_BROWSER=1 $(BIN)/python -m pytest -q tests/browser $(ARGS)

bench-speed: venv
	$(BIN)/python benchmarks/speed.py $(ARGS)

bench-quality: venv
	$(BIN)/python benchmarks/quality.py --refresh docs/quality.md $(ARGS)

bench-ablation: venv
	$(BIN)/python benchmarks/ablation.py --refresh docs/method.md --refresh docs/quality.md $(ARGS)

clean:
	rm -rf $(VENV) .venv-serving build dist *.egg-info .pytest_cache .ruff_cache
