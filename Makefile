# Two commands: `make run` (train, evaluate and plot one variant) and `make test`. `make help` says more.
# Settings: make run VARIANT=topk IDEA=my_idea PYTHON=python3.12 SAE_CACHE_DIR=/large/disk
PYTHON ?= python3
VARIANT ?=
IDEA ?=
export PYTHON VARIANT IDEA SAE_CACHE_DIR
.PHONY: help env run test references mutations kills interop
.DEFAULT_GOAL := help

# What every target begins with: a way to stop with one line, the cache's folder, the path of the environment.
define BEGIN
set -eu; die() { echo "make: $$*" >&2; exit 1; }; \
"$$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
    || die "Python 3.11 or newer is needed, and '$$PYTHON' is not that: make $@ PYTHON=/path/to/python3.11"; \
SAE_CACHE_DIR="$${SAE_CACHE_DIR:-$${XDG_CACHE_HOME:-$$HOME/.cache}/temporal-sae-runner}"; \
case "$$SAE_CACHE_DIR" in /*) ;; *) SAE_CACHE_DIR="$$PWD/$$SAE_CACHE_DIR" ;; esac; export SAE_CACHE_DIR; \
name_of() { "$$PYTHON" -c 'import hashlib, sys; print("%d.%d-" % sys.version_info[:2] \
    + hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest()[:12])' "$$1"; }; \
env="$$SAE_CACHE_DIR/venv-$$(name_of requirements.txt)"; python="$$env/bin/python"
endef

# The environment is trusted only with the file "complete" in it, written last. One make at a time builds it.
define BUILD
mkdir -p "$$SAE_CACHE_DIR" || die "the cache cannot be at $$SAE_CACHE_DIR: set SAE_CACHE_DIR to another folder"; \
if ! [ -e "$$env/complete" ]; then ( \
    if command -v flock >/dev/null; then exec 9>"$$env.lock"; flock 9; fi; \
    if [ -e "$$env/complete" ]; then exit 0; fi; \
    echo "Making the virtual environment $$env (once for these requirements; takes some minutes)"; \
    rm -rf "$$env"; \
    "$$PYTHON" -m venv "$$env" || die "no virtual environment could be made: on Debian install python3-venv"; \
    echo "Installing the pinned requirements"; \
    "$$python" -m pip install -q --disable-pip-version-check -r requirements.txt \
        || die "the requirements could not be installed (see above); the same command tries again"; \
    : > "$$env/complete" ); fi
endef

help:
	@echo "make run [VARIANT=slow] [IDEA=VARIANT]      trains, evaluates and plots VARIANT in a copy under ideas/IDEA, as its"
	@echo "                                            next run_1, run_2, ... VARIANT is one of:"
	@"$$PYTHON" -m runtime.idea_folder --list | fold -s -w 76 | sed 's/^/                                            /'
	@echo "make test                                   runs the whole test suite"
	@echo "make references                             makes the committed runs again: run_0 and run_batch_topk"
	@echo "make mutations                              runs 93 edits of the kind agents make; a table of what comes of each"
	@echo "make kills                                  kills runs at 20 random moments and compares how they end"
	@echo "make interop                                loads and measures SAEs of every variant in SAELens and SAEBench"
	@echo "make env                                    makes the virtual environment of all but interop and says where it is"
	@echo "All take PYTHON=python3 (3.11 or newer) and SAE_CACHE_DIR=~/.cache/temporal-sae-runner (environment, caches)."

env:
	@$(BEGIN); $(BUILD); echo "The environment is ready: . '$$env/bin/activate'"

run:
	@$(BEGIN); \
	idea="$$("$$PYTHON" -m runtime.idea_folder --variant="$$VARIANT" --idea="$$IDEA")"; \
	$(BUILD); cd "$$idea"; \
	i=1; while [ -e "run_$$i" ]; do i=$$((i + 1)); done; \
	echo "Running python experiment.py --out_dir=run_$$i"; "$$python" experiment.py --out_dir="run_$$i"; \
	echo "Running python plot.py"; "$$python" plot.py; \
	echo "Done. Open $$idea/run_$$i/features.html, then $$idea/comparison.md and $$idea/headline_metrics.png"

test:
	@$(BEGIN); $(BUILD); \
	tested="$$env/tests-$$(name_of tests/requirements.txt)"; \
	if ! [ -e "$$tested" ]; then \
	    echo "Installing the tests' requirements"; \
	    "$$python" -m pip install -q --disable-pip-version-check -r requirements.txt -r tests/requirements.txt \
	        || die "the tests' requirements could not be installed (see above)"; \
	    : > "$$tested"; fi; \
	echo "Running python -m pytest tests -q -n 2 --dist loadfile"; "$$python" -m pytest tests -q -n 2 --dist loadfile

references:
	@$(BEGIN); $(BUILD); "$$python" bench/references.py

mutations kills:
	@$(BEGIN); $(BUILD); "$$python" tests/$@.py

# The peers have an environment of their own, beside the runner's
interop:
	@$(BEGIN); peers="$$(bench/setup_interop.sh | tail -1)" || die "the peers' environment could not be made (see above)"; \
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$$peers" bench/interop.py
