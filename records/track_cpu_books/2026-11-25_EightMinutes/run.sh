#!/usr/bin/env bash
set -euo pipefail
export EMA_DECAY=0.99
export GPTQ_RESERVE_SECONDS=20.0
export MAX_EVAL_SECONDS=600.0
export MAX_WALLCLOCK_SECONDS=480.0
export MUON_MOMENTUM_WARMUP_STEPS=300
export PRESET=demo
export SEEDS_DECLARED=42,314,0
export SEQ_CHANGE_WARMUP_STEPS=16
export TTT_LORA_LR=0.006
export VOCAB_SIZE=2048
SEED=$1 python "$(dirname "$0")/train_gpt.py"
