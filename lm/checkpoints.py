"""Checkpoints: what they hold, the models that are made of them, and the runs that go on from them."""

import contextlib
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed

from lm import pretrained, quantize
from lm.configurator import ROOT, check_choice, note, report_idle, require, restore, user_errors
from lm.files import as_sentence, save_atomically, write_json
from lm.optim import local
from lm.run_folder import RESULTS, newest_checkpoint, run_of
from model import ARCHITECTURES, SIZES, ModelConfig, architecture_name, check

CHECKPOINT_FORMAT = 1
NEEDED = {'architecture', 'model_config', 'model_state_dict', 'tokenizer', 'global_step', 'start_token'}
# Of what is used long after it is read.
TYPES = dict.fromkeys(['global_step', 'start_token', 'best_step', 'later', 'rows_per_step'], int)
TYPES |= dict.fromkeys(['best_val_loss', 'best_score'], float)
TYPES |= dict.fromkeys(['tokenizer', 'prompt_format', 'wandb_run_id'], str | None)
TYPES |= {'train_config': dict, 'pending': dict | None, 'came_with': dict | None}
OTHERS = 'take another one of the run, best.pt or one under checkpoints/'


def save(path, checkpoint):
    save_atomically(path, lambda file: torch.save({'format': CHECKPOINT_FORMAT, **checkpoint}, file))


def is_pretrained(path):
    """Say whether a path is a Hugging Face folder or, given as text, could be the name of a model of its hub."""
    path, is_name = Path(path), isinstance(path, str) and not path.endswith('.pt')
    if path.is_dir():
        settings, is_run = path / 'config.json', (path / 'ckpt.pt').exists()
        return settings.is_file() and not is_run and '"model_type"' in settings.read_text('utf-8', 'replace')
    first = Path(path.parts[0])  # out/run is no name where there is a folder out/, and /run is none
    return is_name and len(path.parts) <= 2 and not first.exists()


def load(path, token=None, revision=None, mmap=False, sharded=False, tokenizer=None, architecture=''):
    """Load the dict that `ckpt.pt` holds, its tensors on the CPU.

    path: the file, a run folder, a Hugging Face folder, or the id of a model of its hub, for which `token` and
    `revision` are. mmap: leave the tensors on disk until they are used. sharded: whether the weights may be in a folder
    beside it. tokenizer: of a ckpt.pt of nanoGPT's. architecture: of one that does not say it; another is refused.
    """
    if is_pretrained(path):
        run = next((out / path for out in (Path('out'), ROOT / 'out') if (out / path).is_dir()), None)
        require(not run or Path(path).exists(), f'There is no checkpoint at {path}; did you mean {run}?')
        checkpoint = pretrained.load(path, token, revision)
        require_architecture(checkpoint, path, architecture)
        return checkpoint
    path = newest_checkpoint(path) if Path(path).is_dir() else Path(path)
    require(path.is_file(), f'There is no checkpoint at {path}; correct the path, or train one.')
    with as_sentence(f'{path} is damaged or no checkpoint of ours', OTHERS):
        with zipfile.ZipFile(path) as file:  # PyTorch's advice for other files is unsafe
            damaged = file.testzip()  # torch.load never looks at the checksums
        require(not damaged, f'{path} is damaged ({damaged} has another checksum); {OTHERS}.')
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    if {'model', 'model_args'} <= checkpoint.keys():
        checkpoint = pretrained.from_nanogpt(checkpoint, path, tokenizer)
    require_architecture(checkpoint, path, architecture)
    missing = NEEDED - checkpoint.keys()
    if missing == {'model_state_dict'} and 'sharded' in checkpoint:
        remedy = f'put them into it with `python hf.py consolidate {path.parent}`, or let the run finish'
        require(sharded, f'The weights of {path} are sharded in {path.parent / "sharded"}; {remedy}.')
        return checkpoint
    require(not missing, f'{path} lacks {", ".join(sorted(missing))}; give the ckpt.pt of a run.')
    with unedited(path):
        checkpoint['model_config'] = pretrained.current_config(checkpoint['model_config'])
        names = [name for name, x in checkpoint.items() if name.endswith('_state_dict') and x]
        checkpoint |= {name: pretrained.current_names(checkpoint[name]) for name in names}
        check_contents(checkpoint)
    return checkpoint


