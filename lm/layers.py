"""The shape of a model and the layers of its trunk: norms, rotary positions, attention and its masks, MLP, block.

Torch only.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lm.kernels import attend, linear

ACTIVATIONS = {
    'relu2': lambda x: F.relu(x).square(),
    'relu': F.relu,
    'gelu': F.gelu,
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),
    'swiglu': F.silu,  # of the gate (Shazeer 2020)
}

CHOICES = {'norm': ('rms', 'rms_gain', 'layer'), 'position': ('rope', 'learned'), 'mlp': tuple(ACTIVATIONS)}


@dataclass
class ModelConfig:
    """The shape of a model. The defaults are the native trunk; lm/families.py sets the switches for others.

    nanoGPT's model: norm='layer', position='learned', mlp='gelu', bias=True, qk_norm=False, logit_softcap=0.
    """

    vocab_size: int  # real tokens, special ones included; the embedding is padded beyond it
    block_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = None  # fewer than n_head: grouped-query attention; None: as many
    n_embd: int = 128
    dropout: float = 0.0
    norm: str = 'rms'  # 'rms' has no parameters, 'rms_gain' a gain, 'layer' a gain (and a bias)
    position: str = 'rope'  # or 'learned'
    mlp: str = 'relu2'  # squared ReLU, or another of ACTIVATIONS
    bias: bool = False  # in linear layers and LayerNorm
    qk_norm: bool = True  # RMS-normalised queries and keys
    embedding_shortcuts: bool = None  # each layer reads the embedding again; None: where norm='rms'
    neighbours: int = None  # on each side whose embeddings each layer reads; None: 8 where norm='rms', else 0
    logit_softcap: float = 15.0  # logits are squashed into ±this by tanh; 0: they are not
    rope_theta: float = 10000.0
    rope_scaling: dict = None  # arguments of lm.layers.scale_rope
    head_dim: int = None  # None: n_embd / n_head
    mlp_width: int = None  # None: 4 n_embd
    qkv_bias: bool = None  # None: as bias
    norm_eps: float = None  # None: PyTorch's
    norm_after: bool = False  # post-norm: after each residual sum, and none at the end
    embedding_width: int = None  # of embedding and head, where a projection leads to n_embd; None: n_embd
    position_offset: int = 0  # rows of learned positions before the first
    tied: bool = True  # the embedding is the head as well
    pretrained_rows: int = None  # rows of a pretrained embedding, its own padding included
    shift: bool = False  # bidirectional with `ar` weights: a hidden state predicts the token after it
    mask_id: int = None  # <|mask|>: an input, never predicted
    ignore_id: int = None  # <|ignore|>: padding that a bidirectional model predicts; not counted as text
    block_length: tuple = (0,)  # diffusion: tokens per block, the first unless asked for; 0: the whole row
    ar_weight: float = 0.0  # diffusion: of the next-token loss of the clean tokens: an `ar` model as well
    k: int = 8  # sdd: candidates per masked position, where no other number is asked for
    gradient_checkpointing: bool = False  # recompute each block in the backward pass

    def __post_init__(self):
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        self.mlp_width = 4 * self.n_embd if self.mlp_width is None else self.mlp_width
        self.qkv_bias = self.bias if self.qkv_bias is None else self.qkv_bias
        self.embedding_width = self.embedding_width or self.n_embd
        if self.embedding_shortcuts is None:
            self.embedding_shortcuts = self.norm == 'rms'
        if self.neighbours is None:
            self.neighbours = 8 if self.norm == 'rms' else 0
        self.block_length = tuple(self.block_length)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            check(value in choices, f'{name} is {value!r}; choose {" or ".join(choices)}.')
        for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd'):
            check_setting(self, name, getattr(self, name) >= 1, 'at least 1')
        for name in ('neighbours', 'ar_weight'):
            check_setting(self, name, getattr(self, name) >= 0, 'at least 0')
        for name in ('mask_id', 'ignore_id'):
            fits = getattr(self, name) is None or getattr(self, name) in range(self.vocab_size)
            check_setting(self, name, fits, f'one of {self.vocab_size} tokens, or None')
        check_setting(self, 'dropout', 0 <= self.dropout < 1, 'at least 0 and below 1')
        fits = self.block_length and all(type(x) is int and x >= 0 for x in self.block_length)
        check_setting(self, 'block_length', fits, 'numbers of tokens, 0 for the whole row')
        heads = f'n_head={self.n_head}'
        check(self.n_head % self.n_kv_head == 0, f'{heads} is no multiple of n_kv_head={self.n_kv_head}.')
        if self.head_dim is None:
            self.head_dim = self.n_embd // self.n_head
            even = self.head_dim % 2 == 0 and self.head_dim * self.n_head == self.n_embd
            check(even, f'n_embd={self.n_embd} is no even multiple of {heads}; choose one that is.')

    @property
    def has_two_streams(self):
        """Say whether the clean tokens of a row are read beside its noisy ones: for blocks, and for ar_weight."""
        return any(self.block_length) or self.ar_weight > 0

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: a multiple of 64 keeps the head's matmul fast."""
        return -(-max(self.vocab_size, self.pretrained_rows or 0) // 64) * 64


def check(condition, message):
    if not condition:
        raise ValueError(message)


def check_setting(settings, name, fits, wanted):
    check(fits, f'{name} is {getattr(settings, name)!r}; it must be {wanted}.')


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        gain = None if self.weight is None else self.weight.type_as(x)  # bfloat16 too, under autocast
        return F.rms_norm(x, self.normalized_shape, gain, self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        gain, bias = (None if part is None else part.type_as(x) for part in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, gain, bias, self.eps)


def make_norm(config, head_dim=None):
    """Make the norm of a block, or the RMSNorm of queries and keys of a width."""
    if config.norm == 'layer' and not head_dim:
        return LayerNorm(config.n_embd, config.norm_eps or 1e-5, bias=config.bias)
    return RMSNorm(head_dim or config.n_embd, config.norm_eps, elementwise_affine=config.norm == 'rms_gain')


def rope_table(theta, head_dim, length, scaling=None):
    """Compute cosines and sines (2, length, D), the first half of the sines negated as `rotate` wants them.

    In float32, as pretrained models learnt them: exact angles are 3e-5 off theirs at position 1,000, and logits 3e-4.
    """
    frequency = 1 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)  # (D/2,)
    if scaling:
        frequency = scale_rope(frequency, **scaling)
    angle = torch.outer(torch.arange(length).float(), frequency)  # (length, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)]).float()


def scale_rope(frequency, rope_type, factor, **llama3):
    """Slow down rotary frequencies (D/2,) for texts `factor` times as long as those of pretraining.

    'linear' (Chen et al. 2023): all of them; 'llama3': only those that turn few times in such a text.
    """
    if rope_type == 'linear':
        return frequency / factor
    low, high = llama3.get('low_freq_factor', 1.0), llama3.get('high_freq_factor', 4.0)
    turns = llama3.get('original_max_position_embeddings', 8192) * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor)


