"""The scripts keep what a step needs on its device: on one that refuses those of the CPU they come to the same loss."""

import json

import pytest
import torch
from conftest import write_folder
from helpers import TINY, losses, run, train, tune, tuning, write_tuning
from two_devices import DEVICE, second_device

KINDS = {
    'ar': ['--optimizer=muon', '--ema_decay=0.9'],
    'diffusion': ['--architecture=diffusion', '--mode=documents', '--gradient_checkpointing'],
    'blocks': ['--architecture=diffusion', '--block_length=(4,)', '--ar_weight=2'],
    'sdd': ['--architecture=sdd', '--p_belief=((0,1),)'],
}
SAMPLERS = 'first_hitting ancestral confidence threshold remdm speculative'.split()


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder of letters, runs of each kind on the second device, and a folder of answers."""
    path = write_tuning(tmp_path_factory.mktemp('two'))
    write_folder(path / 'letters')
    with second_device():
        for kind, settings in KINDS.items():
            train(*settings, f'--dataset={path}/letters', f'--out_dir={path}/runs/{kind}')
    return path


def test_an_operation_on_tensors_of_both_devices_is_refused():
    with second_device():
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        assert there.device == DEVICE and (2 * there + torch.tensor(1.0)).sum().item() == 9
        assert (there.cpu() + here).device.type == 'cpu' and (there + here.to(DEVICE)).device == DEVICE
        with pytest.raises(RuntimeError, match=r"aten.add.Tensor got \[\('There', 3\), \('Tensor', 3\)\]"):
            there + here


@pytest.mark.parametrize('kind', KINDS)
def test_training_comes_to_the_losses_of_the_cpu(place, tmp_path, kind):
    train(*KINDS[kind], f'--dataset={place}/letters', f'--out_dir={tmp_path}/cpu')
    assert losses(place / 'runs' / kind) == pytest.approx(losses(tmp_path / 'cpu'), abs=1e-4)


@pytest.mark.parametrize('sampler', ['', *SAMPLERS])
def test_a_text_is_that_of_the_cpu(place, capsys, sampler):
    kind = 'ar' if not sampler else 'blocks' if sampler == 'speculative' else 'sdd'
    words = [f'--checkpoint={place}/runs/{kind}', '--num_samples=2', '--max_new_tokens=9', '--device=cpu']
    words += [f'--sampler={sampler}'] * bool(sampler) + ['--dtype=float32']
    run('sample.py', *words)
    expected = capsys.readouterr().out
    with second_device():
        run('sample.py', *words)
    assert capsys.readouterr().out == expected


def test_figures_are_those_of_the_cpu(place, tmp_path):
    words = [
        '--checkpoint=' + ','.join(f'{place}/runs/{kind}' for kind in KINDS),
        f'--judge={place}/runs/ar',
        '--draws=2',
    ]
    words += ['--metrics=perplexity,generation', '--max_tokens=100', '--num_samples=2', '--exact']
    words += ['--exact_rows=1', '--device=cpu', '--dtype=float32']
    run('evaluate.py', *words, f'--output={tmp_path}/cpu.json')
    with second_device():
        run('evaluate.py', *words, f'--output={tmp_path}/two.json')
    one, two = [json.loads((tmp_path / f'{name}.json').read_text())['models'] for name in ('cpu', 'two')]
    assert len(one) > len(KINDS)  # the `ar` half of a model of blocks too
    for here, there in zip(one, two, strict=True):
        numbers = {key: value for key, value in here.items() if isinstance(value, float)}
        assert {key: there[key] for key in numbers} == pytest.approx(numbers, rel=1e-6)


@pytest.mark.parametrize(
    'settings', [['--packing'], ['--use_peft', '--load_in_4bit'], ['--use_peft', '--load_in_8bit']]
)
def test_tuning_comes_to_the_losses_of_the_cpu(place, tmp_path, settings):
    words = tuning(place, 'ar', '--architecture=diffusion', '--max_steps=3', *settings)
    tune(*words, f'--out_dir={tmp_path}/cpu')
    with second_device():
        tune(*words, f'--out_dir={tmp_path}/two')
    assert losses(tmp_path / 'two') == pytest.approx(losses(tmp_path / 'cpu'), abs=1e-4)


def test_classifying_comes_to_the_losses_of_the_cpu(place, tmp_path):
    words = ['--architecture=diffusion', *TINY, '--target_func=fn_a', '--sequence_length=10']
    words += ['--train_set_size=20', '--test_set_size=40', '--batch_size=6', '--max_steps=3', '--no_wandb']
    words += ['--device=cpu', '--dtype=float32']
    run('classify.py', *words, f'--out_dir={tmp_path}/cpu')
    with second_device():
        run('classify.py', *words, f'--out_dir={tmp_path}/two')
    assert losses(tmp_path / 'two') == pytest.approx(losses(tmp_path / 'cpu'), abs=1e-4)
