"""TRAINING: schedules at their corners, a warm-up that leaves no trace, a clock that is never overrun, checkpoints exact to the bit."""

import contextlib
import copy
import dataclasses
import itertools
import os
import signal

import numpy as np
import pytest
import torch
from conftest import tiny_config

import train_gpt as tg

S14 = tg.Config(quant="s14")
# Compiling costs seconds per block: two of them still have a loop, a skip, two lanes and one block without XSA.
SHALLOW = dict(num_layers=2, loop_start=0, loop_end=0, parallel_start_layer=1, xsa_last_n=1)


def quiet(line, console=True):
    pass


def make_trainer(cfg, world) -> tg.Trainer:
    return tg.Trainer(cfg, world, tg.Dataset.open(cfg, need_train=True), tg.choose_kernels(cfg, world))


def no_score():
    return tg.Score(1.0, 1.0, 1, 1)


def run(cfg, world, folder, warm=False, log=quiet, trainer=None) -> tg.Trainer:
    """A training run to its end."""
    trainer = trainer or make_trainer(cfg, world)
    if warm:
        trainer.warm_up(log)
    tg.train(trainer, no_score, log, folder / "checkpoint.pt")
    return trainer


def fingerprint(trainer) -> dict[str, torch.Tensor]:
    """Weights, average, Adam moments and momentum."""
    out = {f"model.{n}": t.detach().clone() for n, t in trainer.model.state_dict().items()}
    out |= {f"ema.{n}": t.clone() for n, t in trainer.ema.shadow.items()}
    state = trainer.optimizer.state_dict()
    out |= {f"adam.{k}.{n}": t.clone() for k, moments in state["adamw"]["state"].items() for n, t in moments.items()}
    return out | {f"matrices.{i}.{n}": t for i, bank in enumerate(state["matrices"]) for n, t in bank.items()}


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def loss_values(trainer) -> list[float]:
    return [loss for _, _, loss in trainer.losses]


@pytest.fixture(scope="module")
def whole(dataset, world, tmp_path_factory):
    """Losses and final state of the tiny run, never interrupted."""
    trainer = run(tiny_config(data_path=str(dataset)), world, tmp_path_factory.mktemp("whole"))
    return loss_values(trainer), fingerprint(trainer)


class FakeTime:
    """`time.perf_counter` that only moves when told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(tg.time, "perf_counter", lambda: self.now)


def slow_steps(trainer, fake, seconds):
    """Every step takes `seconds(step, looping)` on the fake clock; returns the list of (context, looping, lr) of the steps."""
    taken, step = [], trainer.train_step

    def timed(window, context, looping, lr, momentum):
        taken.append((context, looping, lr))
        fake.now += seconds(len(taken) - 1, looping)
        return step(window, context, looping, lr, momentum)

    trainer.train_step = timed
    return taken


# ---- schedules


def test_learning_rate_of_the_record():
    """Golden test C.5 (warmdown 0.85, floor 0.1)."""
    for progress, expected in {
        0.0: 1,
        0.149: 1,
        0.15: 1,
        0.5: 0.5882353,
        0.9: 0.1176471,
        0.914: 0.1011765,
        0.916: 0.1,
        0.95: 0.1,
        1.0: 0.1,
    }.items():
        assert tg.lr_scale(S14, progress) == pytest.approx(expected, abs=1e-6), progress
    no_warmdown = dataclasses.replace(S14, warmdown_frac=0.0)
    assert [tg.lr_scale(no_warmdown, p) for p in (0.0, 0.5, 1.0)] == [1, 1, 1]
    whole = dataclasses.replace(S14, warmdown_frac=1.0, min_lr=0.0)
    assert [tg.lr_scale(whole, p) for p in (0.0, 0.25, 1.0)] == [1, 0.75, 0]


def test_warmdown_in_iterations():
    """Section 4.3: min(1, remaining / (iters * elapsed per step)) by the clock, else counted back from ITERATIONS; with the floor."""
    by_clock = dataclasses.replace(S14, warmdown_iters=1000)  # 596 s of training
    for progress, expected in {0.0: 1, 0.5: 1, 1 - 100 / 596: 1, 1 - 50 / 596: 0.5, 1 - 9 / 596: 0.1, 1.0: 0.1}.items():
        assert tg.lr_scale(by_clock, progress, step=1, step_seconds=0.1) == pytest.approx(expected, abs=1e-6), progress
    by_step = dataclasses.replace(by_clock, max_wallclock_seconds=0.0, iterations=5000)
    for step, expected in {0: 1, 4000: 1, 4500: 0.5, 4990: 0.1}.items():
        assert tg.lr_scale(by_step, step / 5000, step, 0.1) == pytest.approx(expected)
        in_step_mode = dataclasses.replace(by_step, max_wallclock_seconds=600.0, train_seq_schedule_mode="step")
        assert tg.lr_scale(in_step_mode, step / 5000, step, 0.3) == pytest.approx(expected)  # the clock plays no part


def test_context_of_the_record():
    """Golden test C.4: a stage lasts until its fraction, inclusive."""
    for progress, expected in {0.0: 1024, 0.1: 1024, 0.1001: 2048, 0.7: 2048, 0.7001: 3072, 1.0: 3072}.items():
        assert tg.context_length(S14, progress) == expected
    half = tiny_config(train_seq_schedule="64@0.5")
    assert [tg.context_length(half, p) for p in (0.0, 0.5, 0.6, 1.0)] == [64] * 4
    with pytest.raises(ValueError, match="TRAIN_SEQ_LEN"):
        tiny_config(train_seq_schedule="32@0.5")
    blank = tiny_config(train_seq_schedule="")
    assert [tg.context_length(blank, p) for p in (0.0, 1.0)] == [64, 64]
    unsorted = tiny_config(train_seq_schedule="64@1.0,32@0.5")
    assert [tg.context_length(unsorted, p) for p in (0.5, 0.51)] == [32, 64]


def test_small_schedules():
    assert [tg.rewarmup(S14, k) for k in (None, 1, 16, 32, 33, 900)] == [1, 1 / 32, 0.5, 1, 1, 1]
    assert tg.rewarmup(dataclasses.replace(S14, seq_change_warmup_steps=0), 1) == 1
    assert [tg.muon_momentum(S14, s) for s in (0, 750, 1500, 9999)] == pytest.approx([0.92, 0.945, 0.97, 0.97])
    assert tg.muon_momentum(dataclasses.replace(S14, muon_momentum_warmup_steps=0), 0) == 0.97
    assert [tg.looping_at(S14, p) for p in (0.0, 0.3499, 0.35, 1.0)] == [False, False, True, True]
    assert not tg.looping_at(dataclasses.replace(S14, num_loops=0), 1.0)


def test_shapes_to_warm():
    """Section 5.4."""
    P, L = False, True
    shapes = lambda **c: tg.warm_shapes(dataclasses.replace(S14, **c))  # noqa: E731
    assert shapes() == [(1024, P), (2048, P), (2048, L), (3072, L)]
    assert shapes(compile_shape_warmup=False) == [(3072, P), (3072, L)]
    assert shapes(num_loops=0) == [(1024, P), (2048, P), (3072, P)]
    assert shapes(train_seq_schedule="") == [(3072, P), (3072, L)]
    assert shapes(enable_looping_at=0.0) == [(1024, L), (2048, L), (3072, L)]


def test_every_step_meets_a_warmed_shape(cfg, world):
    """Walk the run's progress: no (context, loop mode) may appear that was not warmed."""
    for c in (
        S14,
        dataclasses.replace(S14, enable_looping_at=0.2),
        dataclasses.replace(S14, enable_looping_at=0.7),
        tg.Config(num_loops=0),
    ):
        met = {(tg.context_length(c, p), tg.looping_at(c, p)) for p in np.linspace(0, 1, 10_001)}
        assert met <= set(tg.warm_shapes(c))


