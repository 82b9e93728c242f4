# Two commands are enough:   make demo   make test
#
# Both work from a fresh clone with nothing but Python 3.11 or newer, its venv module and make; tools/venv does the
# set-up, once, and again only when pyproject.toml changes. PYTHON=/path/to/python chooses another interpreter.

BIN := .venv/bin

.PHONY: help demo test check format docs wheel release lab-test clean

help:
	@echo 'make demo [FILE=…]   two domains share pages, here and now (FILE: what to send)'
	@echo 'make test            the test suite, without the lab'
	@echo 'make check           lint, format, types, import rules'
	@echo 'make format          let the formatter have its way'
	@echo 'make docs            build/docs: the pages of docs/ and an API reference'
	@echo 'make wheel           build dist/*.whl, and try it in an empty environment'
	@echo 'make release         the same, and the tag; then docs/releasing.md'
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

# A warning is an error: a link or an anchor that leads nowhere, a docstring that cannot be read.
docs:
	@tools/venv docs
	$(BIN)/sphinx-build -q -W --keep-going -E -b html docs build/docs
	@echo 'build/docs/index.html'

wheel:
	@tools/wheel

release:
	@tools/release

# Two emulators side by side, since each uses one processor. What needs no Xen of these files, `make test` has done.
# Of the second, the last tests let their guests panic.
lab-test:
	@tools/venv dev
	@log=$$(mktemp); trap 'rm -f "$$log"' EXIT; export GNTALLOC_LAB=1; \
	$(BIN)/python -m pytest --durations=5 -k 'real_drivers or vchan or blk' tests/conformance tests/lab/test_vchan.py tests/lab/test_blk.py >"$$log" 2>&1 & beside=$$!; \
	$(BIN)/python -m pytest --durations=5 tests/differential tests/lab/test_stream.py tests/lab/test_store.py tests/lab/test_boot.py; one=$$?; \
	wait $$beside; two=$$?; cat "$$log"; exit $$((one | two))

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
