"""Teaches a pretrained model to follow instructions: the loss is on the answers of a prepared instruction folder.

python finetune.py --dataset=alpaca --init_from=out/ar-books-tiny-v1
python finetune.py --dataset=alpaca --init_from=Qwen/Qwen2.5-0.5B --use_peft --max_steps=1000
torchrun --standalone --nproc_per_node=2 finetune.py --dataset=alpaca --init_from=out/big --device=cpu
"""

import copy
import math
import sys
import time
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from lm import checkpoints, data, files, optim, prompts, runtime
from lm.configurator import UserError, check_choice, check_range, configure
from sampling import generate

# --- data ---
dataset = ''  # a folder of prepare/instruct.py: a name under data/, or a path
batch_size = 8  # rows per micro-step and rank
gradient_accumulation_steps = 1  # micro-steps per step and rank
packing = True  # several examples per row, none of which sees another; False: one example per row
train_on_prompt = False  # the loss is on the prompt as well
# --- model ---
init_from = ''  # a ckpt.pt, run folder, Hugging Face folder or hub id; scratch: random weights
architecture = ''  # ar, diffusion or sdd; empty: that of the checkpoint
block_size: int = None  # tokens per row; None: as many as the model sees
dropout = 0.0
k_schedule = (1, 2, 4, 8)  # sdd: candidates per hidden position, one of these drawn for each step
k_warmup_steps = 0  # sdd: go through k_schedule in this many steps instead, then stay at its last
p_belief = ((0.5, 0.5),)  # sdd: from these shares of the steps on, how many of them have beliefs
anneal_steps: int = (
    None  # an ar start of another architecture sees ever more of what is ahead; None: a tenth of all
)
neftune_alpha = 0.0  # noise on the embeddings while training, e.g. 5 (Jain et al. 2023); 0: none
gradient_checkpointing = True  # recompute each block in the backward pass: less memory, a third more time
model_size = 'tiny'  # of init_from=scratch: tiny, small, medium, large, xl
token = ''  # of the Hugging Face hub, for private models
revision = ''  # a branch, tag or commit of the hub
trust_remote_code = False  # refused: models are read by this repository's own code
# --- adapters ---
use_peft = False  # train LoRA adapters, the model's own weights stay as they are
peft_lora_r = 64
peft_lora_alpha = 16.0
peft_lora_dropout = 0.0
peft_targets = ''  # names of linear layers, with commas between them; empty: all within the blocks
use_dora = False  # DoRA: magnitude and direction apart
load_in_8bit = False  # the frozen weights as int8
load_in_4bit = False  # the frozen weights as NF4
# --- optimization ---
max_steps = 0  # 0: num_epochs decides
num_epochs = 3.0
optimizer = 'adamw'  # adamw or muon
learning_rate = 2e-5
min_lr = 0.0
warmup_steps = 100  # at most a tenth of all steps, unless given
schedule = 'cosine'  # cosine, linear, wsd, constant
decay_ratio = 0.2  # of all steps: the decay of wsd
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0: not clipped
early_stopping = 0  # evaluations without a better val/loss after which the run ends; 0: none
# --- looking ---
eval_every = 100  # steps
eval_batches = 0  # batches of validation rows; 0: the whole split
log_every = 10  # steps
num_samples = 3  # held-out prompts answered at each evaluation, always the same; 0: none
sample_tokens = 100  # of an answer, at most
# --- the run ---
out_dir = ''  # empty: out/{architecture}-{dataset}-{base}-v{n}
run_suffix = ''  # appended to that name
overwrite = False  # give up the run that out_dir holds
resume_from = ''  # a ckpt.pt or run folder; auto: out_dir's, if it has one
save_every = 0  # steps between checkpoints beside those at evaluations; 0: none
save_total_limit = 0  # copies kept under checkpoints/, one per save_every; the best stays besides
seed = 0
no_wandb = False
wandb_project = 'diffusion-lm-finetune'
wandb_run_name = ''  # empty: the run folder's name
push_to_hub = False  # in the end, the best weights with a model card; `hf.py push` does the same later
hub_model_id = ''  # owner/name
# --- the machine ---
device = 'auto'  # cpu, cuda, cuda:N, mps
dtype = 'auto'  # bfloat16, float16, float32
master_weights = 'float32'  # bfloat16: weights, gradients, moments in half the memory, rounded stochastically
compile: bool = None  # torch.compile; None: on CUDA only, without fsdp
fsdp = False  # shard weights, gradients and moments over the ranks: for what no single GPU holds
config = configure(globals())
del config['token']  # no secret goes into config.json, the checkpoint or W&B

