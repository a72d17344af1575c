"""Check a record of docs/records.md, and print its row: python benchmarks/record.py LOG

LOG: the logs.log of three runs of one command with three seeds, one after the other (docs/records.md).
"""

import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder
from lm.configurator import ROOT, SUFFIXES, configs_of, require
from model import ARCHITECTURES

TABLE = ROOT / 'docs' / 'records.md'
SECONDS, THREADS, SEEDS = 600, 2, 3
PARTS = {  # of a run's log
    'command': r'\$ python train\.py (.*)',
    'commit': r'commit (\S+), (torch .*)',
    'run': rf'.*: ({"|".join(ARCHITECTURES)}), [\d,]+ parameters, \w+ on 1 × cpu; .* of data (\w{{8}})',
    'start': r'(step 0: val/loss .*)',
    'end': r'step [1-9]\d*: val/loss ([\d.]+).*\ndone in (\d+) s of training',
}


def read_run(text):
    """Return {part: what its groups matched} of one run's log."""
    found = {}
    for name, pattern in PARTS.items():
        matches = re.findall(f'^{pattern}', text, re.M)
        require(len(matches) == 1, f'A run of the log has {len(matches)} lines like {pattern!r}, not one.')
        found[name] = matches[0]
    return found


def settings_of(command):
    """Return the words of a command without seed and folder, its seed, and all other settings of train.py."""
    words = shlex.split(command)
    (config,) = configs_of(ROOT / 'train.py', [words])
    rest = {key: value for key, value in config.items() if key not in ('seed', 'out_dir')}
    lines = '\n'.join([*words, ''])  # a word in each, so that a value may follow in the next
    kept = re.sub(r'(?m)^--(seed|random.seed|out.dir)[=\n].*\n', '', lines).splitlines()
    return kept, config['seed'], rest


def is_committed(commit, path=''):
    """Say whether the repository has a commit, and in it a file or, by '', any."""
    git = ['git', '-C', ROOT, 'cat-file', '-e', f'{commit}:{path}']
    return subprocess.run(git, capture_output=True).returncode == 0


def check(runs, data_sets):
    """Raise a UserError for runs that are no record by the rules of docs/records.md."""
    require(len(runs) == SEEDS, f'The log has {len(runs)} runs; a record is of {SEEDS}.')
    words, seeds, settings = zip(*(settings_of(run['command']) for run in runs))
    require(len(set(seeds)) == SEEDS, f'The seeds are {seeds}; give {SEEDS} that differ.')
    require(all(x == settings[0] for x in settings), f'The commands differ in more than the seed: {words}.')
    for part in ('commit', 'run'):
        found = {run[part] for run in runs}
        require(len(found) == 1, f'The runs are of different commits, machines, models or data: {found}.')
    is_fresh = not settings[0]['init_from']
    require(is_fresh, f'{shlex.join(words[0])} starts from weights; a record is from random ones.')
    require(not settings[0]['eval_tokens'], 'val/loss is over all of the split: add --eval_tokens=0.')
    (commit, machine), (_, data) = runs[0]['commit'], runs[0]['run']
    require(is_committed(commit), f'Commit {commit} is not in this repository; commit what was run.')
    for path in (word for word in words[0] if word.endswith(SUFFIXES) and not word.startswith('--')):
        require(is_committed(commit, path), f'Commit {commit} has no {path}; commit what was run.')
    threads = int(re.search(r'(\d+) of \d+ cores', machine)[1])
    require(threads <= THREADS, f'{threads} threads were used; OMP_NUM_THREADS={THREADS}.')
    require(data in data_sets, f'Data {data} is none of {data_sets}; prepare it as docs/records.md says.')
    slowest = max(int(run['end'][1]) for run in runs)
    require(slowest <= SECONDS, f'A run trained for {slowest} s; a record has {SECONDS}.')


def read_table(text):
    """Return {version: name} of the data sets, and {(architecture, name): losses by seed} of the best records."""
    data_sets = {v: name for name, v in re.findall(r'^\| (\w+) \|.*`(\w{8})` \|$', text, re.M)}
    rows = re.findall(r'^\| (\w+) \| (\w+) \| [\d.]+ \(([\d., ]+)\)', text, re.M)
    rows = [(kind, name, [float(x) for x in losses.split(', ')]) for kind, name, losses in rows]
    rows.sort(key=lambda row: -statistics.mean(row[2]))  # the last of each kind is the best
    return data_sets, {(kind, name): losses for kind, name, losses in rows}


def main():
    require(len(sys.argv) == 2, 'python benchmarks/record.py LOG')
    path = Path(sys.argv[1])
    require(path.is_file(), f'There is no file {path}; cat out/record-*/logs.log > {path}')
    text = path.read_text(encoding='utf-8', errors='replace')
    runs = [read_run('$ python' + part) for part in re.split(r'^\$ python', text, flags=re.M)[1:]]
    data_sets, best = read_table(TABLE.read_text(encoding='utf-8'))
    check(runs, data_sets)
    (commit, machine), (kind, data) = runs[0]['commit'], runs[0]['run']
    losses = sorted(float(run['end'][0]) for run in runs)
    seconds = max(int(run['end'][1]) for run in runs)
    command = shlex.join(['python', 'train.py', *settings_of(runs[0]['command'])[0]])
    figures = f'{statistics.mean(losses):.4f} ({", ".join(f"{loss:.4f}" for loss in losses)})'
    print(f'| {kind} | {data_sets[data]} | {figures} | {seconds} s | {commit} | {machine} | `{command}` |')
    old = best.get((kind, data_sets[data]))
    if old and losses[-1] >= min(old):
        sys.exit(f'no record: not each seed is below each of {old}')
    is_better = f'a record: each seed is below each of {old}, which chance gives once in twenty times'
    print(is_better if old else 'the first of its kind')


if __name__ == '__main__':
    main()
