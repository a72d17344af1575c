"""Train or fine-tune a model to classify sequences, of algorithmic tasks or texts.

python classify.py --target_func=fn_c --sequence_length=20 --train_set_size=2000
python classify.py --task=sentiment --train_langs=eng --init_from=out/ar-books-tiny-v1
torchrun --standalone --nproc_per_node=2 classify.py --target_func=fn_a --device=cpu
"""

import copy
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from lm import checkpoints, classification, families, languages, optim, runtime, tasks
from lm.configurator import check_choice, check_range, configure, report_idle, require
from lm.files import save_atomically, write_json
from lm.log import start_run
from lm.tokenizer import SPECIAL_TOKENS, Tokenizer, build
from model import SIZES

# --- an algorithmic task ---
target_func = 'fn_c'  # fn_a to fn_l; lm/tasks.py says what each is
sequence_length = 50  # digits per row
train_set_size = 200  # rows
test_set_size = 10000  # rows
compat: bool = None  # fn_g and fn_h as published at L = 20: rows repeat; None: where there are too few
# --- or texts ---
task = ''  # of the database, e.g. sentiment; instead of target_func
train_langs = 'eng'  # commas between several
eval_langs = ''  # empty: train_langs
language_database = 'config/languages.json'  # or a .py file that assigns LANGUAGES
model_type = 'normal'  # normal, or ipa: reads the columns {feature}-phoneme
tokenizer = 'bpe'  # from scratch: bpe, bytes, char, gpt2, or a path; of a nanoGPT ckpt.pt: gpt2 or a path
vocab_size = 4096  # of a bpe, which is trained on the training texts
checkpoint_prefix = ''  # with model_prefix: start from checkpoint_prefix/model_prefix/ckpt.pt
model_prefix = ''  # {model_type} in this, in tokenizer or in init_from stands for normal or ipa
# --- both ---
val_set_size = 0  # rows held out of training to choose the best weights by; 0: the database's val split
batch_size = 20  # rows per micro-step and rank
gradient_accumulation_steps = 1  # micro-steps per step and rank
eval_batch_size = 256  # rows that are evaluated at once
group_by_length = True  # the rows of a step are of like length: less padding
# --- model ---
model = ''  # llama3, deepseek, qwen0.6B, qwen1.7B; llama3_finetune, deepseek_finetune, qwen3_finetune; or a model_size
architecture = 'ar'  # from scratch: ar, diffusion or sdd
model_size = 'tiny'  # tiny, small, medium, large, xl: sets n_layer, n_head and n_embd
n_layer: int = None  # blocks
n_head: int = None  # attention heads
n_embd: int = None  # width of the trunk
n_kv_head: int = None  # fewer than n_head: grouped-query attention
block_size = 128  # most tokens of a text; an algorithmic task sets its own
dropout = 0.0  # in the trunk and before the head
token_dropout = 0.0  # fraction of a training row's tokens that are masked
gradient_checkpointing = False  # recompute each block in the backward pass: less memory, a third more time
init_from = ''  # start from the weights of this ckpt.pt, run folder, Hugging Face folder or hub id
token = ''  # of the Hugging Face hub, for private models
revision = ''  # a branch, tag or commit of the hub
num_layers_to_finetune: int = None  # only so many top blocks and the head train; None: all, of *_finetune 2
train_final_norm = False  # with them, the norm above the blocks
lora_rank = 0  # train low-rank adapters and the head only; 0: none
lora_alpha = 32.0  # over the rank: what their product is multiplied by
lora_dropout = 0.0  # of their inputs
pool = ''  # last, mean; empty: last for ar, mean for the bidirectional ones
num_classes: int = None  # outputs of the head; 1: a single logit. None: 1 for a task, else the database's
# --- optimization ---
num_epochs = 200.0  # passes over the training rows
max_steps: int = None  # in place of num_epochs; the later of the two counts
optimizer = 'adamw'  # adamw or muon
learning_rate = 3e-4  # at its highest
min_lr = 0.0  # at the end of the schedule
warmup_steps: int = None  # in place of warmup_ratio; the later of the two counts
warmup_ratio = 0.0  # of all steps, in which the learning rate rises
schedule = 'cosine'  # cosine, linear, wsd, constant
decay_ratio = 0.2  # of all steps: the decay of wsd
weight_decay = 1e-5  # of matrices, times the learning rate
beta1 = 0.9  # of the moving average of gradients
beta2 = 0.999  # of the moving average of their squares
grad_clip = 1.0  # largest norm of the gradient; 0: not clipped
class_weights = ''  # weight of a row by class: balanced, or numbers as in 1,2.5; empty: the same
label_smoothing = 0.0  # probability that goes to all classes alike
early_stopping = 0  # evaluations on validation rows without a better one before it stops; 0: none
best_by = 'loss'  # which weights are best on them: loss, accuracy, macro_f1
# --- evaluation and log ---
eval_every: int = None  # steps; None: ten times
eval_examples = 0  # of each set that are evaluated, 0: all; at the end all but those of the training set
log_every = 10  # steps
# --- the run ---
out_dir = ''  # empty: out/{architecture}-{task}-{size}-v{n}
run_suffix = ''  # appended to that name
overwrite = False  # delete the existing run in out_dir
resume_from = ''  # a ckpt.pt or run folder; auto: out_dir's, if it has one
changed_data = False  # resume although rows or labels are others than those that the run began with
save_every = 0  # steps between checkpoints beside those at evaluations; 0: none
seed = 42  # of weights, batches and dropout
no_wandb = False  # log to the run folder only
wandb_project = 'diffusion-lm'  # of Weights & Biases
wandb_run_name = ''  # empty: the run folder's name
# --- the machine ---
device = 'auto'  # cpu, cuda, cuda:N, mps
dtype = 'auto'  # bfloat16, float16, float32
compile: bool = None  # torch.compile; None: on CUDA only
config = configure(globals())

