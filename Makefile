# make demo: the whole method on the shapes set, about five minutes on two cores.   make test: every test.
# Both set themselves up: a .venv from requirements.txt (tests: requirements-dev.txt too).
PYTHON ?= python3
PY = .venv/bin/python

demo: .venv/installed
	$(PY) train_cls.py
	$(PY) make_labels.py
	$(PY) train_seg.py
	$(PY) eval.py

test: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m mypy *.py tools/*.py
	$(PY) -m pytest tests -n auto --dist loadfile --no-loadscope-reorder

# pydensecrf2 asks for a Cython to build with that knows no Python after 3.12: it gets today's, without isolation.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip setuptools wheel cython
	$(PY) -m pip install --quiet --no-build-isolation -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: demo test
