"""Runs a script many times: grids, zipped and random settings, on this machine or as jobs on a Slurm cluster.

    python sweep.py config/sweep_parity.py --jobs=2
    python sweep.py config/sweep_parity.py --submit=slurm --timeout=04:00:00 --cpus=16 --gpus_per_job=1

A run is named by the hash of its settings: the same command again skips what is finished and goes on with the rest.
"""

import ast
import csv
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lm.configurator import ROOT, UserError, check_choice, check_range, configure

# --- what to run ---
script = 'classify.py'
experiment_name = 'sweep'
results_root = 'out/sweeps'  # the runs are in results_root/experiment_name/
base_args = {}  # the settings of every run; None: not given
grid = {}  # key: values; every combination is run
parameters = {}  # more of the same; a single value needs no list
zipped = {}  # key: values, as many for each key; the first of each, the second of each, ...
sampled = {}  # key: values, or (low, high), or (low, high, 'log'); num_trials random draws
num_trials = 0
sample_seed = 0  # of these draws
languages = {}  # train: all, a language or a list, one after the other; eval: the same, together
# --- where ---
jobs = 1  # runs at the same time
gpus = ''  # 0,1: a run sees one of these; empty: all
dry_run = False  # list the runs, or write the job scripts, and stop
# --- results ---
metric = 'test.accuracy'  # of eval_results.json, with dots between names: the best row is by this
lower_is_better = False
show = ''  # more of these for the table; empty: the accuracy of each set
# --- slurm ---
submit = ''  # slurm
template = 'config/slurm.sh'
output_dir = ''  # of the job scripts; empty: results_root/experiment_name/jobs
timeout = '04:00:00'
cpus = 16
gpus_per_job = 1
fields = {}  # what further {names} in the template stand for
config = configure(globals())

check_choice(config, 'submit', ('', 'slurm'))
check_range(config, 1, math.inf, 'jobs', 'cpus')
check_range(config, 0, math.inf, 'num_trials', 'gpus_per_job')
STOPPED = 'stopped at'  # how the last line of a run's log begins that saved on a signal


def write(path, text):
    """Writes a file, complete or not at all."""
    beside = path.with_name(path.name + '.tmp')
    beside.write_text(text)
    os.replace(beside, path)


# ---------------------------------------------------------------------------- the runs


def plain(value):
    """A value as it is meant: YAML reads 1e-5 as a text."""
    if isinstance(value, str):
        try:
            number = ast.literal_eval(value)
            return number if type(number) in (int, float) else value
        except (ValueError, SyntaxError):
            return value
    return value


def listed(key, values):
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    if not values:
        raise UserError(f'{key} has no values; name at least one, or leave it out.')
    return values


def combinations(axes):
    names = list(axes)
    return [
        dict(zip(names, values)) for values in itertools.product(*(listed(key, axes[key]) for key in names))
    ]


def zips():
    lists = {key: listed(key, values) for key, values in zipped.items()}
    if len({len(values) for values in lists.values()}) > 1:
        raise UserError(
            'The lists in zipped have different lengths: '
            + ', '.join(f'{key} {len(values)}' for key, values in lists.items())
            + '.'
        )
    return [dict(zip(lists, values)) for values in zip(*lists.values())] or [{}]


def trials():
    if bool(sampled) != bool(num_trials):
        raise UserError('sampled and num_trials need each other: what to draw from, and how often.')
    draws = random.Random(sample_seed)
    return [
        {key: draw(draws, key, values) for key, values in sampled.items()} for _ in range(num_trials)
    ] or [{}]


def draw(draws, key, values):
    if (
        isinstance(values, tuple)
        and len(values) in (2, 3)
        and all(type(v) in (int, float) for v in values[:2])
    ):
        low, high, *kind = values
        if kind == ['log'] and 0 < low < high:
            return float(f'{math.exp(draws.uniform(math.log(low), math.log(high))):.4g}')
        if not kind and low < high:
            return (
                draws.randint(low, high)
                if type(low) is type(high) is int
                else float(f'{draws.uniform(low, high):.4g}')
            )
        raise UserError(
            f'sampled[{key!r}] is {values}; write (low, high), or (low, high, "log") with low above 0.'
        )
    return draws.choice(listed(key, values))


