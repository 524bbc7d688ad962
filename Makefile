# Two commands do all the set-up they need on a fresh Debian or Ubuntu machine with Python 3.10 to 3.13:
#
#   make demo    demonstrations in LIBERO -> phase 1 -> phase 2 -> offline MSE -> rollouts with video and curves
#   make test    the tests; make test-fast those without simulator and other processes, in less than a minute;
#                make test-interop those with other projects' programs, which get environments of their own
#
# make lint checks style and types, make bench measures how fast all of it is, make table prints the component table,
# make clean-demo forgets what the demo made, make libero-object-cpu (or -gpu) trains one policy for ten tasks, make
# libero-object-looks one that looks.
# PYTHON=python3.11 chooses the interpreter, VENV=DIR where the environment goes. Another Python is tested beside the
# first one with: make test PYTHON=python3.13 VENV=/tmp/venv313, another torch with TORCH=torch==2.6.0 in its place.
#
# make lock writes requirements-lock.txt anew from the other requirements files, make audit looks it up in databases of
# vulnerabilities, and make licences lists the licences of what is in it (docs/licences.md).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo libero-object-cpu libero-object-gpu libero-object-looks test test-fast test-interop lint bench
.PHONY: table clean-demo install system-packages lock audit licences

VENV ?= .venv
RUN := $(VENV)/bin/python
# An environment that is there keeps its Python, whatever python3 has become meanwhile; one that is half made, or whose
# Python is gone, is made anew.
IS_SOUND := $(shell $(RUN) -c "import pip" 2>/dev/null && echo yes)
PYTHON ?= $(if $(IS_SOUND),$(RUN),python3)
ifndef IS_SOUND
.PHONY: $(VENV)/.installed
endif
# A torch that is there already stays (your GPU's build), unless TORCH=... asks for another one.
CHOSEN := $(TORCH)
ifeq ($(CHOSEN),)
override TORCH := torch==2.13.0
else ifneq ($(CHOSEN),$(shell cat $(VENV)/.installed 2>/dev/null))
.PHONY: $(VENV)/.installed
endif
# Without an NVIDIA GPU PyTorch's own CPU build is enough: 0.2 GB instead of 3. It sorts before PyPI's build.
CPU_BUILD := $(shell command -v nvidia-smi >/dev/null || \
  echo --retries 1 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu)
export TIMEFORMAT = [%0R s]

# The demo: one task (6 of libero_object, the butter), trained and evaluated with conf/quickstart.yaml.
QUICK := --config conf/quickstart.yaml
DATA := data/quickstart
RUNS := checkpoints/quickstart
PHASE1 := $(RUNS)/phase1_temporal_jepa
PHASE2 := $(RUNS)/phase2_flow_matching
ROLLOUTS := $(RUNS)/rollouts

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n '1,13p'

demo: $(PHASE2)/curves.png $(PHASE2)/offline.txt $(ROLLOUTS)/.done
	@echo
	@tail -n 9 $(PHASE2)/offline.txt
	@echo "learning curves: $(PHASE1)/curves.png $(PHASE2)/curves.png"
	@echo "rollouts, with videos: $(ROLLOUTS)/report.html"
	@grep '^overall' $(ROLLOUTS)/summary.txt

$(DATA)/.done: | install
	@echo "== demonstrations from the simulator"
	@time $(RUN) collect_demos.py $(QUICK) --tasks 6 --image_size 64 --visual_mesh_ratio 0.2
	@$(RUN) embed_language.py $(QUICK) --encoder offline
	@touch $@

# A training that was interrupted goes on from where it was (it ends with an error, so that no half of it is taken for
# the whole), an evaluation from its last episode.
$(PHASE1)/.done: | $(DATA)/.done
	@echo "== phase 1: temporal JEPA"
	@time $(RUN) train.py $(QUICK) --phase 1 --resume
	@touch $@

$(PHASE2)/.done: | $(PHASE1)/.done
	@echo "== phase 2: flow matching on the frozen encoder"
	@time $(RUN) train.py $(QUICK) --phase 2 --phase1_checkpoint $(PHASE1)/checkpoint_best.pt --resume
	@touch $@

