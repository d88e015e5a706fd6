# hvpfast from a fresh clone. Needs Python >= 3.10 and, for the native CPU kernels, a C++ compiler; downloads only from
# the package index that pip is set to use.
#
#   make demo    train a small network on real digits, look at its curvature; ends with the report's path
#   make test    every test, each kernel held against its reference
#
# Variables: PYTHON (python3), VENV (.venv), PIP_FLAGS (e.g. --index-url ...), DEMO_FLAGS (e.g. --data DIR), OUT (demo),
# TEST_FLAGS, JOBS (2), HVPFAST_BUILD (auto).

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
OUT ?= demo
JOBS ?= 2
DEMO_FLAGS ?=
TEST_FLAGS ?=
BENCH_FLAGS ?=
# A file's tests on one process: what they share (a build, compiled kernels) is made once.
XDIST := --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
# Whatever the build or the choice of versions reads: a change in it installs again.
INPUTS := pyproject.toml setup.py constraints.txt $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint sanitize clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo    set up $(VENV), train a small network on real digits and report its curvature in $(OUT)/'
	@echo 'make test    set up $(VENV) and run every test'
	@echo 'make bench   set up $(VENV) and run the benchmark suites'
	@echo 'make lint    ruff check and ruff format --check'
	@echo 'make sanitize  the CPU kernels under AddressSanitizer and UBSan, with their tests'
	@echo 'make clean   remove $(VENV), demo/, build outputs and caches'

demo: $(VENV)/.installed-demo
	@echo '== Training on digits and measuring curvature (well under 2 minutes on two cores)'
	$(BIN)/hvpfast demo --out $(OUT) $(DEMO_FLAGS)
	@echo '== Report: $(OUT)/report.html'

test: $(VENV)/.installed-test
	@echo '== Running the tests on $(JOBS) processes'
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q -n $(JOBS) $(XDIST) $(TEST_FLAGS)

bench: $(VENV)/.installed-bench
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-only $(BENCH_FLAGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'hvpfast needs Python >= 3.10; "$(PYTHON)" is older. Try: make PYTHON=python3.12 ...' >&2; exit 1; }
	@echo '== Making the virtual environment $(VENV)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# One stamp an extra. Build isolation is off so that the environment's own pinned setuptools and pybind11 are used.
$(VENV)/.installed-demo: EXTRAS := plot,cli
$(VENV)/.installed-test: EXTRAS := test,plot,cli,triton
$(VENV)/.installed-bench: EXTRAS := bench,test,plot,cli,triton
$(VENV)/.installed-%: $(VENV)/.created $(INPUTS)
	@echo '== Installing hvpfast[$(EXTRAS)] with the versions in constraints.txt (torch is large; minutes at first)'
	$(PIP) setuptools pybind11
	$(PIP) --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

# The CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer, from a copy of the sources, and their tests. It is
# `pytest`, not `python -m pytest`, which would put this directory, and with it the plain build, first.
SANITIZE := -fsanitize=address,undefined
sanitize: $(VENV)/.installed-test
	rm -rf build/sanitize && mkdir -p build/sanitize/src
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t build/sanitize/src
	HVPFAST_BUILD=cpu HVPFAST_CXXFLAGS='-g1 -O1 -fno-omit-frame-pointer -fno-sanitize-recover=undefined $(SANITIZE)' \
	  HVPFAST_LDFLAGS='$(SANITIZE)' \
	  $(PIP) --no-deps --no-build-isolation --target build/sanitize/site ./build/sanitize/src
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PYTHONPATH=build/sanitize/site \
	  $(BIN)/pytest -q -n $(JOBS) $(XDIST) tests/kernels/test_cpu_*.py $(TEST_FLAGS)

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .ruff_cache .benchmarks kernels/*.so kernels/_build.json
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
