"""Pretrains a language model on a prepared folder.

python train.py config/stories.py
python train.py config/xl_owt.py --batch_size=8
torchrun --standalone --nproc_per_node=2 train.py config/shakespeare_char.py --device=cpu
"""

import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from lm import checkpoints, data, files, optim, runtime
from lm.configurator import UserError, check_choice, check_range, configure
from sampling import generate

# --- data ---
dataset = 'stories'  # a name under data/, the path of a prepared folder, or a mix: NAME:WEIGHT,NAME:WEIGHT
mode = 'packed'  # packed: windows of the token stream; documents: one document per row
batch_size = 32  # rows per micro-step and rank
gradient_accumulation_steps = 1  # micro-steps per step and rank
# --- model ---
architecture = 'ar'  # ar, diffusion or sdd
model_size = 'tiny'  # tiny, small, medium, large, xl: sets the next three
n_layer: int = None
n_head: int = None
n_embd: int = None
n_kv_head: int = None  # fewer than n_head: grouped-query attention
block_size = 256  # tokens per row; if not given, the max_seq_len that the data were prepared with, if any
dropout = 0.0
norm = 'rms'  # rms, rms_gain or layer
position = 'rope'  # rope or learned
mlp = 'relu2'  # relu2, relu, gelu, gelu_tanh or swiglu
bias = False  # in linear layers and LayerNorm
qk_norm = True  # RMS-normalised queries and keys
logit_softcap = 15.0  # 0: none
k_schedule = (1, 2, 4, 8)  # sdd: candidates per hidden position, one of these drawn for each step
k_warmup_steps = 0  # sdd: go through k_schedule in this many steps instead, then stay at its last
p_belief = ((0.5, 0.5),)  # sdd: from these shares of the steps on, how many of them have beliefs
gradient_checkpointing = False  # recompute each block in the backward pass: less memory, a third more time
selective_checkpointing = (
    False  # with it: keep matrix products and attention, half of a block, and recompute the rest
)
init_from = ''  # start from the weights of a ckpt.pt, run folder, Hugging Face folder or hub id
anneal_steps: int = (
    None  # an ar start of another architecture sees ever more of what is ahead; None: a tenth of all
)
token = ''  # of the Hugging Face hub, for private models
revision = ''  # a branch, tag or commit of the hub
# --- optimization ---
max_steps = 2000
num_epochs = 0.0  # instead of max_steps
optimizer = 'adamw'  # adamw or muon
learning_rate = 1e-3
min_lr = 0.0
warmup_steps: int = None  # None: warmup_ratio of all steps
warmup_ratio = 0.02
schedule = 'cosine'  # cosine, linear, wsd, constant
decay_ratio = 0.2  # of all steps: the decay of wsd
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0: not clipped
ema_decay = 0.0  # running average of the weights, e.g. 0.999; evaluated and sampled instead; 0: none
# --- looking ---
eval_every = 250  # steps
eval_batches = 0  # batches of validation rows; 0: the whole split
log_every = 10  # steps
sample_every = 0  # evaluations at multiples of this many steps print samples; 0: none
num_samples = 2
sample_tokens = 200
# --- the run ---
out_dir = ''  # empty: out/{architecture}-{dataset}-{size}-v{n}
run_suffix = ''  # appended to that name
overwrite = False  # give up the run that out_dir holds
resume_from = ''  # a ckpt.pt or run folder; auto: out_dir's, if it has one
save_every = 0  # steps between checkpoints beside those at evaluations; 0: none
save_total_limit = 0  # copies kept under checkpoints/, one per save_every; the best stays besides
seed = 0
no_wandb = False
wandb_project = 'diffusion-lm'
wandb_run_name = ''  # empty: the run folder's name
# --- the machine ---
device = 'auto'  # cpu, cuda, cuda:N, mps
dtype = 'auto'  # bfloat16, float16, float32
master_weights = 'float32'  # bfloat16: weights, gradients, moments in half the memory, rounded stochastically
compile: bool = None  # torch.compile; None: on CUDA only, without fsdp
fsdp = False  # shard weights, gradients and moments over the ranks: for what no single GPU holds
config = configure(globals())
del config['token']  # no secret goes into config.json, the checkpoint or W&B

RECOMPUTED = ('gradient_checkpointing', 'selective_checkpointing')
# What defines a run: a resumed one keeps it. Everything else may change, and the change is printed.
FIXED = (
    'architecture',
    'mode',
    'model_size',
    'n_layer',
    'n_head',
    'n_embd',
    'n_kv_head',
    'block_size',
    'norm',
    'position',
    'mlp',
    'bias',
    'qk_norm',
    'logit_softcap',
    'optimizer',
    'fsdp',
    'master_weights',
    'seed',
    'anneal_steps',
)
SHAPE = (
    'n_layer',
    'n_head',
    'n_embd',
    'n_kv_head',
    'block_size',
    'norm',
    'position',
    'mlp',
    'bias',
    'qk_norm',
    'logit_softcap',
    'dropout',
    *RECOMPUTED,
)  # keys that go to ModelConfig as they are

