"""What all parts of bench.py share: the machine in words, the spread of figures, and targets."""

import os
import platform
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import torch


class Target(NamedTuple):
    what: str
    value: float
    sign: str  # <= or >=
    wanted: float

    @property
    def reached(self):
        return self.value <= self.wanted if self.sign == '<=' else self.value >= self.wanted

    def __str__(self):
        return (
            f'{"reached" if self.reached else "MISSED":<8} {self.what}: {self.value:,.3f} '
            f'(wanted {self.sign} {self.wanted:,})'
        )


def say(*words):
    print(*words, flush=True)


def spread(values, form='{:.3f}'):
    """'median, least to most' of some figures."""
    return ' '.join(
        (
            form.format(statistics.median(values)) + ',',
            form.format(min(values)),
            'to',
            form.format(max(values)),
        )
    )


def describe_machine(device=None):
    """What a figure means nothing without."""
    info = Path('/proc/cpuinfo')
    names = re.findall(r'^model name\s*: (.*)', info.read_text(), re.M) if info.exists() else []
    gpu = f'{torch.cuda.get_device_name(device)}, ' if device is not None and device.type == 'cuda' else ''
    say(
        f'{gpu}{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores, '
        f'{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}'
    )
    load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else 0
    if load > 0.5:
        # A step's threads wait for each other at each operation: with one core taken, it is ten times slower.
        say(f'The load here is {load:.1f} before the start: other programs will disturb the figures.')
