"""Tune a pretrained model on instructions: the loss is on the answers of a prepared instruction folder.

python finetune.py --dataset=alpaca --init_from=out/ar-books-tiny-v1
python finetune.py --dataset=alpaca --init_from=Qwen/Qwen2.5-0.5B --use_peft --max_steps=1000
torchrun --standalone --nproc_per_node=2 finetune.py --dataset=alpaca --init_from=out/big --device=cpu
"""

import zlib
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from lm import checkpoints, data, optim, prompts, run_folder, runtime
from lm.configurator import configure, report_idle, require
from lm.files import as_sentence
from lm.folder import Folder, is_of, prepared
from lm.log import start_run
from sampling import generate

# --- data ---
dataset = ''  # a folder of prepare/instruct.py, a name under data/ or a path; or its source: a file, a hub id
field = ''  # of a source that is plain text: the field that holds it
batch_size = 8  # rows per micro-step and rank
gradient_accumulation_steps = 1  # micro-steps per step and rank
packing = True  # several examples per row, none of which sees another; False: one example per row
train_on_prompt = False  # the loss is on the prompt as well, and on answers that were not to be learned
# --- model ---
init_from = ''  # a ckpt.pt, run folder, Hugging Face folder or hub id; scratch: random weights
architecture = ''  # ar, diffusion or sdd; empty: that of the checkpoint
block_size: int = None  # tokens per row; None: the data's max_seq_len, or as many as the model sees
dropout = 0.0  # in the trunk
mask_ratio = (0.0, 1.0)  # diffusion: lowest and highest in training, in blocks rounded up to whole tokens
block_length: tuple = None  # diffusion: tokens per block, of several one per step; None: as the base
ar_weight: float = None  # diffusion: of the next-token loss of the clean tokens; None: as the base
k_schedule = (1, 2, 4, 8)  # sdd: candidates per masked position, one of these drawn for each step
k_warmup_steps = 0  # sdd: go through k_schedule in this many steps instead, then stay at its last
p_belief = ((0.5, 0.5),)  # sdd: (fraction of training, probability of beliefs from there on); before: 0
anneal_steps: int = None  # from ar weights: steps to bidirectional attention; None: a tenth of all
gradient_checkpointing = True  # recompute each block in the backward pass: less memory, a third more time
model_size = 'tiny'  # of init_from=scratch: tiny, small, medium, large, xl
token = ''  # of the Hugging Face hub, for private models
revision = ''  # a branch, tag or commit of the hub
# --- adapters ---
use_peft = False  # train LoRA adapters, the model's own weights stay as they are
peft_lora_r = 64  # rank of the adapters
peft_lora_alpha = 16.0  # over the rank: what their product is multiplied by
peft_lora_dropout = 0.0  # of their inputs
peft_targets = ''  # names of linear layers, with commas between them; empty: all within the blocks
load_in_8bit = False  # the frozen weights as int8
load_in_4bit = False  # the frozen weights as NF4
# --- optimization ---
max_steps = 0  # in place of num_epochs; the later of the two counts
num_epochs = 3.0  # passes over the training examples
optimizer = 'adamw'  # adamw or muon
learning_rate = 2e-5  # at its highest
min_lr = 0.0  # at the end of the schedule
warmup_steps: int = None  # None: warmup_ratio of all steps, or else 100, at most a tenth of all
warmup_ratio: float = None  # the later of the two counts
schedule = 'cosine'  # cosine, linear, wsd, constant
decay_ratio = 0.2  # of all steps: the decay of wsd
weight_decay = 0.01  # of matrices, times the learning rate
beta1 = 0.9  # of the moving average of gradients
beta2 = 0.95  # of the moving average of their squares
grad_clip = 1.0  # largest norm of the gradient; 0: not clipped
early_stopping = 0  # evaluations without a better val/loss after which the run ends; 0: none
# --- evaluation and log ---
eval_every = 100  # steps
eval_tokens = 0  # of the validation split; 0: all of it
log_every = 10  # steps
num_samples = 3  # held-out prompts answered at each evaluation, always the same; 0: none
sample_tokens = 100  # of an answer, at most
# --- the run ---
out_dir = ''  # empty: out/{architecture}-{dataset}-{base}-v{n}
run_suffix = ''  # appended to that name
overwrite = False  # delete the existing run in out_dir
resume_from = ''  # a ckpt.pt or run folder; auto: out_dir's, if it has one
changed_data = False  # resume although data or base weights are others than those that the run began with
save_every = 0  # steps between checkpoints beside those at evaluations; 0: none
save_total_limit: int = None  # copies kept under checkpoints/, one per save_every; None: all; 0: none
seed = 0  # of weights, batches, masks and dropout
no_wandb = False  # log to the run folder only
wandb_project = 'diffusion-lm-finetune'  # of Weights & Biases
wandb_run_name = ''  # empty: the run folder's name
# --- the machine ---
device = 'auto'  # cpu, cuda, cuda:N, mps
dtype = 'auto'  # bfloat16, float16, float32
compile: bool = None  # torch.compile; None: on CUDA only, without fsdp
fsdp = False  # shard weights, gradients and moments over the ranks: for what no single GPU holds
config = configure(globals())

