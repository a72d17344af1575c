"""Likelihoods against what can be enumerated: token by token, all orders, all masks, any batches and ranks."""

from contextlib import nullcontext
from itertools import permutations, product
from math import comb
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import letter_tokenizer, random_model, random_texts, write_folder

from lm import data, likelihood
from lm.caches import KVCache
from lm.folder import Folder

MASK, IGNORE = 4, 5
TOY = dict(vocab_size=6, block_size=4, n_layer=1, n_head=2, n_embd=16, mask_id=MASK, ignore_id=IGNORE)


def toy(architecture='diffusion'):
    return random_model(architecture, 0.4, **TOY)


def rank(rank=0, world_size=1):
    """One of several processes; its totals are its own share."""
    return SimpleNamespace(
        rank=rank,
        world_size=world_size,
        device=torch.device('cpu'),
        autocast=nullcontext,
        sum=lambda array: array,
    )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('likelihood') / 'letters'
    return Folder(write_folder(path, val=random_texts(8, 60, seed=2)))


def model_for(folder, architecture):
    tokenizer = folder.tokenizer
    special = dict(mask_id=tokenizer.mask_id, ignore_id=tokenizer.ignore_id)
    return random_model(
        architecture, 0.4, **{**TOY, 'vocab_size': tokenizer.vocab_size, 'block_size': 16, **special}
    )


def open_rows(folder, model, mode):
    if mode == 'documents':
        return data.DocumentRows(folder, 'val', 16, model.trains_on_padding)
    return data.PackedRows(folder, 'val', 16, 16, training=False)


def measured(folder, architecture, mode='packed', dist=None, batch_size=5, draws=3, **settings):
    model = model_for(folder, architecture)
    rows = open_rows(folder, model, mode)
    return likelihood.measure(model, rows, dist or rank(), batch_size, draws, **settings)


def assert_independent_of_batches_and_ranks(measure):
    whole = measure(dist=rank(), batch_size=5)
    shares = [measure(dist=rank(i, 3), batch_size=2) for i in range(3)]
    for unit, part in whole.items():
        for name, array in part.items():
            np.testing.assert_allclose(
                sum(share[unit][name] for share in shares),
                array,
                rtol=1e-5,
                atol=1e-5,
                err_msg=f'{unit} {name}',
            )


# ---------------------------------------------------------------------------- left to right


