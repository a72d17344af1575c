"""Run a script many times: grids, zipped and random settings, on this machine or as jobs on a Slurm cluster.

    python sweep.py config/sweep_parity.py --jobs=2
    python sweep.py config/sweep_parity.py --submit=slurm --timeout=04:00:00 --cpus=16 --gpus_per_job=1

A run is named by the hash of its settings: the same command again skips what is finished and goes on with the rest.
"""

import csv
import fcntl
import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lm.configurator import ROOT, UserError, check_range, configs_of, configure, find, report_idle, require
from lm.files import write_json, writing
from lm.report import flat

# --- what to run ---
script = 'classify.py'  # what is run
experiment_name = 'sweep'  # of the folder, and of the jobs
results_root = 'out/sweeps'  # the runs are in results_root/experiment_name/
base_args = {}  # the settings of every run; None: not given
grid = {}  # key: values; every combination is run; a single value needs no list
parameters = {}  # another name of grid, which published JSON files use
zipped = {}  # key: values, as many for each key; the first of each, the second of each, ...
sampled = {}  # key: values, or (low, high), or (low, high, 'log'); num_trials random draws
num_trials = 0  # random draws
sample_seed = 0  # of these draws
languages = {}  # train: all, a language or a list, one after the other; eval: the same, together
# --- where ---
jobs = 1  # runs at the same time
gpus = ''  # 0,1: a run sees one of these; empty: all
dry_run = False  # list the runs, or write the job scripts, and stop
# --- results ---
metric = ''  # of eval_results.json: the best row has most (of losses least); empty: of validation, or test
show = ''  # more of these for the table; empty: the accuracy of each set
# --- slurm ---
submit = ''  # slurm
template = 'config/slurm.sh'  # of a job script
output_dir = ''  # of the job scripts; empty: results_root/experiment_name/jobs
timeout = '04:00:00'  # of a job
cpus = 16  # of a job
gpus_per_job = 1  # of a job
fields = {}  # what further {names} in the template stand for
config = configure(globals())

require(submit in ('', 'slurm'), f'submit is {submit!r}; the only cluster is slurm.')
check_range(config, 1, math.inf, 'jobs', 'cpus')
check_range(config, 0, math.inf, 'num_trials', 'gpus_per_job')
of_jobs = 'template output_dir timeout cpus gpus_per_job fields'
report_idle(config, 'with submit' if submit else 'without submit', 'gpus' if submit else of_jobs)
lines = [experiment_name, timeout, *map(str, fields.values())]  # of shell scripts
plain = re.fullmatch(r'\w[\w.+=-]*', experiment_name) and '\n' not in ''.join(lines)
require(plain, f'experiment_name, timeout or a field in {lines} is no plain name; write letters and digits.')
root = (Path(results_root) / experiment_name).absolute()
METRICS = 'val.accuracy', 'best_val_loss', 'test.accuracy'
OUR_OWN = {'out_dir', 'results_path', 'output_dir', 'resume_from'}  # settings that the sweep gives


def all_runs():
    """Return {name: {key: value}} of every run, without repeats and in order; the name is the hash of the rest."""
    axes = [[{key: value} for value in listed(key, values)] for key, values in {**grid, **parameters}.items()]
    runs = {}
    for parts in itertools.product([base_args], language_runs(), zipped_runs(), sampled_runs(), *axes):
        settings = {key.replace('-', '_'): value for part in parts for key, value in part.items()}
        run = {key: value for key, value in settings.items() if value is not None}
        require(OUR_OWN.isdisjoint(run), f'{", ".join(OUR_OWN)} are given by the sweep; take them out of it.')
        require('token' not in run, 'A token would stand in job scripts; set HF_TOKEN or `hf auth login`.')
        text = json.dumps([Path(script).name, run], sort_keys=True, default=str)
        runs[hashlib.sha256(text.encode()).hexdigest()[:12]] = run
    return runs


def listed(key, values):
    values = values.tolist() if hasattr(values, 'tolist') else values  # of numpy
    values = list(values) if isinstance(values, (list, tuple, range)) else [values]
    require(values, f'{key} has no values; name at least one, or leave it out.')
    return values


