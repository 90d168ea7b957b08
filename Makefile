# Two commands do everything: `make demo` and `make test`. Both set up what they need, once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
BUNDLE ?= outputs/runs/demo/model
.PHONY: setup demo test lab image hooks clean

setup: $(READY)

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "automl_cv needs Python 3.11 or newer")'
	@echo "Setting up .venv: about 200 packages, a few minutes, once."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt pip
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[serve,train,dev]"
	@touch $(READY)

demo: $(READY)
	@rm -rf outputs/runs/demo
	@$(BIN)/automl-cv run demo:200 --out outputs/runs/demo --backbone small_cnn --scratch --size 64 \
		--batch-size 32 --time none --trials 4 --max-epochs 16 --name demo

test: $(READY)
	@$(BIN)/python tests/notebooks.py
	@$(BIN)/python -m pytest

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir nbs

# A container image around a bundle, with whatever builds images here.
image:
	docker build --build-arg BUNDLE=$(BUNDLE) -t automl_cv .

hooks: $(READY)
	git config --local merge.nbdev-merge.driver "$(BIN)/nbdev_merge %O %A %B %P"
	git config --local merge.nbdev-merge.name "resolve conflicts with nbdev_fix"

clean:
	rm -rf .venv build dist *.egg-info
