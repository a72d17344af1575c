"""How long is a training step of each architecture, one beside the other, on any device?

    python benchmarks/train.py --dataset=stories --mode=documents --block_size=160 --batch_size=24

Steps take turns: milliseconds, tokens per second, and the share of the machine's own matmul speed (MFU). Steps of sdd
are timed by the passes without gradient before them, and weighted by their share of train.py's schedule.
"""

import functools
import itertools
import math
import statistics
import sys
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from benchmarks import timing
from benchmarks.timing import Target, say
from lm import checkpoints, data, optim, runtime
from lm.configurator import check_range, configure
from model import ARCHITECTURES

dataset = 'stories'  # a name under data/, or a path
mode = 'packed'  # packed, documents, examples
model_size = 'tiny'
block_size = 128
batch_size = 32
optimizer = 'muon'  # adamw or muon
steps = 20  # timed steps of each kind, after warm-up
device = 'auto'
dtype = 'auto'
config = configure(globals(), None if __name__ == '__main__' else [])

SCHEDULE = 10**4  # steps of the training run whose beliefs are timed
P_BELIEF, K_SCHEDULE = ((0.5, 0.5),), (1, 2, 4, 8)  # the defaults of train.py


class Trainee:
    """A model with all that a training step takes."""

    def __init__(self, architecture, dist, optimizer, model_size, **shape):
        """shape: keys of ModelConfig, the vocabulary among them."""
        torch.manual_seed(0)
        size = checkpoints.size_of(model_size)
        with dist.device:
            self.model = checkpoints.make_model(architecture, **size, **shape)
        if dist.device.type == 'cuda':
            self.model.compile()
        self.dist, self.scaler = dist, dist.scaler()
        self.optimizer = optim.make_optimizer(self.model, optimizer, 1e-3, 0.9, 0.95, 0.1)

    def step(self, batch, count, beliefs=None):
        with self.dist.autocast():
            loss, *_ = self.model(*batch, **(beliefs or {}))
        self.scaler.scale(loss / count).backward()
        self.optimizer.step(self.scaler, self.model.parameters(), 1.0)


def belief_plans(model):
    """Return {passes before a step: the beliefs of those steps of train.py's schedule that have as many}."""
    plans = {}
    for step in range(SCHEDULE):
        beliefs = optim.draw_beliefs(model, step, SCHEDULE, 0, P_BELIEF, K_SCHEDULE, 0)
        plans.setdefault(beliefs.get('depth', 0), []).append(beliefs)
    return dict(sorted(plans.items()))


def compare_steps(trainees, batches, steps, tokens, peak_flops):
    """Print the times of steps of `trainees`, {architecture: Trainee}, in turn; return {architecture: seconds}.

    batches: {architecture: iterator of (batch, number of tokens that its loss is over)}
    """

    def timed_step(name, beliefs):
        batch, count = next(batches[name])
        return timing.seconds(
            lambda: trainees[name].step(batch, count, next(beliefs)), trainees[name].dist.device
        )

    plans = {name: belief_plans(trainee.model) for name, trainee in trainees.items()}
    sides = {
        (name, passes): functools.partial(timed_step, name, itertools.cycle(beliefs))
        for name in trainees
        for passes, beliefs in plans[name].items()
    }
    times = timing.alternate(sides, steps, warmup=3)
    typical = dict.fromkeys(trainees, 0.0)
    for (name, passes), values in times.items():
        share = len(plans[name][passes]) / sum(map(len, plans[name].values()))
        typical[name] += share * statistics.median(values)
        spread = timing.spread([1000 * value for value in values])
        say(f'  {name}, {passes} passes before, {share:.0%} of the steps: {spread} ms')
    for name, value in typical.items():
        mfu = runtime.flops_per_token(trainees[name].model) * tokens / value / peak_flops
        say(f'  {name}: {1000 * value:.1f} ms per step, {tokens / value:,.0f} tokens/s, MFU {mfu:.3f}')
    return typical


def step_targets(typical):
    wanted = {'step of diffusion / step of ar': 1.05, 'step of sdd / step of diffusion': 1.4}
    ratios = [typical['diffusion'] / typical['ar'], typical['sdd'] / typical['diffusion']]
    return [Target(name, ratio, '<=', most) for (name, most), ratio in zip(wanted.items(), ratios)]


def read_batches(folder, architecture, dist):
    """Yield (batch, count) of the data, after printing how fast they come without a model."""
    batches = data.Batches(folder, architecture, block_size, batch_size, mode=mode, dist=dist)
    taken = timing.seconds(lambda: [batches.get(step) for step in range(steps)], dist.device)
    say(f'  {architecture.description}: {steps / taken:,.0f} batches per second without a model')
    for step in itertools.count():
        (batch,), count = batches.get(step)
        yield batch, count


def main():
    check_range(config, 1, math.inf, 'batch_size', 'block_size', 'steps')
    dist, folder = runtime.Runtime(device, dtype), data.Folder(dataset)
    timing.describe_machine(dist.device)
    say(f'{folder.path}: {model_size}, {batch_size} rows of {block_size} tokens, {dist.dtype}, {optimizer}')
    ids = {key: getattr(folder.tokenizer, key) for key in ('vocab_size', 'mask_id', 'ignore_id')}
    batches = {name: read_batches(folder, kind, dist) for name, kind in ARCHITECTURES.items()}
    trainees = {
        name: Trainee(name, dist, optimizer, model_size, block_size=block_size, **ids) for name in batches
    }
    peak_flops = runtime.measure_peak_flops(dist.device, dist.dtype)
    timing.finish(step_targets(compare_steps(trainees, batches, steps, batch_size * block_size, peak_flops)))


if __name__ == '__main__':
    main()