def zipped_runs():
    lists = [listed(key, values) for key, values in zipped.items()]
    lengths = ', '.join(f'{key} {len(values)}' for key, values in zip(zipped, lists))
    require(len(set(map(len, lists))) < 2, f'The lists in zipped have different lengths: {lengths}.')
    return [dict(zip(zipped, values)) for values in zip(*lists)] or [{}]


def sampled_runs():
    require(bool(sampled) == bool(num_trials), 'sampled and num_trials need each other; give both or none.')
    generator, trials = random.Random(sample_seed), range(num_trials)
    return [{key: draw(generator, key, values) for key, values in sampled.items()} for _ in trials] or [{}]


def draw(generator, key, values):
    """Draw one of a list of values, or a number between two bounds, rounded to four digits."""
    if isinstance(values, list) and values[-1:] == ['log']:  # YAML and JSON have no tuples
        values = tuple(values)
    if not isinstance(values, tuple):
        return generator.choice(listed(key, values))
    wrong = f'sampled[{key!r}] is {values}; write [...], (low, high), or (low, high, "log") with low above 0.'
    require(len(values) > 1 and all(isinstance(bound, (int, float)) for bound in values[:2]), wrong)
    (low, high), scale = values[:2], values[2:]
    require(low < high and (scale == () or scale == ('log',) and low > 0), wrong)
    if scale:
        return float(f'{math.exp(generator.uniform(math.log(low), math.log(high))):.4g}')
    if type(low) is type(high) is int:
        return generator.randint(low, high)
    return float(f'{generator.uniform(low, high):.4g}')


def language_runs():
    """Return languages={'train': ..., 'eval': ...} as settings; 'all' is every language that has the task."""
    if not languages:
        return [{}]
    wrong = f'languages is {languages}; it has the keys train and eval, and needs a task in base_args.'
    require(set(languages) <= {'train', 'eval'} and 'task' in base_args, wrong)
    from lm.languages import load_database  # takes a second to import

    database = load_database(base_args.get('language_database', 'config/languages.json'))
    everyone = [name for name, tasks in database.items() if base_args['task'] in tasks]
    require(everyone, f'No language has the task {base_args["task"]!r}; correct base_args.')
    chosen = {side: languages.get(side, 'all') for side in ('train', 'eval')}
    train, test = (everyone if names == 'all' else listed(side, names) for side, names in chosen.items())
    return [{'train_langs': name, 'eval_langs': ','.join(test)} for name in train]


def arguments(name):
    settings = [f'--{key}={value}' for key, value in runs[name].items() if value != '']
    return [*settings, f'--out_dir={root / name}', '--resume_from=auto']


def make_folder(path):
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def is_finished(name):
    folder = root / name
    return (folder / 'predictions.npz').exists() or (folder / 'done.json').exists() and not was_stopped(name)


def was_stopped(name):
    """Say whether a run, when it was started last, saved on a signal and ended, with status 0 too."""
    return '\nstopped at step ' in read_text(root / name / 'logs.log').rpartition('\n$ ')[2]


def start(name, gpu):
    """Start a run, which inherits its lock; or return None if another sweep, or a run that outlived one, has it."""
    folder, environment = make_folder(root / name), {'CUDA_VISIBLE_DEVICES': gpu} if gpu else {}
    with open(folder / '.lock', 'w') as lock, open(folder / 'stdout.log', 'ab') as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError:  # some file systems have no locks
            pass
        (folder / 'done.json').unlink(missing_ok=True)  # of a job that was stopped
        options = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **environment})
        options |= dict(pass_fds=[lock.fileno()], start_new_session=True)  # Ctrl-C is for the sweep alone
        return subprocess.Popen([sys.executable, script_path, *arguments(name)], **options)


def outcome(name, status):
    """Return 'done', 'stopped' or 'failed: ...' for a run that has ended; leave done.json where it is done."""
    folder = root / name
    if status == -signal.SIGTERM:  # before it could answer
        return 'stopped'
    if status:
        last = read_text(folder / 'stdout.log').strip().rpartition('\n')[2]
        return f'failed: {last[:200]} ({folder / "stdout.log"})'
    if was_stopped(name):
        return 'stopped'
    write_json(folder / 'done.json', {})
    return 'done'


