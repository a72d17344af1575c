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

import functools
import math
import pickle
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from benchmarks import timing
from benchmarks.timing import Target, say
from lm import checkpoints, data, runtime
from lm.configurator import ROOT, check_range, configure, require
from model import ARCHITECTURES
from sampling import generate

peer = ''  # path of a clone of nanoGPT, which is only read
only = 'learn,work,cache'  # the parts to measure
dataset = 'shakespeare_char'  # as prepare/shakespeare.py writes it: a name under data/, or a path
runs = 5  # pairs of runs of work and of cache
# --- less than these is a rehearsal ---
peer_steps = 2000  # learn: steps of the peer's recipe
short_steps = 240  # learn: steps of our run to the peer's loss, warm-up and decay included
work_steps = 300  # work: steps of each run; the 10M model makes a tenth of them
warmup_steps = 50  # steps at the start of each run that no rate includes; likewise
new_tokens = 500  # cache: tokens generated
config = configure(globals())

SPLITS = {'train': 1_003_854, 'val': 111_540}  # characters, in nanoGPT's split as in ours
MARGIN = 0.85  # the part of the peer's time that our run is planned for, since rates vary by a tenth
# What nanoGPT's README gives for a CPU. --max_iters and --lr_decay_iters, 2000 there, follow.
PEER_RECIPE = """config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1
    --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0""".split()
OUR_RECIPE = 'config/shakespeare_char.py --device=cpu --no_wandb --overwrite --eval_every=1000000000'.split()
# The same blocks and the same optimizer as nanoGPT's; it has no biases either.
SAME_WORK = """--dtype=float32 --norm=layer --position=learned --mlp=gelu --bias=False --qk_norm=False
    --logit_softcap=0 --dropout=0.0 --optimizer=adamw --learning_rate=1e-3 --beta2=0.99 --weight_decay=0.1
    --grad_clip=1.0 --eval_batches=1""".split()
WORK = {  # the second is nanoGPT's shape for a GPU, with fewer rows
    '0.8M': dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12),
    '10M': dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=4),
}


