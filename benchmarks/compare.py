"""bench.py --what=compare: how fast a model learns and trains here, and in a clone of nanoGPT.

Each side is its own train.py as a process of its own, on the CPU. The parts:
    learn   nanoGPT's CPU recipe for Shakespeare by characters against config/shakespeare_char.py: the time
            to the peer's own validation loss, and the loss that the peer's time is enough for
    work    the same work on both sides, GPT-2's blocks and AdamW in float32, in tokens per second, for nanoGPT's
            CPU model of 0.8M parameters and its GPU model of 10.6M
    cache   our own greedy decoding with its KV cache against recomputing all keys and values
`settings` in all functions are the keys of bench.py.
"""

import contextlib
import importlib.util
import io
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.timing import Target, describe_machine, say, spread
from lm import checkpoints, data, runtime
from lm.configurator import ROOT, UserError
from sampling import generate

URL = 'https://github.com/karpathy/nanoGPT'
PEER_FILES = ('train.py', 'model.py', 'configurator.py', 'config/train_shakespeare_char.py')
SPLITS = {'train': 1_003_854, 'val': 111_540}  # characters, in nanoGPT's split as in ours
PARTS = ('learn', 'work', 'cache')

# What nanoGPT's README gives for a CPU. --max_iters and --lr_decay_iters, 2000 there, follow.
PEER_RECIPE = [
    'config/train_shakespeare_char.py',
    '--device=cpu',
    '--compile=False',
    '--eval_iters=20',
    '--log_interval=1',
    '--block_size=64',
    '--batch_size=12',
    '--n_layer=4',
    '--n_head=4',
    '--n_embd=128',
    '--dropout=0.0',
]
OUR_RECIPE = ['config/shakespeare_char.py', '--device=cpu', '--no_wandb']
# The same blocks and the same optimizer as nanoGPT's; it has no biases either.
SAME_WORK = [
    '--dtype=float32',
    '--norm=layer',
    '--position=learned',
    '--mlp=gelu',
    '--bias=False',
    '--qk_norm=False',
    '--logit_softcap=0',
    '--dropout=0.0',
    '--optimizer=adamw',
    '--learning_rate=1e-3',
    '--beta2=0.99',
    '--weight_decay=0.1',
    '--grad_clip=1.0',
    '--eval_batches=1',
]
WORK = {  # layers, heads, width, block, rows; the second is nanoGPT's config for a GPU with fewer rows
    '0.8M': (4, 4, 128, 64, 12),
    '10M': (6, 6, 384, 256, 4),
}
SHORTER = 10  # steps of the 10M model are this many times fewer
NEVER = 10**9  # steps between evaluations
MARGIN = 0.85  # share of the peer's time that our run is planned for, since rates vary by a tenth


def run(script, arguments, folder):
    """Runs a Python script in `folder`. Returns [(seconds since its start, line)] and its seconds in all."""
    command = [sys.executable, str(script), *arguments]
    environment = {**os.environ, 'PYTHONUNBUFFERED': '1', 'PYTHONIOENCODING': 'utf-8'}
    lines, start = [], time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        encoding='utf-8',
        errors='replace',
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line.rstrip()))
    seconds = time.perf_counter() - start
    if process.returncode:
        last = '\n'.join(line for _, line in lines[-5:])
        raise UserError(
            f'`{" ".join(command)}` in {folder} ended with status {process.returncode}; repair '
            f'what it says:\n{last}'
        )
    return lines, seconds


def seconds_per_step(lines, warmup):
    """From a run's progress lines, by the clock at which they came: the same measure for both sides.

    It holds all that a step of the loop does, logging included; evaluation lies before or after these lines.
    """
    progress = [
        (int(match[1]), at)
        for at, line in lines
        if (match := re.match(r'(?:iter|step) (\d+)(?:/\d+)?: loss', line))
    ]
    progress = [(step, at) for step, at in progress if step >= warmup]
    if len(progress) < 2:
        raise UserError(
            f'Only {len(progress)} lines of progress came after {warmup} steps of warm-up, too '
            'few to time; check that the clone is unchanged, or let the run have more steps.'
        )
    (first, start), (last, end) = progress[0], progress[-1]
    return (end - start) / (last - first)


# ---------------------------------------------------------------------------- both sides


def open_dataset(dataset):
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
        raise UserError(
            f"{folder.path} is not nanoGPT's shakespeare_char (65 characters, {SPLITS}), but has "
            f'{len(characters)} and {sizes}; {remedy}.'
        )
    return folder, characters


