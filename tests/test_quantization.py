"""QUANTIZATION: GPTQ against the paper written out, each codec's round trip, the tables, the Hessians."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import tiny_config

import train_gpt as tg


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(cols: int, seed: int = 0, samples: int = 4) -> torch.Tensor:
    """H of inputs that share few directions: full rank, far from diagonal."""
    n = samples * cols
    x = normal(n, cols // 4, seed=seed) @ normal(cols // 4, cols, seed=seed + 1) + 0.3 * normal(n, cols, seed=seed + 2)
    return x.T @ x


def none_protected(W: torch.Tensor) -> torch.Tensor:
    return torch.zeros(W.shape[0], W.shape[2], dtype=torch.bool)


def solve(W, H, clip=3.0, bits=4, protected=None, hi_bits=8, **kwargs):
    """`gptq` of one matrix; returns q and both scales."""
    mask = none_protected(W[None]) if protected is None else protected[None]
    return [t[0] for t in tg.gptq(W[None], H[None], clip * W[None].std(-1), bits, mask, hi_bits, **kwargs)]


def nearest(W: torch.Tensor, scale: torch.Tensor, q_max: int) -> torch.Tensor:
    return (W / scale.float()[:, None]).round().clamp(-q_max, q_max)


def slow_gptq(W: torch.Tensor, H: torch.Tensor, clip: float, bits: int) -> torch.Tensor:
    """Section 7.2 of the specification, one column after another, in fp64: the integers only."""
    W, H = W.double().clone(), H.double().clone()
    rows, cols = W.shape
    q_max = 2 ** (bits - 1) - 1
    scale = torch.tensor([np.float16(max(clip * float(row.std(unbiased=True)) / q_max, 1e-10)) for row in W], dtype=torch.float64)
    for j in range(cols):
        if H[j, j] == 0:
            H[j, j], W[:, j] = 1, 0
    H += 0.01 * H.diagonal().mean() * torch.eye(cols, dtype=torch.float64)
    perm = sorted(range(cols), key=lambda j: (-float(H[j, j]), j))
    W, H = W[:, perm], H[perm][:, perm]
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    out = torch.zeros(rows, cols, dtype=torch.float64)
    for j in range(cols):
        q = (W[:, j] / scale).round().clamp(-q_max, q_max)
        W[:, j:] -= ((W[:, j] - q * scale) / U[j, j])[:, None] * U[j, j:][None]
        out[:, perm[j]] = q
    return out


def test_identity_hessian_is_round_to_nearest():
    W = normal(24, 40)
    q, scale, _ = solve(W, torch.eye(40))
    assert torch.equal(q.float(), nearest(W, scale, 7))


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_hessian_weighted_error_is_below_round_to_nearest(bits):
    for seed in range(5):
        W, H = normal(16, 64, seed=seed), correlated(64, seed=10 * seed)
        q, scale, _ = solve(W, H, clip=2.5, bits=bits)
        step = scale.float()[:, None]
        errors = [torch.einsum("ri,ij,rj->", e, H, e) for e in (W - q * step, W - nearest(W, scale, 2 ** (bits - 1) - 1) * step)]
        assert errors[0] < errors[1]


@pytest.mark.parametrize(("rows", "cols", "bits", "block"), [(8, 32, 6, 128), (12, 48, 4, 16), (5, 130, 3, 128), (3, 7, 8, 4)])
def test_equals_the_paper_column_by_column(rows, cols, bits, block):
    W, H = normal(rows, cols, seed=cols), correlated(cols, seed=rows)
    H[2] = H[:, 2] = 0  # a dead column
    q = solve(W, H, clip=3.0, bits=bits, block=block)[0]
    assert torch.equal(q.double(), slow_gptq(W, H, 3.0, bits))


def test_batched_equals_one_by_one():
    W, H = normal(4, 9, 32), torch.stack([correlated(32, seed=s) for s in range(4)])
    mask = none_protected(W)
    mask[1, 8:16] = mask[3, :8] = True
    together = tg.gptq(W, H, 3 * W.std(-1), 4, mask, 8)
    for i in range(4):
        for a, b in zip(together, solve(W[i], H[i], protected=mask[i]), strict=True):
            assert torch.equal(a[i], b)


def test_protected_columns_get_the_fine_grid_and_nothing_else_does():
    W, H = normal(16, 48), correlated(48)
    mask = torch.zeros(48, dtype=torch.bool)
    mask[16:24] = True
    q, scale, hi_scale = solve(W, H, clip=3.0, bits=4, protected=mask)
    plain, same_scale, _ = solve(W, H, clip=3.0, bits=4)
    assert torch.equal(scale, same_scale)
    assert q[:, ~mask].abs().max() <= 7 < q[:, mask].abs().max() <= 127
    decoded = tg.Gptq.decode(tg.Gptq.encode(q, scale, hi_scale, [16], 8))
    assert torch.equal(decoded[:, mask], q[:, mask] * hi_scale.float()[:, None])
    assert torch.equal(decoded[:, ~mask], q[:, ~mask] * scale.float()[:, None])
    # Errors of the protected columns are passed on from the fine grid, so where H couples nothing the other columns stay as they were.
    assert torch.equal(solve(W, torch.eye(48), protected=mask)[0][:, ~mask], solve(W, torch.eye(48))[0][:, ~mask])
    assert not torch.equal(plain[:, ~mask], q[:, ~mask])
    assert torch.equal(solve(W, torch.eye(48), protected=mask)[0][:, mask].float(), nearest(W, hi_scale, 127)[:, mask])


def test_dead_columns_become_zero_and_move_nothing():
    W, H = normal(8, 24), correlated(24)
    H[[3, 17]] = H[:, [3, 17]] = 0
    q = solve(W, H)[0]
    assert not q[:, [3, 17]].any()
    moved = W.clone()
    moved[:, 3], moved[:, 17] = W[:, 17], W[:, 3]  # the same rows, so the same scales
    assert torch.equal(solve(moved, H)[0], q)


def test_a_zero_row_decodes_to_zeros_and_input_is_left_alone():
    W, H = normal(6, 16), correlated(16)
    W[2] = 0
    before = W.clone(), H.clone()
    q, scale, hi_scale = solve(W, H)
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])
    assert (scale > 0).all() and (hi_scale > 0).all()
    assert not tg.Gptq.decode(tg.Gptq.encode(q, scale, hi_scale, [], 8))[2].any()
    assert tg.Int8Rows.decode(tg.Int8Rows.encode(W))[2].eq(0).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_stay_in_range(bits):
    W = normal(8, 32)
    W[:, 5] = 50  # an outlier that must be clipped
    q = solve(W, correlated(32), clip=1.0, bits=bits)[0]
    assert q.dtype == torch.int8
    assert q.abs().max() == 2 ** (bits - 1) - 1


def test_scale_is_the_fp16_of_clip_times_unbiased_std():
    W = normal(5, 33) * torch.tensor([1e-3, 0.1, 1, 7, 100])[:, None]
    expected = np.float16(12.85 * W.numpy().std(axis=1, ddof=1) / 31)
    scale = tg.step_size(tg.clips_by_deviation(W[None], 12.85), 31)
    assert np.allclose(scale.numpy(), expected, rtol=2**-10)  # one fp16 step: std sums in another order
    assert scale.dtype == torch.float16 and scale.shape == (1, 1, 5)


def test_inverse_cholesky_is_the_upper_factor_of_the_inverse():
    H = torch.stack([correlated(20, seed=s).double() for s in range(3)])
    U = tg.inverse_cholesky(H)
    expected = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    torch.testing.assert_close(U, expected, rtol=1e-8, atol=1e-10)  # fp64, condition about 1e4
    assert torch.equal(U, U.triu())


def test_codecs_round_trip():
    w = normal(7, 12)
    assert torch.equal(tg.Float16.decode(tg.Float16.encode(w)), w.half().float())
    for shape in ((), (0,), (3,)):
        assert tg.Float16.decode(tg.Float16.encode(torch.ones(shape))).shape == shape
    parts = tg.Int8Rows.encode(w)
    assert parts["q"].abs().amax(1).eq(127).all()
    error = (tg.Int8Rows.decode(parts) - w).abs()
    assert (error <= 0.501 * parts["scale"].float()[:, None]).all()  # half a step, and the rounding of the scale at the row's maximum
    again = tg.Int8Rows.encode(tg.Int8Rows.decode(parts))
    assert torch.equal(again["q"], parts["q"])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_low_rank_factors(bits):
    A, B = normal(20, 3), normal(3, 24, seed=1)
    parts = tg.LowRank.encode(A, B, bits)
    top = 2 ** (bits - 1) - 1
    assert parts["A"].abs().max() == top and parts["B"].abs().max() == top
    for name, factor in (("A", A), ("B", B)):
        scale = parts[f"{name}_scale"]
        assert torch.equal(scale, (factor.abs().amax(1) / top).half())
    step = [parts[f"{n}_scale"].float()[:, None] for n in "AB"]
    torch.testing.assert_close(tg.LowRank.decode(parts), (parts["A"] * step[0]) @ (parts["B"] * step[1]))


def test_asymmetric_low_rank_factors():
    A, B = normal(20, 4), normal(4, 24, seed=1)
    A[0, 0], A[1, 0] = 9, -9  # +max clamps to 1 (1.5 steps), -max reaches -2
    B[0, :2] = torch.tensor([5.0, -5.0])
    parts = tg.LowRankAsym.encode(A, B, 16)
    assert set(parts["A"].unique().tolist()) <= {-2, -1, 0, 1} and parts["A"][0, 0] == 1 and parts["A"][1, 0] == -2
    assert (parts["B"].min(), parts["B"].max()) == (-8, 7)
    assert parts["A_scale"].shape == (1,) and parts["B_scale"].shape == (4 * 24 // 16,)
    assert parts["A_scale"].item() == np.float16(6.0)
    flat = torch.tensor([q * float(parts["B_scale"][i // 16]) for i, q in enumerate(parts["B"].flatten().tolist())]).view(4, 24)
    torch.testing.assert_close(tg.LowRankAsym.decode(parts), 6.0 * parts["A"].float() @ flat)
    for codec, args in ((tg.LowRank, (4,)), (tg.LowRankAsym, (16,))):
        zero = codec.decode(codec.encode(torch.zeros(20, 4), torch.zeros(4, 24), *args))
        assert zero.shape == (20, 24) and not zero.any()


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16), (3, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 99])
def test_low_rank_factors_are_the_singular_vectors_and_unique(shape, rank):
    E = normal(*shape, seed=rank) * torch.logspace(0, -2, shape[1])
    A, B = tg.low_rank_factors(E, rank)
    r = min(rank, *shape)
    U, S, Vh = torch.linalg.svd(E.double(), full_matrices=False)
    assert A.shape == (shape[0], r) and B.shape == (r, shape[1]) and A.dtype == B.dtype == torch.float32
    torch.testing.assert_close((A @ B).double(), U[:, :r] * S[:r] @ Vh[:r], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(B @ B.T, torch.eye(r), rtol=0, atol=1e-5)
    torch.testing.assert_close(A.norm(dim=0).double(), S[:r], rtol=1e-5, atol=1e-6)
    assert (B.gather(1, B.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(tg.low_rank_factors(-E, rank), (-A, B), rtol=1e-5, atol=1e-6)  # a residual's sign is all in A
    assert all(t.isfinite().all() for t in tg.low_rank_factors(torch.zeros(shape), rank))


class CountLaunches(torch.utils._python_dispatch.TorchDispatchMode):
    """Operators that a device would run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_solvers_never_wait_for_the_device_and_run_few_kernels_a_column():
    """Tensors without data: reading a number, numpy, or a copy to the host would be an error."""

    def empty(*shape):
        return torch.empty(*shape, device="meta")

    def launches(columns: int, round_column=None) -> int:
        W, H = empty(2, 12, columns), empty(2, columns, columns)
        with CountLaunches() as counter:
            if round_column is None:
                tg.gptq(W, H, empty(2, 12), 6, empty(2, columns).bool(), 8)
            else:
                tg.walk_columns(tg.without_dead_columns(W, H), *tg.factorize(H), empty(2, 12, columns), round_column)
        return counter.count

    assert launches(12) - launches(4) <= 8 * 15
    paths = [launches(columns, lambda x, _: tg.trellis_path(x)) for columns in (4, 8)]
    assert paths[1] - paths[0] > 4 * 7 * 12  # 7 for each row: `viterbi_kernel` is there because of this
    hessians = tg.Hessians()
    hessians("site", empty(2, 7, 8))
    assert hessians.H["site"].device.type == "meta"
    tg.low_rank_factors(empty(40, 12), 3)


