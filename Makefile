# Every command a person or CI needs. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RDMA_INSTALLED := $(VENV)/.rdma-installed
CHAOS_INSTALLED := $(VENV)/.chaos-installed
SGLANG := .cache/sglang-env
SGLANG_INSTALLED := $(SGLANG)/.installed
LOWEST := .cache/lowest-env
LOWEST_INSTALLED := $(LOWEST)/.installed
PROMETHEUS := .cache/prometheus
PROMETHEUS_INSTALLED := $(PROMETHEUS)/.installed
COMPOSE := .cache/compose
COMPOSE_INSTALLED := $(COMPOSE)/.installed

KUBERNETES := .cache/kubernetes
KUBERNETES_INSTALLED := $(KUBERNETES)/.installed
NODE := .cache/kubernetes-node
NODE_INSTALLED := $(NODE)/.installed

KUBERNETES_TOOLS := .cache/kubernetes-tools/.installed

.DEFAULT_GOAL := help
.PHONY: help demo demo-onpolicy gpu test test-slow test-lowest test-chaos test-rdma test-network test-sglang sglang-env prometheus-env compose-env kubernetes-tools helm test-observability test-containers test-node check format proto configuration metrics dashboards constraints clean

help:  ## List the targets
	@grep -hE '^[a-zA-Z_%-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

# torch comes first, so that its version is this one. PyPI's for Linux is a CUDA build; with
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu pip takes the build for CPUs.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo,dev]'
	@touch $@

# The real SGLang on a CPU. It pins its own torch and transformers, hence an environment of its own.
$(SGLANG_INSTALLED): pyproject.toml tools/sglang_env/bare.txt tools/sglang_env/packages.txt
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(SGLANG)/bin/pip install --quiet --disable-pip-version-check --no-deps -r tools/sglang_env/bare.txt
	$(SGLANG)/bin/pip install --quiet --disable-pip-version-check -r tools/sglang_env/packages.txt
	$(SGLANG)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# The oldest versions that pyproject.toml allows; of torch that one of which there is a build for CPUs.
