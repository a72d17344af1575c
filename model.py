"""The language models: one transformer trunk and, on it, a thin class per architecture.

    Autoregressive   predicts the next token, sees what lies to the left       (GPT)
    Diffusion        fills hidden positions, sees every visible one            (MDLM, LLaDA)
    SDD(Diffusion)   the same, and hidden positions hold weighted candidates   (sparse distribution diffusion)

Each answers `model(tokens, loss_mask, noise)` with the sum of its loss in nats, the count of tokens
that the sum is over, and sums of metrics: sums, so that micro-batches and ranks of uneven size add up.
A row's first token is context for every architecture, never predicted and never counted.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

SIZES = {  # model_size: n_layer, n_head, n_embd
    'tiny': (4, 4, 128),
    'small': (6, 6, 384),
    'medium': (8, 8, 512),
    'large': (12, 12, 768),
    'xl': (24, 16, 1024),
}

MIN_LEVEL = 1e-3  # the least share of a row that diffusion hides: 1/level stays finite (MDLM's eps)
HEAD_ELEMENTS = 7 << 20  # logits that exist at once on a CPU: 28 MB in float32; 18 times as many on a GPU

linear = F.linear  # x Wᵀ + b; on a CPU `kernels.install` puts a faster one here
COSTLY = [  # what a block computes with many operations per number that comes out
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


@dataclass
class ModelConfig:
    """The shape of a model. The defaults are the native trunk; the switches make others of it: nanoGPT's by
    norm='layer', position='learned', mlp='gelu', bias=True, qk_norm=False, logit_softcap=0, and the
    pretrained families by those that families.py sets."""

    vocab_size: int  # real tokens, special ones included; the embedding is padded beyond it
    block_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = None  # fewer than n_head: grouped-query attention; None: as many
    n_embd: int = 128
    dropout: float = 0.0
    norm: str = 'rms'  # 'rms' has no parameters, 'rms_gain' a gain, 'layer' a gain (and a bias)
    position: str = 'rope'  # 'rope' or 'learned'
    mlp: str = 'relu2'  # 'relu2' (squared ReLU), 'relu', 'gelu', 'gelu_tanh' or 'swiglu'
    bias: bool = False  # in linear layers and LayerNorm
    qk_norm: bool = True  # RMS-normalised queries and keys
    logit_softcap: float = 15.0  # logits are squeezed into ±this; 0: they are not
    rope_theta: float = 10000.0
    rope_scaling: dict = None  # rope_type 'linear' or 'llama3', and its numbers: see `scaled`
    head_dim: int = None  # None: n_embd / n_head
    mlp_width: int = None  # None: 4 n_embd
    qkv_bias: bool = None  # None: as bias
    norm_eps: float = None  # None: PyTorch's
    norm_after: bool = False  # normalise after each residual sum instead of before each part, not at the end
    embedding_width: int = None  # of embedding and head, where a linear layer leads to n_embd; None: n_embd
    position_offset: int = 0  # rows of learned positions before the first
    tied: bool = True  # the embedding is the head as well
    pretrained_rows: int = None  # rows of a pretrained embedding, its own padding included
    shift: bool = False  # bidirectional, yet a state predicts the token after it: the weights were `ar`'s
    mask_id: int = None  # <|mask|>: can be seen, never predicted
    ignore_id: int = None  # <|ignore|>: filler of a short document, not counted as text
    k: int = 8  # sdd: candidates per hidden position, where no other number is asked for
    gradient_checkpointing: bool = False  # recompute each block in the backward pass
    selective_checkpointing: bool = False  # of that, all but matrix products and attention

    def __post_init__(self):
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        self.mlp_width = 4 * self.n_embd if self.mlp_width is None else self.mlp_width
        self.qkv_bias = self.bias if self.qkv_bias is None else self.qkv_bias
        self.embedding_width = self.embedding_width or self.n_embd
        for name, allowed in (
            ('norm', ('rms', 'rms_gain', 'layer')),
            ('position', ('rope', 'learned')),
            ('mlp', ('relu2', 'relu', 'gelu', 'gelu_tanh', 'swiglu')),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} is {getattr(self, name)!r}; choose {" or ".join(allowed)}.')
        for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}; it must be at least 1.')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout is {self.dropout}; it is a share, at least 0 and below 1.')
        if self.head_dim is None:
            if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
                raise ValueError(
                    f'n_embd={self.n_embd} over n_head={self.n_head} heads gives no even head width; '
                    'choose n_embd as an even multiple of n_head.'
                )
            self.head_dim = self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f'n_head={self.n_head} is no multiple of n_kv_head={self.n_kv_head}; '
                'each key head serves as many query heads.'
            )

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: a multiple of 64 keeps the head's matrix product fast."""
        return -(-max(self.vocab_size, self.pretrained_rows or 0) // 64) * 64


# ---------------------------------------------------------------------------- trunk


class Isolated:
    """Rows that hold several documents, numbered by `documents` (B, T): each sees itself alone, from position 0.

    It stands where a cache does, and answers the same questions.
    """

    def __init__(self, documents, causal):
        mask = documents[:, :, None] == documents[:, None, :]
        mask = mask & causal if isinstance(causal, torch.Tensor) else mask.tril() if causal else mask
        self.mask = mask.unsqueeze(1)  # (B, 1, T, T)
        place = torch.arange(documents.size(1), device=documents.device)
        begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        self.place = place - (begins * place).cummax(1).values  # (B, T)

    def positions(self, length):
        return self.place

    def extend(self, layer, k, v):
        return k, v, self.mask, False


def make_norm(config):
    if config.norm == 'layer':
        return nn.LayerNorm(config.n_embd, config.norm_eps or 1e-5, bias=config.bias)
    return make_rms_norm(config, config.n_embd)


def make_rms_norm(config, width):
    return RMSNorm(width, config.norm_eps, elementwise_affine=config.norm == 'rms_gain')


class RMSNorm(nn.RMSNorm):
    def forward(
        self, x
    ):  # under autocast x may be bfloat16: the fused kernel wants the gain in the same type
        gain = None if self.weight is None else self.weight.type_as(x)
        return F.rms_norm(x, self.normalized_shape, gain, self.eps)


def rotate(x, rope):
    """Rotary positions (Su et al. 2021) in the half-split layout: pairs are (x_i, x_{i+D/2}).

    x: (B, H, T, D); rope: cosines and signed sines, each (T, D) or (B, 1, T, D), in float32.
    """
    cos, sin = rope
    return (x * cos + x.roll(x.size(-1) // 2, -1) * sin).type_as(x)


def attend_fused(q, k, v, mask, causal, grouped, dropout):
    """softmax(q kᵀ / √D) v for q (B, H, T, D), k and v (B, H or fewer, S, D), mask (B, 1, T, S) or none."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped, dropout_p=dropout
    )


def attend_on_cpu(q, k, v, mask, causal, grouped, dropout):
    """The same, written out: the CPU's fused kernel is two to six times slower than this in bfloat16."""
    if grouped:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    if causal:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    weights = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5  # (B, H, T, S)
    if mask is not None:
        weights = weights.masked_fill(~mask, -math.inf)
    return F.dropout(weights.softmax(-1), dropout) @ v


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.grouped = config.n_kv_head != config.n_head
        width, kv_width = config.n_head * self.head_dim, config.n_kv_head * self.head_dim
        self.q = Linear(config.n_embd, width, bias=config.qkv_bias)
        self.k = Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.v = Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.out = Linear(width, config.n_embd, bias=config.bias)
        self.q_norm, self.k_norm = (
            make_rms_norm(config, self.head_dim) if config.qk_norm else None for _ in range(2)
        )

    def forward(self, x, rope, causal, cache=None):
        """x: (B, T, C); causal: true, false, or the mask (T, T) of what each position sees."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
            for project in (self.q, self.k, self.v)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q).type_as(v), self.k_norm(k).type_as(v)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        mask, causal = (causal, False) if isinstance(causal, torch.Tensor) else (None, causal)
        if cache is not None:
            k, v, mask, causal = cache.extend(self, k, v)  # (B, H, S, D), what came before included
        attend = attend_on_cpu if q.device.type == 'cpu' and q.dtype == torch.bfloat16 else attend_fused
        y = attend(q, k, v, mask, causal, self.grouped, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.gate = (
            Linear(config.n_embd, config.mlp_width, bias=config.bias) if config.mlp == 'swiglu' else None
        )
        self.down = Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.activation = {
            'relu2': lambda x: F.relu(x).square(),
            'relu': F.relu,
            'gelu': F.gelu,
            'swiglu': F.silu,
            'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),
        }[config.mlp]

    def forward(self, x):
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))  # Shazeer 2020


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.norm_after = config.norm_after

    def forward(self, x, rope, causal, cache=None):
        if self.norm_after:
            x = self.attention_norm(x + self.dropout(self.attention(x, rope, causal, cache)))
            return self.mlp_norm(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, causal, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class HeadLoss(torch.autograd.Function):
    """Nats (N,) of targets (N,) over `shares` (N,) from states (N, C), for who sums them; and the likeliest tokens.

    Logits live for `rows` positions at a time, and while they do, their gradient is worked out as well, for a sum of
    which each term counts alike: so they are made once, where recomputing in the backward pass would make them twice.
    `weight`: (V, C); `never`: (V,), added to the logits; `cap`: the soft-cap, 0 for none; `dtype`: of the products.
    A share of infinity is that of a position which does not count.
    """

    @staticmethod
    def forward(ctx, hidden, weight, never, targets, shares, cap, rows, dtype):
        table, needs_hidden, needs_weight = weight.to(dtype), *ctx.needs_input_grad[:2]
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = torch.zeros_like(weight) if needs_weight else None
        nats, guess = [], []
        for i in range(0, max(1, len(targets)), rows):
            part = slice(i, i + rows)
            states, chosen = hidden[part].to(dtype), targets[part].unsqueeze(1)
            capped = linear(states, table).float()  # (n, V)
            if cap:
                capped = capped.div_(cap).tanh_().mul_(cap)
            logits = capped + never
            guess.append(logits.argmax(-1))
            total = logits.logsumexp(-1, keepdim=True)
            nats.append((total - logits.gather(1, chosen)).squeeze(1))
            gradient = logits.sub_(total).exp_()  # softmax, less 1 at the target
            gradient.scatter_add_(1, chosen, torch.full_like(total, -1.0)).div_(shares[part].unsqueeze(1))
            if cap:  # d/dx of c tanh(x / c) is 1 - tanh²
                gradient.mul_(capped.div_(cap).square_().neg_().add_(1))
            gradient = gradient.to(dtype)
            if needs_hidden:
                of_hidden[part] = linear(gradient, table.t())
            if needs_weight:
                of_weight += linear(gradient.t(), states.t())
        guess = torch.cat(guess)
        ctx.save_for_backward(of_hidden, of_weight, shares)
        ctx.mark_non_differentiable(guess)
        return torch.cat(nats) / shares, guess

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        of_hidden, of_weight, shares = ctx.saved_tensors
        scale = gradient[:1].sum()  # there may be none
        torch._assert_async(
            ((gradient == scale) | shares.isinf()).all(),
            'the nats of a summed loss were not summed '
            'with equal weights; leave summed=True out of losses(), which gives them exact gradients',
        )
        return (
            None if of_hidden is None else of_hidden * scale,
            None if of_weight is None else of_weight * scale,
            *[None] * 6,
        )


class Transformer(nn.Module):
    """The trunk and its head, and the interface that the architectures share.

    How the weights start, normally distributed with a deviation of
                                native trunk         GPT-2
        embedding               0.02, at most        0.02
                                2.56 / n_embd
        linear layers           1 / √(3 fan_in)      0.02
        a block's two outputs   0                    0.02 / √(2 n_layer)
        biases                  0                    0
    Zero outputs make each block the identity at first. The native trunk's states are √n_embd long, so with a
    constant deviation a token's logit for itself would grow with the width: a new model would repeat its input.
    """

    causal = False  # each position sees only those before it
    believes = False  # hidden positions hold weighted candidates

    def __init__(self, config):
        super().__init__()
        self.config = config
        rows, width, narrow = config.padded_vocab_size, config.n_embd, config.embedding_width
        self.embedding = nn.Embedding(rows, narrow)  # the head as well, but where that is not tied to it
        self.unembedding = None if config.tied else Linear(narrow, rows, bias=False)
        self.widen, self.narrow = (
            (None, None)
            if narrow == width
            else (Linear(narrow, width, bias=False), Linear(width, narrow, bias=False))
        )
        self.positions = None
        if config.position == 'learned':
            self.positions = nn.Embedding(config.position_offset + config.block_size, width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.Identity() if config.norm_after else make_norm(config)
        self.compiled = {}
        self.opening = (
            None  # (T, T): while training, what a position sees on the way from `ar` to bidirectional
        )
        for name, table in self.tables().items():
            self.register_buffer(name, table, persistent=False)
        self.init_weights()

    def _apply(self, *arguments, **keywords):
        super()._apply(*arguments, **keywords)
        if (
            self.config.position == 'rope' and self.rope.dtype != torch.float32
        ):  # bfloat16 cannot tell places apart
            self.rope = rope_table(self.config).to(self.rope.device)
        return self

    def tables(self):
        """The buffers by name: `never`, which is added to the logits, and `rope` (2, block_size, D)."""
        never = torch.zeros(self.config.padded_vocab_size)
        never[
            self.never_predicted() + list(range(self.config.vocab_size, self.config.padded_vocab_size))
        ] = -math.inf
        return {
            'never': never,
            **({'rope': rope_table(self.config)} if self.config.position == 'rope' else {}),
        }

    def never_predicted(self):
        return [] if self.config.mask_id is None else [self.config.mask_id]

    @torch.no_grad()
    def init_weights(self):
        native = self.config.norm == 'rms'
        for name, weight in self.named_parameters():
            if name.endswith('.bias'):
                nn.init.zeros_(weight)
            elif name.endswith(('out.weight', 'down.weight')):
                nn.init.normal_(weight, std=0.0 if native else 0.02 / math.sqrt(2 * self.config.n_layer))
            elif weight.dim() == 2 and native:
                in_block = name.startswith('blocks.')
                width = weight.size(1)
                nn.init.normal_(weight, std=(3 * width) ** -0.5 if in_block else min(0.02, 2.56 / width))
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def num_parameters(self):
        """Parameters, not counting the rows of <|mask|>, <|ignore|> and padding."""
        unused = self.config.padded_vocab_size - self.config.vocab_size
        unused += sum(i is not None for i in (self.config.mask_id, self.config.ignore_id))
        width = self.config.embedding_width * (1 if self.config.tied else 2)
        return sum(p.numel() for p in self.parameters()) - unused * width

    def flops_per_token(self):
        """Floating-point operations of one training step per token: 6 per weight in a matrix product, and
        12 per layer, channel and attended position (Chowdhery et al. 2022, appendix B)."""
        c = self.config
        weights = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        weights -= 0 if self.positions is None else self.positions.weight.numel()
        weights -= 0 if c.tied else self.embedding.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size

    # ------------------------------------------------------------------------ forward

    def compile(self, **options):
        """torch.compile for training: of a pass, of the loss and of what is believed, each by itself, so that the
        steps of `sdd`, which differ in their number of passes, are made of the same few graphs."""
        self.compiled = {
            name: torch.compile(getattr(self, name), **options)
            for name in ('hidden', 'nats_at', 'believe')
            if hasattr(self, name)
        }

    def part(self, name):
        """A method by name, as it is or compiled."""
        return self.compiled.get(name) or getattr(self, name)

    def embed(self, tokens, belief=None):
        """Token ids (B, T) to the stream that enters the blocks (B, T, C); only `SDD` takes a belief."""
        x = self.embedding(tokens)
        return F.rms_norm(x, x.shape[-1:]) if self.config.norm == 'rms' else x

    def hidden(self, tokens, cache=None, belief=None):
        """The trunk's last, normalised states (B, T, C) for token ids (B, T), T at most block_size.

        cache: a KVCache of what was read before, or `Isolated`; belief: for `sdd`, at the hidden positions.
        """
        length = tokens.size(1)
        if length > self.config.block_size:
            raise ValueError(f'A row of {length} tokens is longer than block_size={self.config.block_size}.')
        x = self.embed(tokens, belief)
        # (T,) as a slice where every row is at the same place; (B, T) while decoding rows of unequal length and
        # where rows hold several documents
        place = slice(0, length) if cache is None else cache.positions(length)
        if self.widen is not None:
            x = self.widen(x)
        if self.positions is not None:
            x = x + self.positions.weight[self.config.position_offset :][place]
        x, rope = self.dropout(x), self.rope_at(place)
        causal = self.sight(length)
        for block in self.blocks:
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                kept = self.config.selective_checkpointing
                x = checkpoint(
                    block,
                    x,
                    rope,
                    causal,
                    cache,
                    use_reentrant=False,
                    preserve_rng_state=self.config.dropout > 0,
                    context_fn=keep_costly if kept else noop_context_fn,
                )
            else:
                x = block(x, rope, causal, cache)
        x = self.norm(x)
        if (
            self.config.shift and not self.causal
        ):  # to where its prediction is; nothing predicts the first token
            x = torch.cat([x[:, :1], x[:, :-1]], 1)
        return x if self.narrow is None else self.narrow(x)

    def sight(self, length):
        """What a position of a row sees, as Attention wants to know it."""
        return self.opening[:length, :length] if self.training and self.opening is not None else self.causal

    def rope_at(self, place):
        if self.positions is not None:
            return None
        cos, sin = self.rope[:, place]  # each (T, D) or (B, T, D)
        return (cos, sin) if cos.dim() == 2 else (cos.unsqueeze(1), sin.unsqueeze(1))

    def head(self, hidden):
        """Logits (..., padded vocabulary) in float32; -inf where the architecture never predicts."""
        logits = linear(
            hidden, (self.embedding if self.unembedding is None else self.unembedding).weight
        ).float()
        if self.config.logit_softcap:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits + self.never

    def head_rows(self, hidden):
        """How many positions' logits to make at once. More than the allocator keeps (`keep_freed_memory`) or the
        caches hold makes a CPU twice as slow; a GPU wants large matrices."""
        elements = HEAD_ELEMENTS * (1 if hidden.device.type == 'cpu' else 18)
        return max(1, elements // self.config.padded_vocab_size)

    def logits(self, tokens, cache=None):
        """Logits (B, T, padded vocabulary): what the model would put at, or for `ar` after, each position."""
        return self.head(self.hidden(tokens, cache))

    def cross_entropy(self, hidden, targets, shares=None):
        """Nats (N,) of `targets` (N,) given states (N, C), and the likeliest tokens (N,).

        Logits live for one chunk of positions at a time, so that a large vocabulary never needs N × V numbers. They
        are made again for the backward pass, unless `shares` (N,) are given: what the nats are divided by on the way
        to a sum in which all count alike.
        """
        rows = self.head_rows(hidden)
        if shares is not None and torch.is_grad_enabled():
            weight, on = (
                (self.embedding if self.unembedding is None else self.unembedding).weight,
                hidden.device.type,
            )
            dtype = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else weight.dtype
            with torch.autocast(on, enabled=False):
                return HeadLoss.apply(
                    hidden, weight, self.never, targets, shares, self.config.logit_softcap, rows, dtype
                )

        def chunk(hidden, targets):
            logits = self.head(hidden)
            nats = F.cross_entropy(logits, targets, reduction='none')
            return nats, logits.detach().argmax(-1)

        parts = [
            checkpoint(chunk, h, t, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else chunk(h, t)
            for h, t in zip(hidden.split(rows), targets.split(rows))
        ]
        nats, guess = (torch.cat(column) for column in zip(*parts))
        return nats if shares is None else nats / shares, guess

    def nats_at(self, states, targets, index=None, shares=None):
        """Nats (B, T) of `targets` (B, T) given states (B, T, C), and the likeliest tokens (B, T).

        index: (N,), the only positions that need logits, numbered through the batch; the others get 0 nats and token
        -1. What lies beyond B × T is there for the shape's sake. shares: (B, 1) or (B, T), what the nats are divided
        by, for who sums them: see `cross_entropy`.
        """
        size = targets.numel()
        if index is None:
            shares = None if shares is None else shares.expand_as(targets).flatten()
            return [
                x.view_as(targets)
                for x in self.cross_entropy(states.flatten(0, 1), targets.flatten(), shares)
            ]
        inside = index % size
        if shares is not None:
            shares = shares.expand_as(targets).flatten()[inside].masked_fill(index >= size, math.inf)
        nats, guess = self.cross_entropy(
            states.flatten(0, 1).index_select(0, inside), targets.flatten()[inside], shares
        )
        return [
            torch.full((size + len(index),), blank, dtype=x.dtype, device=x.device)
            .index_copy(0, index, x)[:size]
            .view_as(targets)
            for x, blank in ((nats, 0), (guess, -1))
        ]

    def forward(self, tokens, loss_mask=None, noise=None, documents=None, index=None, **beliefs):
        """The loss as a sum in nats, the count of tokens that it is over, and sums of metrics.

        tokens: (B, T) ids, of which the first of a row is context; loss_mask: (B, T), nonzero where the model
        is trained, all by default; noise: (B, 1 + T) uniform numbers, for the diffusion architectures;
        documents: (B, T) numbers of documents that do not see each other, the first token of each one context;
        index: what `positions_of` gives for `predicted`, worked out elsewhere; beliefs: for `sdd`, see `SDD.states`.
        """
        nats, counted, metrics = self.losses(
            tokens, loss_mask, noise, documents, index, summed=True, **beliefs
        )
        return nats.sum(), counted.sum(), {name: values.sum() for name, values in metrics.items()}

    def nll(self, tokens, loss_mask=None, noise=None):
        """Each row's negative log-likelihood (B,) in nats, or one unbiased draw of its upper bound."""
        return self.losses(tokens, loss_mask, noise)[0].sum(1)

    def predicted(self, tokens, loss_mask, noise):
        """Where a batch needs logits, as a mask over what predicts its tokens; None: everywhere."""
        raise NotImplementedError

    def losses(self, tokens, loss_mask, noise, documents=None, index=None, summed=False):
        """Per architecture, all of them (B, T): nats, the tokens that count, and metrics by name.

        summed: a promise to sum the nats, all with the same weight, if anything is to be learnt from them.

        The metrics are `predicted`, where the model had to guess a token that counts, and `correct`; for filler
        `ignore_targets`, where it had to be guessed, `ignore_guesses`, where it was, and `ignore_correct`, both;
        `text_loss`, the nats without those of filler.
        """
        raise NotImplementedError

    def trained(self, tokens, loss_mask):
        """Where the loss is (B, T), and which of these tokens count: filler is paid for, but is no text."""
        trained = torch.ones_like(tokens, dtype=torch.bool) if loss_mask is None else loss_mask.bool()
        trained = trained.clone()
        trained[:, 0] = False
        counted = trained if self.config.ignore_id is None else trained & (tokens != self.config.ignore_id)
        return trained, counted


def keep_costly():
    """For `checkpoint`: keeps the results that take long to recompute, which are half of what a block keeps."""
    return create_selective_checkpoint_contexts(COSTLY)


def positions_of(where, spare=0):
    """The numbers (N,) of the positions in a mask (B, T), counted through the batch.

    spare: so many more, beyond B × T, that stand for no position: they bring N to a shape that was seen before.
    """
    index = where.flatten().nonzero().squeeze(1)
    return torch.cat([index, where.numel() + torch.arange(spare, device=index.device)]) if spare else index


def mask_of(index, tokens):
    """The mask (B, T) of what `positions_of` counted."""
    where = torch.zeros(tokens.numel() + len(index), dtype=torch.bool, device=index.device)
    return where.index_fill(0, index, True)[: tokens.numel()].view_as(tokens)


def rope_table(config):
    """Cosines and sines (2, block_size, D); the first half of the sines negated, as `rotate` wants them."""
    frequency = config.rope_theta ** -(torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    if config.rope_scaling:
        frequency = scaled(frequency, **config.rope_scaling)
    angle = torch.outer(torch.arange(config.block_size).double(), frequency)  # (block_size, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)]).float()


def scaled(
    frequency,
    rope_type,
    factor,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
):
    """Rotary frequencies (D/2,) for texts `factor` times as long as those of pretraining: all of them slower
    ('linear', Chen et al. 2023), or only those that turn few times in such a text ('llama3')."""
    if rope_type == 'linear':
        return frequency / factor
    turns = original_max_position_embeddings * frequency / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor)


# ---------------------------------------------------------------------------- architectures


class Autoregressive(Transformer):
    """Predicts each token from those before it; its likelihood is exact."""

    causal = True

    def never_predicted(self):
        return [i for i in (self.config.mask_id, self.config.ignore_id) if i is not None]

    def predicted(self, tokens, loss_mask=None, noise=None):
        return None if loss_mask is None else self.trained(tokens, loss_mask)[1][:, 1:]

    def losses(self, tokens, loss_mask=None, noise=None, documents=None, index=None, summed=False):
        _, counted = self.trained(tokens, loss_mask)
        if index is None and loss_mask is not None:
            index = positions_of(counted[:, 1:])
        alone = None if documents is None else Isolated(documents[:, :-1], self.causal)
        shares = torch.ones_like(tokens[:, 1:], dtype=torch.float32) if summed else None
        nats, guess = self.part('nats_at')(
            self.part('hidden')(tokens[:, :-1], alone), tokens[:, 1:], index, shares
        )
        nats, guess = F.pad(nats, (1, 0)), F.pad(guess, (1, 0), value=-1)  # nothing predicts the first token
        return nats, counted, {'correct': (guess == tokens) & counted, 'predicted': counted}


class Diffusion(Transformer):
    """Masked diffusion (Sahoo et al. 2024, MDLM; Nie et al. 2025, LLaDA).

    A row has a level t; each of its tokens is hidden with probability t and predicted from the visible ones.
    E_t[Σ_hidden -log p / t] is an upper bound of -log p(row) (the NELBO), but for the levels below MIN_LEVEL.
    The network is not told t: the share of hidden positions says it (Ou et al. 2024, RADD).
    """

    def __init__(self, config):
        if config.mask_id is None:
            raise ValueError('mask_id is None; a diffusion model needs the id of <|mask|>.')
        super().__init__(config)

    def levels(self, noise):
        """Level t (B, 1) of each row: a uniform number, kept above 0."""
        return MIN_LEVEL + (1 - MIN_LEVEL) * noise[:, :1]

    def states(self, view, earlier=None, alone=None, index=None, **beliefs):
        """What the tokens at the hidden positions of a view (B, T) are predicted from: (B, T, C)."""
        return self.part('hidden')(view, alone)

    def believe(self, states, where, k, index=None):
        """What is kept of a prediction for the next pass; see `SDD`. Here: nothing."""

    def predicted(self, tokens, loss_mask, noise, extra=0.0):
        """What is masked (B, T) at the rows' levels, or that much above; what is at one level is at each higher one."""
        return self.trained(tokens, loss_mask)[0] & (noise[:, 1:] < self.levels(noise) + extra)

    def losses(self, tokens, loss_mask=None, noise=None, documents=None, index=None, summed=False, **beliefs):
        _, counted = self.trained(tokens, loss_mask)
        if noise is None:
            noise = torch.rand(tokens.size(0), 1 + tokens.size(1), device=tokens.device)
        if index is None:
            index = positions_of(self.predicted(tokens, loss_mask, noise))
        masked = mask_of(index, tokens)  # not worked out again: another device may round otherwise

        def view(extra=0.0):
            more = self.predicted(tokens, loss_mask, noise, extra) if extra else masked
            return tokens.masked_fill(masked | more, self.config.mask_id)

        alone = None if documents is None else Isolated(documents, self.sight(tokens.size(1)))
        states = self.states(view(), earlier=view, alone=alone, index=index, **beliefs)
        level = self.levels(noise)
        nats, guess = self.part('nats_at')(states, tokens, index, level if summed else None)
        nats = nats if summed else nats / level
        correct = guess == tokens
        metrics = {'correct': correct & counted, 'predicted': masked & counted}
        if self.config.ignore_id is not None:
            filler = tokens == self.config.ignore_id
            metrics.update(
                text_loss=nats.detach().masked_fill(filler, 0),
                ignore_correct=correct & filler,
                ignore_targets=masked & filler,
                ignore_guesses=guess == self.config.ignore_id,
            )
        return nats, counted, metrics


class Belief(NamedTuple):
    """What a model holds likely at each position: k tokens with their probabilities, 0 where nothing is believed."""

    tokens: torch.Tensor  # (B, T, k)
    probabilities: torch.Tensor  # (B, T, k)


class SDD(Diffusion):
    """Sparse distribution diffusion: masked diffusion whose hidden positions hold what the pass before believed.

    A belief is the k likeliest tokens with their true probabilities, not renormalised over k: what is missing to 1
    is left open. A hidden position enters the network as E[mask] + W Σ_j p_j E[token_j]; W starts as the identity
    and learns to tell a candidate from a token that stands. Visible positions have no beliefs, and k = 0 is
    masked diffusion.

    A belief is a function of a view that is as masked as the present one or more, so the network with its passes
    before is a deeper function of what is visible: its loss bounds -log p(row) as that of `Diffusion` does, here
    for the model that makes the same passes. The passes before carry no gradient. Nearest relatives: Soft-Masked
    Diffusion (Hersche et al. 2025), self-conditioning (Chen et al. 2022), LRD, LDDM, SCMDM.
    """

    believes = True

    def __init__(self, config):
        super().__init__(config)  # draws the same weights as Diffusion
        width = self.embedding.embedding_dim
        self.believed = Linear(width, width, bias=False)
        nn.init.eye_(self.believed.weight)

    def embed(self, tokens, belief=None):
        x = super().embed(tokens)
        if belief is None:  # a gradient of zero, but one in every step: ranks wait for it
            return x + 0 * self.believed.weight.sum() if torch.is_grad_enabled() else x
        table = self.embedding.weight
        if self.config.norm == 'rms':
            table = F.rms_norm(table, table.shape[-1:])
        p = (belief.probabilities * (tokens == self.config.mask_id).unsqueeze(-1)).to(
            table.dtype
        )  # (B, T, k)
        mixture = F.embedding_bag(
            belief.tokens.flatten(0, 1), table, per_sample_weights=p.flatten(0, 1), mode='sum'
        )
        return x + self.believed(mixture).view_as(x)

    @torch.no_grad()
    def believe(self, states, where, k, index=None):
        """The belief at the positions `where` (B, T) that follows from the states (B, T, C); None for k = 0.

        index: the same positions as `positions_of` gives them, where they are known.
        """
        if k == 0:
            return None
        k, size = min(k, self.config.vocab_size), where.numel()
        index = positions_of(where) if index is None else index
        tokens = torch.zeros(size + len(index), k, dtype=torch.long, device=where.device)
        probabilities = torch.zeros(size + len(index), k, device=where.device)
        states = states.flatten(0, 1)
        for part in index.split(self.head_rows(states)):
            logits = self.head(states[part % size])  # (n, V)
            top = logits.topk(k)
            tokens[part] = top.indices
            probabilities[part] = (top.values - logits.logsumexp(-1, keepdim=True)).exp()
        return Belief(tokens[:size].view(*where.shape, k), probabilities[:size].view(*where.shape, k))

    def states(self, view, earlier=None, alone=None, index=None, k=None, depth=1, stale=0.0):
        """As in `Diffusion`, after `depth` passes each of which gave the next one its beliefs.

        k: candidates, None for the model's own number. stale: the first pass sees a row with this much more of
        it masked, earlier(stale), the next ones steadily less, as when sampling: beliefs grow old there.
        """
        k, belief = self.config.k if k is None else k, None
        hidden, run, believe = view == self.config.mask_id, self.part('hidden'), self.part('believe')
        with torch.no_grad():
            for i in range(depth if k else 0, 0, -1):
                look = earlier(stale * i / depth) if stale else view
                belief = believe(run(look, alone, belief), hidden, k, index)
        torch.clear_autocast_cache()  # torch 2.9 would reuse here what it cast without gradient
        return run(view, alone, belief)


ARCHITECTURES = {'ar': Autoregressive, 'diffusion': Diffusion, 'sdd': SDD}
