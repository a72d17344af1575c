"""Checkpoints, what continues from them, and the run folder that they stand in."""

import contextlib
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from lm import pretrained
from lm.configurator import ROOT, UserError, require, restore, user_errors
from lm.files import save_atomically, write_json
from lm.pretrained import current_names
from model import ARCHITECTURES, SIZES, ModelConfig, architecture_name

CHECKPOINT_FORMAT = 1


def save(path, checkpoint):
    save_atomically(path, lambda file: torch.save({'format': CHECKPOINT_FORMAT, **checkpoint}, file))


def is_pretrained(path):
    """Say whether a path is a Hugging Face folder or, given as text, could be the name of a model of its hub."""
    path, is_name = Path(path), isinstance(path, str) and not path.endswith('.pt')
    if path.is_dir():
        settings = path / 'config.json'
        is_run = (path / 'ckpt.pt').exists() or not settings.is_file()
        return not is_run and '"model_type"' in settings.read_text('utf-8')
    owner = path.parent  # out/run is no name where there is a folder out/
    is_id = not path.is_absolute() and len(path.parts) <= 2 and (owner == Path() or not owner.exists())
    return is_name and is_id and not path.exists()


def load(path, token=None, revision=None, mmap=False, sharded=False, tokenizer=None):
    """Load the dict that `ckpt.pt` holds, its tensors on the CPU.

    path: the file, a run folder, a Hugging Face folder, or the id of a model of its hub, for which `token` and
    `revision` are. mmap: leave the tensors on disk until they are used. sharded: whether the weights may be missing,
    because a folder beside it has them. tokenizer: of a ckpt.pt of nanoGPT's, which does not hold it.
    """
    if is_pretrained(path):
        return pretrained.load(path, token, revision)
    path = Path(path) / 'ckpt.pt' if Path(path).is_dir() else Path(path)
    require(path.is_file(), f'There is no checkpoint at {path}; correct the path, or train one.')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except Exception as error:  # damaged bytes make it fail in a dozen ways, OSError and KeyError among them
        reason = str(error).splitlines()[0] if str(error) else 'it ends too early'
        remedy = 'take another one of the run, best.pt or one under checkpoints/'
        raise UserError(f'{path} is damaged or no checkpoint of ours ({reason}); {remedy}.') from error
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    if {'model', 'model_args'} <= checkpoint.keys():
        checkpoint = pretrained.from_nanogpt(checkpoint, path, tokenizer)
    missing = {'architecture', 'model_config', 'model_state_dict', 'tokenizer'} - set(checkpoint)
    if missing == {'model_state_dict'} and 'sharded' in checkpoint:
        remedy = f'put them into it with `python hf.py consolidate {path.parent}`, or let the run finish'
        require(sharded, f'The weights of {path} are sharded in {path.parent / "sharded"}; {remedy}.')
        return checkpoint
    lacks = ', '.join(sorted(missing))
    require(not missing, f'{path} lacks {lacks}, so it is no checkpoint of ours; give the ckpt.pt of a run.')
    return {k: current_names(x) if k.endswith('_state_dict') else x for k, x in checkpoint.items()}


# ---------------------------------------------------------------------------- models


def make_model(architecture, **model_config):
    """Make a model by its architecture's name and ModelConfig's fields; impossible ones are UserErrors."""
    known = architecture in ARCHITECTURES
    require(known, f'architecture is {architecture!r}; choose {" or ".join(ARCHITECTURES)}.')
    with user_errors():
        return ARCHITECTURES[architecture](ModelConfig(**model_config))


def size_of(model_size):
    """Return n_layer, n_head and n_embd of a named size as a dict."""
    require(model_size in SIZES, f'model_size is {model_size!r}; choose {", ".join(SIZES)}.')
    return dict(zip(('n_layer', 'n_head', 'n_embd'), SIZES[model_size]))


