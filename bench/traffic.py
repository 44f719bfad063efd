"""Bytes that a compiled micro-batch, or step of test-time training, moves, counted without running it: `python bench/traffic.py`.

Dynamo, AOTAutograd and Inductor's scheduler see the S14 network at its real sizes (98,304 tokens or 24 documents of 1,024, bf16) as
tensors without data; each kernel Inductor would emit is charged what it reads and writes. Its rules for the CPU decide what is
fused here, so the numbers are not those of a GPU; they are a price for changes of the graph: tests/test_bench.py holds them below
bench/traffic.json, and `--write` replaces that file. An optimizer step is not compiled: there, operators are charged, without the
products of the orthogonalisation.

`python bench/stand_in.py bench/traffic.py --gpu` counts by the rules for a GPU, with and without the Triton kernels; with `--compile`,
too, Inductor and Triton compile everything for sm_90, and the graphs and their seconds are told. One JSON line each.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch._inductor import compile_fx, config as inductor_config
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_gpt as tg

COMMITTED = Path(__file__).with_name("traffic.json")
TOKENS = 98_304


ALL_KERNELS = dict(mlp=tg.fused_mlp("lsb"), split_heads=tg.split_heads_op, gate_heads=tg.gate_heads_op, head_ce=tg.HeadCe.apply)


class Compiler:
    """A backend for torch.compile that compiles to the end and runs the graph as it is."""

    def __init__(self):
        self.seconds = []

    def inner(self, gm, example_inputs, **options):
        start = time.perf_counter()
        compile_fx.compile_fx_inner(gm, example_inputs, **options)
        self.seconds.append(round(time.perf_counter() - start, 1))
        return compile_fx.make_boxed_func(gm.forward)

    def __call__(self, gm, example_inputs):
        return compile_fx.compile_fx(gm, example_inputs, inner_compile=self.inner)

    def found(self) -> dict:
        return dict(graphs=len(self.seconds), compile_seconds=self.seconds)


class Counter(Compiler):
    """A backend for torch.compile that adds up bytes and runs the graph as it is."""

    def __init__(self):
        self.bytes = self.kernels = 0

    def inner(self, gm, example_inputs, **options):
        mode = compile_fx.fake_tensor_prop(gm, example_inputs)
        compile_fx.record_original_output_strides(gm)
        with V.set_fake_mode(mode):
            compile_fx._recursive_post_grad_passes(gm, options.get("is_inference", False))
            graph = GraphLowering(gm, shape_env=mode.shape_env)
            with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
                graph.run(*example_inputs)
                graph.init_wrapper_code()
                graph._update_scheduler()
                moved = [node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes]
        self.bytes, self.kernels = self.bytes + sum(moved), self.kernels + sum(size > 0 for size in moved)
        return compile_fx.make_boxed_func(gm.forward)

    def found(self) -> dict:
        return dict(gigabytes=self.bytes / 1e9, kernels=self.kernels)


def blocks(count: int) -> tg.Config:
    """S14 with so many blocks, one half of them with two lanes, and no loops."""
    return tg.Config(num_layers=count, num_loops=0, parallel_start_layer=count - count // 2, xsa_last_n=count)


def forward_backward(cfg: tg.Config, adapt: bool, backend=None, device: str = "cpu", widths: tuple[int, ...] = (1024,), **kernels) -> dict:
    """What `backend` (None: a Counter) finds at forward and backward. adapt: of a chunk of 24 tokens of each document, with frozen weights
    and S14's adapters, in windows of these `widths`, one after the other; else of a packed row. kernels: fields of `tg.Kernels`."""
    backend, order = backend or Counter(), tg.layer_order(cfg, looping=True)
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(device):
            model = tg.GPT(cfg, torch.bfloat16, tg.DEFINITIONS._replace(**dict(attend=tg.document_attention_cpu) | kernels))
        forward = torch.compile(model, backend=backend, fullgraph=True, dynamic=None if len(widths) > 1 else False)
        if not adapt:
            tokens = torch.zeros(1, TOKENS, dtype=torch.int64, device=device)
            segments = tg.Segments(torch.zeros(192, dtype=torch.int32, device=device), 2048)
            (forward(tokens, tokens, layers=order, segments=segments, training=True).sum() / TOKENS).backward()
            return backend.found()
        model.requires_grad_(False)
        world = tg.World(0, 1, torch.device(device), torch.bfloat16)
        chain = tg.AdapterChain(cfg, world, 24, seed=0)
        for width in widths:
            tokens = torch.zeros(24, width, dtype=torch.int64, device=device)
            positions = torch.arange(width - 24, width, device=device).expand(24, -1)
            if len(widths) > 1:
                torch._dynamo.maybe_mark_dynamic(tokens, 1)
            nats = forward(tokens, tokens[:, -24:], layers=order, adapters=chain.adapters, positions=positions)
            nats.sum().backward()
    return backend.found()


