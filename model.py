"""The language models: one transformer trunk and, on it, one class per architecture.

    Autoregressive   predicts the next token from those before it           (GPT)
    Diffusion        predicts masked tokens from all visible ones           (MDLM, LLaDA)
    SDD(Diffusion)   the same, with weighted candidates at masked positions (sparse distribution diffusion)

`model(tokens, loss_mask, noise)` returns sums, so that uneven micro-batches and ranks add up exactly: of the loss in
nats, of the tokens that it is divided by, and of metrics. The first token of a row is context, never predicted and
never counted.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lm import layers
from lm.kernels import WeightedSum, linear, put, take
from lm.layers import Linear, ModelConfig, TwoStreams, check  # noqa: F401

SIZES = {  # model_size: n_layer, n_head, n_embd
    'tiny': (4, 4, 128),
    'small': (6, 6, 384),
    'medium': (8, 8, 512),
    'large': (12, 12, 768),
    'xl': (24, 16, 1024),
}
T_MIN = 1e-3  # smallest mask ratio: the loss weight 1/t stays finite (MDLM's eps)
LOGITS_PER_CHUNK = 7 << 20  # logits that exist at once on a CPU: 28 MB in float32; 18 times as many on a GPU


# ---------------------------------------------------------------------------- trunk and head


class Transformer(nn.Module):
    """The trunk, its head, and what the architectures share.

    An architecture is a subclass: its class attributes say what it needs, its `forward` is its loss. An entry in
    ARCHITECTURES is all that it takes to train, sample, evaluate and export it.

    Initial standard deviations:
                                native trunk         GPT-2
        embedding               0.02, at most        0.02
                                2.56 / n_embd
        linear layers           1 / √(3 fan_in)      0.02
        a block's two outputs   0                    0.02 / √(2 n_layer)
        biases                  0                    0
    Zero outputs make each block the identity at first. The native trunk's hidden states have norm √n_embd, so with
    a constant deviation a token's logit for itself would grow with the width: a new model would repeat its input.
    """

    bound = 'none'  # 'exact': its loss is -log p(row); 'upper': an upper bound of that; 'none': neither
    order = 'in its own way'  # of writing: the sampler of which the loss is the nll or its bound
    causal = False  # each position attends to those before it only
    needs_noise = True  # forward takes uniform numbers, drawn with the batch
    has_beliefs = False  # masked positions can hold weighted candidates
    extra_tokens = 0  # of a training row, beyond block_size
    trains_on_padding = True  # a bidirectional model has to say where a text ends
    family_of = ''  # the architecture of the families of lm/families.py that compute the same function
    project = staticmethod(linear)  # the head's product; lm/quantize.py puts one with fewer bits in its place

    def __init__(self, config):
        super().__init__()
        self.config = config
        rows, width = config.padded_vocab_size, config.embedding_width
        self.embedding = nn.Embedding(rows, width)  # the head as well, unless untied
        self.unembedding = None if config.tied else Linear(width, rows, bias=False)
        self.project_in = None if width == config.n_embd else Linear(width, config.n_embd, bias=False)
        self.project_out = None if width == config.n_embd else Linear(config.n_embd, width, bias=False)
        self.positions = None
        if config.position == 'learned':
            self.positions = nn.Embedding(config.position_offset + config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(layers.Block(config, layer) for layer in range(config.n_layer))
        if config.embedding_shortcuts:  # a layer's input is a sum of stream and embedding
            self.residual_scale = nn.Parameter(torch.ones(config.n_layer))
            self.embedding_scale = nn.Parameter(torch.zeros(config.n_layer))
        self.neighbours = layers.Neighbours(config, self.causal) if config.neighbours else None
        self.norm = nn.Identity() if config.norm_after else layers.make_norm(config)
        self.attn_mask = None  # (T, T): in training, overrides what `causal` says
        for name, table in self.tables().items():
            self.register_buffer(name, table, persistent=False)
        self.init_weights()

    def tables(self):
        """Compute the buffers by name: `logit_bias` (V,), and `rope` (2, block_size, D)."""
        c, tables = self.config, {'logit_bias': torch.zeros(self.config.padded_vocab_size)}
        tables['logit_bias'][[*self.never_predicted(), *range(c.vocab_size, c.padded_vocab_size)]] = -math.inf
        if self.positions is None:
            tables['rope'] = layers.rope_table(c.rope_theta, c.head_dim, c.block_size, c.rope_scaling)
        return tables

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        if self.positions is None and self.rope.dtype != torch.float32:
            self.rope = self.tables()['rope'].to(self.rope.device)  # bfloat16 cannot tell positions apart
        return self

    def never_predicted(self):
        """List the special tokens that get no probability."""
        return list({self.config.mask_id, None if self.trains_on_padding else self.config.ignore_id} - {None})

    @torch.no_grad()
    def init_weights(self):
        native = self.config.norm == 'rms'
        for name, weight in self.named_parameters():
            if name.endswith('.bias'):
                nn.init.zeros_(weight)
            elif name.endswith(('.out.weight', '.down.weight')):
                nn.init.normal_(weight, std=0.0 if native else 0.02 / math.sqrt(2 * self.config.n_layer))
            elif weight.dim() == 2:
                in_block, width = name.startswith('blocks.'), weight.size(1)
                native_std = (3 * width) ** -0.5 if in_block else min(0.02, 2.56 / width)
                nn.init.normal_(weight, std=native_std if native else 0.02)

    @classmethod
    def new_weights(cls, config):
        """Return {name: tensor} of the parameters that a checkpoint of another architecture lacks."""
        if cls.causal or not config.neighbours:
            return {}
        return {'neighbours.after.weight': layers.Neighbours(config, False).after.weight.data}

    def num_parameters(self):
        """Count parameters, without the rows of <|mask|>, <|ignore|> and padding."""
        c = self.config
        unused = c.padded_vocab_size - c.vocab_size + sum(i is not None for i in (c.mask_id, c.ignore_id))
        return sum(p.numel() for p in self.parameters()) - unused * c.embedding_width * (2 - c.tied)

    def compile(self, **options):
        """Compile the trunk and the token loss apart: steps with other numbers of passes share these graphs."""
        for name in ('hidden', 'chunk_nll', 'chunk_top_k'):
            if hasattr(self, name):
                setattr(self, name, torch.compile(getattr(self, name), **options))

    def embed(self, tokens, belief=None):
        """Embed token ids (B, T) as (B, T, embedding_width); only `SDD` takes a belief."""
        x = self.embedding(tokens)
        return F.rms_norm(x, x.shape[-1:]) if self.config.norm == 'rms' else x

    def hidden(self, tokens, doc_ids=None, cache=None, belief=None):
        """Compute the last, normalised hidden states (B, T, C) of token ids (B, T), T at most block_size.

        doc_ids: (B, T), documents that do not attend to each other; cache: a KV cache or TwoStreams instead; belief: of
        `SDD`.
        """
        c, length = self.config, tokens.size(1)
        if cache is None:
            if length > c.block_size:  # `check` would put each length into its message, and compile it in
                raise ValueError(f'A row of {length} tokens is longer than block_size={c.block_size}.')
            annealing = self.training and self.attn_mask is not None
            attn_mask = self.attn_mask[:length, :length] if annealing else self.causal
            cache = layers.AttentionMask(attn_mask)
            if doc_ids is not None:
                cache = layers.DocumentMask(doc_ids, attn_mask)
        positions = cache.positions(length)  # a slice where all rows have the same, else (B, T)

        x, rope = self.embed(tokens, belief), None
        x = x if self.project_in is None else self.project_in(x)
        if self.positions is not None:
            x = x + self.positions.weight[c.position_offset :][positions]
        else:
            rope = self.rope[:, positions]  # (2, T, D) or (2, B, T, D)
            rope = tuple(rope if rope.dim() == 3 else rope.unsqueeze(2))
        x0 = x = self.dropout(x)
        beside = [] if self.neighbours is None else self.neighbours(x0, cache)
        for layer, block in enumerate(self.blocks):
            if c.embedding_shortcuts:
                x = self.residual_scale[layer] * x + self.embedding_scale[layer] * x0
            for scale, neighbour in beside:
                x = torch.addcmul(x, scale[layer], neighbour)
            x = block(x, x0, rope, cache)
        x = self.norm(x)
        if c.shift and not self.causal:  # to where its prediction is; nothing predicts the first token
            x = torch.cat([x[:, :1], x[:, :-1]], 1)
        return x if self.project_out is None else self.project_out(x)

    def head_weight(self):
        return (self.embedding if self.unembedding is None else self.unembedding).weight

    def head(self, hidden, weight=None):
        """Compute logits (..., padded vocabulary) in float32; -inf for what is never predicted."""
        logits = self.project(hidden, self.head_weight() if weight is None else weight).float()
        if self.config.logit_softcap:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits + self.logit_bias

    def head_rows(self, hidden):
        """Say how many positions get logits at once: as many as the caches of a CPU hold, more on a GPU."""
        size = LOGITS_PER_CHUNK * (1 if hidden.device.type == 'cpu' else 18)
        return max(1, size // self.config.padded_vocab_size)

    def logits(self, tokens, cache=None):
        """Compute logits (B, T, padded vocabulary): of the token at, or for `ar` after, each position."""
        return self.head(self.hidden(tokens, cache=cache))

    # ------------------------------------------------------------------------ losses of tokens

    def chunk_nll(self, hidden, targets, head_weight, label_smoothing=0.0):
        """Compute nll (N,) of targets (N,) given hidden states (N, C), and the likeliest tokens (N,)."""
        logits = self.head(hidden, head_weight)  # (N, V)
        nll = F.cross_entropy(logits, targets, reduction='none')
        if label_smoothing:  # towards the uniform distribution over what can be predicted
            possible = self.logit_bias == 0
            uniform = logits.logsumexp(-1) - logits.masked_fill(~possible, 0).sum(-1) / possible.sum()
            nll = nll + label_smoothing * (uniform - nll)
        return nll, logits.detach().argmax(-1)

    def weighted_nll(self, hidden, targets, weights=None, label_smoothing=0.0):
        """Compute Σ weights · nll over a batch: the scalar that trains, and nll and pred (B, T) for metrics.

        hidden: (B, T, C); targets: (B, T); weights: (B, T), where 0 costs no logits; None: 1 everywhere.
        """
        if not torch.is_grad_enabled():
            nll, pred = self.token_nll(hidden, targets, weights, label_smoothing)
            return (nll if weights is None else weights * nll).sum(), nll, pred
        index = None if weights is None else weights.flatten().nonzero().squeeze(1)
        h, y = take(hidden, index), take(targets, index)
        w = torch.ones(len(y), device=y.device) if weights is None else take(weights, index)
        chunk_nll = partial(self.chunk_nll, label_smoothing=label_smoothing)
        loss, nll, pred = WeightedSum.apply(h, self.head_weight(), w, y, chunk_nll, self.head_rows(h))
        return loss, put(nll, index, targets, 0.0), put(pred, index, targets, -1)

    def token_nll(self, hidden, targets, where=None, label_smoothing=0.0):
        """Compute nll and pred (B, T) where `where` (B, T) is not 0 (None: everywhere), else 0 and -1.

        For losses that are no weighted sum over tokens: differentiable, but the logits are computed twice.
        """
        index = None if where is None else where.flatten().nonzero().squeeze(1)
        h, y, weight = take(hidden, index), take(targets, index), self.head_weight()
        chunk_nll = partial(self.chunk_nll, label_smoothing=label_smoothing)
        if torch.is_grad_enabled():
            chunk_nll = partial(checkpoint, chunk_nll, use_reentrant=False)
        rows = self.head_rows(h)
        chunks = [chunk_nll(h_part, y_part, weight) for h_part, y_part in zip(h.split(rows), y.split(rows))]
        nll, pred = (torch.cat(parts) for parts in zip(*chunks))
        return put(nll, index, targets, 0.0), put(pred, index, targets, -1)

    def loss_positions(self, tokens, loss_mask=None, streams=None):
        """Return where the loss is and which of these tokens count, (B, T) bool each.

        Padding adds to the loss of a bidirectional model, but not to the token count; blocks, in TwoStreams, that
        consist of it are never written.
        """
        in_loss = torch.ones_like(tokens, dtype=torch.bool) if loss_mask is None else loss_mask.bool().clone()
        in_loss[:, 0] = False  # the first token is context
        if self.config.ignore_id is None:
            return in_loss, in_loss
        is_text = tokens != self.config.ignore_id
        if streams is not None:
            in_loss &= is_text.gather(1, streams.start.expand_as(tokens))
        return in_loss, in_loss & is_text

    def denoiser(self, x_t, doc_ids=None, cache=None, clean=None, k=None):
        """Compute the hidden states (B, T, C) that predict the masked tokens of x_t (B, T), and those of clean (B, T).

        cache: TwoStreams, or a BlockCache of the tokens before, or None: x_t is the whole row, and clean has no states.
        """
        return self.predict(x_t, doc_ids, cache, clean)

    def predict(self, x_t, doc_ids=None, cache=None, clean=None, belief=None):
        """Compute what `denoiser` does, in one pass."""
        if cache is None:
            return self.hidden(x_t, doc_ids, None, belief), None
        return cache.read(self, x_t, clean, belief)

    def top_k_belief(self, hidden, where, k):
        """Return what a sampler keeps of a prediction for the next step; see `SDD`. Here: nothing."""

    def nll(self, tokens, loss_mask=None, noise=None):
        """Compute each row's negative log-likelihood (B,) in nats, or one unbiased draw of its upper bound."""
        return self(tokens, loss_mask, noise, reduction='none')[0].sum(1)