def require_architecture(checkpoint, path, architecture):
    """Raise a UserError where a checkpoint says another architecture than one that was given; complete it."""
    held = checkpoint.setdefault('architecture', architecture) if architecture else ''
    problem = f'{path} holds architecture={held!r}, not {architecture!r}'
    require(held == architecture, f'{problem}; leave --architecture out.')


def tokenizer_of(path, token, revision):
    """Return what `--tokenizer` takes for a run that starts from `path`: a model of the hub is fetched."""
    if path == 'scratch' or Path(path).exists() or not is_pretrained(path):
        return '' if path == 'scratch' else path
    return str(pretrained.download(path, token, revision))


def check_contents(checkpoint):
    """Raise some error where an entry has another type than it should, or the weights are not those of the model."""
    for key in TYPES.keys() & checkpoint.keys():
        check(isinstance(checkpoint[key], TYPES[key]), f'{key} is of {type(checkpoint[key])}')
    config, weights = checkpoint['model_config'], checkpoint['model_state_dict']
    step, start, size = checkpoint['global_step'], checkpoint['start_token'], config['vocab_size']
    fits = min(step, start, config['block_size']) >= 0 and (start < size or not checkpoint['tokenizer'])
    check(fits, f'global_step is {step}, start_token {start}, block_size {config["block_size"]}')
    check(config['n_layer'] <= len(weights), f'n_layer is {config["n_layer"]}')  # before so many are made
    with torch.device('meta'):
        model = ARCHITECTURES[checkpoint['architecture']](ModelConfig(**config))
    for state_dict in filter(None, (weights, checkpoint.get('ema_state_dict'))):
        model.load_state_dict(state_dict, assign=True)  # copies nothing
        check(all(weight.isfinite().all() for weight in state_dict.values()), 'a weight is not finite')


def unedited(path):
    """Return the context in which the contents of a checkpoint are read: one that somebody edited is a UserError."""
    return as_sentence(f'{path} was edited, is damaged or of other code', OTHERS)


# ---------------------------------------------------------------------------- models


def make_model(architecture, **model_config):
    """Make a model by its architecture's name and ModelConfig's fields; impossible ones are UserErrors."""
    check_choice({'architecture': architecture}, 'architecture', ARCHITECTURES)
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


def load_model(checkpoint, device, weights='float32'):
    """Make the checkpoint's model with its weights, ready to evaluate or sample; weights: how they are kept."""
    model = make_model(checkpoint['architecture'], **checkpoint['model_config'])
    model.load_state_dict(weights_of(checkpoint))
    quantize.pack(model.eval(), weights, torch.device(device))
    return model.to(device)


def as_ar(checkpoint, path):
    """Return an `ar` model as it is; of a diffusion model trained with ar_weight the one that its clean tokens are."""
    if ARCHITECTURES[checkpoint['architecture']].causal:
        return checkpoint
    config = checkpoint['model_config']
    require(config.get('ar_weight'), f'{path} was not trained with --ar_weight; choose another sampler.')
    own = ARCHITECTURES[checkpoint['architecture']].new_weights(ModelConfig(**config))
    weights = {name: x for name, x in weights_of(checkpoint).items() if name not in own}
    config = {**config, 'block_length': (0,), 'ar_weight': 0.0}
    parts = {'architecture': pretrained.CAUSAL_LM, 'model_config': config, 'model_state_dict': weights}
    return {**checkpoint, **parts, 'ema_state_dict': None}


def check_fits(checkpoint, path, architecture, tokenizer, dataset):
    """Raise a UserError where the checkpoint at `path` is of another architecture or vocabulary than the run."""
    held, size = checkpoint['architecture'], checkpoint['model_config']['vocab_size']
    remedy = f'use --architecture={held}'
    require(held == architecture, f'{path} holds architecture={held!r}, not {architecture!r}; {remedy}.')
    remedy = "prepare the data with the checkpoint's tokenizer, or start from scratch"
    same, here = checkpoint['tokenizer'] == tokenizer.to_json(), tokenizer.vocab_size
    require(same, f'{path} has another vocabulary ({size} tokens) than {dataset} ({here}); {remedy}.')


def check_padding(config, tokenizer):
    """Raise a UserError for blocks or an ar_weight where texts are padded with their end, as LLaDA's are: these would
    not learn where a text ends."""
    fits = not config.has_two_streams or tokenizer.ignore_id != tokenizer.endoftext_id
    require(fits, 'This tokenizer pads texts with their end; leave block_length and ar_weight out.')


