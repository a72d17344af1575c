"""How fast and how large is prepare/text.py beside nanoGPT's way with OpenWebText?

    python benchmarks/prepare.py --input=books.jsonl          # minutes; takes five times --megabytes of the disk

Both sides encode the same file, the documents of --input repeated up to --megabytes, by the GPT-2 vocabulary with
--num_workers processes into one flat file of uint16 per split. nanoGPT's way is that of its
data/openwebtext/prepare.py: `datasets.map` over tiktoken, then a memory map filled from the result. Memory is the
largest sum of the proportional set sizes (PSS) of all processes of a side.
"""

import functools
import itertools
import json
import math
import os
import re
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from benchmarks import timing
from benchmarks.timing import Target, say
from lm.configurator import ROOT, check_range, configure, require
from prepare.readers import files

input = ''  # files of documents, as prepare/text.py takes them
megabytes = 250  # size of the file that both sides prepare
num_workers = 2  # processes that encode, on both sides
runs = 3  # pairs
folder = ''  # for the script itself: be the side of nanoGPT, in this folder
config = configure(globals())

OUTPUTS = {'nanoGPT': ('train.bin', 'test.bin'), 'ours': ('ours/train_tokens.bin', 'ours/val_tokens.bin')}


def nanogpt_way():
    """Take the steps of nanoGPT's data/openwebtext/prepare.py, with a local file in place of the hub's."""
    import datasets
    import tiktoken

    encoding = tiktoken.get_encoding('gpt2')

    def encode(example):
        ids = [*encoding.encode_ordinary(example['text']), encoding.eot_token]
        return {'ids': ids, 'len': len(ids)}

    workers = dict(num_proc=num_workers)
    texts = datasets.load_dataset('json', data_files=input, split='train', cache_dir=folder, **workers)
    splits = texts.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    for name, encoded in splits.map(encode, remove_columns=['text'], **workers).items():
        total = np.sum(encoded['len'], dtype=np.uint64)
        tokens = np.memmap(f'{folder}/{name}.bin', dtype=np.uint16, mode='w+', shape=(total,))
        start, shards = 0, min(1024, len(encoded))
        for i in range(shards):
            shard = encoded.shard(num_shards=shards, index=i, contiguous=True).with_format('numpy')
            ids = np.concatenate(shard['ids'])
            tokens[start : start + len(ids)] = ids
            start += len(ids)
        tokens.flush()


def measure(side, path, results):
    """Return the seconds of a run; add its peak PSS in MB and its number of tokens to `results`."""
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        command = [ROOT / 'benchmarks/prepare.py', f'--folder={place}']
        if side == 'ours':
            words = f'--output_dir={place}/ours --tokenizer=gpt2 --val_fraction=0.01'.split()
            command = [ROOT / 'prepare/text.py', *words]
        command += [f'--input={path}', f'--num_workers={num_workers}']
        peaks, ended = [0.0], threading.Event()
        watcher = threading.Thread(target=watch_memory, args=(peaks, ended))
        watcher.start()
        try:
            done = timing.run([sys.executable, *command], HF_HOME=place, HF_DATASETS_OFFLINE='1')
        finally:
            ended.set()
            watcher.join()
        tokens = sum(os.path.getsize(f'{place}/{name}') // 2 for name in OUTPUTS[side])
    say(f'  {side}: {done.seconds:.1f} s, peak PSS {max(peaks):,.0f} MB, {tokens:,} tokens')
    results.append((side, max(peaks), tokens))
    return done.seconds


def watch_memory(peaks, ended):
    """Append the memory of all processes that this one has started, five times a second."""
    while not ended.wait(0.2):
        peaks.append(sum(map(tree_pss, children_of(os.getpid()))))


def children_of(pid):
    return ' '.join(path.read_text() for path in Path(f'/proc/{pid}/task').glob('*/children')).split()


def tree_pss(pid):
    """Return the MB of a process and all its descendants; what they share counts once."""
    try:
        pss = re.search(r'^Pss:\s+(\d+)', Path(f'/proc/{pid}/smaps_rollup').read_text(), re.M)
        return (int(pss[1]) / 1000 if pss else 0) + sum(map(tree_pss, children_of(pid)))
    except OSError:  # it has ended
        return 0


def write_input(path):
    """Write the documents of --input, over and over, to a file of --megabytes."""
    texts = [text for text, _ in files(input, 'text').documents() if isinstance(text, str)]
    with open(path, 'wb') as file:
        for text in itertools.cycle(texts):
            file.write(json.dumps({'text': text}, ensure_ascii=False).encode() + b'\n')
            if file.tell() >= megabytes * 1e6:
                return


def main():
    check_range(config, 1, math.inf, 'megabytes', 'num_workers', 'runs')
    require(
        Path('/proc/self/smaps_rollup').exists(), 'Memory is read from /proc/PID/smaps_rollup; use Linux.'
    )
    results = []
    with tempfile.TemporaryDirectory(prefix='bench-') as place:
        path = Path(place, 'input.jsonl')
        write_input(path)
        timing.describe_machine()
        sides = {side: functools.partial(measure, side, path, results) for side in OUTPUTS}
        ratio = timing.compare_rates(f'{megabytes} MB', sides, megabytes, runs, unit='MB/s')
    counts = {tokens for *_, tokens in results}
    require(
        len(counts) == 1, f'The sides wrote different numbers of tokens, {counts}: they cannot be compared.'
    )
    peak = max(peak for side, peak, _ in results if side == 'ours')
    timing.finish(
        [
            Target("our MB/s / nanoGPT's, median", ratio, '>=', 1.5),
            Target('our peak PSS in MB, largest', peak, '<=', 1500),
        ]
    )


if __name__ == '__main__':
    nanogpt_way() if folder else main()