def check_model(checkpoint, path, config, keys=()):
    """Raise a UserError where the model at `path` is another one than the settings that were given say."""
    wanted = size_of(config['model_size']) if 'model_size' in config.given else {}
    wanted |= {key: config[key] for key in keys if key in config.given}
    held = {**checkpoint['model_config'], 'architecture': checkpoint['architecture']}
    for key, value in wanted.items():
        require(value in (None, held[key]), f'{path} has {key}={held[key]!r}, not {value!r}; leave it out.')


def weights_of(checkpoint):
    """Return the weights to evaluate, sample or start from: the averaged ones where there are some."""
    return checkpoint.get('ema_state_dict') or checkpoint['model_state_dict']


def load_model(checkpoint, device, **changes):
    """Make the checkpoint's model with its weights, ready to evaluate or sample."""
    model = make_model(checkpoint['architecture'], **{**checkpoint['model_config'], **changes})
    model.load_state_dict(weights_of(checkpoint))
    return model.to(device).eval()


def check_fits(checkpoint, path, architecture, tokenizer, dataset):
    """Raise a UserError where the checkpoint at `path` is of another architecture or vocabulary than the run."""
    held, size = checkpoint['architecture'], checkpoint['model_config']['vocab_size']
    remedy = f'use --architecture={held}'
    require(held == architecture, f'{path} holds architecture={held!r}, not {architecture!r}; {remedy}.')
    remedy = "prepare the data with the checkpoint's tokenizer, or start from scratch"
    same, here = checkpoint['tokenizer'] == tokenizer.to_json(), tokenizer.vocab_size
    require(same, f'{path} has another vocabulary ({size} tokens) than {dataset} ({here}); {remedy}.')


def convert(checkpoint, path, architecture, block_size=None):
    """Turn the checkpoint at `path` into the start of a run of `architecture`, rows of at most `block_size` tokens.

    Weights of a causal model start the bidirectional ones: a hidden state goes on predicting the token after it
    (`shift`), and the rows of <|mask|> and <|ignore|>, which it never learned, become the mean of the embedding.
    """
    config, weights = dict(checkpoint['model_config']), dict(weights_of(checkpoint))
    longest = config['block_size']
    fits = not block_size or block_size <= longest
    require(fits, f'{path} sees {longest} tokens; choose a smaller block_size.')
    if block_size and 'positions.weight' in weights:
        rows = config.get('position_offset', 0) + block_size
        weights['positions.weight'] = weights['positions.weight'][:rows]
    config['block_size'] = block_size or longest
    source = checkpoint['architecture']
    if source != architecture:
        before, after = ARCHITECTURES[source], ARCHITECTURES.get(architecture)
        possible = after and (before.causal and not after.causal or issubclass(after, before))
        remedy = f'use --architecture={source}'
        require(possible, f'{path} holds architecture={source!r}, no start for {architecture!r}; {remedy}.')
        if before.causal:
            config['shift'] = True
            special = [i for i in (config['mask_id'], config['ignore_id']) if i is not None]
            others = [i for i in range(config['vocab_size']) if i not in special]
            for name in {'embedding.weight', 'unembedding.weight'} & set(weights):
                weights[name] = weights[name].float().clone()
                weights[name][special] = weights[name][others].mean(0)
        weights |= after.new_weights(ModelConfig(**config))
    converted_from = source if source != architecture else None
    start = {'architecture': architecture, 'model_config': config, 'converted_from': converted_from}
    return {**checkpoint, **start, 'model_state_dict': weights, 'ema_state_dict': None}


# ---------------------------------------------------------------------------- what a run saves


@dataclass
class Best:
    """The evaluation with the lowest validation loss so far."""

    step: int = 0
    loss: float = math.inf


def contents(model, step, best, config, tokenizer, start_token, prompt_format):
    """Return what the other scripts need to use a model, but for its weights."""
    state = {'architecture': architecture_name(model), 'seed': config['seed'], 'train_config': dict(config)}
    state |= {'global_step': step, 'best_step': best.step, 'best_val_loss': best.loss}
    state |= {'model_config': vars(model.config), 'tokenizer': tokenizer.to_json()}
    return {**state, 'start_token': start_token, 'prompt_format': prompt_format}