$(LOWEST_INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 uv
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --extra demo --extra dev --no-emit-package torch --output-file $(LOWEST)/constraints.txt pyproject.toml
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check --constraint $(LOWEST)/constraints.txt --editable '.[demo,dev]'
	@touch $@

$(RDMA_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[rdma]'
	@touch $@

$(CHAOS_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[chaos]'
	@touch $@

$(PROMETHEUS_INSTALLED): $(INSTALLED) tools/debian_packages.py
	$(BIN)/python tools/debian_packages.py prometheus $(PROMETHEUS)
	@touch $@

$(COMPOSE_INSTALLED): $(INSTALLED) tools/debian_packages.py
	$(BIN)/python tools/debian_packages.py compose $(COMPOSE)
	@touch $@

$(KUBERNETES_TOOLS): tools/install_kubernetes_tools.py $(INSTALLED)
	$(BIN)/python tools/install_kubernetes_tools.py
	@touch $@

# Only a change of how it is built builds it again, which takes long.
$(KUBERNETES_INSTALLED): tools/build_kubernetes.py | $(INSTALLED)
	rm -rf $(KUBERNETES)
	$(BIN)/python tools/debian_packages.py kubernetes $(KUBERNETES)
	$(BIN)/python tools/build_kubernetes.py $(KUBERNETES)
	@touch $@

$(NODE_INSTALLED): $(INSTALLED) tools/debian_packages.py
	$(BIN)/python tools/debian_packages.py node $(NODE)
	@touch $@

demo: $(INSTALLED)  ## Distil a small model on this machine: teacher server, 2-rank trainer, report
	$(BIN)/kdmesh demo

demo-onpolicy: $(INSTALLED)  ## Let a small model learn from its own samples: teacher, rollout server, trainer, report
	$(BIN)/kdmesh demo --on-policy

test: $(INSTALLED) $(KUBERNETES_TOOLS)  ## Everything CI runs, a file of tests on each core
	$(BIN)/pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-rdma: $(RDMA_INSTALLED)  ## The RDMA door, over the test transports of NIXL (70 MB to fetch)
	$(BIN)/pytest -q -m rdma tests/rdma tests/system/test_rdma_job.py

test-slow: $(INSTALLED)  ## Whole suites that `make test` leaves out, to stay short
	$(BIN)/pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile -m slow

# LFM2 and LFM3 need transformers 5.23, before which they are refused; SGLang pins 5.19.
test-lowest: $(LOWEST_INSTALLED) $(KUBERNETES_TOOLS)  ## Unit and contract tests with the oldest packages that pyproject.toml allows
	$(LOWEST)/bin/pytest -q -W ignore::DeprecationWarning -k 'not lfm' --numprocesses auto --maxprocesses 4 --dist loadfile tests/unit tests/contract

test-chaos: $(CHAOS_INSTALLED)  ## Two teachers and three jobs through every fault, at random moments (needs a C compiler)
	$(BIN)/pytest -v -m chaos tests/chaos

test-network: $(INSTALLED)  ## Two hosts as network namespaces, with a slow, lossy and cut wire between them (as root)
	$(BIN)/pytest -q -m network tests/network

sglang-env: $(SGLANG_INSTALLED)  ## An environment with the real SGLang for CPU, about 3 GB, kept between runs

test-sglang: $(SGLANG_INSTALLED) $(KUBERNETES_TOOLS)  ## The SGLang engine against the real SGLang, on the CPU
	PYTHONPATH=tests/support/sglang_standin $(SGLANG)/bin/pytest -q -m sglang tests/sglang

gpu:  ## Correctness, then figures, on one GPU within 10 minutes, by PYTHON's own torch; JSON as last line
	PYTHONPATH=.:services/trainer $(PYTHON) -m benchmarks.gpu

test-browser: $(INSTALLED)  ## The servers' status page in a real Chromium; skipped where there is none
	$(BIN)/pytest -q -rs -m browser tests/system

prometheus-env: $(PROMETHEUS_INSTALLED)  ## Prometheus, promtool and Alertmanager from Debian's packages, 30 MB; `make test` uses promtool if it is there

kubernetes-tools: $(KUBERNETES_TOOLS)  ## helm 3 and 4, which the chart is tested with

test-observability: $(PROMETHEUS_INSTALLED)  ## Rules, alerts and dashboards against a real Prometheus and Alertmanager that read real services
	$(BIN)/pytest -q -m observability tests/observability

compose-env: $(COMPOSE_INSTALLED)  ## Docker's compose from Debian's packages, 13 MB; `make test` uses it if it is there

test-containers: $(COMPOSE_INSTALLED) $(PROMETHEUS_INSTALLED)  ## Images built and a distillation run in them, under a Docker daemon of its own (as root, on Debian; minutes)
	command -v dockerd debootstrap docker-init || apt-get install --yes --no-install-recommends docker.io debootstrap iptables iproute2 tini
	$(BIN)/pytest -v -m containers tests/containers

# In namespaces of their own, the node's mounts, network and processes end with the tests. docker-init waits for orphans.
APART := unshare --mount --net --pid --fork --kill-child --mount-proc docker-init --

test-node: $(INSTALLED) $(KUBERNETES_INSTALLED) $(NODE_INSTALLED) $(KUBERNETES_TOOLS)  ## The chart and jobs on a real, old node of Kubernetes, built from Debian's source the first time (as root, on Debian; up to an hour, then a quarter of one)
	command -v dockerd debootstrap docker-init || apt-get install --yes --no-install-recommends docker.io debootstrap iptables iproute2 tini
	$(BIN)/python -m tests.node.image
	$(APART) $(BIN)/pytest -v -m node tests/node

check: $(INSTALLED)  ## Lint, types, generated code, documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/generate_proto.py --check
	$(BIN)/python tools/generate_helm.py --check
	$(BIN)/python tools/generate_metrics.py --check
	$(BIN)/python -m tools.generate_dashboards --check
	$(BIN)/python tools/generate_configuration.py --check
	$(BIN)/python tools/check_docs.py

format: $(INSTALLED)  ## Rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

configuration: $(INSTALLED)  ## Regenerate docs/configuration.md
	$(BIN)/python tools/generate_configuration.py

metrics: $(INSTALLED)  ## Regenerate the tables of docs/metrics.md
	$(BIN)/python tools/generate_metrics.py

dashboards: $(INSTALLED)  ## Regenerate the Grafana dashboards of the chart
	$(BIN)/python -m tools.generate_dashboards

helm: $(INSTALLED) $(KUBERNETES_TOOLS)  ## Regenerate the chart's values, schema and golden files
	$(BIN)/python tools/generate_helm.py
	$(BIN)/python tools/render_helm.py

constraints: $(INSTALLED)  ## Pin in the images what this environment has
	$(BIN)/python tools/generate_constraints.py

proto: $(INSTALLED)  ## Regenerate kdmesh/v1 from proto/
	$(BIN)/python tools/generate_proto.py

bench-sglang_hidden_states bench-prefix_reuse: bench-%: $(SGLANG_INSTALLED)
	PYTHONPATH=tests/support/sglang_standin $(SGLANG)/bin/python -m benchmarks.$*

bench-transport_rdma: $(RDMA_INSTALLED)
	$(BIN)/python -m benchmarks.transport_rdma

bench-%: $(INSTALLED)  ## Run benchmarks/NAME.py (bench-transport, bench-loss, ...)
	$(BIN)/python -m benchmarks.$*

clean:  ## Remove the virtual environment, caches and runs
	rm -rf $(VENV) .cache runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
