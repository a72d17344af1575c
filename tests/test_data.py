"""What data.py promises: folders are checked; rows, levels and noise are pure functions of their place."""

import itertools

import numpy as np
import pytest
import torch
from conftest import letter_tokenizer

from lm import data, rng
from lm.configurator import UserError


def batches(folder, architecture='ar', batch_size=4, accumulation=1, ranks=1, rank=0, seed=0, mode='packed'):
    return data.Batches(folder, architecture, 16, batch_size, accumulation, seed, mode, rank, ranks)


def rows_of_step(folder, step, ranks=1, accumulation=1, **settings):
    """The rows of a global step in their order, as (tokens, loss_mask, noise), whoever reads them."""
    parts = [
        batches(folder, ranks=ranks, accumulation=accumulation, rank=rank, **settings).read(step)[0]
        for rank in range(ranks)
    ]
    in_order = [parts[rank][i] for i in range(accumulation) for rank in range(ranks)]
    return [
        tuple(None if x is None else tuple(x[row].tolist()) for x in batch)
        for batch in in_order
        for row in range(len(batch[0]))
    ]


# ---------------------------------------------------------------------------- numbers from keys


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_permuted_is_a_permutation(size):
    assert sorted(rng.permuted(range(size), size, 7, size)) == list(range(size))


def test_permuted_differs_by_each_part_of_its_key_and_moves_most_places():
    orders = [rng.permuted(range(500), 500, *key) for key in ((0, 1), (1, 0), (0, 2), (2, 1), (0, 1, 0))]
    for one, other in itertools.combinations(orders, 2):
        assert np.mean(one == other) < 0.02
    assert np.mean(orders[0] == np.arange(500)) < 0.02


def test_permuted_answers_for_single_places_of_a_huge_range():
    size = 10**12
    places = rng.permuted([0, 1, size - 1], size, 3)
    assert len(set(places)) == 3 and all(0 <= place < size for place in places)
    assert rng.permuted([1], size, 3)[0] == places[1]


def test_uniform_is_uniform_in_0_to_1():
    numbers = rng.uniform(5, np.arange(100_000))
    assert numbers.min() >= 0 and numbers.max() < 1
    shares = np.histogram(numbers, 20, (0, 1))[0] / len(numbers)
    assert np.abs(shares - 0.05).max() < 0.004  # six standard deviations


def test_uniform_is_uncorrelated_along_and_across_keys():
    numbers = rng.uniform(5, np.arange(300)[:, None], np.arange(300))
    others = rng.uniform(6, np.arange(300)[:, None], np.arange(300))
    for one, other in (
        (numbers[1:], numbers[:-1]),
        (numbers[:, 1:], numbers[:, :-1]),
        (numbers, numbers.T),
        (numbers, others),
    ):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02
    assert not np.array_equal(rng.uniform(1, 2, np.arange(9)), rng.uniform(2, 1, np.arange(9)))


# ---------------------------------------------------------------------------- rows of training


