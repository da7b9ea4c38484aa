# make demo        erase "neon style" from the embedded model, export it, measure, attack and draw it (CPU, about six minutes)
#                  make demo BASE=emoji-flow erases it from the embedded rectified flow
#                  make demo CONCEPT="a cat" erases another style or object, CONFIG=emoji by another recipe
# make evidence    the same with more images, four attacks, and what parts of the change do (a quarter of an hour)
# make test        the default tests          make test-slow   the long ones          make lint   ruff, pyright
#                  make test JAX='jax==0.10.0' makes a new .venv with that version
# make docs        the documentation as a site, in out/docs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
JAX ?= jax
OUT ?= out/demo
BASE ?= emoji
CONCEPT ?= neon style
CONFIG ?=
RECIPE = --base=$(BASE) $(if $(CONFIG),--config=$(CONFIG))
EVIDENCE ?= out/evidence
IMAGES ?= 60
ATTACKS ?= concept_inversion,unlearn_diff_atk,p4d,ring_a_bell

.PHONY: demo evidence test test-slow lint docs clean

$(VENV)/.package: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e . '$(JAX)'
	touch $@

$(VENV)/.tests: $(VENV)/.package
	$(PIP) -e '.[test]' '$(JAX)'
	touch $@

$(VENV)/.docs: $(VENV)/.package
	$(PIP) -e '.[docs]' '$(JAX)'
	touch $@

demo: $(VENV)/.package
	$(BIN)/esd-jax demo "$(CONCEPT)" $(RECIPE) --output="$(OUT)" --overwrite

evidence: $(VENV)/.package
	$(BIN)/esd-jax demo "$(CONCEPT)" $(RECIPE) --output="$(EVIDENCE)" \
	  --images=$(IMAGES) --attacks=$(ATTACKS) --seeds=10 --random --front

# Most of the time goes to compiling, which takes one core: two processes.
test: $(VENV)/.tests
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15

test-slow: $(VENV)/.tests
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	if $(BIN)/pyright --version >/dev/null 2>&1; then $(BIN)/pyright; else echo 'pyright cannot be fetched: no types checked'; fi

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf out runs .cache build dist
