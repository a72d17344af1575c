"""What benchmarks/classify.py promises apart from its figures."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / 'benchmarks/classify.py'


def bench(*options):
    return subprocess.run([sys.executable, BENCH, *options], capture_output=True, text=True)


@pytest.mark.slow
def test_both_sides_take_the_same_steps():
    done = bench(
        '--n_layer=1',
        '--sequence_length=8',
        '--train_set_size=20',
        '--batch_size=4',
        '--runs=2',
        '--steps=2',
        '--learning_rate=1e-4',
        '--dtype=float32',
    )
    losses = [tuple(map(float, pair)) for pair in re.findall(r'loss ([0-9.]+) and ([0-9.]+)', done.stdout)]
    assert done.returncode in (0, 1) and len(losses) == 2, done.stdout + done.stderr
    assert losses[0] != losses[1] and all(abs(theirs - ours) < 2e-3 for theirs, ours in losses)


def test_a_mistake_is_one_sentence():
    done = bench('--dtype=float31')
    assert done.returncode == 1 and done.stderr.startswith("error: dtype is 'float31'; choose ")