def state_of_run(scaler, batches, log):
    """Return what a run needs to go on beside weights and optimizer."""
    state = {'scaler_state_dict': scaler.state_dict(), 'rows_per_step': batches.rows_per_step}
    return {**state, 'data': batches.folder.fingerprint, 'wandb_run_id': log.wandb_run_id}


def save_if_best(out, step, values, best, checkpoint, weights, dist):
    """Write best.pt where val/loss is the lowest so far, and eval_results.json; returns whether it is.

    checkpoint: a call that returns the contents; weights: one that returns the weights, which all ranks make.
    """
    is_best = values['val/loss'] < best.loss
    if is_best:
        best.step, best.loss = step, values['val/loss']
        state_dict = weights()
        if dist.is_main:
            save(out / 'best.pt', {**checkpoint(), 'model_state_dict': state_dict})
    if dist.is_main:
        results = {'step': step, **values, 'best_step': best.step, 'best_val_loss': best.loss}
        write_json(out / 'eval_results.json', results)
    return is_best


# The next five are the store of weights and training state; lm/sharded.py has the same five for sharded ones.


def place(model, weights, dist):
    """Load weights ({name: tensor}, or None for the random ones) into a model on its device."""
    if weights:
        model.load_state_dict(weights)
    return model.to(dist.device)


def whole_weights(model):
    return model.state_dict()


def gathered(model):
    """Return the context in which a model can generate; where it is not sharded, any."""
    return contextlib.nullcontext()


def save_state(path, model, optimizer, dist, checkpoint, weights, is_last):
    """Write ckpt.pt on rank 0; weights() returns what other scripts load."""
    if dist.is_main:
        states = {'model_state_dict': weights(), 'optimizer_state_dict': optimizer.state_dict()}
        save(path, {**checkpoint, **states})


def load_state(resumed, model, optimizer):
    """Load what the optimizer has gathered; its settings are this run's."""
    optimizer.load_state_dict(resumed.checkpoint['optimizer_state_dict'])


# ---------------------------------------------------------------------------- continuing a run


class Resumed(NamedTuple):
    """The checkpoint that a run continues from; all None and () for a new run."""

    checkpoint: dict = None
    path: Path = None  # of the checkpoint
    run_dir: Path = None  # the run folder that it stands in, or that --resume_from=auto names
    overrides: tuple = ()  # [(key, value before, value now)] of the settings that differ


def resume(namespace, config, fixed):
    """Return the Resumed that --resume_from asks for; every setting that was not given becomes the run's own.

    namespace: globals() of the script; fixed: the settings that a run keeps, of which one that differs is refused.
    """
    resume_from, out_dir = config['resume_from'], config['out_dir']
    if not resume_from:
        return Resumed()
    auto = resume_from == 'auto'
    require(not auto or out_dir, "--resume_from=auto needs the run's folder; add --out_dir=PATH.")
    path = Path(out_dir if auto else resume_from)
    path = path / 'ckpt.pt' if auto or path.is_dir() else path
    if auto and not path.exists():
        return Resumed(run_dir=run_of(path))
    checkpoint = load(path, mmap=config.get('fsdp', False), sharded=True)
    can_go_on, remedy = {'optimizer_state_dict', 'sharded'} & set(checkpoint), f'use it by --init_from={path}'
    require(can_go_on, f'{path} holds weights without the state of training; give a ckpt.pt, or {remedy}.')
    own = {'out_dir', 'resume_from', 'overwrite'} | ({'init_from'} - set(fixed))
    saved = {key: value for key, value in checkpoint['train_config'].items() if key not in own}
    overrides = restore(namespace, config, saved)
    for key, before, now in overrides:
        remedy = f'leave --{key} out, or start a new run'
        require(key not in fixed, f'The run of {path} has {key}={before!r}, not {now!r}; {remedy}.')
    return Resumed(checkpoint, path, run_of(path), overrides)


