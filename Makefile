# Each target does all of its own set-up: git, make and Python 3.11 are enough.
#   make demo    checkpoint -> artifact -> graphs -> proof -> SGLang server -> an answer
#   make test    lint, types, import rules and all tests
#   make setup   only the environment
#   make browser Chromium, in which the tests look at report.html

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

# Only files whose hashes requirements/*.txt have.  torch for a CPU comes first, from an index of its own or a mirror.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
INSTALL = -m pip install --no-deps --require-hashes --progress-bar off
TORCH = $(INSTALL) --retries 1 --extra-index-url $(TORCH_INDEX) -r requirements/torch.txt

.PHONY: setup demo test test-ms28 test-clients test-storage test-pd test-install test-walks test-ray eval test-rehearsal test-names test-digests test-drafts test-int8 test-fused test-onnx test-processors test-roofline test-servers test-crashes test-vllm browser compiler transfer hashes check format clean

setup: $(INSTALLED)

$(INSTALLED): requirements/torch.txt requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "Python 3.11 is needed; $(PYTHON) is another. Set PYTHON=/path/to/python3.11."; exit 4; }
	@echo "Setting up $(VENV): 1.3 GB of downloads, 6 GB of disk, some minutes the first time."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(TORCH)
	$(BIN)/python $(INSTALL) -r requirements/cpu.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation --quiet -e .
	@touch $@

demo: setup
	$(BIN)/python -m demo.run

test: check browser compiler
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 40

# Environments that have more than this one: what requirements/NAME.txt says, in .venv-NAME.
.venv-%/.installed: requirements/torch.txt requirements/cpu.txt requirements/%.txt pyproject.toml
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python $(TORCH)
	.venv-$*/bin/python $(INSTALL) -r requirements/cpu.txt -r requirements/$*.txt
	.venv-$*/bin/python -m pip install --no-deps --no-build-isolation --quiet -e .
	@touch $@

# The tests look at report.html in a real browser; MSCONV_NO_BROWSER=1 leaves those tests out.
browser:
	@if [ -n "$$MSCONV_NO_BROWSER" ] || { command -v chromium && command -v chromedriver; } >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; \
	else \
	  echo "The tests of report.html need Chromium: as root, apt-get install chromium chromium-driver;"; \
	  echo "or leave them out: MSCONV_NO_BROWSER=1 make test"; exit 4; \
	fi

# The tests build the CPU's kernels; serving does without them where there is no compiler.
compiler:
	@if command -v c++ || command -v g++; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq g++; \
	else \
	  echo "The tests of the CPU's kernels need a C++ compiler: as root, apt-get install g++" >&2; exit 4; \
	fi >/dev/null

# All layouts that SGLang's NPU path can be rehearsed in here; `make test` takes some of them.
test-rehearsal: setup compiler
	MSCONV_EVERY_LAYOUT=1 $(BIN)/python -m pytest tests/rehearsal

# SGLang's server with every family, layout and draft, and old artifacts; `make test` takes some of them.
test-servers: setup compiler
	MSCONV_EVERY_LAYOUT=1 $(BIN)/python -m pytest tests/e2e tests/format1

# Commands that are ended at each of their steps; `make test` takes one in some.
test-crashes: setup
	MSCONV_EVERY_LAYOUT=1 $(BIN)/python -m pytest tests/stream/test_crash.py tests/stream/test_crash_int8.py \
	  tests/stream/test_reshard.py tests/stream/test_lost_writes.py

# The bytes of weights and graphs in all layouts, against those of before; `make test` takes some of them.
test-digests: setup
	MSCONV_EVERY_LAYOUT=1 $(BIN)/python -m pytest tests/digests tests/runtime/test_mindir_check.py

# Graphs of drafts and their hidden states on all targets, and every fault in them; `make test` takes some.
test-drafts: setup compiler
	MSCONV_EVERY_LAYOUT=1 $(BIN)/python -m pytest tests/verify/test_drafts.py tests/verify/test_hidden.py \
	  tests/verify/test_eagle3.py

# The bounds of docs/roofline.md: every layout counted, every recipe's row; `make test` takes some of each.
test-roofline: setup
	MSCONV_EVERY_LAYOUT=1 $(BIN)/python -m pytest tests/roofline

# Every published name of a supported model, as a small random one, models with experts in every layout, and dense
# ones in every element type; `make test` takes one of each kind.
test-names: setup
	MSCONV_EVERY_LAYOUT=1 $(BIN)/python -m pytest tests/verify/test_other_names.py tests/verify/test_moe_verify.py \
	  tests/verify/test_verify.py

# ONNX files of every kind of model, by onnxruntime too and through onnxruntime-genai: an environment that has them.
test-onnx: .venv-onnx/.installed
	MSCONV_EVERY_LAYOUT=1 .venv-onnx/bin/python -m pytest tests/onnx_files tests/verify/test_attention.py

