"""What master_weights=bfloat16 promises: half the memory, and no update lost to rounding."""

import math
import os
import signal

import pytest
import torch
from conftest import assert_drawn_from, write_folder
from test_finetune import place, settings, tune  # noqa: F401, place is a fixture
from test_sharded import script
from test_train import load, metrics, same

from lm import checkpoints, optim, runtime
from lm.configurator import UserError

BF16 = ['--master_weights=bfloat16', '--dtype=bfloat16']


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize('x', [1.0 + 2**-9, -3.0 - 2**-8, 1e-30, 0.02001, -65504.3])
def test_rounding_is_to_a_neighbour_and_exact_on_average(x):
    x = torch.tensor(x)
    down = (x.view(torch.int32) & -65536).view(torch.float32)  # towards zero
    up = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)
    rounded = optim.stochastically_rounded(x.expand(100_000).clone(), generator())
    assert rounded.dtype == torch.bfloat16
    is_up = (rounded.float() - down).abs() > 0
    assert torch.equal(rounded.float(), torch.where(is_up, up, down))
    share = ((x.double() - down.double()) / (up.double() - down.double())).item()
    assert_drawn_from(torch.tensor([1 - share, share]), is_up.long())


def test_what_bfloat16_can_hold_is_not_rounded():
    x = torch.tensor([0.0, -0.0, 1.5, -(2.0**-130), math.inf, -math.inf, math.nan]).repeat(1000)
    assert torch.equal(
        optim.stochastically_rounded(x, generator()).view(torch.int16), x.bfloat16().view(torch.int16)
    )


def descend(make, steps=400, rate=1e-4):
    """Weights of 1 after steps down a gradient of 1: in float32 each step takes `rate` off."""
    weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = make([weight], rate)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach().double()


def test_an_update_far_below_the_precision_is_learned_and_lost_by_plain_rounding():
    """The gap below 1 is 2⁻⁸ = 0.0039, an update 0.0001."""
    plain = descend(lambda weights, rate: torch.optim.AdamW(weights, lr=rate, weight_decay=0.0))
    assert (plain == 1).all()
    ours = descend(lambda weights, rate: optim.StochasticAdamW(weights, rate, (0.9, 0.95)))
    assert abs(ours.mean() - (1 - 400 * 1e-4)) < 5e-4  # 4096 weights of a deviation of 0.012


def test_a_step_is_that_of_adamw_but_for_the_rounding():
    weight = torch.randn(300, 7, generator=generator()).bfloat16()
    exact, ours = torch.nn.Parameter(weight.float()), torch.nn.Parameter(weight.clone())
    optimizers = (
        torch.optim.AdamW([exact], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
        optim.StochasticAdamW([{'params': [ours], 'weight_decay': 0.1}], 0.01, (0.9, 0.95)),
    )
    for step in range(3):
        gradient = torch.randn(300, 7, generator=torch.Generator().manual_seed(step)).bfloat16()
        exact.grad, ours.grad = gradient.float(), gradient
        for optimizer in optimizers:
            optimizer.step()
    gap = exact.detach().abs() * 2**-7 + 1e-3
    assert ((exact - ours.float()).abs() < 3 * gap).all()
    assert {x.dtype for key, x in optimizers[1].state[ours].items() if key != 'step'} == {torch.bfloat16}


@pytest.mark.parametrize('architecture', ['ar', 'sdd'])
def test_a_run_learns_and_goes_on_bit_identical(place, tmp_path, monkeypatch, architecture):  # noqa: F811
    arguments = settings(place, architecture, *BF16, '--max_steps=40', '--eval_every=20')
    variables = tune(*arguments, f'--out_dir={tmp_path}/reference')
    assert {p.dtype for p in variables['raw_model'].parameters()} == {torch.bfloat16}
    first, *_, last = [float(row['val/loss']) for row in metrics(tmp_path / 'reference') if row['val/loss']]
    assert last < first - 0.5
    rate = optim.learning_rate_at
    with monkeypatch.context() as patch:
        patch.setattr(
            optim,
            'learning_rate_at',
            lambda step, *rest: (step == 25 and os.kill(os.getpid(), signal.SIGTERM), rate(step, *rest))[1],
        )
        tune(*arguments, f'--out_dir={tmp_path}/run')
    assert load(tmp_path / 'run')['global_step'] == 26
    tune(f'--resume_from={tmp_path}/run', tiny=[])
    one, other = load(tmp_path / 'run'), load(tmp_path / 'reference')
    assert one['global_step'] == 40 and other['model_state_dict']['embedding.weight'].dtype == torch.bfloat16
    for part in ('model_state_dict', 'optimizer_state_dict', 'best_val_loss'):
        assert same(one[part], other[part]), part
    assert checkpoints.load_model(other, 'cpu').embedding.weight.dtype == torch.float32


def test_pretraining_takes_it_and_the_estimate_knows_it(tmp_path):
    folder, estimates = write_folder(tmp_path / 'letters'), []
    for kind in ('float32', 'bfloat16'):
        variables = script(
            'train.py',
            f'--dataset={folder}',
            f'--out_dir={tmp_path}/{kind}',
            '--dtype=bfloat16',
            f'--master_weights={kind}',
        )
        estimates.append(runtime.memory_estimate(variables['raw_model'], 4, 64, variables['run']))
    for part, share in (
        ('weights', 3),
        ('gradients', 2),
        ('optimizer', 2),
    ):  # autocast copies float32 weights
        assert estimates[0][part] == pytest.approx(share * estimates[1][part], rel=0.05), (
            part
        )  # but for buffers


@pytest.mark.parametrize(
    'setting, name',
    [
        ('--dtype=float32', 'dtype=float32'),
        ('--dtype=float16', 'dtype=float16'),
        ('--optimizer=muon', 'optimizer_muon'),
        ('--ema_decay=0.9', 'ema_decay'),
        ('--use_peft', 'use_peft'),
    ],
)
def test_what_it_does_not_go_with_is_refused(setting, name):
    name_of_script = 'finetune.py' if name == 'use_peft' else 'train.py'
    with pytest.raises(UserError, match=f'master_weights=bfloat16 does not go with {name}'):
        script(name_of_script, '--master_weights=bfloat16', '--dtype=auto', setting)