check_choice(config, 'optimizer', optim.OPTIMIZERS)
check_choice(config, 'schedule', optim.SCHEDULES)
check_choice(config, 'master_weights', optim.MASTER_WEIGHTS)
check_range(
    config,
    1,
    math.inf,
    'batch_size',
    'gradient_accumulation_steps',
    'max_steps',
    'eval_every',
    'log_every',
    'num_samples',
    'sample_tokens',
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
    'sample_every',
    'save_every',
    'save_total_limit',
    'anneal_steps',
)
check_range(config, 0, 1, 'beta1', 'beta2', 'ema_decay')
data.check_belief_plan(p_belief, k_schedule)

# ---------------------------------------------------------------------------- what to continue

checkpoint_path = checkpoints.resume_path(resume_from, out_dir)
checkpoint, changed = None, []
continued = (
    checkpoints.run_of(checkpoint_path or Path(out_dir, 'ckpt.pt')) if resume_from else None
)  # a run folder
if checkpoint_path:
    checkpoint, changed = checkpoints.load_run(checkpoint_path, globals(), config, FIXED)
if fsdp:
    from lm import sharded  # only where it is wanted

    sharded.check(
        ema_decay=ema_decay,
        save_total_limit=save_total_limit,
        optimizer_muon=optimizer == 'muon',
        dtype_float16=dtype == 'float16',
    )
if master_weights == 'bfloat16':
    dtype = 'bfloat16' if dtype == 'auto' else dtype
    optim.check_bfloat16_weights(
        ema_decay=ema_decay, optimizer_muon=optimizer == 'muon', **{f'dtype={dtype}': dtype != 'bfloat16'}
    )

run = runtime.Runtime(device, dtype)
folder = data.open_dataset(dataset)
tokenizer = folder.tokenizer
if 'block_size' not in config.given:
    config['block_size'] = folder.config.get('max_seq_len') or block_size

# ---------------------------------------------------------------------------- model

initial = checkpoint
if init_from and not checkpoint:
    initial = checkpoints.as_start(
        checkpoints.load(init_from, token, revision, mmap=True),
        init_from,
        architecture,
        block_size if 'block_size' in config.given else None,
    )
shape = dict(zip(('n_layer', 'n_head', 'n_embd'), checkpoints.size_of(model_size)))
shape.update({key: config[key] for key in SHAPE if config[key] is not None})
if initial:
    checkpoints.check_fits(initial, checkpoint_path or init_from, architecture, tokenizer, folder.path)
    for key in sorted(config.given.intersection(SHAPE) - {'dropout', *RECOMPUTED}):
        if config[key] != initial['model_config'][key]:
            raise UserError(
                f'{init_from} has {key}={initial["model_config"][key]!r}, not {config[key]!r}; leave '
                f'--{key} out.'
            )
    shape = {**initial['model_config'], 'dropout': dropout, **{key: config[key] for key in RECOMPUTED}}
shape.update(
    k=max(k_schedule),
    vocab_size=tokenizer.vocab_size,
    mask_id=tokenizer.mask_id,
    ignore_id=tokenizer.ignore_id,
)
torch.manual_seed(seed)
with torch.device('meta' if fsdp and initial else 'cpu'):  # a rank reads only its part of a sharded model
    raw_model = checkpoints.make_model(architecture, **shape)
if checkpoint and not fsdp:
    raw_model.load_state_dict(checkpoint['model_state_dict'])
elif initial and not fsdp:  # as all other scripts, from the average where there is one
    checkpoints.load_weights(raw_model, initial)
if master_weights == 'bfloat16':
    raw_model.bfloat16()
raw_model = (
    sharded.shard(raw_model, run, initial['model_state_dict'] if initial and not checkpoint else {})
    if fsdp
    else raw_model.to(run.device)
)
if initial:
    initial.pop('model_state_dict', None)  # not kept beside the model
block_size = raw_model.config.block_size

# ---------------------------------------------------------------------------- batches, optimizers, state

batches = data.Batches(
    folder,
    architecture,
    block_size,
    batch_size,
    gradient_accumulation_steps,
    seed,
    mode,
    run.rank,
    run.world_size,
    run.device,
    raw_model.predicted,
)
data.make_rows(folder, 'val', architecture, block_size, mode, training=False)  # what it lacks is said now
if num_epochs and 'max_steps' not in config.given:
    max_steps = math.ceil(num_epochs * batches.rows.num_rows / batches.rows_per_step)
