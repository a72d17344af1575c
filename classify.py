"""Trains or fine-tunes a model to classify sequences, algorithmic tasks or texts.

python classify.py --target_func=fn_c --sequence_length=20 --train_set_size=2000
python classify.py --task=sentiment --train_langs=eng --init_from=out/ar-books-tiny-v1
torchrun --standalone --nproc_per_node=2 classify.py --target_func=fn_a --device=cpu
"""

import copy
import math
import time
from pathlib import Path

import numpy as np
import torch

from lm import checkpoints, classification, files, languages, nanogpt, optim, runtime, tasks
from lm.classification import Examples
from lm.configurator import UserError, check_choice, check_range, configure
from lm.data import Tokenizer
from lm.published import FINETUNED, PUBLISHED, shape_of
from model import SIZES

# --- an algorithmic task ---
target_func = 'fn_c'  # fn_a to fn_l; lm/tasks.py says what each is
sequence_length = 50  # digits per row
train_set_size = 200
test_set_size = 10000
compat = False  # fn_g and fn_h as published at L = 20: test rows repeat, near misses as negatives
# --- or texts ---
task = ''  # of the database, e.g. sentiment; instead of target_func
train_langs = 'eng'  # commas between several
eval_langs = ''  # empty: train_langs
language_database = 'config/languages.py'  # or a .json file of the same shape
model_type = 'normal'  # normal, or ipa: reads the columns {feature}-phoneme
tokenizer = 'bpe'  # of a model from scratch: bpe, bytes, char, gpt2, or a path; of a nanoGPT ckpt.pt: a path
vocab_size = 4096  # of a bpe, which is trained on the training texts
checkpoint_prefix = ''  # with model_prefix: start from checkpoint_prefix/model_prefix/ckpt.pt
model_prefix = ''  # {model_type} in this, in tokenizer or in init_from stands for normal or ipa
# --- both ---
val_set_size = 0  # rows held out of training to choose the best weights by; 0: the database's val split
batch_size = 20  # rows per micro-step and rank
gradient_accumulation_steps = 1
eval_batch_size = 256
group_by_length = True  # the rows of a step are of like length: less padding
# --- model ---
model = ''  # llama3, deepseek, qwen0.6B, qwen1.7B; one of them with _finetune; or a model_size
architecture = 'ar'  # from scratch: ar, diffusion or sdd
model_size = 'tiny'  # tiny, small, medium, large, xl: sets the next three
n_layer: int = None
n_head: int = None
n_embd: int = None
n_kv_head: int = None  # fewer than n_head: grouped-query attention
block_size = 128  # most tokens of a text; an algorithmic task sets its own
dropout = 0.0  # in the trunk and before the head
token_dropout = 0.0  # share of a training row's tokens that are hidden by <|mask|>
gradient_checkpointing = False  # recompute each block in the backward pass: less memory, a third more time
init_from = ''  # start from the weights of this ckpt.pt, run folder, Hugging Face folder or hub id
token = ''  # of the Hugging Face hub, for private models
revision = ''  # a branch, tag or commit of the hub
num_layers_to_finetune: int = None  # only so many top blocks and the head train; None: all, of *_finetune 2
train_final_norm = False  # with them, the norm above the blocks
lora_rank = 0  # train low-rank adapters and the head only; 0: none
lora_alpha = 32.0
lora_dropout = 0.0
lora_dora = False  # adapters that learn the weights' lengths apart (DoRA)
pool = ''  # last, mean; empty: last for ar, mean for the bidirectional ones
num_classes: int = None  # outputs of the head; 1: a single logit. None: 1 for a task, else the database's
# --- optimization ---
num_epochs = 200.0
max_steps: int = None  # instead of num_epochs
optimizer = 'adamw'  # adamw or muon
learning_rate = 3e-4
min_lr = 0.0
warmup_steps: int = None  # None: warmup_ratio of all steps
warmup_ratio = 0.0
schedule = 'cosine'  # cosine, linear, wsd, constant
decay_ratio = 0.2  # of all steps: the decay of wsd
weight_decay = 1e-5
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0  # largest norm of the gradient; 0: not clipped
class_weights = ''  # what a row of each class weighs: balanced, or numbers as in 1,2.5; empty: the same
label_smoothing = 0.0
early_stopping = 0  # evaluations on validation rows without a better one before it stops; 0: none
best_by = 'loss'  # which weights are best on them: loss, accuracy, macro_f1
# --- looking ---
eval_every: int = None  # steps; None: ten times
eval_batches = 0  # batches of each set that are evaluated while training; 0: all; the last time all
log_every = 10  # steps
compare_to = ''  # a run folder: tests in the end whether its predictions differ by more than chance
# --- the run ---
out_dir = ''  # empty: out/{architecture}-{task}-{size}-v{n}
run_suffix = ''  # appended to that name
overwrite = False  # give up the run that out_dir holds
resume_from = ''  # a ckpt.pt or run folder; auto: out_dir's, if it has one
save_every = 0  # steps between checkpoints beside those at evaluations; 0: none
seed = 42
no_wandb = False
wandb_project = 'diffusion-lm-classify'
wandb_run_name = ''  # empty: the run folder's name
# --- the machine ---
device = 'auto'  # cpu, cuda, cuda:N, mps
dtype = 'auto'  # bfloat16, float16, float32
compile: bool = None  # torch.compile; None: on CUDA only
config = configure(globals())
del config['token']  # no secret goes into config.json, the checkpoint or W&B