def language_runs():
    """languages={'train': ..., 'eval': ...} as settings; 'all' is every language that has the task."""
    if not languages:
        return [{}]
    if not set(languages) <= {'train', 'eval'} or 'task' not in base_args:
        raise UserError(
            f'languages is {languages}; it has the keys train and eval, and needs a task in base_args.'
        )
    from lm.languages import load_database  # takes a second to import

    known = load_database(base_args.get('language_database', 'config/languages.py'))
    everyone = [name for name, entries in known.items() if base_args['task'] in entries]
    train, test = (
        everyone if languages.get(side, 'all') == 'all' else listed(side, languages[side])
        for side in ('train', 'eval')
    )
    return [{'train_langs': name, 'eval_langs': ','.join(test)} for name in train]


def all_runs():
    """The settings of every run, {key: value}, without repeats and in order."""
    axes = {**grid, **parameters}
    runs = [
        {**base_args, **a, **b, **c, **d}
        for a in language_runs()
        for b in zips()
        for c in trials()
        for d in combinations(axes)
    ]
    runs = [
        {key.replace('-', '_'): plain(value) for key, value in run.items() if value is not None}
        for run in runs
    ]
    for run in runs:
        if {'out_dir', 'results_path', 'output_dir', 'resume_from'} & set(run):
            raise UserError('out_dir and resume_from are given by the sweep; take them out of its settings.')
    return list({identity(run): run for run in runs}.items())


def identity(run):
    """Twelve letters that stand for the script and its settings."""
    try:
        text = json.dumps([Path(script).name, run], sort_keys=True)
    except TypeError as error:
        raise UserError(f'{run} cannot be written down ({error}); use numbers, texts and lists.') from error
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def arguments(name, run):
    return [
        *(f'--{key}={value}' for key, value in run.items()),
        f'--out_dir={root / name}',
        '--resume_from=auto',
    ]


def varying(runs):
    """The keys that not all runs have the same value of."""
    keys = dict.fromkeys(key for _, run in runs for key in run)
    return [key for key in keys if len({json.dumps(run.get(key)) for _, run in runs}) > 1]


def describe(run, keys):
    return ' '.join(f'{key}={run[key]}' for key in keys if key in run) or 'the only run'


def is_finished(name):
    """done.json is what this script and the job scripts leave; predictions.npz is the last that classify.py writes."""
    return any((root / name / file).exists() for file in ('done.json', 'predictions.npz'))


# ---------------------------------------------------------------------------- on this machine


