"""Likelihoods against what can be enumerated: token by token, all orders, all masks, any batches and ranks."""

from contextlib import nullcontext
from itertools import permutations, product
from math import comb
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import letter_tokenizer, write_folder

from lm import data, likelihood
from model import ARCHITECTURES, ModelConfig
from sampling import KVCache

MASK, IGNORE = 4, 5
TOY = dict(vocab_size=6, block_size=4, n_layer=1, n_head=2, n_embd=16, mask_id=MASK, ignore_id=IGNORE)


def tiny(architecture, **shape):
    """A model whose every weight is random, not training."""
    generator = torch.Generator().manual_seed(0)
    model = ARCHITECTURES[architecture](ModelConfig(**{**TOY, **shape})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.4 * torch.randn(weight.shape, generator=generator))
    return model


def one_of(rank=0, world_size=1):
    """A run of one rank; its totals are its own share."""
    return SimpleNamespace(
        rank=rank,
        world_size=world_size,
        device=torch.device('cpu'),
        autocast=nullcontext,
        total=lambda values: {name: np.asarray(value).tolist() for name, value in values.items()},
    )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return data.Folder(write_folder(tmp_path_factory.mktemp('likelihood') / 'letters'))


def model_for(folder, architecture, block_size=16):
    tokenizer = folder.tokenizer
    return tiny(
        architecture,
        vocab_size=tokenizer.vocab_size,
        block_size=block_size,
        mask_id=tokenizer.mask_id,
        ignore_id=tokenizer.ignore_id,
    )


def measured(folder, architecture, mode='packed', run=None, batch_size=5, **settings):
    model = model_for(folder, architecture)
    rows = likelihood.open_rows(folder, 'val', model, 16, mode)
    return likelihood.measure(model, rows, run or one_of(), batch_size, **settings)


def assert_close(one, other):
    for unit, part in one.items():
        for name, array in part.items():
            np.testing.assert_allclose(
                array, other[unit][name], rtol=1e-5, atol=1e-5, err_msg=f'{unit} {name}'
            )


# ---------------------------------------------------------------------------- left to right


@torch.no_grad()
def test_ar_equals_a_loop_token_by_token_over_the_cache(folder):
    model = model_for(folder, 'ar')
    sums = measured(folder, 'ar')
    rows, tokens = likelihood.open_rows(folder, 'val', model, 16, 'packed'), folder.tokens['val']
    total, seen = 0.0, 0
    for start in [*range(0, len(tokens) - 16, 16), len(tokens) - 16]:
        row, cache = tokens[start : start + 16].astype(int), KVCache(1, 16, 'cpu')
        for i in range(15):
            logits = model.logits(torch.tensor([[int(row[i])]]), cache)[0, -1]
            cache.advance([1])
            if start + i + 1 >= seen:  # what the last window shares with the one before is context
                total -= logits.log_softmax(-1)[row[i + 1]].item()
        seen = start + 16
    assert sums['row']['nats'].sum() == pytest.approx(total, abs=1e-4)
    assert rows.num_rows == len(sums['row']['nats']) > 10


def test_every_token_but_the_rows_first_counts_once_and_for_its_own_document(folder):
    tokens, index = folder.tokens['val'], folder.index['val'].astype(int)
    for architecture in ('ar', 'diffusion'):
        sums = measured(folder, architecture)
        first = np.arange(0, len(tokens), 16)  # and of the last window, what is before it is context
        counted = np.setdiff1d(np.arange(len(tokens)), first[first < len(tokens) - 16])
        expected = np.bincount(np.searchsorted(index, counted, side='right') - 1, minlength=len(index) - 1)
        np.testing.assert_allclose(sums['document']['count'], expected)
        assert sums['document']['nats'].sum() == pytest.approx(sums['row']['nats'].sum())
    sums = measured(folder, 'ar', 'documents')
    np.testing.assert_allclose(sums['document']['count'], np.diff(index))


# ---------------------------------------------------------------------------- diffusion, enumerated

ROW = torch.tensor([[3, 0, 2, 1]])


def chain(model, row, order):
    """Nats of a row whose positions 1.. are written in `order`."""
    turn = [-1] * row.size(1)
    for time, place in enumerate(order):
        turn[place] = time
    return likelihood.chain_rule(model, row, turn=turn)