# What defines a run: a resumed one keeps it. Everything else may change, and the change is printed.
FIXED = (
    'target_func',
    'sequence_length',
    'train_set_size',
    'test_set_size',
    'compat',
    'task',
    'train_langs',
    'eval_langs',
    'model_type',
    'val_set_size',
    'model',
    'architecture',
    'model_size',
    'n_layer',
    'n_head',
    'n_embd',
    'n_kv_head',
    'block_size',
    'num_layers_to_finetune',
    'train_final_norm',
    'lora_rank',
    'lora_alpha',
    'lora_dora',
    'pool',
    'num_classes',
    'optimizer',
    'group_by_length',
    'seed',
)
SHAPE = ('n_layer', 'n_head', 'n_embd', 'n_kv_head')
OF_A_TASK = {'target_func', 'sequence_length', 'train_set_size', 'test_set_size', 'compat'}
OF_TEXTS = {
    'train_langs',
    'eval_langs',
    'language_database',
    'model_type',
    'tokenizer',
    'vocab_size',
    'group_by_length',
}

check_choice(config, 'model', ('', *PUBLISHED, *FINETUNED, *SIZES))
check_choice(config, 'model_type', ('normal', 'ipa'))
check_choice(config, 'pool', ('', 'last', 'mean'))
check_choice(config, 'optimizer', optim.OPTIMIZERS)
check_choice(config, 'schedule', optim.SCHEDULES)
check_range(
    config,
    1,
    math.inf,
    'batch_size',
    'gradient_accumulation_steps',
    'eval_batch_size',
    'max_steps',
    'eval_every',
    'log_every',
    'num_classes',
    'block_size',
    'sequence_length',
)
check_range(
    config,
    0,
    math.inf,
    'num_epochs',
    'learning_rate',
    'min_lr',
    'warmup_steps',
    'warmup_ratio',
    'decay_ratio',
    'weight_decay',
    'grad_clip',
    'eval_batches',
    'save_every',
    'val_set_size',
    'early_stopping',
    'lora_rank',
    'num_layers_to_finetune',
)
check_range(config, 0, 1, 'beta1', 'beta2', 'dropout', 'token_dropout', 'label_smoothing', 'lora_dropout')

# ---------------------------------------------------------------------------- what to continue

checkpoint_path = checkpoints.resume_path(resume_from, out_dir)
checkpoint, changed = None, []
continued = (
    checkpoints.run_of(checkpoint_path or Path(out_dir, 'ckpt.pt')) if resume_from else None
)  # a run folder
if checkpoint_path:
    checkpoint, changed = checkpoints.load_run(checkpoint_path, globals(), config, FIXED)
idle = config.given & (OF_A_TASK if task else OF_TEXTS)
if idle and not checkpoint:
    raise UserError(
        f'{sorted(idle)[0]} says nothing about {"texts" if task else "an algorithmic task"}; leave it out'
        + ('.' if task else ', or give --task=NAME for texts.')
    )
if lora_rank and num_layers_to_finetune is not None:
    raise UserError(
        'lora_rank and num_layers_to_finetune are given, which freeze different things; leave one out.'
    )
model_size = model if model in SIZES else model_size
if model in FINETUNED:
    init_from = init_from or FINETUNED[model]
    num_layers_to_finetune = 2 if num_layers_to_finetune is None and not lora_rank else num_layers_to_finetune
