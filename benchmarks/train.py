"""bench.py --what=train, data and memory: steps, batches and bytes of the three architectures, side by side.

`settings` in all functions are the keys of bench.py.
"""

import statistics
import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import memory
from benchmarks.timing import Target, describe_machine, say, spread
from lm import checkpoints, data, optim, runtime
from lm.configurator import UserError
from model import ARCHITECTURES

SCHEDULE = 10**4  # steps of the training run whose beliefs are timed
P_BELIEF, K_SCHEDULE = ((0.5, 0.5),), (1, 2, 4, 8)  # train.py's own
CHECKPOINTING = {
    'none': {},
    'each block': {'gradient_checkpointing': True},
    'all but the products': {'gradient_checkpointing': True, 'selective_checkpointing': True},
}


# ---------------------------------------------------------------------------- train


class Trainee:
    """A model with all that a training step takes."""

    def __init__(self, architecture, model_size, run_on, optimizer, **shape):
        """shape: keys of ModelConfig; what they leave open of the size, model_size says."""
        self.run_on = run_on
        torch.manual_seed(0)
        size = dict(zip(('n_layer', 'n_head', 'n_embd'), checkpoints.size_of(model_size)))
        with run_on.device:
            self.model = checkpoints.make_model(architecture, **{**size, **shape})
        if run_on.device.type == 'cuda':
            self.model.compile()
        self.optimizers = optim.make_optimizers(self.model, optimizer, 1e-3, 0.9, 0.95, 0.1)

    def step(self, batch, count, beliefs):
        with self.run_on.autocast():
            loss, *_ = self.model(*batch, **beliefs)
        (loss / count).backward()
        runtime.clip_gradients(self.model.parameters(), 1.0)
        for o in self.optimizers.values():
            o.step()
            o.zero_grad(set_to_none=True)

    def seconds(self, *step):
        runtime.synchronize(self.run_on.device)
        start = time.perf_counter()
        self.step(*step)
        runtime.synchronize(self.run_on.device)
        return time.perf_counter() - start

    def peak_bytes(self, *step):
        """The most that is allocated in a step, what stays between steps included."""
        stays = sum(memory.state_bytes(self.model, self.optimizers.values()).values())
        if self.run_on.device.type == 'cuda':
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step(*step)
            return stays + torch.cuda.max_memory_allocated() - before
        with memory.Allocations() as allocations:
            self.step(*step)
        return stays + allocations.peak


def train(settings):
    """Steps of each architecture in turn, so that what slows the machine down slows all of them down."""
    run_on, folder = runtime.Runtime(settings['device'], settings['dtype']), data.Folder(settings['dataset'])
    steps, batch_size, block_size = (settings[key] for key in ('steps', 'batch_size', 'block_size'))
    describe_machine(run_on.device)
    say(
        f'train: {folder.config["name"]}, model_size={settings["model_size"]}, {batch_size} rows of {block_size} '
        f'tokens, {run_on.dtype}, {settings["optimizer"]}; {steps} steps of each, alternating'
    )
    plans, shares = belief_plans(steps)
    sides = {
        name: Trainee(
            name,
            settings['model_size'],
            run_on,
            settings['optimizer'],
            block_size=block_size,
            **vocabulary_of(folder.tokenizer),
        )
        for name in ARCHITECTURES
    }
    read = {
        name: data.Batches(
            folder,
            name,
            block_size,
            batch_size,
            mode=settings['mode'],
            device=run_on.device,
            predicted=trainee.model.predicted,
        )
        for name, trainee in sides.items()
    }
    seconds = {architecture: [] for architecture in sides}
    peaks = {}
    for i in range(-2 * len(shares), steps + 1):
        for architecture, trainee in sides.items():
            (batch,), count = read[architecture].get(i + 2 * len(shares))
            step = batch, count, plans[i] if architecture == 'sdd' else {}
            if i == steps:
                peaks[architecture] = trainee.peak_bytes(*step)
            elif i < 0:
                trainee.seconds(*step)
            else:
                seconds[architecture].append(trainee.seconds(*step))
    passes = [plan.get('depth', 0) for plan in plans[:steps]]
    return report_training(seconds, passes, shares, sides, peaks, run_on, batch_size * block_size)


