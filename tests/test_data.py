"""Rows and batches: pure functions of (seed, step, row), each row once per epoch, for any number of ranks."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import letter_tokenizer, random_model
from rows import batches, evaluated, evaluation_batches, make_rows, rank, rows_of_step

from lm import data, rng
from lm.configurator import UserError
from lm.folder import Folder, open_dataset
from model import ARCHITECTURES

# ---------------------------------------------------------------------------- rows of training


@pytest.mark.parametrize('mode', ['packed', 'documents'])
@pytest.mark.parametrize('batch_size, micro_steps, ranks', [(1, 1, 1), (4, 1, 1), (1, 2, 2)])
def test_every_row_of_an_epoch_comes_exactly_once(make_folder, mode, batch_size, micro_steps, ranks):
    folder = Folder(make_folder())
    num_rows = batches(folder, mode=mode).rows.num_rows
    steps = -(-num_rows // (batch_size * micro_steps * ranks))
    seen = [
        tokens
        for step in range(steps)
        for tokens, _, _ in rows_of_step(folder, step, ranks, micro_steps, batch_size=batch_size, mode=mode)
    ][:num_rows]
    rows = make_rows(folder, 'ar', mode=mode)
    expected = [tuple(rows.read(row, (rng.MOVE, 0, 0))[0].tolist()) for row in range(num_rows)]
    assert sorted(seen) == sorted(expected)
    assert seen != expected  # in random order


@pytest.mark.parametrize('mode', ['packed', 'documents'])
@pytest.mark.parametrize('micro_steps, ranks', [(4, 1), (1, 2), (2, 2)])
def test_rows_and_noise_depend_on_seed_step_and_row_only(make_folder, mode, micro_steps, ranks):
    folder = Folder(make_folder())
    settings = dict(architecture='diffusion', mode=mode)
    for step in (0, 9):
        expected = rows_of_step(folder, step, batch_size=8, **settings)
        size = 8 // (micro_steps * ranks)
        assert rows_of_step(folder, step, ranks, micro_steps, batch_size=size, **settings) == expected


def test_rows_and_noise_differ_by_seed_and_by_step(make_folder):
    folder = Folder(make_folder())
    rows = [
        rows_of_step(folder, step, architecture='diffusion', seed=seed)
        for seed, step in ((0, 0), (0, 1), (1, 0))
    ]
    for one, other in itertools.combinations(rows, 2):
        assert [row[0] for row in one] != [row[0] for row in other]
        assert not set(one[0][2]) & set(other[0][2])


def test_get_gives_any_step_in_any_order(make_folder):
    """Reading ahead is invisible: a resumed run sees the rows that it would have seen."""
    folder = Folder(make_folder())
    reader = batches(folder, 'diffusion')
    for step in (0, 1, 2, 7, 3, 3):
        (batch,), _ = reader.get(step)
        (expected,), _ = batches(folder, 'diffusion').read(step)
        assert torch.equal(batch.tokens, expected.tokens) and torch.equal(batch.noise, expected.noise)


def test_another_epoch_has_other_borders(make_folder):
    reader = batches(Folder(make_folder()), batch_size=1)
    num_rows = reader.rows.num_rows
    first, second = (
        {tuple(reader.read(epoch * num_rows + i)[0][0].tokens[0].tolist()) for i in range(num_rows)}
        for epoch in (0, 1)
    )
    assert len(first & second) < len(first) / 4
    assert reader.epoch(num_rows) == 1


def test_training_windows_reach_both_ends_of_the_split(make_folder):
    folder = Folder(make_folder(train=['abcdefghijklmnopqrstuvwxyz' * 2]))  # 53 tokens: 2 rows of 17
    rows = make_rows(folder, 'ar')
    starts = [[rows.read(row, (epoch,))[0].tolist() for row in range(rows.num_rows)] for epoch in range(300)]
    tokens = folder.tokens['train'].tolist()
    assert any(epoch[0] == tokens[:17] for epoch in starts)
    assert any(epoch[-1] == tokens[-17:] for epoch in starts)
    assert all(epoch[0][16] == epoch[1][0] for epoch in starts)  # a last target is the next context


# ---------------------------------------------------------------------------- noise


@pytest.mark.parametrize('micro_steps, ranks', [(1, 1), (2, 2)])
def test_mask_ratios_are_stratified_over_the_global_batch(make_folder, micro_steps, ranks):
    folder = Folder(make_folder())
    size = 16 // (micro_steps * ranks)
    for step in range(5):
        rows = rows_of_step(folder, step, ranks, micro_steps, batch_size=size, architecture='diffusion')
        ratios = np.array([noise[0] for _, _, noise in rows])
        assert sorted(np.floor(ratios * 16)) == list(range(16))


def test_mask_ratios_are_spread_over_the_ranks(make_folder):
    folder = Folder(make_folder())
    steps = [rows_of_step(folder, step, batch_size=16, architecture='diffusion') for step in range(200)]
    ratios = np.array([[noise[0] for _, _, noise in rows] for rows in steps])
    of_ranks = ratios.reshape(200, 2, 8).mean(axis=(0, 2))  # rank 0 has the first half of each step's rows
    assert np.abs(of_ranks - 0.5).max() < 0.02
    assert np.abs(ratios.mean(0) - 0.5).max() < 0.1  # no row of a batch has always the hard ones


def test_mask_ratio_and_noise_of_a_row_are_independent(make_folder):
    folder = Folder(make_folder())
    steps = [rows_of_step(folder, step, architecture='diffusion') for step in range(200)]
    noise = np.array([noise for rows in steps for _, _, noise in rows])
    correlation = np.corrcoef(noise.T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.2  # 800 rows: six standard deviations


# ---------------------------------------------------------------------------- evaluation


def targets_of(folder, architecture):
    targets = []
    for tokens, loss_mask, _ in evaluated(folder, architecture):
        in_loss = torch.ones_like(tokens) if loss_mask is None else loss_mask
        targets += tokens[1:][in_loss[1:].bool()].tolist()  # a row's first token is context
    return sorted(targets)


@pytest.mark.parametrize('length', [16, 17, 31, 32, 33, 47, 64, 65, 100])  # and <|endoftext|>
def test_ar_evaluation_covers_each_token_but_the_first_exactly_once(make_folder, length):
    """Each position of the split is its own token id, so that a target says where it is."""
    letters = ''.join(map(chr, range(200, 200 + length)))
    folder = Folder(make_folder(val=[letters], letters=letters, train=[letters]))
    assert targets_of(folder, 'ar') == list(range(1, length + 1))


def test_diffusion_evaluation_counts_no_token_twice(make_folder):
    letters = ''.join(map(chr, range(200, 300)))
    folder = Folder(make_folder(val=[letters], letters=letters, train=[letters]))
    context = set(range(0, 96, 16))  # of the rows but the last, which begins before what it counts
    assert targets_of(folder, 'diffusion') == sorted(set(range(101)) - context)


@pytest.mark.parametrize('architecture, mode', [('ar', 'packed'), ('diffusion', 'documents')])
@pytest.mark.parametrize('max_tokens', [0, 96])
def test_evaluation_is_the_same_for_any_number_of_ranks(make_folder, architecture, mode, max_tokens):
    folder = Folder(make_folder())

    def rows(ranks):
        found = evaluated(folder, architecture, ranks, mode=mode, max_tokens=max_tokens)
        return sorted(repr([x if x is None else x.tolist() for x in row]) for row in found)

    assert rows(1) == rows(2) == rows(5)
    assert len(rows(1)) == {'packed': 6, 'documents': 7}[mode] if max_tokens else len(rows(1)) > 12


@pytest.mark.parametrize('mode', ['packed', 'documents'])
def test_more_tokens_to_evaluate_than_there_are_is_the_whole_split(make_folder, mode):
    folder = Folder(make_folder())
    for architecture in ('ar', 'diffusion'):
        rows = evaluated(folder, architecture, mode=mode, max_tokens=1 + len(folder.tokens['val']))
        assert len(rows) == len(evaluated(folder, architecture, mode=mode))


def test_each_rank_gets_as_many_evaluation_batches(make_folder):
    folder = Folder(make_folder(val=['abcdefghi' * 4]))  # two rows, both in the first rank's batch
    kind = ARCHITECTURES['diffusion']
    first, second = (
        list(data.EvaluationBatches(folder, 'val', kind, 16, 4, 'packed', dist=rank(i, 2))) for i in (0, 1)
    )
    assert len(first) == len(second) == 1 and len(first[0].tokens) > len(second[0].tokens)
    assert not second[0].loss_mask.any()


@pytest.mark.faults
@pytest.mark.parametrize('architecture', ['ar', 'diffusion'])
def test_rows_and_noise_of_evaluation_do_not_depend_on_the_batch_size(make_folder, architecture):
    folder = Folder(make_folder())
    few, many = (evaluated(folder, architecture, batch_size=n, max_tokens=160) for n in (2, 7))
    assert len(few) == 10
    for row, other in zip(few, many, strict=True):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(row, other))


@pytest.mark.faults
@pytest.mark.parametrize('mode', ['packed', 'documents'])
def test_bytes_of_a_mix_are_those_of_its_tokens(make_folder, tmp_path, mode):
    """In documents mode the weights are of rows, and a row of short documents has few tokens."""
    for name, val in (('long', ['a' * 29] * 20), ('short', ['b'] * 400)):
        make_folder(name, val=val)
    folder = open_dataset(f'{tmp_path}/long:0.5,{tmp_path}/short:0.5')
    batches = evaluation_batches(folder, 'ar', mode=mode)
    tokens = (
        torch.cat([b.tokens[:, 1:][b.loss_mask[:, 1:] > 0] for b in batches]) if mode == 'documents' else None
    )
    if mode == 'packed':
        tokens = torch.cat([b.tokens[:, 1:].flatten() for b in batches])
    long, short = (sum(folder.tokenizer.decode([t]) == x for t in tokens.tolist()) for x in 'ab')
    assert batches.num_bytes == pytest.approx(long + short, rel=0.05) and long > short


@pytest.mark.faults
@pytest.mark.parametrize('percent', [50, 70, 90])
def test_an_evaluation_of_a_part_of_a_mix_has_its_proportions(make_folder, tmp_path, percent):
    """Every tenth of its thousand rows would be of one folder, or of none but one in ten."""
    for name, rows in (('a', 10 * percent), ('b', 1000 - 10 * percent)):
        make_folder(name, val=[name * 15] * rows + [name])
    folder = open_dataset(f'{tmp_path}/a:{percent},{tmp_path}/b:{100 - percent}')
    rows = evaluated(folder, 'ar', max_tokens=100 * 16)
    first = sum(bool((row[0] == folder.tokenizer.encode('a')[0]).any()) for row in rows)
    assert len(rows) == 100 and first == pytest.approx(percent, abs=1)


@pytest.mark.faults
@pytest.mark.filterwarnings('error')
def test_a_weight_of_many_digits_credits_bytes_to_the_right_folder(make_folder, tmp_path):
    for name in 'ab':
        make_folder(name, val=[name * 15] * 3000)
    folder = open_dataset(f'{tmp_path}/a:0.3333333333333333,{tmp_path}/b:0.6666666666666667')
    batches = evaluation_batches(folder, 'ar')
    list(batches)
    assert batches.size > 4000 and batches.counts[1] == pytest.approx(2 * batches.counts[0], rel=0.02)


def test_evaluation_of_a_few_batches_is_spread_over_the_split(make_folder):
    folder = Folder(make_folder(val=['a' * 499, 'b' * 499]))
    tokens = torch.stack([row[0] for row in evaluated(folder, 'ar', max_tokens=96)])
    letters = letter_tokenizer()
    assert (tokens == letters.encode('a')[0]).any() and (tokens == letters.encode('b')[0]).any()


# ---------------------------------------------------------------------------- documents


def documents(make_folder, architecture, texts, **settings):
    folder = Folder(make_folder(train=texts, **settings))
    rows = make_rows(folder, architecture, 8, 'documents')
    return [rows.read(row) for row in range(rows.num_rows)], folder.tokenizer


@pytest.mark.parametrize('architecture, length', [('ar', 9), ('diffusion', 8)])
def test_a_document_begins_with_endoftext_and_is_padded_with_ignore(make_folder, architecture, length):
    (short, last), tokenizer = documents(make_folder, architecture, ['abc', 'de'])
    end, ignore = tokenizer.endoftext_id, tokenizer.ignore_id
    assert short[0].tolist() == [end, *tokenizer.encode('abc'), end] + [ignore] * (length - 5)
    assert last[0].tolist() == [end, *tokenizer.encode('de'), end] + [ignore] * (length - 4)


@pytest.mark.parametrize('architecture, in_loss', [('ar', 0), ('diffusion', 1)])
def test_padding_is_in_the_loss_of_diffusion_and_not_of_ar(make_folder, architecture, in_loss):
    ((_, loss_mask),), _ = documents(make_folder, architecture, ['abc'])
    assert loss_mask[1:5].tolist() == [1] * 4  # a, b, c and the end
    assert set(loss_mask[5:]) == {in_loss}


def test_padding_is_never_counted(make_folder):
    folder = Folder(make_folder(train=['abc', 'de', 'f' * 30]))
    for architecture, num_rows in (('ar', 4), ('diffusion', 5)):  # 16 or 15 tokens in a row
        count = batches(folder, architecture, batch_size=num_rows, mode='documents').read(0)[1]
        assert count == 4 + 3 + 31


def test_a_long_document_continues_after_the_token_before(make_folder):
    rows, tokenizer = documents(make_folder, 'ar', ['abcdefghijklmno', 'z'])
    (first, _), (second, loss_mask), (third, _) = rows
    end = tokenizer.endoftext_id
    assert first.tolist() == [end, *tokenizer.encode('abcdefgh')]
    assert second.tolist() == [*tokenizer.encode('hijklmno'), end]
    assert loss_mask[1:].all() and third[:2].tolist() == [end, *tokenizer.encode('z')]


def test_an_empty_document_has_a_row_with_its_end(make_folder):
    rows, tokenizer = documents(make_folder, 'ar', ['', 'a', ''])
    end, (a,) = tokenizer.endoftext_id, tokenizer.encode('a')
    assert [tokens[1] for tokens, _ in rows] == [end, a, end]


def test_a_stream_of_a_chat_template_is_reported(make_folder, capsys):
    folder = Folder(make_folder(train_on='e'))
    folder.config['prompt_format'] = '{{ messages }}'
    for mode, count in (('documents', 0), ('packed', 1)):
        batches(folder, mode=mode)
        assert capsys.readouterr().out.count('note: a stream leaves out how the conversations of') == count


@pytest.mark.parametrize('mode', ['packed', 'documents'])
def test_the_folders_masks_say_where_the_loss_is(make_folder, mode):
    folder = Folder(make_folder(train_on='e'))
    (e,) = folder.tokenizer.encode('e')
    micro_batches, count = batches(folder, batch_size=8, micro_steps=2, mode=mode).read(3)
    tokens, loss_mask = (torch.cat([batch[i] for batch in micro_batches]) for i in (0, 1))
    assert torch.equal(loss_mask[:, 1:].bool(), tokens[:, 1:] == e)
    assert count == (tokens[:, 1:] == e).sum() > 0


@pytest.mark.parametrize('architecture, mode', [('ar', 'documents'), ('diffusion', 'packed')])
@pytest.mark.parametrize('train_on', [None, 'aeiou'])
def test_the_count_is_the_models_over_all_ranks_and_micro_steps(make_folder, architecture, mode, train_on):
    folder = Folder(make_folder(train_on=train_on))
    special = dict(mask_id=folder.tokenizer.mask_id, ignore_id=folder.tokenizer.ignore_id)
    model = random_model(architecture, 0.1, vocab_size=30, n_layer=1, n_embd=8, n_head=2, **special)
    readers = [batches(folder, architecture, 2, 2, 2, mode, rank(number, 2)).read(5) for number in (0, 1)]
    expected = sum(int(model(*batch)[1]) for micro_batches, _ in readers for batch in micro_batches)
    assert [count for _, count in readers] == [expected, expected]


def test_collate_pads_outside_the_loss_with_a_document_of_its_own():
    rows = [
        (np.array([5, 6, 7]), np.array([0, 1, 1], np.uint8), np.array([0, 0, 1])),
        (np.array([8]), None, np.array([0])),
    ]
    batch = data.collate(rows, np.zeros((2, 9), np.float32))
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch.doc_ids.tolist() == [[0, 0, 1], [0, -1, -1]] and batch.noise.shape == (2, 4)


# ---------------------------------------------------------------------------- memory, mistakes


def resident_file_pages():
    """Megabytes of files that are mapped into this process and in memory."""
    line = next(line for line in open('/proc/self/status') if line.startswith('RssFile'))
    return int(line.split()[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='there is no /proc')
def test_reading_a_large_folder_keeps_no_pages(make_folder):
    folder = make_folder()
    size, texts = 100_000_000, 2_000_000
    config = json.loads((folder / 'config.json').read_text())
    config['splits']['train'].update(tokens=size, documents=texts)
    (folder / 'config.json').write_text(json.dumps(config))
    with open(folder / 'train_tokens.bin', 'wb') as file:
        file.truncate(2 * size)  # sparse: nothing is written
    (np.arange(texts + 1, dtype=np.uint64) * np.uint64(50)).tofile(folder / 'train_index.bin')
    opened = Folder(folder)
    for mode in ('packed', 'documents'):
        reader = data.Batches(opened, ARCHITECTURES['ar'], 64, 512, mode=mode)
        reader.read(9)  # code is read into memory too
        before = resident_file_pages()
        for step in range(5):
            reader.read(step)
        assert resident_file_pages() - before < 5, mode  # 2560 positions of 200 MB
        if mode == 'documents':
            assert reader.rows.num_rows == texts


def test_a_block_longer_than_the_data_is_refused(make_folder):
    folder = Folder(make_folder(val=['abc']))
    with pytest.raises(UserError, match='has 4 val tokens, a row 17; choose'):
        evaluation_batches(folder, 'ar')
    with pytest.raises(UserError, match='train tokens, a row 99999'):
        make_rows(folder, 'diffusion', 99999)


def test_an_unknown_mode_is_refused(make_folder):
    with pytest.raises(UserError, match="'rows'.*'packed' or 'documents'"):
        batches(Folder(make_folder()), mode='rows')
