"""What the benchmarks share: sides measured in turn, processes that are timed, targets reached or missed."""

import functools
import importlib.util
import os
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import torch

from lm.configurator import require
from lm.runtime import synchronize

CPU = torch.device('cpu')
say = functools.partial(print, flush=True)


class Target(NamedTuple):
    name: str
    value: float
    sign: str  # <= or >=
    wanted: float

    @property
    def reached(self):
        return self.value <= self.wanted if self.sign == '<=' else self.value >= self.wanted


def finish(targets):
    """Print each target, reached or MISSED, and exit with status 1 if one is missed."""
    for target in targets:
        verdict = 'reached' if target.reached else 'MISSED'
        say(f'{verdict:<8} {target.name}: {target.value:,.3f} (wanted {target.sign} {target.wanted:,})')
    raise SystemExit(not all(target.reached for target in targets))


def describe_machine(device=CPU):
    """Print the GPU where one is used, the processor, the versions, and the load before the start."""
    info = Path('/proc/cpuinfo')
    names = re.findall(r'^model name\s*: (.*)', info.read_text(), re.M) if info.exists() else []
    gpu = f'{torch.cuda.get_device_name(device)}, ' if device.type == 'cuda' else ''
    say(
        f'{gpu}{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} '
        f'threads, torch {torch.__version__}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}'
    )


# ---------------------------------------------------------------------------- sides in turn


def alternate(sides, rounds, warmup=0):
    """Call `sides`, {name: function}, in turn and return {name: [what its calls returned]}.

    So what slows the machine down for a while slows all of them down. Every second round is the other way round, and
    the first `warmup` rounds are left out.
    """
    results = {name: [] for name in sides}
    for i in range(warmup + rounds):
        for name in list(sides)[:: -1 if i % 2 else 1]:
            result = sides[name]()
            if i >= warmup:
                results[name].append(result)
    return results


def compare_rates(title, sides, amount, rounds, warmup=0, unit='tokens/s'):
    """Return the median of our rate over the peer's; print both, amount / seconds.

    sides: {name: function that returns seconds}, the peer's first.
    """
    times = alternate(sides, rounds, warmup)
    for name, values in times.items():
        say(f'  {title}, {name}: {" · ".join(f"{amount / value:,.1f}" for value in values)} {unit}')
    ratios = [peer / ours for peer, ours in zip(*times.values())]
    say(f'  {title}, ratio: {spread(ratios)}')
    return statistics.median(ratios)


def spread(values):
    return f'{statistics.median(values):,.2f} ({min(values):,.2f} to {max(values):,.2f})'


def seconds(call, device=CPU):
    """Return the seconds that `call` takes, its work on the device included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


# ---------------------------------------------------------------------------- peers and processes


def find_peer(peer, name, origin):
    """Return the path of a file of a peer's clone."""
    path = Path(peer, name)
    remedy = f'give the path of one, made with: git clone https://github.com/{origin}'
    require(peer and path.is_file(), f'--peer={peer} is no clone of {origin}, it has no {name}; {remedy}')
    return path


def load_nanogpt(peer):
    """Return the model.py of a clone of nanoGPT as a module, under a name that none of ours has."""
    path = find_peer(peer, 'model.py', 'karpathy/nanoGPT')
    spec = importlib.util.spec_from_file_location('nanogpt_model', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Finished(NamedTuple):
    lines: list  # of (seconds since the start, line of output)
    seconds: float
    peak_mb: float  # the largest resident size of the process, or of this one when it started it


def run(command, folder=None, **environment):
    """Run a command to its end, in `folder`."""
    command, lines, start = [str(word) for word in command], [], time.perf_counter()
    environment = {**os.environ, 'PYTHONUNBUFFERED': '1', **environment}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8', errors='replace')
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line.rstrip()))
        _, process.returncode, usage = os.wait4(process.pid, 0)
    said = '\n'.join(line for _, line in lines[-9:])
    require(process.returncode == 0, f'`{" ".join(command)}` failed; repair what it says:\n{said}')
    return Finished(lines, time.perf_counter() - start, usage.ru_maxrss / 1000)


def seconds_per_step(lines, warmup):
    """Return the seconds from step to step of a run, by the clock at which its lines of progress came.

    It is the same measure for both sides and holds all that a step of the loop does, logging included. Steps before
    `warmup` are left out; evaluation lies before or after the lines.
    """
    matches = [(re.match(r'(?:iter|step) (\d+)(?:/\d+)?: loss', line), at) for at, line in lines]
    progress = [(int(match[1]), at) for match, at in matches if match and int(match[1]) >= warmup]
    too_few = (
        f'{len(progress)} lines of progress after {warmup} steps of warm-up are too few; give more steps.'
    )
    require(len(progress) > 1, too_few)
    (first, start), (last, end) = progress[0], progress[-1]
    return (end - start) / (last - first)
