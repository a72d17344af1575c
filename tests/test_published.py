"""Configuration files and command lines of published systems, as they were written."""

import pytest
from test_configurator import write

from lm import configurator

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
        configurator.check_arguments(configurator.ROOT / script, [list(words)])
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
    assert config['hub_model_id'] == ''
    assert config['max_steps'] <= 0 and config['use_peft'] is False and config['learning_rate'] == 1.41e-5
    notes = capsys.readouterr().out
    assert 'use_auth_token=True in config.yml has no effect here; HF_TOKEN' in notes
    assert 'prepare/instruct.py --source is for that' in notes
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
