"""Configuration files and command lines of published systems, as they were written."""

import json
import shutil

import pytest
import torch
from conftest import write_folder
from helpers import ASCII, CPU, load, run, write_base
from test_configurator import write

from lm import configurator
from lm.configurator import ROOT, UserError
from lm.folder import Folder

TRL = """
model_name: facebook/opt-350m
dataset_name: timdettmers/openassistant-guanaco
dataset_text_field: text
learning_rate: 1.41e-5
batch_size: 64
seq_length: 512
gradient_accumulation_steps: 16
num_train_epochs: 3
max_steps: -1
load_in_8bit: false
load_in_4bit: false
logging_steps: 1
save_steps: 100
save_total_limit: 10
use_peft: no
peft_lora_r: 64
peft_lora_alpha: 16
trust_remote_code: false
use_auth_token: true
output_dir: output
push_to_hub: false
hub_model_id: null
gradient_checkpointing: false
gradient_checkpointing_kwargs: null
"""
MSML = """
base_model: Qwen/Qwen2.5-14B-Instruct
max_steps: 1000
learning_rate: 2e-5
save_steps: 50
training_method: full
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
num_processes: 4
"""
CASCADE = """{
  "checkpoints": {"prefix": "/x/checkpoints", "training": "/x/checkpoints", "is_medium": false},
  "tokenizers": {"prefix": "/x/tokenizers"},  // of all languages
  "hf_cache": "/x/cache", "random_seed": 7, "cpu_only": true,
  "task": "sentiment",
  "hyperparameters": {"epochs": 2, "learning_rate": 2.5e-5, "warmup_ratio": 0.05, "batch_size": 32},
  "wandb": {"entity": "someone", "config": {}, "project": "finetuning"}
}"""


def settings_of(script, *words):
    """Return the Config that a script makes of a command line, without running it."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            configurator, 'configure', lambda *call, real=configurator.configure: found.append(real(*call))
        )
        configurator.configs_of(configurator.ROOT / script, [list(words)])
    return found[0]


@pytest.mark.faults
def test_files_of_published_systems_are_read_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = settings_of('finetune.py', write('config.yml', TRL))
    values = {
        key: config[key] for key in ('init_from', 'num_epochs', 'block_size', 'log_every', 'save_every')
    }
    assert values == dict(
        init_from='facebook/opt-350m', num_epochs=3.0, block_size=512, log_every=1, save_every=100
    )
    assert config['max_steps'] <= 0 and config['use_peft'] is False and config['learning_rate'] == 1.41e-5
    notes = capsys.readouterr().out
    assert 'use_auth_token=True in config.yml has no effect here; HF_TOKEN' in notes
    assert 'push_to_hub=False in config.yml has no effect here; `hf upload`' in notes
    assert (config['dataset'], config['field']) == ('timdettmers/openassistant-guanaco', 'text')
    config = settings_of('finetune.py', write('msml.yaml', MSML))
    assert (config['batch_size'], config['use_peft'], config['save_every']) == (1, False, 50)
    assert 'torchrun --nproc_per_node' in capsys.readouterr().out
    words = [write('default.json', CASCADE), '--train-langs', 'rus', 'pol', '--model-type', 'ipa']
    config = settings_of('classify.py', *words)
    values = [config[key] for key in ('checkpoint_prefix', 'seed', 'device', 'wandb_project', 'num_epochs')]
    assert values == ['/x/checkpoints', 7, 'cpu', 'finetuning', 2.0] and config['train_langs'] == 'rus,pol'
    assert 'HF_HOME' in capsys.readouterr().out
    common = write('common.yaml', 'seed: 3\ntemperature: 0.5\ndevice: cpu')
    for script in ('sample.py', 'evaluate.py'):
        assert settings_of(script, common)['temperature'] == 0.5


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a base model, base/."""
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / 'base', 'ar')
    return tmp_path