SHAPE = ('n_layer', 'n_head', 'n_embd', 'n_kv_head')
TASK_KEYS = 'target_func sequence_length train_set_size test_set_size compat'
TEXT_KEYS = 'train_langs eval_langs model_type tokenizer vocab_size block_size group_by_length'
# A run keeps what is FIXED; everything else may change when it is resumed, and the change is printed.
FIXED = f'{TASK_KEYS} {TEXT_KEYS} task val_set_size checkpoint_prefix model_prefix init_from model'.split()
FIXED += 'architecture model_size num_layers_to_finetune train_final_norm lora_rank lora_alpha pool'.split()
FIXED += [*SHAPE, 'num_classes', 'optimizer', 'seed']

# ---------------------------------------------------------------------------- process, start, data

resumed = checkpoints.resume(globals(), config, FIXED)
runtime.check_settings(config)
check_choice(config, 'model', ('', *families.PUBLISHED, *families.FINETUNED, *SIZES))
both = lora_rank and num_layers_to_finetune is not None
require(not both, 'lora_rank and num_layers_to_finetune freeze different things; leave one of them out.')
report_idle(config, f'beside model={model}', 'model_size' * bool(model))
report_idle(config, 'without model_prefix', 'checkpoint_prefix' * (not model_prefix))
report_idle(config, f'beside init_from={init_from}', 'model_prefix' * bool(init_from))
if model in SIZES:
    model_size = config['model_size'] = model
    config.given.add('model_size')
if model in families.FINETUNED:
    init_from = init_from or families.FINETUNED[model]
    num_layers_to_finetune = 2 if num_layers_to_finetune is None and not lora_rank else num_layers_to_finetune
all_train = num_layers_to_finetune is None
report_idle(config, 'where more than the top blocks train', 'train_final_norm' * all_train)
if model_prefix:
    init_from = init_from or str(Path(checkpoint_prefix, model_prefix, 'ckpt.pt'))
