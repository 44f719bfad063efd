"""CONFIG: the published settings are the defaults, and a wrong variable never starts a run."""

import dataclasses
import os
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, tiny_config, tiny_env
from hypothesis import given, settings, strategies as st

import train_gpt as tg

FIELDS = {f.name.upper(): f for f in dataclasses.fields(tg.Config)}

# Appendix A of the specification: NAME value, or NAME published code default -> value of S14. A lone '' is the blank string.
# COMPRESSOR is ours: S14 has pergroup.
S14 = """
DATA_DIR ./data/
CASEOPS_ENABLED 0->1
SEED 1337
ARTIFACT_DIR ''
ITERATIONS 20000
MAX_WALLCLOCK_SECONDS 600
TRAIN_LOG_EVERY 500
VAL_LOSS_EVERY 4000->0
VAL_BATCH_TOKENS 524288
VAL_DOC_FRACTION 1.0
EVAL_INCLUDE_TAIL 1
WARMUP_STEPS 20
WARMDOWN_FRAC 0.75->0.85
WARMDOWN_ITERS 0
MIN_LR 0->0.1
TRAIN_BATCH_TOKENS 786432
TRAIN_SEQ_LEN 2048->3072
TRAIN_SEQ_SCHEDULE ''->1024@0.100,2048@0.700,3072@1.000
TRAIN_SEQ_SCHEDULE_MODE wallclock
SEQ_CHANGE_WARMUP_STEPS 0->32
COMPILE_SHAPE_WARMUP 0->1
COMPILE_SHAPE_WARMUP_ITERS 1
COMPILE_SHAPE_WARMUP_LOOP_MODES auto
MIDRUN_CAP_SCHEDULE ''
MIDRUN_CAP_LOG_UPDATES 0
ENABLE_LOOPING_AT 0.35
EVAL_SEQ_LEN 2048->3072
EVAL_STRIDE 64->1536
FORCE_STOP_STEP 0
VOCAB_SIZE 8192
NUM_LAYERS 11
XSA_LAST_N 11
MODEL_DIM 512
NUM_KV_HEADS 4
NUM_HEADS 8
MLP_MULT 4.0
SKIP_GATES_ENABLED 1
TIE_EMBEDDINGS 1
LOGIT_SOFTCAP 30
ROPE_BASE 1e4
ROPE_DIMS 16
ROPE_TRAIN_SEQ_LEN 2048->3072
ROPE_YARN 0
LN_SCALE 1
QK_GAIN_INIT 5.0->5.25
NUM_LOOPS 2
LOOP_START 3
LOOP_END 5
PARALLEL_START_LAYER 8
PARALLEL_FINAL_LANE mean
ATTN_OUT_GATE_ENABLED 0
ATTN_OUT_GATE_SRC proj
SMEAR_GATE_ENABLED 0->1
GATE_WINDOW 12
GATED_ATTN_ENABLED 0
GATED_ATTN_INIT_STD 0.01
SPARSE_ATTN_GATE_ENABLED 0->1
SPARSE_ATTN_GATE_INIT_STD 0
SPARSE_ATTN_GATE_SCALE 1.0->0.5
ASYM_LOGIT_RESCALE 0->1
FUSED_CE_ENABLED 1
TIED_EMBED_INIT_STD 0.005
EMBED_LR 0.6
TIED_EMBED_LR 0.03
MATRIX_LR 0.026
SCALAR_LR 0.02
MUON_MOMENTUM 0.97
MUON_BACKEND_STEPS 5
MUON_MOMENTUM_WARMUP_START 0.92
MUON_MOMENTUM_WARMUP_STEPS 1500
MUON_ROW_NORMALIZE 1
BETA1 0.9
BETA2 0.95->0.99
ADAM_EPS 1e-8
GRAD_CLIP_NORM 0.3
ADAM_WD 0.02
MUON_WD 0.095
EMBED_WD 0.085
EMA_DECAY 0.9965
MATRIX_BITS 6
EMBED_BITS 8->7
MATRIX_CLIP_SIGMAS 12.85
EMBED_CLIP_SIGMAS 20->14
MLP_CLIP_SIGMAS 10->11.5
ATTN_CLIP_SIGMAS 13
GATED_ATTN_QUANT_GATE 0->1
LQER_ENABLED 1
LQER_RANK 4
LQER_TOP_K 3
LQER_FACTOR_BITS 4
LQER_ASYM_ENABLED 1
LQER_ASYM_GROUP 64
LQER_SCOPE all
LQER_GAIN_SELECT 0
AWQ_LITE_ENABLED 0->1
AWQ_LITE_BITS 8
AWQ_LITE_GROUP_TOP_K 1
AWQ_LITE_GROUP_SIZE 64
GPTQ_CALIBRATION_BATCHES 16
GPTQ_RESERVE_SECONDS 4.0
COMPRESSOR brotli->range
TTT_ENABLED 1
TTT_LORA_RANK 96->80
TTT_LORA_LR 1e-4
TTT_LOCAL_LR_MULT 1->0.75
TTT_LORA_ALPHA 144
TTT_WARM_START_A 1
TTT_CHUNK_SIZE 48
TTT_EVAL_SEQ_LEN 2048->3072
TTT_BATCH_SIZE 64->24
TTT_GRAD_STEPS 1
TTT_WEIGHT_DECAY 2.0->0.5
TTT_BETA1 0
TTT_BETA2 0.999->0.99
TTT_MASK ''->no_qv
TTT_K_LORA 1
TTT_MLP_LORA 1
TTT_O_LORA 1
TTT_OPTIMIZER adam
TTT_EVAL_BATCHES ''
TTT_SHORT_DOC_LEN 512->2000
TTT_SHORT_SCORE_FIRST_ENABLED 0->1
TTT_SHORT_CHUNK_SIZE 48->24
TTT_SHORT_SCORE_FIRST_STEPS ''->256:8,2000:24
TTT_SHORT_LORA_ENABLED 0
TTT_TRAIN_MIN_DOC_LEN 0
TTT_TRAIN_MAX_DOC_LEN 0
TTT_WARM_START_MEAN_ENABLED 0
TTT_WARM_START_MEAN_MOMENTUM 0.95
PHASED_TTT_PREFIX_DOCS 2000->2500
PHASED_TTT_NUM_PHASES 1
GLOBAL_TTT_LR 0.001
GLOBAL_TTT_MOMENTUM 0.9
GLOBAL_TTT_EPOCHS 1
GLOBAL_TTT_CHUNK_TOKENS 32768
GLOBAL_TTT_BATCH_SEQS 32
GLOBAL_TTT_WARMUP_START_LR 0
GLOBAL_TTT_WARMUP_CHUNKS 0
GLOBAL_TTT_GRAD_CLIP 1.0
GLOBAL_TTT_RESPECT_DOC_BOUNDARIES 1
PREQUANT_ONLY 0
QUANTIZE_ONLY 0
TTT_EVAL_ONLY 0
DYNAMO_CACHE_SIZE_LIMIT 128
DYNAMO_ACCUMULATED_CACHE_SIZE_LIMIT 1024
"""
ROWS = [(name, *[v.strip("'") for v in text.split("->")]) for name, text in (line.split(" ", 1) for line in S14.strip().splitlines())]
S14_ENV = {name: values[-1] for name, *values in ROWS}
UNVALUED = (  # listed without a value, or read by none of that code
    "DATA_PATH", "TOKENIZER_PATH", "RUN_ID", "TTT_Q_LORA", "TTT_V_LORA", "TTT_SHORT_LORA_RANK", "TTT_SHORT_LORA_LR",
    "TTT_SHORT_LORA_WEIGHT_DECAY", "TTT_SHORT_LORA_BETA2", "TTT_WARM_START_MEAN_DOC_LEN", "PHASED_TTT_ENABLED",
)  # fmt: skip


def errors_of(env: dict) -> str:
    with pytest.raises(ValueError) as caught:
        tg.config_from_env(env)
    return str(caught.value)


