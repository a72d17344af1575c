"""How fast does a model learn, train and write here, and in a clone of nanoGPT, on the CPU?

git clone https://github.com/karpathy/nanoGPT && python prepare/shakespeare.py
python benchmarks/compare.py --peer=nanoGPT              # twenty minutes on two idle cores

learn   nanoGPT's CPU recipe for Shakespeare by characters against config/shakespeare_char.py with rows as short, each
        its own train.py as a process of its own: the time to the peer's own validation loss, and the loss that the
        peer's time is enough for
work    steps of the same work on both sides, GPT-2's blocks and AdamW in float32
write   tokens of one text: nanoGPT's sampling loop computes the whole text anew for each; ours, with its very
        weights, keeps a cache
pretrained    only when asked for, as --only=pretrained --pretrained=FOLDER: greedy tokens of a Hugging Face folder,
        beside transformers' in float32
"""

import math
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from benchmarks import timing
from benchmarks.train import GPT2, beside_nanogpt
from lm import checkpoints, runtime
from lm.configurator import ROOT, check_choice, check_range, configure, require
from lm.folder import Folder
from lm.kernels import has_bfloat16
from lm.pretrained import gpt2_layout, load_state_dict
from lm.tokenizer import Tokenizer
from sampling import generate

peer = ''  # path of a clone of nanoGPT, which is only read
pretrained = ''  # a Hugging Face folder
only = ''  # learn, work, write or pretrained; empty: the first three
dataset = 'shakespeare_char'  # as prepare/shakespeare.py writes it: a name under data/, or a path
runs = 5  # pairs of runs of write
steps = 50  # pairs of steps of work
new_tokens = 512  # tokens generated
config = configure(globals())

BLOCK_SIZE = 64
PEER_STEPS, SHORT_STEPS = 2000, 150
WARMUP = 50  # steps at the start of a run that no rate includes
# What nanoGPT's README gives for a CPU; --max_iters and --lr_decay_iters follow.
PEER_RECIPE = f"""config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1
    --block_size={BLOCK_SIZE} --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0"""
OUR_RECIPE = f"""config/shakespeare_char.py --device=cpu --no_wandb --overwrite --eval_every=1000000000
    --block_size={BLOCK_SIZE} --batch_size=32 --decay_embedding=False"""
VOCAB_SIZE = 65  # characters of Shakespeare
WORK = {'tiny': (12, 64), 'small': (4, 256)}  # rows and block; the second with fewer rows than on a GPU
WRITE_BLOCK = 1024
SAMPLING = dict(temperature=0.8, top_k=200)  # the defaults of nanoGPT's sample.py


def copy_peer(folder, copy):
    """Copy the clone, and add the data as its own prepare.py would write them."""
    shutil.copytree(peer, copy, ignore=shutil.ignore_patterns('.git', 'data', 'out*'))
    prepared = copy / 'data' / 'shakespeare_char'
    prepared.mkdir(parents=True)
    for split in ('train', 'val'):
        shutil.copy(folder.path / f'{split}_tokens.bin', prepared / f'{split}.bin')
    (prepared / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': folder.tokenizer.endoftext_id}))


def learn():
    """Train the peer, a short run of ours, and one as long as the peer's, each with a schedule of its own length."""
    timing.say('learn: validation loss over the whole split, in float32, and the time of the whole process')
    folder = Folder(dataset)
    with tempfile.TemporaryDirectory(prefix='bench-') as place:
        copy_peer(folder, Path(place, 'nanoGPT'))
        peer_time, _, peer_loss, peer_size = measure('nanoGPT', PEER_STEPS, folder, Path(place))
        seconds, pace, loss, size = measure('ours', SHORT_STEPS, folder, Path(place))
        # What is left of the peer's time after our start and evaluations; 0.85, since rates vary by a tenth.
        planned = max(WARMUP + 20, int((0.85 * peer_time - (seconds - SHORT_STEPS * pace)) / pace))
        long_time, _, long_loss, _ = measure('ours', planned, folder, Path(place))
    return [
        ("our parameters / the peer's", size / peer_size, '<=', 1.0),
        (f"validation loss of {SHORT_STEPS} steps (the peer's)", loss, '<=', round(peer_loss, 4)),
        ("that run's time / the peer's", seconds / peer_time, '<=', 0.35),
        (f"validation loss of {planned} steps, planned for the peer's time", long_loss, '<=', 1.62),
        ("that run's time / the peer's", long_time / peer_time, '<=', 1.0),
    ]


def measure(side, steps, folder, place):
    """Train a side; print and return the seconds of the process and of a step, the loss, and the parameters,
    without learned positions and the rows of tokens that nanoGPT does not have."""
    seconds, pace = train(side, steps, folder, place)
    if side == 'ours':
        model = checkpoints.load_model(checkpoints.load(place / side), 'cpu')
        size = model.num_parameters() - model.config.n_embd  # the row of <|endoftext|>
        loss = validation_loss(model.logits, folder.tokens['val'])
    else:
        module = timing.load_nanogpt(peer)
        checkpoint = torch.load(place / side / 'out-shakespeare-char/ckpt.pt', 'cpu', weights_only=True)
        model = module.GPT(module.GPTConfig(**checkpoint['model_args'])).eval()
        model.load_state_dict(checkpoint['model'])
        size = model.get_num_params()
        loss = validation_loss(lambda x: model(x, targets=x)[0], folder.tokens['val'])
    took = f'{seconds:.1f} s, {1000 * pace:.1f} ms per step'
    timing.say(f'  {side}, {steps} steps: {took}, loss {loss:.4f}, {size:,} parameters')
    return seconds, pace, loss, size


def train(side, steps, folder, place):
    """Run the train.py of a side; return its seconds, and those per step between its lines after the warm-up."""
    schedule = f'--max_iters={steps} --lr_decay_iters={steps} --eval_interval={min(250, steps)}'
    words = ['train.py', *f'{PEER_RECIPE} {schedule}'.split()]  # 250 is the recipe's own
    if side == 'ours':
        words = [ROOT / 'train.py', *OUR_RECIPE.split(), f'--max_steps={steps}']
        words += [f'--dataset={folder.path.resolve()}', f'--out_dir={place / side}']

    start, progress = time.perf_counter(), []
    options = dict(cwd=place / 'nanoGPT', stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, '-u', *words], **options) as process:
        for line in process.stdout:
            match = re.match(r'(?:iter|step) (\d+)(?:/\d+)?: loss', line)
            if match and int(match[1]) >= WARMUP:
                progress.append((int(match[1]), time.perf_counter()))
    require(not process.returncode, f'{words[0]} of {side} failed; repair what it says above.')
    seconds, (first, begun), (last, ended) = time.perf_counter() - start, progress[0], progress[-1]
    return seconds, (ended - begun) / (last - first)


