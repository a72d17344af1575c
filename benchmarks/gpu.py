"""How fast are training and decoding on one GPU? All figures in what should be ten minutes of an H200.

    python benchmarks/gpu.py --peer=nanoGPT

    nanoGPT    a 124M GPT-2 in bfloat16, compiled, trained there and here in turn on the same tokens
    xl         366M parameters, block 1024, each block checkpointed: share of the peak, and memory
    ratios     a step of diffusion over one of ar, one of sdd over one of diffusion; diffusion in blocks of 8
    decoding   Llama 3.2 1B's shape, compiled, beside what reading the weights once per token takes
    others     a step in float16, one in a process group of one rank (NCCL), graph breaks of all that was compiled

The peak is the fastest matmul that was measured. On a CPU it is a rehearsal, whose figures mean nothing.
"""

import statistics
import sys
from functools import partial
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from benchmarks import timing
from benchmarks.train import Trainee, beside_nanogpt, compare_architectures, compare_steps
from lm import checkpoints, runtime
from lm.configurator import configure
from sampling import generate

peer = ''  # path of a clone of nanoGPT, which is only read
steps = 20  # timed steps of each kind
new_tokens = 512  # decoding
device = 'auto'
config = configure(globals())

LLAMA_1B = dict(n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, mlp_width=8192, vocab_size=128256)
LLAMA_1B |= dict(mlp='swiglu', norm='rms_gain', qk_norm=False, logit_softcap=0.0)


def xl(dist, peak, *settings, block_size):
    """Train 366M parameters with each block checkpointed; the memory is that of steps of 8 rows."""
    trainee = Trainee('ar', dist, 'adamw', *settings, block_size=block_size, gradient_checkpointing=True)
    rows, trainee.rows = trainee.rows, 8
    for _ in range(2):  # the first makes the optimizer's state
        trainee.step(trainee.batch())
    used, trainee.rows = torch.cuda.max_memory_allocated() / 1e9, rows
    mfu = trainee.mfu(compare_steps({'ar': trainee}, steps, peak)['ar'], peak)
    return [('MFU of xl', mfu, '>=', 0.45), ('GB of a step of xl, 8 rows', used, '<=', 12.0)]


def others(dist, peak, *settings, **shape):
    """Time steps in float16 beside those in bfloat16, and in a process group of one rank beside those without."""
    half = runtime.Runtime(device, 'float16' if dist.device.type == 'cuda' else 'bfloat16')
    kinds = {'bfloat16': dist, 'float16': half, 'one rank': dist}
    trainees = {name: Trainee('ar', kind, 'adamw', *settings, **shape) for name, kind in kinds.items()}
    backend = 'nccl' if dist.device.type == 'cuda' else 'gloo'
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    ddp = torch.nn.parallel.DistributedDataParallel
    trainees['one rank'].forward = ddp(trainees['one rank'].model, gradient_as_bucket_view=True)
    seconds = compare_steps(trainees, steps, peak)
    torch.distributed.destroy_process_group()
    breaks = sum(torch._dynamo.utils.counters['graph_break'].values())
    ratio = seconds['one rank'] / seconds['bfloat16']
    return [('a step in a group of one rank / without', ratio, '<=', 1.1), ('graph breaks', breaks, '<=', 0)]


def decoding(dist, shape):
    """Compare with the time that it takes to read all weights, and the keys and values so far, per token."""
    with dist.device:
        model = checkpoints.make_model('ar', block_size=1024, **shape).bfloat16().eval()
        source = torch.empty(2**31 if dist.device.type == 'cuda' else 2**20, dtype=torch.uint8)
    copies = [runtime.seconds(source.clone, dist.device) for _ in range(10)]
    speed = 2 * source.numel() / statistics.median(copies)  # bytes per second, read and written
    cache = model.config.n_layer * 2 * model.config.n_kv_head * model.config.head_dim * new_tokens / 2
    bound = speed / (2 * (sum(p.numel() for p in model.parameters()) + cache))

    write = partial(generate, model, [[0]], new_tokens, compile=True)
    write()  # compiles
    rate = new_tokens / runtime.seconds(write, dist.device)
    timing.say(f'  decoding: {rate:,.0f} of at most {bound:,.0f} tokens/s, memory {speed / 1e9:,.0f} GB/s')
    return [('1B: decoding / memory-bandwidth bound, batch 1', rate / bound, '>=', 0.6)]


def main():
    module, dist = timing.load_nanogpt(peer), runtime.Runtime(device, 'bfloat16')
    timing.describe_machine(dist.device)
    peak = runtime.measure_peak_flops(dist.device, 'bfloat16')
    timing.say(f'matmuls of bfloat16: {peak / 1e12:,.1f} TFLOP/s')

    small, large, llama, length = ('large', 50260, 32), ('xl', 50260, 16), LLAMA_1B, 1024
    if dist.device.type == 'cpu':
        small, large, llama, length = ('tiny', 64, 1), ('tiny', 64, 1), dict(n_layer=1, vocab_size=64), 16
    targets = xl(dist, peak, *large, block_size=length)  # first, while the memory is free
    ours, ratio = beside_nanogpt(module, steps, dist, 'adamw', *small, block_size=length)
    mfu = ours.mfu(compare_steps({'ar': ours}, steps, peak)['ar'], peak)
    targets += [("our tokens/s / nanoGPT's, median of pairs", ratio, '>=', 1.3), ('our MFU', mfu, '>=', 0.5)]
    targets += compare_architectures(peak, steps, dist, 'muon', *small, block_size=length)
    targets += others(dist, peak, *small, block_size=length)
    timing.finish(targets + decoding(dist, llama))


if __name__ == '__main__':
    main()
