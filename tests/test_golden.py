"""Golden vectors: the product against numbers that published code computed (PR #2014 and PR #1105, on a CPU in fp32).

tests/data has copies of the small files of ../shared/golden: all of two_lanes.npz, and of s05.npz the parts that this script has.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config
from spec_model import PlainNetwork

import train_gpt as tg

DATA = Path(__file__).parent / "data"
SHARED = ROOT.parent / "shared" / "golden"
SITES = ("q", "k", "v", "o", "mlp", "head")


def arrays_of(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(DATA / name).items() if value.dtype.kind != "U"}


@pytest.fixture(scope="module")
def two_lanes():
    arrays = arrays_of("two_lanes.npz")
    cfg = tiny_config(num_layers=5, model_dim=48, vocab_size=200, mlp_mult=2.0, xsa_last_n=4, gate_window=12)
    model = tg.GPT(cfg).double()
    model.load_state_dict({name[2:]: t for name, t in arrays.items() if name.startswith("w/")})
    return model, arrays


@pytest.fixture(scope="module")
def s05():
    return arrays_of("s05_small.npz")


@pytest.mark.parametrize("copy, original", [("two_lanes.npz", "two_lanes.npz"), ("s05_small.npz", "s05.npz")])
def test_the_copies_are_copies(copy, original):
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not here")
    published = np.load(SHARED / original)
    for name, array in np.load(DATA / copy).items():
        assert np.array_equal(array, published[name]), name


# ---- the two-lane network of PR #2014


@pytest.mark.parametrize("looping", [False, True])
def test_two_lane_logits(two_lanes, looping):
    model, arrays = two_lanes
    layers = tg.layer_order(model.cfg, looping)
    tokens, targets = arrays["tokens"], arrays["targets"]
    logits = arrays[f"logits_packed_loop{int(looping)}"].double()
    nats = -logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
    with torch.no_grad():
        ours = model(tokens, targets, layers=layers, segments=tg.Segments(arrays["cu_seqlens"], 64))
        dense = model(tokens, None, layers=layers)
    torch.testing.assert_close(ours.double(), nats, rtol=0, atol=2e-5)
    torch.testing.assert_close(dense, arrays[f"logits_dense_loop{int(looping)}"], rtol=0, atol=2e-5)
    bounds = torch.unique(arrays["cu_seqlens"]).tolist()
    spec = PlainNetwork(model.state_dict(), model.cfg).nats(tokens[0], targets[0], [*itertools.pairwise(bounds)], looping)
    torch.testing.assert_close(spec, nats[0], rtol=0, atol=2e-5)


def test_lambdas_read_the_other_way_round_would_be_seen(two_lanes):
    model, arrays = two_lanes
    turned = tg.GPT(model.cfg).double()
    turned.load_state_dict(model.state_dict())
    with torch.no_grad():
        turned.parallel_post_lambdas.copy_(model.parallel_post_lambdas.mT)
        logits = turned(arrays["tokens"], None, layers=tg.layer_order(model.cfg, True))
    assert (logits - arrays["logits_dense_loop1"]).abs().max() > 0.05


def test_two_lane_adapters(two_lanes):
    model, arrays = two_lanes
    layers = tg.layer_order(model.cfg, True)
    scale = arrays["lora_scale"].item()

    def lora(site: str) -> tg.Lora:
        names = ["lm_head_lora"] if site == "head" else [f"{site}_loras.{depth}" for depth in range(len(layers))]
        A, B = (torch.stack([arrays[f"lora/{name}.{factor}"] for name in names]) for factor in "AB")
        return tg.Lora(A[0], B[0], scale) if site == "head" else tg.Lora(A, B, scale)

    adapters = tg.Adapters(**{site: lora(site) for site in SITES})
    with torch.no_grad():
        ours = model(arrays["tokens_ttt"], arrays["targets_ttt"], layers=layers, adapters=adapters)
    torch.testing.assert_close(ours, arrays["ttt_nats"], rtol=0, atol=1e-4)  # losses up to 61


# ---- parts of PR #1105


def exact_rotary_tables(cfg, length, context, device):
    """`rotary_tables` with frequencies that are not rounded to bf16, as in PR #1105."""
    exponents = torch.arange(0, cfg.rope_dims, 2, dtype=torch.float32) / cfg.rope_dims
    angles = torch.arange(length, dtype=torch.float32)[:, None] * cfg.rope_base**-exponents
    return angles.cos()[:, None], angles.sin()[:, None]


