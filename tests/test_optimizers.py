"""OPTIMIZERS: each update against a slow reference, failures that touch nothing, and the same result on any number of ranks."""

import copy
import dataclasses
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import tiny_config

import train_gpt as tg


def with_gradients(model, seed=0, size=1.0):
    """Random gradients on everything that learns; returns them by name."""
    g = torch.Generator().manual_seed(seed)
    grads = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.grad = (size * torch.randn(p.shape, generator=g)).to(p.dtype)
            grads[name] = p.grad.clone()
    return grads


def weights(model) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same_matrices(ours: dict, theirs: dict):
    """Bit for bit what two state dicts remember of the banks."""
    for a, b in zip(ours["matrices"], theirs["matrices"], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def slow_polar(G):
    """Section 4.1 for one matrix, on its singular values: X = U f(S) V^T."""
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    s = S / (S.square().sum().sqrt() + 1e-7)
    for a, b, c in [
        (8.156554524902461, -22.48329292557795, 15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393), (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ]:
        s = a * s + b * s**3 + c * s**5
    return U @ torch.diag(s) @ Vh


def slow_muon(G, M, momentum, row_normalize):
    """Section 4.1 for one matrix; returns update and new momentum."""
    M = momentum * M + G
    U = G + momentum * M
    if row_normalize:
        U = torch.stack([row / max(row.norm().item(), 1e-7) for row in U])
    return slow_polar(U) * max(1.0, G.shape[0] / G.shape[1]) ** 0.5, M


@pytest.mark.parametrize("shape", [(3, 64, 24), (3, 24, 64), (2, 32, 32), (1, 1, 50)])
def test_singular_values_land_in_the_band(shape):
    """Golden test C.6: [0.859, 1.141] wherever sigma / norm >= 1e-3."""
    n, rows, cols = shape
    g = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=g), full_matrices=False)
    S = torch.logspace(0, -2.4, min(rows, cols)).expand(n, -1)  # norm is about 2, so sigma / norm stays above 1e-3
    assert (S[0, -1] / S[0].norm()) >= 1e-3
    X = tg.polar_express(5.0 * U @ torch.diag_embed(S) @ Vh, 5)
    sigma = torch.linalg.svdvals(X)
    assert sigma.min() >= 0.8585 and sigma.max() <= 1.1415  # the edges are known to three digits
    half = torch.linalg.svdvals(tg.polar_express((5.0 * U @ torch.diag_embed(S) @ Vh).bfloat16(), 5).float())
    assert half.max() <= 1.141 * 1.06 and half.median() > 0.85  # bf16: a few per cent, and values below its resolution are lost


def test_polar_express_details():
    g = torch.Generator().manual_seed(1)
    G = torch.randn(3, 20, 12, generator=g)
    G[1] = 0
    X = tg.polar_express(G, 5)
    assert (X[1] == 0).all()  # padding matrices of a bank
    torch.testing.assert_close(X[0].double(), slow_polar(G[0]), rtol=0, atol=1e-4)  # fp32, steep polynomials
    assert torch.equal(tg.polar_express(G, 9), X)  # more than five still runs five
    a, b, c = tg.POLAR_EXPRESS[0]
    Y = G[0].T / (G[0].norm() + 1e-7)
    torch.testing.assert_close(
        tg.polar_express(G, 1)[0], (a * Y + b * (Y @ Y.T) @ Y + c * (Y @ Y.T) @ (Y @ Y.T) @ Y).T, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("row_normalize", [True, False])
@pytest.mark.parametrize("shape", [(4, 24, 8), (4, 8, 24), (2, 16, 16)])
def test_muon_equals_the_slow_reference(shape, row_normalize):
    g = torch.Generator().manual_seed(2)
    cfg = tiny_config(muon_row_normalize=row_normalize)
    state = {}
    expected_M = torch.zeros(shape, dtype=torch.float64)
    for momentum in (0.92, 0.95, 0.97):
        G = torch.randn(shape, generator=g)
        before = copy.deepcopy(state)
        update, after = tg.muon(G, state, cfg, momentum)
        assert all(torch.equal(t, before[name]) for name, t in state.items())  # a new state, the old one untouched
        state = after
        for i in range(shape[0]):
            expected, expected_M[i] = slow_muon(G[i].double(), expected_M[i], momentum, row_normalize)
            torch.testing.assert_close(update[i].double(), expected, rtol=0, atol=5e-4)  # fp32 against fp64 through degree 5^5
    torch.testing.assert_close(state["momentum"].double(), expected_M, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 12), (12, 24), (12, 12)])