def read_text(path):
    return path.read_text('utf-8', 'replace') if path.exists() else ''


def run_here():
    """Run what is not finished, `jobs` at a time, and return whether all is done."""
    waiting, running, outcomes = [name for name in runs if not is_finished(name)], {}, []
    total, sees = len(waiting), gpus.split(',')
    many = jobs if 'jobs' in config.given or not gpus else len(sees)
    free = [sees[i % len(sees)] for i in range(many)]  # a GPU is shared where there are more jobs
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    print(f'{len(runs)} runs, {len(runs) - total} of them finished before', flush=True)

    while running or waiting:
        if signals:
            print('\nstopping: the runs save and exit; once more to quit at once', file=sys.stderr)
            signals.clear()
            waiting.clear()
            for process, _ in running.values():
                process.send_signal(signal.SIGTERM)
        if waiting and free:
            name = waiting.pop(0)
            if process := start(name, free[0]):
                running[name] = process, free.pop(0)
            else:
                waiting.append(name)  # later
        time.sleep(0.05)
        for name in [name for name, (process, _) in running.items() if process.poll() is not None]:
            process, gpu = running.pop(name)
            free.append(gpu)
            outcomes.append(outcome(name, process.returncode))
            about = ' '.join(f'{key}={runs[name][key]}' for key in keys if key in runs[name])
            print(f'{len(outcomes)}/{total} {name} {about}: {outcomes[-1]}', flush=True)
    return outcomes.count('done') == total


def write_results():
    """Write results.csv, a row per finished run, and results.md, the mean ± standard deviation over seeds."""
    paths = {name: root / name / 'eval_results.json' for name in runs if is_finished(name)}
    figures = {name: read_results(path) for name, path in paths.items() if path.exists()}
    names = list(dict.fromkeys(key for values in figures.values() for key in values))
    if not figures:  # the table of another grid stays
        return print(f'\nnone of {len(runs)} runs has results')
    best_by = metric or next(filter(names.__contains__, METRICS), METRICS[0])
    if best_by == 'test.accuracy' and not metric:
        print('note: there are no validation rows, so the best row is chosen on the test rows: flattered.')
    if unknown := [name for name in (best_by, *filter(None, show.split(','))) if name not in names]:
        print(f'note: no run has {", ".join(unknown)} among its results: {", ".join(names)}')
    with open(root / 'results.csv', 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, ['run', *keys, *names], extrasaction='ignore', lineterminator='\n')
        writer.writeheader()
        writer.writerows({**runs[name], **values, 'run': name} for name, values in figures.items())

    groups, columns = {}, [key for key in keys if key not in ('seed', 'random_seed')]
    for name, values in figures.items():
        group = tuple(str(runs[name].get(key, '')) for key in columns)
        groups.setdefault(group, []).append(values)
    table = markdown_table(columns, groups, names, best_by)
    (root / 'results.md').write_text(table + '\n', 'utf-8')
    print(f'\n{table}\n\n{len(figures)} of {len(runs)} runs: {root}/results.csv, {root}/results.md')


def read_results(path):
    """Return the figures of a run; none, and a word about it, where its file is damaged."""
    try:
        figures = flat(json.loads(path.read_text('utf-8')))
        return {name: value for name, value in figures if type(value) in (int, float)}
    except (ValueError, AttributeError) as error:
        print(f'{path} is damaged ({error}); delete {path.parent}, and the run is done again.')
        return {}


