"""What runtime.py, checkpoints.py and optim.py promise: run folders, logs, optimizers, schedules, averages."""

import math
import os
import signal
import sys

import pytest
import torch
from conftest import letter_tokenizer, signals_kept

from lm import checkpoints, files, optim, runtime
from lm.configurator import UserError
from model import Autoregressive, Diffusion, ModelConfig

TINY = dict(vocab_size=30, block_size=16, n_layer=2, n_head=2, n_embd=32, mask_id=28, ignore_id=29)
GPT2 = dict(norm='layer', position='learned', mlp='gelu', bias=True, qk_norm=False, logit_softcap=0.0)


def tiny_checkpoint(**changes):
    model = Autoregressive(ModelConfig(**TINY))
    return {
        'architecture': 'ar',
        'model_config': vars(model.config),
        'model_state_dict': model.state_dict(),
        'tokenizer': letter_tokenizer().to_json(),
        **changes,
    }


# ---------------------------------------------------------------------------- checkpoints


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / 'ckpt.pt').write_text('old')

    def write(file):
        file.write(b'half of the ne')
        raise OSError('No space left on device')

    with pytest.raises(UserError, match='ckpt.pt could not be written .*No space left.*still is'):
        files.save_atomically(tmp_path / 'ckpt.pt', write)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {'ckpt.pt': 'old'}


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    checkpoints.save(tmp_path / 'ckpt.pt', {'weights': torch.ones(3)})

    def write(file):
        file.write(b'half')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        files.save_atomically(tmp_path / 'ckpt.pt', write)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['weights'].tolist() == [1, 1, 1]
    checkpoints.save(tmp_path / 'ckpt.pt', {'weights': torch.zeros(3)})  # over what it left
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt.pt']


def test_a_new_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    happened = []
    monkeypatch.setattr(os, 'fsync', lambda file: happened.append('fsync'))
    monkeypatch.setattr(os, 'replace', lambda source, target: happened.append('replace'))
    files.save_atomically(tmp_path / 'file', lambda file: happened.append('write'))
    assert happened == ['write', 'fsync', 'replace']


def test_a_checkpoint_cut_anywhere_or_of_another_kind_is_refused(tmp_path):
    path = tmp_path / 'ckpt.pt'
    checkpoints.save(path, tiny_checkpoint())
    whole = path.read_bytes()
    cut = (whole[:n] for n in range(1, len(whole), 4999))
    for content in [b'', b'{"a": 1}', b'.', b'not a checkpoint', *cut]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=f'{path} is damaged or no checkpoint of ours .*; take another'):
            checkpoints.load(path)
    for value in (5, [1], {'model': {}}):
        torch.save(value, path)
        with pytest.raises(UserError, match=f'{path} lacks .*tokenizer.*; give the ckpt.pt'):
            checkpoints.load(path)
    with pytest.raises(UserError, match='no checkpoint at nowhere.pt; correct'):
        checkpoints.load('nowhere.pt')


def test_a_run_folder_stands_for_its_checkpoint(tmp_path):
    checkpoints.save(tmp_path / 'ckpt.pt', tiny_checkpoint())
    assert checkpoints.load(tmp_path)['format'] == checkpoints.CHECKPOINT_FORMAT
    assert checkpoints.resume_path(str(tmp_path), '') == tmp_path / 'ckpt.pt'
    assert checkpoints.run_of(tmp_path / 'ckpt.pt') == tmp_path
    assert checkpoints.run_of(tmp_path / 'checkpoints/checkpoint-5/ckpt.pt') == tmp_path


def test_resume_auto_needs_an_out_dir_and_starts_afresh_without_a_checkpoint(tmp_path):
    assert checkpoints.resume_path('auto', tmp_path) is None
    (tmp_path / 'ckpt.pt').touch()
    assert checkpoints.resume_path('auto', tmp_path) == tmp_path / 'ckpt.pt'
    with pytest.raises(UserError, match='--resume_from=auto needs an out_dir.*--out_dir='):
        checkpoints.resume_path('auto', '')