def as_text(value) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def probe(**changes) -> tg.Config:
    """A Config whose cross-field rules were not applied."""
    c = object.__new__(tg.Config)
    for f in dataclasses.fields(tg.Config):
        object.__setattr__(c, f.name, changes.get(f.name, f.default))
    return c


def run_main(monkeypatch, capsys, *args: str, **env: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *args])
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    code = tg.main()
    return code, *capsys.readouterr()


# ---- the published recipe


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_published_variable(row):
    """The default is the record's value; where there is no such variable any more, the record's value is accepted and said to do
    nothing."""
    name, *values = row
    if name not in FIELDS:
        switches = ("MIDRUN_CAP_SCHEDULE", "TTT_WARM_START_MEAN_ENABLED")  # off in the published environment
        env = {switch: S14_ENV[switch] for switch in switches if name.startswith(switch[:-8])} | {name: values[-1]}
        cfg = tg.config_from_env(env)
        assert cfg == tg.Config()
        notes = tg.without_effect(cfg, env)
        assert len(notes) == len(env) and any(note.startswith(f"{name} (") for note in notes)
        return
    f = FIELDS[name]
    assert tg.parse_knob(f, values[-1]) == f.default, "the default is the record"
    assert getattr(tg.config_from_env({name: values[-1]}), f.name) == f.default
    tg.parse_knob(f, values[0])  # the published code's own default is accepted as well


def test_whole_published_environment_is_the_default():
    assert tg.config_from_env(S14_ENV) == tg.Config()


@pytest.mark.parametrize("name", UNVALUED)
def test_variable_published_without_value_is_known(name):
    assert name in FIELDS or any(tg.published(name, {}))


def test_query_and_value_adapters_follow_the_mask():
    assert tg.Config().lora_sites == ("k", "o", "mlp")
    assert tg.config_from_env({"TTT_Q_LORA": "0", "TTT_V_LORA": "0"}).lora_sites == tg.Config().lora_sites
    assert tg.config_from_env({"TTT_Q_LORA": "1"}).lora_sites == ("q", "k", "o", "mlp")


@pytest.mark.parametrize("mask, sites", [("", "q k v o mlp"), ("all", "q k v o mlp"), ("baseline_all", "q k v o mlp"),
                                         ("no_q", "k v o mlp"), ("no_v", "q k o mlp"), ("no_qv", "k o mlp")])  # fmt: skip
def test_masks(mask, sites):
    assert tg.config_from_env({"TTT_MASK": mask}).lora_sites == tuple(sites.split())


def test_default_paths_are_the_published_export():
    cfg = tg.config_from_env({"DATA_DIR": "/d"})
    export = "/d/datasets/fineweb10B_sp8192_caseops/datasets"
    assert str(cfg.shards_path) == f"{export}/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
    assert str(cfg.tokenizer_file) == f"{export}/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
    assert str(tg.config_from_env({"DATA_PATH": "/x"}).tokenizer_file) == "/x/tokenizer.model"
    assert str(tg.config_from_env({"DATA_PATH": "/x", "TOKENIZER_PATH": "/t.model"}).tokenizer_file) == "/t.model"


# ---- one variable


@pytest.mark.parametrize("name", FIELDS)
def test_default_parses_from_its_text(name):
    assert tg.parse_knob(FIELDS[name], as_text(FIELDS[name].default)) == FIELDS[name].default


def garbage(f):
    """Texts no knob of this type may accept, with what the message must say."""
    if f.type == "bool":
        return [(raw, "0 or 1") for raw in ("true", "yes", "2", "")]
    if f.metadata["choices"]:
        return [("nonsense", choice or "(blank)") for choice in f.metadata["choices"]]
    if f.type == "str":
        return []
    kind = "a whole number" if f.type == "int" else "a number"
    lo, hi = f.metadata["lo"], f.metadata["hi"]
    accepted = f"{kind} in [{lo}, {hi}]" if hi < tg.LARGEST else f"{kind} of at least {lo}" if lo > -tg.LARGEST else kind
    outside = [str(bound) for bound in (lo - 1, hi + 1) if abs(bound) < tg.LARGEST]
    endless = ["nan", "inf", "-inf", "1e400"]
    return [(raw, accepted) for raw in ("abc", "", *(["1.5"] if f.type == "int" else endless), *outside)]


@pytest.mark.parametrize("name, raw, accepted", [(n, *case) for n, f in FIELDS.items() for case in garbage(f)])
def test_garbage_is_refused_by_name(name, raw, accepted):
    message = errors_of({name: raw})
    assert f"{name}={raw!r}" in message
    assert accepted in message


@pytest.mark.parametrize("name, value", [(name, value) for name, values in {
    "TRAIN_SEQ_SCHEDULE": ("1024", "0@0.5", "1024@1.5", "1024@0", "a@0.5", "1024@nan"),
    "TTT_SHORT_SCORE_FIRST_STEPS": ("256", "256:8:9", "256:0", "256:-8", "256:0.5", "256:nan", "256:inf"),
}.items() for value in values])  # fmt: skip
def test_malformed_list_is_refused_by_name(name, value):
    assert name in errors_of({name: value})


def test_all_errors_at_once():
    env = {"NUM_LAYERS": "eleven", "MODEL_DIM": "510", "MUON_MOMENTUN": "0.9", "TTT_LR": "1e-4", "PRESET": "s15", "EMA_DECAY": "2"}
    message = errors_of(env)
    assert len(message.splitlines()) >= len(env)
    for name in env:
        assert name in message


def test_a_refused_value_does_not_provoke_cross_field_errors():
    assert len(errors_of({"MODEL_DIM": "x"}).splitlines()) == 1


@pytest.mark.parametrize("typo, nearest", [
    ("MUON_MOMENTUN", "MUON_MOMENTUM"), ("TTT_LORA_RNK", "TTT_LORA_RANK"), ("NUM_LAYERSS", "NUM_LAYERS"), ("TRAIN_SEQLEN", "TRAIN_SEQ_LEN"),
    ("EVAL_SEQ_LENGTH", "EVAL_SEQ_LEN"), ("BETA_2", "BETA2"),
])  # fmt: skip
def test_unknown_variable_names_the_nearest(typo, nearest):
    message = errors_of({typo: "1"})
    assert typo in message and message.endswith(nearest)


@pytest.mark.parametrize("typo, nearest", [
    ("ITERATION", "ITERATIONS"), ("NUM_LAYER", "NUM_LAYERS"), ("RUNID", "RUN_ID"), ("DATAPATH", "DATA_PATH"),
    ("seed", "SEED"), ("Num_Layers", "NUM_LAYERS"), ("ttt_lora_rank", "TTT_LORA_RANK"), ("slot", "SLOT"),
    ("MODEL_DIMS", "MODEL_DIM"), ("MAX_WALLCLOCK", "MAX_WALLCLOCK_SECONDS"), ("CUDA_GRAPH", "CUDA_GRAPHS"),
    ("TARGET_BYTE", "TARGET_BYTES"), ("MIN_LR_FRAC", "MIN_LR"), ("PARALLEL_START", "PARALLEL_START_LAYER"),
    ("ITERATONS", "ITERATIONS"), ("MUOM_MOMENTUM", "MUON_MOMENTUM"),
])  # fmt: skip
def test_every_slip_is_noticed(typo, nearest):
    assert re.fullmatch(rf"{typo}: no such variable; the nearest is \w+", errors_of({typo: "1"}))
    assert errors_of({typo: "1"}).endswith(f" {nearest}")


@pytest.mark.parametrize("name", [name for name, f in FIELDS.items() if "_" in name])
def test_a_typo_in_any_family_is_noticed(name):
    """A letter missing, doubled or swapped, or a word more: no variable is so rare that its misspelling passes."""
    middle = len(name) // 2
    swapped = name[:middle] + name[middle + 1] + name[middle] + name[middle + 2 :]
    for typo in {name[:middle] + name[middle + 1 :], name[: middle + 1] + name[middle:], swapped, name + "_X"} - set(FIELDS):
        message = errors_of({typo: "1"})
        assert "no such variable; the nearest is" in message or any(tg.published(typo, {})), typo


