"""Speed, side by side: how fast a model learns, trains and writes here, and in a clone of nanoGPT.

    git clone https://github.com/karpathy/nanoGPT && python prepare/shakespeare.py
    python bench.py --what=compare --peer=nanoGPT                       # ten minutes on two idle cores
    python bench.py --what=compare --peer=nanoGPT --only=work --runs=9
    python bench.py --what=train --dataset=stories --mode=documents --block_size=160 --batch_size=24

`train` times training steps of the three architectures on one data set and shape, one after the other in turn, on
any device: milliseconds, tokens per second, the share of the machine's own matrix speed, and each one's time over
that of the one before it. The steps of `sdd` are spread over its whole schedule, with and without beliefs.

The three parts of `compare`, all on the CPU, each side its own train.py as a process of its own:
    learn   nanoGPT's CPU recipe for Shakespeare by characters against config/shakespeare_char.py: the time
            to a validation loss of 1.88, and the loss that the peer's time is enough for
    work    the same work on both sides, GPT-2's blocks and AdamW in float32, in tokens per second
    cache   our own greedy decoding with its KV cache against recomputing all keys and values
Raw figures come as they are measured, then each target, reached or missed; a missed one makes the exit
status 1. Other programs on the machine disturb the figures, ratios of pairs the least.
"""
import contextlib
import importlib.util
import io
import os
import pickle
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import checkpoints
import data
import optim
import runtime
from configurator import UserError, configure
from sampling import generate

# --- what to measure ---
what = 'compare'             # compare: against a peer; train: the three architectures side by side
peer = ''                    # path of a clone of nanoGPT, which is only read
only = 'learn,work,cache'    # parts of compare
dataset = 'shakespeare_char'  # as prepare/shakespeare.py writes it: a name under data/, or a path
# --- what train times ---
mode = 'packed'              # packed, documents
model_size = 'tiny'
block_size = 128
batch_size = 32
steps = 60                   # timed steps of each architecture, after warm-up
device = 'auto'
dtype = 'auto'
# --- how long; less than the defaults is a rehearsal ---
runs = 5                     # pairs of runs of work and of cache
peer_steps = 2000            # learn: steps of the peer's recipe
short_steps = 240            # learn: steps of our run to a loss of 1.88, warm-up and decay included
work_steps = 300             # work: steps of each run
warmup_steps = 50            # steps at the start of each run that no rate includes
new_tokens = 500             # cache: tokens written
config = configure(globals())

ROOT = Path(__file__).resolve().parent
URL = 'https://github.com/karpathy/nanoGPT'
PEER_FILES = ('train.py', 'model.py', 'configurator.py', 'config/train_shakespeare_char.py')
SPLITS = {'train': 1_003_854, 'val': 111_540}  # characters, in nanoGPT's split as in ours
PARTS = ('learn', 'work', 'cache')

# What nanoGPT's README gives for a CPU. --max_iters and --lr_decay_iters, 2000 there, follow.
PEER_RECIPE = ['config/train_shakespeare_char.py', '--device=cpu', '--compile=False', '--eval_iters=20',
               '--log_interval=1', '--block_size=64', '--batch_size=12', '--n_layer=4', '--n_head=4',
               '--n_embd=128', '--dropout=0.0']
OUR_RECIPE = ['config/shakespeare_char.py', '--device=cpu', '--no_wandb']
# The same shapes and the same optimizer as PEER_RECIPE; it has no biases either.
SAME_WORK = ['--dtype=float32', '--batch_size=12', '--norm=layer', '--position=learned', '--mlp=gelu',
             '--bias=False', '--qk_norm=False', '--logit_softcap=0', '--dropout=0.0', '--optimizer=adamw',
             '--learning_rate=1e-3', '--beta2=0.99', '--weight_decay=0.1', '--grad_clip=1.0']
NEVER = 10 ** 9            # steps between evaluations
TOKENS_PER_STEP = 12 * 64  # of PEER_RECIPE and SAME_WORK
MARGIN = 0.85              # share of the peer's time that our run is planned for, since rates vary by a tenth


class Target(NamedTuple):
    what: str
    value: float
    sign: str      # <= or >=
    wanted: float

    @property
    def reached(self):
        return self.value <= self.wanted if self.sign == '<=' else self.value >= self.wanted

    def __str__(self):
        return (f'{"reached" if self.reached else "MISSED":<8} {self.what}: {self.value:,.3f} '
                f'(wanted {self.sign} {self.wanted:,})')