@torch.no_grad()
def nelbo(model, row):
    """Over all masks: ∫ t^(m-1) (1-t)^(n-m) dt = 1 / (m C(n, m)) is the weight of a mask of m of n tokens."""
    n, total = row.size(1) - 1, 0.0
    for mask in product((0, 1), repeat=n):
        m = sum(mask)
        if m:
            noise = torch.tensor([[1.0, 1.0] + [1.0 - one for one in mask]])  # level 1: nats are not divided
            total += model.nll(row, noise=noise * torch.tensor([1.0] + [2.0] * (n + 1))).item() / (
                m * comb(n, m)
            )
    return total


@torch.no_grad()
def test_the_chain_rule_is_the_product_of_its_conditionals():
    model = tiny('diffusion')
    for order in permutations((1, 2, 3)):
        canvas, total = torch.tensor([[3, MASK, MASK, MASK]]), 0.0
        for place in order:
            total -= model.logits(canvas)[0, place].log_softmax(-1)[ROW[0, place]].item()
            canvas[0, place] = ROW[0, place]
        assert chain(model, ROW, order).sum().item() == pytest.approx(total, abs=1e-5)
    assert torch.allclose(likelihood.chain_rule(model, ROW), chain(model, ROW, (1, 2, 3)))
    assert torch.allclose(
        likelihood.chain_rule(model, ROW, batch_size=1), chain(model, ROW, (1, 2, 3)), atol=1e-6
    )


def test_the_bound_is_the_mean_over_all_orders_of_the_chain_rule():
    model = tiny('diffusion')
    orders = [chain(model, ROW, order).sum().item() for order in permutations((1, 2, 3))]
    assert nelbo(model, ROW) == pytest.approx(np.mean(orders), abs=1e-4)
    assert max(orders) - min(orders) > 0.05  # orders differ, or there is nothing to show


def test_the_bound_is_above_the_enumerated_truth():
    model = tiny('diffusion')
    for text in product(range(4), repeat=3):
        row = torch.tensor([[3, *text]])
        orders = np.array([chain(model, row, order).sum().item() for order in permutations((1, 2, 3))])
        truth = -np.log(np.exp(-orders).mean())  # of the model that writes in random order
        assert nelbo(model, row) >= truth
    texts = [*product((0, 1, 2, 3, IGNORE), repeat=3)]  # all that it can write
    total = sum(np.exp(-chain(model, torch.tensor([[3, *text]]), (2, 3, 1)).sum().item()) for text in texts)
    assert total == pytest.approx(1, abs=1e-4)


def toy_rows(count):
    """The row ROW, `count` times, as a split of one document."""
    return SimpleNamespace(
        num_rows=count,
        row_length=4,
        read=lambda row, key: (ROW[0].numpy(), None),
        documents=lambda row: np.zeros(4, int),
    )


def test_measured_and_scored_bounds_are_unbiased():
    model = tiny('diffusion')
    truth = nelbo(model, ROW)
    sums = likelihood.measure(model, toy_rows(2000), one_of(), 500, draws=8)
    nats = sums['row']['nats']
    assert (
        abs(nats.mean() - truth) < 4 * nats.std() / len(nats) ** 0.5 + 1e-3 * truth
    )  # levels start at 0.001
    texts = [(ROW[0].tolist(), [False, True, True, True])] * 2000
    nats = likelihood.score(model, texts, one_of(), 500, draws=6)
    assert abs(nats.mean() - truth) < 4 * nats.std() / len(nats) ** 0.5
    exact = likelihood.measure(model, toy_rows(2), one_of(), 2, exact=True)
    np.testing.assert_allclose(exact['row']['nats'], chain(model, ROW, (1, 2, 3)).sum().item(), rtol=1e-5)


@torch.no_grad()
def test_one_hidden_token_is_scored_exactly_by_one_draw():
    model, scored = tiny('diffusion'), [False, False, True, False]
    truth = -model.logits(torch.tensor([[3, 0, MASK, 1]]))[0, 2].log_softmax(-1)[2].item()
    nats = likelihood.score(model, [(ROW[0].tolist(), scored)] * 3, one_of(), 2, draws=1)
    np.testing.assert_allclose(nats, truth, rtol=1e-5)


def test_levels_are_stratified_and_hang_on_the_row_only():
    noise = np.stack([likelihood.level_noise([7, 3], draw, 8, 16) for draw in range(8)])  # (8, 2, 17)
    assert (np.floor(noise[:, :, 0] * 8).T == np.arange(8)).all()
    assert len(np.unique(noise[:, :, 1:])) > 0.99 * noise[:, :, 1:].size
    np.testing.assert_array_equal(likelihood.level_noise([3], 5, 8, 16)[0], noise[5, 1])