def rotate(x, rope):
    """Apply rotary positions in the half-split layout, whose pairs are (x_i, x_{i+D/2}).

    x: (B, H, T, D); rope: cosines and signed sines, each (T, D) or (B, 1, T, D), in float32.
    """
    cos, sin = rope
    return (x * cos + x.roll(x.size(-1) // 2, -1) * sin).type_as(x)


class AttentionMask:
    """The positions that a position attends to: those before (causal), all, or those of a mask (T, T).

    The trunk asks it for positions and for what stands beside them, each attention layer for keys, values and mask; a
    KV cache answers the same questions (lm.caches.KVCache).
    """

    def __init__(self, attn_mask):
        self.mask, self.is_causal = (None, attn_mask) if isinstance(attn_mask, bool) else (attn_mask, False)

    def positions(self, length):
        return slice(0, length)

    def extend(self, layer, k, v):
        return k, v, self.mask, self.is_causal

    def near(self, x, offsets):
        """Return for each offset what stands so many positions after, or before, each of x (B, T, C): 0 where that is
        not attended to, None where it never is."""
        return [self.moved(x, offset) for offset in offsets]

    def moved(self, x, offset):
        after, before = (min(max(0, away), x.size(1)) for away in (offset, -offset))
        moved = F.pad(x[:, after : x.size(1) - before], (0, 0, before, after))
        if self.mask is None:
            return moved
        visible = F.pad(self.mask.diagonal(offset, -2, -1), (before, after))  # (T,) or (B, 1, T)
        return moved * visible.view(-1, x.size(1), 1)


class DocumentMask(AttentionMask):
    """Rows that hold several documents, doc_ids (B, T): each attends to itself alone, from position 0."""

    def __init__(self, doc_ids, attn_mask):
        same = doc_ids[:, :, None] == doc_ids[:, None, :]  # (B, T, T)
        if isinstance(attn_mask, bool):
            same = same.tril() if attn_mask else same
        else:
            same = same & attn_mask
        super().__init__(same.unsqueeze(1))  # (B, 1, T, T)
        self.index = positions_of(doc_ids)

    def positions(self, length):
        return self.index


def positions_of(doc_ids):
    """Return the position (B, T) of each token in its document."""
    index = torch.arange(doc_ids.size(1), device=doc_ids.device)
    starts = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)
    return index - (starts * index).cummax(1).values


def take_positions(x, index):
    """Return of x (B, T, C) the positions of an index (S,), or of each row (B, S)."""
    if index.dim() == 1:
        return x.index_select(1, index)
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.size(2)))