def reduced(reduction, loss, weighted_nll, counted, metrics):
    """Return what forward returns: the loss, the count and the metrics as sums, or per token (B, T) for 'none'."""
    if reduction == 'none':
        return weighted_nll, counted, metrics
    return loss, counted.sum(), {name: values.sum() for name, values in metrics.items()}


# ---------------------------------------------------------------------------- architectures


def drop_tokens(tokens, share, mask_id):
    """Mask a random share of tokens (B, T), but not the first ones."""
    if not share:
        return tokens
    masked = torch.rand(tokens.shape, device=tokens.device) < share
    masked[:, 0] = False  # the start token
    return tokens.masked_fill(masked, mask_id)


class Autoregressive(Transformer):
    """Predicts each token from those before it; its likelihood is exact."""

    bound, order = 'exact', 'left to right'
    causal, needs_noise, extra_tokens, trains_on_padding, family_of = True, False, 1, False, 'ar'

    def __init__(self, config):
        has_blocks = any(config.block_length) or config.ar_weight
        check(not has_blocks, 'block_length and ar_weight are for diffusion models; leave them out.')
        super().__init__(config)
        self.token_dropout = 0.0  # of a training step: the share of the tokens that it reads masked

    def forward(self, tokens, loss_mask=None, noise=None, doc_ids=None, reduction='sum'):
        """Compute Σ nll of tokens (B, T) but the first, where loss_mask (B, T) says; None: of all."""
        _, counted = self.loss_positions(tokens, loss_mask)  # (B, T)
        weights = None if loss_mask is None else counted[:, 1:].float()
        visible = drop_tokens(tokens, self.token_dropout, self.config.mask_id) if self.training else tokens
        h = self.hidden(visible[:, :-1], None if doc_ids is None else doc_ids[:, :-1])  # (B, T - 1, C)
        loss, nll, pred = self.weighted_nll(h, tokens[:, 1:], weights)
        nll, pred = F.pad(nll, (1, 0)), F.pad(pred, (1, 0), value=-1)  # nothing predicts the first token
        metrics = {'correct': (pred == tokens) & counted, 'predicted': counted}
        return reduced(reduction, loss, nll, counted, metrics)


