# On a fresh machine, `make demo` runs the toolkit from build to benchmark, and `make test` checks it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
GUIDES ?= build/emoji/guides
# for `make bench`: set to --resume to resume an interrupted run
RESUME ?=
# One worker per core; each takes whole files, in the order set by tests/conftest.py
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-fast test-ray test-portability coverage docs campaign soak lint bench tables ablation train-speed faults realsize precision trt-api gpu emoji gains rivals joint clean

help:
	@echo "make demo   install, then build, sample and bench the bundled model; results in $(DEMO)/"
	@echo "make test   install the development extra, then lint, type-check and test"
	@echo "make test-fast   the tests that need no model and little time (90 seconds)"
	@echo "make test-ray    replicas and workers with Ray, and the failure of one (two processes on a CPU; minutes)"
	@echo "make docs   the documentation site with an API reference, in build/site (under a minute)"
	@echo "make coverage   the tests, with coverage by module (slower than make test)"
	@echo "make test-portability  the numerical tests with other vector widths, kernels and thread counts (15 minutes)"
	@echo "make campaign    over 2,200 hostile inputs and faults; report in build/campaign/ (13 minutes on two idle cores)"
	@echo "make soak   5,000 images in one process, 10,000 requests to a server: memory, descriptors, equality (minutes)"
	@echo "make bench  the README's figures, into benchmarks/results/ (an hour; to resume, add RESUME=--resume)"
	@echo "make tables      the distillation's tables A, B and C (hours on a CPU; resumable)"
	@echo "make ablation    guide designs, loss terms and states on a short budget (an hour on a CPU; resumable)"
	@echo "make train-speed steps per second and memory of training at Stable Diffusion 1.5's size"
	@echo "make faults    kill a build at twenty random moments (minutes)"
	@echo "make realsize  sizes of SD 1.5, 2.1 and XL with random weights: engines, plug, a step (an hour, 24 GB; resumes)"
	@echo "make precision cost of FP16 and INT8: parity, sizes and images of the bundled model (half an hour)"
	@echo "make trt-api   check every TensorRT and CUDA name in use against the bindings of supported releases (gcc, 30 MB)"
	@echo "make gpu    tests and benchmarks that need a GPU (minutes; skipped without one)"
	@echo "make gains  effect of gains of the bundled guide, compared with CFG (an hour on a CPU, a minute on a GPU)"
	@echo "make rivals other ways to distil guidance, measured at an equal budget (minutes on a GPU; resumable)"
	@echo "make joint  guide, sharpener and offsets trained jointly and alone, and negative prompts (hours; resumable)"
	@echo "make emoji  train the bundled model from scratch (hours on a CPU; resumable)"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing (once; torch is the large part)"
	$(PIP_INSTALL) -e '.[build,bench,fidelity,rtx]'
	@touch $@

$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing (once; torch is the large part)"
	$(PIP_INSTALL) -e '.[dev,rtx]'
	@touch $@ $(VENV)/.demo-installed

demo: $(VENV)/.demo-installed
	@mkdir -p $(DEMO)
	$(BIN)/pnp-trt build --base emoji --guide none --out engines/emoji-teacher
	$(BIN)/pnp-trt build --base emoji --out engines/emoji-tiny
	$(BIN)/pnp-trt sample "a red apple" "a red heart, noto style" "an automobile, twemoji style" --engine emoji-tiny --out $(DEMO)/samples
	$(BIN)/pnp-trt build --base emoji --backend tensorrt-rtx --precision fp16 --target sm_89 --out engines/emoji-tiny-fp16-rtx-sm_89
	$(BIN)/pnp-trt inspect emoji-tiny-fp16-rtx-sm_89
	$(BIN)/pnp-trt bench --quick --json $(DEMO)/bench.json --html $(DEMO)/report.html --grid $(DEMO)/grid.png
	@echo "done: open $(DEMO)/report.html and $(DEMO)/grid.png"

test: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(PYTEST)

test-fast: $(VENV)/.dev-installed
	OMP_NUM_THREADS=1 $(PYTEST) -m fast

test-ray: $(VENV)/.dev-installed
	$(PIP_INSTALL) -e '.[dev,ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray tests/serve/test_ray.py

# The tests whose results are floating-point numbers of a model, a schedule or an optimiser. The others do not depend on
# the processor. PyTorch and oneDNN can be limited to a subset of the processor's instructions. ONNX Runtime's release
# builds have no such variable. Its unoptimised graphs run other kernels with other rounding, like another processor.
NUMERICS := tests/sampling/test_schedule.py tests/sampling/test_loop.py tests/sampling/test_baselines.py \
  tests/runtime/test_pipeline.py tests/runtime/test_sampling.py tests/distill tests/graph tests/precision \
  tests/build/test_layers.py tests/build/test_module_parity.py tests/build/test_sizes.py \
  tests/models/test_student.py tests/models/test_guides.py tests/models/test_random.py \
  tests/integrations tests/bench/test_fidelity.py tests/bench/test_eyes.py \
  tests/benchmarks/test_tables.py tests/benchmarks/test_figures.py tests/visualize/test_visualize.py
PORTABILITY := "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41" "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2" \
  "PNP_TRT_TEST_KERNELS=plain" "OMP_NUM_THREADS=2"

test-portability: $(VENV)/.dev-installed
	for setting in $(PORTABILITY); do \
	  echo "== $$setting"; \
	  env OMP_NUM_THREADS=1 $$setting $(PYTEST) $(NUMERICS) || exit 1; \
	done

