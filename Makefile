# Two commands are enough:   make demo   make test
#
# Both work from a fresh clone with nothing but Python 3.11 or newer, its venv module and make; tools/venv does the
# set-up, once, and again only when pyproject.toml changes. PYTHON=/path/to/python chooses another interpreter.

BIN := .venv/bin

.PHONY: help demo test check format lab-test clean

help:
	@echo 'make demo [FILE=…]   two domains share pages, here and now (FILE: what to send)'
	@echo 'make test            the test suite, without the lab'
	@echo 'make check           lint, format, types, import rules'
	@echo 'make format          let the formatter have its way'
	@echo 'make lab-test        the tests that boot a real Xen in QEMU'
	@echo 'make clean           remove .venv and caches'

# FILE reaches the recipe through the environment, so that any name is safe.
demo:
	@tools/venv run
	@$(BIN)/gntalloc demo $${FILE:+"$$FILE"}

test:
	@tools/venv dev
	@env -u GNTALLOC_LAB $(BIN)/python -m pytest

check:
	@tools/venv dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format:
	@tools/venv dev
	$(BIN)/ruff format

# In this order: the last of test_boot's tests let the guests of the shared boot panic.
lab-test:
	@tools/venv dev
	GNTALLOC_LAB=1 $(BIN)/python -m pytest --durations=8 tests/conformance tests/differential tests/lab/test_stream.py tests/lab/test_boot.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
