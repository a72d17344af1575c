"""How fast does a model learn and train here, and in a clone of nanoGPT, on the CPU?

    git clone https://github.com/karpathy/nanoGPT && python prepare/shakespeare.py
    python benchmarks/compare.py --peer=nanoGPT              # a quarter of an hour on two idle cores

Each side is its own train.py as a process of its own. The parts:
    learn   nanoGPT's CPU recipe for Shakespeare by characters against config/shakespeare_char.py: the time
            to the peer's own validation loss, and the loss that the peer's time is enough for
    work    the same work on both sides, GPT-2's blocks and AdamW in float32, for nanoGPT's CPU model of 0.8M
            parameters and its GPU model of 10.6M
    cache   our own greedy decoding with its KV cache against recomputing all keys and values
"""

import math
import pickle
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from benchmarks import timing
from benchmarks.timing import say
from lm import checkpoints, runtime
from lm.configurator import ROOT, check_range, configure, require
from lm.folder import Folder
from sampling import generate

peer = ''  # path of a clone of nanoGPT, which is only read
only = 'learn,work,cache'  # the parts to measure
dataset = 'shakespeare_char'  # as prepare/shakespeare.py writes it: a name under data/, or a path
runs = 5  # pairs of runs of work and of cache
rehearsal = False  # a few steps of everything
config = configure(globals())

BLOCK_SIZE = 64
SPLITS = {'train': 1_003_854, 'val': 111_540}  # characters, in nanoGPT's split as in ours
PEER_STEPS, SHORT_STEPS, NEW_TOKENS = (21, 21, 4) if rehearsal else (2000, 240, 500)
WARMUP = 1 if rehearsal else 50  # steps at the start of a run that no rate includes
MARGIN = 0.85  # the part of the peer's time that our run is planned for, since rates vary by a tenth
# What nanoGPT's README gives for a CPU; --max_iters and --lr_decay_iters follow.
PEER_RECIPE = f"""config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1
    --block_size={BLOCK_SIZE} --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0"""
OUR_RECIPE = 'config/shakespeare_char.py --device=cpu --no_wandb --overwrite --eval_every=1000000000'
SAME_WORK = {  # the same blocks and the same optimizer; nanoGPT's has no biases either
    'nanoGPT': '--log_interval=5 --eval_interval=1000000 --eval_iters=1',
    'ours': """--dtype=float32 --norm=layer --position=learned --mlp=gelu --bias=False --qk_norm=False
        --logit_softcap=0 --dropout=0.0 --optimizer=adamw --learning_rate=1e-3 --beta2=0.99 --weight_decay=0.1
        --grad_clip=1.0 --eval_batches=1 --log_every=5""",
}
WORK = {  # parameters: shape, tokens per step, steps, steps of warm-up; the second with fewer rows than on a GPU
    '0.8M': ('--n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12', 12 * 64, 300, 50),
    '10M': ('--n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=4', 4 * 256, 30, 5),
}