FOREIGN = {  # environments as other programs make them: never a word about any of these
    "shell": """SHELL=/bin/bash PWD=/workspace OLDPWD=/ LOGNAME=root HOME=/root USER=root LANG=C.UTF-8 LC_ALL=C LS_COLORS=x
        TERM=xterm-256color COLORTERM=truecolor SHLVL=2 PATH=/usr/bin _=/usr/bin/env HISTSIZE=1000 HISTFILE=x PS1=x EDITOR=vim
        PAGER=less LESS=-R DISPLAY=:0 MAIL=/var/mail/x HOSTNAME=node DEBIAN_FRONTEND=noninteractive TZ=UTC BASH_ENV=x ENV=x
        XDG_CACHE_HOME=x XDG_SESSION_ID=3 XDG_RUNTIME_DIR=x DBUS_SESSION_BUS_ADDRESS=x SSH_CLIENT=x SSH_CONNECTION=x SSH_TTY=x
        http_proxy=x https_proxy=x no_proxy=x HTTP_PROXY=x NO_PROXY=x LD_LIBRARY_PATH=x LD_PRELOAD=x MALLOC_ARENA_MAX=2
        GLIBC_TUNABLES=x WINDOWID=7 WINDOW=0 STY=1.pts TMUX=/tmp/tmux TMUX_PANE=%0 TMUX_TMPDIR=x VTE_VERSION=1
        NO_COLOR=1 FORCE_COLOR=1 CLICOLOR=1 LINES=50 COLUMNS=120 RANDOM=1 SECONDS=1 UID=0 EUID=0 PPID=1 IFS=x""",
    "torchrun": """RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=8 GROUP_RANK=0 GROUP_WORLD_SIZE=1 ROLE_RANK=0
        ROLE_WORLD_SIZE=8 ROLE_NAME=default MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 TORCHELASTIC_RUN_ID=none
        TORCHELASTIC_RESTART_COUNT=0 TORCHELASTIC_MAX_RESTARTS=0 TORCHELASTIC_USE_AGENT_STORE=True
        TORCHELASTIC_ERROR_FILE=x TORCHELASTIC_SIGNALS_TO_HANDLE=x TORCH_NCCL_ASYNC_ERROR_HANDLING=1 TORCH_DISTRIBUTED_DEBUG=OFF
        OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE MKL_NUM_THREADS=1 KMP_AFFINITY=x GOMP_SPINCOUNT=0 GOMP_CPU_AFFINITY=0
        NUMEXPR_MAX_THREADS=8 OPENBLAS_NUM_THREADS=1 NCCL_NET=Socket NCCL_IB_DISABLE=0 NCCL_DEBUG=INFO NCCL_SOCKET_IFNAME=x
        NCCL_MIN_NCHANNELS=4 NCCL_MAX_NCHANNELS=8 GLOO_SOCKET_IFNAME=x""",
    "gpu": """CUDA_VISIBLE_DEVICES=0 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_HOME=x CUDA_PATH=x CUDA_VERSION=12.8 CUDA_LAUNCH_BLOCKING=0
        CUDA_MODULE_LOADING=LAZY CUDA_CACHE_PATH=x CUDA_ARCH_LIST=9.0 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=x
        NVIDIA_REQUIRE_CUDA=x CUBLAS_WORKSPACE_CONFIG=:4096:8 CUDNN_LOGINFO_DBG=0 NVTE_FRAMEWORK=x PYTORCH_CUDA_ALLOC_CONF=x
        PYTORCH_ALLOC_CONF=x TORCH_CUDA_ARCH_LIST=9.0 TORCH_HOME=x TORCH_LOGS=x TORCH_COMPILE_DEBUG=0 TORCHINDUCTOR_CACHE_DIR=x
        TORCHINDUCTOR_MAX_AUTOTUNE=1 TORCHINDUCTOR_FORCE_DISABLE_CACHES=0 TORCHDYNAMO_VERBOSE=1 TRITON_CACHE_DIR=x
        TRITON_INTERPRET=1 TRITON_PRINT_AUTOTUNING=1 TRITON_PTXAS_PATH=x TRITON_DEFAULT_FP_FUSION=0 XLA_FLAGS=x XLA_USE_BF16=1
        XLA_PYTHON_CLIENT_MEM_FRACTION=.9 MAX_JOBS=8 CUTE_DSL_ARCH=sm_90a FLASH_ATTENTION_ARCH=sm_90 FLASH_ATTENTION_NUM_SMS=132
        FLASH_ATTENTION_FORCE_BUILD=1 FLASH_ATTENTION_SKIP_CUDA_BUILD=1 FLA_DISABLE_BACKEND_DISPATCH=1 CC=gcc CXX=g++
        CFLAGS=-O3 TARGET_ARCH=x86_64 VLLM_USE_TRITON_AWQ=1 VLLM_ATTENTION_BACKEND=x""",
    "python": """PYTHONPATH=x PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0 VIRTUAL_ENV=x VIRTUAL_ENV_PROMPT=x
        CONDA_EXE=x CONDA_PREFIX=x CONDA_DEFAULT_ENV=base CONDA_SHLVL=1 CONDA_PROMPT_MODIFIER=x CONDA_PYTHON_EXE=x _CE_CONDA=
        _CE_M= PIP_INDEX_URL=x PIP_NO_CACHE_DIR=1 UV_CACHE_DIR=x UV_PYTHON_DOWNLOADS=never PYENV_ROOT=x POETRY_HOME=x
        PYTEST_CURRENT_TEST=x PYTEST_VERSION=9 PYTEST_XDIST_WORKER=gw0 PYTEST_XDIST_WORKER_COUNT=2 PYTEST_ADDOPTS=x COV_CORE_SOURCE=x
        HYPOTHESIS_PROFILE=x HF_HOME=x HF_TOKEN=x HF_HUB_CACHE=x HF_DATASETS_CACHE=x HF_HUB_ENABLE_HF_TRANSFER=1
        TRANSFORMERS_CACHE=x TOKENIZERS_PARALLELISM=false WANDB_API_KEY=x WANDB_MODE=offline WANDB_PROJECT=x WANDB_RUN_ID=x
        MLFLOW_TRACKING_URI=x MPLBACKEND=Agg JPY_PARENT_PID=7 IPYTHONDIR=x JUPYTER_TOKEN=x TRACKIO_DIR=x TQDM_DISABLE=1""",
    "github": """CI=true GITHUB_ACTIONS=true GITHUB_RUN_ID=1 GITHUB_RUN_NUMBER=2 GITHUB_RUN_ATTEMPT=1 GITHUB_SHA=x GITHUB_REF=x
        GITHUB_TOKEN=x GITHUB_WORKSPACE=x GITHUB_EVENT_NAME=push GITHUB_JOB=test GITHUB_STEP_SUMMARY=x GITHUB_ENV=x GITHUB_OUTPUT=x
        RUNNER_OS=Linux RUNNER_ARCH=X64 RUNNER_NAME=x RUNNER_TEMP=/tmp RUNNER_TOOL_CACHE=x RUNNER_WORKSPACE=x RUNNER_DEBUG=1
        ACTIONS_RUNTIME_TOKEN=x ACTIONS_CACHE_URL=x AGENT_TOOLSDIRECTORY=x ImageOS=ubuntu24 JAVA_HOME=x GOROOT=x
        DATA_VOLUME=x MODEL_NAME=x ENABLE_CACHE=1 SKIP=ruff SKIP_BUILD=1 TOKEN=x RUN_TESTS=1 NUM_WORKERS=2 STAGE_NAME=x""",
    "gitlab": """GITLAB_CI=true CI_JOB_ID=1 CI_JOB_STAGE=test CI_JOB_TOKEN=x CI_RUNNER_ID=1 CI_COMMIT_SHA=x CI_PIPELINE_ID=1
        CI_MERGE_REQUEST_TARGET_BRANCH_NAME=main CI_NODE_TOTAL=1 CI_PROJECT_DIR=x GITLAB_USER_ID=1 FF_USE_FASTZIP=1
        JENKINS_URL=x BUILD_ID=1 BUILD_NUMBER=2 JOB_NAME=x WORKSPACE=x CIRCLE_NODE_INDEX=0 TRAVIS=1 BUILDKITE_JOB_ID=x
        ARTIFACT_DOWNLOAD_ATTEMPTS=2 CACHE_COMPRESSION_LEVEL=fast GIT_DEPTH=20 GIT_STRATEGY=fetch GIT_TERMINAL_PROMPT=0""",
    "cluster": """SLURM_JOB_ID=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=8 SLURM_NODELIST=x SLURM_JOB_NUM_NODES=1 SLURM_GPUS=8
        SLURM_CPUS_PER_TASK=12 SLURM_MEM_PER_NODE=1 SLURM_STEP_ID=0 SLURM_TASKS_PER_NODE=8 SLURM_SUBMIT_DIR=x SLURM_EXPORT_ENV=ALL
        SLURM_ARRAY_TASK_ID=3 SBATCH_EXPORT=x PMI_RANK=0 PMIX_RANK=0 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=8 MPI_HOME=x
        UCX_NET_DEVICES=x HYDRA_FULL_ERROR=1 PBS_JOBID=1 PBS_O_WORKDIR=x SGE_TASK_ID=1 LSB_JOBID=1 KUBERNETES_SERVICE_HOST=x
        KUBERNETES_PORT=x AWS_REGION=x AWS_PROFILE=x AWS_ACCESS_KEY_ID=x GOOGLE_APPLICATION_CREDENTIALS=x RUNPOD_POD_ID=x
        RUNPOD_GPU_COUNT=8 RUNPOD_DC_ID=x VAST_CONTAINERLABEL=x SM_MODEL_DIR=x SM_NUM_GPUS=8 SM_CHANNEL_TRAINING=x TRAINING_JOB=x
        PARALLEL=-j8 PARALLEL_SEQ=1 PARALLEL_PID=2 PARALLEL_JOBSLOT=1 PARALLEL_HOME=x PARALLEL_SHELL=/bin/bash MAKEFLAGS=x
        MAKELEVEL=1 MFLAGS=x""",
}  # fmt: skip


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_variables_of_other_programs_are_never_complained_about(text):
    env = dict(setting.split("=", 1) for setting in text.split())
    assert len(env) > 20
    cfg = tg.config_from_env(env)
    assert cfg == tg.Config() and tg.without_effect(cfg, env) == []