def convert(checkpoint, path, architecture, block_size=None, **blocks):
    """Turn the checkpoint at `path` into the start of a run of `architecture`, rows of at most `block_size` tokens.

    Weights of a causal model start the bidirectional ones: a hidden state of a whole row goes on predicting the token
    after it (`shift`), and the rows of <|mask|> and <|ignore|>, which it never learned, become the embedding's mean.
    blocks: a block_length and ar_weight other than the checkpoint's.
    """
    longest = checkpoint['model_config']['block_size']
    block_size = block_size or longest
    require(block_size <= longest, f'{path} sees {longest} tokens; choose a smaller block_size.')
    with user_errors():
        config = ModelConfig(**{**checkpoint['model_config'], 'block_size': block_size, **blocks})
    problem = f'{path} predicts a token from the position before it'
    impossible = config.shift and config.has_two_streams
    require(not impossible, f'{problem}, so it is no start for blocks or an ar_weight; leave these out.')
    weights, source = dict(weights_of(checkpoint)), checkpoint['architecture']
    if config.position == 'learned':
        weights['positions.weight'] = weights['positions.weight'][: config.position_offset + block_size]
    if source != architecture:
        before, after = ARCHITECTURES[source], ARCHITECTURES.get(architecture)
        possible = after and (before.causal and not after.causal or issubclass(after, before))
        remedy = f'use --architecture={source}'
        require(possible, f'{path} holds architecture={source!r}, no start for {architecture!r}; {remedy}.')
        if before.causal and not after.causal:
            config.shift = not config.has_two_streams
            special = [i for i in (config.mask_id, config.ignore_id) if i is not None]
            others = [i for i in range(config.vocab_size) if i not in special]
            for name in {'embedding.weight', 'unembedding.weight'} & set(weights):
                weights[name] = weights[name].float().clone()
                weights[name][special] = weights[name][others].mean(0)
        weights = {**after.new_weights(config), **weights}
        with torch.device('meta'):
            lacking = sorted(make_model(architecture, **vars(config)).state_dict().keys() - weights.keys())
        problem = f'{path} has no {", ".join(lacking[:3])} of architecture={architecture!r}'
        require(not lacking, f'{problem}; let new_weights of {after.__name__} in model.py return a start.')
    converted_from = source if source != architecture else None
    start = {'architecture': architecture, 'model_config': vars(config), 'converted_from': converted_from}
    return {**checkpoint, **start, 'model_state_dict': weights, 'ema_state_dict': None}


# ---------------------------------------------------------------------------- what a run saves


@dataclass
class Best:
    """The evaluation with the lowest validation loss so far, and how many came after it."""

    step: int = 0
    loss: float = math.inf
    later: int = 0


def contents(model, step, best, config, initial, tokenizer, start_token, prompt_format, trained=None):
    """Return what the other scripts need to use a model, but for its weights; UserError where one of these is
    not finite, or of the module `trained` that it is a part of: nothing is saved over a checkpoint that can be used."""
    weights = [(name, local(x)) for name, x in (trained or model).named_parameters() if x.requires_grad]
    broken = next((name for name, x in weights if not x.isfinite().all()), None)
    remedy = f'the last checkpoint is kept; try a lower learning_rate than {config["learning_rate"]}'
    require(not broken, f'{broken} is not finite after step {step}; {remedy}.')
    state = {'architecture': architecture_name(model), 'seed': config['seed'], 'train_config': dict(config)}
    state |= {'global_step': step, 'best_step': best.step, 'best_val_loss': best.loss, 'later': best.later}
    state |= {'model_config': vars(model.config), 'tokenizer': tokenizer.to_json()}
    kept = initial or {}  # a model that was taught to answer goes on knowing how it was asked
    state |= {'start_token': start_token, 'prompt_format': prompt_format or kept.get('prompt_format')}
    return {**state, 'came_with': kept.get('came_with')}  # of a pretrained folder, for exports


def state_of_run(inputs, pending, scaler, log):
    """Return what a run needs to go on beside weights and optimizer; inputs, pending: see `continue_run`."""
    state = {**inputs, 'pending': pending, 'scaler_state_dict': scaler.state_dict()}
    return {**state, 'wandb_run_id': log.wandb_run_id}


