"""Prepared folders: damage is named in one sentence, and mixes know their weights."""

import json
import multiprocessing
from functools import partial

import pytest
from conftest import letter_tokenizer, write_folder

from lm import checkpoints
from lm.configurator import ROOT, UserError
from lm.folder import Folder, is_of, open_dataset, prepared


def test_an_opened_folder_has_its_texts_by_document(make_folder):
    folder = Folder(make_folder(val=['abc', '', 'de']))
    end = folder.tokenizer.endoftext_id
    assert folder.index['val'].tolist() == [0, 4, 5, 8] and folder.masks['val'] is None
    expected = [*folder.tokenizer.encode('abc'), end, end, *folder.tokenizer.encode('de'), end]
    assert folder.tokens['val'].tolist() == expected
    assert folder.counted_tokens_per_byte('val') == 8 / 5


def test_bytes_are_counted_of_the_text_in_the_loss(make_folder):
    folder = Folder(make_folder(val=['abc', 'ad'], train_on='ad'))
    assert folder.counted_tokens_per_byte('val') == 1  # a, a, d
    assert Folder(make_folder('none', train_on='')).counted_tokens_per_byte('val') is None


@pytest.mark.faults
def test_ends_that_are_padding_are_no_tokens_of_the_text(make_folder):
    for folder in (
        Folder(make_folder(val=['abc', 'de'])),
        Folder(make_folder('some', val=['abc', 'ad'], train_on='ad')),
    ):
        folder.tokenizer.ignore_id = folder.tokenizer.endoftext_id
        assert folder.counted_tokens_per_byte('val') == 1


@pytest.mark.parametrize('size, documents', [(3, [0, 3]), (4, [0, 4]), (6, [0, 4, 6])])
def test_unique_tokens_are_the_first_of_the_training_split(make_folder, size, documents):
    path = make_folder(train=['abc', 'de', 'abc'], val=['abc'])
    whole, part = open_dataset(path), open_dataset(path, unique_tokens=size)
    assert part.tokens['train'].tolist() == whole.tokens['train'][:size].tolist()
    assert part.index['train'].tolist() == documents
    assert part.tokens['val'].tolist() == whole.tokens['val'].tolist()
    with pytest.raises(UserError, match='unique_tokens is 99; .* has 11 for training'):
        open_dataset(path, unique_tokens=99)


# ---------------------------------------------------------------------------- what cannot be read

DAMAGE = {  # the file, what it becomes, what the error says
    'no config': ('config.json', None, 'has no config.json: move it away'),
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
        Folder(folder)
    assert expected in str(error.value) and '\n' not in str(error.value)
    assert str(folder) in str(error.value)
    assert 'prepare' in str(error.value) or 'give a' in str(error.value)


def test_masks_that_are_lost_are_missed(make_folder):
    folder = make_folder(train_on='e')
    (folder / 'val_masks.bin').unlink()
    with pytest.raises(UserError, match='val_masks.bin has 0 bytes, config.json says '):
        Folder(folder)


def test_a_missing_folder_is_named_with_the_remedy():
    with pytest.raises(UserError, match="'nowhere'.*python prepare/stories.py"):
        Folder('nowhere')


# ---------------------------------------------------------------------------- mixes


@pytest.fixture
def mix(make_folder, tmp_path):
    """Opens a mix of the folders a and b, written with settings of their own."""

    def make(weights, **settings):
        for name in 'ab':
            make_folder(name, **settings.get(name, {}))
        return open_dataset(','.join(f'{tmp_path}/{part}' for part in weights.split(',')))

    return make


@pytest.mark.parametrize(
    'weights, words',
    [
        ('a:0.7,b', 'no weight above 0'),
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
    expected = 'different tokenizers, of 30 and 6 tokens.*the second with --tokenizer='
    with pytest.raises(UserError, match=expected):
        mix('a:0.5,b:0.5', b={'letters': 'ab ', 'train': ['ab'], 'val': ['ab']})


def test_other_scripts_say_that_they_take_one_folder(mix):
    with pytest.raises(UserError, match='mixes folders, which is for train.py; name one'):
        Folder('a:0.5,b:0.5')


def test_the_format_of_a_mix_is_that_of_the_folder_that_has_one(mix, tmp_path):
    folder = mix('a:1,b:2')
    assert folder.config['prompt_format'] is None and folder.config['max_seq_len'] == 0
    for name, changes in (('a', {'max_seq_len': 24}), ('b', {'prompt_format': '{instruction}{output}'})):
        path = tmp_path / name / 'config.json'
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    config = open_dataset(f'{tmp_path}/a:1,{tmp_path}/b:2').config
    assert (config['prompt_format'], config['max_seq_len']) == ('{instruction}{output}', 24)
    assert config['name'] == 'a+b'


@pytest.mark.faults
def test_a_folder_says_which_file_or_data_set_of_the_hub_it_is_of(tmp_path):
    folder, config = write_folder(tmp_path / 'some'), tmp_path / 'some/config.json'
    hub = 'https://huggingface.co/datasets/a/b'
    for source, name in ((hub, 'a/b'), (f'{hub}/part', 'a/b:part'), ('my.json', 'my.json')):
        config.write_text(json.dumps({**json.loads(config.read_text()), 'source': source}))
        assert is_of(folder, name) and not is_of(folder, 'a/c')
    assert not is_of(tmp_path / 'moved', 'my.json')


@pytest.mark.faults
def test_runs_that_start_together_prepare_a_file_once(tmp_path, monkeypatch):
    monkeypatch.setattr('lm.folder.ROOT', tmp_path)
    (tmp_path / 'prepare').symlink_to(ROOT / 'prepare')
    records = tmp_path / 'my.json'
    records.write_text(json.dumps([{'instruction': f'Say {i}.', 'output': f'{i}'} for i in range(40)]))
    context = multiprocessing.get_context('fork')
    with context.Pool(2) as pool:
        args = str(records), '', 64, partial(str, 'bytes')
        first, second = pool.starmap(prepared, [args, args], chunksize=1)
    assert first == second and is_of(first, str(records))


@pytest.mark.parametrize('path, wanted', [('scratch', ''), ('DIR/from-scratch', 'DIR/from-scratch')])
def test_data_are_prepared_with_the_tokenizer_of_the_start(path, wanted, tmp_path):
    (tmp_path / 'from-scratch').mkdir()
    path, wanted = (text.replace('DIR', str(tmp_path)) for text in (path, wanted))
    assert checkpoints.tokenizer_of(path, None, None) == wanted
