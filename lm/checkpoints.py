"""Checkpoints, and the folder of the run that they stand in."""

import contextlib
import shutil
from pathlib import Path

import torch

from lm import pretrained
from lm.configurator import ROOT, UserError, restore
from lm.files import save_atomically
from model import ARCHITECTURES, SIZES, ModelConfig

CHECKPOINT_FORMAT = 1


# ---------------------------------------------------------------------------- checkpoints


def save(path, checkpoint):
    save_atomically(path, lambda file: torch.save({'format': CHECKPOINT_FORMAT, **checkpoint}, file))


def is_pretrained(path):
    """Whether a path is a Hugging Face folder or, given as text, could be the name of a model of its hub."""
    path, is_name = Path(path), isinstance(path, str) and not path.endswith('.pt')
    if path.is_dir():
        settings = path / 'config.json'
        return (
            not (path / 'ckpt.pt').exists()
            and settings.is_file()
            and '"model_type"' in settings.read_text('utf-8')
        )
    owner = path.parent  # out/run is no name where there is a folder out/
    return (
        is_name
        and not path.exists()
        and not path.is_absolute()
        and len(path.parts) <= 2
        and (owner == Path() or not owner.exists())
    )


def load(path, token=None, revision=None, mmap=False, sharded=False):
    """The dict that `ckpt.pt` holds, its tensors on the CPU.

    path: the file, a run folder, a Hugging Face folder, or the id of a model of its hub, for which `token` and
    `revision` are. mmap: leave the tensors on disk until they are used. sharded: whether the weights may be
    missing, because a folder beside it has them.
    """
    if is_pretrained(path):
        return pretrained.load(path, token, revision)
    path = Path(path) / 'ckpt.pt' if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f'There is no checkpoint at {path}; correct the path, or train one.')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except Exception as error:  # damaged bytes make it fail in a dozen ways, OSError and KeyError among them
        reason = str(error).splitlines()[0] if str(error) else 'it ends too early'
        raise UserError(
            f'{path} is damaged or no checkpoint of ours ({reason}); take another one of the run, '
            'best.pt or one under checkpoints/.'
        ) from error
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    if 'architecture' in checkpoint.get('train_config', {}):
        checkpoint.setdefault('architecture', checkpoint['train_config']['architecture'])
    missing = {'architecture', 'model_config', 'model_state_dict', 'tokenizer'} - set(checkpoint)
    if missing == {'model_state_dict'} and 'sharded' in checkpoint:
        if sharded:
            return checkpoint
        raise UserError(
            f'The weights of {path} are sharded in {path.parent / "sharded"}; put them into it with '
            f'`python hf.py consolidate {path.parent}`, or let the run finish.'
        )
    if missing:
        raise UserError(
            f'{path} lacks {", ".join(sorted(missing))}, so it is no checkpoint of these scripts; '
            'give the ckpt.pt of a run.'
        )
    return checkpoint


def load_run(path, namespace, config, fixed):
    """The checkpoint to continue, and [(key, its value, the given value)] of the settings that differ.

    Every setting that the user did not give is set to the run's own; one of `fixed` that differs is refused.
    """
    checkpoint = load(path, mmap=config.get('fsdp', False), sharded=True)
    if not {'optimizer_state_dict', 'sharded'} & set(checkpoint):
        raise UserError(
            f'{path} holds weights without the state of their training; continue from a ckpt.pt, or '
            f'start a new run with --init_from={path}.'
        )
    saved = {
        key: value
        for key, value in checkpoint['train_config'].items()
        if key not in ('out_dir', 'resume_from', 'overwrite') and (key != 'init_from' or key in fixed)
    }
    changed = restore(namespace, config, saved)
    for key, before, now in changed:
        if key in fixed:
            raise UserError(
                f'The run of {path} has {key}={before!r}, so it cannot go on with {now!r}; '
                f'leave --{key} out, or start a new run.'
            )
    return checkpoint, changed


