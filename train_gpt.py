"""
Train a language model, squeeze it into 16,000,000 bytes, score it in bits per byte.

    torchrun --standalone --nproc_per_node=8 train_gpt.py      # the S14 recipe on 8 GPUs; no variables needed
    PRESET=demo python train_gpt.py                            # the same pipeline on a laptop CPU, minutes
    python train_gpt.py --help                                 # every variable: value, meaning, range

train -> average -> Hessians -> integers -> artifact on disk -> read back -> score -> test-time training.

Reads top to bottom, a name is used below its definition: CONFIG, RUNTIME, DATA, MODEL, OPTIMIZERS, TRAINING,
QUANTIZATION, PACKING, BUDGET, SCORING, TEST-TIME TRAINING, KERNELS, MAIN.
Shapes in comments: B rows, T tokens, D model_dim, H query heads, G key/value heads, d head_dim, F MLP width,
V vocabulary, L blocks, S depths (positions in the unrolled layer order), W ranks.
"""

# To read it in thirty minutes:
#   1. The group "model" of Config: what the network is made of, a line each.
#   2. tests/spec_model.py: that network in plain loops. Then MODEL: the same, fast, a row for each tensor.
#   3. `train`: schedules are functions of progress, and the clock decides when it ends.
#   4. The head of QUANTIZATION: each codec is an encode next to its decode.
#   5. `score_batch`: score, then learn. What has not been scored cannot be asked for.
#   6. `main`: the stages, and the artifact's bytes between them. Skip KERNELS until something must be faster.
#
# Words:
#   nats, bpb    -ln p of a token; the same of a text in bits, over its bytes: what is scored
#   depth        one application of a block; with loops there are more depths than blocks
#   stream       what blocks read and add to, a vector a token; the last depths have two, of attention and MLP
#   segment      a document, or a piece of it, in a packed row; attention stays inside
#   bank         one tensor that holds the matrices of one kind of all blocks
#   codec        how a tensor becomes small integers and scales, and comes back
#   Hessian      X^T X of a matrix's inputs X: which errors of its weights cost how much
#   artifact     the file that is scored and counted, with this script
#   ledger       the chained account of what was scored and learned from
#   chunk        the tokens that test-time training scores at once and learns from next
#   adapter      a low-rank change of a matrix, learned for one document
#   rank         a process of the run, one a GPU; of an adapter, the width between its two factors

from __future__ import annotations

import bisect
import contextlib
import copy
import ctypes
import difflib
import gc
import hashlib
import heapq
import importlib
import importlib.util
import inspect
import io
import json
import linecache
import math
import os
import platform
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import brotli
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

BOS_ID = 1                                # every document starts with it; there is no end-of-document token
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
ARTIFACT_CAP_BYTES = 16_000_000           # decimal, model file plus shipped code
CU_SEQLENS_BUCKET = 64                    # cu_seqlens are padded to multiples of this: few shapes to compile


class RunError(Exception):
    """A failure explained for the person at the keyboard: what, where, what was expected, what to do."""


# ==================================================================================================
# CONFIG - every variable of a run. The only section that reads the environment.
# ==================================================================================================

S14_SCHEDULE = "1024@0.100,2048@0.700,3072@1.000"
MLP_KERNELS = ("eager", "pre_post", "act_grad", "lsb")
COMPRESSORS = ("range", "pergroup", "brotli")
STAGE_FLAGS = dict(prequant_only="train", quantize_only="quantize", ttt_eval_only="eval")  # published names
LARGEST = sys.float_info.max

PRESETS = {  # variables to set together; what is set by hand wins
    "s14": "",
    "s55": """
        TRAIN_SEQ_LEN=2048 TRAIN_SEQ_SCHEDULE= SEQ_CHANGE_WARMUP_STEPS=0 ROPE_TRAIN_SEQ_LEN=2048
        EVAL_SEQ_LEN=2048 EVAL_INCLUDE_TAIL=0 QK_GAIN_INIT=5.0
        QUANT=s14 AWQ_LITE_ENABLED=0 GPTQ_RESERVE_SECONDS=0.5
        TTT_EVAL_SEQ_LEN=2048 TTT_BATCH_SIZE=64 TTT_MASK= TTT_LOCAL_LR_MULT=1.0
        TTT_SHORT_SCORE_FIRST_ENABLED=0 TTT_SHORT_SCORE_FIRST_STEPS= PHASED_TTT_NUM_PHASES=3
    """,
    # PR #1105 with mixed bits, but not its loader, bigram hash, value embeddings, SWA, late fake quantization
    "s05": """
        TRAIN_SEQ_LEN=2048 TRAIN_SEQ_SCHEDULE= SEQ_CHANGE_WARMUP_STEPS=0 ROPE_TRAIN_SEQ_LEN=2048
        WARMDOWN_ITERS=4000 MIN_LR=0.05
        MLP_MULT=3.5 NUM_LOOPS=0 PARALLEL_START_LAYER=0 SMEAR_GATE_ENABLED=0 SPARSE_ATTN_GATE_ENABLED=0
        QUANT=s05 GPTQ_CALIBRATION=self AWQ_LITE_ENABLED=0 LQER_ENABLED=0 COMPRESSOR=brotli
        EVAL_METHOD=sliding EVAL_SEQ_LEN=2048 EVAL_STRIDE=64 TTT_ENABLED=0
    """,
    "demo": """
        DATA_PATH=data/demo VOCAB_SIZE=1024 VAL_BATCH_TOKENS=65536 TRAIN_LOG_EVERY=20
        NUM_LAYERS=6 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 XSA_LAST_N=6 ROPE_DIMS=8
        LOOP_START=2 LOOP_END=3 NUM_LOOPS=1 PARALLEL_START_LAYER=4
        TRAIN_BATCH_TOKENS=4096 TRAIN_MICROBATCH_TOKENS=4096 TRAIN_SEQ_LEN=512
        TRAIN_SEQ_SCHEDULE=256@0.5,512@1.0 SEQ_CHANGE_WARMUP_STEPS=8 COMPILE_SHAPE_WARMUP=0 WARMUP_STEPS=0
        EVAL_SEQ_LEN=512 TTT_EVAL_SEQ_LEN=512 ROPE_TRAIN_SEQ_LEN=512 EVAL_STRIDE=256
        MAX_WALLCLOCK_SECONDS=80 GPTQ_RESERVE_SECONDS=24 RD_RESERVE_SECONDS=0 MAX_EVAL_SECONDS=0
        MUON_MOMENTUM_WARMUP_STEPS=100 EMA_DECAY=0.95
        GPTQ_CALIBRATION_BATCHES=8 AWQ_LITE_GROUP_SIZE=32 LQER_ASYM_GROUP=32
        TTT_LORA_RANK=8 TTT_LORA_ALPHA=14 TTT_LORA_LR=1e-2 TTT_BATCH_SIZE=16 TTT_CHUNK_SIZE=128
        TTT_SHORT_SCORE_FIRST_STEPS=256:32,512:64 TTT_LANES=1
        PHASED_TTT_PREFIX_DOCS=40 GLOBAL_TTT_CHUNK_TOKENS=4096 GLOBAL_TTT_BATCH_SEQS=8
    """,
}

ALIASES = {"VAL_BATCH_SIZE": "VAL_BATCH_TOKENS", "LR_FLOOR": "MIN_LR"}  # published names of our variables

# Variables of published commands and scripts that are not ours: pattern of the name, setting with which it is
# accepted and changes nothing (- = with none, * = with any), and why. The first pattern that fits decides.
PUBLISHED = """
LQER_GROUP_SIZE - nothing ever read it; the group size of the asymmetric factors is LQER_ASYM_GROUP
TTT_LR - nothing ever read it; the adapters' learning rate is TTT_LORA_LR times TTT_LOCAL_LR_MULT
TTT_NO_QV_MASK - nothing ever read it; use TTT_MASK=no_qv
MUON_BETA2 - nothing ever read it; the momentum is MUON_MOMENTUM
GPTQ_CALIB_BATCHES - nothing ever read it; use GPTQ_CALIBRATION_BATCHES
GPTQ_CALIBRATION_MODE - GPTQ_CALIBRATION chooses the data of the Hessians
TARGET_MB - published runs gave it in MiB: their 15.9 are 16,672,358 bytes, over the cap; use TARGET_BYTES
AUDIT - nothing audits itself: tools/audit.py run RUN_FOLDER judges a finished run, with --full at length
*_NAME_PATTERNS - the table `parameters` says which tensor has which optimizer and codec
GPTQ_BLOCK_SIZE * blocks of columns bound the memory of GPTQ, not its result
MATRIX_LR_EARLY * it scales gradients, and Muon's update does not depend on their scale; use MATRIX_LR
MATRIX_LR_LATE * it scales gradients, and Muon's update does not depend on their scale; use MATRIX_LR
BANK_SPLIT * it divides MATRIX_LR_EARLY from MATRIX_LR_LATE, which do nothing
ASYM_LOGIT_RESCALE * both caps are LOGIT_SOFTCAP: published code never trains them
EMBED_LR * the head is the embedding matrix; TIED_EMBED_LR applies
HEAD_LR * the head is the embedding matrix; TIED_EMBED_LR applies
MATRIX_CLIP_SIGMAS * it matches no tensor of a model with a tied head
TIE_EMBEDDINGS TIE_EMBEDDINGS=1 the head is the embedding matrix
PARALLEL_FINAL_LANE PARALLEL_FINAL_LANE=mean the head reads the mean of both lanes
LQER_SCOPE LQER_SCOPE=all every quantized matrix may be corrected
LQER_GAIN_SELECT LQER_GAIN_SELECT=0 the tensors with the largest residual are corrected
COMPILE_SHAPE_WARMUP_ITERS COMPILE_SHAPE_WARMUP_ITERS=1 one pass a shape compiles it
COMPILE_SHAPE_WARMUP_LOOP_MODES COMPILE_SHAPE_WARMUP_LOOP_MODES=auto the modes the run meets are warmed
MIDRUN_CAP_* MIDRUN_CAP_SCHEDULE= TRAIN_SEQ_SCHEDULE and WARMDOWN_FRAC shape the learning rate
TRAIN_BATCH_TOKENS_SCHEDULE TRAIN_BATCH_TOKENS_SCHEDULE= every step has TRAIN_BATCH_TOKENS tokens
TTT_OPTIMIZER TTT_OPTIMIZER=adam adapters are trained by AdamW
TTT_GRAD_STEPS TTT_GRAD_STEPS=1 one update a scored chunk
TTT_UPDATE_EVERY TTT_UPDATE_EVERY=1 one update a scored chunk
TTT_LORA_EMA_DECAY TTT_LORA_EMA_DECAY=0 chunks are scored by the adapters themselves, not by an average
TTT_EVAL_BATCHES TTT_EVAL_BATCHES= every batch is reported, and the order of scoring is fixed
TTT_TRAIN_MIN_DOC_LEN TTT_TRAIN_MIN_DOC_LEN=0 every document is learned from
TTT_TRAIN_MAX_DOC_LEN TTT_TRAIN_MAX_DOC_LEN=0 every document is learned from
TTT_SHORT_LORA_* TTT_SHORT_LORA_ENABLED=0 short documents have the adapters of all
TTT_WARM_START_MEAN_* TTT_WARM_START_MEAN_ENABLED=0 adapters start from those of the batch before
SLOT_ENABLED SLOT_ENABLED=0 SLOT says which kind: published or causal
NGRAM_HINT_PRECOMPUTE_OUTSIDE NGRAM_HINT_PRECOMPUTE_OUTSIDE=0 hints are made inside the evaluation's clock
WITHIN_TAU WITHIN_BOOST=0 experts for tokens within a word read the target: not legal
WITHIN_BOOST WITHIN_BOOST=0 experts for tokens within a word read the target: not legal
WORD_TAU WORD_BOOST=0 experts for the start of a word read the target: not legal
WORD_BOOST WORD_BOOST=0 experts for the start of a word read the target: not legal
AGREE_ADD_BOOST AGREE_ADD_BOOST=0 there is one expert, so none to agree with
FUSED_NGRAM_* FUSED_NGRAM_EVAL=0 its experts read the target: not legal; NGRAM_TILT_ENABLED=1 is legal
ENGRAM ENGRAM=0 there is no n-gram embedding
NGRAM_[BHOD]* ENGRAM=0 there is no n-gram embedding
TRIGRAM TRIGRAM=0 there is no n-gram embedding
BIGRAM_* BIGRAM_VOCAB_SIZE=0 there is no bigram hash embedding
VE_* VE_ENABLED=0 there are no value embeddings
VALUE_RESIDUAL VALUE_RESIDUAL=0 the values of the first block are not added to later ones
GATED_ATTENTION GATED_ATTENTION=0 its gate starts open; GATED_ATTN_ENABLED=1 is the nearest
GATED_XSA* GATED_XSA=0 XSA has no gate of its own
DTG_* DTG_ENABLED=0 blocks have no gate over the token
MTP_* MTP_NUM_HEADS=0 only the next token is predicted
SWA_* SWA_ENABLED=0 no snapshots are averaged; EMA_DECAY averages the weights of every step
LAWA_* LAWA_ENABLED=0 no snapshots are averaged; EMA_DECAY averages the weights of every step
QAT_* QAT_ENABLED=0 nothing is quantized while training
LATE_QAT_* LATE_QAT_THRESHOLD=0 nothing is quantized while training
MIXED_QUANT MIXED_QUANT=0 QUANT=s05 has its mixed bits
SKYLIGHT_* SKYLIGHT_MUON=0 there is one Muon
"""

# First words that other programs' variables have too: there, a typo has to share two words with one of ours.
FOREIGN_WORDS = (
    "ARTIFACT CUDA DATA DEVICE ENABLE FORCE GLOBAL MAX MIN MODEL N NUM PARALLEL PROFILE RUN SKIP STAGE "
    "TARGET TOKEN WINDOW"
)


def knob(
    default: Any, doc: str, lo: float = 0, hi: float = LARGEST, choices: str = "", needs: str | None = None,
    because: str = "", model: bool = False, recipe: bool = True, group: str = "",
) -> Any:
    """Declare one variable: default, meaning, accepted range of a number or a|b|c of a text.

    needs: when it has an effect, see `unmet`; None = while the switch NAME_ENABLED is on, for NAME_REST.
    because: what to say when it has none, where that says more. model: artifact and run must agree on it.
    recipe: it is part of the run's identity, see `config_hash`. group: title of the variables from here on.
    """
    words = tuple(choices.split("|")) if choices else ()
    about = dict(doc=doc, lo=lo, hi=hi, choices=words, needs=needs, because=because)
    return field(default=default, metadata=about | dict(model=model, recipe=recipe, group=group))


def parse_steps(text: str, separator: str) -> tuple[tuple[float, float], ...]:
    """Read '256:8,2000:24' as ((256.0, 8.0), (2000.0, 24.0)), by the first number. Raises ValueError."""
    pairs = [item.split(separator) for item in text.split(",") if item.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{text!r}: expected a comma list of A{separator}B")
    return tuple(sorted((float(a), float(b)) for a, b in pairs))


def parse_seq_schedule(text: str, default_len: int) -> tuple[tuple[int, float], ...]:
    """Read '1024@0.1,2048@1' as ((1024, 0.1), (2048, 1.0)): contexts, each until its fraction of the run.

    Blank means one stage of `default_len`. Raises ValueError on a malformed stage.
    """
    stages = sorted(parse_steps(text, "@"), key=lambda stage: stage[1]) or [(default_len, 1.0)]
    if not all(n >= 1 and not n % 1 and 0 < end <= 1 for n, end in stages):
        raise ValueError("expected LENGTH@END_FRACTION with a whole LENGTH > 0 and 0 < END_FRACTION <= 1")
    stages = [(int(n), end) for n, end in stages]
    last_length, last_end = stages[-1]
    if last_end < 1:
        stages.append((last_length, 1.0))
    return tuple(stages)


def rule_violations(c: Config):
    """Check what no range of one variable can say: yields a sentence that names all variables involved."""
    yield from model_violations(c)
    yield from schedule_violations(c)
    yield from evaluation_violations(c)

    if (c.stage != "all") + c.prequant_only + c.quantize_only + c.ttt_eval_only > 1:
        yield "set only one of STAGE, PREQUANT_ONLY, QUANTIZE_ONLY, TTT_EVAL_ONLY"
    if not all(item.strip().isdecimal() for item in c.seeds_declared.split(",") if item):
        yield f"SEEDS_DECLARED={c.seeds_declared!r}: expected a comma list of seeds"
    if c.mlp_backward == "cutlass" and c.mlp_kernel != "act_grad":
        yield f"MLP_BACKWARD=cutlass needs what MLP_KERNEL=act_grad stores, not {c.mlp_kernel}"

    if c.quant == "s05" and c.matrix_bits < 3:
        yield f"QUANT=s05 takes a bit from most matrices: MATRIX_BITS={c.matrix_bits} must be at least 3"
    if not c.lqer_enabled:
        return
    if c.lqer_asym_enabled and any(c.lqer_rank * n % c.lqer_asym_group for n in (c.model_dim, c.mlp_dim)):
        yield (f"LQER_RANK={c.lqer_rank} times MODEL_DIM={c.model_dim} and times the MLP width {c.mlp_dim} "
               f"(MLP_MULT) must be multiples of LQER_ASYM_GROUP={c.lqer_asym_group}, or LQER_ASYM_ENABLED=0")
    smallest = min(c.kv_dim, c.model_dim, c.mlp_dim)
    if c.lqer_rank > smallest:
        yield (f"LQER_RANK={c.lqer_rank} must be at most the smallest side of a matrix, {smallest} "
               "(MODEL_DIM, NUM_HEADS, NUM_KV_HEADS, MLP_MULT)")


def model_violations(c: Config):
    """Rules of the network's shape."""
    if c.model_dim % c.num_heads:
        yield f"MODEL_DIM={c.model_dim} must be divisible by NUM_HEADS={c.num_heads}"
    if c.num_heads % c.num_kv_heads:
        yield f"NUM_HEADS={c.num_heads} must be divisible by NUM_KV_HEADS={c.num_kv_heads}"
    if c.rope_dims % 2 or c.rope_dims > c.head_dim:
        size = f"head size {c.head_dim} (MODEL_DIM / NUM_HEADS)"
        yield f"ROPE_DIMS={c.rope_dims} must be even and at most the {size}"
    if c.rope_yarn and c.rope_dims < 4:
        yield f"ROPE_YARN=1 needs ROPE_DIMS of at least 4, got {c.rope_dims}"
    if not c.window_pattern or set(c.window_pattern) - set("SL"):
        yield f"WINDOW_PATTERN={c.window_pattern!r}: expected letters S and L, such as SSL"
    if c.gate_window > c.model_dim:
        yield f"GATE_WINDOW={c.gate_window} must be at most MODEL_DIM={c.model_dim}"
    if c.num_loops and not c.loop_start <= c.loop_end < c.num_layers:
        found = f"{c.loop_start}, {c.loop_end}, {c.num_layers}"
        yield f"need LOOP_START <= LOOP_END < NUM_LAYERS, got {found} (NUM_LOOPS=0 turns loops off)"
    if c.attn_out_gate_enabled + c.gated_attn_enabled + c.sparse_attn_gate_enabled > 1:
        yield "at most one of ATTN_OUT_GATE_ENABLED, GATED_ATTN_ENABLED, SPARSE_ATTN_GATE_ENABLED may be 1"


def schedule_violations(c: Config):
    """Rules of the training's batches, contexts and seconds."""
    micro = f"TRAIN_MICROBATCH_TOKENS={c.train_microbatch_tokens}"
    if c.train_batch_tokens % c.train_microbatch_tokens:
        yield f"TRAIN_BATCH_TOKENS={c.train_batch_tokens} must be a multiple of {micro}"
    try:
        lengths = [length for length, _ in c.seq_schedule]
    except ValueError as e:
        yield f"TRAIN_SEQ_SCHEDULE={c.train_seq_schedule!r}: {e}"
    else:
        if max(lengths) != c.train_seq_len:
            yield (f"TRAIN_SEQ_LEN={c.train_seq_len} must be the longest context of TRAIN_SEQ_SCHEDULE="
                   f"{c.train_seq_schedule!r} (a blank schedule trains at TRAIN_SEQ_LEN throughout)")
        bad = [n for n in lengths if c.train_microbatch_tokens % n]
        if bad:
            yield (f"{micro} must be a multiple of every context length, not of {bad} "
                   "(TRAIN_SEQ_SCHEDULE, TRAIN_SEQ_LEN)")

    if c.max_wallclock_seconds and not c.train_budget_seconds:
        kept = f", RD_RESERVE_SECONDS={c.rd_reserve_seconds:g} being kept too" if c.quant == "rd" else ""
        yield (f"GPTQ_RESERVE_SECONDS={c.gptq_reserve_seconds:g} leaves nothing of MAX_WALLCLOCK_SECONDS="
               f"{c.max_wallclock_seconds:g}{kept}")
    if c.train_seq_schedule_mode == "wallclock" and not c.max_wallclock_seconds and not c.iterations:
        yield "MAX_WALLCLOCK_SECONDS=0 needs ITERATIONS > 0"


def evaluation_violations(c: Config):
    """Rules of scoring and of test-time training."""
    if c.eval_stride > c.eval_seq_len and c.eval_method == "sliding":
        yield f"EVAL_STRIDE={c.eval_stride} must be at most EVAL_SEQ_LEN={c.eval_seq_len}"
    if c.slot != "off" and (c.ttt_enabled or c.eval_method != "sliding"):
        yield f"SLOT={c.slot} needs sliding windows: set EVAL_METHOD=sliding and TTT_ENABLED=0"
    if c.ttt_adam_kernel == "triton" and c.ttt_beta1:
        yield "TTT_ADAM_KERNEL=triton needs TTT_BETA1=0"
    if c.phased_ttt_enabled and c.ttt_enabled and c.global_ttt_chunk_tokens < c.eval_seq_len:
        yield (f"GLOBAL_TTT_CHUNK_TOKENS={c.global_ttt_chunk_tokens} must hold at least one sequence of "
               f"EVAL_SEQ_LEN={c.eval_seq_len}")
    try:
        steps = parse_steps(c.ttt_short_score_first_steps, ":")
    except ValueError as e:
        yield f"TTT_SHORT_SCORE_FIRST_STEPS: {e}"
        return
    chunks = {c.ttt_chunk_size}
    if c.ttt_short_score_first_enabled:
        chunks |= {chunk for _, chunk in steps} or {c.ttt_short_chunk_size}
    if c.ttt_enabled and any(chunk % 1 or not 1 <= chunk <= c.ttt_eval_seq_len for chunk in chunks):
        yield (f"chunks are whole numbers of tokens from 1 to TTT_EVAL_SEQ_LEN={c.ttt_eval_seq_len}, "
               f"not {sorted(chunks)}: TTT_CHUNK_SIZE={c.ttt_chunk_size}, TTT_SHORT_CHUNK_SIZE="
               f"{c.ttt_short_chunk_size}, TTT_SHORT_SCORE_FIRST_STEPS={c.ttt_short_score_first_steps!r}")


@dataclass(frozen=True)
class Config:
    """Hold every variable of a run; field num_layers is variable NUM_LAYERS. Defaults are S14 (PR #2014)."""

    preset: str = knob("s14", "table of overrides to start from", choices="|".join(PRESETS), group="the run")
    stage: str = knob("all", "which part of the pipeline to run",
        choices="all|train|quantize|eval|warm", recipe=False)
    prequant_only: bool = knob(False, "same as STAGE=train", recipe=False)
    quantize_only: bool = knob(False, "same as STAGE=quantize: start from final_model.pt", recipe=False)
    ttt_eval_only: bool = knob(False, "same as STAGE=eval: start from the artifact", needs="", recipe=False)
    seed: int = knob(1337, "seeds weights and adapters; the data order does not depend on it", recipe=False)
    seeds_declared: str = knob("",
        "comma list of the seeds that will be run and averaged, fixed before the first of them", recipe=False)
    run_id: str = knob("", "name of the run; blank = date and time", recipe=False)
    artifact_dir: str = knob("", "folder for log, checkpoint and artifact; blank = logs/RUN_ID", recipe=False)
    resume: bool = knob(False, "continue from checkpoint.pt of ARTIFACT_DIR", recipe=False)
    checkpoint_seconds: float = knob(0.0,
        "write checkpoint.pt this often while training; 0 = only when interrupted", recipe=False)
    device: str = knob("auto", "where to run; auto = cuda if there is one, else cpu",
        choices="auto|cuda|cpu|mps")
    activation_dtype: str = knob("auto", "activations and embedding; auto = bf16 on cuda, else fp32",
        choices="auto|bf16|fp32")
    compile_backend: str = knob("auto", "of torch.compile; auto = inductor on cuda, else none",
        choices="auto|none|inductor|aot_eager|eager")
    dynamo_cache_size_limit: int = knob(128, "graphs torch.compile may keep per function", lo=1)
    dynamo_accumulated_cache_size_limit: int = knob(1024, "graphs torch.compile may keep in all", lo=1)
    compile_allow_recompiles: bool = knob(
        False, "go on when torch.compile is at work in timed code; 0 = an error that names the reasons",
        needs="compile_backend!=none|cuda_graphs", recipe=False)
    compile_cache_dir: str = knob(
        "", "keep compiled code here for later runs (STAGE=warm makes all of it); blank = torch's own place",
        recipe=False)
    cuda_graphs: bool = knob(False,
        "replay a micro-batch and a step of test-time training as CUDA graphs; not yet measured on a GPU")
    profile: int = knob(0,
        "profile this many steps, after the third, for tools/step_profile.py; costs time, so not for records")

    attn_backend: str = knob("auto", "attention of packed rows; auto = the fastest one here that is right",
        choices="auto|fa3|fa4|cudnn|varlen|flex|cpu|sdpa", group="kernels")
    mlp_kernel: str = knob("eager", "GEMMs with the activation inside, by what they store for the backward",
        choices="|".join(MLP_KERNELS))
    mlp_backward: str = knob("triton", "what multiplies by the derivative that MLP_KERNEL=act_grad stored",
        choices="triton|cutlass", needs="mlp_kernel!=eager")
    cutlass_path: str = knob(
        "",
        "CUTLASS's folder, for MLP_BACKWARD=cutlass; blank = that of the installed package nvidia-cutlass",
        needs="mlp_backward=cutlass", recipe=False)
    qk_kernel: str = knob("eager", "one kernel from merged projection to normed, rotated heads",
        choices="eager|triton")
    xsa_kernel: str = knob(
        "eager", "one kernel for XSA and head gate", choices="eager|triton",
        needs="xsa_last_n,attn_gate!=none", because="XSA_LAST_N is 0 or there is no head gate")
    fused_ce_kernel: str = knob("eager", "loss and its gradient in one pass over the logits",
        choices="eager|triton")

    data_dir: str = knob("./data/", "root of the default data paths", recipe=False, group="data")
    data_path: str = knob("", "folder of the shards; blank = the published CaseOps export below DATA_DIR",
        recipe=False)
    tokenizer_path: str = knob("",
        "SentencePiece model; blank = tokenizer.model beside the shards, or the published one", recipe=False)
    caseops_enabled: bool = knob(True, "bytes come from the sidecar; 0 = from the SentencePiece pieces")
    vocab_size: int = knob(8192, "token ids are below this", lo=2, hi=65536, model=True)
    val_doc_fraction: float = knob(1.0,
        "score a fixed random share of the documents; below 1 is for development", lo=1e-6, hi=1)

    num_layers: int = knob(11, "blocks", lo=1, model=True, group="model")
    model_dim: int = knob(512, "width of the residual stream", lo=1, model=True)
    num_heads: int = knob(8, "query heads", lo=1, model=True)
    num_kv_heads: int = knob(4, "key/value heads", lo=1, model=True)
    mlp_mult: float = knob(4.0, "MLP width over MODEL_DIM", lo=0.01, model=True)
    mlp_slope: float = knob(0.5, "slope of leaky ReLU below zero, before the square", hi=1, model=True)
    logit_softcap: float = knob(30.0, "logits become c tanh(logits / c)", lo=1e-3, model=True)
    fused_ce_enabled: bool = knob(True,
        "softcap and cross-entropy of training in fp32; 0 = softcap rounded to the activation dtype")
    rope_base: float = knob(10000.0, "base of the rotary frequencies", lo=1, model=True)
    rope_dims: int = knob(16, "rotated dimensions of each head", lo=2, model=True)
    rope_yarn: bool = knob(False, "stretch ROPE_BASE where the context exceeds ROPE_TRAIN_SEQ_LEN",
        model=True)
    rope_train_seq_len: int = knob(3072, "context the rotary base is meant for",
        lo=1, needs="rope_yarn", model=True)
    ln_scale: bool = knob(True, "scale the normed input of block i by 1/sqrt(i+1)", model=True)
    qk_gain_init: float = knob(5.25, "initial gain of the normed queries", lo=-LARGEST)
    xsa_last_n: int = knob(11,
        "blocks, counted from the last, whose heads drop the part along their own value", model=True)
    window_pattern: str = knob(
        "L", "S = the last WINDOW_SIZE tokens, L = the whole document so far; repeated over the blocks",
        model=True)
    window_size: int = knob(1024, "tokens seen by the attention of an S block, itself included",
        lo=1, needs="windowed", because="WINDOW_PATTERN has no S", model=True)
    skip_gates_enabled: bool = knob(True, "gated skips; 0 = plain weighted sums", model=True)
    num_loops: int = knob(2, "extra passes over LOOP_START..LOOP_END", model=True)
    loop_start: int = knob(3, "first block of the repeated segment", needs="num_loops", model=True)
    loop_end: int = knob(5, "last block of the repeated segment, inclusive", needs="num_loops", model=True)
    parallel_start_layer: int = knob(8, "first block of the two-lane decoder; 0 = one lane", model=True)
    attn_out_gate_enabled: bool = knob(False, "head gate 2 sigmoid(W src[:GATE_WINDOW])", model=True)
    attn_out_gate_src: str = knob("proj", "input of that gate: the block's normed input or the raw queries",
        choices="proj|q", model=True)
    gated_attn_enabled: bool = knob(False, "head gate sigmoid(W n) over all channels", model=True)
    gated_attn_init_std: float = knob(0.01, "initial std of its weights")
    sparse_attn_gate_enabled: bool = knob(True, "head gate sigmoid(SPARSE_ATTN_GATE_SCALE W n[:GATE_WINDOW])",
        model=True)
    sparse_attn_gate_init_std: float = knob(0.0, "initial std of its weights")
    sparse_attn_gate_scale: float = knob(0.5, "factor inside the sigmoid", lo=-LARGEST, model=True)
    gate_window: int = knob(12, "channels read by the sparse, output and smear gates", lo=1, model=True)
    smear_gate_enabled: bool = knob(True, "add a gated share of the previous token's embedding", model=True)
    smear_gate_bos_fix: bool = knob(True, "never smear across a document start", model=True)
    tied_embed_init_std: float = knob(0.005, "initial std of the embedding")

    matrix_optimizer: str = knob("muon", "optimizer of the weight banks", choices="muon", group="optimizers")
    matrix_lr: float = knob(0.026, "learning rate of the weight banks")
    tied_embed_lr: float = knob(0.03, "AdamW, the embedding")
    scalar_lr: float = knob(0.02, "AdamW, all small tensors")
    muon_momentum: float = knob(0.97, "Nesterov momentum", hi=0.9999)
    muon_momentum_warmup_start: float = knob(0.92, "momentum at step 0", hi=0.9999)
    muon_momentum_warmup_steps: int = knob(1500, "steps until MUON_MOMENTUM is reached")
    muon_backend_steps: int = knob(5, "Polar Express iterations; more than 5 still runs 5", lo=1)
    muon_row_normalize: bool = knob(True, "divide rows of the update by their norm before orthogonalising")
    muon_wd: float = knob(0.095, "decoupled weight decay of the banks")
    embed_wd: float = knob(0.085, "decoupled weight decay of embedding and head")
    adam_wd: float = knob(0.02, "decoupled weight decay of the small tensors")
    beta1: float = knob(0.9, "AdamW", hi=0.9999)
    beta2: float = knob(0.99, "AdamW", hi=0.99999)
    adam_eps: float = knob(1e-8, "AdamW")
    grad_clip_norm: float = knob(0.3, "global norm of the reduced gradient; 0 = off")
    ema_decay: float = knob(0.9965, "moving average of the weights, per step; 0 = off", hi=0.999999)

    iterations: int = knob(20000, "upper bound on training steps", group="schedule of the training")
    max_wallclock_seconds: float = knob(600.0,
        "training budget, calibration included; 0 = ITERATIONS decides")
    force_stop_step: int = knob(0, "stop at this step whatever the clock says; not record-legal")
    train_batch_tokens: int = knob(786432, "tokens per step, all ranks", lo=1)
    train_microbatch_tokens: int = knob(98304,
        "tokens per packed row; the data order depends on it, not on the ranks", lo=1)
    train_seq_len: int = knob(3072,
        "longest attention context of training; must be the longest of the schedule", lo=1)
    train_seq_schedule: str = knob(S14_SCHEDULE, "LENGTH@END_FRACTION,...; blank = TRAIN_SEQ_LEN throughout")
    train_seq_schedule_mode: str = knob("wallclock", "what progress means", choices="wallclock|step")
    seq_change_warmup_steps: int = knob(
        32, "ramp the learning rate over this many steps after a context change", needs="changes_context",
        because="the context never changes")
    enable_looping_at: float = knob(0.35, "progress at which the loops switch on", needs="num_loops")
    warmdown_frac: float = knob(0.85, "share of the run, at its end, over which the learning rate falls",
        hi=1, needs="!warmdown_iters")
    warmdown_iters: int = knob(0, "if set: the warmdown lasts this many steps instead")
    min_lr: float = knob(0.1, "floor of the learning rate, as a share of its peak", hi=1)
    warmup_steps: int = knob(20, "untimed steps per loop mode before the clock starts, rolled back exactly")
    compile_shape_warmup: bool = knob(True, "compile every (context, loop mode) before the clock starts")
    train_log_every: int = knob(500, "steps between log lines", lo=1, recipe=False)
    val_loss_every: int = knob(0, "steps between validations, clock stopped; 0 = only at the end")

    quant: str = knob(
        "rd",
        "rd: every weight at one slope of loss against coded bits; s14: fixed bits and clips; s05: PR #1105",
        choices="rd|s14|s05", group="quantization")
    target_bytes: int = knob(16_000_000,
        "QUANT=rd and s05: most bytes of artifact and running script; 0 = no limit", needs="quant!=s14")
    rd_loss: float = knob(
        1e-3,
        "QUANT=rd: predicted loss of quantization, nats per token, below which no more bytes are spent",
        lo=1e-7, needs="quant=rd")
    matrix_bits: int = knob(
        6, "bits of the matrices; with QUANT=s05 of the chosen ones, the others have one less", lo=2, hi=8,
        needs="quant!=rd")
    n_int6_layers: int = knob(
        10, "matrices that keep MATRIX_BITS with QUANT=s05: those with the largest Hessian trace",
        needs="quant=s05")
    embed_bits: int = knob(7, "bits of the embedding", lo=2, hi=8, needs="quant=s14")
    embed_clip_sigmas: float = knob(14.0, "clip of the embedding, in standard deviations of the row",
        lo=0.1, needs="quant=s14")
    mlp_clip_sigmas: float = knob(11.5, "clip of the MLP matrices", lo=0.1, needs="quant=s14")
    attn_clip_sigmas: float = knob(13.0, "clip of the attention matrices", lo=0.1, needs="quant=s14")
    gated_attn_quant_gate: bool = knob(True, "attention gates as int8 rows; 0 = fp16",
        needs="gated_attn_enabled|sparse_attn_gate_enabled")
    gptq_calibration: str = knob("train", "data of the Hessians: training windows, or the model's own text",
        choices="train|self")
    gptq_calibration_batches: int = knob(16, "batches of TRAIN_BATCH_TOKENS training tokens for the Hessians",
        lo=1, needs="gptq_calibration=train")
    gptq_reserve_seconds: float = knob(4.0, "part of the training budget kept for the Hessians",
        needs="gptq_calibration=train,max_wallclock_seconds")
    rd_reserve_seconds: float = knob(6.0, "QUANT=rd: another part of it, for the gradients",
        needs="quant=rd,gptq_calibration=train,max_wallclock_seconds")
    awq_lite_enabled: bool = knob(True, "int8 for the column groups that matter most", needs="quant!=rd")
    awq_lite_bits: int = knob(8, "bits of those groups; tensors with as many bits are no candidates",
        lo=3, hi=8)
    awq_lite_group_size: int = knob(64, "columns per group", lo=1)
    awq_lite_group_top_k: int = knob(1, "groups protected, over all tensors")
    lqer_enabled: bool = knob(True, "low-rank correction of the worst residuals", needs="quant!=rd")
    lqer_rank: int = knob(4, "rank of the correction", lo=1)
    lqer_top_k: int = knob(3, "tensors corrected")
    lqer_factor_bits: int = knob(4, "bits of symmetric factors",
        lo=2, hi=8, needs="lqer_enabled,!lqer_asym_enabled")
    lqer_asym_enabled: bool = knob(True,
        "2-bit left and grouped 4-bit right factors instead of symmetric ones")
    lqer_asym_group: int = knob(64, "values per scale of the right factor", lo=1)
    compressor: str = knob("range", "coder of the artifact; pergroup needs the lrzip program",
        choices="|".join(COMPRESSORS))

    eval_method: str = knob("packed", "diagnostics: whole documents packed, or sliding windows",
        choices="packed|sliding", group="evaluation")
    eval_seq_len: int = knob(3072, "longest context of the diagnostics", lo=1)
    eval_stride: int = knob(1536, "targets scored per sliding window after the first",
        lo=1, needs="eval_method=sliding")
    eval_include_tail: bool = knob(True, "score the last, partial sequence too")
    val_batch_tokens: int = knob(524288, "tokens per evaluation batch, 8 packed rows", lo=8)
    eval_softcap_fp32: bool = knob(True,
        "softcap of every score in fp32; 0 = rounded to the activation dtype, as published scores were")
    ngram_tilt_enabled: bool = knob(False,
        "raise the probability of the token that mostly followed the same words earlier in the stream")
    token_order: int = knob(16, "tokens of that n-gram, the guessed one included",
        lo=3, hi=256, needs="ngram_tilt_enabled")
    token_threshold: float = knob(0.8, "guess only where this share of the continuations so far agrees",
        hi=1, needs="ngram_tilt_enabled")
    token_boost: float = knob(2.625, "what a guess gains, in nats before renormalising",
        hi=50, needs="ngram_tilt_enabled")
    slot: str = knob(
        "off",
        "learn a shift of the states; published = from the targets, not legal; causal = from scored ones",
        choices="off|published|causal")
    slot_lr: float = knob(0.003, "AdamW of that shift", needs="slot!=off")
    slot_steps: int = knob(5, "updates of the shift per batch of windows", lo=1, needs="slot!=off")
    max_eval_seconds: float = knob(600.0, "budget of the scored evaluation; 0 = no limit")

    ttt_enabled: bool = knob(True, "score with test-time training",
        group="test-time training: one adapter set per document")
    ttt_lora_rank: int = knob(80, "rank of the adapters", lo=1)
    ttt_lora_alpha: float = knob(144.0, "adapters are scaled by alpha / rank", lo=-LARGEST)
    ttt_lora_lr: float = knob(1e-4, "learning rate of the adapters")
    ttt_local_lr_mult: float = knob(0.75, "factor on TTT_LORA_LR")
    ttt_weight_decay: float = knob(0.5, "decoupled weight decay of the adapters")
    ttt_beta1: float = knob(0.0, "AdamW of the adapters", hi=0.9999)
    ttt_beta2: float = knob(0.99, "AdamW of the adapters", hi=0.99999)
    ttt_adam_kernel: str = knob("eager", "AdamW without a first moment, which TTT_BETA1=0 does not need",
        choices="eager|triton")
    ttt_mask: str = knob("no_qv", "which attention adapters to leave out",
        choices="|all|baseline_all|no_q|no_v|no_qv")
    ttt_q_lora: str = knob("auto", "query adapter; auto = as TTT_MASK says", choices="auto|0|1")
    ttt_v_lora: str = knob("auto", "value adapter; auto = as TTT_MASK says", choices="auto|0|1")
    ttt_k_lora: bool = knob(True, "key adapter")
    ttt_o_lora: bool = knob(True, "adapter beside the attention block, reading its normed input")
    ttt_mlp_lora: bool = knob(True, "adapter beside the MLP, reading its normed input")
    ttt_warm_start_a: bool = knob(True, "keep A between the batches of a lane; 0 = draw it anew")
    ttt_eval_seq_len: int = knob(3072, "context of a scored chunk", lo=1)
    ttt_batch_size: int = knob(24, "documents side by side", lo=1)
    ttt_chunk_size: int = knob(48, "tokens scored between two updates", lo=1)
    ttt_bucket: int = knob(
        128, "CUDA_GRAPHS=1: windows are padded to multiples of this many tokens, and each width is a graph",
        lo=1, needs="ttt_enabled,cuda_graphs,!rope_yarn")
    ttt_short_doc_len: int = knob(2000, "documents up to this length are short",
        needs="ttt_short_score_first_enabled,!ttt_short_score_first_steps")
    ttt_short_score_first_enabled: bool = knob(True, "smaller chunks for short documents")
    ttt_short_chunk_size: int = knob(24, "chunk of short documents when TTT_SHORT_SCORE_FIRST_STEPS is blank",
        lo=1, needs="ttt_short_score_first_enabled,!ttt_short_score_first_steps")
    ttt_short_score_first_steps: str = knob("256:8,2000:24", "MAX_LENGTH:CHUNK,...")
    ttt_lanes: int = knob(8,
        "independent adapter lineages; ranks share them out, so the score does not depend on the ranks", lo=1)

    phased_ttt_enabled: bool = knob(True, "learn from scored documents with all weights between phases",
        needs="ttt_enabled", group="test-time training: global phases")
    phased_ttt_prefix_docs: int = knob(2500, "documents scored before the last global phase")
    phased_ttt_num_phases: int = knob(1, "global phases", lo=1)
    global_ttt_lr: float = knob(0.001, "SGD, peak of a cosine", needs="phased_ttt_enabled")
    global_ttt_momentum: float = knob(0.9, "SGD", hi=0.9999, needs="phased_ttt_enabled")
    global_ttt_epochs: int = knob(1, "passes over the scored tokens", lo=1, needs="phased_ttt_enabled")
    global_ttt_chunk_tokens: int = knob(32768, "tokens per update", lo=1, needs="phased_ttt_enabled")
    global_ttt_batch_seqs: int = knob(32, "sequences per forward", lo=1, needs="phased_ttt_enabled")
    global_ttt_warmup_start_lr: float = knob(0.0, "learning rate at the first chunk of the warm-up",
        needs="phased_ttt_enabled")
    global_ttt_warmup_chunks: int = knob(0, "linear warm-up", needs="phased_ttt_enabled")
    global_ttt_grad_clip: float = knob(1.0, "global norm; 0 = off", needs="phased_ttt_enabled")
    global_ttt_respect_doc_boundaries: bool = knob(True, "mask attention across documents",
        needs="phased_ttt_enabled")

    def __post_init__(self):
        """Check the rules. The published flags for a stage become STAGE."""
        problems = list(rule_violations(self))
        if problems:
            raise ValueError("\n".join(problems))
        for flag, stage in STAGE_FLAGS.items():
            if getattr(self, flag):
                object.__setattr__(self, "stage", stage)
                object.__setattr__(self, flag, False)

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def windowed(self) -> bool:
        """Whether any block sees a window only."""
        return "S" in self.window_pattern

    def window(self, layer: int) -> int:
        """Tokens that block's attention sees, itself included; 0 = the whole document so far."""
        letter = self.window_pattern[layer % len(self.window_pattern)]
        return self.window_size if letter == "S" else 0

    @property
    def attn_gate(self) -> str:
        """The per-head output gate: none, out, dense or sparse."""
        if self.attn_out_gate_enabled:
            return "out"
        if self.gated_attn_enabled:
            return "dense"
        return "sparse" if self.sparse_attn_gate_enabled else "none"

    @property
    def micro_batches(self) -> int:
        """Packed rows per step, all ranks together."""
        return self.train_batch_tokens // self.train_microbatch_tokens

    @property
    def train_budget_seconds(self) -> float:
        """Seconds for the training loop; 0 = no limit."""
        return max(self.max_wallclock_seconds - self.reserve_seconds, 0.0)

    @property
    def reserve_seconds(self) -> float:
        """Seconds of the training budget for calibration; the model's own text needs none."""
        if self.gptq_calibration != "train":
            return 0.0
        return self.gptq_reserve_seconds + (self.rd_reserve_seconds if self.quant == "rd" else 0.0)

    @property
    def seq_schedule(self) -> tuple[tuple[int, float], ...]:
        return parse_seq_schedule(self.train_seq_schedule, self.train_seq_len)

    @property
    def changes_context(self) -> bool:
        return len(self.seq_schedule) > 1

    @property
    def lora_sites(self) -> tuple[str, ...]:
        """Where adapters sit in a block: subset of q k v o mlp. The head always has one."""
        masked = {"no_q": "q", "no_v": "v", "no_qv": "qv"}.get(self.ttt_mask, "")
        chosen = dict(
            q=self.ttt_q_lora, k=self.ttt_k_lora, v=self.ttt_v_lora, o=self.ttt_o_lora, mlp=self.ttt_mlp_lora)
        unmasked = [site for site, on in chosen.items() if on != "auto" or site not in masked]
        return tuple(site for site in unmasked if chosen[site] in ("auto", "1", True))

    @property
    def published_data(self) -> Path:
        """The folder of the CaseOps export below DATA_DIR."""
        return Path(self.data_dir) / "datasets/fineweb10B_sp8192_caseops/datasets"

    @property
    def shards_path(self) -> Path:
        if self.data_path:
            return Path(self.data_path)
        return self.published_data / "datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"

    @property
    def tokenizer_file(self) -> Path:
        if self.tokenizer_path:
            return Path(self.tokenizer_path)
        if self.data_path:
            return self.shards_path / "tokenizer.model"
        return self.published_data / "tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"


VARIABLES = {f.name.upper(): f for f in fields(Config)}
MODEL_FIELDS = tuple(f.name for f in fields(Config) if f.metadata["model"])  # the same in a loaded artifact
NEED = re.compile(r"(!?)(\w+)(?:(!?=)(\w+))?")


def as_text(value: Any) -> str:
    """Write a value as the environment would say it."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def needs_of(name: str) -> str:
    """Look up the `needs` of a field; NAME_REST needs NAME_ENABLED unless its knob says else."""
    needs = VARIABLES[name.upper()].metadata["needs"]
    if needs is not None:
        return needs
    others = (f.name for f in fields(Config) if f.name != name and f.name.endswith("_enabled"))
    return max((switch for switch in others if name.startswith(switch[:-7])), key=len, default="")


def unmet(c: Config, needs: str) -> str:
    """Say which part of `needs` does not hold in c; '' if all does.

    Comma = and, | = or, x = true, nonzero, not blank, !x = the opposite, x=v, x!=v. x is a field or property;
    what a field needs itself is needed too.
    """
    for clause in filter(None, needs.split(",")):
        reasons = [unmet_need(c, need) for need in clause.split("|")]
        if all(reasons):
            return " and ".join(reasons)
    return ""


def unmet_need(c: Config, need: str) -> str:
    """Say why one need of `unmet` does not hold, or return ''."""
    negation, name, operator, wanted = NEED.fullmatch(need).groups()
    value = getattr(c, name)
    if operator:
        holds = (as_text(value) == wanted) == (operator == "=")
    else:
        holds = bool(value) != bool(negation)
    if not holds:
        return f"{name.upper()} is {as_text(value) or 'blank'}"
    if negation or name.upper() not in VARIABLES:
        return ""
    return unmet(c, needs_of(name))


def check_needs() -> None:
    """Raise AttributeError when a `needs` is malformed or names what is no field or property."""
    for name in Config.__dataclass_fields__:
        for need in filter(None, re.split("[,|]", needs_of(name))):
            getattr(Config, NEED.fullmatch(need)[2])


check_needs()


def accepted(f) -> str:
    """Describe the values a variable takes."""
    lo, hi, choices = map(f.metadata.get, ("lo", "hi", "choices"))
    if choices:
        return "one of " + ", ".join(choice or "(blank)" for choice in choices)
    if f.type in ("bool", "str"):
        return {"bool": "0 or 1", "str": "text"}[f.type]
    kind = "a whole number" if f.type == "int" else "a number"
    if hi < LARGEST:
        return f"{kind} in [{lo}, {hi}]"
    return f"{kind} of at least {lo}" if lo > -LARGEST else kind


def parse_knob(f, raw: str) -> Any:
    """Turn the text of one variable into its checked value. Raises ValueError that says what is accepted."""
    lo, hi, choices = map(f.metadata.get, ("lo", "hi", "choices"))
    try:
        value = {"int": int, "float": float, "bool": ("0", "1").index, "str": str}[f.type](raw)
    except ValueError:
        value = math.nan
    valid = raw in (choices or (raw,)) if f.type == "str" else lo <= value <= hi
    if not valid:
        raise ValueError(f"expected {accepted(f)}")
    return bool(value) if f.type == "bool" else value


def family(name: str) -> str:
    """Shorten a name to what it shares with its relatives: one word, or two where others use the first."""
    words = name.split("_")
    return "_".join(words[: 1 + (words[0] in FOREIGN_WORDS.split())])


FAMILIES = frozenset(family(name) for name in VARIABLES if "_" in name)


def meant(name: str) -> str:
    """Guess which variable an unknown name was meant to be; '' if it looks like another program's."""
    capitals = name.upper()
    near = difflib.get_close_matches(capitals, VARIABLES, n=1, cutoff=0.83)
    if near and (near[0] == capitals or "_" in name + near[0] or len(near[0]) > 8):
        return near[0]
    if "_" in name and family(name) in FAMILIES:
        return difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.0)[0]
    return ""


def same_text(a: str, b: str) -> bool:
    """Compare two values as numbers where they are numbers."""
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b


def published(name: str, env) -> tuple[str, str]:
    """Look up a variable of other scripts: why it is refused, why it changes nothing; '' and '' if none."""
    for line in PUBLISHED.strip().splitlines():
        pattern, setting, why = line.split(" ", 2)
        if not re.fullmatch(pattern.replace("*", ".*"), name):
            continue
        switch, _, off = setting.partition("=")
        if switch == "*" or (switch in env and same_text(env[switch], off)):
            return "", why
        return why if switch == "-" else f"{why} ({setting} is accepted)", ""
    return "", ""


def preset_values(preset: str) -> dict[str, Any]:
    """The value of every field before anything is set by hand."""
    values = {f.name: f.default for f in fields(Config)}
    for setting in PRESETS.get(preset, "").split():
        name, _, raw = setting.partition("=")
        values[name.lower()] = parse_knob(VARIABLES[name], raw)
    return values | dict(preset=preset)


def config_from_env(env) -> Config:
    """Turn an environment into a checked Config. Raises ValueError that lists every problem at once."""
    values = preset_values(env.get("PRESET", "s14"))
    given, errors = {}, []
    for name in sorted(env):
        variable = ALIASES.get(name, name)
        refusal, harmless = published(name, env)
        if variable in VARIABLES:
            try:
                value = parse_knob(VARIABLES[variable], env[name])
            except ValueError as e:
                errors.append(f"{name}={env[name]!r}: {e}")
                continue
            first, same = given.setdefault(variable, (name, value))
            if same != value:
                both = f"{first}={env[first]!r} and {name}={env[name]!r}"
                errors.append(f"{both} are two names of one variable")
            values[variable.lower()] = value
        elif refusal:
            errors.append(f"{name}={env[name]!r}: {refusal}")
        elif not harmless and meant(name):
            errors.append(f"{name}: no such variable; the nearest is {meant(name)}")

    try:
        cfg = Config(**values)
    except ValueError as e:  # a rule about a value that was refused says nothing new
        refused = {ALIASES.get(name, name) for name in env} - set(given)
        for rule in str(e).splitlines():
            if not refused & set(re.findall(r"\w+", rule)):
                errors.append(rule)
    if errors:
        raise ValueError("\n".join(errors))
    return cfg


def overrides(cfg: Config) -> dict[str, str]:
    """What this run changes against its preset, as the environment would say it, PRESET included."""
    base = preset_values(cfg.preset) | dict(preset="s14")
    return {name.upper(): as_text(getattr(cfg, name)) for name in base if getattr(cfg, name) != base[name]}


def without_effect(cfg: Config, env) -> list[str]:
    """Variables somebody set that this configuration never looks at, with the reason."""
    notes = []
    for name in sorted(env):
        variable = ALIASES.get(name, name)
        if variable in VARIABLES:
            unmet_part = unmet(cfg, needs_of(variable.lower()))
            reason = unmet_part and (VARIABLES[variable].metadata["because"] or unmet_part)
        else:
            _, reason = published(name, env)
        if reason:
            notes.append(f"{name} ({reason})")
    return notes


def config_hash(cfg: Config) -> str:
    """Identify the recipe: everything but seed, stage, the run's name, where files lie and what is logged."""
    recipe = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.metadata["recipe"]}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def help_text(preset: str) -> str:
    """What `--help` prints: every variable with the preset's value, its meaning and what it accepts."""
    lines = [__doc__.strip()]
    for name, value in preset_values(preset).items():
        f = VARIABLES[name.upper()]
        if f.metadata["group"]:
            lines += ["", f"{f.metadata['group'].capitalize()}:"]
        setting = f"  {name.upper()}={as_text(value)}"
        text = f"{setting:<40} {f.metadata['doc']} ({accepted(f)})"
        lines.append(textwrap.fill(text, 110, subsequent_indent=" " * 41, break_on_hyphens=False))

    lines += ["", "Published variables that are not here, the setting accepted (- = none, * = any), and why:"]
    for line in PUBLISHED.strip().splitlines():
        lines.append(textwrap.fill("  " + line, 110, subsequent_indent="    ", break_on_hyphens=False))
    return "\n".join(lines)


class Launch(NamedTuple):
    """What torchrun tells a process about itself."""

    rank: int
    local_rank: int
    size: int


def launch_from_env(env) -> Launch:
    """Read rank, local rank and number of ranks; one process without torchrun. Raises ValueError."""
    given = {name: env.get(name, "0") for name in ("RANK", "LOCAL_RANK")}
    given["WORLD_SIZE"] = env.get("WORLD_SIZE", "1")
    expected = "expected a whole number, as torchrun sets it"
    bad = [f"{name}={text!r}: {expected}" for name, text in given.items() if not text.isdecimal()]
    if bad:
        raise ValueError("\n".join(bad))
    return Launch(*map(int, given.values()))


# ==================================================================================================
# RUNTIME - the processes, the device, the clock, the log and files that never lie half written.
# ==================================================================================================

@dataclass(frozen=True)
class World:
    """The ranks of a run and the device of this one. At size 1 every collective is the identity."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype  # of activations, embedding and the optimizer's communication
    # of CUDA graphs, see `compilations`
    recordings: list[tuple[int, str]] = field(default_factory=list, compare=False)

    @staticmethod
    def init(cfg: Config, launch: Launch) -> World:
        """Choose the device, start the process group (NCCL on cuda, gloo elsewhere) and seed every generator.

        Raises RunError when the ranks do not divide the micro-batches or the device is missing.
        """
        if cfg.micro_batches % launch.size:
            raise RunError(
                f"{launch.size} ranks cannot share {cfg.micro_batches} micro-batches "
                f"(TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} / "
                f"TRAIN_MICROBATCH_TOKENS={cfg.train_microbatch_tokens}): start a number of ranks that "
                f"divides {cfg.micro_batches}, or lower TRAIN_MICROBATCH_TOKENS")
        kind = cfg.device
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "cpu"
        if kind == "cuda" and not torch.cuda.is_available():
            raise RunError("DEVICE=cuda, but torch sees no CUDA device: install a CUDA build of torch, or "
                           "set DEVICE=cpu")
        if cfg.cuda_graphs and kind != "cuda":
            raise RunError(f"CUDA_GRAPHS=1 needs a CUDA device, and this run is on {kind}: set CUDA_GRAPHS=0")
        if kind == "mps" and not torch.backends.mps.is_available():
            raise RunError("DEVICE=mps, but torch sees no Metal device: set DEVICE=cpu")
        device = torch.device(kind, launch.local_rank) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
        if launch.size > 1:
            backend, device_id = ("nccl", device) if kind == "cuda" else ("gloo", None)
            dist.init_process_group(backend, device_id=device_id)
        wanted = cfg.activation_dtype
        if wanted == "auto":
            wanted = "bf16" if kind == "cuda" else "fp32"
        dtype = dict(bf16=torch.bfloat16, fp32=torch.float32)[wanted]
        torch.manual_seed(cfg.seed)
        return World(launch.rank, launch.size, device, dtype)

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def wide(self) -> torch.dtype:
        """The widest floating-point type of the device."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def sum_(self, *tensors: Tensor) -> None:
        """Add up in place over the ranks, all tensors of one type in one message."""
        for dtype in dict.fromkeys(t.dtype for t in tensors) if self.size > 1 else ():
            same = [t for t in tensors if t.dtype == dtype]
            dist.all_reduce(flat := torch.cat([t.flatten() for t in same]))
            for t, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                t.copy_(part.view_as(t))

    def max(self, *values: float) -> list[float]:
        """The largest of each value over the ranks: how the ranks agree on clocks and stop requests."""
        if self.size == 1:
            return list(values)
        t = torch.tensor(values, dtype=self.wide, device=self.device)
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return t.tolist()

    def from_main(self, value: Any) -> Any:
        """The object rank 0 holds."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def gather(self, value: Any) -> list:
        """The objects of all ranks, on every rank."""
        out = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(out, value)
        return out

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


class Readback:
    """A number on its way from the device: `read` waits for what led to it, and not for what the device was
    asked to do since.
    """

    def __init__(self, t: Tensor):
        self.host, self.arrived = t, None
        if t.device.type == "cuda":
            self.host, self.arrived = torch.empty(t.shape, dtype=t.dtype, pin_memory=True), torch.cuda.Event()
            self.host.copy_(t, non_blocking=True)
            self.arrived.record()

    def read(self) -> float:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host.item()


def hardware_name(world: World) -> str:
    """Name the device, the number of ranks and, on a CPU, its cores."""
    if world.device.type == "cuda":
        return f"{world.size}x {torch.cuda.get_device_name(world.device)}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{world.size}x {world.device.type} ({model}, {os.cpu_count()} cores)"


def triton_version() -> str | None:
    """Look up the version of Triton, by which torch.compile makes its kernels for a GPU; None without it."""
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


def compile_cache(cfg: Config, world: World) -> dict[str, str]:
    """Variables that make torch.compile and Triton keep their work below COMPILE_CACHE_DIR, in a folder of
    its own for each version of this code, torch and Triton, device and choice of kernels; none when it is
    blank.
    """
    if not cfg.compile_cache_dir:
        return {}
    kinds = ("_kernel", "_backward", "_backend", "_dtype")
    flags = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name.endswith(kinds)}
    versions = torch.__version__, triton_version(), hardware_name(world).split("x ", 1)[1]
    choices = json.dumps([flags, versions], sort_keys=True).encode()
    key = hashlib.sha256(Path(__file__).read_bytes() + choices).hexdigest()[:16]
    folder = Path(cfg.compile_cache_dir).resolve() / key
    return dict(TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"), TRITON_CACHE_DIR=str(folder / "triton"))


def compilations(world: World) -> list[str]:
    """List what torch.compile has made in this process, and the CUDA graphs that this rank has recorded.

    Of a compilation: the function, the number of its graph, and why the graph before did not fit.
    """
    dynamo = sys.modules.get("torch._dynamo.utils")
    lines = []
    for metrics in dynamo.get_compilation_metrics() if dynamo else ():
        if metrics.co_name:
            reason = (metrics.recompile_reason or "the first graph").splitlines()[0]
            lines.append(f"{metrics.co_name} {metrics.compile_id}: {' '.join(reason.split())}")
    for compiled_before, name in reversed(world.recordings):
        lines.insert(compiled_before, name)
    return lines


class Graphed:
    """A forward with the same arguments that replays CUDA graphs (torch.cuda.make_graphed_callables).

    Its kernels are one launch, those of its backward another. There is one graph for each set of shapes and
    plain values, recorded at the first call after one that ran as it is and backward: that has compiled and
    loaded all there is to run. Nothing in it may wait for the device.

    Tensors that want a gradient, and `parameters`, which it reads without being handed them, are read where
    they lie; others are copied into the graph. All share their memory: a backward comes before the next
    forward, and a result is good until its graph runs again.
    """

    def __init__(self, forward, world: World, parameters=()):
        self.forward = forward
        self.world = world
        self.parameters = tuple(parameters)
        self.warm = set()  # keys of arguments whose backward has run
        self.recorded = {}  # key of arguments: the graphed forward
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *args, **kwargs) -> Tensor:
        """Return what `forward` returns."""
        leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        plain = [Tensor if isinstance(x, Tensor) else x for x in leaves]
        shapes = [(tuple(t.shape), t.dtype) for t in tensors if not t.requires_grad]
        places = [t.data_ptr() for t in (*tensors, *self.parameters) if t.requires_grad]
        key = spec, *plain, *shapes, *places

        def forward(*tensors: Tensor, run=self.forward) -> Tensor:
            left = iter(tensors)
            filled = [next(left) if x is Tensor else x for x in plain]
            args, kwargs = torch.utils._pytree.tree_unflatten(filled, spec)
            return run(*args, **kwargs)

        if key not in self.warm:
            # Cloned as in a graph: kernels depend on the alignment.
            out = forward(*(t if t.requires_grad else t.clone() for t in tensors))
            if out.requires_grad:
                out.register_hook(lambda _: self.warm.add(key))
            return out
        if key not in self.recorded:
            self.record(key, forward, tensors)

        # A gradient that autograd took over from a graph would be written again by the next replay, not added
        # to.
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return self.recorded[key](*tensors, *self.parameters)

    def record(self, key: tuple, forward, tensors: list[Tensor]) -> None:
        """Record the graph of one set of arguments."""
        # Leaves of their own: the accumulators of gradients belong to a stream, and those of the arguments
        # may be alive on another.
        own = [t.detach().requires_grad_() if t.requires_grad else t.clone() for t in tensors]
        with torch.enable_grad():
            self.recorded[key] = torch.cuda.make_graphed_callables(
                forward, (*own, *self.parameters),
                num_warmup_iters=0, allow_unused_input=True, pool=self.pool)
        recordings = self.world.recordings
        compiled_before = len(compilations(self.world)) - len(recordings)
        shapes = [tuple(t.shape) for t in tensors if not t.requires_grad]
        recordings.append((compiled_before, f"CUDA graph of {shapes}"))


def recompile_error(where: str, new_graphs: list[str], remedy: str) -> RunError:
    """Explain that torch.compile was at work in timed code; new_graphs: the latest of `compilations`."""
    found = "; ".join(new_graphs) or "on another rank"
    return RunError(f"{where}: the compiler was at work in timed code ({found}). "
                    f"COMPILE_ALLOW_RECOMPILES=1 accepts that; {remedy}")


PEAK_FLOPS = {  # datasheets: dense bf16 products summed in fp32, per second
    "H200": 989.4e12, "H100": 989.4e12, "B200": 2250e12, "A100": 312e12,
    "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}


def quickest(world: World, f, repeats: int = 3) -> float:
    """Seconds of the quickest of a few f() on the device."""
    seconds = []
    for _ in range(repeats):
        world.synchronize()
        start = time.perf_counter()
        f()
        world.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@cache
def measured_peak(world: World) -> float:
    """FLOP/s of the best square matrix product in the activation dtype on this device, sizes doubled while
    they are quick.
    """
    best, generator = 0.0, torch.Generator(world.device).manual_seed(0)
    for n in (256, 512, 1024, 2048, 4096, 8192):
        a = torch.randn(n, n, device=world.device, generator=generator).to(world.dtype)
        seconds = quickest(world, lambda a=a: [a @ a for _ in range(4)]) / 4
        best = max(best, 2 * n**3 / max(seconds, 1e-9))
        if seconds > 0.002:
            break
    return best


def write_atomic(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to disk, rename: readers see the old file or the whole new one.

    Raises RunError (read-only folder, full disk), leaving an older file as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RunError(f"cannot write {path} ({len(data)} bytes): {e.strerror or e}; free space or choose "
                       "another ARTIFACT_DIR") from None


def save_tensors(path: Path, state: Any) -> None:
    """torch.save through `write_atomic`."""
    with tempfile.SpooledTemporaryFile() as buffer:
        torch.save(state, buffer)
        buffer.seek(0)
        write_atomic(path, buffer.read())


def load_tensors(path: Path, device: torch.device | str) -> Any:
    """What `save_tensors` wrote; nothing but tensors and plain values is ever unpickled. Raises RunError."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # damaged bytes raise whatever they lead to
        why = e.strerror if isinstance(e, OSError) else f"damaged, {type(e).__name__}"
        remedy = "train first, or set ARTIFACT_DIR to the run's folder"
        raise RunError(f"cannot load {path} ({why}): {remedy}") from None


class Log:
    """Lines to the console and to RUN_ID.txt, from rank 0 only. Nothing is lost: every line is appended at
    once.
    """

    def __init__(self, path: Path | None):
        self.path = path
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("a").close()
            except OSError as e:
                why = e.strerror or e
                remedy = "choose a writable ARTIFACT_DIR"
                raise RunError(f"cannot write the log {path}: {why}; {remedy}") from None

    def __call__(self, line: str, console: bool = True) -> None:
        if self.path is None:
            return
        if console:
            print(line, flush=True)
        try:
            with self.path.open("a") as f:
                f.write(line + "\n")
        except OSError as e:  # the run matters more than its diary
            print(f"cannot append to {self.path}: {e.strerror or e}", file=sys.stderr)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new high-water mark: of the GPU's allocator, or of this process where Linux lets us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: torch.device) -> int:
    """Largest memory held since `reset_peak_memory`, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


class Clock:
    """One monotonic clock cut into named phases. A phase ends where the next begins: they add up to the wall
    time.

    ended(name, seconds): called for every stretch that has passed.
    """

    def __init__(self, world: World, ended=lambda name, seconds: None):
        self.world = world
        self.ended = ended
        self.name = "setup"
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.peak_mib: dict[str, int] = {}
        self.compiled: dict[str, list[str]] = {}  # by phase, see `compilations`
        self.graphs = len(compilations(world))

    def phase(self, name: str) -> None:
        """End the current phase and begin `name`; coming back to a name adds to it."""
        self.world.synchronize()
        now = time.perf_counter()
        passed = now - self.start
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + passed
        self.ended(self.name, passed)

        peak = peak_memory_mib(self.world.device)
        self.peak_mib[self.name] = max(self.peak_mib.get(self.name, 0), peak)
        reset_peak_memory(self.world.device)

        new_graphs = compilations(self.world)[self.graphs :]
        if new_graphs:
            self.compiled.setdefault(self.name, []).extend(new_graphs)
            self.graphs += len(new_graphs)
        self.name = name
        self.start = now

    def table(self) -> list[dict]:
        """List the phases so far, the current one included: [{name, seconds, peak_mib, compilations}]."""
        self.phase(self.name)
        rows = []
        for name, seconds in self.seconds.items():
            graphs = len(self.compiled.get(name, ()))
            rows.append(dict(
                name=name, seconds=round(seconds, 3), peak_mib=self.peak_mib[name], compilations=graphs))
        return rows


class Eta:
    """Seconds left, from work done and work planned."""

    def __init__(self, total: float):
        self.total = total
        self.done = 0.0
        self.start = time.perf_counter()

    def add(self, work: float) -> None:
        self.done += work

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        return self.elapsed * (self.total - self.done) / self.done if self.done else math.inf


# ==================================================================================================
# DATA - shards of uint16 tokens, their manifest, packed training rows, validation tokens with their bytes.
# ==================================================================================================

def read_shard(path: Path) -> np.ndarray:
    """Memory-map one shard: 256 little-endian int32 (magic, version, n), then n little-endian uint16. Raises
    RunError.
    """
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=256)
    except OSError as e:
        raise RunError(f"cannot read shard {path}: {e.strerror or e}") from None
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise RunError(f"{path} is no token shard: its header must start with {SHARD_MAGIC}, "
                       f"{SHARD_VERSION}, found {header[:2].tolist()}; "
                       "prepare the data again")
    expected = SHARD_HEADER_BYTES + 2 * int(header[2])
    if size != expected:
        raise RunError(f"{path} is damaged: {expected} bytes expected for {header[2]} tokens, found {size}; "
                       "download or prepare it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES)


def check_vocab(tokens: np.ndarray, vocab_size: int, path: Path) -> None:
    """Raises RunError when a token id does not fit the model's vocabulary."""
    if len(tokens) and (top := int(tokens.max())) >= vocab_size:
        raise RunError(f"{path} holds token id {top}, but VOCAB_SIZE={vocab_size}: set VOCAB_SIZE to that of "
                       "the data's tokenizer")


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@dataclass(frozen=True)
class Dataset:
    """The files of a run. `train` is empty when the run only evaluates."""

    train: tuple[Path, ...]
    val: tuple[Path, ...]
    sidecar: tuple[Path, ...]
    manifest: dict
    manifest_sha256: str | None
    hashes: dict[str, str | None]  # sha256 by file name, see `shard_hashes`

    @staticmethod
    def open(cfg: Config, need_train: bool) -> Dataset:
        """List the shards and check them against manifest.json where there is one. Raises RunError."""
        folder = cfg.shards_path
        names = sorted(p for p in folder.glob("fineweb_*.bin")) if folder.is_dir() else []
        train = tuple(p for p in names if p.name.startswith("fineweb_train_")) if need_train else ()
        sidecar = tuple(p for p in names if p.name.startswith("fineweb_val_bytes_"))
        val = tuple(p for p in names if p.name.startswith("fineweb_val_") and p not in sidecar)
        wanted = dict(train=need_train, val=True, val_bytes=cfg.caseops_enabled)
        found = dict(train=train, val=val, val_bytes=sidecar)
        for kind in wanted:
            if wanted[kind] and not found[kind]:
                plain = " (or CASEOPS_ENABLED=0 for plain tokens)" if kind == "val_bytes" else ""
                raise RunError(f"no fineweb_{kind}_*.bin in {folder}: set DATA_PATH to a folder made by "
                               f"prepare_caseops_data.py or data/download.py{plain}")
        path, paths = folder / "manifest.json", (*train, *val, *(sidecar if cfg.caseops_enabled else ()))
        manifest, digest, hashes = {}, None, shard_hashes(paths)
        if path.exists():
            try:
                manifest, digest = json.loads(path.read_text()), sha256_file(path)
            except (OSError, ValueError) as e:
                raise RunError(f"cannot read {path}: {e}; prepare the data again") from None
            check_manifest(cfg, manifest, folder, paths, hashes)
        return Dataset(train, val, sidecar, manifest, digest, hashes)


def shard_hashes(paths: tuple[Path, ...]) -> dict[str, str | None]:
    """sha256 by file name; None for training shards beyond the first GB: 16 GB of FineWeb would cost a
    minute.
    """
    sizes = np.cumsum([path.stat().st_size for path in paths])
    return {path.name: sha256_file(path) if "_train_" not in path.name or size < 1 << 30 else None
            for path, size in zip(paths, sizes, strict=True)}


def check_manifest(
    cfg: Config, manifest: dict, folder: Path, paths: tuple[Path, ...], hashes: dict[str, str | None]
) -> None:
    """Overlap of train and val documents, transform, vocabulary, and size and sha256 of each file. Raises
    RunError.
    """
    splits = manifest.get("splits")
    shards = [entry for split in (splits or {}).values() for entry in split.get("shards", [{}])]
    if not shards or any(key not in entry for entry in shards for key in ("file", "tokens", "sha256")):
        raise RunError(f"{folder}/manifest.json does not list the shards of this folder: prepare the data "
                       "again")
    train_docs, val_docs = (splits.get(split, {}).get("documents", [0, 0]) for split in ("train", "val"))
    if max(train_docs[0], val_docs[0]) < min(train_docs[1], val_docs[1]):
        raise RunError(f"{folder}/manifest.json: training documents {train_docs} and validation documents "
                       f"{val_docs} overlap, so every score would be invalid; prepare the data again with "
                       "one --val-docs")
    if manifest.get("vocab_size", cfg.vocab_size) != cfg.vocab_size:
        raise RunError(f"{folder}: the data was made with a vocabulary of {manifest['vocab_size']}, but "
                       f"VOCAB_SIZE={cfg.vocab_size}")
    transform = "caseops" if cfg.caseops_enabled else "none"
    if manifest.get("transform", transform) != transform:
        raise RunError(f"{folder}: the data was made with transform {manifest['transform']!r}, but "
                       f"CASEOPS_ENABLED={cfg.caseops_enabled:d}")
    listed = {}
    for split in splits.values():
        for entry in (*split.get("shards", ()), *split.get("sidecar", ())):
            listed[entry["file"]] = entry
    for path in paths:
        if path.name not in listed:
            raise RunError(f"{path} is not in manifest.json: remove it or prepare the data again")
        entry, tokens = listed[path.name], read_shard(path)
        if len(tokens) != entry["tokens"]:
            raise RunError(f"{path} holds {len(tokens)} tokens, manifest.json says {entry['tokens']}; "
                           "download or prepare it again")
        if hashes[path.name] not in (None, entry["sha256"]):
            raise RunError(f"{path} does not have the sha256 that manifest.json says; download or prepare it "
                           "again")


def document_cu_seqlens(
    bos: np.ndarray, total: int, max_len: int, bucket: int = CU_SEQLENS_BUCKET
) -> np.ndarray:
    """Attention segments of one packed row: starts of its documents, cut every `max_len` tokens, closed and
    padded with `total`.

    bos: sorted offsets of BOS in [0, total). max_len 0 = no cuts. Returns int32, its length a multiple of
    `bucket`; the padding makes zero-length segments, so that the compiler sees few shapes. Example: bos [5,
    900], total 2048, max_len 512 -> 0 5 517 900 1412 1924 2048 2048 ...
    """
    starts = bos if len(bos) and bos[0] == 0 else np.concatenate(([0], bos))
    if max_len:
        lengths = np.diff(np.append(starts, total))
        pieces = -(-lengths // max_len)
        nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = np.repeat(starts, pieces) + nth * max_len
    out = np.full(-(-(len(starts) + 1) // bucket) * bucket, total, dtype=np.int32)
    out[: len(starts)] = starts
    return out


class Segments(NamedTuple):
    """Attention segments of a packed row: int32 bounds of `document_cu_seqlens`, length of the longest one
    allowed.

    None in their place means plain causal attention.
    """

    cu_seqlens: Tensor
    max_len: int


class Row(NamedTuple):
    """One packed row: inputs and targets (1, T) int64, its attention segments, and their lengths on the host.
    """

    inputs: Tensor
    targets: Tensor
    segments: Segments
    lengths: np.ndarray


def packed_row(tokens: np.ndarray, max_len: int, device: torch.device, every: int = 0) -> Row:
    """Pack T + 1 consecutive tokens into a Row of T predictions; attention stays within documents cut at
    `max_len`.

    every: cut at its multiples too, wherever documents start.
    """
    starts = np.flatnonzero(tokens[:-1] == BOS_ID)
    if every:
        starts = np.union1d(starts, np.arange(0, len(tokens) - 1, every))
    bounds = document_cu_seqlens(starts, len(tokens) - 1, max_len)
    lengths = np.diff(bounds)
    window = torch.from_numpy(tokens.astype(np.int64))
    cu_seqlens = torch.from_numpy(bounds)

    if device.type == "cuda":
        window = window.pin_memory()
        cu_seqlens = cu_seqlens.pin_memory()
    window = window.to(device, non_blocking=True)
    segments = Segments(cu_seqlens.to(device, non_blocking=True), max_len)
    return Row(window[None, :-1], window[None, 1:], segments, lengths[lengths > 0])


class TrainLoader:
    """Consecutive windows of `rows` x (row_tokens + 1) tokens in file order, from the first document of each
    shard on.

    The order depends on the row size alone: ranks take their share of the rows of each step. The tail of a
    shard that does not hold a whole step is dropped. One thread reads ahead. `position` (file, offset) is
    where the next step will be read.
    """

    def __init__(
        self, shards: tuple[Path, ...], row_tokens: int, rows: int, vocab_size: int,
        position: tuple[int, int] | None = None,
    ):
        self.shards = shards
        self.span = row_tokens + 1
        self.rows = rows
        self.vocab_size = vocab_size
        self.pool = ThreadPoolExecutor(1)
        self.position = position or (0, -1)  # offset -1: at the first BOS
        self.ahead: Future = self.pool.submit(self._read, self.position)

    def _read(self, position: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
        """Tokens (rows, span) at a position, and the position after them."""
        file, offset = position
        for _ in range(len(self.shards) + bool(self.shards)):
            path = self.shards[file % len(self.shards)]
            tokens = read_shard(path)
            if offset < 0:
                starts = np.flatnonzero(tokens == BOS_ID)
                if not len(starts):
                    raise RunError(f"{path} holds no document start (token {BOS_ID}): prepare the data "
                                   "with BOS before every document")
                offset = int(starts[0])
            end = offset + self.rows * self.span
            if end <= len(tokens):
                window = np.array(tokens[offset:end])
                check_vocab(window, self.vocab_size, path)
                return window.reshape(self.rows, self.span), (file, end)
            file, offset = file + 1, -1
        raise RunError(f"no training shard holds a step of {self.rows} x {self.span} tokens: prepare more "
                       "data or lower TRAIN_BATCH_TOKENS")

    def next_step(self) -> np.ndarray:
        """Tokens (rows, span) uint16 of the next step, all ranks' rows."""
        window, self.position = self.ahead.result()
        self.ahead = self.pool.submit(self._read, self.position)
        return window

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def calibration_windows(
    shards: tuple[Path, ...], row_tokens: int, count: int, seed: int = 0
) -> list[np.ndarray]:
    """`count` windows of row_tokens + 1 training tokens, spread over all shards by PCG64, none twice until
    all were used.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    starts = []
    for file, path in enumerate(shards):
        n = len(read_shard(path))
        phase = int(generator.integers(0, max(1, min(row_tokens, n - row_tokens - 1))))
        starts += [(file, phase + k * row_tokens) for k in range((n - 1 - phase) // row_tokens)]
    if not starts:
        raise RunError(f"no training shard holds {row_tokens + 1} tokens for calibration: lower "
                       "TRAIN_MICROBATCH_TOKENS")
    rounds = -(-count // len(starts))
    drawn = np.concatenate([generator.permutation(len(starts)) for _ in range(rounds)])
    windows = []
    for i in drawn[:count]:
        file, start = starts[i]
        windows.append(np.array(read_shard(shards[file])[start : start + row_tokens + 1]))
    return windows


def sentencepiece_byte_tables(path: Path, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per token id: bytes of its text without a leading space, whether it has one, whether it is no text at
    all.

    Control, unknown and unused pieces count 0 bytes and swallow the space of the piece that follows; a byte
    piece counts 1. Raises RunError when the model lacks the lone space piece: spaces would be scored as three
    byte pieces.
    """
    import sentencepiece  # only runs without a sidecar need it

    if not path.exists():
        raise RunError(f"no tokenizer at {path}: set TOKENIZER_PATH to the SentencePiece model of the data")
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    if model.vocab_size() != vocab_size:
        raise RunError(f"{path} has {model.vocab_size()} pieces, but VOCAB_SIZE={vocab_size}")
    if model.is_unknown(model.piece_to_id("\u2581")):
        raise RunError(f"{path} has no piece for a lone space, so bytes per token can not be counted; use "
                       "another tokenizer")
    size = np.zeros(vocab_size, np.int32)
    lead = np.zeros(vocab_size, bool)
    boundary = np.zeros(vocab_size, bool)
    for i in range(vocab_size):
        if model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
            boundary[i] = True
        elif model.is_byte(i):
            size[i] = 1
        else:
            piece = model.id_to_piece(i)
            lead[i] = piece.startswith("\u2581")
            size[i] = len(piece.removeprefix("\u2581").replace("\u2581", " ").encode())
    return size, lead, boundary


@dataclass(frozen=True)
class ValData:
    """Validation tokens (N + 1) and the bytes (N) each target stands for: `target_bytes[i]` belongs to
    `tokens[i + 1]`.
    """

    tokens: np.ndarray
    target_bytes: np.ndarray

    @staticmethod
    def load(cfg: Config, files: Dataset) -> ValData:
        """Read tokens and the one byte count of the run: the sidecar, or the SentencePiece rule. Raises
        RunError.
        """
        tokens = np.concatenate([read_shard(p) for p in files.val])
        check_vocab(tokens, cfg.vocab_size, files.val[0])
        if len(tokens) < 2:
            raise RunError(f"{files.val[0].parent}: the validation set is empty; prepare the data again")
        if tokens[0] != BOS_ID:
            raise RunError(f"{files.val[0]} starts with token {tokens[0]}, not with a document start "
                           f"({BOS_ID}): documents were written "
                           "without BOS, prepare the data again")
        if cfg.caseops_enabled:
            per_token = np.concatenate([read_shard(p) for p in files.sidecar]).astype(np.int32)
            if len(per_token) != len(tokens):
                raise RunError(f"the byte sidecar holds {len(per_token)} counts for {len(tokens)} tokens: "
                               f"{files.sidecar[0]} does not "
                               "belong to this validation set; prepare both again")
            target_bytes = per_token[1:]
        else:
            size, lead, boundary = sentencepiece_byte_tables(cfg.tokenizer_file, cfg.vocab_size)
            target_bytes = size[tokens[1:]] + (lead[tokens[1:]] & ~boundary[tokens[:-1]])
        data = ValData(tokens, target_bytes)
        if cfg.val_doc_fraction < 1:
            data = data.subset(cfg.val_doc_fraction)
        if not cfg.eval_include_tail:
            n = (len(data.tokens) - 1) // cfg.eval_seq_len * cfg.eval_seq_len
            data = ValData(data.tokens[: n + 1], data.target_bytes[:n])
        if not data.target_bytes.sum():
            raise RunError("the validation set stands for 0 bytes: bits per byte are undefined; prepare the "
                           "data again")
        return data

    def subset(self, fraction: float, seed: int = 0) -> ValData:
        """A random share of the documents, in file order; the same for every SEED of a run."""
        starts, ends = self.documents()
        count = max(1, round(fraction * len(starts)))
        keep = np.sort(np.random.Generator(np.random.PCG64(seed)).choice(len(starts), count, replace=False))
        ends = ends + (ends == len(self.tokens) - 1)  # the last document's last target is the last token
        index = np.concatenate([np.arange(starts[i], ends[i]) for i in keep])
        sizes = np.concatenate(([0], self.target_bytes))
        return ValData(self.tokens[index], sizes[index][1:].astype(np.int32))

    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs [start, end) of every document: its BOS to the token before the next BOS. They cover each
        target once.
        """
        starts = np.flatnonzero(self.tokens == BOS_ID)
        starts = starts[starts < len(self.tokens) - 1]
        return starts, np.append(starts[1:], len(self.tokens) - 1)


# ==================================================================================================
# MODEL - one network, one forward: training, scoring, calibration and test-time training by its arguments.
# ==================================================================================================

# The same network in 140 lines of plain loops, nothing folded or fused: tests/spec_model.py. Read that first.


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Compute cap tanh(logits / cap) in fp32."""
    return cap * torch.tanh(logits.float() / cap)


def softcapped_ce(logits: Tensor, targets: Tensor, cap: float, round_cap: bool = False) -> Tensor:
    """Compute the cross-entropy of the capped logits in nats, per token and in fp32.

    logits (..., V), targets (...), or (..., n) for several candidates each, int64 -> as targets, fp32. The
    upcast comes before the cap: a cap rounded to bf16 costs about 0.002 nats. `round_cap` rounds it all the
    same, to compare with runs that did.
    """
    z = softcap(logits, cap)
    if round_cap:
        z = z.to(logits.dtype).float()
    if targets.ndim == z.ndim:
        return z.logsumexp(-1, keepdim=True) - z.gather(-1, targets)
    nats = F.cross_entropy(z.flatten(0, -2), targets.flatten(), reduction="none")
    return nats.view(targets.shape)


def leaky_relu_squared(x: Tensor, slope: float) -> Tensor:
    """Compute leaky_relu(x)^2, which is homogeneous of degree 2 on each side of zero."""
    return F.leaky_relu(x, slope).square()


def leaky_mlp(x: Tensor, up: Tensor, down: Tensor, slope: float, see_hidden=None) -> Tensor:
    """Compute leaky_relu(x up^T)^2 down^T: x (..., D), up (F, D), down (D, F) -> (..., D).

    see_hidden(h), if given, sees what `down` reads.
    """
    hidden = leaky_relu_squared(F.linear(x, up), slope)
    if see_hidden is not None:
        see_hidden(hidden)
    return F.linear(hidden, down)


def rms_norm(x: Tensor) -> Tensor:
    """Divide x by its root mean square over the last dimension; no weight, eps is that of the dtype."""
    return F.rms_norm(x, (x.shape[-1],))


def add_streams(weights: Tensor | None, *streams: Tensor) -> Tensor:
    """Add up streams (B, T, D), each times its row of weights (n, D) or (n, 1); weights None: a plain sum."""
    if weights is not None:
        rows = weights.to(streams[0].dtype)
        streams = tuple(row * x for row, x in zip(rows, streams, strict=True))
    return sum(streams[1:], streams[0])


def add_norm(weights: Tensor | None, *streams: Tensor) -> tuple[Tensor, Tensor]:
    """Add up two or three streams by `add_streams` -> that sum, and that sum normed."""
    total = add_streams(weights, *streams)
    return total, rms_norm(total)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first 2 n of d dimensions of x (B, T, heads, d), half-split; n = cos.shape[-1]."""
    n = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    x1, x2, rest = x.tensor_split((n, 2 * n), dim=-1)
    turned = (x1 * cos + x2 * sin, x2 * cos - x1 * sin)
    return torch.cat((*turned, rest), dim=-1)


def split_heads(
    qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a merged projection into queries and keys, normed per head and rotated, and values.

    Queries are multiplied by their gain.
    qkv (B, T, (H + 2 G) d), gain (H,), cos and sin (T, 1, n) -> q (B, T, H, d), k and v (B, T, G, d).
    """
    heads = len(gain)
    merged = qkv.unflatten(-1, (heads + 2 * kv_heads, -1))
    q, k, v = merged.split((heads, kv_heads, kv_heads), dim=2)
    q = rotate(rms_norm(q), cos, sin)
    k = rotate(rms_norm(k), cos, sin)
    return q * gain.to(q.dtype)[:, None], k, v


def without_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Compute XSA, y - (y.v / v.v) v, in fp32 for heads y (B, T, H, d) and their values v (B, T, G, d)."""
    grouped = y.unflatten(2, (v.shape[2], -1)).float()  # (B, T, G, H/G, d)
    own = v.unsqueeze(3).float()                        # (B, T, G, 1, d)
    square = own.square().sum(-1, keepdim=True).clamp_min(1e-24)
    share = (grouped * own).sum(-1, keepdim=True) / square
    return (grouped - share * own).flatten(2, 3).to(y.dtype)


def gate_heads(y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Drop from each head its part along the token's own value (XSA), then scale the head by its gate.

    y (B, T, H, d), v (B, T, G, d), gate (B, T, H) -> (B, T, H, d).
    """
    return without_own_value(y, v) * gate.unsqueeze(-1)


def window_mask(n: int, window: int, like: Tensor, positions: Tensor | None = None) -> Tensor | None:
    """Make what is added to the scores (n, n) of a segment: a query sees itself and window - 1 tokens before.

    None where plain causal attention is the same: no window (0), or one that the segment fits into. positions
    (.., m): just the queries there, -> (.., 1, m, n), never None.
    """
    if positions is None and not 0 < window < n:
        return None
    keys = torch.arange(n, device=like.device)
    queries = keys if positions is None else positions.unsqueeze(-2)
    distance = queries.unsqueeze(-1) - keys
    hidden = (distance < 0) | (distance >= (window or n))
    return torch.zeros_like(distance, dtype=like.dtype).masked_fill_(hidden, -math.inf)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int, positions: Tensor | None = None) -> Tensor:
    """Attend causally within whole rows, in a window: q (B, T, H, d), k and v (B, T, G, d) -> (B, T, H, d).

    positions (B, n): of the queries, q (B, n, H, d); fewer queries than keys are otherwise the last.
    """
    queries, keys = q.shape[1], k.shape[1]
    if positions is None and queries < keys:
        positions = torch.arange(keys - queries, keys, device=q.device)
    mask = window_mask(keys, window, q, positions)
    heads = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


def document_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int = 0
) -> Tensor:
    """Attend causally within each segment: the definition. q (T, H, d), k and v (T, G, d) -> (T, H, d)."""
    parts = []
    for start, end in pairwise(cu_seqlens.tolist()):
        if end > start:
            rows = (t[None, start:end] for t in (q, k, v))
            parts.append(causal_attention(*rows, window)[0])
    return torch.cat(parts)


class Kernels(NamedTuple):
    """What computes each fused operation; the definitions by default."""

    attend: Any = document_attention_reference
    mlp: Any = leaky_mlp
    split_heads: Any = split_heads
    gate_heads: Any = gate_heads
    head_ce: Any = None  # None: the loss of training and its gradient by `softcapped_ce` and autograd
    viterbi: Any = None  # None: the trellis's search of the same name
    adam: Any = None     # None: torch's AdamW for the adapters


DEFINITIONS = Kernels()


class Lora(NamedTuple):
    """Low-rank deltas of one site, one per document b: delta(x)[b] = scale x[b] A[b]^T B[b]^T."""

    A: Tensor  # (S, B, r, n_in), or (B, r, n_in) for one depth
    B: Tensor  # (S, B, n_out, r), or (B, n_out, r)
    scale: float


class Adapters(NamedTuple):
    """Adapters by site: q k v on the projections, o and mlp beside the sublayer, reading its normed input."""

    q: Lora | None = None
    k: Lora | None = None
    v: Lora | None = None
    o: Lora | None = None
    mlp: Lora | None = None
    head: Lora | None = None  # of no depth, reads the final normed hidden state

    def by_depth(self, blocks: list[Block]) -> list[Adapters]:
        """Cut into one Adapters per depth, given its block."""
        found: list[dict[str, Lora]] = [{} for _ in blocks]
        for site, lora in self._asdict().items():
            if lora is None or site == "head":
                continue
            # unbind, not indexing: its backward writes each gradient once
            pairs = zip(lora.A.unbind(0), lora.B.unbind(0), strict=True)
            for sites, block, (A, B) in zip(found, blocks, pairs, strict=True):
                sites[site] = block.fold_adapter(site, Lora(A, B, lora.scale))
        return [Adapters(**sites) for sites in found]

    def rows(self, first: int, end: int) -> Adapters:
        """View the adapters of documents [first, end)."""
        count, cut = end - first, {}
        for site, lora in self._asdict().items():
            if lora is not None:
                cut[site] = Lora(lora.A.narrow(-3, first, count), lora.B.narrow(-3, first, count), lora.scale)
        return Adapters(**cut)


NO_ADAPTERS = Adapters()


class Weights(NamedTuple):
    """The matrices of one block, (n_out, n_in), in the activation dtype, its scales folded in."""

    qkv: Tensor  # Q, K and V below one another
    o: Tensor
    up: Tensor
    down: Tensor


class Cache:
    """What rows (B, T) leave behind: their last token and, by depth, their keys and values.

    With it a forward goes on where it stopped.
    """

    def __init__(self, max_len: int):
        self.max_len = max_len
        self.length = 0
        self.last_token: Tensor | None = None  # (B, 1)
        self.kv: dict[int, Tensor] = {}

    def extend(self, depth: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, T, G, d) of new tokens; return those of all tokens so far."""
        B, T, G, d = k.shape
        if depth not in self.kv:
            # A head's positions lie side by side: reading them takes half the time.
            self.kv[depth] = k.new_empty(2, B, G, self.max_len, d).transpose(2, 3)
        kept = self.kv[depth][:, :, : self.length + T]
        kept[0, :, self.length :] = k
        kept[1, :, self.length :] = v
        return kept[0], kept[1]


class Context(NamedTuple):
    """What all depths of one forward share."""

    tokens: Tensor  # (B, T): a depth may look something up by token
    rope: tuple[Tensor, Tensor]  # cos and sin (T, 1, rope_dims / 2)
    segments: Segments | None
    cache: Cache | None
    kernels: Kernels
    tap: Any  # None, or tap(site, x): sees the input of every matrix


class Streams(NamedTuple):
    """The residual stream (B, T, D); the two-lane decoder has one for attention and one for the MLP."""

    attn: Tensor
    mlp: Tensor | None = None
    mlp_normed: Tensor | None = None  # made where `mlp` is written: the compiler fuses only what is near


def at_positions(x: Tensor, positions: Tensor | None) -> Tensor:
    """Take x (B, T, ..) at the positions (B, n) -> (B, n, ..); None = all of it."""
    if positions is None:
        return x
    index = positions.view(*positions.shape, *[1] * (x.ndim - 2))
    index = index.expand(-1, -1, *x.shape[2:])  # not take_along_dim, which compiles anew for each width T
    return x.gather(1, index)


def add_deltas(
    y: Tensor, x: Tensor, *loras: Lora | None, columns: tuple[int, ...] = (0,)
) -> Tensor:
    """Add to y (B, T, width) the deltas of adapters that read x, each from its own of the `columns` on.

    One product by all A, one by all B, added up inside it.
    """
    A, B = [], []
    for lora, left in zip(loras, columns, strict=True):
        if lora is not None:
            right = y.shape[-1] - left - lora.B.shape[1]
            A.append(lora.A)
            B.append(F.pad(lora.scale * lora.B, (0, 0, left, right)))
    if not A:
        return y
    down = torch.cat(A, dim=1).to(x.dtype)
    up = torch.cat(B, dim=2).to(x.dtype)
    return torch.baddbmm(y, x @ down.mT, up.mT)


def layer_order(cfg: Config, looping: bool) -> tuple[int, ...]:
    """List the blocks in execution order; when looping, the middle ones run 1 + NUM_LOOPS times."""
    if not (looping and cfg.num_loops):
        return tuple(range(cfg.num_layers))
    before = range(cfg.loop_start)
    middle = range(cfg.loop_start, cfg.loop_end + 1)
    after = range(cfg.loop_end + 1, cfg.num_layers)
    return (*before, *[*middle] * (1 + cfg.num_loops), *after)


def rotary_tables(cfg: Config, length: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute cos and sin (length, 1, rope_dims / 2) of the row positions.

    Only differences of positions matter, so documents need no reset. The frequencies are rounded to bf16
    because published checkpoints were trained with rounded ones. With ROPE_YARN the base grows where
    `context` exceeds ROPE_TRAIN_SEQ_LEN.
    """
    base = cfg.rope_base
    if cfg.rope_yarn and context > cfg.rope_train_seq_len:
        base *= (context / cfg.rope_train_seq_len) ** (cfg.rope_dims / (cfg.rope_dims - 2))
    exponents = torch.arange(0, cfg.rope_dims, 2, dtype=torch.float32, device=device)
    frequencies = (base ** -(exponents / cfg.rope_dims)).bfloat16().float()
    places = torch.arange(length, dtype=torch.float32, device=device)
    angles = places[:, None] * frequencies
    return angles.cos()[:, None], angles.sin()[:, None]


class StoredAs(NamedTuple):
    """How the artifact keeps a tensor. Knobs and sites are blank where the codec has no use for them."""

    codec: str        # an entry of CODECS
    bits: str         # the knob that has its bits
    clip_sigmas: str  # the knob that has the end of its grid, in standard deviations of a row
    site: str         # the product whose inputs make its Hessian
    stream: str       # of the artifact, for its integers
    sort_rows: bool   # by similarity, with COMPRESSOR=pergroup


class Role(NamedTuple):
    """What a tensor, or each of the equal parts of a bank, is for."""

    name: str                # of the matrix in a block; "": the tensor is no bank
    products: str            # "every" token; those "scored", not those that are context; "": none
    stored: StoredAs | None  # None: for training only, in no artifact


class Parameter(NamedTuple):
    """One tensor of the network: a row of `parameters`, with no column left out."""

    name: str
    shape: tuple[int, ...]
    init: Callable[[Tensor], Any]
    optimizer: str  # the group it is learned in: "matrices", "scalars" or "embedding", see TrainOptimizer
    roles: tuple[Role, ...]
    present: bool


SITES = ("attn_in", "attn_out", "mlp_in", "mlp_mid")  # inputs of a block's matrices, in the forward's order
HALF = StoredAs("float16", "", "", "", "rest", False)
INT8_ROWS = HALF._replace(codec="int8_row")
ELEMENTWISE = (Role("", "", HALF),)


def init_orthogonal(p: Tensor) -> None:
    """Make each matrix of a bank orthogonal, gain 1."""
    for matrix in p:
        nn.init.orthogonal_(matrix)


def init_half_orthogonal(p: Tensor) -> None:
    """Make Q orthogonal and the output projection zero: every block starts as the identity."""
    init_orthogonal(p[: len(p) // 2])
    p[len(p) // 2 :].zero_()


def init_resid_mix(p: Tensor) -> None:
    """Take all of the residual stream and nothing of the embedding."""
    p[0].fill_(1)
    p[1].zero_()


def gptq_matrix(name: str, products: str, clip_sigmas: str, site: str, sort_rows: bool) -> Role:
    """Describe a block's matrix that GPTQ quantizes and that has a stream of its own."""
    return Role(name, products, StoredAs("gptq", "matrix_bits", clip_sigmas, site, name, sort_rows))


def bank_parameters(cfg: Config) -> list[Parameter]:
    """List the banks: the matrices of all blocks, stacked so that whole matrices are sharded over the ranks.

    A bank holds its roles one after another, each with one matrix (n_out, n_in) per block.
    """
    L, D = cfg.num_layers, cfg.model_dim
    attn, mlp = "attn_clip_sigmas", "mlp_clip_sigmas"
    q = gptq_matrix("attn.c_q", "every", attn, "attn_in", sort_rows=True)
    k = gptq_matrix("attn.c_k", "every", attn, "attn_in", sort_rows=False)
    v = gptq_matrix("attn.c_v", "every", attn, "attn_in", sort_rows=False)
    o = gptq_matrix("attn.proj", "scored", attn, "attn_out", sort_rows=False)
    up = gptq_matrix("mlp.fc", "scored", mlp, "mlp_in", sort_rows=True)
    down = gptq_matrix("mlp.proj", "scored", mlp, "mlp_mid", sort_rows=False)
    return [
        Parameter("qo_bank", (2 * L, D, D), init_half_orthogonal, "matrices", (q, o), True),
        Parameter("kv_bank", (2 * L, cfg.kv_dim, D), init_orthogonal, "matrices", (k, v), True),
        Parameter("mlp_up_bank", (L, cfg.mlp_dim, D), init_orthogonal, "matrices", (up,), True),
        Parameter("mlp_down_bank", (L, D, cfg.mlp_dim), nn.init.zeros_, "matrices", (down,), True),
    ]


def block_parameters(cfg: Config, block: str) -> list[Parameter]:
    """List the small tensors of one block."""
    D, heads = cfg.model_dim, cfg.num_heads
    dense = cfg.attn_gate == "dense"
    gain = partial(nn.init.constant_, val=cfg.qk_gain_init)
    gate_shape = (heads, D if dense else cfg.gate_window)
    gate_std = cfg.gated_attn_init_std if dense else cfg.sparse_attn_gate_init_std
    gate_init = partial(nn.init.normal_, std=gate_std)
    gate = (Role("", "scored", INT8_ROWS if cfg.gated_attn_quant_gate else HALF),)
    out_gate = (Role("", "scored", HALF),)
    has_gate = cfg.attn_gate in ("dense", "sparse")
    out_name = f"{block}.attn.attn_gate_proj.weight"
    return [
        Parameter(f"{block}.attn_scale", (D,), nn.init.ones_, "scalars", ELEMENTWISE, True),
        Parameter(f"{block}.mlp_scale", (D,), nn.init.ones_, "scalars", ELEMENTWISE, True),
        Parameter(f"{block}.resid_mix", (2, D), init_resid_mix, "scalars", ELEMENTWISE, True),
        Parameter(f"{block}.attn.q_gain", (heads,), gain, "scalars", ELEMENTWISE, True),
        Parameter(f"{block}.attn.attn_gate_w", gate_shape, gate_init, "scalars", gate, has_gate),
        Parameter(out_name, gate_shape, nn.init.zeros_, "scalars", out_gate, cfg.attn_gate == "out"),
    ]


@cache
def parameters(cfg: Config) -> tuple[Parameter, ...]:
    """List every tensor of the network, once.

    Shape, initial values, optimizer, FLOPs and stored form are read from here. Names are those of published
    checkpoints.
    """
    L, D = cfg.num_layers, cfg.model_dim
    skips = (len(layer_order(cfg, looping=True)) // 2, D)
    lanes, smear = cfg.parallel_start_layer > 0, cfg.smear_gate_enabled
    embedding = (cfg.vocab_size, D)
    head = (Role("", "scored", StoredAs("gptq", "embed_bits", "embed_clip_sigmas", "head", "tok_emb", True)),)
    embedding_init = partial(nn.init.normal_, std=cfg.tied_embed_init_std)
    stream_share = partial(nn.init.constant_, val=1.1)
    rows = [
        *bank_parameters(cfg),
        Parameter("skip_weights", skips, nn.init.ones_, "scalars", ELEMENTWISE, True),
        Parameter("skip_gates", skips, nn.init.zeros_, "scalars", ELEMENTWISE, cfg.skip_gates_enabled),
        # by sublayer, stream
        Parameter("parallel_post_lambdas", (L, 2, 2), nn.init.ones_, "scalars", ELEMENTWISE, lanes),
        Parameter("parallel_resid_lambdas", (L, 2), stream_share, "scalars", ELEMENTWISE, lanes),
        Parameter("smear_lambda", (1,), nn.init.zeros_, "scalars", ELEMENTWISE, smear),
        Parameter("tok_emb.weight", embedding, embedding_init, "embedding", head, True),
    ]
    for layer in range(L):
        rows += block_parameters(cfg, f"blocks.{layer}")
    every = (Role("", "every", HALF),)
    rows.append(Parameter("smear_gate.weight", (1, cfg.gate_window), nn.init.zeros_, "scalars", every, smear))
    return tuple(row for row in rows if row.present)


class Matrix(NamedTuple):
    """A tensor as artifacts name it: a whole parameter, or one matrix of a bank."""

    name: str
    parameter: str
    index: int | None  # in its bank; None: the whole parameter
    layer: int | None  # its block; None: it belongs to no block
    shape: tuple[int, ...]
    role: Role


@cache
def matrices(cfg: Config) -> tuple[Matrix, ...]:
    """List the tensors as artifacts name and order them: what is no bank, then each block's matrices."""
    whole, parts = [], []
    for row in parameters(cfg):
        for k, role in enumerate(row.roles):
            if not role.name:
                words = row.name.split(".")
                layer = int(words[1]) if words[0] == "blocks" else None
                whole.append(Matrix(row.name, row.name, None, layer, row.shape, role))
                continue
            for layer in range(cfg.num_layers):
                name = f"blocks.{layer}.{role.name}.weight"
                index = k * cfg.num_layers + layer
                parts.append(Matrix(name, row.name, index, layer, row.shape[1:], role))
    # Within a block as the forward meets their inputs; what is for training only comes last.
    parts.sort(key=lambda m: (
        m.layer, SITES.index(m.role.stored.site) if m.role.stored else len(SITES)))
    return (*whole, *parts)


def stored_matrices(cfg: Config) -> dict[str, Matrix]:
    """Find what an artifact of this configuration holds, by name, in its order there."""
    return {m.name: m for m in matrices(cfg) if m.role.stored is not None}


def unbank(cfg: Config, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut a state dict, or a part of one, into the tensors that artifacts name."""
    out = {}
    for name, m in stored_matrices(cfg).items():
        if m.parameter in state:
            whole = state[m.parameter]
            out[name] = whole if m.index is None else whole[m.index]
    return out


def rebank(cfg: Config, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the tensors that artifacts name together again: the inverse of `unbank`."""
    out: dict[str, Tensor] = {}
    banks: dict[str, list[Tensor]] = {}
    for m in sorted(matrices(cfg), key=lambda m: m.index or 0):
        if m.index is None:
            out[m.parameter] = tensors[m.name]
        else:
            banks.setdefault(m.parameter, []).append(tensors[m.name])
    return out | {name: torch.stack(parts) for name, parts in banks.items()}


class Attention(nn.Module):
    """One attention sublayer: its small tensors; its matrices live in the banks."""

    def __init__(self, cfg: Config, layer: int, norm_scale: float):
        super().__init__()
        self.cfg = cfg
        self.name = f"blocks.{layer}"
        self.norm_scale = norm_scale
        self.window = cfg.window(layer)
        self.exclusive = layer >= cfg.num_layers - cfg.xsa_last_n
        if cfg.attn_gate == "out":
            self.attn_gate_proj = nn.Linear(cfg.gate_window, cfg.num_heads, bias=False)

    def gate(self, x: Tensor, q_raw: Tensor) -> Tensor:
        """Compute how much of each head's output passes (B, T, H); the weights take over x's norm scale."""
        cfg, source = self.cfg, x
        if cfg.attn_gate == "dense":
            weight = self.norm_scale * self.attn_gate_w
        elif cfg.attn_gate == "sparse":
            weight = cfg.sparse_attn_gate_scale * self.norm_scale * self.attn_gate_w
        elif cfg.attn_out_gate_src == "proj":
            weight = self.norm_scale * self.attn_gate_proj.weight
        else:
            weight, source = self.attn_gate_proj.weight, q_raw
        if cfg.attn_gate != "dense":
            source = source[..., : cfg.gate_window].contiguous()
        gate = torch.sigmoid(F.linear(source, weight.to(x.dtype)))
        return 2 * gate if cfg.attn_gate == "out" else gate

    def qkv(self, x: Tensor, weights: Weights, lora: Adapters) -> Tensor:
        """Compute the merged projection and the deltas of the adapters there are: (B, T, (H + 2 G) d)."""
        D, kv = self.cfg.model_dim, self.cfg.kv_dim
        merged = F.linear(x, weights.qkv)
        return add_deltas(merged, x, lora.q, lora.k, lora.v, columns=(0, D, D + kv))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor,
        context: Context, depth: int, positions: Tensor | None,
    ) -> Tensor:
        """Attend within segments, to the cache, or within whole rows -> (B, T, H, d), or at the positions."""
        if context.segments is not None:
            rows = (t.flatten(0, 1) for t in (q, k, v))  # not t[0]: the gradient of an index is a copy
            cu_seqlens, max_len = context.segments
            return context.kernels.attend(*rows, cu_seqlens, max_len, self.window)[None]
        if context.cache is not None:
            k, v = context.cache.extend(depth, k, v)
        return causal_attention(at_positions(q, positions), k, v, self.window, positions)

    def forward(
        self, x: Tensor, weights: Weights, lora: Adapters,
        context: Context, depth: int, positions: Tensor | None,
    ) -> Tensor:
        """Map x (B, T, D), normed without its norm scale -> (B, T, D); or (B, n, D) at positions (B, n)."""
        cfg, kernels = self.cfg, context.kernels
        if context.tap is not None:
            context.tap(f"{self.name}.attn_in", self.norm_scale * x)
        qkv = self.qkv(x, weights, lora)
        q, k, v = kernels.split_heads(qkv, self.q_gain, *context.rope, cfg.num_kv_heads)
        y = self.attend(q, k, v, context, depth, positions)
        x, qkv, v = (at_positions(t, positions) for t in (x, qkv, v))
        gate = None if cfg.attn_gate == "none" else self.gate(x, qkv)
        if self.exclusive and gate is not None:
            y = kernels.gate_heads(y, v, gate)
        elif self.exclusive:
            y = without_own_value(y, v)
        elif gate is not None:
            y = y * gate.unsqueeze(-1)
        y = y.flatten(2)
        if context.tap is not None:
            context.tap(f"{self.name}.attn_out", y)
        return add_deltas(F.linear(y, weights.o), x, lora.o)


class Block(nn.Module):
    """One block: its small tensors and the two sublayers."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.cfg = cfg
        self.name = f"blocks.{layer}"
        self.norm_scale = 1 / math.sqrt(layer + 1) if cfg.ln_scale else 1.0
        self.attn = Attention(cfg, layer, self.norm_scale)

    def fold(self, q: Tensor, k: Tensor, v: Tensor, *others: Tensor, dtype: torch.dtype) -> Weights:
        """Move the scales of a sublayer into its matrices: a pass over weights instead of activations."""
        o, up, down = others
        qkv = self.norm_scale * torch.cat((q, k, v))
        o = self.attn_scale[:, None] * o
        up = self.norm_scale * up
        down = self.mlp_scale[:, None] * down
        return Weights(*(matrix.to(dtype) for matrix in (qkv, o, up, down)))

    def fold_adapter(self, site: str, lora: Lora) -> Lora:
        """Do the same for an adapter."""
        learned = dict(o=self.attn_scale, mlp=self.mlp_scale).get(site)
        B = lora.B if learned is None else learned[:, None] * lora.B
        return Lora(lora.A, B, lora.scale * self.norm_scale)

    def mlp(self, x: Tensor, weights: Weights, lora: Adapters, context: Context) -> Tensor:
        """Compute what the MLP adds to the residual stream, from that stream normed, x (B, T, D)."""
        slope, tap = self.cfg.mlp_slope, context.tap
        if tap is None:
            out = context.kernels.mlp(x, weights.up, weights.down, slope)
        else:
            tap(f"{self.name}.mlp_in", self.norm_scale * x)
            out = leaky_mlp(x, weights.up, weights.down, slope, partial(tap, f"{self.name}.mlp_mid"))
        return add_deltas(out, x, lora.mlp)

    def forward(
        self, streams: Streams, x0: Tensor, weights: Weights, lora: Adapters,
        context: Context, depth: int, positions: Tensor | None, lane_mix: Tensor | None,
    ) -> Streams:
        """Run attention and MLP, one after the other on one stream, or side by side on two.

        x0 (B, T, D): the embedding, of which attention reads a share, per channel. positions (B, n): where
        alone to compute what follows the keys and values. lane_mix: `GPT.lane_mix`, where there are two
        streams.
        """
        mixed, normed = add_norm(self.resid_mix, streams.attn, x0)
        attn = self.attn(normed, weights, lora, context, depth, positions)
        if streams.mlp is None:
            x, normed = add_norm(None, at_positions(mixed, positions), attn)
            return Streams(x + self.mlp(normed, weights, lora, context))
        attn_stream, mlp_stream, normed = (at_positions(x, positions) for x in streams)
        mlp = self.mlp(normed, weights, lora, context)
        attn_stream = add_streams(lane_mix[0], attn_stream, attn, mlp)
        return Streams(attn_stream, *add_norm(lane_mix[1], mlp_stream, attn, mlp))


class GPT(nn.Module):
    """The S14 network, its tensors as `parameters` lists them. Masters are fp32, the embedding has the
    activation dtype.
    """

    def __init__(self, cfg: Config, dtype: torch.dtype = torch.float32, kernels: Kernels = DEFINITIONS):
        super().__init__()
        self.cfg = cfg
        self.kernels = kernels
        self.tok_emb = nn.Module()
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
        if cfg.smear_gate_enabled:
            self.smear_gate = nn.Linear(cfg.gate_window, 1, bias=False)
        for row in parameters(cfg):
            owner, _, leaf = row.name.rpartition(".")
            precision = dtype if row.optimizer == "embedding" else torch.float32
            value = nn.Parameter(torch.empty(row.shape, dtype=precision))
            self.get_submodule(owner).register_parameter(leaf, value)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed (B, T) int64 -> (B, T, D), each token with a gated share of its predecessor."""
        cfg = self.cfg
        x = F.embedding(tokens, self.tok_emb.weight)
        if cfg.smear_gate_enabled:
            source = x[:, 1:, : cfg.gate_window].contiguous()
            gate = torch.sigmoid(F.linear(source, self.smear_gate.weight.to(x.dtype)))
            gate = self.smear_lambda.to(x.dtype) * gate
            if cfg.smear_gate_bos_fix:
                # BOS starts a new document: its predecessor belongs to someone else's text and must not leak
                # into it.
                gate = gate * (tokens[:, 1:] != BOS_ID).unsqueeze(-1)
            smeared = x[:, 1:] + gate * x[:, :-1]
            x = torch.cat((x[:, :1], smeared), dim=1)
        return rms_norm(x)

    def weights(self, dtype: torch.dtype) -> list[Weights]:
        """Cut the banks into blocks. unbind, not indexing: its backward writes each gradient once."""
        L = self.cfg.num_layers
        qo, kv = self.qo_bank.unbind(0), self.kv_bank.unbind(0)
        up, down = self.mlp_up_bank.unbind(0), self.mlp_down_bank.unbind(0)
        out = []
        for i, block in enumerate(self.blocks):
            out.append(block.fold(
                qo[i], kv[i], kv[L + i], qo[L + i],
                up[i], down[i], dtype=dtype))
        return out

    def skip(self, x: Tensor, skipped: Tensor, index: int) -> Tensor:
        """Combine the decoder's x with an encoder output; rows of the weights count decoder depths, not
        blocks.
        """
        skipped = self.skip_weights[index].to(x.dtype) * skipped
        if not self.cfg.skip_gates_enabled:
            return x + skipped
        gate = torch.sigmoid(self.skip_gates[index])
        return torch.lerp(skipped, x, gate.to(x.dtype))

    def lane_mix(self, layer: int) -> Tensor:
        """Weights (2 streams that receive, 3 that give, 1): the stream itself, what attention writes, what
        the MLP writes.
        """
        own = self.parallel_resid_lambdas[layer, :, None]
        written = self.parallel_post_lambdas[layer].T  # rows of the parameter are the sublayers that write
        return torch.cat((own, written), dim=1)[..., None]

    def hidden(
        self, tokens: Tensor, layers: tuple[int, ...], segments: Segments | None, cache: Cache | None,
        adapters: Adapters, positions: Tensor | None, tap,
    ) -> Tensor:
        """Map tokens -> final normed hidden states (B, T, D), or (B, n, D) at `positions`.

        With positions the last depth computes of the others only keys and values. The first half of `layers`
        pushes skips, the second half pops them. From the first decoder depth with block >=
        PARALLEL_START_LAYER on there are two streams: attention reads and skips join the first, the MLP reads
        the second, and both sublayers write to both.
        """
        cfg, start = self.cfg, 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if start:  # the smear gate looks back at the token before
            x0 = self.embed(torch.cat((cache.last_token, tokens), dim=1))[:, 1:]
        else:
            x0 = self.embed(tokens)
        bounded = segments or cache
        longest = tokens.shape[1] if bounded is None else bounded.max_len
        cos, sin = rotary_tables(cfg, end, longest, tokens.device)
        rope = (cos[start:], sin[start:])
        context = Context(tokens, rope, segments, cache, self.kernels, tap)
        weights = self.weights(x0.dtype)
        loras = adapters.by_depth([self.blocks[layer] for layer in layers])
        streams, skips, half = Streams(x0), [], len(layers) // 2
        for depth, layer in enumerate(layers):
            if depth >= half:
                if streams.mlp is None and 0 < cfg.parallel_start_layer <= layer:
                    streams = Streams(streams.attn, streams.attn, rms_norm(streams.attn))
                if skips:
                    joined = self.skip(streams.attn, skips.pop(), depth - half)
                    streams = streams._replace(attn=joined)
            scored = positions if depth == len(layers) - 1 else None
            lane_mix = None if streams.mlp is None else self.lane_mix(layer)
            streams = self.blocks[layer](
                streams, x0, weights[layer], loras[depth], context, depth, scored, lane_mix)
            if depth < half:
                skips.append(streams.attn)
        if cache is not None:
            cache.last_token = tokens[:, -1:]
            cache.length = end
        if streams.mlp is None:
            return rms_norm(streams.attn)
        return rms_norm((streams.attn + streams.mlp) / 2)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None,
        *,
        layers: tuple[int, ...],
        segments: Segments | None = None,
        cache: Cache | None = None,
        adapters: Adapters = NO_ADAPTERS,
        positions: Tensor | None = None,
        shift: Tensor | None = None,
        training: bool = False,
        tap=None,
    ) -> Tensor:
        """Compute nats per target, fp32. The only entry: training, scoring, calibration, writing and
        test-time training.

        tokens (B, T) int64. targets (B, T), or (B, n) together with `positions` (B, n): score just those
        positions; one more dimension for several candidates each; None: the capped logits (B, T, V). layers:
        `layer_order`. segments: of a packed row; not with positions. cache: what these rows held before; not
        with either. adapters: one set per row. shift (B or 1, 1, D): added to the final hidden states.
        tap(site, x): sees the input of every matrix. training: the cap is rounded as FUSED_CE_ENABLED says,
        not EVAL_SOFTCAP_FP32; without adapters.
        """
        cfg, head = self.cfg, self.tok_emb.weight
        x = self.hidden(tokens, layers, segments, cache, adapters, positions, tap)
        if shift is not None:
            x = (x + shift).to(x.dtype)
        if tap is not None:
            tap("head", x)
        round_cap = not (cfg.fused_ce_enabled if training else cfg.eval_softcap_fp32)
        if training and self.kernels.head_ce is not None and not round_cap:
            return self.kernels.head_ce(x, head, targets, cfg.logit_softcap)
        logits = add_deltas(F.linear(x, head), x, adapters.head)
        if targets is None:
            return softcap(logits, cfg.logit_softcap)
        return softcapped_ce(logits, targets, cfg.logit_softcap, round_cap)


class Flops(NamedTuple):
    """Floating-point operations of a forward's products: two a multiplication and addition."""

    matmul: float     # with the model's own matrices
    lora: float       # with those of adapters
    attention: float


def causal_pairs(lengths: np.ndarray, window: int) -> float:
    """Pairs of a query and a key that it sees, over segments of these lengths."""
    full = np.minimum(lengths, window or np.inf)  # queries whose window the start of the segment cuts short
    return (full * (full + 1) / 2 + (lengths - full) * window).sum()


def adapter_flops(site: str, lora: Lora, depths: int, scored: float) -> float:
    """Count the FLOPs of a site's adapters for a token; at the last depth some are for scored tokens only."""
    spared = dict(o=1 / depths, mlp=1 / depths, head=1.0).get(site, 0.0) * (1 - scored)
    per_document = (lora.A.numel() + lora.B.numel()) / lora.A.shape[-3]
    return 2 * per_document * (1 - spared)


def flops_per_token(
    cfg: Config, lengths, looping: bool, adapters: Adapters = NO_ADAPTERS, scored: float = 1.0
) -> Flops:
    """Count the forward FLOPs of a token, averaged over segments of these lengths.

    Counted are the matrices of every layer application, logits and adapters, and attention by its causal
    pairs.
    scored: share of the tokens, at the end of the segments, that are scored; the last depth computes keys and
    values of the others, but not what follows. Zeros that adapters are padded with do not count.
    """
    layers = layer_order(cfg, looping)
    products = 0.0
    for m in matrices(cfg):
        times = 1.0 if m.layer is None else layers.count(m.layer)
        if m.role.products == "scored" and m.layer in (None, layers[-1]):
            times -= 1 - scored
        products += times * math.prod(m.shape) * bool(m.role.products)
    sites = {site: lora for site, lora in adapters._asdict().items() if lora is not None}
    deltas = sum(adapter_flops(site, lora, len(layers), scored) for site, lora in sites.items())
    n = np.asarray(lengths, dtype=np.float64)
    pairs = sum(causal_pairs(n, cfg.window(layer)) for layer in layers)
    pairs -= causal_pairs((1 - scored) * n, cfg.window(layers[-1]))
    return Flops(2 * products, deltas, 4 * cfg.model_dim * pairs / n.sum())


# How often a pass does the forward's FLOPs with matrices, adapters and in attention, and the latter again.
PASSES = {
    "score": (1, 1, 1, 0.0),
    "train": (3, 3, 3, 0.5),  # the backward of flash attention repeats one of the forward's two products
    "adapt": (2, 3, 3, 0.5),  # frozen matrices have no gradient of their own
}


class FlopCount:
    """Count the FLOPs of one rank: the model's, of these those of scored tokens, and all the hardware's."""

    def __init__(self):
        self.model = 0.0
        self.useful = 0.0
        self.hardware = 0.0

    def add(self, flops: Flops, kind: str, tokens: int, scored: float) -> None:
        """Add one of PASSES over `tokens` positions, padding included; the loss counts `scored` of them."""
        matmul, lora, attention, again = PASSES[kind]
        per_token = matmul * flops.matmul + lora * flops.lora + attention * flops.attention
        self.model += tokens * per_token
        self.useful += scored * per_token
        self.hardware += tokens * (per_token + again * flops.attention)


@torch.no_grad()
def build_model(cfg: Config, world: World, kernels: Kernels = DEFINITIONS) -> GPT:
    """A freshly initialised model on this rank's device; the same on every rank and on every device type."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, world.dtype, kernels)
    for p in parameters(cfg):
        p.init(model.get_parameter(p.name))
    return model.to(world.device)


def compile_forward(model: GPT, cfg: Config, world: World, growing: bool = False):
    """Return the forward that everything calls: compiled if COMPILE_BACKEND says so, else the model itself.

    The same code serves packed rows of any number of segments and, if `growing`, rows of any width.
    """
    backend = cfg.compile_backend
    if backend == "auto":
        backend = "inductor" if world.device.type == "cuda" else "none"
    if backend == "none":
        return model
    torch._dynamo.config.recompile_limit = cfg.dynamo_cache_size_limit
    torch._dynamo.config.accumulated_recompile_limit = cfg.dynamo_accumulated_cache_size_limit
    torch._dynamo.utils.set_compilation_metrics_limit(1 << 16)  # `compilations` counts all of them
    compiled = torch.compile(model, backend=backend, dynamic=None if growing else False, fullgraph=True)

    def forward(
        tokens: Tensor, targets: Tensor | None, segments: Segments | None = None, **options
    ) -> Tensor:
        for t, size in ((segments and segments.cu_seqlens, 0), (tokens if growing else None, 1)):
            if t is not None:
                torch._dynamo.maybe_mark_dynamic(t, size)
        return compiled(tokens, targets, segments=segments, **options)

    return forward


# ==================================================================================================
# OPTIMIZERS - which parameter is learned how, and one step of it on any number of ranks.
# ==================================================================================================

# Polar Express (Amsel et al., arXiv:2505.16932): rows are (a, b, c) of one iteration,
# X <- a X + b (X X^T) X + c (X X^T)^2 X. Five of them map singular values in [1e-3, 1] into [0.86, 1.14].
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(G: Tensor, steps: int) -> Tensor:
    """Approximate the semi-orthogonal matrix nearest to each of G (n, rows, cols). Zeros stay zeros."""
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)

    for a, b, c in POLAR_EXPRESS[:steps]:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X

    return X.mT if tall else X


MatrixState = dict[str, Tensor]  # what an optimizer remembers of n matrices: tensors (n, ...); {} at first


def muon(gradient: Tensor, state: MatrixState, cfg: Config, momentum: float) -> tuple[Tensor, MatrixState]:
    """Compute the Muon update (Keller Jordan, 2024) of a gradient (n, rows, cols), and the next state.

    Nesterov momentum, rows scaled to norm 1 (MuonEq-R), orthogonalised, scaled by sqrt(max(1, rows / cols)).
    """
    rows, cols = gradient.shape[-2:]
    average = torch.add(gradient, state.get("momentum", 0.0), alpha=momentum)
    update = torch.add(gradient, average, alpha=momentum)

    if cfg.muon_row_normalize:
        norms = torch.linalg.vector_norm(update, dim=-1, keepdim=True, dtype=torch.float32)
        update = update / norms.clamp_min(1e-7).to(update.dtype)

    orthogonal = polar_express(update, cfg.muon_backend_steps)
    return orthogonal * max(1.0, rows / cols) ** 0.5, dict(momentum=average)


# (gradient, state, cfg, momentum of this step) -> (update, next state); what was handed in stays as it is.
# A new optimizer is one function, one entry here, and its name among the choices of MATRIX_OPTIMIZER.
MATRIX_OPTIMIZERS = dict(muon=muon)


class Bank:
    """Holds a weight bank (n, rows, cols) and this rank's share: `per_rank` matrices, zeros behind the last.

    A step is launch_reduce, wait, launch_gather, apply.
    """

    def __init__(self, p: nn.Parameter, world: World):
        self.p = p
        self.world = world
        self.per_rank = -(-len(p) // world.size)
        self.state = {}

        # Gradients of all matrices, which the gathered updates replace, and of this rank's.
        self.padded = p.new_zeros(self.per_rank * world.size, *p.shape[1:], dtype=world.dtype)
        self.shard = torch.empty_like(self.padded[: self.per_rank]) if world.size > 1 else self.padded
        self.update = None
        self.pending = None

    def launch_reduce(self) -> None:
        """Start averaging the gradient over the ranks; each receives its share in `shard`."""
        self.padded[: len(self.p)].copy_(self.p.grad)
        if self.world.size > 1:
            reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            self.pending = reduce_scatter(self.shard, self.padded, dist.ReduceOp.AVG, async_op=True)

    def launch_gather(self, update: Tensor) -> None:
        """Start collecting every rank's share of the update."""
        self.update = update
        if self.world.size > 1:
            all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            self.update = self.padded
            self.pending = all_gather(self.padded, update.contiguous(), async_op=True)

    def wait(self) -> None:
        if self.pending:
            self.pending.wait()
            self.pending = None

    def apply(self, lr: float, weight_decay: float) -> None:
        """Decay, then move along the gathered update."""
        self.wait()
        self.p.mul_(1 - lr * weight_decay).add_(self.update[: len(self.p)], alpha=-lr)
        self.update = None

    def full_state(self) -> MatrixState:
        """Collect the state of all matrices, on every rank, in host memory."""
        full = {}
        for name, share in self.state.items():
            shares = [share.clone() for _ in range(self.world.size)]
            if self.world.size > 1:
                dist.all_gather(shares, share)
            full[name] = torch.cat(shares)[: len(self.p)].cpu()
        return full

    def load_state(self, full: MatrixState) -> None:
        """Take this rank's share of the state of all matrices."""
        first = self.world.rank * self.per_rank
        self.state = {}
        for name, whole in full.items():
            mine = whole[first : first + self.per_rank]
            padding = whole.new_zeros(self.per_rank - len(mine), *whole.shape[1:])
            self.state[name] = torch.cat((mine, padding)).to(self.p.device)


class TrainOptimizer:
    """Learns the banks by MATRIX_OPTIMIZER, whole matrices a rank, and the rest by AdamW, replicated."""

    def __init__(self, model: GPT, cfg: Config, world: World):
        self.cfg = cfg
        self.world = world
        self.model = model
        members = dict(matrices=[], scalars=[], embedding=[])
        for row in parameters(cfg):
            members[row.optimizer].append(model.get_parameter(row.name))

        banks = [Bank(p, world) for p in members["matrices"]]
        self.banks = sorted(banks, key=lambda bank: -bank.p.numel())  # the largest reduction starts first
        self.scalars = members["scalars"]  # fp32
        self.embedding = members["embedding"]  # of the activations' dtype, as the banks' gradients
        self.replicated = self.scalars + self.embedding
        groups = [
            dict(params=self.scalars, base_lr=cfg.scalar_lr, weight_decay=cfg.adam_wd),
            dict(params=self.embedding, base_lr=cfg.tied_embed_lr, weight_decay=cfg.embed_wd),
        ]
        fused = world.device.type in ("cuda", "cpu")
        self.adamw = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=fused)

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float) -> float:
        """Reduce the gradients, clip them, update the weights. Returns the gradient's norm before clipping.

        Raises FloatingPointError, leaving weights and state as they were, when the norm is not finite.
        """
        cfg = self.cfg
        self.reduce()
        norm = self.grad_norm()
        norm_on_host = Readback(norm)
        allowed = cfg.grad_clip_norm or math.inf
        shrink = (allowed / (norm.to(self.world.wide) + 1e-6)).clamp(max=1.0).float()

        optimizer = MATRIX_OPTIMIZERS[cfg.matrix_optimizer]
        states = []  # the banks keep the old ones until the norm is known to be finite
        for bank in self.banks:  # gathering one bank's update overlaps the next one's products
            bank.shard.mul_(shrink.expand_as(bank.shard))  # as a scalar it would be rounded to bf16 first
            update, state = optimizer(bank.shard, bank.state, cfg, momentum)
            bank.launch_gather(update)
            states.append(state)

        value = norm_on_host.read()  # of all that was launched, the host waits for the norm alone
        if not math.isfinite(value):
            for bank in self.banks:
                bank.wait()
            raise FloatingPointError(f"the gradient norm is {value}")

        self.step_replicated(shrink, lr_scale)
        for bank, state in zip(self.banks, states, strict=True):
            bank.state = state
            bank.apply(cfg.matrix_lr * lr_scale, cfg.muon_wd)
        self.model.zero_grad()
        return value

    def reduce(self) -> None:
        """Average all gradients over the ranks: banks scattered, scalars in one flat message."""
        for p in self.replicated:
            if p.grad is None:  # this model has no use for it, as for the skips of a single block
                p.grad = torch.zeros_like(p)
        for bank in self.banks:
            bank.launch_reduce()

        if self.world.size > 1:
            pending = [dist.all_reduce(p.grad, dist.ReduceOp.AVG, async_op=True) for p in self.embedding]
            scalars = [p.grad for p in self.scalars]
            self.world.sum_(*scalars)
            torch._foreach_div_(scalars, self.world.size)
            for message in pending:
                message.wait()

        for bank in self.banks:
            bank.wait()

    def grad_norm(self) -> Tensor:
        """Compute the norm of the averaged gradient, on the device: the same number on every rank."""
        parts = [bank.shard for bank in self.banks] + [p.grad for p in self.replicated]
        half = [t for t in parts if t.dtype != torch.float32]
        full = [t for t in parts if t.dtype == torch.float32]

        # One kernel a dtype. The banks, which share one, are the first of the norms in either case.
        norms = [torch._foreach_norm(group, dtype=torch.float32) for group in (half, full) if group]
        squares = torch.stack(sum(norms, ())).square()
        of_banks = squares[: len(self.banks)].sum()
        self.world.sum_(of_banks)
        return (of_banks + squares[len(self.banks) :].sum()).sqrt()

    def step_replicated(self, shrink: Tensor, lr_scale: float) -> None:
        """Clip the gradients of everything but matrices and take a step of AdamW."""
        torch._foreach_mul_([p.grad for p in self.scalars], shrink)
        for p in self.embedding:
            p.grad.mul_(shrink.expand_as(p.grad))

        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adamw.step()

    def state_dict(self) -> dict:
        """Collect the state of all parameters, on every rank."""
        return dict(adamw=self.adamw.state_dict(), matrices=[bank.full_state() for bank in self.banks])

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken."""
        self.adamw.load_state_dict(state["adamw"])
        for bank, full in zip(self.banks, state["matrices"], strict=True):
            bank.load_state(full)


class Ema:
    """Averages every tensor over the steps, in fp32, from the initial weights on, without debiasing."""

    def __init__(self, model: GPT, decay: float):
        self.decay = decay
        weights = model.state_dict()
        self.shadow = {name: t.float().clone() for name, t in weights.items()}

    @torch.no_grad()
    def update(self, model: GPT) -> None:
        live = model.state_dict()
        weights = [live[name].float() for name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - self.decay)

    def copy_to(self, model: GPT) -> None:
        """Replace the weights by their average, each in its own dtype."""
        model.load_state_dict(self.shadow)


# ==================================================================================================
# TRAINING - schedules as pure functions of progress, exact warm-up, and a loop that never overruns its clock.
# ==================================================================================================

def lr_scale(cfg: Config, progress: float, step: int = 0, step_seconds: float = 0.0) -> float:
    """Compute the share of the peak learning rate: 1, then linear down to MIN_LR over the last WARMDOWN_FRAC.

    progress runs from 0 to 1. With WARMDOWN_ITERS the warmdown lasts that many steps instead: counted back
    from ITERATIONS, or from the end of the clock at `step_seconds` a step.
    """
    if cfg.warmdown_iters:
        budget = cfg.train_budget_seconds
        by_clock = cfg.train_seq_schedule_mode == "wallclock" and budget and step_seconds
        steps_left = budget * (1 - progress) / step_seconds if by_clock else cfg.iterations - step
        return max(min(1.0, steps_left / cfg.warmdown_iters), cfg.min_lr)

    if progress < 1 - cfg.warmdown_frac or not cfg.warmdown_frac:
        return 1.0
    return max((1 - progress) / cfg.warmdown_frac, cfg.min_lr)


def context_length(cfg: Config, progress: float) -> int:
    """Choose the attention context: that of the first stage whose end has not passed."""
    return next(length for length, end in cfg.seq_schedule if progress <= end)


def rewarmup(cfg: Config, steps_since_change: int | None) -> float:
    """Compute the ramp after a context change: k / SEQ_CHANGE_WARMUP_STEPS at its k-th step; None: 1."""
    if steps_since_change is None or not cfg.seq_change_warmup_steps:
        return 1.0
    return min(1.0, steps_since_change / cfg.seq_change_warmup_steps)


def muon_momentum(cfg: Config, step: int) -> float:
    """Compute the momentum of a step: linear over MUON_MOMENTUM_WARMUP_STEPS, then constant."""
    steps = cfg.muon_momentum_warmup_steps
    share = min(1.0, step / steps) if steps else 1.0
    start = cfg.muon_momentum_warmup_start
    return start + share * (cfg.muon_momentum - start)


def looping_at(cfg: Config, progress: float) -> bool:
    """Tell whether the middle blocks repeat at this point of the run."""
    return cfg.num_loops > 0 and progress >= cfg.enable_looping_at


def halves(layers: tuple[int, ...]) -> str:
    """Write an order of layers for the log: those before the skips, and those after."""
    middle = len(layers) // 2
    return f"encoder:{list(layers[:middle])} decoder:{list(layers[middle:])}"


def warm_shapes(cfg: Config) -> list[tuple[int, bool]]:
    """List the (context, looping) combinations that the run will meet, in the order it meets them."""
    shapes = []
    start = 0.0
    for length, end in cfg.seq_schedule if cfg.compile_shape_warmup else [(cfg.train_seq_len, 1.0)]:
        if not cfg.num_loops or start < cfg.enable_looping_at:
            shapes.append((length, False))
        if cfg.num_loops and end > cfg.enable_looping_at:
            shapes.append((length, True))
        start = end
    return list(dict.fromkeys(shapes))


def warm_lengths(tokens: int, context: int) -> list[int]:
    """List the lengths of cu_seqlens to warm for rows of `tokens`: the least possible and three more."""
    segments = -(-tokens // context)
    return [CU_SEQLENS_BUCKET * (segments // CU_SEQLENS_BUCKET + k) for k in range(1, 5)]


def warm_rows(row: Row, context: int) -> list[Row]:
    """Cut `row` every `context` tokens, once for each of its `warm_lengths`."""
    rows = []
    tokens = row.targets.numel()
    for length in warm_lengths(tokens, context):
        bounds = torch.arange(length, dtype=torch.int32).mul(context).clamp(max=tokens)
        rows.append(row._replace(segments=Segments(bounds.to(row.inputs.device), context)))
    return rows


def nats_of_row(row: Row, forward, graphs: Graphed | None, **options) -> Tensor:
    """Compute the nats (1, T) of a row. One of more segments than were warmed does without a graph."""
    segments = row.segments
    warmed = len(segments.cu_seqlens) in warm_lengths(row.targets.numel(), segments.max_len)
    run = graphs if graphs and warmed else forward
    return run(row.inputs, row.targets, segments=segments, **options)


class StepClock:
    """Counts the seconds of training, without pauses for validation and checkpoints, and forecasts a step."""

    def __init__(self, seconds: float = 0.0, recent: tuple[float, ...] = ()):
        self.seconds = seconds  # until the last pause
        self.start = None  # None: paused
        self.recent = [*recent]  # seconds a block of the last ten steps

    def now(self) -> float:
        return self.seconds + (0.0 if self.start is None else time.perf_counter() - self.start)

    def pause(self) -> None:
        self.seconds = self.now()
        self.start = None

    def go_on(self) -> None:
        self.start = time.perf_counter()

    def record(self, seconds: float, applications: int) -> None:
        """Remember the seconds of one step that ran `applications` blocks."""
        self.recent = [*self.recent[-9:], seconds / applications]

    def block_seconds(self) -> float:
        """Estimate from above what a block of the next step takes: as in the slowest recent, plus 10 %."""
        return 1.1 * max(self.recent, default=0.0)


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a request to stop between two steps; the second one kills."""

    def __init__(self):
        self.requested = False
        self.previous = {}  # handlers, by signal

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread
                self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, _frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)


class Interrupted(RunError):
    """Training was asked to stop; its checkpoint has been written."""


class Utilization:
    """Compares FLOPs per second with the peak of the device.

    work: FLOPs of this rank; seconds: in which it did them, without pauses for validation and checkpoints.
    """

    def __init__(self, world: World, work: FlopCount | None = None, seconds: float = 0.0):
        name = hardware_name(world)
        self.datasheet = next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
        self.measured = measured_peak(world)
        self.work = work or FlopCount()
        self.seconds = seconds
        self.logged = (time.perf_counter(), 0.0, 0.0, 0.0, 0.0)  # totals at the last `interval`

    def shares(self, flops: float, seconds: float) -> dict:
        """Divide FLOPs a second by the datasheet's peak (None: there is none) and by the measured one."""
        rate = flops / max(seconds, 1e-9)
        return dict(mfu=rate / self.datasheet if self.datasheet else None, of_measured=rate / self.measured)

    def interval(self) -> str:
        """Describe the time since the last call, for the log.

        Of the model's FLOPs both shares; then one each, of the datasheet's peak where known: that of scored
        tokens, of all that the hardware ran, and of the model once more, with pauses in the time.
        """
        work = self.work
        totals = np.array([time.perf_counter(), self.seconds, work.model, work.useful, work.hardware])
        wall, seconds, model, useful, hardware = totals - self.logged
        self.logged = totals

        peak = self.datasheet or self.measured
        seconds = max(seconds, 1e-9)
        mfu = f"{model / seconds / peak:.4f}" if self.datasheet else "n/a"
        return (
            f"mfu:{mfu} of_measured:{model / seconds / self.measured:.4f} "
            f"useful:{useful / seconds / peak:.4f} hardware:{hardware / seconds / peak:.4f} "
            f"with_pauses:{model / max(wall, seconds) / peak:.4f}")

    def result(self, wall_seconds: float) -> dict:
        """Sum up all of it: three kinds of FLOPs, each by the running time and by the time with pauses."""
        peaks = dict(datasheet=self.datasheet, measured=self.measured)
        out = dict(model_flops=self.work.model, peak_flops=peaks)
        for kind, flops in vars(self.work).items():
            out[kind] = self.shares(flops, self.seconds)
            out[f"{kind}_with_pauses"] = self.shares(flops, wall_seconds)
        return out


class StepPlan(NamedTuple):
    """Says how to take a step: context, whether middle blocks repeat, share of the peak learning rate."""

    context: int
    looping: bool
    lr_scale: float


class Trainer:
    """Holds model, optimizer, average and data of one training run, and the state that a checkpoint keeps."""

    def __init__(self, cfg: Config, world: World, files: Dataset, kernels: Kernels = DEFINITIONS):
        self.cfg = cfg
        self.world = world
        self.files = files
        self.model = build_model(cfg, world, kernels)
        self.forward = compile_forward(self.model, cfg, world)
        self.graphs = Graphed(self.forward, world, self.model.parameters()) if cfg.cuda_graphs else None
        self.optimizer = TrainOptimizer(self.model, cfg, world)
        self.ema = Ema(self.model, cfg.ema_decay) if cfg.ema_decay else None
        self.accumulate = cfg.micro_batches // world.size  # micro-batches of this rank in a step
        self.utilization = Utilization(world)
        self.loader = self.open_loader()

        self.step = 0
        self.clock = StepClock()
        self.losses = []  # (step, seconds, nats)
        self.looping = False
        self.stage_len = cfg.seq_schedule[0][0]  # attention context, and the step that changed it
        self.changed_at = None

    def open_loader(self, position: tuple[int, int] | None = None) -> TrainLoader:
        cfg = self.cfg
        return TrainLoader(
            self.files.train, cfg.train_microbatch_tokens, cfg.micro_batches, cfg.vocab_size, position)

    def loss(self, row: Row, layers: tuple[int, ...]) -> Tensor:
        """Compute this row's part of the mean loss of the rank's micro-batches."""
        weight = 1 / (row.targets.numel() * self.accumulate)
        return weight * nats_of_row(row, self.forward, self.graphs, layers=layers, training=True).sum()

    def backward(self, row: Row, layers: tuple[int, ...]) -> Tensor:
        """Add a row's gradient to the step's; returns its loss, detached: see `Graphed` on accumulators."""
        loss = self.loss(row, layers)
        loss.backward()
        return loss.detach()

    def train_step(
        self, window: np.ndarray, context: int, looping: bool, lr: float, momentum: float
    ) -> float:
        """Take a step on a window (rows, span) of all ranks; returns the mean loss in nats of them all.

        Raises FloatingPointError before any weight is touched when loss or gradient is not finite.
        """
        world = self.world
        layers = layer_order(self.cfg, looping)
        total = torch.zeros((), device=world.device)
        first = world.rank * self.accumulate
        for tokens in window[first : first + self.accumulate]:
            row = packed_row(tokens, context, world.device)
            total += self.backward(row, layers)
            count = row.targets.numel()
            self.utilization.work.add(flops_per_token(self.cfg, row.lengths, looping), "train", count, count)

        world.sum_(total)
        mean_on_host = Readback(total / world.size)
        with torch.profiler.record_function("optimizer"):
            self.optimizer.step(lr, momentum)
        return mean_on_host.read()

    def state(self) -> dict:
        """Collect everything that decides how the run goes on."""
        return dict(
            config_hash=config_hash(self.cfg), seed=self.cfg.seed,
            step=self.step, seconds=self.clock.now(), recent=self.clock.recent, position=self.loader.position,
            changed_at=self.changed_at, stage_len=self.stage_len, looping=self.looping, losses=self.losses,
            model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
            ema=self.ema.shadow if self.ema else {},
        )

    def load_state(self, state: dict) -> None:
        """Go on where `state` was taken. Raises RunError when it belongs to another recipe."""
        found = state.get("config_hash"), state.get("seed")
        if found != (config_hash(self.cfg), self.cfg.seed):
            raise RunError(
                f"checkpoint.pt was written by another configuration or seed ({found[0]}, seed {found[1]}); "
                "resume with the same variables, or start afresh with RESUME=0")

        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, average in state["ema"].items():
            self.ema.shadow[name].copy_(average)
        self.loader.close()
        self.loader = self.open_loader(tuple(state["position"]))

        self.step = state["step"]
        self.clock = StepClock(state["seconds"], state["recent"])
        self.losses = state["losses"]
        self.looping = state["looping"]
        self.stage_len = state["stage_len"]
        self.changed_at = state["changed_at"]

    def checkpoint(self, path: Path) -> None:
        state = self.state()
        if self.world.main:
            save_tensors(path, state)

    def warm_up(self, log: Log) -> None:
        """Compile every shape, take WARMUP_STEPS steps per loop mode, then put everything back, data too."""
        compiled = self.graphs or self.forward is not self.model
        if not compiled and not self.cfg.warmup_steps:
            return

        before = copy.deepcopy(self.state())
        generator = torch.get_rng_state()
        window = self.loader.next_step()

        if compiled:
            self.warm_shapes(window[0], log)
        for looping in dict.fromkeys((False, self.cfg.num_loops > 0)):
            self.warm_steps(window, looping, log)

        self.load_state(before)
        self.model.zero_grad()
        self.utilization = Utilization(self.world)
        torch.set_rng_state(generator)

    def warm_shapes(self, tokens: np.ndarray, log: Log) -> None:
        """Run forward and backward, without a step, for every context, loop mode and length of cu_seqlens."""
        cfg = self.cfg
        shapes = warm_shapes(cfg)
        names = [f"{context}x{'loop' if looping else 'plain'}" for context, looping in shapes]
        log("compile_shape_warmup:start " + ",".join(names))
        row = packed_row(tokens, cfg.train_seq_len, self.world.device)

        for context, looping in shapes * (2 if self.graphs else 1):  # graphs are recorded in the second round
            buckets = ",".join(map(str, warm_lengths(cfg.train_microbatch_tokens, context)))
            shape = f"seq_len:{context} loop:{int(looping)} warmup_cu_buckets:{buckets}"
            log(f"compile_shape_warmup:shape {shape}")
            for shaped in warm_rows(row, context):
                self.backward(shaped, layer_order(cfg, looping))
                self.model.zero_grad()

    def warm_steps(self, window: np.ndarray, looping: bool, log: Log) -> None:
        """Take WARMUP_STEPS steps in one loop mode. Raises RunError when loss or gradient is not finite."""
        cfg = self.cfg
        if looping:
            log(f"loop_warmup:enabled {halves(layer_order(cfg, looping))}")

        for step in range(cfg.warmup_steps):
            done = step + 1
            try:
                self.train_step(window, cfg.seq_schedule[0][0], looping, 1.0, muon_momentum(cfg, step))
            except FloatingPointError as e:
                remedy = "lower MATRIX_LR or TIED_EMBED_LR, or look at the data"
                raise RunError(f"warm-up step {done}: {e}; {remedy}") from None
            if done <= 6 or done % 10 == 0 or done == cfg.warmup_steps:
                log(f"{'loop_warmup_step' if looping else 'warmup_step'}: {done}/{cfg.warmup_steps}")

    def plan_step(self, elapsed: float, log: Log) -> StepPlan:
        """Plan the step about to run, `elapsed` seconds into training; logs what changes with it."""
        cfg = self.cfg
        step = self.step
        budget = cfg.train_budget_seconds
        by_clock = cfg.train_seq_schedule_mode == "wallclock" and budget > 0
        progress = min(1.0, elapsed / budget if by_clock else step / max(1, cfg.iterations))

        context = context_length(cfg, progress)
        if context != self.stage_len:
            self.stage_len = context
            self.changed_at = step
            log(f"growth_stage:seq_len:{context} progress:{progress:.3f} step:{step}")
            if cfg.seq_change_warmup_steps:
                steps = cfg.seq_change_warmup_steps
                log(f"growth_stage_rewarmup:start step:{step} steps:{steps} seq_len:{context}")

        if looping_at(cfg, progress) and not self.looping:
            self.looping = True
            log(f"layer_loop:enabled step:{step} frac:{progress:.3f} {halves(layer_order(cfg, True))}")

        ramp = rewarmup(cfg, None if self.changed_at is None else step - self.changed_at + 1)
        step_seconds = elapsed / step if step else 0.0
        return StepPlan(context, self.looping, lr_scale(cfg, progress, step, step_seconds) * ramp)

    def finish_step(self, loss: float, elapsed: float, applications: int) -> float:
        """Average the weights and account for a step that began at `elapsed`; returns the seconds now."""
        self.step += 1
        if self.ema:
            self.ema.update(self.model)

        now = self.clock.now()
        self.clock.record(now - elapsed, applications)
        self.utilization.seconds += now - elapsed
        self.losses.append((self.step, round(now, 3), round(loss, 5)))
        return now


def log_training_start(cfg: Config, trainer: Trainer, log: Log) -> None:
    """Log what is about to be trained, by which schedule, on a device of which speed."""
    log(f"model_params:{sum(p.numel() for p in trainer.model.parameters())}")
    peaks = trainer.utilization
    datasheet = f"{peaks.datasheet / 1e12:.4g}" if peaks.datasheet else "n/a"
    log(f"peak_tflops: measured:{peaks.measured / 1e12:.4g} datasheet:{datasheet}")
    log("train_seq_schedule:" + ",".join(f"{n}@{end:.3f}" for n, end in cfg.seq_schedule))
    log(f"local_microbatch_tokens:{cfg.train_microbatch_tokens}")
    log(f"growth_stage:seq_len:{cfg.seq_schedule[0][0]} progress:0.000")
    log(f"gptq:reserving {cfg.reserve_seconds:.0f}s, effective={cfg.train_budget_seconds * 1000:.0f}ms")


def step_profiler(trainer: Trainer, path: Path):
    """Build torch's profiler of PROFILE steps after the third, its trace to lie at `path`. None: no PROFILE.

    The speeds that the trace is to be measured by go into profile_speeds.json beside it.
    """
    world = trainer.world
    steps = trainer.cfg.profile
    if not steps or not world.main:
        return None

    source = torch.ones(1 << 26, device=world.device)
    bytes_per_second = 2 * source.nbytes / quickest(world, source.clone)
    speeds = dict(flops_per_second=trainer.utilization.measured, bytes_per_second=bytes_per_second)
    write_atomic(path.with_name("profile_speeds.json"), json.dumps(speeds).encode())

    return torch.profiler.profile(
        record_shapes=True,
        schedule=torch.profiler.schedule(wait=2, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)))


def leave_early(trainer: Trainer, path: Path, new_graphs: list[str], interrupted: float) -> None:
    """Save a checkpoint and raise Interrupted, or RunError for what was compiled in timed code."""
    trainer.clock.pause()
    trainer.checkpoint(path)
    remedy = f"{path} holds it: go on with RESUME=1 and the same variables (ARTIFACT_DIR={path.parent})"
    if interrupted:
        raise Interrupted(f"interrupted after step {trainer.step}; {remedy}")
    remedy = f"COMPILE_SHAPE_WARMUP=1 may avoid it. {remedy}"
    raise recompile_error(f"step {trainer.step}", new_graphs, remedy)


def take_step(trainer: Trainer, plan: StepPlan, checkpoint_path: Path) -> tuple[np.ndarray, float]:
    """Take the planned step; returns its tokens (rows, span) and the loss.

    Raises RunError when loss or gradient is not finite: the checkpoint then stands before this step's data.
    """
    position = trainer.loader.position
    window = trainer.loader.next_step()
    try:
        return window, trainer.train_step(window, *plan, muon_momentum(trainer.cfg, trainer.step))
    except FloatingPointError as e:
        trainer.loader.position = position
        trainer.model.zero_grad()
        trainer.checkpoint(checkpoint_path)
        raise RunError(
            f"step {trainer.step + 1}: {e}; the weights before it are in {checkpoint_path}. "
            "Lower MATRIX_LR or TIED_EMBED_LR, or look at the data of this step") from None


def train(trainer: Trainer, validate, log: Log, checkpoint_path: Path, forecast=None) -> None:
    """Train until ITERATIONS, FORCE_STOP_STEP, or the step that would overrun the budget, which is not begun.

    validate(): scores the model as it stands, clock stopped. forecast(tokens): what the main rank logs of the
    artifact so far, clock running, only where that takes less than 1 % of the time since it last did. Raises
    Interrupted on Ctrl-C and RunError when loss or gradient is no longer finite; in both cases checkpoint.pt
    holds the last good state.
    """
    cfg = trainer.cfg
    world = trainer.world
    clock = trainer.clock
    budget = cfg.train_budget_seconds
    known_graphs = len(compilations(world))  # what is compiled from here on is compiled in timed code
    saved_at = 0.0  # seconds of training at the last checkpoint
    forecast_at = 0.0  # and at the last forecast
    forecast_seconds = 0.0  # which took these; 0: there was none
    profiler = step_profiler(trainer, checkpoint_path.with_name("profile.json.gz"))

    clock.go_on()
    with StopRequest() as stop, profiler or contextlib.nullcontext():
        while trainer.step < (cfg.force_stop_step or cfg.iterations):
            # The ranks agree on the clock, and on stopping.
            new_graphs = [] if cfg.compile_allow_recompiles else compilations(world)[known_graphs:]
            elapsed, block_seconds, interrupted, recompiled = world.max(
                clock.now(), clock.block_seconds(), float(stop.requested), len(new_graphs))
            if interrupted or recompiled:
                leave_early(trainer, checkpoint_path, new_graphs, interrupted)

            plan = trainer.plan_step(elapsed, log)
            applications = len(layer_order(cfg, plan.looping))
            if budget and not cfg.force_stop_step and elapsed + block_seconds * applications > budget:
                reached = f"train_time: {elapsed * 1000:.0f}ms step: {trainer.step}/{cfg.iterations}"
                log(f"stopping_early: wallclock_cap {reached}")
                break

            window, loss = take_step(trainer, plan, checkpoint_path)
            now = trainer.finish_step(loss, elapsed, applications)
            seconds = now - elapsed
            if profiler:
                profiler.step()

            if trainer.step <= 5 or trainer.step % cfg.train_log_every == 0:
                log(f"{trainer.step}/{cfg.iterations} train_loss: {loss:.4f} train_time: {now / 60:.1f}m "
                    f"tok/s: {trainer.step * cfg.train_batch_tokens / now:.0f} seconds:{now:.2f} "
                    f"lr_scale:{plan.lr_scale:.4f} tok/s_now:{cfg.train_batch_tokens / seconds:.0f} "
                    f"{trainer.utilization.interval()}")

                allowance = forecast_seconds or 3 * seconds  # until it is known: as much as three steps
                fits = not budget or now + 2 * allowance < budget
                if forecast and world.main and fits and now - forecast_at > 100 * allowance:
                    log(f"{trainer.step}/{cfg.iterations} {forecast(window[0])}")
                    forecast_at = clock.now()
                    forecast_seconds = forecast_at - now
                    known_graphs = len(compilations(world))

            if cfg.val_loss_every and trainer.step % cfg.val_loss_every == 0:
                clock.pause()
                score = validate()
                log(f"{trainer.step}/{cfg.iterations} val_loss: {score.loss:.4f} val_bpb: {score.bpb:.4f}")
                known_graphs = len(compilations(world))
                clock.go_on()

            if cfg.checkpoint_seconds:
                agreed = world.max(now)[0]
                if agreed - saved_at >= cfg.checkpoint_seconds:
                    saved_at = agreed
                    clock.pause()
                    trainer.checkpoint(checkpoint_path)
                    clock.go_on()

        world.synchronize()
        clock.pause()

    trainer.loader.close()
    if not trainer.step:
        remedy = "raise MAX_WALLCLOCK_SECONDS or lower TRAIN_BATCH_TOKENS"
        raise RunError(f"no step fits into {budget:g} s of training: {remedy}")
    score = validate()
    log(f"{trainer.step}/{cfg.iterations} val_loss: {score.loss:.4f} val_bpb: {score.bpb:.4f}")


# ==================================================================================================
# QUANTIZATION - weights -> small integers and scales. Codecs encode and decode; schemes choose the integers.
# ==================================================================================================

Tensors = dict[str, Tensor]  # by name
Rounded = tuple[Tensor, Tensor]  # integers and the values they stand for, in steps


class Hessians:
    """Add up GPTQ's H = sum of x^T x over the inputs of every matrix, by site: the tap of a forward."""

    def __init__(self):
        self.H: Tensors = {}
        self.count: dict[str, int] = {}
        self.squares: Tensors = {}  # sums of squared gradients by matrix (rows, cols), if a scheme wants them

    def __call__(self, site: str, x: Tensor) -> None:
        """Add the inputs x (.., cols) of a site."""
        x = x.detach().flatten(0, -2).float()
        if site not in self.H:
            self.H[site] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        self.H[site].addmm_(x.T, x)
        self.count[site] = self.count.get(site, 0) + len(x)

    def add_gradients(self, gradients: Tensors) -> None:
        """Add the gradients of one window's summed loss, by matrix.

        The embedding is read as input and as head, so its H, under its own name, is that of its gradients.
        """
        for name, g in gradients.items():
            if name not in self.squares:
                self.squares[name] = torch.zeros_like(g, dtype=torch.float32)
            self.squares[name].addcmul_(g, g)
            if name == "tok_emb.weight":
                self(name, g)

    def rms(self, site: str) -> Tensor:
        """Return the root mean square of each input column."""
        return (self.H[site].diagonal() / self.count[site]).sqrt()


def kind_of(name: str) -> str:
    """Return a tensor's name without its block: "blocks.3.attn.q_gain" -> "blocks.*.attn.q_gain"."""
    return ".".join("*" if word.isdigit() else word for word in name.split("."))


@torch.no_grad()
def write_sequences(
    cfg: Config, world: World, model: GPT, count: int = 64, length: int = 2048, temperature: float = 0.8
) -> np.ndarray:
    """Let the model write text for calibration (PR #1019): this rank's share (n, T + 1) of `count` sequences.

    T is the smaller of `length` and TRAIN_SEQ_LEN. The first token is uniform, the others are drawn at
    `temperature`; SEED decides them, on any number of ranks.
    """
    size = min(length, cfg.train_seq_len) + 1
    layers = layer_order(cfg, looping=True)
    draws = torch.rand(count, size, generator=torch.Generator().manual_seed(cfg.seed))
    draws = draws[world.rank :: world.size].to(world.device)
    tokens = (draws * cfg.vocab_size).long()
    cache = Cache(size - 1)
    for t in range(1, size):
        logits = model(tokens[:, t - 1 : t], None, layers=layers, cache=cache)[:, 0]
        odds = (logits / temperature).softmax(-1).cumsum(-1)
        draw = draws[:, t : t + 1] * odds[:, -1:]
        tokens[:, t] = torch.searchsorted(odds, draw)[:, 0]
    return tokens.cpu().numpy()


def calibration_parts(cfg: Config) -> int:
    """Return how many windows a micro-batch is cut into: gradients want more samples and less memory."""
    most = 8 if scheme_of(cfg).GRADIENTS else 1
    return min(most, cfg.train_microbatch_tokens // cfg.train_seq_len)


def calibrate(
    cfg: Config, world: World, model: GPT, weights: Tensors, tokens: np.ndarray, hessians: Hessians
) -> None:
    """Add one window to `hessians`, run through the looped network with documents masked as in training.

    weights: parameters by name, which take the place of the model's own.
    """
    row = packed_row(tokens, cfg.train_seq_len, world.device)
    how = dict(layers=layer_order(cfg, looping=True), segments=row.segments, tap=hessians)
    stored = stored_matrices(cfg).values()
    learned = {m.parameter: weights[m.parameter] for m in stored if m.role.stored.codec == "gptq"}
    gradients = scheme_of(cfg).GRADIENTS

    with torch.set_grad_enabled(gradients):
        nats = torch.func.functional_call(model, weights, (row.inputs, row.targets), how)
        if gradients:
            found = torch.autograd.grad(nats.sum(), list(learned.values()))
            hessians.add_gradients(unbank(cfg, dict(zip(learned, found, strict=True))))


def calibration_text(cfg: Config, world: World, model: GPT, files: Dataset, log: Log) -> Any:
    """Return this rank's windows (T + 1,): training data, or text of the model's own."""
    if cfg.gptq_calibration == "self":
        start = time.perf_counter()
        windows = write_sequences(cfg, world, model)
        seconds = time.perf_counter() - start
        log(f"GPTQ:wrote {len(windows)} sequences of {windows.shape[1]} tokens per rank in {seconds:.1f}s")
        return windows

    parts = calibration_parts(cfg)
    count = cfg.gptq_calibration_batches * cfg.micro_batches * parts
    windows = calibration_windows(files.train, cfg.train_microbatch_tokens // parts, count)
    return windows[world.rank :: world.size]


@torch.no_grad()
def collect_hessians(cfg: Config, world: World, model: GPT, files: Dataset, log: Log) -> Hessians:
    """Calibrate on all windows, and add up over the ranks."""
    hessians = Hessians()
    windows = calibration_text(cfg, world, model, files, log)
    weights = dict(model.named_parameters())
    eta = Eta(len(windows))
    for tokens in windows:
        calibrate(cfg, world, model, weights, tokens, hessians)
        eta.add(1)
        if eta.done == 1 and eta.left > 20:
            log(f"GPTQ:calibration takes about {eta.left:.0f}s more")

    world.sum_(*hessians.H.values(), *hessians.squares.values())
    counts = torch.tensor(list(hessians.count.values()), device=world.device)
    world.sum_(counts)
    hessians.count = dict(zip(hessians.count, counts.tolist(), strict=True))
    return hessians


def step_size(clip: Tensor, q_max: float) -> Tensor:
    """Choose steps that put `clip` on `q_max` steps, fp16 because that is what is stored.

    They are never zero, so a zero row decodes to zeros.
    """
    return (clip / q_max).clamp_min(1e-10).half().clamp_min(2.0**-24)


def inverse_cholesky(H: Tensor) -> Tensor:
    """Compute the upper U with U^T U = H^-1 for a stack of positive definite H, by one triangular solve."""
    R = torch.linalg.cholesky(H.flip(-2, -1)).flip(-2, -1)  # H = R R^T, R upper
    identity = torch.eye(H.shape[-1], device=H.device, dtype=H.dtype).expand_as(H)
    return torch.linalg.solve_triangular(R, identity, upper=True)


def factorize(H: Tensor, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Damp H (n, cols, cols) and choose the order in which GPTQ takes the columns, largest diagonal first.

    Returns that permutation (n, cols) and `inverse_cholesky` of H permuted. The diagonal of a column that no
    input uses (dead) counts as 1.
    """
    H = H.clone()
    diag = H.diagonal(0, 1, 2)
    diag[diag == 0] = 1
    diag += damping * diag.mean(-1, keepdim=True)
    perm = diag.argsort(dim=-1, descending=True, stable=True)
    H = H.gather(1, perm[:, :, None].expand_as(H))
    H = H.gather(2, perm[:, None].expand_as(H))
    return perm, inverse_cholesky(H)


@contextlib.contextmanager
def positive_definite(name: str):
    """Turn a Cholesky factorization that fails inside into a RunError that names a matrix."""
    try:
        yield
    except torch.linalg.LinAlgError as e:
        raise RunError(f"GPTQ of {name} and its like: {e}; raise GPTQ_CALIBRATION_BATCHES") from None


def walk_columns(
    W: Tensor, perm: Tensor, U: Tensor, step: Tensor, round_column: Callable, block: int = 128
) -> Tensor:
    """Quantize column after column, each error passed on to the columns that follow (GPTQ, arXiv:2210.17323).

    W and step (n, rows, cols), perm and U from `factorize`. round_column(x, j): column x (n, rows) in steps,
    from column j (n,) -> its integers and the values they stand for, in steps. Returns the integers, fp32, in
    the order of W.
    """
    cols = W.shape[2]
    index = perm[:, None].expand_as(W)
    W, step = W.gather(2, index), step.gather(2, index)
    Q = torch.empty_like(W)
    for start in range(0, cols, block):
        end = min(start + block, cols)
        errors = torch.empty_like(W[:, :, start:end])
        for j in range(start, end):
            s = step[:, :, j]
            Q[:, :, j], value = round_column(W[:, :, j] / s, perm[:, j])
            e = (W[:, :, j] - value * s) / U[:, j, j, None]
            W[:, :, j:end] -= e[:, :, None] * U[:, j, None, j:end]
            errors[:, :, j - start] = e
        W[:, :, end:] -= errors @ U[:, start:end, end:]
    return Q.gather(2, perm.argsort(-1)[:, None].expand_as(Q))


def without_dead_columns(W: Tensor, H: Tensor) -> Tensor:
    """Put zeros into W (n, rows, cols) where no input ever is."""
    return W.masked_fill((H.diagonal(0, 1, 2) == 0)[:, None], 0)


def gptq(
    W: Tensor, H: Tensor, clip: Tensor, bits: int, protected: Tensor, hi_bits: int, block: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """Run GPTQ with one scale per row, for a stack of matrices of one shape.

    W (n, rows, cols) fp32, H (n, cols, cols), clip (n, rows): where a row's grid ends, protected (n, cols)
    bool: columns on the finer grid of `hi_bits`. Returns q int8 (n, rows, cols) and the fp16 scales (n, rows)
    of plain and protected columns.
    """
    q_max = 2 ** (bits - 1) - 1
    hi_max = 2 ** (hi_bits - 1) - 1
    scale, hi_scale = step_size(clip, q_max), step_size(clip, hi_max)
    fine, plain = hi_scale[:, :, None], scale[:, :, None]
    step = torch.where(protected[:, None], fine, plain).float()
    limit = torch.where(protected, hi_max, q_max).float()

    def round_column(x: Tensor, j: Tensor) -> Rounded:
        largest = limit.gather(1, j[:, None])
        q = x.round().clamp(-largest, largest)
        return q, q

    perm, U = factorize(H)
    q = walk_columns(without_dead_columns(W, H), perm, U, step, round_column, block)
    return q.to(torch.int8), scale, hi_scale


# A trellis codes a column in segments of rows. The parity of each integer moves a state machine (next state
# by state and parity); it starts at 0 in every segment, and in odd states the second of two quantizers is
# active: k stands for 2 k steps in the first, for 2 k - sign(k) in the second. Together they have every
# multiple of a step (dependent quantization, as in the VVC video standard). A way is 2 * state + parity: two
# ways lead into each state.
TRELLIS_SEGMENT = 128
TRELLIS_NEXT = (
    (0, 2), (5, 7), (1, 3), (6, 4),
    (2, 0), (4, 6), (3, 1), (7, 5),
)  # fmt: skip
TRELLIS_INTO = torch.tensor(TRELLIS_NEXT).flatten().argsort(stable=True).view(8, 2)  # ways into states
TRELLIS_ERROR = 0.24  # mean squared error of its nearest path, in steps squared


def to_segments(x: Tensor) -> Tensor:
    """Cut columns x (n, rows) into segments side by side (height, segments), filled up with zeros."""
    rows = x.shape[1]
    height = min(max(rows, 1), TRELLIS_SEGMENT)
    return F.pad(x, (0, -rows % height)).reshape(-1, height).T.contiguous()


def from_segments(segments: Tensor, shape: torch.Size) -> Tensor:
    """Put segments together again: the inverse of `to_segments`."""
    n, rows = shape
    return segments.T.reshape(n, -1)[:, :rows]


def trellis_values(q: Tensor) -> Tensor:
    """Return what integers (n, rows) stand for, in steps."""
    segments = to_segments(q.long())
    following = torch.tensor(TRELLIS_NEXT, device=q.device).view(-1)
    second = torch.empty_like(segments)
    state = torch.zeros_like(segments[0])
    for t, k in enumerate(segments):
        second[t] = state & 1
        state = following[2 * state + (k & 1)]
    return from_segments(2 * segments - second * segments.sign(), q.shape).float()


def nearest_integers(a: Tensor) -> Rounded:
    """Find the integers nearest to a >= 0 (height, segments), and their values, both (height, 4, segments).

    They are an even and an odd integer of the first quantizer, then an even and an odd one of the second: a
    way takes the one of its number modulo 4.
    """
    way = torch.arange(4, device=a.device)[:, None]
    quantizer, parity = way // 2, way % 2
    offset = quantizer - 2 * parity
    k = 2 * ((a[:, None] + offset) / 4).round().clamp(0, 63) + parity
    k[:, 2] *= a >= 1.5  # 0 is even in both quantizers, and nearer than the first even value of the second
    return k, 2 * k - quantizer * k.sign()


def viterbi(x: Tensor) -> Rounded:
    """Find the nearest path through each segment of x (height, segments): integers and values, same shape."""
    k, value = nearest_integers(x.abs())
    into = TRELLIS_INTO.to(x.device)
    source = into.T // 2
    error = (value - x.abs()[:, None]).square()[:, into.T % 4]  # (height, 2, 8, segments)

    cost = torch.full((8, x.shape[1]), math.inf, device=x.device)
    cost[0] = 0
    second = torch.empty((len(x), *cost.shape), dtype=torch.bool, device=x.device)
    for t in range(len(x)):
        costs = cost[source] + error[t]
        torch.lt(costs[1], costs[0], out=second[t])
        cost = torch.minimum(costs[0], costs[1])

    reached_by = torch.where(second, into[:, 1, None], into[:, 0, None])
    state = cost.argmin(0, keepdim=True)
    way = torch.empty_like(x, dtype=torch.long)
    for t in reversed(range(len(x))):
        way[t] = reached_by[t].gather(0, state)[0]
        state = way[t : t + 1] // 2

    taken = way[:, None] % 4
    sign = torch.where(x < 0, -1.0, 1.0)
    return sign * k.gather(1, taken)[:, 0], sign * value.gather(1, taken)[:, 0]


def trellis_path(x: Tensor, search: Callable = viterbi) -> Rounded:
    """Find the integers |k| <= 127 whose values are nearest to x (n, rows), in steps, over whole segments."""
    k, value = search(to_segments(x))
    return from_segments(k, x.shape), from_segments(value, x.shape)


class QuantizedTensor(NamedTuple):
    """One tensor of the artifact: the parts of its codecs, whose decoded values add up, by (codec, part)."""

    parts: dict[tuple[str, str], Tensor]
    bits: int = 0  # that GPTQ was given; 0 where that is not known

    def codecs(self) -> list[str]:
        """List the codecs, in the order of their parts."""
        return list(dict.fromkeys(codec for codec, _ in self.parts))

    def parts_of(self, codec: str) -> Tensors:
        """Return the parts of one codec, by name."""
        return {part: t for (owner, part), t in self.parts.items() if owner == codec}

    def decode(self) -> Tensor:
        """Return the fp32 values."""
        return sum(CODECS[codec].decode(self.parts_of(codec)) for codec in self.codecs())

    def cpu(self) -> QuantizedTensor:
        """Copy the parts to the CPU."""
        return self._replace(parts={key: t.cpu() for key, t in self.parts.items()})


Quantized = dict[str, QuantizedTensor]  # by the tensor's name


def round_rows(w: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Round w (rows, cols) to integers from low to high, and choose one fp16 scale (rows,) for each row."""
    scale = step_size(w.abs().amax(1), (high - low) / 2)
    q = (w / scale.float()[:, None]).round().clamp(low, high)
    return q.to(torch.int8), scale


def rescale(q: Tensor, scale: Tensor) -> Tensor:
    """Multiply integers by their scales -> fp32. Scales (n,) belong to n equal shares, such as the rows."""
    shares = q.float().reshape(scale.numel(), -1)
    return (shares * scale.float().view(-1, 1)).view(q.shape)


class Float16:
    """Half precision, as it is."""

    @staticmethod
    def encode(w: Tensor) -> Tensors:
        return dict(w=w.half())

    @staticmethod
    def decode(parts: Tensors) -> Tensor:
        return parts["w"].float()


class Int8Rows:
    """Symmetric int8, one fp16 scale per row."""

    @staticmethod
    def encode(w: Tensor) -> Tensors:
        q, scale = round_rows(w, -127, 127)
        return dict(q=q, scale=scale)

    @staticmethod
    def decode(parts: Tensors) -> Tensor:
        return rescale(parts["q"], parts["scale"])


class Gptq:
    """Integers and a scale per row from `gptq`, a finer scale for protected groups (AWQ-lite, PR #1908)."""

    @staticmethod
    def encode(q: Tensor, scale: Tensor, hi_scale: Tensor, hi_starts: tuple, hi_size: int) -> Tensors:
        parts = dict(q=q, scale=scale)
        if hi_starts:
            parts["hi_start"] = torch.tensor(hi_starts, dtype=torch.int16)
            parts["hi_size"] = torch.tensor([hi_size], dtype=torch.int16)
            parts["hi_scale"] = hi_scale
        return parts

    @staticmethod
    def decode(parts: Tensors) -> Tensor:
        q = parts["q"]
        w = rescale(q, parts["scale"])
        if "hi_start" in parts:
            high = torch.zeros_like(q[0], dtype=torch.bool)
            for start in parts["hi_start"].unique().tolist():
                high[start : start + int(parts["hi_size"])] = True
            w[:, high] = rescale(q[:, high], parts["hi_scale"])
        return w


OCTAVES = tuple(math.ldexp(1, n) for n in range(-128, 128))
HALF_OCTAVES = torch.tensor([(x, x * math.sqrt(2)) for x in OCTAVES]).flatten()


class Trellis:
    """A trellis of integers down each column, with a step for each row and each column, in half octaves.

    q int8 (rows, cols); row (rows,) and col (cols,) int8; step int16 (1,) times 2 to the octave int8 (1,),
    common to all.
    """

    encode = dict

    @staticmethod
    def steps(parts: Tensors) -> Tensor:
        """Compute the steps (rows, cols) fp32, the same everywhere: 15 bits, half octaves from a table."""
        codes = parts["row"].int()[:, None] + parts["col"].int()
        common = math.ldexp(int(parts["step"]), int(parts["octave"]))
        return common * HALF_OCTAVES.to(codes.device)[256 + codes]

    @staticmethod
    def decode(parts: Tensors) -> Tensor:
        return trellis_values(parts["q"].T).T * Trellis.steps(parts)


class LowRank:
    """Low-rank correction A B, symmetric integers, a scale per row of either (LQER, arXiv:2402.02446)."""

    @staticmethod
    def encode(A: Tensor, B: Tensor, bits: int) -> Tensors:
        q_max = 2 ** (bits - 1) - 1
        A, A_scale = round_rows(A, -q_max, q_max)
        B, B_scale = round_rows(B, -q_max, q_max)
        return dict(A=A, A_scale=A_scale, B=B, B_scale=B_scale)

    @staticmethod
    def decode(parts: Tensors) -> Tensor:
        return rescale(parts["A"], parts["A_scale"]) @ rescale(parts["B"], parts["B_scale"])


class LowRankAsym:
    """Low-rank correction A B, A in {-2..1} with one scale, B in {-8..7} with one per group (PR #1797)."""

    @staticmethod
    def encode(A: Tensor, B: Tensor, group: int) -> Tensors:
        row, A_scale = round_rows(A.reshape(1, -1), -2, 1)
        groups, B_scale = round_rows(B.reshape(-1, group), -8, 7)
        return dict(A=row.view(A.shape), A_scale=A_scale, B=groups.view(B.shape), B_scale=B_scale)

    decode = LowRank.decode


CODECS = dict(
    float16=Float16,
    int8_row=Int8Rows,
    gptq=Gptq,
    trellis=Trellis,
    low_rank=LowRank,
    low_rank_asym=LowRankAsym,
)
CODEC_PARTS = dict(  # what an artifact may hold of each codec, and its dtype
    float16=dict(w="f2"),
    int8_row=dict(q="i1", scale="f2"),
    gptq=dict(q="i1", scale="f2", hi_start="i2", hi_size="i2", hi_scale="f2"),
    trellis=dict(q="i1", row="i1", col="i1", step="i2", octave="i1"),
    low_rank=dict(A="i1", A_scale="f2", B="i1", B_scale="f2"),
    low_rank_asym=dict(A="i1", A_scale="f2", B="i1", B_scale="f2"),
)


def encoded(codec: str, *args, **kwargs) -> QuantizedTensor:
    """Encode a tensor by one codec, whose arguments follow its name."""
    parts = CODECS[codec].encode(*args, **kwargs)
    return QuantizedTensor({(codec, part): t for part, t in parts.items()})


class GptqInput(NamedTuple):
    """One matrix for GPTQ."""

    name: str
    W: Tensor  # (rows, cols) fp32
    bits: int
    clip_sigmas: float
    site: str  # of the Hessian
    hi_starts: tuple[int, ...] = ()  # first columns of the protected groups


def codec_of(cfg: Config, m: Matrix) -> str:
    """Look up a tensor's codec: its row's, but for the embedding, for which the scheme has one."""
    return scheme_of(cfg).EMBEDDING if m.name == "tok_emb.weight" else m.role.stored.codec


def gptq_inputs(cfg: Config, tensors: Tensors) -> list[GptqInput]:
    """Collect the matrices that GPTQ quantizes, with their settings."""
    inputs = []
    for name, m in stored_matrices(cfg).items():
        if codec_of(cfg, m) == "gptq":
            how = m.role.stored
            site = how.site if m.layer is None else f"blocks.{m.layer}.{how.site}"
            bits, clip_sigmas = getattr(cfg, how.bits), getattr(cfg, how.clip_sigmas)
            inputs.append(GptqInput(name, tensors[name].float(), bits, clip_sigmas, site))
    return inputs


def mixed_bits(cfg: Config, inputs: list[GptqInput], hessians: Hessians) -> list[GptqInput]:
    """Take a bit from all matrices but the N_INT6_LAYERS with the largest trace of H (PR #1105)."""
    traces = {x.name: hessians.H[x.site].trace().item() for x in inputs}
    ranked = sorted(traces, key=traces.get, reverse=True)
    kept = set(ranked[: cfg.n_int6_layers])
    return [x if x.name in kept else x._replace(bits=x.bits - 1) for x in inputs]


def protect_groups(cfg: Config, inputs: list[GptqInput], hessians: Hessians) -> list[GptqInput]:
    """Choose the groups of columns to protect (AWQ-lite), of all matrices with fewer than AWQ_LITE_BITS.

    They are those with the largest sum of rms(x_j) mean|W_j|.
    """
    if not cfg.awq_lite_enabled:
        return inputs
    size = cfg.awq_lite_group_size
    ranked = []
    for x in inputs:
        if x.bits < cfg.awq_lite_bits:
            columns = hessians.rms(x.site) * x.W.abs().mean(0)
            whole = len(columns) // size * size
            scores = columns[:whole].view(-1, size).sum(1).tolist()
            ranked += [(-score, x.name, g * size) for g, score in enumerate(scores)]

    starts: dict[str, tuple[int, ...]] = {}
    for _, name, start in sorted(ranked)[: cfg.awq_lite_group_top_k]:
        starts[name] = (*starts.get(name, ()), start)
    return [x._replace(hi_starts=starts.get(x.name, ())) for x in inputs]


PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)  # of |w| in a row: where QUANT=s05 tries to end its grid


def clips_by_deviation(W: Tensor, sigmas: float) -> Tensor:
    """End the grid of a row of W (n, rows, cols) at `sigmas` standard deviations (SDClip): (n, 1, rows)."""
    return sigmas * W.std(-1)[:, None]


def clips_by_percentile(W: Tensor, sigmas: float) -> Tensor:
    """Try PERCENTILES of each row's |w| as the end of its grid (PR #1105): (n, candidates, rows).

    They are at least 1, as published: rows of smaller weights share one step.
    """
    percentiles = torch.tensor(PERCENTILES, device=W.device)
    return torch.stack([w.abs().quantile(percentiles, dim=1).clamp_min(1) for w in W])


def low_rank_factors(E: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Find the nearest A B to E (rows, cols): A (rows, r), B (r, cols) with orthonormal rows.

    r is the smallest of rank, rows and cols. These are the leading singular vectors, by the eigenvectors of
    the smaller Gram matrix in fp64. The largest number in each row of B is positive: that makes the result
    unique, and the same on every device up to rounding.
    """
    tall = E.shape[0] >= E.shape[1]
    device = "cpu" if E.device.type == "mps" else E.device
    X = (E if tall else E.T).to(device, torch.float64)
    squares, V = torch.linalg.eigh(X.T @ X)
    squares, V = squares[-rank:].flip(-1), V[:, -rank:].flip(-1)
    A, B = X @ V, V.T
    if not tall:
        S = squares.clamp_min(1e-60).sqrt()
        A, B = V * S, (A / S).T
    largest = B.gather(1, B.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    return (A * sign.T).to(E), (B * sign).to(E)


def low_rank_corrections(cfg: Config, inputs: list[GptqInput], stored: Quantized) -> Quantized:
    """Find rank-r factors of W - W_hat for the LQER_TOP_K matrices with the largest of these residuals."""
    if not cfg.lqer_enabled or not inputs:
        return {}
    residuals = {x.name: x.W - stored[x.name].decode() for x in inputs}
    norms = torch.stack([E.norm() for E in residuals.values()]).tolist()  # one wait for the device
    ranked = sorted((-norm, name) for name, norm in zip(residuals, norms, strict=True))

    codec, setting = "low_rank", cfg.lqer_factor_bits
    if cfg.lqer_asym_enabled:
        codec, setting = "low_rank_asym", cfg.lqer_asym_group
    out = {}
    for _, name in ranked[: cfg.lqer_top_k]:
        A, B = low_rank_factors(residuals[name], cfg.lqer_rank)
        out[name] = encoded(codec, A, B, setting)
    return out


def gptq_group(
    cfg: Config, group: list[GptqInput], hessians: Hessians, clips: Callable, damping: float
) -> Quantized:
    """Run GPTQ for matrices of one shape and setting.

    Rows do not influence each other, so the candidates of a matrix run as more rows of it.
    """
    first, size = group[0], cfg.awq_lite_group_size
    W = torch.stack([x.W for x in group])
    H = torch.stack([hessians.H[x.site] for x in group])
    if damping:
        diag = H.diagonal(0, 1, 2)
        diag += diag.mean(-1, keepdim=True).mul(damping).clamp_min(1e-6)

    protected = torch.zeros_like(W[:, 0], dtype=torch.bool)
    for columns, x in zip(protected, group, strict=True):
        for start in x.hi_starts:
            columns[start : start + size] = True

    ends = clips(W, first.clip_sigmas)
    n = ends.shape[1]
    W = W.repeat(1, n, 1)
    with positive_definite(first.name):
        results = gptq(W, H, ends.flatten(1), first.bits, protected, cfg.awq_lite_bits)

    out = {}
    for x, *parts in zip(group, *results, strict=True):
        candidates = zip(*(t.chunk(n) for t in parts), strict=True)
        found = [encoded("gptq", *candidate, x.hi_starts, size) for candidate in candidates]
        errors = [float((x.W - t.decode()).square().sum()) for t in found]
        out[x.name] = found[errors.index(min(errors))]._replace(bits=x.bits)
    return out


def run_gptq(
    cfg: Config, inputs: list[GptqInput], hessians: Hessians, clips: Callable, damping: float = 0.0
) -> Quantized:
    """Quantize by GPTQ, with protected columns and low-rank corrections as AWQ_LITE_* and LQER_* say.

    clips(W, clip_sigmas): candidates for the ends of the grids; a matrix takes the one that leaves the
    smallest squared error. damping: of H, before the solver adds its own. Raises RunError when a Hessian is
    not positive definite.
    """
    inputs = protect_groups(cfg, inputs, hessians)
    groups: dict[tuple, list[GptqInput]] = {}
    for x in inputs:
        groups.setdefault((x.W.shape, x.bits, x.clip_sigmas), []).append(x)
    out = {}
    for group in groups.values():
        out |= gptq_group(cfg, group, hessians, clips, damping)

    for name, extra in low_rank_corrections(cfg, inputs, out).items():
        out[name] = out[name]._replace(parts=out[name].parts | extra.parts)
    return out


RD_DAMPING, RD_FLOOR = 0.05, 1e-2


def half_octaves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Write 1 / sqrt(x) of x (n, k) in half octaves: int8 around a zero, and the zero of each matrix (n,)."""
    octaves = -x.log2()
    zero = octaves.mean(-1, keepdim=True).round()
    return (octaves - zero).round().clamp(-100, 100).to(torch.int8), zero[:, 0]


def row_weights(H: Tensor, squares: Tensor) -> Tensor:
    """Estimate the mean squared gradient of a row's output, at least RD_FLOOR times its mean: (n, rows)."""
    diag = H.diagonal(0, 1, 2)
    g = (squares / diag.clamp_min(1e-9 * diag.amax())[:, None]).mean(-1)
    return g.clamp_min(RD_FLOOR * g.mean(-1, keepdim=True)).clamp_min(1e-30)


def variance_histogram(W: Tensor, g: Tensor, d: Tensor) -> Tensor:
    """Count the weights by variance, in steps squared at a delta of 1, in sixteenths of an octave."""
    power = W.square()
    variance = power.mean(2, keepdim=True) * power.mean(1, keepdim=True)
    variance /= power.mean((1, 2), keepdim=True).clamp_min(1e-30)
    octaves = (variance * g[:, :, None] * d[:, None]).clamp_min(1e-30).log2()
    bins = octaves.mul(16).round().clamp(-2047, 2047).flatten().long()
    return torch.bincount(bins.cpu() + 2048, minlength=4096)


def coarser(excess: Tensor) -> Tensor:
    """Return the half octaves by which a step must grow if its integers are so many times too large."""
    return (2 * excess.clamp_min(1).log2()).ceil().to(torch.int8)


def trellis_steps(W: Tensor, row: Tensor, col: Tensor, zero: float, delta: float) -> Tensors:
    """Write down the steps of one matrix W (rows, cols), the parts of `Trellis` without its integers.

    Columns, then rows, whose integers would not fit into 8 bits get coarser steps.
    """
    mantissa, exponent = math.frexp(delta * 2 ** (zero / 2))
    step = min(round(mantissa * 2**15), 2**15 - 1)
    octave = min(max(exponent - 15, -128), 127)
    parts = dict(row=row, col=col)
    parts["step"] = torch.tensor([step], dtype=torch.int16)
    parts["octave"] = torch.tensor([octave], dtype=torch.int8)

    excess = W.abs() / (160 * Trellis.steps(parts))
    parts["col"] = col + coarser(4 * excess.square().mean(0).sqrt())
    excess = W.abs() / (160 * Trellis.steps(parts))
    parts["row"] = row + coarser(excess.amax(1))
    return parts


def scalar_rounding(x: Tensor, column: Tensor) -> Rounded:
    """Round to nearest, on steps that err as much as the trellis: a `round_column` that costs no search."""
    width = math.sqrt(12 * TRELLIS_ERROR)
    q = (x / width).round().clamp(-127, 127)
    return q, q * width


class MatrixGroup:
    """Matrices of one shape and what decides their steps, for `RateDistortion`. Raises its RunError."""

    def __init__(self, inputs: list[GptqInput], hessians: Hessians):
        self.names = [x.name for x in inputs]
        sites = [x.name if x.name in hessians.H else x.site for x in inputs]  # the embedding's: its gradients
        H = torch.stack([hessians.H[site] for site in sites])
        squares = torch.stack([hessians.squares[name] for name in self.names])
        self.W = without_dead_columns(torch.stack([x.W for x in inputs]), H)
        with positive_definite(self.names[0]):
            self.perm, self.U = factorize(H, RD_DAMPING)
        g = row_weights(H, squares)
        d = self.U.diagonal(0, 1, 2).square().reciprocal()
        d = d.gather(1, self.perm.argsort(-1))
        self.row, row_zero = half_octaves(g)
        self.col, col_zero = half_octaves(d)
        self.zero = (row_zero + col_zero).tolist()
        self.variances = variance_histogram(self.W, g, d)

    def encode(self, delta: float, round_column: Callable) -> Quantized:
        """Quantize the matrices."""
        each = zip(self.W, self.row, self.col, self.zero, strict=True)
        parts = [trellis_steps(*matrix, delta) for matrix in each]
        step = torch.stack([Trellis.steps(p) for p in parts])
        q = walk_columns(self.W, self.perm, self.U, step, round_column).to(torch.int8)
        found = [encoded("trellis", q=k, **p) for k, p in zip(q, parts, strict=True)]
        return dict(zip(self.names, found, strict=True))


class RateDistortion:
    """Put every weight at one slope of predicted loss against coded bits: `delta` alone sets the size of all.

    The predicted loss of an error E of a matrix is 1/2 sum_r g_r E_r H E_r^T: H as in GPTQ, g the mean
    squared gradient of the row's output (diagonal Fisher information, with the labels of the text). GPTQ
    makes it 1/2 sum_rj g_r d_j e_rj^2 with d_j = 1 / U_jj^2 and errors e of the size of the steps; by reverse
    water-filling (Cover and Thomas, 10.3) the step of weight (r, j) is delta / sqrt(g_r d_j). Raises RunError
    when a Hessian is not positive definite.
    """

    def __init__(self, cfg: Config, tensors: Tensors, hessians: Hessians, search: Callable | None = None):
        groups: dict[torch.Size, list[GptqInput]] = {}
        for x in gptq_inputs(cfg, tensors):
            groups.setdefault(x.W.shape, []).append(x)
        self.groups = [MatrixGroup(group, hessians) for group in groups.values()]
        self.search = search or viterbi
        self.tokens = hessians.count["head"]
        self.weights = sum(group.W.numel() for group in self.groups)
        self.variances = sum(group.variances for group in self.groups).double()
        self.ratios = 2 ** (torch.arange(-2048, 2048, dtype=torch.float64) / 16)  # the variance of each bin
        self.rd_loss = cfg.rd_loss
        self.finest = self.delta(cfg.rd_loss)

    def delta(self, loss: float) -> float:
        """Return the delta at which the predicted loss is so many nats per token."""
        return math.sqrt(2 * loss * self.tokens / self.weights / TRELLIS_ERROR)

    def loss(self, delta: float) -> float:
        """Predict the loss, in nats per token: it grows with the square of delta."""
        return self.rd_loss * (delta / self.finest) ** 2

    def nearest_path(self, x: Tensor, column: Tensor) -> Rounded:
        """Round a column by the trellis."""
        return trellis_path(x, self.search)

    def encode(self, delta: float, round_column: Callable | None = None) -> Quantized:
        """Quantize all matrices, by the trellis unless `round_column` is another one for `walk_columns`."""
        out = {}
        for group in self.groups:
            out |= group.encode(delta, round_column or self.nearest_path)
        return out

    def bits(self, delta: float) -> float:
        """Predict the bits of the integers: half the logarithm of a weight's variance in steps squared."""
        octaves = (1 + 4.3 * self.ratios / delta**2).log2()
        return float((self.variances * octaves).sum() / 2)

    def delta_for(self, bits: float) -> float:
        """Return the delta at which `bits` predicts so many, by bisection."""
        low, high = 1e-12, 1e12
        for _ in range(100):
            middle = math.sqrt(low * high)
            if self.bits(middle) > bits:
                low = middle
            else:
                high = middle
        return low


class S14:
    """Bits and grids by kind of matrix, protected columns, low-rank corrections."""

    EMBEDDING = "gptq"
    GRADIENTS = False

    @staticmethod
    def encode(cfg: Config, tensors: Tensors, hessians: Hessians) -> Quantized:
        return run_gptq(cfg, gptq_inputs(cfg, tensors), hessians, clips_by_deviation)


class S05:
    """Mixed bits, the best of several grids, an int8 embedding (PR #1105); H damped twice, as published."""

    EMBEDDING = "int8_row"
    GRADIENTS = False

    @staticmethod
    def encode(cfg: Config, tensors: Tensors, hessians: Hessians) -> Quantized:
        inputs = mixed_bits(cfg, gptq_inputs(cfg, tensors), hessians)
        return run_gptq(cfg, inputs, hessians, clips_by_percentile, damping=0.01)


class Rd:
    """Steps by rate and distortion, integers by a trellis."""

    EMBEDDING = "gptq"
    GRADIENTS = True

    @staticmethod
    def encode(cfg: Config, tensors: Tensors, hessians: Hessians) -> Quantized:
        plan = RateDistortion(cfg, tensors, hessians)
        return plan.encode(plan.finest)


SCHEMES = dict(s14=S14, s05=S05, rd=Rd)  # embedding's codec, whether gradients are needed, how to encode


def scheme_of(cfg: Config) -> Any:
    """Look up the scheme that QUANT names."""
    return SCHEMES[cfg.quant]


@contextlib.contextmanager
def full_fp32():
    """Turn TF32 off inside: GPTQ divides by what it subtracts."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def complete(cfg: Config, tensors: Tensors, quantized: Quantized) -> Quantized:
    """Encode the tensors that are not quantized yet, each by its codec. Returns all, in order, on the CPU."""
    stored = dict(quantized)
    for name, m in stored_matrices(cfg).items():
        if name not in quantized:
            stored[name] = encoded(codec_of(cfg, m), tensors[name].float())
    return {name: stored[name].cpu() for name in tensors}


def log_codecs(cfg: Config, stored: Quantized, log: Log) -> None:
    """Write which codec, and how many bits, each kind of tensor got."""
    kinds: dict[str, set[str]] = {}
    for name, t in stored.items():
        label = "+".join(t.codecs())
        if t.bits:
            label += f" (int{t.bits})"
        if ("gptq", "hi_start") in t.parts:
            label += f"+awqgrpint{cfg.awq_lite_bits}"
        kinds.setdefault(label, set()).add(kind_of(name))
    log("Quantized weights:")
    for label, names in sorted(kinds.items()):
        log(f"  {label}: {', '.join(sorted(names))}")


@torch.no_grad()
@full_fp32()
def quantize(cfg: Config, state: Tensors, hessians: Hessians, log: Log) -> Quantized:
    """Turn a state dict into tensors as the artifact stores them, whatever their size."""
    tensors = unbank(cfg, state)
    stored = complete(cfg, tensors, scheme_of(cfg).encode(cfg, tensors, hessians))
    log_codecs(cfg, stored, log)
    return stored


def dequantized_state(cfg: Config, stored: Quantized) -> Tensors:
    """Return the fp32 state dict that an artifact stands for; tensors that no artifact keeps are zero."""
    values = {m.name: torch.zeros(m.shape) for m in matrices(cfg) if m.role.stored is None}
    values |= {name: t.decode() for name, t in stored.items()}
    return rebank(cfg, values)


# ==================================================================================================
# PACKING - tensors <-> bytes. The only section that knows the artifact's layout.
# ==================================================================================================

ARTIFACT_MAGIC = b"PGA1"
ARTIFACT_VERSION = 4   # bump it whenever any byte of the output could change its meaning
HEADER_START = 26      # behind magic, version, header size and checksum
CHECKPOINT_FORMAT = 2  # of final_model.pt; published files have none
STREAMS = (  # in their order in an artifact
    "tok_emb", "attn.c_k", "attn.c_q", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj", "rest", "row_order",
)
SMALL_STREAMS = ("rest", "row_order")  # no integers of matrices
TOKEN_STREAM = "tok_emb"  # a row per token: rows of rare tokens resemble each other

Array = np.ndarray
Arrays = dict[str, Array]  # all parts of all tensors by name, "tensor:codec.part": int8, int16 or fp16


class ArtifactError(RunError):
    """The bytes are no artifact of ours, are damaged, or belong to another model."""


HOSTILE = (  # what parsing and decoding of hostile bytes raise, before it becomes an ArtifactError
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, RecursionError,
    TypeError, ValueError, brotli.error, subprocess.TimeoutExpired,
)


# Coders: bytes <-> fewer bytes


class Brotli:
    """brotli at its best: all streams of COMPRESSOR=brotli, the small ones of COMPRESSOR=pergroup."""

    @staticmethod
    def require() -> None:
        """Need nothing that this script does not import."""

    @staticmethod
    def encode(data: bytes) -> bytes:
        return brotli.compress(data, quality=11, lgwin=24)

    @staticmethod
    def decode(data: bytes, size: int) -> bytes:
        """Decode to `size` bytes, holding little more than that. The caller checks how many came."""
        return brotli.Decompressor().process(data, output_buffer_limit=size + 1)


class Lrzip:
    """The lrzip program, with one thread, so that the bytes do not depend on the machine (PR #1855)."""

    @staticmethod
    def require() -> str:
        """Find the program. Raises RunError saying how to get it."""
        path = shutil.which("lrzip")
        if path is None:
            raise RunError("COMPRESSOR=pergroup needs the lrzip program, to pack and to unpack: install it "
                           "(on Debian and Ubuntu: apt-get install lrzip), or set COMPRESSOR=range")
        return path

    @staticmethod
    def encode(data: bytes) -> bytes:
        return Lrzip.run(["-z", "-L", "9"], data, len(data))

    @staticmethod
    def decode(data: bytes, size: int) -> bytes:
        """Decode to `size` bytes, which the data's own header must announce too: the program sees no bomb."""
        announced = int.from_bytes(data[6:14], "little")
        if data[:4] != b"LRZI" or announced != size:
            raise ArtifactError(f"a stream of the artifact is no lrzip form of {size} bytes; make it again")
        return Lrzip.run(["-d"], data, size)

    @staticmethod
    def run(flags: list[str], data: bytes, size: int) -> bytes:
        """Run the program on `data`, which has or will have `size` bytes when decoded.

        Its time and, on Linux, memory and disk have limits of several times what that size usually takes,
        whatever the data. Raises ArtifactError, RunError or subprocess.TimeoutExpired.
        """
        seconds = 1 + size // 50_000
        limits = dict(CPU=seconds, AS=(512 << 20) + 16 * size, FSIZE=(32 << 10) + size)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "in.lrz")
            result = Path(folder, "out")
            source.write_bytes(data)
            command = [Lrzip.require(), *flags, "-q", "-p", "1", "-o", str(result), str(source)]
            streams = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            with subprocess.Popen(command, **streams) as process:
                for name, limit in limits.items():
                    if hasattr(resource, "prlimit"):
                        resource.prlimit(process.pid, getattr(resource, f"RLIMIT_{name}"), (limit, limit))
                try:
                    output, _ = process.communicate(timeout=10 * seconds)
                finally:
                    process.kill()
            if process.returncode or not result.exists():
                words = output.decode(errors="replace").strip()
                raise ArtifactError(f"lrzip {' '.join(flags)} failed with exit code {process.returncode}: "
                                    f"{words}; make the artifact again")
            return result.read_bytes()


# COMPRESSOR=range: an adaptive range coder. Model and tables are integers, the same on every machine,
# and no table is sent: encoder and decoder count what they have seen. All of it, up to `code_arrays`, is
# written once for both: an encoder leaves the values it is given as they are, a decoder fills them in, a
# counter of bits adds up what they would cost.

# 2^(n/8), rounded down: three square roots of 2^n.
EIGHTH_OCTAVES = np.array(
    [math.isqrt(math.isqrt(math.isqrt(1 << n))) for n in range(8 * 40)]
)  # fmt: skip
MAGNITUDE_CLASSES = 41  # of a mean magnitude, a quarter of an octave each, from 1/8 (class 0) to 128
CLASS_OF_ONE = 12       # the class of a mean of 1: three octaves above 1/8
COUNT_STEP = 64         # what one symbol adds to its count
MAGNITUDES = np.minimum(np.arange(256), 256 - np.arange(256))  # of the int8 that a byte stands for

# Means are in units of 2^-12, so class 0 is around 2^(12 - 3) and ends an eighth of an octave above that; the
# others follow, each a quarter of an octave wide.
CLASS_ENDS = EIGHTH_OCTAVES[8 * (12 - 3) + 1 :: 2][: MAGNITUDE_CLASSES - 1]


def magnitude_class(mean: Array) -> Array:
    """Find the class of mean magnitudes in units of 2^-12, int8: the first and the last have no end."""
    return CLASS_ENDS.searchsorted(mean, side="right").astype(np.int8)


@cache
def gaussian_counts() -> Array:
    """Make the counts to start from, int64 (2 * MAGNITUDE_CLASSES, 256): each class under both quantizers of
    a trellis.

    They are a Gaussian of the class's mean magnitude m, worth 256 symbols, and a floor. At k it has fallen by
    k^2 / (pi m^2 ln 2) octaves: in eighths of them, with m^2 in units of 2^-10, by 8 * 2^10 / (pi ln 2) =
    3762 k^2 / m^2.
    """
    squared_mean = EIGHTH_OCTAVES[8 * 4 + 4 * np.arange(MAGNITUDE_CLASSES)][:, None]  # 2^(10 - 6) for class 0
    fallen = MAGNITUDES**2 * 3762 // squared_mean
    weight = EIGHTH_OCTAVES[np.maximum(8 * 14 - fallen, 0)]
    counts = 1 + 256 * COUNT_STEP * weight // weight.sum(1, keepdims=True)
    return np.tile(counts, (2, 1))


def library_tables(counts: Array) -> Array:
    """Scale counts (contexts, symbols) to the frequencies that the library is given, integers.

    Its tables have 24 bits and no zeros: it adds 1 to each frequency. The frequencies have exactly the sum
    that makes its own scaling a multiplication by one; what is missing after rounding down goes to the most
    frequent symbol.
    """
    contexts, symbols = counts.shape
    room = 2**24 - symbols
    tables = counts * room // counts.sum(1, keepdims=True)
    tables[np.arange(contexts), counts.argmax(1)] += room - tables.sum(1)
    return tables


class RangeCoder:
    """Encodes symbols with adaptive tables, or decodes `data`, or, for `owners`, adds up the bits of each."""

    def __init__(self, data: bytes | None = None, owners: int = 0):
        library = RangeCoder.require().stream
        self.bits = np.zeros(owners)
        self.model = library.model.Categorical
        self.encoder = library.queue.RangeEncoder()
        self.decoder = None
        if data is not None:
            words = np.frombuffer(data, "<u4").astype(np.uint32)
            self.decoder = library.queue.RangeDecoder(words)

    @staticmethod
    def require() -> Any:
        """Import the constriction library. Raises RunError saying how to get it."""
        try:
            return importlib.import_module("constriction")
        except ImportError:
            raise RunError("COMPRESSOR=range needs the constriction library, to pack and to unpack: pip "
                           "install -r requirements.txt, or set COMPRESSOR=brotli") from None

    def encoded(self) -> bytes:
        """Return what was encoded."""
        return self.encoder.get_compressed().astype("<u4").tobytes()

    def code(self, counts: Array, context: Array, values: Array, owner: Array) -> None:
        """Code `values` (n,) uint8, each with the row of `counts` that `context` (n,) names.

        Then count them, in `counts` (contexts, symbols). `owner`, of n values, says whose they are.
        """
        contexts, symbols = counts.shape
        frequency = np.bincount(context, minlength=contexts)
        used = np.flatnonzero(frequency)
        tables = library_tables(counts[used])
        if len(self.bits):
            cost = 24 - np.log2(tables + 1)
            bits = cost[used.searchsorted(context), values]
            self.bits += np.bincount(owner.ravel(), bits, len(self.bits))
        else:
            by_context = np.argsort(context, kind="stable")
            numbers = values[by_context].astype(np.int32)
            self.transfer(numbers, tables.astype(np.float32), frequency[used])
            if self.decoder is not None:
                values[by_context] = numbers
        index = context.astype(np.uint32) * np.uint32(symbols) + values
        counts += COUNT_STEP * np.bincount(index, minlength=counts.size).reshape(counts.shape)

    def transfer(self, numbers: Array, tables: Array, sizes: Array) -> None:
        """Encode int32 `numbers`, or decode them in place: sizes[i] of them with tables[i], then the next."""
        if tables.shape[1] == 16:  # small tables are cheap: one for each number, in one call
            self.library_call(numbers, self.model(perfect=False), np.repeat(tables, sizes, axis=0))
            return
        parts = np.split(numbers, sizes.cumsum()[:-1])
        for table, part in zip(tables, parts, strict=True):
            self.library_call(part, self.model(table, perfect=False))

    def library_call(self, numbers: Array, model, *tables: Array) -> None:
        """Encode `numbers` by one call, or decode them in place; `tables` has one for each number, if any."""
        if self.decoder is None:
            self.encoder.encode(numbers, model, *tables)
        else:
            numbers[:] = self.decoder.decode(model, *(tables or [len(numbers)]))


CODERS = dict(brotli=Brotli, lrzip=Lrzip, range=RangeCoder)  # the last codes numbers, not bytes


def stream_coder(compressor: str, stream: str) -> str:
    """Name a stream's coder: pergroup means lrzip for the integer matrices and brotli for the rest."""
    if compressor != "pergroup":
        return compressor
    return "brotli" if stream in SMALL_STREAMS else "lrzip"


def require_coders(compressor: str) -> None:
    """Check that all coders of COMPRESSOR are there. Raises RunError saying how to get one that is not."""
    for stream in STREAMS:
        CODERS[stream_coder(compressor, stream)].require()


# Of the tables of a number's four nibbles: the first has one, the second and third have one for each value of
# what is above them, the fourth has one.
TABLE_STARTS = (0, 1, 1 + 16, 1 + 16 + 256)


def code_numbers(coder: RangeCoder, values: Array, owner: Array) -> None:
    """Code numbers (n,) uint8 or uint16 of one kind, four bits at a time from the top, each given those above
    it.

    Blocks grow with what is known, and what is known fades: layers differ.
    """
    last_table = TABLE_STARTS[-1]
    floor = COUNT_STEP // 4
    counts = np.full((last_table + 1, 16), floor)
    shifts = range(8 * values.itemsize - 4, -1, -4)
    start = 0
    while start < len(values):
        end = start + 4 + start // 6
        block = values[start:end]
        above = np.zeros(len(block), np.uint16)
        for shift, first_table in zip(shifts, TABLE_STARTS, strict=False):
            nibble = (block >> shift & 15).astype(np.uint8)
            table = first_table + above * (first_table < last_table)
            coder.code(counts, table, nibble, owner[start:end])
            above = above * 16 + nibble
        block[:] = above
        counts -= (counts - floor) // 6
        start = end


def find_references(q: Array, similar: bool) -> tuple[Array, Array, Array]:
    """Choose for each row of int8 (rows, cols) the row it is coded against, if `similar` rows are to be
    found.

    That is the most similar row that a decoder has by then: one higher up in any segment. A reference costs
    about two bytes and must save more. Scalar products are exact in fp32, so the choice is the same on every
    machine. Returns the reference, uint16 (rows,), its weight in halves, uint8 (rows,), 0 for no reference,
    and what is left, int8 (rows, cols).
    """
    rows, cols = q.shape
    reference = np.zeros(rows, np.uint16)
    halves = np.zeros(rows, np.uint8)
    residual = q.copy()
    if not similar:
        return reference, halves, residual

    step = np.arange(rows) % TRELLIS_SEGMENT
    by_step = step.argsort(kind="stable")
    step_ends = np.bincount(step).cumsum().tolist()
    x = torch.from_numpy(q[by_step, :256]).float()  # so many columns are enough to find it
    norm = (x.square().sum(1) + 1).sqrt()
    for start, end in pairwise(step_ends):
        own = by_step[start:end]
        similarity = (x[start:end] @ x[:start].T).div_(norm[:start])
        best = by_step[similarity.argmax(1).numpy()]
        wide = q[best].astype(np.int16)
        left = np.stack([q[own] - (wide * weight + 1 >> 1) for weight in range(3)])
        bonus = [[2.0 ** (-18 / cols)], [1], [1]]  # for no reference
        error = np.square(left, dtype=np.int32).sum(2) * bonus
        reference[own] = best
        halves[own] = error.argmin(0)
        residual[own] = left[halves[own], np.arange(len(own))]
    return reference, halves, residual


def plan_rows(q: Array, similar: bool) -> tuple[Array, Array]:
    """Choose what an encoder tells about the rows of int8 (rows, cols): class of magnitude + 64 * (weight of
    the reference in halves), uint8 (rows,), and the reference, uint16 (rows,).

    The class is that of the whole matrix unless the row differs enough to pay for saying so.
    """
    reference, halves, residual = find_references(q, similar)
    total = np.abs(residual).view(np.uint8).sum(1, dtype=np.int64) << 12
    usual = magnitude_class(total.sum() // q.size).astype(int)
    own = magnitude_class(total // q.shape[1]).astype(int)
    differs = q.shape[1] * (own - usual) ** 2 >= 400
    return (np.where(differs, own, usual) + 64 * halves).astype(np.uint8), reference


def code_plan(coder: RangeCoder, q: Array, owner: Array, similar: bool) -> tuple[Array, Array, int]:
    """Code what is told about the rows of int8 matrices (n, rows, cols) before the rows themselves.

    Returns the two arrays of `plan_rows`, (n * rows,), and the largest magnitude of a symbol, at least 1.
    """
    plan = np.zeros(len(owner), np.uint8)
    reference = np.zeros(len(owner), np.uint16)
    largest = np.full(1, 127, np.uint8)  # less one
    if coder.decoder is None:
        plans, references = zip(*(plan_rows(matrix, similar) for matrix in q), strict=True)
        plan = np.concatenate(plans)
        reference = np.concatenate(references)
        if not (plan > 63).any():  # differences to references may have any magnitude
            largest[:] = max(1, int(q.max()), -int(q.min())) - 1

    code_numbers(coder, plan, owner)
    refers = plan > 63
    chosen = reference[refers]
    code_numbers(coder, chosen, owner[refers])
    reference[refers] = chosen
    code_numbers(coder, largest, owner[:1])
    return plan, reference, 1 + int(largest[0])


def by_step(a: Array, n: int, rows: int) -> Array:
    """Arrange (n * rows, ...) as (steps, segments, n, width): step t has row t of each segment."""
    a = a.reshape(n, rows, -1)
    padded = np.pad(a, ((0, 0), (0, -rows % TRELLIS_SEGMENT), (0, 0)))
    segments = padded.reshape(n, -1, TRELLIS_SEGMENT, a.shape[2])
    return np.ascontiguousarray(segments.transpose(2, 1, 0, 3))


def predict_rows(x: Array, reference: Array, halves: Array) -> Array:
    """Predict the rows of a step from those known so far, x (steps, segments, n, cols): int8 (segments, n,
    cols).

    `reference`, `halves` (segments, n, 1): the number of a row in its matrix, and its weight.
    """
    if not halves.any():
        return np.int8(0)
    segment, step = np.divmod(reference[..., 0], TRELLIS_SEGMENT)
    earlier = x[step, segment, np.arange(x.shape[2])].astype(np.int16)
    return (earlier * halves + 1 >> 1).astype(np.int8)


def code_matrices(
    coder: RangeCoder, counts: Array, q: Array, owners: list[int], trellis: bool, similar: bool,
) -> Array:  # fmt: skip
    """Code int8 matrices (n, rows, cols) side by side: step t takes row t of every segment of every matrix.
    Returns them.

    An integer's table depends on the class of its row (sent), on that of its column (from the rows before it,
    over all segments) and on the active quantizer of its trellis. Rows with a reference are coded as the
    difference to it, modulo 256.
    """
    n, rows, cols = q.shape
    plan, reference, largest = code_plan(coder, q, np.repeat(owners, rows), similar)
    x = by_step(q, n, rows)
    plan = by_step(plan, n, rows)
    reference = by_step(reference, n, rows).astype(np.int64)
    halves = plan >> 6
    row_class = (plan & 63).astype(np.int8)
    row_scale = EIGHTH_OCTAVES[8 * 15 - 2 * row_class.astype(int)].astype(np.uint32)  # 2^12 / the row's mean

    seen = 8  # rows of the class's own mean, to begin with
    total = np.full((n, cols), seen << 12)
    column_class = np.zeros((n, cols), np.int8)
    owner = np.array(owners)[:, None]
    state = np.zeros(x.shape[1:], np.uint8)
    next_state = np.array(TRELLIS_NEXT, np.uint8).ravel()

    is_symbol = largest >= MAGNITUDES  # of the 256 bytes; symbols number those, from 0 on
    to_symbol = (is_symbol.cumsum() - 1).astype(np.uint8)
    from_symbol = np.flatnonzero(is_symbol).astype(np.uint8)
    tables = counts[:, from_symbol]
    for t in range(min(rows, TRELLIS_SEGMENT)):
        live = -(-(rows - t) // TRELLIS_SEGMENT)  # segments with a row t
        own = x[t, :live]
        prediction = predict_rows(x, reference[t, :live], halves[t, :live])
        classes = np.clip(row_class[t, :live] + column_class, 0, MAGNITUDE_CLASSES - 1).astype(np.uint8)
        context = classes + MAGNITUDE_CLASSES * (state[:live] & 1)

        symbol = to_symbol.take((own - prediction).view(np.uint8).reshape(-1))
        coder.code(tables, context.reshape(-1), symbol, np.broadcast_to(owner, own.shape))
        residual = from_symbol.take(symbol).view(np.int8).reshape(own.shape)
        own[:] = residual + prediction

        magnitude = np.abs(residual).view(np.uint8)
        total += (magnitude * row_scale[t, :live]).sum(0, dtype=np.uint32)
        seen += live
        column_class = magnitude_class(total // seen) - CLASS_OF_ONE
        if trellis:
            state = next_state.take(2 * state + (x[t] & 1).view(np.uint8))
    counts[:, from_symbol] = tables
    return x.transpose(2, 1, 0, 3).reshape(n, -1, cols)[:, :rows]


# Arrays "tensor:codec.part" <-> streams


def layout(cfg: Config, arrays: Arrays) -> dict[str, StoredAs]:
    """Look up how each array is kept: integers as the row of their tensor says, all else like HALF."""
    stored = stored_matrices(cfg)
    found = dict.fromkeys(arrays, HALF)
    for name in arrays:
        tensor, _, part = name.rpartition(":")
        if part.endswith(".q") and tensor in stored:
            found[name] = stored[tensor].role.stored
    return found


def code_arrays(cfg: Config, arrays: Arrays, coders: dict[str, RangeCoder]) -> Arrays:
    """Code every array with its stream's coder. Returns them.

    The tables of the matrices pass from stream to stream, less seven eighths of what they have seen. All
    other numbers of one kind (the same tensor of every block, codec and part) share theirs.
    """
    groups: dict[tuple, list[str]] = {}
    for name, stored in layout(cfg, arrays).items():
        a = arrays[name]
        if a.size:
            alike = a.shape if stored.stream != "rest" else ()  # matrices are coded side by side
            key = STREAMS.index(stored.stream), kind_of(name), alike
            groups.setdefault(key, []).append(name)

    out = dict(arrays)
    number = {name: i for i, name in enumerate(arrays)}
    start = gaussian_counts()
    counts = start.copy()
    for (place, kind, _), names in sorted(groups.items()):
        stream = STREAMS[place]
        given = [arrays[name] for name in names]
        owners = [number[name] for name in names]
        if stream == "rest":
            sizes = [a.size for a in given]
            flat = np.concatenate([a.reshape(-1) for a in given])
            code_numbers(coders[stream], flat.view(f"<u{flat.itemsize}"), np.repeat(owners, sizes))
            parts = np.split(flat, np.cumsum(sizes)[:-1])
            coded = [part.reshape(a.shape) for part, a in zip(parts, given, strict=True)]
        else:
            counts = start + (counts - start) // 8
            similar = stream == TOKEN_STREAM
            trellis = ":trellis." in kind
            coded = code_matrices(coders[stream], counts, np.stack(given), owners, trellis, similar)
        out |= zip(names, coded, strict=True)
    return out


def coded_bits(cfg: Config, arrays: Arrays) -> Array:
    """Count the bits (fp64) that COMPRESSOR=range needs for each array of an artifact of just these, in their
    order.

    Nothing is coded: what `pack` writes is within 0.1 %, and up to 8 bytes a stream. Tables are shared.
    """
    counter = RangeCoder(owners=len(arrays))
    code_arrays(cfg, arrays, dict.fromkeys(STREAMS, counter))
    return counter.bits


def similarity_order(q: Array) -> Array:
    """Chain rows greedily: from row 0 on, always the nearest unused row in L1, ties to the lowest index.
    uint16 (rows,).

    The distances are sums of integers below 2^24, so they are exact, and the same, wherever they are
    computed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = torch.from_numpy(q).to(device, torch.float32)
    distance = torch.cdist(rows, rows, p=1).cpu().numpy()
    used = np.zeros(len(q), np.float32)
    row_order = np.zeros(len(q), np.uint16)
    for i in range(1, len(q)):
        last = row_order[i - 1]
        used[last] = np.inf
        row_order[i] = (distance[last] + used).argmin()
    return row_order


def byte_planes(a: Array) -> Array:
    """View an array as all first bytes, then all second bytes, ...: halves of fp16 compress better apart."""
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8).reshape(a.size, a.itemsize).T


def stream_views(
    cfg: Config, compressor: str, arrays: Arrays, order_of: Callable[[Array], Array]
) -> tuple[dict[str, list[Array]], list]:
    """Say what a stream's bytes are when they are not range-coded: views of the arrays, uint8, to read or to
    fill in.

    lrzip gets matrices transposed, column after column; everything else is byte planes. Where a tensor's row
    says so, its rows are sorted by `order_of` it, uint16 in stream row_order: such arrays are returned too,
    as (array, order, its rows in that order, a copy).
    """
    views = {stream: [] for stream in STREAMS}
    in_order = []
    for name, stored in layout(cfg, arrays).items():
        a = arrays[name]
        if stream_coder(compressor, stored.stream) != "lrzip":
            views[stored.stream].append(byte_planes(a))
            continue
        if stored.sort_rows:
            row_order = order_of(a)
            views["row_order"].append(byte_planes(row_order))
            rows = a[row_order]
            in_order.append((a, row_order, rows))
            a = rows
        views[stored.stream].append(a.view(np.uint8).T)
    return views, in_order


def encode_streams(cfg: Config, arrays: Arrays) -> dict[str, bytes]:
    """Encode arrays to the bytes of every stream."""
    if cfg.compressor == "range":
        coders = {stream: RangeCoder() for stream in STREAMS}
        code_arrays(cfg, arrays, coders)
        return {stream: coder.encoded() for stream, coder in coders.items()}
    views, _ = stream_views(cfg, cfg.compressor, arrays, similarity_order)

    def encode(stream: str) -> bytes:
        raw = b"".join(view.tobytes() for view in views[stream])
        return CODERS[stream_coder(cfg.compressor, stream)].encode(raw) if raw else b""

    with ThreadPoolExecutor() as pool:
        return dict(zip(STREAMS, pool.map(encode, STREAMS), strict=True))


def decode_streams(cfg: Config, compressor: str, arrays: Arrays, coded: dict[str, bytes]) -> Arrays:
    """Invert `encode_streams`: fill in `arrays`, return them. Raises ArtifactError or what a coder raises."""
    if compressor == "range":
        return code_arrays(cfg, arrays, {stream: RangeCoder(data) for stream, data in coded.items()})

    def decode(stream: str) -> None:
        size = sum(view.size for view in views[stream])
        coder = CODERS[stream_coder(compressor, stream)]
        data = coder.decode(coded[stream], size) if coded[stream] else b""
        if len(data) != size:
            raise ArtifactError(f"stream {stream} of the artifact decodes to {len(data)} bytes, expected "
                                f"{size}; make it again")
        left = io.BytesIO(data)
        for view in views[stream]:
            view[:] = np.frombuffer(left.read(view.size), np.uint8).reshape(view.shape)

    views, in_order = stream_views(cfg, compressor, arrays, lambda a: np.zeros(len(a), "<u2"))
    with ThreadPoolExecutor() as pool:
        list(pool.map(decode, STREAMS))
    for a, row_order, rows in in_order:
        a[row_order] = rows
    return arrays


# The artifact: a header and the streams


@cache
def tensor_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """List names and shapes of the tensors that an artifact holds, in their order there."""
    return {name: matrix.shape for name, matrix in stored_matrices(cfg).items()}


def arrays_of(stored: dict[str, QuantizedTensor]) -> Arrays:
    """Name all parts of all tensors "tensor:codec.part"."""
    arrays = {}
    for name, tensor in stored.items():
        for (codec, part), t in tensor.parts.items():
            arrays[f"{name}:{codec}.{part}"] = t.numpy()
    return arrays


def not_finite(arrays: Arrays) -> str:
    """Name the arrays with a number that is none; "" if there are none."""
    return ", ".join(name for name, a in arrays.items() if not np.isfinite(a).all())


def parts_in_header(shape: tuple[int, ...], stored: QuantizedTensor) -> list:
    """List the parts of a tensor, [codec, part, sizes], where a size -1 - i is the tensor's own size i."""
    listed = []
    for (codec, part), t in stored.parts.items():
        sizes = [-1 - shape.index(n) if n in shape else n for n in t.shape]
        listed.append([codec, part, sizes])
    return listed


def checksum(lengths: bytes, body: bytes) -> bytes:
    """Hash all of an artifact but its magic and the checksum itself, to 16 bytes."""
    return hashlib.blake2b(lengths + body, digest_size=16).digest()


def pack(cfg: Config, stored: dict[str, QuantizedTensor]) -> bytes:
    """Pack tensors into an artifact; the same tensors give the same bytes. Raises RunError if they are not
    the model's.

    magic "PGA1" | u16 version | u32 header size | checksum, 16 bytes | header | streams. The header is
    brotli-coded JSON: [compressor, MODEL_FIELDS by name, bytes of each stream, `parts_in_header` of each
    tensor]. Names and shapes of tensors follow from the model, dtypes from the codec.
    """
    shapes = tensor_shapes(cfg)
    if shapes.keys() != stored.keys():
        raise RunError("these are not the model's tensors: "
                       f"{', '.join(sorted(shapes.keys() ^ stored.keys()))}; set the model's own variables")
    arrays = arrays_of({name: stored[name] for name in shapes})
    if bad := not_finite(arrays):
        raise RunError(f"not all finite: {bad}; the weights are no model's, look at the training loss")
    streams = encode_streams(cfg, arrays)

    parts = [parts_in_header(shape, stored[name]) for name, shape in shapes.items()]
    model = {name: getattr(cfg, name) for name in sorted(MODEL_FIELDS)}
    sizes = [len(data) for data in streams.values()]
    text = json.dumps([cfg.compressor, model, sizes, parts], separators=(",", ":"))
    header = brotli.compress(text.encode(), quality=11)

    lengths = struct.pack("<HI", ARTIFACT_VERSION, len(header))
    body = header + b"".join(streams.values())
    return ARTIFACT_MAGIC + lengths + checksum(lengths, body) + body


class Header(NamedTuple):
    """What an artifact says about itself, nothing of it checked against a model."""

    compressor: str
    model: dict[str, Any]   # MODEL_FIELDS
    sizes: dict[str, int]   # bytes of each stream
    parts: list             # of each tensor, as `parts_in_header`
    start: int              # of the first stream
    caps: tuple[str, ...]   # scalars behind the network's own tensors, dropped if they are LOGIT_SOFTCAP
    transposed: tuple[str, ...]  # arrays whose last two axes are swapped


LOGIT_CAPS = ("softcap_pos", "softcap_neg")  # of logits of either sign: tensors once, which nobody trained
VERSION_3_FIELDS = (  # whose values artifacts of version 3 list in this order
    "vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "mlp_slope",
    "tie_embeddings", "logit_softcap", "rope_base", "rope_dims", "rope_yarn", "rope_train_seq_len",
    "ln_scale", "xsa_last_n", "window_pattern", "window_size", "skip_gates_enabled", "num_loops",
    "loop_start", "loop_end", "parallel_start_layer", "parallel_final_lane", "attn_out_gate_enabled",
    "attn_out_gate_src", "gated_attn_enabled", "sparse_attn_gate_enabled", "sparse_attn_gate_scale",
    "gate_window", "smear_gate_enabled", "smear_gate_bos_fix", "asym_logit_rescale",
)


def from_version_3(compressor: str, values: list, sizes: list[int], kinds: list, chosen: list[int]) -> tuple:
    """Say what a header of version 3 says like one of this version, and add the names for `caps` and
    `transposed`.

    Version 3 listed values without names, each kind of tensor once, and the stream of an untied head. It had
    two caps of the logits, and parallel_post_lambdas as [lane that receives, sublayer that writes]. Raises
    ArtifactError.
    """
    model = dict(zip(VERSION_3_FIELDS, values, strict=True))
    for name, known in dict(tie_embeddings=True, parallel_final_lane="mean").items():
        if model.pop(name) != known:
            raise ArtifactError(f"the artifact needs another {name.upper()} than {known}, which is all that "
                                "this script knows: use the script it was written by")
    caps = LOGIT_CAPS if model.pop("asym_logit_rescale") else ()
    sizes.pop(STREAMS.index("rest"))  # of the head
    parts = [kinds[kind] for kind in chosen]
    return compressor, model, sizes, parts, caps, ("parallel_post_lambdas:float16.w",)


def read_header(blob: bytes) -> Header:
    """Read the header of an artifact of version 3 or 4, and verify the checksum. Raises ArtifactError."""
    if blob[:4] != ARTIFACT_MAGIC or len(blob) < HEADER_START:
        raise ArtifactError(f"no artifact: expected it to start with {ARTIFACT_MAGIC!r}, found {blob[:4]!r} "
                            f"in {len(blob)} bytes; set ARTIFACT_DIR to the run's folder")
    version, size = struct.unpack("<HI", blob[4:10])
    if version not in (3, ARTIFACT_VERSION):
        raise ArtifactError(f"artifact version {version}; this script reads 3 and {ARTIFACT_VERSION}: use "
                            "the script it was written by")
    if checksum(blob[4:10], blob[HEADER_START:]) != blob[10:HEADER_START]:
        raise ArtifactError(f"damaged artifact: the checksum of its {len(blob)} bytes does not match; copy "
                            "it or make it again")
    start = HEADER_START + size
    try:
        text = brotli.Decompressor().process(blob[HEADER_START:start], output_buffer_limit=1 << 20)
        header = json.loads(text)
        header = from_version_3(*header) if version == 3 else (*header, (), ())
        compressor, model, sizes, parts, caps, transposed = header
        if compressor not in COMPRESSORS or min(sizes) < 0 or start + sum(sizes) != len(blob):
            raise ValueError("its streams do not fill it")
        if not isinstance(model, dict):
            raise ValueError("its variables have no names")
        sizes = dict(zip(STREAMS, sizes, strict=True))
        return Header(compressor, model, sizes, parts, start, caps, transposed)
    except HOSTILE as e:
        raise ArtifactError(f"the header of this artifact makes no sense: {e!r}; make it again") from None


def check_model_fields(cfg: Config, saved: dict[str, Any]) -> None:
    """Compare the variables of a header, `saved`, with this run's. Raises ArtifactError naming every one that
    differs.

    A variable younger than the artifact had its default; one that this script does not know differs.
    """
    expected = {f.name: f.default for f in fields(Config) if f.name in MODEL_FIELDS} | saved
    differ = []
    for name, theirs in expected.items():
        if name not in MODEL_FIELDS:
            differ.append(f"{name.upper()}: artifact {theirs}, unknown to this script")
        elif theirs != getattr(cfg, name):
            differ.append(f"{name.upper()}: artifact {theirs}, this run {getattr(cfg, name)}")
    if differ:
        raise ArtifactError(f"the artifact belongs to another model: {'; '.join(differ)}. Set these "
                            "variables as in the run that wrote it, or use its script")


def empty_arrays(cfg: Config, header: Header) -> Arrays:
    """Make the arrays that a header lists, zeros.

    Raises ValueError or LookupError unless they are parts of known codecs, as large as the tensors allow.
    """
    shapes = tensor_shapes(cfg)
    if header.caps:  # they were the last of the network's own tensors
        own = {name: shape for name, shape in shapes.items() if "." not in name}
        shapes = own | dict.fromkeys(header.caps, ()) | shapes
    arrays: Arrays = {}
    for (name, shape), parts in zip(shapes.items(), header.parts, strict=True):
        if not parts:
            raise ValueError(f"{name} has no parts")
        room = 4 * math.prod(shape) + 16  # integers, low-rank factors and scales
        for codec, part, sizes in parts:
            array = f"{name}:{codec}.{part}"
            sizes = tuple(shape[-1 - n] if n < 0 else n for n in sizes)
            room -= math.prod(sizes)
            is_whole = sizes == shape or part not in ("q", "w")
            if room < 0 or array in arrays or not is_whole:
                raise ValueError(f"{name}, of shape {shape}, can not have {codec}.{part} of shape {sizes}")
            arrays[array] = np.zeros(sizes, "<" + CODEC_PARTS[codec][part])
    return arrays


def unpack(cfg: Config, blob: bytes) -> dict[str, QuantizedTensor]:
    """Unpack an artifact into its tensors, the inverse of `pack`. Raises ArtifactError, whatever the bytes.

    It never needs more memory than the integers of four such models.
    """
    header = read_header(blob)
    check_model_fields(cfg, header.model)
    streams = io.BytesIO(blob[header.start :])
    try:
        coded = {stream: streams.read(size) for stream, size in header.sizes.items()}
        arrays = decode_streams(cfg, header.compressor, empty_arrays(cfg, header), coded)
        if bad := not_finite(arrays):
            raise ValueError(f"not all finite: {bad}")
    except HOSTILE as e:
        raise ArtifactError(f"this artifact makes no sense: {e!r}; make it again") from None

    out: dict[str, QuantizedTensor] = {}
    for name, a in arrays.items():
        tensor, _, part = name.rpartition(":")
        if tensor in header.caps:
            check_cap(cfg, "the artifact", tensor, a)
            continue
        a = a.swapaxes(1, 2) if name in header.transposed else a
        stored = out.setdefault(tensor, QuantizedTensor({}))
        stored.parts[tuple(part.split("."))] = torch.from_numpy(np.array(a, order="C"))
    return out


def check_cap(cfg: Config, file: Any, name: str, cap: Array) -> None:
    """Check that a cap of the logits, a tensor of its own once, is LOGIT_SOFTCAP. Raises ArtifactError."""
    if (cap.astype(float) != cfg.logit_softcap).any():
        raise ArtifactError(f"{file} has {name} {cap}, this run LOGIT_SOFTCAP={cfg.logit_softcap:g} for "
                            "logits of both signs: set it to that, or use the script it was written by")


def bytes_by_part(blob: bytes) -> dict[str, int]:
    """Count the bytes of each stream of an artifact, and of its header; they add up to its size."""
    header = read_header(blob)
    return dict(header=header.start, **header.sizes)


def load_artifact(cfg: Config, world: World, path: Path, kernels: Kernels = DEFINITIONS) -> GPT:
    """Load the model that the bytes on disk stand for. Raises ArtifactError."""
    model = GPT(cfg, world.dtype, kernels)
    try:
        model.load_state_dict(dequantized_state(cfg, unpack(cfg, path.read_bytes())))
    except OSError as e:
        raise ArtifactError(f"cannot read {path}: {e.strerror or e}; train first, or set ARTIFACT_DIR to the "
                            "run's folder") from None
    except (*HOSTILE, RuntimeError) as e:
        raise ArtifactError(f"{path} does not hold the tensors of this model: {e}; make it again") from None
    return model.to(world.device).requires_grad_(False)


# Final_model.pt


def checkpoint_state(cfg: Config, path: Path, saved: Any) -> dict[str, Tensor]:
    """Find the state dict in what final_model.pt holds, ours or a published one. Raises RunError.

    Without a format number it is a published one, whose parallel_post_lambdas are [sublayer that writes, lane
    that receives], or one of ours of old, which had them the other way round.
    """
    if "format" in saved:
        if saved["format"] != CHECKPOINT_FORMAT:
            raise RunError(f"{path} has format {saved['format']}, this script reads {CHECKPOINT_FORMAT}: use "
                           "the script it was written by")
        return saved["model"]
    ledger = path.with_name("ledger.jsonl")
    lines = ledger.read_bytes().splitlines() if ledger.exists() else []
    trained_here = any(b'"phase"' in line and b'"train"' in line for line in lines)
    if trained_here and "parallel_post_lambdas" in saved:
        raise RunError(f"{path} was written by an older version of this script, with parallel_post_lambdas "
                       f"transposed: train again, or save dict(format={CHECKPOINT_FORMAT}, model=state) with "
                       "state['parallel_post_lambdas'].mT in its place")
    for name in saved.keys() & {*LOGIT_CAPS}:
        check_cap(cfg, path, name, saved[name].float().numpy())
    return {name: t for name, t in saved.items() if name not in LOGIT_CAPS}


def load_checkpoint_model(cfg: Config, world: World, path: Path, kernels: Kernels = DEFINITIONS) -> GPT:
    """Load a model from final_model.pt, ours or a published one. Raises RunError."""
    saved = load_tensors(path, "cpu")
    model = GPT(cfg, world.dtype, kernels)
    try:
        model.load_state_dict(checkpoint_state(cfg, path, saved))
    except (AttributeError, LookupError, RuntimeError, TypeError) as e:
        raise RunError(f"{path} does not fit this configuration: {e}") from None
    return model.to(world.device)


# ==================================================================================================
# BUDGET - the searches for a size: as good a model as fits into TARGET_BYTES beside the script.
# ==================================================================================================

class Pruning:
    """Selective pruning (PR #1105): integers +-1 of the GPTQ matrix_parts become zero, cheapest first.

    What one costs is the square of the weight it stands for. `code_bits` predicts, without a coder, how many
    bits a number of zeros leaves.
    """

    def __init__(self, stored: Quantized):
        self.stored = stored
        self.names = [name for name, t in stored.items() if "gptq" in t.codecs()]
        matrix_parts = [stored[name].parts_of("gptq") for name in self.names]
        self.q = torch.cat([parts["q"].flatten() for parts in matrix_parts])
        self.sizes = [parts["q"].numel() for parts in matrix_parts]

        ones = (self.q.abs() == 1).nonzero()[:, 0]
        cost = torch.cat([Gptq.decode(parts).flatten() for parts in matrix_parts])[ones].square()
        self.ranked = ones[cost.argsort(stable=True)]

        owner = torch.arange(len(matrix_parts)).repeat_interleave(torch.tensor(self.sizes))
        bins = 256 * owner + self.q + 128  # by matrix and integer
        self.counts = torch.bincount(bins, minlength=256 * len(matrix_parts)).view(-1, 256)
        self.bins = bins[self.ranked]

    def code_bits(self, count: int) -> float:
        """Compute the entropy of the integers, matrix by matrix, once the cheapest `count` are zero."""
        moved = torch.bincount(self.bins[:count], minlength=self.counts.numel()).view_as(self.counts)
        p = (self.counts - moved).double()
        p[:, 128] += moved.sum(1)
        nats = torch.special.xlogy(p, p.sum(1, keepdim=True)) - torch.special.xlogy(p, p)
        return nats.sum().item() / math.log(2)

    def zeros_for(self, bits: float) -> int:
        """Find the fewest zeros that leave at most so many bits; all of them if none do."""
        return bisect.bisect_left(range(len(self.ranked)), -bits, key=lambda count: -self.code_bits(count))

    def apply(self, count: int) -> Quantized:
        """Return the tensors with the cheapest `count` integers zeroed."""
        q = self.q.clone()
        q[self.ranked[:count]] = 0
        out = dict(self.stored)
        for name, flat in zip(self.names, q.split(self.sizes), strict=True):
            parts = self.stored[name].parts
            pruned = flat.view_as(parts["gptq", "q"])
            out[name] = self.stored[name]._replace(parts=parts | {("gptq", "q"): pruned})
        return out


class Point(NamedTuple):
    """Predicted bits of the integers, and the bytes that came of them."""

    bits: float
    size: float


def prune_to_fit(
    cfg: Config, stored: Quantized, code_bytes: int, log: Log
) -> tuple[Quantized, bytes]:
    """Pack, pruned until artifact and script have at most TARGET_BYTES; 0 prunes nothing.

    Size is nearly linear in the entropy of the integers, so at most three more packs come within 0.05 %
    (COMPRESSOR=range) or 0.5 %. Raises RunError naming the smallest size.
    """
    blob = pack(cfg, stored)
    target = cfg.target_bytes - code_bytes
    if not cfg.target_bytes or len(blob) <= target:
        return stored, blob

    pruning = Pruning(stored)
    over, under = Point(pruning.code_bits(0), len(blob)), None  # the points nearest to the target so far
    fit, packs = None, 0
    while fit is None or (packs < 3 and under.size < 0.9995 * target):
        bits_per_byte = over.bits / over.size * (1 + packs / 2)
        if under:
            bits_per_byte = (over.bits - under.bits) / (over.size - under.size)
        count = pruning.zeros_for(over.bits - (over.size - 0.9998 * target) * bits_per_byte)
        pruned = pruning.apply(count)
        blob = pack(cfg, pruned)
        packs += 1
        zeros = f"{count} of {len(pruning.ranked)} integers +-1 to zero"
        log(f"prune: {zeros}, {len(blob)} bytes of {target} beside the script")

        point = Point(pruning.code_bits(count), len(blob))
        if point.size <= target:
            under, fit = point, (pruned, blob)
        elif count < len(pruning.ranked):
            over = point
        else:
            raise RunError(
                f"TARGET_BYTES={cfg.target_bytes}: every +-1 at zero leaves {len(blob) + code_bytes} bytes, "
                f"{code_bytes} of them the script: lower MATRIX_BITS, or ship the packed script "
                "(tools/pack_code.py)")
    return fit


class Pass(NamedTuple):
    """One artifact of a search."""

    size: int  # bytes with the script
    matrices: Quantized
    blob: bytes


class StepSearch:
    """Search for as many bytes as TARGET_BYTES leaves beside the script, unless RD_LOSS needs fewer.

    Each pass is a real artifact; what it missed by corrects the formula that leads to the next. 0.05 % below
    the target is near enough. Two passes within 0.2 % on both sides of it end the search as well: some
    matrices from the finer pass, the others from the coarser, as many as fit.
    """

    def __init__(self, cfg: Config, tensors: Tensors, plan: RateDistortion, code_bytes: int):
        self.cfg, self.tensors = cfg, tensors
        self.plan, self.code_bytes = plan, code_bytes
        self.target = cfg.target_bytes or math.inf
        self.coarsest = plan.delta(max(100.0, cfg.rd_loss))
        bits = plan.bits(plan.finest)
        others = sum(t.numel() for t in tensors.values()) - plan.weights
        guess = Point(bits, code_bytes + bits / 8 + 2 * others)  # two bytes for every other number
        self.points = [guess]  # and one for each pass so far

    def attempt(self, quantized: Quantized) -> Pass:
        """Pack the model with these matrices."""
        blob = pack(self.cfg, complete(self.cfg, self.tensors, quantized))
        return Pass(len(blob) + self.code_bytes, quantized, blob)

    def next_delta(self) -> tuple[float, float]:
        """Choose the delta of the next pass, and predict its size."""
        plan, last = self.plan, self.points[-1]
        slope = 1 / 8  # bytes a bit; measured as soon as there are two passes
        if len(self.points) > 2 and last.bits != self.points[-2].bits:
            before = self.points[-2]
            slope = (last.size - before.size) / (last.bits - before.bits)
            slope = min(max(slope, 1 / 16), 1 / 4)

        delta = plan.finest
        if last.size > self.target or len(self.points) > 1:
            missing = 0.99975 * self.target - last.size
            delta = plan.delta_for(last.bits + missing / slope)
            delta = min(max(delta, plan.finest), self.coarsest)
        return delta, last.size + slope * (plan.bits(delta) - last.bits)

    def bracket(self, log: Log) -> tuple[Pass | None, Pass]:
        """Find the last pass over the target, if any, and the last one that fits.

        Raises RunError naming the smallest size when even steps that destroy the model do not fit.
        """
        over = under = None
        against = f", TARGET_BYTES {self.target}" if self.cfg.target_bytes else ""
        close = False
        while len(self.points) < 12 and not close:
            delta, expected = self.next_delta()
            tried = self.attempt(self.plan.encode(delta))
            self.points.append(Point(self.plan.bits(delta), tried.size))
            log(f"rd: predicted loss {self.plan.loss(delta):.5f}, {tried.size} bytes with the script, "
                f"predicted {expected:.0f}{against}")
            if tried.size <= self.target:
                under = tried
            else:
                over = tried
            close = delta == (self.plan.finest if under else self.coarsest)
            if under:
                close |= under.size > 0.9995 * self.target
            if under and over:
                close |= over.size - under.size < 0.002 * self.target
        if not under:
            raise RunError(
                f"TARGET_BYTES={self.target}: the smallest reachable size is {tried.size} bytes, "
                f"{self.code_bytes} of them the script; make the model smaller, or ship the packed script "
                "(tools/pack_code.py)")
        return over, under

    def mix(self, over: Pass, under: Pass) -> Pass:
        """Take as many matrices of the finer pass as fit, by bisection.

        Matrices are of unequal size, so another order of them may end closer: up to eight are tried.
        """
        names, coarse = list(under.matrices), under.matrices
        for turn in range(min(8, len(names))):
            ranked = names[turn:] + names[:turn]
            low, high = 0, len(names)
            while under.size <= 0.9995 * self.target and high - low > 1:
                middle = (low + high) // 2
                fine = {name: over.matrices[name] for name in ranked[:middle]}
                tried = self.attempt(coarse | fine)
                if tried.size > self.target:
                    high = middle
                else:
                    low = middle
                    under = tried if tried.size > under.size else under
        return under


Fitted = tuple[Quantized, bytes]  # the tensors, and the artifact of them


def fit_as_encoded(
    cfg: Config, state: Tensors, hessians: Hessians, code_bytes: int, log: Log, search: Any
) -> Fitted:
    """Take whatever size comes of the scheme's bits and grids."""
    stored = quantize(cfg, state, hessians, log)
    return stored, pack(cfg, stored)


def fit_by_pruning(
    cfg: Config, state: Tensors, hessians: Hessians, code_bytes: int, log: Log, search: Any
) -> Fitted:
    """Prune if need be."""
    return prune_to_fit(cfg, quantize(cfg, state, hessians, log), code_bytes, log)


def fit_by_steps(
    cfg: Config, state: Tensors, hessians: Hessians, code_bytes: int, log: Log, search: Any
) -> Fitted:
    """Search the delta that all steps depend on."""
    tensors = unbank(cfg, state)
    steps = StepSearch(cfg, tensors, RateDistortion(cfg, tensors, hessians, search), code_bytes)
    over, best = steps.bracket(log)
    if over:
        best = steps.mix(over, best)
    stored = complete(cfg, tensors, best.matrices)
    log_codecs(cfg, stored, log)
    return stored, best.blob


def coded_size(cfg: Config, tensors: Tensors, quantized: Quantized) -> float:
    """Predict the bytes of an artifact by `coded_bits`."""
    return coded_bits(cfg, arrays_of(complete(cfg, tensors, quantized))).sum() / 8


def forecast_as_encoded(cfg: Config, tensors: Tensors, hessians: Hessians, code_bytes: int) -> str:
    """Forecast the size that comes of the scheme's bits and grids."""
    size = code_bytes + coded_size(cfg, tensors, scheme_of(cfg).encode(cfg, tensors, hessians))
    return f"{size:.0f} bytes with the script"


def forecast_steps(cfg: Config, tensors: Tensors, hessians: Hessians, code_bytes: int) -> str:
    """Forecast the size at RD_LOSS, without the trellis, on steps that err as much; and a target's loss."""
    plan = RateDistortion(cfg, tensors, hessians)
    size = code_bytes + coded_size(cfg, tensors, plan.encode(plan.finest, scalar_rounding))
    text = f"{size:.0f} bytes with the script for RD_LOSS {cfg.rd_loss:g}"
    if 0 < cfg.target_bytes < size:
        delta = plan.delta_for(plan.bits(plan.finest) + 8 * (cfg.target_bytes - size))
        text += f"; at TARGET_BYTES {cfg.target_bytes} the predicted loss is {plan.loss(delta):.5f}"
    return text


FITS = {S14: fit_as_encoded, S05: fit_by_pruning, Rd: fit_by_steps}  # as `quantize_to_fit`
FORECASTS = {S14: forecast_as_encoded, S05: forecast_as_encoded, Rd: forecast_steps}


@torch.no_grad()
@full_fp32()
def quantize_to_fit(
    cfg: Config, state: Tensors, hessians: Hessians, code_bytes: int, log: Log, search: Callable | None = None
) -> tuple[Quantized, bytes]:
    """Quantize and pack, so that artifact and script fit into TARGET_BYTES.

    code_bytes: of the script; search: `viterbi` or an equal. Returns the tensors and the artifact. Raises
    RunError naming the smallest size when nothing fits.
    """
    return FITS[scheme_of(cfg)](cfg, state, hessians, code_bytes, log, search)


@torch.no_grad()
@full_fp32()
def forecast_size(
    cfg: Config, world: World, model: GPT, state: Tensors, tokens: np.ndarray, code_bytes: int
) -> str:
    """Forecast the size of artifact and script if training ended here, calibrated on one micro-batch.

    state: the weights to pack; tokens: the micro-batch. Changes neither the model nor a random generator.
    """
    live = dict(model.named_parameters())
    weights = {}
    for name, t in state.items():
        weights[name] = t.detach().to(live[name].dtype).clone().requires_grad_()
    hessians = Hessians()
    parts = calibration_parts(cfg)
    n = (len(tokens) - 1) // parts
    for k in range(parts):
        calibrate(cfg, world, model, weights, tokens[k * n : (k + 1) * n + 1], hessians)
    text = FORECASTS[scheme_of(cfg)](cfg, unbank(cfg, weights), hessians, code_bytes)
    return f"predicted_size: {text}"


# ==================================================================================================
# SCORING - bits per byte: every target scored once, every byte counted once, all of it in a chained ledger.
# ==================================================================================================

class Ledger:
    """Keep the account of a run, line by line: {"n", "prev", "kind", .., "hash"}; "prev" is the hash of the
    line before.

    An edit breaks the chain. A later stage in the same folder goes on behind the last line. Without a path,
    as on all ranks but the first, nothing is kept.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.lines = 0
        self.last = ""  # hash of the last line

        if path is not None and path.exists():
            try:
                entry = json.loads(path.read_text().splitlines()[-1])
                self.lines = entry["n"] + 1
                self.last = entry["hash"]
            except (OSError, ValueError, LookupError, TypeError):
                raise RunError(f"{path} does not end with a whole ledger line: move it away, or choose "
                               "another ARTIFACT_DIR") from None

    @staticmethod
    def digest(entry: dict) -> str:
        """Hash a line without its "hash": blake2b-128, in hex, of the canonical JSON."""
        content = {key: value for key, value in entry.items() if key != "hash"}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    def add(self, kind: str, facts: dict) -> None:
        """Append one line, at once. Raises RunError."""
        if self.path is None:
            return
        entry = dict(n=self.lines, prev=self.last, kind=kind, **facts)
        self.lines += 1
        self.last = entry["hash"] = self.digest(entry)
        try:
            with self.path.open("a") as f:
                f.write(json.dumps(entry, separators=(",", ":")) + "\n")
        except OSError as e:
            raise RunError(f"cannot append to {self.path}: {e.strerror or e}; free space or choose another "
                           "ARTIFACT_DIR") from None


class Score(NamedTuple):
    """Hold what an evaluation comes to."""

    loss: float  # nats per token
    bpb: float   # bits per byte
    tokens: int
    bytes: int


def graded(forward, tokens: Tensor, hints: Tensor | None, boost: float) -> tuple[Tensor, Tensor]:
    """Grade tokens (B, n) or (B, n, K) twice: nats as the model sees them, to learn from, and nats that
    count.

    forward(tokens) -> nats. The two differ where there is a hint, (B, n), -1 = none: its probability q is
    multiplied by e^boost and all probabilities are divided by their new sum, 1 + q (e^boost - 1), whatever
    the target is.
    """
    if hints is None:
        nats = forward(tokens)
        return nats, nats
    hint = hints.unsqueeze(-1)
    candidates = tokens.view(*hints.shape, -1)
    both = forward(torch.cat((candidates, hint.clamp_min(0)), -1))
    nats, hinted = both[..., :-1], both[..., -1:]

    probability = (-hinted).exp()
    log_sum = torch.log1p(probability * math.expm1(boost))
    tilted = nats - boost * (candidates == hint) + log_sum
    counted = torch.where(hint < 0, nats, tilted)
    return nats.reshape(tokens.shape), counted.reshape(tokens.shape)


class Scorer:
    """Stand between an evaluation and the validation tokens; target i is token i + 1.

    `inputs_for` shows what comes before targets, `score` grades them, each once, `targets_to_learn` hands out
    graded ones to learn from, `sync` merges the ranks and writes the receipts.
    """

    def __init__(self, data: ValData, world: World, name: str = "", ledger: Ledger | None = None):
        self._data = data
        self.world = world
        self.name = name
        self.ledger = ledger
        self.documents = data.documents
        self.total = len(data.target_bytes)

        self.own = np.zeros(self.total, np.uint8)   # graded by this rank
        self.graded = np.zeros(self.total, bool)    # by any, at the last sync
        self.nats = torch.zeros(self.total, device=world.device)
        self.sum = torch.zeros((), dtype=world.wide, device=world.device)
        self.tokens = 0
        self.bytes = 0
        self.work = FlopCount()

        self.order = np.arange(self.total)  # in which targets are graded, see `announce_order`
        self.hints: np.ndarray | None = None
        self.boost = 0.0
        self.steps = 0.0  # that optimizers may take
        self.shown: list[np.ndarray] = []  # targets whose inputs are out, to be graded next
        # Targets by (what for, whether before they were graded), since the last receipt.
        self.unwritten: dict[tuple[str, bool], list[np.ndarray]] = {}
        self.receipts: list[tuple[str, bool, np.ndarray]] = []  # since the last sync

    def inputs_for(self, start: int, targets: np.ndarray) -> np.ndarray:
        """Show the inputs of targets, -1 = none: tokens from `start` to the one before the last of them.

        The next `score` must grade them all: nothing is seen that is not scored.
        """
        wanted = targets[targets >= 0]
        self.shown.append(wanted)
        return self._data.tokens[start : wanted.max(initial=-1) + 1]

    def set_hints(self, order: np.ndarray, guess, boost: float) -> None:
        """Take hints for `graded`: guess(tokens, order) -> (N,), order (N,) as the targets will be graded.

        Nothing else is handed the stream at once, so it is asked again with a forged future, from a drawn
        target on; RunError where that changes a hint up to there.
        """
        tokens = self._data.tokens
        cut = int(np.random.default_rng(self.total).integers(self.total))
        future = order[cut:] + 1
        future = future[tokens[future] != BOS_ID]  # where documents start is known
        forged = tokens.copy()
        forged[future] = tokens[future[::-1]]

        self.boost = boost
        self.hints = guess(tokens, order)
        past = order[: cut + 1]
        if (self.hints[past] != guess(forged, order)[past]).any():
            raise RunError(f"{self.name}: a hint depends on its target or on what comes after it: a bug, "
                           "please report it")

    def on_device(self, values: np.ndarray) -> Tensor:
        """Copy whole numbers to the device, as int64."""
        return torch.from_numpy(values.astype(np.int64)).to(self.world.device, non_blocking=True)

    def hints_at(self, targets: np.ndarray) -> Tensor | None:
        """Look up the hints of targets."""
        return None if self.hints is None else self.on_device(self.hints[targets])

    def score(self, targets: np.ndarray, forward) -> Tensor:
        """Grade targets (B, n), -1 = none, none of them graded before (RunError).

        forward(tokens (B, n) int64) -> nats (B, n), which come back; what counts is what `graded` makes of
        them.
        """
        places = np.flatnonzero(targets >= 0)
        index = targets.reshape(-1)[places]
        if (self.own[index] | self.graded[index]).any() or len(np.unique(index)) < len(index):
            raise RunError(f"{self.name}: a target in [{index.min()}, {index.max()}] was about to be scored "
                           "twice: a bug, please report it")
        seen = np.concatenate([*self.shown, index[:0]])
        self.shown = []
        if not np.isin(seen, index).all():
            raise RunError(f"{self.name}: what comes before target {seen.max()} was read, and others are "
                           "scored: a bug, please report it")

        self.steps = 0
        tokens = self.on_device(self._data.tokens[targets + 1])
        nats, counted = graded(forward, tokens, self.hints_at(targets), self.boost)
        counted = counted.detach().reshape(-1)[self.on_device(places)].float()
        self.nats[self.on_device(index)] = counted
        self.sum += counted.to(self.sum.dtype).sum()
        self.own[index] = 1
        self.tokens += len(index)
        self.bytes += int(self._data.target_bytes[index].sum())
        self.unwritten.setdefault(("score", False), []).append(index)
        return nats

    def targets_to_learn(self, targets: np.ndarray, what: str = "adapters", early: bool = False) -> Tensor:
        """Hand out the tokens of targets to learn from, as for `score`. Raises RunError where one has not
        been graded.

        One step of an optimizer may follow, with another `what` than adapters any number until the next
        `score`. `early`, for methods that break the rule, puts that into the ledger instead of raising.
        """
        index = targets[targets >= 0]
        ready = bool((self.own[index] | self.graded[index]).all())
        if not ready and not early:
            raise RunError(f"{self.name}: learning from a target in [{index.min()}, {index.max()}] before it "
                           "was scored: a bug, please report it")
        self.steps = 1 if what == "adapters" else math.inf
        self.unwritten.setdefault((what, not ready), []).append(index)
        return self.on_device(self._data.tokens[targets + 1])

    @contextlib.contextmanager
    def only_released_steps(self):
        """Refuse, meanwhile, every step of a torch optimizer that nothing was handed out for: RunError."""
        def before_step(*_):
            if self.steps < 1:
                raise RunError(f"{self.name}: an optimizer step on nothing that was released for learning: "
                               "a bug, please report it")
            self.steps -= 1

        with register_optimizer_step_pre_hook(before_step):
            yield

    def sums(self) -> tuple[float, int, int]:
        """Add up nats, tokens and bytes graded by this rank so far."""
        return self.sum.item(), self.tokens, self.bytes

    def receipt(self) -> None:
        """Close an entry for what was scored, and for what was learned from, since the last receipt."""
        for kind, parts in self.unwritten.items():
            index = np.unique(np.concatenate(parts))
            if len(index):
                self.receipts.append((*kind, index))
        self.unwritten = {}

    def ledger_line(self, nats: np.ndarray, what: str, early: bool, index: np.ndarray) -> tuple[str, dict]:
        """Write a receipt as a ledger line: ranges [a, b) of targets, with nats and bytes for scores."""
        gaps = np.flatnonzero(np.diff(index) > 1)
        runs = np.split(index, gaps + 1)
        ranges = [[int(run[0]), int(run[-1]) + 1] for run in runs]
        line = {"pass": self.name, "ranges": ranges}
        if what != "score":
            return "update", line | dict(what=what, early=early)
        line["nats"] = [float(nats[run].sum(dtype=np.float64)) for run in runs]
        line["bytes"] = [int(self._data.target_bytes[run].sum()) for run in runs]
        return "score", line

    def sync(self) -> None:
        """Merge the ranks and write the receipts. Raises RunError where two have graded the same target."""
        self.receipt()
        counts = torch.tensor(self.own, device=self.world.device)
        self.world.sum_(counts)
        if (counts > 1).any():
            raise RunError(f"{self.name}: two ranks scored the same targets: a bug, please report it")
        self.graded = (counts > 0).cpu().numpy()

        nats = self.nats.cpu().numpy()
        if self.ledger is not None:
            lines = [self.ledger_line(nats, *receipt) for receipt in self.receipts]
            for of_rank in self.world.gather(lines):
                for kind, line in of_rank:
                    self.ledger.add(kind, line)
        self.receipts = []

    def finish(self) -> Score:
        """Merge the ranks and sum up in fp64; rank 0 leaves the nats of every target.

        Raises RunError where one was left out.
        """
        self.sync()
        self.world.sum_(self.nats)  # zero where another rank has graded
        nats = self.nats.cpu().numpy()
        total = float(nats.sum(dtype=np.float64))
        count = int(self.graded.sum())
        size = int(self._data.target_bytes.sum())
        if count != self.total or not math.isfinite(total):
            raise RunError(f"{self.name}: scored {count} targets instead of {self.total}, {total:g} nats: "
                           "a bug, please report it with the log")

        if self.ledger is not None and self.ledger.path is not None:
            buffer = io.BytesIO()
            np.save(buffer, nats)
            path = self.ledger.path.with_name(f"token_nats_{self.name}.npy")
            write_atomic(path, buffer.getvalue())
            self.ledger.add("tokens", {"pass": self.name, "file": path.name, "sha256": sha256_file(path)})
        return Score(total / count, total / math.log(2) / size, count, size)


def ngram_hints(cfg: Config, tokens: np.ndarray, order: np.ndarray, device: torch.device | str) -> np.ndarray:
    """Guess each target of the stream from those scored before it (the token-only n-gram of PR #2135).

    tokens (N + 1,), order (N,): the targets as they are scored -> (N,) int32: the token that most often
    followed the same TOKEN_ORDER - 1 tokens of a document so far, of several the first to get there; -1 where
    its share is below TOKEN_THRESHOLD or there is none. Sorts instead of a loop over hash tables; contexts
    are told apart exactly, from 1 token to 2, 4, 8, ...: they are equal if both halves are.
    """
    n = cfg.token_order - 1
    stream = torch.from_numpy(tokens.astype(np.int64)).to(device)
    order = torch.from_numpy(order).to(device)
    base = max(len(stream), 1 << 16)  # above every token and every name

    context = stream[:-1]
    positions = torch.arange(len(context), device=device)
    document_start = torch.where(context == BOS_ID, positions, 0).cummax(0).values
    order = order[order - document_start[order] >= n - 1]

    length = 1  # of the contexts that have a name: context[i] is that of tokens i to i + length - 1
    while length < n:
        step = min(length, n - length)
        halves = context[step:] * base + context[:-step]
        context = halves.unique(return_inverse=True)[1]
        length += step

    context, by_context = context[order - (n - 1)].sort(stable=True)
    order = order[by_context]  # one context after the other, within each as they are scored
    follows = stream[order + 1]
    rank = torch.arange(len(order), device=device)
    pairs, by_pair = (context * base + follows).sort(stable=True)
    count = torch.empty_like(rank)
    count[by_pair] = rank - torch.searchsorted(pairs, pairs) + 1  # how often it has followed, now included
    most = (context * base + count).cummax(0).values
    leader = torch.searchsorted(most, most)  # where the highest count so far was reached

    seen = rank - torch.searchsorted(context, context)  # how often the context came before
    before = leader.roll(1)
    sure = (seen > 0) & (count[before].double() / seen >= cfg.token_threshold)
    hints = torch.full((len(stream) - 1,), -1, dtype=torch.int32, device=device)
    hints[order[sure]] = follows[before[sure]].int()
    return hints.cpu().numpy()


def announce_order(cfg: Config, scorer: Scorer, order: np.ndarray) -> Scorer:
    """Tell the scorer in which order its targets come, and the hints that NGRAM_TILT_ENABLED asks for.

    This is on the evaluation's clock.
    """
    scorer.order = order
    if cfg.ngram_tilt_enabled:
        device = scorer.world.device if scorer.world.device.type == "cuda" else "cpu"
        scorer.set_hints(order, partial(ngram_hints, cfg, device=device), cfg.token_boost)
    return scorer


class EvalBatch(NamedTuple):
    """Hold inputs (B, T) int64 on the device and the target that each predicts, or -1 (B, T)."""

    inputs: Tensor
    targets: np.ndarray
    lengths: np.ndarray  # of the attention segments
    segments: Segments | None = None  # of a packed row
    learn: np.ndarray | None = None  # (B, T), as targets: those that SLOT learns from


def packed_rows(scorer: Scorer, context: int, row_tokens: int) -> list[tuple[int, int]]:
    """Cut the stream into rows of at most `row_tokens` inputs: (start, end).

    They never cut a piece: a document, or `context` tokens of a long one.
    """
    cuts = document_cu_seqlens(scorer.documents()[0], scorer.total, context, bucket=1)
    rows, start = [], 0
    while start < scorer.total:
        end = int(cuts[np.searchsorted(cuts, start + row_tokens, side="right") - 1])
        rows.append((start, end))
        start = end
    return rows


def packed_batches(cfg: Config, scorer: Scorer, rank: int, size: int):
    """Yield whole documents (cut at EVAL_SEQ_LEN) side by side in padded rows, the same for any ranks."""
    context = cfg.eval_seq_len
    whole_stream = -(-scorer.total // context) * context
    row_tokens = min(max(cfg.val_batch_tokens // 8, context), whole_stream)

    for start, end in packed_rows(scorer, context, row_tokens)[rank::size]:
        targets = np.arange(start, start + row_tokens)[None]
        targets = np.where(targets < end, targets, -1)
        inputs = np.zeros((1, row_tokens), np.int64)
        inputs[0, : end - start] = scorer.inputs_for(start, targets)

        starts = np.flatnonzero(inputs[0] == BOS_ID)
        starts = np.append(starts, end - start)  # the padding is a document of its own
        cuts = document_cu_seqlens(starts, row_tokens, context)
        segments = Segments(torch.from_numpy(cuts).to(scorer.world.device), context)
        yield EvalBatch(scorer.on_device(inputs), targets, np.diff(cuts), segments)


def sliding_batches(cfg: Config, scorer: Scorer, rank: int, size: int):
    """Yield windows every EVAL_STRIDE tokens, documents not masked; each scores what no earlier window has
    scored.

    Each row walks through a stretch of its own: most of what its window shows has been scored by the same row
    in earlier batches.
    """
    seq, stride = cfg.eval_seq_len, cfg.eval_stride
    starts = np.arange(0, max(1, scorer.total - (seq - stride)), stride)
    first_new = starts + seq - stride  # the first target that a window scores
    first_new[0] = 0
    rows = max(1, cfg.val_batch_tokens // 8 // seq)
    steps = -(-len(starts) // (size * rows))
    stretches = np.arange(rank * rows, (rank + 1) * rows) * steps

    for step in range(steps):
        first = stretches[stretches + step < len(starts)]
        if not len(first):
            continue
        windows = first + step
        targets = starts[windows, None] + np.arange(seq)
        targets = np.where(targets < scorer.total, targets, -1)
        new = targets >= first_new[windows, None]
        by_this_row = ~new & (targets >= first_new[first, None])
        learn = targets if cfg.slot == "published" else np.where(by_this_row, targets, -1)
        targets = np.where(new, targets, -1)

        inputs = np.zeros(targets.shape, np.int64)
        for row, window in enumerate(windows):
            shown = scorer.inputs_for(starts[window], targets[row])
            inputs[row, : len(shown)] = shown
        yield EvalBatch(scorer.on_device(inputs), targets, np.full(len(windows), seq), learn=learn)


class Method(NamedTuple):
    """Say what a way of scoring is, for `evaluate`, and for the probes of tools/probes.py."""

    batches: Any            # (cfg, scorer, rank, size) -> EvalBatches; None: TttRun makes its own
    documents_masked: bool  # no document sees another
    small: dict             # upper limits of variables with which a few short documents go through all of it


METHODS = dict(
    packed=Method(packed_batches, True, {}),
    sliding=Method(sliding_batches, False, dict(eval_seq_len=64, eval_stride=16, val_batch_tokens=8)),
    ttt=Method(None, True, dict(phased_ttt_enabled=False)))


@torch.enable_grad()
def slot_shift(cfg: Config, scorer: Scorer, score, learn: np.ndarray) -> Tensor:
    """Learn a shift of the final hidden states that lowers the loss on some targets of windows (SLOT, PR
    #1105).

    published: one shift for the batch, from all its targets, those about to be scored included, which breaks
    the rules. causal: one for each window, from targets that its row has scored before. score(tokens,
    shift=...) -> nats. -> (1 or B, 1, D).
    """
    device, causal = scorer.world.device, cfg.slot == "causal"
    tokens = scorer.targets_to_learn(learn, "slot", early=not causal)
    chosen = torch.from_numpy(learn >= 0)
    count = chosen.sum(1 if causal else None, keepdim=causal)
    weight = (chosen / count.clamp_min(1)).to(device)

    shift = torch.zeros(len(learn) if causal else 1, 1, cfg.model_dim, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([shift], lr=cfg.slot_lr, eps=1e-5, weight_decay=1e-8)
    for _ in range(cfg.slot_steps):
        loss = (score(tokens, shift=shift) * weight).sum()
        shift.grad = torch.autograd.grad(loss, shift)[0]
        optimizer.step()
    return shift.detach()


@torch.no_grad()
def evaluate(cfg: Config, world: World, forward, scorer: Scorer, looping: bool = True) -> Score:
    """Score everything behind the scorer with fixed weights, each rank its share of the batches.

    forward: `GPT.forward`, compiled or not.
    """
    layers = layer_order(cfg, looping)
    batches = METHODS[cfg.eval_method].batches
    with announce_order(cfg, scorer, scorer.order).only_released_steps():
        for batch in batches(cfg, scorer, world.rank, world.size):
            score = partial(forward, batch.inputs, layers=layers, segments=batch.segments)
            if cfg.slot != "off":
                scorer.receipt()  # what is learned now comes after what was scored up to here
                score = partial(score, shift=slot_shift(cfg, scorer, score, batch.learn))
            scorer.score(batch.targets, score)
            flops = flops_per_token(cfg, batch.lengths, looping)
            scorer.work.add(flops, "score", batch.targets.size, int((batch.targets >= 0).sum()))
        return scorer.finish()


# ==================================================================================================
# TEST-TIME TRAINING - score a chunk, then learn from it: a prediction never depends on what it predicts.
# ==================================================================================================
# Start at `score_batch`, the loop that this is about: what stands above it plans, what stands below runs it.

class Batch(NamedTuple):
    """Documents side by side, n of them, by ascending length; each is scored `chunk` tokens at a time."""

    number: int         # position in the order of ascending length
    starts: np.ndarray  # (n,) first input token of a document
    sizes: np.ndarray   # (n,) predictions of a document
    chunk: int

    @property
    def chunks(self) -> np.ndarray:
        """Count the chunks of each document, (n,), the last one often partial."""
        return -(-self.sizes // self.chunk)

    def targets(self) -> np.ndarray:
        """List the targets, places in the stream, as they are scored: all chunks 0, then all chunks 1, ..."""
        offsets = np.concatenate([np.arange(size) for size in self.sizes])
        targets = np.repeat(self.starts, self.sizes) + offsets
        return targets[np.argsort(offsets // self.chunk, kind="stable")]


def chunk_size(cfg: Config, length: int) -> int:
    """Choose how many tokens are scored between two updates of a batch.

    length: tokens of its longest document, the last target included.
    """
    if not cfg.ttt_short_score_first_enabled:
        return cfg.ttt_chunk_size

    if not cfg.ttt_short_score_first_steps:
        return cfg.ttt_short_chunk_size if length <= cfg.ttt_short_doc_len else cfg.ttt_chunk_size

    for limit, chunk in parse_steps(cfg.ttt_short_score_first_steps, ":"):
        if length <= limit:
            return int(chunk)
    return cfg.ttt_chunk_size


def document_batches(cfg: Config, data: ValData | Scorer) -> list[Batch]:
    """Batch all documents by ascending length, TTT_BATCH_SIZE at a time; ties in file order."""
    starts, ends = data.documents()
    sizes = ends - starts
    by_length = np.argsort(sizes, kind="stable")

    batches = []
    for first in range(0, len(sizes), cfg.ttt_batch_size):
        chosen = by_length[first : first + cfg.ttt_batch_size]
        longest = int(sizes[chosen[-1]])
        batches.append(Batch(len(batches), starts[chosen], sizes[chosen], chunk_size(cfg, longest + 1)))
    return batches


def chunk_window(size: int, chunk: int, index: int, context: int) -> tuple[int, int, int]:
    """Locate chunk `index` of a document with `size` predictions -> (window start, chunk start, end).

    A window holds up to `context` input tokens and ends with its chunk.
    Example: size 100, chunk 48, context 3072 -> (0, 0, 48), (0, 48, 96), (0, 96, 100).
    """
    start = index * chunk
    end = min(start + chunk, size)
    return max(0, end - context), start, end


def window_width(cfg: Config, chunk: int, index: int) -> int:
    """Compute the tokens of all windows of a batch at its chunk `index`.

    With CUDA_GRAPHS they are padded to a multiple of TTT_BUCKET, as nothing that is scored looks behind
    itself; not with ROPE_YARN, whose base follows the width.
    """
    bucket = cfg.ttt_bucket if cfg.cuda_graphs and not cfg.rope_yarn else 1
    padded = -(-(index + 1) * chunk // bucket) * bucket
    return min(padded, cfg.ttt_eval_seq_len)


def batch_cost(cfg: Config, batch: Batch) -> float:
    """Count the token positions that a batch runs through the network, the unit of its duration."""
    chunk, context = batch.chunk, cfg.ttt_eval_seq_len
    chunks = int(batch.chunks.max())
    growing = min(chunks, context // chunk)  # windows of 1, 2, 3, ... chunks; later ones are full
    positions = chunk * growing * (growing + 1) / 2 + (chunks - growing) * context
    return len(batch.sizes) * positions


class Part(NamedTuple):
    """What is scored between two global phases."""

    batches: list[Batch]
    documents_to_learn: int  # that the phase behind these batches learns from, 0 = no phase


def split_at_phases(cfg: Config, batches: list[Batch]) -> list[Part]:
    """Split the batches at the global phases. A function of the data alone.

    The longest come first, because they cost most and teach most. A batch that passes several boundaries is
    followed by one phase, over all of their documents. After the last batch no document is left for one.
    """
    total = sum(len(batch.sizes) for batch in batches)
    prefix = min(total, cfg.phased_ttt_prefix_docs) if cfg.phased_ttt_enabled else 0
    phases = cfg.phased_ttt_num_phases
    boundaries = [prefix * (phase + 1) // phases for phase in range(phases)]

    parts, waiting = [], []
    scored, learned = 0, 0
    for batch in batches[::-1]:
        waiting.append(batch)
        scored += len(batch.sizes)
        reached = max((b for b in boundaries if b <= scored), default=0)
        if learned < reached and scored < total:
            parts.append(Part(waiting, reached))
            waiting, learned = [], reached
    return [*parts, Part(waiting, 0)]


def assign_to_chains(cfg: Config, batches: list[Batch]) -> list[list[Batch]]:
    """Assign batches, in the given order, to TTT_LANES chains of adapters, each to the least loaded one.

    That is balanced when costs fall, and the same on every run. The ranks share out the chains.
    """
    loads = [(0.0, chain) for chain in range(cfg.ttt_lanes)]
    assigned = [[] for _ in loads]
    for batch in batches:
        load, chain = heapq.heappop(loads)
        assigned[chain].append(batch)
        heapq.heappush(loads, (load + batch_cost(cfg, batch), chain))
    return assigned


def scoring_order(cfg: Config, parts: list[Part]) -> np.ndarray:
    """List all targets, (N,) places in the stream, in the order in which one rank scores them."""
    order = []
    for part in parts:
        for batches in assign_to_chains(cfg, part.batches):
            order += [batch.targets() for batch in batches]
    return np.concatenate(order)


def empty_adapters(cfg: Config, rows: int, device: torch.device) -> Adapters:
    """Allocate fp32 adapters of `rows` documents: A (depths, rows, rank, n_in), not set, and B, zero.

    B is (depths, rows, n_out, rank). Those of the head have no depths.
    """
    D, rank = cfg.model_dim, cfg.ttt_lora_rank
    depths = len(layer_order(cfg, looping=True))
    n_out = dict(q=D, k=cfg.kv_dim, v=cfg.kv_dim, o=D, mlp=D, head=cfg.vocab_size)

    loras = {}
    for site in (*cfg.lora_sites, "head"):
        lead = (rows,) if site == "head" else (depths, rows)
        A = torch.empty(*lead, rank, D, device=device, requires_grad=True)
        B = torch.zeros(*lead, n_out[site], rank, device=device, requires_grad=True)
        loras[site] = Lora(A, B, cfg.ttt_lora_alpha / rank)
    return Adapters(**loras)


class AdapterChain:
    """Adapters passed on from batch to batch: B starts at zero every time, A is kept (TTT_WARM_START_A).

    What is passed on comes from tokens scored in earlier batches only.
    adam: optimizer of `Kernels`, None = torch's AdamW.
    """

    def __init__(self, cfg: Config, world: World, rows: int, seed: int, adam=None):
        self.cfg = cfg
        self.adam = adam
        self.generator = torch.Generator()
        self.adapters = empty_adapters(cfg, rows, world.device)
        self.loras = [lora for lora in self.adapters if lora is not None]
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """Become another chain, at the same place in memory."""
        self.generator.manual_seed(seed)
        self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        """Draw fresh A, uniform in +-1/sqrt(n_in)."""
        for lora in self.loras:
            bound = lora.A.shape[-1] ** -0.5
            fresh = torch.empty(lora.A.shape).uniform_(-bound, bound, generator=self.generator)
            lora.A.copy_(fresh)

    @torch.no_grad()
    def begin(self) -> torch.optim.Optimizer:
        """Reset the adapters for a new batch and return its optimizer."""
        cfg = self.cfg
        if not cfg.ttt_warm_start_a:
            self.draw()
        for lora in self.loras:
            lora.B.zero_()

        parameters = [t for lora in self.loras for t in (lora.A, lora.B)]
        lr = cfg.ttt_lora_lr * cfg.ttt_local_lr_mult
        decay, eps = cfg.ttt_weight_decay, 1e-10
        if self.adam is not None:
            return self.adam(parameters, lr, cfg.ttt_beta2, eps, decay)

        fused = parameters[0].device.type in ("cuda", "cpu")
        betas = cfg.ttt_beta1, cfg.ttt_beta2
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=fused)


class Chunk(NamedTuple):
    """The next c tokens of B documents of a batch, in windows of w tokens that show what comes before."""

    inputs: Tensor       # (B, w) int64
    positions: Tensor    # (B, c) where in its window a target is predicted
    targets: np.ndarray  # (B, c) places in the stream, -1 = none
    learns: np.ndarray   # (B,) the document goes on behind this chunk, so something is left to learn for


def build_chunk(cfg: Config, scorer: Scorer, batch: Batch, index: int, first: int, rows: int) -> Chunk:
    """Build chunk `index` of documents first, first + 1, ... of a batch in `rows` rows.

    Rows of documents that have ended, or that are not there, stay empty.
    """
    width = window_width(cfg, batch.chunk, index)
    inputs = np.zeros((rows, width), np.int64)
    positions = np.zeros((rows, batch.chunk), np.int64)
    targets = np.full((rows, batch.chunk), -1)
    learns = np.zeros(rows, bool)

    for row, document in enumerate(range(first, len(batch.sizes))):
        origin, size = int(batch.starts[document]), int(batch.sizes[document])
        window, start, end = chunk_window(size, batch.chunk, index, cfg.ttt_eval_seq_len)
        if start >= size:
            continue
        targets[row, : end - start] = np.arange(origin + start, origin + end)
        inputs[row, : end - window] = scorer.inputs_for(origin + window, targets[row])
        positions[row] = np.minimum(np.arange(batch.chunk) + start - window, width - 1)
        learns[row] = end < size
    return Chunk(torch.from_numpy(inputs), torch.from_numpy(positions), targets, learns)


def learn_from(scorer: Scorer, chunk: Chunk, nats: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take one step down the mean loss (B, c) of each document that goes on.

    Each has its own adapters and the loss is a sum over documents, so they do not influence each other.
    """
    scorer.targets_to_learn(np.where(chunk.learns[:, None], chunk.targets, -1))
    learns = torch.from_numpy(chunk.learns).float().to(nats.device)
    (nats.mean(1) * learns).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def score_batch(
    cfg: Config, forward, scorer: Scorer, batch: Batch, chain: AdapterChain, static_rows: int = 0
) -> None:
    """Score each chunk of a batch with adapters that have never seen it, then learn from it.

    Two verbs, in this order. A document's last chunk is not learned from.
    static_rows: a compiled forward wants this many rows at every step; otherwise documents that have ended
    are left out (sizes ascend, so they are the first).
    """
    optimizer = chain.begin()
    layers = layer_order(cfg, looping=True)

    for index in range(int(batch.chunks.max())):
        first = 0 if static_rows else int(np.searchsorted(batch.chunks, index, side="right"))
        rows = static_rows or len(batch.sizes) - first
        adapters = chain.adapters if static_rows else chain.adapters.rows(first, first + rows)
        chunk = build_chunk(cfg, scorer, batch, index, first, rows)
        inputs, positions = (t.to(scorer.world.device, non_blocking=True) for t in chunk[:2])
        learns = bool(chunk.learns.any())

        with torch.set_grad_enabled(learns):
            nats_of = partial(forward, inputs, layers=layers, adapters=adapters, positions=positions)
            nats = scorer.score(chunk.targets, nats_of)
        if learns:
            learn_from(scorer, chunk, nats, optimizer)

        width = inputs.shape[1]
        flops = flops_per_token(cfg, [width], True, chain.adapters, scored=batch.chunk / width)
        scored = int((chunk.targets >= 0).sum())
        scorer.work.add(flops, "adapt" if learns else "score", inputs.numel(), scored)
    scorer.receipt()


def base_lr(cfg: Config, chunk: int, chunks: int) -> float:
    """Compute the learning rate of a global phase: linear warm-up, then a cosine to zero."""
    warm, peak = cfg.global_ttt_warmup_chunks, cfg.global_ttt_lr
    if chunk < warm:
        lowest = cfg.global_ttt_warmup_start_lr
        return lowest + (peak - lowest) * chunk / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (chunk - warm) / max(1, chunks - 1 - warm)))


class BaseLearner:
    """Global phases: SGD on all weights over scored tokens, all ranks together.

    Every rank joins every collective, with zero gradients when a chunk has fewer sequences than there are
    ranks, and the mean is over the chunk's tokens: the result does not depend on the ranks (but for the smear
    gate at a row's first token).
    """

    def __init__(self, cfg: Config, world: World, model: GPT):
        self.cfg = cfg
        self.world = world
        self.layers = layer_order(cfg, looping=True)
        self.parameters = [*model.parameters()]
        self.forward = compile_forward(model, cfg, world)
        self.graphs = Graphed(self.forward, world, self.parameters) if cfg.cuda_graphs else None

        # Sequences of a chunk: all, this rank's [first, end), and (first, how many) of each of its forwards.
        self.per_chunk = cfg.global_ttt_chunk_tokens // cfg.eval_seq_len
        first = self.per_chunk * world.rank // world.size
        end = self.per_chunk * (world.rank + 1) // world.size
        most = cfg.global_ttt_batch_seqs
        self.shares = [(s, min(most, end - s)) for s in range(first, end, most)]

    def set_trainable(self, on: bool) -> None:
        """Let gradients flow into all weights or into none, from no gradient on."""
        for p in self.parameters:
            p.requires_grad_(on).grad = None

    def add_gradient(self, row: Row) -> None:
        """Add the gradient of this row's part of the mean loss of a chunk."""
        seq = self.cfg.eval_seq_len
        if self.cfg.global_ttt_respect_doc_boundaries:
            nats = nats_of_row(row, self.forward, self.graphs, layers=self.layers)
        else:
            run = self.graphs or self.forward
            nats = run(row.inputs.view(-1, seq), row.targets.view(-1, seq), layers=self.layers)
        (nats.sum() / (self.per_chunk * seq)).backward()

    def warm_up(self) -> None:
        """Compile, and record, what `learn` will run, on random tokens; no weight changes."""
        seq = self.cfg.eval_seq_len
        rng = np.random.default_rng(0)
        counts = [*dict.fromkeys(count for _, count in self.shares)]

        self.set_trainable(True)
        for count in counts * (1 + self.cfg.cuda_graphs):  # graphs are recorded in the second round
            tokens = rng.integers(0, self.cfg.vocab_size, count * seq + 1)
            for row in warm_rows(packed_row(tokens, seq, self.world.device, every=seq), seq):
                self.add_gradient(row)
        self.set_trainable(False)

    def step(self, optimizer: torch.optim.Optimizer, tokens: np.ndarray, chunk: int) -> None:
        """Take one step down the mean loss of a chunk of the phase's tokens."""
        cfg, seq = self.cfg, self.cfg.eval_seq_len
        for first, count in self.shares:
            start = chunk * cfg.global_ttt_chunk_tokens + first * seq
            # Cut at every sequence: how many share a row depends on the ranks, what a token sees must not.
            row = packed_row(tokens[start : start + count * seq + 1], seq, self.world.device, every=seq)
            self.add_gradient(row)

        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.world.sum_(*(p.grad for p in self.parameters))
        if cfg.global_ttt_grad_clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, cfg.global_ttt_grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def learn(self, tokens: np.ndarray, log: Log) -> None:
        """Learn from the (N,) tokens of one phase; the last, partial chunk is skipped."""
        cfg, start = self.cfg, time.perf_counter()
        chunks = -(-(len(tokens) - 1) // cfg.global_ttt_chunk_tokens)
        optimizer = torch.optim.SGD(self.parameters, lr=cfg.global_ttt_lr, momentum=cfg.global_ttt_momentum)

        self.set_trainable(True)
        for chunk in [*range(chunks - 1)] * cfg.global_ttt_epochs:
            lr = base_lr(cfg, chunk, chunks)
            for group in optimizer.param_groups:
                group["lr"] = lr
            self.step(optimizer, tokens, chunk)
            if chunk % 50 == 0 or chunk == chunks - 2:
                seconds = time.perf_counter() - start
                log(f"ttt_phase_chunk:{chunk + 1}/{chunks} lr:{lr:.6f} t:{seconds:.1f}s")
        self.set_trainable(False)


class TttEngine:
    """What runs of test-time training share: compiled forwards, their CUDA graphs, one chain of adapters.

    data: the documents it is built for; a run may score others, in batches of no more rows.
    """

    def __init__(self, cfg: Config, world: World, model: GPT, data: ValData):
        self.cfg = cfg
        self.world = world
        self.batches = document_batches(cfg, data)
        self.rows = max(len(batch.sizes) for batch in self.batches)

        self.forward = compile_forward(model, cfg, world, growing=True)
        if cfg.cuda_graphs:
            gc.collect()  # graphs of the training, and the memory they hold, lie in cycles of references
            self.forward = Graphed(self.forward, world)
        self.static_rows = 0 if self.forward is model else self.rows
        self.base = BaseLearner(cfg, world, model) if cfg.phased_ttt_enabled else None
        self.chain = AdapterChain(cfg, world, self.rows, cfg.seed, model.kernels.adam)

    def warm_up(self, log: Log) -> None:
        """Compile what a run will run, if anything is compiled; no weight changes, adapters end as noise."""
        if not self.static_rows:
            return
        self.warm_up_scoring(self.shapes(), log)
        if self.base:
            self.base.warm_up()

    def shapes(self) -> list[tuple[int, int]]:
        """List (chunk size, width of windows): for CUDA graphs all, else those a compiler tells apart."""
        cfg, found = self.cfg, {}
        for batch in self.batches:
            indices = range(int(batch.chunks.max())) if cfg.cuda_graphs else (0, 1, cfg.ttt_eval_seq_len)
            for index in indices:
                found[batch.chunk, window_width(cfg, batch.chunk, index)] = None
        return [*found]

    def warm_up_scoring(self, shapes: list[tuple[int, int]], log: Log) -> None:
        """Score and learn from random tokens in each of these shapes."""
        log(f"ttt_lora:warming up compile (random tokens, no val data) shapes:{len(shapes)}")
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        optimizer = self.chain.begin()

        for chunk, width in shapes * (1 + self.cfg.cuda_graphs):  # graphs are recorded in the second round
            nats = self.score_noise(chunk, width, generator)
            nats.mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        log(f"ttt_lora:compile warmup done ({time.perf_counter() - start:.1f}s)")

    def score_noise(self, chunk: int, width: int, generator: torch.Generator) -> Tensor:
        """Score the last `chunk` of `width` random tokens, without and with gradients -> (rows, chunk)."""
        cfg, device = self.cfg, self.world.device
        draw = partial(torch.randint, 0, cfg.vocab_size, generator=generator)
        inputs = draw((self.rows, width)).to(device)
        targets = draw((self.rows, chunk)).to(device)
        if cfg.ngram_tilt_enabled:
            targets = torch.stack((targets, targets), -1)  # a hint beside each target
        positions = torch.arange(width - chunk, width, device=device).expand(self.rows, -1).contiguous()

        layers = layer_order(cfg, looping=True)
        for learn in (False, True):
            with torch.set_grad_enabled(learn):
                nats = self.forward(
                    inputs, targets, layers=layers, adapters=self.chain.adapters, positions=positions)
        return nats


class TttRun:
    """One scored evaluation with test-time training. Its clock starts when it is made."""

    def __init__(self, cfg: Config, engine: TttEngine, scorer: Scorer, log: Log):
        self.cfg = cfg
        self.engine = engine
        self.scorer = scorer
        self.log = log
        self.batches = document_batches(cfg, scorer)
        self.parts = split_at_phases(cfg, self.batches)
        self.phases = sum(part.documents_to_learn > 0 for part in self.parts)
        self.phases_done = 0
        self.scored_docs = 0  # by this rank

        self.graphs_before = len(compilations(engine.world))
        self.eta = Eta(sum(batch_cost(cfg, batch) for batch in self.batches) / scorer.world.size)

    def run(self) -> Score:
        """Score every document. Returns the number that the run is judged by."""
        self.log_plan()
        order = scoring_order(self.cfg, self.parts)
        scored: list[Batch] = []
        with announce_order(self.cfg, self.scorer, order).only_released_steps():
            for part in self.parts:
                self.score_part(part.batches)
                scored += part.batches
                if part.documents_to_learn:
                    self.scorer.sync()
                    self.learn_base(scored, part.documents_to_learn)
            return self.scorer.finish()

    def log_plan(self) -> None:
        """Log how many documents there are and where the phases lie."""
        total = sum(len(batch.sizes) for batch in self.batches)
        boundaries = [part.documents_to_learn for part in self.parts[:-1]]
        prefix = max(boundaries, default=0)
        self.log(f"ttt_phased: total_docs:{total} prefix_docs:{prefix} suffix_docs:{total - prefix} "
                 f"num_phases:{self.phases} boundaries:{boundaries} target_tokens:{self.scorer.total}")

    def score_part(self, batches: list[Batch]) -> None:
        """Score all batches between two phases, on this rank those of its chains."""
        cfg, world, chain = self.cfg, self.scorer.world, self.engine.chain
        assigned = assign_to_chains(cfg, batches)
        for number in range(world.rank, cfg.ttt_lanes, world.size):
            chain.restart(cfg.seed + 1000 * (1 + self.phases_done * cfg.ttt_lanes + number))
            for batch in assigned[number]:
                self.check_budget(batch)
                before = self.scorer.sums()
                score_batch(cfg, self.engine.forward, self.scorer, batch, chain, self.engine.static_rows)
                self.scored_docs += len(batch.sizes)
                self.eta.add(batch_cost(cfg, batch))
                self.report(batch, before)
                self.check_compiler(batch)

    def check_budget(self, batch: Batch) -> None:
        """Raise RunError before the batch that would break MAX_EVAL_SECONDS."""
        eta, budget = self.eta, self.cfg.max_eval_seconds
        per_position = eta.elapsed / eta.done if eta.done else 0
        forecast = eta.elapsed + per_position * batch_cost(self.cfg, batch)
        if budget and forecast > budget:
            raise RunError(
                f"evaluation would break MAX_EVAL_SECONDS={budget:g}: {eta.elapsed:.0f} s used, "
                f"{self.scored_docs} documents scored, about {eta.left:.0f} s to go. Use larger "
                "TTT_CHUNK_SIZE or TTT_SHORT_SCORE_FIRST_STEPS, a shorter TTT_EVAL_SEQ_LEN, fewer "
                "PHASED_TTT_PREFIX_DOCS, or a larger budget; the artifact is on disk: go on with STAGE=eval")

    def check_compiler(self, batch: Batch) -> None:
        """Raise RunError behind a batch in which something was compiled or recorded."""
        new_graphs = compilations(self.engine.world)[self.graphs_before :]
        if new_graphs and not self.cfg.compile_allow_recompiles:
            remedy = "the artifact exists: go on with STAGE=eval"
            raise recompile_error(f"evaluation batch {batch.number + 1}", new_graphs, remedy)

    def report(self, batch: Batch, before: tuple[float, int, int]) -> None:
        """Log a batch and this rank's running score; before: the sums ahead of the batch."""
        sums = self.scorer.sums()
        nats, tokens, size = (now - old for now, old in zip(sums, before, strict=True))
        all_nats, all_tokens, all_size = sums
        bpb = nats / math.log(2) / max(1, size)
        running_bpb = all_nats / math.log(2) / max(1, all_size)
        lengths = f"{batch.sizes.min() + 1}-{batch.sizes.max() + 1}"
        self.log(
            f"ttt batch:{batch.number + 1}/{len(self.batches)} bpb:{bpb:.4f} loss:{nats / tokens:.4f} "
            f"running_bpb:{running_bpb:.4f} running_loss:{all_nats / all_tokens:.4f} "
            f"docs:{lengths} phases:{self.phases_done} chunk:{batch.chunk} "
            f"t:{self.eta.elapsed:.0f}s eta:{self.eta.left:.0f}s")

    def learn_base(self, scored: list[Batch], documents: int) -> None:
        """Run a global phase over the first `documents` scored documents in the order of ascending length."""
        cfg, scorer = self.cfg, self.scorer
        starts = np.concatenate([batch.starts for batch in scored[::-1]])  # shortest documents first
        sizes = np.concatenate([batch.sizes for batch in scored[::-1]])
        name = f"ttt_phase:{self.phases_done + 1}/{self.phases}"
        self.log(f"{name} start docs:{documents} of:{len(starts)} t:{self.eta.elapsed:.1f}s")

        ranges = zip(starts[:documents], sizes[:documents], strict=True)
        # Target -1 is the token that starts the stream and, here, every document.
        targets = np.concatenate([np.r_[-1, start : start + size] for start, size in ranges])
        tokens = scorer.targets_to_learn(targets, "base").cpu().numpy()
        scorer.world.barrier()
        self.engine.base.learn(tokens, self.log)

        lengths = np.minimum(sizes[:documents], cfg.eval_seq_len)
        flops = flops_per_token(cfg, lengths, True)
        learned = cfg.global_ttt_epochs * len(tokens) / scorer.world.size
        scorer.work.add(flops, "train", learned, 0)
        self.phases_done += 1
        self.log(f"{name} end t:{self.eta.elapsed:.1f}s")


# ==================================================================================================
# KERNELS - faster forms of the definitions, each held to its own by a test; no section but MAIN needs it.
# ==================================================================================================

# An appendix: without it the definitions run, on any device. This cuts it off:
#     sed '/^# KERNELS - /,/^# MAIN - /{/^# MAIN - /!d;}' train_gpt.py > short.py
try:  # without Triton no kernel can be asked for
    import triton
    import triton.language as tl
    from triton.language import constexpr
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = None


def operator(fake, backward=None):
    """Register a function as one node of compiled graphs: fake(*args) makes tensors of its results' shapes.

    backward(*gradients of the results, *tensors among the arguments) -> gradients of the first arguments; the
    others have none.
    """

    def register(body):
        op = torch.library.custom_op(f"train_gpt::{body.__name__}", body, mutates_args=())
        op.register_fake(fake)

        def save(ctx, inputs, output):
            ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
            ctx.inputs = len(inputs)

        def differentiate(ctx, *grads):
            found = backward(*grads, *ctx.saved_tensors)
            return *found, *[None] * (ctx.inputs - len(found))

        if backward is not None:
            op.register_autograd(differentiate, setup_context=save)
        return op

    return register


def with_saved_results(op, backward) -> None:
    """Give op(q, k, v, cu_seqlens, n) -> (out, lse) its gradients.

    backward(grad, q, k, v, out, lse, cu_seqlens, n) -> those of q, k and v.
    """

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], *output, inputs[3])
        ctx.n = inputs[4]

    def differentiate(ctx, grad, _):
        grads = backward(grad.contiguous(), *ctx.saved_tensors, ctx.n)
        return *grads, None, None

    op.register_autograd(differentiate, setup_context=save)


# Attentions of packed rows: each takes what `document_attention_reference` takes and computes the same.
# On a CPU the segments go one by one through torch's flash kernel. A registered operator keeps that loop,
# whose trip count depends on data, out of the compiler's sight, and its backward reuses the saved
# log-sum-exp.
def each_segment(cu_seqlens: Tensor, window: int, *tensors: Tensor):
    """Walk over the segments: where each lies, its mask, its (1, heads, n, d) of tensors (T, heads, d)."""
    for start, end in pairwise(cu_seqlens.tolist()):
        if end > start:
            span = slice(start, end)
            mask = window_mask(end - start, window, tensors[0])
            yield span, mask, [t[span].transpose(0, 1)[None] for t in tensors]


def empty_out_lse(q: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """Make the results of a CPU's attention, without their values: outputs (T, H, d), log-sum-exps (H, T)."""
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def empty_qkv(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    """Make the gradients of q, k and v, without their values."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@operator(empty_out_lse)
def _document_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = empty_out_lse(q)
    for span, mask, heads in each_segment(cu_seqlens, window, q, k, v):
        part, part_lse = flash(*heads, 0.0, mask is None, attn_mask=mask)
        out[span] = part[0].transpose(0, 1)
        lse[:, span] = part_lse[0]
    return out, lse


@operator(empty_qkv)
def _document_attention_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = empty_qkv(grad, q, k, v)
    for span, mask, heads in each_segment(cu_seqlens, window, grad, q, k, v, out):
        part_lse = lse[:, span].contiguous()[None]
        parts = flash_backward(*heads, part_lse, 0.0, mask is None, attn_mask=mask)
        for whole, part in zip(grads, parts, strict=True):
            whole[span] = part[0].transpose(0, 1)
    return grads


with_saved_results(_document_attention_cpu, _document_attention_cpu_backward)


def document_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int = 0
) -> Tensor:
    """Attend on a CPU: one graph node, no recomputation. The kernel wants as many k/v heads as queries."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (k, v))
    return _document_attention_cpu(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, window)[0]


def varlen_attention():
    """Make an attention of torch's variable-length flash attention (CUDA, half precision).

    What this version of torch accepts is looked up here, once, and not inside the compiled graph.
    """
    from torch.nn.attention.varlen import varlen_attn

    options = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True  # a check, no other kernel

    def document_attention_varlen(q, k, v, cu_seqlens, max_len, window=0):
        bounds = (cu_seqlens, cu_seqlens, max_len, max_len)
        return varlen_attn(q, k, v, *bounds, window_size=(window - 1, 0), **options)

    return document_attention_varlen


def empty_cudnn(q: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """Make the results of cuDNN's attention, without values: outputs (T, H, d) and log-sum-exps (T, H, 1)."""
    return torch.empty_like(q), q.new_empty(*q.shape[:2], 1, dtype=torch.float32)


@operator(empty_cudnn)
def _document_attention_cudnn(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int
) -> tuple[Tensor, Tensor]:
    bounds = (cu_seqlens, cu_seqlens, max_len, max_len)
    out, lse, *_ = torch.ops.aten._cudnn_attention_forward(q, k, v, None, *bounds, True, 0.0, True)
    return out, lse.view(*q.shape[:2], 1)


@operator(empty_qkv)
def _document_attention_cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    seed = cu_seqlens.new_zeros((), dtype=torch.int64)  # of no dropout
    saved = (q, k, v, out, lse, seed, seed, None)
    bounds = (cu_seqlens, cu_seqlens, max_len, max_len)
    return torch.ops.aten._cudnn_attention_backward(grad, *saved, *bounds, 0.0, True)


with_saved_results(_document_attention_cudnn, _document_attention_cudnn_backward)


def cudnn_attention():
    """Make an attention of torch's cuDNN kernels for packed rows.

    They know no window, so `varlen_attention` does those.
    """
    windowed = varlen_attention()

    def document_attention_cudnn(q, k, v, cu_seqlens, max_len, window=0):
        if 0 < window < max_len:
            return windowed(q, k, v, cu_seqlens, max_len, window)
        heads = (t.contiguous() for t in (q, k, v))
        return _document_attention_cudnn(*heads, cu_seqlens, max_len)[0]

    return document_attention_cudnn


def flash_attention(module: str, unlimited: int | None):
    """Make an attention of the FlashAttention package with `module`; unlimited: its word for no window."""
    flash = importlib.import_module(module).flash_attn_varlen_func

    def document_attention_flash(q, k, v, cu_seqlens, max_len, window=0):
        bounds = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
        longest = dict(max_seqlen_q=max_len, max_seqlen_k=max_len)
        before = window - 1 if window else unlimited
        out = flash(q, k, v, **bounds, **longest, causal=True, window_size=(before, 0))
        return out[0] if isinstance(out, tuple) else out

    return document_attention_flash


def flex_attention():
    """Make an attention of FlexAttention, which compiles a kernel for the mask and skips hidden blocks."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention as flex

    flex = torch.compile(flex, dynamic=False)

    def block_mask(cu_seqlens, tokens, window):
        """Find the blocks of keys that each block of queries needs.

        What a query sees starts at its document or at its window and ends at itself, and both starts only
        grow: a block needs those from the start of its first query to itself.
        """
        n = len(tokens)
        side = 128
        first = cu_seqlens[torch.searchsorted(cu_seqlens, tokens, right=True) - 1]
        if window:
            first = torch.maximum(first, tokens - window + 1)

        blocks = tokens[: -(-n // side)]
        lowest = first[::side] // side
        counts = (blocks - lowest + 1).int()  # of each row of `needed`, so many count
        needed = torch.minimum(lowest[:, None] + blocks, blocks[-1]).int()

        def visible(batch, head, query, key):
            return (key <= query) & (key >= first[query])

        return BlockMask.from_kv_blocks(
            counts[None, None], needed[None, None], BLOCK_SIZE=side, mask_mod=visible, seq_lengths=(n, n))

    def document_attention_flex(q, k, v, cu_seqlens, max_len, window=0):
        mask = block_mask(cu_seqlens, torch.arange(len(q), device=q.device), window)
        heads = (t.transpose(0, 1)[None] for t in (q, k, v))
        return flex(*heads, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return document_attention_flex


# name: (how to get it, lowest and highest compute capability, its module). In half precision only.
ATTENTION_BACKENDS = {
    "fa3": (partial(flash_attention, "flash_attn_interface", -1), (9, 0), (9, 0), "flash_attn_interface"),
    "fa4": (partial(flash_attention, "flash_attn.cute", None), (9, 0), (12, 9), "flash_attn.cute"),
    "cudnn": (cudnn_attention, (9, 0), (99, 0), "torch.nn.attention.varlen"),
    "varlen": (varlen_attention, (8, 0), (99, 0), "torch.nn.attention.varlen"),
    "flex": (flex_attention, (7, 5), (99, 0), "torch.nn.attention.flex_attention"),
}


def module_exists(name: str) -> bool:
    """Say whether `import name` would find something; importing nothing but its parents."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def attention_backends(world: World) -> dict[str, Any]:
    """Collect the attentions of this device and installation, the definition, a loop of SDPA, last."""
    if world.device.type == "cpu":
        return dict(cpu=document_attention_cpu, sdpa=document_attention_reference)

    found = {}
    if world.device.type == "cuda" and world.dtype in (torch.bfloat16, torch.float16):
        capability = torch.cuda.get_device_capability(world.device)
        for name, (make, low, high, module) in ATTENTION_BACKENDS.items():
            if low <= capability <= high and module_exists(module):
                found[name] = make()

    return dict(**found, sdpa=document_attention_reference)


@torch.enable_grad()
def attention_trial(attend, world: World, lengths: list[int]) -> tuple[float, float]:
    """Run forward and backward on random packed documents of these lengths.

    -> (relative error against the definition in fp32, seconds)
    """
    generator = torch.Generator().manual_seed(0)

    def random_heads(heads: int) -> Tensor:
        return torch.randn(sum(lengths), heads, 64, generator=generator).to(world.device, world.dtype)

    q, k, v, direction = map(random_heads, (8, 4, 4, 8))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(world.device)

    def run(f, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = f(*inputs, bounds, max(lengths))
        return [out, *torch.autograd.grad(out, inputs, direction.to(dtype))]

    ours = run(attend, world.dtype)
    exact = run(document_attention_reference, torch.float32)
    pairs = zip(ours, exact, strict=True)
    errors = [(a.float() - b).norm() / b.norm() for a, b in pairs]
    seconds = quickest(world, partial(run, attend, world.dtype), 1)
    return torch.stack(errors).max().item(), seconds


def try_attention(attend, world: World) -> tuple[str, float]:
    """Run `attention_trial` on a row of documents, padded as real ones are.

    -> (what is wrong, blank if nothing; seconds)
    """
    lengths = [1500, 800, 2048, 100, 3072, 672] * 4 + [0, 0]
    if world.device.type == "cpu":
        lengths = [5, 130, 1, 377, 0]

    try:
        error, seconds = attention_trial(attend, world, lengths)
    except (RuntimeError, TypeError, AttributeError) as e:  # not for this device, or torch has changed
        return f"does not run on this machine: {(str(e) or repr(e)).splitlines()[0]}", math.inf

    right = error < 0.02  # bf16 rounds
    fault = "" if right else f"is wrong on this machine: relative error {error:.3g} against the definition"
    return fault, seconds


@cache
def choose_attention(wanted: str, world: World) -> tuple[str, Any, str]:
    """Choose an attention; auto: the fastest that is right, on a row of documents, by rank 0's clock.

    -> (name, function, how the choice was made). Raises RunError when the wanted one is missing or wrong.
    """
    found = attention_backends(world)
    if wanted not in ("auto", *found):
        raise RunError(f"ATTN_BACKEND={wanted} can not be had here: {world.device} in {world.dtype} has "
                       f"{', '.join(found)}; install what is missing, or set ATTN_BACKEND=auto")

    times, trial_texts = {}, []
    for name in found if wanted == "auto" else (wanted,):
        if name in ("flex", "sdpa") and times:
            break  # minutes of compiling, a loop on the host: only for want of anything else

        fault, seconds = try_attention(found[name], world)
        if not fault:
            times[name] = seconds
            trial_texts.append(f"{name}:{1e3 * seconds:.2f}ms")
        elif name in (wanted, "sdpa"):
            raise RunError(f"ATTN_BACKEND={' '.join([*trial_texts, name])} {fault}; take another")
        else:
            trial_texts.append(f"{name} {fault},")

    best = world.from_main(min(times, key=times.get))
    return best, found[best], " ".join(trial_texts)


# Triton kernels, each behind an operator with the definition's gradients. Tensors are read once and written
# once; sums are fp32; a store rounds to the type of its tensor. Under Triton's interpreter they run on a CPU,
# where products must be widened by hand: it multiplies the bits of bf16.
jit = triton.jit if triton else lambda kernel: kernel  # without Triton no kernel is ever called
INTERPRETED = bool(triton and triton.knobs.runtime.interpret)


@jit
def load_fp32(pointers, inside):
    """Read numbers as fp32, and zeros where `inside` is false."""
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@jit
def sign_in_lsb(post, negative):
    """Round post >= 0 to the nearest bf16 whose last bit says if its input was negative; ties go down."""
    bits = post.to(tl.int32, bitcast=True)
    odd = negative.to(tl.int32) << 16
    nearest = ((tl.maximum(bits - odd + 65535, 0) >> 17) << 17) + odd
    return (nearest >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@jit
def mlp_epilogue(acc, out, saved, m, n, slope, FORM: constexpr, BACKWARD: constexpr):
    """Finish half a tile of products: activate and store it, or multiply it by the derivative."""
    kept = saved.load([m, n]) if BACKWARD else acc.to(tl.bfloat16)
    pre = kept.to(tl.float32)
    derivative = tl.where(pre > 0, 2 * pre, 2 * slope * slope * pre)
    if BACKWARD:
        if FORM == "lsb":
            root = 2 * tl.sqrt(pre)
            negative = (kept.to(tl.int16, bitcast=True) & 1) == 1
            derivative = tl.where(negative, -slope * root, root)
        elif FORM == "act_grad":
            derivative = pre
        out.store([m, n], (acc * derivative).to(tl.bfloat16))
    else:
        post = 0.5 * derivative * pre
        if FORM == "lsb":
            out.store([m, n], sign_in_lsb(post, pre <= 0))
        else:
            out.store([m, n], post.to(tl.bfloat16))
            saved.store([m, n], (pre if FORM == "pre_post" else derivative).to(tl.bfloat16))


@jit
def mlp_kernel(
    a, b, out, saved, M, N, K, slope,
    BM: constexpr, BN: constexpr, BK: constexpr, FORM: constexpr,
    BACKWARD: constexpr, PROGRAMS: constexpr, WIDEN: constexpr,
):
    """Multiply a (M, K) by b, (N, K) forward and (K, N) backward, and end in `mlp_epilogue`.

    A persistent GEMM over TMA descriptors.
    """
    tiles_n = tl.cdiv(N, BN)
    tiles = tl.cdiv(M, BM) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        m = (tile // tiles_n) * BM
        n = (tile % tiles_n) * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            left = a.load([m, k])
            if BACKWARD:
                right = b.load([k, n])
            else:
                right = b.load([n, k]).T
            if WIDEN:
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            acc = tl.dot(left, right, acc)
        # Halves of the columns one after the other: half the shared memory, and the arithmetic of one hides
        # the store of the other.
        halves = tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1))
        first, second = tl.split(halves)
        mlp_epilogue(first, out, saved, m, n, slope, FORM, BACKWARD)
        mlp_epilogue(second, out, saved, m, n + BN // 2, slope, FORM, BACKWARD)


# By major compute capability: BM, BN, BK, stages forward and backward. 12 has 99 KB of shared memory.
MLP_TILES = {
    9: (256, 128, 64, (4, 3)),
    10: (256, 128, 64, (4, 3)),
    12: (128, 128, 64, (3, 2)),
}


def mlp_tiles(device: torch.device) -> tuple[tuple, int]:
    """Look up (an entry of MLP_TILES, how many programs run at once); the interpreter's are small."""
    if device.type != "cuda":
        return (32, 32, 16, (1, 1)), 3
    properties = torch.cuda.get_device_properties(device)
    return MLP_TILES[properties.major], properties.multi_processor_count


def launch_mlp(
    a: Tensor, b: Tensor, slope: float, form: str, saved: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch `mlp_kernel`. Forward, without `saved`: -> (leaky_relu(a b^T)^2, what the backward needs).

    Backward: -> (a b times the derivative, saved).
    """
    backward = saved is not None
    a = a.contiguous()
    b = b.contiguous()
    M, K = a.shape
    N = b.shape[1] if backward else b.shape[0]
    out = a.new_empty(M, N)
    if saved is None:
        saved = out if form == "lsb" else torch.empty_like(out)

    (BM, BN, BK, stages), programs = mlp_tiles(a.device)
    programs = min(programs, triton.cdiv(M, BM) * triton.cdiv(N, BN))
    describe = TensorDescriptor.from_tensor
    half_tile = [BM, BN // 2]
    tensors = (
        describe(a, [BM, BK]),
        describe(b, [BK, BN] if backward else [BN, BK]),
        describe(out, half_tile),
        describe(saved, half_tile),
    )
    constants = (BM, BN, BK, form, backward, programs, INTERPRETED)
    mlp_kernel[(programs,)](*tensors, M, N, K, slope, *constants, num_warps=8, num_stages=stages[backward])
    return out, saved


def mlp_up_shapes(x: Tensor, up: Tensor, slope: float, form: str) -> tuple[Tensor, Tensor]:
    """Make the results of `mlp_up`, without their values."""
    hidden = x.new_empty(x.shape[0], up.shape[0])
    return hidden, x.new_empty(0) if form == "lsb" else torch.empty_like(hidden)


@operator(mlp_up_shapes)
def mlp_up(x: Tensor, up: Tensor, slope: float, form: str) -> tuple[Tensor, Tensor]:
    """Compute the hidden layer (R, F) of x (R, D), and what the backward needs besides: for lsb nothing."""
    hidden, kept = launch_mlp(x, up, slope, form)
    return hidden, x.new_empty(0) if form == "lsb" else kept


# The backward of the act_grad form once more, with CUTLASS (PR #1105): a persistent GEMM over TMA and wgmma,
# its epilogue multiplies fp32 sums by the stored derivative. No torch in it, so that one build serves every
# version. A C operand is declared, never loaded.
CUTLASS_SOURCE = r"""
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

namespace ep = cutlass::epilogue;
using cute::_1, cute::_64, cute::_128, cute::_256;
using bf16 = cutlass::bfloat16_t;
using Row = cutlass::layout::RowMajor;
using TensorOp = cutlass::arch::OpClassTensorOp;
using Tile = cute::Shape<_128, _256, _64>;
using Cluster = cute::Shape<_1, _1, _1>;
using Auto = ep::collective::EpilogueTileAuto;
using Schedule = ep::TmaWarpSpecializedCooperative;
using Layout = ep::collective::detail::EpilogueDescriptor<Tile, Auto, bf16, bf16, Schedule>;
using Aux = ep::collective::detail::AuxLoadDescriptor<Layout, Row, bf16>;
using Stored = ep::fusion::Sm90AuxLoad<
    Aux::Stages, Aux::EpilogueTile, bf16, Aux::Stride, Aux::SmemLayoutAtom, Aux::CopyOpS2R>;
using Multiply = ep::fusion::Sm90Compute<
    cutlass::multiplies, bf16, float, cutlass::FloatRoundStyle::round_to_nearest>;
using Tree = ep::fusion::Sm90EVT<Multiply, ep::fusion::Sm90AccFetch, Stored>;
using Epilogue = ep::collective::CollectiveBuilder<
    cutlass::arch::Sm90, TensorOp, Tile, Cluster, Auto, float, float,
    bf16, Row, 8, bf16, Row, 8, Schedule, Tree>::CollectiveOp;
using Mainloop = cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, TensorOp, bf16, Row, 8, bf16, Row, 8, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<sizeof(Epilogue::SharedStorage)>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
extern "C" const int mlp_grad_shared_bytes = Kernel::SharedStorageSize;

// out (m, n) = grad (m, k) down (k, n) * stored (m, n). Null or what went wrong; without `out`, only
// the sizes are looked at.
extern "C" const char* mlp_grad(
    bf16* grad, bf16* down, bf16* stored, bf16* out, int m, int n, int k, int device, cudaStream_t stream) {
  Kernel::StrideD rows{n, _1{}, 0};
  Gemm::Arguments problem{cutlass::gemm::GemmUniversalMode::kGemm, {m, n, k, 1},
                          {grad, {k, _1{}, 0}, down, {_1{}, n, 0}},
                          {{{}, {stored, bf16(0), rows}, {}}, out, rows, out, rows}, {device}};
  cutlass::Status status = Gemm::can_implement(problem);
  uintptr_t addresses = uintptr_t(grad) | uintptr_t(down) | uintptr_t(stored) | uintptr_t(out);
  if (addresses % 16) status = cutlass::Status::kErrorMisalignedOperand;
  if (out && status == cutlass::Status::kSuccess) {
    if (cudaError_t error = cudaSetDevice(device)) return cudaGetErrorString(error);
    status = Gemm()(problem, nullptr, stream);
  }
  return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
}
"""
NVCC_FLAGS = (
    "-std=c++17", "-O3", "--use_fast_math", "--expt-relaxed-constexpr", "-DNDEBUG",
    "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler=-fPIC", "-cudart=static",
)


def cutlass_version(cfg: Config) -> Path | None:
    """Find CUTLASS's version.h: in the folder CUTLASS_PATH if that is set, else in the Python package."""
    package = importlib.util.find_spec("cutlass_library")
    root = cfg.cutlass_path
    if package and not root:
        root = Path(package.origin).parent / "source"
    version = Path(root, "include", "cutlass", "version.h")
    return version if root and version.is_file() else None


def compile_cutlass(nvcc: str, include: Path) -> bytes:
    """Compile CUTLASS_SOURCE to a library with the headers in `include`. Raises RunError where nvcc fails."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "mlp_grad.cu")
        library = Path(folder, "mlp_grad.so")
        source.write_text(CUTLASS_SOURCE)
        command = [nvcc, *NVCC_FLAGS, f"-I{include}", "-o", library, source]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            complaint = (done.stdout + done.stderr)[-2000:].strip()
            raise RunError(f"MLP_BACKWARD=cutlass: {nvcc} failed with the headers in {include}; take other "
                           f"versions, or set MLP_BACKWARD=triton. It said:\n{complaint}")
        return library.read_bytes()


def build_cutlass(cfg: Config) -> str:
    """Find the compiled CUTLASS_SOURCE in COMPILE_CACHE_DIR or torch's cache folder, or make it there.

    That takes a minute. Where there is no compiler or no CUTLASS, any build of this source will do. -> its
    path. Raises RunError.
    """

    def digest(*parts: str) -> str:
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    version = cutlass_version(cfg)
    missing = []
    if not nvcc:
        missing.append("nvcc (a CUDA toolkit with its bin/ on PATH; 13.0 is known to do)")
    if not version:
        missing.append("CUTLASS (pip install --no-deps nvidia-cutlass==4.2.0.0, or its folder as "
                       f"CUTLASS_PATH, now {cfg.cutlass_path!r})")

    tools = "*"
    if not missing:
        compiler = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        tools = digest(compiler, version.read_text())
    name = f"mlp_grad-{digest(CUTLASS_SOURCE, *NVCC_FLAGS, platform.machine())}-{tools}.so"

    folder = Path(cfg.compile_cache_dir or Path(torch.hub.get_dir()).parent).resolve()
    builds = sorted(folder.glob(name))
    if builds:
        return str(builds[-1])
    if missing:
        raise RunError(f"MLP_BACKWARD=cutlass compiles a kernel at its first use, and {folder} has no "
                       f"{name}. Missing to make it: {'; '.join(missing)}. Install that, or set "
                       "MLP_BACKWARD=triton")

    write_atomic(folder / name, compile_cutlass(nvcc, version.parents[1]))
    return str(folder / name)


@cache
def cutlass_library(cfg: Config, world: World) -> str:
    """Run `build_cutlass` on the first rank of each machine, then on the others, which find it done.

    Raises RunError on all ranks if on one.
    """
    path = failure = ""
    first = not world.device.index
    for my_turn in (first, not first):
        try:
            path = build_cutlass(cfg) if my_turn else path
        except RunError as e:
            failure = str(e)

        failures = [text for text in world.gather(failure) if text]
        if failures:
            raise RunError(failures[0])
    return path


@cache
def cutlass_entry(library: str):
    """Load the function `mlp_grad` of a library from `build_cutlass`."""
    entry = ctypes.CDLL(library).mlp_grad
    entry.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int] * 4 + [ctypes.c_void_p]
    entry.restype = ctypes.c_char_p
    return entry


def launch_cutlass(grad: Tensor, down: Tensor, stored: Tensor, library: str) -> Tensor:
    """Compute (grad down) * stored, rounded once. Raises RunError where CUTLASS or CUDA refuses."""
    grad, down, stored = (t.contiguous() for t in (grad, down, stored))
    out = torch.empty_like(stored)
    pointers = [t.data_ptr() for t in (grad, down, stored, out)]
    stream = torch.cuda.current_stream(grad.device).cuda_stream
    problem = cutlass_entry(library)(*pointers, *out.shape, grad.shape[1], grad.device.index, stream)
    if problem:
        sizes = f"{tuple(grad.shape)} times {tuple(down.shape)} on {grad.device}"
        raise RunError(f"MLP_BACKWARD=cutlass: {sizes}: {problem.decode()}")
    return out


def mlp_up_grad_shape(grad: Tensor, down: Tensor, *rest) -> Tensor:
    """Make the result of `mlp_up_grad`, without its values."""
    return grad.new_empty(grad.shape[0], down.shape[1])


@operator(mlp_up_grad_shape)
def mlp_up_grad(grad: Tensor, down: Tensor, saved: Tensor, slope: float, form: str, library: str) -> Tensor:
    """Compute the gradient (R, F) of the up projection's output from that of the MLP's, grad (R, D).

    By a library from `build_cutlass`, or by Triton where its name is blank.
    """
    if library:
        return launch_cutlass(grad, down, saved, library)
    return launch_mlp(grad, down, slope, form, saved)[0]


class FusedMlp(torch.autograd.Function):
    """Compute `leaky_mlp` with the activation in the GEMMs; the form is what is stored besides its output.

    pre_post: the input of the activation (PR #1530); act_grad: its derivative, since f = f' x / 2 (PR #1105);
    lsb: nothing, the sign goes into the last bit of the output and the magnitude comes back by a square root.
    """

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor, slope: float, form: str, library: str) -> Tensor:
        rows = x.flatten(0, -2)
        hidden, kept = mlp_up(rows, up, slope, form)
        ctx.save_for_backward(rows, up, down, hidden, kept)
        ctx.options = (slope, form, library)
        ctx.shape = x.shape
        return F.linear(hidden, down).view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, up, down, hidden, kept = ctx.saved_tensors
        slope, form, library = ctx.options
        need_x, need_up, need_down, *_ = ctx.needs_input_grad
        grad = grad.reshape(rows.shape)
        stored = hidden if form == "lsb" else kept
        d_hidden = mlp_up_grad(grad, down, stored, slope, form, library)
        dx = (d_hidden @ up).view(ctx.shape) if need_x else None
        d_up = d_hidden.T @ rows if need_up else None
        d_down = grad.T @ hidden if need_down else None
        return dx, d_up, d_down, None, None, None


def fused_mlp(form: str, library: str = ""):
    """Make `leaky_mlp` of `FusedMlp` in one of its forms; library: see `mlp_up_grad`."""

    def mlp(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
        return FusedMlp.apply(x, up, down, slope, form, library)

    return mlp


# In the kernels on heads a program has BT rows (tokens) and D channels of a head, padded to BD, a power of
# two.
@jit
def rotation(cos, sin, position, channel, HALF: constexpr):
    """Look up a channel's partner and the factors of both: y[channel] = x[channel] own + x[partner] other."""
    turns = (channel < 2 * HALF)[None, :]
    offsets = position[:, None] * HALF + (channel % HALF)[None, :]
    own = tl.load(cos + offsets, mask=turns, other=1.0)
    other = tl.load(sin + offsets, mask=turns, other=0.0)
    other = tl.where((channel < HALF)[None, :], other, -other)
    below = tl.where(channel < 2 * HALF, channel - HALF, channel)
    return own, other, tl.where(channel < HALF, channel + HALF, below)


@jit
def split_heads_kernel(
    qkv, gain, cos, sin, q, k, v, rows, length, eps,
    H: constexpr, G: constexpr, D: constexpr, HALF: constexpr, BT: constexpr, BD: constexpr,
):
    """Make BT rows of a query head, or of a key head and its value."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    channel = tl.arange(0, BD)
    inside = (row < rows)[:, None] & (channel < D)[None, :]
    row = row.to(tl.int64)
    own, other, partner = rotation(cos, sin, row % length, channel, HALF)

    source = qkv + row[:, None] * ((H + 2 * G) * D) + head * D
    x = load_fp32(source + channel[None, :], inside)
    swapped = load_fp32(source + partner[None, :], inside)
    inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    scale = inverse_rms * tl.load(gain + head, mask=head < H, other=1.0)
    turned = scale[:, None] * (x * own + swapped * other)

    if head < H:
        tl.store(q + (row[:, None] * H + head) * D + channel[None, :], turned, mask=inside)
    else:
        offsets = (row[:, None] * G + head - H) * D + channel[None, :]
        value = tl.load(source + G * D + channel[None, :], mask=inside, other=0.0)
        tl.store(k + offsets, turned, mask=inside)
        tl.store(v + offsets, value, mask=inside)


@jit
def split_heads_grad_kernel(
    dq, dk, dv, qkv, gain, cos, sin, dqkv, dgain, rows, length, eps,
    H: constexpr, G: constexpr, D: constexpr, HALF: constexpr, BT: constexpr, BD: constexpr,
):
    """Make BT rows of a head's gradient, and their part of its gain's.

    With y the normed head, d its gradient, turned back, and s = d.y: dx = gain / rms (d - y s / D) and
    dgain = sum of s.
    """
    head = tl.program_id(1)
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    channel = tl.arange(0, BD)
    inside = (row < rows)[:, None] & (channel < D)[None, :]
    row = row.to(tl.int64)
    own, other, partner = rotation(cos, sin, row % length, channel, HALF)

    offsets = row[:, None] * ((H + 2 * G) * D) + head * D + channel[None, :]
    if head < H:
        source = dq + (row[:, None] * H + head) * D
    else:
        kv_offsets = (row[:, None] * G + head - H) * D
        source = dk + kv_offsets
        value = tl.load(dv + kv_offsets + channel[None, :], mask=inside, other=0.0)
        tl.store(dqkv + offsets + G * D, value, mask=inside)

    d = load_fp32(source + channel[None, :], inside)
    swapped = load_fp32(source + partner[None, :], inside)
    d = d * own - swapped * other
    x = load_fp32(qkv + offsets, inside)
    inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    y = x * inverse_rms
    s = tl.sum(d * y, 1)
    scale = tl.load(gain + head, mask=head < H, other=1.0) * inverse_rms
    tl.store(dqkv + offsets, scale * (d - y * (s / D)[:, None]), mask=inside)
    tl.store(dgain + tl.program_id(0) * (H + G) + head, tl.sum(s, 0))


ROWS_PER_PROGRAM = 32  # BT


def split_launch(qkv: Tensor, cos: Tensor, H: int, G: int) -> tuple[tuple[int, int], dict]:
    """Compute the grid and the size arguments of the two kernels above."""
    rows = qkv.shape[:-1].numel()
    D = qkv.shape[-1] // (H + 2 * G)
    grid = (triton.cdiv(rows, ROWS_PER_PROGRAM), H + G)
    numbers = dict(rows=rows, length=qkv.shape[-2], eps=torch.finfo(qkv.dtype).eps)
    blocks = dict(BT=ROWS_PER_PROGRAM, BD=triton.next_power_of_2(D))
    return grid, dict(**numbers, H=H, G=G, D=D, HALF=cos.shape[-1], **blocks)


def empty_qkv_gain(dq, dk, dv, qkv: Tensor, gain: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """Make the results of `split_heads_grad`, without their values."""
    return torch.empty_like(qkv), torch.empty_like(gain)


@operator(empty_qkv_gain)
def split_heads_grad(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `split_heads` for qkv and gain."""
    H = len(gain)
    G = dk.shape[-2]
    dq, dk, dv, qkv = (t.contiguous() for t in (dq, dk, dv, qkv))
    grid, sizes = split_launch(qkv, cos, H, G)
    dqkv = torch.empty_like(qkv)
    dgain = gain.new_empty(grid[0], H + G, dtype=torch.float32)
    split_heads_grad_kernel[grid](dq, dk, dv, qkv, gain.float(), cos, sin, dqkv, dgain, **sizes)
    return dqkv, dgain[:, :H].sum(0).to(gain.dtype)


def empty_heads(qkv: Tensor, gain: Tensor, cos, sin, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make the results of `split_heads`, without their values."""
    heads = len(gain)
    D = qkv.shape[-1] // (heads + 2 * kv_heads)
    return tuple(qkv.new_empty(*qkv.shape[:-1], n, D) for n in (heads, kv_heads, kv_heads))


@operator(empty_heads, split_heads_grad)
def split_heads_op(
    qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `split_heads` by one kernel."""
    grid, sizes = split_launch(qkv, cos, len(gain), kv_heads)
    heads = empty_heads(qkv, gain, cos, sin, kv_heads)
    split_heads_kernel[grid](qkv.contiguous(), gain.float(), cos, sin, *heads, **sizes)
    return heads


@jit
def gate_heads_kernel(
    y, v, gate, out, rows,
    H: constexpr, G: constexpr, D: constexpr, BT: constexpr, BD: constexpr,
):
    """Make BT rows of all heads that share a value."""
    group = tl.program_id(1)
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    channel = tl.arange(0, BD)
    in_rows = row < rows
    inside = in_rows[:, None] & (channel < D)[None, :]
    row = row.to(tl.int64)

    own = load_fp32(v + (row[:, None] * G + group) * D + channel[None, :], inside)
    square = tl.maximum(tl.sum(own * own, 1), 1e-24)
    for j in range(H // G):
        head = group * (H // G) + j
        offsets = (row[:, None] * H + head) * D + channel[None, :]
        x = load_fp32(y + offsets, inside)
        passes = load_fp32(gate + row * H + head, in_rows)
        share = tl.sum(x * own, 1) / square
        tl.store(out + offsets, passes[:, None] * (x - share[:, None] * own), mask=inside)


@jit
def gate_heads_grad_kernel(
    dout, y, v, gate, dy, dv, dgate, rows,
    H: constexpr, G: constexpr, D: constexpr, BT: constexpr, BD: constexpr,
):
    """Make BT rows of the gradients of all heads that share a value, of that value and of their gates.

    With a = y.v / v.v, e = gate dout, b = e.v / v.v: dy = e - b v and dv = sum over heads of 2 a b v - a e -
    b y.
    """
    group = tl.program_id(1)
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    channel = tl.arange(0, BD)
    in_rows = row < rows
    inside = in_rows[:, None] & (channel < D)[None, :]
    row = row.to(tl.int64)

    v_offsets = (row[:, None] * G + group) * D + channel[None, :]
    own = load_fp32(v + v_offsets, inside)
    square = tl.maximum(tl.sum(own * own, 1), 1e-24)
    down = tl.zeros((BT, BD), tl.float32)
    for j in range(H // G):
        head = group * (H // G) + j
        offsets = (row[:, None] * H + head) * D + channel[None, :]
        x = load_fp32(y + offsets, inside)
        d = load_fp32(dout + offsets, inside)
        passes = load_fp32(gate + row * H + head, in_rows)
        a = (tl.sum(x * own, 1) / square)[:, None]
        tl.store(dgate + row * H + head, tl.sum(d * (x - a * own), 1), mask=in_rows)
        e = passes[:, None] * d
        b = (tl.sum(e * own, 1) / square)[:, None]
        tl.store(dy + offsets, e - b * own, mask=inside)
        down += 2 * a * b * own - a * e - b * x
    tl.store(dv + v_offsets, down, mask=inside)


def gate_launch(y: Tensor, v: Tensor) -> tuple[tuple[int, int], dict]:
    """Compute the grid and the size arguments of the two kernels above."""
    *batch, H, D = y.shape
    G = v.shape[-2]
    rows = math.prod(batch)
    grid = (triton.cdiv(rows, ROWS_PER_PROGRAM), G)
    return grid, dict(rows=rows, H=H, G=G, D=D, BT=ROWS_PER_PROGRAM, BD=triton.next_power_of_2(D))


def empty_gate_grads(dout: Tensor, y: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make the results of `gate_heads_grad`, without their values."""
    return tuple(x.new_empty(x.shape) for x in (y, v, gate))


@operator(empty_gate_grads)
def gate_heads_grad(dout: Tensor, y: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `gate_heads` for y, v and gate."""
    inputs = [x.contiguous() for x in (dout, y, v, gate)]
    grads = empty_gate_grads(*inputs)
    grid, sizes = gate_launch(y, v)
    gate_heads_grad_kernel[grid](*inputs, *grads, **sizes)
    return grads


def empty_gated(y: Tensor, *rest) -> Tensor:
    """Make the result of `gate_heads`, without its values."""
    return y.new_empty(y.shape)


@operator(empty_gated, gate_heads_grad)
def gate_heads_op(y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Compute `gate_heads` by one kernel."""
    grid, sizes = gate_launch(y, v)
    out = empty_gated(y)
    gate_heads_kernel[grid](y.contiguous(), v.contiguous(), gate.contiguous(), out, **sizes)
    return out


@jit
def ce_kernel(logits, targets, nats, slope, cap, V, BLOCK: constexpr):
    """Make one row in registers: its loss and the gradient of that. tanh(u) = 2 sigmoid(2 u) - 1."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    x = load_fp32(logits + row * V + c, c < V)
    s = tl.sigmoid(2 * x / cap)
    z = tl.where(c < V, cap * (2 * s - 1), float("-inf"))

    top = tl.max(z, 0)
    e = tl.exp(z - top)
    total = tl.sum(e, 0)
    hit = c == tl.load(targets + row)
    target_z = tl.sum(tl.where(hit, z, 0.0), 0)
    tl.store(nats + row, top + tl.log(total) - target_z)

    grad = (e / total - hit.to(tl.float32)) * 4 * s * (1 - s)
    tl.store(slope + row * V + c, grad, mask=c < V)


def empty_nats_slope(logits: Tensor, targets: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """Make the results of `ce_with_slope`, without their values."""
    return targets.new_empty(targets.shape, dtype=torch.float32), logits.new_empty(logits.shape)


@operator(empty_nats_slope)
def ce_with_slope(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Compute `softcapped_ce` of logits (T, V) and, from the same pass, the gradient of each row's result."""
    nats, slope = empty_nats_slope(logits, targets)
    logits = logits.contiguous()
    rows, V = logits.shape
    block = triton.next_power_of_2(V)
    ce_kernel[(rows,)](logits, targets.contiguous(), nats, slope, cap, V, BLOCK=block, num_warps=8)
    return nats, slope


class HeadCe(torch.autograd.Function):
    """Compute `softcapped_ce` of a linear head by one pass over the logits.

    What comes in backward scales rows of the narrow factors of the two products, not of the wide one. Left
    out, it would leave AOTAutograd without a backward that depends on the loss.
    """

    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, cap: float) -> Tensor:
        logits = F.linear(x, head).flatten(0, -2)
        nats, slope = ce_with_slope(logits, targets.flatten(), cap)
        ctx.save_for_backward(x, head, slope)
        return nats.view(targets.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, head, slope = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        dx = grad * (slope @ head).view(x.shape)
        scaled = (grad * x).to(x.dtype).flatten(0, -2)
        return dx.to(x.dtype), slope.T @ scaled, None, None


@jit
def adam_kernel(p, g, v, lr, keep, beta2, correction, eps, n, BLOCK: constexpr):
    """Step BLOCK numbers in place: weight decay (keep), second moment, step."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    grad = tl.load(g + offsets, mask=inside, other=0.0)
    before = tl.load(v + offsets, mask=inside, other=0.0)
    second = beta2 * before + (1 - beta2) * grad * grad
    tl.store(v + offsets, second, mask=inside)
    step = lr * grad / (correction * tl.sqrt(second) + eps)
    weight = tl.load(p + offsets, mask=inside, other=0.0)
    tl.store(p + offsets, keep * weight - step, mask=inside)


class FusedAdam(torch.optim.Optimizer):
    """Step as torch.optim.AdamW with beta1 = 0, for contiguous fp32 parameters.

    The gradient is its own first moment, so none is kept or read.
    """

    def __init__(self, parameters, lr: float, beta2: float, eps: float, weight_decay: float):
        super().__init__(parameters, dict(lr=lr, beta2=beta2, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr = group["lr"]
            beta2 = group["beta2"]
            group["step"] = group.get("step", 0) + 1
            keep = 1 - lr * group["weight_decay"]
            correction = (1 - beta2 ** group["step"]) ** -0.5

            for p in group["params"]:
                if p.grad is not None:
                    second = self.state[p].setdefault("second", torch.zeros_like(p))
                    n = p.numel()
                    numbers = (lr, keep, beta2, correction, group["eps"], n)
                    adam_kernel[(triton.cdiv(n, 1024),)](p, p.grad.contiguous(), second, *numbers, BLOCK=1024)


@jit
def nearest_on_way(a, way):
    """Find the integer k >= 0 nearest to a >= 0 on a way, 2 * state + parity, and its value, both fp32.

    Adding 1.5 * 2^23 rounds to even.
    """
    odd = way % 2
    other = way // 2 % 2
    r = (tl.minimum(a, 1e4) + (other - 2 * odd)) / 4 + 12582912.0 - 12582912.0
    k = 2 * tl.minimum(tl.maximum(r, 0.0), 63.0) + odd
    k = tl.where((other > odd) & (a < 1.5), 0.0, k)
    return k, 2 * k - tl.where(k > 0, other, 0)


@jit
def cost_by(way, cost, a):
    """Add to the cost of the states that the ways come from what the next number misses by on each."""
    miss = nearest_on_way(a, way)[1] - a
    return tl.gather(cost, way // 2, 0) + miss * miss


@jit
def viterbi_kernel(x, into, second, best_k, best_value, count, HEIGHT: constexpr, L: constexpr):
    """Find the paths of L segments of x (HEIGHT, count), a thread for each of their states if L is 4.

    second (HEIGHT, count) uint8: which of the two ways led into each state, a bit for each.
    """
    segment = tl.program_id(0) * L + tl.arange(0, L)
    inside = segment < count
    s = tl.arange(0, 8)
    zeros = tl.zeros((8, L), tl.int32)
    one = tl.load(into + 2 * s)[:, None] + zeros
    two = tl.load(into + 2 * s + 1)[:, None] + zeros
    start = tl.where(s == 0, 0.0, float("inf"))
    cost = start[:, None] + tl.zeros((8, L), tl.float32)

    for t in range(HEIGHT):
        a = tl.abs(tl.load(x + t * count + segment, mask=inside, other=0.0))[None, :]
        first_cost = cost_by(one, cost, a)
        second_cost = cost_by(two, cost, a)
        bits = tl.sum((second_cost < first_cost).to(tl.int32) << s[:, None], 0)
        tl.store(second + t * count + segment, bits.to(tl.uint8), mask=inside)
        cost = tl.minimum(first_cost, second_cost)

    state = tl.argmin(cost, 0)
    tl.debug_barrier()  # what other threads stored is read below
    for step in range(HEIGHT):
        offsets = (HEIGHT - 1 - step) * count + segment
        taken = tl.load(second + offsets, mask=inside, other=0).to(tl.int32) >> state & 1
        way = tl.load(into + 2 * state + taken)
        here = tl.load(x + offsets, mask=inside, other=0.0)
        k, value = nearest_on_way(tl.abs(here), way)
        tl.store(best_k + offsets, tl.where(here < 0, -k, k), mask=inside)
        tl.store(best_value + offsets, tl.where(here < 0, -value, value), mask=inside)
        state = way // 2


def fused_viterbi(x: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `viterbi` by one kernel instead of about 950, to the bit. into: TRELLIS_INTO, int32."""
    height, count = x.shape
    second = torch.empty_like(x, dtype=torch.uint8)
    k = torch.empty_like(x)
    value = torch.empty_like(x)
    grid = (triton.cdiv(count, 4),)
    viterbi_kernel[grid](x, into, second, k, value, count, height, 4, num_warps=1, enable_fp_fusion=False)
    return k, value


@cache
def choose_viterbi(device: torch.device):
    """Choose on a GPU the kernel, if it finds there what the definition finds; else the definition."""
    if not triton or device.type != "cuda":
        return viterbi
    x = 20 * torch.randn(TRELLIS_SEGMENT, 100, generator=torch.Generator().manual_seed(0)).to(device)
    fused = partial(fused_viterbi, into=TRELLIS_INTO.to(device, torch.int32))
    same = all(torch.equal(a, b) for a, b in zip(fused(x), viterbi(x), strict=True))
    return fused if same else viterbi


def checked_viterbi(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `viterbi` by what `choose_viterbi` takes for this device, looked up at the first call."""
    return choose_viterbi(x.device)(x)


# The variable that asks for it: what takes the place of a definition. MLP_KERNEL, which has forms, is no row.
TRITON_KERNELS = {
    "qk_kernel": dict(split_heads=split_heads_op),
    "xsa_kernel": dict(gate_heads=gate_heads_op),
    "fused_ce_kernel": dict(head_ce=HeadCe.apply),
    "ttt_adam_kernel": dict(adam=FusedAdam),
}


def require_triton(cfg: Config, world: World) -> None:
    """Raise RunError where variables ask for kernels that this machine can not run."""
    knobs = ("mlp_kernel", *TRITON_KERNELS)
    wanted = [f"{name.upper()}={getattr(cfg, name)}" for name in knobs if getattr(cfg, name) != "eager"]
    on_gpu = world.device.type == "cuda"
    if wanted and not (triton and (on_gpu or INTERPRETED)):
        need = "needs" if len(wanted) == 1 else "need"
        raise RunError(f"{' '.join(wanted)} {need} Triton and an NVIDIA GPU, this is {world.device}; "
                       "set them to eager")


def choose_mlp(cfg: Config, world: World):
    """Make the MLP that MLP_KERNEL and MLP_BACKWARD ask for. Raises RunError where it can not run."""
    capability = None  # the interpreter's: it runs everything but CUTLASS
    if world.device.type == "cuda":
        capability = torch.cuda.get_device_capability(world.device)

    if world.dtype != torch.bfloat16 or (capability and capability[0] not in MLP_TILES):
        majors = ", ".join(map(str, MLP_TILES))
        raise RunError(f"MLP_KERNEL={cfg.mlp_kernel} needs bf16 activations and compute capability "
                       f"{majors}.x (TMA), not {world.dtype} on {capability}; set MLP_KERNEL=eager")
    if cfg.mlp_backward != "cutlass":
        return fused_mlp(cfg.mlp_kernel)

    if not capability or capability[0] != 9:
        raise RunError("MLP_BACKWARD=cutlass is made for compute capability 9.0 (Hopper), "
                       f"not {capability}; set MLP_BACKWARD=triton")
    library = cutlass_library(cfg, world)
    no_pointers = [None] * 4  # only the sizes are looked at
    problem = cutlass_entry(library)(*no_pointers, 1, cfg.mlp_dim, cfg.model_dim, 0, None)
    if problem:
        raise RunError(f"MLP_BACKWARD=cutlass needs multiples of 8, not {cfg.model_dim} (MODEL_DIM), "
                       f"{cfg.mlp_dim}: {problem.decode()}")
    return fused_mlp(cfg.mlp_kernel, library)


def choose_kernels(cfg: Config, world: World) -> Kernels:
    """Choose the attention of this device, and the kernels that *_KERNEL ask for.

    Raises RunError where they can not run.
    """
    require_triton(cfg, world)
    fused = dict(viterbi=checked_viterbi)
    if cfg.mlp_kernel != "eager":
        fused["mlp"] = choose_mlp(cfg, world)
    for knob, kernel in TRITON_KERNELS.items():
        if getattr(cfg, knob) != "eager":
            fused |= kernel

    name, attend, _ = choose_attention(cfg.attn_backend, world)
    if cfg.cuda_graphs and name == "sdpa":
        raise RunError("CUDA_GRAPHS=1 needs an attention that does not loop on the host, and here is only "
                       "sdpa; set CUDA_GRAPHS=0")
    return DEFINITIONS._replace(attend=attend, **fused)


# ==================================================================================================
# MAIN - the stages of a run. The artifact's bytes on disk are the only bridge from training to scoring.
# ==================================================================================================

def pick_kernels(cfg: Config, world: World) -> tuple[Kernels, str]:
    """Choose the kernels of this run; a script without KERNELS has the definitions.

    -> (kernels, the attention's name and how it was chosen). Raises RunError where a variable asks such a
    script for a kernel.
    """
    if "choose_kernels" in globals():
        kernels = choose_kernels(cfg, world)
        name, _, trials = choose_attention(cfg.attn_backend, world)
        return kernels, f"{name} ({trials})"

    knobs = [f.name for f in fields(cfg) if f.name.endswith("_kernel") or f.name == "attn_backend"]
    values = {name.upper(): getattr(cfg, name) for name in knobs}
    wanted = [f"{name}={value}" for name, value in values.items() if value not in ("eager", "auto", "sdpa")]
    if cfg.cuda_graphs:
        wanted.append("CUDA_GRAPHS=1")
    if wanted:
        raise RunError(f"{' '.join(wanted)}: no kernels in this script, its section KERNELS was cut off; "
                       "take the whole script, or set *_KERNEL=eager, ATTN_BACKEND=auto and CUDA_GRAPHS=0")
    return DEFINITIONS, "sdpa (KERNELS was cut off)"


class Note(NamedTuple):
    """Say where facts of one kind are kept."""

    log: str              # lines, formatted with the facts
    result: dict          # key of result.json, formatted with the facts -> fact
    ledger: bool = False  # whether all of them stand in a line of their kind


NOTES = dict(
    data=Note(
        "train_shards: {train_shards}\nval_tokens: {val_tokens}",
        dict(val_tokens="val_tokens", docs_val="docs_val")),
    trained=Note(
        "peak memory allocated: {allocated} MiB reserved: {reserved} MiB",
        dict(steps="steps", train_seconds="seconds", train_tokens="tokens", step_avg_ms="step_ms",
             loss_curve="losses", mfu="mfu")),
    calibrated=Note("GPTQ:collected {count} Hessians in {seconds:.1f}s", dict(calib_seconds="budgeted")),
    scored=Note(
        "{name} val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{milliseconds:.0f}ms",
        {"{key}_val_loss": "loss", "{key}_val_bpb": "bpb", "{key}_mfu": "mfu",
         "val_loss": "loss", "val_bpb": "bpb", "target_tokens": "tokens", "val_bytes": "bytes"}),
    artifact=Note(
        "Code size (uncompressed): {code_bytes} bytes\n"
        "Serialized model {form}: {bytes} bytes\n"
        "Total submission size {form}: {total} bytes",
        dict(artifact_file="file", artifact_bytes="bytes", artifact_sha256="sha256", bytes_by_part="parts",
             code_bytes="code_bytes", code_sha256="code_sha256", bytes_total="total", over_cap="over_cap"),
        ledger=True),
)


def state_hash(*states: Any) -> str:
    """Hash nested states, blake2b-128 in hex: every tensor's bytes, every other value as text."""
    h = hashlib.blake2b(digest_size=16)
    for x in torch.utils._pytree.tree_leaves(states):
        if isinstance(x, Tensor):
            h.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            h.update(repr(x).encode())
    return h.hexdigest()


class Run:
    """Hold what stages share: configuration, ranks, files, log, ledger, clock and the numbers so far."""

    def __init__(self, cfg: Config, world: World, out: Path):
        self.cfg = cfg
        self.world = world
        self.out = out
        self.id = cfg.run_id or out.name
        self.checkpoint = out / "checkpoint.pt"
        self.weights = out / "final_model.pt"
        self.artifact = out / "final_model.int6.ptz"
        self.log = Log(out / f"{self.id}.txt" if world.main else None)
        self.ledger = Ledger(out / "ledger.jsonl" if world.main else None)
        self.clock = Clock(world, self.note_phase)
        if cfg.stage not in ("train", "warm"):
            require_coders(cfg.compressor)  # before an hour of training, not after

        self.files = Dataset.open(cfg, need_train=cfg.stage != "eval")
        self.data = ValData.load(cfg, self.files)
        self.kernels, self.attention = pick_kernels(cfg, world)
        self.result: dict[str, Any] = {}
        self.last_pass = ""  # over the validation tokens

    def note_phase(self, name: str, seconds: float) -> None:
        """Keep a stretch of the clock in the ledger."""
        self.ledger.add("phase", dict(name=name, seconds=seconds))

    def note(self, kind: str, **facts: Any) -> None:
        """Write facts to the log, the result and the ledger, as NOTES says for their kind."""
        note = NOTES[kind]
        self.log(note.log.format(**facts))
        for key, fact in note.result.items():
            self.result[key.format(**facts)] = facts[fact]
        if note.ledger:
            self.ledger.add(kind, facts)

    def note_weights(self, model: GPT, when: str) -> None:
        """Keep the hash of all parameters: what was loaded must be what scores the first target."""
        self.ledger.add("weights", dict(when=when, sha256=state_hash(model.state_dict())))

    @contextlib.contextmanager
    def unchanged(self, state):
        """Keep the hash of what state() returns and of the random generators, before and after a warm-up."""
        def look() -> str:
            return state_hash(state(), torch.get_rng_state(), torch.cuda.get_rng_state_all())

        before = look()
        yield
        self.ledger.add("warmup", dict(before=before, after=look()))

    def scorer(self, name: str) -> Scorer:
        """Begin a pass over the validation tokens that the ledger keeps account of."""
        self.last_pass = name
        return Scorer(self.data, self.world, name, self.ledger)

    def score(self, name: str, scorer: Scorer, method) -> float:
        """Time method(scorer) -> Score, note what it comes to and return the seconds. name: in the log."""
        start = time.perf_counter()
        score = method(scorer)
        seconds = time.perf_counter() - start
        mfu = Utilization(self.world, scorer.work, seconds).result(seconds)
        facts = score._asdict() | dict(milliseconds=1000 * seconds, mfu=mfu)
        self.note("scored", name=name, key=scorer.name, **facts)
        return seconds

    def diagnostic(self, name: str, key: str, forward) -> float:
        """Score with fixed weights."""
        self.clock.phase("diagnostic eval")
        return self.score(name, self.scorer(key), partial(evaluate, self.cfg, self.world, forward))


def environment(world: World) -> dict:
    """List versions and machine."""
    return dict(
        hardware=hardware_name(world), world_size=world.size, python_version=platform.python_version(),
        torch_version=torch.__version__, triton_version=triton_version())


def log_start(run: Run, env) -> None:
    """Log what the run depends on: overrides, variables without effect, configuration, the source."""
    cfg, log = run.cfg, run.log
    script = Path(__file__)
    changed = " ".join(f"{name}={value}" for name, value in overrides(cfg).items())
    log(f"train_gpt {config_hash(cfg)} seed:{cfg.seed} on {hardware_name(run.world)}, "
        f"torch {torch.__version__}, python {platform.python_version()}")
    log(f"overrides: {changed or 'none'}")
    for note in without_effect(cfg, env):
        log(f"no effect: {note}")
    log("Hyperparameters:", console=False)
    for name in sorted(f.name for f in fields(cfg)):
        log(f"  {name}: {getattr(cfg, name)}", console=False)
    source = "".join(linecache.getlines(log_start.__code__.co_filename))  # also of a script that is packed
    log(f"{'=' * 100}\n{source}\n{'=' * 100}", console=False)

    documents, _ = run.data.documents()
    targets = len(run.data.target_bytes)
    run.note("data", train_shards=len(run.files.train), val_tokens=targets, docs_val=len(documents))
    if cfg.quant == "rd" and cfg.target_bytes and cfg.stage != "eval":
        log(bits_available(cfg, script.stat().st_size))

    kernels = dict(
        mlp=cfg.mlp_kernel, qk=cfg.qk_kernel, xsa=cfg.xsa_kernel, ce=cfg.fused_ce_kernel,
        adam=cfg.ttt_adam_kernel)
    chosen = " ".join(f"{name}:{kind}" for name, kind in kernels.items())
    log(f"kernels: attention:{run.attention} {chosen}")


def bits_available(cfg: Config, code_bytes: int) -> str:
    """Say how many bits TARGET_BYTES leaves for a weight, and what that means."""
    stored = [m for m in matrices(cfg) if m.role.stored is not None]
    weights = sum(math.prod(m.shape) for m in stored if m.role.stored.codec == "gptq")
    bits = 8 * (cfg.target_bytes - code_bytes) / weights
    verdicts = ((0.2, "CANNOT FIT"), (2, "fits, at a loss: 3 are usual"), (math.inf, "fits"))
    verdict = next(verdict for limit, verdict in verdicts if bits < limit)
    return (f"budget: {weights} weights in TARGET_BYTES {cfg.target_bytes} less a script of {code_bytes}, "
            f"{bits:.2f} bits each: {verdict}")


def open_account(run: Run) -> None:
    """Begin the ledger's account of this process: who ran what on which data."""
    cfg, files = run.cfg, run.files
    tokenizer = files.manifest.get("tokenizer_sha256")
    if cfg.tokenizer_file.exists():
        tokenizer = sha256_file(cfg.tokenizer_file)
    run.ledger.add("start", dict(
        schema=1, time=datetime.now(UTC).isoformat(timespec="seconds"), stage=cfg.stage,
        code_sha256=sha256_file(Path(__file__)), config_hash=config_hash(cfg), overrides=overrides(cfg),
        seed=cfg.seed, seeds_declared=cfg.seeds_declared,
        manifest_sha256=files.manifest_sha256, shards=files.hashes, tokenizer_sha256=tokenizer,
        val_tokens=len(run.data.target_bytes), val_bytes=int(run.data.target_bytes.sum()),
        environment=environment(run.world)))


def train_stage(run: Run) -> GPT:
    """Train within the budget, average, score, and leave final_model.pt. Returns the averaged model."""
    cfg, world = run.cfg, run.world
    log, clock = run.log, run.clock
    trainer = Trainer(cfg, world, run.files, run.kernels)
    log_training_start(cfg, trainer, log)
    clock.phase("compile")
    with run.unchanged(trainer.state):
        trainer.warm_up(log)
    if cfg.resume:
        resume(run, trainer)

    def validate() -> Score:
        clock.phase("diagnostic eval")
        score = evaluate(cfg, world, trainer.forward, Scorer(run.data, world), trainer.looping)
        clock.phase("train")
        return score

    def forecast(tokens: np.ndarray) -> str:
        averaged = trainer.ema.shadow if trainer.ema else trainer.model.state_dict()
        return forecast_size(cfg, world, trainer.model, averaged, tokens, Path(__file__).stat().st_size)

    clock.phase("train")
    start = time.perf_counter()
    train(trainer, validate, log, run.checkpoint, forecast)
    note_training(run, trainer, time.perf_counter() - start)

    if trainer.ema:
        log("ema:applying EMA weights")
        trainer.ema.copy_to(trainer.model)
    if world.main:
        save_tensors(run.weights, dict(format=CHECKPOINT_FORMAT, model=trainer.model.state_dict()))
        run.checkpoint.unlink(missing_ok=True)
    run.diagnostic("diagnostic pre-quantization post-ema", "pre_quant", trainer.forward)
    return trainer.model


def resume(run: Run, trainer: Trainer) -> None:
    """Go on where an interrupted run left its checkpoint. Raises RunError without one."""
    if not run.checkpoint.exists():
        raise RunError(f"RESUME=1, but there is no {run.checkpoint}: set ARTIFACT_DIR to the folder of the "
                       "interrupted run, or RESUME=0")
    trainer.load_state(load_tensors(run.checkpoint, run.world.device))
    run.log(f"resumed after step {trainer.step}")


def note_training(run: Run, trainer: Trainer, wall_seconds: float) -> None:
    """Note what the training took."""
    device, seconds = run.world.device, trainer.clock.seconds
    allocated = max(peak_memory_mib(device), run.clock.peak_mib.get("train", 0))
    reserved = torch.cuda.max_memory_reserved() >> 20 if device.type == "cuda" else allocated
    run.note(
        "trained", allocated=allocated, reserved=reserved, steps=trainer.step, seconds=seconds,
        tokens=trainer.step * run.cfg.train_batch_tokens, step_ms=1000 * seconds / trainer.step,
        losses=trainer.losses, mfu=trainer.utilization.result(wall_seconds))


def warm_stage(run: Run) -> None:
    """Compile what training and the scored evaluation will run, on fresh weights; nothing is learned."""
    cfg, world = run.cfg, run.world
    run.clock.phase("compile")
    trainer = Trainer(cfg, world, run.files, run.kernels)
    trainer.warm_up(run.log)
    trainer.loader.close()
    trainer.graphs = None
    if cfg.ttt_enabled:
        TttEngine(cfg, world, trainer.model.requires_grad_(False), run.data).warm_up(run.log)
    folder = compile_cache(cfg, world).get("TORCHINDUCTOR_CACHE_DIR", "torch's default folder")
    run.log(f"warm: {len(compilations(run.world))} graphs, kept in {folder}")


def quantize_stage(run: Run, model: GPT | None) -> None:
    """Collect Hessians, quantize and pack; the artifact is read back and compared."""
    cfg, world, log = run.cfg, run.world, run.log
    if model is None:
        model = load_checkpoint_model(cfg, world, run.weights, run.kernels)
        run.diagnostic("diagnostic pre-quantization post-ema", "pre_quant", model)
    if world.main:
        log(f"Serialized model: {run.weights.stat().st_size} bytes")

    trains = cfg.gptq_calibration == "train"  # on training data it is part of the training budget
    run.clock.phase("calibrate" if trains else "self-calibrate")
    start = time.perf_counter()
    log("GPTQ:collecting Hessians from calibration data...")
    hessians = collect_hessians(cfg, world, model, run.files, log)
    world.synchronize()
    seconds = time.perf_counter() - start
    run.note("calibrated", count=len(hessians.H), seconds=seconds, budgeted=seconds if trains else 0.0)

    run.clock.phase("quantize")
    if world.main:
        start = time.perf_counter()
        stored, blob = quantize_to_fit(
            cfg, model.state_dict(), hessians, Path(__file__).stat().st_size, log, model.kernels.viterbi)
        seconds = time.perf_counter() - start
        log(f"Serialize: {cfg.quant} quantization and {cfg.compressor} compression done in {seconds:.1f}s")
        write_atomic(run.artifact, blob)
        run.clock.phase("unpack")
        back = unpack(cfg, run.artifact.read_bytes())
        for name, s in stored.items():
            if not torch.equal(s.decode(), back[name].decode()):
                raise RunError(f"{run.artifact}: {name} does not survive packing: a bug, please report it")
    world.barrier()


def count_bytes(run: Run) -> None:
    """Note the sizes of the files that a submission ships: the artifact and the script that is running."""
    script, artifact = Path(__file__), run.artifact
    code, model = script.stat().st_size, artifact.stat().st_size
    total = code + model
    run.note(
        "artifact", form=f"quantized+{run.cfg.compressor}",
        file=artifact.name, bytes=model, sha256=sha256_file(artifact),
        parts=bytes_by_part(artifact.read_bytes()), code_bytes=code, code_sha256=sha256_file(script),
        total=total, over_cap=total > ARTIFACT_CAP_BYTES)
    if total > ARTIFACT_CAP_BYTES:
        run.log(
            f"OVER THE CAP: {total} bytes are {total - ARTIFACT_CAP_BYTES} more than {ARTIFACT_CAP_BYTES}; "
            "nothing is deleted, the run is marked. Ship the packed script (tools/pack_code.py), or set "
            "QUANT=rd and TARGET_BYTES, or raise *_CLIP_SIGMAS")


def score_artifact(run: Run) -> None:
    """Load the artifact from its bytes, score it as it is, and then, with TTT_ENABLED, as it adapts."""
    cfg = run.cfg
    run.clock.phase("unpack")
    start = time.perf_counter()
    model = load_artifact(cfg, run.world, run.artifact, run.kernels)
    run.log(f"Deserialize: decompression and dequantization done in {time.perf_counter() - start:.1f}s")
    run.note_weights(model, "loaded")
    run.result["model_params"] = sum(p.numel() for p in model.parameters())
    count_bytes(run)

    forward = compile_forward(model, cfg, run.world)
    if not cfg.ttt_enabled:
        run.note_weights(model, "first_score")
    run.result["eval_seconds"] = run.diagnostic("diagnostic quantized", "quantized", forward)
    if cfg.ttt_enabled:
        run.result["eval_seconds"] = adapt_and_score(run, model)


def adapt_and_score(run: Run, model: GPT) -> float:
    """Score with test-time training, and return the seconds that it took."""
    cfg = run.cfg
    scorer = run.scorer("ttt")
    engine = TttEngine(cfg, run.world, model, run.data)
    if engine.static_rows:
        run.clock.phase("compile")
        with run.unchanged(model.state_dict):
            engine.warm_up(run.log)
    run.note_weights(model, "first_score")

    run.clock.phase("eval")
    run.log("beginning TTT eval timer")
    ttt = TttRun(cfg, engine, scorer, run.log)  # its clock runs from here
    seconds = run.score("quantized_ttt_phased", scorer, lambda _: ttt.run())
    run.log(f"total_eval_time:{seconds:.1f}s")
    run.log(f"ttt_utilization: {Utilization(run.world, scorer.work, seconds).interval()}")
    return seconds


class AccessLog:
    """Log what Python opens, connects to and starts within `with`; opening a training shard is a RunError.

    It is an audit hook and cannot be removed, so a process has one: `access_log()`.
    """

    EVENTS = ("open", "socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")

    def __init__(self):
        self.on = False
        self.seen: dict[tuple[str, str], None] = {}  # (event, file, host or program)
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        """Take down an event. Raises RunError where a training shard is opened."""
        if not self.on or event not in self.EVENTS:
            return
        what = args[event == "socket.connect"]
        if isinstance(what, int):
            return  # a file that is open already
        name = str(what[0]) if isinstance(what, tuple) else os.fsdecode(what)
        if event == "open":
            name = os.path.realpath(name)
        self.seen[event, name] = None
        if "fineweb_train_" in os.path.basename(name):
            raise RunError(f"{name}: training data was about to be read in an evaluation: a bug, report it")

    def __enter__(self) -> AccessLog:
        self.on = True
        self.seen = {}
        return self

    def __exit__(self, *_) -> None:
        self.on = False

    def unexpected(self, data: Path, own_files: list[Path]) -> list[tuple[str, str]]:
        """List (event, file, host or program), but files of the run, of Python and of the system.

        Files beside the data count wherever the data lies.
        """
        known = tuple(map(os.path.realpath, (
            sys.prefix, sys.base_prefix, torch.__path__[0], Path(__file__).parent, tempfile.gettempdir(),
            "/proc", "/sys", "/dev", "/etc", "/usr", "/lib")))
        own = tuple(map(os.path.realpath, own_files))
        beside = os.path.realpath(data) + os.sep

        def expected(file: str) -> bool:
            if file.startswith(own) or ".cache/" in file:
                return True
            return file.startswith(known) and not file.startswith(beside)

        return [(event, name) for event, name in self.seen if event != "open" or not expected(name)]


access_log = cache(AccessLog)


def eval_stage(run: Run) -> None:
    """Score the artifact, and keep account of what was opened meanwhile."""
    cfg, files = run.cfg, run.files
    with access_log() as log:
        score_artifact(run)
    own_files = [run.out, cfg.shards_path / "manifest.json", cfg.tokenizer_file, *files.val, *files.sidecar]
    of_ranks = run.world.gather(log.unexpected(cfg.shards_path, own_files))
    run.ledger.add("access", dict(seen=sorted(set().union(*of_ranks))))


def documents_of(manifest: dict, split: str) -> int | None:
    """Count the documents of a split by the manifest; None where it does not say."""
    first, end = manifest.get("splits", {}).get(split, {}).get("documents", [0, 0])
    return end - first or None


def complete_result(run: Run) -> dict:
    """Put the numbers so far among what says which run they are of; what no stage has measured is None."""
    cfg, files = run.cfg, run.files
    phases = run.clock.table()
    stages = ("", "pre_quant_", "quantized_", "ttt_")
    scores = [f"{stage}val_{unit}" for stage in stages for unit in ("loss", "bpb")]
    others = ("steps", "step_avg_ms", "train_tokens", "train_seconds", "calib_seconds", "eval_seconds")
    measured = dict.fromkeys((*scores, *others)) | run.result
    manifest = files.manifest
    data = dict(
        manifest_sha256=files.manifest_sha256, tokenizer_sha256=manifest.get("tokenizer_sha256"),
        train_shards=len(files.train), train_tokens=manifest.get("splits", {}).get("train", {}).get("tokens"),
        docs_train=documents_of(manifest, "train"), docs_val=documents_of(manifest, "val"))
    return dict(
        schema_version=1, run_id=run.id, seed=cfg.seed, preset=cfg.preset, stage=cfg.stage,
        overrides=overrides(cfg), config_hash=config_hash(cfg), **measured,
        phases=phases, wall_seconds=sum(p["seconds"] for p in phases),
        peak_mem_mib=max(p["peak_mib"] for p in phases), compilations=run.clock.compiled,
        **environment(run.world), data=data,
        train_budget_seconds=cfg.max_wallclock_seconds, eval_budget_seconds=cfg.max_eval_seconds)


def finish(run: Run) -> None:
    """Close the account, write result.json, print the tables, how to judge the run, and the result."""
    result = complete_result(run)
    times = ("train_seconds", "calib_seconds", "eval_seconds", "train_budget_seconds", "eval_budget_seconds")
    run.ledger.add("end", dict(
        val_loss=result["val_loss"], val_bpb=result["val_bpb"],
        tokens=result.get("target_tokens"), bytes=result.get("val_bytes"),
        **{name: result[name] for name in times}, **{"pass": run.last_pass}))
    result["ledger"] = dict(lines=run.ledger.lines, last_hash=run.ledger.last)

    curve = result.pop("loss_curve", None)
    if run.world.main:
        if curve:
            write_atomic(run.out / "loss_curve.json", json.dumps(curve).encode())
        write_atomic(run.out / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    for line in summary_table(result):
        run.log(line)
    run.log(f"judge this run: python tools/audit.py run {run.out}")
    run.log(f"result: {json.dumps(result)}")


def summary_table(result: dict) -> list[str]:
    """Write out the numbers that a person wants first."""
    lines = ["", f"{'stage':<28}{'val_bpb':>10}{'val_loss':>10}"]
    stages = {"trained (EMA)": "pre_quant", "quantized": "quantized", "test-time trained": "ttt"}
    for name, key in stages.items():
        if result[f"{key}_val_bpb"] is not None:
            lines.append(f"{name:<28}{result[f'{key}_val_bpb']:>10.5f}{result[f'{key}_val_loss']:>10.5f}")
    if "artifact_bytes" in result:
        lines += ["", f"{'bytes':<28}{'':>10}{'':>10}"]
        lines += [f"  {name:<26}{size:>10,}" for name, size in result["bytes_by_part"].items() if size]
        lines.append(f"  {'code':<26}{result['code_bytes']:>10,}")
        lines.append(f"{'total':<28}{result['bytes_total']:>10,}  of {ARTIFACT_CAP_BYTES:,}")
    lines += ["", f"{'phase':<28}{'seconds':>10}{'peak MiB':>10}"]
    lines += [f"  {p['name']:<26}{p['seconds']:>10.1f}{p['peak_mib']:>10}" for p in result["phases"]]
    return [*lines, f"{'wall':<28}{result['wall_seconds']:>10.1f}{result['peak_mem_mib']:>10}", ""]


def run_stages(cfg: Config, world: World, env) -> None:
    """Run the stages that STAGE asks for, in order, and write the result."""
    run_id = cfg.run_id or world.from_main(datetime.now(UTC).strftime("%Y%m%d_%H%M%S"))
    run = Run(cfg, world, Path(cfg.artifact_dir or f"logs/{run_id}"))
    open_account(run)
    log_start(run, env)
    if cfg.stage == "warm":
        warm_stage(run)
    model = train_stage(run) if cfg.stage in ("all", "train") else None
    if cfg.stage in ("all", "quantize"):
        quantize_stage(run, model)
    if cfg.stage in ("all", "quantize", "eval"):
        eval_stage(run)
    finish(run)


def main() -> int:
    """Run from the command line. Exit codes: 0 done, 1 failed with an explanation, 2 bad configuration, 130
    interrupted.
    """
    if set(sys.argv[1:]) & {"-h", "--help"}:
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
        print(help_text(os.environ.get("PRESET", "s14")))
        return 0
    if sys.argv[1:]:
        print(f"unknown arguments {sys.argv[1:]}: everything is set by environment variables; see --help",
              file=sys.stderr)
        return 2
    try:
        cfg, launch = config_from_env(os.environ), launch_from_env(os.environ)
    except ValueError as e:
        problems = "\n".join(f"  {line}" for line in str(e).splitlines())
        print(f"bad configuration:\n{problems}", file=sys.stderr)
        return 2
    world = None
    try:
        world = World.init(cfg, launch)
        os.environ.update(compile_cache(cfg, world))
        run_stages(cfg, world, os.environ)
    except RunError as e:
        print(f"error: {e}", file=sys.stderr)
        return 130 if isinstance(e, Interrupted) else 1
    except torch.OutOfMemoryError as e:
        print(f"error: out of device memory: {e}\nLower TRAIN_MICROBATCH_TOKENS (the batch stays the same), "
              "VAL_BATCH_TOKENS or TTT_BATCH_SIZE", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was finished is on disk: go on with STAGE=quantize or STAGE=eval",
              file=sys.stderr)
        return 130
    finally:
        if world is not None:
            world.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
