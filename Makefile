# make demo: the whole method on the shapes set, about five minutes on two cores.   make test: every test.
# All set themselves up: a .venv from requirements.txt (tests and VOC: requirements-dev.txt too).
PYTHON ?= python3
PY = .venv/bin/python

demo: .venv/installed
	$(PY) train_cls.py
	$(PY) make_labels.py
	$(PY) train_seg.py
	$(PY) eval.py
	@echo
	@echo "Pictures: runs/shapes/panels.png (images, labels, predictions) and runs/shapes/curves.png (the trainings);"
	@echo "runs/shapes/index.md says what else lies there."
	@echo "Next: your photographs, by the network trained on VOC 2007: $(PY) -m pip install timm, then"
	@echo "$(PY) eval.py weights=weights/voc2007_seg.pth images=YOUR_PHOTOS run.name=photos;"
	@echo "or make voc2007; or your own images and boxes: docs/own_data.md"

# make voc, make voc2007: the whole method on PASCAL VOC 2012 or 2007, and its scores beside the paper's. The same
# command resumes an interrupted run. CONFIG=FILE chooses other settings.
voc: YEAR = 2012
voc: CONFIG ?= configs/voc_vgg16.yaml
voc2007: YEAR = 2007
voc2007: CONFIG ?= configs/voc2007.yaml
voc voc2007: .venv/installed-dev
	$(PY) tools/download_voc.py $(YEAR) data
	$(PY) train_cls.py $(CONFIG)
	$(PY) make_labels.py $(CONFIG)
	$(PY) train_seg.py $(CONFIG)
	$(PY) eval.py $(CONFIG)
	$(PY) eval.py $(CONFIG) 'scales=[0.5, 0.75, 1, 1.5]' flip=true crf=true
	$(PY) tools/paper.py $(CONFIG)

test: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m mypy *.py tools/*.py
	$(PY) -m pytest tests -n auto --dist loadfile --no-loadscope-reorder

# Which lines of the top level and of tools/ the tests run, in all their processes.
coverage: .venv/installed-dev
	$(PY) -m pip install --quiet 'coverage>=7.10'
	mkdir -p runs/coverage
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest tests -n auto --dist loadfile --no-loadscope-reorder
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report

# pydensecrf2 asks for a Cython to build with that knows no Python after 3.12: it gets today's, without isolation.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip setuptools wheel cython
	$(PY) -m pip install --quiet --no-build-isolation -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: demo test coverage voc voc2007
