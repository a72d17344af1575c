"""Measure how likely a model finds unseen text, in nats, on the same tokens for every architecture.

Rows of block_size tokens, the first of each given, the others counted. From left to right the nll is exact. A
diffusion model has a likelihood for each way to generate a row; each figure is exact for or bounds one of them:

    NELBO           random order, one token at a time; for `sdd` with k = 0 the same, without beliefs
    two-pass NELBO  `sdd`: random order, each token after a first pass over the same masked row gave the beliefs
    nested_bound    random order in S steps, all tokens of a step at once, beliefs kept from step to step: what
                    sampler='ancestral' with steps=S, temperature 1 and no top_k or top_p does
    chain_rule      exact, from left to right, one forward pass per token

No bound holds for samples by confidence, blocks, threshold or ReMDM, or at another temperature. It would be void
if a belief came from a less masked row or from the text itself, overrode a visible token, or if k were chosen per
row by its loss. Random numbers are keyed by a row's number: the result depends neither on the batch size nor on
the number of ranks, and models are compared under the same masks.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from lm import data, rng, scoring
from lm.configurator import require
from model import T_MIN

RATIO_BINS = 10  # mask ratios at which accuracy is told apart
MIN_DOCUMENTS = 30  # with fewer, intervals are over windows
QUANTITIES = ('nll', 'count', 'correct', 'predicted')


def open_rows(folder, split, model, block_size, mode):
    """Return the same rows for each architecture: adjacent windows of block_size tokens, or one document per row."""
    if mode == 'documents':
        return data.DocumentRows(folder, split, block_size, model.trains_on_padding)
    return data.PackedRows(folder, split, block_size, stride=block_size, training=False)


@torch.inference_mode()
def measure(model, rows, dist, batch_size, draws=8, max_tokens=0, **bound):
    """Return sums over a split as {unit: {quantity: float64 array}}; the ranks share the rows, each gets all sums.

    Units: 'documents' (D,), 'windows' (R,), 'ratios' (RATIO_BINS,). Quantities: 'nll' and the 'count' of its tokens,
    'correct' predictions of those 'predicted'. draws: mask ratios per row, where the model needs them, over which
    all quantities are means. max_tokens: of rows spread over the split; 0: all. bound: see `token_values`.
    """
    size = min(rows.num_rows, max(1, max_tokens // (rows.row_length - 1))) if max_tokens else rows.num_rows
    chosen = np.arange(size) * rows.num_rows // size
    last_document = int(rows.documents(rows.num_rows - 1)[-1])
    sizes = {'documents': 1 + last_document, 'windows': size, 'ratios': RATIO_BINS}
    sums = {unit: {name: np.zeros(length) for name in QUANTITIES} for unit, length in sizes.items()}
    passes = draws if model.needs_noise and not bound.get('exact') and not bound.get('steps') else 1

    for start in range(dist.rank * batch_size, size, dist.world_size * batch_size):
        windows = np.arange(start, min(start + batch_size, size))
        numbers = chosen[windows]
        batch = data.collate([rows.read(number, ()) for number in numbers], None).to(dist.device)
        documents = np.stack([rows.documents(number) for number in numbers])  # (B, T)
        for draw in range(passes):
            noise = ratio_noise(numbers, draw, draws, rows.row_length)
            with dist.autocast():
                values = token_values(model, batch.tokens, batch.loss_mask, noise, batch_size, **bound)
            ratios = np.minimum((noise[:, 0] * RATIO_BINS).astype(int), RATIO_BINS - 1)
            for name, value in values.items():
                value = value.cpu().double().numpy() / passes  # (B, T)
                np.add.at(sums['documents'][name], documents, value)
                np.add.at(sums['windows'][name], windows, value.sum(1))
                np.add.at(sums['ratios'][name], ratios, value.sum(1))
    totals = {unit: dist.total(part) for unit, part in sums.items()}
    return {unit: {name: np.array(array) for name, array in part.items()} for unit, part in totals.items()}


def token_values(model, tokens, loss_mask, noise, batch_size, exact=False, steps=0, k=None):
    """Return {quantity: (B, T)} of one pass with noise (B, 1 + T).

    exact: the chain rule instead of the model's loss; steps: the bound of sampling in so many steps; neither has
    'correct' and 'predicted'. k: of an `sdd`, if not its own.
    """
    noise = torch.from_numpy(noise).to(tokens.device) if model.needs_noise else None
    if exact or steps:
        _, counted = model.loss_positions(tokens, loss_mask)
        if exact:
            return {'nll': chain_rule(model, tokens, loss_mask, None, batch_size, k), 'count': counted}
        return {'nll': nested_bound(model, tokens, loss_mask, noise[:, 1:], steps, k), 'count': counted}
    beliefs = {'k': k} if model.has_beliefs and k is not None else {}
    nll, counted, metrics = model(tokens, loss_mask, noise, reduction='none', **beliefs)
    return {'nll': nll, 'count': counted, 'correct': metrics['correct'], 'predicted': metrics['predicted']}


def ratio_noise(numbers, draw, draws, row_length):
    """Return noise (B, 1 + row_length) for one of several draws: a mask ratio per row, then a number per token.

    A row's ratios are stratified, (draw + u) / draws, and depend on the row's number and the draw only.
    """
    numbers = np.asarray(numbers)
    ratios = (draw + rng.uniform(rng.LEVEL, numbers).astype(np.float64)) / draws
    tokens = rng.uniform(rng.NOISE, numbers[:, None], draw, np.arange(row_length))
    return np.concatenate([ratios[:, None], tokens], axis=1).astype(np.float32)


@torch.inference_mode()
def nested_bound(model, tokens, loss_mask, noise, steps, k=None):
    """Return nll (B, T) whose sum over a row is an unbiased upper bound for generating it in `steps` random steps.

    Σ_j (t_j - t_{j-1}) / t_j Σ_{masked at t_j} nll with t_j = j / steps, so the weight is 1 / j; a token is masked
    while its uniform number in noise (B, T) is below t_j: the masks are nested. Beliefs come from the step before,
    which saw less: they depend on the path of the reverse process alone, on which p may be conditioned.
    """
    maskable, _ = model.loss_positions(tokens, loss_mask)
    k = model.config.k if k is None else k
    nll, belief = torch.zeros(tokens.shape, device=tokens.device), None
    for step in range(steps, 0, -1):
        masked = maskable & (noise < step / steps)
        hidden = model.hidden(tokens.masked_fill(masked, model.config.mask_id), belief=belief)
        nll += model.token_nll(hidden, tokens, masked)[0] / step
        belief = model.top_k_belief(hidden, masked, k) if model.has_beliefs else None
    return nll


@torch.inference_mode()
def chain_rule(model, tokens, loss_mask=None, turn=None, batch_size=32, k=None):
    """Return the exact nll (B, T) of a diffusion model that fills one position after the other.

    turn: (T,), when each position's turn comes; None: from left to right. Each token is predicted while its own
    position and all later ones are masked: as many forward passes as tokens, batch_size of them at once.
    -log p(row) of the model that samples in this very order; the mean over all orders is the NELBO.
    """
    maskable, _ = model.loss_positions(tokens, loss_mask)
    turn = torch.arange(tokens.size(1)) if turn is None else torch.as_tensor(turn)
    turn = turn.to(tokens.device)
    nll = torch.zeros(tokens.shape, device=tokens.device)
    for part in maskable.nonzero().split(batch_size):
        row, position = part.unbind(1)  # (n,), (n,)
        masked = maskable[row] & (turn >= turn[position, None])  # (n, T)
        hidden = model.denoiser(tokens[row].masked_fill(masked, model.config.mask_id), k=k)
        one = torch.arange(tokens.size(1), device=tokens.device) == position[:, None]  # (n, T)
        nll[row, position] = model.token_nll(hidden, tokens[row], one)[0].sum(1).float()
    return nll


# ---------------------------------------------------------------------------- texts of any length


@torch.inference_mode()
def score(model, texts, dist, batch_size, draws=8, numbers=None, k=None):
    """Return the nll (N,) of the scored tokens of each text, exact or an upper bound.

    texts: [(ids, scored)], at most block_size ids and as many bools, of which the first is False. numbers: (N,) keys
    of the noise, the same for texts that are to be compared. k: of an `sdd`, if not its own.
    """
    if not texts:
        return np.zeros(0)
    nll, numbers = np.zeros(len(texts)), np.arange(len(texts)) if numbers is None else np.asarray(numbers)
    lengths = np.array([len(ids) for ids, _ in texts])
    batches = []  # of one length: a bidirectional model would see padding
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        batches += [same[i : i + batch_size] for i in range(0, len(same), batch_size)]

    passes = draws if model.needs_noise else 1
    for batch in batches[dist.rank :: dist.world_size]:
        tokens = torch.tensor([texts[i][0] for i in batch], device=dist.device)  # (B, T)
        scored = np.array([texts[i][1] for i in batch], dtype=bool)
        loss_mask = torch.from_numpy(scored).to(dist.device)
        for draw in range(passes):
            noise = count_noise(numbers[batch], draw, draws, scored)
            with dist.autocast():
                values = token_values(model, tokens, loss_mask, noise, batch_size, k=k)
            nll[batch] += values['nll'].cpu().double().sum(1).numpy() / passes
    return np.array(dist.total({'nll': nll})['nll'])


def count_noise(numbers, draw, draws, scored):
    """Return noise (B, 1 + T) that masks exactly m of the n tokens `scored` (B, T), at the ratio m / n.

    m is stratified over 1..n, so E[n/m Σ_masked -log p] is the NELBO (Ou et al. 2024, RADD), and a text of one
    token has its exact value from a single draw (Nie et al. 2025, LLaDA).
    """
    numbers, n = np.asarray(numbers), scored.sum(1)
    shift = rng.uniform(rng.LEVEL, numbers).astype(np.float64)
    m = np.minimum(n, (n * (draw + shift) / draws).astype(int) + 1)  # (B,)
    order = rng.uniform(rng.NOISE, numbers[:, None], draw, np.arange(scored.shape[1]))
    rank = np.where(scored, order, 2).argsort(1, kind='stable').argsort(1)
    ratio = np.maximum(m, 1) / np.maximum(n, 1)
    ratio = (ratio - T_MIN) / (1 - T_MIN)  # model.mask_ratio makes it m / n again
    return np.concatenate([ratio[:, None], rank >= m[:, None]], axis=1).astype(np.float32)


def windows(ids, block_size):
    """Return [(ids, scored)] that together score each of `ids` but the first, which is context, once."""
    parts = [ids[start : start + block_size] for start in range(0, max(1, len(ids) - 1), block_size - 1)]
    return [(part, [False] + [True] * (len(part) - 1)) for part in parts]


def choose(model, tokenizer, start_token, questions, dist, batch_size, draws, k=None):
    """Return how often the right choice has the least nll per byte, given the question (acc_norm).

    questions: [{'question': text, 'choices': [text], 'answer': number from 0}]; what does not fit the block is
    cut off at a question's beginning.
    """
    block_size, texts, numbers, sizes = model.config.block_size, [], [], []
    for number, question in enumerate(questions):
        head = [start_token] + tokenizer.encode(question['question'].rstrip())
        for choice in map(str.strip, question['choices']):
            tail = tokenizer.encode(' ' + choice)
            fits = choice and len(tail) < block_size
            require(
                fits,
                f'The choice {choice[:60]!r} is empty or fills the block of {block_size} tokens; leave it out.',
            )
            kept = head[max(0, len(head) + len(tail) - block_size) :]
            texts.append((kept + tail, [False] * len(kept) + [True] * len(tail)))
            numbers.append(number)
            sizes.append(1 + len(choice.encode()))
    nll, numbers = score(model, texts, dist, batch_size, draws, numbers, k) / sizes, np.array(numbers)
    right = [nll[numbers == i].argmin() == question['answer'] for i, question in enumerate(questions)]
    accuracy, ci = scoring.share_ci(right)
    chance = float(np.mean([1 / len(question['choices']) for question in questions]))
    return {'choices_accuracy': accuracy, 'choices_ci95': ci, 'choices_chance': chance}


class Judge(NamedTuple):
    model: object
    tokenizer: data.Tokenizer
    start_token: int


def judge(judge, rows, tokenizer, dist, batch_size, draws):
    """Return a judge's nll per token of its own, and bits per byte, of `rows`, lists of token ids of `tokenizer`.

    It reads each document by itself and predicts its end as well, where it has one.
    """
    texts, size, same = [], 0, judge.tokenizer.to_json() == tokenizer.to_json()
    for row in rows:
        documents = split_at(row, tokenizer.endoftext_id)
        for number, document in enumerate(documents, 1):
            text = tokenizer.decode(document)
            size += len(text.encode())
            ids = plain(document, tokenizer) if same else judge.tokenizer.encode(text)
            end = [judge.tokenizer.endoftext_id] if number < len(documents) else []
            texts += windows([judge.start_token, *ids, *end], judge.model.config.block_size)
    nll, count = (
        score(judge.model, texts, dist, batch_size, draws).sum(),
        sum(sum(scored) for _, scored in texts),
    )
    return {
        'judge_nats': float(nll / count) if count else None,
        'judge_bpb': float(nll / size / math.log(2)) if size else None,
        'judge_bound': judge.model.bound,
    }


def plain(ids, tokenizer):
    """Return the token ids without the special ones."""
    special = (tokenizer.endoftext_id, tokenizer.mask_id, tokenizer.ignore_id)
    return [i for i in ids if i not in special]


def split_at(row, end):
    """Return the parts of a list of ids that lie before, between and after the ids `end`."""
    ends = [i for i, token in enumerate(row) if token == end]
    return [row[start + 1 : stop] for start, stop in zip([-1, *ends], [*ends, len(row)])]


# ---------------------------------------------------------------------------- figures


def interval_unit(sums):
    """Return what intervals are over: 'documents', or 'windows' where there are few of them.

    Windows next to each other resemble each other, so intervals over them are somewhat too narrow.
    """
    return 'documents' if np.count_nonzero(sums['documents']['count']) >= MIN_DOCUMENTS else 'windows'


def difference(sums, others):
    """Return by how many nats per token the nll is above another model's on the same tokens.

    What makes a document hard for both cancels, so it tells models apart whose own intervals overlap.
    """
    sums, others = sums[interval_unit(sums)], others[interval_unit(sums)]
    value, ci = scoring.mean_ci(sums['nll'] - others['nll'], sums['count'])
    return {'difference': value, 'difference_ci95': ci}


def perplexity_figures(sums, tokens_per_byte):
    """Return nats per token, perplexity, bits per byte where there is text, and the 95 % interval of each."""
    unit = interval_unit(sums)
    nll, ci = scoring.mean_ci(sums[unit]['nll'], sums[unit]['count'])
    scales = {'perplexity': lambda x: math.exp(min(x, 700))}
    if tokens_per_byte is not None:
        scales['bpb'] = lambda x: x * tokens_per_byte / math.log(2)
    figures = {
        'tokens': int(round(sums['windows']['count'].sum())),
        'documents': int(np.count_nonzero(sums['documents']['count'])),
        'nats_per_token': nll,
        'ci95': ci,
        'ci_over': unit,
    }
    for name, scale in scales.items():
        figures[name] = None if nll is None else scale(nll)
        figures[name + '_ci95'] = None if ci is None else [scale(x) for x in ci]
    return figures


def accuracy_figures(sums, by_ratio):
    """Return the share of correct predictions, and the same for each tenth of the mask ratios."""
    unit = interval_unit(sums)
    accuracy, ci = scoring.mean_ci(sums[unit]['correct'], sums[unit]['predicted'])
    figures = {'accuracy': accuracy, 'accuracy_ci95': ci, 'ci_over': unit}
    if by_ratio:
        correct, predicted = sums['ratios']['correct'], sums['ratios']['predicted']
        figures['accuracy_by_level'] = [float(c / p) if p else None for c, p in zip(correct, predicted)]
    return figures
