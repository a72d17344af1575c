"""--depth=N: one number sets shape, rows, steps and rates; what is given beside it stays."""

import json

import numpy as np
import pytest
from conftest import write_folder
from helpers import CPU, run, train

from lm import scaling
from lm.configurator import Config, UserError
from lm.folder import Folder


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with prepared data, letters/, and a run on it, run/."""
    path = tmp_path_factory.mktemp('depth')
    write_folder(path / 'letters')
    train(f'--dataset={path}/letters', f'--out_dir={path}/run')
    return path


def by_depth(place, out, *arguments):
    """The config.json of a run of a depth."""
    run('train.py', f'--dataset={place}/letters', f'--out_dir={out}', '--no_wandb', *CPU, *arguments)
    return json.loads((out / 'config.json').read_text())


def test_a_depth_sets_shape_batch_steps_and_rates(place, tmp_path):
    arguments = '--depth=2 --block_size=16 --eval_tokens=64 --max_steps=3'.split()
    config = by_depth(place, tmp_path / 'run', *arguments)
    assert [config[key] for key in ('n_layer', 'n_head', 'n_embd')] == [2, 2, 64]
    assert config['optimizer'] == 'muon' and config['schedule'] == 'linear'


def settings_of(place, *given, **values):
    """What a depth makes of the letters, beside those of the values that are given."""
    config = Config({})
    config.update(depth=4, max_steps=0, block_size=32, gradient_accumulation_steps=1, mode='packed')
    config.update({'architecture': 'ar', 'block_length': (0,), **values})
    config.given.update(given)
    return scaling.settings(config, Folder(place / 'letters'), world_size=1)


def test_longer_runs_have_more_tokens_in_a_step_and_lower_rates(place):
    def settings(max_steps, **values):
        return settings_of(place, 'max_steps', max_steps=max_steps, **values)

    short, long, deep = settings(1000), settings(100_000), settings(1000, depth=8)
    assert long['batch_size'] > short['batch_size'] and long['learning_rate'] < short['learning_rate']
    assert deep['learning_rate'] < short['learning_rate'] and deep['n_embd'] > short['n_embd']
    assert settings(0)['max_steps'] == settings(-1)['max_steps'] > 10  # as the depth says
    rows, blocks = (settings(1000, architecture='diffusion', block_length=(n,)) for n in (0, 4))
    assert rows['learning_rate'] > short['learning_rate'] == blocks['learning_rate']  # whole rows want more


@pytest.mark.faults
def test_a_depth_has_its_number_of_tokens_whatever_the_rows_of_a_step(place, tmp_path, capsys):
    by_default, by_rows = settings_of(place), settings_of(place, 'batch_size', batch_size=5)
    tokens = by_default['max_steps'] * by_default['batch_size']
    assert by_rows['max_steps'] * 5 == pytest.approx(tokens, rel=0.02)
    by_depth(place, tmp_path / 'run', *'--depth=1 --max_steps=1 --decay_embedding=False'.split())
    assert 'no effect' not in capsys.readouterr().out


@pytest.mark.parametrize('mode', ['packed', 'documents'])
def test_a_little_text_is_gone_through_a_few_times_only_unless_the_steps_are_given(place, capsys, mode):
    def epochs(*given, **values):
        found = settings_of(place, *given, mode=mode, **values)
        lengths = np.diff(Folder(place / 'letters').index['train'])  # of the texts
        rows = {'packed': lengths.sum() / 32, 'documents': np.ceil(lengths / 31).sum()}
        return found['max_steps'] * found['batch_size'] / rows[mode]

    assert epochs() == pytest.approx(5, rel=0.05)
    assert 'it does so 5 times' in capsys.readouterr().out
    assert epochs(architecture='diffusion') == pytest.approx(40, rel=0.05)
    assert epochs(depth=1, architecture='diffusion') < 30  # as many as its size asks for
    capsys.readouterr()
    assert epochs('max_steps', max_steps=5000) > 100
    assert not capsys.readouterr().out


def test_the_embedding_is_decayed_where_a_text_is_gone_through_often(place):
    settings = lambda epochs: settings_of(
        place, 'max_steps', 'batch_size', batch_size=34, max_steps=5 * epochs
    )
    assert [settings(epochs)['decay_embedding'] for epochs in (1, 5)] == [False, True]  # of 168 rows


def test_what_is_given_beside_a_depth_stays_and_so_does_all_of_it_on_resume(place, tmp_path):
    arguments = '--depth=1 --block_size=16 --eval_tokens=64 --max_steps=3 --batch_size=3 --learning_rate=0.5'
    config = by_depth(place, tmp_path / 'run', *arguments.split(), '--n_embd=16', '--n_head=1')
    assert [config[key] for key in ('batch_size', 'learning_rate', 'n_embd', 'n_layer')] == [3, 0.5, 16, 1]
    again = by_depth(place, tmp_path / 'run', f'--resume_from={tmp_path}/run', '--max_steps=4')
    kept = set(config) - {'max_steps', 'resume_from', 'out_dir'}
    assert {key: again[key] for key in kept} == {key: config[key] for key in kept}


def test_a_depth_does_not_go_with_another_shape_or_weights(place):
    for other in ('--model_size=small', f'--init_from={place}/run', '--depth=0', '--num_epochs=2'):
        with pytest.raises(UserError, match='depth'):
            run('train.py', f'--dataset={place}/letters', '--depth=1', other)