# ---- the loop


def test_plan_follows_progress(cfg, world, tmp_path):
    """12 steps by step count: context until the fraction, loops from 0.35, ramp of two steps, learning rate of that progress."""
    trainer = make_trainer(cfg, world)
    taken, step = [], trainer.train_step
    trainer.train_step = lambda w, context, looping, lr, mu: taken.append((context, looping, lr, mu)) or step(w, context, looping, lr, mu)
    lines = []
    run(cfg, world, tmp_path, log=lambda line, console=True: lines.append(line), trainer=trainer)
    for k, (context, looping, lr, mu) in enumerate(taken):
        p = k / 12
        assert (context, looping) == (32 if p <= 0.5 else 64, p >= 0.35)
        ramp = 0.5 if k == 7 else 1.0  # steps 7 and 8 are the first two after the change
        assert lr == pytest.approx(ramp * (1.0 if p < 0.15 else max((1 - p) / 0.85, 0.1)))
        assert mu == pytest.approx(0.92 + 0.05 * min(1, k / 4))
    assert len(taken) == 12 == trainer.step
    assert any(line.startswith("growth_stage:seq_len:64 ") and line.endswith("step:7") for line in lines)
    assert any(line.startswith("layer_loop:enabled step:5 ") for line in lines)


def test_it_learns(cfg, world, tmp_path):
    losses = loss_values(run(dataclasses.replace(cfg, iterations=40), world, tmp_path))
    assert losses[0] == pytest.approx(np.log(64), abs=0.05)  # embeddings of 0.005 give nearly uniform predictions
    assert np.mean(losses[-5:]) < losses[0] - 0.7


def test_it_repeats_itself(cfg, world, tmp_path, whole):
    again = run(cfg, world, tmp_path)
    assert loss_values(again) == whole[0] and len(again.losses) == 12
    assert_same(fingerprint(again), whole[1])


def test_the_seed_moves_weights_and_not_data(cfg, world):
    a, b = (make_trainer(dataclasses.replace(cfg, seed=s), world) for s in (1, 2))
    assert not torch.equal(a.model.qo_bank, b.model.qo_bank)
    assert all(np.array_equal(a.loader.next_step(), b.loader.next_step()) for _ in range(3))


