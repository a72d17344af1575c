"""Sides measured in turn, processes that are timed, targets reached or missed: what the benchmarks share."""

import importlib.util
import os
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

from lm import log, runtime
from lm.configurator import require

CPU = torch.device('cpu')
say = partial(print, flush=True)


def finish(targets):
    """Print whether each target (name, value, '<=' or '>=', wanted) is reached; exit with status 1 if one is not."""
    all_reached = True
    for name, value, sign, wanted in targets:
        reached = value <= wanted if sign == '<=' else value >= wanted
        all_reached &= reached
        say(f'{"reached" if reached else "MISSED":<8} {name}: {value:,.3f} (wanted {sign} {wanted:,})')
    sys.exit(not all_reached)


def describe_machine(device=CPU):
    """Print the machine, and its load before the start."""
    say(f'{log.describe_machine(device)}, load {os.getloadavg()[0]:.1f}')


def alternate(sides, rounds, warmup=0):
    """Call `sides`, {name: function}, in turn; return {name: [what its calls returned]} without the warm-up rounds."""
    results = {name: [] for name in sides}  # in turn, since what slows the machine down slows all of them
    for i in range(warmup + rounds):
        for name in list(sides)[:: -1 if i % 2 else 1]:
            results[name].append(sides[name]())
    return {name: values[warmup:] for name, values in results.items()}


def timed(call, *args, **settings):
    """Return a function that makes this call on a CPU and returns the seconds that it takes."""
    return partial(runtime.seconds, partial(call, *args, **settings), CPU)


def compare_rates(title, sides, amount, rounds, warmup=0):
    """Print the rates of `sides`, {name: a call that returns the seconds for `amount` tokens}, the peer's
    first, and return the median of our rate over the peer's."""
    times = alternate(sides, rounds, warmup)
    for name, values in times.items():
        say(f'  {title}, {name}: {" · ".join(f"{amount / value:,.1f}" for value in values)} tokens/s')
    ratios = [peer / ours for peer, ours in zip(*times.values())]
    say(f'  {title}, ratio: {spread(ratios)}')
    return statistics.median(ratios)


def spread(values):
    return f'{statistics.median(values):,.2f} ({min(values):,.2f} to {max(values):,.2f})'


def load_nanogpt(peer):
    """Return the model.py of a clone of nanoGPT as a module."""
    path, remedy = Path(peer, 'model.py'), 'git clone https://github.com/karpathy/nanoGPT'
    require(peer and path.is_file(), f'--peer={peer} is no clone of nanoGPT, it has no model.py; {remedy}')
    spec = importlib.util.spec_from_file_location('nanogpt_model', path)  # `model` is the name of ours
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile looks for it there
    spec.loader.exec_module(module)
    return module
