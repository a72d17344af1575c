"""The files in config/ and the commands in README.md."""

import re
import runpy
import sys

import pytest
import torch

from lm import checkpoints, runtime
from lm.configurator import ALIASES, ROOT, Config, apply_file, keys_of

CONFIGS = sorted(path.name for path in (ROOT / 'config').glob('*.py'))
SWEEPS = [name for name in CONFIGS if name.startswith(('sweep_', 'language_pairs'))]
SIZES = [name for name in CONFIGS if re.fullmatch(r'(small|medium|large|xl)_(owt|tinystories)\.py', name)]


def config_of(script):
    """The settings of a script, of which a recipe changes some."""
    source = (ROOT / script).read_text()
    defaults = {}
    exec(source[source.index('# --- ') : source.index('config = configure(')], defaults)
    return Config(keys_of(source, defaults))


@pytest.mark.parametrize('recipe', sorted({*CONFIGS} - {*SWEEPS}))
def test_a_recipe_sets_what_its_script_knows(recipe):
    script = 'finetune.py' if recipe.startswith(('sft_', 'finetune_')) else 'train.py'
    config = config_of(script)
    apply_file(config, f'config/{recipe}')
    assert (
        config.given
        and config['optimizer'] in runtime.CHOICES['optimizer']
        and config['schedule'] in runtime.CHOICES['schedule']
    )
    checkpoints.size_of(config['model_size'])


@pytest.mark.parametrize('recipe', SWEEPS)
def test_a_sweep_sets_what_its_script_knows(recipe, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['sweep.py', f'config/{recipe}', '--dry_run'])
    runpy.run_path(str(ROOT / 'sweep.py'), run_name='__main__')
    *runs, count = capsys.readouterr().out.splitlines()
    assert len(runs) > 1 and count == f'{len(runs)} runs'
    for run in runs:
        script = re.match(r'python (\S+) ', run)[1]
        assert set(re.findall(r'--(\w+)=', run)) <= set(config_of(script)), run


@pytest.mark.parametrize('recipe', SIZES)
def test_a_recipe_has_as_many_parameters_as_it_says(recipe):
    config = config_of('train.py')
    apply_file(config, f'config/{recipe}')
    shape = checkpoints.size_of(config['model_size'])
    with torch.device('meta'):
        model = checkpoints.make_model('ar', vocab_size=32000, block_size=config['block_size'], **shape)
    said = float(re.search(r'([\d.]+)M parameters', (ROOT / 'config' / recipe).read_text())[1]) * 1e6
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(said, abs=0.05e6)


def test_there_is_a_recipe_for_each_size_and_both_data_sets():
    assert len(SIZES) == 8


def test_the_xl_recipe_checkpoints_and_accumulates():
    config = config_of('train.py')
    apply_file(config, 'config/xl_owt.py')
    assert (config['block_size'], config['gradient_accumulation_steps']) == (1024, 4)
    assert config['gradient_checkpointing'] and config['dtype'] == 'bfloat16'
    assert config['min_lr'] == config['learning_rate'] / 10 == 4e-4 / 10


def test_each_alias_leads_to_a_key():
    scripts = 'train.py finetune.py classify.py evaluate.py'.split()
    assert {key for _, key, _ in ALIASES} <= {key for script in scripts for key in config_of(script)}


def test_the_readme_speaks_of_files_and_settings_that_exist(capsys, monkeypatch):
    readme = (ROOT / 'README.md').read_text()
    monkeypatch.setattr(sys, 'path', list(sys.path))
    for script, options in re.findall(r'python ((?:prepare/|benchmarks/)?\w+\.py)([^\n#]*)', readme):
        assert (ROOT / script).is_file(), script
        monkeypatch.setattr(sys, 'argv', [script, '--help'])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name='__main__')
        known = capsys.readouterr().out
        for recipe in re.findall(r'config/\w+\.py', options):
            assert (ROOT / recipe).is_file(), recipe
        for key in set(re.findall(r'--(\w+)', options)) - {'help'}:
            assert re.search(rf'--{key}\b', known), f'{script} --{key}'