def test_accumulation_is_the_mean_of_its_micro_batches(cfg, world):
    """Two rows of 256 in one step = the mean of the gradients of the two rows. (One row of 512 holds other tokens: every row spends one
    extra token on its last target, so 1 x 512 and 2 x 256 never see quite the same data.)"""
    trainer = make_trainer(cfg, world)
    window, grads = trainer.loader.next_step(), []
    assert window.shape == (2, 257) and trainer.accumulate == 2
    trainer.optimizer.step = lambda lr, momentum: None  # leave the gradients in place
    loss = trainer.train_step(window, 32, True, 1.0, 0.9)
    total = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    rows = []
    for tokens in window:
        trainer.model.zero_grad()
        row = tg.packed_row(tokens, 32, torch.device("cpu"))
        nats = trainer.model(row.inputs, row.targets, layers=tg.layer_order(cfg, True), segments=row.segments)
        nats.mean().backward()
        rows.append(nats.mean().item())
        grads.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert loss == pytest.approx(np.mean(rows), abs=1e-6)
    for n, g in total.items():
        torch.testing.assert_close(g, (grads[0][n] + grads[1][n]) / 2, rtol=1e-5, atol=1e-7)  # halves are exact, sums are fp32
    # The same 512 targets in one row: two rows that overlap in one token, cut at the same places.
    trainer.model.zero_grad()
    tokens = np.concatenate([window[0], window[0][1:]])
    tokens[256] = tokens[0] = tg.BOS_ID  # both halves start a document, so neither sees the other
    halves = np.stack([tokens[:257], tokens[256:]])
    trainer.train_step(halves, 32, True, 1.0, 0.9)
    split = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    trainer.accumulate = 1
    trainer.train_step(tokens[None], 32, True, 1.0, 0.9)
    for n, p in trainer.model.named_parameters():
        if n in split:
            torch.testing.assert_close(p.grad, split[n], rtol=1e-4, atol=1e-6)  # other sums over rows of other lengths, fp32


# ---- warm-up


@pytest.mark.parametrize("backend", ["none", "eager"])
def test_warm_up_leaves_no_trace(cfg, world, tmp_path, backend):
    with clean_compiler():
        cfg = dataclasses.replace(cfg, **SHALLOW, compile_backend=backend, compile_shape_warmup=backend != "none", iterations=8,
                                  compile_allow_recompiles=True)
        plain = run(cfg, world, tmp_path)
        warmed, lines = make_trainer(dataclasses.replace(cfg, warmup_steps=3), world), []
        before, position = fingerprint(warmed), warmed.loader.position
        steps, shapes = [], []
        step, forward = warmed.train_step, warmed.forward
        warmed.train_step = lambda *a: steps.append((a[1], a[2], a[3])) or step(*a)
        if backend != "none":
            warmed.forward = lambda *a, **k: (
                shapes.append((k["segments"].max_len, len(k["layers"]), len(k["segments"].cu_seqlens))) or forward(*a, **k)
            )
        warmed.warm_up(lambda line, console=True: lines.append(line))
        assert steps == [(32, False, 1.0)] * 3 + [(32, True, 1.0)] * 3  # full learning rate, first context, plain then looped
        assert_same(fingerprint(warmed), before)  # no Adam state, zero momentum
        assert warmed.loader.position == position and all(p.grad is None for p in warmed.model.parameters())
        assert (warmed.step, warmed.losses) == (0, [])
        if backend != "none":
            assert {(n, layers) for n, layers, _ in shapes} >= {(n, 3 if loop else 2) for n, loop in tg.warm_shapes(cfg)}
            assert {bucket for *_, bucket in shapes} == {64, 128, 192, 256}
            assert "compile_shape_warmup:start 32xplain,32xloop,64xloop" in lines
        run(cfg, world, tmp_path, trainer=warmed)
        assert loss_values(warmed) == loss_values(plain)
        assert_same(fingerprint(warmed), fingerprint(plain))


# ---- the clock


def test_clock_counts_running_time_only(monkeypatch):
    fake = FakeTime(monkeypatch)
    clock = tg.StepClock(5.0)
    fake.now += 100  # not started yet
    assert clock.now() == 5
    clock.go_on()
    fake.now += 2
    assert clock.now() == 7
    clock.pause()
    fake.now += 50
    assert clock.now() == 7  # a checkpoint written now says 7, not 9 or 59
    clock.go_on()
    fake.now += 1
    assert clock.now() == 8
    for seconds in (4.0, 2.0):
        clock.record(seconds, 4)
    assert clock.block_seconds() == pytest.approx(1.1 * 1.0)
    for _ in range(10):
        clock.record(2.0, 4)
    assert clock.block_seconds() == pytest.approx(1.1 * 0.5)  # the slow step is forgotten


def test_training_never_exceeds_its_budget(cfg, world, tmp_path, monkeypatch):
    """Steps of 1 s that become 1.5 s with the loops (6 blocks instead of 4): the step that would overrun is not begun."""
    cfg = dataclasses.replace(
        cfg, iterations=1000, max_wallclock_seconds=20.9, gptq_reserve_seconds=1.0, train_seq_schedule_mode="wallclock"
    )
    fake, trainer, lines = FakeTime(monkeypatch), make_trainer(cfg, world), []
    trainer.train_step = lambda *a: 4.0
    taken = slow_steps(trainer, fake, lambda k, looping: 1.5 if looping else 1.0)
    run(cfg, world, tmp_path, log=lambda line, console=True: lines.append(line), trainer=trainer)
    seconds = sum(1.5 if looping else 1.0 for _, looping, _ in taken)
    assert seconds <= 19.9 == pytest.approx(cfg.train_budget_seconds)
    assert seconds + 1.1 * 1.5 > 19.9  # and the clock was used up: one more might not have fitted
    assert trainer.clock.seconds == pytest.approx(seconds)
    assert sum(line.startswith("stopping_early: wallclock_cap") for line in lines) == 1
    assert [looping for _, looping, _ in taken] == sorted(looping for _, looping, _ in taken)  # once on, loops stay on
    # what the step met is that of the clock's progress
    elapsed = 0.0
    for context, looping, _ in taken:
        assert (context, looping) == (32 if elapsed / 19.9 <= 0.5 else 64, elapsed / 19.9 >= 0.35)
        elapsed += 1.5 if looping else 1.0


