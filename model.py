"""The language models: one transformer trunk and, on it, a thin class per architecture.

    Autoregressive   predicts the next token, sees what lies to the left       (GPT)
    Diffusion        fills hidden positions, sees every visible one            (MDLM, LLaDA)
    SDD(Diffusion)   hidden positions hold weighted candidates                 (comes next)

Each answers `model(tokens, loss_mask, noise)` with the sum of its loss in nats, the count of tokens
that the sum is over, and sums of metrics: sums, so that micro-batches and ranks of uneven size add up.
A row's first token is context for every architecture, never predicted and never counted.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SIZES = {  # model_size: n_layer, n_head, n_embd
    'tiny':   (4, 4, 128),
    'small':  (6, 6, 384),
    'medium': (8, 8, 512),
    'large':  (12, 12, 768),
    'xl':     (24, 16, 1024),
}

MIN_LEVEL = 1e-3          # the least share of a row that diffusion hides: 1/level stays finite (MDLM's eps)
HEAD_ELEMENTS = 7 << 20   # logits that exist at once on a CPU: 28 MB in float32; 18 times as many on a GPU


@dataclass
class ModelConfig:
    """The shape of a model. The defaults are the native trunk; the switches make others of it, GPT-2 by
    norm='layer', position='learned', mlp='gelu', bias=True, qk_norm=False, logit_softcap=0."""
    vocab_size: int              # real tokens, special ones included; the embedding is padded beyond it
    block_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = None        # fewer than n_head: grouped-query attention; None: as many
    n_embd: int = 128
    dropout: float = 0.0
    norm: str = 'rms'            # 'rms' has no parameters, 'layer' has a gain (and a bias)
    position: str = 'rope'       # 'rope' or 'learned'
    mlp: str = 'relu2'           # 'relu2' (squared ReLU) or 'gelu'
    bias: bool = False           # in linear layers and LayerNorm
    qk_norm: bool = True         # RMS-normalised queries and keys
    logit_softcap: float = 15.0  # logits are squeezed into ±this; 0: they are not
    rope_theta: float = 10000.0
    mask_id: int = None          # <|mask|>: can be seen, never predicted
    ignore_id: int = None        # <|ignore|>: filler of a short document, not counted as text
    gradient_checkpointing: bool = False

    def __post_init__(self):
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        for name, allowed in (('norm', ('rms', 'layer')), ('position', ('rope', 'learned')),
                              ('mlp', ('relu2', 'gelu'))):
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} is {getattr(self, name)!r}; choose {" or ".join(allowed)}.')
        for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}; it must be at least 1.')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout is {self.dropout}; it is a share, at least 0 and below 1.')
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            raise ValueError(f'n_embd={self.n_embd} over n_head={self.n_head} heads gives no even head width; '
                             'choose n_embd as an even multiple of n_head.')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head={self.n_head} is no multiple of n_kv_head={self.n_kv_head}; '
                             'each key head serves as many query heads.')

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: a multiple of 64 keeps the head's matrix product fast."""
        return -(-self.vocab_size // 64) * 64


# ---------------------------------------------------------------------------- trunk

class Isolated:
    """Rows that hold several documents, numbered by `documents` (B, T): each sees itself alone, from position 0.

    It stands where a cache does, and answers the same questions.
    """

    def __init__(self, documents, causal):
        mask = documents[:, :, None] == documents[:, None, :]
        self.mask = (mask.tril() if causal else mask).unsqueeze(1)  # (B, 1, T, T)
        place = torch.arange(documents.size(1), device=documents.device)
        begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        self.place = place - (begins * place).cummax(1).values  # (B, T)

    def positions(self, length):
        return self.place

    def extend(self, layer, k, v):
        return k, v, self.mask, False


def make_norm(config):
    if config.norm == 'layer':
        return nn.LayerNorm(config.n_embd, bias=config.bias)
    return nn.RMSNorm(config.n_embd, elementwise_affine=False)


def rotate(x, rope):
    """Rotary positions (Su et al. 2021) in the half-split layout: pairs are (x_i, x_{i+D/2}).

    x: (B, H, T, D); rope: cosines and signed sines, each (T, D) or (B, 1, T, D), in float32.
    """
    cos, sin = rope
    return (x * cos + x.roll(x.size(-1) // 2, -1) * sin).type_as(x)


def attend_fused(q, k, v, mask, causal, grouped, dropout):
    """softmax(q kᵀ / √D) v for q (B, H, T, D), k and v (B, H or fewer, S, D), mask (B, 1, T, S) or none."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped,
                                          dropout_p=dropout)


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


class Attention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.n_embd // config.n_head
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm
        self.grouped = config.n_kv_head != config.n_head
        kv_width = config.n_kv_head * self.head_dim
        self.q = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.k = nn.Linear(config.n_embd, kv_width, bias=config.bias)
        self.v = nn.Linear(config.n_embd, kv_width, bias=config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rope, causal, cache=None):
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
                   for linear in (self.q, self.k, self.v))
        if self.qk_norm:
            q, k = (F.rms_norm(x, (self.head_dim,)).type_as(v) for x in (q, k))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        mask = None
        if cache is not None:
            k, v, mask, causal = cache.extend(self, k, v)  # (B, H, S, D), what came before included
        attend = attend_on_cpu if q.device.type == 'cpu' and q.dtype == torch.bfloat16 else attend_fused
        y = attend(q, k, v, mask, causal, self.grouped, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, C)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation = F.gelu if config.mlp == 'gelu' else lambda x: F.relu(x).square()

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, causal, cache=None):
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, causal, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


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
    causal = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.n_embd)  # tied: it is the head as well
        self.positions = nn.Embedding(config.block_size, config.n_embd) if config.position == 'learned' else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        if config.position == 'rope':
            self.register_buffer('rope', rope_table(config), persistent=False)  # (2, block_size, D)
        never = torch.zeros(config.padded_vocab_size)
        never[self.never_predicted() + list(range(config.vocab_size, config.padded_vocab_size))] = -math.inf
        self.register_buffer('never', never, persistent=False)  # added to the logits
        self.init_weights()

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
        return sum(p.numel() for p in self.parameters()) - unused * self.config.n_embd

    def flops_per_token(self):
        """Floating-point operations of one training step per token: 6 per weight in a matrix product, and
        12 per layer, channel and attended position (Chowdhery et al. 2022, appendix B)."""
        c = self.config
        weights = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        weights -= 0 if self.positions is None else self.positions.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    # ------------------------------------------------------------------------ forward

    def embed(self, tokens):
        """Token ids (B, T) to the stream that enters the blocks (B, T, C)."""
        x = self.embedding(tokens)
        return F.rms_norm(x, x.shape[-1:]) if self.config.norm == 'rms' else x

    def hidden(self, tokens, cache=None):
        """The trunk's last, normalised states (B, T, C) for token ids (B, T), T at most block_size.

        cache: a KVCache of what was read before, or `Isolated`.
        """
        length = tokens.size(1)
        if length > self.config.block_size:
            raise ValueError(f'A row of {length} tokens is longer than block_size={self.config.block_size}.')
        x = self.embed(tokens)
        # (T,) as a slice where every row is at the same place; (B, T) while decoding rows of unequal length and
        # where rows hold several documents
        place = slice(0, length) if cache is None else cache.positions(length)
        if self.positions is not None:
            x = x + self.positions.weight[place]
        x, rope = self.dropout(x), self.rope_at(place)
        for block in self.blocks:
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, self.causal, cache, use_reentrant=False,
                               preserve_rng_state=self.config.dropout > 0)
            else:
                x = block(x, rope, self.causal, cache)
        return self.norm(x)

    def rope_at(self, place):
        if self.positions is not None:
            return None
        cos, sin = self.rope[:, place]  # each (T, D) or (B, T, D)
        return (cos, sin) if cos.dim() == 2 else (cos.unsqueeze(1), sin.unsqueeze(1))

    def head(self, hidden):
        """Logits (..., padded vocabulary) in float32; -inf where the architecture never predicts."""
        logits = F.linear(hidden, self.embedding.weight).float()
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

    def cross_entropy(self, hidden, targets):
        """Nats (N,) of `targets` (N,) given states (N, C), and whether each was the likeliest (N,).

        Logits live for one chunk of positions at a time and are made again for the backward pass, so that
        a large vocabulary never needs N × V numbers.
        """
        def chunk(hidden, targets):
            logits = self.head(hidden)
            nats = F.cross_entropy(logits, targets, reduction='none')
            return nats, logits.detach().argmax(-1) == targets

        rows = self.head_rows(hidden)
        if len(targets) <= rows:
            return chunk(hidden, targets)
        parts = [checkpoint(chunk, h, t, use_reentrant=False, preserve_rng_state=False)
                 for h, t in zip(hidden.split(rows), targets.split(rows))]
        return tuple(torch.cat(column) for column in zip(*parts))

    def nats_at(self, states, targets, where=None):
        """Nats (B, T) of `targets` (B, T) given states (B, T, C), and whether each was the likeliest (B, T).

        where: (B, T), the only positions that need logits; the others get 0 and False.
        """
        if where is None:
            return [x.view_as(targets) for x in self.cross_entropy(states.flatten(0, 1), targets.flatten())]
        index = where.flatten().nonzero().squeeze(1)
        nats, correct = self.cross_entropy(states.flatten(0, 1).index_select(0, index), targets.flatten()[index])
        all_nats = torch.zeros(targets.numel(), device=targets.device).index_add(0, index, nats)
        return all_nats.view_as(targets), torch.zeros_like(where).masked_scatter(where, correct)

    def forward(self, tokens, loss_mask=None, noise=None, documents=None):
        """The loss as a sum in nats, the count of tokens that it is over, and sums of metrics.

        tokens: (B, T) ids, of which the first of a row is context; loss_mask: (B, T), nonzero where the model
        is trained, all by default; noise: (B, 1 + T) uniform numbers, for the diffusion architectures;
        documents: (B, T) numbers of documents that do not see each other, the first token of each one context.
        """
        nats, counted, metrics = self.losses(tokens, loss_mask, noise, documents)
        return nats.sum(), counted.sum(), {name: values.sum() for name, values in metrics.items()}

    def nll(self, tokens, loss_mask=None, noise=None):
        """Each row's negative log-likelihood (B,) in nats, or one unbiased draw of its upper bound."""
        return self.losses(tokens, loss_mask, noise)[0].sum(1)

    def losses(self, tokens, loss_mask, noise, documents=None):
        """Per architecture, all of them (B, T): nats, the tokens that count, and metrics by name.

        The metrics are `predicted`, where the model had to guess a token that counts, and `correct`.
        """
        raise NotImplementedError

    def trained(self, tokens, loss_mask):
        """Where the loss is (B, T), and which of these tokens count: filler is paid for, but is no text."""
        trained = torch.ones_like(tokens, dtype=torch.bool) if loss_mask is None else loss_mask.bool()
        trained = trained.clone()
        trained[:, 0] = False
        counted = trained if self.config.ignore_id is None else trained & (tokens != self.config.ignore_id)
        return trained, counted


def rope_table(config):
    """Cosines and sines (2, block_size, D); the first half of the sines negated, as `rotate` wants them."""
    head_dim = config.n_embd // config.n_head
    frequency = config.rope_theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    angle = torch.outer(torch.arange(config.block_size).double(), frequency)  # (block_size, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)]).float()


# ---------------------------------------------------------------------------- architectures

class Autoregressive(Transformer):
    """Predicts each token from those before it; its likelihood is exact."""
    causal = True

    def never_predicted(self):
        return [i for i in (self.config.mask_id, self.config.ignore_id) if i is not None]

    def losses(self, tokens, loss_mask=None, noise=None, documents=None):
        _, counted = self.trained(tokens, loss_mask)
        where = None if loss_mask is None else counted[:, 1:]
        alone = None if documents is None else Isolated(documents[:, :-1], self.causal)
        nats, correct = self.nats_at(self.hidden(tokens[:, :-1], alone), tokens[:, 1:], where)
        nats, correct = F.pad(nats, (1, 0)), F.pad(correct, (1, 0))  # nothing predicts the first token
        return nats, counted, {'correct': correct, 'predicted': counted}


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

    def losses(self, tokens, loss_mask=None, noise=None, documents=None):
        trained, counted = self.trained(tokens, loss_mask)
        if noise is None:
            noise = torch.rand(tokens.size(0), 1 + tokens.size(1), device=tokens.device)
        level = self.levels(noise)
        masked = trained & (noise[:, 1:] < level)  # (B, T)
        alone = None if documents is None else Isolated(documents, self.causal)
        states = self.hidden(tokens.masked_fill(masked, self.config.mask_id), alone)
        nats, correct = self.nats_at(states, tokens, masked)
        return nats / level, counted, {'correct': correct & counted, 'predicted': masked & counted}


# SDD(Diffusion), the third architecture, is to stand here.

ARCHITECTURES = {'ar': Autoregressive, 'diffusion': Diffusion}