class Touched(TorchDispatchMode):
    """Adds up what operators read of their arguments, and write to them or to new memory."""

    def __init__(self):
        super().__init__()
        self.bytes = self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func._schema.name
        if not func.is_view and not name.startswith(("aten::empty", "aten::new_empty", "aten::_local_scalar")):
            def size(values) -> int:
                return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tree_leaves(values) if isinstance(t, torch.Tensor))

            given = tree_leaves((args, kwargs))
            declared = [a.alias_info for a in func._schema.arguments]
            written = [a for a, alias in zip(args, declared, strict=False) if alias and alias.is_write]
            new = [t for t in tree_leaves(out) if not any(t is a for a in given)]
            self.bytes += size(given) + size(written) + size(new)
            self.operators += 1
        return out


def optimizer_step(cfg: tg.Config) -> dict:
    """Bytes and operators of clipping, Muon but for its products, AdamW and the moving average: one process, bf16, a CPU."""
    world = tg.World(0, 1, torch.device("cpu"), torch.bfloat16)
    model = tg.build_model(cfg, world, tg.choose_kernels(cfg, world))
    optimizer, ema = tg.TrainOptimizer(model, cfg, world), tg.Ema(model, cfg.ema_decay)
    with mock.patch.object(tg, "polar_express", lambda G, steps: G):
        for _ in range(2):  # the first makes Adam's state
            for p in model.parameters():
                p.grad = torch.full_like(p, 1e-3) if p.requires_grad else None
            with Touched() as counter:
                optimizer.step(1.0, 0.95)
                ema.update(model)
    return dict(optimizer_gigabytes=counter.bytes / 1e9, optimizer_operators=counter.operators)


def measure() -> dict:
    """What the whole costs with two blocks, and each further pair of blocks; what an optimizer step of S14 costs."""
    out = optimizer_step(tg.Config())
    for prefix, adapt in (("", False), ("ttt_", True)):
        two, four = (forward_backward(blocks(count), adapt) for count in (2, 4))
        out |= {f"{prefix}{what}_{name}": value for name in two
                for what, value in (("two_blocks", two[name]), ("two_more_blocks", four[name] - two[name]))}
    return {name: round(value, 2) for name, value in out.items()} | dict(torch=torch.__version__)


def on_gpu(compile: bool):
    """Lines about S14 by the rules for a GPU: bytes of a micro-batch and of a learning step; or two blocks of it compiled."""
    options = dict(device="cuda", attend=tg.varlen_attention())
    training = dict(definitions={}, **{name: {name: kernel} for name, kernel in ALL_KERNELS.items()}, all=ALL_KERNELS)
    adapting = dict(definitions={}, all={name: kernel for name, kernel in ALL_KERNELS.items() if name != "head_ce"})
    inductor_config.shape_padding = False  # it times products to decide
    for adapt, variants in ((False, training), (True, adapting)):
        for name, kernels in variants.items():
            what = dict(what="learning step" if adapt else "micro-batch", kernels=name, torch=torch.__version__)
            if not compile:
                found = forward_backward(tg.Config(), adapt, Counter(), **options, **kernels)
                yield what | dict(gigabytes=round(found["gigabytes"], 2), launches=found["kernels"])
            elif name in adapting:
                yield what | forward_backward(blocks(2), adapt, Compiler(), widths=(1024, 512, 3072), **options, **kernels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--write", "--gpu", "--compile"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a GPU, or `python bench/stand_in.py bench/traffic.py --gpu`")
    for found in on_gpu(args.compile) if args.gpu else [measure()]:
        print(json.dumps(found), flush=True)
    if args.write:
        COMMITTED.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
