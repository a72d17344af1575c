"""Measure how likely a model finds unseen text, in nats, on the same tokens for every architecture.

Rows of block_size tokens, the first of each given, the others counted. From left to right the nll is exact. A
diffusion model has a likelihood for each way to generate a row; each figure is exact for or bounds one of them:

    NELBO           a bound for sampler='first_hitting': random order, one token at a time; of `sdd` with k = 0 too
    two-pass NELBO  `sdd`: a bound for the same sampler, whose fresh_beliefs come from a first pass over each masked row
    nested_bound    a bound for sampler='ancestral' with steps=S, of a row or of each of its blocks: random order, all
                    tokens of a step at once, beliefs carried from step to step
    chain_rule      exact for sampler='blocks' with block_length=1, from left to right, of models of whole rows; `sdd`:
                    with fresh_beliefs=True, or carried from token to token

All of them at temperature 1 without top_k or top_p. No bound holds for samples by confidence, longer blocks, threshold
or ReMDM. It would be void if a belief came from a less masked row or from the text itself, overrode a visible token, or
if k were chosen per row by its loss. Random numbers are keyed by a row's number: the result depends neither on the
batch size nor on the number of ranks, and models are compared under the same masks.
"""

import math
from itertools import groupby

import numpy as np
import torch
from tqdm import tqdm

from lm import data, rng, scoring

MIN_DOCUMENTS = 30  # with fewer, intervals are over windows
QUANTITIES = ('nll', 'count', 'correct', 'predicted')


def batches_of(model, items, length, size):
    """Return lists of at most `size` items, the shortest first by `length`; only a causal model has them mixed: it
    sees no padding."""
    items = sorted(items, key=length)
    groups = [items] if model.causal else [[*group] for _, group in groupby(items, length)]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


@torch.inference_mode()
def measure(model, rows, dist, batch_size, draws=8, max_tokens=0, **bound):
    """Return sums over a split as {unit: {quantity: float64 array}}; the ranks share the rows, each gets all sums.

    Units: 'documents' (D,), 'windows' (R,). Quantities: 'nll' and the 'count' of its tokens, 'correct' predictions of
    those 'predicted'. draws: mask ratios per row, where the model needs them, over which all quantities are means.
    max_tokens: of rows spread over the split; 0: all. bound: see `token_values`.
    """
    size = data.num_evaluated(rows, max_tokens, rows.row_length - 1)
    chosen = np.arange(size) * rows.num_rows // size
    sizes = {'documents': 1 + int(rows.documents(rows.num_rows - 1)[-1]), 'windows': size}
    sums = {unit: {name: np.zeros(length) for name in QUANTITIES} for unit, length in sizes.items()}
    passes = draws if model.needs_noise and not bound.get('exact') and not bound.get('steps') else 1

    starts = range(dist.rank * batch_size, size, dist.world_size * batch_size)
    for start in tqdm(starts, 'likelihood', leave=False, disable=dist.rank > 0 or None):
        windows = np.arange(start, min(start + batch_size, size))
        numbers = chosen[windows]
        batch = data.collate([rows.read(number, ()) for number in numbers], None).to(dist.device)
        length = batch.tokens.size(1)  # of the longest example
        documents = np.stack([rows.documents(number)[:length] for number in numbers])  # (B, T)
        for draw in range(passes):
            noise = ratio_noise(numbers, draw, draws, rows.row_length)
            with dist.autocast():
                values = token_values(model, batch.tokens, batch.loss_mask, noise, **bound)
            for name, value in values.items():
                value = value.cpu().double().numpy() / passes  # (B, T)
                np.add.at(sums['documents'][name], documents, value)
                sums['windows'][name][windows] += value.sum(1)
    for part in sums.values():
        for array in part.values():
            dist.sum(torch.from_numpy(array))  # in place
    return sums


