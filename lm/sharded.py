"""Models too large for one GPU: FSDP2 shards weights, gradients and optimizer state over ranks (fsdp=True).

The state of such a run is a folder of torch.distributed.checkpoint (DCP), sharded/step-N in the run's folder,
which any number of ranks can read. ckpt.pt names it, and gets the weights at the end of the run or by
`consolidate`. The functions are those of lm/checkpoints.py for runs that are not sharded.
"""

import itertools
import pickle
import shutil
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as state_dicts
from torch.distributed.checkpoint import CheckpointException, metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from lm import checkpoints, runtime
from lm.configurator import UserError, require
from lm.files import first_line, lock
from lm.optim import local

warnings.filterwarnings('ignore', 'torch.distributed is disabled')  # a single process saves alone on purpose


class DrawnInParts(TorchDispatchMode):
    """The context in which a model is made from scratch, of which a rank only keeps its part: its matrices are on the
    device 'meta'. Each is drawn whole, one at a time, so that it starts with the numbers of one process."""

    def __init__(self, dist):
        super().__init__()
        self.dist = dist

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten.empty.memory_format and len(args[0]) == 2:
            return function(*args, **{**kwargs, 'device': 'meta'})
        if function._schema.is_mutable and args[0].is_meta:  # normal_, uniform_, copy_
            whole = function(torch.empty(args[0].shape), *args[1:], **kwargs)
            args[0].part = part_of(whole, self.dist).clone()
            return args[0]
        return function(*args, **kwargs)


def part_of(whole, dist):
    """Return what of a tensor a rank has, as FSDP2 shards it; a small one has fewer parts than there are ranks."""
    return [*whole.chunk(dist.world_size), *[whole[:0]] * dist.world_size][dist.rank]


def place(model, weights, dist):
    """Shard a model in place, so that no device ever holds it whole, and return it.

    Nor does a rank if the model is on 'meta': each copies its part of `weights`, one tensor after the other, or what
    was drawn of it; where a state has them, `load_state` is to follow. The embedding, which is the head as well,
    belongs to the root, so the loss is computed in the root's forward.
    """
    on_meta = model.embedding.weight.is_meta
    parts = {name: x.part for name, x in model.named_parameters() if hasattr(x, 'part')}
    if dist.world_size > 1:
        dtype = runtime.DTYPES[dist.dtype]  # not of the inputs, noise and rotary tables
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(dist.device.type, (dist.world_size,))
        for layer in [module for module in model.modules() if hasattr(module, 'codes')]:  # quantized
            codes = layer._buffers.pop('codes').view(dtype)  # FSDP shards parameters, and casts all but these
            layer.register_parameter('codes', torch.nn.Parameter(codes, requires_grad=False))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        if dist.dtype == 'bfloat16':  # weights are gathered in it; the residual stream stays in float32
            for module in filter(None, (model.embedding, model.project_in)):
                module.register_forward_hook(lambda module, args, x: x.float())
    if not on_meta:
        return model.to(dist.device)
    model._apply(lambda x: torch.empty_like(x, device=dist.device) if x.is_meta else x.to(dist.device))
    for name, table in model.tables().items():
        setattr(model, name, table.to(dist.device))
    parts |= {name: part_of(x, dist) for name, x in (weights or {}).items()}
    for name, part in parts.items():
        local(model.get_parameter(name).detach()).copy_(part)
    return model


OPTIONS = state_dicts.StateDictOptions(ignore_frozen_params=True, strict=False)  # adapters without their base


def state_of(model, optimizer):
    """Return what DCP saves, and fills: the state dicts of the model's trained weights and of the optimizer."""
    parts = list(optimizer.parts.values())
    if not any(part.state for part in parts):
        # DCP needs initialised optimizer state: take an empty step, then reset the step counter.
        state_dicts.get_state_dict(model, parts)
        for state in [state for part in parts for state in part.state.values() if 'step' in state]:
            state['step'].zero_()
    model_state, optimizer_state = state_dicts.get_state_dict(model, parts, options=OPTIONS)
    state = {'model': model_state, 'optimizer': optimizer_state}
    return {**state, 'ema': optimizer.average.ema} if optimizer.average else state


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
    folder, whole = path.parent / 'sharded', weights() if is_last else {}
    if is_last:  # the state is there
        folder /= dist.from_main(lambda: checkpoints.load(path, mmap=True, sharded=True)['sharded'])
    else:
        folder /= dist.from_main(lambda: new_name(folder, f'step-{checkpoint["global_step"]}'))
        state = state_of(model, optimizer)
        with failures_named(folder, 'could not be written'):
            dcp.save(state, checkpoint_id=folder)
    if dist.is_main:
        checkpoints.save(path, {**checkpoint, **whole, 'sharded': folder.name})
        for old in set(folder.parent.iterdir()) - {folder}:
            shutil.rmtree(old)


def new_name(parent, name):
    """Name a state that replaces no whole one: ckpt.pt may need that, and copies share its files."""
    names = itertools.chain([name], (f'{name}-{n}' for n in itertools.count(2)))
    return next(name for name in names if not (parent / name / '.metadata').exists())


# What DCP's .metadata is made of; anything else that it names would be code to run.
PARTS = {f'{metadata.__name__}.{name}' for name in [*metadata.__all__, '_MEM_FORMAT_ENCODING']}
PARTS |= {'torch.distributed.checkpoint.filesystem._StorageInfo'}
PARTS |= {'torch.serialization._get_layout', 'torch.Size', 'pathlib.PosixPath', 'pathlib._local.PosixPath'}
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
    state, was_averaged = state_of(model, optimizer), resumed.checkpoint['train_config'].get('ema_decay')
    if not was_averaged:
        state.pop('ema', None)
    wanted = {**state, 'optimizer': {'state': state['optimizer']['state']}}
    read(wanted, resumed.path, resumed.checkpoint)
    states = dict(model_state_dict=state['model'], optim_state_dict=state['optimizer'], options=OPTIONS)
    state_dicts.set_state_dict(model, list(optimizer.parts.values()), **states)
    if optimizer.average and not was_averaged:
        optimizer.average.load(dict(model.named_parameters()))


def consolidate(source):
    """Add the weights of a sharded run to its ckpt.pt, from which every other script reads them."""
    path = Path(source) / 'ckpt.pt' if Path(source).is_dir() else Path(source)
    with lock(path.parent) if path.is_file() else nullcontext():
        checkpoint = checkpoints.load(path, sharded=True)
        require('sharded' in checkpoint, f'{path} is not of a sharded run; it can be used as it is.')
        remedy = f'let the run finish, or merge {path.parent / "adapter"} into its base'
        is_base = 'adapter_state_dict' not in checkpoint
        require(is_base, f'{path} holds adapters without their base; {remedy}.')
        model = checkpoints.make_model(checkpoint['architecture'], **checkpoint['model_config'])
        states = {'model': model.state_dict()}
        if checkpoint['train_config'].get('ema_decay'):
            states['ema'] = {name: torch.empty_like(x) for name, x in states['model'].items()}
        read(states, path, checkpoint)
        checkpoints.save(path, {**checkpoint, **{f'{name}_state_dict': x for name, x in states.items()}})