def check_same_rows(checkpoint, path, folder, rows_per_step, config):
    """A UserError where the run would go on with other rows than those that it has not seen yet."""
    if checkpoint['data'] != folder.fingerprint and 'dataset' not in config.given:
        raise UserError(
            f'{folder.path} was prepared anew since the run of {path}; to go on with it all the same, '
            f'add --dataset={config["dataset"]}.'
        )
    if checkpoint['rows_per_step'] != rows_per_step:
        raise UserError(
            f'The run of {path} has {checkpoint["rows_per_step"]} rows per step, not {rows_per_step}; '
            'choose batch_size and gradient_accumulation_steps so that their product with the number of '
            'ranks stays, or rows would be skipped or repeated.'
        )


def load_training_state(checkpoint, optimizers, scaler):
    """What the optimizers and the scaler have gathered; their settings are this run's."""
    for name, optimizer in optimizers.items():
        state = checkpoint['optimizer_state_dict'][name]['state']
        optimizer.load_state_dict({**optimizer.state_dict(), 'state': state})
    if checkpoint['scaler_state_dict']:  # empty unless dtype was float16
        scaler.load_state_dict(checkpoint['scaler_state_dict'])


def make_model(architecture, **model_config):
    """A model by its architecture's name and ModelConfig's fields; what cannot be is a UserError."""
    if architecture not in ARCHITECTURES:
        raise UserError(f'architecture is {architecture!r}; choose {" or ".join(ARCHITECTURES)}.')
    try:
        return ARCHITECTURES[architecture](ModelConfig(**model_config))
    except ValueError as error:
        raise UserError(str(error)) from error


def size_of(model_size):
    """(n_layer, n_head, n_embd) of a named size."""
    if model_size not in SIZES:
        raise UserError(f'model_size is {model_size!r}; choose {", ".join(SIZES)}.')
    return SIZES[model_size]


def check_fits(checkpoint, path, architecture, tokenizer, dataset):
    """A UserError where the checkpoint at `path` is of another architecture or vocabulary than the run."""
    if checkpoint['architecture'] != architecture:
        raise UserError(
            f'{path} holds architecture={checkpoint["architecture"]!r}, not {architecture!r}; use '
            f'--architecture={checkpoint["architecture"]}.'
        )
    if checkpoint['tokenizer'] != tokenizer.to_json():
        raise UserError(
            f'{path} was trained with another vocabulary ({checkpoint["model_config"]["vocab_size"]} '
            f'tokens) than that of {dataset} ({tokenizer.vocab_size}); prepare the data with the '
            "checkpoint's tokenizer, or start from scratch."
        )


def as_start(checkpoint, path, architecture, block_size=None):
    """The checkpoint at `path` as the start of a run of `architecture`, with rows of at most `block_size` tokens.

    Weights of `ar` start the others: a state goes on predicting the token after it (`shift`), and the rows of
    <|mask|> and <|ignore|>, which `ar` never learned, become the mean of the embedding.
    """
    config = dict(checkpoint['model_config'])
    weights = dict(checkpoint.get('ema_state_dict') or checkpoint['model_state_dict'])
    if block_size and block_size > config['block_size']:
        raise UserError(
            f'{path} sees at most {config["block_size"]} tokens; choose no larger block_size than that, '
            f'{block_size} is one.'
        )
    if block_size and 'positions.weight' in weights:
        weights['positions.weight'] = weights['positions.weight'][
            : config.get('position_offset', 0) + block_size
        ]
    config['block_size'] = block_size or config['block_size']
    before = checkpoint['architecture']
    if before != architecture:
        if (before, architecture) not in (('ar', 'diffusion'), ('ar', 'sdd'), ('diffusion', 'sdd')):
            raise UserError(
                f'{path} holds architecture={before!r}, which cannot start {architecture!r}; use '
                f'--architecture={before}.'
            )
        config['shift'] = before == 'ar' or config.get('shift', False)
        own = [i for i in (config['mask_id'], config['ignore_id']) if i is not None]
        others = [i for i in range(config['vocab_size']) if i not in own]
        for name in {'embedding.weight', 'unembedding.weight'} & set(weights) if before == 'ar' else ():
            weights[name] = weights[name].float().clone()
            weights[name][own] = weights[name][others].mean(0)
        if architecture == 'sdd':  # as it starts
            weights['believed.weight'] = torch.eye(weights['embedding.weight'].size(1))
    return {
        **checkpoint,
        'architecture': architecture,
        'model_config': config,
        'model_state_dict': weights,
        'ema_state_dict': None,
        'converted_from': before if before != architecture else None,
    }


