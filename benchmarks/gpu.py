"""bench.py --what=gpu: all that is to be shown on one GPU, in under ten minutes on an H200.

    python bench.py --what=gpu --peer=nanoGPT
    python bench.py --what=gpu --peer=nanoGPT --device=cpu --model_size=tiny --block_size=64 --batch_size=2

    nanoGPT    a 124M GPT-2 in bfloat16, compiled, trained there and here in turn on the same tokens
    xl         300M parameters, block 1024, each block checkpointed
    ratios     a step of diffusion over one of ar, one of sdd over one of diffusion
    decoding   benchmarks/sample.py --what=gpu

A share of the peak (MFU) is of the fastest matrix product that was measured. On a CPU it is a rehearsal: everything
is as small as --model_size says, and no figure means anything.
"""

import contextlib
import importlib.util
import io
import statistics
import time
from pathlib import Path

import torch

from benchmarks import sample
from benchmarks.timing import Target, describe_machine, say, spread
from benchmarks.train import Trainee, belief_plans
from lm import data, runtime
from lm.configurator import UserError

GPT2 = dict(norm='layer', position='learned', mlp='gelu', bias=False, qk_norm=False, logit_softcap=0.0)
SHAPES = {  # what a GPU measures: model_size, block, rows, changes
    'nanoGPT': ('large', 1024, 32, {}),
    'xl': ('xl', 1024, 16, {'gradient_checkpointing': True}),
}
VOCABULARY = 50257


def measure(settings):
    run_on = runtime.Runtime(settings['device'], 'bfloat16')
    rehearsal = run_on.device.type == 'cpu'
    shapes = SHAPES
    if rehearsal:
        small = (settings['model_size'], settings['block_size'], settings['batch_size'])
        shapes = {name: (*small, changes) for name, (*_, changes) in SHAPES.items()}
        say('gpu: a rehearsal on the CPU; its figures mean nothing')
    module = load_peer(settings['peer'])
    describe_machine(run_on.device)
    steps = 10 if rehearsal else settings['steps']
    peak = runtime.measure_peak_flops(run_on.device, 'bfloat16')
    say(f'  matrix products of bfloat16: {peak / 1e12:,.1f} TFLOP/s')
    return [
        *beside_nanogpt(module, shapes['nanoGPT'], run_on, steps, peak),
        *xl(shapes['xl'], run_on, steps, peak),
        *ratios(shapes['nanoGPT'], run_on, steps),
        *sample.measure(what='gpu'),
    ]