class Diffusion(Transformer):
    """Masked diffusion (Sahoo et al. 2024, MDLM; Nie et al. 2025, LLaDA).

    Each token of a row is masked with probability t and predicted from the visible ones. The NELBO, E_t[Σ_masked
    -log p / t], is an upper bound of -log p(row), up to the ratios below T_MIN. The network is not told t: the share
    of masked positions says it (Ou et al. 2024, RADD). With block_length it is autoregressive over blocks and
    diffuses within them (Arriola et al. 2025, BD3-LM); with ar_weight the clean tokens are an `ar` model as well.
    """

    bound, order, family_of = 'upper', 'in random order', 'diffusion'

    def __init__(self, config):
        check(config.mask_id is not None, 'mask_id is None; a diffusion model needs the id of <|mask|>.')
        super().__init__(config)
        if config.block_length[0]:
            self.order = f'in blocks of {config.block_length[0]}, {self.order}'
        # Of a training step: its mask ratios, its blocks, and which are masked, every n-th from the first on.
        self.mask_window, self.block_length, self.noisy_blocks = (0, 1), None, (1, 0)

    def forward(self, tokens, loss_mask=None, noise=None, doc_ids=None, reduction='sum', **beliefs):
        """Compute Σ nll / t over the masked tokens, plus ar_weight Σ nll of next tokens in training.

        tokens, loss_mask, doc_ids: (B, T), with the loss where loss_mask is not 0; noise: (B, 1 + T) uniform numbers
        for the mask ratio and for each token, drawn here where None; beliefs: settings of `SDD.earlier_passes`.
        """
        if noise is None:
            noise = torch.rand(len(tokens), 1 + tokens.size(1), device=tokens.device)
        streams = self.two_streams(tokens, doc_ids)
        maskable, counted = self.loss_positions(tokens, loss_mask, streams)  # (B, T) each
        t = self.mask_ratio(noise, streams)  # (B, 1), or (B, T) by blocks
        if streams is not None:
            t, noise = streams.whole_tokens(t, noise, maskable)
        corrupt = partial(self.corrupt, tokens, maskable, noise)
        x_t, masked = corrupt(t)  # (B, T) each
        h, clean = self.denoiser(x_t, doc_ids, streams, tokens, **self.earlier_passes(corrupt, t, **beliefs))
        weights = self.loss_weights(masked, t) * (streams.every if streams else 1)  # (B, T)
        loss, nll, pred = self.weighted_nll(h, tokens, weights)
        return self.outputs(reduction, loss, weights * nll, pred, tokens, masked, counted, clean)

    def earlier_passes(self, corrupt, t):
        """Return what `denoiser` is told of passes before the one that predicts: here there are none."""
        return {}

    def two_streams(self, tokens, doc_ids=None):
        """Return the TwoStreams of rows (B, T), where blocks or ar_weight need them, else None."""
        c, length, block_length = self.config, tokens.size(1), self.config.block_length[0]
        if self.training and self.block_length is not None:
            block_length = self.block_length
        if 0 < block_length < length or c.ar_weight:
            noisy_blocks = self.noisy_blocks if self.training else (1, 0)
            return TwoStreams(tokens, block_length or length, doc_ids, *noisy_blocks, c.neighbours)

    def mask_ratio(self, noise, streams=None):
        """Return the probability t (B, 1), or of each block (B, T), that a token is masked; noise: (B, 1 + T).

        The blocks of a row are spread over the ratios by the golden ratio.
        """
        low, high = self.mask_window if self.training else (0, 1)
        u, low = noise[:, :1], max(low, T_MIN)
        if streams is not None:
            u = (u + streams.number * 0.6180339887498949) % 1
        return low + (high - low) * u

    def corrupt(self, tokens, maskable, noise, t):
        """Draw x_t ~ q(x_t | x): mask each maskable token with probability t. Returns x_t and where, (B, T) each."""
        masked = maskable & (noise[:, 1:] < t)
        return tokens.masked_fill(masked, self.config.mask_id), masked

    def loss_weights(self, masked, t):
        """Return the weights (B, T) of the NELBO: 1/t where a token is masked."""
        return masked / t

    def outputs(self, reduction, loss, weighted_nll, pred, tokens, masked, counted, clean=None):
        """Return what forward returns, with the metrics that are logged beside the loss.

        clean: hidden states (B, T, C) of the clean tokens, for the next-token loss.
        """
        metrics = {'correct': (pred == tokens) & counted, 'predicted': masked & counted}
        if self.config.ignore_id is not None:
            padding = tokens == self.config.ignore_id
            metrics['loss_without_padding'] = weighted_nll.masked_fill(padding, 0)
            metrics['ignore_correct'] = (pred == tokens) & padding
            metrics['ignore_targets'] = masked & padding
            metrics['ignore_guesses'] = pred == self.config.ignore_id
        if self.config.ar_weight:
            ar_loss, nll, _ = self.weighted_nll(clean[:, :-1], tokens[:, 1:], counted[:, 1:].float())
            loss = loss + self.config.ar_weight * ar_loss if self.training else loss
            metrics['ar_loss'], metrics['loss'] = F.pad(nll, (1, 0)), weighted_nll  # logged is the bound
        return reduced(reduction, loss, weighted_nll, counted, metrics)