$(PHASE2)/curves.png: | $(PHASE2)/.done
	@$(RUN) plot_curves.py $(PHASE1) $(PHASE2)

$(PHASE2)/offline.txt: | $(PHASE2)/.done
	@echo "== offline MSE on the held-out demos"
	@time $(RUN) eval.py --checkpoint $(PHASE2)/checkpoint_best.pt > $@.part
	@mv $@.part $@

$(ROLLOUTS)/.done: | $(PHASE2)/.done
	@echo "== rollouts from the suite's init states"
	@mkdir -p $(ROLLOUTS)
	@time $(RUN) run_libero_eval.py --checkpoint $(PHASE2)/checkpoint_best.pt --task_suite libero_object --tasks 6 \
	  --num_trials 20 --save_video all --output_dir $(ROLLOUTS) | tee $(ROLLOUTS)/summary.txt
	@touch $@

# One policy for all ten tasks (figures in docs/learning.md): about two hours on two CPU cores. On a machine with an
# NVIDIA GPU, libero-object-gpu does the same with the guide's full-size model and LIBERO's own pictures.
DEMOS := --tasks 0-9 --image_size 128 --shift_target 0.05 --missed_grasps 0.4
libero-object-cpu: DEMOS += --visual_mesh_ratio 0.2

libero-object-cpu libero-object-gpu: libero-object-%: install
	@$(RUN) collect_demos.py --config conf/libero_object_$*.yaml $(DEMOS)
	@$(RUN) embed_language.py --config conf/libero_object_$*.yaml --encoder offline
	@$(RUN) train.py --config conf/libero_object_$*.yaml --phase 1 --resume
	@$(RUN) eval.py --checkpoint checkpoints/libero_object_$*/phase1_temporal_jepa/checkpoint_latest.pt
	@$(RUN) train.py --config conf/libero_object_$*.yaml --phase 2 --resume \
	  --phase1_checkpoint checkpoints/libero_object_$*/phase1_temporal_jepa/checkpoint_latest.pt
	@$(RUN) run_libero_eval.py --checkpoint checkpoints/libero_object_$*/phase2_flow_matching/checkpoint_latest.pt \
	  --num_trials 10 --side_by_side 0.05 --output_dir checkpoints/libero_object_$*/rollouts

# The same with shuffled layouts beside LIBERO's own, and scenes without a demonstration: a policy that looks, in less
# than two hours. What it then solves everywhere, beside blind policies, takes about as long again.
LOOKS := --config conf/libero_object_cpu.yaml --config conf/libero_object_looks.yaml
# All of it shows LIBERO's own pictures; drawing every fifth step alone takes a quarter of the time.
SHUFFLED := --data_directory data/libero_object_shuffled --image_size 128
LOOKING := checkpoints/libero_object_looks
libero-object-looks: install
	@$(RUN) collect_demos.py $(DEMOS) --data_directory data/libero_object_own --demos_per_task 24 --draw_every 5
	@$(RUN) collect_demos.py $(SHUFFLED) --layouts shuffled --missed_grasps 0.4 --demos_per_task 60 --draw_every 5
	@$(RUN) collect_demos.py $(SHUFFLED) --scenes 240
	@$(RUN) embed_language.py $(LOOKS) --encoder offline
	@$(VENV)/bin/torchrun --nproc_per_node=2 train.py $(LOOKS) --phase 1 --resume --batch_size 32
	@$(RUN) eval.py --checkpoint $(LOOKING)/phase1_temporal_jepa/checkpoint_latest.pt --sight
	@$(RUN) train.py $(LOOKS) --phase 2 --resume --phase1_checkpoint $(LOOKING)/phase1_temporal_jepa/checkpoint_latest.pt
	@$(RUN) eval.py --checkpoint $(LOOKING)/phase2_flow_matching/checkpoint_latest.pt --turning
	@$(RUN) -m experiments.everywhere --blind --checkpoint $(LOOKING)/phase2_flow_matching/checkpoint_latest.pt \
	  --output_dir $(LOOKING)/everywhere

clean-demo:
	rm -rf $(DATA) $(RUNS)

