# `make demo`, `make tour`, `make test` and `make lint` from a fresh clone: each makes .venv and installs what it needs.
PYTHON ?= python3
RUN := .venv/bin/python
RUN_OPTIONS := --overwrite --no_wandb
ASKED := config/stories_instruct.py --learning_rate=1e-2 --decay_embedding $(RUN_OPTIONS)
WHOLE_ROWS := config/stories.py --mask_ratio='(0.2,0.8)' $(RUN_OPTIONS)
REQUESTS := --source=stories --name=story_requests --vocab_size=1536 --tokenizer_sample_mb=2 --overwrite
ASK := Tell a story about a shy mouse named Pip who loses a green drum.
ONE := --chat --num_samples=1 --temperature=0
GAP := 'Pip was a curious mouse. One sunny afternoon, Pip took his green drum to the beach. But on the way home, the drum was gone! He felt very worried. A <mask:1> saw him. "Click clack! I will help you," said the crab.'
INFILL := --infill='Bruno was a little bear. He loved to sing. One rainy day, Bruno sat in the park with an <mask:1>. Just then a <mask:1> came by. "Quack! I am so hungry," said the duck. Bruno looked at the apple. It was the last apple.'

# Five minutes on two cores: a model that tells the stories that it is asked for, and fills a gap in one; two pages.
demo: .venv/installed
	$(RUN) prepare/instruct.py $(REQUESTS) --max_examples=12000
	$(RUN) train.py $(ASKED) --max_steps=560 --out_dir=out/demo
	$(RUN) sample.py --checkpoint=out/demo $(ONE) --prompt="$(ASK)" --html=out/demo-watch.html
	$(RUN) sample.py --checkpoint=out/demo $(ONE) --prompt="Tell a story about Lily at the beach. A crab comes along."
	$(RUN) sample.py --checkpoint=out/demo $(ONE) --prompt="Tell a story about Bruno the bear."
	$(RUN) sample.py --checkpoint=out/demo --chat --num_samples=1 --prompt="Tell a story about a mouse who lost a drum." --infill=$(GAP)
	$(RUN) evaluate.py --checkpoint=out/demo --metrics=perplexity,instructions --temperature=0 --num_samples=40 --max_tokens=16000 --html=out/demo.html
	@echo 'The report: out/demo.html; a text being written: out/demo-watch.html; to ask it: python serve.py --checkpoint=out/demo'

# Half an hour: four minutes of each kind, and a model that is asked for stories.
tour: .venv/installed
	$(RUN) prepare/stories.py --overwrite
	$(RUN) train.py config/stories.py $(RUN_OPTIONS) --out_dir=out/demo-ar
	$(RUN) train.py config/stories_blocks.py $(RUN_OPTIONS) --out_dir=out/demo-blocks
	$(RUN) train.py $(WHOLE_ROWS) --out_dir=out/demo-diffusion --architecture=diffusion --max_steps=820
	$(RUN) train.py $(WHOLE_ROWS) --out_dir=out/demo-sdd --architecture=sdd --max_steps=820
	$(RUN) prepare/instruct.py $(REQUESTS)
	$(RUN) train.py $(ASKED) --max_steps=1000 --out_dir=out/demo-requests
	$(RUN) evaluate.py --checkpoint=out/demo-ar,out/demo-blocks,out/demo-diffusion,out/demo-sdd --num_samples=32 --max_tokens=32000 --html=out/demo.html
	$(RUN) sample.py --checkpoint=out/demo-blocks --num_samples=1 --sampler=confidence
	$(RUN) sample.py --checkpoint=out/demo-diffusion --num_samples=1 --sampler=confidence --temperature=0 $(INFILL)
	$(RUN) sample.py --checkpoint=out/demo-requests $(ONE) --prompt="$(ASK)"

test: .venv/test-installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto

lint: .venv/test-installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

.venv/installed: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

.venv/test-installed: requirements-test.txt .venv/installed
	$(RUN) -m pip install -q -r requirements-test.txt
	touch $@

.PHONY: demo tour test lint