if model_prefix:
    init_from = init_from or str(Path(checkpoint_prefix, model_prefix, 'ckpt.pt'))
init_from, tokenizer = (name.replace('{model_type}', model_type) for name in (init_from, tokenizer))
initial = checkpoint
if init_from and not checkpoint:
    initial = (
        nanogpt.load(init_from, languages.load_tokenizer(tokenizer))
        if 'tokenizer' in config.given
        else checkpoints.load(init_from, token, revision)
    )
run = runtime.Runtime(device, dtype)

# ---------------------------------------------------------------------------- labelled rows

if task:  # what is read, then what turns it into tokens
    texts, num_labels = languages.read_sets(
        languages.load_database(language_database), task, train_langs, eval_langs, model_type
    )
    source = (
        ''  # what the rows of a set are of, beside its name: predictions on the same rows can be compared
    )
else:
    num_labels = 2
    source = tasks.key_of(
        target_func, sequence_length, train_set_size + val_set_size, test_set_size, seed, compat
    )
    digits = tasks.splits(
        target_func, sequence_length, train_set_size, test_set_size, val_set_size, seed, compat
    )
check_choice(config, 'best_by', classification.BEST_BY)
vocabulary = (
    Tokenizer(initial['tokenizer'])
    if initial
    else languages.make_tokenizer(tokenizer, texts, vocab_size)
    if task
    else tasks.digit_tokenizer(target_func)
)
start_token = initial['start_token'] if initial else vocabulary.endoftext_id

# ---------------------------------------------------------------------------- model

if initial:
    architecture, shape = initial['architecture'], dict(initial['model_config'])
    for key in sorted(config.given & {*SHAPE, 'architecture'}):
        if config[key] != {**shape, 'architecture': architecture}[key]:
            raise UserError(f'{init_from} has another {key} than {config[key]!r}; leave --{key} out.')
    block_size = min(block_size, shape['block_size']) if 'block_size' in config.given else shape['block_size']
else:
    shape = dict(zip(('n_layer', 'n_head', 'n_embd'), checkpoints.size_of(model_size)))
    if model in PUBLISHED:
        shape = shape_of(model, block_size)
    shape.update(
        {key: config[key] for key in SHAPE if config[key] is not None},
        block_size=block_size,
        vocab_size=vocabulary.vocab_size,
        mask_id=vocabulary.mask_id,
        ignore_id=vocabulary.ignore_id,
    )
if not task:
    block_size = sequence_length + 1  # with the start token
    if shape.get('position', 'rope') != 'rope' and block_size > shape['block_size']:
        raise UserError(
            f'{init_from} knows {shape["block_size"]} positions, too few for sequence_length='
            f'{sequence_length} and a start; choose shorter sequences.'
        )
    shape['block_size'] = block_size if shape.get('position', 'rope') == 'rope' else shape['block_size']
torch.manual_seed(seed)
trunk = checkpoints.make_model(
    architecture, **{**shape, 'dropout': dropout, 'gradient_checkpointing': gradient_checkpointing}
)
if initial and not checkpoint:
    checkpoints.load_weights(trunk, initial)

if task:
    sets, notes = languages.encode_sets(texts, vocabulary, start_token, block_size)
else:
    ids, notes = tasks.digit_ids(vocabulary, target_func), {}
    sets = {
        name: Examples(list(np.insert(ids[rows], 0, start_token, axis=1)), labels)
        for name, (rows, labels) in digits.items()
        if len(rows)
    }
if val_set_size and 'val' not in sets:
    sets['train'], sets['val'] = classification.hold_out(sets['train'], val_set_size, seed)
tested = [name for name in sets if name not in ('train', 'val')]
others = {
    name: predictions
    for name, (labels, predictions) in (  # of the run to compare with
        classification.load_predictions(compare_to, source) if compare_to else {}
    ).items()
    if name in tested and np.array_equal(labels, classification.gold_of(sets[name].labels))
}
if compare_to and not others:
    raise UserError(
        f'{compare_to} has no predictions for the rows of {", ".join(tested)}; compare runs of the same '
        'data and seed.'
    )
if not num_classes:
    num_classes = num_labels if task else 1
if num_labels and num_labels > max(2, num_classes):
    raise UserError(
        f'num_classes is {num_classes}, but the labels are of {num_labels} classes; leave it out.'
    )
if early_stopping and 'val' not in sets:
    raise UserError(
        'early_stopping needs validation rows, or the test would choose its own result; add '
        '--val_set_size=N, or name a val split in the database.'
    )
