"""Optimizers, the average of the weights, and what else depends on the step."""

import math

import numpy as np
import pytest
import torch
from helpers import GPT2_SWITCHES

from lm import optim, runtime
from lm.configurator import UserError
from lm.layers import TwoStreams
from model import ARCHITECTURES, ModelConfig

TINY = dict(vocab_size=30, block_size=16, n_layer=2, n_head=2, n_embd=16, mask_id=28, ignore_id=29)


def make_model(architecture='diffusion', **shape):
    return ARCHITECTURES[architecture](ModelConfig(**{**TINY, **shape}))


def make_optimizer(model, name='adamw', learning_rate=0.1, weight_decay=0.3, **settings):
    return optim.make_optimizer(model, name, learning_rate, 0.9, 0.95, weight_decay, **settings)


def parameters_of(optimizer):
    return [p for part in optimizer.parts.values() for group in part.param_groups for p in group['params']]


# ---------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize('name, parts', [('adamw', {'adamw'}), ('muon', {'adamw', 'muon'})])
@pytest.mark.parametrize('shape', [{}, GPT2_SWITCHES], ids=['native', 'gpt2'])
@pytest.mark.parametrize('decay_embedding', [True, False])
def test_each_trainable_parameter_is_in_exactly_one_part(name, parts, shape, decay_embedding):
    model = make_model(**shape)
    model.blocks[0].mlp.up.weight.requires_grad_(False)
    optimizer = make_optimizer(model, name, decay_embedding=decay_embedding)
    assert set(optimizer.parts) == parts
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, parameters_of(optimizer))) == sorted(map(id, trainable))
    matrices = [(part, p) for part, p in model.named_parameters() if p.dim() > 1]
    everywhere = decay_embedding or name == 'adamw'
    decayed = {id(p) for part, p in matrices if everywhere or part.startswith('blocks.')}
    for group in (group for part in optimizer.parts.values() for group in part.param_groups):
        assert {id(p) in decayed for p in group['params']} == {group['weight_decay'] > 0}


@pytest.mark.faults
def test_muon_takes_a_model_that_trains_matrices_of_the_blocks_alone():
    model = make_model().requires_grad_(False)
    model.blocks[0].mlp.up.weight.requires_grad_(True)
    assert set(make_optimizer(model, 'muon').parts) == {'muon'}


@pytest.mark.faults
def test_only_a_causal_start_is_annealed():
    model = make_model('sdd', shift=True)
    steps = [
        optim.default_anneal_steps(None, model, {'converted_from': kind}, 1000)
        for kind in ('ar', 'diffusion')
    ]
    assert steps == [100, 0]


@pytest.mark.faults
def test_which_blocks_are_noisy_is_even_where_there_are_fewer_than_every_nth():
    model = make_model(block_length=(6,))
    firsts = [optim.draw_blocks(model, step, 0, 4)[1][1] for step in range(300)]
    first = [TwoStreams(torch.zeros(1, 16, dtype=torch.long), 6, None, 4, x).first for x in firsts]
    assert min(first.count(i) for i in range(3)) > 80


def test_muon_has_the_matrices_of_the_blocks_and_no_others():
    model = make_model(**GPT2_SWITCHES)
    muon = make_optimizer(model, 'muon').parts['muon']
    expected = [p for name, p in model.named_parameters() if name.startswith('blocks.') and p.dim() == 2]
    assert [id(p) for p in muon.param_groups[0]['params']] == list(map(id, expected))
    assert len(expected) == 2 * 6


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_muon_steps_as_pytorchs_and_takes_its_state():
    shapes = [(16, 16), (16, 64), (16, 16), (64, 16), (24, 16)]
    one, other = ([random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)] for _ in '12')
    options = dict(lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn='match_rms_adamw')
    optimizers = optim.Muon(one, **options), torch.optim.Muon(other, **options)
    for step in range(4):
        for i, (p, q) in enumerate(zip(one, other)):
            p.grad = random(*p.shape, seed=10 * step + i + 100)
            q.grad = p.grad.clone()
        if step == 2:  # a matrix that a step does not touch; and each goes on with the state of the other
            one[0].grad = other[0].grad = None
            states = [optimizer.state_dict() for optimizer in optimizers]
            for optimizer, state in zip(optimizers, reversed(states)):
                optimizer.load_state_dict(state)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(one, other):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=1e-2)  # PyTorch's computes in bfloat16