def test_one_iteration_equals_torch_muon(shape):
    """Momentum, Nesterov and scale of torch.optim.Muon (no row normalisation). It has one coefficient triple, so one iteration."""
    g = torch.Generator().manual_seed(3)
    p = torch.nn.Parameter(torch.zeros(shape))
    theirs = torch.optim.Muon(
        [p], lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.0, ns_steps=1, ns_coefficients=tg.POLAR_EXPRESS[0], adjust_lr_fn="original"
    )
    cfg, state = tiny_config(muon_backend_steps=1, muon_row_normalize=False), {}
    for _ in range(4):
        p.grad = torch.randn(shape, generator=g)
        before = p.detach().clone()
        ours, state = tg.muon(p.grad.clone()[None], state, cfg, 0.9)
        theirs.step()
        update = before - p.detach()
        assert (ours[0] - update).norm() / update.norm() < 0.01  # theirs iterates in bf16: 8 bits
    buffer = theirs.state[p]["momentum_buffer"]
    torch.testing.assert_close(buffer, 0.1 * state["momentum"][0], rtol=1e-4, atol=1e-6)  # they average, we add up


CONFIGS = [
    {}, dict(sparse_attn_gate_enabled=False, attn_out_gate_enabled=True), dict(parallel_start_layer=0),
    dict(sparse_attn_gate_enabled=False, gated_attn_enabled=True),
    dict(skip_gates_enabled=False, smear_gate_enabled=False), dict(num_loops=0),
]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_every_parameter_is_owned_once(changes, world):
    cfg = tiny_config(**changes)
    model = tg.build_model(cfg, world, tg.choose_kernels(cfg, world))
    optimizer = tg.TrainOptimizer(model, cfg, world)
    owned = [bank.p for bank in optimizer.banks] + [p for group in optimizer.adamw.param_groups for p in group["params"]]
    learning = [p for p in model.parameters() if p.requires_grad]
    assert len(owned) == len({id(p) for p in owned}) and {id(p) for p in owned} == {id(p) for p in learning}
    assert [p.numel() for p in (b.p for b in optimizer.banks)] == sorted((b.p.numel() for b in optimizer.banks), reverse=True)
    assert {id(bank.p) for bank in optimizer.banks} == {id(p) for name, p in model.named_parameters() if name.endswith("_bank")}
    settings = {id(p): (group["base_lr"], group["weight_decay"]) for group in optimizer.adamw.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if not name.endswith("_bank"):
            embedding = (cfg.tied_embed_lr, cfg.embed_wd)
            expected = embedding if name == "tok_emb.weight" else (cfg.scalar_lr, cfg.adam_wd)
            assert settings[id(p)] == expected, name


def test_one_step_equals_the_definitions(random_model, world):
    """Clip over everything, AdamW as torch's, Muon as the slow reference, decoupled weight decay of both, one lr factor."""
    cfg = tiny_config(grad_clip_norm=0.3, muon_wd=0.2, embed_wd=0.3, adam_wd=0.1)
    model = random_model(cfg)
    optimizer = tg.TrainOptimizer(model, cfg, world)
    twin = {name: t.double() for name, t in weights(model).items()}
    adam_names = [n for n, p in model.named_parameters() if p.requires_grad and not n.endswith("_bank")]
    reference = {n: torch.nn.Parameter(twin[n].clone()) for n in adam_names}
    emb = [reference["tok_emb.weight"]]
    rest = [reference[n] for n in adam_names if n != "tok_emb.weight"]
    adamw = torch.optim.AdamW(
        [dict(params=emb, lr=0.03, weight_decay=0.3), dict(params=rest, lr=0.02, weight_decay=0.1)],
        betas=(0.9, 0.99),
        eps=1e-8,
        foreach=False,
    )
    momenta = {n: torch.zeros_like(t) for n, t in twin.items() if n.endswith("_bank")}
    for step, (scale, mu) in enumerate([(1.0, 0.92), (0.5, 0.95), (0.25, 0.97)]):
        grads = with_gradients(model, seed=step, size=[1.0, 1e-5, 0.01][step])
        norm = sum(g.double().square().sum() for g in grads.values()).sqrt().item()
        assert (norm > 0.3) == (step != 1)
        factor = min(1.0, 0.3 / (norm + 1e-6))
        reported = optimizer.step(scale, mu)
        assert reported == pytest.approx(norm, rel=1e-5)
        for n in adam_names:
            reference[n].grad = grads[n].double() * factor
        for group, lr in zip(adamw.param_groups, (0.03, 0.02), strict=True):
            group["lr"] = lr * scale
        adamw.step()
        for n in momenta:
            for i in range(len(twin[n])):
                update, momenta[n][i] = slow_muon(grads[n][i].double() * factor, momenta[n][i], mu, True)
                twin[n][i] = twin[n][i] * (1 - 0.026 * scale * 0.2) - 0.026 * scale * update
        assert all(p.grad is None for p in model.parameters())
    for n, t in model.state_dict().items():
        expected = reference[n].detach() if n in reference else twin[n]
        torch.testing.assert_close(t.double(), expected, rtol=1e-4, atol=1e-4, msg=n)  # three updates of 0.03, each to fp32 through polar


def test_weight_decay_is_decoupled(random_model, world):
    """Without gradients everything that learns just shrinks by its own factor: gains, gates and lambdas as well."""
    cfg = tiny_config()
    model = random_model(cfg)
    optimizer, before = tg.TrainOptimizer(model, cfg, world), weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step(0.5, 0.95)
    for name, t in model.state_dict().items():
        lr_wd = 0.026 * 0.095 if name.endswith("_bank") else 0.03 * 0.085 if name == "tok_emb.weight" else 0.02 * 0.02
        torch.testing.assert_close(t, before[name] * (1 - 0.5 * lr_wd), rtol=1e-6, atol=1e-9)


def test_no_clip_when_off(random_model, world):
    cfg = tiny_config(grad_clip_norm=0.0)
    model = random_model(cfg)
    optimizer = tg.TrainOptimizer(model, cfg, world)
    grads = with_gradients(model)
    optimizer.step(1.0, 0.9)
    for bank, name in ((b, n) for b in optimizer.banks for n, p in model.named_parameters() if p is b.p):
        assert torch.equal(bank.full_state()["momentum"], grads[name])


@pytest.mark.parametrize("poison", ["qo_bank", "tok_emb.weight", "blocks.1.attn.q_gain"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_touches_nothing(poison, value, random_model, world):
    cfg = tiny_config()
    model = random_model(cfg)
    optimizer = tg.TrainOptimizer(model, cfg, world)
    with_gradients(model)
    optimizer.step(1.0, 0.9)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    with_gradients(model, 1)
    dict(model.named_parameters())[poison].grad.view(-1)[3 if poison != "blocks.1.attn.q_gain" else 0] = value
    with pytest.raises(FloatingPointError, match="norm is"):
        optimizer.step(1.0, 0.9)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    after = optimizer.state_dict()
    assert_same_matrices(after, state)
    for key, moments in state["adamw"]["state"].items():
        assert all(torch.equal(t, after["adamw"]["state"][key][name]) for name, t in moments.items())
    model.zero_grad()  # and training can go on
    with_gradients(model, 2)
    assert np.isfinite(optimizer.step(1.0, 0.9))


@pytest.mark.parametrize("clip", [0.3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping_on_the_device_equals_clipping_on_the_host_to_the_bit(random_model, dtype, clip):
    """The same step with the factor as a Python number, in the order norm, check, clip, update."""
    cfg, world = tiny_config(grad_clip_norm=clip), tg.World(0, 1, torch.device("cpu"), dtype)
    twins = [tg.GPT(cfg, dtype) for _ in range(2)]
    for model in twins:
        model.load_state_dict(random_model(cfg).state_dict())
    ours, host = (tg.TrainOptimizer(model, cfg, world) for model in twins)
    for k, size in enumerate((1.0, 1e-5, 0.03)):
        for model in twins:
            with_gradients(model, k, size)
        norm = ours.step(0.7, 0.9)
        host.reduce()
        assert host.grad_norm().item() == norm
        factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        with torch.no_grad():
            for bank in host.banks:
                update, bank.state = tg.muon(bank.shard.mul_(factor), bank.state, cfg, 0.9)
                bank.launch_gather(update)
            for p in host.replicated:
                p.grad.mul_(factor)
            for group in host.adamw.param_groups:
                group["lr"] = group["base_lr"] * 0.7
            host.adamw.step()
            for bank in host.banks:
                bank.apply(cfg.matrix_lr * 0.7, cfg.muon_wd)
        host.model.zero_grad()
        for (name, a), b in zip(twins[0].state_dict().items(), twins[1].state_dict().values(), strict=True):
            assert torch.equal(a, b), name
        assert_same_matrices(ours.state_dict(), host.state_dict())


def test_the_host_reads_one_number_and_only_after_the_directions(random_model, world, monkeypatch):
    """Everything that the device has to compute before the update is asked of it before the host waits for the norm."""
    cfg, order = tiny_config(), []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            order.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    model = random_model(cfg)
    optimizer = tg.TrainOptimizer(model, cfg, world)
    with_gradients(model)
    optimizer.step(1.0, 0.9)  # makes Adam's state
    with_gradients(model)
    with Spy():
        optimizer.step(1.0, 0.9)
    reads = [i for i, op in enumerate(order) if op == torch.ops.aten._local_scalar_dense]
    products = [i for i, op in enumerate(order) if op in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)]
    assert len(reads) == 1 and len(products) == 4 * 5 * 3 and reads[0] > max(products)
    assert torch.ops.aten._fused_adamw_ in order[reads[0] :] and torch.ops.aten._fused_adamw_ not in order[: reads[0]]


def normalized_momentum(gradient, state, cfg, momentum):
    """Another optimizer, with two tensors of state, one of them no matrix: momentum over the mean square of each row."""
    average = torch.add(gradient, state.get("momentum", 0.0), alpha=momentum)
    squares = 0.1 * gradient.square().mean(-1) + 0.9 * state.get("squares", 0.0)
    return average / squares.sqrt().add(1e-6).unsqueeze(-1), dict(momentum=average, squares=squares)


OPTIMIZERS = dict(muon=tg.muon, another=normalized_momentum)


def test_the_registry_is_the_knob():
    assert tg.Config.__dataclass_fields__["matrix_optimizer"].metadata["choices"] == tuple(tg.MATRIX_OPTIMIZERS)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_matrices_are_stored_whole_for_any_number_of_ranks(size, random_model):
    """Every rank takes its share of them; the last one's is padded."""
    g, n = torch.Generator().manual_seed(0), 5
    full = dict(momentum=torch.randn(n, 4, 6, generator=g), squares=torch.randn(n, 4, generator=g))
    shares = []
    for rank in range(size):
        bank = tg.Bank(torch.nn.Parameter(torch.zeros(n, 4, 6)), tg.World(rank, size, torch.device("cpu"), torch.float32))
        bank.load_state(full)
        shares.append(bank.state)
    for name, whole in full.items():
        together = torch.cat([share[name] for share in shares])
        assert torch.equal(together[:n], whole) and not together[n:].any()
        assert {len(share[name]) for share in shares} == {-(-n // size)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_round_trip_continues_to_the_bit(optimizer, random_model, world, tmp_path, monkeypatch):
    """Also that of an optimizer that is one more function and one more entry."""
    cfg = tiny_config()
    monkeypatch.setitem(tg.MATRIX_OPTIMIZERS, cfg.matrix_optimizer, OPTIMIZERS[optimizer])
    model = random_model(cfg)
    optimizer = tg.TrainOptimizer(model, cfg, world)
    for step in range(3):
        with_gradients(model, step)
        optimizer.step(1.0, 0.9)
    torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict()), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    twin = tg.build_model(cfg, world, tg.choose_kernels(cfg, world))
    twin.load_state_dict(saved["model"])
    other = tg.TrainOptimizer(twin, cfg, world)
    other.load_state_dict(saved["optimizer"])
    for step in range(3, 6):
        for m, o in ((model, optimizer), (twin, other)):
            with_gradients(m, step)
            o.step(0.7, 0.95)
    assert all(torch.equal(t, twin.state_dict()[name]) for name, t in model.state_dict().items())


def test_moving_average(random_model, world):
    """Started at the initial weights, fp32 also for a bf16 embedding, no debiasing, cast back at the end."""
    cfg = tiny_config()
    model = tg.GPT(cfg, torch.bfloat16)
    model.load_state_dict(random_model(cfg).state_dict())
    expected = {name: t.double() for name, t in weights(model).items()}
    ema = tg.Ema(model, 0.9)
    for step in range(3):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p.dtype))
        ema.update(model)
        for name, t in model.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * t.double()
    assert {t.dtype for t in ema.shadow.values()} == {torch.float32} and set(ema.shadow) == set(model.state_dict())
    for name, t in ema.shadow.items():
        torch.testing.assert_close(t.double(), expected[name], rtol=1e-5, atol=1e-6)
    ema.copy_to(model)
    assert model.tok_emb.weight.dtype == torch.bfloat16
    assert torch.equal(model.tok_emb.weight, ema.shadow["tok_emb.weight"].bfloat16())
    assert torch.equal(model.qo_bank, ema.shadow["qo_bank"])


def train_and_score(cfg: tg.Config, world: tg.World) -> dict:
    """Five steps with clipping on, then both evaluations: what must not depend on the ranks."""
    files = tg.Dataset.open(cfg, need_train=True)
    trainer = tg.Trainer(cfg, world, files, tg.choose_kernels(cfg, world))
    losses, norms, step = [], [], trainer.optimizer.step

    def spy(lr, momentum):
        norms.append(step(lr, momentum))
        return norms[-1]

    trainer.optimizer.step = spy
    for k in range(5):
        losses.append(trainer.train_step(trainer.loader.next_step(), 32, k > 1, 1.0, 0.9))
    trainer.loader.close()
    optimizer_state = trainer.optimizer.state_dict()
    trainer.optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    again = trainer.optimizer.state_dict()
    assert_same_matrices(again, optimizer_state)
    out = dict(
        losses=losses,
        norms=norms,
        model={n: t.clone() for n, t in trainer.model.state_dict().items()},
        matrices=optimizer_state["matrices"],
    )
    data = tg.ValData.load(cfg, files)
    model = trainer.model.requires_grad_(False).eval()
    sliding = dataclasses.replace(cfg, eval_method="sliding")
    out["scores"] = [tg.evaluate(c, world, model, tg.Scorer(data, world)) for c in (cfg, sliding)]
    engine = tg.TttEngine(cfg, world, model, data)
    out["scores"].append(tg.TttRun(cfg, engine, tg.Scorer(data, world), lambda line: None).run())
    out["after"] = {n: t.clone() for n, t in model.state_dict().items()}
    return out


def rank_main(rank: int, port: int, cfg: tg.Config, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    world = tg.World(rank, 2, torch.device("cpu"), torch.float32)
    torch.save(train_and_score(cfg, world), f"{folder}/rank{rank}.pt")
    world.close()


def test_two_ranks_equal_one(dataset, tmp_path):
    """Three blocks: the MLP banks hold an odd number of matrices, so the second rank's share is padded."""
    cfg = tiny_config(data_path=str(dataset), num_layers=3, loop_start=0, loop_end=1, parallel_start_layer=2, grad_clip_norm=0.3)
    alone = train_and_score(cfg, tg.World(0, 1, torch.device("cpu"), torch.float32))
    assert max(alone["norms"]) > 0.3  # clipping takes part
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank_main, args=(port, cfg, str(tmp_path)), nprocs=2)
    allowed = [torch.torch_version.TorchVersion, tg.Score]
    with torch.serialization.safe_globals(allowed):
        ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    first, second = ranks
    assert first["losses"] == second["losses"] and first["norms"] == second["norms"] and first["scores"] == second["scores"]
    for key in ("model", "after"):
        assert all(torch.equal(t, second[key][n]) for n, t in first[key].items())  # replicas never drift apart
        # A sum of two and a half are exact in any order: on one kind of CPU only the norm is summed differently.
        for n, t in alone[key].items():
            torch.testing.assert_close(first[key][n], t, rtol=0, atol=1e-5, msg=n)
    assert first["losses"] == pytest.approx(alone["losses"], abs=1e-5) and first["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    for a, b in zip(first["matrices"], alone["matrices"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    for ours, single in zip(first["scores"], alone["scores"], strict=True):
        assert (ours.tokens, ours.bytes) == (single.tokens, single.bytes)
        assert ours.loss == pytest.approx(single.loss, abs=1e-5)
    assert not torch.equal(alone["after"]["qo_bank"], alone["model"]["qo_bank"])  # the global phase took part