raw_classifier, weights = classification.make_classifier(
    trunk, sets['train'], num_classes, pool, dropout, class_weights, label_smoothing, token_dropout
)
if lora_rank:
    from lm import lora  # only where it is wanted

    trunk.requires_grad_(False)
    lora.add_lora(trunk, lora_rank, lora_alpha, dropout=lora_dropout, dora=lora_dora)
elif num_layers_to_finetune is not None:
    classification.train_only(raw_classifier, num_layers_to_finetune, train_final_norm)
if checkpoint:
    classification.restore(raw_classifier, checkpoint)
raw_classifier.to(run.device)

# ---------------------------------------------------------------------------- steps, optimizers, state

rows_per_step = batch_size * gradient_accumulation_steps * run.world_size
num_rows = len(sets['train'])
lengths = np.array([len(row) for row in sets['train'].rows]) if task and group_by_length else None
if max_steps is None or 'num_epochs' in config.given and 'max_steps' not in config.given:
    max_steps = math.ceil(num_epochs * num_rows / rows_per_step)
eval_every = eval_every or max(1, math.ceil(max_steps / 10))
warmup = round(warmup_ratio * max_steps) if warmup_steps is None else warmup_steps
optimizers = optim.make_optimizers(raw_classifier, optimizer, learning_rate, beta1, beta2, weight_decay)
scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == 'float16')
step, best_step, best_val_loss, best_score = 0, 0, math.inf, -math.inf
history = {key: [] for key in ('steps', 'train_losses', 'test_losses', 'train_accuracies', 'test_accuracies')}
finished = False
if checkpoint:
    step, best_step, best_val_loss, best_score, history, finished = (
        checkpoint[key]
        for key in ('global_step', 'best_step', 'best_val_loss', 'best_score', 'history', 'finished')
    )
    if (checkpoint['rows_per_step'], checkpoint['num_rows']) != (rows_per_step, num_rows):
        raise UserError(
            f'The run of {checkpoint_path} has {checkpoint["rows_per_step"]} rows per step of '
            f'{checkpoint["num_rows"]}, not {rows_per_step} of {num_rows}; leave batch_size, ranks and '
            'data as they were, or rows would be skipped or repeated.'
        )
    checkpoints.load_training_state(checkpoint, optimizers, scaler)
    finished = finished and not {'max_steps', 'num_epochs'} & {key for key, _, _ in changed}  # made longer
    if finished and (continued / 'predictions.npz').exists():
        run.exit(f'{checkpoint_path} is at step {step} of {max_steps}: the run is finished.')

if run.device.type == 'cuda' if compile is None else compile:
    raw_classifier.compile()
classifier = run.wrap(raw_classifier)

# ---------------------------------------------------------------------------- run folder, logs

subject = f'{task}-{train_langs.replace(",", "+").replace(":", "-")}' if task else target_func
out = Path(
    run.from_main(
        lambda: checkpoints.open_run_folder(
            out_dir or continued,
            f'{architecture}-{subject}-{model or model_size}',
            run_suffix,
            continued,
            overwrite,
        )
    )
)
config.update(
    {key: getattr(trunk.config, key) for key in SHAPE},
    architecture=architecture,
    max_steps=max_steps,
    block_size=block_size,
    dtype=run.dtype,
    num_classes=num_classes,
    pool=raw_classifier.pool,
    init_from=init_from,
    tokenizer=tokenizer,
    num_layers_to_finetune=num_layers_to_finetune,
)
if run.is_main:
    files.write_json(out / 'config.json', config)
log = runtime.Logger(
    out,
    run.is_main,
    step if checkpoint else -1,
    None
    if no_wandb
    else dict(
        project=wandb_project,
        name=wandb_run_name or out.name,
        config=dict(config),
        run_id=checkpoint['wandb_run_id'] if checkpoint else None,
    ),
)
stop = runtime.StopSignal()
trained = sum(p.numel() for p in raw_classifier.parameters() if p.requires_grad)
log.print(
    f'{out}: {architecture}, {trunk.num_parameters():,} parameters, {trained:,} of them and the head train, '
    f'{run.dtype} on {run.world_size} × {run.device.type}; {max_steps} steps of {rows_per_step} rows',
    ', '.join(
        f'{name}: {len(examples)} rows' + (f' ({notes[name]})' if notes.get(name) else '')
        for name, examples in sets.items()
    ),
)
for key, before, now in changed:
    log.print(f'resumed with {key}={now!r}, which was {before!r}')


