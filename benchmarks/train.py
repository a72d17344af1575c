"""How long does a training step of each architecture take?

    python benchmarks/train.py --optimizer=muon

Steps take turns, on random tokens. Those of sdd are timed by the passes without gradient before them, and weighted
by their share of train.py's schedule.
"""

import itertools
import math
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from benchmarks import timing
from lm import checkpoints, data, optim, runtime
from lm.configurator import check_range, configure
from model import ARCHITECTURES

model_size = 'tiny'
vocab_size = 8192
block_size = 128
batch_size = 32
optimizer = 'muon'  # adamw or muon
steps = 20  # timed steps of each kind, after warm-up
device = 'auto'
dtype = 'auto'
config = configure(globals(), None if __name__ == '__main__' else [])

GPT2 = dict(norm='layer', position='learned', mlp='gelu', qk_norm=False, logit_softcap=0.0)
NOISY_BLOCKS = (2, 0.0)  # every second one, as noisy_every says by default
SCHEDULE = 10**4  # steps of the training run whose beliefs are timed, with the defaults of train.py


class Trainee:
    """A model with all that a training step takes, and batches of random tokens."""

    def __init__(self, architecture, dist, optimizer, model_size, vocab_size, rows, **shape):
        torch.manual_seed(0)
        shape |= dict(vocab_size=vocab_size, mask_id=vocab_size - 2, ignore_id=vocab_size - 1)
        with dist.device:
            self.model = checkpoints.make_model(architecture, **checkpoints.size_of(model_size), **shape)
        dist.wrap(self.model)  # compiled on a GPU, as a run is
        self.dist, self.scaler, self.rows, self.forward = dist, dist.scaler(), rows, self.model
        self.optimizer = optim.make_optimizer(self.model, optimizer, 1e-3, 0.9, 0.95, 0.1, dist.dtype)
        self.tokens, self.passes = rows * self.model.config.block_size, 0.0  # those before a step, on average
        if any(self.model.config.block_length):
            self.model.noisy_blocks = NOISY_BLOCKS

    def batch(self):
        length = self.model.config.block_size + self.model.extra_tokens
        tokens, noise = torch.randint(self.model.config.vocab_size - 3, (self.rows, length)), None
        if self.model.needs_noise:
            noise = torch.rand(self.rows, 1 + length)
            noise[:, 0] = (torch.arange(self.rows) + noise[:, 0]) / self.rows  # a mask ratio in each interval
        return data.Batch(tokens, noise=noise).to(self.dist.device)

    def step(self, batch, **beliefs):
        with self.dist.autocast():
            loss, count, _ = self.forward(*batch, **beliefs)
        self.scaler.scale(loss / count).backward()
        self.optimizer.step(self.scaler, self.model.parameters(), 1.0)

    def timed_step(self, plans=None):
        """Return the seconds of a step; plans: an iterator of how steps come to their beliefs."""
        batch, beliefs = self.batch(), next(plans) if plans else {}
        return runtime.seconds(lambda: self.step(batch, **beliefs), self.dist.device)

    def mfu(self, seconds, peak):
        predicted = 0.5 if self.model.needs_noise else 1.0  # the mean mask ratio
        flops = runtime.flops_per_token(self.model, predicted=predicted, passes=self.passes)
        return flops * self.tokens / seconds / peak


def beside_nanogpt(module, steps, dist, *settings, block_size):
    """Train a GPT-2 of ours and nanoGPT's, each with its own AdamW, clipped at 1, on the same tokens in one precision.

    settings: of `Trainee`. Returns our Trainee, and the median of our rate over nanoGPT's.
    """
    ours = Trainee('ar', dist, *settings, block_size=block_size, **GPT2)
    shape = {key: getattr(ours.model.config, key) for key in ('n_layer', 'n_head', 'n_embd', 'block_size')}
    shape['vocab_size'] = ours.model.config.padded_vocab_size
    theirs = module.GPT(module.GPTConfig(**shape, bias=False)).to(dist.device)
    optimizer = theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.95), dist.device.type)
    if dist.device.type == 'cuda':
        theirs.compile()

    def train_peer(x, y):
        with dist.autocast():
            _, loss = theirs(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def peer_step():
        tokens = ours.batch().tokens
        call = partial(train_peer, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        return runtime.seconds(call, dist.device)

    sides = {'nanoGPT': peer_step, 'ours': ours.timed_step}
    return ours, timing.compare_rates(settings[1], sides, ours.tokens, steps, warmup=5)


def compare_steps(trainees, steps, peak):
    """Print the times of steps of `trainees`, {name: Trainee}, in turn; return {name: seconds}."""
    plans = {}  # {(name, passes before a step): the beliefs of those steps of the schedule that have as many}
    for step, (name, trainee) in itertools.product(range(SCHEDULE), trainees.items()):
        beliefs = optim.draw_beliefs(trainee.model, step, SCHEDULE, 0, ((0.5, 0.5),), (1, 2, 4, 8), 0)
        plans.setdefault((name, beliefs.get('passes', 0)), []).append(beliefs)
    sides = {key: partial(trainees[key[0]].timed_step, itertools.cycle(plans[key])) for key in sorted(plans)}

    typical = dict.fromkeys(trainees, 0.0)
    for (name, passes), times in timing.alternate(sides, steps, warmup=3).items():
        share, spread = len(plans[name, passes]) / SCHEDULE, timing.spread([1000 * time for time in times])
        timing.say(f'  {name}, {passes} passes before, {share:.0%} of the steps: {spread} ms')
        typical[name] += share * statistics.median(times)
        trainees[name].passes += share * passes
    for name, seconds in typical.items():
        rate, mfu = trainees[name].tokens / seconds, trainees[name].mfu(seconds, peak)
        timing.say(f'  {name}: {1000 * seconds:.1f} ms per step, {rate:,.0f} tokens/s, MFU {mfu:.3f}')
    return typical


def compare_architectures(peak, steps, *settings, **shape):
    """Compare steps of all architectures, and of diffusion in blocks of 8 with an ar model in it, and return the
    targets; settings, shape: of `Trainee`."""
    trainees = {name: Trainee(name, *settings, **shape) for name in ARCHITECTURES}
    trainees['blocks'] = Trainee('diffusion', *settings, **shape, block_length=(8,), ar_weight=1.0)
    typical = compare_steps(trainees, steps, peak)
    ratios = [typical['diffusion'] / typical['ar'], typical['sdd'] / typical['diffusion']]
    targets = ('step of diffusion / step of ar', 1.05), ('step of sdd / step of diffusion', 1.4)
    return [(name, ratio, '<=', most) for ratio, (name, most) in zip(ratios, targets)]


def main():
    check_range(config, 1, math.inf, 'batch_size', 'block_size', 'steps')
    dist = runtime.Runtime(device, dtype)
    timing.describe_machine(dist.device)
    timing.say(f'{batch_size} rows of {block_size} tokens, {dist.dtype}, {optimizer}')
    settings = dist, optimizer, model_size, vocab_size, batch_size
    peak = runtime.measure_peak_flops(dist.device, dist.dtype)
    timing.finish(compare_architectures(peak, steps, *settings, block_size=block_size))


if __name__ == '__main__':
    main()
