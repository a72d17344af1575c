"""How much memory a training step takes: the bytes of the tensors that are alive in it."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """While active, counts the bytes of the tensors that operations make: `now`, and `peak`, the most at once.

    What was there before is not counted, nor what an operation takes and gives back inside; the allocator's own
    rounding and gaps come on top. It counts on any device, and with fake tensors, which hold nothing, as well.
    """

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, {}  # seen: sizes by the address of the storage object

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        known = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and id(x.untyped_storage()) not in known:
                self.add(x.untyped_storage())
        return result

    def add(self, storage):
        key = id(storage)
        if key not in self.seen:
            self.seen[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key)

    def remove(self, key):
        self.now -= self.seen.pop(key, 0)


def state_bytes(model, optimizers):
    """What stays between steps, by what for: weights (buffers included) and the optimizers' moments."""
    moments = [
        value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()
    ]
    return {'weights': total([*model.parameters(), *model.buffers()]), 'moments': total(moments)}


def total(tensors):
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))
