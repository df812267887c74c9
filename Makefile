# From a fresh machine with Python and make to results. Another Python or place for the environment:
#     make demo PYTHON=python3.12 VENV=path
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python -m
SOURCES = pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/* csrc/*/*)

.DELETE_ON_ERROR:
.PHONY: help demo test test-slow bench bench-compare lint venv

help:
	@echo 'make demo       install, pre-train a small pair on real pictures, evaluate it (minutes)'
	@echo 'make test       install with development tools, then lint and all tests but slow ones'
	@echo 'make test-slow  the slow ones: minutes, 10 GB of memory, and what is tested in parts already'
	@echo 'make bench      every benchmark into bench/results; ARGS="distill --quick" for less, --full for all'
	@echo 'make bench-compare  short cases of each operator against their last run here'
	@echo 'make lint       ruff and mypy'
	@echo 'make venv       the environment with development tools, in $(VENV)'

demo: $(VENV)/.installed-demo
	$(VENV)/bin/mokd-fast demo

# One test a core, which is faster than one test on all.
test: lint
	OMP_NUM_THREADS=1 $(RUN) pytest -p no:benchmark -n auto --maxprocesses 4

test-slow: $(VENV)/.installed-dev
	$(RUN) pytest -m slow

bench: $(VENV)/.installed-dev
	$(VENV)/bin/mokd-fast bench $(ARGS)

# malloc keeps freed memory, as in the benchmarks themselves (bench/timing.py).
bench-compare: $(VENV)/.installed-dev
	MALLOC_MMAP_THRESHOLD_=1099511627776 MALLOC_TRIM_THRESHOLD_=1099511627776 \
		$(RUN) pytest -m speed --benchmark-only --benchmark-autosave --benchmark-compare \
		--benchmark-columns=min,median,rounds --benchmark-group-by=fullname $(ARGS)

lint: $(VENV)/.installed-dev
	$(RUN) ruff check .
	$(RUN) mypy

venv: $(VENV)/.installed-dev

# $(call torch,PYTHON): the torch that PYTHON has, as a constraint for pip; fails if none will do.
# One from another index (its version has a +) needs its own torchvision; PyPI's does not load.
torch = $(1) -c 'import torch; from importlib.metadata import version; \
	from importlib.util import find_spec; v = version("torch"); \
	assert [int(n) for n in v.split(".")[:2]] >= [2, 11]; \
	assert "+" not in v or find_spec("torchvision"); print("torch==" + v)' 2>/dev/null

# Editable, so that changed Python needs no reinstall; changed C++ does, hence the sources.
$(VENV)/.installed-%: $(SOURCES) | $(VENV)/pyvenv.cfg
	@echo 'Installing mokd_fast[$*] into $(VENV); downloads some GB if torch is not there yet.'
	@$(call torch,$(VENV)/bin/python) >$(VENV)/constraints.txt || cp constraints.txt $(VENV)
	$(RUN) pip install --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[$*]'
	@touch $@

# Where PYTHON has a torch that will do, the environment sees PYTHON's packages through a .pth file.
# (--system-site-packages would not see them where PYTHON is of a virtual environment itself.)
$(VENV)/pyvenv.cfg:
	@echo 'Creating the environment $(VENV).'
	@$(PYTHON) -m venv $(VENV) || { echo 'This needs Python with its venv module' \
		'(Debian, Ubuntu: apt install python3-venv).'; exit 1; }
	@if $(call torch,$(PYTHON)); then $(PYTHON) -c 'import sys; \
		print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
		>$$(echo $(VENV)/lib/python3*/site-packages)/reused.pth; fi
