"""Preparation, side by side: speed and memory of prepare/text.py and of nanoGPT's way with OpenWebText.

    python benchmarks/prepare.py --input=books.jsonl          # minutes; takes five times --megabytes of the disk

Both sides encode the same file, the documents of --input repeated up to --megabytes, by the GPT-2 vocabulary with
--num_workers processes into one flat file of uint16 per split. nanoGPT's way is that of its
data/openwebtext/prepare.py: `datasets.map` over tiktoken, then a memory map filled from the result. Each side is a
process of its own, timed from its start to its end, in pairs, so that what slows the machine down for a while slows
both down. Memory is the largest sum of the proportional set sizes (PSS) of all processes of a side. Then ours alone
prepares the sizes of --memory_at. Targets that are missed make the exit status 1.
"""

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from lm.configurator import ROOT, UserError, check_range, configure
from prepare.readers import files

input = ''  # files of documents, as prepare/text.py takes them
megabytes = 250  # size of the file that both sides prepare
num_workers = 2  # processes that encode, on both sides
runs = 3  # pairs
memory_at = '50,500'  # megabytes that ours prepares alone, to compare the memory; '' for none
side = ''  # for the script itself: run one side on --input, in this folder
config = configure(globals())
check_range(config, 1, math.inf, 'megabytes', 'num_workers', 'runs')

SECONDS_BETWEEN_LOOKS = 0.2


# ---------------------------------------------------------------------------- the two sides, each in a process


def nanogpt_way(path, folder):
    """The steps of nanoGPT's data/openwebtext/prepare.py, with a local file in place of the hub's."""
    import datasets
    import tiktoken

    encoding = tiktoken.get_encoding('gpt2')

    def encode(example):
        ids = encoding.encode_ordinary(example['text'])
        ids.append(encoding.eot_token)
        return {'ids': ids, 'len': len(ids)}

    texts = datasets.load_dataset(
        'json', data_files=path, split='train', num_proc=num_workers, cache_dir=folder
    )
    splits = texts.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    for name, encoded in splits.map(encode, remove_columns=['text'], num_proc=num_workers).items():
        total = np.sum(encoded['len'], dtype=np.uint64)
        tokens = np.memmap(f'{folder}/{name}.bin', dtype=np.uint16, mode='w+', shape=(total,))
        start, shards = 0, min(1024, len(encoded))
        for i in range(shards):
            shard = encoded.shard(num_shards=shards, index=i, contiguous=True).with_format('numpy')
            ids = np.concatenate(shard['ids'])
            tokens[start : start + len(ids)] = ids
            start += len(ids)
        tokens.flush()


def commands(path, folder):
    """For each side, its command and the token files that it leaves."""
    ours = [
        'prepare/text.py',
        f'--input={path}',
        f'--output_dir={folder}/ours',
        '--tokenizer=gpt2',
        '--val_fraction=0.01',
    ]
    theirs = ['benchmarks/prepare.py', f'--input={path}', f'--side={folder}']
    return {
        'nanoGPT': (theirs, ('train.bin', 'test.bin')),
        'ours': (ours, ('ours/train_tokens.bin', 'ours/val_tokens.bin')),
    }


# ---------------------------------------------------------------------------- measuring