def copy_peer(folder, copy):
    """Copy the clone, and add the data as its own prepare.py would write them."""
    timing.load_nanogpt(peer)
    sizes, num_letters = {split: len(x) for split, x in folder.tokens.items()}, folder.tokenizer.endoftext_id
    found = f'{folder.path} has {num_letters} characters and {sizes} tokens, Shakespeare 65 and {SPLITS}'
    require(sizes == SPLITS and num_letters == 65, f'{found}; make it with: python prepare/shakespeare.py')

    shutil.copytree(peer, copy, ignore=shutil.ignore_patterns('.git', 'data', 'out*'))
    prepared = copy / 'data' / 'shakespeare_char'
    prepared.mkdir(parents=True)
    for split in SPLITS:
        shutil.copy(folder.path / f'{split}_tokens.bin', prepared / f'{split}.bin')
    (prepared / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': num_letters}))


def train(side, folder, place, steps, more=''):
    """Run the train.py of a side; return its timed lines, and the seconds it took."""
    if side == 'nanoGPT':
        words = f'{PEER_RECIPE} --max_iters={steps} --lr_decay_iters={steps} {more}'.split()
        return timing.run([sys.executable, 'train.py', *words], place / side)
    words = f'{OUR_RECIPE} --max_steps={steps} {more}'.split()
    paths = [f'--dataset={folder.path.resolve()}', f'--out_dir={place / side}']
    return timing.run([sys.executable, ROOT / 'train.py', *words, *paths])


# ---------------------------------------------------------------------------- the parts


def learn(folder, place):
    """Train the peer, a short run of ours, and one as long as the peer's, each with a schedule of its own length."""
    say('learn: validation loss over the whole split, in float32, and the time of the whole process')
    peer_time, _, peer_loss, peer_size = measure('nanoGPT', folder, place, PEER_STEPS)
    time, pace, loss, size = measure('ours', folder, place, SHORT_STEPS)
    # What is left of the peer's time after our start and evaluations, in steps of the pace just measured.
    left = MARGIN * peer_time - (time - SHORT_STEPS * pace)
    planned = max(WARMUP + 20, int(left / pace))
    long_time, _, long_loss, _ = measure('ours', folder, place, planned)
    return [
        ("our parameters / the peer's", size / peer_size, '<=', 1.0),
        (f"validation loss of {SHORT_STEPS} steps (the peer's)", loss, '<=', round(peer_loss, 4)),
        ("that run's time / the peer's", time / peer_time, '<=', 0.35),
        (f"validation loss of {planned} steps, planned for the peer's time", long_loss, '<=', 1.62),
        ("that run's time / the peer's", long_time / peer_time, '<=', 1.0),
    ]


def measure(side, folder, place, steps):
    """Train a side; print and return the seconds of the process and of a step, the loss and the parameters.

    Parameters as nanoGPT counts them, without learned positions, and without rows for tokens that it does not have.
    """
    more = f'--eval_interval={min(250, steps)}' if side == 'nanoGPT' else ''  # 250 is the recipe's own
    lines, time = train(side, folder, place, steps, more)
    if side == 'nanoGPT':
        path, module = place / side / 'out-shakespeare-char/ckpt.pt', timing.load_nanogpt(peer)
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        model = module.GPT(module.GPTConfig(**checkpoint['model_args'])).eval()
        model.load_state_dict(checkpoint['model'])
        logits, size = lambda x: model(x, targets=x)[0], model.get_num_params()
    else:
        model = checkpoints.load_model(checkpoints.load(place / side), 'cpu')
        rows = model.config.padded_vocab_size - folder.tokenizer.endoftext_id
        logits, size = model.logits, sum(p.numel() for p in model.parameters()) - rows * model.config.n_embd
    loss, pace = validation_loss(logits, folder.tokens['val']), timing.seconds_per_step(lines, WARMUP)
    say(
        f'  {side}: {time:.1f} s, {steps} steps of {1000 * pace:.1f} ms, loss {loss:.4f}, {size:,} parameters'
    )
    return time, pace, loss, size


@torch.no_grad()
def validation_loss(logits, tokens):
    """Return nats per token, each but the first a target once; logits: from tokens (1, T) to (1, T, V)."""
    tokens, total = torch.from_numpy(tokens.astype(np.int64)), 0.0
    for x, y in zip(tokens[:-1].split(BLOCK_SIZE), tokens[1:].split(BLOCK_SIZE)):
        total += F.cross_entropy(logits(x[None])[0], y, reduction='sum').item()
    return total / (len(tokens) - 1)


def work(folder, place):
    """Compare the pace of both sides at the same shapes and with the same optimizer."""

    def pace(side, shape, steps, warmup):
        lines, _ = train(side, folder, place, steps, f'{shape} {SAME_WORK[side]}')
        return timing.seconds_per_step(lines, warmup)

    targets = []
    for name, (shape, tokens, *steps) in WORK.items():
        steps = [12, 2] if rehearsal else steps
        say(f'work: {name} parameters in float32, {steps[0]} steps, the first {steps[1]} not timed')
        sides = {side: partial(pace, side, shape, *steps) for side in SAME_WORK}
        ratio = timing.compare_rates(name, sides, tokens, runs)
        targets.append((f"our tokens/s / the peer's, {name}, median of {runs}", ratio, '>=', 1.1))
    return targets


def cache(folder, place):
    """Compare decoding with the cache and without, from random weights."""
    runtime.Runtime('cpu', 'float32')
    torch.manual_seed(0)
    shape = checkpoints.size_of('small')
    model = checkpoints.make_model('ar', **shape, vocab_size=folder.tokenizer.vocab_size, block_size=512)
    for weight in model.parameters():  # some start as zeros, and then no token depends on those before
        torch.nn.init.normal_(weight, std=weight.size(-1) ** -0.5)
    say(f'cache: {NEW_TOKENS} new tokens, model_size=small, block 512, batch 1, float32')

    def decode(use_cache, temperature=0.0):
        return generate(model, [[0]], NEW_TOKENS, temperature, use_cache=use_cache)[0]

    sides = {
        name: partial(timing.seconds, partial(decode, name == 'cached')) for name in ('recomputed', 'cached')
    }
    ratio = timing.compare_rates('greedy', sides, NEW_TOKENS, runs)
    same = [decode(True, t) == decode(False, t) for t in (0.0, 1.0)]  # greedy text soon repeats itself
    return [
        ('texts equal with the cache and without, greedy and drawn', sum(same), '>=', 2),
        (f'recomputing time / cached time, median of {runs}', ratio, '>=', 8.0),
    ]


def main():
    parts, targets = {'learn': learn, 'work': work, 'cache': cache}, []
    for part in only.split(','):
        require(part in parts, f'only has {part!r}; choose from {", ".join(parts)}.')
    check_range(config, 1, math.inf, 'runs')
    folder = Folder(dataset)
    with tempfile.TemporaryDirectory(prefix='bench-') as place:
        if only != 'cache':
            copy_peer(folder, Path(place, 'nanoGPT'))
        timing.describe_machine()
        for part in only.split(','):
            targets += parts[part](folder, Path(place))
    timing.finish(*targets)


if __name__ == '__main__':
    main()