BLOCKS = ['block_length', 'ar_weight']
# A run keeps what is FIXED; everything else may change when it is resumed, and the change is printed.
FIXED = 'architecture block_size packing train_on_prompt init_from model_size optimizer fsdp seed'.split()
FIXED += 'use_peft peft_lora_r peft_lora_alpha peft_targets load_in_8bit load_in_4bit anneal_steps'.split()
FIXED += BLOCKS

resumed = checkpoints.resume(globals(), config, FIXED)
runtime.check_settings(config)
require(not (load_in_8bit and load_in_4bit), 'load_in_8bit and load_in_4bit exclude each other; choose one.')
is_quantized = load_in_8bit or load_in_4bit
require(use_peft or not is_quantized, 'Quantized weights are for adapters; add --use_peft.')
require(learning_rate, 'learning_rate is 0, so nothing would be trained; 2e-5 is usual for all weights.')
require(init_from, 'init_from is empty; give --init_from=CHECKPOINT, a hub id, or --init_from=scratch.')
require(dataset, 'There is nothing to learn from; give --dataset=NAME, a folder of prepare/instruct.py.')

# ---------------------------------------------------------------------------- process, data, start

store = checkpoints  # keeps weights and the state of training
if fsdp:
    from lm import sharded as store  # slow to import
for key, before, now in [*resumed.overrides]:
    if key == 'dataset' and is_of(before, now):  # prepared at the start of the run
        dataset = config['dataset'] = before
        resumed.overrides.remove((key, before, now))
if not resumed.checkpoint:
    base, source = partial(checkpoints.tokenizer_of, init_from, token, revision), dataset
    dataset = config['dataset'] = prepared(source, field, block_size, base)
    report_idle(config, 'on data that are prepared', 'field' * (dataset == source))
dist = runtime.Runtime(device, dtype)  # after what may take longer than ranks wait for each other
folder = Folder(dataset)
folder.train_on_prompt = train_on_prompt
tokenizer, prompt_format = folder.tokenizer, folder.config['prompt_format'] or prompts.DEFAULT
start_token, max_seq_len = folder.config['start_token'], folder.config.get('max_seq_len')

blocks = {key: config[key] for key in BLOCKS if config[key] is not None}
if resumed.checkpoint and not use_peft:
    initial = resumed.checkpoint
elif init_from == 'scratch':
    if dist.is_main:
        print('warning: init_from=scratch; a model that was not pretrained will not learn to answer.')
    shape = {**checkpoints.size_of(model_size), 'block_size': block_size or max_seq_len or 256, **blocks}
    shape.update({key: getattr(tokenizer, key) for key in ('vocab_size', 'mask_id', 'ignore_id')})
    initial = {'architecture': architecture or 'ar', 'tokenizer': tokenizer.to_json(), 'model_config': shape}