def test_the_environment_of_the_tests_is_not_complained_about():
    ours = set(FIELDS) | set(tg.ALIASES)
    assert tg.config_from_env({name: value for name, value in os.environ.items() if name not in ours}) == tg.Config()


# ---- published names that are not ours


PATTERNS = [line.split(" ", 2) for line in tg.PUBLISHED.strip().splitlines()]


def test_table_of_published_names():
    """Each row says why, in one clause; settings are NAME=VALUE of a name that the row itself covers or another row accepts."""
    assert len({pattern for pattern, _, _ in PATTERNS}) == len(PATTERNS)
    for pattern, setting, why in PATTERNS:
        assert len(why) > 12 and not why.endswith(".")
        assert not any(re.fullmatch(pattern.replace("*", ".*"), name) for name in FIELDS), "one of ours"
        if setting not in ("-", "*"):
            switch, _, off = setting.partition("=")
            assert tg.published(switch, {switch: off}) == ("", why) or any(tg.published(switch, {switch: off}))


def example(pattern: str) -> str:
    return pattern.replace("[BHOD]*", "BUCKETS").replace("*", "EXAMPLE" if pattern.endswith("*") else "SOME")


@pytest.mark.parametrize("row", PATTERNS, ids=lambda row: row[0])
def test_published_name_is_refused_with_its_reason_or_said_to_do_nothing(row):
    pattern, setting, why = row
    name = example(pattern)
    if setting == "*":
        cfg = tg.config_from_env({name: "0.5"})
        assert cfg == tg.Config() and tg.without_effect(cfg, {name: "0.5"}) == [f"{name} ({why})"]
        return
    assert errors_of({name: "7.5"}) == f"{name}='7.5': {why}" + (f" ({setting} is accepted)" if setting != "-" else "")
    if setting != "-":
        switch, _, off = setting.partition("=")
        env = {name: off if name == switch else "7.5", switch: off}
        cfg = tg.config_from_env(env)
        assert cfg == tg.Config() and f"{name} ({why})" in tg.without_effect(cfg, env)
        assert errors_of(env | {switch: "9"}).count("is accepted")


@pytest.mark.parametrize("off, value", [("0", "0.0"), ("0", "0"), ("1", "1.0")])
def test_off_is_off_however_it_is_written(off, value):
    name = {"0": "TTT_LORA_EMA_DECAY", "1": "TTT_UPDATE_EVERY"}[off]
    assert tg.config_from_env({name: value}) == tg.Config()


# The variables of PR #1105's last script with their defaults; its files and log names, and paths, by an x.
H4 = """
DATA_PATH=x TOKENIZER_PATH=x RUN_ID=x SEED=1337 VAL_BATCH_SIZE=524288 VAL_LOSS_EVERY=4000 TRAIN_LOG_EVERY=500 ITERATIONS=20000
WARMDOWN_ITERS=4000 WARMUP_STEPS=20 TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048 EVAL_SEQ_LEN=2048 MAX_WALLCLOCK_SECONDS=600.0
QK_GAIN_INIT=5.0 VOCAB_SIZE=4608 NUM_LAYERS=11 NUM_KV_HEADS=4 MODEL_DIM=512 NUM_HEADS=8 MLP_MULT=4.0 TIE_EMBEDDINGS=1
ROPE_BASE=10000.0 LOGIT_SOFTCAP=30.0 EMBED_LR=0.6 HEAD_LR=0.008 TIED_EMBED_LR=0.035 TIED_EMBED_INIT_STD=0.005 MATRIX_LR=0.02
MATRIX_LR_EARLY=0.02 MATRIX_LR_LATE=0.02 BANK_SPLIT=5 SCALAR_LR=0.025 MUON_MOMENTUM=0.99 MUON_BACKEND_STEPS=5
MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 BETA1=0.9 BETA2=0.95 ADAM_EPS=1e-8 GRAD_CLIP_NORM=0.3
EVAL_STRIDE=64 MTP_NUM_HEADS=0 MTP_LOSS_WEIGHT=0.2 MUON_BETA2=0.95 SWA_ENABLED=1 SWA_EVERY=50 LAWA_ENABLED=0 LAWA_K=10
LAWA_FREQ=100 MUON_WD=0.085 ADAM_WD=0.02 EMBED_WD=0.085 QAT_ENABLED=0 QAT_ALPHA_START=1.0 QAT_ALPHA_END=16.0 QAT_RAMP_STEPS=500
BIGRAM_VOCAB_SIZE=0 BIGRAM_DIM=0 TRIGRAM=0 ENGRAM=0 NGRAM_BUCKETS=8192 NGRAM_HEADS=2 NGRAM_ORDERS=2 NGRAM_DIM_PER_HEAD=32
XSA_LAST_N=11 ROPE_DIMS=16 LN_SCALE=1 DTG_ENABLED=0 LATE_QAT_THRESHOLD=0.15 LR_FLOOR=0.05 MIXED_QUANT=1 N_INT6_LAYERS=66
VE_ENABLED=0 VE_DIM=128 VE_LAYERS=9,10 GATED_ATTENTION=0 VALUE_RESIDUAL=0 GPTQ_CALIB_BATCHES=256 GPTQ_BLOCK_SIZE=128
FUSED_NGRAM_EVAL=1 FUSED_NGRAM_DEVICE=cuda:0 FUSED_NGRAM_BATCH_SEQS=64 FUSED_NGRAM_BASE_BETA=1.0 FUSED_NGRAM_AGREE_BONUS=0.5
FUSED_NGRAM_WITHIN_THRESHOLD=0.25 FUSED_NGRAM_WITHIN_BETA=0.55 FUSED_NGRAM_WORD_THRESHOLD=0.80 FUSED_NGRAM_WORD_BETA=0.50
FUSED_NGRAM_OPEN_TABLE_BITS=26 FUSED_NGRAM_TOKEN_THRESHOLD_SCALE=1.0 FUSED_NGRAM_ORDER_STRIDE=2 TARGET_MB=15.9
CONTROL_TENSOR_NAME_PATTERNS=x INT8_KEEP_FLOAT_FP32_NAME_PATTERNS=x
"""
S35 = """
ASYM_LOGIT_RESCALE=1 NGRAM_TILT_ENABLED=1 NGRAM_HINT_PRECOMPUTE_OUTSIDE=0 TOKEN_ORDER=16 TOKEN_THRESHOLD=0.800 TOKEN_BOOST=2.625
WITHIN_TAU=99.0 WITHIN_BOOST=0.0 WORD_TAU=99.0 WORD_BOOST=0.0 AGREE_ADD_BOOST=0.0 DATA_DIR=./data CASEOPS_ENABLED=1
SMEAR_GATE_BOS_FIX=0 TTT_LORA_EMA_DECAY=0.0 TTT_UPDATE_EVERY=1 PHASED_TTT_PREFIX_DOCS=2500 PHASED_TTT_NUM_PHASES=1
EVAL_SEQ_LEN=2560 TTT_EVAL_SEQ_LEN=2560 COMPRESSOR=pergroup MATRIX_CLIP_SIGMAS=12.85 ATTN_CLIP_SIGMAS=13.0 MLP_CLIP_SIGMAS=11.5
EMBED_BITS=7 EMBED_CLIP_SIGMAS=14.0 MATRIX_LR=0.028 MIN_LR=0.1 WARMDOWN_FRAC=0.85 BETA2=0.99 FUSED_CE_ENABLED=1
SPARSE_ATTN_GATE_ENABLED=1 SPARSE_ATTN_GATE_SCALE=0.5 SMEAR_GATE_ENABLED=1 GATE_WINDOW=12 LQER_ENABLED=1 LQER_RANK=4
LQER_TOP_K=3 LQER_FACTOR_BITS=4 LQER_ASYM_ENABLED=1 LQER_ASYM_GROUP=32 TTT_WARM_START_A=1 TTT_LORA_RANK=80 TTT_BETA2=0.99
TTT_WEIGHT_DECAY=2.0 TTT_LORA_LR=8e-5 GPTQ_RESERVE_SECONDS=0.5 GPTQ_CALIBRATION_BATCHES=16 TTT_K_LORA=0 TTT_O_LORA=1
TTT_MLP_LORA=1 EMA_DECAY=0.9965 SEED=42
"""


