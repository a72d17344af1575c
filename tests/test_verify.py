"""Check what `python -m lm.verify data/NAME` promises: any damage is found and named, or a card is written."""

import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, config_of, make_texts, write_jsonl

from lm import verify
from lm.configurator import UserError


@pytest.fixture
def folder(prepare, tmp_path):
    """A prepared folder that has masks too: those of plain texts, all 1."""
    texts = make_texts(60) + ['a long one ' * 99, 'x']
    source = write_jsonl(tmp_path / 'a.jsonl', texts)
    settings = ['--field=text', '--val_fraction=0.2', '--vocab_size=300', '--max_seq_len=1024']
    return prepare('instruct.py', f'--source={source}', *settings)


def change(folder, name, place, value, dtype):
    """One number of a file becomes another."""
    numbers = np.fromfile(folder / name, dtype)
    numbers[place] = value
    numbers.tofile(folder / name)


def test_a_folder_as_it_was_written_gets_its_card(folder, capsys):
    assert verify.main([str(folder)]) == 0
    said, sizes = capsys.readouterr().out, config_of(folder)['splits']
    for part in (
        'a.jsonl',
        "'max_seq_len': 1024",
        'bytes per token',
        f'{sizes["train"]["tokens"]:,}',
        'all is as it was written',
    ):
        assert part in said, part


def cut(folder, name, size):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:size])


def edit(folder, name, before, after):
    text = (folder / name).read_text()
    assert before in text
    (folder / name).write_text(text.replace(before, after))


DAMAGES = {
    'a token changed': (
        lambda f: change(f, 'train_tokens.bin', 5, 7, 'uint16'),
        'train_tokens.bin is not the file',
    ),
    'a mask changed': (lambda f: change(f, 'val_masks.bin', 0, 0, 'uint8'), 'val_masks.bin is not the file'),
    'masks gone': (lambda f: (f / 'val_masks.bin').unlink(), 'val_masks.bin has 0 bytes, config.json says'),
    'a file without hash': (
        lambda f: edit(f, 'config.json', '"val_masks.bin"', '"other"'),
        'val_masks.bin has no hash',
    ),
    'a file cut': (lambda f: cut(f, 'val_tokens.bin', 2), 'val_tokens.bin has 2 bytes, config.json says'),
    'a file gone': (lambda f: (f / 'train_index.bin').unlink(), 'train_index.bin has 0 bytes'),
    'another count of bytes': (
        lambda f: edit(f, 'config.json', '"bytes": ', '"bytes": 1'),
        'config.json was changed',
    ),
    'another count of tokens': (
        lambda f: edit(f, 'config.json', '"tokens": ', '"tokens": 1'),
        'bytes, config.json says',
    ),
    'a config cut': (lambda f: cut(f, 'config.json', 1), 'config.json is damaged'),
    'a tokenizer changed': (lambda f: edit(f, 'tokenizer.json', '{', ' {'), 'tokenizer.json is not the file'),
}


@pytest.mark.parametrize('case', DAMAGES)
def test_any_damage_is_named_and_makes_the_exit_status_1(folder, case, capsys):
    damage, words = DAMAGES[case]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} != before
    try:
        status = verify.main([str(folder)])
        said = capsys.readouterr().err
    except UserError as error:  # which ends the process with status 1
        status, said = 1, str(error)
    assert status == 1
    assert re.search(words, said), said


def test_the_command_exits_0_1_or_2(folder, capsys):
    command = [sys.executable, '-m', 'lm.verify', 'no/such/folder']
    missing = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert missing.returncode == 1 and 'Traceback' not in missing.stderr
    assert verify.main([]) == 2 and verify.main(['--help']) == 0
    change(folder, 'train_tokens.bin', 0, 9, 'uint16')
    change(folder, 'val_tokens.bin', 0, 9, 'uint16')
    capsys.readouterr()
    assert verify.main([str(folder)]) == 1
    said = capsys.readouterr()
    assert said.out == '' and said.err.count('error: ') == 2
