# make demo   set up, prepare Shakespeare, train config/train_mla.py (under a minute on 2 cores), sample
# make test   set up, run the tests, then ruff on the tracked files
# Both skip what is done already.

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow lint clean

demo: .venv/ready data/shakespeare_char/meta.json
	@if [ -f out-demo/ckpt.pt ]; then from=resume; else from=scratch; fi; \
	 $(PY) train.py config/train_mla.py --out_dir=out-demo --init_from=$$from
	$(PY) sample.py --out_dir=out-demo --start="ROMEO:" --max_new_tokens=400

test: .venv/ready-dev
	$(PY) -m pytest
	@$(MAKE) --no-print-directory lint

test-slow: .venv/ready-dev
	$(PY) -m pytest -m slow

lint: .venv/ready-dev
	git ls-files -z '*.py' | xargs -0 .venv/bin/ruff check

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	 "nanoMLA needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

data/shakespeare_char/meta.json: | .venv/ready
	$(PY) data/shakespeare_char/prepare.py

clean:
	rm -rf .venv out-demo .pytest_cache .ruff_cache
