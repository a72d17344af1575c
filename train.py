"""Pretrain a language model on a prepared folder.

python train.py config/stories.py
python train.py config/xl_owt.py --batch_size=8
torchrun --standalone --nproc_per_node=2 train.py config/shakespeare_char.py --device=cpu
"""

from contextlib import nullcontext
from pathlib import Path

import torch

from lm import checkpoints, data, optim, run_folder, runtime, scaling
from lm.configurator import configure, restore
from lm.folder import open_dataset, version_of
from lm.log import start_run
from sampling import generate

# --- data ---
dataset = 'stories'  # a name under data/, the path of a prepared folder, or a mix: NAME:WEIGHT,NAME:WEIGHT
unique_tokens = 0  # of the training split, from its start on, for studies of repetition; 0: all
mode = 'packed'  # packed: windows of the token stream; documents: one document per row
batch_size = 32  # rows per micro-step and rank
gradient_accumulation_steps = 1  # micro-steps per step and rank
# --- model ---
architecture = 'ar'  # ar, diffusion or sdd
model_size = 'tiny'  # tiny, small, medium, large, xl: sets n_layer, n_head and n_embd
depth: int = None  # instead: shape, batch, steps and rates by lm/scaling.py; what is given stays
n_layer: int = None  # blocks
n_head: int = None  # attention heads
n_embd: int = None  # width of the trunk
n_kv_head: int = None  # fewer than n_head: grouped-query attention
block_size = 256  # tokens per row; if not given, the data's max_seq_len, if any, or what init_from reads
dropout = 0.0  # in the trunk
norm = 'rms'  # rms, rms_gain or layer
position = 'rope'  # rope or learned
mlp = 'relu2'  # relu2, relu, gelu, gelu_tanh or swiglu
bias = False  # in linear layers and LayerNorm
qk_norm = True  # RMS-normalised queries and keys
embedding_shortcuts: bool = None  # each layer reads the embedding again; None: where norm=rms
neighbours: int = None  # each layer reads so many embeddings on each side; None: 8 where norm=rms, else 0
logit_softcap = 15.0  # 0: none
token_dropout = 0.0  # ar: share of the tokens that it reads masked in training, against learning by heart
mask_ratio = (0.0, 1.0)  # diffusion: lowest and highest in training, in blocks rounded up to whole tokens
block_length = (0,)  # diffusion: tokens per block, several: one is drawn for each step; 0: the whole row
noisy_every = 2  # diffusion: a step masks every n-th block only, for less time; all clean tokens are there
ar_weight = 0.0  # diffusion: of the next-token loss of the clean tokens, which makes it an ar model as well
k_schedule = (1, 2, 4, 8)  # sdd: candidates per masked position, one of these drawn for each step
k_warmup_steps = 0  # sdd: go through k_schedule in this many steps instead, then stay at its last
p_belief = ((0.5, 0.5),)  # sdd: (fraction of training, probability of beliefs from there on); before: 0
gradient_checkpointing = False  # recompute each block in the backward pass: less memory, a third more time
init_from = ''  # start from the weights of a ckpt.pt, run folder, Hugging Face folder or hub id
anneal_steps: int = None  # from ar weights: steps from causal to full attention; None: a tenth of all
token = ''  # of the Hugging Face hub, for private models
revision = ''  # a branch, tag or commit of the hub
# --- optimization ---
max_steps = 2000  # of the optimizer
num_epochs = 0.0  # in place of max_steps; the later of the two counts
optimizer = 'adamw'  # adamw or muon
learning_rate = 1e-3  # at its highest
min_lr = 0.0  # at the end of the schedule
warmup_steps: int = None  # in place of warmup_ratio; the later of the two counts
warmup_ratio = 0.02  # of all steps, in which the learning rate rises
schedule = 'cosine'  # cosine, linear, wsd, constant
decay_ratio = 0.2  # of all steps: the decay of wsd
weight_decay = 0.1  # of matrices, times the learning rate
decay_embedding = False  # with muon: weight decay of the embedding too; better for some short runs
beta1 = 0.9  # of the moving average of gradients
beta2 = 0.95  # of the moving average of their squares
grad_clip = 1.0  # largest norm of the gradient; 0: not clipped
ema_decay = 0.0  # moving average of the weights, e.g. 0.999, evaluated and sampled instead; 0: none
# --- evaluation and log ---
eval_every = 250  # steps
eval_tokens = 0  # of the validation split; 0: all of it
log_every = 10  # steps
sample_every = 0  # steps between samples, printed at the next evaluation; 0: none
num_samples = 2  # of them each time
sample_tokens = 200  # of a sample, at most
# --- the run ---
out_dir = ''  # empty: out/{architecture}-{dataset}-{size}-v{n}
run_suffix = ''  # appended to that name
overwrite = False  # delete the existing run in out_dir
resume_from = ''  # a ckpt.pt or run folder; auto: out_dir's, if it has one
changed_data = False  # resume although the data are others than those that the run began with
save_every = 0  # steps between checkpoints beside those at evaluations; 0: none
save_total_limit: int = None  # copies kept under checkpoints/, one per save_every; None: all; 0: none
seed = 0  # of weights, batches, masks and dropout
no_wandb = False  # log to the run folder only
wandb_project = 'diffusion-lm'  # of Weights & Biases
wandb_run_name = ''  # empty: the run folder's name
# --- the machine ---
device = 'auto'  # cpu, cuda, cuda:N, mps
dtype = 'auto'  # bfloat16, float16, float32
compile: bool = None  # torch.compile; None: on CUDA only, without fsdp
fsdp = False  # shard weights, gradients and moments over the ranks: for what no single GPU holds
config = configure(globals())