def save_if_best(out, step, values, best, checkpoint, weights, dist):
    """Write best.pt where val/loss is the lowest so far, and eval_results.json; returns whether it is.

    checkpoint, weights: calls that return the contents and {name: state dict} of the weights, which all ranks make.
    """
    is_best = values['val/loss'] < best.loss
    best.later += 1
    if is_best:
        best.step, best.loss, best.later = step, values['val/loss'], 0
        state = {**checkpoint(), **weights()}
        if dist.is_main:
            save(out / 'best.pt', state)
    if dist.is_main:
        results = {'step': step, **values, 'best_step': best.step, 'best_val_loss': best.loss}
        write_json(out / 'eval_results.json', results)
    return is_best


def whole(tensors):
    """Gather {name: tensor} on the CPU of rank 0, one after the other, and nothing elsewhere. All ranks call it."""
    found, is_main = {}, not distributed.is_initialized() or distributed.get_rank() == 0
    for name, x in tensors.items():
        x = x.detach().full_tensor() if hasattr(x, 'full_tensor') else x.detach()  # of a sharded model
        found |= {name: x.cpu()} if is_main else {}
    return found


@contextlib.contextmanager
def gathered(model):
    """Gather a sharded root's weights for methods other than forward; every rank has to enter the context."""
    is_sharded = hasattr(model, 'unshard')
    if is_sharded:
        model.unshard()
    yield
    if is_sharded:
        model.reshard()


# The next three are the store of weights and training state; lm/sharded.py has the same three for sharded ones.


def place(model, weights, dist):
    """Load weights ({name: tensor}, or None for the random ones) into a model on its device."""
    if weights:
        model.load_state_dict(weights)
    return model.to(dist.device)


def save_state(path, model, optimizer, dist, checkpoint, weights, is_last):
    """Write ckpt.pt on rank 0; weights() returns what other scripts load. is_last: once more, at the end of the run."""
    if dist.is_main:
        save(path, {**checkpoint, **weights(), 'optimizer_state_dict': optimizer.state_dict()})


def load_state(resumed, model, optimizer):
    """Load what the optimizer has gathered; its settings are this run's, but for the learning rate of the last step."""
    states = resumed.checkpoint['optimizer_state_dict']
    optimizer.load_state_dict(states)
    optimizer.set_lr(next(iter(states.values()))['param_groups'][0]['lr'])
    for weight, state in (pair for part in optimizer.parts.values() for pair in part.state.items()):
        fits = {x.shape for x in state.values()} <= {weight.shape, torch.Size()}
        check(fits, 'optimizer_state_dict is of other weights')
    if optimizer.average and 'ema_state_dict' in resumed.checkpoint:
        optimizer.average.load(resumed.checkpoint['ema_state_dict'])


# ---------------------------------------------------------------------------- continuing a run


class Resumed(NamedTuple):
    """The checkpoint that a run continues from; all None and () for a new run."""

    checkpoint: dict = None
    path: Path = None  # of the checkpoint
    run_dir: Path = None  # the run folder that it stands in, or that --resume_from=auto names
    overrides: tuple = ()  # [(key, value before, value now)] of the settings that differ
    stamp: tuple = None  # of the run's ckpt.pt when the checkpoint was read

    def is_current(self, out):
        """Say whether no other process has saved a state in the folder `out` since that of its run was read."""
        return out.resolve() != self.run_dir or self.stamp == stamp_of(out / 'ckpt.pt')

    def goes_on_in(self, out):
        """Say whether the checkpoint is the run's own state, which need not be written again."""
        return self.checkpoint is not None and self.path.resolve() == (out / 'ckpt.pt').resolve()