def settings_of(text: str) -> dict[str, str]:
    return dict(setting.split("=", 1) for setting in text.split())


def test_every_variable_of_pr_1105_is_used_refused_or_named():
    env = settings_of(H4)
    assert len(env) >= 95
    refused = errors_of(env | {"PRESET": "s05"})
    used = set(FIELDS) | set(tg.ALIASES)
    noted = {name for name in env if tg.published(name, env)[1]}
    for name in env:
        assert (name in used) + (name in noted) + (f"\n{name}=" in f"\n{refused}") == 1, name
    on = {"MUON_BETA2", "GPTQ_CALIB_BATCHES", "SWA_ENABLED", "SWA_EVERY", "LATE_QAT_THRESHOLD", "MIXED_QUANT", "TARGET_MB",
          "CONTROL_TENSOR_NAME_PATTERNS", "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS"} | {n for n in env if n.startswith("FUSED_NGRAM_")}
    assert {line.split("=")[0] for line in refused.splitlines()} == on
    assert {"HEAD_LR", "BANK_SPLIT", "MTP_LOSS_WEIGHT", "LAWA_K", "BIGRAM_DIM", "NGRAM_BUCKETS", "VE_LAYERS", "DTG_ENABLED"} <= noted
    cfg = tg.config_from_env({name: value for name, value in env.items() if name not in on} | {"PRESET": "s05"})
    assert (cfg.min_lr, cfg.val_batch_tokens, cfg.vocab_size) == (0.05, 524288, 4608)


def test_command_of_pr_1019_does_not_run_without_its_bigram():
    message = errors_of(settings_of("BIGRAM_VOCAB_SIZE=3072 BIGRAM_DIM=112 WARMDOWN_ITERS=4000 SEED=314"))
    assert message.count("there is no bigram hash embedding") == 2 and len(message.splitlines()) == 2


def test_command_of_the_clean_s35_is_accepted():
    env = settings_of(S35) | {"TRAIN_SEQ_LEN": "2048", "TRAIN_SEQ_SCHEDULE": ""}
    cfg = tg.config_from_env(env)
    assert (cfg.ngram_tilt_enabled, cfg.matrix_lr, cfg.lqer_asym_group, cfg.smear_gate_bos_fix) == (True, 0.028, 32, False)
    named = {note.split(" (")[0] for note in tg.without_effect(cfg, env)}
    assert named >= {"ASYM_LOGIT_RESCALE", "WITHIN_TAU", "WORD_BOOST", "AGREE_ADD_BOOST", "TTT_LORA_EMA_DECAY", "TTT_UPDATE_EVERY"}


@pytest.mark.parametrize("alias, name", tg.ALIASES.items())
def test_alias(alias, name):
    f = FIELDS[name]
    value = {"VAL_BATCH_TOKENS": "4096", "MIN_LR": "0.25"}[name]
    cfg = tg.config_from_env({alias: value})
    assert cfg == tg.config_from_env({name: value}) == tg.config_from_env({name: value, alias: value}) != tg.Config()
    assert tg.config_from_env({"PRESET": "s05", alias: value}) == tg.config_from_env({"PRESET": "s05", name: value})
    message = errors_of({name: value, alias: as_text(f.default)})
    assert alias in message and name in message and message.endswith("are two names of one variable")
    assert errors_of({alias: "x"}) == f"{alias}='x': expected {tg.accepted(f)}"
    assert tg.overrides(cfg) == {name: value}


def test_published_dead_names_are_refused():
    for name in ("LQER_GROUP_SIZE", "TTT_LR", "TTT_NO_QV_MASK", "CONTROL_TENSOR_NAME_PATTERNS"):
        assert name in errors_of({name: "1"})


# ---- presets and stages


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_preset(preset):
    cfg = tg.config_from_env({"PRESET": preset})
    assert cfg.preset == preset
    settings = dict(setting.split("=", 1) for setting in tg.PRESETS[preset].split())
    assert len(settings) == len(tg.PRESETS[preset].split()) and set(settings) <= set(FIELDS)
    for name, f in FIELDS.items():
        value = getattr(cfg, f.name)
        assert type(value) is type(f.default)
        assert value == (tg.parse_knob(f, settings[name]) if name in settings else preset if name == "PRESET" else f.default)
    assert tg.preset_values(preset) == dataclasses.asdict(cfg)


def test_hand_set_variable_wins_over_the_preset():
    assert tg.config_from_env({"PRESET": "s55", "TTT_BATCH_SIZE": "24"}).ttt_batch_size == 24
    assert tg.config_from_env({"PRESET": "s55"}).ttt_batch_size == 64


def test_unknown_preset_is_refused():
    message = errors_of({"PRESET": "s99"})
    assert "PRESET='s99'" in message and all(name in message for name in tg.PRESETS)


@pytest.mark.parametrize("alias, stage", [("PREQUANT_ONLY", "train"), ("QUANTIZE_ONLY", "quantize"), ("TTT_EVAL_ONLY", "eval")])
def test_stage_alias(alias, stage):
    assert tg.config_from_env({alias: "1"}) == tg.config_from_env({"STAGE": stage})
    assert tg.config_from_env({alias: "0"}) == tg.Config()
    assert alias in errors_of({alias: "1", "STAGE": "train"})