def load_weights(model, checkpoint):
    """Into a model, the averaged weights where there are some."""
    model.load_state_dict(checkpoint.get('ema_state_dict') or checkpoint['model_state_dict'])


def load_model(checkpoint, device, **changes):
    """The checkpoint's model, with its averaged weights where there are some, ready to evaluate or sample."""
    model = make_model(checkpoint['architecture'], **{**checkpoint['model_config'], **changes})
    load_weights(model, checkpoint)
    return model.to(device).eval()


# ---------------------------------------------------------------------------- the run folder

RUN_FILES = (
    'config.json',
    'ckpt.pt',
    'best.pt',
    'metrics.csv',
    'logs.log',
    'eval_results.json',
    'checkpoints',
    'sharded',
    'metrics.py',
    'predictions.npz',
)


def holds_run(path):
    return any((Path(path) / name).exists() for name in RUN_FILES)


def resume_path(resume_from, out_dir):
    """The checkpoint that --resume_from means, or None to start afresh."""
    if not resume_from:
        return None
    if resume_from == 'auto':
        if not out_dir:
            raise UserError(
                "--resume_from=auto needs an out_dir, which holds the run's ckpt.pt; add --out_dir=PATH."
            )
        path = Path(out_dir) / 'ckpt.pt'
        return path if path.exists() else None
    path = Path(resume_from)
    return path / 'ckpt.pt' if path.is_dir() else path


def run_of(checkpoint_path):
    """The run folder that a checkpoint stands in: beside it, or above checkpoints/checkpoint-N/."""
    folder = Path(checkpoint_path).resolve().parent
    return folder.parent.parent if folder.parent.name == 'checkpoints' else folder


def open_run_folder(out_dir, name, suffix='', continued=None, overwrite=False):
    """Makes the run's folder and returns it: `out_dir`, or out/{name}-v{n} with the next free n.

    A folder that holds a run is refused, unless it is the one `continued` or `overwrite` gives it up.
    """
    if not out_dir:
        suffix = f'-{suffix}' if suffix else ''
        n = 1
        while True:
            folder = ROOT / 'out' / f'{name}-v{n}{suffix}'
            with contextlib.suppress(FileExistsError):  # another run may take the number just now
                folder.mkdir(parents=True)
                return folder
            n += 1
    folder = Path(out_dir)
    if (folder / 'tokenizer.json').exists():
        raise UserError(f'{folder} is a prepared data folder, not a place for a run; choose another out_dir.')
    if holds_run(folder) and folder.resolve() != continued:
        if not overwrite:
            raise UserError(
                f'{folder} already holds a run; continue it with --resume_from=auto, give it up with '
                '--overwrite, or choose another out_dir.'
            )
        for file in RUN_FILES:
            path = folder / file
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def keep(folder, step, limit, best_step):
    """Copies ckpt.pt to checkpoints/checkpoint-{step}/, and keeps the newest `limit` and the best."""
    kept = folder / 'checkpoints' / f'checkpoint-{step}'
    kept.mkdir(parents=True, exist_ok=True)
    with open(folder / 'ckpt.pt', 'rb') as source:
        save_atomically(kept / 'ckpt.pt', lambda file: shutil.copyfileobj(source, file))
    steps = sorted(int(path.name.split('-')[1]) for path in (folder / 'checkpoints').glob('checkpoint-*'))
    for old in [s for s in steps if s not in (step, best_step)][: max(0, len(steps) - limit)]:
        shutil.rmtree(folder / 'checkpoints' / f'checkpoint-{old}')
