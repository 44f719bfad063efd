"""
Train a language model, squeeze it into 16,000,000 bytes, score it in bits per byte.

    torchrun --standalone --nproc_per_node=8 train_gpt.py      # the S14 recipe on 8 GPUs; no variables needed
    PRESET=demo python train_gpt.py                            # the same pipeline on a laptop CPU, minutes
    python train_gpt.py --help                                 # every variable; PRESET=demo shows the values of demo

train -> EMA -> Hessians -> GPTQ -> artifact on disk -> reload from its bytes -> score -> test-time training
-> one JSON line.

Reads top to bottom, a name is used below its definition:
CONFIG, RUNTIME, DATA, MODEL, OPTIMIZERS, TRAINING, QUANTIZATION, PACKING, BUDGET, SCORING, TEST-TIME TRAINING,
AUDIT, KERNELS, MAIN.
Shapes in comments: B rows, T tokens, D model_dim, H query heads, G key/value heads, d head_dim, F MLP width,
V vocabulary, L blocks, S depths (positions in the unrolled layer order), W ranks.
"""

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
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import brotli
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

try:  # without Triton the definitions run, and no kernel can be asked for
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = None

BOS_ID = 1                                # every document starts with it; there is no end-of-document token
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
ARTIFACT_CAP_BYTES = 16_000_000           # decimal, model file plus shipped code
CU_SEQLENS_BUCKET = 64                    # cu_seqlens are padded to multiples of this: few shapes for the compiler


class RunError(Exception):
    """A failure with an explanation for the person at the keyboard: what, where, what was expected, what to do."""


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
    # PR #1105 with mixed bits, without its loader, bigram hash, value embeddings, SWA and late fake quantization
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
*_NAME_PATTERNS - the table `parameters` says which tensor has which optimizer and codec
GPTQ_BLOCK_SIZE * blocks of columns bound the memory of GPTQ, not its result
MATRIX_LR_* * it scales gradients, and Muon's update does not depend on their scale; use MATRIX_LR
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

    needs: when it has any effect, see `unmet`; None = while the switch NAME_ENABLED is on, if its name begins so.
    because: what to say when it has none, where that says more. model: artifact and run must agree on it.
    recipe: it is part of the run's identity, see `config_hash`. group: title of the variables from here on.
    """
    about = dict(doc=doc, lo=lo, hi=hi, choices=choices, needs=needs, because=because)
    return field(default=default, metadata=about | dict(model=model, recipe=recipe, group=group))


def parse_steps(text: str, separator: str) -> tuple[tuple[float, float], ...]:
    """Read '256:8,2000:24' as ((256.0, 8.0), (2000.0, 24.0)), by the first number. Raises ValueError."""
    pairs = [item.split(separator) for item in text.split(",") if item.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{text!r}: expected a comma list of A{separator}B")
    return tuple(sorted((float(a), float(b)) for a, b in pairs))


def parse_seq_schedule(text: str, default_len: int) -> tuple[tuple[int, float], ...]:
    """Read '1024@0.1,2048@1' as ((1024, 0.1), (2048, 1.0)): context lengths, each until its fraction of the run.

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
    audit: str = knob("sample", "probes of the scored evaluation: none, a few short documents, or many",
        choices="off|sample|full", recipe=False)
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

    matrix_lr: float = knob(0.026, "Muon, the weight banks", group="optimizers")
    tied_embed_lr: float = knob(0.03, "AdamW, the tied embedding and the untied head")
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
        "learn a shift of the last states; published = from the targets, not legal; causal = from scored ones",
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
    """Look up the `needs` of a field; one that continues a switch's name needs it unless its knob says else."""
    needs = VARIABLES[name.upper()].metadata["needs"]
    if needs is not None:
        return needs
    others = (f.name for f in fields(Config) if f.name != name and f.name.endswith("_enabled"))
    return max((switch for switch in others if name.startswith(switch[:-7])), key=len, default="")


def unmet(c: Config, needs: str) -> str:
    """Say which part of `needs` does not hold in c; '' if all does.

    Comma = and, | = or, x = true, nonzero, not blank, !x = the opposite, x=v, x!=v. x is a field or property; what
    a field needs itself is needed too.
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
    if f.type in ("bool", "str"):
        words = "0|1" if f.type == "bool" else choices
        return words.removeprefix("|") + ", blank" * words.startswith("|") if words else "text"
    kind = "a whole number" if f.type == "int" else "a number"
    if hi < LARGEST:
        return f"{kind} in [{lo}, {hi}]"
    return f"{kind} of at least {lo}" if lo > -LARGEST else kind


def parse_knob(f, raw: str) -> Any:
    """Turn the text of one variable into its checked value. Raises ValueError that says what is accepted."""
    about = f.metadata
    try:
        value = {"int": int, "float": float, "bool": ("0", "1").index, "str": str}[f.type](raw)
    except ValueError:
        value = math.nan
    if f.type == "str":
        valid = not about["choices"] or raw in about["choices"].split("|")
    else:
        valid = about["lo"] <= value <= about["hi"]
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
    near = difflib.get_close_matches(capitals, VARIABLES, n=1, cutoff=0.85)
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
    """Look up a variable of other scripts: why it is refused, why it changes nothing. '' and '' for any other."""
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
            if given.setdefault(variable, value) != value:
                errors.append(f"{name}={env[name]!r}: another name of {variable}, which has another value")
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
    lines += ["  " + line for line in PUBLISHED.strip().splitlines()]
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

    @staticmethod
    def init(cfg: Config, launch: Launch) -> World:
        """Choose the device, start the process group (NCCL on cuda, gloo elsewhere) and seed every generator.

        Raises RunError when the ranks do not divide the micro-batches or the device is missing.
        """
        if cfg.micro_batches % launch.size:
            raise RunError(
                f"{launch.size} ranks cannot share {cfg.micro_batches} micro-batches (TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} / "
                f"TRAIN_MICROBATCH_TOKENS={cfg.train_microbatch_tokens}): start a number of ranks that divides {cfg.micro_batches}, "
                "or lower TRAIN_MICROBATCH_TOKENS")
        kind = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if kind == "cuda" and not torch.cuda.is_available():
            raise RunError("DEVICE=cuda, but torch sees no CUDA device: install a CUDA build of torch, or set DEVICE=cpu")
        if cfg.cuda_graphs and kind != "cuda":
            raise RunError(f"CUDA_GRAPHS=1 needs a CUDA device, and this run is on {kind}: set CUDA_GRAPHS=0")
        if kind == "mps" and not torch.backends.mps.is_available():
            raise RunError("DEVICE=mps, but torch sees no Metal device: set DEVICE=cpu")
        device = torch.device(kind, launch.local_rank) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
        if launch.size > 1:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
        wanted = cfg.activation_dtype if cfg.activation_dtype != "auto" else "bf16" if kind == "cuda" else "fp32"
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
    """A number on its way from the device: `read` waits for what led to it, and not for what the device was asked to do since."""

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
    """Device, number of ranks and, on a CPU, its cores."""
    if world.device.type == "cuda":
        return f"{world.size}x {torch.cuda.get_device_name(world.device)}"
    cpuinfo = Path("/proc/cpuinfo")
    model = next((line.split(":")[1].strip() for line in (cpuinfo.read_text() if cpuinfo.exists() else "").splitlines()
                  if line.startswith("model name")), platform.processor() or platform.machine())
    return f"{world.size}x {world.device.type} ({model}, {os.cpu_count()} cores)"


def compile_cache(cfg: Config, world: World) -> dict[str, str]:
    """Variables that make torch.compile and Triton keep their work below COMPILE_CACHE_DIR, in a folder of its own for each version
    of this code, torch and Triton, device and choice of kernels; none when it is blank."""
    if not cfg.compile_cache_dir:
        return {}
    flags = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name.endswith(("_kernel", "_backward", "_backend", "_dtype"))}
    versions = torch.__version__, triton.__version__ if triton else None, hardware_name(world).split("x ", 1)[1]
    key = hashlib.sha256(Path(__file__).read_bytes() + json.dumps([flags, versions], sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cfg.compile_cache_dir).resolve() / key
    return dict(TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"), TRITON_CACHE_DIR=str(folder / "triton"))


def compilations() -> list[str]:
    """What torch.compile has made in this process: function, number of its graph, and why the one before did not fit. And CUDA graphs."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    made = [f"{m.co_name} {m.compile_id}: {' '.join((m.recompile_reason or 'the first graph').splitlines()[0].split())}"
            for m in (dynamo.get_compilation_metrics() if dynamo else ()) if m.co_name]
    for before, name in reversed(Graphed.made):
        made.insert(before, name)
    return made


class Graphed:
    """A forward with the same arguments that replays CUDA graphs: its kernels are one launch, those of its backward another
    (torch.cuda.make_graphed_callables). One graph for each set of shapes and plain values, recorded at the first call after one that
    ran as it is and backward, which has compiled and loaded all there is to run. Nothing in it may wait for the device.

    Tensors that want a gradient, and `parameters`, which it reads without being handed them, are read where they lie; others are copied
    into the graph. All share their memory: a backward comes before the next forward, and a result is good until its graph runs again.
    """

    made: ClassVar[list[tuple[int, str]]] = []  # in this process: compilations before it, and what was recorded

    def __init__(self, forward, parameters=()):
        self.forward, self.parameters, self.warm, self.recorded = forward, tuple(parameters), set(), {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *args, **kwargs) -> Tensor:
        """What `forward` returns."""
        leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs))
        tensors, plain = [x for x in leaves if isinstance(x, Tensor)], [Tensor if isinstance(x, Tensor) else x for x in leaves]
        shapes = [(tuple(t.shape), t.dtype) for t in tensors if not t.requires_grad]
        key = spec, *plain, *shapes, *(t.data_ptr() for t in (*tensors, *self.parameters) if t.requires_grad)

        def forward(*tensors: Tensor, run=self.forward) -> Tensor:
            left = iter(tensors)
            args, kwargs = torch.utils._pytree.tree_unflatten([next(left) if x is Tensor else x for x in plain], spec)
            return run(*args, **kwargs)

        if key not in self.warm:
            out = forward(*(t if t.requires_grad else t.clone() for t in tensors))  # cloned: kernels depend on the alignment
            if out.requires_grad:
                out.register_hook(lambda _: self.warm.add(key))
            return out
        if key not in self.recorded:
            # Leaves of their own: the accumulators of gradients belong to a stream, and those of the arguments may be alive on another.
            own = (t.detach().requires_grad_() if t.requires_grad else t.clone() for t in tensors)
            with torch.enable_grad():
                self.recorded[key] = torch.cuda.make_graphed_callables(
                    forward, (*own, *self.parameters), num_warmup_iters=0, allow_unused_input=True, pool=self.pool)
            Graphed.made.append((len(compilations()) - len(Graphed.made), f"CUDA graph of {[shape for shape, _ in shapes]}"))
        for p in self.parameters:  # a gradient that autograd took over from a graph would be written again by the next replay, not added to
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return self.recorded[key](*tensors, *self.parameters)


def recompile_error(where: str, made: list[str], remedy: str) -> RunError:
    """What a run says where torch.compile was at work in timed code; made: the latest of `compilations`."""
    return RunError(f"{where}: the compiler was at work in timed code ({'; '.join(made) or 'on another rank'}). "
                    f"COMPILE_ALLOW_RECOMPILES=1 accepts that; {remedy}")


