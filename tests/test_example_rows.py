"""Rows of instruction examples: each example once, only answers in the loss, none sees another."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_model
from helpers import FORM, GPT2_SWITCHES, special_ids, turns, write_examples

from lm import data, prompts, rng
from lm.configurator import UserError
from lm.folder import Folder
from model import ARCHITECTURES


def make_rows(folder, architecture, block_size, mode):
    return data.make_rows(folder, 'train', ARCHITECTURES[architecture], block_size, mode, training=True)


LONG = 160  # tokens, which all of the examples have room in


@pytest.fixture(scope='module')
def examples(tmp_path_factory):
    return Folder(write_examples(tmp_path_factory.mktemp('data') / 'examples'))


@pytest.mark.parametrize('architecture', ['ar', 'diffusion'])
@pytest.mark.parametrize('mode', ['examples', 'packed examples'])
def test_each_example_comes_once_whole_and_only_answers_are_in_the_loss(examples, architecture, mode):
    rows = make_rows(examples, architecture, LONG, mode)
    start, ignore, seen = examples.config['start_token'], examples.tokenizer.ignore_id, []
    for row in range(rows.num_rows):
        tokens, loss_mask, doc_ids = rows.read(row)
        assert len(tokens) <= rows.row_length
        doc_ids = np.zeros(len(tokens)) if doc_ids is None else doc_ids
        for number in np.unique(doc_ids):
            ids, mask = tokens[doc_ids == number], loss_mask[doc_ids == number]
            assert ids[0] == start and mask[0] == 0  # context of its own
            assert (mask[ids == ignore] == 1).all() and (architecture != 'ar' or ignore not in ids)
            ids, mask = ids[1:][ids[1:] != ignore].tolist(), mask[1:][ids[1:] != ignore].tolist()
            assert ids.count(start) == 1 and ids[-1] == start and mask[-1] == 1  # <|endoftext|> ends it
            seen.append((ids, mask))
    expected = [prompts.encode(examples.tokenizer, FORM, [turn]) for turn in turns(60)]
    assert sorted(seen) == sorted(expected)
    assert rows.num_rows == 60 if mode == 'examples' else rows.num_rows < 35


@pytest.mark.faults
def test_a_bidirectional_model_sees_nothing_behind_an_answer(examples):
    parts = dict(
        index=[0, 9], tokens=[*range(9)], masks=[0, 1, 1, 0, 0, 1, 1, 1, 0]
    )  # two answers, and a newline
    parts = {name: {'train': np.array(array)} for name, array in parts.items()}
    folder = SimpleNamespace(
        **parts, config=examples.config, tokenizer=examples.tokenizer, path='here', train_on_prompt=False
    )
    start = folder.config['start_token']
    read = lambda architecture: [
        x[:2] for x in map(rows_of[architecture].read, range(rows_of[architecture].num_rows))
    ]
    rows_of = {name: make_rows(folder, name, 9, 'examples') for name in ('ar', 'diffusion')}
    ((tokens, loss_mask),) = read('ar')
    assert tokens.tolist() == [start, *range(9)] and loss_mask.tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 1, 0]
    (first, first_mask), (second, second_mask) = read('diffusion')
    assert first[:4].tolist() == [start, 0, 1, 2] and first_mask[:4].tolist() == [0, 0, 1, 1]
    assert {*first[4:].tolist()} <= {folder.tokenizer.ignore_id}
    assert second.tolist() == [start, *range(8)] and second_mask.tolist() == [0] * 6 + [1] * 3
    with pytest.raises(UserError, match='here has texts that go on after an answer'):
        make_rows(folder, 'diffusion', 9, 'documents')


@pytest.mark.faults
def test_an_example_that_is_all_answer_is_cut_into_rows_not_dropped(tmp_path):
    folder = Folder(write_examples(tmp_path / 'plain', form='{output}'))
    rows = make_rows(folder, 'ar', 12, 'examples')
    assert rows.dropped == 0 and rows.num_trained == len(folder.tokens['train']) and rows.num_rows > 60
    tokens = [token for row in range(rows.num_rows) for token in rows.read(row)[0][1:]]
    assert tokens == folder.tokens['train'].tolist()


def test_padding_of_examples_is_of_all_lengths_for_diffusion(examples):
    rows = make_rows(examples, 'diffusion', 64, 'examples')
    padding = np.array([(rows.read(row)[0] == examples.tokenizer.ignore_id).sum() for row in range(60)])
    assert (padding < 3).any() and (padding > 20).any()


@pytest.mark.faults
def test_the_room_of_an_answer_in_evaluation_does_not_tell_its_length(examples):
    rows = data.make_rows(
        examples, 'val', ARCHITECTURES['diffusion'], LONG, 'packed examples', training=False
    )
    assert all(len(rows.read(row)[0]) == LONG for row in range(rows.num_rows))


def test_best_fit_never_overfills_and_wastes_little():
    sizes = np.array([int(x) for x in rng.random_bits(1, np.arange(500)) % np.uint64(60) + np.uint64(1)])
    rows = data.best_fit(sizes, 64)
    assert sorted(sum(rows, [])) == list(range(500)) and all(sizes[row].sum() <= 64 for row in rows)
    assert len(rows) <= 1.03 * sizes.sum() / 64


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize(
    'changes',
    [{}, {'n_head': 4, 'n_kv_head': 2}, GPT2_SWITCHES, {'shift': True}],
    ids=['native', 'grouped', 'gpt2', 'shift'],
)
def test_packed_examples_have_the_loss_of_single_ones(examples, architecture, changes):
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=LONG, **special_ids(examples.tokenizer))
    model = random_model(architecture, 0.4, **{**shape, **changes})
    rows = make_rows(examples, architecture, LONG, 'packed examples')
    packed = [rows.read(row) for row in range(rows.num_rows - 3, rows.num_rows)]
    batch = data.collate(packed, data.row_noise(np.arange(3), 3, rows.row_length, ()))
    nll, *_ = model(*batch, reduction='none')
    assert max(doc_ids[-1] for _, _, doc_ids in packed) >= 2  # several in a row
    for row, (tokens, loss_mask, doc_ids) in enumerate(packed):
        for number in range(doc_ids[-1] + 1):
            where = np.flatnonzero(doc_ids == number)
            noise = batch.noise[row, np.append(0, 1 + where)][
                None
            ]  # the row's ratio, the tokens' own numbers
            single = data.collate([(tokens[where], loss_mask[where])], noise.numpy())
            expected, *_ = model(*single, reduction='none')
            assert expected.sum() > 0 or architecture != 'ar'
            torch.testing.assert_close(nll[row, where], expected[0], atol=1e-5, rtol=1e-5)