init_from, tokenizer = (name.replace('{model_type}', model_type) for name in (init_from, tokenizer))
initial = resumed.checkpoint
clash = init_from and not initial and model in families.PUBLISHED
require(not clash, f'{model} is a shape to train from scratch; leave --model or --init_from={init_from} out.')
if init_from and not initial:
    given = languages.load_tokenizer(tokenizer) if 'tokenizer' in config.given else None
    initial = checkpoints.load(init_from, token, revision, tokenizer=given)
    is_its_own = given is None or initial['tokenizer'] == given.to_json()
    require(is_its_own, f'{init_from} holds another tokenizer than {tokenizer}; leave --tokenizer out.')
    checkpoints.check_model(initial, init_from, config, (*SHAPE, 'architecture'))
    model_size = Path(init_from).resolve().name.removesuffix('.pt')
dist = runtime.Runtime(device, dtype)

if task:
    report_idle(config, 'on texts', TASK_KEYS)
    database = languages.load_database(language_database)
    texts, num_labels, classes = languages.read_sets(database, task, train_langs, eval_langs, model_type)
    if init_from or tokenizer != 'bpe':
        report_idle(config, "without a bpe of the run's own", 'vocab_size')
    check_range(config, 256 + len(SPECIAL_TOKENS), math.inf, 'vocab_size')
    vocabulary = None if initial else languages.make_tokenizer(tokenizer, texts, vocab_size)
else:
    report_idle(config, 'on an algorithmic task', f'{TEXT_KEYS} language_database')
    num_labels, classes = 2, []
    sizes = train_set_size, test_set_size, val_set_size
    digits = tasks.splits(target_func, sequence_length, *sizes, seed, compat)
    vocabulary = None if initial else build('char', tasks.digits_of(target_func))
vocabulary = vocabulary or Tokenizer(initial['tokenizer'], start=initial['start_token'])
start_token = initial['start_token'] if initial else vocabulary.start_id

# ---------------------------------------------------------------------------- model

if initial:
    architecture, shape = initial['architecture'], dict(initial['model_config'])
    if not resumed.checkpoint and 'block_size' not in config.given:
        block_size = shape['block_size']
else:
    published = model in families.PUBLISHED
    shape = families.published_config(model, block_size) if published else checkpoints.size_of(model_size)
    shape.update({key: config[key] for key in SHAPE if config[key] is not None}, block_size=block_size)
    shape.update(vocab_size=vocabulary.vocab_size, mask_id=vocabulary.mask_id, ignore_id=vocabulary.ignore_id)
if not task:
    block_size = sequence_length + 1  # with the start token
    if shape.get('position', 'rope') == 'rope':
        shape['block_size'] = block_size
longest = shape['block_size']
problem = f'block_size is {block_size}, but {init_from} sees {longest} tokens'
require(block_size <= longest, f'{problem}; lower it, or sequence_length.')
torch.manual_seed(seed)
shape.update(dropout=dropout, gradient_checkpointing=gradient_checkpointing)
trunk = checkpoints.make_model(architecture, **shape)
if initial and not resumed.checkpoint:
    trunk.load_state_dict(checkpoints.weights_of(initial))

if task:
    sets, notes = languages.encode_sets(texts, vocabulary, start_token, block_size)
else:
    ids, sets, notes = tasks.digit_ids(vocabulary, target_func), {}, {}
    for name, (rows, labels) in digits.items():
        if len(rows):
            sets[name] = classification.Examples(list(np.insert(ids[rows], 0, start_token, axis=1)), labels)
if 'val' in sets and task:
    report_idle(config, 'where the data have a val split', 'val_set_size')
elif val_set_size and 'val' not in sets:
    sets['train'], sets['val'] = classification.hold_out(sets['train'], val_set_size, seed)