# What defines a run: a resumed one keeps it. Everything else may change, and the change is printed.
FIXED = (
    'architecture',
    'block_size',
    'packing',
    'train_on_prompt',
    'init_from',
    'model_size',
    'use_peft',
    'peft_lora_r',
    'peft_lora_alpha',
    'peft_targets',
    'use_dora',
    'load_in_8bit',
    'load_in_4bit',
    'optimizer',
    'fsdp',
    'master_weights',
    'seed',
    'anneal_steps',
)

check_choice(config, 'optimizer', optim.OPTIMIZERS)
check_choice(config, 'schedule', optim.SCHEDULES)
check_choice(config, 'master_weights', optim.MASTER_WEIGHTS)
check_range(
    config,
    1,
    math.inf,
    'batch_size',
    'gradient_accumulation_steps',
    'eval_every',
    'log_every',
    'sample_tokens',
    'peft_lora_r',
)
check_range(
    config,
    0,
    math.inf,
    'learning_rate',
    'min_lr',
    'warmup_steps',
    'decay_ratio',
    'weight_decay',
    'grad_clip',
    'early_stopping',
    'eval_batches',
    'num_samples',
    'save_every',
    'save_total_limit',
    'neftune_alpha',
    'anneal_steps',
)
check_range(config, 0, 1, 'beta1', 'beta2', 'dropout', 'peft_lora_dropout')
data.check_belief_plan(p_belief, k_schedule)
if trust_remote_code:
    raise UserError(
        "trust_remote_code=True is refused: models are read by this repository's own code, so there is "
        'none to trust; leave it out.'
    )
if load_in_8bit and load_in_4bit:
    raise UserError('load_in_8bit and load_in_4bit are both given; choose one of them.')
if (load_in_8bit or load_in_4bit or use_dora) and not use_peft:
    raise UserError(
        'load_in_8bit, load_in_4bit and use_dora are about a model whose weights stay as they are while '
        'adapters are trained; add --use_peft, or leave them out.'
    )

# ---------------------------------------------------------------------------- what to continue

checkpoint_path = checkpoints.resume_path(resume_from, out_dir)
checkpoint, changed = None, []
continued = (
    checkpoints.run_of(checkpoint_path or Path(out_dir, 'ckpt.pt')) if resume_from else None
)  # a run folder
if checkpoint_path:
    checkpoint, changed = checkpoints.load_run(checkpoint_path, globals(), config, FIXED)
if push_to_hub:
    from lm import hub  # only where it is wanted

    hub.check(hub_model_id, token)
if fsdp:
    from lm import sharded  # only where it is wanted

    sharded.check(
        use_peft=use_peft,
        save_total_limit=save_total_limit,
        optimizer_muon=optimizer == 'muon',
        dtype_float16=dtype == 'float16',
    )
if master_weights == 'bfloat16':
    dtype = 'bfloat16' if dtype == 'auto' else dtype
    optim.check_bfloat16_weights(
        use_peft=use_peft, optimizer_muon=optimizer == 'muon', **{f'dtype={dtype}': dtype != 'bfloat16'}
    )
if not learning_rate:
    raise UserError('learning_rate is 0, so nothing would be trained; 2e-5 is usual for all weights.')
if max_steps <= 0 and num_epochs <= 0:
    raise UserError(
        f'max_steps is {max_steps} and num_epochs is {num_epochs}, so nothing would be trained; give one '
        'of them.'
    )
if not init_from:
    raise UserError(
        'There is no model to start from; give --init_from=CHECKPOINT, a Hugging Face folder or hub id, '
        'or --init_from=scratch.'
    )
if not dataset:
    raise UserError('There is nothing to learn from; give --dataset=NAME, a folder of prepare/instruct.py.')
run = runtime.Runtime(device, dtype)
folder = data.Folder(dataset)
tokenizer, form = folder.tokenizer, folder.config['prompt_format'] or prompts.DEFAULT
answers = folder.masks['val']  # 1 where an answer stands
if train_on_prompt:
    folder.masks = {split: np.ones(len(tokens), np.uint8) for split, tokens in folder.tokens.items()}

