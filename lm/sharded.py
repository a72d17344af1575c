"""Models too large for one GPU: FSDP2 shards weights, gradients and optimizer state over ranks (fsdp=True).

The state of such a run is a folder of torch.distributed.checkpoint (DCP), sharded/step-N in the run's folder,
which any number of ranks can read. ckpt.pt names it, and gets the weights at the end of the run or by
`consolidate`. The functions are those of lm/checkpoints.py for runs that are not sharded.
"""

import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as state_dicts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lm import checkpoints, runtime
from lm.configurator import require
from lm.optim import local

warnings.filterwarnings('ignore', 'torch.distributed is disabled')  # a single process saves alone on purpose


def place(model, weights, dist):
    """Shard a model in place, so that no device ever holds it whole, and return it.

    Nor does a rank if the model is on the device 'meta': each copies its part of `weights`, one tensor after the
    other; without weights, `load_state` is to follow. The embedding, which is the head as well, belongs to the
    root, so the loss is computed in the root's forward.
    """
    on_meta = model.embedding.weight.is_meta
    if dist.world_size > 1:
        dtype = runtime.DTYPES[dist.dtype]  # not of the inputs, noise and rotary tables
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(dist.device.type, (dist.world_size,))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    if not on_meta:
        return model.to(dist.device)
    model.to_empty(device=dist.device)
    for name, table in model.tables().items():
        setattr(model, name, table.to(dist.device))
    if weights:
        load_own_part(model, weights, dist)
    return model


@torch.no_grad()
def load_own_part(model, weights, dist):
    """Copy this rank's parts of whole tensors; FSDP2 shards the first dimension as torch.chunk does."""
    for name, weight in model.named_parameters():
        parts = weights[name].chunk(dist.world_size)
        if dist.rank < len(parts):  # a small tensor has fewer parts than there are ranks
            local(weight).copy_(parts[dist.rank])


def whole_weights(model):
    """Return the state dict with whole tensors on the CPU, on rank 0; every rank has to call it."""
    options = state_dicts.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return state_dicts.get_model_state_dict(model, options=options)


@contextmanager
def gathered(model):
    """Gather the root's weights for methods other than forward; every rank has to enter the context."""
    if hasattr(model, 'unshard'):
        model.unshard()
    yield
    if hasattr(model, 'reshard'):
        model.reshard()


def model_and_optimizer_state(model, optimizers):
    """Return the two state dicts that DCP saves, and fills."""
    if not any(optimizer.state for optimizer in optimizers):
        # DCP needs initialised optimizer state: take an empty step, then reset the step counter.
        state_dicts.get_state_dict(model, optimizers)
        for state in [state for optimizer in optimizers for state in optimizer.state.values()]:
            state['step'].zero_()
    return state_dicts.get_state_dict(model, optimizers)


def save_state(path, model, optimizer, dist, checkpoint, weights, is_last):
    """Write the state of all ranks, then ckpt.pt, with weights() if the run ends; delete older states."""
    whole = {'model_state_dict': weights()} if is_last else {}
    folder = path.parent / 'sharded' / f'step-{checkpoint["global_step"]}'
    model_state, optimizer_state = model_and_optimizer_state(model, list(optimizer.parts.values()))
    dcp.save({'model': model_state, 'optimizer': optimizer_state}, checkpoint_id=folder)
    if dist.is_main:
        checkpoints.save(path, {**checkpoint, **whole, 'sharded': folder.name})
        for old in set(folder.parent.iterdir()) - {folder}:
            shutil.rmtree(old)


def load_state(resumed, model, optimizer):
    """Fill model and optimizer, whatever the number of ranks; the optimizer's settings are this run's."""
    folder = resumed.path.parent / 'sharded' / resumed.checkpoint['sharded']
    found = (folder / '.metadata').exists()
    require(found, f'{resumed.path} needs {folder}, which is not there; copy the whole run folder.')
    optimizers = list(optimizer.parts.values())
    weights, state = model_and_optimizer_state(model, optimizers)
    dcp.load({'model': weights, 'optimizer': {'state': state['state']}}, checkpoint_id=folder)
    state_dicts.set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=state)


def consolidate(source):
    """Add the weights of a sharded run to its ckpt.pt, from which every other script reads them."""
    path = Path(source) / 'ckpt.pt' if Path(source).is_dir() else Path(source)
    checkpoint = checkpoints.load(path, sharded=True)
    require('sharded' in checkpoint, f'{path} is no checkpoint of a sharded run; it can be used as it is.')
    model = checkpoints.make_model(checkpoint['architecture'], **checkpoint['model_config'])
    model.to(runtime.DTYPES[checkpoint['train_config'].get('master_weights', 'float32')])
    state = model.state_dict()
    dcp.load({'model': state}, checkpoint_id=path.parent / 'sharded' / checkpoint['sharded'])
    checkpoints.save(path, {**checkpoint, 'model_state_dict': state})
