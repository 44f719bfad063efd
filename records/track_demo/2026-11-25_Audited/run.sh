#!/usr/bin/env bash
set -euo pipefail
export PRESET=demo
export SEEDS_DECLARED=42,314,0
SEED=$1 python "$(dirname "$0")/train_gpt.py"