def stamp_of(path):
    state = path.stat() if path.exists() else None
    return state and (state.st_size, state.st_mtime_ns)


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
    path = newest_checkpoint(path) if auto or path.is_dir() else path
    if auto and not path.exists():
        lost = ', '.join(name for name in RESULTS if path.with_name(name).exists())
        remedy = 'put it back, begin another run with --init_from, or delete this one with --overwrite'
        require(not lost or config['overwrite'], f'{path} of a run that left {lost} is not there; {remedy}.')
        return Resumed(run_dir=None if lost else run_of(path))
    stamp = stamp_of(run_of(path) / 'ckpt.pt')
    checkpoint = load(path, mmap=config.get('fsdp', False), sharded=True)
    can_go_on, remedy = {'optimizer_state_dict', 'sharded'} & set(checkpoint), f'use it by --init_from={path}'
    require(can_go_on, f'{path} holds weights without the state of training; give a ckpt.pt, or {remedy}.')
    is_run = path.name == 'ckpt.pt' or (run_of(path) / 'logs.log').exists()
    require(is_run or out_dir, f'{path} stands in no run folder; add --out_dir=PATH.')
    if out_dir and Path(out_dir).resolve() == run_of(path):
        report_idle(config, f'where the run of {path} goes on in its folder', 'overwrite')
    saved, own = checkpoint.get('train_config', {}), {'out_dir', 'resume_from', 'overwrite', 'changed_data'}
    saved = {key: value for key, value in saved.items() if key not in own}
    other = {'mode', 'use_peft', 'target_func'} & saved.keys() - config.keys()  # which each script alone has
    require(not other, f'The run of {path} is of another script; continue it with that one, or {remedy}.')
    for key in sorted(saved.keys() - config.keys() - {'eval_batches'}):
        note(f'{key}={saved[key]!r}, of the run of {path}, is no setting of this script.')
    if 'eval_batches' in saved:
        saved['eval_tokens'] = saved['eval_batches'] * saved['batch_size'] * (saved['block_size'] or 0)
        saved['eval_examples'] = saved['eval_batches'] * saved.get('eval_batch_size', 0)
    of_itself = {'depth', 'num_layers_to_finetune'}  # whose None says something; of others it is: as it comes
    config.given -= {key for key in set(fixed) - of_itself if key in config and config[key] is None}
    earlier = {'noisy_every': 1, 'decay_embedding': True}  # as runs of earlier versions were trained
    overrides = restore(namespace, config, earlier | saved)
    for key, before, now in overrides:
        problem = f'The run of {path} has {key}={before!r}, not {now!r}'
        require(key not in [*fixed, 'run_suffix'], f'{problem}; leave --{key} out, or start a new run.')
    return Resumed(checkpoint, path, run_of(path), overrides, stamp)


def continue_run(resumed, store, model, optimizer, scaler, inputs, config):
    """Load the state of training and return (step, Best, the metrics of a step that was saved before its evaluation, or
    None where there is none such); (0, Best(), {}) for a new run.

    inputs: rows_per_step and data, {name: checksum}, of which UserError refuses others, but for --changed_data.
    """
    checkpoint, path = resumed.checkpoint, resumed.path
    if checkpoint is None:
        return 0, Best(), {}
    with unedited(path):
        before, now = checkpoint['rows_per_step'], inputs['rows_per_step']
        remedy = 'keep the product of batch_size, gradient_accumulation_steps and ranks'
        require(before == now, f'The run of {path} has {before} rows per step, not {now}; {remedy}.')
        held, data = checkpoint.get('data') or {}, inputs['data']
        if isinstance(held, str):  # of an earlier version: the hash of a file, or those of a mix
            held = {} if ':' in held else {'train_tokens.bin': held}
        changed = [name for name in held if held[name] != data.get(name)]
        refused = [] if config['changed_data'] else changed
        overridden = {key for key, *_ in resumed.overrides}
        if 'dataset' in overridden:  # on purpose, but for what adapters go on
            refused = [name for name in refused if name.startswith('the weights of')]
        remedy = 'put it back, or go on all the same with --changed_data'
        require(not refused, f'{", ".join(refused)} changed since the run of {path}; {remedy}.')
        resumed.overrides.extend((name, held[name], data.get(name)) for name in changed)
        store.load_state(resumed, model, optimizer)
        if checkpoint['scaler_state_dict']:  # empty unless dtype was float16
            scaler.load_state_dict(checkpoint['scaler_state_dict'])
        step, pending, own = checkpoint['global_step'], checkpoint.get('pending'), resumed.run_dir / 'best.pt'
        is_copy = path.resolve().parent != resumed.run_dir
        of = load(own, mmap=True) if is_copy and own.exists() else checkpoint
        best = Best(of['best_step'], of['best_val_loss'], checkpoint.get('later', 0))
        if 'later' not in checkpoint or best.step != checkpoint['best_step']:
            every = checkpoint['train_config'].get('eval_every') or 1
            waits = pending is not None
            best.later = (step - best.step) // every - waits  # below 0 until the run is there again
        compare = {'eval_tokens', 'eval_examples', 'best_by', 'k_schedule'}
        if ':' in config.get('dataset', ''):  # a mix, whose weights may be others
            compare.add('dataset')
        elsewhere = config['out_dir'] and Path(config['out_dir']).resolve() != resumed.run_dir
        if changed or elsewhere or overridden & compare:
            best = Best(step)  # figures of another evaluation do not compare; and best.pt stays where it is
        return step, best, pending
