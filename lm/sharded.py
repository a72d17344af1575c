"""Models that are too large for one GPU: FSDP2 shards weights, gradients and moments over the ranks (fsdp=True).

The state of such a run is a folder that torch.distributed.checkpoint writes, each rank its part, for any number
of ranks to read: out/<run>/sharded/step-N. The run's ckpt.pt says which, and holds everything but the weights;
at the end of the run, and by `consolidate`, it gets these too and is a checkpoint like any other.
"""

import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lm import checkpoints, optim, runtime
from lm.configurator import UserError


def check(**settings):
    """A UserError for each setting that does not go with fsdp; those that are given as true are the wrong ones."""
    for name, wrong in settings.items():
        if wrong:
            raise UserError(f'fsdp does not go with {name}; leave one of them out.')


def shard(model, run, weights):
    """Shards the model in place: no device ever holds it whole.

    Nor does a rank where the model comes without values, on the device 'meta': each takes its part of `weights`,
    {name: tensor}, which may lie in a file, one tensor after the other; where there are none, `load` is to follow.

    The embedding, which is the head as well, belongs to the root, so the loss is made within the root's forward.
    A single process keeps everything, and writes the same checkpoints.
    """
    empty = any(weight.is_meta for weight in model.parameters())
    if run.world_size > 1:
        mesh = init_device_mesh(run.device.type, (run.world_size,))
        policy = MixedPrecisionPolicy()
        if run.dtype != 'float32':
            policy = MixedPrecisionPolicy(
                param_dtype=runtime.DTYPES[run.dtype], reduce_dtype=torch.float32, cast_forward_inputs=False
            )  # noise and rotary tables stay as they are
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    if not empty:
        return model.to(run.device)
    model.to_empty(device=run.device)
    for name, table in model.tables().items():
        setattr(model, name, table.to(run.device))
    if weights:
        fill(model, weights, run)
    return model


@torch.no_grad()
def fill(model, weights, run):
    """A rank's parts of whole tensors by name: FSDP2 shards the first dimension as torch.chunk does."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        odd = ', '.join(sorted(parameters.keys() ^ weights.keys())[:3])
        raise UserError(
            f'The checkpoint does not hold the plain weights of its model ({odd}, ...); give another one.'
        )
    for name, weight in parameters.items():
        for part in weights[name].chunk(run.world_size)[
            run.rank : run.rank + 1
        ]:  # small ones have fewer parts
            optim.local(weight).copy_(part)


@contextmanager
def root_in_place(model):
    """While it lasts, methods other than forward find the root's own weights whole; every rank calls the same."""
    sharded = hasattr(model, 'unshard')
    if sharded:
        model.unshard()
    try:
        yield
    finally:
        if sharded:
            model.reshard()


def whole_weights(model):
    """The state dict with whole tensors on the CPU, on rank 0; every rank has to call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def state_of(model, optimizers):
    """What the optimizers have gathered. Those that have made no step yet are made to make one, of nothing; it is
    not to count."""
    fresh = not any(optimizer.state for optimizer in optimizers)
    state = get_optimizer_state_dict(model, optimizers)
    if fresh:
        for optimizer in optimizers:
            for values in optimizer.state.values():
                values['step'].zero_()
        state = get_optimizer_state_dict(model, optimizers)
    return state


def save(out, step, model, optimizers, run, write_rest):
    """Writes the state of all ranks, then `write_rest(folder's name)` on rank 0, then drops older states."""
    folder = Path(out) / 'sharded' / f'step-{step}'
    state = {'model': get_model_state_dict(model), 'optimizer': state_of(model, optimizers)}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that a single process saves alone
        dcp.save(state, checkpoint_id=folder)
    if run.is_main:
        write_rest(folder.name)
        for old in folder.parent.iterdir():
            if old != folder:
                shutil.rmtree(old)


def load(checkpoint_path, name, model, optimizers):
    """Fills a model and its optimizers, sharded over any number of ranks or not, from what `save` wrote."""
    folder = Path(checkpoint_path).parent / 'sharded' / name
    if not (folder / '.metadata').exists():
        raise UserError(f'{checkpoint_path} needs {folder}, which is not there; copy the whole run folder.')
    state = {'model': get_model_state_dict(model), 'optimizer': state_of(model, optimizers)}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dcp.load(state, checkpoint_id=folder)
    settings = [[{**group, 'params': None} for group in o.param_groups] for o in optimizers]
    set_model_state_dict(model, state['model'])
    set_optimizer_state_dict(model, optimizers, state['optimizer'])
    for optimizer, groups in zip(optimizers, settings):  # the settings are this run's
        for group, before in zip(optimizer.param_groups, groups):
            group.update({**before, 'params': group['params']})


def consolidate(path):
    """Puts the weights of a sharded run into its ckpt.pt, from which every other script reads them."""
    path = Path(path) / 'ckpt.pt' if Path(path).is_dir() else Path(path)
    checkpoint = checkpoints.load(path, sharded=True)
    if 'sharded' not in checkpoint:
        raise UserError(f'{path} is no checkpoint of a sharded run; it can be used as it is.')
    model = checkpoints.make_model(checkpoint['architecture'], **checkpoint['model_config'])
    model.to(getattr(torch, checkpoint['train_config'].get('master_weights', 'float32')))
    state = {'model': model.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dcp.load(state, checkpoint_id=path.parent / 'sharded' / checkpoint['sharded'])
    checkpoints.save(path, {**checkpoint, 'model_state_dict': state['model']})