def test_two_stage_aliases_are_refused():
    assert "only one of" in errors_of({"PREQUANT_ONLY": "1", "TTT_EVAL_ONLY": "1"})


# ---- rules between variables


@pytest.mark.parametrize("changes, message", [
    (dict(model_dim=36, num_heads=8), "divisible by NUM_HEADS"),
    (dict(num_kv_heads=3), "divisible by NUM_KV_HEADS"),
    (dict(rope_dims=5), "ROPE_DIMS=5 must be even"),
    (dict(rope_dims=16), "at most the head size 8"),
    (dict(gate_window=33), "GATE_WINDOW=33 must be at most MODEL_DIM=32"),
    (dict(loop_start=3, loop_end=2), "LOOP_START <= LOOP_END < NUM_LAYERS"),
    (dict(loop_end=4), "LOOP_START <= LOOP_END < NUM_LAYERS"),
    (dict(gated_attn_enabled=True), "at most one of ATTN_OUT_GATE_ENABLED"),
    (dict(attn_out_gate_enabled=True), "at most one of ATTN_OUT_GATE_ENABLED"),
    (dict(stage="train", ttt_eval_only=True), "only one of STAGE"),
    (dict(stage="train"), None),
    (dict(prequant_only=True, quantize_only=True), "only one of STAGE"),
    (dict(ttt_adam_kernel="triton", ttt_beta1=0.9), "needs TTT_BETA1=0"),
    (dict(train_batch_tokens=500), "must be a multiple of TRAIN_MICROBATCH_TOKENS"),
    (dict(train_seq_len=128), "TRAIN_SEQ_LEN=128 must be the longest context"),
    (dict(train_seq_schedule=""), None),
    (dict(train_seq_schedule="", train_seq_len=100), "must be a multiple of every context length, not of [100]"),
    (dict(train_seq_schedule="48@0.5,64@1"), "must be a multiple of every context length, not of [48]"),
    (dict(train_seq_schedule="32@0.5"), "TRAIN_SEQ_LEN=64 must be the longest context"),
    (dict(train_seq_schedule="32-0.5"), "expected a comma list of A@B"),
    (dict(train_seq_schedule="32.5@0.5"), "expected LENGTH@END_FRACTION"),
    (dict(max_wallclock_seconds=3.0, gptq_reserve_seconds=4.0), "GPTQ_RESERVE_SECONDS=4 leaves nothing"),
    (dict(train_seq_schedule_mode="wallclock", iterations=0), "needs ITERATIONS > 0"),
    (dict(eval_method="sliding", eval_stride=65), "EVAL_STRIDE=65 must be at most EVAL_SEQ_LEN=64"),
    (dict(eval_stride=65), None),
    (dict(slot="causal", ttt_enabled=False), "SLOT=causal needs sliding windows"),
    (dict(slot="published", eval_method="sliding"), "SLOT=published needs sliding windows"),
    (dict(slot="causal", eval_method="sliding", ttt_enabled=False), None),
    (dict(lqer_asym_group=48), "multiples of LQER_ASYM_GROUP=48"),
    (dict(lqer_asym_group=48, lqer_asym_enabled=False), None),
    (dict(global_ttt_chunk_tokens=63), "GLOBAL_TTT_CHUNK_TOKENS=63 must hold at least one sequence"),
    (dict(global_ttt_chunk_tokens=63, phased_ttt_enabled=False), None),
    (dict(num_loops=0, loop_start=3, loop_end=0), None),
])  # fmt: skip
def test_rule(changes, message):
    env = tiny_env(**changes)
    if message is None:
        assert tg.config_from_env(env) == tiny_config(**changes)
        return
    assert message in errors_of(env)
    with pytest.raises(ValueError, match=re.escape(message)):  # a Config can not be built around the check either
        tiny_config(**changes)


@pytest.mark.parametrize("text, default, expected", [
    ("1024@0.1,2048@0.7,3072@1", 3072, ((1024, 0.1), (2048, 0.7), (3072, 1.0))),
    ("1024@0.5", 1024, ((1024, 0.5), (1024, 1.0))),
    ("3072@1, 1024@0.1 ,2048@0.7,", 3072, ((1024, 0.1), (2048, 0.7), (3072, 1.0))),
    ("", 777, ((777, 1.0),)),
    (" , ", 777, ((777, 1.0),)),
])  # fmt: skip
def test_schedule_parsing(text, default, expected):
    assert tg.parse_seq_schedule(text, default) == expected


@pytest.mark.parametrize("progress, context", [(0, 1024), (0.1, 1024), (0.1001, 2048), (0.7, 2048), (0.7001, 3072), (1, 3072)])
def test_schedule_selects_the_stage_that_has_not_ended(progress, context):
    assert tg.context_length(tg.config_from_env({"TRAIN_SEQ_SCHEDULE": "1024@0.1,2048@0.7,3072@1"}), progress) == context


def test_short_schedule_must_name_the_longest_context():
    assert "TRAIN_SEQ_LEN=3072" in errors_of({"TRAIN_SEQ_SCHEDULE": "1024@0.5"})
    cfg = tg.config_from_env({"TRAIN_SEQ_SCHEDULE": "1024@0.5", "TRAIN_SEQ_LEN": "1024"})
    assert [tg.context_length(cfg, p) for p in (0.0, 0.6, 1.0)] == [1024] * 3


# ---- what a run says about its variables


def noted(env: dict) -> str:
    return "\n".join(tg.without_effect(tg.config_from_env(env), env))


@pytest.mark.parametrize("dead, switch", [
    ({"EVAL_STRIDE": "64"}, {"EVAL_METHOD": "sliding"}),
    ({"ROPE_TRAIN_SEQ_LEN": "1024"}, {"ROPE_YARN": "1"}),
    ({"TOKEN_ORDER": "8"}, {"NGRAM_TILT_ENABLED": "1"}),
    ({"SLOT_STEPS": "3"}, {"SLOT": "causal", "EVAL_METHOD": "sliding", "TTT_ENABLED": "0"}),
    ({"LQER_FACTOR_BITS": "3"}, {"LQER_ASYM_ENABLED": "0", "QUANT": "s14"}),
    ({"MLP_CLIP_SIGMAS": "9"}, {"QUANT": "s14"}),
    ({"TTT_SHORT_CHUNK_SIZE": "3"}, {"TTT_SHORT_SCORE_FIRST_STEPS": ""}),
    ({"CUTLASS_PATH": "cutlass"}, {"MLP_BACKWARD": "cutlass", "MLP_KERNEL": "act_grad"}),
    ({"MLP_BACKWARD": "triton"}, {"MLP_KERNEL": "lsb"}),
    ({"ATTN_OUT_GATE_SRC": "q"}, {"SPARSE_ATTN_GATE_ENABLED": "0", "ATTN_OUT_GATE_ENABLED": "1"}),
])  # fmt: skip
def test_variables_without_effect_are_named_with_the_reason(dead, switch):
    (name,) = dead
    assert re.search(rf"^{name} \(.+\)$", noted(dead), re.M)
    assert name not in noted(dead | switch)
    assert name not in noted(switch), "nobody set it"


def test_switched_off_features_name_their_variables():
    notes = noted({"TTT_ENABLED": "0", "TTT_LORA_RANK": "8", "GLOBAL_TTT_LR": "0.1", "NUM_LOOPS": "0", "LOOP_START": "1"})
    assert all(name in notes for name in ("TTT_LORA_RANK", "GLOBAL_TTT_LR", "LOOP_START"))
    assert "TTT_ENABLED (" not in notes


# When a variable has no effect, written down a second time: (variables, function of the configuration).
TTT = {name for name in tg.Config.__dataclass_fields__ if "ttt_" in name} - {"ttt_enabled", "ttt_eval_only"}
S14_STEPS = {name for name in tg.Config.__dataclass_fields__ if name.startswith(("awq_", "lqer_"))
             or name.endswith(("_clip_sigmas", "_bits"))}  # fmt: skip