def take(folder):
    """The open lock of a run, or None where another process has it: a sweep, or a run that outlived its sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / '.lock', 'w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except OSError:
        lock.close()


def start(name, run, gpu):
    """Starts a run that nobody else is at; its process inherits the lock, so that it is held while it lives."""
    folder = root / name
    lock = take(folder)
    if lock is None:
        return None
    write(folder / 'run.json', json.dumps({'script': script, 'args': run}))
    environment = {**os.environ, **({'CUDA_VISIBLE_DEVICES': gpu} if gpu else {})}
    with lock, open(folder / 'stdout.log', 'a') as log:
        return subprocess.Popen(
            [sys.executable, script_path, *arguments(name, run)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )  # Ctrl-C is for the sweep, which tells its runs


def last_line(path):
    lines = path.read_text(errors='replace').split('\n') if path.exists() else []
    return next((line for line in reversed(lines) if line.strip()), '')


def conclude(name, process, started):
    """Notes that a run is done; returns what to say about it."""
    folder = root / name
    if process.returncode == 0 and not last_line(folder / 'logs.log').startswith(STOPPED):
        write(folder / 'done.json', json.dumps({'seconds': round(time.time() - started, 1)}))
        return 'done'
    if process.returncode == 0:
        return 'stopped'
    return f'failed: {last_line(folder / "stdout.log")[:200]} ({folder / "stdout.log"})'


class Stop:
    """The first Ctrl-C or SIGTERM asks the runs to save and exit, a second one to exit at once."""

    def __init__(self):
        self.count, self.running = 0, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.count += 1
        os.write(2, b'\nstopping: the runs save and exit; once more to quit at once\n')
        for process, *_ in self.running.values():
            process.send_signal(signal.SIGTERM)


def run_here(runs, keys):
    """Runs what is not finished, `jobs` at a time; returns whether all is done."""
    stop, waiting, free = (
        Stop(),
        [item for item in runs if not is_finished(item[0])],
        gpus.split(',') if gpus else [],
    )
    total, done = len(waiting), 0
    print(f'{len(runs)} runs, {len(runs) - total} of them finished before', flush=True)
    failed, begun = 0, time.time()
    while waiting and not stop.count or stop.running:
        while waiting and not stop.count and len(stop.running) < jobs and (free or not gpus):
            name, run = waiting.pop(0)
            gpu = free.pop(0) if free else None
            process = start(name, run, gpu)
            if process is None:  # somebody else is at it: later
                waiting.append((name, run))
                free += [gpu] if gpu else []
                break
            stop.running[name] = process, run, gpu, time.time()
            if stop.count:
                process.send_signal(signal.SIGTERM)  # it came while the process started
        time.sleep(0.05)
        for name, (process, run, gpu, started) in list(stop.running.items()):
            if process.poll() is None:
                continue
            del stop.running[name]
            free += [gpu] if gpu else []
            verdict = conclude(name, process, started)
            done, failed = done + (verdict == 'done'), failed + verdict.startswith('failed')
            left = (time.time() - begun) / 60 / max(1, done + failed) * (total - done - failed)
            print(
                f'{done + failed}/{total} {name} {describe(run, keys)}: {verdict}; {left:.0f} min left',
                flush=True,
            )
    if failed:
        print(f'{failed} runs failed; the same command tries them again', flush=True)
    return done == total


# ---------------------------------------------------------------------------- results


def figures(folder):
    """The numbers of a run's eval_results.json, nested names joined by dots."""
    path = folder / 'eval_results.json'
    found = {}

    def collect(prefix, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f'{prefix}.{key}' if prefix else key, inner)
        elif type(value) in (int, float):
            found[prefix] = value

    collect('', json.loads(path.read_text()) if path.exists() else {})
    return found


def write_results(runs, keys):
    """results.csv with a row per finished run, and results.md: the mean ± standard deviation over seeds."""
    rows = [(name, run, figures(root / name)) for name, run in runs if is_finished(name)]
    names = list(dict.fromkeys(key for *_, values in rows for key in values))
    table_of_runs = io.StringIO()
    writer = csv.writer(table_of_runs, lineterminator='\n')
    writer.writerow(['run', *keys, *names])
    writer.writerows(
        [name, *(run.get(key, '') for key in keys), *(values.get(key, '') for key in names)]
        for name, run, values in rows
    )
    write(root / 'results.csv', table_of_runs.getvalue())
    text = table(rows, [key for key in keys if key != 'seed'], names)
    write(root / 'results.md', text + '\n')
    print(
        f'\n{text}\n\n{len(rows)} of {len(runs)} runs: {root / "results.csv"}, {root / "results.md"}',
        flush=True,
    )


def table(rows, keys, names):
    shown = [name for name in show.split(',') if name] or [
        name for name in names if name.endswith('accuracy') and not name.startswith('compare_to')
    ]
    shown = list(dict.fromkeys([*shown, *([metric] if metric in names else [])]))
    groups = {}
    for _, run, values in rows:
        groups.setdefault(tuple(str(run.get(key, '')) for key in keys), []).append(values)
    sign = -1 if lower_is_better else 1
    scores = {
        group: sign * statistics.mean(value[metric] for value in values)
        for group, values in groups.items()
        if all(metric in value for value in values)
    }
    best = max(scores, key=scores.get, default=None)
    lines = ['| ' + ' | '.join([*keys, 'runs', *shown]) + ' |', '|' + '---|' * (len(keys) + 1 + len(shown))]
    for group, values in groups.items():
        cells = [
            *group,
            str(len(values)),
            *(spread([v[name] for v in values if name in v]) for name in shown),
        ]
        lines.append(
            '| ' + ' | '.join(f'**{cell}**' if group == best and cell else cell for cell in cells) + ' |'
        )
    return '\n'.join(lines)