def belief_plans(steps):
    """What the steps of `sdd` believe from, and {passes before: share of the steps of train.py's schedule}.

    The steps go through the numbers of passes in turn, each time with another of the schedule's k and staleness;
    the last one, whose memory is taken, has the most.
    """
    drawn = [data.draw_belief(step, SCHEDULE, 0, P_BELIEF, K_SCHEDULE, 0) for step in range(SCHEDULE)]
    groups = {
        depth: [plan for plan in drawn if plan.get('depth', 0) == depth]
        for depth in range(data.MAX_DEPTH + 1)
    }
    plans = [groups[i % len(groups)][i // len(groups)] for i in range(steps)]
    return [*plans, groups[data.MAX_DEPTH][0]], {
        depth: len(group) / SCHEDULE for depth, group in groups.items()
    }


def vocabulary_of(tokenizer):
    return dict(vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id, ignore_id=tokenizer.ignore_id)


def report_training(seconds, passes, shares, trainees, peaks, run_on, tokens):
    """Prints a line per architecture, sdd's by its passes, and returns the targets."""
    peak_flops = runtime.measure_peak_flops(run_on.device, run_on.dtype)
    pairs = {
        name: [a / b for a, b in zip(seconds[name], seconds[other])]
        for name, other in (('diffusion', 'ar'), ('sdd', 'diffusion'))
    }
    by_passes = {
        depth: [ratio for ratio, done in zip(pairs['sdd'], passes) if done == depth] for depth in shares
    }
    over_schedule = sum(share * statistics.median(by_passes[depth]) for depth, share in shares.items())
    say(
        f'  matrix products of {run_on.dtype}: {peak_flops / 1e9:,.0f} GFLOP/s; times: median (least to most)'
    )
    for name, trainee in trainees.items():
        typical = statistics.median(seconds[name] if name != 'sdd' else seconds['diffusion'])
        typical *= over_schedule if name == 'sdd' else 1
        rate = tokens / typical
        say(
            f'  {name:10} {1000 * typical:8.1f} ms per step ({1000 * min(seconds[name]):.1f} to '
            f'{1000 * max(seconds[name]):.1f}), {rate:,.0f} tokens/s, MFU '
            f'{trainee.model.flops_per_token() * rate / peak_flops:.2f}, peak memory {peaks[name] / 2**20:,.0f} MiB'
        )
    say('  a step of sdd over one of diffusion, by the passes before it and their share of the schedule:')
    for depth, ratios in by_passes.items():
        say(f'    {depth} ({shares[depth]:4.0%})  {spread(ratios, "{:.2f}")}')
    say(f'    over the whole schedule {over_schedule:.2f}')
    return [
        Target(
            'step of diffusion / step of ar, median of pairs',
            statistics.median(pairs['diffusion']),
            '<=',
            1.05,
        ),
        Target('step of sdd / step of diffusion, over the schedule', over_schedule, '<=', 1.4),
    ]


# ---------------------------------------------------------------------------- data, memory


def read_data(settings):
    """Batches per second of each architecture and mode that the data have, without a model."""
    folder, on = data.Folder(settings['dataset']), runtime.Runtime(settings['device'], 'float32').device
    runs, steps, batch_size, block_size = (
        settings[key] for key in ('runs', 'steps', 'batch_size', 'block_size')
    )
    describe_machine(on)
    say(
        f'data: {folder.config["name"]}, batches of {batch_size} rows of {block_size} tokens; per second, median of '
        f'{runs} times {steps} batches, least to most'
    )
    modes = ['packed', 'documents'] + (
        ['examples', 'packed examples'] if folder.masks['train'] is not None else []
    )
    for name in modes:
        for architecture in ('ar', 'diffusion'):  # those of sdd are diffusion's
            batches = data.Batches(folder, architecture, block_size, batch_size, mode=name, device=on)
            rates = [batches_per_second(batches, part * steps, steps) for part in range(runs + 1)][1:]
            say(
                f'  {name:16} {architecture:10} {spread(rates, "{:,.0f}")}; '
                f'{statistics.median(rates) * batch_size * block_size / 1e6:,.2f} million tokens/s'
            )
    return []


def batches_per_second(batches, first, steps):
    start = time.perf_counter()
    for step in range(first, first + steps):
        batches.get(step)
    runtime.synchronize(batches.device)
    return steps / (time.perf_counter() - start)


def measure_memory(settings):
    """What a step of each architecture allocates, without gradient checkpointing, with it and with its selective kind.

    The tensors are fake: they have a shape and a device, and no numbers. Attention is the CPU's, which in bfloat16
    keeps the scores that a GPU's does not: an upper bound for that one.
    """
    if settings['device'] not in ('auto', 'cpu'):
        raise UserError(f'device is {settings["device"]!r}; memory is counted without computing, on the cpu.')
    run_on, optimizer = runtime.Runtime('cpu', settings['dtype']), settings['optimizer']
    model_size, batch_size, block_size = (settings[key] for key in ('model_size', 'batch_size', 'block_size'))
    vocabulary = dict(vocab_size=50260, mask_id=50258, ignore_id=50259)  # GPT-2's and the special tokens
    say(
        f"memory: model_size={model_size}, GPT-2's vocabulary, {batch_size} rows of {block_size} tokens, "
        f'{run_on.dtype}, {optimizer}; GB of 10⁹ bytes'
    )
    peaks = {}
    for architecture in ARCHITECTURES:
        for name, changes in CHECKPOINTING.items():
            with FakeTensorMode():
                trainee = Trainee(
                    architecture,
                    model_size,
                    run_on,
                    optimizer,
                    block_size=block_size,
                    **vocabulary,
                    **changes,
                )
                tokens = torch.zeros(batch_size, block_size + (architecture == 'ar'), dtype=torch.long)
                batch, beliefs = (tokens,), {}
                if architecture != 'ar':  # as data.Batches pads them, at the mean share of hidden positions
                    index = torch.arange(tokens.numel() * 9 // 16)
                    batch = tokens, None, torch.zeros(batch_size, 1 + block_size), None, index
                if architecture == 'sdd':
                    beliefs = {'k': max(K_SCHEDULE), 'depth': data.MAX_DEPTH}
                for _ in range(2):  # the first makes the moments
                    stays = memory.state_bytes(trainee.model, trainee.optimizers.values())
                    peaks[architecture, name] = trainee.peak_bytes(batch, 1, beliefs)
            say(
                f'  {architecture:10} {name:24} {peaks[architecture, name] / 1e9:6.2f}, of which weights '
                f'{stays["weights"] / 1e9:.2f} and moments {stays["moments"] / 1e9:.2f}'
            )
    if model_size != 'xl' or block_size != 1024 or batch_size != 8:
        return []
    return [
        Target(
            'GB of a step of xl with checkpointing, block 1024, batch 8, the most of all',
            max(peaks[architecture, 'each block'] for architecture in ARCHITECTURES) / 1e9,
            '<=',
            12.0,
        )
    ]
