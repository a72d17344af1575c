"""How likely a model finds text that it has not seen, in nats, for every architecture on the same tokens.

Rows of block_size tokens, the first of each given, the others counted. What is left to right is exact. A
diffusion model has several likelihoods, one for each way to write a row with it, and each figure is exact for
or bounds one of them:

    NELBO           random order, one token at a time; for `sdd` with k = 0 the same, without beliefs
    two-pass NELBO  `sdd`: random order, each token after a first pass over the same canvas gave the beliefs
    nested_bound    random order in S steps, all tokens of a step at once, beliefs kept from step to step: what
                    sampler='ancestral' with steps=S, temperature 1 and no top_k or top_p does
    chain_rule      exact, from left to right, one forward pass per token

No bound holds for samples by confidence, blocks, threshold or ReMDM, or at another temperature. It would be void
if a belief came from a less masked view or from the text itself, overrode a visible token, or if k were chosen
per row by its loss. All numbers drawn are keyed by a row's own number: the result depends neither on the batch
size nor on the number of ranks, and models are compared under the same masks.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from lm import data, rng, scoring
from lm.configurator import UserError
from model import MIN_LEVEL, positions_of

LEVEL_BINS = 10  # masking levels at which accuracy is told apart
FEW_DOCUMENTS = 30  # below this many, windows tell how sure we are
QUANTITIES = ('nats', 'count', 'correct', 'predicted')


# ---------------------------------------------------------------------------- a split


def open_rows(folder, split, model, block_size, mode):
    """The same rows for each architecture: block_size tokens that overlap by none, or one document per row."""
    if mode == 'documents':
        return data.DocumentRows(folder, split, block_size, train_on_filler=not model.causal)
    return data.PackedRows(folder, split, block_size, stride=block_size, training=False)


def choose_rows(rows, max_tokens):
    """Numbers of the rows to measure: all, or as many as hold max_tokens, spread over the split."""
    size = rows.num_rows
    if max_tokens:
        size = min(size, max(1, max_tokens // (rows.row_length - 1)))
    return np.arange(size) * rows.num_rows // size


@torch.inference_mode()
def measure(model, rows, run, batch_size, draws=8, max_tokens=0, exact=False, steps=0, k=None):
    """Sums over a split as {unit: {quantity: float64 array}}.

    Units: 'document' (D,), 'row' (R,), 'level' (LEVEL_BINS,). Quantities: 'nats', 'count' of the tokens that
    the nats are over, 'correct' guesses of 'predicted' ones. draws: masking levels per row of a diffusion
    model, over which all quantities are means; exact: the chain rule instead, steps: the bound of sampling in so
    many steps, neither of which guesses; k: of an `sdd`, if not its own.
    run: a Runtime; its ranks share the rows, and each gets all sums.
    """
    chosen = choose_rows(rows, max_tokens)
    sizes = {
        'document': 1 + int(rows.documents(rows.num_rows - 1)[-1]),
        'row': len(chosen),
        'level': LEVEL_BINS,
    }
    sums = {unit: {name: np.zeros(size) for name in QUANTITIES} for unit, size in sizes.items()}
    passes = 1 if model.causal or exact or steps else draws
    for start in range(run.rank * batch_size, len(chosen), run.world_size * batch_size):
        places = np.arange(start, min(start + batch_size, len(chosen)))
        numbers = chosen[places]
        batch = data.stack([rows.read(number, ()) for number in numbers], None, pin=False)
        tokens, loss_mask, _ = data.to_device(batch, run.device)
        documents = np.stack([rows.documents(number) for number in numbers])  # (B, T)
        for draw in range(passes):
            noise = None if model.causal else level_noise(numbers, draw, draws, tokens.size(1))
            with run.autocast():
                values = guess(model, tokens, loss_mask, noise, batch_size, exact, steps, k)
            levels = np.zeros(len(numbers), int) if noise is None else bins(noise[:, 0])
            for name, value in values.items():
                value = value.cpu().double().numpy() / passes  # (B, T)
                np.add.at(sums['document'][name], documents, value)
                sums['row'][name][places] += value.sum(1)
                np.add.at(sums['level'][name], levels, value.sum(1))
    return sum_over_ranks(run, sums)


def guess(model, tokens, loss_mask, noise, batch_size, exact=False, steps=0, k=None):
    """{quantity: (B, T)} of one pass."""
    noise = None if noise is None else torch.from_numpy(noise).to(tokens.device)
    if exact or steps:
        _, counted = model.trained(tokens, loss_mask)
        nats = (
            chain_rule(model, tokens, loss_mask, batch_size=batch_size, k=k)
            if exact
            else nested_bound(model, tokens, loss_mask, noise[:, 1:], steps, k)
        )
        return {'nats': nats, 'count': counted}
    beliefs = {} if k is None or model.causal else {'k': k}
    nats, counted, metrics = model.losses(tokens, loss_mask, noise, **beliefs)
    return {'nats': nats, 'count': counted, 'correct': metrics['correct'], 'predicted': metrics['predicted']}


def bins(levels):
    return np.minimum((levels * LEVEL_BINS).astype(int), LEVEL_BINS - 1)


def sum_over_ranks(run, sums):
    """The same nested arrays, each added up over the ranks."""
    flat = np.concatenate([array for part in sums.values() for array in part.values()])
    flat = np.array(run.total({'sums': flat})['sums'])
    result, start = {}, 0
    for unit, part in sums.items():
        result[unit] = {}
        for name, array in part.items():
            result[unit][name] = flat[start : start + len(array)]
            start += len(array)
    return result


# ---------------------------------------------------------------------------- what is drawn


def level_noise(numbers, draw, draws, row_length):
    """Noise (B, 1 + row_length) for draw number `draw` of `draws`: a level per row, then a number per token.

    A row's levels are stratified, (draw + u) / draws, and hang on the row's number and the draw only.
    """
    numbers = np.asarray(numbers)
    levels = (draw + rng.uniform(rng.LEVEL, numbers).astype(np.float64)) / draws
    tokens = rng.uniform(rng.NOISE, numbers[:, None], draw, np.arange(row_length))
    return np.concatenate([levels[:, None], tokens], axis=1).astype(np.float32)


def count_noise(numbers, draw, draws, scored):
    """Noise (B, 1 + T) that hides exactly m of the n tokens `scored` (B, T), at the level m / n.

    m is stratified over 1..n, so E[n/m Σ_hidden -log p] is the NELBO (Ou et al. 2024, RADD), and a text of one
    token has its exact value from a single draw (Nie et al. 2025, LLaDA).
    """
    numbers, n = np.asarray(numbers), scored.sum(1)
    shift = rng.uniform(rng.LEVEL, numbers).astype(np.float64)
    m = np.minimum(n, (n * (draw + shift) / draws).astype(int) + 1)  # (B,)
    order = rng.uniform(rng.NOISE, numbers[:, None], draw, np.arange(scored.shape[1]))
    rank = np.where(scored, order, 2).argsort(1, kind='stable').argsort(1)
    level = np.maximum(m, 1) / np.maximum(n, 1)
    level = (level - MIN_LEVEL) / (1 - MIN_LEVEL)  # Diffusion.levels makes it m / n again
    return np.concatenate([level[:, None], rank >= m[:, None]], axis=1).astype(np.float32)


# ---------------------------------------------------------------------------- by how a model writes


@torch.inference_mode()
def nested_bound(model, tokens, loss_mask, noise, steps, k=None):
    """Nats (B, T) whose sum over a row is an unbiased upper bound of -log p of writing it in `steps` random steps.

    Σ_j (t_j - t_{j-1}) / t_j Σ_{hidden at t_j} CE with t_j = j / steps, so the weight is 1 / j; a token is hidden
    while its uniform number in noise (B, T) is below t_j: the masks are nested. Beliefs come from the step before,
    which saw less: they depend on the path of the reverse process alone, on which p may be conditioned.
    """
    trained, _ = model.trained(tokens, loss_mask)
    k = model.config.k if k is None else k
    nats, belief = torch.zeros(tokens.shape, device=tokens.device), None
    for step in range(steps, 0, -1):
        hidden = trained & (noise < step / steps)
        states = model.hidden(tokens.masked_fill(hidden, model.config.mask_id), belief=belief)
        nats += model.nats_at(states, tokens, positions_of(hidden))[0] / step
        belief = model.believe(states, hidden, k)
    return nats


@torch.inference_mode()
def chain_rule(model, tokens, loss_mask=None, turn=None, batch_size=32, k=None):
    """Exact nats (B, T) of a diffusion model that fills one position after the other.

    turn: (T,), when each position's turn comes; None: from left to right. Each token is predicted while its own
    position and all later ones are hidden: as many forward passes as tokens, batch_size of them at once.
    -log p(row) of the model that draws in this very order; the mean over all orders is the NELBO.
    """
    trained, _ = model.trained(tokens, loss_mask)
    turn = torch.arange(tokens.size(1)) if turn is None else torch.as_tensor(turn)
    turn = turn.to(tokens.device)
    nats = torch.zeros(tokens.shape, device=tokens.device)
    for part in trained.nonzero().split(batch_size):
        row, place = part.unbind(1)  # (n,), (n,)
        hidden = trained[row] & (turn >= turn[place, None])  # (n, T)
        states = model.states(tokens[row].masked_fill(hidden, model.config.mask_id), k=k)
        states = states[torch.arange(len(row), device=tokens.device), place]  # (n, C)
        nats[row, place] = model.cross_entropy(states, tokens[row, place])[0].float()
    return nats


# ---------------------------------------------------------------------------- texts of any length


@torch.inference_mode()
def score(model, texts, run, batch_size, draws=8, numbers=None, k=None):
    """Nats (N,) of the scored tokens of each text, exact or an upper bound.

    texts: [(ids, scored)], at most block_size ids and as many bools, of which the first is False.
    numbers: (N,) keys of what is drawn; texts with the same one are compared under the same noise. k: of an
    `sdd`, if not its own.
    """
    nats = np.zeros(len(texts))
    numbers = np.arange(len(texts)) if numbers is None else np.asarray(numbers)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches = [
        [i for i in batch if len(texts[i][0]) == length]  # no padding: a bidirectional model would see it
        for batch in batches
        for length in sorted({len(texts[i][0]) for i in batch})
    ]
    for batch in batches[run.rank :: run.world_size]:
        tokens = torch.tensor([texts[i][0] for i in batch], device=run.device)  # (B, T)
        scored = np.array([texts[i][1] for i in batch], dtype=bool)
        loss_mask = torch.from_numpy(scored).to(run.device)
        passes = 1 if model.causal else draws
        for draw in range(passes):
            noise = None if model.causal else count_noise(numbers[batch], draw, draws, scored)
            with run.autocast():
                values = guess(model, tokens, loss_mask, noise, batch_size, k=k)
            nats[batch] += values['nats'].cpu().double().sum(1).numpy() / passes
    return np.array(run.total({'nats': nats})['nats']) if len(texts) else nats


def windows(ids, block_size):
    """[(ids, scored)] that together score each of `ids` but the first, which is context, once."""
    parts = [ids[start : start + block_size] for start in range(0, max(1, len(ids) - 1), block_size - 1)]
    return [(part, [False] + [True] * (len(part) - 1)) for part in parts]


def choose(model, tokenizer, start_token, questions, run, batch_size, draws, k=None):
    """Multiple choice: how often the right choice has the fewest nats per byte, given the question.

    questions: [{'question': text, 'choices': [text], 'answer': number from 0}]; what does not fit the block is
    cut off at a question's beginning. Per byte, so that a long choice is not at a disadvantage (acc_norm).
    """
    block_size, texts, numbers, sizes = model.config.block_size, [], [], []
    for number, question in enumerate(questions):
        head = [start_token] + tokenizer.encode(question['question'].rstrip())
        for choice in question['choices']:
            tail = tokenizer.encode(' ' + choice.strip())
            if not choice.strip() or len(tail) >= block_size:
                raise UserError(
                    f'The choice {choice[:60]!r} of {question["question"][:60]!r} is empty or fills the '
                    f'block of {block_size} tokens; leave it out.'
                )
            kept = head[max(0, len(head) + len(tail) - block_size) :]
            texts.append((kept + tail, [False] * len(kept) + [True] * len(tail)))
            numbers.append(number)
            sizes.append(1 + len(choice.strip().encode()))
    nats, numbers = score(model, texts, run, batch_size, draws, numbers, k) / sizes, np.array(numbers)
    right = [nats[numbers == i].argmin() == question['answer'] for i, question in enumerate(questions)]
    accuracy, ci = share(right)
    chance = sum(1 / len(question['choices']) for question in questions) / len(questions)
    return {'choices_accuracy': accuracy, 'choices_ci95': ci, 'choices_chance': chance}


# ---------------------------------------------------------------------------- texts of another model


class Judge(NamedTuple):
    model: object
    tokenizer: data.Tokenizer
    start_token: int


def judge(judge, rows, tokenizer, run, batch_size, draws):
    """What a judge thinks of `rows`, token ids of `tokenizer`: nats per its own token, bits per byte of text.

    It reads each document by itself and is asked for its end as well, where it has one.
    """
    texts, size = [], 0
    for row in rows:
        *whole, last = split_at(row, tokenizer.endoftext_id)
        for document, end in [(ids, [judge.tokenizer.endoftext_id]) for ids in whole] + [(last, [])]:
            size += len(tokenizer.decode(document).encode())
            ids = [judge.start_token] + recoded(document, tokenizer, judge.tokenizer) + end
            texts += windows(ids, judge.model.config.block_size)
    nats = score(judge.model, texts, run, batch_size, draws).sum()
    count = sum(sum(scored) for _, scored in texts)
    return {
        'judge_nats': float(nats / count) if count else None,
        'judge_bpb': float(nats / size / math.log(2)) if size else None,
        'judge_bound': 'exact' if judge.model.causal else 'upper',
    }


def recoded(ids, tokenizer, other):
    """The ids of another tokenizer for the same text."""
    same = other.to_json() == tokenizer.to_json()
    return plain(ids, tokenizer) if same else other.encode(tokenizer.decode(ids))


def plain(ids, tokenizer):
    """Token ids without the special ones."""
    special = (tokenizer.endoftext_id, tokenizer.mask_id, tokenizer.ignore_id)
    return [i for i in ids if i not in special]


def split_at(row, end):
    """The documents of a row of ids: what lies before, between and after the ids `end`."""
    parts = [[]]
    for token in row:
        if token == end:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


# ---------------------------------------------------------------------------- figures


def interval(sums, value, weight):
    """Σ value / Σ weight with its 95 % interval: over documents, or over windows where there are few of them."""
    if np.count_nonzero(sums['document'][weight]) >= FEW_DOCUMENTS:
        return scoring.mean_ci(sums['document'][value], sums['document'][weight])
    return scoring.block_bootstrap_ci(sums['row'][value], sums['row'][weight])


def difference(sums, others):
    """Nats per token more than another model's on the same tokens; what is hard for both cancels."""
    documents = np.count_nonzero(sums['document']['count']) >= FEW_DOCUMENTS
    unit, method = ('document', scoring.mean_ci) if documents else ('row', scoring.block_bootstrap_ci)
    estimate = scoring.paired_ci(sums[unit]['nats'], others[unit]['nats'], sums[unit]['count'], method)
    value, ci = scaled(estimate, float)
    return {'difference': value, 'difference_ci95': ci}


