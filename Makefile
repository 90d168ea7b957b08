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

# A container image around a bundle. Where no Docker daemon runs, CONTAINER builds it, if that is there.
CONTAINER ?= ../shared/tools/container
IMAGE ?= automl_cv
EXTRAS ?= serve
read_name = import json, sys; print(json.load(open(sys.argv[1]))["name"])
image:
	@test -f $(BUNDLE)/model.json || { echo "There is no bundle in $(BUNDLE): make image BUNDLE=..."; exit 2; }
	@case $(patsubst ./%,%,$(BUNDLE:/=)) in outputs/runs/*/model) ;; *) \
		echo "The build sees no bundle outside of outputs/runs/NAME/model. Copy it there."; exit 2;; esac
	@set -e -- --build-arg BUNDLE=$(BUNDLE) --build-arg EXTRAS=$(EXTRAS) --build-arg "REVISION=$$(git rev-parse HEAD 2>/dev/null)" \
		--build-arg "MODEL=$$($(PYTHON) -c '$(read_name)' $(BUNDLE)/model.json)" \
		--build-arg "MODEL_SHA256=$$(sha256sum $(BUNDLE)/model.onnx | cut -d ' ' -f 1)"; \
	if [ ! -f $(CONTAINER) ] || docker ps >/dev/null 2>&1; then docker build "$$@" -t $(IMAGE) .; \
	else bash $(CONTAINER) build . $(IMAGE) -- "$$@"; fi

hooks: $(READY)
	git config --local merge.nbdev-merge.driver "$(BIN)/nbdev_merge %O %A %B %P"
	git config --local merge.nbdev-merge.name "resolve conflicts with nbdev_fix"

clean:
	rm -rf .venv build dist *.egg-info
