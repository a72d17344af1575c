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
from benchmarks.timing import finish, say
from benchmarks.train import Trainee
from lm import data, optim, runtime
from lm.configurator import configure
from model import ARCHITECTURES

model_size = 'xl'
block_size = 1024
batch_size = 8
optimizer = 'adamw'  # adamw or muon
dtype = 'bfloat16'
vocab_size = 50260  # GPT-2's and the special tokens
config = configure(globals(), None if __name__ == '__main__' else [])

CHECKPOINTING = {
    'none': {},
    'each block': {'gradient_checkpointing': True},
    'all but matmuls': {'gradient_checkpointing': True, 'selective_checkpointing': True},
}


class Allocations(TorchDispatchMode):
    """While active, counts the bytes of the tensors that operations make: `now`, and `peak`, the most at once.

    Not counted: what was there before, what an operation takes and gives back inside, the allocator's rounding.
    """

    now = peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.nonzero.default:
            # Where fake tensors are not 0 is unknown: at half of the positions, as diffusion masks on average.
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


def peak_bytes(architecture, dist, *settings, block_size, **shape):
    """Return the most bytes that are there in a training step: weights, buffers and moments included.

    settings, shape: of `Trainee`
    """
    with FakeTensorMode(), Allocations() as allocations:
        trainee = Trainee(architecture, dist, *settings, block_size=block_size, **shape)
        model, rows = trainee.model, trainee.rows
        tokens = torch.zeros(rows, block_size + model.extra_tokens, dtype=torch.long)
        noise = torch.zeros(rows, 1 + block_size) if model.needs_noise else None
        beliefs = {'k': 8, 'depth': optim.MAX_DEPTH} if model.has_beliefs else {}
        for _ in range(2):  # the first makes the moments
            allocations.peak = allocations.now
            trainee.step(data.Batch(tokens, noise=noise), **beliefs)
    return allocations.peak


def main():
    dist, most = runtime.Runtime('cpu', dtype), 0
    say(f'{model_size}, {batch_size} rows of {block_size} tokens, {dist.dtype}, {optimizer}; GB of 10⁹ bytes')
    settings = optimizer, model_size, vocab_size, batch_size
    for name in ARCHITECTURES:
        for kind, changes in CHECKPOINTING.items():
            peak = peak_bytes(name, dist, *settings, block_size=block_size, **changes) / 1e9
            say(f'  {name}, checkpointing {kind}: {peak:.2f}')
            most = max(most, peak if kind == 'each block' else 0)
    is_recipe = (model_size, block_size, batch_size) == ('xl', 1024, 8)
    finish(*[('GB of xl with checkpointing, the most of all', most, '<=', 12.0)] * is_recipe)


if __name__ == '__main__':
    main()