@pytest.mark.parametrize('mode', ['packed', 'documents'])
@pytest.mark.parametrize(
    'batch_size, accumulation, ranks', [(1, 1, 1), (4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
)
def test_every_row_of_an_epoch_comes_exactly_once(make_folder, mode, batch_size, accumulation, ranks):
    folder = data.Folder(make_folder())
    per_step = batch_size * accumulation * ranks
    num_rows = batches(folder, mode=mode).rows.num_rows
    steps = -(-num_rows // per_step)
    seen = [
        tokens
        for step in range(steps)
        for tokens, _, _ in rows_of_step(folder, step, ranks, accumulation, batch_size=batch_size, mode=mode)
    ][:num_rows]
    rows = data.make_rows(folder, 'train', 'ar', 16, mode, training=True)
    expected = [tuple(rows.read(row, (rng.MOVE, 0, 0))[0].tolist()) for row in range(num_rows)]
    assert sorted(seen) == sorted(expected)
    assert seen != expected  # in random order


@pytest.mark.parametrize('mode', ['packed', 'documents'])
@pytest.mark.parametrize('accumulation, ranks', [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_rows_and_noise_depend_on_seed_step_and_place_only(make_folder, mode, accumulation, ranks):
    folder = data.Folder(make_folder())
    for step in (0, 9):
        expected = rows_of_step(folder, step, batch_size=8, architecture='diffusion', mode=mode)
        assert (
            rows_of_step(
                folder,
                step,
                ranks,
                accumulation,
                batch_size=8 // (accumulation * ranks),
                architecture='diffusion',
                mode=mode,
            )
            == expected
        )


def test_rows_and_noise_differ_by_seed_and_by_step(make_folder):
    folder = data.Folder(make_folder())
    rows = [
        rows_of_step(folder, step, architecture='diffusion', seed=seed)
        for seed, step in ((0, 0), (0, 1), (1, 0))
    ]
    for one, other in itertools.combinations(rows, 2):
        assert [row[0] for row in one] != [row[0] for row in other]
        assert not set(one[0][2]) & set(other[0][2])


def test_get_gives_any_step_in_any_order(make_folder):
    """Reading ahead is invisible: a resumed run sees the rows that it would have seen."""
    reader, folder = batches(data.Folder(folder := make_folder()), 'diffusion'), data.Folder(folder)
    for step in (0, 1, 2, 7, 3, 3):
        ((tokens, _, noise),) = reader.get(step)[0]
        ((expected_tokens, _, expected_noise),) = batches(folder, 'diffusion').read(step)[0]
        assert torch.equal(tokens, expected_tokens) and torch.equal(noise, expected_noise)


def test_another_epoch_has_other_borders(make_folder):
    folder = data.Folder(make_folder())
    reader = batches(folder, batch_size=1)
    first, second = (
        {
            tuple(reader.read(epoch * reader.rows.num_rows + i)[0][0][0][0].tolist())
            for i in range(reader.rows.num_rows)
        }
        for epoch in (0, 1)
    )
    assert len(first & second) < len(first) / 4
    assert reader.epoch(reader.rows.num_rows) == 1


def test_training_windows_reach_both_ends_of_the_split(make_folder):
    folder = data.Folder(make_folder(train=['abcdefghijklmnopqrstuvwxyz' * 2]))  # 53 tokens: 2 rows of 17
    rows = data.make_rows(folder, 'train', 'ar', 16, 'packed', training=True)
    starts = [[rows.read(row, (epoch,))[0].tolist() for row in range(rows.num_rows)] for epoch in range(300)]
    tokens = folder.tokens['train'].tolist()
    assert any(epoch[0] == tokens[:17] for epoch in starts)
    assert any(epoch[-1] == tokens[-17:] for epoch in starts)
    assert all(epoch[0][16] == epoch[1][0] for epoch in starts)  # a last target is the next context


# ---------------------------------------------------------------------------- noise


@pytest.mark.parametrize('accumulation, ranks', [(1, 1), (2, 2)])
def test_levels_are_stratified_over_the_global_batch(make_folder, accumulation, ranks):
    folder = data.Folder(make_folder())
    for step in range(5):
        rows = rows_of_step(
            folder,
            step,
            ranks,
            accumulation,
            batch_size=16 // (accumulation * ranks),
            architecture='diffusion',
        )
        levels = np.array([noise[0] for _, _, noise in rows])
        assert sorted(np.floor(levels * 16)) == list(range(16))


def test_levels_are_spread_over_the_ranks(make_folder):
    folder = data.Folder(make_folder())
    steps = [rows_of_step(folder, step, batch_size=16, architecture='diffusion') for step in range(200)]
    levels = np.array([[noise[0] for _, _, noise in rows] for rows in steps])
    of_ranks = levels.reshape(200, 2, 8).mean(axis=(0, 2))  # rank 0 has the first half of each step's rows
    assert np.abs(of_ranks - 0.5).max() < 0.02
    assert np.abs(levels.mean(0) - 0.5).max() < 0.1  # no place has always the hard ones


def test_level_and_noise_of_a_row_are_independent(make_folder):
    folder = data.Folder(make_folder())
    steps = [rows_of_step(folder, step, architecture='diffusion') for step in range(200)]
    noise = np.array([noise for rows in steps for _, _, noise in rows])
    correlation = np.corrcoef(noise.T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.2  # 800 rows: six standard deviations


# ---------------------------------------------------------------------------- evaluation


def evaluated(folder, architecture, ranks=1, batch_size=3, **settings):
    """Each row of the validation split as (tokens, loss_mask, noise), over all ranks."""
    return [
        tuple(None if x is None else x[row] for x in batch)
        for rank in range(ranks)
        for batch in data.evaluation_batches(
            folder, 'val', architecture, 16, batch_size, rank=rank, world_size=ranks, **settings
        )
        for row in range(len(batch[0]))
    ]


def targets_of(folder, architecture):
    targets = []
    for tokens, loss_mask, _ in evaluated(folder, architecture):
        trained = torch.ones_like(tokens) if loss_mask is None else loss_mask
        targets += tokens[1:][trained[1:].bool()].tolist()  # a row's first token is context
    return sorted(targets)


@pytest.mark.parametrize('length', [16, 17, 31, 32, 33, 47, 64, 65, 100])  # and <|endoftext|>
def test_ar_evaluation_covers_each_token_but_the_first_exactly_once(make_folder, length):
    """Each position of the split is its own token id, so that a target says where it is."""
    letters = ''.join(map(chr, range(200, 200 + length)))
    folder = data.Folder(make_folder(val=[letters], letters=letters, train=[letters]))
    assert targets_of(folder, 'ar') == list(range(1, length + 1))


def test_diffusion_evaluation_counts_no_token_twice(make_folder):
    letters = ''.join(map(chr, range(200, 300)))
    folder = data.Folder(make_folder(val=[letters], letters=letters, train=[letters]))
    context = set(range(0, 96, 16))  # of the rows but the last, which begins before what it counts
    assert targets_of(folder, 'diffusion') == sorted(set(range(101)) - context)


@pytest.mark.parametrize('architecture', ['ar', 'diffusion'])
@pytest.mark.parametrize('mode', ['packed', 'documents'])
@pytest.mark.parametrize('num_batches', [0, 2])
def test_evaluation_is_the_same_for_any_number_of_ranks(make_folder, architecture, mode, num_batches):
    folder = data.Folder(make_folder())

    def rows(ranks):
        found = evaluated(folder, architecture, ranks, mode=mode, num_batches=num_batches)
        return sorted(repr([x if x is None else x.tolist() for x in row]) for row in found)

    assert rows(1) == rows(2) == rows(5)
    assert len(rows(1)) == 6 if num_batches else len(rows(1)) > 12


def test_evaluation_of_a_few_batches_is_spread_over_the_split(make_folder):
    folder = data.Folder(make_folder(val=['a' * 499, 'b' * 499]))
    tokens = torch.stack([row[0] for row in evaluated(folder, 'ar', num_batches=2)])
    letters = letter_tokenizer()
    assert (tokens == letters.encode('a')[0]).any() and (tokens == letters.encode('b')[0]).any()


# ---------------------------------------------------------------------------- documents


def documents(make_folder, architecture, texts, **settings):
    folder = data.Folder(make_folder(train=texts, **settings))
    rows = data.make_rows(folder, 'train', architecture, 8, 'documents', training=True)
    return [rows.read(row) for row in range(rows.num_rows)], folder.tokenizer


@pytest.mark.parametrize('architecture, length', [('ar', 9), ('diffusion', 8)])
def test_a_document_begins_with_endoftext_and_is_filled_with_ignore(make_folder, architecture, length):
    (short, last), tokenizer = documents(make_folder, architecture, ['abc', 'de'])
    end, ignore = tokenizer.endoftext_id, tokenizer.ignore_id
    assert short[0].tolist() == [end, *tokenizer.encode('abc'), end] + [ignore] * (length - 5)
    assert last[0].tolist() == [end, *tokenizer.encode('de'), end] + [ignore] * (length - 4)


def test_filler_is_trained_on_by_diffusion_and_masked_for_ar(make_folder):
    for architecture, filler in (('ar', 0), ('diffusion', 1)):
        ((tokens, trained),) = documents(lambda **kw: make_folder(architecture, **kw), architecture, ['abc'])[
            0
        ]
        assert trained[1:5].tolist() == [1] * 4  # a, b, c and the end
        assert set(trained[5:]) == {filler}


def test_filler_is_never_counted(make_folder):
    folder = data.Folder(make_folder(train=['abc', 'de', 'f' * 30]))
    for architecture, num_rows in (('ar', 4), ('diffusion', 5)):  # 16 or 15 tokens in a row
        count = batches(folder, architecture, batch_size=num_rows, mode='documents').read(0)[1]
        assert count == 4 + 3 + 31


def test_a_long_document_continues_after_the_token_before(make_folder):
    rows, tokenizer = documents(make_folder, 'ar', ['abcdefghijklmno', 'z'])
    (first, _), (second, trained), (third, _) = rows
    end = tokenizer.endoftext_id
    assert first.tolist() == [end, *tokenizer.encode('abcdefgh')]
    assert second.tolist() == [*tokenizer.encode('hijklmno'), end]
    assert trained[1:].all() and third[:2].tolist() == [end, *tokenizer.encode('z')]


def test_an_empty_document_has_a_row_with_its_end(make_folder):
    rows, tokenizer = documents(make_folder, 'ar', ['', 'a', ''])
    end, (a,) = tokenizer.endoftext_id, tokenizer.encode('a')
    assert [tokens[1] for tokens, _ in rows] == [end, a, end]


@pytest.mark.parametrize('mode', ['packed', 'documents'])
def test_the_folders_masks_say_where_the_loss_is(make_folder, mode):
    folder = data.Folder(make_folder(train_on='e'))
    (e,) = folder.tokenizer.encode('e')
    micro_batches, count = batches(folder, batch_size=8, accumulation=2, mode=mode).read(3)
    tokens, loss_mask = (torch.cat(parts) for parts in list(zip(*micro_batches))[:2])
    assert torch.equal(loss_mask[:, 1:].bool(), tokens[:, 1:] == e)
    assert count == (tokens[:, 1:] == e).sum() > 0


@pytest.mark.parametrize('architecture', ['ar', 'diffusion'])
@pytest.mark.parametrize('mode', ['packed', 'documents'])
@pytest.mark.parametrize('train_on', [None, 'aeiou'])
def test_the_count_is_the_models_over_all_ranks_and_micro_steps(make_folder, architecture, mode, train_on):
    folder = data.Folder(make_folder(train_on=train_on))
    readers = [batches(folder, architecture, 2, 2, 2, rank, mode=mode).read(5) for rank in (0, 1)]
    tokens, loss_mask, _ = zip(*(batch for micro_batches, _ in readers for batch in micro_batches))
    tokens = torch.cat(tokens)
    trained = torch.ones_like(tokens) if loss_mask[0] is None else torch.cat(loss_mask)
    expected = (trained[:, 1:].bool() & (tokens[:, 1:] != folder.tokenizer.ignore_id)).sum()
    assert [count for _, count in readers] == [expected, expected]


# ---------------------------------------------------------------------------- what cannot be read

DAMAGE = {  # the file, what it becomes, what the error says
    'no config': ('config.json', None, 'did not finish'),
    'cut config': ('config.json', lambda old: old[:-2], 'config.json is damaged'),
    'empty config': ('config.json', lambda old: b'', 'config.json is damaged'),
    'config of another kind': ('config.json', lambda old: b'[1]', 'config.json is damaged'),
    'config without a name': ('config.json', lambda old: old.replace(b'name', b'nome'), "KeyError('name')"),
    'config without a split': ('config.json', lambda old: old.replace(b'val', b'test'), "KeyError('val')"),
    'cut tokens': ('train_tokens.bin', lambda old: old[:5], 'train_tokens.bin has 5 bytes'),
    'no tokens': ('val_tokens.bin', None, 'val_tokens.bin has 0 bytes'),
    'cut index': ('val_index.bin', lambda old: old[:4], 'val_index.bin has 4 bytes'),
    'no tokenizer': ('tokenizer.json', None, 'There is no tokenizer'),
    'cut tokenizer': ('tokenizer.json', lambda old: old[:99], 'tokenizer.json could not be read'),
    'tokenizer that is no text': ('tokenizer.json', lambda old: b'\xff', 'tokenizer.json could not be read'),
    'another tokenizer': (
        'tokenizer.json',
        lambda old: letter_tokenizer('abc').to_json().encode(),
        'tokenizer.json has 6 tokens, config.json says 30',
    ),
}


@pytest.mark.parametrize('case', DAMAGE)
def test_a_damaged_folder_is_refused_in_one_sentence_with_its_path(make_folder, case):
    folder = make_folder()
    name, change, expected = DAMAGE[case]
    path = folder / name
    path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError) as error:
        data.Folder(folder)
    assert expected in str(error.value) and '\n' not in str(error.value)
    assert str(folder) in str(error.value)
    assert 'prepare' in str(error.value) or 'give a' in str(error.value)


def test_a_missing_folder_is_named_with_the_remedy():
    with pytest.raises(UserError, match="'nowhere'.*python prepare/stories.py"):
        data.Folder('nowhere')


def test_a_block_longer_than_the_data_is_refused(make_folder):
    folder = data.Folder(make_folder(val=['abc']))
    with pytest.raises(UserError, match='val split .* has 4 tokens, fewer than one row of 17; choose'):
        next(data.evaluation_batches(folder, 'val', 'ar', 16, 4))
    with pytest.raises(UserError, match='train split .* fewer than one row of 99999'):
        data.Batches(folder, 'diffusion', 99999, 4)


def test_an_unknown_mode_is_refused(make_folder):
    with pytest.raises(UserError, match="'rows'.*'packed' or 'documents'"):
        batches(data.Folder(make_folder()), mode='rows')
