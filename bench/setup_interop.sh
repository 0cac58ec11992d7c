#!/usr/bin/env bash
# Adds SAEBench to the environment of the peers (once) and prints the path of its python on the last line.
set -euo pipefail
python="$("$(dirname "$0")/setup_peers.sh" | tail -1)"
done_file="$(dirname "$(dirname "$python")")/.ready-saebench-0.6.0"
if [ ! -f "$done_file" ]; then
  # --no-deps: it asks for numpy < 2 and datasets < 4, which nothing below needs; the second line is what its modules import
  "$python" -m pip install --quiet --no-deps sae-bench==0.6.0 \
      collectibles tabulate seaborn matplotlib contourpy cycler kiwisolver fonttools pyparsing openai jiter >&2
  HF_HUB_OFFLINE=1 "$python" -c \
      "import sae_bench.evals.core.main, sae_lens, dictionary_learning, sparsify" >&2
  touch "$done_file"
fi
echo "$python"