def test_one_stream_logits_and_loss(s05, monkeypatch):
    monkeypatch.setattr(tg, "rotary_tables", exact_rotary_tables)
    cfg = tiny_config(
        vocab_size=96, num_layers=5, model_dim=64, mlp_mult=3.5, rope_dims=8, xsa_last_n=5, num_loops=0, parallel_start_layer=0,
        smear_gate_enabled=False, sparse_attn_gate_enabled=False)
    model = tg.GPT(cfg)
    model.load_state_dict({name.removeprefix("h4_plain/w/"): t for name, t in s05.items() if name.startswith("h4_plain/w/")})
    tokens, targets, layers = s05["h4_plain/tokens"], s05["h4_plain/targets"], tg.layer_order(cfg, False)
    with torch.no_grad():
        logits = model(tokens, None, layers=layers)
        nats = model(tokens, targets, layers=layers)
    torch.testing.assert_close(logits, s05["h4_plain/logits"], rtol=0, atol=5e-5)
    assert nats.double().mean().item() == pytest.approx(s05["h4_plain/loss"].item(), rel=1e-6)


def test_own_value_removal(s05):
    torch.testing.assert_close(tg.without_own_value(s05["xsa/y"], s05["xsa/v"]), s05["xsa/out"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("levels, bits", [(15, 5), (31, 6)])
@pytest.mark.parametrize("name, scale", [("", 1.0), ("small_", 1 / 40)])
def test_gptq(s05, levels, bits, name, scale):
    """Integers and steps exactly as published, one dead column included; small: every row's step is the floor."""
    cfg, hessians = tiny_config(awq_lite_enabled=False, lqer_enabled=False), tg.Hessians()
    hessians.H["site"], hessians.count["site"] = s05["quant/H_raw"].clone(), 1
    matrix = tg.GptqInput("w", s05["quant/W"] * scale, bits, 0.0, "site")
    parts = tg.run_gptq(cfg, [matrix], hessians, tg.clips_by_percentile, damping=0.01)["w"].parts
    assert torch.equal(parts["gptq", "q"], s05[f"quant/{name}gptq{levels}_q"])
    assert torch.equal(parts["gptq", "scale"], s05[f"quant/{name}gptq{levels}_s"])


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_muon(s05, shape, monkeypatch):
    """Two steps with the published coefficients in the place of Polar Express; published arithmetic is bf16, hence the tenth."""
    monkeypatch.setattr(tg, "POLAR_EXPRESS", ((3.4445, -4.7750, 2.0315),) * 5)
    lr, momentum, wd = 0.02, 0.95, 0.04
    gradients, p = s05[f"muon/{shape}_g"], s05[f"muon/{shape}_p0"]
    torch.testing.assert_close(
        tg.polar_express(gradients[0].double(), 5), s05[f"muon/{shape}_ns5_fp64_of_g0"], rtol=0, atol=1e-9)
    cfg, state = tiny_config(muon_backend_steps=5, muon_row_normalize=False), {}
    for step in (0, 1):
        update, state = tg.muon(gradients[step], state, cfg, momentum)
        published = s05[f"muon/{shape}_p{step + 1}"]
        ours = p * (1 - lr * wd) - lr * update
        assert (ours - published).abs().max() < 0.1 * (published - p).abs().max()
        p = published


def test_learning_rate_and_momentum(s05):
    cfg = tg.Config(
        warmdown_iters=4000, min_lr=0.05, max_wallclock_seconds=600.0, gptq_calibration="self", muon_momentum=0.99,
        muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500)
    for step, ms, expected in zip(s05["lr/steps"].tolist(), s05["lr/ms"].tolist(), s05["lr/scale"].tolist(), strict=True):
        ours = tg.lr_scale(cfg, ms / 600_000, step, ms / 1000 / step if step else 0.0)
        assert ours == pytest.approx(expected, abs=1e-9), step
    for step, expected in zip(s05["lr/momentum_steps"].tolist(), s05["lr/momentum"].tolist(), strict=True):
        assert tg.muon_momentum(cfg, step) == pytest.approx(expected, abs=1e-12)
