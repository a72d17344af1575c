"""How fast are training and decoding on one GPU? All figures in under ten minutes of an H200.

    python benchmarks/gpu.py --peer=nanoGPT

    nanoGPT    a 124M GPT-2 in bfloat16, compiled, trained there and here in turn on the same tokens
    xl         335M parameters, block 1024, each block checkpointed: the share of the peak (MFU), and memory
    ratios     a step of diffusion over one of ar, one of sdd over one of diffusion
    decoding   Llama 3.2 1B's shape, beside what reading the weights once per token takes, eager and compiled

The peak is the fastest matmul that was measured. On a CPU it is a rehearsal, whose figures mean nothing.
"""

import itertools
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from benchmarks import timing
from benchmarks.timing import Target, say
from benchmarks.train import Trainee, compare_steps, step_targets
from lm import checkpoints, data, runtime
from lm.configurator import configure
from model import ARCHITECTURES
from sampling import generate

peer = ''  # path of a clone of nanoGPT, which is only read
steps = 20  # timed steps of each kind
new_tokens = 512  # decoding
device = 'auto'
config = configure(globals())

VOCABULARY = dict(vocab_size=50260, mask_id=50258, ignore_id=50259)  # GPT-2's and the special tokens
GPT2 = dict(norm='layer', position='learned', mlp='gelu', qk_norm=False, logit_softcap=0.0)
LLAMA = dict(mlp='swiglu', norm='rms_gain', qk_norm=False, logit_softcap=0.0)
LLAMA_1B = dict(n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, mlp_width=8192, vocab_size=128256, **LLAMA)


def random_batches(model, rows, device):
    """Yield batches of random tokens, and how many the loss of each is over."""
    length, words = model.config.block_size + model.extra_tokens, model.config.vocab_size - 4
    for number in itertools.count():
        tokens = torch.randint(words, (rows, length), generator=torch.Generator().manual_seed(number))
        noise = torch.from_numpy(data.row_noise(np.arange(rows), rows, length, (0, number)))
        batch = data.Batch(tokens, noise=noise if model.needs_noise else None)
        yield batch.to(device), rows * (length - 1)


def beside_nanogpt(dist, peak, model_size, block_size, rows):
    """Train both on the same tokens in the same precision, each with its own AdamW, clipped at 1."""
    module = timing.load_nanogpt(peer)
    ours = Trainee('ar', dist, 'adamw', model_size, block_size=block_size, **VOCABULARY, **GPT2)
    shape = {key: getattr(ours.model.config, key) for key in ('n_layer', 'n_head', 'n_embd', 'block_size')}
    vocab_size = ours.model.config.padded_vocab_size
    theirs = module.GPT(module.GPTConfig(**shape, vocab_size=vocab_size, bias=False)).to(dist.device)
    optimizer = theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.95), dist.device.type)
    if dist.device.type == 'cuda':
        theirs.compile()

    def peer_step(batch, count):
        with dist.autocast():
            _, loss = theirs(batch.tokens[:, :-1].contiguous(), batch.tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    batches = random_batches(ours.model, rows, dist.device)

    def timed(step):
        batch, count = next(batches)
        return timing.seconds(lambda: step(batch, count), dist.device)

    sides = {'nanoGPT': lambda: timed(peer_step), 'ours': lambda: timed(ours.step)}
    ratio = timing.compare_rates(model_size, sides, rows * block_size, steps, warmup=5)
    mfu = measure_mfu(ours, dist, peak, rows)
    return [
        Target("our tokens/s / nanoGPT's, median of pairs", ratio, '>=', 1.3),
        Target('MFU of that shape', mfu, '>=', 0.5),
    ]


def measure_mfu(trainee, dist, peak, rows):
    batches, tokens = random_batches(trainee.model, rows, dist.device), rows * trainee.model.config.block_size
    typical = compare_steps({'ar': trainee}, {'ar': batches}, steps, tokens, peak)['ar']
    return runtime.flops_per_token(trainee.model) * tokens / typical / peak


def xl(dist, peak, model_size, block_size, rows):
    on_gpu = dist.device.type == 'cuda'
    before = torch.cuda.memory_allocated() if on_gpu else 0
    shape = dict(block_size=block_size, gradient_checkpointing=True, **VOCABULARY)
    trainee = Trainee('ar', dist, 'adamw', model_size, **shape)
    mfu = measure_mfu(trainee, dist, peak, rows)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        trainee.step(*next(random_batches(trainee.model, 8, dist.device)))
    used = (torch.cuda.max_memory_allocated() - before) / 1e9 if on_gpu else 0.0
    return [
        Target('MFU of xl with checkpointing', mfu, '>=', 0.45),
        Target('GB of a step of xl, 8 rows', used, '<=', 12.0),
    ]


def ratios(dist, peak, model_size, block_size, rows):
    shape = dict(block_size=block_size, **VOCABULARY)
    trainees = {name: Trainee(name, dist, 'muon', model_size, **shape) for name in ARCHITECTURES}
    batches = {name: random_batches(side.model, rows, dist.device) for name, side in trainees.items()}
    return step_targets(compare_steps(trainees, batches, steps, rows * block_size, peak))


def decoding(dist, shape):
    """Compare with the time that it takes to read all weights, and the keys and values so far, per token."""
    with dist.device:
        model = checkpoints.make_model('ar', block_size=1024, **shape).bfloat16().eval()
        source = torch.empty(2**31 if dist.device.type == 'cuda' else 2**20, dtype=torch.uint8)
    copies = [timing.seconds(source.clone, dist.device) for _ in range(10)]
    speed = 2 * source.numel() / statistics.median(copies)  # bytes per second, read and written
    cache = model.config.n_layer * 2 * model.config.n_kv_head * model.config.head_dim * new_tokens / 2
    bound = speed / (2 * (sum(p.numel() for p in model.parameters()) + cache))
    for compiled in (False, True):
        write = lambda compiled=compiled: generate(model, [[0]], new_tokens, compile=compiled)
        write()  # compiles
        rate = new_tokens / timing.seconds(write, dist.device)
        say(f'  decoding, compile={compiled}: {rate:,.0f} tokens/s, {rate / bound:.0%} of the bound')
    return [Target('1B: decoding / memory-bandwidth bound, batch 1', rate / bound, '>=', 0.6)]


def main():
    dist = runtime.Runtime(device, 'bfloat16')
    timing.describe_machine(dist.device)
    peak = runtime.measure_peak_flops(dist.device, 'bfloat16')
    say(f'matmuls of bfloat16: {peak / 1e12:,.1f} TFLOP/s')
    if dist.device.type == 'cpu':
        small = large = ('tiny', 16, 1)
        llama = dict(n_layer=1, vocab_size=64)
    else:
        small, large, llama = ('large', 1024, 32), ('xl', 1024, 16), LLAMA_1B
    targets = [*beside_nanogpt(dist, peak, *small), *xl(dist, peak, *large), *ratios(dist, peak, *small)]
    timing.finish([*targets, *decoding(dist, llama)])


if __name__ == '__main__':
    main()
