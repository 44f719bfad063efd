#!/usr/bin/env bash
set -euo pipefail
export GPTQ_RESERVE_SECONDS=14.0
export PRESET=demo
SEED=$1 python "$(dirname "$0")/train_gpt.py"
