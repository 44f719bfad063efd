"""CONFIG: the published settings are the defaults, and a wrong variable never starts a run."""

import dataclasses
import math
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
        env = {name: values[-1]}
        cfg = tg.config_from_env(env)
        assert cfg == tg.Config()
        (note,) = tg.without_effect(cfg, env)
        assert note.startswith(f"{name} (")
        return
    f = FIELDS[name]
    assert tg.parse_knob(f, values[-1]) == f.default, "the default is the record"
    assert getattr(tg.config_from_env({name: values[-1]}), f.name) == f.default
    tg.parse_knob(f, values[0])  # the published code's own default is accepted as well


def test_whole_published_environment_is_the_default():
    assert tg.config_from_env(S14_ENV) == tg.Config()


@pytest.mark.parametrize("name", UNVALUED)
def test_variable_published_without_value_is_known(name):
    assert name in FIELDS or name in tg.GONE


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
    out = [("abc", kind), ("", kind)] + ([("1.5", kind)] if f.type == "int" else [("nan", "expected a value")])
    lo, hi = f.metadata["lo"], f.metadata["hi"]
    return out + [(str(v), f"[{lo}, {hi}]") for v in (lo - 1, hi + 1) if math.isfinite(v)]


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


@pytest.mark.parametrize("name", [
    "PATH", "HOME", "NCCL_NET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR",
    "TORCHELASTIC_RUN_ID", "TRAINING_JOB", "LOGNAME", "TRITON_CACHE_DIR", "XDG_CACHE_HOME",
])  # fmt: skip
def test_foreign_variable_is_ignored(name):
    assert tg.config_from_env({name: "anything"}) == tg.Config()


@pytest.mark.parametrize("name", tg.REFUSED)
def test_refused_variable_says_why(name):
    assert errors_of({name: "1"}) == f"{name}: {tg.REFUSED[name]}"


@pytest.mark.parametrize("name", tg.GONE)
def test_gone_variable_is_accepted_where_it_changes_nothing(name):
    accepted, why = tg.GONE[name]
    env = {name: "anything" if accepted is None else accepted}
    cfg = tg.config_from_env(env)
    assert cfg == tg.Config() and tg.without_effect(cfg, env) == [f"{name} ({why})"]
    if accepted is not None:
        assert errors_of({name: "other"}) == f"{name}='other': only {accepted!r} is left: {why}"


def test_published_dead_names_are_refused():
    assert {"LQER_GROUP_SIZE", "TTT_LR", "TTT_NO_QV_MASK", "CONTROL_TENSOR_NAME_PATTERNS"} <= set(tg.REFUSED)


# ---- presets and stages


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_preset(preset):
    cfg = tg.config_from_env({"PRESET": preset})
    assert cfg.preset == preset
    for name, value in tg.PRESETS[preset].items():
        assert getattr(cfg, name) == value
        assert type(getattr(cfg, name)) is type(FIELDS[name.upper()].default)
        tg.parse_knob(FIELDS[name.upper()], as_text(value))


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


def test_table_of_variables_without_effect_names_variables():
    names = [name for group, _, _ in tg.NO_EFFECT for name in group]
    assert set(names) <= set(tg.Config.__dataclass_fields__)


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
RECIPE = [name for name in list(tg.Config.__dataclass_fields__)[18:] if name not in WHERE_AND_WHO]  # past the group `run`


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
    lines = done.stdout.splitlines()
    for name, f in FIELDS.items():
        (line,) = [x for x in lines if x.split()[:1] == [name]]
        assert f.type in line and as_text(f.default) in line and f.metadata["doc"] in line
    for name in (*tg.REFUSED, *tg.PRESETS):
        assert any(x.strip().startswith(f"{name}:") for x in lines)


def test_every_variable_has_a_meaning():
    assert all(len(f.metadata["doc"]) >= 5 or f.metadata["doc"] in ("SGD", "AdamW") for f in FIELDS.values())


def test_unknown_argument_exits_2(monkeypatch, capsys):
    code, out, err = run_main(monkeypatch, capsys, "--lr=3")
    assert code == 2 and "--lr=3" in err and "--help" in err and not out


def test_bad_configuration_exits_2_and_lists_everything(monkeypatch, capsys):
    code, out, err = run_main(monkeypatch, capsys, NUM_LAYERS="x", TTT_LR="1", MUON_LR="1", MODEL_DIM="511")
    assert code == 2 and not out and "Traceback" not in err
    assert all(name in err for name in ("NUM_LAYERS", "TTT_LR", "MUON_LR", "MODEL_DIM"))


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