def copy_peer(peer, workplace, folder, characters):
    """A working copy of the peer's clone, with its data as its own prepare.py would write them."""
    source, copy = Path(peer), workplace / 'peer'
    missing = [name for name in PEER_FILES if not (peer and (source / name).is_file())]
    if missing:
        raise UserError(
            f'--peer={peer} is no clone of nanoGPT: it has no {missing[0]}; '
            f'give the path of one, made with: git clone {URL}'
        )
    for name in PEER_FILES:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, copy / name)
    prepared = copy / 'data' / 'shakespeare_char'
    prepared.mkdir(parents=True)
    for split in SPLITS:
        shutil.copy(folder.path / f'{split}_tokens.bin', prepared / f'{split}.bin')
    meta = {
        'vocab_size': len(characters),
        'itos': dict(enumerate(characters)),
        'stoi': {character: i for i, character in enumerate(characters)},
    }
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


def learn(settings, workplace, copy, folder):
    """Two runs of ours, each with a schedule of its own length: one to 1.88, one as long as the peer's."""
    short_steps, warmup = settings['short_steps'], settings['warmup_steps']
    peer_seconds, peer_loss, peer_size = peer_learns(copy, folder, settings['peer_steps'], warmup)
    short_seconds, short_loss, size, step_seconds = we_learn(workplace, folder, short_steps, warmup)
    # What is left of the peer's time after our start and evaluations, in steps of the pace just measured.
    fixed = short_seconds - short_steps * step_seconds
    steps = max(warmup + 20, int((MARGIN * peer_seconds - fixed) / step_seconds))
    say(f"  {steps} steps are planned for {MARGIN:.0%} of the peer's {peer_seconds:.1f} s")
    seconds, loss, *_ = we_learn(workplace, folder, steps, warmup)
    return [
        Target("our parameters / the peer's", size / peer_size, '<=', 1.0),
        Target(
            f"validation loss of our run of {short_steps} steps (the peer's own)",
            short_loss,
            '<=',
            round(peer_loss, 4),
        ),
        Target("that run's time / the peer's", short_seconds / peer_seconds, '<=', 0.35),
        Target(f'validation loss of our run of {steps} steps', loss, '<=', 1.62),
        Target("that run's time / the peer's", seconds / peer_seconds, '<=', 1.0),
    ]


def peer_learns(copy, folder, steps, warmup):
    """Whole seconds, validation loss and parameters of the peer's recipe."""
    say(
        f"learn: validation loss over the whole split, in float32, and the whole process's time\n"
        f'  nanoGPT, {steps} steps of 12 × 64 ...'
    )
    lines, seconds = run_peer(
        copy, f'--max_iters={steps}', f'--lr_decay_iters={steps}', f'--eval_interval={min(250, steps)}'
    )  # 250 is the recipe's own
    model = load_peer(copy)
    loss = whole_split_loss(lambda tokens: model(tokens, targets=tokens)[0], folder, model.config.block_size)
    size = model.get_num_params()
    say(
        f'  nanoGPT: {seconds:.1f} s ({1000 * seconds_per_step(lines, warmup):.1f} ms per step), '
        f'loss {loss:.4f}, {size:,} parameters without positions'
    )
    return seconds, loss, size


def we_learn(workplace, folder, steps, warmup):
    """Whole seconds, validation loss, parameters and seconds per step of config/shakespeare_char.py."""
    path, lines, seconds = run_ours(workplace, folder, f'--max_steps={steps}')
    checkpoint = checkpoints.load(path)
    model = checkpoints.load_model(checkpoint, 'cpu')
    loss = whole_split_loss(model.logits, folder, model.config.block_size)
    size = parameters_by_peer_convention(model, folder.tokenizer.endoftext_id)
    step_seconds = seconds_per_step(lines, warmup)
    rows, dtype = checkpoint['rows_per_step'], checkpoint['train_config']['dtype']
    say(
        f'  ours:    {seconds:.1f} s ({1000 * step_seconds:.1f} ms per step), loss {loss:.4f}, '
        f'{size:,} parameters, {steps} steps of {rows} × {model.config.block_size} in {dtype}'
    )
    return seconds, loss, size, step_seconds


# ---------------------------------------------------------------------------- compare: work


