"""Count what a rank of many holds and sends for a model of 32B, without them: PyTorch's fake group and fake tensors.

python tests/fake_ranks.py 64 muon      # ranks, optimizer
"""

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lm import checkpoints, optim, runtime, sharded

QWEN_32B = dict(n_layer=64, n_head=40, n_kv_head=8, n_embd=5120, head_dim=128, mlp='swiglu', mlp_width=27648)
QWEN_32B.update(
    norm='rms_gain', qkv_bias=True, qk_norm=False, logit_softcap=0.0, tied=False, vocab_size=152064
)
QWEN_32B.update(block_size=2048, gradient_checkpointing=True, embedding_shortcuts=False, neighbours=0)


class Sent(TorchDispatchMode):
    """The calls of collectives within the context, and the bytes of the largest tensor of each."""

    def __enter__(self):
        self.calls, self.bytes = Counter(), Counter()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ('c10d', '_c10d_functional', '_dtensor'):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.calls[str(function)] += 1
            self.bytes[str(function)] += max(x.nbytes for x in tensors)
        return function(*args, **(kwargs or {}))

    def print(self, what):
        for name, calls in self.calls.items():
            print(f'{what}: {name}, {calls} calls, {self.bytes[name] / 1e9:.1f} GB')


def main(ranks, optimizer):
    torch.distributed.init_process_group('fake', rank=0, world_size=ranks, store=FakeStore())
    make_mesh = sharded.init_device_mesh

    def mesh_of_real_tensors(*arguments):
        with unset_fake_temporarily():
            return make_mesh(*arguments)

    sharded.init_device_mesh = mesh_of_real_tensors
    dist = SimpleNamespace(rank=0, world_size=ranks, device=torch.device('cpu'), dtype='bfloat16')
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device('meta'):
            model = checkpoints.make_model('ar', **QWEN_32B)
        model = sharded.place(model, None, dist).train()
        held = sum(optim.local(p).numel() for p in model.parameters())
        print(f'{sum(p.numel() for p in model.parameters()):,} parameters, {held:,} on a rank')
        sizes = runtime.memory_estimate(model, 1, 2048, dist)
        print(', '.join(f'{name} {size / 1e9:.2f} GB' for name, size in sizes.items()))
        opt = optim.make_optimizer(model, optimizer, 1e-4, 0.9, 0.95, 0.1)
        with Sent() as sent:
            model(torch.zeros(1, 2049, dtype=torch.long))[0].backward()
        sent.print('forward and backward')
        with Sent() as sent:
            for part in opt.parts.values():
                part.step()
        sent.print('step')
        states = [x for part in opt.parts.values() for state in part.state.values() for x in state.values()]
        print(f'state of the optimizer: {sum(optim.local(x).nbytes for x in states) / 1e9:.2f} GB on a rank')


if __name__ == '__main__':
    main(int(sys.argv[1]), sys.argv[2])