DEAD = (
    ({"eval_stride"}, lambda c: c.eval_method != "sliding"),
    ({"token_order", "token_threshold", "token_boost"}, lambda c: not c.ngram_tilt_enabled),
    ({"slot_lr", "slot_steps"}, lambda c: c.slot == "off"),
    ({"rope_train_seq_len"}, lambda c: not c.rope_yarn),
    ({"attn_out_gate_src"}, lambda c: c.attn_gate != "out"),
    ({"gated_attn_init_std"}, lambda c: c.attn_gate != "dense"),
    ({"sparse_attn_gate_init_std", "sparse_attn_gate_scale"}, lambda c: c.attn_gate != "sparse"),
    ({"gated_attn_quant_gate"}, lambda c: c.attn_gate not in ("dense", "sparse")),
    ({"xsa_kernel"}, lambda c: not c.xsa_last_n or c.attn_gate == "none"),
    ({"mlp_backward"}, lambda c: c.mlp_kernel == "eager"),
    ({"cutlass_path"}, lambda c: c.mlp_backward != "cutlass"),
    ({"fused_ce_kernel"}, lambda c: not c.fused_ce_enabled),
    ({"window_size"}, lambda c: "S" not in c.window_pattern),
    ({"loop_start", "loop_end", "enable_looping_at"}, lambda c: not c.num_loops),
    ({"smear_gate_bos_fix"}, lambda c: not c.smear_gate_enabled),
    ({"warmdown_frac"}, lambda c: c.warmdown_iters > 0),
    ({"seq_change_warmup_steps"}, lambda c: len(c.seq_schedule) == 1),
    ({"embed_bits", "embed_clip_sigmas", "mlp_clip_sigmas", "attn_clip_sigmas"}, lambda c: c.quant == "s05"),
    ({"gptq_calibration_batches", "gptq_reserve_seconds", "rd_reserve_seconds"}, lambda c: c.gptq_calibration == "self"),
    (S14_STEPS, lambda c: c.quant == "rd"),
    ({"n_int6_layers"}, lambda c: c.quant != "s05"),
    ({"rd_loss", "rd_reserve_seconds"}, lambda c: c.quant != "rd"),
    ({"target_bytes"}, lambda c: c.quant == "s14"),
    ({"awq_lite_bits", "awq_lite_group_size", "awq_lite_group_top_k"}, lambda c: not c.awq_lite_enabled),
    ({"lqer_rank", "lqer_top_k", "lqer_factor_bits", "lqer_asym_enabled", "lqer_asym_group"}, lambda c: not c.lqer_enabled),
    ({"lqer_factor_bits"}, lambda c: c.lqer_asym_enabled),
    ({"lqer_asym_group"}, lambda c: not c.lqer_asym_enabled),
    ({"compile_allow_recompiles"}, lambda c: c.compile_backend == "none" and not c.cuda_graphs),
    ({"gptq_reserve_seconds", "rd_reserve_seconds"}, lambda c: not c.max_wallclock_seconds),
    (TTT, lambda c: not c.ttt_enabled),
    ({"ttt_bucket"}, lambda c: not c.cuda_graphs or c.rope_yarn),
    ({name for name in TTT if not name.startswith("ttt_")} - {"phased_ttt_enabled"}, lambda c: not c.phased_ttt_enabled),
    ({"ttt_short_chunk_size", "ttt_short_score_first_steps", "ttt_short_doc_len"}, lambda c: not c.ttt_short_score_first_enabled),
    ({"ttt_short_chunk_size", "ttt_short_doc_len"}, lambda c: c.ttt_short_score_first_steps),
)
CHOICES = {f.name: f.metadata["choices"] or [False, True] for f in FIELDS.values()
           if (f.metadata["choices"] or f.type == "bool") and f.name not in ("preset", *tg.STAGE_FLAGS)} | dict(
    num_loops=[0, 1, 2], xsa_last_n=[0, 3], window_pattern=["L", "S", "SL", "LL"], warmdown_iters=[0, 5],
    train_seq_schedule=["", "3072@1.0", "1024@0.5,3072@1"], max_wallclock_seconds=[0.0, 600.0],
    ttt_short_score_first_steps=["", "256:8"])  # fmt: skip


def test_a_variable_has_no_effect_exactly_when_its_needs_are_not_met():
    """On random configurations; whatever has a condition is met in both states."""
    rng, seen, count = random.Random(0), set(), 0
    every = dict.fromkeys(FIELDS, "x")
    while count < 400:
        changes = {name: rng.choice(values) for name, values in CHOICES.items() if rng.random() < 0.4}
        try:
            cfg = tg.Config(**changes)
        except ValueError:
            continue
        count += 1
        notes = tg.without_effect(cfg, every)
        dead = {note.split(" (")[0].lower() for note in notes}
        assert len(dead) == len(notes) and all(re.fullmatch(r"\w+ \(.+\)", note) for note in notes)
        assert dead == set().union(*(names for names, is_dead in DEAD if is_dead(cfg))), changes
        seen |= {(name, name in dead) for name in tg.Config.__dataclass_fields__ if tg.needs_of(name)}
    conditional = {name for name in tg.Config.__dataclass_fields__ if tg.needs_of(name)}
    assert conditional == set().union(*(names for names, _ in DEAD))
    assert {(name, state) for name in conditional for state in (False, True)} == seen


@pytest.mark.parametrize("needs, reason", [
    ("", ""), ("ttt_enabled", ""), ("!ttt_enabled", "TTT_ENABLED is 1"), ("rope_yarn", "ROPE_YARN is 0"), ("!rope_yarn", ""),
    ("slot=off", ""), ("slot!=off", "SLOT is off"), ("quant=s14", "QUANT is rd"), ("quant!=rd", "QUANT is rd"), ("quant!=s14", ""),
    ("warmdown_iters", "WARMDOWN_ITERS is 0"), ("!warmdown_iters", ""), ("num_loops=2", ""), ("num_loops=1", "NUM_LOOPS is 2"),
    ("run_id", "RUN_ID is blank"), ("!run_id", ""), ("!window_pattern", "WINDOW_PATTERN is L"),
    ("rope_yarn|slot!=off", "ROPE_YARN is 0 and SLOT is off"), ("rope_yarn|ttt_enabled", ""), ("ttt_enabled|rope_yarn", ""),
    ("ttt_enabled,rope_yarn", "ROPE_YARN is 0"), ("rope_yarn,slot!=off", "ROPE_YARN is 0"), ("windowed", "WINDOWED is 0"),
    ("attn_gate=sparse", ""), ("lqer_enabled", "QUANT is rd"), ("!lqer_enabled", "LQER_ENABLED is 1"),
    ("lqer_asym_enabled|rope_yarn", "QUANT is rd and ROPE_YARN is 0"),
])  # fmt: skip
def test_grammar_of_needs(needs, reason):
    assert tg.unmet(tg.Config(), needs) == reason


def test_a_variable_needs_the_switch_whose_name_it_continues():
    assert tg.needs_of("awq_lite_bits") == "awq_lite_enabled" and tg.needs_of("awq_lite_enabled") == "quant!=rd"
    assert tg.needs_of("lqer_asym_group") == "lqer_asym_enabled" and tg.needs_of("lqer_asym_enabled") == "lqer_enabled"
    assert tg.needs_of("ttt_short_score_first_steps") == "ttt_short_score_first_enabled"
    assert tg.needs_of("ttt_enabled") == tg.needs_of("ttt_eval_only") == tg.needs_of("num_layers") == ""


@pytest.mark.parametrize("needs", ["no_such_field", "slot=off,no_such_field", "slot==off", "a b", "!no_such_field"])
def test_needs_are_checked_at_import(needs, monkeypatch):
    tg.check_needs()
    changed = dataclasses.field(default=3, metadata=dict(FIELDS["SLOT_LR"].metadata) | dict(needs=needs))
    monkeypatch.setitem(tg.VARIABLES, "SLOT_LR", changed)
    with pytest.raises((AttributeError, TypeError)):
        tg.check_needs()


