"""CPU benchmarks: `python bench/cpu.py [NAME...]`. One JSON line each, then a table.

Speed is a ratio to a reference measured in the same process; medians of repetitions; every result is checked before it is
timed. Text: English pages drawn from this Python's own documentation, so that it runs anywhere.
"""

import json
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import lossless_caps
import train_gpt as tg


def median_seconds(f, repeat: int = 7) -> float:
    """Median duration of f() after one call that does not count."""
    f()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def sample_text(size: int) -> str:
    """About `size` characters of help text with capitals, digits and punctuation."""
    import pydoc_data.topics

    text = "\n".join(pydoc_data.topics.topics.values())
    return (text * (size // len(text) + 1))[:size]


def caps_reference(text: str) -> str:
    """CaseOps word by word with a compiled regular expression."""
    op = dict(title=lossless_caps.TITLE, caps=lossless_caps.ALLCAPS, next=lossless_caps.CAPNEXT)

    def word(m: re.Match) -> str:
        w = m[0]
        low = w.lower()
        if w == low:
            return w
        if len(w) > 1 and w == w.upper():
            return op["caps"] + low
        if w[0] != low[0] and w[1:] == low[1:]:
            return op["title"] + low
        first = (op["title"] if w[0] != low[0] else "") + low[0]
        return first + "".join((op["next"] if a != b else "") + b for a, b in zip(w[1:], low[1:], strict=True))

    return re.sub("[A-Za-z]+", word, text)


def bench_caps() -> list[dict]:
    """MB of UTF-8 per second on one core, against a regular expression with a callback."""
    text = sample_text(1 << 19)
    encoded = lossless_caps.encode(text)
    assert encoded == caps_reference(text) and lossless_caps.decode(encoded) == text
    mb = len(text.encode()) / 1e6
    reference = mb / median_seconds(lambda: caps_reference(text), 3)
    rows = []
    for name, f in (("caps encode", lambda: lossless_caps.encode(text)), ("caps decode", lambda: lossless_caps.decode(encoded))):
        speed = mb / median_seconds(f)
        rows.append(dict(name=name, unit="MB/s", value=round(speed, 1), reference="regex", reference_value=round(reference, 1),
                         ratio=round(speed / reference, 2)))
    return rows


def bench_attention() -> list[dict]:
    """Forward and backward of packed document attention, against the loop of SDPA that defines it."""
    generator = torch.Generator().manual_seed(0)
    T, H, G, d = 4096, 4, 2, 32
    q, k, v = (torch.randn(T, heads, d, generator=generator, requires_grad=True) for heads in (H, G, G))
    starts = torch.randperm(T, generator=generator)[:12].sort().values.numpy()
    cu = torch.from_numpy(tg.document_cu_seqlens(starts, T, 512))
    grad = torch.randn(T, H, d, generator=generator)

    def run(attend):
        out = attend(q, k, v, cu, 512)
        return out, torch.autograd.grad(out, (q, k, v), grad)

    (out, grads), (expected, expected_grads) = run(tg.document_attention_cpu), run(tg.document_attention_reference)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)
    ours, reference = (median_seconds(lambda a=a: run(a)) for a in (tg.document_attention_cpu, tg.document_attention_reference))
    return [dict(name="document attention fwd+bwd", unit="ms", value=round(1e3 * ours, 2), reference="SDPA per document",
                 reference_value=round(1e3 * reference, 2), ratio=round(reference / ours, 2))]


def bench_gptq() -> list[dict]:
    """GPTQ of 8 matrices at once, against one at a time."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(8, 128, 256, generator=generator)
    x = torch.randn(8, 512, 256, generator=generator)
    H, clip, none = x.mT @ x, 12 * W.std(-1), torch.zeros(8, 256, dtype=torch.bool)

    def one_by_one():
        return [tg.gptq(W[i : i + 1], H[i : i + 1], clip[i : i + 1], 6, none[:1], 8)[0] for i in range(8)]

    batched, single = tg.gptq(W, H, clip, 6, none, 8)[0], torch.cat(one_by_one())
    assert (batched != single).float().mean() < 1e-3  # the two sum in different orders: a rare tie may fall the other way
    ours, reference = median_seconds(lambda: tg.gptq(W, H, clip, 6, none, 8), 3), median_seconds(one_by_one, 3)
    return [dict(name="gptq 8x128x256", unit="ms", value=round(1e3 * ours, 1), reference="one at a time",
                 reference_value=round(1e3 * reference, 1), ratio=round(reference / ours, 2))]


def bench_ngram() -> list[dict]:
    """Hints of the n-gram tilt, against one pass over a dictionary of contexts."""
    cfg, rng = tg.Config(token_order=8), np.random.default_rng(0)
    phrases = [rng.integers(2, 200, rng.integers(3, 12)) for _ in range(2000)]
    tokens = np.concatenate([[tg.BOS_ID], *(phrases[i] for i in rng.zipf(1.5, 40_000) % 2000)])[:200_000].astype(np.uint16)
    order, n = np.arange(len(tokens) - 1), cfg.token_order - 1

    def reference() -> list[int]:
        table, hints, stream = {}, [], tokens.tolist()
        for i in range(len(stream) - 1):
            hints.append(-1)
            if i < n - 1:
                continue
            counts, total, best = table.get(context := tuple(stream[i - n + 1 : i + 1]), ({}, 0, None))
            if total and counts[best] / total >= cfg.token_threshold:
                hints[-1] = best
            y = stream[i + 1]
            counts[y] = counts.get(y, 0) + 1
            table[context] = (counts, total + 1, y if best is None or counts[y] > counts[best] else best)
        return hints

    assert tg.ngram_hints(cfg, tokens, order, "cpu").tolist() == reference()
    ours, slow = (len(tokens) / 1e3 / median_seconds(f, 3) for f in (lambda: tg.ngram_hints(cfg, tokens, order, "cpu"), reference))
    return [dict(name="n-gram hints", unit="ktok/s", value=round(ours), reference="a dictionary", reference_value=round(slow),
                 ratio=round(ours / slow, 2))]


def bench_polar() -> list[dict]:
    """Orthogonalisation of a bank of matrices at once, against one at a time (B8)."""
    G = torch.randn(8, 256, 128, generator=torch.Generator().manual_seed(0))
    ours = tg.polar_express(G, 5)
    assert (torch.linalg.svdvals(ours) - 1).abs().max() < 0.2
    torch.testing.assert_close(ours, torch.cat([tg.polar_express(g, 5) for g in G.split(1)]), rtol=1e-3, atol=1e-4)
    batched = median_seconds(lambda: tg.polar_express(G, 5))
    single = median_seconds(lambda: [tg.polar_express(g, 5) for g in G.split(1)])
    return [dict(name="polar express 8x256x128", unit="ms", value=round(1e3 * batched, 2), reference="one at a time",
                 reference_value=round(1e3 * single, 2), ratio=round(single / batched, 2))]


def bench_pack() -> list[dict]:
    """Coders on a million Gaussian symbols of 6 bits (clip 12.85 sigma): bits per symbol against their entropy, and MB per second (B14)."""
    symbols = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 31 / 12.85).round().clamp(-31, 31).to(torch.int8).numpy()
    counts = torch.bincount(torch.from_numpy(symbols).int() + 31).double()
    share = counts[counts > 0] / counts.sum()
    entropy, raw, rows = -(share * share.log2()).sum().item(), symbols.tobytes(), []
    for coder in ("brotli",):
        encode, decode = tg.CODERS[coder].encode, tg.CODERS[coder].decode
        packed = encode(raw)
        assert decode(packed, len(raw)) == raw
        bits = 8 * len(packed) / len(symbols)
        rows.append(dict(name=f"{coder} of 6-bit symbols", unit="bits", value=round(bits, 4), reference="their entropy",
                         reference_value=round(entropy, 4), ratio=round(entropy / bits, 4)))
        seconds, back = median_seconds(lambda e=encode: e(raw), 1), median_seconds(lambda d=decode, p=packed: d(p, len(raw)), 3)
        rows.append(dict(name=f"{coder} decode", unit="MB/s", value=round(len(raw) / back / 1e6, 2), reference="encode",
                         reference_value=round(len(raw) / seconds / 1e6, 2), ratio=round(seconds / back, 2)))
    return rows


BENCHES = dict(caps=bench_caps, attention=bench_attention, gptq=bench_gptq, polar=bench_polar, pack=bench_pack, ngram=bench_ngram)


def main(names: list[str]) -> int:
    if unknown := [n for n in names if n not in BENCHES]:
        print(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    rows = [row for name in names or BENCHES for row in BENCHES[name]()]
    for row in rows:
        print(json.dumps(row))
    print(f"\n{'what':<28}{'ours':>10}{'reference':>12}{'unit':>7}{'ratio':>8}  reference is")
    for r in rows:
        print(f"{r['name']:<28}{r['value']:>10}{r['reference_value']:>12}{r['unit']:>7}{r['ratio']:>8}  {r['reference']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
