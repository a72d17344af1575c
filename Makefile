# `make demo` and `make test` from a fresh clone: each makes .venv and installs what it needs.
PYTHON ?= python3
RUN := .venv/bin/python

demo: .venv/installed
	$(RUN) prepare/stories.py --overwrite
	$(RUN) train.py config/stories.py --out_dir=out/demo-ar --overwrite --no_wandb
	$(RUN) train.py config/stories.py --out_dir=out/demo-diffusion --overwrite --architecture=diffusion --no_wandb
	$(RUN) train.py config/stories.py --out_dir=out/demo-sdd --overwrite --architecture=sdd --no_wandb
	$(RUN) sample.py --checkpoint=out/demo-ar --num_samples=2
	$(RUN) sample.py --checkpoint=out/demo-diffusion --num_samples=2 --sampler=blocks
	$(RUN) sample.py --checkpoint=out/demo-sdd --num_samples=2 --sampler=blocks
	$(RUN) sample.py --checkpoint=out/demo-diffusion --num_samples=3 --sampler=confidence --infill="Once upon a time there was a <mask:2> named Lily. She loved <mask:3>."
	$(RUN) evaluate.py --checkpoint=out/demo-ar,out/demo-diffusion,out/demo-sdd --num_samples=32 --max_tokens=32000

test: .venv/test-installed
	$(RUN) -m pytest -q

.venv/installed: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

.venv/test-installed: requirements-test.txt .venv/installed
	$(RUN) -m pip install -q -r requirements-test.txt
	touch $@

.PHONY: demo test