report_idle(config, 'without validation rows', 'best_by' * ('val' not in sets))
test_sets = [name for name in sets if name not in ('train', 'val')]
num_classes = num_classes or (num_labels if task else 1)
enough = num_labels <= max(2, num_classes)
require(enough, f'num_classes is {num_classes}, but the labels are of {num_labels} classes; leave it out.')
selectable = 'val' in sets or not early_stopping
require(selectable, 'early_stopping needs validation rows: the test set never selects; add --val_set_size=N.')
pool = pool or ('last' if trunk.causal else 'mean')
by_class = classification.weights_of_classes(class_weights, sets['train'].labels, max(2, num_classes))
options = pool, dropout, by_class, label_smoothing, token_dropout
raw_classifier = classification.Classifier(trunk, num_classes, *options)
row_weights = by_class[sets['train'].labels]  # (N,)
if lora_rank:
    from lm import lora  # only where it is wanted

    trunk.requires_grad_(False)
    lora.add_lora(trunk, lora_rank, lora_alpha, dropout=lora_dropout)
elif num_layers_to_finetune is not None:
    classification.train_top_layers(raw_classifier, num_layers_to_finetune, train_final_norm)
raw_classifier.to(dist.device)

# ---------------------------------------------------------------------------- steps, optimizer, state

rows_per_step = batch_size * gradient_accumulation_steps * dist.world_size
num_rows = len(sets['train'])
lengths = np.array([len(row) for row in sets['train'].rows]) if task and group_by_length else None
max_steps, warmup = runtime.plan_steps(config, num_rows, rows_per_step)
eval_every = eval_every or max(1, math.ceil(max_steps / 10))
opt = optim.make_optimizer(raw_classifier, optimizer, learning_rate, beta1, beta2, weight_decay, dist.dtype)
scaler = dist.scaler()
names = {f'the rows of {name}': [*part.rows, part.labels] for name, part in sets.items()}
checksums = {name: zlib.crc32(np.concatenate(arrays)) for name, arrays in names.items()}
inputs = {'rows_per_step': rows_per_step, 'data': checksums}
state = resumed, checkpoints, raw_classifier, opt, scaler, inputs, config
step, best, pending = checkpoints.continue_run(*state)
best_score = -math.inf
history = {key: [] for key in 'steps train_losses test_losses train_accuracies test_accuracies'.split()}
is_finished = lambda: pending is None and (step >= max_steps or 0 < early_stopping <= best.later)
if resumed.checkpoint:
    with checkpoints.unedited(resumed.path):
        classification.load_state(raw_classifier, initial)
        history = {key: [number + 0 for number in initial['history'][key]] for key in history}
        best_score = initial['best_score'] if math.isfinite(best.loss) else best_score  # reset with it
        best.later = sum(evaluated > best.step for evaluated in history['steps'])
    if is_finished() and (resumed.run_dir / 'predictions.npz').exists():
        remedy = '--max_steps makes it longer' if step >= max_steps else '--early_stopping=0 makes it go on'
        dist.exit(f'{resumed.path} is finished at step {step} of {max_steps}. {remedy}.')
classifier = dist.wrap(raw_classifier, compile)

subject = f'{task}-{train_langs.replace(",", "+").replace(":", "-")}' if task else target_func
config.update({key: getattr(trunk.config, key) for key in SHAPE}, architecture=architecture, pool=pool)
config.update(num_classes=num_classes, num_layers_to_finetune=num_layers_to_finetune, dtype=dist.dtype)
config.update(max_steps=max_steps, block_size=block_size if task else config['block_size'])
out, log = start_run(dist, config, f'{architecture}-{subject}-{model or model_size}', resumed, init_from)
(out / 'predictions.npz').unlink(missing_ok=True)  # of a run that was shorter
stop = runtime.StopSignal()
trained = sum(p.numel() for p in trunk.parameters() if p.requires_grad)
trained = min(trained, trunk.num_parameters())  # padding is not counted
log.print(
    f'{out}: {architecture}, {trunk.num_parameters():,} parameters, {trained:,} of them and the head train, '
    f'{dist.dtype} on {dist.world_size} × {dist.device.type}; {max_steps} steps of {rows_per_step} rows'
)
if classes:
    log.print('classes: ' + ', '.join(f'{number} {name}' for number, name in enumerate(classes)))
