"""What fsdp=True promises, on two gloo ranks: the run of one process, states for any number of ranks."""

import os
import re
import runpy
import sys

import pytest
import torch
from conftest import LETTERS, several_scripts, signals_kept, write_folder
from test_finetune import ROOT, write_base, write_examples
from test_finetune import TINY as TUNE
from test_train import GPT2, free_ports, load, metrics, start
from test_train import TINY as TRAIN

import hf
from lm import checkpoints, optim, sharded
from lm.configurator import UserError

pytestmark = pytest.mark.slow
CASES = {
    'ar': ('train.py', [*GPT2, '--gradient_accumulation_steps=2', '--sample_every=3', '--sample_tokens=4']),
    'diffusion': ('train.py', ['--architecture=diffusion', '--gradient_checkpointing']),
    'converted': ('train.py', ['--architecture=diffusion', '--init_from=PLACE/letters-base']),
    'tune': ('finetune.py', []),
    'bfloat16': ('finetune.py', ['--dtype=bfloat16', '--master_weights=bfloat16']),
    'sdd': ('finetune.py', ['--architecture=sdd', '--p_belief=((0,1),)']),
}


def script(name, *arguments):
    with pytest.MonkeyPatch.context() as patch, signals_kept():
        patch.setattr(
            sys,
            'argv',
            [
                name,
                *(TUNE if name == 'finetune.py' else TRAIN),
                '--learning_rate=0.0003',
                '--eval_every=5',
                *map(str, arguments),
            ],
        )
        return runpy.run_path(str(ROOT / name), run_name='__main__')


def run_rank(rank, ports, commands):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1')
    with several_scripts():
        for port, (name, stop_at, arguments) in zip(ports, commands):
            os.environ['MASTER_PORT'] = str(port)
            rate, shard = optim.learning_rate_at, sharded.fully_shard
            optim.learning_rate_at = lambda step, *rest: (
                step == stop_at and signal_self(rank),
                rate(step, *rest),
            )[1]
            sharded.fully_shard = lambda module, **how: (
                without_values(module, arguments),
                shard(module, **how),
            )[1]
            model = script(name, *arguments)['raw_model']
            optim.learning_rate_at, sharded.fully_shard = rate, shard
            parts, whole = zip(*((p.to_local().numel(), p.numel()) for p in model.parameters()))
            assert sum(parts) < 0.6 * sum(whole)


def without_values(module, arguments):
    """What comes from a checkpoint is sharded before any of it is read."""
    if '--init_from' in ' '.join(map(str, arguments)):
        assert all(weight.is_meta for weight in module.parameters())


def signal_self(rank):
    if rank == 1:  # the other one has to stop at the same step
        os.kill(os.getpid(), 15)


def test_two_ranks_are_one_process_and_their_state_resumes_on_one(tmp_path):
    write_folder(
        tmp_path / 'letters', val=['the cat sees a dog in its tree and sings']
    )  # one batch: none for rank 1
    write_examples(tmp_path / 'examples')
    write_base(tmp_path / 'base', 'diffusion')
    write_base(tmp_path / 'letters-base', 'ar', LETTERS)
    commands = {}
    for case, (name, more) in CASES.items():
        data = (
            [f'--dataset={tmp_path}/examples', f'--init_from={tmp_path}/base']
            if name == 'finetune.py'
            else [f'--dataset={tmp_path}/letters']
        )
        more = [argument.replace('PLACE', str(tmp_path)) for argument in more]
        commands[case] = name, [*data, *more, '--max_steps=5']
        script(name, *commands[case][1], f'--out_dir={tmp_path}/{case}-one', '--batch_size=4')
    ranks = [
        (name, at, [*arguments, '--batch_size=2', '--fsdp', f'--out_dir={tmp_path}/{case}-{kind}'])
        for case, (name, arguments) in commands.items()
        for kind, at in (('two', None), ('half', 2))
    ]
    torch.multiprocessing.spawn(run_rank, (free_ports(len(ranks)), ranks), nprocs=2)

    for case, (name, arguments) in commands.items():
        one, two, half = (tmp_path / f'{case}-{kind}' for kind in ('one', 'two', 'half'))
        with pytest.raises(UserError, match='weights of .* are sharded in .*consolidate'):
            checkpoints.load(half)
        assert [path.name for path in (half / 'sharded').iterdir()] == ['step-3']
        script(name, *arguments, '--batch_size=4', '--fsdp', f'--out_dir={half}', '--resume_from=auto')
        expected = load(one)['model_state_dict']
        weight_gap, loss_gap = (
            (0.02, 0.02) if case == 'bfloat16' else (1e-6, 1e-5)
        )  # ranks round by bits of their own
        for out in (two, half):
            weights = load(out)['model_state_dict']
            assert weights.keys() == expected.keys() and load(out)['global_step'] == 5
            for weight, value in expected.items():
                torch.testing.assert_close(
                    weights[weight],
                    value,
                    atol=weight_gap,
                    rtol=0,
                    msg=lambda said: f'{case} {weight}: {said}',
                )
            for row, wanted in zip(metrics(out), metrics(one), strict=True):
                assert float(row['train/loss'] or 0) == pytest.approx(
                    float(wanted['train/loss'] or 0), abs=loss_gap
                )
                assert float(row['val/loss'] or 0) == pytest.approx(
                    float(wanted['val/loss'] or 0), abs=loss_gap
                )
        assert checkpoints.load_model(checkpoints.load(two / 'best.pt'), 'cpu')


def test_a_stopped_run_is_consolidated(tmp_path, monkeypatch):
    folder, out = write_folder(tmp_path / 'letters'), tmp_path / 'run'
    rate = optim.learning_rate_at
    monkeypatch.setattr(
        optim,
        'learning_rate_at',
        lambda step, *rest: (step == 2 and os.kill(os.getpid(), 15), rate(step, *rest))[1],
    )
    variables = script('train.py', f'--dataset={folder}', '--fsdp', f'--out_dir={out}')
    assert 'model_state_dict' not in load(out)
    hf.main(['consolidate', str(out)])
    for name, weight in variables['raw_model'].state_dict().items():
        assert torch.equal(load(out)['model_state_dict'][name], weight)
    process = start(f'--dataset={folder}', '--learning_rate=0.001', f'--out_dir={out}', '--resume_from=auto')
    assert process.wait() == 0 and load(out)['global_step'] == 6, process.stdout.read()
    (out / 'sharded').rename(tmp_path / 'elsewhere')
    with pytest.raises(UserError, match='ckpt.pt needs .*step-6, which is not there'):
        script('train.py', f'--resume_from={out}', '--max_steps=9', f'--dataset={folder}', '--fsdp')


@pytest.mark.parametrize(
    'setting', ['--ema_decay=0.9', '--optimizer=muon', '--save_total_limit=2', '--dtype=float16']
)
def test_what_does_not_go_with_fsdp_is_refused(setting):
    with pytest.raises(UserError, match='fsdp does not go with ' + re.match(r'--(\w+)', setting)[1]):
        script('train.py', '--fsdp', setting)