def test_hidden_counts_are_stratified_over_all_of_them():
    scored = np.array([[False] + [True] * 6 + [False]] * 2)
    noise = [likelihood.count_noise([7, 3], draw, 6, scored) for draw in range(6)]
    for row in range(2):
        hidden = [(noise[draw][row, 1:] == 0) for draw in range(6)]
        assert sorted(mask.sum() for mask in hidden) == [1, 2, 3, 4, 5, 6]
        assert not any(mask[~scored[row]].any() for mask in hidden)


# ---------------------------------------------------------------------------- the same number, however computed


@pytest.mark.parametrize('mode', ['packed', 'documents'])
@pytest.mark.parametrize('architecture', ['ar', 'diffusion', 'sdd'])
def test_neither_batch_size_nor_ranks_change_the_sums(folder, architecture, mode):
    whole = measured(folder, architecture, mode)
    for batch_size in (1, 7, 64):
        assert_close(measured(folder, architecture, mode, batch_size=batch_size), whole)
    shares = [measured(folder, architecture, mode, one_of(rank, 3), batch_size=2) for rank in range(3)]
    assert_close(
        {
            unit: {name: sum(share[unit][name] for share in shares) for name in part}
            for unit, part in whole.items()
        },
        whole,
    )


@pytest.mark.parametrize('settings', [dict(steps=5), dict(k=0), dict(steps=5, k=0)])
def test_neither_batch_size_nor_ranks_change_the_other_bounds(folder, settings):
    whole = measured(folder, 'sdd', **settings)
    assert whole['row']['nats'].sum() != measured(folder, 'sdd')['row']['nats'].sum()
    assert_close(measured(folder, 'sdd', batch_size=7, **settings), whole)
    shares = [measured(folder, 'sdd', run=one_of(rank, 3), batch_size=2, **settings) for rank in range(3)]
    assert_close(
        {
            unit: {name: sum(share[unit][name] for share in shares) for name in part}
            for unit, part in whole.items()
        },
        whole,
    )


def test_scores_of_texts_depend_on_neither_batches_nor_ranks(folder):
    model = model_for(folder, 'diffusion')
    texts = [
        (folder.tokens['val'][i : i + 3 + i % 9].tolist(), [False] + [True] * (2 + i % 9)) for i in range(20)
    ]
    whole = likelihood.score(model, texts, one_of(), 4)
    assert (whole > 0).all()
    np.testing.assert_allclose(likelihood.score(model, texts, one_of(), 1), whole, rtol=1e-5)
    shares = [likelihood.score(model, texts, one_of(rank, 2), 4) for rank in range(2)]
    np.testing.assert_allclose(sum(shares), whole, rtol=1e-5)


def test_the_right_choice_has_the_fewest_nats_per_byte(folder, monkeypatch):
    seen = []

    def score(model, texts, run, batch_size, draws, numbers, k):
        seen.extend(texts)
        assert numbers == [0, 0, 1, 1]
        return np.array([4.0, 5.0, 1.0, 4.0])

    monkeypatch.setattr(likelihood, 'score', score)
    questions = [
        {'question': 'the cat ', 'choices': ['is', 'sings '], 'answer': 1},  # 4 / 3 and 5 / 6 nats per byte
        {'question': 'a dog' * 9, 'choices': ['in', 'a'], 'answer': 0},
    ]
    model, start = model_for(folder, 'ar'), folder.tokenizer.endoftext_id
    figures = likelihood.choose(model, folder.tokenizer, start, questions, one_of(), 4, 8)
    assert figures['choices_accuracy'] == 1 and figures['choices_chance'] == 0.5
    (ids, scored), (cut, _) = seen[0], seen[2]
    assert ids == [start] + folder.tokenizer.encode('the cat is') and scored == [False] * 8 + [True] * 3
    assert len(cut) == 16 and folder.tokenizer.decode(cut) == ('a dog' * 9)[-13:] + ' in'