@pytest.mark.parametrize(("shape", "size"), [((1, 1), 3.0), ((5, 2), 0.5), ((11, 40), 40.0), ((128, 3), 3.0)], ids=str)
def test_the_viterbi_kernel_equals_its_definition_to_the_bit(shape, size, monkeypatch):
    allocate = torch.empty_like

    def poisoned(t, **options):
        fresh = allocate(t, **options)
        return fresh.fill_(float("nan") if fresh.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty_like", poisoned)
    x = size * normal(*shape, seed=shape[1])
    x = torch.where(normal(*shape, seed=1) < -0.5, (2 * x).round() / 2, x)  # many are half way between two integers
    for ours, expected in zip(tg.fused_viterbi(x, tg.TRELLIS_INTO.int()), tg.viterbi(x), strict=True):
        assert torch.equal(ours, expected)


def test_without_a_gpu_the_definition_finds_the_paths():
    assert tg.choose_viterbi(torch.device("cpu")) is tg.viterbi


def fake_hessians(cfg, inputs, seed=0) -> tg.Hessians:
    hessians = tg.Hessians()
    for i, x in enumerate(inputs):
        if x.site not in hessians.H:
            hessians.H[x.site] = correlated(x.W.shape[1], seed=seed + i) * (1 + i % 3)
            hessians.count[x.site] = 100 + i
    return hessians


@pytest.fixture(scope="module")
def tiny(random_model):
    """Configuration, state, inputs, Hessians and the GPTQ of a tiny model."""
    cfg = tiny_config(matrix_bits=4, embed_bits=4)
    state = random_model(cfg).state_dict()
    inputs = tg.gptq_inputs(cfg, tg.unbank(cfg, state))
    hessians = fake_hessians(cfg, inputs)
    plain = dataclasses.replace(cfg, awq_lite_enabled=False, lqer_enabled=False)
    return cfg, state, inputs, hessians, tg.run_gptq(plain, inputs, hessians, tg.clips_by_deviation)


def protected(cfg, inputs, hessians) -> dict[str, tuple[int, ...]]:
    return {x.name: x.hi_starts for x in tg.protect_groups(cfg, inputs, hessians) if x.hi_starts}


def test_protected_groups_are_the_best_by_brute_force(tiny):
    cfg, _, inputs, hessians, _ = tiny
    for k, size in ((1, 8), (5, 8), (3, 24)):  # 24 does not divide 32: the remainder is no candidate
        scored = []
        for x in inputs:
            rms = [float((hessians.H[x.site][j, j] / hessians.count[x.site]) ** 0.5) for j in range(x.W.shape[1])]
            for start in range(0, x.W.shape[1] - size + 1, size):
                scored.append((sum(rms[j] * float(x.W[:, j].abs().mean()) for j in range(start, start + size)), x.name, start))
        best = sorted(scored, reverse=True)[:k]
        chosen = protected(dataclasses.replace(cfg, awq_lite_group_top_k=k, awq_lite_group_size=size), inputs, hessians)
        assert {(name, start) for name, starts in chosen.items() for start in starts} == {(name, start) for _, name, start in best}
    assert protected(dataclasses.replace(cfg, awq_lite_enabled=False), inputs, hessians) == {}
    wide = [t._replace(bits=8) for t in inputs]
    assert protected(cfg, wide, hessians) == {}, "tensors that have as many bits already are no candidates"


def test_low_rank_correction_lowers_the_error_of_the_worst_tensors(tiny):
    cfg, _, inputs, _, stored = tiny
    residual = {t.name: float((t.W - stored[t.name].decode()).norm()) for t in inputs}
    for asym in (True, False):
        c = dataclasses.replace(cfg, lqer_asym_enabled=asym, lqer_rank=4)
        extra = tg.low_rank_corrections(c, inputs, stored)
        assert list(extra) == sorted(residual, key=residual.get, reverse=True)[:3]
        assert {codec for s in extra.values() for codec, _ in s.parts} == {"low_rank_asym" if asym else "low_rank"}
        for t in inputs:
            if t.name in extra:
                corrected = tg.QuantizedTensor(stored[t.name].parts | extra[t.name].parts)
                torch.testing.assert_close(corrected.decode(), stored[t.name].decode() + extra[t.name].decode())
                assert (t.W - corrected.decode()).norm() < residual[t.name]
    assert tg.low_rank_corrections(dataclasses.replace(cfg, lqer_enabled=False), inputs, stored) == {}


CONFIGS = {
    "s14": {},
    "dense gate": dict(sparse_attn_gate_enabled=False, gated_attn_enabled=True),
    "out gate": dict(sparse_attn_gate_enabled=False, attn_out_gate_enabled=True),
    "fp16 gate": dict(gated_attn_quant_gate=False),
    "plain": dict(sparse_attn_gate_enabled=False, smear_gate_enabled=False, skip_gates_enabled=False, num_loops=0,
                  parallel_start_layer=0, awq_lite_enabled=False, lqer_enabled=False),
    "square": dict(mlp_mult=1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_gets_a_codec_and_comes_back(name, random_model):
    cfg = tiny_config(**CONFIGS[name])
    state = random_model(cfg).state_dict()
    tensors = tg.unbank(cfg, state)
    inputs = tg.gptq_inputs(cfg, tensors)
    lines = []
    stored = tg.quantize(cfg, state, fake_hessians(cfg, inputs), lines.append)
    assert list(stored) == list(tensors), "the order of the state decides the bytes"
    matrices = {n for n in tensors if n == "tok_emb.weight" or ".c_" in n or ".proj." in n or ".fc." in n}
    for n, s in stored.items():
        codecs = {codec for codec, _ in s.parts}
        expected = "gptq" if n in matrices else "int8_row" if n.endswith("attn_gate_w") and cfg.gated_attn_quant_gate else "float16"
        assert expected in codecs and codecs <= {expected, "low_rank_asym"}, n
        assert s.decode().dtype == torch.float32 and s.decode().shape == tensors[n].shape
        assert {t.dtype for t in s.parts.values()} <= {torch.int8, torch.int16, torch.float16}
    settings = {t.name: (t.bits, t.clip_sigmas) for t in inputs}
    assert set(settings) == matrices
    for n, setting in settings.items():
        clip = 14.0 if n == "tok_emb.weight" else 11.5 if ".mlp." in n else 13.0
        assert setting == (7 if n == "tok_emb.weight" else 6, clip)
    back = tg.dequantized_state(cfg, stored)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in state.items()}
    tg.GPT(cfg).load_state_dict(back)
    text = "\n".join(lines)
    assert "gptq" in text and ("awqgrpint8" in text) == cfg.awq_lite_enabled and ("low_rank_asym" in text) == cfg.lqer_enabled
    assert next(t for t in inputs if t.name == "tok_emb.weight").site == "head"


def test_unbank_names_the_matrices_as_published_and_rebank_undoes_it(random_model):
    cfg = tiny_config()
    state, L = random_model(cfg).state_dict(), cfg.num_layers
    tensors = tg.unbank(cfg, state)
    for i in range(L):
        for name, bank, row in (("attn.c_q", "qo", i), ("attn.proj", "qo", L + i), ("attn.c_k", "kv", i), ("attn.c_v", "kv", L + i),
                                ("mlp.fc", "mlp_up", i), ("mlp.proj", "mlp_down", i)):  # fmt: skip
            assert torch.equal(tensors[f"blocks.{i}.{name}.weight"], state[f"{bank}_bank"][row])
    assert not any("bank" in name for name in tensors)
    back = tg.rebank(cfg, tensors)
    assert set(back) == set(state) and all(torch.equal(back[n], state[n]) for n in state)


def test_the_tap_adds_up_x_transposed_x():
    hessians, x = tg.Hessians(), normal(3, 5, 8)
    hessians("site", x[:1])
    hessians("site", x[1:])
    flat = x.flatten(0, 1)
    torch.testing.assert_close(hessians.H["site"], flat.T @ flat)
    torch.testing.assert_close(hessians.rms("site"), flat.square().mean(0).sqrt())


@torch.no_grad()
def test_calibration_sees_the_inputs_of_every_matrix_document_by_document(dataset, world, random_model):
    """H from packed windows equals H from each document alone: attention and smear stay inside documents."""
    cfg = tiny_config(data_path=str(dataset), train_seq_len=256, train_seq_schedule="", train_batch_tokens=512, gptq_calibration_batches=2)
    model, files, order = random_model(cfg), tg.Dataset.open(cfg, need_train=True), tg.layer_order(cfg, looping=True)
    got = tg.collect_hessians(cfg, world, model, files, lambda line: None)
    alone = tg.Hessians()
    windows = tg.calibration_windows(files.train, 256, 4)
    for window in windows:
        starts = np.union1d([0], np.flatnonzero(window[:-1] == tg.BOS_ID))
        assert len(starts) > 1
        for a, b in zip(starts, [*starts[1:], 256], strict=True):
            tokens = torch.from_numpy(window[a : b + 1].astype(np.int64))[None]
            model(tokens[:, :-1], tokens[:, 1:], layers=order, tap=alone)
    sites = {f"blocks.{i}.{s}" for i in range(cfg.num_layers) for s in ("attn_in", "attn_out", "mlp_in", "mlp_mid")} | {"head"}
    assert set(got.H) == sites
    for site in sites:
        passes = order.count(int(site.split(".")[1])) if site != "head" else 1
        assert got.count[site] == alone.count[site] == passes * 4 * 256
        # fp32 sums of about a thousand products, in another order and from another attention kernel
        torch.testing.assert_close(got.H[site], alone.H[site], rtol=1e-3, atol=1e-4 * float(alone.H[site].abs().max()))
    again = tg.collect_hessians(cfg, world, model, files, lambda line: None)
    assert all(torch.equal(got.H[site], again.H[site]) for site in sites), "calibration is deterministic"


@torch.no_grad()
def test_hessian_is_of_the_matrix_it_is_used_for(world, random_model):
    """The tapped x are what the matrix multiplies: x W^T reproduces what the next module received."""
    cfg = tiny_config(num_loops=0)
    model, seen = random_model(cfg), {}
    tokens = torch.randint(4, 64, (1, 16), generator=torch.Generator().manual_seed(0))
    model(tokens, tokens, layers=tg.layer_order(cfg, False), tap=lambda site, x: seen.setdefault(site, x))
    hidden = tg.leaky_relu_squared(seen["blocks.1.mlp_in"] @ model.mlp_up_bank[1].T, cfg.mlp_slope)
    torch.testing.assert_close(hidden, seen["blocks.1.mlp_mid"])
    assert seen["blocks.0.attn_out"].shape == seen["blocks.0.attn_in"].shape == seen["head"].shape == (1, 16, 32)


def test_a_singular_hessian_is_an_error_with_advice(tiny):
    cfg, _, inputs, _, _ = tiny
    hessians = tg.Hessians()
    for x in inputs:
        hessians.H[x.site], hessians.count[x.site] = -torch.ones(x.W.shape[1], x.W.shape[1]), 1
    with pytest.raises(tg.RunError, match="GPTQ_CALIBRATION_BATCHES"):
        tg.run_gptq(cfg, inputs, hessians, tg.clips_by_deviation)


def test_eight_bits_keep_the_score_and_three_do_not(dataset, world, random_model):
    cfg = tiny_config(data_path=str(dataset))
    model, files = random_model(cfg), tg.Dataset.open(cfg, need_train=True)
    data = tg.ValData.load(cfg, files)
    hessians = tg.collect_hessians(cfg, world, model, files, lambda line: None)

    def change(**bits) -> float:
        c = dataclasses.replace(cfg, lqer_enabled=False, awq_lite_enabled=False, **bits)
        quantized = tg.build_model(c, world, tg.choose_kernels(c, world))
        quantized.load_state_dict(tg.dequantized_state(c, tg.quantize(c, model.state_dict(), hessians, lambda line: None)))
        losses = [tg.evaluate(c, world, m, tg.Scorer(data, world)).loss for m in (quantized, model)]
        return abs(losses[0] - losses[1])

    eight, three = change(matrix_bits=8, embed_bits=8), change(matrix_bits=3, embed_bits=3)
    assert eight < 0.1 < three  # nats of about 6: the random weights make the network far more sensitive than a trained one