for name, examples in sets.items():
    log.print(f'{name}: {len(examples)} rows' + (f' ({notes[name]})' if notes.get(name) else ''))
if 'val' not in sets:
    log.print('val/loss and val/accuracy are of the test rows; --val_set_size=N holds out rows for them')

# ---------------------------------------------------------------------------- evaluation and checkpoints


def checkpoint():
    """Return the trunk as all scripts know it, adapters merged, and the head."""
    texts = vocabulary, start_token, None
    state = checkpoints.contents(trunk, step, best, config, initial, *texts, trained=raw_classifier)
    state.update(model_state_dict=trunk.state_dict(), head_state_dict=raw_classifier.head.state_dict())
    if lora_rank:
        merged = copy.deepcopy(trunk)
        lora.merge(merged)
        state.update(model_state_dict=merged.state_dict(), adapted_state_dict=trunk.state_dict())
    return state


def save():
    """Write ckpt.pt with all that it takes to go on."""
    if dist.is_main:
        state = {**checkpoint(), **checkpoints.state_of_run(inputs, pending, scaler, log)}
        state |= {'optimizer_state_dict': opt.state_dict(), 'best_score': best_score, 'history': history}
        checkpoints.save(out / 'ckpt.pt', state)


@torch.no_grad()
def predict(examples):
    """Compute the logits (N, C), of rows of like length together, the same for any number of ranks."""
    order = np.argsort([len(row) for row in examples.rows], kind='stable')
    logits = torch.zeros(len(examples), raw_classifier.width)
    raw_classifier.eval()
    for start in range(dist.rank * eval_batch_size, len(order), dist.world_size * eval_batch_size):
        index = order[start : start + eval_batch_size]
        tokens, token_counts, _ = classification.collate(examples, index, dist.device)
        with dist.autocast():
            logits[index] = raw_classifier.logits(tokens, token_counts).cpu()
    raw_classifier.train()
    return dist.sum(logits)