# The shape of the model: keys that go to ModelConfig as they are. A run keeps it and what else is FIXED; everything
# else may change when it is resumed, and the change is printed.
SHAPE = 'n_layer n_head n_embd n_kv_head block_size norm position mlp bias qk_norm logit_softcap'.split()
SHAPE += ['embedding_shortcuts', 'neighbours']
BLOCKS = ['block_length', 'ar_weight']  # may be others than those of the weights that a run starts from
FIXED = 'architecture mode unique_tokens model_size depth init_from optimizer fsdp seed anneal_steps'.split()
FIXED += SHAPE + BLOCKS

# ---------------------------------------------------------------------------- process, data, start

resumed = checkpoints.resume(globals(), config, FIXED)
runtime.check_settings(config)
store = checkpoints  # keeps weights and the state of training
if fsdp:
    from lm import sharded as store  # slow to import
dist = runtime.Runtime(device, dtype)
folder = open_dataset(dataset, unique_tokens)
tokenizer = folder.tokenizer
if 'block_size' not in config.given:
    config['block_size'] = folder.config.get('max_seq_len') or block_size
if depth is not None and not resumed.checkpoint:
    restore(globals(), config, scaling.settings(config, folder, dist.world_size))

initial = resumed.checkpoint or {}
if init_from and not initial:
    initial = checkpoints.load(init_from, token, revision, mmap=True, tokenizer=tokenizer)
    longest = initial['model_config']['block_size']
    if 'block_size' not in config.given:
        block_size = min(longest, folder.config.get('max_seq_len') or longest)
    blocks = {key: config[key] for key in config.given.intersection(BLOCKS)}
    initial = checkpoints.convert(initial, init_from, architecture, block_size, **blocks)
    checkpoints.check_model(initial, init_from, config, SHAPE)

# ---------------------------------------------------------------------------- model

if initial:
    checkpoints.check_fits(initial, resumed.path or init_from, architecture, tokenizer, folder.path)
    shape = dict(initial['model_config'])
else:
    shape = checkpoints.size_of(model_size)
    shape.update({key: config[key] for key in SHAPE + BLOCKS if config[key] is not None})