def scaled(estimate, function):
    """(value, [low, high]) of an Interval under an increasing function; None where it is not known."""
    mean, low, high = (None if x is None else function(x) for x in estimate)
    return mean, None if low is None else [low, high]


def share(passed):
    """The share of true values, and its 95 % interval by Wilson (1927), which leaves doubt about 0 and 1 as well."""
    n, z = len(passed), 1.959964
    if n == 0:
        return None, None
    p = sum(passed) / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return float(p), [float((centre + side * half) / (1 + z * z / n)) for side in (-1, 1)]


def perplexity_figures(sums, tokens_per_byte):
    """Nats per token, perplexity, bits per byte, and the 95 % interval of each."""
    nats = interval(sums, 'nats', 'count')
    figures = {
        'tokens': int(round(sums['row']['count'].sum())),
        'documents': int(np.count_nonzero(sums['document']['count'])),
    }
    figures['nats_per_token'], figures['ci95'] = scaled(nats, float)
    figures['perplexity'], figures['perplexity_ci95'] = scaled(nats, lambda x: math.exp(min(x, 700)))
    if tokens_per_byte is not None:
        figures['bpb'], figures['bpb_ci95'] = scaled(nats, lambda x: x * tokens_per_byte / math.log(2))
    return figures


def accuracy_figures(sums, by_level):
    """The share of guesses that were right, and the same for each tenth of the masking levels."""
    figures = {}
    figures['accuracy'], figures['accuracy_ci95'] = scaled(interval(sums, 'correct', 'predicted'), float)
    if by_level:
        right, guessed = sums['level']['correct'], sums['level']['predicted']
        figures['accuracy_by_level'] = [float(r / g) if g else None for r, g in zip(right, guessed)]
    return figures
