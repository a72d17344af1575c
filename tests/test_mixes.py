"""Mixes of prepared folders: rows in exact proportions, each folder without replacement within its own epoch."""

import itertools
from fractions import Fraction
from types import SimpleNamespace

import pytest
from rows import batches, evaluated, make_rows, rank, rows_of_step

from lm import data
from lm.folder import open_dataset


@pytest.fixture
def mix(make_folder, tmp_path):
    """Folders a, b and c, whose texts have letters of their own, mixed by the weights."""

    def make(weights='a:0.5,b:0.3,c:0.2', **settings):
        for name, size in (('a', 3000), ('b', 400), ('c', 150)):
            train, val = [name * 29] * (size // 30), [name * 29] * (size // 90)
            make_folder(name, train=train, val=val, **settings.get(name, {}))
        return open_dataset(','.join(f'{tmp_path}/{part}' for part in weights.split(',')))

    return make


@pytest.mark.parametrize(
    'weights', [['0.7', '0.3'], ['1/3', '1/3', '1/3'], ['0.5', '0.3', '0.19', '0.01'], ['1']]
)
def test_of_any_number_of_rows_each_folder_has_its_share(weights):
    part = SimpleNamespace(num_rows=10**9, row_length=9, text_per_row=9, has_loss_mask=False)
    weights = [Fraction(weight) for weight in weights]
    rows = data.MixedRows([part] * len(weights), weights, training=True)
    seen = [0] * len(weights)
    for row in range(1000):
        which, before = rows.find(row)
        assert before == seen[which]  # each row of a folder once, in turn
        seen[which] += 1
        assert all(abs(count - (row + 1) * weight) < len(weights) for count, weight in zip(seen, weights))
    assert rows.counts(10**15)[0] == 10**15 * weights[0] // 1  # exact, far beyond a float


@pytest.mark.parametrize('mode', ['packed', 'documents'])
def test_each_step_has_the_folders_in_proportion(mix, mode):
    folder = mix()
    for step in (0, 7, 123):
        rows = rows_of_step(folder, step, batch_size=20, mode=mode)
        letters = [max(tokens, key=tokens.count) for tokens, *_ in rows]
        assert [letters.count(letter) for letter in sorted(set(letters))] == [10, 6, 4]


@pytest.mark.parametrize('mode', ['packed', 'documents'])
def test_rows_of_a_mix_depend_on_seed_step_and_row_only(mix, mode):
    folder, settings = mix(), dict(architecture='diffusion', mode=mode)
    expected = rows_of_step(folder, 9, batch_size=8, **settings)
    assert rows_of_step(folder, 9, ranks=2, micro_steps=2, batch_size=2, **settings) == expected
    assert rows_of_step(folder, 9, batch_size=8, seed=1, **settings) != expected


@pytest.mark.parametrize('mode', ['packed', 'documents'])
def test_each_folder_of_a_mix_has_epochs_of_its_own_without_repetition(make_folder, mode):
    """Each token of a folder is a letter of its own, so that a row says which it is."""
    letters = ''.join(map(chr, range(200, 600)))
    paths = []
    for name, size in (('large', 390), ('small', 90)):
        train = [letters[i : i + 15] for i in range(0, size, 15)]
        paths.append(make_folder(name, train=train, val=[letters[:30]], letters=letters))
    reader = batches(open_dataset(f'{paths[0]}:3,{paths[1]}:1'), batch_size=8, mode=mode)
    for which, part in enumerate(reader.rows.parts):
        drawn = []
        for row in itertools.count():
            if reader.rows.find(row)[0] == which:
                drawn.append(tuple(reader.read_rows(0, [row])[row][0].tolist()))
            if len(drawn) == 2 * part.num_rows:
                break
        assert len(set(drawn[: part.num_rows])) == len(set(drawn[part.num_rows :])) == part.num_rows
        assert drawn[: part.num_rows] != drawn[part.num_rows :]  # in another order


def test_the_count_covers_folders_with_masks_and_without(mix):
    folder = mix('a:0.5,b:0.5', b={'train_on': 'z'})
    (batch,), count = batches(folder, batch_size=8).read(0)
    assert count == 4 * 16 == batch.loss_mask[:, 1:].sum()
    # Each rank reads rows of one folder only, and both know the count of all.
    counts = [batches(folder, batch_size=1, dist=rank(number, 2)).read(0)[1] for number in (0, 1)]
    assert counts == [16, 16]


def test_epochs_of_a_mix_are_counted_in_all_and_by_folder(mix):
    reader = batches(mix('a:0.5,b:0.5'), batch_size=10)
    a, b = (part.num_rows for part in reader.rows.parts)
    assert reader.epoch(12) == pytest.approx(120 / (a + b))
    assert reader.describe_epochs(12) == f'{120 / (a + b):.2f} epochs (a {60 / a:.2f}, b {60 / b:.2f})'


@pytest.mark.parametrize('mode', ['packed', 'documents'])
@pytest.mark.parametrize('weights', ['a:0.5,b:0.3,c:0.2', 'a:0.01,b:0.01,c:0.98'])
def test_validation_of_a_mix_is_in_proportion_and_has_no_row_twice(mix, mode, weights):
    folder = mix(weights)
    rows = make_rows(folder, 'diffusion', mode=mode, split='val', training=False)
    chosen = []
    for row in range(rows.num_rows):
        part, count = rows.find(row)
        chosen.append((part, count * rows.parts[part].num_rows // rows.taken[part]))
    assert len(set(chosen)) == len(chosen) == rows.num_rows
    for which, weight in enumerate(folder.weights):
        assert abs(sum(part == which for part, _ in chosen) - weight * rows.num_rows) < 3
    most = min(part.num_rows / weight for part, weight in zip(rows.parts, folder.weights))
    assert rows.num_rows >= most - 3  # nearly all of the folder that limits it
    whole, split = (
        [row[0].tolist() for row in evaluated(folder, 'diffusion', ranks, mode=mode)] for ranks in (1, 2)
    )
    assert sorted(whole) == sorted(split)