def subset(examples):
    size = min(len(examples), eval_examples or len(examples))
    return examples.take(np.arange(size) * len(examples) // size)


def evaluate_and_save():
    """Evaluate all sets, keep the best weights by the validation rows, write down the history, log the step."""
    global best_score, pending
    parts = {name: subset(examples) for name, examples in sets.items()}
    logits = {name: predict(examples) for name, examples in parts.items()}
    metrics = {name: classification.evaluate_predictions(parts[name].labels, logits[name]) for name in parts}
    labels = np.concatenate([parts[name].labels for name in test_sets])
    test = classification.evaluate_predictions(labels, torch.cat([logits[name] for name in test_sets]))
    figures = (f'{name} loss {m["loss"]:.4f}, accuracy {m["accuracy"]:.4f}' for name, m in metrics.items())
    log.print(f'step {step}: ' + ', '.join(figures))
    train, selecting = metrics['train'], metrics.get('val', test)
    runtime.check_finite(selecting['loss'], step, learning_rate)
    values = step, train['loss'], test['loss'], train['accuracy'], test['accuracy']
    for key, value in zip(history, values):
        history[key].append(value)
    best.later += 1
    score = -selecting['loss'] if best_by == 'loss' else selecting[best_by]
    if score > best_score and 'val' in sets:
        best.step, best.loss, best.later, best_score = step, selecting['loss'], 0, score
        if dist.is_main:
            checkpoints.save(out / 'best.pt', checkpoint())
    if dist.is_main:
        lines = ''.join(f'{key} = {value!r}\n' for key, value in history.items())
        save_atomically(out / 'metrics.py', lambda file: file.write(lines.encode()))
        write_json(out / 'eval_results.json', {'step': step, **metrics})
    values = {'val/loss': selecting['loss'], 'val/accuracy': selecting['accuracy']}
    log.metrics(step, pending | values | {'val/perplexity': math.exp(min(selecting['loss'], 700))})
    pending = None


# ---------------------------------------------------------------------------- the loop

save()  # where a copy goes on, ckpt.pt becomes that
if pending is not None:
    evaluate_and_save()
tokens_per_row = np.mean([len(row) for row in sets['train'].rows])
speed = runtime.Speed(trunk, dist, rows_per_step * tokens_per_row, step, tokens_per_row)
stopping = False
while not stopping and not is_finished():
    lr = optim.learning_rate_at(step, max_steps, learning_rate, min_lr, warmup, schedule, decay_ratio)
    opt.set_lr(lr)
    index = classification.rows_of_step(step, rows_per_step, num_rows, seed, lengths)
    weight = max(1e-9, float(row_weights[index].sum()))  # of the rows of all micro-steps and ranks
    mine = index.reshape(gradient_accumulation_steps, dist.world_size, batch_size)[:, dist.rank]
    sums = {}
    for i, part in enumerate(mine):
        runtime.seed_dropout(seed, step, i, dist.rank)
        classifier.require_backward_grad_sync = i == len(mine) - 1  # DDP sends gradients once per step
        with dist.autocast():
            loss, *rest = classifier(*classification.collate(sets['train'], part, dist.device))
        scaler.scale(loss * (dist.world_size / weight)).backward()  # DDP divides by the number of ranks
        runtime.add(sums, loss, *rest)
    grad_norm = opt.step(scaler, raw_classifier.parameters(), grad_clip)
    step += 1

    stopping = dist.any(stop.received)  # all ranks at the same step
    evaluating = step % eval_every == 0 or step == max_steps
    saving = evaluating or stopping or (save_every and step % save_every == 0)
    if not saving and step % log_every:
        continue
    sums = dist.total(sums)
    metrics = runtime.means('train', {**sums, 'loss': sums['loss'] / weight, 'count': 1})
    runtime.check_finite(metrics['train/loss'], step, learning_rate)
    epoch = step * rows_per_step / num_rows
    metrics |= {'train/lr': lr, 'train/grad_norm': grad_norm.item(), 'train/epoch': epoch}
    metrics |= speed.metrics(step)
    log.progress(step, max_steps, metrics, speed.seconds_per_step)
    if evaluating:
        pending = metrics
    else:
        log.metrics(step, metrics)
    if saving:
        save()  # before the evaluation, which may be cut off
    if evaluating and not stopping:
        evaluate_and_save()
    speed.restart(step)

if is_finished():
    save()
    # Predictions and metrics of the best weights by the validation rows, or else of the last.
    if 'val' in sets and best.step != step:
        classification.load_state(raw_classifier, checkpoints.load(out / 'best.pt'))
    results, arrays = {'step': best.step if 'val' in sets else step}, {}
    for name, examples in sets.items():
        examples = subset(examples) if name == 'train' else examples
        logits = predict(examples)
        results[name] = classification.evaluate_predictions(examples.labels, logits)
        if name != 'train':
            predictions = classification.logits_by_class(logits).argmax(1)
            arrays |= {f'{name}_labels': examples.labels, f'{name}_preds': predictions.numpy()}
            arrays[f'{name}_logits'] = logits.numpy()
            figures = [f'{key} {x:.4f}' for key, x in results[name].items() if isinstance(x, float)]
            log.print(f'{name} at step {results["step"]}: {", ".join(figures)}')
    if dist.is_main:
        names = {'classes': classes} if classes else {}
        write_json(out / 'eval_results.json', results | names)
        save_atomically(out / 'predictions.npz', lambda file: np.savez_compressed(file, **arrays))
else:
    log.print(f'stopped at step {step} of {max_steps}; continue with --resume_from={out}')
log.close()
dist.close()