def measure(name, path, workplace):
    """Seconds, seconds of all processors, peak PSS in MB and number of tokens of one side's run."""
    with tempfile.TemporaryDirectory(dir=workplace) as folder:
        command, outputs = commands(path, folder)[name]
        environment = {**os.environ, 'HF_HOME': folder, 'HF_DATASETS_OFFLINE': '1', 'PYTHONPATH': str(ROOT)}
        command = [sys.executable, ROOT / command[0], *command[1:], f'--num_workers={num_workers}']
        with open(f'{folder}/log', 'w+') as log:
            start, used, peak = time.perf_counter(), processor_seconds(), 0
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            while process.poll() is None:
                peak = max(peak, tree_pss(process.pid))
                time.sleep(SECONDS_BETWEEN_LOOKS)
            seconds, used = time.perf_counter() - start, processor_seconds() - used
            log.seek(0)
            if process.returncode:
                raise UserError(
                    f'The side of {name} ended with status {process.returncode}; repair what it says:\n'
                    f'{log.read()[-2000:]}'
                )
        return seconds, used, peak, sum(os.path.getsize(f'{folder}/{output}') // 2 for output in outputs)


def processor_seconds():
    """Of all processes that have ended; unlike the clock, it hardly minds what else the machine does."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def tree_pss(root):
    """MB of the proportional set sizes of a process and all its descendants: what they share counts once."""
    parents, total = {}, 0
    for path in Path('/proc').glob('[0-9]*/stat'):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(')')[2].split()[1])
        except OSError:  # it has ended
            pass
    for pid in parents:
        above = pid
        while above not in (root, 0, None):
            above = parents.get(above)
        if above == root:
            try:
                rollup = Path(f'/proc/{pid}/smaps_rollup').read_text()
                total += next(
                    (int(line.split()[1]) for line in rollup.splitlines() if line.startswith('Pss:')), 0
                )
            except OSError:
                pass
    return total / 1000


def write_input(path, size):
    """Writes the documents of --input, over and over, to a file of `size` megabytes. Returns its size."""
    texts = [text for text, _ in files(input, 'text').documents() if isinstance(text, str)]
    with open(path, 'wb') as file:
        for text in cycle(texts):
            file.write(json.dumps({'text': text}, ensure_ascii=False).encode() + b'\n')
            if file.tell() >= size * 1e6:
                return file.tell() / 1e6


# ---------------------------------------------------------------------------- comparing


def compare(workplace):
    """Pairs of runs over one file. Returns targets: (what, value, reached, wanted)."""
    path = f'{workplace}/input.jsonl'
    size = write_input(path, megabytes)
    print(
        f'{size:.0f} MB of JSON lines, {num_workers} processes, {os.cpu_count()} cores; '
        f'the load before is {os.getloadavg()[0]:.1f}',
        flush=True,
    )
    ratios, peaks = [], []
    for _ in range(runs):
        rates, counts = {}, {}
        for name in ('nanoGPT', 'ours'):
            seconds, used, peak, counts[name] = measure(name, path, workplace)
            rates[name] = size / seconds
            print(
                f'  {name:<8} {rates[name]:6.1f} MB/s ({seconds:.1f} s, {used:.1f} s of processors), '
                f'{counts[name]:,} tokens, peak PSS {peak:,.0f} MB',
                flush=True,
            )
        if counts['ours'] != counts['nanoGPT']:
            raise UserError(
                f'The sides wrote different numbers of tokens, {counts}, so they cannot be compared; '
                'see whether the versions of tiktoken and datasets are those that were tested.'
            )
        ratios.append(rates['ours'] / rates['nanoGPT'])
        peaks.append(peak)
        print(f'  ratio {ratios[-1]:.2f}', flush=True)
    ratio = statistics.median(ratios)
    return [
        ("our MB/s / nanoGPT's, median", ratio, ratio >= 1.5, '>= 1.5'),
        ('our peak PSS in MB, largest', max(peaks), max(peaks) <= 1500, '<= 1500'),
    ]


def compare_memory(workplace):
    """Ours alone at other sizes."""
    peaks = []
    for size in map(int, filter(None, memory_at.split(','))):
        write_input(f'{workplace}/input.jsonl', size)
        seconds, used, peak, _ = measure('ours', f'{workplace}/input.jsonl', workplace)
        peaks.append(peak)
        print(
            f'  ours at {size} MB: {size / seconds:.1f} MB/s ({used:.1f} s of processors), peak PSS {peak:,.0f} MB',
            flush=True,
        )
    spread = max(peaks) / min(peaks) - 1 if peaks else 0
    return [(f'how much our peak PSS differs at {memory_at} MB', spread, spread <= 0.1, '<= 0.1')] * (
        len(peaks) > 1
    )


def main():
    with tempfile.TemporaryDirectory(prefix='bench-') as workplace:
        targets = compare(workplace) + compare_memory(workplace)
    for what, value, reached, wanted in targets:
        print(f'{"reached" if reached else "MISSED":<8} {what}: {value:,.2f} (wanted {wanted})')
    return int(not all(reached for _, _, reached, _ in targets))


if __name__ == '__main__':
    if side:
        nanogpt_way(input, side)
    elif not Path('/proc/self/smaps_rollup').exists():
        raise UserError(
            'The memory of processes is read from /proc/PID/smaps_rollup, which is not here; use Linux.'
        )
    else:
        raise SystemExit(main())