def continue_run(resumed, store, model, optimizer, scaler, batches, config):
    """Load the state of training and return (step, Best); (0, Best()) for a new run.

    Raises UserError where the run would go on with other rows than those that it has not seen yet.
    """
    checkpoint, path, folder = resumed.checkpoint, resumed.path, batches.folder
    if checkpoint is None:
        return 0, Best()
    same = checkpoint['data'] == folder.fingerprint or 'dataset' in config.given
    remedy = f'to go on with it all the same, add --dataset={config["dataset"]}'
    require(same, f'{folder.path} was prepared anew since the run of {path}; {remedy}.')
    before, now = checkpoint['rows_per_step'], batches.rows_per_step
    remedy = 'keep the product of batch_size, gradient_accumulation_steps and ranks, or rows would be skipped or repeated'
    require(before == now, f'The run of {path} has {before} rows per step, not {now}; {remedy}.')
    store.load_state(resumed, model, optimizer)
    if checkpoint['scaler_state_dict']:  # empty unless dtype was float16
        scaler.load_state_dict(checkpoint['scaler_state_dict'])
    return checkpoint['global_step'], Best(checkpoint['best_step'], checkpoint['best_val_loss'])


# ---------------------------------------------------------------------------- the run folder

RUN_FILES = 'config.json ckpt.pt best.pt metrics.csv logs.log eval_results.json checkpoints sharded'.split()
RUN_FILES += ['metrics.py', 'predictions.npz']


def run_of(checkpoint_path):
    """Return the run folder that a checkpoint stands in: beside it, or above checkpoints/checkpoint-N/."""
    folder = Path(checkpoint_path).resolve().parent
    return folder.parent.parent if folder.parent.name == 'checkpoints' else folder


def open_run_folder(out_dir, name, suffix='', run_dir=None, overwrite=False):
    """Make the run's folder and return it: `out_dir`, or out/{name}-v{n} with the next free n.

    A folder that holds a run is refused, unless it is the `run_dir` to continue, or `overwrite` deletes it.
    """
    n = 0
    while not out_dir:
        n += 1
        numbered = f'{name}-v{n}' + (f'-{suffix}' if suffix else '')
        folder = ROOT / 'out' / re.sub(r'[^\w.+=-]', '-', numbered)  # a name of data leads nowhere else
        with contextlib.suppress(FileExistsError):  # another run may take the number just now
            folder.mkdir(parents=True)
            return folder
    folder = Path(out_dir)
    is_data = (folder / 'tokenizer.json').exists()
    require(not is_data, f'{folder} is a prepared data folder, no place for a run; choose another out_dir.')
    if folder.resolve() != run_dir and any((folder / name).exists() for name in RUN_FILES):
        remedy = 'continue it with --resume_from=auto, delete it with --overwrite, or choose another out_dir'
        require(overwrite, f'{folder} already holds a run; {remedy}.')
        for path in (folder / file for file in RUN_FILES):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def keep_copy(folder, step, limit, best_step):
    """Copy ckpt.pt to checkpoints/checkpoint-{step}/, and keep the newest `limit` copies (None: all) and the best."""
    copy, state = folder / 'checkpoints' / f'checkpoint-{step}', Path('sharded', f'step-{step}')
    copy.mkdir(parents=True, exist_ok=True)
    if (folder / state).is_dir():  # its files are written once and never changed
        shutil.rmtree(copy / state, ignore_errors=True)
        shutil.copytree(folder / state, copy / state, copy_function=os.link)
    with open(folder / 'ckpt.pt', 'rb') as source:
        save_atomically(copy / 'ckpt.pt', lambda file: shutil.copyfileobj(source, file))
    steps = sorted(int(path.name.split('-')[1]) for path in (folder / 'checkpoints').glob('checkpoint-*'))
    too_many = max(0, len(steps) - (limit or len(steps)))
    for old in [s for s in steps if s not in (step, best_step)][:too_many]:
        shutil.rmtree(folder / 'checkpoints' / f'checkpoint-{old}')