# ---------------------------------------------------------------------------- the machine

def say(*words):
    print(*words, flush=True)


def describe_machine():
    """What a figure means nothing without."""
    info = Path('/proc/cpuinfo')
    names = re.findall(r'^model name\s*: (.*)', info.read_text(), re.M) if info.exists() else []
    say(f'{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores, '
        f'{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}')
    load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else 0
    if load > 0.5:
        # A step's threads wait for each other at each operation: with one core taken, it is ten times slower.
        say(f'The load here is {load:.1f} before the start: other programs will disturb the figures.')


def run(script, arguments, folder):
    """Runs a Python script in `folder`. Returns [(seconds since its start, line)] and its seconds in all."""
    command = [sys.executable, str(script), *arguments]
    environment = {**os.environ, 'PYTHONUNBUFFERED': '1', 'PYTHONIOENCODING': 'utf-8'}
    lines, start = [], time.perf_counter()
    with subprocess.Popen(command, cwd=folder, env=environment, encoding='utf-8', errors='replace',
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line.rstrip()))
    seconds = time.perf_counter() - start
    if process.returncode:
        last = '\n'.join(line for _, line in lines[-5:])
        raise UserError(f'`{" ".join(command)}` in {folder} ended with status {process.returncode}; repair '
                        f'what it says:\n{last}')
    return lines, seconds


def seconds_per_step(lines, warmup):
    """From a run's progress lines, by the clock at which they came: the same measure for both sides.

    It holds all that a step of the loop does, logging included; evaluation lies before or after these lines.
    """
    progress = [(int(match[1]), at) for at, line in lines
                if (match := re.match(r'(?:iter|step) (\d+)(?:/\d+)?: loss', line))]
    progress = [(step, at) for step, at in progress if step >= warmup]
    if len(progress) < 2:
        raise UserError(f'Only {len(progress)} lines of progress came after {warmup} steps of warm-up, too '
                        'few to time; check that the clone is unchanged, or let the run have more steps.')
    (first, start), (last, end) = progress[0], progress[-1]
    return (end - start) / (last - first)


# ---------------------------------------------------------------------------- both sides

def open_dataset():
    """The prepared folder, sure to hold the ids of nanoGPT's own preparation: characters in sorted order."""
    remedy = f'make it with: python {ROOT / "prepare" / "shakespeare.py"}'
    try:
        folder = data.Folder(dataset)
    except UserError as error:
        raise UserError(f'The comparison needs Shakespeare by characters; {remedy}. ({error})') from error
    tokenizer = folder.tokenizer
    characters = [tokenizer.decode([i]) for i in range(tokenizer.endoftext_id)]
    sizes = {split: len(tokens) for split, tokens in folder.tokens.items()}
    if characters != sorted(set(characters)) or len(characters) != 65 or sizes != SPLITS:
        raise UserError(f"{folder.path} is not nanoGPT's shakespeare_char (65 characters, {SPLITS}), but has "
                        f'{len(characters)} and {sizes}; {remedy}.')
    return folder, characters