PEAK_FLOPS = {  # datasheets: dense bf16 products summed in fp32, per second
    "H200": 989.4e12, "H100": 989.4e12, "B200": 2250e12, "A100": 312e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
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
    """FLOP/s of the best square matrix product in the activation dtype on this device, sizes doubled while they are quick."""
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
        raise RunError(f"cannot write {path} ({len(data)} bytes): {e.strerror or e}; free space or choose another ARTIFACT_DIR") from None


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
        raise RunError(f"cannot load {path} ({why}): train first, or set ARTIFACT_DIR to the run's folder") from None


class Log:
    """Lines to the console and to RUN_ID.txt, from rank 0 only. Nothing is lost: every line is appended at once."""

    def __init__(self, path: Path | None):
        self.path = path
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("a").close()
            except OSError as e:
                raise RunError(f"cannot write the log {path}: {e.strerror or e}; choose a writable ARTIFACT_DIR") from None

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
    """One monotonic clock cut into named phases. A phase ends where the next begins, so they add up to the wall time.

    ended(name, seconds): told of every stretch that has passed.
    """

    def __init__(self, world: World, ended=lambda name, seconds: None):
        self.world, self.ended, self.name, self.start = world, ended, "setup", time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.peak_mib: dict[str, int] = {}
        self.compiled: dict[str, list[str]] = {}  # by phase, see `compilations`
        self.graphs = len(compilations())

    def phase(self, name: str) -> None:
        """End the current phase and begin `name`; coming back to a name adds to it."""
        self.world.synchronize()
        now = time.perf_counter()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self.start
        self.ended(self.name, now - self.start)
        self.peak_mib[self.name] = max(self.peak_mib.get(self.name, 0), peak_memory_mib(self.world.device))
        reset_peak_memory(self.world.device)
        if made := compilations()[self.graphs :]:
            self.compiled[self.name], self.graphs = self.compiled.get(self.name, []) + made, self.graphs + len(made)
        self.name, self.start = name, now

    def table(self) -> list[dict]:
        """Phases so far, the current one included: [{name, seconds, peak_mib, compilations}]."""
        self.phase(self.name)
        return [dict(name=n, seconds=round(s, 3), peak_mib=self.peak_mib[n], compilations=len(self.compiled.get(n, ())))
                for n, s in self.seconds.items()]


class Eta:
    """Seconds left, from work done and work planned."""

    def __init__(self, total: float):
        self.total, self.done, self.start = total, 0.0, time.perf_counter()

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
    """Memory-map one shard: 256 little-endian int32 (magic, version, n), then n little-endian uint16. Raises RunError."""
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=256)
    except OSError as e:
        raise RunError(f"cannot read shard {path}: {e.strerror or e}") from None
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise RunError(f"{path} is no token shard: its header must start with {SHARD_MAGIC}, {SHARD_VERSION}, found {header[:2].tolist()}; "
                       "prepare the data again")
    expected = SHARD_HEADER_BYTES + 2 * int(header[2])
    if size != expected:
        raise RunError(f"{path} is damaged: {expected} bytes expected for {header[2]} tokens, found {size}; download or prepare it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES)


def check_vocab(tokens: np.ndarray, vocab_size: int, path: Path) -> None:
    """Raises RunError when a token id does not fit the model's vocabulary."""
    if len(tokens) and (top := int(tokens.max())) >= vocab_size:
        raise RunError(f"{path} holds token id {top}, but VOCAB_SIZE={vocab_size}: set VOCAB_SIZE to that of the data's tokenizer")


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
        for kind, found in (("train", train or not need_train), ("val", val), ("val_bytes", sidecar or not cfg.caseops_enabled)):
            if not found:
                raise RunError(f"no fineweb_{kind}_*.bin in {folder}: set DATA_PATH to a folder made by prepare_caseops_data.py or "
                               "data/download.py" + (" (or CASEOPS_ENABLED=0 for plain tokens)" if kind == "val_bytes" else ""))
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
    """sha256 by file name; None for training shards beyond the first GB: 16 GB of FineWeb would cost a minute."""
    sizes = np.cumsum([path.stat().st_size for path in paths])
    return {path.name: sha256_file(path) if "_train_" not in path.name or size < 1 << 30 else None
            for path, size in zip(paths, sizes, strict=True)}


def check_manifest(cfg: Config, manifest: dict, folder: Path, paths: tuple[Path, ...], hashes: dict[str, str | None]) -> None:
    """Overlap of train and val documents, transform, vocabulary, and size and sha256 of each file. Raises RunError."""
    splits = manifest.get("splits")
    shards = [entry for split in (splits or {}).values() for entry in split.get("shards", [{}])]
    if not shards or any(key not in entry for entry in shards for key in ("file", "tokens", "sha256")):
        raise RunError(f"{folder}/manifest.json does not list the shards of this folder: prepare the data again")
    train_docs, val_docs = (splits.get(split, {}).get("documents", [0, 0]) for split in ("train", "val"))
    if max(train_docs[0], val_docs[0]) < min(train_docs[1], val_docs[1]):
        raise RunError(f"{folder}/manifest.json: training documents {train_docs} and validation documents {val_docs} overlap, so every "
                       "score would be invalid; prepare the data again with one --val-docs")
    if manifest.get("vocab_size", cfg.vocab_size) != cfg.vocab_size:
        raise RunError(f"{folder}: the data was made with a vocabulary of {manifest['vocab_size']}, but VOCAB_SIZE={cfg.vocab_size}")
    transform = "caseops" if cfg.caseops_enabled else "none"
    if manifest.get("transform", transform) != transform:
        raise RunError(f"{folder}: the data was made with transform {manifest['transform']!r}, but CASEOPS_ENABLED={cfg.caseops_enabled:d}")
    listed = {s["file"]: s for split in splits.values() for s in (*split.get("shards", ()), *split.get("sidecar", ()))}
    for path in paths:
        if path.name not in listed:
            raise RunError(f"{path} is not in manifest.json: remove it or prepare the data again")
        entry, tokens = listed[path.name], read_shard(path)
        if len(tokens) != entry["tokens"]:
            raise RunError(f"{path} holds {len(tokens)} tokens, manifest.json says {entry['tokens']}; download or prepare it again")
        if hashes[path.name] not in (None, entry["sha256"]):
            raise RunError(f"{path} does not have the sha256 that manifest.json says; download or prepare it again")


def document_cu_seqlens(bos: np.ndarray, total: int, max_len: int, bucket: int = CU_SEQLENS_BUCKET) -> np.ndarray:
    """Attention segments of one packed row: starts of its documents, cut every `max_len` tokens, closed and padded with `total`.

    bos: sorted offsets of BOS in [0, total). max_len 0 = no cuts. Returns int32, its length a multiple of `bucket`; the padding
    makes zero-length segments, so that the compiler sees few shapes. Example: bos [5, 900], total 2048, max_len 512 ->
    0 5 517 900 1412 1924 2048 2048 ...
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
    """Attention segments of a packed row: int32 bounds of `document_cu_seqlens`, length of the longest one allowed.

    None in their place means plain causal attention.
    """

    cu_seqlens: Tensor
    max_len: int


class Row(NamedTuple):
    """One packed row: inputs and targets (1, T) int64, its attention segments, and their lengths on the host."""

    inputs: Tensor
    targets: Tensor
    segments: Segments
    lengths: np.ndarray


def packed_row(tokens: np.ndarray, max_len: int, device: torch.device, every: int = 0) -> Row:
    """Pack T + 1 consecutive tokens into a Row of T predictions; attention stays within documents cut at `max_len`.

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
    """Consecutive windows of `rows` x (row_tokens + 1) tokens in file order, from the first document of each shard on.

    The order depends on the row size alone: ranks take their share of the rows of each step. The tail of a shard that does not
    hold a whole step is dropped. One thread reads ahead. `position` (file, offset) is where the next step will be read.
    """

    def __init__(self, shards: tuple[Path, ...], row_tokens: int, rows: int, vocab_size: int, position: tuple[int, int] | None = None):
        self.shards, self.span, self.rows, self.vocab_size = shards, row_tokens + 1, rows, vocab_size
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
                    raise RunError(f"{path} holds no document start (token {BOS_ID}): prepare the data with BOS before every document")
                offset = int(starts[0])
            end = offset + self.rows * self.span
            if end <= len(tokens):
                window = np.array(tokens[offset:end])
                check_vocab(window, self.vocab_size, path)
                return window.reshape(self.rows, self.span), (file, end)
            file, offset = file + 1, -1
        raise RunError(f"no training shard holds a step of {self.rows} x {self.span} tokens: prepare more data or lower TRAIN_BATCH_TOKENS")

    def next_step(self) -> np.ndarray:
        """Tokens (rows, span) uint16 of the next step, all ranks' rows."""
        window, self.position = self.ahead.result()
        self.ahead = self.pool.submit(self._read, self.position)
        return window

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def calibration_windows(shards: tuple[Path, ...], row_tokens: int, count: int, seed: int = 0) -> list[np.ndarray]:
    """`count` windows of row_tokens + 1 training tokens, spread over all shards by PCG64, none twice until all were used."""
    generator = np.random.Generator(np.random.PCG64(seed))
    starts = []
    for file, path in enumerate(shards):
        n = len(read_shard(path))
        phase = int(generator.integers(0, max(1, min(row_tokens, n - row_tokens - 1))))
        starts += [(file, phase + k * row_tokens) for k in range((n - 1 - phase) // row_tokens)]
    if not starts:
        raise RunError(f"no training shard holds {row_tokens + 1} tokens for calibration: lower TRAIN_MICROBATCH_TOKENS")
    order = np.concatenate([generator.permutation(len(starts)) for _ in range(-(-count // len(starts)))])[:count]
    return [np.array(read_shard(shards[starts[i][0]])[starts[i][1]:starts[i][1] + row_tokens + 1]) for i in order]


def sentencepiece_byte_tables(path: Path, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per token id: bytes of its text without a leading space, whether it has one, whether it is no text at all.

    Control, unknown and unused pieces count 0 bytes and swallow the space of the piece that follows; a byte piece counts 1.
    Raises RunError when the model lacks the lone space piece: spaces would be scored as three byte pieces.
    """
    import sentencepiece  # only runs without a sidecar need it

    if not path.exists():
        raise RunError(f"no tokenizer at {path}: set TOKENIZER_PATH to the SentencePiece model of the data")
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    if model.vocab_size() != vocab_size:
        raise RunError(f"{path} has {model.vocab_size()} pieces, but VOCAB_SIZE={vocab_size}")
    if model.is_unknown(model.piece_to_id("\u2581")):
        raise RunError(f"{path} has no piece for a lone space, so bytes per token can not be counted; use another tokenizer")
    size, lead, boundary = np.zeros(vocab_size, np.int32), np.zeros(vocab_size, bool), np.zeros(vocab_size, bool)
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
    """Validation tokens (N + 1) and the bytes (N) each target stands for: `target_bytes[i]` belongs to `tokens[i + 1]`."""

    tokens: np.ndarray
    target_bytes: np.ndarray

    @staticmethod
    def load(cfg: Config, files: Dataset) -> ValData:
        """Read tokens and the one byte count of the run: the sidecar, or the SentencePiece rule. Raises RunError."""
        tokens = np.concatenate([read_shard(p) for p in files.val])
        check_vocab(tokens, cfg.vocab_size, files.val[0])
        if len(tokens) < 2:
            raise RunError(f"{files.val[0].parent}: the validation set is empty; prepare the data again")
        if tokens[0] != BOS_ID:
            raise RunError(f"{files.val[0]} starts with token {tokens[0]}, not with a document start ({BOS_ID}): documents were written "
                           "without BOS, prepare the data again")
        if cfg.caseops_enabled:
            per_token = np.concatenate([read_shard(p) for p in files.sidecar]).astype(np.int32)
            if len(per_token) != len(tokens):
                raise RunError(f"the byte sidecar holds {len(per_token)} counts for {len(tokens)} tokens: {files.sidecar[0]} does not "
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
            raise RunError("the validation set stands for 0 bytes: bits per byte are undefined; prepare the data again")
        return data

    def subset(self, fraction: float, seed: int = 0) -> ValData:
        """A random share of the documents, in file order; the same for every SEED of a run."""
        starts, ends = self.documents()
        count = max(1, round(fraction * len(starts)))
        keep = np.sort(np.random.Generator(np.random.PCG64(seed)).choice(len(starts), count, replace=False))
        index = np.concatenate([np.arange(starts[i], ends[i] + (ends[i] == len(self.tokens) - 1)) for i in keep])
        return ValData(self.tokens[index], np.concatenate(([0], self.target_bytes))[index][1:].astype(np.int32))

    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs [start, end) of every document: its BOS to the token before the next BOS. They cover each target once."""
        starts = np.flatnonzero(self.tokens == BOS_ID)
        starts = starts[starts < len(self.tokens) - 1]
        return starts, np.append(starts[1:], len(self.tokens) - 1)


# ==================================================================================================
# MODEL - one network, one forward: training, scoring, calibration and test-time training differ by its arguments.
# ==================================================================================================

def softcap(logits: Tensor, cap: float) -> Tensor:
    """Compute cap tanh(logits / cap) in fp32."""
    return cap * torch.tanh(logits.float() / cap)


def softcapped_ce(logits: Tensor, targets: Tensor, cap: float, round_cap: bool = False) -> Tensor:
    """Cross-entropy in nats, per token and in fp32, of the capped logits.

    logits (..., V), targets (...), or (..., n) for several candidates each, int64 -> as targets, fp32. The upcast comes before the
    cap: a cap rounded to bf16 costs about 0.002 nats. `round_cap` rounds it all the same, to compare with runs that did.
    """
    z = softcap(logits, cap)
    z = z.to(logits.dtype).float() if round_cap else z
    if targets.ndim == z.ndim:
        return z.logsumexp(-1, keepdim=True) - z.gather(-1, targets)
    return F.cross_entropy(z.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def leaky_relu_squared(x: Tensor, slope: float) -> Tensor:
    """leaky_relu(x)^2: homogeneous of degree 2 on each side of zero."""
    return F.leaky_relu(x, slope).square()


def leaky_mlp(x: Tensor, up: Tensor, down: Tensor, slope: float, see_hidden=None) -> Tensor:
    """leaky_relu(x up^T)^2 down^T. x (..., D), up (F, D), down (D, F) -> (..., D). see_hidden(h): sees what `down` reads."""
    hidden = leaky_relu_squared(F.linear(x, up), slope)
    if see_hidden is not None:
        see_hidden(hidden)
    return F.linear(hidden, down)


def rms_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension; no weight, eps is that of the dtype."""
    return F.rms_norm(x, (x.shape[-1],))


def add_streams(weights: Tensor | None, *streams: Tensor) -> Tensor:
    """Residual streams (B, T, D), each times its row of weights (n, D) or (n, 1), added up. weights None: a plain sum."""
    w = weights if weights is None else weights.to(streams[0].dtype)
    first, *rest = streams if w is None else (factor * x for factor, x in zip(w, streams, strict=True))
    return sum(rest, first)


def add_norm(weights: Tensor | None, *streams: Tensor) -> tuple[Tensor, Tensor]:
    """Two or three residual streams added up by `add_streams`, and that sum normed."""
    total = add_streams(weights, *streams)
    return total, rms_norm(total)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Partial rotary embedding, half-split: x (B, T, heads, d), the first 2 n of d dimensions turn, n = cos.shape[-1]."""
    n = cos.shape[-1]
    x1, x2, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


def split_heads(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """One merged projection -> queries and keys, normed per head and rotated, queries times their gain, and values.

    qkv (B, T, (H + 2 G) d), gain (H,), cos and sin (T, 1, n) -> q (B, T, H, d), k and v (B, T, G, d).
    """
    heads = len(gain)
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=2)
    q, k = rotate(rms_norm(q), cos, sin), rotate(rms_norm(k), cos, sin)
    return q * gain.to(q.dtype)[:, None], k, v


def without_own_value(y: Tensor, v: Tensor) -> Tensor:
    """XSA: y - (y.v / v.v) v for each head of y (B, T, H, d) and its value v (B, T, G, d), computed in fp32."""
    grouped, own = y.unflatten(2, (v.shape[2], -1)).float(), v.unsqueeze(3).float()  # (B, T, G, H/G, d) and (B, T, G, 1, d)
    share = (grouped * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True).clamp_min(1e-24)
    return (grouped - share * own).flatten(2, 3).to(y.dtype)


def gate_heads(y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """XSA and the output gate: drop from each head its part along the token's own value, then scale the head.

    y (B, T, H, d), v (B, T, G, d), gate (B, T, H) -> (B, T, H, d).
    """
    return without_own_value(y, v) * gate.unsqueeze(-1)


def window_mask(n: int, window: int, like: Tensor, at: Tensor | None = None) -> Tensor | None:
    """What is added to the scores (n, n) of a segment so that a query sees itself and the window - 1 tokens before it.

    None where plain causal attention is the same: no window (0), or one that the segment fits into. at (.., m): just the queries at
    these positions, -> (.., 1, m, n), never None.
    """
    if not 0 < window < n and at is None:
        return None
    keys = torch.arange(n, device=like.device)
    distance = (keys if at is None else at.unsqueeze(-2)).unsqueeze(-1) - keys
    return torch.zeros_like(distance, dtype=like.dtype).masked_fill_((distance < 0) | (distance >= (window or n)), -math.inf)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int, at: Tensor | None = None) -> Tensor:
    """Causal attention of whole rows, in a window. q (B, T, H, d), k and v (B, T, G, d) -> (B, T, H, d).

    at (B, n): positions of the queries, q (B, n, H, d); fewer queries than keys are otherwise the last.
    """
    if at is None and q.shape[1] < k.shape[1]:
        at = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)
    mask = window_mask(k.shape[1], window, q, at)
    heads = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=mask is None, enable_gqa=True).transpose(1, 2)


def document_attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int = 0) -> Tensor:
    """The definition: causal attention within each segment. q (T, H, d), k and v (T, G, d) -> (T, H, d)."""
    bounds = cu_seqlens.tolist()
    return torch.cat([causal_attention(*(t[None, start:end] for t in (q, k, v)), window)[0]
                      for start, end in pairwise(bounds) if end > start])


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
    """Adapters by site. q k v sit on the projections; o and mlp run beside the sublayer and read its normed input."""

    q: Lora | None = None
    k: Lora | None = None
    v: Lora | None = None
    o: Lora | None = None
    mlp: Lora | None = None
    head: Lora | None = None  # of no depth, reads the final normed hidden state

    def by_depth(self, blocks: list[Block]) -> list[Adapters]:
        """One Adapters per depth, given its block. unbind, not indexing: its backward writes each gradient once."""
        sites = {site: lora for site, lora in zip(self._fields, self, strict=True) if lora is not None and site != "head"}
        columns = {site: zip(lora.A.unbind(0), lora.B.unbind(0), strict=True) for site, lora in sites.items()}
        return [Adapters(**{site: block.fold_adapter(site, Lora(*next(column), sites[site].scale)) for site, column in columns.items()})
                for block in blocks]

    def rows(self, first: int, end: int) -> Adapters:
        """Views of the adapters of documents [first, end)."""
        return Adapters(*(lora and Lora(*(t[..., first:end, :, :] for t in lora[:2]), lora.scale) for lora in self))


NO_ADAPTERS = Adapters()


class Weights(NamedTuple):
    """The matrices of one block, (n_out, n_in) each, in the activation dtype, with the block's constant and learned scales folded in."""

    qkv: Tensor  # Q, K and V below one another
    o: Tensor
    up: Tensor
    down: Tensor


class Cache:
    """What rows (B, T) leave behind: their last token and, by depth, their keys and values. With it a forward goes on where it stopped."""

    def __init__(self, max_len: int):
        self.max_len, self.length, self.last, self.kv = max_len, 0, None, {}

    def extend(self, depth: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, T, G, d) of new tokens; returns those of all tokens so far."""
        B, T, G, d = k.shape
        if depth not in self.kv:
            self.kv[depth] = k.new_empty(2, B, G, self.max_len, d).transpose(2, 3)  # a head's positions lie side by side: half the time
        held = self.kv[depth][:, :, : self.length + T]
        held[0, :, self.length :], held[1, :, self.length :] = k, v
        return held[0], held[1]


def at_positions(x: Tensor, at: Tensor | None) -> Tensor:
    """x (B, T, ..) at the positions (B, n) -> (B, n, ..); None = all of it."""
    return x if at is None else x.gather(1, at.view(*at.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def add_deltas(y: Tensor, x: Tensor, *loras: Lora | None, columns: tuple[int, ...] = (0,)) -> Tensor:
    """y (B, T, width) plus the deltas of adapters that read x, each from its own of the `columns` on: one product by all A, one by all B,
    added up inside it."""
    found = [(lora, first) for lora, first in zip(loras, columns, strict=True) if lora is not None]
    if not found:
        return y
    A = torch.cat([lora.A for lora, _ in found], 1).to(x.dtype)
    B = torch.cat([F.pad(lora.scale * lora.B, (0, 0, first, y.shape[-1] - first - lora.B.shape[1])) for lora, first in found], 2)
    return torch.baddbmm(y, x @ A.mT, B.to(x.dtype).mT)


def layer_order(cfg: Config, looping: bool) -> tuple[int, ...]:
    """Blocks in execution order; when looping, the middle segment runs 1 + NUM_LOOPS times."""
    if not (looping and cfg.num_loops):
        return tuple(range(cfg.num_layers))
    segment = tuple(range(cfg.loop_start, cfg.loop_end + 1))
    return (*range(cfg.loop_start), *(segment * (1 + cfg.num_loops)), *range(cfg.loop_end + 1, cfg.num_layers))


def rotary_tables(cfg: Config, length: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (length, 1, rope_dims / 2) of the row positions: only differences matter, so documents need no reset.

    The frequencies are rounded to bf16 because published checkpoints were trained with rounded ones. With ROPE_YARN the base
    grows where the attention context exceeds ROPE_TRAIN_SEQ_LEN.
    """
    base = cfg.rope_base
    if cfg.rope_yarn and context > cfg.rope_train_seq_len:
        base *= (context / cfg.rope_train_seq_len) ** (cfg.rope_dims / (cfg.rope_dims - 2))
    exponents = torch.arange(0, cfg.rope_dims, 2, dtype=torch.float32, device=device) / cfg.rope_dims
    frequencies = (base**-exponents).bfloat16().float()
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos()[:, None], angles.sin()[:, None]


class StoredAs(NamedTuple):
    """How the artifact keeps a tensor."""

    codec: str         # an entry of CODECS
    bits: str          # gptq: the knob that has its bits,
    clip_sigmas: str   # the knob that has the end of its grid,
    site: str          # and the products whose inputs make its Hessian
    stream: str        # of the artifact, for its integers
    sort_rows: bool    # by similarity, with COMPRESSOR=pergroup


HALF = StoredAs("float16", "", "", "", "rest", False)
INT8_ROWS = StoredAs("int8_row", "", "", "", "rest", False)
SITES = ("attn_in", "attn_out", "mlp_in", "mlp_mid")  # inputs of a block's matrices, in the order of the forward


class Role(NamedTuple):
    """What a tensor, or one of the equal parts of a bank, is for."""

    name: str                # of the matrix in a block, "" for a tensor that is no bank
    products: str            # "every": multiplied for every token; "scored": not for those that are only context; "": never
    stored: StoredAs | None  # None: for training only, in no artifact


class Parameter(NamedTuple):
    """One tensor of the network: a row of `parameters`, with no column left out."""

    name: str
    present: bool
    shape: tuple[int, ...]
    init: Callable[[Tensor], Any]
    optimizer: str  # an entry of OPTIMIZER_GROUPS
    roles: tuple[Role, ...]


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


def gptq_matrix(name: str, products: str, clip_sigmas: str, site: str, sort_rows: bool = False) -> Role:
    """Describe a block's matrix that GPTQ quantizes and that has a stream of its own."""
    return Role(name, products, StoredAs("gptq", "matrix_bits", clip_sigmas, site, name, sort_rows))


@cache
def parameters(cfg: Config) -> tuple[Parameter, ...]:
    """List every tensor of the network, once: presence, shape, initial values, optimizer, FLOPs and stored form are read from here.

    The matrices of all blocks are stacked into four banks, so that the optimizer shards whole matrices over the ranks. A bank holds
    its roles one after another, each with a matrix (n_out, n_in) per block. Names are those of published checkpoints.
    """
    L, D, heads, rows = cfg.num_layers, cfg.model_dim, cfg.num_heads, []
    skips = len(layer_order(cfg, looping=True)) // 2
    lanes = cfg.parallel_start_layer > 0
    elementwise, gate = (Role("", "", HALF),), (Role("", "scored", HALF),)
    gate_rows = (Role("", "scored", INT8_ROWS if cfg.gated_attn_quant_gate else HALF),)
    gate_width = D if cfg.attn_gate == "dense" else cfg.gate_window
    gate_std = cfg.gated_attn_init_std if cfg.attn_gate == "dense" else cfg.sparse_attn_gate_init_std
    embedding = StoredAs("gptq", "embed_bits", "embed_clip_sigmas", "head", "tok_emb", True)

    def constant(value: float) -> Callable[[Tensor], Any]:
        return partial(nn.init.constant_, val=value)

    def normal(std: float) -> Callable[[Tensor], Any]:
        return partial(nn.init.normal_, std=std)

    def row(name: str, shape: tuple[int, ...], init, optimizer: str, roles: tuple[Role, ...], present: bool = True) -> None:
        rows.append(Parameter(name, present, shape, init, optimizer, roles))

    row("qo_bank", (2 * L, D, D), init_half_orthogonal, "matrices", (
        gptq_matrix("attn.c_q", "every", "attn_clip_sigmas", "attn_in", sort_rows=True),
        gptq_matrix("attn.proj", "scored", "attn_clip_sigmas", "attn_out")))
    row("kv_bank", (2 * L, cfg.kv_dim, D), init_orthogonal, "matrices", (
        gptq_matrix("attn.c_k", "every", "attn_clip_sigmas", "attn_in"),
        gptq_matrix("attn.c_v", "every", "attn_clip_sigmas", "attn_in")))
    row("mlp_up_bank", (L, cfg.mlp_dim, D), init_orthogonal, "matrices", (
        gptq_matrix("mlp.fc", "scored", "mlp_clip_sigmas", "mlp_in", sort_rows=True),))
    row("mlp_down_bank", (L, D, cfg.mlp_dim), nn.init.zeros_, "matrices", (
        gptq_matrix("mlp.proj", "scored", "mlp_clip_sigmas", "mlp_mid"),))
    row("skip_weights", (skips, D), nn.init.ones_, "scalars", elementwise)
    row("skip_gates", (skips, D), nn.init.zeros_, "scalars", elementwise, cfg.skip_gates_enabled)
    row("parallel_post_lambdas", (L, 2, 2), nn.init.ones_, "scalars", elementwise, lanes)  # sublayer that writes, lane that receives
    row("parallel_resid_lambdas", (L, 2), constant(1.1), "scalars", elementwise, lanes)
    row("smear_lambda", (1,), nn.init.zeros_, "scalars", elementwise, cfg.smear_gate_enabled)
    row("tok_emb.weight", (cfg.vocab_size, D), normal(cfg.tied_embed_init_std), "embedding", (Role("", "scored", embedding),))
    for i in range(L):
        row(f"blocks.{i}.attn_scale", (D,), nn.init.ones_, "scalars", elementwise)
        row(f"blocks.{i}.mlp_scale", (D,), nn.init.ones_, "scalars", elementwise)
        row(f"blocks.{i}.resid_mix", (2, D), init_resid_mix, "scalars", elementwise)
        row(f"blocks.{i}.attn.q_gain", (heads,), constant(cfg.qk_gain_init), "scalars", elementwise)
        row(f"blocks.{i}.attn.attn_gate_w", (heads, gate_width), normal(gate_std), "scalars", gate_rows, cfg.attn_gate in ("dense", "sparse"))
        row(f"blocks.{i}.attn.attn_gate_proj.weight", (heads, gate_width), nn.init.zeros_, "scalars", gate, cfg.attn_gate == "out")
    row("smear_gate.weight", (1, cfg.gate_window), nn.init.zeros_, "scalars", (Role("", "every", HALF),), cfg.smear_gate_enabled)
    return tuple(parameter for parameter in rows if parameter.present)


class Matrix(NamedTuple):
    """A tensor as artifacts name it: a whole parameter, or one matrix of a bank."""

    name: str
    parameter: str
    index: int | None  # in its bank; None: the whole parameter
    layer: int | None  # its block; None: it belongs to no block
    shape: tuple[int, ...]
    products: str
    stored: StoredAs | None


@cache
def matrices(cfg: Config) -> tuple[Matrix, ...]:
    """List the tensors as artifacts name and order them: parameters that are no bank, then each block's matrices."""
    whole, parts = [], []
    for p in parameters(cfg):
        for k, role in enumerate(p.roles):
            if not role.name:
                words = p.name.split(".")
                layer = int(words[1]) if words[0] == "blocks" else None
                whole.append(Matrix(p.name, p.name, None, layer, p.shape, role.products, role.stored))
                continue
            for i in range(cfg.num_layers):
                name = f"blocks.{i}.{role.name}.weight"
                parts.append(Matrix(name, p.name, k * cfg.num_layers + i, i, p.shape[1:], role.products, role.stored))
    parts.sort(key=lambda m: (m.layer, SITES.index(m.stored.site)))
    return (*whole, *parts)


def unbank(cfg: Config, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut a state dict into the tensors that artifacts name; those of other parameters than are in it are left out."""
    found = (m for m in matrices(cfg) if m.stored is not None and m.parameter in state)
    return {m.name: state[m.parameter] if m.index is None else state[m.parameter][m.index] for m in found}


def rebank(cfg: Config, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the tensors that artifacts name together again: the inverse of `unbank`."""
    parts: dict[str, list[Matrix]] = {}
    for m in matrices(cfg):
        parts.setdefault(m.parameter, []).append(m)
    state = {}
    for name, found in parts.items():
        whole = found[0].index is None
        state[name] = tensors[found[0].name] if whole else torch.stack([tensors[m.name] for m in sorted(found, key=lambda m: m.index)])
    return state


class Attention(nn.Module):
    """Small tensors of one attention sublayer; its matrices live in the banks."""

    def __init__(self, cfg: Config, layer: int, norm_scale: float):
        super().__init__()
        self.cfg, self.norm_scale, self.window = cfg, norm_scale, cfg.window(layer)
        self.exclusive = layer >= cfg.num_layers - cfg.xsa_last_n
        if cfg.attn_gate == "out":
            self.attn_gate_proj = nn.Linear(cfg.gate_window, cfg.num_heads, bias=False)

    def gate(self, n: Tensor, q_raw: Tensor) -> Tensor:
        """(B, T, H): how much of each head's output passes. n lacks the norm scale, which the weights take over."""
        cfg = self.cfg
        if cfg.attn_gate == "dense":
            return torch.sigmoid(F.linear(n, (self.norm_scale * self.attn_gate_w).to(n.dtype)))
        if cfg.attn_gate == "sparse":
            weight = cfg.sparse_attn_gate_scale * self.norm_scale * self.attn_gate_w
            return torch.sigmoid(F.linear(n[..., : cfg.gate_window].contiguous(), weight.to(n.dtype)))
        from_norm = cfg.attn_out_gate_src == "proj"
        source, weight = (n, self.norm_scale * self.attn_gate_proj.weight) if from_norm else (q_raw, self.attn_gate_proj.weight)
        return 2 * torch.sigmoid(F.linear(source[..., : cfg.gate_window].contiguous(), weight.to(n.dtype)))

    def qkv(self, n: Tensor, w: Weights, lora: Adapters) -> Tensor:
        """(B, T, (H + 2 G) d): the merged projection and the deltas of whichever adapters there are."""
        D, kv = self.cfg.model_dim, self.cfg.kv_dim
        return add_deltas(F.linear(n, w.qkv), n, lora.q, lora.k, lora.v, columns=(0, D, D + kv))

    def forward(self, n: Tensor, w: Weights, lora: Adapters, rope, kernels: Kernels, segments, past, tap, name: str, at) -> Tensor:
        """n (B, T, D) normed, without its norm scale -> (B, T, D); at (B, m): (B, m, D), only at these positions."""
        cfg = self.cfg
        if tap is not None:
            tap(f"{name}.attn_in", self.norm_scale * n)
        qkv = self.qkv(n, w, lora)
        q, k, v = kernels.split_heads(qkv, self.q_gain, *rope, cfg.num_kv_heads)
        if segments is None:
            y = causal_attention(at_positions(q, at), *((k, v) if past is None else past(k, v)), self.window, at)
        else:
            rows = (t.flatten(0, 1) for t in (q, k, v))  # not t[0]: the gradient of an index is a copy
            y = kernels.attend(*rows, segments.cu_seqlens, segments.max_len, self.window)[None]
        n, qkv, v = (at_positions(t, at) for t in (n, qkv, v))
        gate = None if cfg.attn_gate == "none" else self.gate(n, qkv)
        if self.exclusive and gate is not None:
            y = kernels.gate_heads(y, v, gate)
        elif self.exclusive:
            y = without_own_value(y, v)
        elif gate is not None:
            y = y * gate.unsqueeze(-1)
        y = y.flatten(2)
        if tap is not None:
            tap(f"{name}.attn_out", y)
        return add_deltas(F.linear(y, w.o), n, lora.o)


class Block(nn.Module):
    """Small tensors of one block and the two sublayers."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.cfg, self.name = cfg, f"blocks.{layer}"
        self.norm_scale = 1 / math.sqrt(layer + 1) if cfg.ln_scale else 1.0
        self.attn = Attention(cfg, layer, self.norm_scale)

    def fold(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype) -> Weights:
        """Scales of a sublayer's input and output, moved into its matrices: they cost a pass over weights instead of activations."""
        qkv, o = self.norm_scale * torch.cat((q, k, v)), self.attn_scale[:, None] * o
        up, down = self.norm_scale * up, self.mlp_scale[:, None] * down
        return Weights(*(matrix.to(dtype) for matrix in (qkv, o, up, down)))

    def fold_adapter(self, site: str, lora: Lora) -> Lora:
        """The same for an adapter."""
        learned = dict(o=self.attn_scale, mlp=self.mlp_scale).get(site)
        return Lora(lora.A, lora.B if learned is None else learned[:, None] * lora.B, lora.scale * self.norm_scale)

    def mlp(self, n: Tensor, w: Weights, lora: Adapters, kernels: Kernels, tap) -> Tensor:
        """What the MLP adds to the residual stream, from that stream normed, n (B, T, D)."""
        if tap is None:
            out = kernels.mlp(n, w.up, w.down, self.cfg.mlp_slope)
        else:
            tap(f"{self.name}.mlp_in", self.norm_scale * n)
            out = leaky_mlp(n, w.up, w.down, self.cfg.mlp_slope, partial(tap, f"{self.name}.mlp_mid"))
        return add_deltas(out, n, lora.mlp)


class GPT(nn.Module):
    """The S14 network, its tensors as `parameters` lists them. Masters are fp32, the embedding has the activation dtype."""

    def __init__(self, cfg: Config, dtype: torch.dtype = torch.float32, kernels: Kernels = DEFINITIONS):
        super().__init__()
        self.cfg, self.kernels = cfg, kernels
        self.tok_emb = nn.Module()
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_layers))
        if cfg.smear_gate_enabled:
            self.smear_gate = nn.Linear(cfg.gate_window, 1, bias=False)
        for p in parameters(cfg):
            path, _, leaf = p.name.rpartition(".")
            owner = self.get_submodule(path)
            precision = dtype if p.optimizer == "embedding" else torch.float32
            owner.register_parameter(leaf, nn.Parameter(torch.empty(p.shape, dtype=precision)))

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, D), each token with a gated share of its predecessor."""
        x = F.embedding(tokens, self.tok_emb.weight)
        if self.cfg.smear_gate_enabled:
            weight, strength = self.smear_gate.weight.to(x.dtype), self.smear_lambda.to(x.dtype)
            gate = strength * torch.sigmoid(F.linear(x[:, 1:, : self.cfg.gate_window].contiguous(), weight))
            if self.cfg.smear_gate_bos_fix:
                # BOS starts a new document: its predecessor belongs to someone else's text and must not leak into it.
                gate = gate * (tokens[:, 1:] != BOS_ID).unsqueeze(-1)
            x = torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), dim=1)
        return rms_norm(x)

    def weights(self, dtype: torch.dtype) -> list[Weights]:
        """The banks cut into blocks. unbind, not indexing: its backward writes each gradient once."""
        L = self.cfg.num_layers
        qo, kv, up, down = (bank.unbind(0) for bank in (self.qo_bank, self.kv_bank, self.mlp_up_bank, self.mlp_down_bank))
        return [b.fold(qo[i], kv[i], kv[L + i], qo[L + i], up[i], down[i], dtype) for i, b in enumerate(self.blocks)]

    def skip(self, x: Tensor, skipped: Tensor, j: int) -> Tensor:
        """Combine the decoder's x with an encoder output; rows of the weights count decoder positions, not blocks."""
        skipped = self.skip_weights[j].to(x.dtype) * skipped
        if not self.cfg.skip_gates_enabled:
            return x + skipped
        return torch.lerp(skipped, x, torch.sigmoid(self.skip_gates[j]).to(x.dtype))

    def hidden(self, tokens: Tensor, segments: Segments | None, layers: tuple[int, ...], adapters: Adapters, positions, cache, tap) -> Tensor:
        """Tokens -> final normed hidden states (B, T, D), or (B, n, D) at `positions`, and then the last depth computes the others' keys
        and values alone. The first half of `layers` pushes skips, the second half pops them.

        From the first decoder depth with block >= PARALLEL_START_LAYER on there are two lanes: attention reads and skips join
        the first, the MLP reads the second, and both sublayers write to both.
        """
        cfg, T, start = self.cfg, tokens.shape[1], 0 if cache is None else cache.length
        x0 = lane = self.embed(torch.cat((cache.last, tokens), dim=1))[:, 1:] if start else self.embed(tokens)
        context = next((c.max_len for c in (segments, cache) if c is not None), T)
        rope = tuple(table[start:] for table in rotary_tables(cfg, start + T, context, tokens.device))
        loras = adapters.by_depth([self.blocks[layer] for layer in layers])
        weights, half, skips, mlp_lane, mlp_in = self.weights(x0.dtype), len(layers) // 2, [], None, None
        for depth, layer in enumerate(layers):
            block, w, lora, j = self.blocks[layer], weights[layer], loras[depth], depth - half
            if j >= 0 and cfg.parallel_start_layer and layer >= cfg.parallel_start_layer and mlp_lane is None:
                mlp_lane, mlp_in = lane, rms_norm(lane)
            if j >= 0 and skips:
                lane = self.skip(lane, skips.pop(), j)
            past, at = None if cache is None else partial(cache.extend, depth), positions if depth == len(layers) - 1 else None
            u, n = add_norm(block.resid_mix, lane, x0)  # the stream with its share of the embedding, per channel
            a = block.attn(n, w, lora, rope, self.kernels, segments, past, tap, block.name, at)
            u, lane, mlp_lane, mlp_in = (t if t is None else at_positions(t, at) for t in (u, lane, mlp_lane, mlp_in))
            if mlp_lane is None:
                lane, n = add_norm(None, u, a)
                lane = lane + block.mlp(n, w, lora, self.kernels, tap)
            else:
                m = block.mlp(mlp_in, w, lora, self.kernels, tap)
                post, resid = self.parallel_post_lambdas[layer], self.parallel_resid_lambdas[layer, :, None]
                mixes = torch.cat((resid, post.T), dim=1)[..., None]  # (2 lanes, 3 streams, 1); post: sublayer that writes, lane
                lane, (mlp_lane, mlp_in) = add_streams(mixes[0], lane, a, m), add_norm(mixes[1], mlp_lane, a, m)
            if j < 0:
                skips.append(lane)
        if cache is not None:
            cache.last, cache.length = tokens[:, -1:], start + T
        if mlp_lane is not None:
            lane = (lane + mlp_lane) / 2
        return rms_norm(lane)

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
        """Nats per target, fp32. The only entry: training, scoring, calibration, writing and test-time training.

        tokens (B, T) int64. targets (B, T), or (B, n) together with `positions` (B, n): score just those positions; one more
        dimension for several candidates each; None: the capped logits (B, T, V). layers: `layer_order`. segments: of a packed
        row; not with positions. cache: what these rows held before; not with either. adapters: one set per row. shift (B or 1, 1, D):
        added to the final hidden states. tap(site, x): sees the input of every matrix. training: the cap is rounded as
        FUSED_CE_ENABLED says, not EVAL_SOFTCAP_FP32; without adapters.
        """
        x = self.hidden(tokens, segments, layers, adapters, positions, cache, tap)
        if shift is not None:
            x = (x + shift).to(x.dtype)
        if tap is not None:
            tap("head", x)
        head, cap = self.tok_emb.weight, self.cfg.logit_softcap
        round_cap = not (self.cfg.fused_ce_enabled if training else self.cfg.eval_softcap_fp32)
        if training and self.kernels.head_ce is not None and not round_cap:
            return self.kernels.head_ce(x, head, targets, cap)
        logits = add_deltas(F.linear(x, head), x, adapters.head)
        return softcap(logits, cap) if targets is None else softcapped_ce(logits, targets, cap, round_cap)


class Flops(NamedTuple):
    """Floating-point operations of a forward pass; a multiplication and an addition are two. Elementwise work is not counted."""

    matmul: float     # with the model's own matrices
    lora: float       # with those of adapters
    attention: float


def causal_pairs(lengths: np.ndarray, window: int) -> float:
    """Pairs of a query and a key that it sees, over segments of these lengths."""
    full = np.minimum(lengths, window or np.inf)  # queries whose window the start of the segment cuts short
    return (full * (full + 1) / 2 + (lengths - full) * window).sum()


def adapter_flops(site: str, lora: Lora, depths: int, scored: float) -> float:
    """Count the products of one site's adapters for a token, two FLOPs each; at the last depth some only for scored tokens."""
    spared = dict(o=1 / depths, mlp=1 / depths, head=1.0).get(site, 0.0) * (1 - scored)
    per_document = (lora.A.numel() + lora.B.numel()) / lora.A.shape[-3]
    return 2 * per_document * (1 - spared)


def flops_per_token(cfg: Config, lengths, looping: bool, adapters: Adapters = NO_ADAPTERS, scored: float = 1.0) -> Flops:
    """Forward FLOPs of a token, averaged over segments of these lengths: the matrices of every layer application, logits and adapters,
    and attention by the causal pairs there really are.

    scored: share of the tokens, at the end of the segments, that are scored; the last depth computes keys and values of the
    others, but not what follows. Zeros that adapters are padded with do not count.
    """
    layers = layer_order(cfg, looping)
    products = 0.0
    for m in matrices(cfg):
        times = 1.0 if m.layer is None else layers.count(m.layer)
        if m.products == "scored" and m.layer in (None, layers[-1]):
            times -= 1 - scored
        products += times * math.prod(m.shape) * bool(m.products)
    sites = {site: lora for site, lora in adapters._asdict().items() if lora is not None}
    deltas = sum(adapter_flops(site, lora, len(layers), scored) for site, lora in sites.items())
    n = np.asarray(lengths, dtype=np.float64)
    pairs = sum(causal_pairs(n, cfg.window(layer)) for layer in layers)
    pairs -= causal_pairs((1 - scored) * n, cfg.window(layers[-1]))
    return Flops(2 * products, deltas, 4 * cfg.model_dim * pairs / n.sum())


PASSES = {  # how often the forward's matrix, adapter and attention FLOPs are done: as the model defines it, and as the hardware runs it
    "score": ((1, 1, 1), (1, 1, 1)),
    "train": ((3, 3, 3), (3, 3, 3.5)),  # the backward of flash attention computes the scores again: 5 products instead of 4
    "adapt": ((2, 3, 3), (2, 3, 3.5)),  # frozen matrices have no gradient of their own
}


class FlopCount:
    """FLOPs of one rank: of the model, as the hardware runs it, and the part of the model's that belongs to scored tokens."""

    def __init__(self):
        self.model = self.hardware = self.useful = 0.0

    def add(self, flops: Flops, kind: str, tokens: int, scored: float) -> None:
        """Passes over `tokens` positions, padding and context included, `scored` of which count for the loss."""
        model, hardware = (tokens * sum(f * times for f, times in zip(flops, passes, strict=True)) for passes in PASSES[kind])
        self.model, self.hardware, self.useful = self.model + model, self.hardware + hardware, self.useful + model * scored / tokens


@torch.no_grad()
def build_model(cfg: Config, world: World, kernels: Kernels = DEFINITIONS) -> GPT:
    """A freshly initialised model on this rank's device; the same on every rank and on every device type."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, world.dtype, kernels)
    for p in parameters(cfg):
        p.init(model.get_parameter(p.name))
    return model.to(world.device)


def compile_forward(model: GPT, cfg: Config, world: World, growing: bool = False):
    """The forward that everything calls: compiled without graph breaks where COMPILE_BACKEND says so, else the model itself.

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

    def forward(tokens: Tensor, targets: Tensor | None, segments: Segments | None = None, **options) -> Tensor:
        for t, size in ((segments and segments.cu_seqlens, 0), (tokens if growing else None, 1)):
            if t is not None:
                torch._dynamo.maybe_mark_dynamic(t, size)
        return compiled(tokens, targets, segments=segments, **options)

    return forward


# ==================================================================================================
# OPTIMIZERS - which parameter is learned how, and one step of it on any number of ranks.
# ==================================================================================================

# Polar Express (arXiv:2505.16932): rows are (a, b, c) of X <- a X + b (X X^T) X + c (X X^T)^2 X.
# Five of them map singular values in [1e-3, 1] into [0.86, 1.14].
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(G: Tensor, steps: int) -> Tensor:
    """Nearest semi-orthogonal matrix, approximately, of each of G (n, rows, cols). Zero matrices stay zero."""
    X = G.mT if G.shape[-2] > G.shape[-1] else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS[:steps]:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X


def muon_direction(G: Tensor, M: Tensor, momentum: float, steps: int, row_normalize: bool) -> tuple[Tensor, Tensor]:
    """One Muon update for matrices G (n, rows, cols) with momentum buffer M, and the next M.

    Nesterov momentum, rows scaled to norm 1 (MuonEq-R), orthogonalised, scaled by sqrt(max(1, rows / cols)).
    """
    M = torch.add(G, M, alpha=momentum)
    U = torch.add(G, M, alpha=momentum)
    if row_normalize:
        U = U / torch.linalg.vector_norm(U, dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1e-7).to(U.dtype)
    return polar_express(U, steps) * max(1.0, G.shape[-2] / G.shape[-1]) ** 0.5, M


OPTIMIZER_GROUPS = dict(  # knobs of the learning rate and the weight decay; matrices are learned by Muon, the others by AdamW
    matrices=("matrix_lr", "muon_wd"),
    embedding=("tied_embed_lr", "embed_wd"),
    scalars=("scalar_lr", "adam_wd"),
)


class Bank:
    """A weight bank and this rank's share of it: `per_rank` whole matrices, zero padding behind the last."""

    def __init__(self, p: nn.Parameter, lr: float, wd: float, world: World):
        self.p, self.lr, self.wd, self.world = p, lr, wd, world
        self.per_rank = -(-len(p) // world.size)
        self.first = min(world.rank * self.per_rank, len(p))
        self.momentum = p.new_zeros(self.per_rank, *p.shape[1:], dtype=world.dtype)
        self.shard = torch.empty_like(self.momentum)
        padded = (self.per_rank * world.size, *p.shape[1:])
        self.padded = p.new_zeros(padded, dtype=world.dtype) if world.size > 1 else self.shard
        self.update = self.pending = None

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
            self.update, self.pending = self.padded, all_gather(self.padded, update.contiguous(), async_op=True)

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.wait()
            self.pending = None

    def apply(self, lr_scale: float) -> None:
        """Decay, then move along the gathered update."""
        self.wait()
        lr = self.lr * lr_scale
        self.p.mul_(1 - lr * self.wd).add_(self.update[: len(self.p)], alpha=-lr)
        self.update = None

    def full_momentum(self) -> Tensor:
        """Momentum of all matrices, on every rank."""
        shares = [self.momentum.clone() for _ in range(self.world.size)]
        if self.world.size > 1:
            dist.all_gather(shares, self.momentum)
        return torch.cat(shares)[: len(self.p)]

    def load_momentum(self, full: Tensor) -> None:
        mine = full[self.first : self.first + self.per_rank]
        self.momentum.zero_()[: len(mine)].copy_(mine)


class TrainOptimizer:
    """Muon on the banks, each rank owning whole matrices, and AdamW on everything else, replicated."""

    def __init__(self, model: GPT, cfg: Config, world: World):
        self.cfg, self.world, self.banks, groups = cfg, world, [], {}
        for row in parameters(cfg):
            p, (lr, wd) = model.get_parameter(row.name), OPTIMIZER_GROUPS[row.optimizer]
            if row.optimizer == "matrices":
                self.banks.append(Bank(p, getattr(cfg, lr), getattr(cfg, wd), world))
            else:
                groups.setdefault((lr, wd), []).append(p)
        self.banks.sort(key=lambda bank: -bank.p.numel())  # the largest reduction starts first
        self.replicated = [p for group in groups.values() for p in group]
        self.adamw = torch.optim.AdamW(
            [dict(params=ps, base_lr=getattr(cfg, lr), weight_decay=getattr(cfg, wd)) for (lr, wd), ps in groups.items()],
            betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=world.device.type in ("cuda", "cpu"))

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float) -> float:
        """Reduce the gradients, clip them, update. Returns the gradient norm before clipping.

        Raises FloatingPointError, leaving the weights as they were, when the norm is not finite.
        """
        self.reduce()
        norm, cfg, wide = self.grad_norm(), self.cfg, self.world.wide
        told, momenta, clip = Readback(norm), [], cfg.grad_clip_norm or math.inf
        factor = (clip / (norm.to(wide) + 1e-6)).clamp(max=1.0).float()
        for bank in self.banks:  # the gather of one bank overlaps the orthogonalisation of the next
            bank.shard.mul_(factor.expand_as(bank.shard))  # as a scalar it would be rounded to bf16 first
            update, M = muon_direction(bank.shard, bank.momentum, momentum, cfg.muon_backend_steps, cfg.muon_row_normalize)
            bank.launch_gather(update)
            momenta.append(M)  # a bad norm must leave no trace in the old one
        value = told.read()  # the host waits for the norm alone: the device has the directions to compute meanwhile
        if not math.isfinite(value):
            for bank in self.banks:
                bank.wait()
            raise FloatingPointError(f"the gradient norm is {value}")
        grads = [p.grad for p in self.replicated]
        torch._foreach_mul_([g for g in grads if g.dtype == torch.float32], factor)
        for g in (g for g in grads if g.dtype != torch.float32):
            g.mul_(factor.expand_as(g))
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adamw.step()
        for bank, M in zip(self.banks, momenta, strict=True):
            bank.momentum = M
            bank.apply(lr_scale)
        self.zero_grad()
        return value

    def reduce(self) -> None:
        """Average all gradients over the ranks: banks scattered, small tensors in one flat message. Clipping comes after."""
        for p in self.replicated:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a tensor this model has no use for, as skips of one block
        for bank in self.banks:
            bank.launch_reduce()
        if self.world.size > 1:
            large = [p.grad for p in self.replicated if p.numel() > 32768]
            small = [p.grad for p in self.replicated if p.numel() <= 32768]
            handles = [dist.all_reduce(g, dist.ReduceOp.AVG, async_op=True) for g in large]
            self.world.sum_(*small)
            torch._foreach_div_(small, self.world.size)
            for handle in handles:
                handle.wait()
        for bank in self.banks:
            bank.wait()

    def grad_norm(self) -> Tensor:
        """Norm of the averaged gradient, on the device: the same number on every rank."""
        parts = [bank.shard for bank in self.banks] + [p.grad for p in self.replicated]
        groups = ([t for t in parts if (t.dtype == torch.float32) == full] for full in (False, True))  # a kernel for each; banks first
        squares = torch.stack([n for group in groups if group for n in torch._foreach_norm(group, dtype=torch.float32)]).square()
        mine = squares[: len(self.banks)].sum()
        self.world.sum_(mine)
        return (mine + squares[len(self.banks) :].sum()).sqrt()

    def zero_grad(self) -> None:
        for p in [*self.replicated, *(bank.p for bank in self.banks)]:
            p.grad = None

    def state_dict(self) -> dict:
        return dict(adamw=self.adamw.state_dict(), momentum=[bank.full_momentum().cpu() for bank in self.banks])

    def load_state_dict(self, state: dict) -> None:
        self.adamw.load_state_dict(state["adamw"])
        for bank, full in zip(self.banks, state["momentum"], strict=True):
            bank.load_momentum(full.to(self.world.device))


class Ema:
    """Moving average of every tensor of the model, in fp32, started at the initial weights, without debiasing."""

    def __init__(self, model: GPT, decay: float):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: GPT) -> None:
        live = model.state_dict()
        torch._foreach_lerp_(list(self.shadow.values()), [live[name].float() for name in self.shadow], 1 - self.decay)

    def copy_to(self, model: GPT) -> None:
        """Replace the weights by their average, each in its own dtype."""
        model.load_state_dict(self.shadow)


# ==================================================================================================
# TRAINING - schedules as pure functions of progress, exact warm-up, and a loop that never overruns its clock.
# ==================================================================================================

def lr_scale(cfg: Config, progress: float, step: int = 0, step_seconds: float = 0.0) -> float:
    """Share of the peak learning rate: 1, then linear down to MIN_LR over the last WARMDOWN_FRAC; progress runs from 0 to 1.

    With WARMDOWN_ITERS the warmdown lasts that many steps instead: counted back from ITERATIONS, or from the end of the
    clock at `step_seconds` per step.
    """
    if cfg.warmdown_iters:
        budget = cfg.train_budget_seconds
        by_clock = cfg.train_seq_schedule_mode == "wallclock" and budget and step_seconds
        left = budget * (1 - progress) / step_seconds if by_clock else cfg.iterations - step
        return max(min(1.0, left / cfg.warmdown_iters), cfg.min_lr)
    if progress < 1 - cfg.warmdown_frac or not cfg.warmdown_frac:
        return 1.0
    return max((1 - progress) / cfg.warmdown_frac, cfg.min_lr)


def context_length(cfg: Config, progress: float) -> int:
    """Attention context: the first stage whose end fraction has not passed."""
    return next(length for length, end in cfg.seq_schedule if progress <= end)


def rewarmup(cfg: Config, steps_since_change: int | None) -> float:
    """Ramp after a context change: k / SEQ_CHANGE_WARMUP_STEPS at its k-th step. None = no change yet."""
    if steps_since_change is None or not cfg.seq_change_warmup_steps:
        return 1.0
    return min(1.0, steps_since_change / cfg.seq_change_warmup_steps)


def muon_momentum(cfg: Config, step: int) -> float:
    """Linear warm-up over MUON_MOMENTUM_WARMUP_STEPS, then constant."""
    share = min(1.0, step / cfg.muon_momentum_warmup_steps) if cfg.muon_momentum_warmup_steps else 1.0
    return cfg.muon_momentum_warmup_start + share * (cfg.muon_momentum - cfg.muon_momentum_warmup_start)


def looping_at(cfg: Config, progress: float) -> bool:
    """Whether the middle blocks repeat at this point of the run."""
    return cfg.num_loops > 0 and progress >= cfg.enable_looping_at


def warm_shapes(cfg: Config) -> list[tuple[int, bool]]:
    """(context, looping) combinations the run will meet, in the order it meets them."""
    if not cfg.compile_shape_warmup:
        return list(dict.fromkeys([(cfg.train_seq_len, False), (cfg.train_seq_len, cfg.num_loops > 0)]))
    shapes, start = [], 0.0
    for length, end in cfg.seq_schedule:
        plain = not cfg.num_loops or start < cfg.enable_looping_at
        looped = cfg.num_loops > 0 and end > cfg.enable_looping_at
        shapes += [(length, looping) for looping, wanted in ((False, plain), (True, looped)) if wanted]
        start = end
    return list(dict.fromkeys(shapes))


def warm_lengths(tokens: int, context: int) -> list[int]:
    """Lengths of cu_seqlens to warm for rows of `tokens`: the least there can be, and three more buckets."""
    segments = -(-tokens // context)
    return [CU_SEQLENS_BUCKET * (segments // CU_SEQLENS_BUCKET + k) for k in range(1, 5)]


def warm_rows(row: Row, context: int) -> list[Row]:
    """`row` cut every `context` tokens, once for each of its `warm_lengths`."""
    n, device = row.targets.numel(), row.inputs.device
    bounds = (torch.arange(length, dtype=torch.int32).mul(context).clamp(max=n) for length in warm_lengths(n, context))
    return [row._replace(segments=Segments(cu_seqlens.to(device), context)) for cu_seqlens in bounds]


def nats_of_row(row: Row, forward, graphs: Graphed | None, **options) -> Tensor:
    """Nats (1, T). A row of more segments than were warmed does without a graph."""
    few = len(row.segments.cu_seqlens) in warm_lengths(row.targets.numel(), row.segments.max_len)
    run = graphs if graphs and few else forward
    return run(row.inputs, row.targets, segments=row.segments, **options)


class StepClock:
    """Seconds of training so far, and a forecast of the next step. Pausing excludes validation and checkpoints."""

    def __init__(self, seconds: float = 0.0, recent: tuple[float, ...] = ()):
        self.seconds, self.start, self.recent = seconds, None, [*recent]  # start None: paused

    def now(self) -> float:
        return self.seconds + (0.0 if self.start is None else time.perf_counter() - self.start)

    def pause(self) -> None:
        self.seconds, self.start = self.now(), None

    def go_on(self) -> None:
        self.start = time.perf_counter()

    def record(self, seconds: float, applications: int) -> None:
        """Seconds of one step that ran `applications` blocks."""
        self.recent = [*self.recent[-9:], seconds / applications]

    def forecast(self, applications: int) -> float:
        """Upper estimate of a step: the slowest recent one, per block, plus 10 %."""
        return 1.1 * max(self.recent, default=0.0) * applications


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a request that the loop honours between two steps; the second one kills."""

    def __init__(self):
        self.requested, self.previous = False, {}

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
    """How busy the device is kept: FLOPs per second as a share of what it could do. seconds: of the work, pauses left out."""

    def __init__(self, world: World, work: FlopCount | None = None, seconds: float = 0.0):
        name, self.measured = hardware_name(world), measured_peak(world)
        self.datasheet = next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
        self.work, self.seconds, self.marked, self.marked_at = work or FlopCount(), seconds, (FlopCount(), 0.0), time.perf_counter()

    def share(self, flops: float, seconds: float) -> dict[str, float | None]:
        """`flops` in `seconds`, of the datasheet's peak (None where there is none) and of the measured one."""
        rate = flops / seconds if seconds else 0.0
        return dict(mfu=rate / self.datasheet if self.datasheet else None, of_measured=rate / self.measured)

    def interval(self) -> str:
        """Since the last call, for the log: the model's FLOPs, then, of the datasheet's peak or else of the measured one, those of
        scored tokens, those the hardware ran, and the model's again with validation and checkpoints in the time."""
        (old, old_seconds), now = self.marked, time.perf_counter()
        model, useful, hardware = (getattr(self.work, kind) - getattr(old, kind) for kind in ("model", "useful", "hardware"))
        seconds, wall = self.seconds - old_seconds, max(now - self.marked_at, self.seconds - old_seconds)
        shares = self.share(model, seconds)
        for name, flops, time_of in (("useful", useful, seconds), ("hardware", hardware, seconds), ("with_pauses", model, wall)):
            of_datasheet, of_measured = self.share(flops, time_of).values()
            shares[name] = of_measured if of_datasheet is None else of_datasheet
        self.marked, self.marked_at = (copy.copy(self.work), self.seconds), now
        return " ".join(f"{name}:{'n/a' if value is None else format(value, '.4f')}" for name, value in shares.items())

    def result(self, wall_seconds: float) -> dict:
        """Of all of it: three kinds of FLOPs, each without and with pauses for validation and checkpoints."""
        kinds = ("model", "useful", "hardware")
        return dict(
            **{kind: self.share(getattr(self.work, kind), self.seconds) for kind in kinds},
            **{f"{kind}_with_pauses": self.share(getattr(self.work, kind), wall_seconds) for kind in kinds},
            model_flops=self.work.model, peak_flops=dict(datasheet=self.datasheet, measured=self.measured))


class Trainer:
    """Model, optimizer, average and data of one training run, and the state a checkpoint keeps."""

    def __init__(self, cfg: Config, world: World, files: Dataset, kernels: Kernels = DEFINITIONS):
        self.cfg, self.world, self.files = cfg, world, files
        self.model = build_model(cfg, world, kernels)
        self.forward = compile_forward(self.model, cfg, world)
        self.graphs = Graphed(self.forward, (p for p in self.model.parameters() if p.requires_grad)) if cfg.cuda_graphs else None
        self.optimizer = TrainOptimizer(self.model, cfg, world)
        self.ema = Ema(self.model, cfg.ema_decay) if cfg.ema_decay else None
        self.accumulate = cfg.micro_batches // world.size
        self.utilization = Utilization(world)
        self.loader = self.open_loader()
        self.step, self.clock, self.changed_at, self.stage_len = 0, StepClock(), None, cfg.seq_schedule[0][0]
        self.looping, self.losses = False, []

    def open_loader(self, position: tuple[int, int] | None = None) -> TrainLoader:
        cfg = self.cfg
        return TrainLoader(self.files.train, cfg.train_microbatch_tokens, cfg.micro_batches, cfg.vocab_size, position)

    def loss(self, row: Row, order: tuple[int, ...]) -> Tensor:
        """This row's part of the mean loss of the rank's micro-batches."""
        weight = 1 / (row.targets.numel() * self.accumulate)
        return weight * nats_of_row(row, self.forward, self.graphs, layers=order, training=True).sum()

    def train_step(self, window: np.ndarray, context: int, looping: bool, lr: float, momentum: float) -> float:
        """One optimizer step on a window (rows, span) of all ranks; returns the mean loss in nats, the same on every rank.

        Raises FloatingPointError before any weight is touched when loss or gradient is not finite.
        """
        order, total = layer_order(self.cfg, looping), torch.zeros((), device=self.world.device)
        for tokens in window[self.world.rank * self.accumulate : (self.world.rank + 1) * self.accumulate]:
            row = packed_row(tokens, context, self.world.device)
            loss = self.loss(row, order)
            loss.backward()
            n = row.targets.numel()
            self.utilization.work.add(flops_per_token(self.cfg, row.lengths, looping), "train", n, n)
            total += (loss := loss.detach())  # its graph goes: see `Graphed` on accumulators
        self.world.sum_(total)
        mean = Readback(total / self.world.size)
        with torch.profiler.record_function("optimizer"):
            self.optimizer.step(lr, momentum)
        return mean.read()

    def state(self) -> dict:
        """Everything that decides how the run goes on."""
        return dict(
            config_hash=config_hash(self.cfg), seed=self.cfg.seed, step=self.step, seconds=self.clock.now(), recent=self.clock.recent,
            position=self.loader.position,
            changed_at=self.changed_at, stage_len=self.stage_len, looping=self.looping, losses=self.losses,
            model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), ema=self.ema.shadow if self.ema else {},
        )

    def load_state(self, state: dict) -> None:
        """Go on where `state` was taken. Raises RunError when it belongs to another recipe."""
        if (state.get("config_hash"), state.get("seed")) != (config_hash(self.cfg), self.cfg.seed):
            found = f"{state.get('config_hash')}, seed {state.get('seed')}"
            raise RunError(f"checkpoint.pt was written by another configuration or seed ({found}); "
                           "resume with the same variables, or start afresh with RESUME=0")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.shadow = {name: t.to(self.world.device) for name, t in state["ema"].items()}
        self.loader.close()
        self.loader = self.open_loader(tuple(state["position"]))
        self.step, self.clock, self.changed_at = state["step"], StepClock(state["seconds"], state["recent"]), state["changed_at"]
        self.stage_len, self.looping, self.losses = state["stage_len"], state["looping"], state["losses"]

    def checkpoint(self, path: Path) -> None:
        state = self.state()
        if self.world.main:
            save_tensors(path, state)

    def warm_up(self, log: Log) -> None:
        """Compile every shape and run WARMUP_STEPS steps per loop mode, then put back weights, moments and data exactly."""
        cfg = self.cfg
        compiled = self.graphs or self.forward is not self.model
        if not compiled and not cfg.warmup_steps:
            return
        model, generator = {name: t.detach().clone() for name, t in self.model.state_dict().items()}, torch.get_rng_state()
        optimizer = copy.deepcopy(self.optimizer.state_dict())
        window = self.loader.next_step()
        if compiled:
            self.warm_shapes(window[0], log)
        for looping in dict.fromkeys((False, cfg.num_loops > 0)):
            order = layer_order(cfg, looping)
            if looping:
                log(f"loop_warmup:enabled encoder:{list(order[: len(order) // 2])} decoder:{list(order[len(order) // 2 :])}")
            for k in range(cfg.warmup_steps):
                try:
                    self.train_step(window, cfg.seq_schedule[0][0], looping, 1.0, muon_momentum(cfg, k))
                except FloatingPointError as e:
                    raise RunError(f"warm-up step {k + 1}: {e}; lower MATRIX_LR or TIED_EMBED_LR, or look at the data") from None
                if k < 6 or (k + 1) % 10 == 0 or k + 1 == cfg.warmup_steps:
                    log(f"{'loop_warmup_step' if looping else 'warmup_step'}: {k + 1}/{cfg.warmup_steps}")
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.optimizer.zero_grad()
        self.loader.close()
        self.loader, self.utilization = self.open_loader(), Utilization(self.world)
        torch.set_rng_state(generator)

    def warm_shapes(self, tokens: np.ndarray, log: Log) -> None:
        """Forward and backward, without a step, for every context, loop mode and length of cu_seqlens."""
        cfg, shapes, n = self.cfg, warm_shapes(self.cfg), self.cfg.train_microbatch_tokens
        log("compile_shape_warmup:start " + ",".join(f"{n}x{'loop' if loop else 'plain'}" for n, loop in shapes))
        row = packed_row(tokens, cfg.train_seq_len, self.world.device)
        for length, looping in shapes * (1 + bool(self.graphs)):  # graphs are recorded in the second round
            log(f"compile_shape_warmup:shape seq_len:{length} loop:{int(looping)} "
                f"warmup_cu_buckets:{','.join(map(str, warm_lengths(n, length)))}")
            for shaped in warm_rows(row, length):
                self.loss(shaped, layer_order(cfg, looping)).backward()
                self.optimizer.zero_grad()

    def plan_step(self, elapsed: float, log: Log) -> tuple[int, bool, float]:
        """Context, loop mode and learning-rate factor of the step about to run."""
        cfg = self.cfg
        budget = cfg.train_budget_seconds
        by_clock = cfg.train_seq_schedule_mode == "wallclock" and budget > 0
        progress = min(1.0, elapsed / budget if by_clock else self.step / max(1, cfg.iterations))
        context = context_length(cfg, progress)
        if context != self.stage_len:
            self.stage_len, self.changed_at = context, self.step
            log(f"growth_stage:seq_len:{context} progress:{progress:.3f} step:{self.step}")
            if cfg.seq_change_warmup_steps:
                log(f"growth_stage_rewarmup:start step:{self.step} steps:{cfg.seq_change_warmup_steps} seq_len:{context}")
        if looping_at(cfg, progress) and not self.looping:
            self.looping, order = True, layer_order(cfg, True)
            log(f"layer_loop:enabled step:{self.step} frac:{progress:.3f} encoder:{list(order[: len(order) // 2])} "
                f"decoder:{list(order[len(order) // 2 :])}")
        ramp = rewarmup(cfg, None if self.changed_at is None else self.step - self.changed_at + 1)
        per_step = elapsed / self.step if self.step else 0.0
        return context, self.looping, lr_scale(cfg, progress, self.step, per_step) * ramp


def log_training_start(cfg: Config, trainer: Trainer, log: Log) -> None:
    """What is about to be trained, by which schedule, on a device of which speed."""
    log(f"model_params:{sum(p.numel() for p in trainer.model.parameters())}")
    measured, datasheet = trainer.utilization.measured, trainer.utilization.datasheet
    log(f"peak_tflops: measured:{measured / 1e12:.4g} datasheet:{'n/a' if datasheet is None else format(datasheet / 1e12, '.4g')}")
    log("train_seq_schedule:" + ",".join(f"{n}@{end:.3f}" for n, end in cfg.seq_schedule))
    log(f"local_microbatch_tokens:{cfg.train_microbatch_tokens}")
    log(f"growth_stage:seq_len:{cfg.seq_schedule[0][0]} progress:0.000")
    log(f"gptq:reserving {cfg.reserve_seconds:.0f}s, effective={cfg.train_budget_seconds * 1000:.0f}ms")


def step_profiler(cfg: Config, trainer: Trainer, path: Path):
    """torch's profiler over PROFILE steps after the third, and the speeds they are to be measured by; None without PROFILE."""
    if not cfg.profile or not trainer.world.main:
        return None
    device = trainer.world.device
    source = torch.ones(1 << 26, device=device)
    speeds = dict(flops_per_second=trainer.utilization.measured, bytes_per_second=2 * source.nbytes / quickest(trainer.world, source.clone))
    write_atomic(path.with_name("profile_speeds.json"), json.dumps(speeds).encode())
    kinds = torch.profiler.ProfilerActivity
    return torch.profiler.profile(
        activities=[kinds.CPU, *([kinds.CUDA] if device.type == "cuda" else [])], record_shapes=True,
        schedule=torch.profiler.schedule(wait=2, warmup=1, active=cfg.profile, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)))


def train(trainer: Trainer, validate, log: Log, checkpoint_path: Path, forecast=None) -> None:
    """The timed loop. Stops at ITERATIONS, at FORCE_STOP_STEP, or before the step that would overrun the budget.

    validate(): scores the model as it stands, clock stopped. forecast(tokens): what the main rank's log says of the artifact so far,
    clock running, only where that takes less than 1 % of the time since it last did. Raises Interrupted on Ctrl-C and RunError when
    loss or gradient is no longer finite; in both cases checkpoint.pt holds the last good state.
    """
    cfg, world, clock = trainer.cfg, trainer.world, trainer.clock
    budget, checkpointed, tokens_per_step, compiled = cfg.train_budget_seconds, 0.0, cfg.train_batch_tokens, len(compilations())
    profiler, asked, cost = step_profiler(cfg, trainer, checkpoint_path.with_name("profile.json.gz")), 0.0, 0.0
    clock.go_on()
    with StopRequest() as stop, profiler or contextlib.nullcontext():
        while trainer.step < (cfg.force_stop_step or cfg.iterations):
            made = [] if cfg.compile_allow_recompiles else compilations()[compiled:]
            elapsed, per_block, requested, recompiled = world.max(clock.now(), clock.forecast(1), float(stop.requested), len(made))
            context, looping, lr = trainer.plan_step(elapsed, log)
            applications = len(layer_order(cfg, looping))
            if requested or recompiled:
                clock.pause()
                trainer.checkpoint(checkpoint_path)
                go_on = f"{checkpoint_path} holds it: go on with RESUME=1 and the same variables (ARTIFACT_DIR={checkpoint_path.parent})"
                if requested:
                    raise Interrupted(f"interrupted after step {trainer.step}; {go_on}")
                raise recompile_error(f"step {trainer.step}", made, f"COMPILE_SHAPE_WARMUP=1 may avoid it. {go_on}")
            if budget and not cfg.force_stop_step and elapsed + per_block * applications > budget:
                log(f"stopping_early: wallclock_cap train_time: {elapsed * 1000:.0f}ms step: {trainer.step}/{cfg.iterations}")
                break
            position, window = trainer.loader.position, trainer.loader.next_step()
            try:
                loss = trainer.train_step(window, context, looping, lr, muon_momentum(cfg, trainer.step))
            except FloatingPointError as e:
                trainer.loader.position = position
                trainer.optimizer.zero_grad()
                trainer.checkpoint(checkpoint_path)
                raise RunError(f"step {trainer.step + 1}: {e}; the weights before it are in {checkpoint_path}. Lower MATRIX_LR or "
                               "TIED_EMBED_LR, or look at the data of this step") from None
            trainer.step += 1
            if trainer.ema:
                trainer.ema.update(trainer.model)
            now = clock.now()
            clock.record(now - elapsed, applications)
            trainer.utilization.seconds += now - elapsed
            if profiler:
                profiler.step()
            trainer.losses.append((trainer.step, round(now, 3), round(loss, 5)))
            if trainer.step <= 5 or trainer.step % cfg.train_log_every == 0:
                log(f"{trainer.step}/{cfg.iterations} train_loss: {loss:.4f} train_time: {now / 60:.1f}m "
                    f"tok/s: {trainer.step * tokens_per_step / now:.0f} seconds:{now:.2f} lr_scale:{lr:.4f} "
                    f"tok/s_now:{tokens_per_step / (now - elapsed):.0f} {trainer.utilization.interval()}")
                price = cost or 3 * (now - elapsed)  # until it is known: as much as three steps
                if forecast and world.main and now - asked > 100 * price and (not budget or now + 2 * price < budget):
                    log(f"{trainer.step}/{cfg.iterations} {forecast(window[0])}")
                    asked, compiled = clock.now(), len(compilations())
                    cost = asked - now
            if cfg.val_loss_every and trainer.step % cfg.val_loss_every == 0:
                clock.pause()
                score, compiled = validate(), len(compilations())
                log(f"{trainer.step}/{cfg.iterations} val_loss: {score.loss:.4f} val_bpb: {score.bpb:.4f}")
                clock.go_on()
            if cfg.checkpoint_seconds and (agreed := world.max(now)[0]) - checkpointed >= cfg.checkpoint_seconds:
                clock.pause()
                checkpointed = agreed
                trainer.checkpoint(checkpoint_path)
                clock.go_on()
        world.synchronize()
        clock.pause()
    trainer.loader.close()
    if not trainer.step:
        raise RunError(f"no step fits into {budget:g} s of training: raise MAX_WALLCLOCK_SECONDS or lower TRAIN_BATCH_TOKENS")
    score = validate()
    log(f"{trainer.step}/{cfg.iterations} val_loss: {score.loss:.4f} val_bpb: {score.bpb:.4f}")


# ==================================================================================================
# QUANTIZATION - weights -> small integers and scales. Each codec is an encode next to its decode; rules choose.
# ==================================================================================================

class Hessians:
    """GPTQ's H = sum of x^T x over every matmul input, by site; handed to the forward as its tap."""

    def __init__(self):
        self.H: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}
        self.squares: dict[str, Tensor] = {}  # QUANT=rd: sum of squared gradients of the loss, by matrix (rows, cols)

    def __call__(self, site: str, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        if site not in self.H:
            self.H[site] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        self.H[site].addmm_(x.T, x)
        self.count[site] = self.count.get(site, 0) + len(x)

    def add_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Gradients of the summed loss of one window. The embedding is read as input and as head, so its H are its gradients'."""
        for name, g in gradients.items():
            self.squares[name] = g.float().square() if name not in self.squares else self.squares[name].addcmul_(g, g)
            if name == "tok_emb.weight":
                self(name, g)

    def rms(self, site: str) -> Tensor:
        """Root mean square of each input column."""
        return (self.H[site].diagonal() / self.count[site]).sqrt()


def kind_of(name: str) -> str:
    """The name without its block: "blocks.3.attn.q_gain" -> "blocks.*.attn.q_gain"."""
    return ".".join("*" if word.isdigit() else word for word in name.split("."))


@torch.no_grad()
def write_sequences(cfg: Config, world: World, model: GPT, count: int = 64, length: int = 2048, temperature: float = 0.8) -> np.ndarray:
    """Text of the model's own for calibration (PR #1019): this rank's share (n, T + 1) of `count` sequences, T = min(length,
    TRAIN_SEQ_LEN). The first token is uniform, the others are drawn at `temperature`; SEED decides them, on any number of ranks."""
    size, order = min(length, cfg.train_seq_len) + 1, layer_order(cfg, looping=True)
    draws = torch.rand(count, size, generator=torch.Generator().manual_seed(cfg.seed))[world.rank :: world.size].to(world.device)
    tokens, cache = (draws * cfg.vocab_size).long(), Cache(size - 1)
    for t in range(1, size):
        odds = (model(tokens[:, t - 1 : t], None, layers=order, cache=cache)[:, 0] / temperature).softmax(-1).cumsum(-1)
        tokens[:, t] = torch.searchsorted(odds, draws[:, t : t + 1] * odds[:, -1:])[:, 0]
    return tokens.cpu().numpy()


def calibration_parts(cfg: Config) -> int:
    """Windows per micro-batch of calibration: gradients want more samples and less memory."""
    return min(8, cfg.train_microbatch_tokens // cfg.train_seq_len) if cfg.quant == "rd" else 1


def calibrate(cfg: Config, world: World, model: GPT, weights: dict[str, Tensor], tokens: np.ndarray, hessians: Hessians) -> None:
    """Add one window to `hessians`, run through the looped network with documents masked as in training; its gradients with QUANT=rd.
    weights: parameters by name, which take the place of the model's own."""
    row = packed_row(tokens, cfg.train_seq_len, world.device)
    quantized = {m.parameter for m in matrices(cfg) if m.stored is not None and m.stored.codec == "gptq"}
    learned = {name: t for name, t in weights.items() if name in quantized}
    how = dict(layers=layer_order(cfg, looping=True), segments=row.segments, tap=hessians)
    with torch.set_grad_enabled(cfg.quant == "rd"):
        nats = torch.func.functional_call(model, weights, (row.inputs, row.targets), how)
        if cfg.quant == "rd":
            gradients = torch.autograd.grad(nats.sum(), list(learned.values()))
            hessians.add_gradients(unbank(cfg, dict(zip(learned, gradients, strict=True))))


@torch.no_grad()
def collect_hessians(cfg: Config, world: World, model: GPT, files: Dataset, log: Log) -> Hessians:
    """Calibrate on windows of training data or on text of the model's own, and add up over the ranks."""
    hessians, batches, parts = Hessians(), cfg.gptq_calibration_batches * cfg.micro_batches, calibration_parts(cfg)
    start = time.perf_counter()
    if cfg.gptq_calibration == "self":
        windows = write_sequences(cfg, world, model)
        log(f"GPTQ:wrote {len(windows)} sequences of {windows.shape[1]} tokens per rank in {time.perf_counter() - start:.1f}s")
    else:
        windows = calibration_windows(files.train, cfg.train_microbatch_tokens // parts, batches * parts)[world.rank :: world.size]
    eta, weights = Eta(len(windows)), dict(model.named_parameters())
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
    """fp16 steps that put `clip` on `q_max` steps: fp16 because that is what is stored; never zero, so a zero row decodes to zeros."""
    return (clip / q_max).clamp_min(1e-10).half().clamp_min(2.0**-24)


def inverse_cholesky(H: Tensor) -> Tensor:
    """Upper U with U^T U = H^-1, for a stack of positive definite H: Cholesky of the flipped H, one triangular solve."""
    R = torch.linalg.cholesky(H.flip(-2, -1)).flip(-2, -1)  # H = R R^T, R upper
    identity = torch.eye(H.shape[-1], device=H.device, dtype=H.dtype).expand_as(H)
    return torch.linalg.solve_triangular(R, identity, upper=True)


def factor(H: Tensor, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Damped H (n, cols, cols) -> the order in which GPTQ walks the columns, largest diagonal first (n, cols), and `inverse_cholesky`
    of H in that order. A column that no input uses (dead) counts as 1."""
    H = H.clone()
    diag = H.diagonal(dim1=-2, dim2=-1)
    diag[diag == 0] = 1
    diag += damping * diag.mean(-1, keepdim=True)
    perm = diag.argsort(dim=-1, descending=True, stable=True)  # act-order
    H = H.gather(1, perm[:, :, None].expand_as(H)).gather(2, perm[:, None].expand_as(H))
    return perm, inverse_cholesky(H)


def walk_columns(W: Tensor, perm: Tensor, U: Tensor, step: Tensor, choose, block: int = 128) -> Tensor:
    """GPTQ (arXiv:2210.17323): quantize column after column, each error passed on to the columns that follow.

    W and step (n, rows, cols), perm and U from `factor`. choose(x, j): column x (n, rows) in steps, from column j (n,) -> its integers
    and the values they stand for, in steps. Returns the integers, fp32, in the order of W.
    """
    cols, index = W.shape[2], perm[:, None].expand_as(W)
    W, step, Q = W.gather(2, index), step.gather(2, index), torch.empty_like(W)
    for start in range(0, cols, block):
        end = min(start + block, cols)
        err = torch.empty_like(W[:, :, start:end])
        for j in range(start, end):
            s = step[:, :, j]
            Q[:, :, j], value = choose(W[:, :, j] / s, perm[:, j])
            e = (W[:, :, j] - value * s) / U[:, j, j, None]
            W[:, :, j:end] -= e[:, :, None] * U[:, j, None, j:end]
            err[:, :, j - start] = e
        W[:, :, end:] -= err @ U[:, start:end, end:]
    return Q.gather(2, perm.argsort(-1)[:, None].expand_as(Q))


def without_dead_columns(W: Tensor, H: Tensor) -> Tensor:
    """W (n, rows, cols) with zeros where no input ever is."""
    return W.masked_fill((H.diagonal(dim1=-2, dim2=-1) == 0)[:, None], 0)


def gptq(W: Tensor, H: Tensor, clip: Tensor, bits: int, protected: Tensor, hi_bits: int, block: int = 128):
    """GPTQ with one scale per row, for a stack of matrices of one shape.

    W (n, rows, cols) fp32, H (n, cols, cols), clip (n, rows): where a row's grid ends, protected (n, cols) bool: columns on the
    finer grid of `hi_bits`. Returns q int8 (n, rows, cols) and the fp16 scales (n, rows) of plain and of protected columns.
    """
    q_max, hi_max = 2 ** (bits - 1) - 1, 2 ** (hi_bits - 1) - 1
    scale, hi_scale = step_size(clip, q_max), step_size(clip, hi_max)
    step = torch.where(protected[:, None], hi_scale.float()[:, :, None], scale.float()[:, :, None])
    limit = torch.where(protected, hi_max, q_max).float()

    def choose(x: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        top = limit.gather(1, j[:, None])
        q = x.round().clamp(-top, top)
        return q, q

    q = walk_columns(without_dead_columns(W, H), *factor(H), step, choose, block)
    return q.to(torch.int8), scale, hi_scale


# A trellis codes a column in segments of rows. The parity of each integer moves a state machine (next state by state and parity);
# it starts at 0 in every segment, and in odd states the second of two quantizers is active: k stands for 2 k steps in the first, for
# 2 k - sign(k) in the second. Together they have every multiple of a step (dependent quantization, as in the VVC video standard).
TRELLIS_SEGMENT = 128
TRELLIS_NEXT = ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5))
TRELLIS_INTO = torch.tensor([[2 * s + p for s in range(8) for p in (0, 1) if TRELLIS_NEXT[s][p] == t] for t in range(8)])  # (8, 2)
TRELLIS_ERROR = 0.24  # mean squared error of its nearest path, in steps squared


def trellis_values(q: Tensor) -> Tensor:
    """Integers (n, rows) -> what they stand for, in steps."""
    (n, rows), height = q.shape, min(max(q.shape[1], 1), TRELLIS_SEGMENT)
    lanes = F.pad(q.long(), (0, -rows % height)).reshape(-1, height).T
    following = torch.tensor(TRELLIS_NEXT, device=q.device).view(-1)
    second, state = torch.empty_like(lanes), torch.zeros_like(lanes[0])
    for t, k in enumerate(lanes):
        second[t] = state & 1
        state = following[2 * state + (k & 1)]
    return (2 * lanes - second * lanes.sign()).T.reshape(n, -1)[:, :rows].float()


def viterbi(lanes: Tensor) -> tuple[Tensor, Tensor]:
    """`trellis_path` of segments side by side, lanes (height, segments) -> two of its shape."""
    height = len(lanes)
    a, sign = lanes.abs(), torch.where(lanes < 0, -1.0, 1.0)
    k = torch.stack((  # the nearest integers by quantizer and parity: even and odd of the first, even and odd of the second
        2 * (a / 4).round().clamp_max(63), 2 * ((a - 2) / 4).round().clamp(0, 63) + 1,
        torch.where(a < 1.5, 0, 2 * ((a + 1) / 4).round().clamp(1, 63)), 2 * ((a - 1) / 4).round().clamp(0, 63) + 1), 1)
    value = 2 * k
    value[:, 2:] -= k[:, 2:].sign()
    branch = (value - a[:, None]).square()  # (steps, 4, lanes)
    into = TRELLIS_INTO.to(lanes.device)
    source, kind = into // 2, into // 2 % 2 * 2 + into % 2  # state and branch of the two ways into each state (8, 2)
    branch = branch[:, kind.T]  # (steps, 2, 8, lanes)
    cost = torch.full((8, lanes.shape[1]), math.inf, device=lanes.device)
    cost[0] = 0
    second = torch.empty((height, *cost.shape), dtype=torch.bool, device=lanes.device)
    for t in range(height):
        ways = cost[source.T] + branch[t]
        torch.lt(ways[1], ways[0], out=second[t])
        cost = torch.minimum(ways[0], ways[1])
    state, best = cost.argmin(0, keepdim=True), torch.empty_like(lanes, dtype=torch.long)
    way = torch.where(second, into[:, 1, None], into[:, 0, None])  # 2 * state + parity by which each state was reached
    for t in reversed(range(height)):
        best[t] = reached = way[t].gather(0, state)[0]
        state = reached[None] // 2
    chosen = (best // 2 % 2 * 2 + best % 2)[:, None]
    return tuple(sign * y.gather(1, chosen)[:, 0] for y in (k, value))


def trellis_path(x: Tensor, search=viterbi) -> tuple[Tensor, Tensor]:
    """The integers |k| <= 127 whose values are nearest to x (n, rows) in steps, over whole segments, and those values."""
    (n, rows), height = x.shape, min(max(x.shape[1], 1), TRELLIS_SEGMENT)
    lanes = F.pad(x, (0, -rows % height)).reshape(-1, height).T.contiguous()  # (steps, lanes)
    return tuple(y.T.reshape(n, -1)[:, :rows] for y in search(lanes))


class QuantizedTensor(NamedTuple):
    """One tensor of the artifact: its codecs, whose decoded values add up, and their parts by (codec, part)."""

    parts: dict[tuple[str, str], Tensor]

    def decode(self) -> Tensor:
        """fp32 values."""
        codecs = dict.fromkeys(codec for codec, _ in self.parts)
        return sum(CODECS[codec].decode({part: t for (c, part), t in self.parts.items() if c == codec}) for codec in codecs)


class Float16:
    """Half precision, as it is."""

    @staticmethod
    def encode(w: Tensor) -> dict[str, Tensor]:
        return dict(w=w.half())

    @staticmethod
    def decode(parts: dict[str, Tensor]) -> Tensor:
        return parts["w"].float()


class Int8Rows:
    """Symmetric int8, one fp16 scale per row."""

    @staticmethod
    def encode(w: Tensor) -> dict[str, Tensor]:
        scale = step_size(w.abs().amax(1), 127)
        return dict(q=(w / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale=scale)

    @staticmethod
    def decode(parts: dict[str, Tensor]) -> Tensor:
        return parts["q"].float() * parts["scale"].float()[:, None]


class Gptq:
    """What `gptq` chose: integers, a scale per row, and a finer scale for the protected column groups (AWQ-lite, PR #1908)."""

    @staticmethod
    def encode(q: Tensor, scale: Tensor, hi_scale: Tensor, hi_starts: list[int], hi_size: int) -> dict[str, Tensor]:
        parts = dict(q=q, scale=scale)
        if hi_starts:
            hi_start, size = torch.tensor(hi_starts, dtype=torch.int16), torch.tensor([hi_size], dtype=torch.int16)
            parts |= dict(hi_start=hi_start, hi_size=size, hi_scale=hi_scale)
        return parts

    @staticmethod
    def decode(parts: dict[str, Tensor]) -> Tensor:
        q = parts["q"].float()
        w, high = q * parts["scale"].float()[:, None], torch.zeros(q.shape[1], dtype=torch.bool, device=q.device)
        if "hi_start" in parts:
            for start in parts["hi_start"].unique().tolist():
                high[start : start + int(parts["hi_size"])] = True
            w[:, high] = q[:, high] * parts["hi_scale"].float()[:, None]
        return w


RD_DAMPING, RD_FLOOR = 0.05, 1e-2
HALF_OCTAVES = torch.tensor([math.ldexp((1, math.sqrt(2))[n & 1], n >> 1) for n in range(-256, 256)])


class Trellis:
    """A trellis of integers down the rows of each column, with a step for each row and each column, in half octaves."""

    @staticmethod
    def encode(q: Tensor, row: Tensor, col: Tensor, step: Tensor, octave: Tensor) -> dict[str, Tensor]:
        """q int8 (rows, cols); row (rows,) and col (cols,) int8; step int16 (1,) times 2 to the octave int8 (1,), common to all."""
        return dict(q=q, row=row, col=col, step=step, octave=octave)

    @staticmethod
    def steps(parts: dict[str, Tensor]) -> Tensor:
        """(rows, cols) fp32, exactly the same everywhere: a number of 15 bits, half octaves from a table."""
        codes = parts["row"].int()[:, None] + parts["col"].int()
        return math.ldexp(int(parts["step"]), int(parts["octave"])) * HALF_OCTAVES.to(codes.device)[256 + codes]

    @staticmethod
    def decode(parts: dict[str, Tensor]) -> Tensor:
        return trellis_values(parts["q"].T).T * Trellis.steps(parts)


class LowRank:
    """Low-rank correction with symmetric integer factors, one fp16 scale per row of A and of B (LQER, arXiv:2402.02446)."""

    @staticmethod
    def encode(A: Tensor, B: Tensor, bits: int) -> dict[str, Tensor]:
        parts, q_max = {}, 2 ** (bits - 1) - 1
        for name, factor in (("A", A), ("B", B)):
            scale = step_size(factor.abs().amax(1), q_max)
            parts |= {name: (factor / scale.float()[:, None]).round().clamp(-q_max, q_max).to(torch.int8), f"{name}_scale": scale}
        return parts

    @staticmethod
    def decode(parts: dict[str, Tensor]) -> Tensor:
        A, B = (parts[name].float() * parts[f"{name}_scale"].float()[:, None] for name in ("A", "B"))
        return A @ B


class LowRankAsym:
    """Low-rank correction, A in {-2..1} with one scale, B in {-8..7} with one scale per group of values (PR #1797)."""

    @staticmethod
    def encode(A: Tensor, B: Tensor, group: int) -> dict[str, Tensor]:
        a_scale = step_size(A.abs().max(), 1.5)
        groups = B.reshape(-1, group)
        b_scale = step_size(groups.abs().amax(1), 7.5)
        return dict(
            A=(A / a_scale.float()).round().clamp(-2, 1).to(torch.int8), A_scale=a_scale.view(1),
            B=(groups / b_scale.float()[:, None]).round().clamp(-8, 7).to(torch.int8).view_as(B), B_scale=b_scale)

    @staticmethod
    def decode(parts: dict[str, Tensor]) -> Tensor:
        B = parts["B"].float().reshape(len(parts["B_scale"]), -1) * parts["B_scale"].float()[:, None]
        return (parts["A"].float() * parts["A_scale"].float()) @ B.view_as(parts["B"])


CODECS = dict(float16=Float16, int8_row=Int8Rows, gptq=Gptq, trellis=Trellis, low_rank=LowRank, low_rank_asym=LowRankAsym)
CODEC_PARTS = dict(  # what an artifact may hold of each codec, and its dtype
    float16=dict(w="f2"), int8_row=dict(q="i1", scale="f2"), gptq=dict(q="i1", scale="f2", hi_start="i2", hi_size="i2", hi_scale="f2"),
    trellis=dict(q="i1", row="i1", col="i1", step="i2", octave="i1"), low_rank=dict(A="i1", A_scale="f2", B="i1", B_scale="f2"),
    low_rank_asym=dict(A="i1", A_scale="f2", B="i1", B_scale="f2"),
)

PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)  # of |w| in a row: where QUANT=s05 tries to end its grid


def stored_as(cfg: Config) -> dict[str, StoredAs]:
    """Codec by tensor, as the rows say; QUANT=s05 has an int8 embedding."""
    found = {m.name: m.stored for m in matrices(cfg) if m.stored is not None}
    embedding = found["tok_emb.weight"]
    return found | {"tok_emb.weight": embedding._replace(codec="int8_row")} if cfg.quant == "s05" else found


class GptqInput(NamedTuple):
    """One matrix for GPTQ."""

    name: str
    W: Tensor  # (rows, cols) fp32
    bits: int
    clip_sigmas: float
    site: str  # of the Hessian


def gptq_inputs(cfg: Config, tensors: dict[str, Tensor]) -> list[GptqInput]:
    """The tensors that the rules send to GPTQ, with their settings."""
    tasks = []
    for m in matrices(cfg):
        how = stored_as(cfg).get(m.name)
        if m.name in tensors and how is not None and how.codec == "gptq":
            site = how.site if m.layer is None else f"blocks.{m.layer}.{how.site}"
            tasks.append(GptqInput(m.name, tensors[m.name].float(), getattr(cfg, how.bits), getattr(cfg, how.clip_sigmas), site))
    return tasks


def mixed_bits(cfg: Config, tasks: list[GptqInput], hessians: Hessians) -> list[GptqInput]:
    """QUANT=s05: the N_INT6_LAYERS matrices with the largest trace of H keep their bits, the others lose one (PR #1105)."""
    if cfg.quant != "s05":
        return tasks
    ranked = sorted(tasks, key=lambda t: -hessians.H[t.site].trace().item())
    kept = {task.name for task in ranked[: cfg.n_int6_layers]}
    return [t if t.name in kept else t._replace(bits=t.bits - 1) for t in tasks]


def protected_groups(cfg: Config, tasks: list[GptqInput], hessians: Hessians) -> dict[str, list[int]]:
    """AWQ-lite: first columns of the groups with the largest sum of rms(x_j) mean|W_j|, the best over all tensors."""
    if not cfg.awq_lite_enabled:
        return {}
    size, scored = cfg.awq_lite_group_size, []
    for task in tasks:
        if task.bits < cfg.awq_lite_bits:
            column = hessians.rms(task.site) * task.W.abs().mean(0)
            groups = column[: len(column) // size * size].view(-1, size).sum(1)
            scored += [(score, task.name, g * size) for g, score in enumerate(groups.tolist())]
    chosen: dict[str, list[int]] = {}
    for _, name, start in sorted(scored, key=lambda s: (-s[0], s[1], s[2]))[: cfg.awq_lite_group_top_k]:
        chosen.setdefault(name, []).append(start)
    return chosen


def clip_candidates(cfg: Config, W: Tensor, sigmas: float) -> Tensor:
    """Where the grid of a row may end, for W (n, rows, cols): (n, candidates, rows). One multiple of the row's standard deviation
    (SDClip), or PERCENTILES of its |w|, at least 1 as published: rows of smaller weights share one step."""
    if cfg.quant != "s05":
        return sigmas * W.std(-1)[:, None]
    levels = torch.tensor(PERCENTILES, device=W.device)
    return torch.stack([w.abs().quantile(levels, dim=1).clamp_min(1) for w in W])


def run_gptq(cfg: Config, tasks: list[GptqInput], hessians: Hessians, protected: dict[str, list[int]]) -> dict[str, QuantizedTensor]:
    """GPTQ over all tasks, matrices of one shape and setting batched. Raises RunError when a Hessian is not positive definite."""
    batches, out = {}, {}
    for task in tasks:
        batches.setdefault((task.W.shape, task.bits, task.clip_sigmas), []).append(task)
    for ((_, cols), bits, clip), batch in batches.items():
        mask = torch.zeros(len(batch), cols, dtype=torch.bool, device=batch[0].W.device)
        for row, task in zip(mask, batch, strict=True):
            for start in protected.get(task.name, ()):
                row[start : start + cfg.awq_lite_group_size] = True
        H = torch.stack([hessians.H[t.site] for t in batch])
        W = torch.stack([t.W for t in batch])
        clips = clip_candidates(cfg, W, clip)
        if cfg.quant == "s05":  # damped twice, as published: here and in the solver
            H += torch.eye(cols, device=mask.device) * H.diagonal(dim1=-2, dim2=-1).mean(-1).mul(0.01).clamp_min(1e-6)[:, None, None]
        try:  # rows do not influence each other, so candidates are just more rows
            results = gptq(W.repeat(1, clips.shape[1], 1), H, clips.flatten(1), bits, mask, cfg.awq_lite_bits)
        except torch.linalg.LinAlgError as e:
            raise RunError(f"GPTQ of {batch[0].name} and its like: {e}; raise GPTQ_CALIBRATION_BATCHES") from None
        for task, *tried in zip(batch, *results, strict=True):
            found = []
            for q, scale, hi_scale in zip(*(t.chunk(clips.shape[1]) for t in tried), strict=True):
                parts = Gptq.encode(q, scale, hi_scale, protected.get(task.name, []), cfg.awq_lite_group_size)
                found.append(QuantizedTensor({("gptq", part): t for part, t in parts.items()}))
            out[task.name] = min(found, key=lambda s: (task.W - s.decode()).square().sum().item()) if len(found) > 1 else found[0]
    return out


class RateDistortion:
    """QUANT=rd: every weight at one slope of predicted loss against coded bits, so that one number, `delta`, sets the size of all.

    The predicted loss of an error E of a matrix is 1/2 sum_r g_r E_r H E_r^T: H as in GPTQ, g the mean squared gradient of the row's
    output (diagonal Fisher information, with the labels of the text). GPTQ makes it 1/2 sum_rj g_r d_j e_rj^2 with d_j = 1 / U_jj^2 and
    errors e of the size of the steps; by reverse water-filling (Cover and Thomas, 10.3) the step of weight (r, j) is delta / sqrt(g_r d_j).
    """

    def __init__(self, tasks: list[GptqInput], hessians: Hessians, search=None):
        self.batches, groups, self.search = [], {}, search or viterbi
        self.tokens, self.weights = hessians.count["head"], sum(task.W.numel() for task in tasks)
        self.histogram = torch.zeros(4096, dtype=torch.float64)  # of the weights' variances, in steps squared at a delta of 1
        self.ratios = 2 ** (torch.arange(-2048, 2048, dtype=torch.float64) / 16)
        for task in tasks:
            groups.setdefault(task.W.shape, []).append(task)
        for group in groups.values():
            names, W = [task.name for task in group], torch.stack([task.W for task in group])
            H = torch.stack([hessians.H[name if name == "tok_emb.weight" else task.site] for name, task in zip(names, group, strict=True)])
            try:
                perm, U = factor(H, RD_DAMPING)
            except torch.linalg.LinAlgError as e:
                raise RunError(f"GPTQ of {names[0]} and its like: {e}; raise GPTQ_CALIBRATION_BATCHES") from None
            diag, squares = H.diagonal(dim1=-2, dim2=-1), torch.stack([hessians.squares[name] for name in names])
            g = (squares / diag.clamp_min(1e-9 * diag.amax())[:, None]).mean(-1)
            g = g.clamp_min(RD_FLOOR * g.mean(-1, keepdim=True)).clamp_min(1e-30)
            d = U.diagonal(dim1=-2, dim2=-1).square().reciprocal().gather(1, perm.argsort(-1))
            W = without_dead_columns(W, H)
            power = W.square()
            variance = power.mean(2, keepdim=True) * power.mean(1, keepdim=True) / power.mean((1, 2), keepdim=True).clamp_min(1e-30)
            octaves = (variance * g[:, :, None] * d[:, None]).clamp_min(1e-30).log2().mul(16).round().clamp(-2047, 2047)
            self.histogram += torch.bincount(octaves.flatten().long().cpu() + 2048, minlength=4096)
            codes, level = zip(*(self.codes(x) for x in (g, d)), strict=True)
            self.batches.append((names, W, perm, U, *codes, sum(level)))

    @staticmethod
    def codes(x: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, k) -> 1 / sqrt(x) in half octaves, int8 around zero, and the zero of each matrix (n,) in half octaves."""
        level = -x.log2()
        zero = level.mean(-1, keepdim=True).round()
        return (level - zero).round().clamp(-100, 100).to(torch.int8), zero[:, 0]

    def delta(self, loss: float) -> float:
        """The delta at which the predicted loss is so many nats per token."""
        return math.sqrt(2 * loss * self.tokens / self.weights / TRELLIS_ERROR)

    def parts(self, W: Tensor, row: Tensor, col: Tensor, level: float, delta: float) -> dict[str, Tensor]:
        """The steps of W. Columns, then rows whose integers would not fit into 8 bits get coarser ones."""
        mantissa, exponent = math.frexp(delta * 2 ** (level / 2))
        step, octave = min(round(mantissa * 2**15), 2**15 - 1), min(max(exponent - 15, -128), 127)
        out = dict(row=row, col=col, step=torch.tensor([step], dtype=torch.int16), octave=torch.tensor([octave], dtype=torch.int8))
        for part, dim in (("col", 0), ("row", 1)):
            excess = W.abs() / (160 * Trellis.steps(out))
            excess = excess.square().mean(dim).sqrt() * 4 if part == "col" else excess.amax(dim)
            out[part] = out[part] + (2 * excess.clamp_min(1).log2()).ceil().to(torch.int8)
        return out

    def __call__(self, delta: float, choose=None) -> dict[str, QuantizedTensor]:
        """Quantize all matrices, by the trellis unless `choose` is another column rounder for `walk_columns`."""
        out, choose = {}, choose or (lambda x, _: trellis_path(x, self.search))
        for names, W, perm, U, rows, cols, levels in self.batches:
            parts = [self.parts(*x, delta) for x in zip(W, rows, cols, levels.tolist(), strict=True)]
            step = torch.stack([Trellis.steps(p) for p in parts])
            q = walk_columns(W, perm, U, step, choose).to(torch.int8)
            for name, k, p in zip(names, q, parts, strict=True):
                out[name] = QuantizedTensor({("trellis", part): t for part, t in Trellis.encode(k, **p).items()})
        return out

    def bits(self, delta: float) -> float:
        """What the integers should need: of a Gaussian weight, half the logarithm of its variance in steps squared."""
        return float((self.histogram * (1 + 4.3 * self.ratios / delta**2).log2()).sum() / 2)

    def delta_for(self, bits: float) -> float:
        """The delta at which `bits` says so, by bisection."""
        low, high = 1e-12, 1e12
        for _ in range(100):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.bits(middle) > bits else (low, middle)
        return low


def low_rank_factors(E: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest A B to E (rows, cols), A (rows, r), B (r, cols) with orthonormal rows, r = min(rank, rows, cols): its leading singular
    vectors, by the eigenvectors of the smaller Gram matrix in fp64. The largest number in each row of B is positive: that makes the
    result unique, and the same on every device up to rounding."""
    X = (E if E.shape[0] >= E.shape[1] else E.T).to("cpu" if E.device.type == "mps" else E.device, torch.float64)
    squares, V = (t[..., -rank:].flip(-1) for t in torch.linalg.eigh(X.T @ X))
    A, B = X @ V, V.T
    if E.shape[0] < E.shape[1]:
        S = squares.clamp_min(1e-60).sqrt()
        A, B = V * S, (A / S).T
    sign = torch.where(B.gather(1, B.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    return (A * sign.T).to(E), (B * sign).to(E)


def low_rank_corrections(cfg: Config, tasks: list[GptqInput], stored: dict[str, QuantizedTensor]) -> dict[str, QuantizedTensor]:
    """LQER: rank-r factors of W - W_hat for the tensors with the largest residual."""
    if not cfg.lqer_enabled:
        return {}

    def fit(E: Tensor) -> QuantizedTensor:
        A, B = low_rank_factors(E, cfg.lqer_rank)
        codec = "low_rank_asym" if cfg.lqer_asym_enabled else "low_rank"
        parts = LowRankAsym.encode(A, B, cfg.lqer_asym_group) if cfg.lqer_asym_enabled else LowRank.encode(A, B, cfg.lqer_factor_bits)
        return QuantizedTensor({(codec, part): t for part, t in parts.items()})

    residuals = {t.name: t.W - stored[t.name].decode() for t in tasks}
    sizes = [E.norm() for E in residuals.values()]
    worth = dict(zip(residuals, torch.stack(sizes).tolist() if sizes else (), strict=True))  # one wait for the device, not one a matrix
    best = sorted(worth, key=lambda name: (-worth[name], name))[: cfg.lqer_top_k]
    return {name: fit(residuals[name]) for name in best}


@contextlib.contextmanager
def full_fp32():
    """No TF32 inside: GPTQ divides by what it subtracts."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
@full_fp32()
def quantize(cfg: Config, state: dict[str, Tensor], hessians: Hessians, log, matrices: dict | None = None) -> dict[str, QuantizedTensor]:
    """State dict -> every tensor as the artifact stores it, by `stored_as`. matrices: what `RateDistortion` made of them, if it did."""
    tensors = unbank(cfg, state)
    tasks, protected = mixed_bits(cfg, gptq_inputs(cfg, tensors), hessians), {}
    if cfg.quant == "rd":
        plan = RateDistortion(tasks, hessians) if matrices is None else None
        stored = dict(matrices or plan(plan.delta(cfg.rd_loss)))
        tasks = []
    else:
        protected = protected_groups(cfg, tasks, hessians)
        stored = run_gptq(cfg, tasks, hessians, protected)
        for name, extra in low_rank_corrections(cfg, tasks, stored).items():
            stored[name] = QuantizedTensor(stored[name].parts | extra.parts)
    for name, t in tensors.items():
        if name not in stored:
            codec = stored_as(cfg)[name].codec
            stored[name] = QuantizedTensor({(codec, part): x for part, x in CODECS[codec].encode(t.float()).items()})
    log("Quantized weights:")
    kinds: dict[str, set[str]] = {}
    bits = {task.name: f" (int{task.bits})" for task in tasks}
    for name, s in stored.items():
        kind = "+".join(dict.fromkeys(c for c, _ in s.parts)) + bits.get(name, "")
        kind += f"+awqgrpint{cfg.awq_lite_bits}" if name in protected else ""
        kinds.setdefault(kind, set()).add(kind_of(name))
    for kind, names in sorted(kinds.items()):
        log(f"  {kind}: {', '.join(sorted(names))}")
    return {name: QuantizedTensor({k: t.cpu() for k, t in stored[name].parts.items()}) for name in tensors}


def dequantized_state(cfg: Config, stored: dict[str, QuantizedTensor]) -> dict[str, Tensor]:
    """What the artifact stands for, as a state dict in fp32; tensors that no artifact keeps are zero."""
    unstored = {m.name: torch.zeros(m.shape) for m in matrices(cfg) if m.stored is None}
    return rebank(cfg, {name: s.decode() for name, s in stored.items()} | unstored)


# ==================================================================================================
# PACKING - tensors <-> bytes. The only section that knows the artifact's layout.
# ==================================================================================================

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGA1", 4  # bump the version whenever any byte of the output could change its meaning
CHECKPOINT_FORMAT = 2  # of final_model.pt; published files have none, and neither had ours when parallel_post_lambdas was transposed
VERSION_3_FIELDS = (  # whose values artifacts of version 3 list in this order
    "vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "mlp_slope", "tie_embeddings", "logit_softcap",
    "rope_base", "rope_dims", "rope_yarn", "rope_train_seq_len", "ln_scale", "xsa_last_n", "window_pattern", "window_size",
    "skip_gates_enabled", "num_loops", "loop_start", "loop_end", "parallel_start_layer", "parallel_final_lane", "attn_out_gate_enabled",
    "attn_out_gate_src", "gated_attn_enabled", "sparse_attn_gate_enabled", "sparse_attn_gate_scale", "gate_window", "smear_gate_enabled",
    "smear_gate_bos_fix", "asym_logit_rescale",
)

STREAMS = ("tok_emb", "attn.c_k", "attn.c_q", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj", "rest", "row_order")
TOKEN_STREAM = "tok_emb"  # a row per token: rows of rare tokens resemble each other


class ArtifactError(RunError):
    """The bytes are no artifact of ours, are damaged, or belong to another model."""


HOSTILE = (  # what parsing and decoding of hostile bytes raise, before it becomes an ArtifactError
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
    brotli.error, subprocess.TimeoutExpired,
)


def need_lrzip() -> str:
    """Path of the lrzip program. Raises RunError saying how to get it."""
    if path := shutil.which("lrzip"):
        return path
    raise RunError("COMPRESSOR=pergroup needs the lrzip program, to pack and to unpack: install it (on Debian and Ubuntu: "
                   "apt-get install lrzip), or set COMPRESSOR=range")


def need_constriction() -> Any:
    """The constriction library. Raises RunError saying how to get it."""
    try:
        return importlib.import_module("constriction")
    except ImportError:
        raise RunError("COMPRESSOR=range needs the constriction library, to pack and to unpack: pip install -r requirements.txt, "
                       "or set COMPRESSOR=brotli") from None


def lrzip(data: bytes, size: int | None = None) -> bytes:
    """lrzip's form of `data`, or what it stands for, `size` bytes, which its own header must announce too: the program sees no bomb.

    One thread, so that the bytes do not depend on the machine. Its time and, on Linux, memory and disk have limits of several times what
    that size usually takes, whatever the data. Raises ArtifactError, RunError or subprocess.TimeoutExpired.
    """
    if size is not None and (data[:4] != b"LRZI" or int.from_bytes(data[6:14], "little") != size):
        raise ArtifactError(f"a stream of the artifact is not lrzip's form of {size} bytes")
    flags, size = (["-z", "-L", "9"], len(data)) if size is None else (["-d"], size)
    seconds = 1 + size // 50_000
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "in.lrz"), Path(folder, "out")
        source.write_bytes(data)
        command = [need_lrzip(), *flags, "-q", "-p", "1", "-o", str(result), str(source)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            for limit, most in dict(CPU=seconds, AS=(512 << 20) + 16 * size, FSIZE=(32 << 10) + size).items():
                if hasattr(resource, "prlimit"):
                    resource.prlimit(process.pid, getattr(resource, f"RLIMIT_{limit}"), (most, most))
            try:
                said, complaint = process.communicate(timeout=10 * seconds)
            finally:
                process.kill()
        if process.returncode or not result.exists():
            words = (complaint.strip() or said.strip()).decode(errors="replace")
            raise ArtifactError(f"lrzip {' '.join(flags)} failed with exit code {process.returncode}: {words}")
        return result.read_bytes()


CODERS = {  # how a stream's bytes are coded: (encode, decode to a known size, holding little more than that)
    "brotli": (lambda data: brotli.compress(data, quality=11, lgwin=24),
               lambda data, size: brotli.Decompressor().process(data, output_buffer_limit=size + 1)),
    "lrzip": (lrzip, lrzip),
}


def stream_coder(compressor: str, stream: str) -> str:
    """Which coder a stream gets: pergroup means lrzip for the integer matrices and brotli for the rest."""
    return compressor if compressor != "pergroup" else "brotli" if stream in ("rest", "row_order") else "lrzip"


# COMPRESSOR=range: an adaptive range coder. Model and tables are integers, the same on every machine, and no table is sent:
# encoder and decoder count what they have seen. All of it is written once for both, from `code_arrays` below up to here: an
# encoder leaves the values it is given as they are, a decoder fills them in, a counter of bits adds up what they would cost.
EIGHTH_OCTAVES = np.array([math.isqrt(math.isqrt(math.isqrt(1 << n))) for n in range(8 * 40)])  # 2^(n/8), rounded down
MAGNITUDE_CLASSES, CLASS_OF_ONE = 41, 12  # classes of mean magnitude, in quarters of an octave from 1/8 to 128; a mean of 1 is class 12
level = partial(np.arange(MAGNITUDE_CLASSES, dtype=np.int8).repeat(np.diff((0, *EIGHTH_OCTAVES[73:153:2], 2**20))).take, mode="clip")  # of a mean in 2^-12
COUNT_STEP = 64  # what one symbol adds to its count


@cache
def gaussian_counts() -> np.ndarray:
    """Counts to start from, int64 (2 * MAGNITUDE_CLASSES, 256), for each class under both quantizers of a trellis: a Gaussian of its mean
    magnitude m, worth 256 symbols, and a floor. At k it has fallen by k^2 / (pi m^2 ln 2) octaves, here eighths, m^2 in 2^-10."""
    magnitude = np.minimum(np.arange(256), 256 - np.arange(256))  # of an int8 whose bits are the index
    weight = EIGHTH_OCTAVES[np.maximum(8 * 14 - magnitude**2 * 3762 // EIGHTH_OCTAVES[32 + 4 * np.arange(MAGNITUDE_CLASSES)][:, None], 0)]
    return np.tile(1 + 256 * COUNT_STEP * weight // weight.sum(1, keepdims=True), (2, 1))


class RangeCoder:
    """Encodes symbols with adaptive tables, or decodes `data`, or, where `owners` is set, only adds up the bits of each owner."""

    def __init__(self, data: bytes | None = None, owners: int = 0):
        library, self.bits = need_constriction().stream, np.zeros(owners)
        self.model, self.encoder = library.model.Categorical, library.queue.RangeEncoder()
        self.decoder = None if data is None else library.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))

    def code(self, counts: np.ndarray, context: np.ndarray, values: np.ndarray, owner: np.ndarray) -> None:
        """Code `values` (n,) uint8, each with the row of `counts` (contexts, symbols) that `context` (n,) names, then count them.
        `owner`, of n values, says whose they are.

        The library's tables have 24 bits and no zeros: it adds 1 to each frequency. They are given as integers with exactly the
        sum that makes its scaling a multiplication by one.
        """
        contexts, symbols = counts.shape
        sizes = np.bincount(context, minlength=contexts)
        used = np.flatnonzero(sizes)
        tables, sizes = counts[used], sizes[used]
        most, tables = tables.argmax(1), tables * (2**24 - symbols) // tables.sum(1, keepdims=True)
        tables[np.arange(len(used)), most] += 2**24 - symbols - tables.sum(1)
        if len(self.bits):
            bits = (24 - np.log2(tables + 1))[used.searchsorted(context), values]
            self.bits += np.bincount(owner.ravel(), bits, len(self.bits))
        else:
            order = np.argsort(context, kind="stable")
            ordered, tables = (values[order] if self.decoder is None else values).astype(np.int32), tables.astype(np.float32)
            if symbols == 16:  # small tables are cheap: one for each number, in one call
                calls = [(ordered, self.model(perfect=False), [np.repeat(tables, sizes, axis=0)])]
            else:
                parts = (slice(end - n, end) for n, end in zip(sizes.tolist(), sizes.cumsum().tolist(), strict=True))
                calls = ((ordered[part], self.model(table, perfect=False), []) for part, table in zip(parts, tables, strict=True))
            for numbers, model, parameters in calls:
                if self.decoder is None:
                    self.encoder.encode(numbers, model, *parameters)
                else:
                    numbers[:] = self.decoder.decode(model, *(parameters or [len(numbers)]))
            if self.decoder is not None:
                values[order] = ordered
        index = context.astype(np.uint32) * np.uint32(symbols) + values
        counts += COUNT_STEP * np.bincount(index, minlength=counts.size).reshape(counts.shape)


def code_numbers(coder: RangeCoder, values: np.ndarray, owner: np.ndarray) -> None:
    """Code numbers (n,) uint8 or uint16 of one kind, four bits at a time from the top, each given those above it; the lowest
    four of sixteen are alone. Blocks grow with what is known, and what is known fades: layers differ."""
    counts, done = np.full((1 + 16 + 256 + 1, 16), COUNT_STEP // 4), 0
    least, pace = 4, 6
    while done < len(values):
        here = slice(done, done + least + done // pace)
        block, prefix = values[here], np.zeros(len(values[here]), np.uint16)
        for shift, first in zip(range(8 * values.itemsize - 4, -1, -4), (0, 1, 17, 273), strict=False):
            nibble = (block >> shift & 15).astype(np.uint8)
            coder.code(counts, first + prefix * (first < 273), nibble, owner[here])
            prefix = prefix * 16 + nibble
        block[:] = prefix
        counts -= (counts - COUNT_STEP // 4) // pace
        done = here.stop


def plan_rows(q: np.ndarray, similar: bool) -> tuple[np.ndarray, np.ndarray]:
    """What an encoder tells about rows: class of magnitude + 64 * (weight of the reference in halves), uint8, and the reference.

    A reference is the most similar row that a decoder has by then: one higher up in any segment. It costs about two bytes and must
    save more, and the class is that of the whole matrix unless the row differs enough to pay for saying so. Scalar products are
    exact in fp32, so the choice is the same on every machine.
    """
    rows, cols = q.shape
    index, weight, step, residual = np.zeros(rows, np.uint16), np.zeros(rows, np.uint8), np.arange(rows) % TRELLIS_SEGMENT, q.copy()
    if similar:
        order, starts = step.argsort(kind="stable"), np.bincount(step).cumsum().tolist()
        x = torch.from_numpy(q[order, :256]).float()  # enough to find it
        norm = (x.square().sum(1) + 1).sqrt()
        for start, end in pairwise(starts):
            here, best = order[start:end], order[(x[start:end] @ x[:start].T).div_(norm[:start]).argmax(1).numpy()]
            left = np.stack([q[here] - (q[best].astype(np.int16) * halves + 1 >> 1) for halves in range(3)])
            error = np.square(left, dtype=np.int32).sum(2) * [[2.0 ** (-18 / cols)], [1], [1]]
            index[here], weight[here] = best, error.argmin(0)
            residual[here] = left[weight[here], np.arange(len(here))]
    total = np.abs(residual).view(np.uint8).sum(1, dtype=np.int64) << 12
    usual, own = (level(x).astype(int) for x in (total.sum() // q.size, total // cols))
    return (np.where(cols * (own - usual) ** 2 < 400, usual, own) + 64 * weight).astype(np.uint8), index


def code_matrices(coder: RangeCoder, counts: np.ndarray, q: np.ndarray, owners: list[int], trellis: bool, similar: bool) -> np.ndarray:
    """Code int8 matrices (n, rows, cols), side by side: step t takes row t of every segment of every matrix. Returns them.

    An integer's table depends on the class of its row (sent), on that of its column (from the rows before it, over all segments)
    and on the active quantizer of its trellis. Rows with a reference are coded as the difference to it, modulo 256. Symbols are
    no more than the largest magnitude (sent) needs: 0 and up, then the negative ones.
    """
    n, rows, cols = q.shape
    info, index, most = np.zeros(n * rows, np.uint8), np.zeros(n * rows, np.uint16), np.full(1, 127, np.uint8)
    if coder.decoder is None:
        info, index = (np.concatenate(x) for x in zip(*(plan_rows(m, similar) for m in q), strict=True))
        most[:] = 127 if (info > 63).any() else max(1, q.max(), -int(q.min())) - 1
    owner = np.repeat(owners, rows)
    code_numbers(coder, info, owner)
    referring = index[info > 63]
    code_numbers(coder, referring, owner[info > 63])
    index[info > 63] = referring
    code_numbers(coder, most, owner[:1])
    symbols = min(2 * int(most[0]) + 3, 256)
    gap = np.uint8(256 - symbols)

    def steps(a: np.ndarray) -> np.ndarray:
        """(n * rows, ...) -> (steps, segments, n, width)."""
        a = np.pad(a.reshape(n, rows, -1), ((0, 0), (0, -rows % TRELLIS_SEGMENT), (0, 0)))
        return np.ascontiguousarray(a.reshape(n, -1, TRELLIS_SEGMENT, a.shape[2]).transpose(2, 1, 0, 3))

    x, info, index, owner = steps(q), steps(info), steps(index).astype(np.int64), np.array(owners)[:, None]
    row, halves = np.minimum(info & 63, MAGNITUDE_CLASSES - 1).astype(np.int8), info >> 6
    scale = EIGHTH_OCTAVES[120 - 2 * row.astype(int)].astype(np.uint32)
    column, total, seen = np.zeros((n, cols), np.int8), np.full((n, cols), 8 << 12), 8
    state, following = np.zeros(x.shape[1:], np.uint8), np.array(TRELLIS_NEXT, np.uint8).ravel()
    kept = np.arange(symbols) + gap * (np.arange(symbols) > symbols // 2)
    tables = counts[:, kept]
    for t in range(min(rows, TRELLIS_SEGMENT)):
        live = -(-(rows - t) // TRELLIS_SEGMENT)  # segments with a row t
        here, prediction = x[t, :live], np.int8(0)
        if halves[t].any():
            segment, step = np.divmod(index[t, :live, :, 0], TRELLIS_SEGMENT)
            known = x[step, np.minimum(segment, x.shape[1] - 1), np.arange(n)].astype(np.int16)
            prediction = (known * halves[t, :live] + 1 >> 1).astype(np.int8)
        context = np.clip(row[t, :live] + column, 0, MAGNITUDE_CLASSES - 1).astype(np.uint8) + MAGNITUDE_CLASSES * (state[:live] & 1)
        residual = here - prediction
        symbol = residual.view(np.uint8) - gap * (residual < 0)
        coded = symbol.reshape(-1)
        coder.code(tables, context.reshape(-1), coded, np.broadcast_to(owner, here.shape))
        coded += gap * (coded > symbols // 2)
        residual = coded.view(np.int8).reshape(symbol.shape)
        here[:] = residual + prediction
        total += (np.abs(residual).view(np.uint8) * scale[t, :live]).sum(0, dtype=np.uint32)
        seen += live
        column = level(total // seen) - CLASS_OF_ONE
        if trellis:
            state = following.take(2 * state + (x[t] & 1).view(np.uint8))
    counts[:, kept] = tables
    return x.transpose(2, 1, 0, 3).reshape(n, -1, cols)[:, :rows]


def stream_of(cfg: Config, array: str) -> tuple[str, bool]:
    """Look up the stream of an array "tensor:codec.part", and whether its rows are sorted: integers have that of their row."""
    tensor, _, part = array.rpartition(":")
    how = stored_as(cfg).get(tensor, HALF) if part.endswith(".q") else HALF
    return how.stream, how.sort_rows


def code_arrays(cfg: Config, arrays: dict[str, np.ndarray], coders: dict[str, RangeCoder]) -> dict[str, np.ndarray]:
    """Code every array "tensor:codec.part" with its stream's coder. Returns them.

    The tables of the matrices pass from stream to stream, less seven eighths of what they have seen. All other numbers of one
    kind (the same tensor of every block, codec and part) share theirs.
    """
    start, groups, out = gaussian_counts(), {}, dict(arrays)
    for i, (name, a) in enumerate(arrays.items()):
        stream = STREAMS.index(stream_of(cfg, name)[0])
        if a.size:
            kind = (kind_of(name),) if STREAMS[stream] == "rest" else (":trellis." in name, a.shape)
            groups.setdefault((stream, *kind), []).append((i, name, a))
    counts = start.copy()
    for (number, *kind), group in sorted(groups.items()):
        stream, (owners, names, given) = STREAMS[number], zip(*group, strict=True)
        if stream == "rest":
            sizes, flat = [a.size for a in given], np.concatenate([a.reshape(-1) for a in given])
            code_numbers(coders[stream], flat.view(f"<u{flat.itemsize}"), np.repeat(owners, sizes))
            coded = [x.reshape(a.shape) for x, a in zip(np.split(flat, np.cumsum(sizes)[:-1]), given, strict=True)]
        else:
            counts = start + (counts - start) // 8
            coded = code_matrices(coders[stream], counts, np.stack(given), owners, kind[0], stream == TOKEN_STREAM)
        out |= zip(names, coded, strict=True)
    return out


def coded_bits(cfg: Config, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Bits (fp64) that COMPRESSOR=range needs for each array "tensor:codec.part" (int8, int16 or fp16) of an artifact of just these, in
    their order, without coding anything: what `pack` writes is within 0.1 %, and up to 8 bytes a stream. Tables are shared."""
    counter = RangeCoder(owners=len(arrays))
    code_arrays(cfg, arrays, dict.fromkeys(STREAMS, counter))
    return counter.bits


def similarity_order(q: np.ndarray) -> np.ndarray:
    """Greedy chain of rows: from row 0 on, always the nearest unused row in L1, ties to the lowest index. uint16 (rows,).

    The distances are sums of integers below 2^24, so they are exact, and the same, wherever they are computed."""
    rows = torch.from_numpy(q).to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    distance, used, order = torch.cdist(rows, rows, p=1).cpu().numpy(), np.zeros(len(q), np.float32), np.zeros(len(q), np.uint16)
    for i in range(1, len(q)):
        used[order[i - 1]] = np.inf
        order[i] = (distance[order[i - 1]] + used).argmin()
    return order


def byte_planes(a: np.ndarray) -> np.ndarray:
    """All first bytes, then all second bytes, ...: halves of fp16 compress better apart."""
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8).reshape(a.size, a.itemsize).T


def stream_views(
    cfg: Config, compressor: str, arrays: dict[str, np.ndarray], order_of
) -> tuple[dict[str, list[np.ndarray]], list]:
    """What a stream's bytes are when they are not range-coded: uint8 arrays one after another, views of `arrays` to read or to fill in.

    Integer matrices of `pergroup` are transposed, and copies where a tensor's row says that its rows are sorted: those are returned too, as
    (matrix, `order_of` it, which is uint16 in stream row_order, its rows in that order). All others are byte planes.
    """
    views, copies = {stream: [] for stream in STREAMS}, []
    for name, a in arrays.items():
        stream, sort = stream_of(cfg, name)
        if stream_coder(compressor, stream) != "lrzip":
            views[stream].append(byte_planes(a))
            continue
        if sort:
            copies.append((a, order := order_of(a), a := a[order]))
            views["row_order"].append(byte_planes(order))
        views[stream].append(a.view(np.uint8).T)
    return views, copies


def encode_streams(cfg: Config, arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Arrays "tensor:codec.part" -> the bytes of every stream."""
    if cfg.compressor == "range":
        coders = {stream: RangeCoder() for stream in STREAMS}
        code_arrays(cfg, arrays, coders)
        return {stream: coder.encoder.get_compressed().astype("<u4").tobytes() for stream, coder in coders.items()}
    views, _ = stream_views(cfg, cfg.compressor, arrays, similarity_order)
    raw = {stream: b"".join(view.tobytes() for view in own) for stream, own in views.items()}
    with ThreadPoolExecutor() as pool:
        return dict(zip(raw, pool.map(lambda s: CODERS[stream_coder(cfg.compressor, s)][0](raw[s]) if raw[s] else b"", raw), strict=True))


def decode_streams(
    cfg: Config, compressor: str, arrays: dict[str, np.ndarray], coded: dict[str, bytes]
) -> dict[str, np.ndarray]:
    """The inverse of `encode_streams`: fills in `arrays` and returns them. Raises ArtifactError or what a coder raises."""
    if compressor == "range":
        return code_arrays(cfg, arrays, {stream: RangeCoder(data) for stream, data in coded.items()})
    views, copies = stream_views(cfg, compressor, arrays, lambda a: np.zeros(len(a), "<u2"))
    sizes = {stream: sum(view.size for view in own) for stream, own in views.items()}
    with ThreadPoolExecutor() as pool:
        raw = pool.map(lambda s: CODERS[stream_coder(compressor, s)][1](coded[s], sizes[s]) if coded[s] else b"", STREAMS)
    for stream, data in zip(STREAMS, raw, strict=True):
        if len(data) != sizes[stream]:
            raise ArtifactError(f"stream {stream} of the artifact decodes to {len(data)} bytes instead of {sizes[stream]}; make it again")
        left = io.BytesIO(data)
        for view in views[stream]:
            view[:] = np.frombuffer(left.read(view.size), np.uint8).reshape(view.shape)
    for a, order, rows in copies:
        a[order] = rows
    return arrays


@cache
def tensor_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that an artifact of this configuration holds, in their order there."""
    return {m.name: m.shape for m in matrices(cfg) if m.stored is not None}


def arrays_of(stored: dict[str, QuantizedTensor]) -> dict[str, np.ndarray]:
    """All parts of all tensors, named "tensor:codec.part"."""
    return {f"{name}:{codec}.{part}": t.numpy() for name, s in stored.items() for (codec, part), t in s.parts.items()}


def pack(cfg: Config, stored: dict[str, QuantizedTensor]) -> bytes:
    """Tensors -> artifact. Deterministic: the same tensors give the same bytes. Raises RunError if they are not the model's.

    magic "PGA1" | u16 version | u32 header size | 16-byte blake2b of all but the magic and itself | header | streams.
    The header is brotli-coded JSON: [compressor, MODEL_FIELDS by name, bytes of each stream, kinds, kind of each tensor]. A
    kind lists the parts of a tensor, [codec, part, sizes]; a size -1 - i is the tensor's own size i. Names and shapes of tensors
    follow from the model, dtypes from the codec.
    """
    shapes = tensor_shapes(cfg)
    if shapes.keys() != stored.keys():
        raise RunError(f"these are not the model's tensors: {', '.join(sorted(shapes.keys() ^ stored.keys()))}")
    stored = {name: stored[name] for name in shapes}
    arrays, kinds = arrays_of(stored), [
        [[codec, part, [-1 - shape.index(n) if n in shape else n for n in t.shape]] for (codec, part), t in s.parts.items()]
        for shape, s in zip(shapes.values(), stored.values(), strict=True)]
    if bad := [name for name, a in arrays.items() if not np.isfinite(a).all()]:
        raise RunError(f"not all finite: {', '.join(bad)}; the weights are no model's, look at the training loss")
    streams = encode_streams(cfg, arrays)
    distinct = [json.loads(text) for text in dict.fromkeys(map(json.dumps, kinds))]
    header = [cfg.compressor, {f: getattr(cfg, f) for f in MODEL_FIELDS}, [len(data) for data in streams.values()], distinct,
              [distinct.index(kind) for kind in kinds]]
    head = brotli.compress(json.dumps(header, separators=(",", ":")).encode(), quality=11)
    body = head + b"".join(streams.values())
    prefix = struct.pack("<HI", ARTIFACT_VERSION, len(head))
    return ARTIFACT_MAGIC + prefix + hashlib.blake2b(prefix + body, digest_size=16).digest() + body


class Header(NamedTuple):
    """What an artifact says about itself, nothing of it checked against a model."""

    version: int
    compressor: str
    model: dict[str, Any]  # MODEL_FIELDS
    kinds: list  # of tensors, as `pack` writes them
    chosen: list[int]  # the kind of each tensor
    sizes: dict[str, int]  # bytes of each stream
    start: int  # of the first stream


def read_header(blob: bytes) -> Header:
    """Header of an artifact of this version or the one before, checksum verified. Raises ArtifactError."""
    if blob[:4] != ARTIFACT_MAGIC or len(blob) < 26:
        raise ArtifactError(f"no artifact: expected it to start with {ARTIFACT_MAGIC!r}, found {blob[:4]!r} in {len(blob)} bytes")
    version, size = struct.unpack("<HI", blob[4:10])
    if version not in (3, ARTIFACT_VERSION):
        raise ArtifactError(f"artifact version {version}; this script reads 3 and {ARTIFACT_VERSION}: use the script it was written by")
    if hashlib.blake2b(blob[4:10] + blob[26:], digest_size=16).digest() != blob[10:26]:
        raise ArtifactError(f"damaged artifact: the checksum of its {len(blob)} bytes does not match; copy or make it again")
    try:
        header = json.loads(brotli.Decompressor().process(blob[26 : 26 + size], output_buffer_limit=1 << 20))
        compressor, model, sizes, kinds, chosen = header
        if version < ARTIFACT_VERSION:
            model = dict(zip(VERSION_3_FIELDS, model, strict=True))
            sizes.pop(STREAMS.index("rest"))  # of an untied head, before the rest
        if compressor not in COMPRESSORS or min(sizes) < 0 or 26 + size + sum(sizes) != len(blob):
            raise ValueError("its streams do not fill it")
        return Header(version, compressor, dict(model), kinds, chosen, dict(zip(STREAMS, sizes, strict=True)), 26 + size)
    except HOSTILE as e:
        raise ArtifactError(f"the header of this artifact makes no sense: {e!r}; make it again") from None


def check_model_fields(cfg: Config, saved: dict) -> None:
    """Raises ArtifactError naming every variable by which this run differs from the one that wrote the artifact. A variable
    younger than the artifact had its default."""
    values = [(f.name, saved.get(f.name, f.default), getattr(cfg, f.name)) for f in fields(Config) if f.name in MODEL_FIELDS]
    differ = [f"{name.upper()}: artifact {theirs}, this run {ours}" for name, theirs, ours in values if theirs != ours]
    if differ:
        raise ArtifactError(f"the artifact belongs to another model: {'; '.join(differ)}. Set these variables as in the run that wrote it")


def stored_shapes(cfg: Config, header: Header) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of an artifact, in their order there. Version 3 had two caps that nobody trained, behind the
    network's own tensors."""
    shapes = tensor_shapes(cfg)
    if not header.model.get("asym_logit_rescale"):
        return shapes
    own = {name: shape for name, shape in shapes.items() if "." not in name}
    return own | dict(softcap_pos=(), softcap_neg=()) | shapes


def from_version_3(cfg: Config, model: dict, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays as this version has them: without the two caps, and with the lambdas of the two lanes by (sublayer, lane)."""
    gone = dict(tie_embeddings=True, parallel_final_lane="mean")
    caps = [arrays.pop(name, np.half(cfg.logit_softcap)) for name in ("softcap_pos:float16.w", "softcap_neg:float16.w")]
    if any(model[name] != value for name, value in gone.items()) or any(cap != np.half(cfg.logit_softcap) for cap in caps):
        raise ValueError("it has an untied head, a single final lane or caps of its own, which only the script it was written by knows")
    lambdas = "parallel_post_lambdas:float16.w"
    return arrays | {lambdas: arrays[lambdas].swapaxes(1, 2)} if lambdas in arrays else arrays


def empty_arrays(cfg: Config, header: Header) -> dict[str, np.ndarray]:
    """The arrays that a header lists, zeros. Raises ValueError or LookupError unless they are parts of known codecs, as large as
    the model's tensors allow."""
    out: dict[str, np.ndarray] = {}
    for (name, shape), chosen in zip(stored_shapes(cfg, header).items(), header.chosen, strict=True):
        room = 4 * math.prod(shape) + 16  # integers, low-rank factors and scales
        for codec, part, sizes in header.kinds[chosen]:
            sizes = [shape[-1 - n] if n < 0 else n for n in sizes]
            room -= math.prod(sizes)
            if room < 0 or f"{name}:{codec}.{part}" in out or (part in ("q", "w") and tuple(sizes) != shape):
                raise ValueError(f"{name}, of shape {shape}, can not have {codec}.{part} of shape {sizes}")
            out[f"{name}:{codec}.{part}"] = np.zeros(sizes, "<" + CODEC_PARTS[codec][part])
    return out


def unpack(cfg: Config, blob: bytes) -> dict[str, QuantizedTensor]:
    """Artifact -> tensors, the inverse of `pack`. Raises ArtifactError, whatever the bytes, and never needs more memory than the
    integers of four such models."""
    header = read_header(blob)
    check_model_fields(cfg, header.model)
    ends = np.cumsum([header.start, *header.sizes.values()]).tolist()
    try:
        coded = {stream: blob[start:end] for stream, (start, end) in zip(STREAMS, pairwise(ends), strict=True)}
        arrays = decode_streams(cfg, header.compressor, empty_arrays(cfg, header), coded)
        if header.version < ARTIFACT_VERSION:
            arrays = from_version_3(cfg, header.model, arrays)
        if bad := [name for name, a in arrays.items() if not np.isfinite(a).all()]:
            raise ValueError(f"not all finite: {', '.join(bad)}")
    except HOSTILE as e:
        raise ArtifactError(f"this artifact makes no sense: {e!r}; make it again") from None
    out: dict[str, QuantizedTensor] = {name: QuantizedTensor({}) for name in tensor_shapes(cfg)}
    for name, a in arrays.items():
        tensor, _, part = name.rpartition(":")
        out[tensor].parts[tuple(part.split("."))] = torch.from_numpy(np.array(a, order="C"))
    return out


def bytes_by_part(blob: bytes) -> dict[str, int]:
    """Bytes of each stream of an artifact, and of its header; they add up to its size."""
    header = read_header(blob)
    return dict(header=header.start, **header.sizes)


def load_artifact(cfg: Config, world: World, path: Path, kernels: Kernels = DEFINITIONS) -> GPT:
    """The model that the bytes on disk stand for. Raises ArtifactError."""
    model = GPT(cfg, world.dtype, kernels)
    try:
        model.load_state_dict(dequantized_state(cfg, unpack(cfg, path.read_bytes())))
    except OSError as e:
        raise ArtifactError(f"cannot read {path}: {e.strerror or e}; train first, or set ARTIFACT_DIR to the run's folder") from None
    except (LookupError, RuntimeError, ValueError) as e:
        raise ArtifactError(f"{path} does not hold the tensors of this model: {e}; make it again") from None
    return model.to(world.device).requires_grad_(False)


def load_weights(cfg: Config, path: Path) -> dict[str, Tensor]:
    """State dict from final_model.pt, ours or a published one, which has no format number. Raises RunError."""
    state = load_tensors(path, "cpu")
    if isinstance(state, dict) and "format" in state:
        if state["format"] != CHECKPOINT_FORMAT:
            raise RunError(f"{path} has format {state['format']}, this script reads {CHECKPOINT_FORMAT}: use the script it was written by")
        return state["model"]
    ledger = path.with_name("ledger.jsonl")
    trained_here = ledger.exists() and any('"phase"' in line and '"train"' in line for line in ledger.open())
    if trained_here and "parallel_post_lambdas" in state:
        raise RunError(f"{path} was written by an older version of this script, with parallel_post_lambdas transposed: train again, or "
                       f"save dict(format={CHECKPOINT_FORMAT}, model=state) with state['parallel_post_lambdas'].mT in its place")
    caps = [state.pop(name).item() for name in ("softcap_pos", "softcap_neg") if name in state]
    if any(cap != cfg.logit_softcap for cap in caps):
        raise RunError(f"{path} has the caps {caps}, this run LOGIT_SOFTCAP={cfg.logit_softcap:g} for logits of both signs")
    return state


def load_checkpoint_model(cfg: Config, world: World, path: Path, kernels: Kernels = DEFINITIONS) -> GPT:
    """A model from final_model.pt, ours or a published one. Raises RunError."""
    state = load_weights(cfg, path)
    model = GPT(cfg, world.dtype, kernels)
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise RunError(f"{path} does not fit this configuration: {e}") from None
    return model.to(world.device)


def upstream_code_bytes() -> int | None:
    """Code size by the convention of published records: a minified, compressed, base85 script that is never written. None
    when python_minifier is not installed. Our own count is the size of the script that runs."""
    try:
        import python_minifier
    except ImportError:
        return None
    source = "".join(linecache.getlines(upstream_code_bytes.__code__.co_filename))  # also when the script runs packed
    small = python_minifier.minify(source, rename_locals=False, hoist_literals=False, remove_literal_statements=True, remove_asserts=True)
    return len(brotli.compress(small.encode(), quality=11)) * 5 // 4 + 67


# ==================================================================================================
# BUDGET - the searches for a size: as good a model as fits into TARGET_BYTES beside the script.
# ==================================================================================================

class Pruning:
    """Selective pruning (PR #1105): integers +-1 of the GPTQ matrices become zero, cheapest first; what one costs is the square of
    the weight it stands for. `code_bits` predicts, without a coder, how many bits a number of zeros leaves."""

    def __init__(self, stored: dict[str, QuantizedTensor]):
        self.stored, self.names = stored, [name for name, s in stored.items() if ("gptq", "q") in s.parts]
        matrices = [{part: t for (codec, part), t in stored[name].parts.items() if codec == "gptq"} for name in self.names]
        self.q = torch.cat([parts["q"].flatten() for parts in matrices])
        self.sizes = [parts["q"].numel() for parts in matrices]
        ones = (self.q.abs() == 1).nonzero()[:, 0]
        cost = torch.cat([Gptq.decode(parts).flatten() for parts in matrices])[ones].square()
        self.order = ones[cost.argsort(stable=True)]
        owner = torch.repeat_interleave(torch.arange(len(matrices)), torch.tensor(self.sizes))
        self.counts = torch.bincount(256 * owner + self.q + 128, minlength=256 * len(matrices)).view(-1, 256)
        self.bins = 256 * owner[self.order] + self.q[self.order] + 128

    def code_bits(self, count: int) -> float:
        """Entropy of the integers, matrix by matrix, once the cheapest `count` are zero."""
        moved = torch.bincount(self.bins[:count], minlength=self.counts.numel()).view_as(self.counts)
        p = (self.counts - moved).double()
        p[:, 128] += moved.sum(1)
        return (torch.special.xlogy(p, p.sum(1, keepdim=True)) - torch.special.xlogy(p, p)).sum().item() / math.log(2)

    def zeros_for(self, bits: float) -> int:
        """The fewest zeros that leave at most so many bits; all of them if none do."""
        return bisect.bisect_left(range(len(self.order)), -bits, key=lambda count: -self.code_bits(count))

    def apply(self, count: int) -> dict[str, QuantizedTensor]:
        """The tensors with the cheapest `count` integers zeroed."""
        q = self.q.clone()
        q[self.order[:count]] = 0
        new = {name: t.view_as(self.stored[name].parts["gptq", "q"]) for name, t in zip(self.names, q.split(self.sizes), strict=True)}
        return self.stored | {name: QuantizedTensor(self.stored[name].parts | {("gptq", "q"): t}) for name, t in new.items()}


def pack_to_fit(cfg: Config, stored: dict[str, QuantizedTensor], code_bytes: int, log: Log) -> tuple[dict[str, QuantizedTensor], bytes]:
    """`pack`; with QUANT=s05 pruned until artifact and script have at most TARGET_BYTES. Size is nearly linear in the entropy of the
    integers, so at most three more packs come within 0.05 % (COMPRESSOR=range) or 0.5 %. Raises RunError naming the smallest size."""
    blob, target, packs, fit = pack(cfg, stored), cfg.target_bytes - code_bytes, 0, None
    if cfg.quant != "s05" or not cfg.target_bytes or len(blob) <= target:
        return stored, blob
    pruning = Pruning(stored)
    over, under = (pruning.code_bits(0), len(blob)), None  # (bits of the integers, bytes): the points nearest to the target so far
    while fit is None or (packs < 3 and len(fit[1]) < 0.9995 * target):
        bits_per_byte = (over[0] - under[0]) / (over[1] - under[1]) if under else over[0] / over[1] * (1 + packs / 2)
        count = pruning.zeros_for(over[0] - (over[1] - 0.9998 * target) * bits_per_byte)
        tried, packs = pruning.apply(count), packs + 1
        blob = pack(cfg, tried)
        log(f"prune: {count} of {len(pruning.order)} integers +-1 to zero, {len(blob)} bytes of {target} beside the script")
        if len(blob) <= target:
            under, fit = (pruning.code_bits(count), len(blob)), (tried, blob)
        elif count == len(pruning.order):
            raise RunError(f"TARGET_BYTES={cfg.target_bytes}: every +-1 at zero leaves {len(blob) + code_bytes} bytes, {code_bytes} "
                           "of them the script: lower MATRIX_BITS, or ship the packed script (tools/pack_code.py)")
        else:
            over = pruning.code_bits(count), len(blob)
    return fit


@torch.no_grad()
@full_fp32()
def quantize_to_fit(
    cfg: Config, state: dict[str, Tensor], hessians: Hessians, code_bytes: int, log, search=None
) -> tuple[dict[str, QuantizedTensor], bytes]:
    """`quantize` and `pack`. QUANT=rd: as many bytes as TARGET_BYTES leaves beside the script, to 0.05 %, unless RD_LOSS needs fewer.

    Each pass is a real artifact; what it missed by corrects the formula that leads to the next. Two passes within 0.2 % on both sides of
    the target end the search: the first matrices from the finer pass, the others from the coarser, as many as fit. Raises RunError
    naming the smallest size when even steps that destroy the model do not fit.
    """
    if cfg.quant != "rd":
        return pack_to_fit(cfg, quantize(cfg, state, hessians, log), code_bytes, log)
    tensors, quiet = unbank(cfg, state), lambda line: None
    plan = RateDistortion(gptq_inputs(cfg, tensors), hessians, search)
    target, finest, coarsest = cfg.target_bytes or math.inf, plan.delta(cfg.rd_loss), plan.delta(max(100.0, cfg.rd_loss))

    def attempt(matrices: dict[str, QuantizedTensor]) -> tuple[int, dict[str, QuantizedTensor], bytes]:
        blob = pack(cfg, quantize(cfg, state, hessians, quiet, matrices))
        return len(blob) + code_bytes, matrices, blob

    over, under, delta = None, None, finest
    # (what the formula gives, size) of the passes so far; the first is a guess: two bytes for every number outside the matrices.
    known = [(plan.bits(finest), code_bytes + plan.bits(finest) / 8 + 2 * (sum(t.numel() for t in tensors.values()) - plan.weights))]
    while len(known) < 12:
        (bits, size), slope = known[-1], 1 / 8
        if len(known) > 2 and bits != known[-2][0]:
            slope = min(max((size - known[-2][1]) / (bits - known[-2][0]), 1 / 16), 1 / 4)
        if size > target or len(known) > 1:
            delta = min(max(plan.delta_for(bits + (0.99975 * target - size) / slope), finest), coarsest)
        expected = size + slope * (plan.bits(delta) - bits)
        tried = attempt(plan(delta))
        known.append((plan.bits(delta), tried[0]))
        log(f"rd: predicted loss {cfg.rd_loss * (delta / finest) ** 2:.5f}, {tried[0]} bytes with the script, predicted {expected:.0f}"
            + (f", TARGET_BYTES {target}" if cfg.target_bytes else ""))
        over, under = (over, tried) if tried[0] <= target else (tried, under)
        near = under and (under[0] > 0.9995 * target or (over and over[0] - under[0] < 0.002 * target))
        if near or delta == (finest if under else coarsest):
            break
    if not under:
        raise RunError(f"TARGET_BYTES={target}: the smallest reachable size is {tried[0]} bytes, {code_bytes} of them the script; "
                       "make the model smaller, or ship the packed script (tools/pack_code.py)")
    fine, coarse, names = over and over[1], under[1], list(under[1])
    for turn in range(min(8, len(names)) if over else 0):  # matrices are of unequal size: another order may end closer to the target
        order, low, high = names[turn:] + names[:turn], 0, len(names)
        while under[0] <= 0.9995 * target and high - low > 1:
            middle = (low + high) // 2
            tried = attempt({name: (fine if name in order[:middle] else coarse)[name] for name in names})
            low, high = (middle, high) if tried[0] <= target else (low, middle)
            under = tried if under[0] < tried[0] <= target else under
    return quantize(cfg, state, hessians, log, under[1]), under[2]


@torch.no_grad()
@full_fp32()
def forecast_size(cfg: Config, world: World, model: GPT, state: dict[str, Tensor], tokens: np.ndarray, code_bytes: int) -> str:
    """The size that an artifact of these weights would have, with the script: calibrated on one micro-batch, measured by `coded_bits`.
    QUANT=rd without the trellis, on steps that err as much. Changes neither the model nor a random generator."""
    live, hessians, parts, quiet = dict(model.named_parameters()), Hessians(), calibration_parts(cfg), lambda line: None
    weights = {name: t.detach().to(live[name].dtype).clone().requires_grad_() for name, t in state.items()}
    for k in range(parts):
        n = (len(tokens) - 1) // parts
        calibrate(cfg, world, model, weights, tokens[k * n : (k + 1) * n + 1], hessians)
    plan = matrices = None
    if cfg.quant == "rd":
        plan, wide = RateDistortion(gptq_inputs(cfg, unbank(cfg, weights)), hessians), math.sqrt(12 * TRELLIS_ERROR)
        matrices = plan(finest := plan.delta(cfg.rd_loss), lambda x, _: ((q := (x / wide).round().clamp(-127, 127)), q * wide))
    stored = quantize(cfg, weights, hessians, quiet, matrices)
    bits = coded_bits(cfg, arrays_of(stored))
    size, text = code_bytes + bits.sum() / 8, f" for RD_LOSS {cfg.rd_loss:g}" if plan else ""
    if plan and 0 < cfg.target_bytes < size:
        delta = plan.delta_for(plan.bits(finest) + 8 * (cfg.target_bytes - size))
        text += f"; at TARGET_BYTES {cfg.target_bytes} the predicted loss is {cfg.rd_loss * (delta / finest) ** 2:.5f}"
    return f"predicted_size: {size:.0f} bytes with the script{text}"


# ==================================================================================================
# SCORING - bits per byte: every target scored once, every byte counted once, all of it in a chained ledger.
# ==================================================================================================

class Ledger:
    """Append-only account of a run. A line {"n", "prev", "kind", .., "hash"} names the hash of the one before: an edit breaks the chain.
    A later stage in the same folder goes on behind the last line. Without a path (ranks but the first) nothing is kept."""

    def __init__(self, path: Path | None):
        self.path, self.lines, self.last = path, 0, ""
        if path is not None and path.exists():
            try:
                entry = json.loads(path.read_text().splitlines()[-1])
                self.lines, self.last = entry["n"] + 1, entry["hash"]
            except (OSError, ValueError, LookupError, TypeError):
                raise RunError(f"{path} does not end with a whole ledger line: move it away, or choose another ARTIFACT_DIR") from None

    @staticmethod
    def digest(entry: dict) -> str:
        """blake2b-128, in hex, of the canonical JSON of a line without its "hash"."""
        canonical = json.dumps({k: v for k, v in entry.items() if k != "hash"}, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    def add(self, kind: str, payload: dict) -> None:
        """Append one line, at once. Raises RunError."""
        if self.path is None:
            return
        entry = dict(n=self.lines, prev=self.last, kind=kind, **payload)
        self.lines, self.last = self.lines + 1, self.digest(entry)
        try:
            with self.path.open("a") as f:
                f.write(json.dumps(entry | dict(hash=self.last), separators=(",", ":")) + "\n")
        except OSError as e:
            raise RunError(f"cannot append to {self.path}: {e.strerror or e}; free space or choose another ARTIFACT_DIR") from None


def state_hash(*states: Any) -> str:
    """blake2b-128, in hex, of nested states: every tensor's bytes, every other value as text."""
    h = hashlib.blake2b(digest_size=16)
    for x in torch.utils._pytree.tree_leaves(states):
        h.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() if isinstance(x, Tensor) else repr(x).encode())
    return h.hexdigest()


class Score(NamedTuple):
    """What an evaluation comes to."""

    loss: float  # nats per token
    bpb: float   # bits per byte
    tokens: int
    bytes: int


def graded(forward, targets: Tensor, hints: Tensor | None, boost: float) -> tuple[Tensor, Tensor]:
    """Nats of targets, (B, n) or (B, n, K), as the model sees them, for learning, and as they count. forward(targets) -> nats.

    The two differ where there is a hint, (B, n), -1 = none: its probability q is multiplied by e^boost and all probabilities are
    divided by their new sum, 1 + q (e^boost - 1), whatever the target is.
    """
    if hints is None:
        return (nats := forward(targets)), nats
    hint = hints.unsqueeze(-1)
    candidates = targets.view(*hints.shape, -1)
    nats = forward(torch.cat((candidates, hint.clamp_min(0)), -1))
    nats, hinted = nats[..., :-1], nats[..., -1:]
    tilted = nats - boost * (candidates == hint) + torch.log1p((-hinted).exp() * math.expm1(boost))
    return nats.reshape(targets.shape), torch.where(hint < 0, nats, tilted).reshape(targets.shape)


class Scorer:
    """The one way from an evaluation to the validation tokens; target i is token i + 1. `inputs_for` shows what comes before targets, `score`
    grades them, each once, `targets_to_learn` hands out graded ones to learn from, `sync` merges the ranks and writes the receipts."""

    def __init__(self, data: ValData, world: World, name: str = "", ledger: Ledger | None = None):
        self._data, self.world, self.name, self.ledger = data, world, name, ledger
        self.documents, self.total = data.documents, len(data.target_bytes)
        self.own, self.graded = np.zeros(self.total, np.uint8), np.zeros(self.total, bool)  # by this rank; by any, at the last sync
        self.nats = torch.zeros(self.total, device=world.device)
        self.sum = torch.zeros((), dtype=torch.float32 if world.device.type == "mps" else torch.float64, device=world.device)
        self.tokens, self.bytes, self.steps, self.early, self.work = 0, 0, 0, False, FlopCount()
        self.hints, self.boost, self.order = None, 0.0, np.arange(self.total)  # see `graded`, `set_hints`
        self.shown: list[np.ndarray] = []                     # targets whose inputs are out, to be graded next
        self.unwritten: dict[str, list[np.ndarray]] = {}      # graded and released since the last receipt
        self.receipts: list[tuple[str, np.ndarray]] = []  # since the last sync

    def inputs_for(self, start: int, at: np.ndarray) -> np.ndarray:
        """Inputs for the targets `at`, -1 = none: tokens from `start` to the one before the last of them. The next `score` must grade
        them all: nothing is seen that is not scored."""
        self.shown.append(at[at >= 0])
        return self._data.tokens[start : self.shown[-1].max(initial=-1) + 1]

    def set_hints(self, order: np.ndarray, guess, boost: float) -> None:
        """Hints for `graded`: guess(tokens, order) -> (N,), order (N,) as the targets will be graded. Nothing else is handed the stream
        at once, so it is asked again with a forged future, from a drawn target on; RunError where that changes a hint up to there."""
        tokens, cut = self._data.tokens, int(np.random.default_rng(self.total).integers(self.total))
        future, forged = order[cut:][tokens[order[cut:] + 1] != BOS_ID] + 1, tokens.copy()  # where documents start is known
        forged[future] = tokens[future[::-1]]
        self.hints, self.boost, past = guess(tokens, order), boost, order[: cut + 1]
        if (self.hints[past] != guess(forged, order)[past]).any():
            raise RunError(f"{self.name}: a hint depends on its target or on what comes after it: a bug, please report it")

    def _targets(self, at: np.ndarray) -> Tensor:
        return torch.from_numpy(self._data.tokens[at + 1].astype(np.int64)).to(self.world.device, non_blocking=True)

    def _hints(self, at: np.ndarray) -> Tensor | None:
        return None if self.hints is None else torch.from_numpy(self.hints[at].astype(np.int64)).to(self.world.device, non_blocking=True)

    def score(self, at: np.ndarray, forward) -> Tensor:
        """Grade. at (B, n): targets, none of them graded before (RunError), -1 = none; forward(targets (B, n) int64) -> nats (B, n),
        which come back; what counts is what `graded` makes of them."""
        flat, device = np.flatnonzero(at >= 0), self.world.device
        index = at.reshape(-1)[flat]
        if (self.own[index] | self.graded[index]).any() or len(np.unique(index)) < len(index):
            raise RunError(f"{self.name}: a target in [{index.min()}, {index.max()}] was about to be scored twice: a bug, please report it")
        seen, self.shown = np.concatenate([*self.shown, index[:0]]), []
        if not np.isin(seen, index).all():
            raise RunError(f"{self.name}: what comes before target {seen.max()} was read, and others are scored: a bug, please report it")
        self.steps, (nats, counted) = 0, graded(forward, self._targets(at), self._hints(at), self.boost)
        counted = counted.detach().reshape(-1)[torch.from_numpy(flat).to(device, non_blocking=True)].float()
        self.nats[torch.from_numpy(index).to(device, non_blocking=True)] = counted
        self.sum += counted.to(self.sum.dtype).sum()
        self.own[index] = 1
        self.tokens, self.bytes = self.tokens + len(index), self.bytes + int(self._data.target_bytes[index].sum())
        self.unwritten.setdefault("score", []).append(index)
        return nats

    def targets_to_learn(self, at: np.ndarray, what: str = "adapters", early: bool = False) -> Tensor:
        """Targets to learn from, as for `score`; one step of an optimizer may follow, with what = "base" any number until `score`.
        RunError: one has not been graded; `early`, for methods that break this rule, puts that into the ledger instead."""
        index = at[at >= 0]
        ready = bool((self.own[index] | self.graded[index]).all())
        if not ready and not early:
            raise RunError(f"{self.name}: learning from a target in [{index.min()}, {index.max()}] before it was scored: a bug, report it")
        self.early |= not ready
        self.steps = 1 if what == "adapters" else math.inf
        self.unwritten.setdefault(what if ready else f"early {what}", []).append(index)
        return self._targets(at)

    @contextlib.contextmanager
    def only_released_steps(self):
        """Meanwhile every step of a torch optimizer without a release raises RunError."""
        def before_step(*_):
            if self.steps < 1:
                raise RunError(f"{self.name}: an optimizer step on nothing that was released for learning: a bug, please report it")
            self.steps -= 1

        with register_optimizer_step_pre_hook(before_step):
            yield

    def sums(self) -> tuple[float, int, int]:
        """Nats, tokens and bytes graded by this rank so far."""
        return self.sum.item(), self.tokens, self.bytes

    def receipt(self) -> None:
        """One line for what was scored, and one for what was learned from, since the last receipt."""
        self.receipts += [(kind, np.unique(np.concatenate(index))) for kind, index in self.unwritten.items()]
        self.unwritten = {}

    def ledger_line(self, nats: np.ndarray, kind: str, index: np.ndarray) -> tuple[str, dict]:
        """Ledger line of a receipt: ranges [a, b) of targets, and for scores nats and bytes of each range."""
        starts = np.flatnonzero(np.diff(index, prepend=-2) != 1)
        line = {"pass": self.name, "ranges": np.stack((index[starts], index[np.append(starts[1:], len(index)) - 1] + 1), 1).tolist()}
        if kind != "score":
            return "update", line | dict(what=kind.removeprefix("early "), early=kind.startswith("early "))
        sums = (np.add.reduceat(a[index].astype(t), starts).tolist() for a, t in ((nats, np.float64), (self._data.target_bytes, np.int64)))
        return "score", line | dict(zip(("nats", "bytes"), sums, strict=True))

    def sync(self) -> None:
        """Merge the ranks, all together. Raises RunError when two of them have graded the same target."""
        self.receipt()
        counts = torch.tensor(self.own, device=self.world.device)
        self.world.sum_(counts)
        self.graded = (counts > 0).cpu().numpy()
        if (counts > 1).any():
            raise RunError(f"{self.name}: two ranks scored the same targets: a bug, please report it")
        nats = self.nats.cpu().numpy()
        entries, self.receipts = [self.ledger_line(nats, *receipt) for receipt in self.receipts if len(receipt[1])], []
        for line in (line for lines in self.world.gather(entries) for line in lines) if self.ledger is not None else ():
            self.ledger.add(*line)

    def finish(self) -> Score:
        """Merge the ranks and sum up in fp64; rank 0 leaves the nats of every target. Raises RunError when one was left out."""
        self.sync()
        self.world.sum_(self.nats)  # zero where another rank has graded
        nats, size, count = self.nats.cpu().numpy(), int(self._data.target_bytes.sum()), int(self.graded.sum())
        total = float(nats.sum(dtype=np.float64))
        if count != self.total or not math.isfinite(total):
            raise RunError(f"scored {count} targets instead of {self.total}, {total:g} nats: a bug, please report it with the log")
        if self.ledger is not None and self.ledger.path is not None:
            buffer, path = io.BytesIO(), self.ledger.path.with_name(f"token_nats_{self.name}.npy")
            np.save(buffer, nats)
            write_atomic(path, buffer.getvalue())
            self.ledger.add("tokens", {"pass": self.name, "file": path.name, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()})
        return Score(total / count, total / math.log(2) / size, count, size)


def run_starts(x: Tensor) -> Tensor:
    """(n,) -> for each element, the index at which its run of equal elements starts."""
    first = torch.ones_like(x, dtype=torch.bool)
    first[1:] = x[1:] != x[:-1]
    return torch.where(first, torch.arange(len(x), device=x.device), 0).cummax(0).values


def ngram_hints(cfg: Config, tokens: np.ndarray, order: np.ndarray, device: torch.device | str) -> np.ndarray:
    """A guess for each target of the stream from those scored before it (the token-only n-gram of PR #2135).

    tokens (N + 1,), order (N,): the targets as they are scored -> (N,) int32: the token that most often followed the same
    TOKEN_ORDER - 1 tokens of a document so far, of several the first to get there; -1 where its share is below TOKEN_THRESHOLD or
    there is none. Sorts instead of a loop over hash tables; contexts are told apart exactly, from 1 token to 2, 4, 8, ...: they
    are equal if both halves are.
    """
    stream, order, n = torch.from_numpy(tokens.astype(np.int64)).to(device), torch.from_numpy(order).to(device), cfg.token_order - 1
    names, length, base = stream[:-1], 1, max(len(stream), 1 << 16)
    begin = torch.where(names == BOS_ID, torch.arange(len(names), device=device), 0).cummax(0).values
    order = order[order - begin[order] >= n - 1]
    while length < n:
        step = min(length, n - length)
        key, at = (names[step:] * base + names[:-step]).sort()
        names, length = torch.empty_like(at).scatter_(0, at, run_starts(key)), length + step
    context, at = names[order - (n - 1)].sort(stable=True)
    order, place = order[at], torch.arange(len(at), device=device)  # by context, then as they are scored
    follows = stream[order + 1]
    pair, at = (context * base + follows).sort(stable=True)
    count = torch.empty_like(place).scatter_(0, at, place - run_starts(pair) + 1)
    leader = run_starts((context * base + count).cummax(0).values)  # where the highest count so far was reached
    seen, before = place - run_starts(context), leader.roll(1)
    sure = (seen > 0) & (count[before].double() / seen >= cfg.token_threshold)
    hints = torch.full((len(stream) - 1,), -1, dtype=torch.int32, device=device)
    hints[order[sure]] = follows[before[sure]].int()
    return hints.cpu().numpy()


def prepare(cfg: Config, scorer: Scorer, order: np.ndarray) -> Scorer:
    """Tell the scorer in which order its targets come, and the guesses that NGRAM_TILT_ENABLED asks for. On the evaluation's clock."""
    scorer.order = order
    if cfg.ngram_tilt_enabled:
        device = scorer.world.device if scorer.world.device.type == "cuda" else "cpu"
        scorer.set_hints(order, partial(ngram_hints, cfg, device=device), cfg.token_boost)
    return scorer


class EvalBatch(NamedTuple):
    """Inputs (B, T) int64, the target that each predicts or -1 (B, T), and the packing of a packed row."""

    inputs: Tensor
    at: np.ndarray
    segments: Segments | None
    learn: np.ndarray | None = None  # (B, T) likewise: targets that SLOT learns from


def packed_rows(scorer: Scorer, context: int, row_tokens: int) -> list[tuple[int, int]]:
    """Cut the stream into rows of at most `row_tokens` inputs that never cut a piece: a document, or `context` tokens of a long one."""
    cuts = document_cu_seqlens(scorer.documents()[0], scorer.total, context, bucket=1)
    rows, start = [], 0
    while start < scorer.total:
        end = int(cuts[np.searchsorted(cuts, start + row_tokens, side="right") - 1])
        rows.append((start, end))
        start = end
    return rows


def packed_batches(cfg: Config, scorer: Scorer, rank: int, size: int):
    """Whole documents (cut at EVAL_SEQ_LEN) side by side in padded rows; which rows exist does not depend on the ranks."""
    context = cfg.eval_seq_len
    row_tokens = min(max(cfg.val_batch_tokens // 8, context), -(-scorer.total // context) * context)
    for start, end in packed_rows(scorer, context, row_tokens)[rank::size]:
        n = end - start
        inputs, at = np.zeros((1, row_tokens), np.int64), np.full((1, row_tokens), -1)
        at[0, :n] = np.arange(start, end)
        inputs[0, :n] = scorer.inputs_for(start, at)
        starts = np.flatnonzero(inputs[0, :n] == BOS_ID)
        cu_seqlens = document_cu_seqlens(np.append(starts, n) if n < row_tokens else starts, row_tokens, context)
        yield EvalBatch(torch.from_numpy(inputs), at, Segments(torch.from_numpy(cu_seqlens), context))


def sliding_batches(cfg: Config, scorer: Scorer, rank: int, size: int):
    """Windows every EVAL_STRIDE tokens, documents not masked; each scores the targets no earlier window has scored.

    Each row walks through a stretch of its own: most of what its window shows has been scored by the same row in earlier batches.
    """
    seq, stride = cfg.eval_seq_len, cfg.eval_stride
    starts = np.arange(0, max(1, scorer.total - (seq - stride)), stride)
    per_batch = max(1, cfg.val_batch_tokens // 8 // seq)
    steps = -(-len(starts) // (size * per_batch))
    for step in range(steps):
        window = np.arange(rank * per_batch, (rank + 1) * per_batch) * steps + step
        window = window[window < len(starts)]
        if not len(window):
            continue
        at = starts[window][:, None] + np.arange(seq)
        at = np.where(at < scorer.total, at, -1)
        first, fresh = (np.where(starts[w] == 0, 0, starts[w] + seq - stride)[:, None] for w in (window - step, window))
        learn = at if cfg.slot == "published" else np.where((at >= first) & (at < fresh), at, -1)
        at, inputs = np.where(at >= fresh, at, -1), np.zeros(at.shape, np.int64)
        for row, targets in enumerate(at):
            seen = scorer.inputs_for(starts[window[row]], targets)
            inputs[row, : len(seen)] = seen
        yield EvalBatch(torch.from_numpy(inputs), at, None, learn)


@torch.enable_grad()
def slot_shift(cfg: Config, scorer: Scorer, score, learn: np.ndarray) -> Tensor:
    """A shift of the final hidden states that lowers the loss on some targets of a batch of windows (SLOT, PR #1105).

    published: one shift for the batch, from all its targets, those about to be scored included, which breaks the rules. causal:
    one for each window, from targets that its row has scored before. score(targets, shift=...) -> nats. -> (1 or B, 1, D).
    """
    alone, chosen, device = cfg.slot == "causal", torch.from_numpy(learn >= 0), scorer.world.device
    targets = scorer.targets_to_learn(learn, "slot", early=not alone)
    weight = (chosen / chosen.sum(1 if alone else None, keepdim=alone).clamp_min(1)).to(device)
    shift = torch.zeros(len(learn) if alone else 1, 1, cfg.model_dim, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([shift], lr=cfg.slot_lr, eps=1e-5, weight_decay=1e-8)
    for _ in range(cfg.slot_steps):
        shift.grad = torch.autograd.grad((score(targets, shift=shift) * weight).sum(), shift)[0]
        optimizer.step()
    return shift.detach()


@torch.no_grad()
def evaluate(cfg: Config, world: World, forward, scorer: Scorer, looping: bool = True) -> Score:
    """Score everything behind the scorer with fixed weights, each rank its share of the batches. forward: `GPT.forward`, compiled or not."""
    order, batches = layer_order(cfg, looping), packed_batches if cfg.eval_method == "packed" else sliding_batches
    with prepare(cfg, scorer, np.arange(scorer.total)).only_released_steps():
        for batch in batches(cfg, scorer, world.rank, world.size):
            segments = batch.segments and Segments(batch.segments.cu_seqlens.to(world.device), batch.segments.max_len)
            score = partial(forward, batch.inputs.to(world.device), layers=order, segments=segments)
            if cfg.slot != "off":
                scorer.receipt()  # what is learned now comes after what was scored up to here
                score = partial(score, shift=slot_shift(cfg, scorer, score, batch.learn))
            scorer.score(batch.at, score)
            lengths = np.diff(batch.segments.cu_seqlens.numpy()) if batch.segments else np.full(*batch.at.shape)
            scorer.work.add(flops_per_token(cfg, lengths, looping), "score", batch.at.size, int((batch.at >= 0).sum()))
        return scorer.finish()


# ==================================================================================================
# TEST-TIME TRAINING - score a chunk, then learn from it: a prediction never depends on what it predicts.
# ==================================================================================================

class Batch(NamedTuple):
    """Documents side by side. starts and sizes (n,): first input token and number of predictions, sizes ascending."""

    number: int  # position in the order of ascending length
    starts: np.ndarray
    sizes: np.ndarray
    chunk: int


def chunk_size(cfg: Config, length: int) -> int:
    """Tokens scored between two updates, for a batch whose longest document has `length` tokens, its last target included."""
    if not cfg.ttt_short_score_first_enabled:
        return cfg.ttt_chunk_size
    if cfg.ttt_short_score_first_steps:
        steps = parse_steps(cfg.ttt_short_score_first_steps, ":")
        return next((int(chunk) for limit, chunk in steps if length <= limit), cfg.ttt_chunk_size)
    return cfg.ttt_short_chunk_size if length <= cfg.ttt_short_doc_len else cfg.ttt_chunk_size


def document_batches(cfg: Config, scorer: Scorer) -> list[Batch]:
    """All documents by ascending length, TTT_BATCH_SIZE at a time; ties in file order."""
    starts, ends = scorer.documents()
    sizes = ends - starts
    order = np.argsort(sizes, kind="stable")
    groups = [order[i : i + cfg.ttt_batch_size] for i in range(0, len(order), cfg.ttt_batch_size)]
    return [Batch(i, starts[g], sizes[g], chunk_size(cfg, int(sizes[g].max()) + 1)) for i, g in enumerate(groups)]


def chunk_window(size: int, chunk: int, index: int, context: int) -> tuple[int, int, int]:
    """(window start, chunk start, end) in inputs of a document with `size` predictions: chunk `index` sees up to `context` tokens.

    Example: size 100, chunk 48, context 3072 -> (0, 0, 48), (0, 48, 96), (0, 96, 100).
    """
    start, end = index * chunk, min((index + 1) * chunk, size)
    return max(0, end - context), start, end


def window_width(cfg: Config, chunk: int, index: int) -> int:
    """Tokens of all windows of a batch at its chunk `index`. With CUDA_GRAPHS they are padded to a multiple of TTT_BUCKET, as nothing that
    is scored looks behind itself; not with ROPE_YARN, whose base follows the width."""
    bucket = cfg.ttt_bucket if cfg.cuda_graphs and not cfg.rope_yarn else 1
    return min(-(-(index + 1) * chunk // bucket) * bucket, cfg.ttt_eval_seq_len)


def batch_cost(batch: Batch, context: int) -> float:
    """Token positions a batch runs through the network, the unit of its duration."""
    chunks = -(-int(batch.sizes.max()) // batch.chunk)
    growing = min(chunks, context // batch.chunk)
    return len(batch.sizes) * (batch.chunk * growing * (growing + 1) / 2 + (chunks - growing) * context)


def phase_segments(cfg: Config, batches: list[Batch]) -> list[tuple[list[Batch], int]]:
    """The scoring order cut at the global phases: [(batches, documents the phase after them learns from; 0 = no phase)].

    Longest first, because they cost most and teach most. A function of the data alone.
    """
    order = batches[::-1]
    total = sum(len(b.sizes) for b in batches)
    prefix = min(total, cfg.phased_ttt_prefix_docs) if cfg.phased_ttt_enabled else 0
    boundaries = [prefix * (p + 1) // cfg.phased_ttt_num_phases for p in range(cfg.phased_ttt_num_phases)] if prefix else []
    segments, current, done = [], [], 0
    for batch in order:
        current.append(batch)
        done += len(batch.sizes)
        if reached := [b for b in boundaries if b <= done]:  # several at once make one phase, over all of their documents
            segments.append((current, reached[-1]))
            boundaries, current = boundaries[len(reached) :], []
    return [*segments, (current, 0)] if current else [*segments[:-1], (segments[-1][0], 0)]


def deal(costs: list[float], lanes: int) -> list[list[int]]:
    """Items to lanes, in the given order, each to the least loaded lane: balanced when costs fall, and the same on every run."""
    load, hands = [(0.0, lane) for lane in range(lanes)], [[] for _ in range(lanes)]
    for i, cost in enumerate(costs):
        total, lane = heapq.heappop(load)
        hands[lane].append(i)
        heapq.heappush(load, (total + cost, lane))
    return hands


def scoring_order(cfg: Config, segments: list[tuple[list[Batch], int]]) -> np.ndarray:
    """All targets in the order in which one rank scores them: (N,) places in the stream."""
    places = []
    for batches in (segment for segment, _ in segments):
        for i in (i for hand in deal([batch_cost(b, cfg.ttt_eval_seq_len) for b in batches], cfg.ttt_lanes) for i in hand):
            rows = [np.arange(size) for size in batches[i].sizes]
            chunks = np.concatenate(rows) // batches[i].chunk
            places.append(np.concatenate([start + row for start, row in zip(batches[i].starts, rows, strict=True)])
                          [np.argsort(chunks, kind="stable")])
    return np.concatenate(places)


class AdapterChain:
    """Adapters passed on from batch to batch: B starts at zero every time, A is kept (TTT_WARM_START_A).

    What is passed on comes from tokens scored in earlier batches only.
    """

    def __init__(self, cfg: Config, world: World, rows: int, seed: int, adam=None):
        self.cfg, self.adam, self.generator = cfg, adam, torch.Generator()
        D, depths, rank = cfg.model_dim, len(layer_order(cfg, looping=True)), cfg.ttt_lora_rank
        n_out = dict(q=D, k=cfg.kv_dim, v=cfg.kv_dim, o=D, mlp=D, head=cfg.vocab_size)

        def lora(site: str) -> Lora:
            lead = (rows,) if site == "head" else (depths, rows)
            A = torch.empty(*lead, rank, D, device=world.device, requires_grad=True)
            B = torch.zeros(*lead, n_out[site], rank, device=world.device, requires_grad=True)
            return Lora(A, B, cfg.ttt_lora_alpha / rank)

        self.adapters = Adapters(**{site: lora(site) for site in (*cfg.lora_sites, "head")})
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
            lora.A.copy_(torch.empty(lora.A.shape).uniform_(-bound, bound, generator=self.generator))

    @torch.no_grad()
    def begin(self) -> torch.optim.Optimizer:
        """Reset for a new batch and return its optimizer."""
        cfg = self.cfg
        if not cfg.ttt_warm_start_a:
            self.draw()
        for lora in self.loras:
            lora.B.zero_()
        parameters = [t for lora in self.loras for t in (lora.A, lora.B)]
        lr = cfg.ttt_lora_lr * cfg.ttt_local_lr_mult
        if self.adam is not None:
            return self.adam(parameters, lr, cfg.ttt_beta2, 1e-10, cfg.ttt_weight_decay)
        return torch.optim.AdamW(
            parameters, lr=lr, betas=(cfg.ttt_beta1, cfg.ttt_beta2), eps=1e-10, weight_decay=cfg.ttt_weight_decay,
            fused=parameters[0].device.type in ("cuda", "cpu"))


class Chunk(NamedTuple):
    """One step of a batch: windows (B, w), the positions to score in them (B, c), the targets there or -1 (B, c)."""

    inputs: Tensor
    positions: Tensor
    at: np.ndarray


def build_chunk(scorer: Scorer, batch: Batch, first: int, rows: int, index: int, context: int, width: int = 0) -> Chunk:
    """Chunk `index` of the documents first, first + 1, ... of the batch in `rows` rows; ended or missing ones count nothing.
    width: of the windows; 0 = no padding behind the chunk."""
    c, width = batch.chunk, width or min((index + 1) * batch.chunk, context)
    inputs, positions, at = np.zeros((rows, width), np.int64), np.zeros((rows, c), np.int64), np.full((rows, c), -1)
    for row, (origin, size) in enumerate(zip(batch.starts[first:].tolist(), batch.sizes[first:].tolist(), strict=True)):
        window, start, end = chunk_window(size, c, index, context)
        if start >= size:
            continue
        at[row, : end - start] = np.arange(origin + start, origin + end)
        inputs[row, : end - window] = scorer.inputs_for(origin + window, at[row])
        positions[row] = np.minimum(start - window + np.arange(c), width - 1)
    return Chunk(torch.from_numpy(inputs), torch.from_numpy(positions), at)


def score_batch(
    cfg: Config, world: World, forward, scorer: Scorer, batch: Batch, chain: AdapterChain, static_rows: int = 0
) -> None:
    """Two verbs, in this order: grade a chunk with adapters that have never seen it, then learn from it.

    Each document has its own adapters and the loss is a sum over documents, so they do not influence each other. A document's
    last chunk is scored and not learned from. static_rows: a compiled forward wants this many rows at every step; otherwise
    documents that have ended are left out (sizes ascend, so they are the first).
    """
    optimizer, layers = chain.begin(), layer_order(cfg, looping=True)
    context, device = cfg.ttt_eval_seq_len, world.device
    chunks = -(-batch.sizes // batch.chunk)
    for index in range(int(chunks.max())):
        first = 0 if static_rows else int(np.searchsorted(chunks, index, side="right"))
        rows = static_rows or len(chunks) - first
        chunk = build_chunk(scorer, batch, first, rows, index, context, window_width(cfg, batch.chunk, index))
        inputs, positions = (t.to(device, non_blocking=True) for t in (chunk.inputs, chunk.positions))
        learn = torch.zeros(rows)
        learn[: len(chunks) - first] = torch.from_numpy((chunks > index + 1)[first:])
        adapters = chain.adapters if static_rows else chain.adapters.rows(first, first + rows)
        score = partial(forward, inputs, layers=layers, adapters=adapters, positions=positions)
        with torch.set_grad_enabled(bool(learn.any())):
            nats = scorer.score(chunk.at, score)
        width, learns = inputs.shape[1], bool(learn.any())
        flops = flops_per_token(cfg, [width], True, chain.adapters, batch.chunk / width)
        scorer.work.add(flops, "adapt" if learns else "score", inputs.numel(), int((chunk.at >= 0).sum()))
        if learns:
            scorer.targets_to_learn(np.where(learn.bool()[:, None], chunk.at, -1))
            loss = (nats.mean(1) * learn.to(device)).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    scorer.receipt()


def base_lr(cfg: Config, chunk: int, chunks: int) -> float:
    """Learning rate of a global phase: linear warm-up, then a cosine to zero."""
    warm = cfg.global_ttt_warmup_chunks
    if chunk < warm:
        return cfg.global_ttt_warmup_start_lr + (cfg.global_ttt_lr - cfg.global_ttt_warmup_start_lr) * chunk / warm
    return cfg.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * (chunk - warm) / max(1, chunks - 1 - warm)))


class BaseLearner:
    """Global phases: SGD on all weights over scored tokens, all ranks together.

    Every rank joins every collective, with zero gradients when a chunk has fewer sequences than there are ranks, and the mean
    is over the chunk's tokens: the result does not depend on the ranks (but for the smear gate at a row's first token).
    """

    def __init__(self, cfg: Config, world: World, model: GPT):
        self.cfg, self.world, self.layers = cfg, world, layer_order(cfg, looping=True)
        self.parameters = [*model.parameters()]
        self.forward = compile_forward(model, cfg, world)
        self.graphs = Graphed(self.forward, self.parameters) if cfg.cuda_graphs else None
        self.per_chunk, most = cfg.global_ttt_chunk_tokens // cfg.eval_seq_len, cfg.global_ttt_batch_seqs
        first, end = (self.per_chunk * rank // world.size for rank in (world.rank, world.rank + 1))
        self.shares = [(s, min(most, end - s)) for s in range(first, end, most)]  # (first sequence of a chunk, how many) of each forward

    def add_gradient(self, row: Row) -> None:
        """Of this row's part of the mean loss of a chunk."""
        seq = self.cfg.eval_seq_len
        if self.cfg.global_ttt_respect_doc_boundaries:
            nats = nats_of_row(row, self.forward, self.graphs, layers=self.layers)
        else:
            nats = (self.graphs or self.forward)(row.inputs.view(-1, seq), row.targets.view(-1, seq), layers=self.layers)
        (nats.sum() / (self.per_chunk * seq)).backward()

    def warm_up(self) -> None:
        """Compile, and record, what `learn` will run, on random tokens; no weight changes."""
        seq, rng = self.cfg.eval_seq_len, np.random.default_rng(0)
        for p in self.parameters:
            p.requires_grad_(True)
        for count in [*dict.fromkeys(count for _, count in self.shares)] * (1 + bool(self.graphs)):
            tokens = rng.integers(0, self.cfg.vocab_size, count * seq + 1)
            for row in warm_rows(packed_row(tokens, seq, self.world.device, every=seq), seq):
                self.add_gradient(row)
        for p in self.parameters:
            p.requires_grad_(False).grad = None

    def learn(self, tokens: np.ndarray, log: Log) -> None:
        """One phase; the last, partial chunk is skipped."""
        cfg, seq, size, parameters = self.cfg, self.cfg.eval_seq_len, self.cfg.global_ttt_chunk_tokens, self.parameters
        chunks = -(-(len(tokens) - 1) // size)
        for p in parameters:
            p.requires_grad_(True)
        optimizer = torch.optim.SGD(parameters, lr=cfg.global_ttt_lr, momentum=cfg.global_ttt_momentum)
        eta = Eta(cfg.global_ttt_epochs * (chunks - 1))
        for chunk in (c for _ in range(cfg.global_ttt_epochs) for c in range(chunks - 1)):
            for first, count in self.shares:
                at = chunk * size + first * seq
                # Cut at every sequence: how many of them share a row depends on the ranks, what a token sees must not.
                self.add_gradient(packed_row(tokens[at : at + count * seq + 1], seq, self.world.device, every=seq))
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.world.sum_(*(p.grad for p in parameters))
            if cfg.global_ttt_grad_clip:
                torch.nn.utils.clip_grad_norm_(parameters, cfg.global_ttt_grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = base_lr(cfg, chunk, chunks)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            eta.add(1)
            if chunk % 50 == 0 or chunk == chunks - 2:
                log(f"tttg: c{chunk + 1}/{chunks} lr:{base_lr(cfg, chunk, chunks):.6f} t:{eta.elapsed:.1f}s")
        for p in parameters:
            p.requires_grad_(False)


def warm_up_ttt(cfg: Config, world: World, forward, chain: AdapterChain, shapes: list[tuple[int, int]], log: Log) -> None:
    """Compile the scoring step for (chunk size, width of windows) on random tokens; model in eval mode, adapters of no use after."""
    log(f"ttt_lora:warming up compile (random tokens, no val data) shapes:{len(shapes)}")
    start, layers, generator = time.perf_counter(), layer_order(cfg, looping=True), torch.Generator().manual_seed(0)
    optimizer, rows = chain.begin(), chain.adapters.head.A.shape[0]
    for chunk, width in shapes * (1 + cfg.cuda_graphs):  # graphs are recorded in the second round
        inputs, targets = (torch.randint(0, cfg.vocab_size, (rows, n), generator=generator).to(world.device) for n in (width, chunk))
        positions = torch.arange(width - chunk, width, device=world.device).expand(rows, -1).contiguous()
        targets = torch.stack((targets, targets), -1) if cfg.ngram_tilt_enabled else targets
        for learn in (False, True):
            with torch.set_grad_enabled(learn):
                nats = forward(inputs, targets, layers=layers, adapters=chain.adapters, positions=positions)
        nats.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    log(f"ttt_lora:compile warmup done ({time.perf_counter() - start:.1f}s)")


class TttRun:
    """One scored evaluation with test-time training: its scorer, its clock and its log lines. like: a run whose graphs it can use."""

    def __init__(self, cfg: Config, world: World, model: GPT, scorer: Scorer, log: Log, like: TttRun | None = None):
        self.cfg, self.world, self.model, self.scorer, self.log = cfg, world, model, scorer, log
        self.forward = like.forward if like else compile_forward(model, cfg, world, growing=True)
        if cfg.cuda_graphs and not like:
            gc.collect()  # graphs of the training, and the memory they hold, lie in cycles of references
            self.forward = Graphed(self.forward)
        self.batches = document_batches(cfg, scorer)
        self.rows = like.rows if like else max(len(b.sizes) for b in self.batches)
        self.base = like.base if like else BaseLearner(cfg, world, model) if cfg.phased_ttt_enabled else None
        self.static_rows = 0 if self.forward is model else self.rows
        self.chain = like.chain if like else AdapterChain(cfg, world, self.rows, cfg.seed, model.kernels.adam)  # all in its place
        self.phases_done = self.scored_docs = 0
        self.eta = Eta(sum(batch_cost(b, cfg.ttt_eval_seq_len) for b in self.batches) / world.size)

    def warm_up(self) -> None:
        """Compile what the evaluation will run, if anything is compiled; for CUDA graphs every width."""
        cfg, few = self.cfg, (0, 1, 1 << 30)
        chunks = ((b.chunk, range(-(-int(b.sizes.max()) // b.chunk)) if cfg.cuda_graphs else few) for b in self.batches)
        shapes = list(dict.fromkeys((c, window_width(cfg, c, i)) for c, indices in chunks for i in indices))
        if self.static_rows:
            warm_up_ttt(cfg, self.world, self.forward, self.chain, shapes, self.log)
            if self.base:
                self.base.warm_up()

    def check_budget(self, batch: Batch) -> None:
        """Raises RunError before the batch that would break MAX_EVAL_SECONDS."""
        budget, cost = self.cfg.max_eval_seconds, batch_cost(batch, self.cfg.ttt_eval_seq_len)
        forecast = self.eta.elapsed + (self.eta.elapsed / self.eta.done * cost if self.eta.done else 0)
        if budget and forecast > budget:
            raise RunError(
                f"evaluation would break MAX_EVAL_SECONDS={budget:g}: {self.eta.elapsed:.0f} s used, {self.scored_docs} documents scored, "
                f"about {self.eta.left:.0f} s to go. Use larger TTT_CHUNK_SIZE or TTT_SHORT_SCORE_FIRST_STEPS, a shorter TTT_EVAL_SEQ_LEN, "
                "fewer PHASED_TTT_PREFIX_DOCS, or a larger budget; the artifact is on disk: go on with STAGE=eval")

    def report(self, batch: Batch, before: tuple[float, int, int]) -> None:
        """Log a batch and this rank's running score; before: the sums ahead of the batch."""
        total = self.scorer.sums()
        nats, tokens, size = (now - old for now, old in zip(total, before, strict=True))
        self.log(f"ttp: b{batch.number + 1}/{len(self.batches)} bl:{nats / tokens:.4f} bb:{nats / math.log(2) / max(1, size):.4f} "
                 f"rl:{total[0] / total[1]:.4f} rb:{total[0] / math.log(2) / max(1, total[2]):.4f} "
                 f"dl:{batch.sizes.min() + 1}-{batch.sizes.max() + 1} gd:{self.phases_done} "
                 f"sf:{int(batch.chunk != self.cfg.ttt_chunk_size)} t:{self.eta.elapsed:.0f}s eta:{self.eta.left:.0f}s")

    def score_segment(self, segment: list[Batch], phase: int) -> None:
        """Score all batches between two phases: dealt to TTT_LANES adapter chains, which the ranks share out."""
        cfg, world = self.cfg, self.world
        hands = deal([batch_cost(b, cfg.ttt_eval_seq_len) for b in segment], cfg.ttt_lanes)
        for number in range(world.rank, cfg.ttt_lanes, world.size):
            if not hands[number]:
                continue
            self.chain.restart(cfg.seed + 1000 * (1 + phase * cfg.ttt_lanes + number))
            for batch in (segment[i] for i in hands[number]):
                self.check_budget(batch)
                before = self.scorer.sums()
                score_batch(cfg, world, self.forward, self.scorer, batch, self.chain, self.static_rows)
                self.eta.add(batch_cost(batch, cfg.ttt_eval_seq_len))
                self.scored_docs += len(batch.sizes)
                self.report(batch, before)
                if not cfg.compile_allow_recompiles and (made := compilations()[self.compiled :]):
                    raise recompile_error(f"evaluation batch {batch.number + 1}", made, "the artifact exists: go on with STAGE=eval")

    def learn_base(self, segments: list[Batch], documents: int) -> None:
        """A global phase over the first `documents` scored documents in the order of ascending length."""
        records = sorted((b.number, i) for b in segments for i in range(len(b.sizes)))[:documents]
        by_number = {b.number: b for b in segments}
        pieces = [(int(by_number[n].starts[i]), int(by_number[n].sizes[i])) for n, i in records]
        tokens = self.scorer.targets_to_learn(np.concatenate([np.r_[-1, at : at + size] for at, size in pieces]), "base").cpu().numpy()
        self.log(f"ttpp: phase:{self.phases_done + 1}/{self.cfg.phased_ttt_num_phases} pd:{sum(len(b.sizes) for b in segments)} "
                 f"gd:{len(records)} t:{self.eta.elapsed:.1f}s")
        self.world.barrier()
        self.base.learn(tokens, self.log)
        learned, lengths = self.cfg.global_ttt_epochs * len(tokens) / self.world.size, [min(n, self.cfg.eval_seq_len) for _, n in pieces]
        self.scorer.work.add(flops_per_token(self.cfg, lengths, True), "train", learned, 0)
        self.phases_done += 1
        self.log(f"ttpr: phase:{self.phases_done}/{self.cfg.phased_ttt_num_phases} t:{self.eta.elapsed:.1f}s")

    def run(self) -> Score:
        """Score every document. Returns the number the run is judged by."""
        cfg = self.cfg
        segments = phase_segments(cfg, self.batches)
        boundaries = [documents for _, documents in segments if documents]
        total = sum(len(b.sizes) for b in self.batches)
        prefix = max(boundaries, default=0)
        self.log(f"ttt_phased: total_docs:{total} prefix_docs:{prefix} suffix_docs:{total - prefix} "
                 f"num_phases:{len(boundaries)} boundaries:{boundaries} target_tokens:{self.scorer.total}")
        self.eta, self.compiled = Eta(self.eta.total), len(compilations())
        scored: list[Batch] = []
        with prepare(cfg, self.scorer, scoring_order(cfg, segments)).only_released_steps():
            for phase, (segment, documents) in enumerate(segments):
                self.score_segment(segment, phase)
                scored += segment
                if documents:
                    self.scorer.sync()
                    self.learn_base(scored, documents)
            return self.scorer.finish()


# ==================================================================================================
# AUDIT - probes of the scored pass, and a verdict for each rule of the contest.
# ==================================================================================================

class Watch:
    """What Python opens, connects to and starts within `with`: an audit hook. It cannot be removed, so `open_watch` makes one. Training
    data that is opened then is a RunError."""

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if self.on and event in ("open", "socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            self.seen.append((event, what := args[1] if event == "socket.connect" else args[0]))
            if event == "open" and not isinstance(what, int) and Path(os.fsdecode(what)).name.startswith("fineweb_train_"):
                raise RunError(f"{os.fsdecode(what)}: training data was about to be read in an evaluation: a bug, please report it")

    def __enter__(self) -> Watch:
        self.on, self.seen = True, []
        return self

    def __exit__(self, *_) -> None:
        self.on = False

    def strangers(self, data: Path, ours: list[Path]) -> list[str]:
        """What an evaluation has no business with: data but `ours`, files of neither Python, the system nor the run, other machines."""
        system = [sys.prefix, sys.base_prefix, torch.__path__[0], tempfile.gettempdir(), "/proc", "/sys", "/dev", "/etc", "/usr", "/lib"]
        ours, places = (tuple(str(Path(path).resolve()) for path in paths) for paths in (ours, [*system, Path(__file__).parent]))
        programs, found = ("lrzip", "gcc", "g++", "cc", "c++", "clang", "ptxas", "ldconfig", "python"), {}
        for event, what in self.seen:
            path = str(Path(os.fsdecode(what)).resolve()) if isinstance(what, (str, bytes, os.PathLike)) else ""
            place = (path.startswith(places) and not path.startswith(f"{data.resolve()}{os.sep}")) or ".cache/" in path
            fine = {"open": not path or path.startswith(ours) or place,
                    "socket.connect": not isinstance(what, tuple) or what[0] in ("127.0.0.1", "::1", "localhost")}
            if not fine.get(event, Path(path).name.startswith(programs)):
                found[f"{event} {path or what}"] = None
        return list(found)


open_watch = cache(Watch)
Finding = tuple[str, str]  # a verdict, and the evidence in one line
SEVERITY = ("FAIL", "NEEDS-RULING", "NOT-MEASURED", "PASS")
RULES = dict(  # rule -> the findings that decide it; tools/validity.md says what each of them asks
    R1=("bytes",), R2=("P7",), R3=("P9",), R4=("P4", "P5", "P10"), R5=("P2",), R6=("P1", "P3"), R7=("order",), R8=("P6",), R9=("P11",),
    R10=("P12",), R11=("sum",), R12=("P8",))
UNRULED = (  # rule, when, what no maintainer has ruled on
    ("R7", lambda c: c.slot == "causal", "a shift of the hidden states learned from scored targets (SLOT, issue #1336)"),
    ("R4", lambda c: not c.caseops_enabled, "bytes are those of the normalized pieces, not of a sidecar"),
)


def holds(good: bool, evidence: str, known: bool = True) -> Finding:
    """PASS or FAIL, or NOT-MEASURED where nobody could know."""
    return ("PASS" if good else "FAIL") if known else "NOT-MEASURED", evidence


def worst(findings: list[Finding]) -> Finding:
    """The gravest verdict, with the evidence of all that share it."""
    verdict = min((v for v, _ in findings), key=SEVERITY.index)
    return verdict, "; ".join(dict.fromkeys(text for v, text in findings if v == verdict))


def verdicts(cfg: Config, findings: dict[str, Finding]) -> dict[str, Finding]:
    """Rule by rule. What nobody looked at is NOT-MEASURED."""
    missing = ("NOT-MEASURED", "AUDIT=off" if cfg.audit == "off" else "no part of this stage")
    unruled = {rule: [("NEEDS-RULING", why) for r, applies, why in UNRULED if r == rule and applies(cfg) and findings] for rule in RULES}
    return {rule: worst([findings.get(name, missing) for name in names] + unruled[rule]) for rule, names in RULES.items()}


class ProbeScorer(Scorer):
    """Where target `watch` is scored, it asks for the nats of the whole vocabulary too: `row` at that target, `excess` anywhere near it."""

    def __init__(self, data: ValData, world: World, watch: int, vocab: int):
        super().__init__(data, world, "probe")
        self.watch, self.vocab, self.row, self.excess = watch, vocab, None, math.inf

    def score(self, at: np.ndarray, forward) -> Tensor:
        if (at == self.watch).any():
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # one shape, once: not worth a graph
                whole = torch.arange(self.vocab, device=self.world.device).expand(*at.shape, -1)
                nats = graded(forward, whole, self._hints(at), self.boost)[1].cpu()
            self.excess = float((nats[torch.from_numpy(at >= 0)].double().neg().exp().sum(-1) - 1).abs().max())
            self.row = nats[torch.from_numpy(at == self.watch)]
        return super().score(at, forward)


def short_stream(data: ValData, count: int, length: int, generator: np.random.Generator) -> ValData:
    """The first `length` tokens of `count` random documents that have so many, or of the longest ones."""
    starts, ends = data.documents()
    sizes, count = ends - starts, min(count, len(starts))
    picked = generator.choice(np.argsort(sizes)[-max(count, (sizes >= length).sum()) :], count, replace=False)
    tokens = np.append(np.concatenate([data.tokens[starts[i] : starts[i] + min(sizes[i], length)] for i in picked]), BOS_ID)
    return ValData(tokens.astype(np.uint16), np.ones(len(tokens) - 1, np.int32))


def probe_scoring(data: ValData, world: World, vocab: int, replay, count: int, length: int, rounds: int, seed: int, isolated: bool = True):
    """P1 forged future, P2 sum over the vocabulary, P3 neighbours (if isolated): {id: finding}. replay(scorer), the scored pass from
    a fresh start, scores `count` short documents as they are, and with one forged from a random target on. All before that in
    the order of scoring, and the other documents, must keep the same bits; so must the distribution at the first forged target."""
    generator, past, others, row, excess = np.random.Generator(np.random.PCG64(seed)), 0.0, 0.0, 0.0, 0.0
    for _ in range(rounds):
        true = short_stream(data, count, length, generator)
        starts, ends = true.documents()
        start, end = starts[len(starts) // 2], ends[len(starts) // 2]
        if end - start < 3:
            return dict.fromkeys(("P1", "P2", "P3"), ("NOT-MEASURED", "the documents are too short"))
        cut = int(generator.integers(start + (end - start) // 3, end - 1))  # token cut + 1 is the first to be forged
        tokens = true.tokens.astype(np.int64)
        tokens[cut + 1 : end] = 2 + (tokens[cut + 1 : end] - 1 + generator.integers(0, vocab - 3, end - cut - 1)) % (vocab - 2)
        scorers = [ProbeScorer(ValData(t, true.target_bytes), world, cut, vocab) for t in (true.tokens, tokens.astype(np.uint16), true.tokens)]
        for scorer in scorers[:2]:
            replay(scorer)
        moved = (scorers[1].nats - scorers[0].nats).abs().cpu().numpy()
        before = np.concatenate((scorers[0].order[: int(np.flatnonzero(scorers[0].order == cut)[0])], np.arange(start, cut)))
        past, others = max(past, moved[before].max(initial=0.0)), max(others, np.delete(moved, np.s_[start:end]).max(initial=0.0))
        row, excess = max(row, float((scorers[1].row - scorers[0].row).abs().max())), max(excess, scorers[0].excess)
        if max(row, past, others) > 0:
            replay(scorers[2])
            if noise := float((scorers[2].nats - scorers[0].nats).abs().max()):
                return dict.fromkeys(("P1", "P2", "P3"), ("NOT-MEASURED", f"scoring the same text twice differs by {noise:.2g} nats here"))
    return dict(
        P1=holds(past == row == 0, f"a forged future moves the scores before it by {past:.3g}, its own distribution by {row:.3g} nats"),
        P2=holds(excess < 1e-4 and row == 0, f"sums over {vocab} tokens are off by {excess:.2g}"),
        P3=holds(others == 0, f"a forged document moves scores of its {count - 1} neighbours by {others:.3g} nats", isolated))


def document_hashes(tokens: np.ndarray, offset: int, length: int) -> np.ndarray:
    """64-bit hash of tokens [offset, offset + length) of every document, 0 for those without the first of them."""
    starts = np.flatnonzero(tokens == BOS_ID)
    ends, h = np.append(starts[1:], len(tokens)), np.zeros(len(starts), np.uint64)
    for at in (starts + offset + j for j in range(length)):
        token = np.where(at < ends, tokens[np.minimum(at, len(tokens) - 1)], 0).astype(np.uint64)
        h = (h ^ token ^ (h >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)
    return np.where(starts + offset < ends, h, np.uint64(0))


def probe_overlap(shards: tuple[Path, ...], val: np.ndarray, seconds: float) -> dict[str, Finding]:
    """P9: validation documents whose first 64 tokens start a training document; and others that share 32 tokens further in."""
    spans, deadline, read = ((1, 64), (65, 32), (129, 32), (257, 32)), time.perf_counter() + seconds, 0
    ours = [document_hashes(val, *span) for span in spans]
    hits = np.zeros((len(spans), len(ours[0])), bool)
    while read < len(shards) and time.perf_counter() < deadline:
        tokens, read = np.array(read_shard(shards[read])), read + 1
        hits |= [np.isin(hashes, document_hashes(tokens, *span)) & (hashes > 0) for hashes, span in zip(ours, spans, strict=True)]
    exact, near = int(hits[0].sum()), int((hits[1:].any(0) & ~hits[0]).sum())
    verdict = "PASS" if not exact else "FAIL" if exact > 0.01 * len(ours[0]) else "NEEDS-RULING"
    return dict(P9=(verdict, f"{exact} of {len(ours[0])} documents are in {read} of {len(shards)} training shards, {near} more in part"))


def probe_round_trip(cfg: Config, data: ValData, count: int, seed: int) -> Finding:
    """P10: documents decoded to text must have the bytes that were counted for them, and give the same tokens when encoded again."""
    try:
        import sentencepiece
        decode = importlib.import_module("lossless_caps").decode if cfg.caseops_enabled else str
        model = sentencepiece.SentencePieceProcessor(model_file=str(cfg.tokenizer_file))
    except (ImportError, OSError, RuntimeError) as e:
        return "NOT-MEASURED", f"the text cannot be decoded here: {str(e).splitlines()[0]}"
    starts, broken, lost, total = data.documents()[0], 0, 0, 0
    ends = np.append(starts[1:], len(data.tokens))
    picked = np.random.Generator(np.random.PCG64(seed)).choice(len(starts), min(count, len(starts)), replace=False)
    for start, end in zip(starts[picked].tolist(), ends[picked].tolist(), strict=True):
        ids, counted = data.tokens[start + 1 : end].tolist(), int(data.target_bytes[start : end - 1].sum())
        coded = model.decode(ids)
        missing = abs(counted - len(decode(coded).encode()))
        broken, lost, total = broken + bool(missing or model.encode(coded) != ids), lost + missing, total + counted
    return ("NEEDS-RULING" if broken else "PASS"), f"{broken} of {len(picked)} documents and {lost} of {total} bytes do not come back"


# ==================================================================================================
# KERNELS - faster forms of the definitions above, each held to its definition by a test; no section but MAIN needs it.
# ==================================================================================================

def operator(fake, backward=None):
    """Register a function as one node of compiled graphs: fake(*args) makes tensors of its results' shapes.

    backward(*gradients of the results, *tensors among the arguments) -> gradients of the first arguments; the others have none.
    """

    def register(body):
        op = torch.library.custom_op(f"train_gpt::{body.__name__}", body, mutates_args=())
        op.register_fake(fake)

        def save(ctx, inputs, output):
            ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
            ctx.inputs = len(inputs)

        def differentiate(ctx, *grads):
            made = backward(*grads, *ctx.saved_tensors)
            return *made, *[None] * (ctx.inputs - len(made))

        if backward is not None:
            op.register_autograd(differentiate, setup_context=save)
        return op

    return register


def with_saved_results(op, backward) -> None:
    """Give op(q, k, v, cu_seqlens, n) -> (out, lse) the gradients that backward(grad, q, k, v, out, lse, cu_seqlens, n) makes."""

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], *output, inputs[3])
        ctx.n = inputs[4]

    op.register_autograd(lambda ctx, grad, _: (*backward(grad.contiguous(), *ctx.saved_tensors, ctx.n), None, None), setup_context=save)


# On a CPU the segments go one by one through torch's flash kernel. A registered operator keeps that loop, whose trip count
# depends on data, out of the compiler's sight, and its backward reuses the saved log-sum-exp instead of recomputing.
def each_segment(cu_seqlens: Tensor, window: int, *tensors: Tensor):
    """Of each segment: where it lies, its mask, and its part of the tensors (T, heads, d) as (1, heads, n, d)."""
    for start, end in pairwise(cu_seqlens.tolist()):
        if end > start:
            yield slice(start, end), window_mask(end - start, window, tensors[0]), [t[start:end].transpose(0, 1)[None] for t in tensors]


@operator(lambda q, k, v, cu_seqlens, window: (torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)))
def _document_attention_cpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for at, mask, heads in each_segment(cu_seqlens, window, q, k, v):
        o, m = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, mask is None, attn_mask=mask)
        out[at], lse[:, at] = o[0].transpose(0, 1), m[0]
    return out, lse


@operator(lambda grad, q, k, v, *rest: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)))
def _document_attention_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for at, mask, heads in each_segment(cu_seqlens, window, grad, q, k, v, out):
        m = lse[:, at].contiguous()[None]
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads, m, 0.0, mask is None, attn_mask=mask)
        for whole, part in zip(grads, parts, strict=True):
            whole[at] = part[0].transpose(0, 1)
    return grads


with_saved_results(_document_attention_cpu, _document_attention_cpu_backward)


def document_attention_cpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int = 0) -> Tensor:
    """`document_attention_reference` for CPU: one graph node, no recomputation. The kernel wants as many k/v heads as queries."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (k, v))
    return _document_attention_cpu(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, window)[0]


def varlen_attention():
    """`document_attention_reference` by torch's variable-length flash attention (CUDA, half precision).

    What this version of torch accepts is looked up here, once, and not inside the compiled graph.
    """
    from torch.nn.attention.varlen import varlen_attn

    options = dict(enable_gqa=True) if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}  # a check, no other kernel

    def document_attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int = 0) -> Tensor:
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, window_size=(window - 1, 0), **options)

    return document_attention_varlen


@operator(lambda q, *rest: (torch.empty_like(q), q.new_empty(*q.shape[:2], 1, dtype=torch.float32)))
def _document_attention_cudnn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> tuple[Tensor, Tensor]:
    made = torch.ops.aten._cudnn_attention_forward(q, k, v, None, cu_seqlens, cu_seqlens, max_len, max_len, True, 0.0, True)
    return made[0], made[1].view(*q.shape[:2], 1)


@operator(lambda grad, q, k, v, *rest: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)))
def _document_attention_cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    seed = cu_seqlens.new_zeros((), dtype=torch.int64)  # of no dropout
    return torch.ops.aten._cudnn_attention_backward(
        grad, q, k, v, out, lse, seed, seed, None, cu_seqlens, cu_seqlens, max_len, max_len, 0.0, True)


with_saved_results(_document_attention_cudnn, _document_attention_cudnn_backward)


def cudnn_attention():
    """`document_attention_reference` by torch's cuDNN kernels for packed rows; they know no window, so `varlen_attention` does those."""
    windowed = varlen_attention()

    def document_attention_cudnn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int = 0) -> Tensor:
        if 0 < window < max_len:
            return windowed(q, k, v, cu_seqlens, max_len, window)
        return _document_attention_cudnn(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, max_len)[0]

    return document_attention_cudnn


def flash_attention(module: str, unlimited: int | None):
    """`document_attention_reference` by the FlashAttention package that has `module`; unlimited: its word for no window."""
    flash = importlib.import_module(module).flash_attn_varlen_func

    def document_attention_flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int = 0) -> Tensor:
        out = flash(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_len, max_seqlen_k=max_len, causal=True,
                    window_size=(window - 1 if window else unlimited, 0))
        return out[0] if isinstance(out, tuple) else out

    return document_attention_flash


FLEX_TILES = ((), (64, 64), (64, 128), (128, 64), (128, 128))  # queries and keys at a time; the first is torch's own choice


def flex_attention(tile: tuple[int, ...] = ()):
    """`document_attention_reference` by FlexAttention, which compiles a kernel for the mask and passes over blocks it hides.

    What a query sees starts at its document or at its window and ends at itself, and both starts only grow: of the blocks of
    keys, those from the start of the first query of a block of queries to that block.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention as flex

    flex = torch.compile(flex, dynamic=False)
    sides = dict(zip("MN", tile, strict=False)) | dict(M1=min(tile), N1=max(tile), M2=max(tile), N2=min(tile)) if tile else {}
    opts = {f"BLOCK_{side}": size for side, size in sides.items()}

    def document_attention_flex(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int = 0) -> Tensor:
        n, at, side = len(q), torch.arange(len(q), device=q.device), 128
        first = cu_seqlens[torch.searchsorted(cu_seqlens, at, right=True) - 1]
        first = torch.maximum(first, at - window + 1) if window else first
        lowest, blocks = first[::side] // side, at[: -(-n // side)]
        kept = torch.minimum(lowest[:, None] + blocks, blocks[-1]).int()  # of each row, the first blocks - lowest + 1 count
        mask = BlockMask.from_kv_blocks((blocks - lowest + 1).int()[None, None], kept[None, None], BLOCK_SIZE=side, seq_lengths=(n, n),
                                        mask_mod=lambda b, h, query, key: (key <= query) & (key >= first[query]))
        return flex(*(t.transpose(0, 1)[None] for t in (q, k, v)), block_mask=mask, enable_gqa=True, kernel_options=opts)[0].transpose(0, 1)

    return document_attention_flex


ATTENTION_BACKENDS = {  # name: (how to get it, lowest and highest compute capability, module it comes from); half precision only
    "fa3": (partial(flash_attention, "flash_attn_interface", -1), (9, 0), (9, 0), "flash_attn_interface"),
    "fa4": (partial(flash_attention, "flash_attn.cute", None), (9, 0), (12, 9), "flash_attn.cute"),
    "cudnn": (cudnn_attention, (9, 0), (99, 0), "torch.nn.attention.varlen"),
    "varlen": (varlen_attention, (8, 0), (99, 0), "torch.nn.attention.varlen"),
    "flex": (flex_attention, (7, 5), (99, 0), "torch.nn.attention.flex_attention"),
}


def module_exists(name: str) -> bool:
    """Whether `import name` would find something; importing nothing but its parents."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def attention_backends(world: World) -> dict[str, Any]:
    """The attentions this device and installation have, the loop of SDPA that defines it last."""
    if world.device.type == "cpu":
        return dict(cpu=document_attention_cpu, sdpa=document_attention_reference)
    found = {}
    if world.device.type == "cuda" and world.dtype in (torch.bfloat16, torch.float16):
        capability = torch.cuda.get_device_capability(world.device)
        found = {name: make() for name, (make, low, high, module) in ATTENTION_BACKENDS.items()
                 if low <= capability <= high and module_exists(module)}
    return dict(**found, sdpa=document_attention_reference)


@torch.enable_grad()
def attention_trial(attend, world: World, segments: list[int]) -> tuple[float, float]:
    """(relative error against the definition in fp32, seconds) of forward and backward on random packed documents."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, direction = (
        torch.randn(sum(segments), heads, 64, generator=generator).to(world.device, world.dtype) for heads in (8, 4, 4, 8))
    bounds = torch.tensor([0, *segments]).cumsum(0).int().to(world.device)

    def run(f, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = f(*inputs, bounds, max(segments))
        return [out, *torch.autograd.grad(out, inputs, direction.to(dtype))]

    ours = run(attend, world.dtype)
    errors = [(a.float() - b).norm() / b.norm() for a, b in zip(ours, run(document_attention_reference, torch.float32), strict=True)]
    return torch.stack(errors).max().item(), quickest(world, lambda: run(attend, world.dtype), 1)


def best_tile(world: World, segments: list[int], path: Path) -> tuple[int, ...]:
    """Of FLEX_TILES the fastest that is right on this device. Compiling them takes minutes, so the file keeps what was found."""
    key, known, trials = f"{hardware_name(world).split('x ', 1)[1]} torch {torch.__version__} {world.dtype}", {}, {}
    with contextlib.suppress(OSError, ValueError):  # no file yet, or somebody else's
        known = json.loads(path.read_text())
    known = world.from_main(known)
    if key not in known:
        for tile in FLEX_TILES:
            with contextlib.suppress(RuntimeError):  # more shared memory than there is
                error, trials[tile] = attention_trial(flex_attention(tile), world, segments)
                trials[tile] = trials[tile] if error < 0.02 else math.inf
        known[key] = world.from_main(min(trials, key=trials.get, default=()))
        if world.main:
            write_atomic(path, json.dumps(known).encode())
    return tuple(known[key])


@cache
def choose_attention(wanted: str, world: World, cache_dir: str = "") -> tuple[str, Any, str]:
    """(name, function, how the choice was made). auto: the fastest that is right, on a row of documents; rank 0 decides.
    cache_dir: where FlexAttention's `best_tile` is kept; blank: torch chooses one. Raises RunError when the wanted backend is missing
    or differs from the definition.
    """
    found = attention_backends(world)
    segments = [5, 130, 1, 377, 0] if world.device.type == "cpu" else [1500, 800, 2048, 100, 3072, 672] * 4 + [0, 0]  # padded as real ones
    if wanted not in ("auto", *found):
        raise RunError(f"ATTN_BACKEND={wanted} can not be had here: {world.device} in {world.dtype} has {', '.join(found)}; "
                       "install what is missing, or set ATTN_BACKEND=auto")
    trials, told = {}, []
    for name in found if wanted == "auto" else (wanted,):
        if name in ("flex", "sdpa") and trials:
            break  # minutes of compiling, a loop on the host: only for want of anything else
        if name == "flex" and cache_dir:
            found[name] = flex_attention(best_tile(world, segments, Path(cache_dir) / "flex_tiles.json"))
        try:
            error, seconds = attention_trial(found[name], world, segments)
            wrong = "" if error < 0.02 else f"is wrong on this machine: relative error {error:.3g} against the definition"  # bf16 rounds
        except (RuntimeError, TypeError, AttributeError) as e:  # not for this device, or torch has changed
            wrong = f"does not run on this machine: {(str(e) or repr(e)).splitlines()[0]}"
        if wrong and name in (wanted, "sdpa"):
            raise RunError(f"ATTN_BACKEND={' '.join([*told, name])} {wrong}; take another")
        told.append(f"{name} {wrong}," if wrong else f"{name}:{1e3 * seconds:.2f}ms")
        trials |= {} if wrong else {name: seconds}
    best = world.from_main(min(trials, key=trials.get))
    return best, found[best], " ".join(told)


# Triton kernels, each behind an operator with the definition's gradients. Tensors are read once and written once; sums are fp32.
# Under Triton's interpreter they run on a CPU, where products must be widened by hand: it multiplies the bits of bf16.
jit = triton.jit if triton else lambda kernel: kernel  # without Triton no kernel is ever called
INTERPRETED = bool(triton and triton.knobs.runtime.interpret)


@jit
def sign_in_lsb(post, negative):
    """The bf16 nearest to post >= 0 among those whose last bit says whether the input of the square was negative; ties go down."""
    bits = post.to(tl.int32, bitcast=True)
    odd = negative.to(tl.int32) << 16
    nearest = ((tl.maximum(bits - odd + 65535, 0) >> 17) << 17) + odd
    return (nearest >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@jit
def mlp_epilogue(acc, out, saved, m, n, slope, FORM: tl.constexpr, BACKWARD: tl.constexpr):
    """One half of a tile of products: activate and store it, or multiply it by the activation's derivative."""
    kept = saved.load([m, n]) if BACKWARD else acc.to(tl.bfloat16)
    pre = kept.to(tl.float32)
    derivative = tl.where(pre > 0, 2 * pre, 2 * slope * slope * pre)
    if BACKWARD:
        if FORM == "lsb":
            root = 2 * tl.sqrt(pre)
            derivative = tl.where((kept.to(tl.int16, bitcast=True) & 1) == 1, -slope * root, root)
        elif FORM == "act_grad":
            derivative = pre
        out.store([m, n], (acc * derivative).to(tl.bfloat16))
    else:
        post = 0.5 * derivative * pre
        out.store([m, n], sign_in_lsb(post, pre <= 0) if FORM == "lsb" else post.to(tl.bfloat16))
        if FORM != "lsb":
            saved.store([m, n], (pre if FORM == "pre_post" else derivative).to(tl.bfloat16))


@jit
def mlp_kernel(
    a, b, out, saved, M, N, K, slope, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FORM: tl.constexpr, BACKWARD: tl.constexpr, PROGRAMS: tl.constexpr, WIDEN: tl.constexpr,
):
    """Persistent GEMM over TMA descriptors: a (M, K) times b, (N, K) forward and (K, N) backward, and `mlp_epilogue`."""
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * tiles_n, PROGRAMS, flatten=True):
        m, n = (tile // tiles_n) * BM, (tile % tiles_n) * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            left = a.load([m, k])
            if BACKWARD:
                right = b.load([k, n])
            else:
                right = b.load([n, k]).T
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            acc = tl.dot(left, right, acc)
        # Halves of the columns one after the other: half the shared memory, and one's arithmetic hides the other's store.
        first, second = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        mlp_epilogue(first, out, saved, m, n, slope, FORM, BACKWARD)
        mlp_epilogue(second, out, saved, m, n + BN // 2, slope, FORM, BACKWARD)


# By major compute capability: BM, BN, BK, stages forward and backward. 12 has 99 KB of shared memory.
MLP_TILES = {9: (256, 128, 64, (4, 3)), 10: (256, 128, 64, (4, 3)), 12: (128, 128, 64, (3, 2))}


def mlp_tiles(device: torch.device) -> tuple[tuple, int]:
    """(an entry of MLP_TILES, how many programs run at once) on this device; small ones under the interpreter."""
    if device.type != "cuda":
        return (32, 32, 16, (1, 1)), 3
    properties = torch.cuda.get_device_properties(device)
    return MLP_TILES[properties.major], properties.multi_processor_count


def launch_mlp(a: Tensor, b: Tensor, slope: float, form: str, saved: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Forward, without `saved`: (leaky_relu(a b^T)^2, what the backward needs). Backward: (a b times the derivative, saved)."""
    backward = saved is not None
    a, b, (M, K) = a.contiguous(), b.contiguous(), a.shape
    N = b.shape[1] if backward else b.shape[0]
    out = a.new_empty(M, N)
    kept = saved if backward else out if form == "lsb" else torch.empty_like(out)
    (BM, BN, BK, stages), programs = mlp_tiles(a.device)
    programs = min(programs, triton.cdiv(M, BM) * triton.cdiv(N, BN))
    describe = TensorDescriptor.from_tensor
    mlp_kernel[(programs,)](
        describe(a, [BM, BK]), describe(b, [BK, BN] if backward else [BN, BK]), describe(out, [BM, BN // 2]), describe(kept, [BM, BN // 2]),
        M, N, K, slope, BM, BN, BK, form, backward, programs, INTERPRETED, num_warps=8, num_stages=stages[backward])
    return out, kept


def mlp_up_shapes(x: Tensor, up: Tensor, slope: float, form: str) -> tuple[Tensor, Tensor]:
    """Results of `mlp_up`, without their values."""
    hidden = x.new_empty(x.shape[0], up.shape[0])
    return hidden, x.new_empty(0) if form == "lsb" else torch.empty_like(hidden)


@operator(mlp_up_shapes)
def mlp_up(x: Tensor, up: Tensor, slope: float, form: str) -> tuple[Tensor, Tensor]:
    """Hidden layer (R, F) of x (R, D), and what the backward needs besides: nothing in the lsb form."""
    hidden, kept = launch_mlp(x, up, slope, form)
    return hidden, x.new_empty(0) if form == "lsb" else kept


# The backward of the act_grad form once more, with CUTLASS (PR #1105): a persistent GEMM over TMA and wgmma whose epilogue multiplies
# fp32 sums by the stored derivative. No torch in it, so that one build serves every version. A C operand is declared, never loaded.
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
using Stored = ep::fusion::Sm90AuxLoad<Aux::Stages, Aux::EpilogueTile, bf16, Aux::Stride, Aux::SmemLayoutAtom, Aux::CopyOpS2R>;
using Multiply = ep::fusion::Sm90Compute<cutlass::multiplies, bf16, float, cutlass::FloatRoundStyle::round_to_nearest>;
using Tree = ep::fusion::Sm90EVT<Multiply, ep::fusion::Sm90AccFetch, Stored>;
using Epilogue = ep::collective::CollectiveBuilder<
    cutlass::arch::Sm90, TensorOp, Tile, Cluster, Auto, float, float, bf16, Row, 8, bf16, Row, 8, Schedule, Tree>::CollectiveOp;
using Mainloop = cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, TensorOp, bf16, Row, 8, bf16, Row, 8, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<sizeof(Epilogue::SharedStorage)>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
extern "C" const int mlp_grad_shared_bytes = Kernel::SharedStorageSize;

// out (m, n) = grad (m, k) down (k, n) * stored (m, n). Null or what went wrong; without `out` only the sizes are looked at.
extern "C" const char* mlp_grad(bf16* grad, bf16* down, bf16* stored, bf16* out, int m, int n, int k, int device, cudaStream_t stream) {
  Kernel::StrideD rows{n, _1{}, 0};
  Gemm::Arguments problem{cutlass::gemm::GemmUniversalMode::kGemm, {m, n, k, 1}, {grad, {k, _1{}, 0}, down, {_1{}, n, 0}},
                          {{{}, {stored, bf16(0), rows}, {}}, out, rows, out, rows}, {device}};
  cutlass::Status status = Gemm::can_implement(problem);
  if ((uintptr_t(grad) | uintptr_t(down) | uintptr_t(stored) | uintptr_t(out)) % 16) status = cutlass::Status::kErrorMisalignedOperand;
  if (out && status == cutlass::Status::kSuccess) {
    if (cudaError_t error = cudaSetDevice(device)) return cudaGetErrorString(error);
    status = Gemm()(problem, nullptr, stream);
  }
  return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
}
"""
NVCC_FLAGS = ("-std=c++17", "-O3", "--use_fast_math", "--expt-relaxed-constexpr", "-DNDEBUG", "-gencode=arch=compute_90a,code=sm_90a",
              "-shared", "-Xcompiler=-fPIC", "-cudart=static")


def build_cutlass(cfg: Config) -> str:
    """Path of the compiled CUTLASS_SOURCE below COMPILE_CACHE_DIR or torch's cache folder; made there by nvcc, a minute, if it is missing.

    Where there is no compiler or no CUTLASS, any build of this source will do. Raises RunError.
    """
    def digest(*parts: str) -> str:
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    folder = Path(cfg.compile_cache_dir or Path(torch.hub.get_dir()).parent).resolve()
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    package = importlib.util.find_spec("cutlass_library")
    include = Path(cfg.cutlass_path) / "include" if cfg.cutlass_path else package and Path(package.origin).parent / "source" / "include"
    version = include and include / "cutlass" / "version.h"
    missing = ["nvcc (a CUDA toolkit with its bin/ on PATH; 13.0 is known to do)"] * (not nvcc)
    if not (version and version.is_file()):
        missing.append(f"CUTLASS (pip install --no-deps nvidia-cutlass==4.2.0.0, or its folder as CUTLASS_PATH, now {cfg.cutlass_path!r})")
    tools = "*" if missing else digest(subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout, version.read_text())
    name = f"mlp_grad-{digest(CUTLASS_SOURCE, *NVCC_FLAGS, platform.machine())}-{tools}.so"
    if made := sorted(folder.glob(name)):
        return str(made[-1])
    if missing:
        raise RunError(f"MLP_BACKWARD=cutlass compiles a kernel at its first use, and {folder} has no {name}. Missing to make it: "
                       f"{'; '.join(missing)}. Install that, or set MLP_BACKWARD=triton")
    with tempfile.TemporaryDirectory() as scratch:
        source, library = Path(scratch, "mlp_grad.cu"), Path(scratch, "mlp_grad.so")
        source.write_text(CUTLASS_SOURCE)
        done = subprocess.run([nvcc, *NVCC_FLAGS, f"-I{include}", "-o", library, source], capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"MLP_BACKWARD=cutlass: {nvcc} failed with the headers in {include}; take other versions, or set "
                           f"MLP_BACKWARD=triton. It said:\n{(done.stdout + done.stderr)[-2000:].strip()}")
        write_atomic(folder / name, library.read_bytes())
    return str(folder / name)


@cache
def cutlass_library(cfg: Config, world: World) -> str:
    """`build_cutlass` on the first rank of each machine, then on the others, which find it done. Raises RunError on all if on one."""
    path, failure = "", ""
    for turn in (not world.device.index, world.device.index):
        try:
            path = build_cutlass(cfg) if turn else path
        except RunError as e:
            failure = str(e)
        if failures := list(filter(None, world.gather(failure))):
            raise RunError(failures[0])
    return path


@cache
def cutlass_entry(library: str):
    """The function `mlp_grad` of a library from `build_cutlass`."""
    entry = ctypes.CDLL(library).mlp_grad
    entry.argtypes, entry.restype = [ctypes.c_void_p] * 4 + [ctypes.c_int] * 4 + [ctypes.c_void_p], ctypes.c_char_p
    return entry


def launch_cutlass(grad: Tensor, down: Tensor, stored: Tensor, library: str) -> Tensor:
    """(grad down) * stored, rounded once. Raises RunError where CUTLASS or CUDA refuses."""
    grad, down, stored = grad.contiguous(), down.contiguous(), stored.contiguous()
    out, stream = torch.empty_like(stored), torch.cuda.current_stream(grad.device).cuda_stream
    pointers = (t.data_ptr() for t in (grad, down, stored, out))
    if problem := cutlass_entry(library)(*pointers, *out.shape, grad.shape[1], grad.device.index, stream):
        raise RunError(f"MLP_BACKWARD=cutlass: {tuple(grad.shape)} times {tuple(down.shape)} on {grad.device}: {problem.decode()}")
    return out


@operator(lambda grad, down, saved, slope, form, library: grad.new_empty(grad.shape[0], down.shape[1]))
def mlp_up_grad(grad: Tensor, down: Tensor, saved: Tensor, slope: float, form: str, library: str) -> Tensor:
    """Gradient (R, F) of the up projection's output from that of the MLP's, grad (R, D); by Triton or a library from `build_cutlass`."""
    return launch_cutlass(grad, down, saved, library) if library else launch_mlp(grad, down, slope, form, saved)[0]


class FusedMlp(torch.autograd.Function):
    """`leaky_mlp` with the activation inside the GEMMs. What is stored for it besides the hidden layer is the form:

    pre_post: the input of the activation (PR #1530); act_grad: its derivative, since f = f' x / 2 (PR #1105);
    lsb: nothing, the sign goes into the last bit of the hidden layer and the magnitude comes back by a square root.
    """

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor, slope: float, form: str, library: str) -> Tensor:
        rows = x.flatten(0, -2)
        hidden, kept = mlp_up(rows, up, slope, form)
        ctx.save_for_backward(rows, up, down, hidden, kept)
        ctx.slope, ctx.form, ctx.library, ctx.shape = slope, form, library, x.shape
        return F.linear(hidden, down).view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, up, down, hidden, kept = ctx.saved_tensors
        grad = grad.reshape(rows.shape)
        d_up = mlp_up_grad(grad, down, hidden if ctx.form == "lsb" else kept, ctx.slope, ctx.form, ctx.library)
        need_x, need_up, need_down = ctx.needs_input_grad[:3]
        return ((d_up @ up).view(ctx.shape) if need_x else None, d_up.T @ rows if need_up else None,
                grad.T @ hidden if need_down else None, None, None, None)


def fused_mlp(form: str, library: str = ""):
    """`leaky_mlp` by `FusedMlp` in one of its forms; library: see `mlp_up_grad`."""
    return lambda x, up, down, slope: FusedMlp.apply(x, up, down, slope, form, library)


@jit
def rotation(cos, sin, position, c, HALF: tl.constexpr):
    """Factors of channel c itself and of its partner, and the partner: y[c] = x[c] own + x[partner] other."""
    turns = (c < 2 * HALF)[None, :]
    at = position[:, None] * HALF + (c % HALF)[None, :]
    own = tl.load(cos + at, mask=turns, other=1.0)
    other = tl.load(sin + at, mask=turns, other=0.0)
    other = tl.where((c < HALF)[None, :], other, -other)
    return own, other, tl.where(c < HALF, c + HALF, tl.where(c < 2 * HALF, c - HALF, c))


@jit
def split_heads_kernel(
    qkv, gain, cos, sin, q, k, v, rows, length, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    """One program: BT rows of a query head, or of a key head and its value."""
    head, t, c = tl.program_id(1), tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BD)
    inside = (t < rows)[:, None] & (c < D)[None, :]
    t = t.to(tl.int64)
    own, other, partner = rotation(cos, sin, t % length, c, HALF)
    source = qkv + t[:, None] * ((H + 2 * G) * D) + head * D
    x = tl.load(source + c[None, :], mask=inside, other=0.0).to(tl.float32)
    swapped = tl.load(source + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps) * tl.load(gain + head, mask=head < H, other=1.0)
    turned = scale[:, None] * (x * own + swapped * other)
    if head < H:
        tl.store(q + (t[:, None] * H + head) * D + c[None, :], turned.to(q.dtype.element_ty), mask=inside)
    else:
        at = (t[:, None] * G + head - H) * D + c[None, :]
        tl.store(k + at, turned.to(k.dtype.element_ty), mask=inside)
        tl.store(v + at, tl.load(source + G * D + c[None, :], mask=inside, other=0.0), mask=inside)


@jit
def split_heads_grad_kernel(
    dq, dk, dv, qkv, gain, cos, sin, dqkv, dgain, rows, length, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    """With y the normed head, d its gradient, turned back, and s = d.y: dx = gain / rms (d - y s / D), dgain = sum of s."""
    head, t, c = tl.program_id(1), tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BD)
    inside = (t < rows)[:, None] & (c < D)[None, :]
    t = t.to(tl.int64)
    own, other, partner = rotation(cos, sin, t % length, c, HALF)
    at = t[:, None] * ((H + 2 * G) * D) + head * D + c[None, :]
    if head < H:
        source = dq + (t[:, None] * H + head) * D
    else:
        source = dk + (t[:, None] * G + head - H) * D
        value = tl.load(dv + (t[:, None] * G + head - H) * D + c[None, :], mask=inside, other=0.0)
        tl.store(dqkv + at + G * D, value, mask=inside)
    d = tl.load(source + c[None, :], mask=inside, other=0.0).to(tl.float32)
    swapped = tl.load(source + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    d = d * own - swapped * other
    x = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    y = x * inverse_rms
    s = tl.sum(d * y, 1)
    dx = tl.load(gain + head, mask=head < H, other=1.0) * inverse_rms * (d - y * (s / D)[:, None])
    tl.store(dqkv + at, dx.to(dqkv.dtype.element_ty), mask=inside)
    tl.store(dgain + tl.program_id(0) * (H + G) + head, tl.sum(s, 0))


ROWS_PER_PROGRAM = 32  # of the two kernels on heads


def split_launch(qkv: Tensor, cos: Tensor, H: int, G: int) -> tuple[tuple[int, int], dict]:
    """Grid and size arguments of the two kernels above."""
    rows, D = qkv.shape[:-1].numel(), qkv.shape[-1] // (H + 2 * G)
    sizes = dict(rows=rows, length=qkv.shape[-2], eps=torch.finfo(qkv.dtype).eps, H=H, G=G, D=D, HALF=cos.shape[-1],
                 BT=ROWS_PER_PROGRAM, BD=triton.next_power_of_2(D))
    return (triton.cdiv(rows, ROWS_PER_PROGRAM), H + G), sizes


@operator(lambda dq, dk, dv, qkv, gain, cos, sin: (torch.empty_like(qkv), torch.empty_like(gain)))
def split_heads_grad(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `split_heads` for qkv and gain."""
    H, G, qkv = len(gain), dk.shape[-2], qkv.contiguous()
    grid, sizes = split_launch(qkv, cos, H, G)
    dqkv, dgain = torch.empty_like(qkv), gain.new_empty(grid[0], H + G, dtype=torch.float32)
    split_heads_grad_kernel[grid](dq.contiguous(), dk.contiguous(), dv.contiguous(), qkv, gain.float(), cos, sin, dqkv, dgain, **sizes)
    return dqkv, dgain[:, :H].sum(0).to(gain.dtype)


def empty_heads(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Results of `split_heads`, without their values."""
    D = qkv.shape[-1] // (len(gain) + 2 * kv_heads)
    return tuple(qkv.new_empty(*qkv.shape[:-1], heads, D) for heads in (len(gain), kv_heads, kv_heads))


@operator(empty_heads, split_heads_grad)
def split_heads_op(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """`split_heads` by one kernel."""
    grid, sizes = split_launch(qkv, cos, len(gain), kv_heads)
    q, k, v = empty_heads(qkv, gain, cos, sin, kv_heads)
    split_heads_kernel[grid](qkv.contiguous(), gain.float(), cos, sin, q, k, v, **sizes)
    return q, k, v


@jit
def gate_heads_kernel(
    y, v, gate, out, rows, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    """One program: BT rows of all heads that share a value."""
    group, t, c = tl.program_id(1), tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BD)
    inside = (t < rows)[:, None] & (c < D)[None, :]
    t64 = t.to(tl.int64)
    own = tl.load(v + (t64[:, None] * G + group) * D + c[None, :], mask=inside, other=0.0).to(tl.float32)
    square = tl.maximum(tl.sum(own * own, 1), 1e-24)
    for j in range(H // G):
        head = group * (H // G) + j
        at = (t64[:, None] * H + head) * D + c[None, :]
        x = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        passes = tl.load(gate + t64 * H + head, mask=t < rows, other=0.0).to(tl.float32)
        kept = passes[:, None] * (x - (tl.sum(x * own, 1) / square)[:, None] * own)
        tl.store(out + at, kept.to(out.dtype.element_ty), mask=inside)


@jit
def gate_heads_grad_kernel(
    dout, y, v, gate, dy, dv, dgate, rows, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    """With a = y.v / v.v, e = gate dout and b = e.v / v.v: dy = e - b v, dv = sum over heads of 2 a b v - a e - b y."""
    group, t, c = tl.program_id(1), tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BD)
    inside = (t < rows)[:, None] & (c < D)[None, :]
    t64 = t.to(tl.int64)
    at_v = (t64[:, None] * G + group) * D + c[None, :]
    own = tl.load(v + at_v, mask=inside, other=0.0).to(tl.float32)
    square = tl.maximum(tl.sum(own * own, 1), 1e-24)
    down = tl.zeros((BT, BD), tl.float32)
    for j in range(H // G):
        head = group * (H // G) + j
        at = (t64[:, None] * H + head) * D + c[None, :]
        x = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        passes = tl.load(gate + t64 * H + head, mask=t < rows, other=0.0).to(tl.float32)
        a = (tl.sum(x * own, 1) / square)[:, None]
        tl.store(dgate + t64 * H + head, tl.sum(d * (x - a * own), 1).to(dgate.dtype.element_ty), mask=t < rows)
        e = passes[:, None] * d
        b = (tl.sum(e * own, 1) / square)[:, None]
        tl.store(dy + at, (e - b * own).to(dy.dtype.element_ty), mask=inside)
        down += 2 * a * b * own - a * e - b * x
    tl.store(dv + at_v, down.to(dv.dtype.element_ty), mask=inside)


def gate_launch(y: Tensor, v: Tensor) -> tuple[tuple[int, int], dict]:
    """Grid and size arguments of the two kernels above."""
    (H, D), G, rows = y.shape[-2:], v.shape[-2], y.shape[:-2].numel()
    return (triton.cdiv(rows, ROWS_PER_PROGRAM), G), dict(rows=rows, H=H, G=G, D=D, BT=ROWS_PER_PROGRAM, BD=triton.next_power_of_2(D))


@operator(lambda dout, y, v, gate: tuple(x.new_empty(x.shape) for x in (y, v, gate)))
def gate_heads_grad(dout: Tensor, y: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gate_heads` for y, v and gate."""
    dout, y, v, gate = (x.contiguous() for x in (dout, y, v, gate))
    (grid, sizes), grads = gate_launch(y, v), tuple(torch.empty_like(x) for x in (y, v, gate))
    gate_heads_grad_kernel[grid](dout, y, v, gate, *grads, **sizes)
    return grads


@operator(lambda y, v, gate: y.new_empty(y.shape), gate_heads_grad)
def gate_heads_op(y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """`gate_heads` by one kernel."""
    (grid, sizes), out = gate_launch(y, v), y.new_empty(y.shape)
    gate_heads_kernel[grid](y.contiguous(), v.contiguous(), gate.contiguous(), out, **sizes)
    return out


@jit
def ce_kernel(logits, targets, nats, slope, cap, V, BLOCK: tl.constexpr):
    """One program, one row, all of it in registers: its loss and the gradient of that. tanh(u) = 2 sigmoid(2 u) - 1."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + c, mask=c < V, other=0.0).to(tl.float32)
    s = tl.sigmoid(2 * x / cap)
    z = tl.where(c < V, cap * (2 * s - 1), float("-inf"))
    top = tl.max(z, 0)
    e = tl.exp(z - top)
    total = tl.sum(e, 0)
    hit = c == tl.load(targets + row)
    tl.store(nats + row, top + tl.log(total) - tl.sum(tl.where(hit, z, 0.0), 0))
    grad = (e / total - hit.to(tl.float32)) * 4 * s * (1 - s)
    tl.store(slope + row * V + c, grad.to(slope.dtype.element_ty), mask=c < V)


@operator(lambda logits, targets, *rest: (targets.new_empty(targets.shape, dtype=torch.float32), logits.new_empty(logits.shape)))
def ce_with_slope(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """`softcapped_ce` of logits (T, V) and, from the same pass, the gradient of each row's result for that row."""
    logits, V = logits.contiguous(), logits.shape[-1]
    nats, slope = torch.empty_like(targets, dtype=torch.float32), torch.empty_like(logits)
    ce_kernel[(targets.numel(),)](logits, targets.contiguous(), nats, slope, cap, V,
                                  BLOCK=triton.next_power_of_2(V), num_warps=8)
    return nats, slope


class HeadCe(torch.autograd.Function):
    """`softcapped_ce` of a linear head by one pass over the logits. What comes in backward scales rows of the narrow factors of the two
    products, not of the wide one. Left out, it would leave AOTAutograd without a backward that depends on the loss."""

    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, cap: float) -> Tensor:
        nats, slope = ce_with_slope(F.linear(x, head).flatten(0, -2), targets.flatten(), cap)
        ctx.save_for_backward(x, head, slope)
        return nats.view(targets.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, head, slope = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        return (grad * (slope @ head).view(x.shape)).to(x.dtype), slope.T @ (grad * x).to(x.dtype).flatten(0, -2), None, None


@jit
def adam_kernel(p, g, v, lr, keep, beta2, correction, eps, n, BLOCK: tl.constexpr):
    """One program, BLOCK numbers: weight decay (keep), second moment, step; in place."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(g + at, mask=at < n, other=0.0)
    second = beta2 * tl.load(v + at, mask=at < n, other=0.0) + (1 - beta2) * grad * grad
    tl.store(v + at, second, mask=at < n)
    step = lr * grad / (correction * tl.sqrt(second) + eps)
    tl.store(p + at, keep * tl.load(p + at, mask=at < n, other=0.0) - step, mask=at < n)


class FusedAdam(torch.optim.Optimizer):
    """torch.optim.AdamW with beta1 = 0, its parameters contiguous fp32: the gradient is its own first moment, so none is kept or read."""

    def __init__(self, parameters, lr: float, beta2: float, eps: float, weight_decay: float):
        super().__init__(parameters, dict(lr=lr, beta2=beta2, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, beta2, group["step"] = group["lr"], group["beta2"], group.get("step", 0) + 1
            for p in (p for p in group["params"] if p.grad is not None):
                v = self.state[p].setdefault("second", torch.zeros_like(p))
                adam_kernel[(triton.cdiv(p.numel(), 1024),)](
                    p, p.grad.contiguous(), v, lr, 1 - lr * group["weight_decay"], beta2, (1 - beta2 ** group["step"]) ** -0.5,
                    group["eps"], p.numel(), BLOCK=1024)


@jit
def nearest_on_way(a, way):
    """The integer k >= 0 nearest to a >= 0 on a way, 2 * state + parity, and its value, both fp32. 1.5 * 2^23 rounds to even."""
    odd, other = way % 2, way // 2 % 2
    r = (tl.minimum(a, 1e4) + (other - 2 * odd)) / 4 + 12582912.0 - 12582912.0
    k = 2 * tl.minimum(tl.maximum(r, 0.0), 63.0) + odd
    k = tl.where((other > odd) & (a < 1.5), 0.0, k)
    return k, 2 * k - tl.where(k > 0, other, 0)


@jit
def viterbi_kernel(x, into, second, best_k, best_value, lanes, HEIGHT: tl.constexpr, L: tl.constexpr):
    """One program: L segments of x (HEIGHT, lanes), a thread for each of their states if L is 4. second (HEIGHT, lanes) uint8: which of
    the two ways led into each state, a bit for each."""
    lane, s = tl.program_id(0) * L + tl.arange(0, L), tl.arange(0, 8)
    inside = lane < lanes
    one, two = tl.load(into + 2 * s)[:, None] + tl.zeros((8, L), tl.int32), tl.load(into + 2 * s + 1)[:, None] + tl.zeros((8, L), tl.int32)
    cost = tl.where(s == 0, 0.0, float("inf"))[:, None] + tl.zeros((8, L), tl.float32)
    for t in range(HEIGHT):
        a = tl.abs(tl.load(x + t * lanes + lane, mask=inside, other=0.0))[None, :]
        miss, miss_two = nearest_on_way(a, one)[1] - a, nearest_on_way(a, two)[1] - a
        first_cost, second_cost = tl.gather(cost, one // 2, 0) + miss * miss, tl.gather(cost, two // 2, 0) + miss_two * miss_two
        bits = tl.sum((second_cost < first_cost).to(tl.int32) << s[:, None], 0)
        tl.store(second + t * lanes + lane, bits.to(tl.uint8), mask=inside)
        cost = tl.minimum(first_cost, second_cost)
    state = tl.argmin(cost, 0)
    tl.debug_barrier()  # what other threads stored is read below
    for step in range(HEIGHT):
        at = (HEIGHT - 1 - step) * lanes + lane
        taken = tl.load(second + at, mask=inside, other=0).to(tl.int32) >> state & 1
        way, here = tl.load(into + 2 * state + taken), tl.load(x + at, mask=inside, other=0.0)
        k, value = nearest_on_way(tl.abs(here), way)
        tl.store(best_k + at, tl.where(here < 0, -k, k), mask=inside)
        tl.store(best_value + at, tl.where(here < 0, -value, value), mask=inside)
        state = way // 2


def fused_viterbi(lanes: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """`viterbi` by one kernel instead of about 950, to the bit. into: TRELLIS_INTO, int32."""
    second, (height, count) = torch.empty_like(lanes, dtype=torch.uint8), lanes.shape
    k, value = torch.empty_like(lanes), torch.empty_like(lanes)
    viterbi_kernel[(triton.cdiv(count, 4),)](lanes, into, second, k, value, count, height, 4, num_warps=1, enable_fp_fusion=False)
    return k, value


@cache
def choose_viterbi(device: torch.device):
    """On a GPU the kernel, if it finds there what the definition finds; else the definition."""
    if not triton or device.type != "cuda":
        return viterbi
    x = 20 * torch.randn(TRELLIS_SEGMENT, 100, generator=torch.Generator().manual_seed(0)).to(device)
    fused = partial(fused_viterbi, into=TRELLIS_INTO.to(device, torch.int32))
    return fused if all(torch.equal(a, b) for a, b in zip(fused(x), viterbi(x), strict=True)) else viterbi


def choose_kernels(cfg: Config, world: World) -> Kernels:
    """The attention this device has, and the kernels that *_KERNEL ask for. Raises RunError where they can not run."""
    knobs = {name: getattr(cfg, name) for name in ("mlp_kernel", "qk_kernel", "xsa_kernel", "fused_ce_kernel", "ttt_adam_kernel")}
    asked = " ".join(f"{name.upper()}={value}" for name, value in knobs.items() if value != "eager")
    on_gpu = world.device.type == "cuda"
    if asked and not (triton and (on_gpu or INTERPRETED)):
        raise RunError(f"{asked} need{'' if ' ' in asked else 's'} Triton and an NVIDIA GPU, this is {world.device}; set them to eager")
    if cfg.mlp_kernel != "eager":
        capability = torch.cuda.get_device_capability(world.device) if on_gpu else None
        if world.dtype != torch.bfloat16 or (capability and capability[0] not in MLP_TILES):
            raise RunError(f"MLP_KERNEL={cfg.mlp_kernel} needs bf16 activations and compute capability {', '.join(map(str, MLP_TILES))}.x "
                           f"(TMA), not {world.dtype} on {capability}; set MLP_KERNEL=eager")
    library = ""
    if cfg.mlp_backward == "cutlass":
        if not capability or capability[0] != 9:
            raise RunError(f"MLP_BACKWARD=cutlass is made for compute capability 9.0 (Hopper), not {capability}; set MLP_BACKWARD=triton")
        library = cutlass_library(cfg, world)
        if problem := cutlass_entry(library)(None, None, None, None, 1, cfg.mlp_dim, cfg.model_dim, 0, None):
            raise RunError(f"MLP_BACKWARD=cutlass needs multiples of 8, not {cfg.model_dim} (MODEL_DIM), {cfg.mlp_dim}: {problem.decode()}")
    name, attention, _ = choose_attention(cfg.attn_backend, world, cfg.compile_cache_dir)
    if cfg.cuda_graphs and name == "sdpa":
        raise RunError("CUDA_GRAPHS=1 needs an attention that does not loop on the host, and here is only sdpa; set CUDA_GRAPHS=0")
    return Kernels(
        attention,
        leaky_mlp if cfg.mlp_kernel == "eager" else fused_mlp(cfg.mlp_kernel, library),
        split_heads if cfg.qk_kernel == "eager" else split_heads_op,
        gate_heads if cfg.xsa_kernel == "eager" else gate_heads_op,
        None if cfg.fused_ce_kernel == "eager" else HeadCe.apply,
        choose_viterbi(world.device),
        None if cfg.ttt_adam_kernel == "eager" else FusedAdam)


# ==================================================================================================
# MAIN - the stages of a run. The artifact's bytes on disk are the only bridge from training to scoring.
# ==================================================================================================

class Run:
    """What all stages of one run share: configuration, ranks, files, log, clock and the numbers collected so far."""

    def __init__(self, cfg: Config, world: World, out: Path):
        self.cfg, self.world, self.out = cfg, world, out
        self.log = Log(out / f"{out.name if not cfg.run_id else cfg.run_id}.txt" if world.main else None)
        self.ledger = Ledger(out / "ledger.jsonl" if world.main else None)
        self.clock = Clock(world, lambda name, seconds: self.ledger.add("phase", dict(name=name, seconds=seconds)))
        self.checkpoint, self.weights, self.artifact = out / "checkpoint.pt", out / "final_model.pt", out / "final_model.int6.ptz"
        if cfg.stage not in ("train", "warm"):
            {"pergroup": need_lrzip, "range": need_constriction}.get(cfg.compressor, str)()  # before an hour of training, not after
        self.files = Dataset.open(cfg, need_train=cfg.stage != "eval")
        self.data, self.train_shards = ValData.load(cfg, self.files), len(self.files.train)
        self.kernels = choose_kernels(cfg, world)
        self.result: dict[str, Any] = {}
        self.findings, self.warm_ups, self.weight_hashes, self.scored_pass = {}, [], [], ""

    def scorer(self, name: str) -> Scorer:
        """A pass over the validation tokens that the ledger keeps account of."""
        self.scored_pass, self.scored = name, Scorer(self.data, self.world, name, self.ledger)
        return self.scored

    def probe(self, check, *args) -> None:
        """check(*args) -> {id: finding}, by rank 0, into the ledger with its cost. Nothing where AUDIT=off."""
        if self.cfg.audit != "off" and self.world.main:
            start, found = time.perf_counter(), check(*args)
            seconds = (time.perf_counter() - start) / len(found)
            for name, (verdict, evidence) in found.items():
                self.ledger.add("probe", dict(id=name, verdict=verdict, evidence=evidence, seconds=seconds))
            self.findings |= found

    @contextlib.contextmanager
    def unchanged(self, state):
        """Around a warm-up, after which what state() returns and the random generators must be what they were (P6)."""
        before = state_hash(state(), torch.get_rng_state(), torch.cuda.get_rng_state_all())
        yield
        after = state_hash(state(), torch.get_rng_state(), torch.cuda.get_rng_state_all())
        self.warm_ups.append((before[:8], after[:8]))
        self.ledger.add("warmup", dict(before=before, after=after))

    def diagnostic(self, name: str, key: str, forward) -> Score:
        """Score with fixed weights and log it."""
        self.clock.phase("diagnostic eval")
        start, scorer = time.perf_counter(), self.scorer(key)
        score = evaluate(self.cfg, self.world, forward, scorer)
        seconds = time.perf_counter() - start
        self.log(f"{name} val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f} eval_time:{1000 * seconds:.0f}ms")
        self.result[f"{key}_mfu"] = Utilization(self.world, scorer.work, seconds).result(seconds)
        self.result |= {f"{key}_val_loss": score.loss, f"{key}_val_bpb": score.bpb, "val_loss": score.loss, "val_bpb": score.bpb,
                        "target_tokens": score.tokens, "val_bytes": score.bytes}
        return score


def environment(world: World) -> dict:
    """Versions and machine."""
    return dict(hardware=hardware_name(world), python_version=platform.python_version(), torch_version=torch.__version__,
                triton_version=triton.__version__ if triton else None, world_size=world.size)


def log_start(run: Run, env) -> None:
    """Overrides, variables without effect, the whole configuration and the source: a log is a complete account of its run."""
    cfg, log, files = run.cfg, run.log, run.files
    script, tokenizer = Path(__file__), cfg.tokenizer_file
    run.ledger.add("start", dict(
        schema=1, time=datetime.now(UTC).isoformat(timespec="seconds"), stage=cfg.stage, code_sha256=sha256_file(script),
        config_hash=config_hash(cfg), overrides=overrides(cfg), seed=cfg.seed, seeds_declared=cfg.seeds_declared, audit=cfg.audit,
        manifest_sha256=files.manifest_sha256, shards=files.hashes,
        tokenizer_sha256=sha256_file(tokenizer) if tokenizer.exists() else files.manifest.get("tokenizer_sha256"),
        val_tokens=len(run.data.target_bytes), val_bytes=int(run.data.target_bytes.sum()), environment=environment(run.world)))
    log(f"train_gpt {config_hash(cfg)} seed:{cfg.seed} on {hardware_name(run.world)}, torch {torch.__version__}, "
        f"python {platform.python_version()}")
    log("overrides: " + (" ".join(f"{k}={v}" for k, v in overrides(cfg).items()) or "none"))
    for note in without_effect(cfg, env):
        log(f"no effect: {note}")
    log("Hyperparameters:", console=False)
    for f in sorted(fields(cfg), key=lambda f: f.name):
        log(f"  {f.name}: {getattr(cfg, f.name)}", console=False)
    log(f"{'=' * 100}\n{script.read_text()}\n{'=' * 100}", console=False)
    log(f"train_shards: {run.train_shards}")
    log(f"val_tokens: {len(run.data.target_bytes)}")
    weights = sum(math.prod(m.shape) for m in matrices(cfg) if m.stored is not None and m.stored.codec == "gptq")
    bits, code = 8 * (cfg.target_bytes - script.stat().st_size) / weights, script.stat().st_size
    if cfg.quant == "rd" and cfg.target_bytes and cfg.stage != "eval":
        verdict = "CANNOT FIT" if bits < 0.2 else "fits, at a loss: 3 are usual" if bits < 2 else "fits"
        log(f"budget: {weights} weights in TARGET_BYTES {cfg.target_bytes} less a script of {code}, {bits:.2f} bits each: {verdict}")
    kernels = dict(mlp=cfg.mlp_kernel, qk=cfg.qk_kernel, xsa=cfg.xsa_kernel, ce=cfg.fused_ce_kernel, adam=cfg.ttt_adam_kernel)
    attention, _, trials = choose_attention(cfg.attn_backend, run.world, cfg.compile_cache_dir)
    log(f"kernels: attention:{attention} ({trials}) " + " ".join(f"{name}:{kind}" for name, kind in kernels.items()))


def train_stage(run: Run) -> GPT:
    """Train within the budget, average, score, and leave final_model.pt. Returns the averaged model."""
    cfg, world, log, clock = run.cfg, run.world, run.log, run.clock
    trainer = Trainer(cfg, world, run.files, run.kernels)
    log_training_start(cfg, trainer, log)
    clock.phase("compile")
    with run.unchanged(trainer.state):
        trainer.warm_up(log)
    if cfg.resume:
        if not run.checkpoint.exists():
            raise RunError(f"RESUME=1, but there is no {run.checkpoint}: set ARTIFACT_DIR to the interrupted run's folder, or RESUME=0")
        trainer.load_state(load_tensors(run.checkpoint, world.device))
        log(f"resumed after step {trainer.step}")

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
    run.result["mfu"] = trainer.utilization.result(time.perf_counter() - start)
    peak = max(peak_memory_mib(world.device), clock.peak_mib.get("train", 0))
    reserved = torch.cuda.max_memory_reserved() >> 20 if world.device.type == "cuda" else peak
    log(f"peak memory allocated: {peak} MiB reserved: {reserved} MiB")
    if trainer.ema:
        log("ema:applying EMA weights")
        trainer.ema.copy_to(trainer.model)
    run.result |= dict(steps=trainer.step, train_seconds=trainer.clock.seconds, train_tokens=trainer.step * cfg.train_batch_tokens,
                       step_avg_ms=1000 * trainer.clock.seconds / trainer.step, loss_curve=trainer.losses)
    if world.main:
        save_tensors(run.weights, dict(format=CHECKPOINT_FORMAT, model=trainer.model.state_dict()))
        run.checkpoint.unlink(missing_ok=True)
    run.diagnostic("diagnostic pre-quantization post-ema", "pre_quant", trainer.forward)
    return trainer.model


def warm_stage(run: Run) -> None:
    """Compile everything that training and the scored evaluation will run, on fresh weights; nothing is learned."""
    cfg, world = run.cfg, run.world
    run.clock.phase("compile")
    trainer = Trainer(cfg, world, run.files, run.kernels)
    trainer.warm_up(run.log)
    trainer.loader.close()
    trainer.graphs = None
    if cfg.ttt_enabled:
        TttRun(cfg, world, trainer.model.requires_grad_(False), Scorer(run.data, world), run.log).warm_up()
    folder = compile_cache(cfg, world).get("TORCHINDUCTOR_CACHE_DIR", "torch's default folder")
    run.log(f"warm: {len(compilations())} graphs, kept in {folder}")


def quantize_stage(run: Run, model: GPT | None) -> None:
    """Hessians, GPTQ, packing; the artifact is read back and compared before the stage is done."""
    cfg, world, log, clock = run.cfg, run.world, run.log, run.clock
    if model is None:
        model = load_checkpoint_model(cfg, world, run.weights, run.kernels)
        run.diagnostic("diagnostic pre-quantization post-ema", "pre_quant", model)
    if world.main:
        log(f"Serialized model: {run.weights.stat().st_size} bytes")
    trains = cfg.gptq_calibration == "train"  # on training data it is part of the training budget
    clock.phase("calibrate" if trains else "self-calibrate")
    start = time.perf_counter()
    log("GPTQ:collecting Hessians from calibration data...")
    hessians = collect_hessians(cfg, world, model, run.files, log)
    world.synchronize()
    seconds = time.perf_counter() - start
    run.result["calib_seconds"] = seconds if trains else 0.0
    log(f"GPTQ:collected {len(hessians.H)} Hessians in {seconds:.1f}s")
    clock.phase("quantize")
    if world.main:
        start = time.perf_counter()
        stored, blob = quantize_to_fit(
            cfg, model.state_dict(), hessians, Path(__file__).stat().st_size, log, model.kernels.viterbi)
        log(f"Serialize: {cfg.quant} quantization and {cfg.compressor} compression done in {time.perf_counter() - start:.1f}s")
        write_atomic(run.artifact, blob)
        clock.phase("unpack")
        back = unpack(cfg, run.artifact.read_bytes())
        for name, s in stored.items():
            if not torch.equal(s.decode(), back[name].decode()):
                raise RunError(f"{run.artifact}: {name} does not survive packing: a bug, please report it with the log")
    world.barrier()


def count_bytes(run: Run) -> None:
    """Sizes of the files that a submission ships: the artifact and the script that is running."""
    log, script, artifact = run.log, Path(__file__), run.artifact
    code, model, kind = script.stat().st_size, artifact.stat().st_size, f"quantized+{run.cfg.compressor}"
    upstream, total = upstream_code_bytes(), script.stat().st_size + artifact.stat().st_size
    log(f"Code size (uncompressed): {code} bytes")
    if upstream is not None:
        log(f"Code size (compressed): {upstream} bytes (upstream's convention, a file that is never written)")
    log(f"Serialized model {kind}: {model} bytes")
    log(f"Total submission size {kind}: {total} bytes")
    if total > ARTIFACT_CAP_BYTES:
        log(f"OVER THE CAP: {total} bytes are {total - ARTIFACT_CAP_BYTES} more than {ARTIFACT_CAP_BYTES}; nothing is deleted, the run is "
            "marked. Ship the packed script (tools/pack_code.py), or set QUANT=rd TARGET_BYTES, or raise *_CLIP_SIGMAS")
    run.result |= dict(
        artifact_file=artifact.name, artifact_bytes=model, artifact_sha256=sha256_file(artifact),
        bytes_by_part=bytes_by_part(artifact.read_bytes()), code_bytes=code, code_sha256=sha256_file(script),
        code_bytes_upstream_convention=upstream, bytes_total=total,
        over_cap=total > ARTIFACT_CAP_BYTES)
    run.ledger.add("artifact", dict(file=artifact.name, sha256=run.result["artifact_sha256"], bytes=model, code_bytes=code))


def note_weights(run: Run, model: GPT, when: str) -> None:
    """The hash of all parameters: what was loaded must be what scores the first target."""
    run.weight_hashes.append(state_hash(model.state_dict()))
    run.ledger.add("weights", dict(when=when, sha256=run.weight_hashes[-1]))


def score_artifact(run: Run) -> tuple[GPT, Any, TttRun | None, Score]:
    """Load the artifact from its bytes, score it as it is, then with test-time training. -> model, its forward, the run that adapted it
    and the score that counts."""
    cfg, world, log, clock = run.cfg, run.world, run.log, run.clock
    clock.phase("unpack")
    start = time.perf_counter()
    model = load_artifact(cfg, world, run.artifact, run.kernels)
    log(f"Deserialize: decompression and dequantization done in {time.perf_counter() - start:.1f}s")
    note_weights(run, model, "loaded")
    run.result["model_params"] = sum(p.numel() for p in model.parameters())
    count_bytes(run)
    forward = compile_forward(model, cfg, world)
    if not cfg.ttt_enabled:
        note_weights(run, model, "first_score")
    start = time.perf_counter()
    score, ttt = run.diagnostic("diagnostic quantized", "quantized", forward), None
    run.result |= dict(eval_seconds=time.perf_counter() - start, ttt_val_loss=None, ttt_val_bpb=None)
    if cfg.ttt_enabled:
        ttt = TttRun(cfg, world, model, run.scorer("ttt"), log)
        if ttt.static_rows:
            clock.phase("compile")
            with run.unchanged(model.state_dict):
                ttt.warm_up()
        note_weights(run, model, "first_score")
        clock.phase("eval")
        log("beginning TTT eval timer")
        start = time.perf_counter()
        score = ttt.run()
        world.synchronize()
        seconds = time.perf_counter() - start
        log(f"quantized_ttt_phased val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f} eval_time:{1000 * seconds:.0f}ms")
        log(f"total_eval_time:{seconds:.1f}s")
        utilization = Utilization(world, ttt.scorer.work, seconds)
        log(f"ttt_utilization: {utilization.interval()}")
        run.result["ttt_mfu"] = utilization.result(seconds)
        run.result |= dict(ttt_val_loss=score.loss, ttt_val_bpb=score.bpb, val_loss=score.loss, val_bpb=score.bpb,
                           target_tokens=score.tokens, val_bytes=score.bytes, eval_seconds=seconds)
    return model, forward, ttt, score


def eval_stage(run: Run) -> None:
    """Score the artifact, watched, and look at how that was done."""
    cfg, world, run.files = run.cfg, run.world, replace(run.files, train=())
    with open_watch() as watch:
        model, forward, ttt, score = score_artifact(run)
    run.clock.phase("audit")
    alone = World(0, 1, world.device, world.dtype)
    mini = replace(cfg, phased_ttt_enabled=False, max_eval_seconds=0.0, compile_allow_recompiles=True)

    def replay(scorer: Scorer) -> Score:
        return TttRun(mini, alone, model, scorer, Log(None), ttt).run() if ttt else evaluate(mini, alone, forward, scorer)

    if cfg.eval_method == "sliding":  # windows that a short stream fills
        mini = replace(mini, eval_seq_len=min(cfg.eval_seq_len, 64), eval_stride=min(cfg.eval_stride, 16), val_batch_tokens=8)
    count, length, rounds = *((min(3, cfg.ttt_batch_size), 3 * chunk_size(cfg, 2)) if ttt else (3, 128)), 16 if cfg.audit == "full" else 1
    isolated = (bool(ttt) or cfg.eval_method == "packed") and not cfg.ngram_tilt_enabled
    run.probe(probe_scoring, run.data, alone, cfg.vocab_size, replay, count, length, rounds, cfg.seed, isolated)
    ours = [run.out, cfg.shards_path / "manifest.json", cfg.tokenizer_file, *run.files.val, *run.files.sidecar]
    strangers = sorted(set().union(*world.gather(watch.strangers(cfg.shards_path, ours))))
    run.probe(score_findings, run, score, run.scored.early, strangers)
    world.barrier()


def score_findings(run: Run, score: Score, early: bool, strangers: list[str]) -> dict[str, Finding]:
    """Findings from what lies on the table: sizes, clocks, hashes, coverage, and the score computed again from its file."""
    cfg, result, seconds, weights = run.cfg, run.result, run.clock.seconds, [digest[:8] for digest in run.weight_hashes]
    total, said = sum(len(read_shard(p)) for p in run.files.val) - 1, run.files.manifest.get("splits", {}).get("val", {}).get("bytes")
    good, lossy = score.tokens == total and score.bytes == said, said is not None and score.tokens == total and score.bytes < said
    covered = holds(good, f"{score.tokens} of {total} targets, {score.bytes} of {said or '?'} bytes", bool(said) or score.tokens != total)
    trained = (result.get("train_seconds") or math.nan) + result.get("calib_seconds", 0)
    clocks = ((trained, cfg.max_wallclock_seconds, ("train", "calibrate", "quantize")),
              (result["eval_seconds"], cfg.max_eval_seconds, ("unpack", "diagnostic eval", "eval")))
    late = any(budget and spent > budget for spent, budget, _ in clocks)
    times = [f"{spent:.1f} of {budget:g} s (strict {sum(seconds.get(p, 0) for p in phases):.1f})" for spent, budget, phases in clocks]
    nats = np.load(run.out / f"token_nats_{run.scored_pass}.npy").sum(dtype=np.float64)
    off = abs(float(nats) / math.log(2) / int(run.data.target_bytes.sum()) - score.bpb)
    declared = [int(seed) for seed in filter(None, cfg.seeds_declared.split(","))]
    return dict(
        bytes=holds(not result["over_cap"], f"{result['bytes_total']:,} of {ARTIFACT_CAP_BYTES:,} bytes, packed by {cfg.compressor}"),
        order=holds(weights[0] == weights[1] and not early, f"weights {weights[0]} when loaded, {weights[1]} at the first score; learned "
                    f"from {'unscored' if early else 'scored'} targets"),
        P4=("NEEDS-RULING", covered[1]) if lossy else covered, P5=holds(True, f"{score.tokens:,} targets, each once, by the scorer"),
        P6=holds(all(a == b for a, b in run.warm_ups), f"hashes of the state before and after: {run.warm_ups}", bool(run.warm_ups)),
        P7=holds(not late, f"train {times[0]}, eval {times[1]}", late or all(budget and spent == spent for spent, budget, _ in clocks)),
        P8=("NOT-MEASURED", "tools/audit.py rescore does it"),
        P10=probe_round_trip(cfg, run.data, 1 << 30 if cfg.audit == "full" else 8, cfg.seed),
        P11=holds(not strangers, f"strange among the files, sockets and programs: {', '.join(strangers[:3]) or 'none'}"),
        P12=holds(cfg.seed in declared, f"seed {cfg.seed}, declared: {declared}", bool(declared)),
        sum=holds(off <= 1e-9, f"bits per byte from token_nats_{run.scored_pass}.npy differ by {off:.1g}"))


def finish(run: Run) -> None:
    """Complete the result, judge it, write result.json, print the tables and the one JSON line."""
    cfg, world, files, manifest = run.cfg, run.world, run.files, run.files.manifest.get("splits", {})
    phases = run.clock.table()
    documents = {split: (lambda d: d[1] - d[0])(manifest.get(split, {}).get("documents", [0, 0])) or None for split in ("train", "val")}
    scores = [f"{stage}val_{unit}" for stage in ("", "pre_quant_", "quantized_", "ttt_") for unit in ("loss", "bpb")]
    keys = (*scores, "steps", "step_avg_ms", "train_tokens", "train_seconds", "calib_seconds", "eval_seconds")
    result = dict(
        schema_version=1, run_id=run.out.name if not cfg.run_id else cfg.run_id, seed=cfg.seed, preset=cfg.preset, stage=cfg.stage,
        overrides=overrides(cfg), config_hash=config_hash(cfg), **dict.fromkeys(keys)) | run.result | dict(
        val_tokens=len(run.data.target_bytes), docs_val=len(run.data.documents()[0]), wall_seconds=sum(p["seconds"] for p in phases),
        phases=phases, compilations=run.clock.compiled, peak_mem_mib=max(p["peak_mib"] for p in phases), **environment(world),
        data=dict(manifest_sha256=files.manifest_sha256, train_shards=run.train_shards, docs_train=documents["train"],
                  train_tokens=manifest.get("train", {}).get("tokens"), docs_val=documents["val"],
                  tokenizer_sha256=files.manifest.get("tokenizer_sha256")),
        train_budget_seconds=cfg.max_wallclock_seconds, eval_budget_seconds=cfg.max_eval_seconds)
    judged = verdicts(cfg, run.findings)
    run.ledger.add("verdicts", judged)
    run.ledger.add("end", dict(val_loss=result["val_loss"], val_bpb=result["val_bpb"], tokens=result.get("target_tokens"),
                               bytes=result.get("val_bytes"), **{"pass": run.scored_pass}))
    result["audit"] = dict(mode=cfg.audit, verdicts=judged, findings=run.findings, lines=run.ledger.lines, last_hash=run.ledger.last)
    if world.main:
        curve = result.pop("loss_curve", None)
        if curve:
            write_atomic(run.out / "loss_curve.json", json.dumps(curve).encode())
        write_atomic(run.out / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    for line in summary_table(result):
        run.log(line)
    run.log(f"result: {json.dumps(result)}")


def summary_table(result: dict) -> list[str]:
    """The numbers a person wants first."""
    lines = ["", f"{'stage':<28}{'val_bpb':>10}{'val_loss':>10}"]
    for name, key in (("trained (EMA)", "pre_quant"), ("quantized", "quantized"), ("test-time trained", "ttt")):
        if result.get(f"{key}_val_bpb") is not None:
            lines.append(f"{name:<28}{result[f'{key}_val_bpb']:>10.5f}{result[f'{key}_val_loss']:>10.5f}")
    if "artifact_bytes" in result:
        lines += ["", f"{'bytes':<28}{'':>10}{'':>10}"]
        lines += [f"  {name:<26}{size:>10,}" for name, size in result["bytes_by_part"].items() if size]
        lines += [f"  {'code':<26}{result['code_bytes']:>10,}", f"{'total':<28}{result['bytes_total']:>10,}  of {ARTIFACT_CAP_BYTES:,}"]
    lines += ["", f"{'phase':<28}{'seconds':>10}{'peak MiB':>10}"]
    lines += [f"  {p['name']:<26}{p['seconds']:>10.1f}{p['peak_mib']:>10}" for p in result["phases"]]
    lines += [f"{'wall':<28}{result['wall_seconds']:>10.1f}{result['peak_mem_mib']:>10}", ""]
    return [*lines, *(f"{rule:<4}{verdict:<14}{evidence}" for rule, (verdict, evidence) in result["audit"]["verdicts"].items()), ""]


def run_stages(cfg: Config, world: World, env) -> None:
    """The stages that STAGE asks for, in order, and the result."""
    run_id = cfg.run_id or world.from_main(datetime.now(UTC).strftime("%Y%m%d_%H%M%S"))
    run = Run(cfg, world, Path(cfg.artifact_dir or f"logs/{run_id}"))
    log_start(run, env)
    if cfg.stage == "warm":
        warm_stage(run)
    if run.files.train and cfg.stage != "warm":
        run.clock.phase("audit")
        run.probe(probe_overlap, run.files.train, run.data.tokens, math.inf if cfg.audit == "full" else 6.0)
    model = train_stage(run) if cfg.stage in ("all", "train") else None
    if cfg.stage in ("all", "quantize"):
        quantize_stage(run, model)
    if cfg.stage in ("all", "quantize", "eval"):
        eval_stage(run)
    finish(run)


def main() -> int:
    """Exit codes: 0 done, 1 the run failed with an explanation, 2 bad configuration, 130 interrupted."""
    if set(sys.argv[1:]) & {"-h", "--help"}:
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
        print(help_text(os.environ.get("PRESET", "s14")))
        return 0
    if sys.argv[1:]:
        print(f"unknown arguments {sys.argv[1:]}: everything is set by environment variables; see --help", file=sys.stderr)
        return 2
    try:
        cfg, launch = config_from_env(os.environ), launch_from_env(os.environ)
    except ValueError as e:
        print("bad configuration:\n" + "\n".join(f"  {line}" for line in str(e).splitlines()), file=sys.stderr)
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
        print(f"error: out of device memory: {e}\nLower TRAIN_MICROBATCH_TOKENS (the batch stays the same), VAL_BATCH_TOKENS or "
              "TTT_BATCH_SIZE", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was finished is on disk: go on with STAGE=quantize or STAGE=eval", file=sys.stderr)
        return 130
    finally:
        if world is not None:
            world.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