test: install $(VENV)/reference/.installed
	@OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(VENV)/reference) $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: install
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not simulator and not slow"

# Other projects' programs, with versions of packages that are not ours: test-interop-NAME is for one of them.
INTEROP := $(patsubst tests/interop/requirements-%.txt,%,$(wildcard tests/interop/requirements-*.txt))
.PHONY: $(INTEROP:%=test-interop-%)

test-interop: $(INTEROP:%=test-interop-%)

$(INTEROP:%=test-interop-%): test-interop-%: install $(VENV)/interop-%/.installed
	@OMP_NUM_THREADS=1 INTEROP=$(abspath $(VENV)) $(RUN) -m pytest tests/interop/test_$**.py

$(VENV)/interop-%/.installed: tests/interop/requirements-%.txt | install
	@$(RUN) -m venv --clear $(VENV)/interop-$*
	@$(VENV)/interop-$*/bin/pip install --quiet $(CPU_BUILD) -r $<
	@touch $@

lint: install
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(RUN) -m mypy

# Figures: benchmarks/results/*.json and docs/speed.png. The machine should do nothing else meanwhile.
bench: install $(VENV)/reference/.installed $(VENV)/peers/.installed
	@PYTHONPATH=$(abspath $(VENV)/reference):$(abspath $(VENV)/peers) $(RUN) benchmarks/run_all.py

table: install
	@$(RUN) statevla_model.py --config conf/config.yaml

install: $(VENV)/.installed

# torch comes last: all that it needs is there then, but for a CUDA build's libraries.
$(VENV)/.installed: requirements-lock.txt | system-packages
	@echo "== installing into $(VENV)"
	@$(if $(IS_SOUND),,$(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV))
	@time .ci/install-lock $(RUN) $<
	@$(if $(CHOSEN),false,$(RUN) -c "import torch" 2>/dev/null) || $(RUN) -m pip install --quiet $(TORCH) $(CPU_BUILD)
	@echo "$(CHOSEN)" > $@

# The lock keeps its versions, as far as the requirements let it; make lock UPGRADE=--upgrade takes the newest.
LOCKED := requirements.txt requirements-dev.txt
lock: $(VENV)/tools/.installed
	@$(VENV)/tools/bin/uv pip compile --quiet $(UPGRADE) $(LOCKED) -c <(echo "$(TORCH)") -o requirements-lock.txt
	@$(MAKE) --no-print-directory licences

licences: install
	@$(RUN) .ci/licences.py

# What is known and stays, with its reason in docs/dependencies.md.
ACCEPTED := CVE-2025-53644 CVE-2025-50817
audit: $(VENV)/tools/.installed
	@$(VENV)/tools/bin/pip-audit --no-deps --disable-pip --progress-spinner off --strict $(ACCEPTED:%=--ignore-vuln %) \
	  -r <(sed 's/ *\\$$//; /--hash=/d' requirements-lock.txt; echo "$(TORCH)")

# Neither needs what the lock installs.
$(VENV)/tools/.installed: .ci/requirements-tools.txt
	@$(PYTHON) -m venv --clear $(VENV)/tools
	@$(VENV)/tools/bin/pip install --quiet -r $<
	@touch $@

# mamba-ssm's Python files, without kernels and beside the environment, where only the tests find them: they hold
# jepa/mamba.py against mamba-ssm's own module on any CPU.
$(VENV)/reference/.installed: benchmarks/requirements-reference.txt | install
	@MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(VENV)/bin/pip install --quiet --no-build-isolation --no-deps \
	  --require-hashes --upgrade --target $(VENV)/reference -r $<
	@touch $@

# Other implementations of Mamba, which benchmarks/encoder.py compares with.
$(VENV)/peers/.installed: benchmarks/requirements.txt | install
	@$(VENV)/bin/pip install --quiet --no-deps --require-hashes --upgrade --target $(VENV)/peers -r $<
	@touch $@

# What no Python package brings: the software renderer's libraries, venv itself on Debian, and a C++ compiler. A Python
# that has no simulator, or is not the environment's, is refused.
system-packages:
	@.ci/system-packages $(PYTHON) $(RUN)
