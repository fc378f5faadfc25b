# Every target uses one environment, the folder .venv: made on first use, holding what constraints.txt pins.
#   PY=/path/to/python3.12   the Python to make it with (3.11 to 3.13; found by itself if not given)
#   TORCH=cpu                the small install: torch for the CPU, without torchvision
#   TORCH_INDEX=address      a package index with CPU wheels of torch, if pip is not configured for one
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXAMPLE := outputs/grade-example

# `make setup` means the default build unless it says TORCH=cpu; the other targets keep the build that is there.
BUILT := $(shell test -x "$(BIN)/python" && cat "$(VENV)/.build" 2>/dev/null)
TORCH ?= $(or $(if $(filter setup,$(MAKECMDGOALS)),default),$(firstword $(BUILT)),default)
BUILD := $(TORCH) $(CURDIR)

unexport PYTHONPATH PYTHONHOME

.PHONY: help setup demo lab test test-all lint lessons notebooks pages site grade-example cards kill-matrix bench lock FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

setup: ## make the environment in .venv (5.9 GB; with TORCH=cpu 2.0 GB)
	@bash tools/setup.sh "$(VENV)" "$(BUILD)"

demo: $(STAMP) ## train a class-conditional model on handwritten digits, sample it, show the results; then a check
	@$(BIN)/condiff demo
	@echo
	@$(BIN)/python -m condiff_check

lab: $(STAMP) ## open the lessons in JupyterLab
	@$(BIN)/python -m jupyterlab notebooks

test: $(STAMP) ## run the tests that take ten minutes together
	@$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-all: test ## and the slow ones: attacks on the grader, kills at any moment, all wrong answers, on every way
	@$(BIN)/python -m pytest -n auto --dist worksteal --timeout=1800 -m slow $(ARGS)

lint: $(STAMP) ## check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

lessons: $(STAMP) ## run the solutions of all lessons, quickly; with TIER=full as learners do
	@$(BIN)/python tools/run.py solutions/*.ipynb --tier $(or $(TIER),smoke) $(ARGS)

notebooks: $(STAMP) ## write notebooks and solutions from lessons/; ARGS=--execute runs the solutions that changed
	@$(BIN)/python tools/build.py $(ARGS)

pages: $(STAMP) ## write docs/coverage.md and docs/errata.md from docs/coverage.yaml and the notebooks
	@$(BIN)/python tools/sources.py $(ARGS)

site: $(VENV)/.site ## build the web site, for learners and for instructors: outputs/site
	@$(BIN)/python site/book.py $(ARGS)

grade-example: $(STAMP) ## write 12 submissions, grade them, and compare with what is known of them: outputs/grade-example
	@$(BIN)/python tools/example_class.py $(EXAMPLE) --lesson 01 --students 12
	@$(BIN)/condiff-grade $(EXAMPLE)/submissions -o $(EXAMPLE)/results --rubric $(EXAMPLE)/rubric.yaml $(ARGS) \
		|| test $$? -eq 3 # one of them is no notebook, and needs a look
	@$(BIN)/python tools/example_class.py $(EXAMPLE) --compare $(EXAMPLE)/results

cards: $(STAMP) ## measure the shipped checkpoints again and write their cards
	@$(BIN)/python tools/card.py

kill-matrix: $(STAMP) ## try every known mistake on its check, 20 times each: benchmarks/kill_matrix.md
	@$(BIN)/python -m condiff_check.kill_matrix benchmarks/kill_matrix.md

bench: $(STAMP) ## measure all that benchmarks/ tells, for hours, and goes on after a stop; downloads MNIST
	@for each in imports training sampling ablations precision growth guidance text control latents architectures grading; do \
		$(BIN)/python benchmarks/$$each.py || exit; done

lock: ## pin what pyproject.toml newly asks for; delete a line of constraints.txt first to renew that pin
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && \
	$(or $(PY),python3) -m venv "$$tmp" && "$$tmp/bin/python" -m pip install -q --disable-pip-version-check uv && \
	"$$tmp/bin/uv" pip compile -q --universal --python-version 3.11 --all-extras --no-header --no-annotate \
		pyproject.toml -o constraints.txt

ifneq "$(BUILD)" "$(BUILT)"
$(STAMP): FORCE
endif
$(VENV)/.site: $(STAMP)
	@echo "Installing what builds the site: 0.1 GB, a minute."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[site]'
	@touch $@
$(STAMP): pyproject.toml constraints.txt
	@bash tools/setup.sh "$(VENV)" "$(BUILD)"
