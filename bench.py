"""Speed, side by side: how fast a model learns, trains and writes here, and in a clone of nanoGPT.

    git clone https://github.com/karpathy/nanoGPT && python prepare/shakespeare.py
    python bench.py --what=compare --peer=nanoGPT                       # a quarter of an hour on two idle cores
    python bench.py --what=compare --peer=nanoGPT --only=work --runs=9
    python bench.py --what=train --dataset=stories --mode=documents --block_size=160 --batch_size=24
    python bench.py --what=memory --model_size=xl --block_size=1024 --batch_size=8 --dtype=bfloat16
    python bench.py --what=data --dataset=stories

compare   against nanoGPT, on the CPU: see benchmarks/compare.py
train     training steps of the three architectures on one data set and shape, one after the other in turn, on any
          device: milliseconds, tokens per second, the share of the machine's own matrix speed (MFU), peak memory, and
          each one's time over that of the one before it; the steps of `sdd` by the passes before them
sample    text beside nanoGPT's sample.py; benchmarks/sample.py has more
data      batches per second, without a model
memory    what a training step allocates, without computing it: any shape on any machine
gpu       all figures for a GPU, with --peer=, in ten minutes: see benchmarks/gpu.py

Raw figures come as they are measured, then each target, reached or missed; a missed one makes the exit
status 1. Other programs on the machine disturb the figures, ratios of pairs the least.
"""

import math

from benchmarks.timing import say
from lm import optim
from lm.configurator import check_choice, check_range, configure

# --- what to measure ---
what = 'compare'  # compare, train, sample, data, memory, gpu
peer = ''  # compare, gpu: path of a clone of nanoGPT, which is only read
only = 'learn,work,cache'  # compare: its parts
dataset = 'shakespeare_char'  # as prepare/shakespeare.py writes it: a name under data/, or a path
# --- what train, data and memory measure ---
mode = 'packed'  # packed, documents
model_size = 'tiny'
block_size = 128
batch_size = 32
optimizer = 'muon'  # adamw or muon
steps = 60  # timed steps of each architecture, after warm-up
device = 'auto'
dtype = 'auto'
# --- how long; less than the defaults is a rehearsal ---
runs = 5  # pairs of runs of work and of cache; repeats of data
peer_steps = 2000  # learn: steps of the peer's recipe
short_steps = 240  # learn: steps of our run to the peer's loss, warm-up and decay included
work_steps = 300  # work: steps of each run; the 10M model makes a tenth of them
warmup_steps = 50  # steps at the start of each run that no rate includes; likewise
new_tokens = 500  # cache: tokens written
config = configure(globals())


# ---------------------------------------------------------------------------- main


def part():
    """The function that measures what is asked for; of its module alone are the imports paid."""
    if what == 'compare':
        from benchmarks import compare

        return compare.compare
    if what == 'sample':
        from benchmarks import sample

        return lambda config: sample.measure(peer=peer, runs=runs)
    if what == 'gpu':
        from benchmarks import gpu

        return gpu.measure
    from benchmarks import train

    return {'train': train.train, 'data': train.read_data, 'memory': train.measure_memory}[what]


if __name__ == '__main__':
    check_choice(config, 'what', ('compare', 'train', 'sample', 'data', 'memory', 'gpu'))
    check_choice(config, 'optimizer', optim.OPTIMIZERS)
    check_range(config, 1, math.inf, 'runs', 'batch_size', 'block_size')
    check_range(config, 10, math.inf, 'steps')
    results = part()(config)
    if results:
        say('targets')
    for result in results:
        say(f'  {result}')
    raise SystemExit(0 if all(result.reached for result in results) else 1)