shape.update({key: getattr(tokenizer, key) for key in ('vocab_size', 'mask_id', 'ignore_id')})
shape.update(k=max(k_schedule), dropout=dropout, gradient_checkpointing=gradient_checkpointing)
torch.manual_seed(seed)
in_parts = store.DrawnInParts(dist) if fsdp and not initial else torch.device('meta' if fsdp else 'cpu')
with in_parts:  # a rank makes, or reads, only its part of a sharded model
    raw_model = checkpoints.make_model(architecture, **shape)
checkpoints.check_padding(raw_model.config, tokenizer)
if not resumed.checkpoint:
    runtime.check_blocks(raw_model.config, raw_model.config.block_size)
runtime.report_idle_settings(config, raw_model)
raw_model = store.place(raw_model, initial.pop('model_state_dict', None), dist)  # not kept beside the model
block_size = raw_model.config.block_size

# ---------------------------------------------------------------------------- batches, optimizer, state

kind = type(raw_model)
batches = data.Batches(folder, kind, block_size, batch_size, gradient_accumulation_steps, seed, mode, dist)
val_rows = data.EvaluationBatches(folder, 'val', kind, block_size, batch_size, mode, eval_tokens, dist)
max_steps, warmup = runtime.plan_steps(config, batches.rows.num_rows, batches.rows_per_step)
anneal_steps = optim.default_anneal_steps(anneal_steps, raw_model, initial, max_steps)
settings = beta1, beta2, weight_decay, dist.dtype, decay_embedding
opt = optim.make_optimizer(raw_model, optimizer, learning_rate, *settings)
scaler = dist.scaler()
ema = opt.average = optim.WeightAverage(raw_model, ema_decay) if ema_decay else None
inputs = {'rows_per_step': batches.rows_per_step, 'data': folder.fingerprint}
step, best, pending = checkpoints.continue_run(resumed, store, raw_model, opt, scaler, inputs, config)
if step >= max_steps and pending is None:
    dist.exit(f'{resumed.path} is finished at step {step} of {max_steps}. --max_steps makes it longer.')
model = dist.wrap(raw_model, compile, fsdp)

config.update({key: getattr(raw_model.config, key) for key in SHAPE + BLOCKS})
config.update(max_steps=max_steps, dtype=dist.dtype, anneal_steps=anneal_steps)
base = model_size if depth is None else f'd{depth}'
base = Path(init_from).resolve().name.removesuffix('.pt') if init_from else base
out, log = start_run(dist, config, f'{architecture}-{folder.config["name"]}-{base}', resumed, init_from)
stop = runtime.StopSignal()
log.print(
    f'{out}: {architecture}, {raw_model.num_parameters():,} parameters, {dist.dtype} on {dist.world_size} × '
    f'{dist.device.type}; {max_steps} steps of {batches.rows_per_step} rows of {block_size} tokens are '
    f'{batches.describe_epochs(max_steps)} of data {version_of(folder)}',
    f'val/loss: nats per token, {runtime.describe_loss(raw_model)}',
)

# ---------------------------------------------------------------------------- evaluation and checkpoints


def checkpoint():
    """Return what the other scripts need to use the model, but for its weights."""
    texts = tokenizer, folder.config['start_token'], folder.config['prompt_format']
    return checkpoints.contents(raw_model, step, best, config, initial, *texts)


def whole_weights():
    """Return what other scripts load, on rank 0; all ranks take part."""
    weights = {'model_state_dict': checkpoints.whole(raw_model.state_dict())}
    return {**weights, 'ema_state_dict': checkpoints.whole(ema.ema)} if ema else weights


def save(is_last=False):
    """Write ckpt.pt with all that it takes to go on, and its copy where one is due."""
    state = {**checkpoint(), **checkpoints.state_of_run(inputs, pending, scaler, log)}
    store.save_state(out / 'ckpt.pt', raw_model, opt, dist, state, whole_weights, is_last)
    run_folder.copy_if_due(out, step, best.step, config, dist)