else:  # adapters go on from the weights that they were made for
    initial = checkpoints.load(init_from, token, revision, mmap=True, tokenizer=tokenizer)
    checkpoints.check_model(initial, init_from, config)
    initial = checkpoints.convert(initial, init_from, architecture or initial['architecture'], **blocks)
architecture = initial['architecture']
checkpoints.check_fits(initial, init_from, architecture, tokenizer, folder.path)

# ---------------------------------------------------------------------------- model

shape = {**initial['model_config'], 'k': max(k_schedule), 'dropout': dropout}
shape['gradient_checkpointing'] = gradient_checkpointing
longest = shape['block_size']
block_size = block_size or min(max_seq_len or longest, longest)
require(8 <= block_size <= longest, f'block_size is {block_size}; {init_from} takes 8 to {longest} tokens.')
torch.manual_seed(seed)
in_parts = fsdp and not use_peft  # a rank makes, or reads, only its part; but for a base of adapters
weights = initial.pop('model_state_dict', None)
is_drawn = in_parts and not weights and not resumed.checkpoint
with store.DrawnInParts(dist) if is_drawn else torch.device('meta' if in_parts else 'cpu'):
    raw_model = checkpoints.make_model(architecture, **shape)
checkpoints.check_padding(raw_model.config, tokenizer)
if not resumed.checkpoint:
    runtime.check_blocks(raw_model.config, block_size)
num_parameters = raw_model.num_parameters()  # before some are quantized, and adapters are added
if use_peft:
    from lm import lora, quantize  # only where it is wanted

    def add_adapters(model):
        targets = tuple(filter(None, map(str.strip, peft_targets.split(','))))
        if is_quantized:
            quantize.quantize(model, bits=8 if load_in_8bit else 4)
        lora.add_lora(model, peft_lora_r, peft_lora_alpha, peft_lora_dropout, targets)
        if initial.get('converted_from'):
            lora.train_new_embeddings(model)

    raw_model.load_state_dict(weights or raw_model.state_dict())
    weights = None
    checksums = [zlib.crc32(x.flatten().view(torch.uint8).numpy()) for x in raw_model.state_dict().values()]
    folder.fingerprint[f'the weights of {init_from}'] = checksums
    base_checksum = lora.base_checksum(raw_model)
    add_adapters(raw_model)
    if dist.dtype == 'bfloat16':
        lora.round_frozen(raw_model)
    if resumed.checkpoint:
        problem = f'{init_from} has another shape than in the run of {resumed.path}'
        with as_sentence(problem, 'put its weights back'):
            raw_model.load_state_dict(resumed.checkpoint['adapter_state_dict'], strict=False)
        resumed.checkpoint.pop(
            'model_state_dict', None
        )  # merged, for other scripts; not kept beside the model
runtime.report_idle_settings(config, raw_model)
raw_model = store.place(raw_model, weights, dist)
weights = None  # not kept beside the model
trainable = {name: p for name, p in raw_model.named_parameters() if p.requires_grad}

# ---------------------------------------------------------------------------- batches, optimizer, state

mode = 'packed examples' if packing else 'examples'
kind = type(raw_model)
batches = data.Batches(folder, kind, block_size, batch_size, gradient_accumulation_steps, seed, mode, dist)
val_rows = data.EvaluationBatches(folder, 'val', kind, block_size, batch_size, mode, eval_tokens, dist)
max_steps, warmup = runtime.plan_steps(config, batches.rows.num_rows, batches.rows_per_step)
anneal_steps = optim.default_anneal_steps(anneal_steps, raw_model, initial, max_steps)
opt = optim.make_optimizer(raw_model, optimizer, learning_rate, beta1, beta2, weight_decay, dist.dtype)
scaler = dist.scaler()
inputs = {'rows_per_step': batches.rows_per_step, 'data': folder.fingerprint}
step, best, pending = checkpoints.continue_run(resumed, store, raw_model, opt, scaler, inputs, config)
is_finished = lambda: pending is None and (step >= max_steps or 0 < early_stopping <= best.later)
if is_finished():
    remedy = '--max_steps makes it longer' if step >= max_steps else '--early_stopping=0 makes it go on'
    dist.exit(f'{resumed.path} is finished at step {step} of {max_steps}, best at {best.step}. {remedy}.')