if anneal_steps is None:
    anneal_steps = max_steps // 10 if initial and initial.get('converted_from') == 'ar' else 0
if anneal_steps and raw_model.causal:
    raise UserError(f'anneal_steps is {anneal_steps}, but {architecture!r} never looks ahead; leave it out.')
warmup = round(warmup_ratio * max_steps) if warmup_steps is None else warmup_steps
optimizers = optim.make_optimizers(
    raw_model, optimizer, learning_rate, beta1, beta2, weight_decay, seed, run.rank if fsdp else 0
)
scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == 'float16')
average = optim.WeightAverage(raw_model, ema_decay) if ema_decay else None
step, best_step, best_val_loss = 0, 0, math.inf
if checkpoint:
    step, best_step, best_val_loss = (
        checkpoint[key] for key in ('global_step', 'best_step', 'best_val_loss')
    )
    checkpoints.check_same_rows(checkpoint, checkpoint_path, folder, batches.rows_per_step, config)
    if fsdp:
        sharded.load(checkpoint_path, checkpoint['sharded'], raw_model, list(optimizers.values()))
    else:
        checkpoints.load_training_state(checkpoint, optimizers, scaler)
    if average and 'ema_state_dict' in checkpoint:
        average.load(checkpoint['ema_state_dict'])
    if step >= max_steps:
        run.exit(
            f'{checkpoint_path} is at step {step} of {max_steps}: the run is finished. '
            '--max_steps makes it longer.'
        )
if run.device.type == 'cuda' and not fsdp if compile is None else compile:
    raw_model.compile()
model = raw_model if fsdp else run.wrap(raw_model)

# ---------------------------------------------------------------------------- run folder, logs