def token_values(model, tokens, loss_mask, noise, exact='', steps=0, k=None):
    """Return {quantity: (B, T)} of one pass with noise (B, 1 + T).

    exact: 'exact' or 'carried', the chain rule with fresh or carried beliefs instead of the model's loss; steps: the
    bound of sampling in so many steps; neither has 'correct' and 'predicted'. k: of an `sdd`, if not its own.
    """
    noise = torch.from_numpy(noise).to(tokens.device) if model.needs_noise else None
    if exact:
        nll = chain_rule(model, tokens, loss_mask, k=k, carried=exact == 'carried')
    elif steps:
        nll = nested_bound(model, tokens, loss_mask, noise[:, 1:], steps, k)
    else:
        beliefs = {'k': k} if model.has_beliefs and k is not None else {}
        nll, counted, metrics = model(tokens, loss_mask, noise, reduction='none', **beliefs)
        return {'nll': nll, 'count': counted, **{name: metrics[name] for name in ('correct', 'predicted')}}
    return {'nll': nll, 'count': model.loss_positions(tokens, loss_mask)[1]}


def ratio_noise(numbers, draw, draws, row_length):
    """Return noise (B, 1 + row_length) for one of several draws: a mask ratio per row, then a number per token.

    A row's ratios are stratified, (draw + u) / draws, and depend on the row's number and the draw only.
    """
    numbers = np.asarray(numbers)
    ratios = (draw + rng.uniform(rng.LEVEL, numbers).astype(np.float64)) / draws
    tokens = rng.uniform(rng.NOISE, numbers[:, None], draw, np.arange(row_length))
    return np.concatenate([ratios[:, None], tokens], axis=1).astype(np.float32)


def nested_bound(model, tokens, loss_mask, noise, steps, k=None):
    """Return nll (B, T) whose sum over a row is an unbiased upper bound for generating it in `steps` random steps, or
    each of its blocks in so many.

    Σ_j (t_j - t_{j-1}) / t_j Σ_{masked at t_j} nll with t_j = j / steps, so the weight is 1 / j; a token is masked
    while its uniform number in noise (B, T) is below t_j: the masks are nested. Beliefs come from the step before,
    which saw less: they depend on the path of the reverse process alone, on which p may be conditioned.
    """
    masks = ((noise < step / steps, step) for step in range(steps, 0, -1))
    return nll_along(model, tokens, loss_mask, ((mask, mask, 1 / step) for mask, step in masks), True, k)


def chain_rule(model, tokens, loss_mask=None, turn=None, k=None, carried=False):
    """Return the exact nll (B, T) of a diffusion model that fills a row, or each block, position by position.

    turn: (T,), when each position's turn comes; None: from left to right. Each token is predicted while its own
    position and all later ones are masked, with fresh beliefs or `carried` ones. -log p(row) of the model that samples
    in this very order; with fresh beliefs the mean over all orders is the NELBO.
    """
    index = torch.arange(tokens.size(1), device=tokens.device)
    if turn is None:
        turn = index % (model.config.block_length[0] or tokens.size(1))
    turn = torch.as_tensor(turn, device=tokens.device)
    path = ((turn >= i, turn == i, 1) for i in range(int(turn.min()), 1 + int(turn.max())))
    return nll_along(model, tokens, loss_mask, path, carried, k)


@torch.inference_mode()
def nll_along(model, tokens, loss_mask, path, carried, k=None):
    """Return Σ weight · nll (B, T) over the steps of a path: with beliefs of a pass before each, or `carried` on.

    path: for each step what is masked, what of that is predicted, (T,) or (B, T) each, and its weight.
    """
    streams = model.two_streams(tokens)
    maskable, _ = model.loss_positions(tokens, loss_mask, streams)
    k = model.config.k if k is None else k
    nll, belief = torch.zeros(tokens.shape, device=tokens.device), None
    for masked, predicted, weight in path:
        masked = maskable & masked  # (B, T)
        x_t = tokens.masked_fill(masked, model.config.mask_id)
        if carried:
            hidden, _ = model.predict(x_t, None, streams, tokens, belief)
            written, before = written_in(masked & predicted, streams), belief
            belief = model.top_k_belief(hidden, masked & written, k)
            if before is not None:  # where no pass is made it stays
                belief = type(belief)(*(torch.where(written[..., None], *x) for x in zip(belief, before)))
        else:
            hidden, _ = model.denoiser(x_t, None, streams, tokens, k)
        nll += weight * model.token_nll(hidden, tokens, masked & predicted)[0]
    return nll


