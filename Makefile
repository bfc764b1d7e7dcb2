# make demo   set up, prepare Shakespeare, train config/train_mla.py (under a minute on 2 cores), sample
# make serve  set up, train the demo run if it is missing, open its page on http://127.0.0.1:8000
# make test   set up, run the tests, then ruff on the tracked files
# All skip what is done already.

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo serve test test-slow test-browser lint clean

demo: .venv/ready data/shakespeare_char/meta.json
	@if [ -f out-demo/ckpt.pt ]; then from=resume; else from=scratch; fi; \
	 $(PY) train.py config/train_mla.py --out_dir=out-demo --init_from=$$from
	$(PY) sample.py --out_dir=out-demo --start="ROMEO:" --max_new_tokens=400

serve: .venv/ready-serve data/shakespeare_char/meta.json
	@test -f out-demo/ckpt.pt || $(PY) train.py config/train_mla.py --out_dir=out-demo
	$(PY) -m tools.serve --out_dir=out-demo || test $$? -eq 130  # Ctrl-C

test: .venv/ready-dev
	$(PY) -m pytest
	@$(MAKE) --no-print-directory lint

test-slow: .venv/ready-dev
	$(PY) -m pytest -m slow

# The page in a real browser; where there is none, the reason of the skips says how to get one.
test-browser: .venv/ready-dev
	$(PIP) "playwright>=1.50"
	$(PY) -m pytest -m browser -rs

lint: .venv/ready-dev
	git ls-files -z '*.py' | xargs -0 .venv/bin/ruff check

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	 "nanoMLA needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@touch $@

.venv/ready-serve: .venv/ready requirements-serve.txt
	$(PIP) -r requirements-serve.txt
	@touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt requirements-serve.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

data/shakespeare_char/meta.json: | .venv/ready
	$(PY) data/shakespeare_char/prepare.py

clean:
	rm -rf .venv out-demo .pytest_cache .ruff_cache