def copy_peer(folder, copy):
    """Copy the clone, and add the data as its own prepare.py would write them."""
    timing.find_peer(peer, 'train.py', 'karpathy/nanoGPT')
    characters = [folder.tokenizer.decode([i]) for i in range(folder.tokenizer.endoftext_id)]
    sizes = {split: len(tokens) for split, tokens in folder.tokens.items()}
    found = f'{folder.path} has {len(characters)} characters and {sizes} tokens'
    remedy = 'make it with: python prepare/shakespeare.py'
    require(sizes == SPLITS and len(characters) == 65, f'{found}, Shakespeare 65 and {SPLITS}; {remedy}')
    shutil.copytree(peer, copy, ignore=shutil.ignore_patterns('.git', 'data', 'out*'))
    prepared = copy / 'data' / 'shakespeare_char'
    prepared.mkdir(parents=True)
    for split in SPLITS:
        shutil.copy(folder.path / f'{split}_tokens.bin', prepared / f'{split}.bin')
    (prepared / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': len(characters)}))


def train(side, folder, workplace, *arguments):
    """Run the train.py of a side. Ours evaluates before the first step and after the last, no more."""
    if side == 'nanoGPT':
        return timing.run([sys.executable, 'train.py', *PEER_RECIPE, *arguments], workplace / side)
    paths = [f'--dataset={folder.path.resolve()}', f'--out_dir={workplace / side}']
    return timing.run([sys.executable, ROOT / 'train.py', *OUR_RECIPE, *paths, *arguments])


# ---------------------------------------------------------------------------- learn


def learn(folder, workplace):
    """Train the peer, a short run of ours, and one as long as the peer's, each with a schedule of its own length."""
    say('learn: validation loss over the whole split, in float32, and the time of the whole process')
    steps = [f'--max_iters={peer_steps}', f'--lr_decay_iters={peer_steps}']
    steps += [f'--eval_interval={min(250, peer_steps)}']  # 250 is the recipe's own
    theirs = train('nanoGPT', folder, workplace, *steps)
    path = workplace / 'nanoGPT' / 'out-shakespeare-char' / 'ckpt.pt'
    checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    module = timing.load_nanogpt(workplace / 'nanoGPT')
    model = module.GPT(module.GPTConfig(**checkpoint['model_args'])).eval()
    model.load_state_dict(checkpoint['model'])
    loss, size = validation_loss(lambda x: model(x, targets=x)[0], folder, 64), model.get_num_params()
    report('nanoGPT', theirs, peer_steps, loss, size)

    short, short_loss, our_size = learn_ours(folder, workplace, short_steps)
    # What is left of the peer's time after our start and evaluations, in steps of the pace just measured.
    step_seconds = timing.seconds_per_step(short.lines, warmup_steps)
    fixed = short.seconds - short_steps * step_seconds
    planned = max(warmup_steps + 20, int((MARGIN * theirs.seconds - fixed) / step_seconds))
    long, long_loss, _ = learn_ours(folder, workplace, planned)
    return [
        Target("our parameters / the peer's", our_size / size, '<=', 1.0),
        Target(f"validation loss of {short_steps} steps (the peer's)", short_loss, '<=', round(loss, 4)),
        Target("that run's time / the peer's", short.seconds / theirs.seconds, '<=', 0.35),
        Target(f"validation loss of {planned} steps, planned for the peer's time", long_loss, '<=', 1.62),
        Target("that run's time / the peer's", long.seconds / theirs.seconds, '<=', 1.0),
    ]


def learn_ours(folder, workplace, steps):
    """Return a run of ours, its validation loss, and its parameters but for rows that the peer does not have."""
    done = train('ours', folder, workplace, f'--max_steps={steps}')
    model = checkpoints.load_model(checkpoints.load(workplace / 'ours'), 'cpu')
    loss = validation_loss(model.logits, folder, model.config.block_size)
    rows = model.config.padded_vocab_size - folder.tokenizer.endoftext_id  # special tokens and padding
    size = sum(p.numel() for p in model.parameters()) - rows * model.config.n_embd
    report('ours', done, steps, loss, size)
    return done, loss, size


@torch.no_grad()
def validation_loss(logits, folder, block_size):
    """Return nats per token over the whole validation split, in float32, by nanoGPT's convention.

    Each window has block_size targets, the first of them given the token before it; each token but the
    split's first is a target once. logits: function of tokens (B, T) that returns (B, T, V).
    """
    total, count = 0.0, 0
    for batch in data.evaluation_batches(folder, 'val', ARCHITECTURES['ar'], block_size, batch_size=32):
        targets = batch.tokens[:, 1:]
        if batch.loss_mask is not None:  # the last window shares tokens with the one before
            targets = targets.masked_fill(batch.loss_mask[:, 1:] == 0, -100)
        predicted = logits(batch.tokens[:, :-1].contiguous()).flatten(0, 1)
        total += F.cross_entropy(predicted, targets.flatten(), reduction='sum').item()
        count += (targets != -100).sum().item()
    return total / count


def report(name, done, steps, loss, size):
    pace = f'{steps} steps of {1000 * timing.seconds_per_step(done.lines, warmup_steps):.1f} ms'
    say(f'  {name}: {done.seconds:.1f} s, {pace}, loss {loss:.4f}, {size:,} parameters')


# ---------------------------------------------------------------------------- work and cache


def work(folder, workplace):
    targets = []
    for name, shape in WORK.items():
        part = 1 if name == '0.8M' else 10
        steps, warmup = max(5, work_steps // part), max(1, warmup_steps // part)
        say(f'work: {name} parameters in float32, same shapes and optimizer, steps {warmup} to {steps}')
        pace = functools.partial(work_seconds, folder, workplace, shape, steps, warmup)
        sides = {side: functools.partial(pace, side) for side in ('nanoGPT', 'ours')}
        ratio = timing.compare_rates(name, sides, shape['block_size'] * shape['batch_size'], runs)
        targets.append(Target(f"our tokens/s / the peer's, {name}, median of {runs}", ratio, '>=', 1.1))
    return targets


def work_seconds(folder, workplace, shape, steps, warmup, side):
    """Return the seconds per step of a run of a side."""
    words, every = [f'--{key}={value}' for key, value in shape.items()], max(1, min(10, warmup))
    if side == 'nanoGPT':
        words += f'--max_iters={steps} --log_interval={every} --eval_interval=1000000 --eval_iters=1'.split()
    else:
        words += [*SAME_WORK, f'--max_steps={steps}', f'--log_every={every}']
    return timing.seconds_per_step(train(side, folder, workplace, *words).lines, warmup)


def cache(folder, workplace):
    """Compare decoding with model_size=small, block 512, batch 1, with the cache and without."""
    runtime.Runtime('cpu', 'float32')
    torch.manual_seed(0)
    shape = checkpoints.size_of('small')
    model = checkpoints.make_model('ar', **shape, vocab_size=folder.tokenizer.vocab_size, block_size=512)
    for weight in model.parameters():  # some start as zeros, and then no token depends on those before
        torch.nn.init.normal_(weight, std=weight.size(-1) ** -0.5)
    say(f'cache: {new_tokens} new tokens, model_size=small, block 512, batch 1, float32')

    def decode(use_cache, temperature=0.0):
        return generate(model, [[0]], new_tokens, temperature, use_cache=use_cache)[0]

    sides = {
        'recomputed': lambda: timing.seconds(lambda: decode(False)),
        'cached': lambda: timing.seconds(lambda: decode(True)),
    }
    ratio = timing.compare_rates('greedy', sides, new_tokens, runs)
    same = [decode(True, t) == decode(False, t) for t in (0.0, 1.0)]  # greedy text soon repeats itself
    return [
        Target('texts equal with the cache and without, greedy and drawn', sum(same), '>=', 2),
        Target(f'recomputing time / cached time, median of {runs}', ratio, '>=', 8.0),
    ]


PARTS = {'learn': learn, 'work': work, 'cache': cache}


def main():
    for part in only.split(','):
        require(part in PARTS, f'only has {part!r}; choose from {", ".join(PARTS)}.')
    check_range(config, 1, math.inf, 'runs', 'warmup_steps')
    check_range(config, 1, 512, 'new_tokens')  # with the prompt they fit in a block
    check_range(config, warmup_steps + 20, math.inf, 'peer_steps', 'short_steps', 'work_steps')
    folder, targets = data.Folder(dataset), []
    with tempfile.TemporaryDirectory(prefix='bench-') as workplace:
        if only != 'cache':
            copy_peer(folder, Path(workplace, 'nanoGPT'))
        timing.describe_machine()
        for part in only.split(','):
            targets += PARTS[part](folder, Path(workplace))
    timing.finish(targets)


if __name__ == '__main__':
    main()
