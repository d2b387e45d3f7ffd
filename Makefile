# Each target works from a fresh clone: it makes .venv and installs what it needs.

PYTHON ?= python3
PY := .venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint bench

demo: .venv/runtime        ## all five stages on a CPU, offline, then a conversation
	$(PY) generate_sft_v3.py --plain --out data/tiny/conversations.jsonl --pairs data/tiny/pairs.jsonl
	$(PY) prepare_sft_data.py --recipe tiny
	$(PY) train_pretrain.py --recipe tiny
	$(PY) train_pretrain.py --recipe tiny --stage anneal
	$(PY) train_chat_pretrain.py --recipe tiny
	$(PY) train_sft.py --recipe tiny
	$(PY) train_dpo.py --recipe tiny
	printf '%s\n' hello 'who made you?' 'what is 15 + 23?' | $(PY) chat.py --recipe tiny --temp 0
	$(PY) chat.py --recipe tiny

test: .venv/dev            ## the whole test suite; no network, no GPU
	$(PY) -m pytest -n 3

lint: .venv/dev            ## style, formatting, types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m mypy benchmarks/*.py  # apart: they import common.py from beside themselves

bench: .venv/dev           ## speed beside peers, on a CPU, with data made here
	$(PY) generate_sft_v3.py --plain --out data/tiny/conversations.jsonl --pairs data/tiny/pairs.jsonl
	$(PY) prepare_sft_data.py --recipe tiny
	$(PY) benchmarks/data_loader.py --recipe tiny --tokens 500_000 --rounds 3
	$(PY) benchmarks/train_step.py --recipe tiny --rounds 3
	$(PY) benchmarks/train_step.py --recipe v4 --rounds 3 --steps 1
	$(PY) benchmarks/sft_packing.py --recipe tiny --rounds 3
	$(PY) benchmarks/dpo_step.py --recipe tiny

.venv/runtime: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@ .venv/runtime