def test_a_model_to_use_has_the_average_where_there_is_one():
    checkpoint = tiny_checkpoint()
    average = {name: weight + 1 for name, weight in checkpoint['model_state_dict'].items()}
    for state, expected in (
        (checkpoint, checkpoint['model_state_dict']),
        ({**checkpoint, 'ema_state_dict': average}, average),
    ):
        model = checkpoints.load_model(state, 'cpu')
        assert not model.training
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    (tmp_path / 'ckpt.pt').write_text('state')

    def kept():
        return {
            int(path.parent.name.removeprefix('checkpoint-')): path.read_text()
            for path in (tmp_path / 'checkpoints').glob('*/ckpt.pt')
        }

    for step in (2, 4, 6, 8, 10):
        checkpoints.keep(tmp_path, step, limit=3, best_step=4)
    assert kept() == {4: 'state', 8: 'state', 10: 'state'}
    checkpoints.keep(tmp_path, 12, limit=2, best_step=12)
    assert set(kept()) == {10, 12}


# ---------------------------------------------------------------------------- the run folder


def test_run_folders_are_numbered_and_the_suffix_comes_last(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, 'ROOT', tmp_path)
    for name, suffix, expected in (
        ('a', '', 'a-v1'),
        ('a', '', 'a-v2'),
        ('b', '', 'b-v1'),
        ('a', '', 'a-v3'),
        ('a', 'fixed-k8', 'a-v1-fixed-k8'),
        ('a', 'fixed-k8', 'a-v2-fixed-k8'),
    ):
        assert checkpoints.open_run_folder('', name, suffix) == tmp_path / 'out' / expected
    (tmp_path / 'out/a-v2').rmdir()
    assert checkpoints.open_run_folder('', 'a').name == 'a-v2'


def test_a_folder_that_holds_a_run_is_refused_unless_it_continues_or_is_given_up(tmp_path):
    run = tmp_path / 'run'
    assert checkpoints.open_run_folder(run, 'a') == run
    assert checkpoints.open_run_folder(run, 'a') == run  # an empty folder holds none
    for name in ('metrics.csv', 'notes.txt'):
        (run / name).write_text('precious')
    for continued in (None, tmp_path / 'another'):
        with pytest.raises(UserError, match=f'{run} already holds a run; .*--resume_from=auto.*--overwrite'):
            checkpoints.open_run_folder(run, 'a', continued=continued)
    assert checkpoints.open_run_folder(run, 'a', continued=run.resolve()) == run
    assert (run / 'metrics.csv').read_text() == 'precious'
    checkpoints.open_run_folder(run, 'a', overwrite=True)
    assert [path.name for path in run.iterdir()] == ['notes.txt']  # what is not the run's stays


# ---------------------------------------------------------------------------- logs


def test_rows_that_come_again_and_a_torn_one_are_forgotten(tmp_path):
    path = tmp_path / 'metrics.csv'
    path.write_text('step,train/loss\n0,\n5,3.5\n10,3.2\n15,3.1\n20,3.')
    runtime.forget_rows_after(path, 10)
    assert path.read_text() == 'step,train/loss\n0,\n5,3.5\n10,3.2\n'
    path.write_text('step,train/loss\n0,\n5,3.5\n10,3.')
    runtime.forget_rows_after(path, 10)
    assert path.read_text() == 'step,train/loss\n0,\n5,3.5\n'
    runtime.forget_rows_after(tmp_path / 'none.csv', 10)


def test_metrics_have_one_column_per_name_and_other_ranks_are_silent(tmp_path, capsys):
    for is_main in (True, False):
        folder = tmp_path / str(is_main)
        folder.mkdir()
        log = runtime.Logger(folder, is_main, -1)
        log.print('hello')
        log.progress('step 5')
        log.metrics(5, {'val/loss': 2.5, 'train/lr': 0.1})
        log.close()
    assert capsys.readouterr().out == 'hello\nstep 5\n'
    assert list((tmp_path / 'False').iterdir()) == []
    header, row = (line.split(',') for line in (tmp_path / 'True/metrics.csv').read_text().splitlines())
    assert header == ['step', *runtime.METRICS]
    assert {name: cell for name, cell in zip(header, row) if cell} == {
        'step': '5',
        'train/lr': '0.1',
        'val/loss': '2.5',
    }
    assert (tmp_path / 'True/logs.log').read_text() == 'hello\nstep 5\n'