out = Path(
    run.from_main(
        lambda: checkpoints.open_run_folder(
            out_dir or continued,
            f'{architecture}-{folder.config["name"]}-{model_size}',
            run_suffix,
            continued,
            overwrite,
        )
    )
)
config.update(
    {key: getattr(raw_model.config, key) for key in SHAPE},
    max_steps=max_steps,
    dtype=run.dtype,
    anneal_steps=anneal_steps,
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
peak_flops = runtime.measure_peak_flops(run.device, run.dtype) * run.world_size
log.print(
    f'{out}: {architecture}, {raw_model.num_parameters():,} parameters, {run.dtype} on {run.world_size} × '
    f'{run.device.type}; {max_steps} steps of {batches.rows_per_step} rows of {block_size} tokens are '
    f'{batches.epochs_in_words(max_steps)}'
)
for key, before, now in changed:
    log.print(f'resumed with {key}={now!r}, which was {before!r}')


# ---------------------------------------------------------------------------- what happens now and then


def save(path, weights, **state):
    """What the other scripts need to use the model, and `state` that this one needs to go on."""
    checkpoints.save(
        path,
        {
            'architecture': architecture,
            'global_step': step,
            'best_step': best_step,
            'best_val_loss': best_val_loss,
            **({'model_state_dict': weights} if weights else {}),
            'model_config': vars(raw_model.config),
            **({'ema_state_dict': average.average} if average else {}),
            'train_config': dict(config),
            'seed': seed,
            'tokenizer': tokenizer.to_json(),
            'start_token': folder.config['start_token'],
            'prompt_format': folder.config['prompt_format'],
            **state,
        },
    )


def whole_weights():
    """What other scripts load; under fsdp every rank has to ask, and the main one gets it."""
    return sharded.whole_weights(raw_model) if fsdp else raw_model.state_dict()


def save_all():
    state = dict(
        scaler_state_dict=scaler.state_dict(),
        rows_per_step=batches.rows_per_step,
        data=folder.fingerprint,
        wandb_run_id=log.wandb_run_id,
    )
    if fsdp:  # all ranks write; the weights are put together at the end
        weights = whole_weights() if step == max_steps else None
        sharded.save(
            out,
            step,
            raw_model,
            list(optimizers.values()),
            run,
            lambda name: save(out / 'ckpt.pt', weights, sharded=name, **state),
        )
    elif run.is_main:
        save(
            out / 'ckpt.pt',
            whole_weights(),
            **state,
            optimizer_state_dict={name: o.state_dict() for name, o in optimizers.items()},
        )


def evaluate():
    """The val/ metrics over the validation split, the same for any number of ranks."""
    rows = data.evaluation_batches(
        folder,
        'val',
        architecture,
        block_size,
        batch_size,
        mode,
        eval_batches,
        run.rank,
        run.world_size,
        run.device,
        even=fsdp,
    )
    return runtime.evaluate(raw_model, rows, run, folder.tokens_per_byte('val'))


def show_samples():
    with sharded.root_in_place(raw_model) if fsdp else nullcontext():
        rows = generate(
            raw_model,
            [[folder.config['start_token']]] * num_samples,
            min(sample_tokens, block_size - 1),
            seed=seed,
            stop_tokens=[tokenizer.endoftext_id],
        )
    for row in rows:
        log.print(f'--- a sample at step {step}', tokenizer.decode(row[1:]).strip())
    log.print('---')


def look():
    """Evaluates the model, or its average where there is one, and shows what it writes."""
    global best_step, best_val_loss
    with average.in_place() if average else nullcontext():
        values = evaluate()
        if sample_every and (step % sample_every == 0 or step == max_steps) and (run.is_main or fsdp):
            show_samples()
    log.print(f'step {step}: ' + ', '.join(f'{name} {value:.4f}' for name, value in values.items()))
    if values['val/loss'] < best_val_loss:
        best_step, best_val_loss = step, values['val/loss']
        weights = whole_weights()
        if run.is_main:
            save(out / 'best.pt', weights)
    if run.is_main:
        files.write_json(
            out / 'eval_results.json',
            {'step': step, **values, 'best_step': best_step, 'best_val_loss': best_val_loss},
        )
    return values


# ---------------------------------------------------------------------------- the loop

if not checkpoint:
    log.metrics(0, look())
    save_all()
raw_model.train()
logged_step, logged_at = step, time.perf_counter()
stopping = False
while step < max_steps and not stopping:
    rate = optim.learning_rate_at(step, max_steps, learning_rate, min_lr, warmup, schedule, decay_ratio)
    for o in optimizers.values():
        for group in o.param_groups:
            group['lr'] = rate

    raw_model.opening = data.opening(step, anneal_steps, block_size, seed, run.device)
    micro_batches, count = batches.get(step)
    beliefs = (
        data.draw_belief(step, max_steps, seed, p_belief, k_schedule, k_warmup_steps)
        if architecture == 'sdd'
        else {}
    )  # the same for all ranks and micro-steps
    sums = {}
    for i, batch in enumerate(micro_batches):
        runtime.seed_dropout(seed, step, i, run.rank)
        model.require_backward_grad_sync = i == len(micro_batches) - 1  # DDP sends gradients once per step
        with run.autocast():
            loss, *rest = model(*batch, **beliefs)
        # The mean over the tokens of all micro-steps and ranks; DDP divides by the number of ranks.
        scaler.scale(loss * (run.world_size / count)).backward()
        runtime.add(sums, loss, *rest)

    for o in optimizers.values():
        scaler.unscale_(o)
    grad_norm = runtime.clip_gradients(raw_model.parameters(), grad_clip)
    for o in optimizers.values():
        scaler.step(o)
        o.zero_grad(set_to_none=True)
    scaler.update()
    if average:
        average.update(step)
    step += 1

    stopping = run.any(stop.received)  # all ranks at the same step
    looking = step % eval_every == 0 or step == max_steps
    saving = looking or stopping or (save_every and step % save_every == 0)
    row = {}
    if looking or saving or step % log_every == 0:
        row = runtime.training_means(run.total(sums), beliefs)
        loss = row['train/loss']
        if not math.isfinite(loss):
            raise UserError(
                f'The loss is {loss} at step {step}; the checkpoint before it is kept. Try a lower '
                f'learning_rate than {learning_rate}, a longer warm-up, or --dtype=float32.'
            )
        seconds_per_step = (time.perf_counter() - logged_at) / (step - logged_step)
        tokens_per_sec = batches.rows_per_step * block_size / seconds_per_step
        row.update(
            {
                'train/lr': rate,
                'train/tokens_per_sec': tokens_per_sec,
                'train/grad_norm': grad_norm.item(),
                'train/mfu': raw_model.flops_per_token() * tokens_per_sec / peak_flops,
                'train/epoch': batches.epoch(step),
            }
        )
        log.progress(
            f'step {step}/{max_steps}: loss {loss:.4f}, lr {rate:.2e}, {tokens_per_sec:,.0f} tokens/s, '
            f'{runtime.duration((max_steps - step) * seconds_per_step)} left'
        )
    if looking:
        row.update(look())
    if row:
        log.metrics(step, row)
    if saving:
        save_all()
        if run.is_main and save_every and step % save_every == 0 and save_total_limit:
            checkpoints.keep(out, step, save_total_limit, best_step)
    if row:
        logged_step, logged_at = step, time.perf_counter()

if step < max_steps:
    log.print(f'stopped at step {step} of {max_steps}; continue with --resume_from={out}')
else:
    log.print(
        f'done: best val/loss {best_val_loss:.4f} at step {best_step}; look at what it writes: '
        f'python sample.py --checkpoint={out / "ckpt.pt"}'
    )
log.close()
run.close()