def work(settings, workplace, copy, folder):
    """Alternating pairs, so that what slows the machine down for a while slows both sides down."""
    targets = []
    for name, shape in WORK.items():
        steps, warmup = settings['work_steps'], settings['warmup_steps']
        if name != '0.8M':
            steps, warmup = max(5, steps // SHORTER), max(1, warmup // SHORTER)
        say(
            f'work: {name} parameters, tokens/s in float32, same shapes and optimizer, steps {warmup} to {steps}'
        )
        ratios = [
            work_pair(workplace, copy, folder, shape, steps, warmup, pair) for pair in range(settings['runs'])
        ]
        say(f'  ratio: median {spread(ratios)}')
        targets.append(
            Target(
                f"our tokens/s / the peer's, {name}, median of {len(ratios)}",
                statistics.median(ratios),
                '>=',
                1.1,
            )
        )
    return targets


def work_pair(workplace, copy, folder, shape, steps, warmup, pair):
    """Our tokens per second over the peer's, of a run of each; every second pair is the other way round."""
    *_, block_size, batch_size = shape
    keys = 'n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size'
    words = [f'--{key}={value}' for key, value in zip(keys, shape)]
    every = max(1, min(10, warmup))
    sides = {
        'nanoGPT': lambda: run_peer(
            copy,
            *words,
            f'--max_iters={steps}',
            f'--eval_interval={NEVER}',
            '--eval_iters=1',
            f'--log_interval={every}',
        )[0],
        'ours': lambda: run_ours(
            workplace, folder, *SAME_WORK, *words, f'--max_steps={steps}', f'--log_every={every}'
        )[1],
    }
    rates = {
        name: block_size * batch_size / seconds_per_step(sides[name](), warmup)
        for name in (list(sides) if pair % 2 == 0 else reversed(sides))
    }
    ratio = rates['ours'] / rates['nanoGPT']
    say(f'  pair {pair + 1}: nanoGPT {rates["nanoGPT"]:,.0f}, ours {rates["ours"]:,.0f}, ratio {ratio:.3f}')
    return ratio


# ---------------------------------------------------------------------------- compare: cache


def cache(settings, vocab_size):
    """Greedy decoding with model_size=small, block 512, batch 1, with the cache and without."""
    run_on, new_tokens = runtime.Runtime('cpu', 'float32'), settings['new_tokens']
    model = decoding_model(vocab_size).to(run_on.device)
    say(f'cache: seconds for {new_tokens} new tokens, model_size=small, block 512, batch 1, float32')
    # Greedy text of an untrained model soon repeats itself; drawn text does not. It is the warm-up as well.
    drawn = {choice: generate(model, [[0]], new_tokens, use_cache=choice)[0] for choice in (True, False)}
    seconds, greedy, ratios = {}, {}, []
    for pair in range(1, settings['runs'] + 1):
        for use_cache in (True, False):
            start = time.perf_counter()
            greedy[use_cache] = generate(model, [[0]], new_tokens, temperature=0, use_cache=use_cache)[0]
            seconds[use_cache] = time.perf_counter() - start
        ratios.append(seconds[False] / seconds[True])
        say(
            f'  pair {pair}: cached {seconds[True]:.2f}, recomputed {seconds[False]:.2f}, '
            f'ratio {ratios[-1]:.2f}'
        )
    say(f'  ratio: median {spread(ratios, "{:.2f}")}')
    return [
        Target('greedy tokens equal with the cache and without', share_equal(greedy), '>=', 1.0),
        Target('drawn tokens equal with the cache and without', share_equal(drawn), '>=', 1.0),
        Target(
            f'recomputing time / cached time, median of {len(ratios)}', statistics.median(ratios), '>=', 8.0
        ),
    ]


def share_equal(texts):
    return sum(a == b for a, b in zip(*texts.values())) / len(texts[True])


@torch.no_grad()
def decoding_model(vocab_size):
    """A model with weights in place of the zeros that it starts with: each token depends on all before."""
    torch.manual_seed(0)
    n_layer, n_head, n_embd = checkpoints.size_of('small')
    model = checkpoints.make_model(
        'ar', vocab_size=vocab_size, block_size=512, n_layer=n_layer, n_head=n_head, n_embd=n_embd
    )
    for weight in model.parameters():
        if not weight.any():
            weight.normal_(std=weight.size(1) ** -0.5)
    return model


# ---------------------------------------------------------------------------- compare


def compare(settings):
    """Runs the chosen parts and returns their targets; all that they write is gone afterwards."""
    chosen = [part.strip() for part in settings['only'].split(',')]
    for part in chosen:
        if part not in PARTS:
            raise UserError(f'only has {part!r}; choose from {", ".join(PARTS)}, with commas between them.')
    if not 1 <= settings['new_tokens'] < 512:
        raise UserError(
            f'new_tokens is {settings["new_tokens"]}; with the prompt they fit in a block of 512: 1 to 511.'
        )
    for name in ('peer_steps', 'short_steps', 'work_steps'):
        if settings[name] < settings['warmup_steps'] + 20:
            raise UserError(
                f'{name} is {settings[name]}, and {settings["warmup_steps"]} steps of warm-up are not '
                'timed; give at least 20 more, or lower warmup_steps.'
            )
    folder, characters = open_dataset(settings['dataset'])
    targets = []
    with tempfile.TemporaryDirectory(prefix='bench-') as name:
        workplace, copy = Path(name), None
        if {'learn', 'work'} & set(chosen):
            copy = copy_peer(settings['peer'], workplace, folder, characters)
        describe_machine()
        if 'learn' in chosen:
            targets += learn(settings, workplace, copy, folder)
        if 'work' in chosen:
            targets += work(settings, workplace, copy, folder)
        if 'cache' in chosen:
            targets += cache(settings, folder.tokenizer.vocab_size)
    return targets
