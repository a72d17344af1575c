"""The process that a script runs in, and the metrics that it computes."""

import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import random_model, signals_kept

from lm import configurator, lora, quantize, runtime
from lm.configurator import ROOT, UserError
from lm.data import Batch

SHAPE = dict(vocab_size=30, block_size=16, n_layer=2, n_head=2, n_embd=16, mask_id=28, ignore_id=29)
CPU = torch.device('cpu')


# ---------------------------------------------------------------------------- device and precision


@pytest.mark.parametrize(
    'call, expected',
    [
        (lambda: runtime.pick_device('gpu'), "device is 'gpu'; choose auto, cpu, cuda"),
        (lambda: runtime.pick_device('meta'), "device is 'meta', but PyTorch finds none .*--device=cpu"),
        (lambda: runtime.pick_dtype('int8', CPU), "dtype is 'int8'; choose auto, bfloat16"),
    ],
)
def test_a_name_that_cannot_be_is_refused(call, expected):
    with pytest.raises(UserError, match=expected):
        call()


def test_auto_is_a_device_and_a_precision_that_it_has(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with monkeypatch.context() as patch, pytest.raises(UserError, match='device=cuda:0 is for one process'):
        patch.setattr(torch.cuda, 'is_available', lambda: True)
        runtime.pick_device('cuda:0')
    assert runtime.pick_device('auto').type in ('cpu', 'cuda', 'mps')
    monkeypatch.setattr(runtime, 'has_bfloat16', lambda device: True)
    assert runtime.pick_dtype('auto', CPU) == 'bfloat16'
    monkeypatch.setattr(runtime, 'has_bfloat16', lambda device: False)
    assert runtime.pick_dtype('auto', CPU) == 'float32'
    assert runtime.pick_dtype('auto', torch.device('cuda')) == 'float16'  # an older GPU


def test_autocast_computes_in_the_precision_that_was_picked():
    for name, dtype in (('float32', torch.float32), ('bfloat16', torch.bfloat16)):
        dist = runtime.Runtime('cpu', name)
        with dist.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
        assert not dist.scaler().is_enabled()
    assert runtime.Runtime('cpu', 'float16').scaler().is_enabled()


def test_dropout_is_seeded_by_each_part_of_its_key():
    def draw(*key):
        runtime.seed_dropout(*key)
        return torch.rand(4).tolist()

    keys = [(0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 0, 0), (0, 0, 0, 0)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    assert draw(*keys[0]) == draw(*keys[0])


@pytest.mark.faults
def test_an_environment_that_cannot_be_is_a_sentence(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UserError, match='WORLD_SIZE is 2 without a RANK; use torchrun, or unset WORLD_SIZE.'):
        runtime.Runtime('cpu')
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('RANK_TIMEOUT', '15m')
    with pytest.raises(UserError, match="RANK_TIMEOUT is '15m'; give a number of seconds."):
        runtime.Runtime('cpu')


# ---------------------------------------------------------------------------- number of steps

SCRIPTS = ('train.py', 'finetune.py', 'classify.py')


def planned(script, *words, saved=None):
    """Return (max_steps, warm-up) of a script's settings for 1000 rows, 10 per step, and what it saves."""
    source = (configurator.ROOT / script).read_text()
    namespace = {'__file__': configurator.ROOT / script}
    exec(source[source.index('# --- ') : source.index('config = configure')], namespace)
    config = configurator.configure(namespace, words)
    configurator.restore(namespace, config, saved or {})
    steps = runtime.plan_steps(config, 1000, 10)
    config.update(max_steps=steps[0])
    return steps, dict(config)


def test_a_tenth_of_an_epoch_is_no_step_too_many():
    config = dict(max_steps=None, num_epochs=1.1, warmup_steps=0, warmup_ratio=None)  # a bit more than 1.1
    assert runtime.plan_steps(config, 3200, 32)[0] == 110


@pytest.mark.faults
@pytest.mark.parametrize('script', SCRIPTS)
def test_the_later_of_two_settings_that_compete_wins_and_is_saved(script, tmp_path, monkeypatch):
    (tmp_path / 'base.py').write_text('max_steps = 1200\nwarmup_steps = 7')
    base = f'{tmp_path}/base.py'
    for words, expected in [
        ([base], (1200, 7)),
        ([base, '--num_epochs=0.05'], (5, 7)),
        (['--num_epochs=2', base], (1200, 7)),
        ([base, '--warmup_ratio=0.1'], (1200, 120)),
        (['--warmup_ratio=0.1', '--warmup_steps=3', '--max_steps=50'], (50, 3)),
        (['--num_epochs=2', '--max_steps=-1', '--warmup_steps=3'], (200, 3)),
    ]:
        steps, saved = planned(script, *words)
        assert steps == expected
        assert planned(script, saved=saved)[0] == expected  # a run that is resumed
    _, longer = planned(script, '--max_steps=300', saved=planned(script, '--num_epochs=2')[1])
    assert planned(script, saved=longer)[0][0] == 300  # and one that was made longer before
    assert planned(script, '--num_epochs=4', saved=longer)[0][0] == 400


# ---------------------------------------------------------------------------- speed and memory


def test_operations_per_token_are_those_of_the_matmuls():
    model = random_model('ar', 0.1, **SHAPE)
    layers, head = (2 * 12 + 1) * 16**2, 64 * 16
    assert runtime.flops_per_token(model) == 6 * (layers + head) + 12 * 2 * 16 * 16
    untied = random_model('ar', 0.1, **SHAPE, tied=False, position='learned')
    assert runtime.flops_per_token(untied) == runtime.flops_per_token(model)  # tables cost nothing


@pytest.mark.faults
def test_operations_are_counted_where_they_are_made():
    model, tokens = random_model('sdd', 0.1, **SHAPE), 16
    layers, head, attention = (
        (2 * 12 + 1) * 16**2 + 16**2,
        64 * 16,
        2 * 16 * tokens,
    )  # with the belief's matrix
    forward = 2 * (layers + head / 4) + 4 * attention
    expected = 3 * forward + 1.5 * forward  # a quarter of the tokens get logits
    assert runtime.flops_per_token(model, tokens, predicted=0.25, passes=1.5) == expected

    blocks = random_model('diffusion', 0.1, block_length=(4,), ar_weight=1.0, **SHAPE)
    forward = (
        2 * (2 * (2 * 12 + 1) * 16**2 + head * (0.25 + 1)) + 4 * 4 * attention
    )  # a row of twice the length
    assert runtime.flops_per_token(blocks, tokens, predicted=0.25) == 3 * forward
    whole = random_model('diffusion', 0.1, ar_weight=1.0, **SHAPE)
    whole.noisy_blocks = 2, 0  # of whole rows nothing is left out
    assert runtime.flops_per_token(whole, tokens, predicted=0.25) == 3 * forward
    blocks.noisy_blocks = 2, 0
    forward = 2 * (1.5 * (2 * 12 + 1) * 16**2 + head * (0.25 + 1)) + 1.5**2 * 4 * attention
    assert runtime.flops_per_token(blocks, tokens, predicted=0.25) == 3 * forward

    model = random_model('ar', 0.1, **SHAPE)
    before = runtime.flops_per_token(model)
    model.requires_grad_(False)
    frozen = runtime.flops_per_token(model)
    assert frozen == before - 2 * ((2 * 12 + 1) * 16**2 + head)
    for bits in (4, 8):
        base = random_model('ar', 0.1, **SHAPE).requires_grad_(False)
        quantize.quantize(base, bits)
        assert runtime.flops_per_token(base) == frozen
    lora.add_lora(model, rank=2, alpha=2)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert runtime.flops_per_token(model) == frozen + 6 * adapters


@pytest.mark.faults
def test_mfu_is_of_the_logits_and_passes_that_there_were(monkeypatch):
    monkeypatch.setattr(runtime, 'measure_peak_flops', lambda device, dtype: 1.0)
    model, dist = random_model('sdd', 0.1, **SHAPE), runtime.Runtime('cpu', 'float32')
    speed = runtime.Speed(model, dist, 64, 0, 16)
    speed.count({'predicted': torch.tensor(20), 'ignore_targets': torch.tensor(4), 'count': 60})
    speed.count({'predicted': torch.tensor(8), 'count': 60}, k=2, passes=3, stale=0.1)
    values = speed.metrics(2)
    flops = values['train/mfu'] / values['train/tokens_per_sec']
    assert flops == pytest.approx(runtime.flops_per_token(model, 16, predicted=32 / 128, passes=1.5))


def test_the_peak_is_that_of_a_matmul():
    assert 1e8 < runtime.measure_peak_flops(CPU, 'float32') < 1e15


@pytest.mark.parametrize('kind, share', [('weights', 3), ('gradients', 2), ('optimizer', 2)])
def test_the_memory_estimate_knows_weights_in_bfloat16(kind, share):
    dist, estimates = runtime.Runtime('cpu', 'bfloat16'), []
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model('ar', 0.1, **{**SHAPE, 'n_embd': 64}).to(dtype)
        estimates.append(runtime.memory_estimate(model, 4, 16, dist)[kind])
    assert estimates[0] == pytest.approx(share * estimates[1], rel=0.05)  # autocast copies float32 weights


# ---------------------------------------------------------------------------- metrics


def test_means_are_over_the_counted_tokens_and_accuracy_over_the_predicted():
    sums = {'loss': 20.0, 'count': 10.0, 'correct': 3.0, 'predicted': 4.0}
    assert runtime.means('train', sums) == {
        'train/loss': 2.0,
        'train/perplexity': math.exp(2.0),
        'train/accuracy': 0.75,
    }
    assert runtime.means('val', {'loss': 0.0, 'count': 0.0})['val/loss'] == 0.0  # a step without loss
    assert runtime.means('val', {'loss': 1e9, 'count': 1.0})['val/perplexity'] < math.inf


def test_recall_and_precision_of_padding_are_of_training_and_the_loss_of_text_of_evaluation():
    sums = dict(loss=20.0, count=10.0, ignore_correct=2.0, ignore_targets=8.0, ignore_guesses=4.0)
    sums['loss_without_padding'] = 5.0
    train, val = runtime.means('train', sums), runtime.means('val', sums)
    assert (train['train/ignore_acc'], train['train/ignore_precision']) == (0.25, 0.5)
    assert val['val/loss_without_padding'] == 0.5 and not {'val/ignore_acc', 'train/loss_without_padding'} & {
        *train,
        *val,
    }
    without = runtime.means('val', {**sums, 'ignore_targets': 0.0})
    assert set(without) == {'val/loss', 'val/perplexity'}


def test_a_metric_of_ones_own_is_a_mean_over_the_counted_tokens_under_its_name():
    values = runtime.means('train', {'loss': 20.0, 'count': 10.0, 'entropy': 5.0})
    assert values['train/entropy'] == 0.5
    sums = {}
    for _ in range(2):
        runtime.add(sums, torch.tensor(1.0), torch.tensor(2), {'entropy': torch.tensor(3.0)})
    assert sums == {'loss': 2.0, 'count': 4.0, 'entropy': 6.0}


class Batches(list):
    num_bytes = 25.0


@pytest.mark.parametrize('architecture', ['ar', 'sdd'])
def test_evaluation_sums_over_batches_of_any_size(architecture):
    model = random_model(architecture, 0.4, **SHAPE).train()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 28, (5, 16), generator=generator)
    noise = torch.rand(5, 17, generator=generator)
    dist = runtime.Runtime('cpu', 'float32')
    parts = [Batch(tokens[i], None, noise[i]) for i in (slice(0, 1), slice(1, 5))]
    split, whole = (
        runtime.evaluate(model, Batches(batches), dist) for batches in (parts, [Batch(tokens, None, noise)])
    )
    assert split == pytest.approx(whole, rel=1e-5) and model.training
    assert split['val/bpb'] == pytest.approx(split['val/loss'] / math.log(2) * 75 / 25)
    assert ('val/loss_k0' in split) == model.has_beliefs
    assert split.get('val/loss_k0') != split['val/loss']


def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_do():
    runtime.check_finite(1.0, 3, 0.1)
    for loss in (math.nan, math.inf):
        with pytest.raises(UserError, match=f'The loss is {loss} at step 3.*lower learning_rate than 0.1'):
            runtime.check_finite(loss, 3, 0.1)


# ---------------------------------------------------------------------------- signals


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_first_signal_is_noted_and_the_second_ends_the_process(monkeypatch, number):
    exits = []
    monkeypatch.setattr(os, '_exit', exits.append)
    with signals_kept():
        stop = runtime.StopSignal()
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stop.received == number.name and exits == []
        os.kill(os.getpid(), number)  # as both Slurm and torchrun hand one on
        assert exits == []
        stop.time -= runtime.TOGETHER
        os.kill(os.getpid(), number)
        assert exits == [128 + number]


@pytest.mark.faults
def test_a_closed_terminal_is_a_signal_to_save_however_often_it_says_so(monkeypatch):
    exits = []
    monkeypatch.setattr(os, '_exit', exits.append)
    with signals_kept():
        stop = runtime.StopSignal()
        for _ in range(2):  # the kernel's and the shell's
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == 'SIGHUP' and exits == []
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        runtime.StopSignal()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# ---------------------------------------------------------------------------- settings


def test_windows_is_told_to_use_wsl():
    code = "import sys; sys.platform = 'win32'; import lm"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert (
        done.returncode == 1 and 'on Windows run it in WSL' in done.stderr and 'Traceback' not in done.stderr
    )


def test_settings_that_cannot_be_are_refused_and_those_that_can_are_not():
    config = configurator.Config({})
    config.update(optimizer='muon', dtype='auto', fsdp=True, save_total_limit=0, ema_decay=0.9, use_peft=True)
    config.update(schedule='cosine', resume_from='run', out_dir='', no_wandb=True, device='cpu')
    runtime.check_settings(config)
    config['dtype'] = 'float16'
    with pytest.raises(UserError, match='fsdp does not go with dtype=float16; give --dtype=float32'):
        runtime.check_settings(config)
    config.update(dtype='auto', warmup_ratio=5.0)  # of which the peak would never be reached
    with pytest.raises(UserError, match='warmup_ratio is 5.0; it must be at least 0 and below 1'):
        runtime.check_settings(config)