model = dist.wrap(raw_model, compile, fsdp)

estimate = runtime.memory_estimate(raw_model, batch_size, block_size, dist)
if use_peft and dist.device.type == 'cpu':
    estimate['merged copy'] = 4 * num_parameters  # while it saves, in float32
runtime.check_memory(estimate, dist)
base = model_size if init_from == 'scratch' else Path(init_from).resolve().name.removesuffix('.pt')
config.update(architecture=architecture, block_size=block_size, max_steps=max_steps)
config.update(warmup_steps=warmup, dtype=dist.dtype, anneal_steps=anneal_steps)
config.update({key: getattr(raw_model.config, key) for key in BLOCKS})
out, log = start_run(dist, config, f'{architecture}-{folder.config["name"]}-{base}', resumed, init_from)
stop = runtime.StopSignal()

# One example as the model sees it, with the tokens in the loss marked, and the size of the data.
rows, text = batches.rows, ''
tokens, loss_mask, doc_ids = rows.read(0)
length = len(tokens) if doc_ids is None else int((doc_ids == 0).sum())
for in_loss, part in groupby(range(length), lambda i: loss_mask[i]):
    piece = tokenizer.decode([tokens[i] for i in part], show_special=True)
    text += f'«{piece}»' if in_loss else piece
log.print('--- an example; the loss is on what is in «»', text, '---')
log.print(
    f'{len(rows.starts):,} examples of {rows.num_tokens:,} tokens, {rows.num_trained:,} of them trained, in '
    f'{rows.num_rows:,} rows of {block_size}; the prompt of {rows.cut:,} is cut on the left, {rows.dropped:,} left out '
    f'because the answer does not fit; of the validation split {val_rows.rows.cut:,} and {val_rows.rows.dropped:,}'
)
parts = ', '.join(f'{name} {size / 1e9:.2f}' for name, size in estimate.items())
log.print(f'memory, about: {parts}; {sum(estimate.values()) / 1e9:.2f} GB in all')
num_trained = sum(p.numel() for p in trainable.values()) if use_peft else num_parameters
log.print(
    f'{out}: {architecture} from {init_from}, {num_parameters:,} parameters, {num_trained:,} trained, {dist.dtype} on '
    f'{dist.world_size} × {dist.device.type}; {max_steps} steps are {batches.epoch(max_steps):.2f} epochs',
    f'val/loss: nats per token, {runtime.describe_loss(raw_model)}',
)

# ---------------------------------------------------------------------------- evaluation and checkpoints


def checkpoint():
    """Return what the other scripts need to use the model, but for its weights."""
    texts = tokenizer, start_token, prompt_format
    state = checkpoints.contents(raw_model, step, best, config, initial, *texts)
    if use_peft:
        state['adapter_state_dict'] = checkpoints.whole(trainable)
    return state


def whole_weights():
    """Return what other scripts load, adapters merged, on rank 0; all ranks take part."""
    weights = checkpoints.whole(raw_model.state_dict())
    if use_peft and weights:
        with torch.device('meta'):
            merged = checkpoints.make_model(architecture, **shape)
            add_adapters(merged)
        merged.load_state_dict(weights, assign=True)
        lora.merge(merged.float())  # in bfloat16 small changes would round away
        weights = merged.state_dict()
    return {'model_state_dict': weights}


def save(is_last=False):
    """Write ckpt.pt with all that it takes to go on, and its copy where one is due."""
    state = {**checkpoint(), **checkpoints.state_of_run(inputs, pending, scaler, log)}
    store.save_state(out / 'ckpt.pt', raw_model, opt, dist, state, whole_weights, is_last)
    run_folder.copy_if_due(out, step, best.step, config, dist)


