# make demo   the whole pipeline on a laptop CPU: data, training, quantization, artifact, score, and the audit of that run
# make test   all tests;  make bench   the CPU benchmarks;  make clean   forget everything that was made

PYTHON ?= python3
PY := .venv/bin/python

# PASSIVE: OpenMP threads that spin while a neighbour is busy make a step up to 30 times slower.
# MALLOC_*: keep freed tensors in the process instead of returning 100 MB to the kernel at every step.
export OMP_WAIT_POLICY ?= PASSIVE
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

# Headers of 6 MB for MLP_BACKWARD=cutlass and its test; what the package requires besides is for its Python side.
CUTLASS := nvidia-cutlass==4.2.0.0

# Without an NVIDIA GPU the CPU build of torch is enough and 2 GB smaller: name PyTorch's CPU wheel index as TORCH_INDEX.
.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements.txt
	-if command -v nvcc >/dev/null; then $(PY) -m pip install -q --disable-pip-version-check --no-deps $(CUTLASS); fi
	touch $@

data/demo_docs.jsonl: data/demo_corpus.py .venv/installed
	$(PY) data/demo_corpus.py $@
	touch $@

data/demo/manifest.json: data/demo_docs.jsonl prepare_caseops_data.py lossless_caps.py
	rm -rf data/demo
	$(PY) prepare_caseops_data.py --docs $< --out data/demo --train-tokenizer 1024 --val-docs 80 --workers 2

logs/demo/result.json: train_gpt.py data/demo/manifest.json
	PRESET=demo RUN_ID=demo $(PY) train_gpt.py

demo: logs/demo/result.json
	@sed -n '/^stage /,/^wall /p' logs/demo/demo.txt | tail -n 30
	@echo
	@$(PY) tools/audit.py run logs/demo

lint: .venv/installed
	.venv/bin/ruff check .

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

bench: .venv/installed
	$(PY) bench/cpu.py

clean:
	rm -rf .venv logs build data/demo data/demo_docs.jsonl*
