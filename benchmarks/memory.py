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
from benchmarks.timing import Target, finish, say
from benchmarks.train import Trainee
from lm import data, optim, runtime
from lm.configurator import configure
from model import ARCHITECTURES

model_size = 'xl'
block_size = 1024
batch_size = 8
optimizer = 'adamw'  # adamw or muon
dtype = 'bfloat16'
config = configure(globals(), None if __name__ == '__main__' else [])

VOCABULARY = dict(vocab_size=50260, mask_id=50258, ignore_id=50259)  # GPT-2's and the special tokens
CHECKPOINTING = {
    'none': {},
    'each block': {'gradient_checkpointing': True},
    'all but matmuls': {'gradient_checkpointing': True, 'selective_checkpointing': True},
}


class Allocations(TorchDispatchMode):
    """While active, counts the bytes of the tensors that operations make: `now`, and `peak`, the most at once.

    Not counted: what was there before, what an operation takes and gives back inside, the allocator's rounding. Fake
    tensors do not say where they are not 0: half of the positions, as many as diffusion masks on average.
    """

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, {}  # sizes: by the address of the storage object

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.nonzero.default:
            result = torch.arange(args[0].numel() // 2)[:, None]
        else:
            result = operation(*args, **(kwargs or {}))
        inputs = {id(storage) for storage in storages((args, kwargs))}
        for storage in storages(result):
            if id(storage) not in inputs and id(storage) not in self.sizes:
                self.add(storage)
        return result

    def add(self, storage):
        self.sizes[id(storage)] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, id(storage))

    def remove(self, key):
        self.now -= self.sizes.pop(key)


def storages(tree):
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def peak_bytes(architecture, dist, optimizer, model_size, batch_size, **shape):
    """Return the most bytes that are there in a training step: weights, buffers and moments included."""
    with FakeTensorMode(), Allocations() as allocations:
        trainee = Trainee(architecture, dist, optimizer, model_size, **VOCABULARY, **shape)
        model, block_size = trainee.model, shape['block_size']
        tokens = torch.zeros(batch_size, block_size + model.extra_tokens, dtype=torch.long)
        noise = torch.zeros(batch_size, 1 + block_size) if model.needs_noise else None
        beliefs = {'k': 8, 'depth': optim.MAX_DEPTH} if model.has_beliefs else {}
        for _ in range(2):  # the first makes the moments
            allocations.peak = allocations.now
            trainee.step(data.Batch(tokens, None, noise, None), 1, beliefs)
    return allocations.peak


def main():
    dist, most = runtime.Runtime('cpu', dtype), 0
    say(f'{model_size}, {batch_size} rows of {block_size} tokens, {dist.dtype}, {optimizer}; GB of 10⁹ bytes')
    for name in ARCHITECTURES:
        for kind, changes in CHECKPOINTING.items():
            shape = dict(block_size=block_size, **changes)
            peak = peak_bytes(name, dist, optimizer, model_size, batch_size, **shape) / 1e9
            say(f'  {name}, checkpointing {kind}: {peak:.2f}')
            most = max(most, peak if kind == 'each block' else 0)
    is_recipe = (model_size, block_size, batch_size) == ('xl', 1024, 8)
    finish([Target('GB of xl with checkpointing, the most of all', most, '<=', 12.0)] * is_recipe)


if __name__ == '__main__':
    main()