# ---------------------------------------------------------------------------- what happens now and then


def save(path, **state):
    """The trunk as all scripts know it, adapters merged, its head, and `state` that this one needs to go on."""
    weights, adapted = trunk.state_dict(), {}
    if lora_rank:
        merged = copy.deepcopy(trunk)
        lora.merge(merged)
        weights, adapted = merged.state_dict(), {'adapted_state_dict': weights}
    checkpoints.save(
        path,
        {
            'architecture': architecture,
            'global_step': step,
            'best_step': best_step,
            'best_val_loss': best_val_loss,
            'model_state_dict': weights,
            **adapted,
            'model_config': vars(trunk.config),
            'head_state_dict': raw_classifier.head.state_dict(),
            'train_config': dict(config),
            'seed': seed,
            'tokenizer': vocabulary.to_json(),
            'start_token': start_token,
            'prompt_format': None,
            **state,
        },
    )


def save_all():
    save(
        out / 'ckpt.pt',
        optimizer_state_dict={name: o.state_dict() for name, o in optimizers.items()},
        scaler_state_dict=scaler.state_dict(),
        rows_per_step=rows_per_step,
        num_rows=num_rows,
        finished=finished,
        best_score=best_score,
        history=history,
        wandb_run_id=log.wandb_run_id,
    )


@torch.no_grad()
def predict(examples):
    """Outputs (N, width) as numpy, the same for any number of ranks; rows of like length come together."""
    order = np.argsort([len(row) for row in examples.rows], kind='stable')
    outputs = torch.zeros(len(examples), raw_classifier.width)
    raw_classifier.eval()
    for start in range(run.rank * eval_batch_size, len(order), run.world_size * eval_batch_size):
        places = order[start : start + eval_batch_size]
        with run.autocast():
            outputs[places] = raw_classifier.outputs(
                *classification.batch_of(examples, places, run.device)
            ).cpu()
    raw_classifier.train()
    return run.sum(outputs).numpy()