# vLLM's server and its offline engine with artifacts of every family: an environment that has vLLM for a CPU.
test-vllm: compiler .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest tests/vllm_engine

# Graphs of every family with operations fused that are not by default; `make test` takes one.
test-fused: setup
	MSCONV_EVERY_LAYOUT=1 $(BIN)/python -m pytest tests/verify/test_fused.py

# Int8 graphs of every family, kind and target; `make test` takes some of each.
test-int8: setup compiler
	MSCONV_EVERY_LAYOUT=1 $(BIN)/python -m pytest tests/verify/test_int8.py

# The CPU's kernels on processors that this machine is not, by QEMU, built by g++ and clang; sessions with every variant
# that it can run.
test-processors: setup compiler
	@if { command -v qemu-aarch64 && command -v aarch64-linux-gnu-g++ && command -v clang++; } >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    g++-aarch64-linux-gnu qemu-user clang >/dev/null; \
	else \
	  echo "Other processors need, as root, apt-get install g++-aarch64-linux-gnu qemu-user clang" >&2; exit 4; \
	fi
	test -x .venv-aarch64/python || ! command -v apt-get >/dev/null || $(BIN)/python tests/processors/arm.py .venv-aarch64
	MSCONV_PROCESSORS=1 $(BIN)/python -m pytest tests/processors tests/runtime/test_variants.py

# Graphs must export and load under MindSpore 2.8.0 too: a second environment, and the tests that need it.
test-ms28: setup .venv-ms28/.installed
	$(BIN)/python -m pytest tests/ms28

.venv-ms28/.installed: requirements/ms28.txt pyproject.toml
	test -x .venv-ms28/bin/python || $(PYTHON) -m venv .venv-ms28
	.venv-ms28/bin/python $(INSTALL) -r requirements/ms28.txt
	.venv-ms28/bin/python -m pip install --no-deps --no-build-isolation --quiet -e .
	@touch $@

# Conversions by nodes of a Ray cluster on this machine, which are killed: an environment that has Ray, and no more.
# Proofs by such nodes: another, which has torch too.
test-ray: setup .venv-ray/.installed .venv-ray-proof/.installed
	$(BIN)/python -m pytest tests/ray

.venv-ray/.installed: requirements/ray.txt pyproject.toml
	test -x .venv-ray/bin/python || $(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python $(INSTALL) -r requirements/ray.txt
	.venv-ray/bin/python -m pip install --no-deps --no-build-isolation --quiet -e .
	@touch $@

# SGLang's benchmark, the OpenAI client and /v1/responses against a served artifact: an environment that has them.
test-clients: compiler .venv-clients/.installed
	.venv-clients/bin/python -m pytest tests/clients

# Checkpoints and artifacts in an object store: an environment with s3fs and a server that speaks S3, on loopback.
test-storage: .venv-storage/.installed
	.venv-storage/bin/python -m pytest tests/storage

# What mooncake links with: Debian's libraries of RDMA.
transfer:
	@if ldconfig -p | grep -q libibverbs.so.1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    libibverbs1 librdmacm1 libnl-3-200 libnl-route-3-200 libnuma1 >/dev/null; \
	else \
	  echo "Moving caches needs, as root, apt-get install libibverbs1 librdmacm1 libnl-3-200 libnl-route-3-200 libnuma1" >&2; \
	  exit 4; \
	fi

# Prefill and decode by two servers, keys and values by mooncake over TCP: an environment that has it and SGLang's
# router.  mooncake needs libraries of the system too; a server that lacks them names them.
test-pd: compiler transfer .venv-pd/.installed
	.venv-pd/bin/python -m pytest tests/pd

# The wheel in environments of its own, beside SGLang and what it pins; hadolint over docker/, systemd and Kubernetes'
# schemas over docs/production.md.  The tests make these environments and remove them.
test-install: setup
	MSCONV_INSTALL=1 $(BIN)/python -m pytest tests/install

# What the README and the pages show, typed line by line, with a hub on localhost.
test-walks: setup compiler
	MSCONV_WALKS=1 $(BIN)/python -m pytest tests/docs/test_walks.py

# lm-evaluation-harness asks a served artifact, and runs transformers on the same checkpoint: a third environment.
eval: setup compiler .venv-eval/.installed
	$(BIN)/python -m pytest tests/eval

.venv-eval/.installed: requirements/torch.txt requirements/eval.txt
	test -x .venv-eval/bin/python || $(PYTHON) -m venv .venv-eval
	.venv-eval/bin/python $(TORCH)
	.venv-eval/bin/python $(INSTALL) -r requirements/eval.txt
	@touch $@

# Hashes of every file of each version that requirements/*.txt name: after a change of a version.
hashes:
	test -x .venv-hashes/bin/uv || $(PYTHON) -m venv .venv-hashes
	.venv-hashes/bin/python -m pip install --progress-bar off uv==0.13.9
	.venv-hashes/bin/python requirements/hashes.py .venv-hashes/bin/uv

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	find artifacts -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