class BrokenWandb:
    """A W&B that fails from its n-th call on."""

    id = 'abc'

    def __init__(self, works):
        self.works = works

    def call(self, *args, **kwargs):
        self.works -= 1
        if self.works < 0:
            raise ConnectionError('the service is gone')
        return self

    login = init = log = finish = call


@pytest.mark.parametrize('works, run_id', [(0, None), (1, None), (2, 'abc'), (3, 'abc'), (4, 'abc')])
def test_a_failure_of_wandb_is_reported_once_and_stops_nothing(tmp_path, monkeypatch, capsys, works, run_id):
    monkeypatch.setitem(sys.modules, 'wandb', BrokenWandb(works))
    monkeypatch.delenv('WANDB_MODE', raising=False)
    log = runtime.Logger(tmp_path, True, -1, dict(project='p', name='n', run_id=None, config={}))
    for step in (0, 1):
        log.metrics(step, {'val/loss': 1.0})
    log.close()
    assert log.wandb_run_id == run_id  # what a resumed run asks for
    assert capsys.readouterr().out.count('the service is gone); the run goes on without it') == 1
    assert len((tmp_path / 'metrics.csv').read_text().splitlines()) == 3


def test_a_machine_without_wandb_trains_as_well(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # its import fails
    runtime.Logger(tmp_path, True, -1, dict(project='p', name='n', run_id=None, config={})).close()
    assert 'the run goes on without it' in capsys.readouterr().out


# ---------------------------------------------------------------------------- signals, seeds, choices


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_first_signal_is_noted_and_the_second_ends_the_process(monkeypatch, number):
    exits = []
    monkeypatch.setattr(os, '_exit', exits.append)
    with signals_kept():
        stop = runtime.StopSignal()
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stop.received == number.name and exits == []
        os.kill(os.getpid(), number)
        assert exits == [128 + number]


def test_dropout_is_seeded_by_each_part_of_its_key():
    def draw(*key):
        runtime.seed_dropout(*key)
        return torch.rand(4).tolist()

    keys = [(0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 0, 0), (0, 0, 0, 0)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    assert draw(*keys[0]) == draw(*keys[0])


@pytest.mark.parametrize(
    'call, expected',
    [
        (lambda: runtime.pick_device('gpu'), "device is 'gpu'; choose auto, cpu, cuda"),
        (lambda: runtime.pick_device('meta'), "device is 'meta', but PyTorch finds none .*--device=cpu"),
        (lambda: runtime.pick_dtype('int8', torch.device('cpu')), "dtype is 'int8'; choose auto, bfloat16"),
        (lambda: checkpoints.size_of('huge'), "model_size is 'huge'; choose tiny, small"),
        (lambda: checkpoints.make_model('rnn', **TINY), "architecture is 'rnn'; choose ar or diffusion"),
        (lambda: checkpoints.make_model('ar', **{**TINY, 'n_head': 5}), 'n_embd=32 over n_head=5 .*choose'),
        (lambda: checkpoints.make_model('ar', **{**TINY, 'dropout': 1.5}), 'dropout is 1.5; it is a share'),
    ],
)
def test_a_name_or_number_that_cannot_be_is_refused(call, expected):
    with pytest.raises(UserError, match=expected):
        call()


def test_a_checkpoint_of_another_architecture_or_vocabulary_is_refused():
    checkpoint = tiny_checkpoint()
    checkpoints.check_fits(checkpoint, 'ckpt.pt', 'ar', letter_tokenizer(), 'data/letters')
    with pytest.raises(UserError, match="architecture='ar', not 'diffusion'; use --architecture=ar"):
        checkpoints.check_fits(checkpoint, 'ckpt.pt', 'diffusion', letter_tokenizer(), 'data/letters')
    with pytest.raises(UserError, match=r'ckpt.pt .*vocabulary \(30 tokens\) than that of data/x \(6\)'):
        checkpoints.check_fits(checkpoint, 'ckpt.pt', 'ar', letter_tokenizer('abc'), 'data/x')


# ---------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize('optimizer, names', [('adamw', {'adamw'}), ('muon', {'adamw', 'muon'})])
@pytest.mark.parametrize('shape', [{}, GPT2])
def test_each_trainable_parameter_is_in_exactly_one_optimizer(optimizer, names, shape):
    model = Diffusion(ModelConfig(**TINY, **shape))
    model.blocks[0].mlp.up.weight.requires_grad_(False)
    optimizers = optim.make_optimizers(model, optimizer, 0.1, 0.9, 0.95, 0.3)
    assert set(optimizers) == names
    held = [p for o in optimizers.values() for group in o.param_groups for p in group['params']]
    assert sorted(map(id, held)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for group in (group for o in optimizers.values() for group in o.param_groups):
        assert {p.dim() for p in group['params']} == ({2} if group['weight_decay'] else {1})


def test_muon_has_the_matrices_of_the_blocks_and_no_others():
    model = Diffusion(ModelConfig(**TINY, **GPT2))
    muon = optim.make_optimizers(model, 'muon', 0.1, 0.9, 0.95, 0.3)['muon']
    expected = [p for name, p in model.named_parameters() if name.startswith('blocks.') and p.dim() == 2]
    assert [id(p) for p in muon.param_groups[0]['params']] == list(map(id, expected))
    assert len(expected) == 2 * 6


# ---------------------------------------------------------------------------- the learning rate


@pytest.mark.parametrize(
    'schedule, by_hand',
    [
        ('cosine', {10: 1.0, 40: 0.775, 55: 0.55, 70: 0.325, 100: 0.1}),  # half a cosine from step 10 to 100
        ('linear', {10: 1.0, 40: 0.7, 55: 0.55, 91: 0.19, 100: 0.1}),
        ('wsd', {10: 1.0, 79: 1.0, 80: 1.0, 90: 0.55, 95: 0.325, 100: 0.1}),  # the last fifth decays
        ('constant', {10: 1.0, 50: 1.0, 100: 1.0}),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, by_hand):
    warmup = {0: 0.1, 4: 0.5, 9: 1.0}
    for step, expected in {**warmup, **by_hand}.items():
        rate = optim.learning_rate_at(step, 100, 1.0, 0.1, 10, schedule, 0.2)
        assert math.isclose(rate, expected), step


def test_the_learning_rate_without_a_warmup_or_a_decay():
    assert optim.learning_rate_at(0, 100, 1.0, 0.0, 0, 'cosine', 0.2) == 1.0
    assert optim.learning_rate_at(99, 100, 1.0, 0.0, 0, 'wsd', 0.0) == 1.0
    assert optim.learning_rate_at(0, 1, 1.0, 0.0, 0, 'linear', 0.2) == 1.0


# ---------------------------------------------------------------------------- the average of the weights


def test_the_average_of_the_weights_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        average = optim.WeightAverage(model, decay=0.9)
        for weight, expected in ((2.0, 0.9 + 0.2), (2.0, 0.9 * 1.1 + 0.2), (-1.0, 0.9 * 1.19 - 0.1)):
            model.weight.fill_(weight)
            average.update(step=10**6)
            assert math.isclose(average.average['weight'].item(), expected, rel_tol=1e-6)


def test_a_long_average_forgets_the_random_start():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1000.0)
        average = optim.WeightAverage(model, decay=0.9999)
        model.weight.fill_(1.0)
        for step in range(1, 301):
            average.update(step)
    assert abs(average.average['weight'].item() - 1.0) < 0.01


def test_the_average_is_in_place_only_within_its_context():
    model = torch.nn.Linear(1, 1, bias=False)
    average = optim.WeightAverage(model, decay=0.9)
    average.load({'weight': torch.tensor([[5.0]])})
    before = model.weight.item()
    with pytest.raises(KeyError), average.in_place():
        assert model.weight.item() == 5.0
        raise KeyError  # whatever happens within
    assert model.weight.item() == before and model.weight.requires_grad
