"""How much memory does a training step take, with gradient checkpointing and without?

    python benchmarks/memory.py --model_size=xl --block_size=1024 --batch_size=8 --dtype=bfloat16

Nothing is computed: the tensors are fake, so any shape can be asked for on any machine. Attention is the CPU's, which
in bfloat16 keeps the scores that a GPU's does not: an upper bound for it.
"""

import sys
import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from benchmarks import timing
from benchmarks.train import Trainee
from lm import optim, runtime
from lm.configurator import configure
from model import ARCHITECTURES

model_size = 'xl'
block_size = 1024
batch_size = 8
optimizer = 'adamw'  # adamw or muon
dtype = 'bfloat16'
vocab_size = 50260  # GPT-2's and the special tokens
config = configure(globals())


class Allocations(TorchDispatchMode):
    """While active, counts the bytes of the tensors that operations make: `now`, and `peak`, the most at once."""

    now = peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if (
            operation is torch.ops.aten.nonzero.default
        ):  # of fake tensors: half, as diffusion masks on average
            result = torch.arange(args[0].numel() // 2)[:, None]
        else:
            result = operation(*args, **(kwargs or {}))
        for storage in storages(result) - storages((args, kwargs)):
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


def storages(tree):
    return {x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}


def peak_bytes(*settings, **shape):
    """Return the most bytes at once in a training step, weights and moments included; of the arguments of Trainee."""
    with FakeTensorMode(), Allocations() as allocations:
        trainee = Trainee(*settings, **shape)
        beliefs = {'k': 8, 'depth': optim.MAX_DEPTH} if trainee.model.has_beliefs else {}
        for _ in range(2):  # the first makes the moments
            allocations.peak = allocations.now
            trainee.step(trainee.batch(), **beliefs)
    return allocations.peak


def main():
    dist = runtime.Runtime('cpu', dtype)
    run = f'{model_size}, {batch_size} rows of {block_size} tokens, {dist.dtype}, {optimizer}'
    timing.say(f'{run}; GB of 10⁹ bytes')
    settings, kinds = (dist, optimizer, model_size, vocab_size, batch_size), ('', 'gradient', 'selective')
    for name in ARCHITECTURES:
        for number, kind in enumerate(kinds):
            changes = {f'{kind}_checkpointing': True for kind in kinds[1 : number + 1]}
            peak = peak_bytes(name, *settings, block_size=block_size, **changes)
            timing.say(f'  {name}, {kind or "no"} checkpointing: {peak / 1e9:.2f}')


if __name__ == '__main__':
    main()