def spread(values):
    if not values:
        return ''
    deviation = f' ± {statistics.stdev(values):.4f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.4f}{deviation}'


# ---------------------------------------------------------------------------- slurm


def fill(text, values):
    try:
        return text.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f'The template {template} has a field {{{str(error).strip(chr(39))}}} that nothing fills; '
            f'known are {", ".join(values)}, and what --fields names. Write {{{{ and }}}} for the braces '
            'of the shell.'
        ) from error


def write_jobs(runs):
    """A job script per unfinished run, from the template, and one that submits them as an array; its path."""
    path = next((folder / template for folder in (Path.cwd(), ROOT) if (folder / template).is_file()), None)
    if path is None:
        raise UserError(f'There is no template {template}; correct the path.')
    folder = Path(output_dir).absolute() if output_dir else root / 'jobs'
    common = {
        'cpus': cpus,
        'gpus': gpus_per_job,
        'timeout': timeout,
        'root': shlex.quote(str(ROOT)),
        'script': shlex.quote(str(script_path)),
        **fields,
    }
    text, scripts = path.read_text(), []
    filled = {
        name: fill(
            text,
            {
                'job_name': f'{experiment_name}-{name}',
                'args': shlex.join(arguments(name, run)),
                'done': shlex.quote(str(root / name / 'done.json')),
                'log': shlex.quote(str(root / name / 'stdout.log')),
                **common,
            },
        )
        for name, run in runs
        if not is_finished(name)
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, job in filled.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        write(root / name / 'run.json', json.dumps({'script': script, 'args': dict(runs)[name]}))
        scripts.append(folder / f'{name}.sh')
        scripts[-1].write_text(job)
    if not scripts:
        return None
    head = [
        line.replace(f'{experiment_name}-{next(iter(filled))}', experiment_name)
        for line in next(iter(filled.values())).splitlines()
        if line.startswith('#SBATCH')
    ]
    limit = f'%{jobs}' if 'jobs' in config.given else ''
    lines = [
        '#!/bin/bash',
        *head,
        f'#SBATCH --array=0-{len(scripts) - 1}{limit}',
        'jobs=(',
        *(f'    {shlex.quote(str(path))}' for path in scripts),
        ')',
        'exec bash "${jobs[$SLURM_ARRAY_TASK_ID]}"',
        '',
    ]
    (folder / 'array.sh').write_text('\n'.join(lines))
    return folder / 'array.sh'


def submit_array(path):
    try:
        answer = subprocess.run(['sbatch', str(path)], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(
            f'There is no sbatch on this machine; copy the repository to the cluster and submit {path} '
            'there, or run here without --submit.'
        ) from error
    if answer.returncode:
        raise UserError(f'sbatch {path} failed: {answer.stderr.strip()}; correct {template}.')
    print(answer.stdout.strip())


# ---------------------------------------------------------------------------- from top to bottom

root = (Path(results_root) / experiment_name).absolute()
script_path = next((folder / script for folder in (Path.cwd(), ROOT) if (folder / script).is_file()), None)
if script_path is None:
    raise UserError(f'There is no script {script!r} in {Path.cwd()} or {ROOT}; correct it.')
runs = all_runs()
keys = varying(runs)
if submit:
    path = write_jobs(runs)
    print(
        f'{len(runs)} runs; job scripts for the unfinished ones: {path}' if path else 'all runs are finished'
    )
    if path and not dry_run:
        submit_array(path)
elif dry_run:
    for name, run in runs:
        print(
            ('finished ' if is_finished(name) else '') + shlex.join(['python', script, *arguments(name, run)])
        )
    print(f'{len(runs)} runs')
else:
    complete = run_here(runs, keys)
    write_results(runs, keys)
    sys.exit(0 if complete else 1)