# ---------------------------------------------------------------------------- model

if checkpoint and not use_peft:
    initial = checkpoint
elif init_from == 'scratch':
    if run.is_main:
        print('warning: init_from=scratch; a model that has read nothing before will not learn to answer.')
    n_layer, n_head, n_embd = checkpoints.size_of(model_size)
    initial = {
        'architecture': architecture or 'ar',
        'tokenizer': tokenizer.to_json(),
        'model_config': {
            'n_layer': n_layer,
            'n_head': n_head,
            'n_embd': n_embd,
            'block_size': block_size or 256,
            'vocab_size': tokenizer.vocab_size,
            'mask_id': tokenizer.mask_id,
            'ignore_id': tokenizer.ignore_id,
        },
    }
else:  # adapters go on from the weights that they were made for
    initial = checkpoints.load(init_from, token, revision, mmap=True)
    initial = checkpoints.as_start(initial, init_from, architecture or initial['architecture'])
architecture = initial['architecture']
checkpoints.check_fits(initial, init_from, architecture, tokenizer, folder.path)
shape = {
    **initial['model_config'],
    'k': max(k_schedule),
    'dropout': dropout,
    'gradient_checkpointing': gradient_checkpointing,
}
block_size = block_size or shape['block_size']
if not 8 <= block_size <= shape['block_size']:
    raise UserError(
        f'block_size is {block_size}; choose at least 8 and at most the {shape["block_size"]} tokens that '
        f'{init_from} sees.'
    )
torch.manual_seed(seed)
has_weights = not {'model_state_dict', 'sharded'}.isdisjoint(initial)
with torch.device('meta' if fsdp and has_weights else 'cpu'):  # a rank reads only its part of a sharded model
    raw_model = checkpoints.make_model(architecture, **shape)
if has_weights and not fsdp:
    checkpoints.load_weights(raw_model, initial)
if use_peft:
    from lm import lora  # only where it is wanted

    control = prompts.control_tokens(form, tokenizer)
    if unknown := lora.untrained(raw_model, list(control.values())):
        names = ', '.join(name for name, i in control.items() if i in unknown)
        if run.is_main:
            print(
                f'warning: {init_from} has never been trained on {names}, which adapters cannot change, so answers '
                'may not end; prepare the data with another --prompt_format, tune all weights, or take a base that '
                'was tuned with this format.'
            )
    targets = {'targets': tuple(name.strip() for name in peft_targets.split(','))} if peft_targets else {}
    if load_in_8bit or load_in_4bit:
        lora.quantize(raw_model, bits=8 if load_in_8bit else 4)
    lora.add_lora(raw_model, peft_lora_r, peft_lora_alpha, peft_lora_dropout, dora=use_dora, **targets)
    if initial.get('converted_from'):
        lora.free_new_parts(raw_model)
    if run.dtype == 'bfloat16':  # as autocast would for each product
        for weight in raw_model.blocks.parameters():
            weight.data = weight.data if weight.requires_grad or weight.dim() < 2 else weight.data.bfloat16()
    if checkpoint:
        raw_model.load_state_dict(checkpoint['adapter_state_dict'], strict=False)
if master_weights == 'bfloat16':
    raw_model.bfloat16()
raw_model = (
    sharded.shard(raw_model, run, {} if checkpoint else initial.get('model_state_dict'))
    if fsdp
    else raw_model.to(run.device)
)
initial.pop('model_state_dict', None)  # not kept beside the model
trainable = {name: p for name, p in raw_model.named_parameters() if p.requires_grad}


def disturb(embedding, inputs, states):
    """NEFTune: uniform noise of norm about alpha on a row's embedded tokens (B, T, C)."""
    if not embedding.training:
        return states
    size = neftune_alpha / math.sqrt(states.size(1) * states.size(2))
    return states + torch.empty_like(states).uniform_(-size, size)


if neftune_alpha:
    raw_model.embedding.register_forward_hook(disturb)

# ---------------------------------------------------------------------------- batches, optimizers, state

mode = 'packed examples' if packing else 'examples'
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
if max_steps <= 0:
    max_steps = math.ceil(num_epochs * batches.rows.num_rows / batches.rows_per_step)
if anneal_steps is None:
    anneal_steps = max_steps // 10 if initial.get('converted_from') == 'ar' else 0