def test_a_judge_reads_documents_apart_in_its_own_tokens(folder, monkeypatch):
    tokenizer, other = folder.tokenizer, letter_tokenizer('zyxwvutsrqponmlkjihgfedcba ')
    end, seen = tokenizer.endoftext_id, []
    monkeypatch.setattr(
        likelihood, 'score', lambda model, texts, *rest: seen.extend(texts) or np.ones(len(texts))
    )
    judge = likelihood.Judge(model_for(folder, 'ar'), other, other.endoftext_id)
    rows = [tokenizer.encode('cat') + [end] + tokenizer.encode('do'), [], tokenizer.encode('a') + [end]]
    figures = likelihood.judge(judge, rows, tokenizer, one_of(), 4, 8)
    begin = [other.endoftext_id]
    assert [ids for ids, scored in seen if sum(scored)] == [
        begin + other.encode('cat') + begin,
        begin + other.encode('do'),
        begin + other.encode('a') + begin,
    ]
    assert figures['judge_nats'] == pytest.approx(len(seen) / (4 + 2 + 2))
    assert (
        figures['judge_bpb'] == pytest.approx(len(seen) / 6 / np.log(2)) and figures['judge_bound'] == 'exact'
    )


def test_filler_is_paid_for_by_diffusion_only(folder):
    documents = np.diff(folder.index['val'].astype(int)) + 1 < 16
    for architecture, is_paid in (('ar', False), ('diffusion', True)):
        rows = likelihood.open_rows(folder, 'val', model_for(folder, architecture), 16, 'documents')
        tokens, trained = rows.read(int(rows.first_row[np.flatnonzero(documents)[0]]), ())
        assert trained[tokens == folder.tokenizer.ignore_id].all() == is_paid


def test_a_share_leaves_doubt_about_all_and_none():
    assert likelihood.share([]) == (None, None)
    assert likelihood.share([True] * 10) == (1.0, [pytest.approx(0.7225, abs=1e-4), pytest.approx(1.0)])
    value, (low, high) = likelihood.share([True] * 50 + [False] * 50)  # by Wilson's formula: 0.4038, 0.5962
    assert value == 0.5 and low == pytest.approx(0.4038, abs=1e-4) and high == pytest.approx(0.5962, abs=1e-4)


def test_windows_score_each_token_but_the_first_once():
    for length in range(1, 20):
        parts = likelihood.windows(list(range(length)), 5)
        assert [i for ids, scored in parts for i, s in zip(ids, scored) if s] == list(range(1, length))
        assert all(len(ids) <= 5 and not scored[0] for ids, scored in parts)
    nats = likelihood.score(tiny('diffusion'), likelihood.windows([3], 4), one_of(), 2)
    assert nats.tolist() == [0.0]  # nothing to score is no nats, and no division by zero


def test_max_tokens_measures_rows_spread_over_the_split(folder):
    sums = measured(folder, 'ar', max_tokens=60)
    assert len(sums['row']['count']) == 4 and sums['row']['count'].sum() == 60
    assert np.flatnonzero(sums['document']['count'])[-1] > len(sums['document']['count']) / 2


# ---------------------------------------------------------------------------- figures


def test_accuracy_is_of_hidden_tokens_and_told_by_level(folder):
    sums = measured(folder, 'diffusion')
    figures = likelihood.accuracy_figures(sums, by_level=True)
    hidden = sums['level']['predicted'] / sums['level']['predicted'].sum()
    assert len(figures['accuracy_by_level']) == 10 and 0 < figures['accuracy'] < 1
    assert hidden[9] > hidden[5] > hidden[1]  # at a high level more is hidden
    weighted = sum(share * (accuracy or 0) for share, accuracy in zip(hidden, figures['accuracy_by_level']))
    assert figures['accuracy'] == pytest.approx(weighted)


def test_figures_by_hand():
    many = {
        'document': {'nats': np.full(40, 6.0), 'count': np.full(40, 3.0)},
        'row': {'nats': np.full(12, 20.0), 'count': np.full(12, 10.0)},
    }
    figures = likelihood.perplexity_figures(many, tokens_per_byte=0.5)
    assert figures['nats_per_token'] == 2 and figures['ci95'] == [2, 2] and figures['tokens'] == 120
    assert figures['perplexity'] == pytest.approx(np.exp(2)) and figures['bpb'] == pytest.approx(
        1 / np.log(2)
    )
    few = {
        'document': {'nats': np.full(1, 240.0), 'count': np.full(1, 120.0)},
        'row': {'nats': np.full(5, 48.0), 'count': np.full(5, 24.0)},
    }
    assert likelihood.perplexity_figures(few, 0.5)['ci95'] is None  # too few windows to tell