def copy_peer(workplace, folder, characters):
    """A working copy of the peer's clone, with its data as its own prepare.py would write them."""
    source, copy = Path(peer), workplace / 'peer'
    missing = [name for name in PEER_FILES if not (peer and (source / name).is_file())]
    if missing:
        raise UserError(f'--peer={peer} is no clone of nanoGPT: it has no {missing[0]}; '
                        f'give the path of one, made with: git clone {URL}')
    for name in PEER_FILES:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, copy / name)
    prepared = copy / 'data' / 'shakespeare_char'
    prepared.mkdir(parents=True)
    for split in SPLITS:
        shutil.copy(folder.path / f'{split}_tokens.bin', prepared / f'{split}.bin')
    meta = {'vocab_size': len(characters), 'itos': dict(enumerate(characters)),
            'stoi': {character: i for i, character in enumerate(characters)}}
    (prepared / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return copy


def run_peer(copy, *arguments):
    return run('train.py', [*PEER_RECIPE, *arguments], copy)


def run_ours(workplace, folder, *arguments):
    """Our train.py in a fresh run folder; evaluates before the first step and after the last, no more."""
    out = tempfile.mkdtemp(dir=workplace)
    common = [*OUR_RECIPE, f'--dataset={folder.path.resolve()}', f'--out_dir={out}', f'--eval_every={NEVER}']
    lines, seconds = run(ROOT / 'train.py', [*common, *arguments], workplace)
    return Path(out) / 'ckpt.pt', lines, seconds


def load_peer(copy):
    """nanoGPT's model of the checkpoint that its run left: the best of its evaluations."""
    spec = importlib.util.spec_from_file_location('peer_model', copy / 'model.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    checkpoint = torch.load(copy / 'out-shakespeare-char' / 'ckpt.pt', map_location='cpu', weights_only=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it announces its size
        model = module.GPT(module.GPTConfig(**checkpoint['model_args']))
    model.load_state_dict(checkpoint['model'])
    return model.eval()


@torch.no_grad()
def whole_split_loss(logits, folder, block_size):
    """Nats per token over the validation split, in float32, by nanoGPT's convention.

    Each window has block_size targets, the first of them given the token before it; each token but the
    split's first is a target once. logits: tokens (B, T) to (B, T, V).
    """
    total, count = 0.0, 0
    for tokens, loss_mask, _ in data.evaluation_batches(folder, 'val', 'ar', block_size, batch_size=32):
        targets = tokens[:, 1:]
        if loss_mask is not None:  # the last window shares tokens with the one before
            targets = targets.masked_fill(loss_mask[:, 1:] == 0, -100)
        predicted = logits(tokens[:, :-1].contiguous()).flatten(0, 1)
        total += F.cross_entropy(predicted, targets.flatten(), reduction='sum').item()
        count += (targets != -100).sum().item()
    return total / count


def parameters_by_peer_convention(model, num_characters):
    """Without positions; and without the rows of special tokens and padding, which the peer does not have."""
    positions = 0 if model.positions is None else model.positions.weight.numel()
    rows = model.config.padded_vocab_size - num_characters
    return sum(p.numel() for p in model.parameters()) - positions - rows * model.config.n_embd


# ---------------------------------------------------------------------------- compare: learn

def learn(workplace, copy, folder):
    """Two runs of ours, each with a schedule of its own length: one to 1.88, one as long as the peer's."""
    peer_seconds, peer_size = peer_learns(copy, folder)
    short_seconds, short_loss, size, step_seconds = we_learn(workplace, folder, short_steps)
    # What is left of the peer's time after our start and evaluations, in steps of the pace just measured.
    fixed = short_seconds - short_steps * step_seconds
    steps = max(warmup_steps + 20, int((MARGIN * peer_seconds - fixed) / step_seconds))
    say(f'  {steps} steps are planned for {MARGIN:.0%} of the peer\'s {peer_seconds:.1f} s')
    seconds, loss, *_ = we_learn(workplace, folder, steps)
    return [Target("our parameters / the peer's", size / peer_size, '<=', 1.0),
            Target(f'validation loss of our run of {short_steps} steps', short_loss, '<=', 1.88),
            Target("that run's time / the peer's", short_seconds / peer_seconds, '<=', 0.35),
            Target(f'validation loss of our run of {steps} steps', loss, '<=', 1.62),
            Target("that run's time / the peer's", seconds / peer_seconds, '<=', 1.0)]


def peer_learns(copy, folder):
    """Whole seconds and parameters of the peer's recipe; its loss is printed."""
    say(f"learn: validation loss over the whole split, in float32, and the whole process's time\n"
        f'  nanoGPT, {peer_steps} steps of 12 × 64 ...')
    lines, seconds = run_peer(copy, f'--max_iters={peer_steps}', f'--lr_decay_iters={peer_steps}',
                              f'--eval_interval={min(250, peer_steps)}')  # 250 is the recipe's own
    model = load_peer(copy)
    loss = whole_split_loss(lambda tokens: model(tokens, targets=tokens)[0], folder, model.config.block_size)
    size = model.get_num_params()
    say(f'  nanoGPT: {seconds:.1f} s ({1000 * seconds_per_step(lines, warmup_steps):.1f} ms per step), '
        f'loss {loss:.4f}, {size:,} parameters without positions')
    return seconds, size


def we_learn(workplace, folder, steps):
    """Whole seconds, validation loss, parameters and seconds per step of config/shakespeare_char.py."""
    path, lines, seconds = run_ours(workplace, folder, f'--max_steps={steps}')
    checkpoint = checkpoints.load(path)
    model = checkpoints.load_model(checkpoint, 'cpu')
    loss = whole_split_loss(model.logits, folder, model.config.block_size)
    size = parameters_by_peer_convention(model, folder.tokenizer.endoftext_id)
    step_seconds = seconds_per_step(lines, warmup_steps)
    rows, dtype = checkpoint['rows_per_step'], checkpoint['train_config']['dtype']
    say(f'  ours:    {seconds:.1f} s ({1000 * step_seconds:.1f} ms per step), loss {loss:.4f}, '
        f'{size:,} parameters, {steps} steps of {rows} × {model.config.block_size} in {dtype}')
    return seconds, loss, size, step_seconds


# ---------------------------------------------------------------------------- compare: work

def work(workplace, copy, folder):
    """Alternating pairs, so that what slows the machine down for a while slows both sides down."""
    say(f'work: tokens/s in float32, same shapes and optimizer, steps {warmup_steps} to {work_steps}')
    peer_arguments = [f'--max_iters={work_steps}', f'--eval_interval={NEVER}', '--eval_iters=1',
                      '--log_interval=10']
    our_arguments = [*SAME_WORK, f'--max_steps={work_steps}', '--log_every=10']
    ratios = []
    for pair in range(1, runs + 1):
        peer_lines, _ = run_peer(copy, *peer_arguments)
        _, our_lines, _ = run_ours(workplace, folder, *our_arguments)
        theirs, ours = (TOKENS_PER_STEP / seconds_per_step(lines, warmup_steps)
                        for lines in (peer_lines, our_lines))
        ratios.append(ours / theirs)
        say(f'  pair {pair}: nanoGPT {theirs:,.0f}, ours {ours:,.0f}, ratio {ratios[-1]:.3f}')
    say(f'  ratio: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}')
    return [Target(f"our tokens/s / the peer's, median of {runs}", statistics.median(ratios), '>=', 1.0)]


# ---------------------------------------------------------------------------- compare: cache

def cache(vocab_size):
    """Greedy decoding with model_size=small, block 512, batch 1, with the cache and without."""
    run_on = runtime.Runtime('cpu', 'float32')
    model = decoding_model(vocab_size).to(run_on.device)
    say(f'cache: seconds for {new_tokens} new tokens, model_size=small, block 512, batch 1, float32')
    # Greedy text of an untrained model soon repeats itself; drawn text does not. It is the warm-up as well.
    drawn = {choice: generate(model, [[0]], new_tokens, use_cache=choice)[0] for choice in (True, False)}
    seconds, greedy, ratios = {}, {}, []
    for pair in range(1, runs + 1):
        for use_cache in (True, False):
            start = time.perf_counter()
            greedy[use_cache] = generate(model, [[0]], new_tokens, temperature=0, use_cache=use_cache)[0]
            seconds[use_cache] = time.perf_counter() - start
        ratios.append(seconds[False] / seconds[True])
        say(f'  pair {pair}: cached {seconds[True]:.2f}, recomputed {seconds[False]:.2f}, '
            f'ratio {ratios[-1]:.2f}')
    say(f'  ratio: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}')
    return [Target('greedy tokens equal with the cache and without', share_equal(greedy), '>=', 1.0),
            Target('drawn tokens equal with the cache and without', share_equal(drawn), '>=', 1.0),
            Target(f'recomputing time / cached time, median of {runs}', statistics.median(ratios), '>=', 8.0)]


def share_equal(texts):
    return sum(a == b for a, b in zip(*texts.values())) / len(texts[True])


@torch.no_grad()
def decoding_model(vocab_size):
    """A model with weights in place of the zeros that it starts with: each token depends on all before."""
    torch.manual_seed(0)
    n_layer, n_head, n_embd = checkpoints.size_of('small')
    model = checkpoints.make_model('ar', vocab_size=vocab_size, block_size=512, n_layer=n_layer, n_head=n_head,
                                   n_embd=n_embd)
    for weight in model.parameters():
        if not weight.any():
            weight.normal_(std=weight.size(1) ** -0.5)
    return model


# ---------------------------------------------------------------------------- compare

def compare():
    """Runs the chosen parts and returns their targets; all that they write is gone afterwards."""
    chosen = [part.strip() for part in only.split(',')]
    for part in chosen:
        if part not in PARTS:
            raise UserError(f'only has {part!r}; choose from {", ".join(PARTS)}, with commas between them.')
    if runs < 1:
        raise UserError(f'runs is {runs}; at least one pair is needed.')
    if not 1 <= new_tokens < 512:
        raise UserError(f'new_tokens is {new_tokens}; with the prompt they fit in a block of 512: 1 to 511.')
    for name in ('peer_steps', 'short_steps', 'work_steps'):
        if config[name] < warmup_steps + 20:
            raise UserError(f'{name} is {config[name]}, and {warmup_steps} steps of warm-up are not timed; '
                            'give at least 20 more, or lower warmup_steps.')
    folder, characters = open_dataset()
    targets = []
    with tempfile.TemporaryDirectory(prefix='bench-') as name:
        workplace = Path(name)
        copy = copy_peer(workplace, folder, characters) if {'learn', 'work'} & set(chosen) else None
        describe_machine()
        if 'learn' in chosen:
            targets += learn(workplace, copy, folder)
        if 'work' in chosen:
            targets += work(workplace, copy, folder)
        if 'cache' in chosen:
            targets += cache(folder.tokenizer.vocab_size)
    return targets


# ---------------------------------------------------------------------------- train

SCHEDULE = 10 ** 6  # steps that the `steps` timed ones are spread over
P_BELIEF, K_SCHEDULE = ((0.5, 0.5),), (1, 2, 4, 8)  # train.py's own


def train():
    """Steps of each architecture in turn, so that what slows the machine down slows all of them down."""
    if steps < 10:
        raise UserError(f'steps is {steps}; at least 10 of each architecture say something.')
    run_on, folder = runtime.Runtime(device, dtype), data.Folder(dataset)
    describe_machine()
    say(f'train: {folder.config["name"]}, model_size={model_size}, {batch_size} rows of {block_size} tokens, '
        f'{run_on.dtype}, AdamW and Muon; medians of {steps} steps, of sdd the mean over its schedule')
    sides = {architecture: trainee(architecture, folder, run_on) for architecture in ('ar', 'diffusion', 'sdd')}
    seconds = {architecture: [] for architecture in sides}
    for i in range(-5, steps):
        for architecture, (step, _) in sides.items():
            taken = step(max(0, i) * SCHEDULE // steps)
            if i >= 0:
                seconds[architecture].append(taken)
    peak = runtime.measure_peak_flops(run_on.device, run_on.dtype)
    for architecture, (_, flops) in sides.items():
        typical = (statistics.mean if architecture == 'sdd' else statistics.median)(seconds[architecture])
        rate = batch_size * block_size / typical
        say(f'  {architecture:10} {1000 * typical:8.1f} ms per step, {rate:10,.0f} tokens/s, '
            f'MFU {flops * rate / peak:.2f}')
    ratios = {architecture: [a / b for a, b in zip(seconds[architecture], seconds[other])]
              for architecture, other in (('diffusion', 'ar'), ('sdd', 'diffusion'))}
    return [Target('step of diffusion / step of ar, median of pairs', statistics.median(ratios['diffusion']), '<=',
                   1.05),
            Target('step of sdd / step of diffusion, mean of pairs', statistics.mean(ratios['sdd']), '<=', 1.4)]


def trainee(architecture, folder, run_on):
    """A function that makes a training step, named by its number, and says its seconds; operations per token."""
    tokenizer = folder.tokenizer
    torch.manual_seed(0)
    n_layer, n_head, n_embd = checkpoints.size_of(model_size)
    model = checkpoints.make_model(architecture, n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size,
                                   vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id,
                                   ignore_id=tokenizer.ignore_id).to(run_on.device)
    if run_on.device.type == 'cuda':
        model.compile()
    optimizers = optim.make_optimizers(model, 'muon', 1e-3, 0.9, 0.95, 0.1)
    batches = data.Batches(folder, architecture, block_size, batch_size, mode=mode, device=run_on.device)

    def step(number):
        (batch,), count = batches.get(number)
        beliefs = {}
        if architecture == 'sdd':
            beliefs = data.draw_belief(number, SCHEDULE, 0, P_BELIEF, K_SCHEDULE, 0)
        runtime.synchronize(run_on.device)
        start = time.perf_counter()
        with run_on.autocast():
            loss, *_ = model(*batch, **beliefs)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        runtime.synchronize(run_on.device)
        return time.perf_counter() - start
    return step, model.flops_per_token()


if __name__ == '__main__':
    if what not in ('compare', 'train'):
        raise UserError(f'what is {what!r}; choose compare or train.')
    results = compare() if what == 'compare' else train()
    say('targets')
    for result in results:
        say(f'  {result}')
    raise SystemExit(0 if all(result.reached for result in results) else 1)