@torch.no_grad()
def test_ar_equals_a_loop_token_by_token_over_the_cache(folder):
    model = model_for(folder, 'ar')
    sums = measured(folder, 'ar')
    tokens = folder.tokens['val']
    total, seen = 0.0, 0
    for start in [*range(0, len(tokens) - 16, 16), len(tokens) - 16]:
        row, cache = tokens[start : start + 16].astype(int), KVCache(1, 16, 'cpu')
        for i in range(15):
            logits = model.logits(torch.tensor([[int(row[i])]]), cache)[0, -1]
            cache.advance([1])
            if start + i + 1 >= seen:  # what the last window shares with the one before is context
                total -= logits.log_softmax(-1)[row[i + 1]].item()
        seen = start + 16
    assert sums['windows']['nll'].sum() == pytest.approx(total, abs=1e-4)
    assert len(sums['windows']['nll']) == -(-len(tokens) // 16) > 10


def test_every_token_but_the_rows_first_counts_once_and_for_its_own_document(folder):
    tokens, index = folder.tokens['val'], folder.index['val'].astype(int)
    for architecture in ('ar', 'diffusion'):
        sums = measured(folder, architecture)
        first = np.arange(0, len(tokens), 16)  # and of the last window, what is before it is context
        counted = np.setdiff1d(np.arange(len(tokens)), first[first < len(tokens) - 16])
        expected = np.bincount(np.searchsorted(index, counted, side='right') - 1, minlength=len(index) - 1)
        np.testing.assert_allclose(sums['documents']['count'], expected)
        assert sums['documents']['nll'].sum() == pytest.approx(sums['windows']['nll'].sum())
    sums = measured(folder, 'ar', 'documents')
    np.testing.assert_allclose(sums['documents']['count'], np.diff(index))


def test_padding_is_in_the_loss_of_diffusion_only(folder):
    short = np.flatnonzero(np.diff(folder.index['val'].astype(int)) + 1 < 16)[0]
    for architecture, in_loss in (('ar', False), ('diffusion', True)):
        rows = open_rows(folder, model_for(folder, architecture), 'documents')
        row = next(row for row in range(rows.num_rows) if rows.documents(row)[0] == short)
        tokens, loss_mask, *_ = rows.read(row, ())
        assert loss_mask[tokens == folder.tokenizer.ignore_id].all() == in_loss


def test_max_tokens_measures_rows_spread_over_the_split(folder):
    sums = measured(folder, 'ar', max_tokens=60)
    assert len(sums['windows']['count']) == 4 and sums['windows']['count'].sum() == 60
    assert np.flatnonzero(sums['documents']['count'])[-1] > len(sums['documents']['count']) / 2


# ---------------------------------------------------------------------------- diffusion, enumerated

ROW = torch.tensor([[3, 0, 2, 1]])
ORDERS = [*permutations((1, 2, 3))]


def chain(model, rows, order):
    """The nll (N,) of rows whose positions 1.. are written in `order`."""
    turn = [-1] * rows.size(1)
    for time, position in enumerate(order):
        turn[position] = time
    return likelihood.chain_rule(model, rows, turn=turn).sum(1)


@torch.no_grad()
def nelbo(model, rows):
    """Over all masks: ∫ t^(m-1) (1-t)^(n-m) dt = 1 / (m C(n, m)) is the weight of a mask of m of n tokens."""
    n, total = rows.size(1) - 1, 0.0
    for mask in product((0, 1), repeat=n):
        m = sum(mask)
        if m:
            noise = torch.tensor([[1.0, 1.0] + [2.0 * (1 - one) for one in mask]])  # ratio 1: weights are 1
            total += model.nll(rows, noise=noise.expand(len(rows), -1)) / (m * comb(n, m))
    return total


@torch.no_grad()
def test_the_chain_rule_is_the_product_of_its_conditionals():
    model = toy()
    for order in ORDERS:
        x, total = torch.tensor([[3, MASK, MASK, MASK]]), 0.0
        for position in order:
            total -= model.logits(x)[0, position].log_softmax(-1)[ROW[0, position]].item()
            x[0, position] = ROW[0, position]
        assert chain(model, ROW, order).item() == pytest.approx(total, abs=1e-5)
    left_to_right = chain(model, ROW, (1, 2, 3)).item()
    assert likelihood.chain_rule(model, ROW).sum().item() == pytest.approx(left_to_right, abs=1e-5)


def test_the_bound_is_the_mean_over_all_orders_of_the_chain_rule():
    model = toy()
    orders = [chain(model, ROW, order).item() for order in ORDERS]
    assert nelbo(model, ROW).item() == pytest.approx(np.mean(orders), abs=1e-4)
    assert max(orders) - min(orders) > 0.05  # orders differ, or there is nothing to show


def test_the_bound_is_above_the_enumerated_truth():
    model = toy()
    rows = torch.tensor([[3, *text] for text in product(range(4), repeat=3)])
    orders = torch.stack([chain(model, rows, order) for order in ORDERS])  # (6, N)
    truth = np.log(6) - (-orders).logsumexp(0)  # of the model that writes in random order
    assert (nelbo(model, rows) >= truth).all()
    texts = torch.tensor(
        [[3, *text] for text in product((0, 1, 2, 3, IGNORE), repeat=3)]
    )  # all that it can write
    assert (-chain(model, texts, (2, 3, 1))).exp().sum().item() == pytest.approx(1, abs=1e-4)


def toy_rows(count):
    """The row ROW, `count` times, as a split of one document."""
    return SimpleNamespace(
        num_rows=count,
        row_length=4,
        read=lambda row, key: (ROW[0].numpy(), None),
        documents=lambda row: np.zeros(4, int),
    )


def test_measured_bounds_are_unbiased():
    model = toy()
    truth = nelbo(model, ROW).item()
    nll = likelihood.measure(model, toy_rows(2000), rank(), 500, draws=8)['windows']['nll']
    error = nll.std() / len(nll) ** 0.5
    assert abs(nll.mean() - truth) < 4 * error + 1e-3 * truth  # mask ratios start at 0.001
    exact = likelihood.measure(model, toy_rows(2), rank(), 2, exact='exact')
    np.testing.assert_allclose(exact['windows']['nll'], chain(model, ROW, (1, 2, 3)).item(), rtol=1e-5)


def test_mask_ratios_are_stratified_and_depend_on_the_row_only():
    noise = np.stack([likelihood.ratio_noise([7, 3], draw, 8, 16) for draw in range(8)])  # (8, 2, 17)
    assert (np.floor(noise[:, :, 0] * 8).T == np.arange(8)).all()
    assert len(np.unique(noise[:, :, 1:])) > 0.99 * noise[:, :, 1:].size
    np.testing.assert_array_equal(likelihood.ratio_noise([3], 5, 8, 16)[0], noise[5, 1])


# ---------------------------------------------------------------------------- the same number, however computed


@pytest.mark.parametrize('mode', ['packed', 'documents'])
@pytest.mark.parametrize('architecture', ['ar', 'diffusion', 'sdd'])
def test_neither_batch_size_nor_ranks_change_the_sums(folder, architecture, mode):
    assert_independent_of_batches_and_ranks(
        lambda **settings: measured(folder, architecture, mode, **settings)
    )


@pytest.mark.parametrize(
    'bound',
    [
        dict(steps=5),
        dict(k=0),
        dict(steps=5, k=0),
        dict(exact='exact', max_tokens=30),
        dict(exact='carried', max_tokens=30),
    ],
)
def test_neither_batch_size_nor_ranks_change_the_other_bounds(folder, bound):
    assert_independent_of_batches_and_ranks(lambda **settings: measured(folder, 'sdd', **bound, **settings))
    own = measured(folder, 'sdd', max_tokens=bound.get('max_tokens', 0))
    assert measured(folder, 'sdd', **bound)['windows']['nll'].sum() != own['windows']['nll'].sum()


@pytest.mark.faults
@torch.no_grad()
def test_carried_beliefs_stay_where_a_token_is_given(folder):
    model, loss_mask = model_for(folder, 'sdd'), torch.tensor([[0, 1, 1, 0, 1, 1]])
    tokens = torch.tensor([folder.tokenizer.encode('a cats')])
    nll, belief = torch.zeros(1, 6), None
    for i in (1, 2, 4, 5):  # as `generate` makes its passes
        masked = loss_mask.bool() & (torch.arange(6) >= i)
        hidden, _ = model.predict(tokens.masked_fill(masked, model.config.mask_id), belief=belief)
        belief = model.top_k_belief(hidden, masked, model.config.k)
        nll[0, i] = model.token_nll(hidden, tokens, masked & (torch.arange(6) == i))[0].sum()
    found = likelihood.chain_rule(model, tokens, loss_mask, carried=True)
    torch.testing.assert_close(found, nll, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------- texts


def nll_from_left_to_right(model, ids, first):
    """The nll of ids[first:] by an `ar` model, in the plainest way."""
    log_p = model.logits(torch.tensor([ids]))[0].log_softmax(-1)
    return -sum(log_p[i - 1, ids[i]].item() for i in range(first, len(ids)))


@torch.no_grad()
def test_a_judge_reads_documents_apart_in_its_own_tokens(folder):
    tokenizer, other = folder.tokenizer, letter_tokenizer('zyxwvutsrqponmlkjihgfedcba ')
    model, end, begin = model_for(folder, 'ar'), tokenizer.endoftext_id, [other.endoftext_id]
    rows = [tokenizer.encode('cat') + [end] + tokenizer.encode('do'), [], tokenizer.encode('a') + [end]]
    figures = likelihood.judge(rows, tokenizer, model, other, *begin, rank(), 2)
    texts = (other.encode('cat') + begin, other.encode('do'), other.encode('a') + begin)
    nll = sum(nll_from_left_to_right(model, begin + text, 1) for text in texts)
    assert figures['judge_nats'] == pytest.approx(nll / (4 + 2 + 2), rel=1e-5)
    assert figures['judge_bpb'] == pytest.approx(nll / 6 / np.log(2), rel=1e-5)


@torch.no_grad()
def test_a_judge_reads_a_long_text_in_windows_and_each_token_once(folder):
    tokenizer, model = folder.tokenizer, model_for(folder, 'ar')
    reader = (tokenizer, model, tokenizer, tokenizer.endoftext_id, rank())
    for length in (0, 14, 15, 16, 30, 31, 50):
        ids = [tokenizer.endoftext_id, *folder.tokens['val'][:length].tolist()]
        ids = [ids[0], *likelihood.plain(ids[1:], tokenizer)]
        nll = sum(nll_from_left_to_right(model, ids[i : i + 16], 1) for i in range(0, len(ids) - 1, 15))
        figures = likelihood.judge([ids[1:]], *reader, 3)
        if length == 0:
            assert figures['judge_nats'] is None
        else:
            assert figures['judge_nats'] == pytest.approx(nll / (len(ids) - 1), rel=1e-5)


def test_documents_are_what_lies_between_ends():
    assert likelihood.split_at([], 0) == [[]]
    assert likelihood.split_at([0, 1, 2, 0, 0, 3], 0) == [[], [1, 2], [], [3]]
    assert likelihood.split_at([1, 0], 0) == [[1], []]


# ---------------------------------------------------------------------------- figures


def sums_of(documents, windows):
    """Sums with so many documents and windows, all of which have 2 nats per token, and 120 tokens."""
    return {
        unit: {'nll': np.full(size, 240 / size), 'count': np.full(size, 120 / size)}
        for unit, size in (('documents', documents), ('windows', windows))
    }


def test_figures_by_hand():
    figures = likelihood.perplexity_figures(sums_of(40, 12), tokens_per_byte=0.5)
    assert (
        figures['nats_per_token'] == 2
        and figures['ci95'] == pytest.approx([2, 2])
        and figures['tokens'] == 120
    )
    assert figures['perplexity'] == pytest.approx(np.exp(2)) and figures['bpb'] == pytest.approx(
        1 / np.log(2)
    )
    assert 'bpb' not in likelihood.perplexity_figures(sums_of(40, 12), None)


@pytest.mark.faults
def test_intervals_cover_the_mean_where_the_documents_of_a_window_share_its_mask_ratio():
    random, covered = np.random.default_rng(0), 0
    for _ in range(300):
        windows = random.normal(size=40)  # what a mask ratio does to all of a window's documents
        documents = np.repeat(windows, 4) + 0.5 * random.normal(size=160)
        nll = {'documents': documents, 'windows': documents.reshape(40, 4).sum(1)}
        sums = {unit: {'nll': x, 'count': np.full(len(x), 160 / len(x))} for unit, x in nll.items()}
        low, high = likelihood.interval(sums, 'nll', 'count')[1]
        covered += low < 0 < high
    assert covered / 300 > 0.92


def test_intervals_are_over_windows_where_there_are_fewer_than_30_documents():
    random = np.random.default_rng(0)
    for documents, unit in ((30, 'documents'), (29, 'windows')):
        sums, others = sums_of(documents, 50), sums_of(documents, 50)
        sums[unit]['nll'] += random.normal(size=len(sums[unit]['nll']))  # the other unit is without noise
        figures = likelihood.perplexity_figures(sums, None)
        assert figures['ci_over'] == unit and figures['ci95'][1] - figures['ci95'][0] > 0.01
        low, high = likelihood.interval(sums, 'nll', 'count', others)[1]
        assert high - low == pytest.approx(figures['ci95'][1] - figures['ci95'][0])
    assert likelihood.perplexity_figures(sums_of(1, 1), None)['ci95'] is None  # nothing to tell from
