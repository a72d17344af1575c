"""What benchmarks/memory.py counts is what there is, and checkpointing keeps less of it."""

import pytest
import torch

from benchmarks import memory
from lm import runtime


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


def test_checkpointing_keeps_less_and_the_selective_kind_lies_between(monkeypatch):
    monkeypatch.setattr(memory, 'VOCABULARY', dict(vocab_size=512, mask_id=510, ignore_id=511))
    dist = runtime.Runtime('cpu', 'float32')

    def peak(batch_size, **changes):
        return memory.peak_bytes('ar', dist, 'adamw', 'tiny', batch_size, block_size=256, **changes)

    none, each = peak(8), peak(8, gradient_checkpointing=True)
    between = peak(8, gradient_checkpointing=True, selective_checkpointing=True)
    assert each < 0.6 * none and each < between < 0.8 * none
    # Weights, gradients and two moments are there in any case, of 12 matrices of a layer and of the embedding.
    parameters = 4 * 12 * 128**2 + 512 * 128
    assert peak(0) == pytest.approx(4 * 4 * parameters, rel=0.05)


@pytest.mark.parametrize('architecture', ['diffusion', 'sdd'])
def test_steps_of_all_architectures_are_counted(architecture):
    dist = runtime.Runtime('cpu', 'bfloat16')
    assert memory.peak_bytes(architecture, dist, 'muon', 'tiny', 2, block_size=16) > 0