class TwoStreams(AttentionMask):
    """A row twice, noisy and then clean (B, 2T), in blocks of block_length (Arriola et al. 2025, BD3-LM).

    A noisy token attends to its own noisy block and to the clean blocks before it; a clean one to the clean tokens up
    to itself. Documents, doc_ids (B, T), attend to themselves alone and begin a block each; where there are none,
    `every` leaves a noisy copy to each so-many-th block only, from the one on that the number `first`, below 1, says.
    """

    def __init__(self, tokens, block_length, doc_ids=None, every=1, first=0, neighbours=0):
        length, device = tokens.size(1), tokens.device
        index = torch.arange(length, device=device)
        self.block_length, self.every = block_length, 1
        if doc_ids is None:
            self.every = min(every, -(-length // block_length))
        self.first = int(first * self.every)
        position = index if doc_ids is None else positions_of(doc_ids)  # (T,) or (B, T)
        self.number = position // block_length  # of each token's block
        self.start = index - position % block_length  # where it begins in the row
        query, key = self.start.unsqueeze(-1), self.start.unsqueeze(-2)
        same, before, causal = query == key, key < query, index <= index.unsqueeze(-1)
        if doc_ids is not None:
            same_doc = doc_ids[:, :, None] == doc_ids[:, None, :]
            before, causal = before & same_doc, causal & same_doc
        noisy = torch.cat([same, before], -1)
        clean = torch.cat([torch.zeros_like(causal), causal], -1)
        mask = torch.cat([noisy, clean], -2)  # (2T, 2T) or (B, 2T, 2T)
        blocks = range(self.first * block_length, length, self.every * block_length)
        noisy = [i for begin in blocks for i in range(begin, min(begin + block_length, length))]
        self.noisy = torch.tensor(noisy, device=device)  # (S,)
        self.index = torch.cat([position, position], -1)
        kept = torch.cat([self.noisy, length + index])
        if self.every > 1:
            mask, self.index = mask[kept][:, kept], self.index[kept]
        super().__init__(mask if doc_ids is None else mask.unsqueeze(1))
        last = min(neighbours, max(1, block_length - 1))  # one at least: DDP waits for all gradients
        offsets = [*range(-neighbours, 0), *range(1, last + 1)]
        self.neighbours = {offset: self.beside(position, kept, offset) for offset in offsets}

    def positions(self, length):
        return self.index

    def read(self, model, x_t, clean, belief):
        """Compute the states (B, T, C) of noisy tokens x_t (B, T), 0 without a copy, and of clean ones (B, T)."""
        length = clean.size(1)
        if belief is not None:  # of the noisy tokens
            belief = type(belief)(*(F.pad(x[:, self.noisy], (0, 0, 0, length)) for x in belief))
        h = model.hidden(torch.cat([x_t[:, self.noisy], clean], 1), cache=self, belief=belief)
        h, clean = h.split([len(self.noisy), length], 1)
        return torch.zeros_like(clean).index_copy(1, self.noisy, h), clean

    def beside(self, position, kept, offset):
        """Return the index, of the streams with a zero behind them, of what stands beside each of their positions.

        A noisy token stands beside those of its block, after the clean ones of the block before; a clean one after
        clean ones.
        """
        index = torch.arange(position.size(-1), device=kept.device)
        length, nothing, there = len(index), 2 * len(index), index + offset
        beside = there.clamp(0, length - 1)
        in_block = (there == beside) & (self.start[..., beside] == self.start)
        in_text = (position + offset >= 0) & (offset < 0)
        clean = torch.where(in_text, length + beside, nothing)
        both = torch.cat([torch.where(in_block, beside, clean), clean], -1)  # (2T,) or (B, 2T)
        slot = torch.full((2 * length + 1,), len(kept), device=kept.device)
        slot[kept] = torch.arange(len(kept), device=kept.device)
        return slot[both[..., kept]]

    def near(self, x, offsets):
        x, known = F.pad(x, (0, 0, 0, 1)), self.neighbours
        return [take_positions(x, known[offset]) if offset in known else None for offset in offsets]

    def whole_tokens(self, t, noise, maskable):
        """Return mask ratios and noise that mask a whole number of the maskable tokens (B, T) of each block.

        Of L tokens, ⌈t L⌉ are masked, those of the least noise, with the weight L / ⌈t L⌉. For uniform t each number
        from 1 to L is as likely, and the loss has the expectation that it has where each token is masked by itself,
        with less variance: no block is without a mask. t: (B, T); noise: (B, 1 + T).
        """
        if self.block_length >= noise.size(1) - 1:  # of a whole row it makes no difference
            return t, noise
        u = noise[:, 1:]
        same = (self.start.unsqueeze(-1) == self.start.unsqueeze(-2)) & maskable.unsqueeze(1)  # (B, T, T)
        size = same.sum(-1).clamp(min=1)  # (B, T)
        rank = (same & (u.unsqueeze(1) < u.unsqueeze(2))).sum(-1)
        rank = (rank / size).masked_fill(self.number % self.every != self.first, 1)  # never masked
        return (t * size).ceil() / size, torch.cat([noise[:, :1], rank], 1)


class Scales(nn.Module):
    """Weights that are 0 at first, in a module of their own, as adapters in PEFT's layout want them."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class Neighbours(nn.Module):
    """Weigh, for each layer, the embeddings beside a position: of N tokens before it and, unless causal, of N after it.

    Attention alone has to find a token's surroundings by their positions first, and learns that late (docs/LOG.md).
    """

    def __init__(self, config, causal):
        super().__init__()
        shape = config.n_layer, config.neighbours, config.n_embd
        self.before, self.after = Scales(*shape), None if causal else Scales(*shape)

    def forward(self, x0, cache):
        """Return [(scales (n_layer, C), neighbours (B, T, C))] of embeddings x0 (B, T, C)."""
        scales = list(self.before.weight.unbind(1))
        offsets = [-i for i in range(1, len(scales) + 1)]
        if self.after is not None:
            scales, offsets = scales + list(self.after.weight.unbind(1)), offsets + [-i for i in offsets]
        beside = zip(scales, cache.near(x0, offsets))
        return [(scale, x) for scale, x in beside if x is not None]


class Attention(nn.Module):
    def __init__(self, config, reads_embedding=False):
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        width, kv_width = config.n_head * self.head_dim, config.n_kv_head * self.head_dim
        self.q = Linear(config.n_embd, width, bias=config.qkv_bias)
        self.k = Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.v = Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.v0 = Linear(config.n_embd, kv_width, bias=False) if reads_embedding else None
        self.out = Linear(width, config.n_embd, bias=config.bias)
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else None

    def forward(self, x, x0, rope, cache):
        """x, and the embedding x0: (B, T, C); cache: an AttentionMask, or a KV cache."""
        v = self.v(x) if self.v0 is None else self.v(x) + self.v0(x0)
        heads = -1, self.head_dim  # (B, T, C) -> (B, H, T, D)
        q, k, v = (y.unflatten(-1, heads).transpose(1, 2) for y in (self.q(x), self.k(x), v))
        if self.q_norm is not None:
            q, k = self.q_norm(q).type_as(v), self.k_norm(k).type_as(v)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        k, v, mask, is_causal = cache.extend(self, k, v)  # (B, H, S, D), cached ones included
        y = attend(q, k, v, mask, is_causal, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        gated = config.mlp == 'swiglu'
        self.up = Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.gate = Linear(config.n_embd, config.mlp_width, bias=config.bias) if gated else None
        self.down = Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.mlp]

    def forward(self, x):
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.attention_norm = make_norm(config)
        every_second = (config.n_layer - layer) % 2 == 1  # the last one among them
        self.attention = Attention(config, config.embedding_shortcuts and every_second)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, x0, rope, cache):
        """x and the embedding x0: (B, T, C); with gradient_checkpointing the backward pass computes the rest anew."""
        if not (self.config.gradient_checkpointing and torch.is_grad_enabled()):
            return self.run(x, x0, rope, cache)
        return checkpoint(self.run, x, x0, rope, cache, use_reentrant=False)

    def run(self, x, x0, rope, cache):
        if self.config.norm_after:
            x = self.attention_norm(x + self.dropout(self.attention(x, x0, rope, cache)))
            return self.mlp_norm(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(self.attention(self.attention_norm(x), x0, rope, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))