def evaluate_and_save():
    """Compute the val/ metrics, print samples where it is their turn, save the best weights, log the step."""
    global pending
    with ema.in_place() if ema else nullcontext():
        values = runtime.evaluate(raw_model, val_rows, dist)
        due = sample_every and (step % sample_every < eval_every or step == max_steps)
        if due and (dist.is_main or fsdp):
            print_samples()
    log.print(f'step {step}: ' + ', '.join(f'{name} {value:.4f}' for name, value in values.items()))
    runtime.check_finite(values['val/loss'], step, learning_rate)
    checkpoints.save_if_best(out, step, values, best, checkpoint, whole_weights, dist)
    log.metrics(step, pending | values)
    pending = None


def print_samples():
    prompts, length = [[folder.config['start_token']]] * num_samples, min(sample_tokens, block_size - 1)
    with dist.autocast(), checkpoints.gathered(raw_model), dist.eager():
        rows = generate(raw_model, prompts, length, seed=seed, stop_tokens=[tokenizer.endoftext_id])
    for row in rows:
        log.print(f'--- a sample at step {step}', tokenizer.decode(row[1:]).strip())
    log.print('---')


# ---------------------------------------------------------------------------- the loop

if not (fsdp and resumed.goes_on_in(out)):  # where a copy goes on, ckpt.pt becomes that
    save()
if pending is not None:
    evaluate_and_save()
raw_model.mask_window, raw_model.token_dropout = mask_ratio, token_dropout
tokens_per_step = batches.rows_per_step * min(block_size, batches.rows.text_per_row)  # without padding
speed = runtime.Speed(raw_model, dist, tokens_per_step, step, block_size)
stopping = False
while step < max_steps and not stopping:
    lr = optim.learning_rate_at(step, max_steps, learning_rate, min_lr, warmup, schedule, decay_ratio)
    opt.set_lr(lr)
    raw_model.block_length, raw_model.noisy_blocks = optim.draw_blocks(raw_model, step, seed, noisy_every)
    raw_model.attn_mask = optim.annealed_mask(step, anneal_steps, block_size, seed, dist.device)
    beliefs = optim.draw_beliefs(raw_model, step, max_steps, seed, p_belief, k_schedule, k_warmup_steps)
    micro_batches, count = batches.get(step)
    sums = {}
    for i, batch in enumerate(micro_batches):
        runtime.seed_dropout(seed, step, i, dist.rank)
        model.require_backward_grad_sync = i == len(micro_batches) - 1  # DDP sends gradients once per step
        with dist.autocast():
            loss, *rest = model(*batch, **beliefs)
        # The mean over the tokens of all micro-steps and ranks; DDP divides by the number of ranks.
        scaler.scale(loss * (dist.world_size / count)).backward()
        runtime.add(sums, loss, *rest)
    speed.count(sums, **beliefs)
    grad_norm = opt.step(scaler, raw_model.parameters(), grad_clip)
    if ema:
        ema.update(step)
    step += 1

    stopping = dist.any(stop.received)  # all ranks at the same step
    evaluating = step % eval_every == 0 or step == max_steps
    saving = evaluating or stopping or (save_every and step % save_every == 0)
    if not saving and step % log_every:
        continue
    metrics = runtime.means('train', dist.total(sums))
    runtime.check_finite(metrics['train/loss'], step, learning_rate)
    metrics |= {'train/lr': lr, 'train/grad_norm': grad_norm.item(), 'train/epoch': batches.epoch(step)}
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

if step < max_steps or pending is not None:
    log.print(f'stopped at step {step} of {max_steps}; continue with --resume_from={out}')
else:
    save(is_last=True)
    done = f'done in {speed.seconds:.0f} s of training since the start or resume'
    sample = f'look at what it writes: python sample.py --checkpoint={out / "ckpt.pt"}'
    log.print(f'{done}: best val/loss {best.loss:.4f} at step {best.step}; {sample}')
log.close()
dist.close()