def test_the_switch_to_loops_is_forecast(cfg, world, tmp_path, monkeypatch):
    """Plain steps of 2 s, looped ones of 3: with 2.5 s left after the switch no step is begun, though a plain one would fit."""
    cfg = dataclasses.replace(
        cfg, max_wallclock_seconds=6.6, gptq_reserve_seconds=0.0, enable_looping_at=0.6, train_seq_schedule_mode="wallclock"
    )
    fake, trainer = FakeTime(monkeypatch), make_trainer(cfg, world)
    trainer.train_step = lambda *a: 4.0
    taken = slow_steps(trainer, fake, lambda k, looping: 3.0 if looping else 2.0)
    run(cfg, world, tmp_path, trainer=trainer)
    assert len(taken) == 2 and trainer.clock.seconds == 4.0


def test_the_ranks_stop_together(cfg, world, tmp_path, monkeypatch):
    """A rank decides from what World.max gave it: clock, forecast and stop request. Another rank's slow step ends this one too."""
    cfg = dataclasses.replace(
        cfg, max_wallclock_seconds=10.0, gptq_reserve_seconds=0.0, train_seq_schedule_mode="wallclock", enable_looping_at=2.0
    )
    fake, trainer = FakeTime(monkeypatch), make_trainer(cfg, world)
    trainer.train_step = lambda *a: 4.0
    slow_steps(trainer, fake, lambda k, looping: 1.0)
    agreed = []

    def max_over_ranks(self, *values):
        if len(values) > 1:
            agreed.append(values)
            values = (values[0], max(values[1], 8.0 / 4 if len(agreed) == 4 else 0), *values[2:])  # the other rank took 8 s
        return list(values)

    monkeypatch.setattr(tg.World, "max", max_over_ranks)
    run(cfg, world, tmp_path, trainer=trainer)
    assert trainer.step == 3


def test_utilization_is_flops_over_time(world, monkeypatch):
    """Per interval, not since the start; of a datasheet's peak only where there is one; pauses count where they are asked for."""
    monkeypatch.setattr(tg, "measured_peak", lambda world: 200.0)
    monkeypatch.setattr(tg, "hardware_name", lambda world: "1x NVIDIA H200")
    monkeypatch.setattr(tg, "PEAK_FLOPS", {"H200": 400.0})
    now = FakeTime(monkeypatch)
    u = tg.Utilization(world)

    def step(matmul, attention, seconds, pause, scored):
        u.work.add(tg.Flops(matmul, 0.0, attention), "train", 1, scored)
        u.seconds += seconds
        now.now += seconds + pause

    step(10.0, 10.0, 2.0, 0.0, 0.5)  # 3 x 20 FLOP in 2 s, half of them for scored tokens
    assert u.interval() == "mfu:0.0750 of_measured:0.1500 useful:0.0375 hardware:0.0813 with_pauses:0.0750"
    step(40.0, 0.0, 1.0, 3.0, 1.0)
    assert u.interval() == "mfu:0.3000 of_measured:0.6000 useful:0.3000 hardware:0.3000 with_pauses:0.0750"
    result = u.result(wall_seconds=6.0)
    assert result["model"]["mfu"] == pytest.approx(180 / 3 / 400) and result["model_flops"] == 180
    assert result["useful"]["mfu"] == pytest.approx(150 / 3 / 400)
    assert result["hardware"]["of_measured"] == pytest.approx((3 * 50 + 3.5 * 10) / 3 / 200)
    for kind in ("model", "useful", "hardware"):
        assert result[f"{kind}_with_pauses"]["mfu"] == pytest.approx(result[kind]["mfu"] / 2)
    monkeypatch.setattr(tg, "PEAK_FLOPS", {})
    unknown = tg.Utilization(world)
    assert unknown.result(1.0)["model"] == dict(mfu=None, of_measured=0.0) and unknown.interval().startswith("mfu:n/a of_measured:0.0000")