HAND_SET = {
    "nothing": {},
    "tiny": tiny_env(),
    "stage alias": {"PREQUANT_ONLY": "1"},
    "s55": {"PRESET": "s55"},
    "demo": {"PRESET": "demo"},
    "s55 with values of s14": {"PRESET": "s55", "TTT_BATCH_SIZE": "24", "TTT_MASK": "no_qv", "EVAL_INCLUDE_TAIL": "1"},
    "demo with a default": {"PRESET": "demo", "MAX_EVAL_SECONDS": "600", "COMPILE_SHAPE_WARMUP": "1"},
    "floats": {"MATRIX_LR": "0.1", "TTT_LORA_LR": "3e-5", "ADAM_EPS": "1e-10"},
}


@pytest.mark.parametrize("env", HAND_SET.values(), ids=HAND_SET)
def test_overrides_rebuild_the_configuration(env):
    cfg = tg.config_from_env(env)
    said = tg.overrides(cfg)
    assert tg.config_from_env(said) == cfg
    assert set(said) <= set(env) | {"STAGE"}, "only what was changed is said"


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(tg.PRESETS)), st.booleans(), st.floats(0, 5), st.integers(1, 64), st.sampled_from(["", "no_q", "no_qv"]),
       st.floats(0, 1, allow_subnormal=False))  # fmt: skip
def test_overrides_rebuild_any_configuration(preset, tail, lr, batch, mask, floor):
    values = dict(eval_include_tail=tail, matrix_lr=lr, ttt_batch_size=batch, ttt_mask=mask, min_lr=floor)
    cfg = tg.config_from_env({"PRESET": preset} | {k.upper(): as_text(v) for k, v in values.items()})
    assert {k: getattr(cfg, k) for k in values} == values
    assert tg.config_from_env(tg.overrides(cfg)) == cfg


WHERE_AND_WHO = ("seed", "run_id", "artifact_dir", "data_dir", "data_path", "tokenizer_path", "resume", "stage",
                 "prequant_only", "quantize_only", "ttt_eval_only", "checkpoint_seconds", "train_log_every", "compile_allow_recompiles",
                 "compile_cache_dir", "cutlass_path")
RECIPE = [f.name for f in FIELDS.values() if f.name not in (*WHERE_AND_WHO, "seeds_declared") and len(f.metadata["choices"]) != 1]


def other(name: str):
    f = FIELDS[name.upper()]
    if f.metadata["choices"]:
        return next(c for c in f.metadata["choices"] if c != f.default)
    return {"bool": lambda v: not v, "str": lambda v: v + "x", "int": lambda v: v + 1, "float": lambda v: v + 0.5}[f.type](f.default)


@pytest.mark.parametrize("name", WHERE_AND_WHO)
def test_hash_ignores_who_runs_where(name):
    assert tg.config_hash(probe(**{name: other(name)})) == tg.config_hash(tg.Config())


def test_hash_tells_recipes_apart():
    hashes = {tg.config_hash(tg.Config())} | {tg.config_hash(probe(**{name: other(name)})) for name in RECIPE}
    assert len(hashes) == len(RECIPE) + 1


# ---- the command line


def test_help_lists_every_variable():
    done = subprocess.run([sys.executable, str(ROOT / "train_gpt.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    listed(done.stdout, tg.Config())
    for line in tg.PUBLISHED.strip().splitlines():
        assert f" {line} " in " ".join(done.stdout.split()) + " "


def listed(text: str, cfg: tg.Config) -> None:
    """Hold that a help text has an entry for each variable: its value in cfg, meaning and range, in groups, 110 columns wide."""
    variables = text[text.index("The run:") : text.index("Published variables")]
    assert max(map(len, text.splitlines())) <= 110
    titles = [f.metadata["group"].capitalize() for f in FIELDS.values() if f.metadata["group"]]
    assert re.findall(r"^(\S.*):$", variables, re.M) == titles and len(set(titles)) == len(titles) >= 9
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=\S)|\n\S.*:$", variables, flags=re.M)]
    assert [e for e in entries if e][1:] == [
        f"{name}={as_text(getattr(cfg, f.name))} {f.metadata['doc']} ({tg.accepted(f)})" for name, f in FIELDS.items()]


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_help_shows_the_values_of_the_preset(preset, monkeypatch, capsys):
    code, out, err = run_main(monkeypatch, capsys, "--help", PRESET=preset)
    assert code == 0 and not err
    listed(out, tg.config_from_env({"PRESET": preset}))


def test_every_variable_has_a_meaning():
    assert all(len(f.metadata["doc"]) >= 5 or f.metadata["doc"] in ("SGD", "AdamW") for f in FIELDS.values())


def test_unknown_argument_exits_2(monkeypatch, capsys):
    code, out, err = run_main(monkeypatch, capsys, "--lr=3")
    assert code == 2 and "--lr=3" in err and "--help" in err and not out


def test_bad_configuration_exits_2_and_lists_everything(monkeypatch, capsys):
    code, out, err = run_main(monkeypatch, capsys, NUM_LAYERS="x", TTT_LR="1", MUON_LR="1", MODEL_DIM="511")
    assert code == 2 and not out and "Traceback" not in err
    assert all(name in err for name in ("NUM_LAYERS", "TTT_LR", "MUON_LR", "MODEL_DIM"))


def test_rules_run_once(monkeypatch):
    calls, rules = [], tg.rule_violations
    monkeypatch.setattr(tg, "rule_violations", lambda c: calls.append(c) or rules(c))
    tg.config_from_env({"PRESET": "demo", "SEED": "3", "TTT_EVAL_ONLY": "1"})
    assert len(calls) == 1
    errors_of({"MODEL_DIM": "510"})
    assert len(calls) == 2


def test_rules_name_their_variables():
    """By the names in a rule's sentence config_from_env knows that it is about a value refused before."""
    broken = dict(model_dim=510, num_heads=7, num_kv_heads=3, rope_dims=5, rope_yarn=True, window_pattern="", gate_window=600,
                  loop_start=9, attn_out_gate_enabled=True, stage="train", quantize_only=True, train_microbatch_tokens=7,
                  train_seq_len=9, max_wallclock_seconds=1.0, mlp_backward="cutlass", eval_method="sliding", eval_stride=4000,
                  slot="causal", lqer_rank=1000, ttt_adam_kernel="triton", ttt_beta1=0.5, global_ttt_chunk_tokens=1,
                  ttt_chunk_size=9999, seeds_declared="a")
    rules = list(tg.rule_violations(probe(**broken)))
    assert len(rules) >= 20
    for rule in rules:
        assert set(re.findall(r"\w+", rule)) & set(FIELDS), rule
    involved = {f.name for name, f in FIELDS.items() if any(name in rule for rule in rules)}
    assert involved >= set(broken) - {"rope_yarn"}


def test_launch_comes_from_torchrun():
    assert tg.launch_from_env({}) == tg.Launch(0, 0, 1)
    assert tg.launch_from_env({"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}) == tg.Launch(9, 1, 16)
    with pytest.raises(ValueError, match=r"RANK='first': expected a whole number.*\nWORLD_SIZE='-1': expected") as e:
        tg.launch_from_env({"RANK": "first", "LOCAL_RANK": "1", "WORLD_SIZE": "-1"})
    assert "LOCAL_RANK" not in str(e.value)


def test_tiny_fixture_is_one_configuration_in_two_spellings():
    assert tg.config_from_env(tiny_env()) == tiny_config() == tg.Config(**TINY)


@pytest.mark.parametrize("given, seconds", [({}, 10), (dict(quant="s14"), 4), (dict(gptq_reserve_seconds=0.5), 6.5),
                                            (dict(gptq_reserve_seconds=0.0, rd_reserve_seconds=0.0), 0),
                                            (dict(quant="s05", gptq_calibration="self"), 0)])
def test_a_calibration_with_gradients_gets_more_time(given, seconds):
    cfg = tg.Config(**given)
    assert cfg.reserve_seconds == seconds and cfg.train_budget_seconds == 600 - seconds
