"""What a mix of folders promises: exact proportions, no row twice, the same rows for any ranks."""

import itertools
import json
import math
import runpy
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_texts, signals_kept
from test_data import batches, rows_of_step

from lm import data, mixing
from lm.configurator import UserError

TRAIN = Path(__file__).resolve().parent.parent / 'train.py'


@pytest.fixture
def mix(make_folder, tmp_path):
    """Folders a, b and c, whose texts have letters of their own, mixed by the weights."""

    def make(weights='a:0.5,b:0.3,c:0.2', **settings):
        for name, size in (('a', 3000), ('b', 400), ('c', 150)):
            if not (tmp_path / name).exists():
                make_folder(
                    name,
                    train=[name * 29] * (size // 30),
                    val=[name * 29] * (size // 90),
                    **settings.get(name, {}),
                )
        return data.open_dataset(','.join(f'{tmp_path}/{part}' for part in weights.split(',')))

    return make


def letters_of(folder, step, **settings):
    """The letter of each row of a step: which folder it came from."""
    return [max(row[0], key=row[0].count) for row in rows_of_step(folder, step, **settings)]


@pytest.mark.parametrize(
    'weights', [['0.7', '0.3'], ['1/3', '1/3', '1/3'], ['0.5', '0.3', '0.19', '0.01'], ['1']]
)
def test_of_any_number_of_rows_each_folder_has_its_share(weights):
    class Part:
        num_rows, row_length, masked = 10**9, 9, False

    weights = [Fraction(weight) for weight in weights]
    rows = mixing.MixedRows([Part] * len(weights), weights, training=True)
    seen = [0] * len(weights)
    for number in range(1000):
        part, before = rows.place(number)
        assert before == seen[part]  # each row of a folder once, in turn
        seen[part] += 1
        assert all(abs(count - (number + 1) * weight) < len(weights) for count, weight in zip(seen, weights))
    assert rows.counts(10**15)[0] == 10**15 * weights[0] // 1  # exact, far beyond a float


@pytest.mark.parametrize('mode', ['packed', 'documents'])
def test_each_step_has_the_folders_in_proportion(mix, mode):
    folder = mix()
    for step in (0, 7, 123):
        letters = letters_of(folder, step, batch_size=20, mode=mode)
        assert [letters.count(letter) for letter in sorted(set(letters))] == [10, 6, 4]


@pytest.mark.parametrize('mode', ['packed', 'documents'])
@pytest.mark.parametrize('accumulation, ranks', [(2, 1), (1, 2), (2, 2)])
def test_rows_of_a_mix_depend_on_seed_step_and_place_only(mix, mode, accumulation, ranks):
    folder = mix()
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
    assert rows_of_step(folder, 0, batch_size=8, seed=1) != rows_of_step(folder, 0, batch_size=8)


@pytest.mark.parametrize('mode', ['packed', 'documents'])
def test_each_folder_has_epochs_of_its_own_without_repetition(make_folder, mode):
    """Each token of a folder is a letter of its own, so that a row says which it is."""
    letters = ''.join(map(chr, range(200, 600)))
    paths = [
        make_folder(
            name, train=[letters[i : i + 15] for i in range(0, size, 15)], val=[letters[:30]], letters=letters
        )
        for name, size in (('large', 390), ('small', 90))
    ]
    folder = data.open_dataset(f'{paths[0]}:3,{paths[1]}:1')
    reader = batches(folder, batch_size=8, mode=mode)
    for part, count in zip(reader.rows.parts, (3, 1)):
        drawn = []
        for number in itertools.count():
            which, _ = reader.rows.place(number)
            if reader.rows.parts[which] is part:
                drawn.append(tuple(reader.read_rows(0, [number])[number][0].tolist()))
            if len(drawn) == 2 * part.num_rows:
                break
        assert len(set(drawn[: part.num_rows])) == len(set(drawn[part.num_rows :])) == part.num_rows
        assert drawn[: part.num_rows] != drawn[part.num_rows :]  # in another order


def test_the_count_covers_folders_with_masks_and_without(mix):
    folder = mix('a:0.5,b:0.5', b={'train_on': 'z'})
    reader = batches(folder, batch_size=8)
    micro_batches, count = reader.read(0)
    ((_, loss_mask, _),) = micro_batches
    assert count == 4 * 16 == loss_mask[:, 1:].sum()
    # Each rank reads rows of one folder only, and both know the count of all.
    assert [batches(folder, batch_size=1, ranks=2, rank=rank).read(0)[1] for rank in (0, 1)] == [16, 16]


def test_a_mixs_epochs_are_counted_in_all_and_by_folder(mix):
    folder = mix('a:0.5,b:0.5')
    reader = batches(folder, batch_size=10)
    a, b = (part.num_rows for part in reader.rows.parts)
    assert reader.epoch(12) == pytest.approx(120 / (a + b))
    assert reader.epochs_in_words(12) == f'{120 / (a + b):.2f} epochs (a {60 / a:.2f}, b {60 / b:.2f})'


@pytest.mark.parametrize('mode', ['packed', 'documents'])
@pytest.mark.parametrize('weights', ['a:0.5,b:0.3,c:0.2', 'a:0.01,b:0.01,c:0.98'])
def test_validation_is_in_proportion_and_has_no_row_twice(mix, mode, weights):
    folder = mix(weights)
    rows = data.make_rows(folder, 'val', 'diffusion', 16, mode, training=False)
    chosen = []
    for number in range(rows.num_rows):
        part, count = rows.place(number)
        chosen.append((part, count * rows.parts[part].num_rows // rows.taken[part]))
    assert len(set(chosen)) == len(chosen) == rows.num_rows
    for part, weight in enumerate(folder.weights):
        assert abs(sum(place[0] == part for place in chosen) - weight * rows.num_rows) < 3
    room = min(part.num_rows / weight for part, weight in zip(rows.parts, folder.weights))
    assert rows.num_rows >= room - 3  # nearly all of the folder that limits it
    batch = [tokens for tokens, _, _ in data.evaluation_batches(folder, 'val', 'diffusion', 16, 4, mode)]
    split = [
        tokens
        for rank in (0, 1)
        for tokens, _, _ in data.evaluation_batches(
            folder, 'val', 'diffusion', 16, 4, mode, rank=rank, world_size=2
        )
    ]
    assert sorted(torch.cat(batch).tolist()) == sorted(torch.cat(split).tolist())


def test_bytes_of_a_mix_follow_its_weights(mix):
    folder = mix('a:0.75,b:0.25')
    a, b = (part.tokens_per_byte('val') for part in folder.folders)
    assert 1 / folder.tokens_per_byte('val') == pytest.approx(0.75 / a + 0.25 / b)


@pytest.mark.parametrize(
    'weights, words',
    [
        ('a:0.7,b', 'no name with a weight above 0'),
        ('a:0.7,b:0', 'weight above 0'),
        ('a:0.7,b:x', 'NAME:WEIGHT'),
        ('a:1,b:nan', 'weight above 0'),
        ('a:-1,b:2', 'weight above 0'),
        ('a:0.7,d:0.3', 'no prepared data at .*d'),
        ('a:0.5,a:0.5', 'names a folder twice'),
    ],
)
def test_a_mistaken_mix_is_one_sentence(mix, weights, words):
    with pytest.raises(UserError, match=words):
        mix(weights)


def test_folders_of_different_tokenizers_are_refused(mix):
    with pytest.raises(
        UserError, match='different tokenizers, of 30 and 6 tokens.*the second with --tokenizer='
    ):
        mix('a:0.5,b:0.5', b={'letters': 'ab '})


def test_other_scripts_say_that_they_take_one_folder(mix):
    with pytest.raises(UserError, match='mixes folders, which is for train.py; name one'):
        data.Folder('a:0.5,b:0.5')


# ---------------------------------------------------------------------------- train.py


@pytest.fixture
def train(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(
            sys,
            'argv',
            [
                str(TRAIN),
                '--device=cpu',
                '--no_wandb',
                '--n_layer=1',
                '--n_embd=16',
                '--n_head=2',
                '--batch_size=4',
                '--eval_every=4',
                *map(str, arguments),
            ],
        )
        with signals_kept():
            return runpy.run_path(str(TRAIN), run_name='__main__')

    return run


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['packed', 'documents'])
def test_training_on_a_mix_resumes_bit_for_bit(train, make_folder, tmp_path, mode, capsys):
    paths = [make_folder(name, train=random_texts(60, 90, seed)) for name, seed in (('one', 3), ('two', 4))]
    mix = f'--dataset={paths[0]}:0.7,{paths[1]}:0.3'
    settings = [mix, f'--mode={mode}', '--block_size=16', '--schedule=constant']
    whole = train(*settings, '--max_steps=8', f'--out_dir={tmp_path / "whole"}')
    assert 'epochs (one ' in capsys.readouterr().out and math.isfinite(whole['best_val_loss'])
    train(*settings, '--max_steps=4', f'--out_dir={tmp_path / "half"}')
    resumed = train(f'--resume_from={tmp_path / "half"}', '--max_steps=8')
    for name, weight in whole['raw_model'].state_dict().items():
        assert torch.equal(weight, resumed['raw_model'].state_dict()[name])


def test_the_block_size_is_what_the_data_were_prepared_for_unless_given(train, make_folder, tmp_path):
    folder = make_folder()
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'max_seq_len': 24}))
    ends = ['--max_steps=1', f'--dataset={folder}']
    assert train(*ends, f'--out_dir={tmp_path / "1"}')['block_size'] == 24
    assert train(*ends, f'--out_dir={tmp_path / "2"}', '--block_size=16')['block_size'] == 16
    resumed = train(f'--resume_from={tmp_path / "2"}', '--max_steps=2')
    assert resumed['block_size'] == resumed['config']['block_size'] == 16


# ---------------------------------------------------------------------------- flat memory


def resident_file_pages():
    line = next(line for line in open('/proc/self/status') if line.startswith('RssFile'))
    return int(line.split()[1]) / 1024  # MB


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='there is no /proc')
def test_reading_a_large_folder_keeps_no_pages(make_folder):
    folder = make_folder()
    size, texts = 100_000_000, 2_000_000
    config = json.loads((folder / 'config.json').read_text())
    config['splits']['train'].update(tokens=size, documents=texts)
    (folder / 'config.json').write_text(json.dumps(config))
    with open(folder / 'train_tokens.bin', 'wb') as file:
        file.truncate(2 * size)  # a hole: nothing is written
    (np.arange(texts + 1, dtype=np.uint64) * np.uint64(50)).tofile(folder / 'train_index.bin')
    opened = data.Folder(folder)
    for mode in ('packed', 'documents'):
        reader = data.Batches(opened, 'ar', 64, 512, mode=mode)
        reader.read(9)  # code is read into memory too
        before = resident_file_pages()
        for step in range(5):
            reader.read(step)
        assert resident_file_pages() - before < 5, mode  # 2560 places of 200 MB
        if mode == 'documents':
            assert reader.rows.num_rows == texts and reader.rows.first_row.nbytes < texts / 50