class Belief(NamedTuple):
    """The likeliest k tokens of each position with their probabilities, 0 where there is no belief."""

    tokens: torch.Tensor  # (B, T, k)
    probabilities: torch.Tensor  # (B, T, k)


class SDD(Diffusion):
    """Sparse distribution diffusion: masked diffusion whose masked positions hold beliefs.

    A belief is the top-k of the model's own previous prediction with its probabilities, which do not add up to 1. A
    masked position enters the network as E[mask] + W Σ_j p_j E[token_j]; W starts as the identity and learns to tell a
    candidate from a token. Visible positions have no belief; k = 0 is masked diffusion.

    A belief is a function of a view that is masked as much as x_t or more, so the network with its earlier passes is
    a deeper function of the visible tokens, and its loss bounds -log p(row) of the sampler that makes these passes
    before each token, without gradient. Related: Soft-Masked Diffusion (Hersche et al. 2025), LRD, LDDM, SCMDM.
    """

    order = f'{Diffusion.order}, two passes per token'
    has_beliefs, family_of = True, ''

    def __init__(self, config):
        super().__init__(config)  # draws the same weights as Diffusion
        self.belief_proj = Linear(config.embedding_width, config.embedding_width, bias=False)
        with torch.no_grad():
            self.belief_proj.weight.copy_(torch.eye(config.embedding_width))

    @classmethod
    def new_weights(cls, config):
        return super().new_weights(config) | {'belief_proj.weight': torch.eye(config.embedding_width)}

    def earlier_passes(self, corrupt, t, k=None, passes=1, stale=0.0):
        """Return k, the number of candidates (None: config.k), and the views (B, T) of the passes to beliefs.

        stale: how much more of a row the first of these passes sees masked, the next ones steadily less, as in
        sampling. In training `optim.draw_beliefs` chooses the three for each step.
        """
        return {'k': k, 'views': [corrupt(t + stale * i / passes)[0] for i in range(passes, 0, -1)]}

    def denoiser(self, x_t, doc_ids=None, cache=None, clean=None, k=None, views=None):
        """Compute what `Diffusion.denoiser` does, after a pass over each view (B, T) of the tokens, by default x_t
        itself, that gives the next pass its belief."""
        k, belief = self.config.k if k is None else k, None
        masked = x_t == self.config.mask_id
        with torch.no_grad():
            for view in (views or [x_t]) if k else ():
                hidden, _ = self.predict(view, doc_ids, cache, clean, belief)
                belief = self.top_k_belief(hidden, masked, k)
        torch.clear_autocast_cache()  # torch 2.9 would reuse here what it cast without gradient
        return self.predict(x_t, doc_ids, cache, clean, belief)

    @torch.no_grad()
    def top_k_belief(self, hidden, where, k):
        """Return the Belief at positions `where` (B, T) that hidden states (B, T, C) predict; None for k = 0."""
        if k == 0:
            return None
        k, index = min(k, self.config.vocab_size), where.flatten().nonzero().squeeze(1)
        tokens = torch.zeros(where.numel(), k, dtype=torch.long, device=where.device)
        probabilities = torch.zeros(where.numel(), k, device=where.device)
        for part in index.split(self.head_rows(hidden)):
            tokens[part], probabilities[part] = self.chunk_top_k(hidden.flatten(0, 1)[part], k)
        return Belief(tokens.view(*where.shape, k), probabilities.view(*where.shape, k))

    def chunk_top_k(self, hidden, k):
        """Return the k likeliest tokens (N, k) given hidden states (N, C), and their probabilities (N, k)."""
        logits = self.head(hidden)  # (N, V)
        top = logits.topk(k)
        return top.indices, (top.values - logits.logsumexp(-1, keepdim=True)).exp()

    def embed(self, tokens, belief=None):
        x = super().embed(tokens)
        if belief is None:  # a gradient of zero, but one in every step: DDP waits for it
            return x + 0 * self.belief_proj.weight.sum() if torch.is_grad_enabled() else x
        table = self.embedding.weight
        table = F.rms_norm(table, table.shape[-1:]) if self.config.norm == 'rms' else table
        p = belief.probabilities * (tokens == self.config.mask_id).unsqueeze(-1)  # (B, T, k)
        p, candidates = p.to(table.dtype).flatten(0, 1), belief.tokens.flatten(0, 1)
        mixture = F.embedding_bag(candidates, table, per_sample_weights=p, mode='sum')  # (B · T, C)
        return x + self.belief_proj(mixture).view_as(x)


ARCHITECTURES = {'ar': Autoregressive, 'diffusion': Diffusion, 'sdd': SDD}


def architecture_name(model):
    """Return the name in ARCHITECTURES of a model, which FSDP2 may have made a subclass of, or of its class."""
    kinds = (model if isinstance(model, type) else type(model)).__mro__
    return next(name for kind in kinds for name, c in ARCHITECTURES.items() if c is kind)
