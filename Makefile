# The two commands of the README are `make demo` and `make test`; both set themselves up.
PY := .venv/bin/python

.PHONY: demo test bench soak lint clean setup-run setup-test

setup-run:
	@tools/setup.sh run

setup-test:
	@tools/setup.sh test

demo: setup-run
	@$(PY) tools/demo.py

lint: setup-test
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

test: lint
	$(PY) -m pytest

bench: setup-test
	$(PY) tools/bench.py

soak: setup-test
	COWFERRY_SOAK=1 $(PY) -m pytest --timeout 0

clean:
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build src/*.egg-info