def written_in(where, streams):
    """Say of each position (B, T) whether `where` is true somewhere in its row or block: no pass is made otherwise."""
    if streams is None:
        return where.any(1, keepdim=True)
    start = streams.start.expand_as(where)
    found = torch.zeros_like(where, dtype=torch.int8).scatter_reduce(1, start, where.char(), 'amax')
    return found.gather(1, start) > 0


@torch.inference_mode()
def nll_of(model, rows, dist):
    """Return the nll (N,) of rows, lists of token ids, by a causal model: it does not see the padding."""
    batch = data.collate([(row, np.ones(len(row))) for row in rows], None).to(dist.device)
    with dist.autocast():
        return model.nll(batch.tokens, batch.loss_mask).cpu().double()


def judge(rows, tokenizer, model, own_tokenizer, start_token, dist, batch_size):
    """Return an `ar` model's nll per token of its own, and bits per byte, of `rows`, token ids of `tokenizer`.

    It reads each document by itself and predicts its end as well, where it has one. What does not fit the block is
    read in windows, the first token of each of which is context.
    """
    parts, size, length = [], 0, model.config.block_size
    same = own_tokenizer.to_json() == tokenizer.to_json()
    for row in rows:
        documents = split_at(row, tokenizer.endoftext_id)
        for number, document in enumerate(documents, 1):
            text = tokenizer.decode(document)
            size += len(text.encode())
            ids = [start_token] + (plain(document, tokenizer) if same else own_tokenizer.encode(text))
            ids += [own_tokenizer.endoftext_id] if number < len(documents) else []
            parts += [ids[i : i + length] for i in range(0, len(ids) - 1, length - 1)]

    nll = torch.zeros((), dtype=torch.float64)
    for start in range(dist.rank * batch_size, len(parts), dist.world_size * batch_size):
        nll += nll_of(model, parts[start : start + batch_size], dist).sum()
    nll, count = dist.sum(nll).item(), sum(len(part) - 1 for part in parts)
    per_byte = nll / size / math.log(2) if size else None
    return {'judge_nats': nll / count if count else None, 'judge_bpb': per_byte}


def plain(ids, tokenizer):
    """Return the token ids without the special ones."""
    special = (tokenizer.endoftext_id, tokenizer.mask_id, tokenizer.ignore_id)
    return [i for i in ids if i not in special]


def split_at(row, end):
    """Return the parts of a list of ids that lie before, between and after the ids `end`."""
    ends = [i for i, token in enumerate(row) if token == end]
    return [row[start + 1 : stop] for start, stop in zip([-1, *ends], [*ends, len(row)])]


def interval(sums, numerator, denominator, others=None):
    """Return Σ numerator / Σ denominator, its 95 % interval, and the unit that this is over.

    The unit is what shares randomness: a document shares its subject, and the documents of one window share its mask
    ratio. So it is the larger of the two, or windows where there are few documents: as windows next to each other
    resemble each other, these intervals are somewhat too narrow. others: another model's sums over the same tokens, to
    subtract. What makes a text hard for both cancels, so this tells models apart whose own intervals overlap.
    """
    documents, windows = (np.count_nonzero(sums[unit]['count']) for unit in ('documents', 'windows'))
    unit = 'documents' if MIN_DOCUMENTS <= documents <= windows else 'windows'
    values = sums[unit][numerator] - (others[unit][numerator] if others else 0)
    return *scoring.mean_ci(values, sums[unit][denominator]), unit


def perplexity_figures(sums, tokens_per_byte):
    """Return nats per token, perplexity, bits per byte where there is text, and the 95 % interval of each."""
    nll, ci, unit = interval(sums, 'nll', 'count')
    documents = int(np.count_nonzero(sums['documents']['count']))
    figures = {'tokens': round(sums['windows']['count'].sum()), 'documents': documents}
    figures |= {'nats_per_token': nll, 'ci95': ci, 'ci_over': unit}
    scales = {'perplexity': lambda x: math.exp(min(x, 700))}
    if tokens_per_byte is not None:
        scales['bpb'] = lambda x: x * tokens_per_byte / math.log(2)
    for name, scale in scales.items():
        figures[name] = None if nll is None else scale(nll)
        figures[name + '_ci95'] = ci and [scale(x) for x in ci]
    return figures
