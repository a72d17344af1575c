"""What memory.py counts is what there is, and checkpointing keeps less of it."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import memory
from lm import optim
from model import ARCHITECTURES, ModelConfig


def test_allocations_are_counted_until_they_are_freed():
    with memory.Allocations() as allocations:
        a = torch.zeros(1000)
        b = a.view(10, 100).t() + 1
        assert allocations.now == 8000
        del a
        c = b.add_(1)[0]
        assert allocations.now == 4000
        del b, c
    assert allocations.now == 0 and allocations.peak == 8000


def peak(**changes):
    with FakeTensorMode():
        model = ARCHITECTURES['ar'](ModelConfig(512, block_size=256, **changes))
        optimizers = optim.make_optimizers(model, 'adamw', 1e-3, 0.9, 0.95, 0.1)
        tokens = torch.zeros(8, 257, dtype=torch.long)
        for _ in range(2):
            with memory.Allocations() as allocations:
                model(tokens)[0].backward()
                optimizers['adamw'].step()
                optimizers['adamw'].zero_grad()
        assert allocations.now < 100  # nothing stays but moments, which were there before
        state = memory.state_bytes(model, optimizers.values())
    weights = sum(p.numel() for p in model.parameters())
    assert 8 * weights <= state['moments'] < 8 * weights + 1000 and state['weights'] >= 4 * weights
    return allocations.peak


def test_checkpointing_keeps_less_and_the_selective_kind_lies_between():
    none, each = peak(), peak(gradient_checkpointing=True)
    between = peak(gradient_checkpointing=True, selective_checkpointing=True)
    assert each < 0.6 * none and each < between < 0.8 * none
