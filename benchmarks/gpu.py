"""How fast are training and decoding on one GPU? All figures in under ten minutes of an H200.

    python benchmarks/gpu.py --peer=nanoGPT

    nanoGPT    a 124M GPT-2 in bfloat16, compiled, trained there and here in turn on the same tokens
    xl         335M parameters, block 1024, each block checkpointed: the share of the peak (MFU), and memory
    ratios     a step of diffusion over one of ar, one of sdd over one of diffusion
    decoding   Llama 3.2 1B's shape, beside what reading the weights once per token takes, eager and compiled

The peak is the fastest matmul that was measured. On a CPU it is a rehearsal, whose figures mean nothing.
"""

import statistics
import sys
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from benchmarks import timing
from benchmarks.timing import say
from benchmarks.train import Trainee, compare_architectures, compare_steps
from lm import checkpoints, runtime
from lm.configurator import configure
from sampling import generate

peer = ''  # path of a clone of nanoGPT, which is only read
steps = 20  # timed steps of each kind
new_tokens = 512  # decoding
device = 'auto'
config = configure(globals())

GPT2 = dict(norm='layer', position='learned', mlp='gelu', qk_norm=False, logit_softcap=0.0)
LLAMA = dict(mlp='swiglu', norm='rms_gain', qk_norm=False, logit_softcap=0.0)
LLAMA_1B = dict(n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, mlp_width=8192, vocab_size=128256, **LLAMA)


def beside_nanogpt(dist, peak, *settings, block_size):
    """Train both on the same tokens in the same precision, each with its own AdamW, clipped at 1."""
    module = timing.load_nanogpt(peer)
    ours = Trainee('ar', dist, 'adamw', *settings, block_size=block_size, **GPT2)
    shape = {key: getattr(ours.model.config, key) for key in ('n_layer', 'n_head', 'n_embd', 'block_size')}
    shape['vocab_size'] = ours.model.config.padded_vocab_size
    theirs = module.GPT(module.GPTConfig(**shape, bias=False)).to(dist.device)
    optimizer = theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.95), dist.device.type)
    if dist.device.type == 'cuda':
        theirs.compile()

    def peer_step():
        tokens = next(ours.batches).tokens
        return timing.seconds(lambda: train_peer(tokens), dist.device)

    def train_peer(tokens):
        with dist.autocast():
            _, loss = theirs(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    sides = {'nanoGPT': peer_step, 'ours': ours.timed_step}
    ratio = timing.compare_rates(settings[0], sides, ours.tokens, steps, warmup=5)
    mfu = ours.mfu(compare_steps({'ar': ours}, steps, peak)['ar'], peak)
    return [
        ("our tokens/s / nanoGPT's, median of pairs", ratio, '>=', 1.3),
        ('MFU of that shape', mfu, '>=', 0.5),
    ]


def xl(dist, peak, *settings, block_size):
    on_gpu = dist.device.type == 'cuda'
    before = torch.cuda.memory_allocated() if on_gpu else 0
    trainee = Trainee('ar', dist, 'adamw', *settings, block_size=block_size, gradient_checkpointing=True)
    mfu = trainee.mfu(compare_steps({'ar': trainee}, steps, peak)['ar'], peak)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        trainee.rows = 8
        trainee.step(next(trainee.batches))
    used = (torch.cuda.max_memory_allocated() - before) / 1e9 if on_gpu else 0.0
    return [
        ('MFU of xl with checkpointing', mfu, '>=', 0.45),
        ('GB of a step of xl, 8 rows', used, '<=', 12.0),
    ]


def decoding(dist, shape):
    """Compare with the time that it takes to read all weights, and the keys and values so far, per token."""
    with dist.device:
        model = checkpoints.make_model('ar', block_size=1024, **shape).bfloat16().eval()
        source = torch.empty(2**31 if dist.device.type == 'cuda' else 2**20, dtype=torch.uint8)
    copies = [timing.seconds(source.clone, dist.device) for _ in range(10)]
    speed = 2 * source.numel() / statistics.median(copies)  # bytes per second, read and written
    cache = model.config.n_layer * 2 * model.config.n_kv_head * model.config.head_dim * new_tokens / 2
    bound = speed / (2 * (sum(p.numel() for p in model.parameters()) + cache))
    say(f'  memory: {speed / 1e9:,.0f} GB/s, at most {bound:,.0f} tokens/s')
    for compiled in (False, True):
        write = lambda compiled=compiled: generate(model, [[0]], new_tokens, compile=compiled)
        write()  # compiles
        rate = new_tokens / timing.seconds(write, dist.device)
        say(f'  decoding, compile={compiled}: {rate:,.0f} tokens/s, {rate / bound:.0%} of the bound')
    return [('1B: decoding / memory-bandwidth bound, batch 1', rate / bound, '>=', 0.6)]


def main():
    dist = runtime.Runtime(device, 'bfloat16')
    timing.describe_machine(dist.device)
    peak = runtime.measure_peak_flops(dist.device, 'bfloat16')
    say(f'matmuls of bfloat16: {peak / 1e12:,.1f} TFLOP/s')
    small, large, llama = (
        ('large', 50260, 32),
        ('xl', 50260, 16),
        LLAMA_1B,
    )  # GPT-2's vocabulary and three more
    length = 1024
    if dist.device.type == 'cpu':
        small = large = ('tiny', 64, 1)
        length, llama = 16, dict(n_layer=1, vocab_size=64)
    targets = beside_nanogpt(dist, peak, *small, block_size=length) + xl(
        dist, peak, *large, block_size=length
    )
    targets += compare_architectures(dist, peak, steps, 'muon', *small, block_size=length)
    timing.finish(*targets, *decoding(dist, llama))


if __name__ == '__main__':
    main()
