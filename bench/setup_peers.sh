#!/usr/bin/env bash
# Creates the environment of the peers (once) and prints the path of its python on the last line.
set -euo pipefail
cache="${SAE_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/temporal-sae-runner}"
venv="$cache/peers-venv"
done_file="$venv/.ready-torch-2.13.0-saelens-6.54.12-dl-0.1.0-sparsify-1.3.3"
if [ ! -f "$done_file" ]; then
  mkdir -p "$cache"
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet torch==2.13.0 >&2          # pinned first: one torch for all of them
  "$venv/bin/python" -m pip install --quiet torch==2.13.0 \
      sae-lens==6.54.12 dictionary-learning==0.1.0 eai-sparsify==1.3.3 >&2
  "$venv/bin/python" -m pip uninstall --quiet -y torchvision >&2       # comes along, does not match, breaks the imports
  HF_HUB_OFFLINE=1 "$venv/bin/python" -c \
      "import sae_lens, dictionary_learning, sparsify, transformers, datasets, safetensors, tqdm" >&2
  touch "$done_file"
fi
echo "$venv/bin/python"