if anneal_steps and raw_model.causal:
    raise UserError(f'anneal_steps is {anneal_steps}, but {architecture!r} never looks ahead; leave it out.')
is_told = checkpoint or 'warmup_steps' in config.given
warmup = warmup_steps if is_told else min(warmup_steps, max_steps // 10)
optimizers = optim.make_optimizers(
    raw_model, optimizer, learning_rate, beta1, beta2, weight_decay, seed, run.rank if fsdp else 0
)
scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == 'float16')
step, best_step, best_val_loss = 0, 0, math.inf


def is_stale():
    """Whether early stopping ends the run here."""
    return early_stopping > 0 and step - best_step >= early_stopping * eval_every


if checkpoint:
    step, best_step, best_val_loss = (
        checkpoint[key] for key in ('global_step', 'best_step', 'best_val_loss')
    )
    checkpoints.check_same_rows(checkpoint, checkpoint_path, folder, batches.rows_per_step, config)
    if fsdp:
        sharded.load(checkpoint_path, checkpoint['sharded'], raw_model, list(optimizers.values()))
    else:
        checkpoints.load_training_state(checkpoint, optimizers, scaler)
    if step >= max_steps or is_stale():
        run.exit(
            f'{checkpoint_path} is at step {step} of {max_steps}, its best at step {best_step}: the run is '
            'finished. --max_steps makes it longer, --early_stopping=0 more patient.'
        )
if run.device.type == 'cuda' and not fsdp if compile is None else compile:
    raw_model.compile()
model = raw_model if fsdp else run.wrap(raw_model)

# ---------------------------------------------------------------------------- run folder, logs