def test_the_measured_peak_is_work_over_time(world, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(tg.time, "perf_counter", lambda: 0.1 * next(ticks))
    assert tg.measured_peak.__wrapped__(world) == pytest.approx(2 * 256**3 / (0.1 / 4))  # four products between two ticks


def test_force_stop_step_overrides_the_clock(cfg, world, tmp_path, monkeypatch):
    cfg = dataclasses.replace(
        cfg, max_wallclock_seconds=5.0, gptq_reserve_seconds=1.0, force_stop_step=9, train_seq_schedule_mode="wallclock"
    )
    fake, trainer = FakeTime(monkeypatch), make_trainer(cfg, world)
    trainer.train_step = lambda *a: 4.0
    taken = slow_steps(trainer, fake, lambda k, looping: 1.0)
    run(cfg, world, tmp_path, trainer=trainer)
    assert trainer.step == len(taken) == 9 and trainer.clock.seconds == 9


def test_validation_and_checkpoints_pause_the_clock(cfg, world, tmp_path, monkeypatch):
    cfg = dataclasses.replace(cfg, iterations=6, val_loss_every=2, checkpoint_seconds=2.5)
    fake, trainer = FakeTime(monkeypatch), make_trainer(cfg, world)
    trainer.train_step = lambda *a: 4.0
    slow_steps(trainer, fake, lambda k, looping: 1.0)
    scored, saved, save = [], [], trainer.checkpoint

    def validate():
        scored.append(trainer.step)
        fake.now += 100
        return no_score()

    def checkpoint(path):
        fake.now += 30
        save(path)
        saved.append(torch.load(path, weights_only=True)["seconds"])

    trainer.checkpoint = checkpoint
    tg.train(trainer, validate, quiet, tmp_path / "checkpoint.pt")
    assert scored == [2, 4, 6, 6]  # the last one is the final score
    assert saved == [3.0, 6.0]
    assert trainer.clock.seconds == 6 and [s for _, s, _ in trainer.losses] == [1, 2, 3, 4, 5, 6]


# ---- the size of the artifact so far


@pytest.mark.parametrize("quant", ["rd", "s14", "s05"])
def test_a_predicted_size_does_not_touch_training(cfg, world, tmp_path, monkeypatch, whole, quant):
    trainer, fake, lines = make_trainer(dataclasses.replace(cfg, quant=quant), world), FakeTime(monkeypatch), []
    slow_steps(trainer, fake, lambda k, looping: 1e-4 if k else 1.0)

    def forecast(tokens):
        fake.now += 1e-7
        return tg.forecast_size(trainer.cfg, world, trainer.model, trainer.ema.shadow, tokens, 1000)

    tg.train(trainer, no_score, lines.append, tmp_path / "checkpoint.pt", forecast)
    assert sum("predicted_size: " in line for line in lines) == 11, "all but the first step"
    assert loss_values(trainer) == whole[0]
    assert_same(fingerprint(trainer), whole[1])


def test_a_predicted_size_costs_one_percent_and_never_the_budget(cfg, world, tmp_path, monkeypatch):
    cfg = dataclasses.replace(cfg, iterations=1000, max_wallclock_seconds=600.0, gptq_reserve_seconds=0.0)
    fake, trainer, asked = FakeTime(monkeypatch), make_trainer(cfg, world), []
    trainer.train_step = lambda *a: 4.0
    slow_steps(trainer, fake, lambda k, looping: 1.0)

    def ask(tokens):
        asked.append(fake.now - 1000)
        fake.now += 2.0
        return "predicted_size: 1"

    tg.train(trainer, no_score, quiet, tmp_path / "checkpoint.pt", ask)
    assert asked == [301, 504] and trainer.clock.seconds <= 600
    other = make_trainer(dataclasses.replace(cfg, max_wallclock_seconds=304.0), world)
    asked.clear()
    other.train_step = lambda *a: 4.0
    start = fake.now = 1000.0
    slow_steps(other, fake, lambda k, looping: 1.0)
    tg.train(other, no_score, quiet, tmp_path / "checkpoint.pt", ask)
    assert not asked and fake.now - start <= 304, "three steps' time, twice, is not left"


# ---- checkpoints


@pytest.mark.parametrize("stop", [1, 5, 7, 8, 10])
def test_resume_is_exact(cfg, world, tmp_path, stop, whole):
    """Early, before the switch to loops (step 5), at the context change (step 7), within its ramp and after."""
    interrupted(make_trainer(cfg, world), stop, tmp_path)
    again = make_trainer(cfg, world)
    again.load_state(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert again.step == stop
    run(cfg, world, tmp_path, trainer=again)
    assert loss_values(again) == whole[0]
    assert_same(fingerprint(again), whole[1])


def interrupted(trainer, stop, folder) -> tg.Trainer:
    """Train, ask to stop during step `stop`, and hand the trainer back when it has done so."""
    step = trainer.train_step

    def with_signal(*args):
        loss = step(*args)
        if trainer.step + 1 == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    trainer.train_step = with_signal
    with pytest.raises(tg.Interrupted, match=rf"after step {stop}; .*checkpoint.pt.*RESUME=1"):
        tg.train(trainer, no_score, quiet, folder / "checkpoint.pt")
    assert trainer.step == stop
    trainer.train_step = step
    return trainer


def test_the_trainer_of_an_interrupted_run_can_go_on_too(cfg, world, tmp_path, whole):
    trainer = interrupted(make_trainer(cfg, world), 4, tmp_path)
    run(cfg, world, tmp_path, trainer=trainer)
    assert_same(fingerprint(trainer), whole[1])


def test_an_interrupted_run_keeps_its_time(cfg, world, tmp_path, monkeypatch):
    """The seconds in the checkpoint are those of the steps: the budget of the resumed run is what was left."""
    cfg = dataclasses.replace(
        cfg, max_wallclock_seconds=7.05, gptq_reserve_seconds=0.0, train_seq_schedule_mode="wallclock", enable_looping_at=2.0
    )
    fake, trainer = FakeTime(monkeypatch), make_trainer(cfg, world)
    slow_steps(trainer, fake, lambda k, looping: 1.0)
    interrupted(trainer, 3, tmp_path)
    fake.now += 500
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["seconds"] == 3.0 and state["step"] == 3
    again = make_trainer(cfg, world)
    again.load_state(state)
    fake.now += 500  # loading, compiling
    slow_steps(again, fake, lambda k, looping: 1.0)
    run(cfg, world, tmp_path, trainer=again)
    assert again.step == 6 and again.clock.seconds == 6.0  # 6 + 1.1 > 7.05


def test_signals_are_handed_back(cfg, world, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with tg.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):  # the second one does not wait
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("change", [dict(matrix_lr=0.01), dict(seed=7), dict(iterations=13)])
def test_resume_with_another_recipe_is_refused(cfg, world, tmp_path, change):
    trainer = make_trainer(cfg, world)
    state = trainer.state()
    other = make_trainer(dataclasses.replace(cfg, **change), world)
    before = fingerprint(other)
    with pytest.raises(tg.RunError, match="another configuration or seed"):
        other.load_state(state)
    assert_same(fingerprint(other), before)
    make_trainer(dataclasses.replace(cfg, run_id="x", artifact_dir="y", resume=True), world).load_state(state)  # names are no recipe


def test_a_bad_loss_stops_the_run_and_keeps_the_last_good_state(cfg, world, tmp_path, whole):
    trainer = make_trainer(cfg, world)
    step, good = trainer.train_step, {}

    def poisoned(*args):
        if trainer.step == 4:
            good.update(fingerprint(trainer))
            forward = trainer.forward
            trainer.forward = lambda *inputs, **options: forward(*inputs, **options) * float("nan")
            try:
                return step(*args)
            finally:
                trainer.forward = forward
        return step(*args)

    trainer.train_step = poisoned
    with pytest.raises(tg.RunError, match=r"step 5: the gradient norm is nan; .*checkpoint.pt.*MATRIX_LR"):
        run(cfg, world, tmp_path, trainer=trainer)
    again = make_trainer(cfg, world)
    again.load_state(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert again.step == 4
    assert_same(fingerprint(again), good)
    run(cfg, world, tmp_path, trainer=again)  # the step's data is read again: as if nothing had happened
    assert_same(fingerprint(again), whole[1])


def test_a_poisoned_weight_stops_the_run(cfg, world, tmp_path):
    trainer = make_trainer(cfg, world)
    with torch.no_grad():
        trainer.model.mlp_up_bank[1, 0, 0] = float("nan")
        trainer.model.mlp_down_bank[1] = 0.1
    with pytest.raises(tg.RunError, match="step 1: the gradient norm is nan"):
        run(cfg, world, tmp_path, trainer=trainer)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 0


def test_no_step_at_all_is_an_error(cfg, world, tmp_path):
    with pytest.raises(tg.RunError, match="no step fits"):
        run(
            dataclasses.replace(cfg, iterations=0, max_wallclock_seconds=5.0, train_seq_schedule_mode="step", gptq_reserve_seconds=1.0),
            world,
            tmp_path,
        )


# ---- the compiler


@contextlib.contextmanager
def clean_compiler():
    """The limits of dynamo are process-wide: put them back, and forget the graphs."""
    config = torch._dynamo.config
    limits = config.recompile_limit, config.accumulated_recompile_limit
    torch._dynamo.reset()
    try:
        yield
    finally:
        config.recompile_limit, config.accumulated_recompile_limit = limits
        torch._dynamo.reset()


def count_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_training_and_scoring_compile_into_few_whole_graphs(cfg, world, tmp_path):
    """fullgraph=True raises at a graph break. Training: one graph per loop mode (the attention of a CPU ignores the longest segment, so
    the context makes no graph of its own); scoring: one more per shape of rows; same losses as eager."""
    cfg = dataclasses.replace(cfg, **SHALLOW, iterations=8)
    compiled_cfg = dataclasses.replace(cfg, compile_backend="aot_eager", compile_allow_recompiles=True)
    eager = run(cfg, world, tmp_path)
    data = tg.ValData.load(dataclasses.replace(cfg, val_doc_fraction=0.4), eager.files)
    with clean_compiler():
        before = count_graphs()
        compiled = run(compiled_cfg, world, tmp_path)
        assert count_graphs() - before == 2
        # aot_eager runs the same kernels, decomposed: fp32 rounding, grown over eight steps of Muon
        assert loss_values(compiled) == pytest.approx(loss_values(eager), abs=2e-3)
        assert compiled.losses[0][2] == pytest.approx(eager.losses[0][2], abs=2e-5)
        compiled.model.load_state_dict(eager.model.state_dict())
        before = count_graphs()
        for method in ("packed", "sliding"):
            scoring = dataclasses.replace(cfg, eval_method=method)
            ours = tg.evaluate(scoring, world, compiled.forward, tg.Scorer(data, world))
            theirs = tg.evaluate(scoring, world, eager.model, tg.Scorer(data, world))
            assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert count_graphs() - before <= 3  # packed rows, full batches of windows, and the last one


@pytest.mark.parametrize("phased", [False, True])
def test_test_time_training_compiles_into_few_whole_graphs(phased, cfg, world, random_model, monkeypatch):
    """Widths grow with every chunk, so they are dynamic: graphs per (chunk size, learning or not), not per width. Phases add one."""
    cfg = dataclasses.replace(cfg, **SHALLOW, phased_ttt_enabled=phased, val_doc_fraction=0.4, ttt_batch_size=2,
                              phased_ttt_prefix_docs=2, global_ttt_chunk_tokens=cfg.eval_seq_len)
    data = tg.ValData.load(cfg, tg.Dataset.open(cfg, need_train=False))
    model = random_model(cfg).requires_grad_(False).eval()
    start = copy.deepcopy(model.state_dict())
    expected = tg.TttRun(cfg, tg.TttEngine(cfg, world, model, data), tg.Scorer(data, world), quiet).run()
    learned = copy.deepcopy(model.state_dict())
    model.load_state_dict(start)
    with clean_compiler():
        before = count_graphs()
        cfg = dataclasses.replace(cfg, compile_backend="aot_eager")
        engine = tg.TttEngine(cfg, world, model, data)
        engine.warm_up(quiet)
        ttt = tg.TttRun(cfg, engine, tg.Scorer(data, world), quiet)
        ours = ttt.run()  # an error if anything were compiled here
        graphs = count_graphs() - before
    assert (ours.tokens, ours.bytes) == (expected.tokens, expected.bytes)
    assert ours.loss == pytest.approx(
        expected.loss, abs=1e-3
    )  # padded rows: other kernels, and AdamW turns noise in tiny gradients into steps
    assert graphs <= 4 + phased  # with and without gradients; dynamic widths and chunk sizes may cost one more each
    assert ttt.phases_done == phased
    moved = {name: (t - start[name]).norm() for name, t in learned.items()}
    assert phased == any(moved.values())
    for name, t in model.state_dict().items():
        assert (t - learned[name]).norm() <= 0.02 * moved[name], name


def test_a_compilation_in_timed_training_is_an_error_that_names_its_reason(cfg, world, tmp_path):
    """Without a warm-up the first step compiles. The checkpoint keeps what was learned, and the knob accepts it."""
    cfg = dataclasses.replace(cfg, **SHALLOW, iterations=8, compile_backend="eager")
    with clean_compiler():
        cold = make_trainer(cfg, world)
        with pytest.raises(tg.RunError, match=r"step 1: the compiler was at work in timed code \(forward 0/0: the first graph\)"):
            tg.train(cold, no_score, quiet, tmp_path / "checkpoint.pt")
        assert tg.load_tensors(tmp_path / "checkpoint.pt", "cpu")["step"] == 1
        allowed = dataclasses.replace(cfg, compile_allow_recompiles=True)
        assert tg.config_hash(allowed) == tg.config_hash(cfg)  # so that the checkpoint may go on with it
        trainer = make_trainer(allowed, world)
        trainer.load_state(tg.load_tensors(tmp_path / "checkpoint.pt", "cpu"))
        assert run(allowed, world, tmp_path, trainer=trainer).step == 8


def test_a_shape_that_the_warm_up_missed_is_named(cfg, world, tmp_path, monkeypatch):
    cfg = dataclasses.replace(cfg, **SHALLOW, iterations=8, compile_backend="eager")
    with clean_compiler():
        trainer = make_trainer(cfg, world)
        trainer.warm_up(quiet)
        made = len(tg.compilations(world))
        run(cfg, world, tmp_path, trainer=trainer)  # every shape of a run is warm
        assert len(tg.compilations(world)) == made and made >= 2
        torch._dynamo.reset()
        shapes = tg.warm_shapes(cfg)
        monkeypatch.setattr(tg, "warm_shapes", lambda cfg: [shape for shape in shapes if not shape[1]])
        trainer = make_trainer(cfg, world)
        trainer.warm_up(quiet)
        with pytest.raises(tg.RunError, match=r"the compiler was at work in timed code \(forward 0/\d+: 0/\d+: "):
            run(cfg, world, tmp_path, trainer=trainer)


def many_documents(count: int) -> np.ndarray:
    """A row of TINY's 256 predictions with that many documents."""
    tokens = np.random.default_rng(count).integers(4, 64, 257).astype(np.uint16)
    tokens[:count] = tg.BOS_ID
    return tokens


def test_more_documents_in_a_row_than_were_warmed_compile_nothing(cfg, world):
    """The warm-up meets the least segments a row can have and three buckets more; the compiled code is one for all of them."""
    cfg = dataclasses.replace(cfg, **SHALLOW, compile_backend="eager")
    with clean_compiler():
        trainer = make_trainer(cfg, world)
        trainer.warm_up(quiet)
        made = len(tg.compilations(world))
        losses = []
        for forward in (trainer.forward, trainer.model):
            trainer.forward = forward
            for context, looping in tg.warm_shapes(cfg):
                row = tg.packed_row(many_documents(256), context, world.device)
                assert len(row.segments.cu_seqlens) == 320 > max(tg.warm_lengths(256, context))
                losses.append(trainer.loss(row, tg.layer_order(cfg, looping)))
        assert len(tg.compilations(world)) == made
        torch.testing.assert_close(losses[: len(losses) // 2], losses[len(losses) // 2 :])


def test_lengths_to_warm():
    assert tg.warm_lengths(98304, 3072) == tg.warm_lengths(98304, 2048) == [64, 128, 192, 256]
    assert tg.warm_lengths(98304, 1024) == [128, 192, 256, 320] and tg.warm_lengths(64 * 3072, 3072)[0] == 128
    for tokens, context in ((256, 32), (98304, 1024), (64 * 63, 64), (1 << 20, 1024)):
        least = len(tg.document_cu_seqlens(np.zeros(1, np.int64), tokens, context))
        assert tg.warm_lengths(tokens, context)[0] == least


# ---- CUDA graphs, without CUDA: see `recordings`


def test_training_in_graphs_is_training(cfg, world, tmp_path, recordings):
    """Bit for bit, with two micro-batches a step, a growing context and loops: all graphs are recorded before the clock starts."""
    cfg = dataclasses.replace(cfg, **SHALLOW, iterations=8, compile_shape_warmup=True)
    plain = run(cfg, world, tmp_path)
    trainer = make_trainer(dataclasses.replace(cfg, cuda_graphs=True), world)
    before, made, shapes = fingerprint(trainer), len(tg.compilations(world)), tg.warm_shapes(cfg)
    trainer.warm_up(quiet)
    assert_same(fingerprint(trainer), before)
    assert len(trainer.graphs.recorded) == sum(len(tg.warm_lengths(256, context)) for context, _ in shapes) == len(recordings) / 2
    assert tg.compilations(world)[made:] == [
        f"CUDA graph of [(1, 256), (1, 256), ({n},)]" for context, _ in shapes for n in tg.warm_lengths(256, context)]
    replays = sum(recording.replays for recording in recordings)
    run(cfg, world, tmp_path, trainer=trainer)  # an error if anything were recorded here
    assert sum(recording.replays for recording in recordings) - replays == 8 * 2 * 2  # steps, micro-batches, forward and backward
    assert loss_values(trainer) == loss_values(plain)
    assert_same(fingerprint(trainer), fingerprint(plain))


def test_a_row_of_many_documents_is_trained_without_a_graph(cfg, world, recordings):
    trainer = make_trainer(dataclasses.replace(cfg, cuda_graphs=True), world)
    for count, graphs in ((256, 0), (3, 1)):
        row = tg.packed_row(many_documents(count), 64, world.device)
        for _ in range(2):
            trainer.loss(row, tg.layer_order(cfg, True)).backward()
        assert len(trainer.graphs.recorded) == graphs


def test_nothing_is_compiled_while_a_graph_is_recorded(cfg, world, random_model, monkeypatch):
    """A recording sees other tensors than the run before it, leaves of their own among them, and must fit the same compiled code."""
    made = []

    def record(forward, sample, **options):
        before = len(tg.compilations(world))
        out = forward(*sample)
        torch.autograd.grad(out.sum(), [t for t in sample if t.requires_grad], allow_unused=True)
        made.append(len(tg.compilations(world)) - before)
        return forward

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    world.recordings.clear()
    cfg = dataclasses.replace(cfg, **SHALLOW, cuda_graphs=True, ttt_bucket=32, val_doc_fraction=0.4, compile_backend="eager")
    with clean_compiler():
        trainer = make_trainer(cfg, world)
        trainer.warm_up(quiet)
        trainer.loader.close()
        micro_batches = len(made)
        data = tg.ValData.load(cfg, trainer.files)
        tg.TttEngine(cfg, world, random_model(cfg).requires_grad_(False), data).warm_up(quiet)
    assert 8 <= micro_batches < len(made) and not any(made)


def test_a_graph_recorded_in_timed_code_is_an_error(cfg, world, tmp_path, recordings):
    cfg = dataclasses.replace(cfg, **SHALLOW, iterations=4, cuda_graphs=True)
    with pytest.raises(tg.RunError, match=r"step 1: the compiler was at work in timed code \(CUDA graph of \[\(1, 256\), .*COMPILE_ALLOW"):
        run(cfg, world, tmp_path)
    allowed = dataclasses.replace(cfg, compile_allow_recompiles=True)
    assert run(allowed, world, tmp_path).step == 4


def test_validation_may_compile(cfg, world, tmp_path):
    cfg = dataclasses.replace(cfg, **SHALLOW, iterations=4, val_loss_every=2, compile_backend="eager")
    with clean_compiler():
        trainer = make_trainer(cfg, world)
        trainer.warm_up(quiet)
        data, made = tg.ValData.load(dataclasses.replace(cfg, val_doc_fraction=0.4), trainer.files), len(tg.compilations(world))
        validate = lambda: tg.evaluate(cfg, world, trainer.forward, tg.Scorer(data, world), trainer.looping)  # noqa: E731
        tg.train(trainer, validate, quiet, tmp_path / "checkpoint.pt")
        assert trainer.step == 4 and len(tg.compilations(world)) > made


def test_a_compilation_in_the_scored_evaluation_is_an_error(cfg, world, random_model):
    cfg = dataclasses.replace(cfg, **SHALLOW, phased_ttt_enabled=False, val_doc_fraction=0.4, compile_backend="eager")
    data = tg.ValData.load(cfg, tg.Dataset.open(cfg, need_train=False))
    model = random_model(cfg).requires_grad_(False)
    with clean_compiler(), pytest.raises(tg.RunError, match="evaluation batch [0-9]+: the compiler was at work in timed code.*STAGE=eval"):
        tg.TttRun(cfg, tg.TttEngine(cfg, world, model, data), tg.Scorer(data, world), quiet).run()
    with clean_compiler():
        cfg = dataclasses.replace(cfg, compile_allow_recompiles=True)
        assert tg.TttRun(cfg, tg.TttEngine(cfg, world, model, data), tg.Scorer(data, world), quiet).run().tokens