def load_peer(peer):
    """nanoGPT's model.py as a module."""
    path = Path(peer, 'model.py')
    if not peer or not path.is_file():
        raise UserError(
            f'--peer={peer} is no clone of nanoGPT: it has no model.py; give the path of one, made with: '
            'git clone https://github.com/karpathy/nanoGPT'
        )
    spec = importlib.util.spec_from_file_location('peer_model', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_batch(trainee, rows, number):
    """Random tokens with all that data.Batches gives along, and how many of them the loss is over."""
    model = trainee.model
    generator = torch.Generator().manual_seed(number)
    length = model.config.block_size + model.causal
    tokens = torch.randint(0, VOCABULARY - 1, (rows, length), generator=generator)
    if model.causal:
        return data.to_device((tokens,), trainee.run_on.device), rows * (length - 1)
    noise = torch.rand(rows, 1 + length, generator=generator)
    noise[:, 0] = (torch.arange(rows) + noise[:, 0]) / rows
    where = model.predicted(tokens, None, noise)
    batch = tokens, None, noise, None, data.positions_of(where, data.spare(where))
    return data.to_device(batch, trainee.run_on.device), rows * (length - 1)


def trainee_of(architecture, shape, run_on, optimizer='adamw', **changes):
    size, block, _, more = shape
    return Trainee(
        architecture,
        size,
        run_on,
        optimizer,
        block_size=block,
        vocab_size=VOCABULARY + 3,
        mask_id=VOCABULARY + 1,
        ignore_id=VOCABULARY + 2,
        **{**more, **changes},
    )


def timed(sides, steps, warmup=5):
    """{name: seconds of each step} of sides {name: call(step number)}, one after the other in turn."""
    seconds = {name: [] for name in sides}
    for i in range(steps + warmup):
        for name, call in sides.items():
            taken = call(i)
            if i >= warmup:
                seconds[name].append(taken)
    return seconds


def describe(name, seconds, tokens, flops_per_token, peak):
    """Prints a line of figures and returns the MFU."""
    typical = statistics.median(seconds)
    mfu = flops_per_token * tokens / typical / peak
    say(
        f'  {name:24} {1000 * typical:8.1f} ms per step ({1000 * min(seconds):.1f} to {1000 * max(seconds):.1f}), '
        f'{tokens / typical:,.0f} tokens/s, MFU {mfu:.3f}'
    )
    return mfu


# ---------------------------------------------------------------------------- training


def beside_nanogpt(module, shape, run_on, steps, peak):
    """Both models see the same tokens in the same precision, each with its own AdamW, clipped at 1."""
    _, block, rows, _ = shape
    ours = trainee_of('ar', shape, run_on, **GPT2)
    config = ours.model.config
    with contextlib.redirect_stdout(io.StringIO()):  # it announces its size
        theirs = module.GPT(
            module.GPTConfig(
                n_layer=config.n_layer,
                n_head=config.n_head,
                n_embd=config.n_embd,
                block_size=block,
                vocab_size=config.padded_vocab_size,
                bias=False,
            )
        )
        theirs = theirs.to(run_on.device)
        optimizer = theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.95), run_on.device.type)
    compiled = torch.compile(theirs) if run_on.device.type == 'cuda' else theirs

    def their_step(i):
        (tokens,), _ = random_batch(ours, rows, i)
        runtime.synchronize(run_on.device)
        start = time.perf_counter()
        with run_on.autocast():
            _, loss = compiled(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        runtime.synchronize(run_on.device)
        return time.perf_counter() - start

    seconds = timed(
        {'nanoGPT': their_step, 'ours': lambda i: ours.seconds(*random_batch(ours, rows, i), {})}, steps
    )
    flops = ours.model.flops_per_token()
    describe('nanoGPT', seconds['nanoGPT'], rows * block, flops, peak)
    mfu = describe('ours, the same shape', seconds['ours'], rows * block, flops, peak)
    pairs = [a / b for a, b in zip(seconds['nanoGPT'], seconds['ours'])]
    say(f'  ratio {spread(pairs)}')
    return [
        Target("our tokens/s / nanoGPT's, median of pairs", statistics.median(pairs), '>=', 1.3),
        Target('MFU of that run', mfu, '>=', 0.5),
    ]


def xl(shape, run_on, steps, peak):
    _, block, rows, _ = shape
    trainee = trainee_of('ar', shape, run_on)
    seconds = timed({'xl': lambda i: trainee.seconds(*random_batch(trainee, rows, i), {})}, steps)
    mfu = describe('xl, checkpointed', seconds['xl'], rows * block, trainee.model.flops_per_token(), peak)
    used = trainee.peak_bytes(*random_batch(trainee, 8, 0), {}) / 1e9
    say(f'  xl, checkpointed, 8 rows: {used:.2f} GB')
    return [
        Target('MFU of xl with checkpointing', mfu, '>=', 0.45),
        Target('GB of a step of xl, 8 rows', used, '<=', 12.0),
    ]


def ratios(shape, run_on, steps):
    """Steps of the three architectures in turn; those of sdd by their passes before, weighted by their share."""
    _, block, rows, _ = shape
    plans, shares = belief_plans(steps + 2 * (data.MAX_DEPTH + 1))
    sides = {name: trainee_of(name, shape, run_on, 'muon') for name in ('ar', 'diffusion', 'sdd')}

    def step(name):
        return lambda i: sides[name].seconds(
            *random_batch(sides[name], rows, i), plans[i] if name == 'sdd' else {}
        )

    seconds = timed({name: step(name) for name in sides}, steps, 2 * len(shares))
    diffusion = [a / b for a, b in zip(seconds['diffusion'], seconds['ar'])]
    sdd = [a / b for a, b in zip(seconds['sdd'], seconds['diffusion'])]
    by_passes = {
        depth: statistics.median(
            [ratio for ratio, plan in zip(sdd, plans[2 * len(shares) :]) if plan.get('depth', 0) == depth]
        )
        for depth in shares
    }
    overall = sum(share * by_passes[depth] for depth, share in shares.items())
    say(
        f'  diffusion / ar {spread(diffusion)}; sdd / diffusion by passes before: '
        + ', '.join(f'{depth}: {ratio:.2f}' for depth, ratio in by_passes.items())
        + f'; of the schedule {overall:.3f}'
    )
    return [
        Target('step of diffusion / step of ar', statistics.median(diffusion), '<=', 1.05),
        Target('step of sdd / step of diffusion, over the schedule', overall, '<=', 1.4),
    ]
