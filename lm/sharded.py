"""Models too large for one GPU: FSDP2 shards weights, gradients and optimizer state over ranks (fsdp=True).

The state of such a run is a folder of torch.distributed.checkpoint (DCP), sharded/step-N in the run's folder,
which any number of ranks can read. ckpt.pt names it, and gets the weights at the end of the run or by
`consolidate`. The functions are those of lm/checkpoints.py for runs that are not sharded.
"""

import pickle
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as state_dicts
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lm import checkpoints, runtime
from lm.configurator import UserError, require
from lm.files import first_line, lock
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
    for name, weight in model.named_parameters() if weights else ():
        parts = weights[name].chunk(dist.world_size)  # FSDP2 shards the first dimension as this does
        if dist.rank < len(parts):  # a small tensor has fewer parts than there are ranks
            local(weight.detach()).copy_(parts[dist.rank])
    return model


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


@contextmanager
def failures_named(folder, problem):
    """Turn what DCP raises on all ranks, whichever rank's error it is, into a UserError."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if not (folder / '.metadata').exists():  # half a state would keep the disk full
            shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f'{folder} {problem} ({first_line(cause)}); the state before it is kept.') from error


def save_state(path, model, optimizer, dist, checkpoint, weights, is_last):
    """Write the state of all ranks, then ckpt.pt; delete older states. is_last: only ckpt.pt, with weights()."""
    folder = path.parent / 'sharded' / f'step-{checkpoint["global_step"]}'
    whole = {'model_state_dict': weights()} if is_last else {}
    if not is_last:
        model_state, optimizer_state = model_and_optimizer_state(model, list(optimizer.parts.values()))
        with failures_named(folder, 'could not be written'):
            dcp.save({'model': model_state, 'optimizer': optimizer_state}, checkpoint_id=folder)
    if dist.is_main:
        checkpoints.save(path, {**checkpoint, **whole, 'sharded': folder.name})
        for old in set(folder.parent.iterdir()) - {folder}:
            shutil.rmtree(old)


# What DCP's .metadata is made of; anything else that it names would be code to run.
PARTS = {f'{metadata.__name__}.{name}' for name in [*metadata.__all__, '_MEM_FORMAT_ENCODING']}
PARTS |= {'torch.distributed.checkpoint.filesystem._StorageInfo'}
PARTS |= {'torch.serialization._get_layout', 'torch.Size'}
PARTS |= {'pathlib.PosixPath', 'pathlib._local.PosixPath'}
PARTS |= {str(dtype) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        require(f'{module}.{name}' in PARTS, f'it would run {module}.{name}')
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """Read tensors from a folder of DCP, whose own reader runs whatever code its files hold."""

    def read_metadata(self, *args, **kwargs):
        with open(self.path / '.metadata', 'rb') as file:
            found = Unpickler(file).load()
        tensors, kind = found.state_dict_metadata, metadata.TensorStorageMetadata  # what is none is a pickle
        found.state_dict_metadata = {name: x for name, x in tensors.items() if isinstance(x, kind)}
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


def read(state, path, checkpoint):
    """Fill a state dict from the folder that a ckpt.pt at `path` names."""
    folder = path.parent / 'sharded' / checkpoint['sharded']
    found = (folder / '.metadata').exists()
    require(found, f'{path} needs {folder}, which is not there; copy the whole run folder.')
    with failures_named(folder, 'is damaged'):
        dcp.load(state, storage_reader=Reader(folder))


def load_state(resumed, model, optimizer):
    """Fill model and optimizer, whatever the number of ranks; the optimizer's settings are this run's."""
    optimizers = list(optimizer.parts.values())
    weights, state = model_and_optimizer_state(model, optimizers)
    read({'model': weights, 'optimizer': {'state': state['state']}}, resumed.path, resumed.checkpoint)
    state_dicts.set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=state)


def consolidate(source):
    """Add the weights of a sharded run to its ckpt.pt, from which every other script reads them."""
    path = Path(source) / 'ckpt.pt' if Path(source).is_dir() else Path(source)
    checkpoint = checkpoints.load(path, sharded=True)
    require('sharded' in checkpoint, f'{path} is no checkpoint of a sharded run; it can be used as it is.')
    model = checkpoints.make_model(checkpoint['architecture'], **checkpoint['model_config'])
    state = model.state_dict()
    read({'model': state}, path, checkpoint)
    with lock(path.parent):
        checkpoints.save(path, {**checkpoint, 'model_state_dict': state})