def evaluate_and_save():
    """Compute the val/ metrics, print answers, save the best weights, log the step."""
    global pending
    values = runtime.evaluate(raw_model, val_rows, dist)
    if num_samples and (dist.is_main or fsdp):
        print_answers()
    log.print(f'step {step}: ' + ', '.join(f'{name} {value:.4f}' for name, value in values.items()))
    runtime.check_finite(values['val/loss'], step, learning_rate)
    is_best = checkpoints.save_if_best(out, step, values, best, checkpoint, whole_weights, dist)
    adapter = checkpoints.whole(trainable) if is_best and use_peft else None
    if adapter and dist.is_main:
        asked = dict(prompt_format=prompt_format, start_token=start_token, base_checksum=base_checksum)
        lora.save_adapter(raw_model, out / 'adapter', init_from, adapter, block_size=block_size, **asked)
    log.metrics(step, pending | values)
    pending = None


def print_answers():
    """Answer the first held-out prompts that leave room for it."""
    questions, index = [], folder.index['val'].astype(int)
    for start, end in zip(index, index[1:]):
        ids = folder.tokens['val'][start:end][: int(folder.masks['val'][start:end].argmax())].tolist()
        if 0 < len(ids) < block_size - sample_tokens and len(questions) < num_samples:
            questions.append([start_token, *ids])
    if not questions:
        problem = f'no held-out prompt leaves room for {sample_tokens=} in rows of {block_size}'
        return step or log.print(problem)  # said once
    stop_tokens = [prompts.end_of(prompt_format, tokenizer)[0]]
    with dist.autocast(), checkpoints.gathered(raw_model), dist.eager():
        rows = generate(raw_model, questions, sample_tokens, seed=seed, stop_tokens=stop_tokens)
    for question, row in zip(questions, rows):
        answer = tokenizer.decode(row[len(question) :]).strip()
        log.print(f'--- a held-out prompt and its answer at step {step}', tokenizer.decode(question) + answer)
    log.print('---')


# ---------------------------------------------------------------------------- the loop

if not (fsdp and resumed.goes_on_in(out)):  # where a copy goes on, ckpt.pt becomes that
    save()
if pending is not None:
    evaluate_and_save()
raw_model.mask_window = mask_ratio
tokens_per_step = batches.rows_per_step * batches.rows.text_per_row  # without padding
speed = runtime.Speed(raw_model, dist, tokens_per_step, step, block_size)
stopping = False
while not stopping and not is_finished():
    lr = optim.learning_rate_at(step, max_steps, learning_rate, min_lr, warmup, schedule, decay_ratio)
    opt.set_lr(lr)
    raw_model.attn_mask = optim.annealed_mask(step, anneal_steps, block_size, seed, dist.device)
    raw_model.block_length, _ = optim.draw_blocks(raw_model, step, seed)
    beliefs = optim.draw_beliefs(raw_model, step, max_steps, seed, p_belief, k_schedule, k_warmup_steps)
    micro_batches, count = batches.get(step)
    sums = {}
    for i, batch in enumerate(micro_batches):
        runtime.seed_dropout(seed, step, i, dist.rank)
        model.require_backward_grad_sync = i == len(micro_batches) - 1  # DDP sends gradients once per step
        with dist.autocast():
            loss, *rest = model(*batch, **beliefs)
        # The mean over the trained tokens of all micro-steps and ranks; DDP divides by the number of ranks.
        scaler.scale(loss * (dist.world_size / count)).backward()
        runtime.add(sums, loss, *rest)
    speed.count(sums, **beliefs)
    grad_norm = opt.step(scaler, trainable.values(), grad_clip)
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

if not is_finished():
    log.print(f'stopped at step {step} of {max_steps}; continue with --resume_from={out}')
else:
    save(is_last=True)
    early = f'stopped early at step {step}' if step < max_steps else 'done'
    sample = f'python sample.py --checkpoint={out / "best.pt"} --chat'
    log.print(f'{early}: best val/loss {best.loss:.4f} at step {best.step}; ask it something: {sample}')
log.close()
dist.close()