@torch.no_grad()
def validation_loss(logits, tokens):
    """Return nats per token, each but the first a target once; logits: from tokens (1, T) to (1, T, V)."""
    tokens, total = torch.from_numpy(tokens.astype(np.int64)), 0.0
    for x, y in zip(tokens[:-1].split(BLOCK_SIZE), tokens[1:].split(BLOCK_SIZE)):
        total += F.cross_entropy(logits(x[None])[0], y, reduction='sum').item()
    return total / (len(tokens) - 1)


def work():
    """Compare the pace of both sides at the same shapes and with the same optimizer."""
    module, dist, targets = timing.load_nanogpt(peer), runtime.Runtime('cpu', 'float32'), []
    for size, (rows, block_size) in WORK.items():
        timing.say(f'work: {size}, {rows} rows of {block_size} tokens in float32')
        _, ratio = beside_nanogpt(module, steps, dist, 'adamw', size, VOCAB_SIZE, rows, block_size=block_size)
        targets.append((f"our tokens/s / the peer's, {size}, median of {steps}", ratio, '>=', 1.1))
    return targets


def write():
    """Compare decoding with the same weights, and count the greedy tokens that are the same."""
    module, start, targets = timing.load_nanogpt(peer), torch.zeros(1, 1, dtype=torch.long), []
    runtime.Runtime('cpu', 'float32')  # as each script of ours starts: what it sets for the machine counts
    for size in WORK:
        torch.manual_seed(0)
        shape = dict(**checkpoints.size_of(size), vocab_size=VOCAB_SIZE, block_size=WRITE_BLOCK)
        theirs = module.GPT(module.GPTConfig(**shape, dropout=0.0)).eval()
        ours = with_weights_of(theirs, shape)
        greedy = zip(theirs.generate(start, 64, top_k=1)[0], generate(ours, [[0]], 64, temperature=0)[0])
        same = sum(int(a) == b for a, b in greedy) / 65
        sides = {'nanoGPT': timing.timed(theirs.generate, start, new_tokens, **SAMPLING)}
        sides['ours'] = timing.timed(generate, ours, [[0]], new_tokens, **SAMPLING)
        ratio = timing.compare_rates(size, sides, new_tokens, runs)
        targets.append((f"{size}: share of greedy tokens equal to nanoGPT's", same, '>=', 1.0))
        targets.append((f"{size}: our tokens/s / nanoGPT's, median of {runs}", ratio, '>=', 8.0))
    return targets


def write_pretrained():
    """Compare decoding of a pretrained model, its weights kept in each way, with transformers' in float32."""
    import transformers  # of requirements-test.txt

    theirs = transformers.AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).eval()
    state, targets = checkpoints.load(pretrained), []
    runtime.Runtime('cpu', 'float32')
    text = 'The history of the lighthouse begins with a fire on a hill. ' * 2
    prompt = Tokenizer(state['tokenizer']).encode(text)
    greedy = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    kinds = {'float32': 1.0, 'float16': 1.6, 'int8': 2.5}
    kinds |= {'bfloat16': 1.6} if has_bfloat16(timing.CPU) else {}
    for weights, wanted in kinds.items():
        ours = checkpoints.load_model(state, 'cpu', weights)
        sides = {'transformers': timing.timed(theirs.generate, torch.tensor([prompt]), **greedy)}
        sides['ours'] = timing.timed(generate, ours, [prompt], new_tokens, temperature=0)
        ratio = timing.compare_rates(weights, sides, new_tokens, runs, warmup=1)
        targets.append((f"--weights={weights}: our tokens/s / transformers'", ratio, '>=', wanted))
    return targets


def with_weights_of(theirs, shape):
    """Return our model with the weights of nanoGPT's; its padding rows are never drawn."""
    rows = len(theirs.transformer['wte'].weight)
    ours = checkpoints.make_model('ar', **shape, **GPT2, bias=True, pretrained_rows=rows).eval()
    tensors = gpt2_layout(theirs.state_dict())
    ours.load_state_dict(load_state_dict(tensors, 'gpt2', type(ours), ours.config, 'the peer'))
    return ours


def main():
    check_choice(config, 'only', ('', 'learn', 'work', 'write', 'pretrained'))
    check_range(config, 1, math.inf, 'runs', 'steps')
    check_range(config, 64, 1024, 'new_tokens')
    timing.describe_machine()
    if only == 'pretrained':
        require(pretrained, 'There is no model to compare with: give --pretrained=FOLDER.')
        timing.finish(write_pretrained())
    timing.load_nanogpt(peer)
    parts = [part for part in (learn, work, write) if only in ('', part.__name__)]
    timing.finish([target for part in parts for target in part()])


if __name__ == '__main__':
    main()