base = model_size if init_from == 'scratch' else Path(init_from).resolve().name.removesuffix('.pt')
out = Path(
    run.from_main(
        lambda: checkpoints.open_run_folder(
            out_dir or continued,
            f'{architecture}-{folder.config["name"]}-{base}',
            run_suffix,
            continued,
            overwrite,
        )
    )
)
config.update(
    architecture=architecture,
    block_size=block_size,
    max_steps=max_steps,
    warmup_steps=warmup,
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


def show_data():
    """One example as the model sees it, with what it is trained on marked, and what there is in all."""
    rows = batches.rows
    tokens, trained, documents = rows.read(0)
    length = len(tokens) if documents is None else int((documents == 0).sum())
    before, after = ('\033[32m', '\033[0m') if sys.stdout.isatty() else ('«', '»')
    text = ''
    for is_trained, part in groupby(range(length), lambda i: trained[i]):
        piece = tokenizer.decode([tokens[i] for i in part], show_special=True)
        text += before + piece + after if is_trained else piece
    log.print(
        '--- an example; trained is ' + ('what is green' if sys.stdout.isatty() else 'what stands in «»'),
        text,
        '---',
    )
    log.print(
        f'{len(rows.starts):,} examples of {rows.num_tokens:,} tokens, {rows.num_trained:,} of them trained, in '
        f'{rows.num_rows:,} rows of {block_size}; the prompt of {rows.cut:,} is cut on the left, '
        f'{rows.dropped:,} left out because the answer does not fit'
    )


show_data()
parts = runtime.memory_estimate(raw_model, batch_size, block_size, run)
log.print(
    'memory, about: '
    + ', '.join(f'{name} {size / 1e9:.2f}' for name, size in parts.items())
    + f'; {sum(parts.values()) / 1e9:.2f} GB in all'
)
log.print(
    f'{out}: {architecture} from {init_from}, {sum(p.numel() for p in trainable.values()):,} of '
    f'{sum(p.numel() for p in raw_model.parameters()):,} parameters trained, {run.dtype} on {run.world_size} × '
    f'{run.device.type}; {max_steps} steps of {batches.rows_per_step} rows are {batches.epoch(max_steps):.2f} '
    'epochs'
)
for key, before, now in changed:
    log.print(f'resumed with {key}={now!r}, which was {before!r}')


# ---------------------------------------------------------------------------- what happens now and then


def save(path, weights, **state):
    """What the other scripts need to use the model, and `state` that this one needs to go on."""
    adapter = {'adapter_state_dict': {name: p.detach() for name, p in trainable.items()}} if use_peft else {}
    checkpoints.save(
        path,
        {
            'architecture': architecture,
            'global_step': step,
            'best_step': best_step,
            'best_val_loss': best_val_loss,
            **({'model_state_dict': weights} if weights else {}),
            'model_config': vars(raw_model.config),
            **adapter,
            'train_config': dict(config),
            'seed': seed,
            'tokenizer': tokenizer.to_json(),
            'start_token': folder.config['start_token'],
            'prompt_format': form,
            **state,
        },
    )


def whole_weights():
    """What other scripts load, adapters merged; under fsdp every rank has to ask, and the main one gets it."""
    if fsdp:
        return sharded.whole_weights(raw_model)
    if not use_peft:
        return raw_model.state_dict()
    merged = copy.deepcopy(raw_model).float()  # in bfloat16 small changes would round away
    lora.merge(merged)
    return merged.state_dict()


def save_all():
    state = dict(
        scaler_state_dict=scaler.state_dict(),
        rows_per_step=batches.rows_per_step,
        data=folder.fingerprint,
        wandb_run_id=log.wandb_run_id,
    )
    if fsdp:  # all ranks write; the weights are put together at the end
        weights = whole_weights() if step == max_steps or is_stale() else None
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
    return runtime.evaluate(raw_model, rows, run, tokens_per_byte)


tokens_per_byte = folder.counted_tokens_per_byte('val')


def answer():
    """Answers the first held-out prompts that leave room for it."""
    questions, index = [], folder.index['val'].astype(int)
    for start, end in zip(index, index[1:]) if answers is not None else ():
        ids = folder.tokens['val'][start:end][: int(answers[start:end].argmax())].tolist()
        if 0 < len(ids) < block_size - sample_tokens and len(questions) < num_samples:
            questions.append([folder.config['start_token'], *ids])
    if not questions:
        return
    with sharded.root_in_place(raw_model) if fsdp else nullcontext():
        rows = generate(
            raw_model, questions, sample_tokens, seed=seed, stop_tokens=[prompts.end_of(form, tokenizer)[0]]
        )
    for question, row in zip(questions, rows):
        log.print(
            f'--- a held-out prompt and its answer at step {step}',
            tokenizer.decode(question) + tokenizer.decode(row[len(question) :]).strip(),
        )
    log.print('---')


def look():
    """Evaluates the model and shows how it answers."""
    global best_step, best_val_loss
    values = evaluate()
    if num_samples and (run.is_main or fsdp):
        answer()
    log.print(f'step {step}: ' + ', '.join(f'{name} {value:.4f}' for name, value in values.items()))
    if values['val/loss'] < best_val_loss:
        best_step, best_val_loss = step, values['val/loss']
        weights = whole_weights()
        if run.is_main:
            save(out / 'best.pt', weights)
            if use_peft:
                lora.save_adapter(raw_model, out / 'adapter', init_from)
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
tokens_per_step = batches.rows_per_step * batches.rows.num_tokens / batches.rows.num_rows  # without filler
stopping = False
while step < max_steps and not stopping and not is_stale():
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
        # The mean over the trained tokens of all micro-steps and ranks; DDP divides by the number of ranks.
        scaler.scale(loss * (run.world_size / count)).backward()
        runtime.add(sums, loss, *rest)

    for o in optimizers.values():
        scaler.unscale_(o)
    grad_norm = runtime.clip_gradients(trainable.values(), grad_clip)
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
        row = runtime.training_means(run.total(sums), beliefs)
        loss = row['train/loss']
        if not math.isfinite(loss):
            raise UserError(
                f'The loss is {loss} at step {step}; the checkpoint before it is kept. Try a lower '
                f'learning_rate than {learning_rate}, a longer warm-up, or --dtype=float32.'
            )
        seconds_per_step = (time.perf_counter() - logged_at) / (step - logged_step)
        tokens_per_sec = tokens_per_step / seconds_per_step
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

if stopping and step < max_steps:
    log.print(f'stopped at step {step} of {max_steps}; continue with --resume_from={out}')
else:
    early = f'stopped early at step {step}' if step < max_steps else 'done'
    log.print(
        f'{early}: best val/loss {best_val_loss:.4f} at step {best_step}; ask it something: '
        f'python sample.py --checkpoint={out / "best.pt"} --chat'
    )
log.close()
if push_to_hub and run.is_main and not stopping:
    import hf  # likewise

    hf.push(out, hub_model_id, token)
run.close()