def markdown_table(columns, groups, names, metric):
    """Return a table with a line for each of groups {values of columns: [figures]}, the best one in bold."""
    accuracies = [n for n in names if n.endswith('accuracy')]
    shown = (show.split(',') if show else accuracies) + [metric] * (metric in names)
    shown = list(dict.fromkeys(shown))
    means = {g: statistics.mean(row.get(metric, math.nan) for row in rows) for g, rows in groups.items()}
    mean = {group: value for group, value in means.items() if math.isfinite(value)}
    is_lower_better = any(word in metric for word in ('loss', 'nll', 'nats', 'perplexity', 'bpb'))
    best = (min if is_lower_better else max)(mean, key=mean.get, default=None)

    lines = [[*columns, 'runs', *shown], ['---'] * (len(columns) + 1 + len(shown))]
    for group, rows in groups.items():
        means = [mean_and_deviation([figures[n] for figures in rows if n in figures]) for n in shown]
        cells = [*group, str(len(rows)), *means]
        lines.append([f'**{cell}**' if group == best and cell else cell for cell in cells])
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines)


def mean_and_deviation(values):
    deviation = f' ± {statistics.stdev(values):.4f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.4f}{deviation}' if values else ''


def job_text(job_name, name):
    """Return the template with its fields filled in for a run."""
    paths = {'root': ROOT, 'cwd': Path.cwd(), 'script': script_path}
    paths |= {'log': root / name / 'stdout.log', 'done': root / name / 'done.json'}
    known = {key: shlex.quote(str(path)) for key, path in paths.items()}
    threads = max(1, cpus // max(1, gpus_per_job))  # of a process
    known |= dict(job_name=job_name, cpus=cpus, threads=threads, gpus=gpus_per_job, timeout=timeout)
    launch = f'torchrun --standalone --nproc_per_node={gpus_per_job}' if gpus_per_job > 1 else 'python'
    known |= {'launch': launch, 'args': shlex.join(arguments(name)), **fields}
    try:
        return find('template', template).read_text('utf-8').format(**known)
    except (KeyError, IndexError, ValueError) as error:
        wrong = f'{template} has a field {{{error.args[0]}}} that is none of {", ".join(known)}'
        raise UserError(f"{wrong}; give it with --fields, or write {{{{ and }}}} for the shell's.") from error


def submit_jobs():
    """Write a job script per unfinished run, and one that runs them as an array; submit that unless dry_run."""
    texts = {name: job_text(f'{experiment_name}-{name}', name) for name in runs if not is_finished(name)}
    if not texts:
        return print('all runs are finished')
    folder = make_folder(Path(output_dir).absolute() if output_dir else root / 'jobs')
    for name, text in texts.items():
        (make_folder(root / name) / 'done.json').unlink(missing_ok=True)  # of a job that was stopped
        (folder / f'{name}.sh').write_text(text, 'utf-8')

    head = [line for line in job_text(experiment_name, name).splitlines() if line.startswith('#SBATCH')]
    limit, scripts = f'%{jobs}' if 'jobs' in config.given else '', [f'{folder}/{name}.sh' for name in texts]
    head += [f'#SBATCH --array=0-{len(texts) - 1}{limit}', f'jobs=({shlex.join(scripts)})']
    path = folder / 'array.sh'
    path.write_text('\n'.join(['#!/bin/bash', *head, 'exec bash "${jobs[$SLURM_ARRAY_TASK_ID]}"\n']), 'utf-8')
    print(f'{len(runs)} runs; scripts of the unfinished ones: {path}')
    if gpus_per_job > 1:
        print(f'note: a step of {gpus_per_job} GPUs has {gpus_per_job} times as many rows as batch_size.')
    if not dry_run:
        require(shutil.which('sbatch'), f'There is no sbatch here; submit {path} where there is one.')
        answer = subprocess.run(['sbatch', path], capture_output=True, text=True)
        require(not answer.returncode, f'sbatch {path} failed: {answer.stderr.strip()}; correct {template}.')
        print(answer.stdout.strip())


script_path, runs = find('script', script), all_runs()
configs_of(script_path, map(arguments, runs))
keys = dict.fromkeys(key for run in runs.values() for key in run)
keys = [key for key in keys if len({str(run.get(key)) for run in runs.values()}) > 1]  # those that vary
if submit:
    submit_jobs()
    write_results()  # of those that are finished
elif dry_run:
    for name in runs:
        print('finished ' * is_finished(name) + shlex.join(['python', script, *arguments(name)]))
    print(f'{len(runs)} runs')
else:
    complete = run_here()
    write_results()
    sys.exit(0 if complete else 1)