def test_muon_computes_in_bfloat16_only_where_the_run_does_and_the_device_can(monkeypatch):
    def weights_after_a_step(dtype, can):
        monkeypatch.setattr(optim, 'has_bfloat16', lambda device: can)
        torch.manual_seed(0)
        model = make_model(**GPT2_SWITCHES)
        optimizer = make_optimizer(model, 'muon', dtype=dtype)
        for i, p in enumerate(model.parameters()):
            p.grad = random(*p.shape, seed=i)
        optimizer.step(runtime.Runtime('cpu', 'float32').scaler(), list(model.parameters()), 0.0)
        return model.blocks[0].mlp.up.weight.detach()

    exact = weights_after_a_step('float32', can=False)
    assert torch.equal(weights_after_a_step('float32', can=True), exact)
    assert torch.equal(weights_after_a_step('bfloat16', can=False), exact)
    rounded = weights_after_a_step('bfloat16', can=True)
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, atol=2e-3, rtol=0)


def one_step(model, optimizer, grad_clip=0.0):
    """Give each parameter a gradient of 1 and step; returns the norm."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return optimizer.step(runtime.Runtime('cpu', 'float32').scaler(), model.parameters(), grad_clip)


def test_a_step_clips_by_the_norm_of_all_gradients_says_it_and_clears_them():
    for grad_clip, expected in ((0.0, 1.0), (1e9, 1.0), (0.5, 0.5)):
        model = make_model()
        optimizer = make_optimizer(model, 'muon')
        norm = one_step(model, optimizer, grad_clip)
        assert norm.item() == pytest.approx(sum(p.numel() for p in model.parameters()) ** 0.5, rel=1e-5)
        share = 1.0 if expected == 1.0 else 0.5 / norm.item()
        moment = optimizer.parts['adamw'].state[model.embedding.weight]['exp_avg']
        torch.testing.assert_close(moment, torch.full_like(moment, 0.1 * share), rtol=1e-4, atol=0)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.faults
@pytest.mark.parametrize('where', ['embedding', 'blocks'])
def test_a_gradient_that_overflows_in_float16_skips_the_step_of_every_part(where):
    model = make_model()
    optimizer, scaler = make_optimizer(model, 'muon'), runtime.Runtime('cpu', 'float16').scaler()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for overflows in (True, False):
        for name, p in model.named_parameters():
            p.grad = torch.full_like(p, math.inf if overflows and name.startswith(where) else 1.0)
        scaler.scale(torch.ones(()))  # as the loss was
        optimizer.step(scaler, model.parameters(), 1.0)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert not moved if overflows else moved == before.keys()
        assert all(p.isfinite().all() for p in model.parameters())
    assert scaler.get_scale() == 2.0**15  # halved once


def test_a_loaded_state_keeps_the_settings_of_this_run():
    model, optimizer = make_model(), None
    optimizer = make_optimizer(model, 'muon')
    one_step(model, optimizer)
    other = make_optimizer(model, 'muon', learning_rate=0.7, weight_decay=0.2)
    other.load_state_dict(optimizer.state_dict())
    for name, part in other.parts.items():
        assert {group['lr'] for group in part.param_groups} == {0.7}
        assert part.state_dict()['state'].keys() == optimizer.parts[name].state_dict()['state'].keys()
    moment = 'exp_avg', model.embedding.weight
    assert torch.equal(*(o.parts['adamw'].state[moment[1]][moment[0]] for o in (optimizer, other)))
    other.set_lr(0.25)
    assert {group['lr'] for part in other.parts.values() for group in part.param_groups} == {0.25}


# ---------------------------------------------------------------------------- the average of the weights


def test_the_average_of_the_weights_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        average = optim.WeightAverage(model, decay=0.9)
        for weight, expected in ((2.0, 0.9 + 0.2), (2.0, 0.9 * 1.1 + 0.2), (-1.0, 0.9 * 1.19 - 0.1)):
            model.weight.fill_(weight)
            average.update(step=10**6)
            assert math.isclose(average.ema['weight'].item(), expected, rel_tol=1e-6)


def test_a_long_average_forgets_the_random_start():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1000.0)
        average = optim.WeightAverage(model, decay=0.9999)
        model.weight.fill_(1.0)
        for step in range(1, 301):
            average.update(step)
    assert abs(average.ema['weight'].item() - 1.0) < 0.01


def test_the_average_is_in_place_only_within_its_context():
    model = torch.nn.Linear(1, 1, bias=False)
    average = optim.WeightAverage(model, decay=0.9)
    average.load({'weight': torch.tensor([[5.0]])})
    before = model.weight.item()
    with pytest.raises(KeyError), average.in_place():
        assert model.weight.item() == 5.0
        raise KeyError  # whatever happens within
    assert model.weight.item() == before and model.weight.requires_grad


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


# ---------------------------------------------------------------------------- the beliefs of a step

RAMP = ((0.2, 0.5), (0.7, 0.9))
ALWAYS = ((0.0, 1.0),)


def plans(steps, seed=0, architecture='sdd', p_belief=RAMP, k_warmup_steps=0):
    kind = ARCHITECTURES[architecture]
    return [
        optim.draw_beliefs(kind, step, steps, seed, p_belief, (1, 2, 4, 8), k_warmup_steps)
        for step in range(steps)
    ]


def test_beliefs_set_in_as_the_schedule_says():
    with_beliefs = np.array([plan['k'] > 0 for plan in plans(5000)])
    assert not with_beliefs[:1000].any()
    assert abs(with_beliefs[1000:3500].mean() - 0.5) < 0.03 and abs(with_beliefs[3500:].mean() - 0.9) < 0.03
    assert plans(3, architecture='diffusion') == [{}] * 3


def test_k_is_drawn_evenly_or_follows_its_curriculum():
    ks = np.array([plan['k'] for plan in plans(5000) if plan['k']])
    for k in (1, 2, 4, 8):
        assert abs((ks == k).mean() - 0.25) < 0.03
    walked = [plan['k'] for plan in plans(2000, k_warmup_steps=1000, p_belief=ALWAYS)]
    assert walked == [1] * 250 + [2] * 250 + [4] * 250 + [8] * 1250


def test_beliefs_depend_on_seed_and_step_only():
    assert plans(200) == plans(200) != plans(200, seed=1)


def test_passes_and_staleness_have_their_probabilities():
    drawn = plans(5000, p_belief=ALWAYS)
    stale, passes = (np.array([plan[name] for plan in drawn]) for name in ('stale', 'passes'))
    assert abs((stale > 0).mean() - optim.P_STALE) < 0.03 and stale.max() <= optim.MAX_STALE
    for least in range(1, optim.MAX_PASSES + 1):
        assert abs((passes >= least).mean() - optim.P_DEEPER ** (least - 1)) < 0.03
    assert passes.max() == optim.MAX_PASSES


@pytest.mark.parametrize(
    'p_belief, k_schedule, said',
    [
        (RAMP, (), 'k_schedule is .*; give'),
        (RAMP, (0, 2), 'k_schedule is .*; give'),
        ((0.5, 0.5), (1,), 'p_belief is'),
        (((0.5, 1.5),), (1,), 'p_belief is'),
        (((0.5, 0.1), (0.2, 0.3)), (1,), 'p_belief is'),
    ],
)
def test_a_wrong_schedule_of_beliefs_is_one_sentence(p_belief, k_schedule, said):
    with pytest.raises(UserError, match=said):
        optim.check_beliefs(p_belief, k_schedule)


# ---------------------------------------------------------------------------- annealing


def test_the_mask_is_annealed_from_causal_to_none_and_depends_on_seed_and_step_only():
    causal = torch.ones(64, 64, dtype=torch.bool).tril()
    masks = [optim.annealed_mask(step, 10, 64, seed=3) for step in range(10)]
    assert torch.equal(masks[0], causal) and optim.annealed_mask(10, 10, 64, seed=3) is None
    assert all((mask | ~causal).all() for mask in masks)  # earlier positions are always visible
    for step, mask in enumerate(masks):
        assert mask[~causal].float().mean() == pytest.approx(step / 10, abs=0.05)
        assert torch.equal(mask, optim.annealed_mask(step, 10, 64, seed=3))
    assert not torch.equal(masks[5], optim.annealed_mask(5, 10, 64, seed=4))
    assert not torch.equal(optim.annealed_mask(50, 100, 64, seed=3), optim.annealed_mask(51, 100, 64, seed=3))
