"""Compute the network of train_gpt.py a second time, in plain loops. Read this before its section MODEL.

One row of T tokens; no batches, no kernels, no folded scales, nothing fused. tests/test_model.py holds MODEL
equal to this file. Shapes: T tokens, D model_dim, H query heads, G key/value heads, d head_dim, F MLP width,
V vocabulary, L blocks.

`weights` is a published state dict. Its banks hold the matrices of all blocks, (n_out, n_in) each: row i of
qo_bank (2L, D, D) is Q of block i, row L + i its output projection; kv_bank (2L, G d, D) has K, then V.
"""

import math
from typing import NamedTuple

import torch


class Row(NamedTuple):
    """What all depths share: segments [(start, end)] that attention stays in, and the rotary frequencies."""

    segments: list
    frequencies: torch.Tensor  # (rope_dims / 2,), radians a token


def norm(x):
    """Divide every row of x (T, n) by its root mean square."""
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def layer_order(cfg, looping):
    """List the blocks in the order they run; when looping, LOOP_START..LOOP_END run 1 + NUM_LOOPS times."""
    order = list(range(cfg.num_layers))
    if looping and cfg.num_loops:
        order[cfg.loop_start : cfg.loop_end + 1] *= cfg.num_loops + 1
    return order


def rotary_frequencies(cfg, context):
    """Compute base^(-2 i / n) of every pair i, rounded to bf16; YaRN raises the base for long contexts."""
    base, n = cfg.rope_base, cfg.rope_dims
    if cfg.rope_yarn and context > cfg.rope_train_seq_len:
        base *= (context / cfg.rope_train_seq_len) ** (n / (n - 2))
    return torch.tensor([base ** (-2 * i / n) for i in range(n // 2)]).bfloat16().double()


def turn(head, frequencies):
    """Rotate the first 2 n dimensions of a head (T, d), in pairs (i, n + i), by position times frequency."""
    out, n = head.clone(), len(frequencies)
    for i in range(n):
        angle = torch.arange(len(head)).double() * frequencies[i]
        a, b = head[:, i], head[:, i + n]
        out[:, i] = a * angle.cos() + b * angle.sin()
        out[:, i + n] = b * angle.cos() - a * angle.sin()
    return out


def visible(segments, T, window):
    """Mark the keys (columns) that a query (row) sees: `window` tokens of its segment, itself the last."""
    mask = torch.zeros(T, T, dtype=torch.bool)
    for start, end in segments:
        for query in range(start, end):
            mask[query, max(start, query + 1 - window) : query + 1] = True
    return mask


def without_own_value(y, v):
    """Remove from a head's output y (T, d) its part along the token's own value v (T, d): XSA."""
    unit = v / v.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return y - (y * unit).sum(-1, keepdim=True) * unit


class PlainNetwork:
    """The network on one row.

    adapter(site, depth) -> None, or A (r, n_in), B (n_out, r) and a scale.
    see(site, x) is shown what a matrix reads.
    """

    def __init__(self, weights, cfg, adapter=None, see=None):
        self.weights, self.cfg = weights, cfg
        self.adapter = adapter or (lambda site, depth: None)
        self.see = see or (lambda site, x: None)

    def nats(self, tokens, targets, segments=None, looping=True, context=0):
        """Score a row: tokens and targets (T,) -> nats (T,). Without segments: one. `context` is for YaRN."""
        cfg, embedding = self.cfg, self.weights["tok_emb.weight"]  # (V, D); the head is the same matrix
        row = Row(segments or [(0, len(tokens))], rotary_frequencies(cfg, context))
        x = self.hidden(tokens, row, layer_order(cfg, looping))
        self.see("head", x)
        logits = x @ embedding.T + self.delta(x, "head", None)  # (T, V)
        logits = cfg.logit_softcap * torch.tanh(logits / cfg.logit_softcap)
        return torch.logsumexp(logits, -1) - logits[torch.arange(len(targets)), targets]

    def hidden(self, tokens, row, order):
        """Run the blocks in `order`: tokens (T,) -> (T, D).

        The first half is the encoder: each depth leaves its output for the second half, the decoder, which
        takes the last one first. From block PARALLEL_START_LAYER on the decoder has two streams, one read by
        attention and one by the MLP, and both sublayers write to both.
        """
        p, half, skips = self.weights, len(order) // 2, []
        x0 = self.embed(tokens)
        attn_stream, mlp_stream = x0, None  # None: one stream for both

        for depth, block in enumerate(order):
            in_decoder = depth >= half
            two_streams = self.cfg.parallel_start_layer and block >= self.cfg.parallel_start_layer
            if in_decoder and two_streams and mlp_stream is None:
                mlp_stream = attn_stream
            if in_decoder and skips:
                attn_stream = self.add_skip(attn_stream, skips.pop(), depth - half)

            mix = p[f"blocks.{block}.resid_mix"]  # (2, D): of the stream, of the embedding
            mixed = mix[0] * attn_stream + mix[1] * x0
            attn = self.attention(mixed, row, block, depth)
            if mlp_stream is None:
                attn_stream = mixed + attn
                attn_stream = attn_stream + self.mlp(attn_stream, block, depth)
            else:
                mlp = self.mlp(mlp_stream, block, depth)
                keep = p["parallel_resid_lambdas"][block]  # (2,), one a stream
                write = p["parallel_post_lambdas"][block]  # (2, 2): [who writes, which stream receives]
                attn_stream = keep[0] * attn_stream + write[0, 0] * attn + write[1, 0] * mlp
                mlp_stream = keep[1] * mlp_stream + write[0, 1] * attn + write[1, 1] * mlp
            if not in_decoder:
                skips.append(attn_stream)
        return norm(attn_stream if mlp_stream is None else (attn_stream + mlp_stream) / 2)

    def embed(self, tokens):
        """Look up tokens (T,) -> (T, D). Each has a gated share of the one before it in its document."""
        cfg, p = self.cfg, self.weights
        raw = p["tok_emb.weight"][tokens]
        x = raw.clone()
        for t in range(1, len(tokens) if cfg.smear_gate_enabled else 0):
            gate = p["smear_lambda"] * torch.sigmoid(p["smear_gate.weight"][0] @ raw[t, : cfg.gate_window])
            starts_document = cfg.smear_gate_bos_fix and tokens[t] == 1
            x[t] = raw[t] + (0 if starts_document else gate) * raw[t - 1]
        return norm(x)

    def add_skip(self, x, skipped, decoder_depth):
        """Combine the decoder's stream x (T, D) with an encoder's output (T, D)."""
        skipped = self.weights["skip_weights"][decoder_depth] * skipped
        if not self.cfg.skip_gates_enabled:
            return x + skipped
        gate = torch.sigmoid(self.weights["skip_gates"][decoder_depth])
        return gate * x + (1 - gate) * skipped

    def delta(self, x, site, depth):
        """Compute what the adapter of a site adds: x (T, n_in) -> (T, n_out), or 0."""
        found = self.adapter(site, depth)
        if found is None:
            return 0
        A, B, scale = found
        return scale * x @ A.double().T @ B.double().T

    def scaled_norm(self, x, block):
        """Norm what a sublayer reads (T, D); a later block reads less of it."""
        return norm(x) / (math.sqrt(block + 1) if self.cfg.ln_scale else 1)

    def attention(self, x, row, block, depth):
        """Let every token read those before it, head by head: x (T, D) -> (T, D)."""
        cfg, p, L = self.cfg, self.weights, self.cfg.num_layers
        d = cfg.model_dim // cfg.num_heads
        short = cfg.window_pattern[block % len(cfg.window_pattern)] == "S"
        mask = visible(row.segments, len(x), cfg.window_size if short else len(x))

        x = self.scaled_norm(x, block)
        self.see(f"blocks.{block}.attn_in", x)
        q = x @ p["qo_bank"][block].T + self.delta(x, "q", depth)      # (T, H d)
        k = x @ p["kv_bank"][block].T + self.delta(x, "k", depth)      # (T, G d)
        v = x @ p["kv_bank"][L + block].T + self.delta(x, "v", depth)  # (T, G d)

        heads = []
        for h in range(cfg.num_heads):
            group = h * cfg.num_kv_heads // cfg.num_heads
            own, shared = slice(h * d, (h + 1) * d), slice(group * d, (group + 1) * d)
            query = turn(norm(q[:, own]), row.frequencies) * p[f"blocks.{block}.attn.q_gain"][h]
            key = turn(norm(k[:, shared]), row.frequencies)
            scores = (query @ key.T / math.sqrt(d)).masked_fill(~mask, -math.inf)  # (T, T)
            y = scores.softmax(-1) @ v[:, shared]                                  # (T, d)
            if block >= L - cfg.xsa_last_n:
                y = without_own_value(y, v[:, shared])
            heads.append(self.gate(x, q, block, h)[:, None] * y)
        y = torch.cat(heads, 1)
        self.see(f"blocks.{block}.attn_out", y)
        y = y @ p["qo_bank"][L + block].T + self.delta(x, "o", depth)
        return p[f"blocks.{block}.attn_scale"] * y

    def gate(self, x, q, block, h):
        """Decide how much of head h passes: x (T, D), and q (T, H d) before its norm -> (T,)."""
        cfg, p, W = self.cfg, self.weights, self.cfg.gate_window
        if cfg.sparse_attn_gate_enabled:
            weight = p[f"blocks.{block}.attn.attn_gate_w"][h]  # (W,)
            return torch.sigmoid(cfg.sparse_attn_gate_scale * x[:, :W] @ weight)
        if cfg.gated_attn_enabled:
            return torch.sigmoid(x @ p[f"blocks.{block}.attn.attn_gate_w"][h])
        if cfg.attn_out_gate_enabled:
            source = x if cfg.attn_out_gate_src == "proj" else q
            return 2 * torch.sigmoid(source[:, :W] @ p[f"blocks.{block}.attn.attn_gate_proj.weight"][h])
        return torch.ones(len(x))

    def mlp(self, x, block, depth):
        """Expand, square a leaky ReLU, contract: x (T, D) -> (T, F) -> (T, D)."""
        p, slope = self.weights, self.cfg.mlp_slope
        x = self.scaled_norm(x, block)
        self.see(f"blocks.{block}.mlp_in", x)
        h = x @ p["mlp_up_bank"][block].T
        h = torch.where(h > 0, h, slope * h) ** 2
        self.see(f"blocks.{block}.mlp_mid", h)
        y = h @ p["mlp_down_bank"][block].T + self.delta(x, "mlp", depth)
        return p[f"blocks.{block}.mlp_scale"] * y
