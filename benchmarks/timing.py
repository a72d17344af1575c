"""Sides measured in turn, processes that are timed, targets reached or missed: what the benchmarks share."""

import functools
import importlib.util
import operator
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from lm.configurator import require
from lm.runtime import synchronize

CPU = torch.device('cpu')
COMPARISONS = {'<=': operator.le, '>=': operator.ge}
say = functools.partial(print, flush=True)


def finish(*targets):
    """Print each target (name, value, sign, wanted), reached or MISSED; exit with status 1 if one is missed."""
    reached = [COMPARISONS[sign](value, wanted) for _, value, sign, wanted in targets]
    for (name, value, sign, wanted), is_reached in zip(targets, reached):
        verdict = 'reached' if is_reached else 'MISSED'
        say(f'{verdict:<8} {name}: {value:,.3f} (wanted {sign} {wanted:,})')
    sys.exit(not all(reached))


def describe_machine(device=CPU):
    """Print the GPU where one is used, the processor, the versions, and the load before the start."""
    info = Path('/proc/cpuinfo')
    names = re.findall(r'^model name\s*: (.*)', info.read_text(), re.M) if info.exists() else []
    gpu = f'{torch.cuda.get_device_name(device)}, ' if device.type == 'cuda' else ''
    cpu = f'{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads'
    versions = f'torch {torch.__version__}, Python {platform.python_version()}'
    say(f'{gpu}{cpu}, {versions}, load {os.getloadavg()[0]:.1f}')


def seconds(call, device=CPU):
    """Return the seconds that `call` takes, its work on the device included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def alternate(sides, rounds, warmup=0):
    """Call `sides`, {name: function}, in turn and return {name: [what its calls returned]}.

    So what slows the machine down for a while slows all of them down. Every second round is the other way round, and
    the first `warmup` rounds are left out.
    """
    results = {name: [] for name in sides}
    for i in range(warmup + rounds):
        for name in list(sides)[:: -1 if i % 2 else 1]:
            results[name].append(sides[name]())
    return {name: values[warmup:] for name, values in results.items()}


def compare_rates(title, sides, amount, rounds, warmup=0):
    """Return the median of our rate over the peer's; print both, in tokens per second.

    sides: {name: function that returns the seconds for `amount` tokens}, the peer's first.
    """
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
    path, remedy = Path(peer, 'model.py'), 'make one: git clone https://github.com/karpathy/nanoGPT'
    require(peer and path.is_file(), f'--peer={peer} is no clone of nanoGPT, it has no model.py; {remedy}')
    spec = importlib.util.spec_from_file_location('nanogpt_model', path)  # `model` is the name of ours
    module = sys.modules[spec.name] = importlib.util.module_from_spec(
        spec
    )  # torch.compile looks for it there
    spec.loader.exec_module(module)
    return module


def run(command, folder=None):
    """Run a command to its end; return its lines as (seconds since the start, text), and the seconds it took."""
    lines, start, environment = [], time.perf_counter(), {**os.environ, 'PYTHONUNBUFFERED': '1'}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace')
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line.rstrip()))
    last = '\n'.join(line for _, line in lines[-9:])
    require(process.returncode == 0, f'`{" ".join(map(str, command))}` failed; repair what it says:\n{last}')
    return lines, time.perf_counter() - start


def seconds_per_step(lines, warmup):
    """Return the seconds per step after the first `warmup`, by the clock at which lines of progress came.

    It is the same measure for both sides and holds all that a step of the loop does, logging included.
    """
    matches = [(re.match(r'(?:iter|step) (\d+)(?:/\d+)?: loss', line), at) for at, line in lines]
    progress = [(int(match[1]), at) for match, at in matches if match and int(match[1]) >= warmup]
    require(len(progress) > 1, f'{len(progress)} lines of progress after {warmup} steps; give more steps.')
    (first, start), (last, end) = progress[0], progress[-1]
    return (end - start) / (last - first)