@pytest.fixture
def prepared_folders():
    """Take away what a run has prepared by itself."""
    before = set((ROOT / 'data').glob('rows-*'))
    yield
    for folder in set((ROOT / 'data').glob('rows-*')) - before:
        shutil.rmtree(folder)


@pytest.mark.faults
def test_a_run_prepares_the_data_set_that_its_file_names_once(place, prepared_folders, capfd):
    rows = [{'text': f'### Human: say {i}### Assistant: ' + 'it is so. ' * (i % 9)} for i in range(80)]
    (place / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    config = TRL.replace('timdettmers/openassistant-guanaco', 'rows.jsonl').replace(
        'facebook/opt-350m', 'base'
    )
    for before, after in (
        (': 64\n', ': 4\n'),
        ('512', '32'),
        ('16\n', '2\n'),
        ('-1', '1'),
        ('save_steps: 100', 'save_steps: 1'),
    ):
        config = config.replace(before, after)
    (place / 'config.yml').write_text(config)
    run('finetune.py', 'config.yml', *CPU)
    checkpoint = load(place / 'output')
    assert checkpoint['global_step'] == 1 and (place / 'output/checkpoints/checkpoint-1/ckpt.pt').exists()
    folder = Folder(checkpoint['train_config']['dataset'])
    assert folder.masks['train'].all() and folder.config['max_seq_len'] == 32
    assert '0 that could not be read' in capfd.readouterr().out
    times = [path.stat().st_mtime_ns for path in sorted(folder.path.iterdir())]
    run('finetune.py', 'config.yml', '--overwrite', *CPU)
    assert times == [path.stat().st_mtime_ns for path in sorted(folder.path.iterdir())]


@pytest.mark.faults
@pytest.mark.parametrize('name', ['nothing', 'nothing.jsonl'])
def test_a_data_set_that_is_nowhere_is_named(place, name):
    with pytest.raises(UserError, match=f"There is no prepared data at '{name}'"):
        run('finetune.py', f'--dataset_name={name}', '--model_name=base', *CPU)


@pytest.mark.faults
def test_an_architecture_that_contradicts_the_checkpoint_is_refused_and_one_that_completes_it_is_taken(place):
    write_folder(place / 'data', letters=ASCII)
    sample = ['sample.py', '--checkpoint=base', '--max_new_tokens=3', '--device=cpu']
    evaluate = ['evaluate.py', '--checkpoint=base', '--dataset=data', '--metrics=accuracy', '--device=cpu']
    for script in (sample, evaluate):
        with pytest.raises(UserError, match="holds architecture='ar', not 'sdd'"):
            run(*script, '--architecture=sdd')
    saved = load(place / 'base')
    del saved['architecture']
    torch.save(saved, place / 'base/ckpt.pt')
    for script in (sample, evaluate):
        with pytest.raises(UserError, match='lacks architecture'):
            run(*script)
        run(*script, '--architecture=ar')


@pytest.mark.faults
def test_a_setting_that_an_architecture_does_not_have_is_reported_by_every_script(place, capsys):
    write_folder(place / 'data', letters=ASCII)
    train = ['train.py', '--dataset=data', '--max_steps=1', '--out_dir=run', '--k_warmup_steps=2', *CPU]
    run(*train, '--mask_ratio=(0.2,0.8)', '--model_size=tiny')
    assert {
        'note: k_warmup_steps=2 has no effect on ar.',
        'note: mask_ratio=(0.2, 0.8) has no effect on ar.',
    } <= {*capsys.readouterr().out.splitlines()}
    run(*train, '--mask_ratio=(0.2,0.8)', '--architecture=diffusion', '--overwrite')
    assert (
        'k_warmup_steps=2 has no effect on diffusion.' in (out := capsys.readouterr().out)
        and 'mask_ratio' not in out
    )
    run(
        'evaluate.py',
        '--checkpoint=base',
        '--dataset=data',
        '--metrics=accuracy',
        '--draws=2',
        '--device=cpu',
    )
    assert 'note: draws=2 has no effect on ar.' in capsys.readouterr().out
