"""Bytes that a compiled micro-batch, or step of test-time training, moves, counted without running it: `python bench/traffic.py`.

Dynamo, AOTAutograd and Inductor's scheduler see the S14 network at its real sizes (98,304 tokens or 24 documents of 1,024, bf16) as
tensors without data; each kernel Inductor would emit is charged what it reads and writes. Its rules for the CPU decide what is
fused here, so the numbers are not those of a GPU; they are a price for changes of the graph: tests/test_bench.py holds them below
bench/traffic.json. An optimizer step is not compiled: there, operators are charged, without the products of the orthogonalisation.
`--write` replaces that file.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from torch._inductor import compile_fx
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


class Counter:
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

    def __call__(self, gm, example_inputs):
        return compile_fx.compile_fx(gm, example_inputs, inner_compile=self.inner)


def forward_backward(layers: int, adapt: bool) -> dict:
    """Bytes and kernels of forward and backward of a network of so many blocks, one half of them with two lanes. adapt: of a chunk of 24
    tokens of each document, with frozen weights and S14's adapters; else of a packed row."""
    cfg = tg.Config(num_layers=layers, num_loops=0, parallel_start_layer=layers - layers // 2, xsa_last_n=layers)
    torch._dynamo.reset()
    counter = Counter()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = tg.GPT(cfg, torch.bfloat16, tg.DEFINITIONS._replace(attend=tg.document_attention_cpu))
        forward = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
        tokens = torch.zeros(*((24, 1024) if adapt else (1, TOKENS)), dtype=torch.int64)
        if adapt:
            model.requires_grad_(False)
            world = tg.World(0, 1, torch.device("cpu"), torch.bfloat16)
            lineage = tg.Lineage(cfg, world, len(tokens), cfg.ttt_lora_rank, cfg.ttt_lora_lr, cfg.ttt_weight_decay, cfg.ttt_beta2, 0)
            targets, how = tokens[:, -24:], dict(adapters=lineage.adapters, positions=torch.arange(1000, 1024).expand(len(tokens), -1))
        else:
            targets, how = tokens, dict(packing=tg.Packing(torch.zeros(192, dtype=torch.int32), 2048))
        forward(tokens, targets, order=tg.layer_order(cfg, False), **how).sum().backward()
    return dict(gigabytes=counter.bytes / 1e9, kernels=counter.kernels)


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
    model = tg.build_model(cfg, world)
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
        two, four = forward_backward(2, adapt), forward_backward(4, adapt)
        out |= {f"{prefix}{what}_{name}": value for name in two
                for what, value in (("two_blocks", two[name]), ("two_more_blocks", four[name] - two[name]))}
    return {name: round(value, 2) for name, value in out.items()} | dict(torch=torch.__version__)


def main() -> int:
    found = measure()
    print(json.dumps(found))
    if "--write" in sys.argv:
        COMMITTED.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
