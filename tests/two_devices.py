"""A second device on a machine that has none, to find what mixes devices before a GPU does.

Its tensors wrap tensors of the CPU. Each operation is computed there, but refused, as CUDA refuses it, if it gets
tensors of both; a number (a tensor without dimensions) and the indices of a tensor may lie on the CPU.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from lm import runtime

DEVICE = torch.device('lazy:0')  # one whose gradients PyTorch computes in the calling thread, as the CPU's
ATEN = torch.ops.aten
MOVES = (ATEN.copy_.default, ATEN._to_copy.default)
INDEXING = (ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default, ATEN._index_put_impl_.default)


class There(torch.Tensor):
    """A tensor of the second device."""

    @staticmethod
    def __new__(cls, inner):
        told = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        tensor = cls._make_wrapper_subclass(cls, inner.size(), device=DEVICE, **told)
        tensor.inner = inner.detach()
        return tensor

    def __tensor_flatten__(self):
        return ['inner'], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, size, stride):
        return There(tensors['inner'])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def __deepcopy__(self, memo):
        copied = There(self.inner.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)

    def tolist(self):
        return self.inner.tolist()

    def data_ptr(self):
        return self.inner.data_ptr()


class TwoDevices(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def is_there(device):
    return device is not None and torch.device(device).type == DEVICE.type


def here(x):
    """Return what stands on the CPU for an argument."""
    is_name = isinstance(x, torch.device) and is_there(x)
    return x.inner if isinstance(x, There) else torch.device('cpu') if is_name else x


def compute(function, args, kwargs):
    """Compute an operation on the CPU; its results lie there if an argument does, or where `device` says."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    others = [x for x in tensors if not isinstance(x, There)]
    is_from_there, device = len(others) < len(tensors), kwargs.get('device')
    if is_from_there and function not in MOVES:
        indices = [x for x in args[1] if x is not None] if function in INDEXING else []
        mixed = [x for x in others if x.dim() and not any(x is index for index in indices)]
        if mixed:
            raise RuntimeError(f'{function} got {[(type(x).__name__, *x.shape) for x in tensors]}')
    found = function(*tree_map(here, args), **tree_map(here, kwargs))
    if function is ATEN.copy_.default:
        return args[0]
    if not (is_there(device) if device is not None else is_from_there):
        return found
    found = tree_map(lambda x: There(x) if isinstance(x, torch.Tensor) else x, found)
    return return_and_correct_aliasing(function, args, kwargs, found) if is_from_there else found


@contextmanager
def second_device():
    """Let scripts of this process run on the second device, in float32; functions of PyTorch that ask for the kind
    of a device, and know this one not, get what a GPU would give them."""
    save, tensor, is_autocast = torch.save, torch.tensor, torch.is_autocast_enabled
    adamw = torch.optim.AdamW.__init__

    def make_tensor(*args, device=None, **settings):
        made = tensor(*args, **settings, device=None if is_there(device) else device)
        return made.to(DEVICE) if is_there(device) else made

    def save_from_here(value, *args, **settings):
        return save(tree_map(here, value), *args, **settings)

    def enter(self):  # inference mode, in which moves are not told, without it
        self.before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)

    def make_adamw(self, *args, fused=None, **settings):
        return adamw(self, *args, **settings, foreach=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, DEVICE.type, SimpleNamespace(synchronize=lambda: None), raising=False)
        patch.setattr(torch, 'is_autocast_enabled', lambda kind: kind != DEVICE.type and is_autocast(kind))
        patch.setattr(torch.inference_mode, '__enter__', enter)
        patch.setattr(torch.inference_mode, '__exit__', lambda self, *_: torch.set_grad_enabled(self.before))
        patch.setattr(torch, 'tensor', make_tensor)
        patch.setattr(torch, 'save', save_from_here)
        patch.setattr(torch.optim.AdamW, '__init__', make_adamw)
        patch.setattr(runtime, 'pick_device', lambda name: DEVICE)
        patch.setattr(runtime, 'pick_dtype', lambda name, device: 'float32')
        with TwoDevices():
            yield
