# Two commands: `make bench` and `make test`. Each sets up .venv the first time and then goes straight to work.

VENV := .venv
# The stamp's name carries the checkout's path: a moved or copied checkout, whose scripts point elsewhere, starts afresh.
READY := $(VENV)/ready-$(firstword $(shell pwd | cksum))
# After the set-up nothing reaches for the network.
OFFLINE := HF_HUB_OFFLINE=1 PIP_NO_INDEX=1

# A program of GCC that was not built with AddressSanitizer has to load its runtime, and what it watches, first.
SANITIZED := LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:allow_user_segv_handler=0 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	MACARON_OPS_NATIVE_LIBRARY=$(CURDIR)/build/$(if $(EMULATE),emulate-)sanitize/libmacaron_ops_cpu.so

.PHONY: help bench test native emulate sanitize check format clean

help:
	@echo "make bench     time Lie-Trotter and Strang layers and a real model: tables, plots, report.html in results/"
	@echo "make test      run the tests (nine to sixteen minutes on 2 cores, by the machine)"
	@echo "make native    build what changed in csrc/ (make bench and make test do it first); cuda where nvcc and a GPU's torch are"
	@echo "make emulate   the tests of the operators on the AVX-512 kernels, emulated with AVX2"
	@echo "make sanitize  the tests of the operators on a library with AddressSanitizer and UBSan (needs GCC)"
	@echo "make check     formatting and lint, changing nothing;  make format  formats and mends"
	@echo "make clean     remove .venv and what tools left, but not results/"
	@echo
	@echo "The first one sets up $(VENV) (needs Python 3.11+, a C++ compiler and the network, once). Variables:"
	@echo "  PYTHON=python3.12     the Python of $(VENV); make clean before another one"
	@echo "  PIP_ARGS='...'        more arguments for pip"
	@echo "  ARGS='-k philox'      more arguments for pytest or for the benchmark"
	@echo "  CXX=clang++ MAX_JOBS=1 MACARON_OPS_BUILD=none   the compiler, how many at a time, or no native libraries"

bench: native
	@$(OFFLINE) $(VENV)/bin/macaron-ops bench main $(ARGS)

test: native
	@$(VENV)/bin/python tools/build_native.py --cuda-on-host
	@$(OFFLINE) $(VENV)/bin/python -m pytest -n auto --maxprocesses=4 --durations=5 $(ARGS)

native: $(READY)
	@$(VENV)/bin/python tools/build_native.py

emulate: $(READY)
	@$(VENV)/bin/python tools/build_native.py --emulate
	@for isa in avx512 avx512_bf16; do \
		$(OFFLINE) MACARON_OPS_NATIVE_LIBRARY=$(CURDIR)/build/emulate/libmacaron_ops_cpu.so MACARON_OPS_CPU_ISA=$$isa \
			$(VENV)/bin/python -m pytest -n auto --maxprocesses=4 --ignore=tests/native/test_build.py tests/ops tests/native \
			$(ARGS) || exit 1; \
	done

sanitize: $(READY)
	@$(VENV)/bin/python tools/build_native.py --sanitize $(if $(EMULATE),--emulate)
	@$(SANITIZED) $(VENV)/bin/python -c "import sys; from macaron_ops import native; sys.exit(native.why_not_loaded())"
	@$(OFFLINE) $(SANITIZED) $(VENV)/bin/python -m pytest -n auto --maxprocesses=4 --capture=sys -m "not inductor" \
		--ignore=tests/native/test_build.py tests/ops tests/native $(ARGS)

check: $(READY)
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .

format: $(READY)
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist macaron_ops/native/*.so macaron_ops/native/build.json *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): constraints.txt setup.py
	@command -v $(or $(PYTHON),python3) >/dev/null || { echo "$(or $(PYTHON),python3) is not there; Python 3.11+ is needed: apt install python3 python3-venv python3-dev"; exit 1; }
	@PYTHON="$(PYTHON)" $(or $(PYTHON),python3) tools/install.py $(VENV) $(READY) $(PIP_ARGS)