coverage: $(VENV)/.dev-installed
	OMP_NUM_THREADS=1 $(PYTEST) --cov --cov-report=term:skip-covered

docs: $(BIN)/python
	$(PIP_INSTALL) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "done: open build/site/index.html"

campaign: $(VENV)/.dev-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaign --jobs 2 --record benchmarks/results/campaign.json

soak: $(VENV)/.dev-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaign.soak --out benchmarks/results/soak.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.serve.soak --json benchmarks/results/serving-soak.json

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/codespell README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md docs pnp_trt benchmarks/*.md
	$(BIN)/python -m pytest tests/test_words.py
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

bench: $(VENV)/.dev-installed
	@mkdir -p build
	$(BIN)/pnp-trt bench --suite readme-emoji $(RESUME) --json benchmarks/results/emoji-bench.json --html build/emoji-bench.html --grid docs/demo-grid.png
	for base in emoji sd15 sd21 sdxl; do \
	  $(BIN)/pnp-trt bench --suite cost-$$base --json benchmarks/results/cost-$$base.json || exit 1; \
	done
	$(BIN)/python -m benchmarks.readme_tables

tables: $(VENV)/.dev-installed
	$(PIP_INSTALL) -e '.[recipe]'
	$(BIN)/python -m benchmarks.emoji.tables --guides $(GUIDES)
	$(BIN)/python -m benchmarks.emoji.tables_report

ablation: $(VENV)/.dev-installed
	$(PIP_INSTALL) -e '.[recipe]'
	$(BIN)/python -m benchmarks.emoji.ablation --steps 250

train-speed: $(VENV)/.dev-installed
	$(BIN)/python -m benchmarks.train_speed --guide tiny
	$(BIN)/python -m benchmarks.train_speed --guide full

faults: $(VENV)/.dev-installed
	PNP_TRT_FAULTS=20 $(BIN)/python -m pytest tests/bundle/test_faults.py

realsize: $(VENV)/.dev-installed
	for base in sd15 sd21 sdxl; do \
	  $(BIN)/python -m benchmarks.realsize --base random:$$base --guide tiny --precision fp16 --target sm_89 || exit 1; \
	  $(BIN)/python -m benchmarks.realsize --base random:$$base --guide tiny --part run $$([ $$base = sdxl ] && echo --guided-only) || exit 1; \
	  $(BIN)/python -m benchmarks.realsize --base random:$$base --guide tiny --part train || exit 1; \
	done
	for guide in tiny full; do for precision in fp16 int8; do \
	  $(BIN)/python -m benchmarks.realsize --base random:sd15 --guide $$guide --precision $$precision --target sm_89 || exit 1; \
	done; done
	$(BIN)/python -m benchmarks.realsize_report

trt-api: $(VENV)/.dev-installed
	$(BIN)/python -m benchmarks.trt_api

precision: $(VENV)/.dev-installed
	$(PIP_INSTALL) -e '.[recipe]'
	$(BIN)/python -m benchmarks.emoji.precision
	$(BIN)/python -m benchmarks.emoji.precision_report

# Installs nothing: uses the existing environment, with the torch and TensorRT that match the GPU.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu

# DEVICE=cuda for a GPU
DEVICE ?= cpu
gains: $(VENV)/.dev-installed
	$(PIP_INSTALL) -e '.[recipe]'
	$(BIN)/python -m benchmarks.emoji.gains measure --device $(DEVICE)
	$(BIN)/python -m benchmarks.emoji.gains report

rivals: $(VENV)/.dev-installed
	$(PIP_INSTALL) -e '.[recipe]'
	test -f build/emoji/pack.npz || $(BIN)/python -m benchmarks.emoji.gpu_train pack
	$(BIN)/python -m benchmarks.emoji.rivals train --steps 800 --pilot 40
	$(BIN)/python -m benchmarks.emoji.rivals measure --device cuda --batch 512 --processes $$(nproc)
	$(BIN)/python -m benchmarks.emoji.rivals report

# equal learning rates for the tiny guide and its combinations, as docs/joint-parts.md states
JOINT_RATES = --lr sharpener=0.003 --lr additive=0.003 \
	$(foreach name,tiny tiny+sharpener tiny+offsets tiny+sharpener+offsets,--lr $(name)=0.009)
JOINT_NAMES = tiny,sharpener,additive,tiny+sharpener,tiny+offsets,tiny+sharpener+offsets

joint: $(VENV)/.dev-installed
	$(PIP_INSTALL) -e '.[recipe]'
	test -f build/emoji/pack.npz || $(BIN)/python -m benchmarks.emoji.gpu_train pack
	$(BIN)/python -m benchmarks.emoji.rivals train --steps 400 --batch 96 --out build/emoji/joint \
		--only $(JOINT_NAMES) $(JOINT_RATES)
	$(BIN)/python -m benchmarks.emoji.rivals measure --images 256 --steps 16,8 --tuned-steps 8 --error-batches 4 --out build/emoji/joint \
		--json benchmarks/results/emoji-joint.json --processes $$(nproc)
	$(BIN)/python -m benchmarks.emoji.rivals report --joint
	$(BIN)/python -m benchmarks.emoji.rivals train --steps 300 --batch 64 --negative --out build/emoji/negative \
		--only sharpener,tiny+sharpener --lr sharpener=0.003 --lr tiny+sharpener=0.009
	$(BIN)/python -m benchmarks.emoji.negative --rivals build/emoji/negative --images 128

emoji: $(BIN)/python
	$(PIP_INSTALL) -e '.[recipe]'
	$(BIN)/python -m benchmarks.emoji --preset cpu

clean:
	rm -rf build demo