def some_of(examples):
    size = min(len(examples), eval_batches * eval_batch_size) if eval_batches else len(examples)
    return examples.take(np.arange(size) * len(examples) // size)


def look():
    """Evaluates all sets, keeps the best weights by the validation rows, and writes down how it goes."""
    global best_step, best_val_loss, best_score
    part = {name: some_of(examples) for name, examples in sets.items()}
    outputs = {name: predict(examples) for name, examples in part.items()}
    figures = {
        name: classification.evaluate_predictions(examples.labels, outputs[name])
        for name, examples in part.items()
    }
    test = classification.evaluate_predictions(
        np.concatenate([part[name].labels for name in tested]),
        np.concatenate([outputs[name] for name in tested]),
    )  # all tests together
    chosen = figures.get('val', test)
    log.print(
        f'step {step}: '
        + ', '.join(
            f'{name} loss {values["loss"]:.4f}, accuracy {values["accuracy"]:.4f}'
            for name, values in figures.items()
        )
    )
    for key, value in (
        ('steps', step),
        ('train_losses', figures['train']['loss']),
        ('test_losses', test['loss']),
        ('train_accuracies', figures['train']['accuracy']),
        ('test_accuracies', test['accuracy']),
    ):
        history[key].append(value)
    score = -chosen['loss'] if best_by == 'loss' else chosen[best_by]
    if score > best_score and 'val' in sets:
        best_step, best_val_loss, best_score = step, chosen['loss'], score
        if run.is_main:
            save(out / 'best.pt')
    if run.is_main:
        lines = ''.join(f'{key} = {value!r}\n' for key, value in history.items())
        files.save_atomically(out / 'metrics.py', lambda file: file.write(lines.encode()))
        files.write_json(out / 'eval_results.json', {'step': step, **figures})
    return {
        'val/loss': chosen['loss'],
        'val/accuracy': chosen['accuracy'],
        'val/perplexity': math.exp(min(chosen['loss'], 700)),
    }


def conclude():
    """The result: predictions and figures of the best weights by the validation rows, or else of the last."""
    if 'val' in sets and best_step != step:
        classification.restore(raw_classifier, checkpoints.load(out / 'best.pt'))
    results, arrays = {'step': best_step if 'val' in sets else step}, {'source': source}
    for name, examples in sets.items():
        outputs = predict(examples)
        results[name] = classification.evaluate_predictions(examples.labels, outputs)
        if name != 'train':
            arrays.update(
                {
                    f'{name}_{key}': array
                    for key, array in classification.arrays_of(examples.labels, outputs).items()
                }
            )
    if compare_to:
        results['compare_to'] = {
            'run': compare_to,
            **{
                name: classification.randomisation_test(
                    sets[name].labels, arrays[f'{name}_preds'], predictions
                )
                for name, predictions in others.items()
            },
        }
    if run.is_main:
        files.write_json(out / 'eval_results.json', results)
        files.save_atomically(out / 'predictions.npz', lambda file: np.savez_compressed(file, **arrays))
    for name in tested:
        log.print(
            f'{name} at step {results["step"]}: '
            + ', '.join(
                f'{key} {value:.4f}' for key, value in results[name].items() if isinstance(value, float)
            )
        )
    for name in others:
        log.print(
            f'{name} beside {compare_to}: '
            + ', '.join(
                f'{key} {value["difference"]:+.4f} (p = {value["p"]:.4f})'
                for key, value in results['compare_to'][name].items()
            )
        )


# ---------------------------------------------------------------------------- the loop

if not checkpoint:
    log.metrics(0, look())
    if run.is_main:
        save_all()
raw_classifier.train()
logged_step, logged_at = step, time.perf_counter()
stopping = False
while step < max_steps and not stopping and not finished:
    rate = optim.learning_rate_at(step, max_steps, learning_rate, min_lr, warmup, schedule, decay_ratio)
    for o in optimizers.values():
        for group in o.param_groups:
            group['lr'] = rate

    places = classification.places_of_step(step, rows_per_step, num_rows, seed, lengths)
    weight = max(1e-9, weights[places].sum())  # of the rows of all micro-steps and ranks
    mine = places.reshape(gradient_accumulation_steps, run.world_size, batch_size)[:, run.rank]
    sums = {}
    for i, micro in enumerate(mine):
        runtime.seed_dropout(seed, step, i, run.rank)
        classifier.require_backward_grad_sync = i == len(mine) - 1  # DDP sends gradients once per step
        with run.autocast():
            loss, *rest = classifier(*classification.batch_of(sets['train'], micro, run.device))
        scaler.scale(loss * (run.world_size / weight)).backward()  # DDP divides by the number of ranks
        runtime.add(sums, loss, *rest)

    for o in optimizers.values():
        scaler.unscale_(o)
    grad_norm = torch.nn.utils.clip_grad_norm_(raw_classifier.parameters(), grad_clip or math.inf)
    for o in optimizers.values():
        scaler.step(o)
        o.zero_grad(set_to_none=True)
    scaler.update()
    step += 1

    stopping = run.any(stop.received)  # all ranks at the same step
    looking = step % eval_every == 0 or step == max_steps
    saving = looking or stopping or (save_every and step % save_every == 0)
    row = {}
    if looking or saving or step % log_every == 0:
        sums = run.total(sums)
        loss = sums['loss'] / weight
        if not math.isfinite(loss):
            raise UserError(
                f'The loss is {loss} at step {step}; the checkpoint before it is kept. Try a lower '
                f'learning_rate than {learning_rate}, a longer warm-up, or --dtype=float32.'
            )
        seconds_per_step = (time.perf_counter() - logged_at) / (step - logged_step)
        row = {
            'train/loss': loss,
            'train/accuracy': sums['correct'] / sums['predicted'],
            'train/lr': rate,
            'train/tokens_per_sec': sum(len(sets['train'].rows[place]) for place in places)
            / seconds_per_step,
            'train/grad_norm': grad_norm.item(),
            'train/epoch': step * rows_per_step / num_rows,
        }
        log.progress(
            f'step {step}/{max_steps}: loss {loss:.4f}, lr {rate:.2e}, '
            f'{rows_per_step / seconds_per_step:,.0f} rows/s, '
            f'{runtime.duration((max_steps - step) * seconds_per_step)} left'
        )
    if looking:
        row.update(look())
        bad = sum(seen > best_step for seen in history['steps'])  # evaluations since the best one
        finished = step == max_steps or bool(early_stopping) and bad >= early_stopping
    if row:
        log.metrics(step, row)
    if saving and run.is_main and not finished:
        save_all()
    if row:
        logged_step, logged_at = step, time.perf_counter()

if finished or step >= max_steps:
    finished = True
    if run.is_main:
        save_all()
    conclude()
else:
    log.print(f'stopped at step {step} of {max_steps}; continue with --resume_from={out}')
log.close()
run.close()
