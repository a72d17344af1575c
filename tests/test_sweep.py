"""sweep.py: which runs a file means, runs that are killed and go on, results, job scripts for Slurm."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A script as the sweep knows them: it goes on with what it finds, saves on SIGTERM, and says when it was stopped.
WORKER = """
import json, os, pathlib, signal, sys, time
args = dict(word[2:].split('=', 1) for word in sys.argv[1:])
out = pathlib.Path(args['out_dir'])
(out / 'config.json').write_text(json.dumps(args))
if (out / 'eval_results.json').exists():
    sys.exit()
if args.get('fails') == 'once' and not (out / 'tried').exists():
    (out / 'tried').touch()
    sys.exit('error: no luck')
def stop(number, frame):
    (out / 'logs.log').write_text('step 1\\nstopped at step 1 of 2\\n   a picture\\n')
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(out / 'started').touch()
(out / 'gpu').write_text(os.environ.get('CUDA_VISIBLE_DEVICES', ''))
time.sleep(float(args.get('seconds', 0.3)) if not (out / 'logs.log').exists() else 0)
(out / 'logs.log').write_text('done\\n')
with open(out / 'work', 'a') as file:
    file.write('once')
accuracy = float(args['lr']) * int(args['seed'])
(out / 'eval_results.json').write_text(json.dumps({'step': 3, 'test': {'accuracy': accuracy, 'loss': accuracy}}))
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER)
    return tmp_path


def start(place, file, *options, **environment):
    return subprocess.Popen(
        [sys.executable, ROOT / 'sweep.py', file, f'--results_root={place}', *options],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def sweep(place, file, *options, **environment):
    process = start(place, file, *options, **environment)
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


def write(place, name, **settings):
    (place / name).write_text(
        '\n'.join(
            f'{key} = {value!r}'
            for key, value in {'script': 'worker.py', 'experiment_name': 'try', **settings}.items()
        )
    )
    return name


def rows(place):
    with open(place / 'try' / 'results.csv', newline='') as file:
        return list(csv.DictReader(file))


def wait_until(true, seconds=60):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, 'it never came'
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_no_run_is_done_twice(place):
    file = write(place, 'twelve.py', grid={'seed': [1, 2, 3, 4], 'lr': [0.1, 0.2, 0.3]})
    killed = start(place, file, '--jobs=2')
    wait_until(lambda: len(list(place.glob('try/*/done.json'))) >= 3)
    killed.kill()  # its two runs live on: the next sweep waits for them
    killed.wait()
    status, output = sweep(place, file, '--jobs=2')
    assert status == 0 and len(rows(place)) == 12
    assert [work.read_text() for work in place.glob('try/*/work')] == ['once'] * 12
    assert '12 of them finished before' in sweep(place, file)[1]
    assert {(row['seed'], row['lr']): float(row['test.accuracy']) for row in rows(place)}[
        '3', '0.2'
    ] == 0.2 * 3
    folder = place / 'try' / rows(place)[0]['run']
    assert (folder / 'stdout.log').exists() and json.loads((folder / 'config.json').read_text())[
        'lr'
    ] == '0.1'


@pytest.mark.faults
def test_each_gpu_that_is_named_has_a_run_unless_jobs_says_otherwise(place):
    file = write(
        place, 'two.py', base_args={'lr': 0.1, 'seconds': 1}, grid={'random_seed': [1, 2], 'seed': [1]}
    )
    assert sweep(place, file, '--gpus=6,7')[0] == 0
    assert {path.read_text() for path in place.glob('try/*/gpu')} == {'6', '7'}
    assert (
        (place / 'try' / 'results.md').read_text().splitlines()[-1].startswith('| **2** |')
    )  # both runs in a row


def test_the_table_has_mean_and_deviation_over_seeds_and_the_best_row(place):
    file = write(place, 'six.py', base_args={'seconds': 0}, grid={'seed': [1, 2, 3], 'lr': [0.1, 0.2]})
    status, output = sweep(place, file, '--jobs=3', '--gpus=6,7')
    assert (
        status == 0 and 'note: there are no validation rows, so the best row is chosen on the test' in output
    )
    assert {path.read_text() for path in place.glob('try/*/gpu')} == {
        '6',
        '7',
    }  # one for each of two at a time
    table = (place / 'try' / 'results.md').read_text()
    assert '| 0.1 | 3 | 0.2000 ± 0.1000 |' in table and '| **0.2** | **3** | **0.4000 ± 0.2000** |' in table
    assert sweep(place, file, '--metric=test.loss', '--show=test.loss')[0] == 0  # of which the best has least
    assert '| **0.1** | **3** |' in (place / 'try' / 'results.md').read_text()
    for path in place.glob('try/*/eval_results.json'):  # with validation rows, which choose
        results = json.loads(path.read_text())
        path.write_text(json.dumps({**results, 'val': {'accuracy': -results['test']['accuracy']}}))
    output = sweep(place, file)[1]
    assert '| **0.1** | **3** |' in output and 'on the test rows' not in output
    path = next(place.glob('try/*/eval_results.json'))
    path.write_text(path.read_text().replace('0.1', 'NaN').replace('0.2', 'NaN'))
    output = sweep(place, file, '--metric=test.acuracy')[1]
    assert 'note: no run has test.acuracy among its results' in output and '**' not in output


@pytest.mark.faults
def test_a_grid_without_results_leaves_the_table_of_another(place):
    assert (
        sweep(place, write(place, 'good.py', base_args={'seconds': 0, 'lr': 0.5}, grid={'seed': [1]}))[0] == 0
    )
    table = (place / 'try/results.md').read_text()
    status, output = sweep(place, write(place, 'bad.py', base_args={'seconds': 0}, grid={'fails': ['once']}))
    assert status == 1 and 'none of 1 runs has results' in output
    assert (place / 'try/results.md').read_text() == table


def test_what_failed_is_named_and_tried_again(place):
    file = write(
        place, 'two.py', base_args={'lr': 1, 'seconds': 0}, zipped={'seed': [1, 2], 'fails': ['once', 'no']}
    )
    status, output = sweep(place, file)
    assert status == 1 and 'failed: error: no luck' in output and len(rows(place)) == 1
    assert sweep(place, file)[0] == 0 and len(rows(place)) == 2


def test_ctrl_c_lets_the_runs_save_and_the_next_sweep_goes_on(place):
    file = write(place, 'long.py', base_args={'lr': 1, 'seconds': 100}, grid={'seed': [1, 2]})
    process = start(place, file)
    wait_until(lambda: list(place.glob('try/*/started')))
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and 'stopped' in output and not list(place.glob('try/*/done.json'))
    assert len(list(place.glob('try/*/started'))) == 1 and 'Traceback' not in output
    [stopped] = place.glob('try/*/logs.log')
    stopped.with_name('started').unlink()
    (place / file).write_text((place / file).read_text().replace('[1, 2]', '[1]'))
    assert sweep(place, file)[0] == 0 and len(rows(place)) == 1


def lines(place, name, *options):
    status, output = sweep(place, name, '--dry_run', *options)
    return [line for line in output.splitlines() if line.startswith('python')], output


def test_grids_lists_and_draws_multiply_and_equal_runs_are_one(place):
    file = write(
        place,
        'all.py',
        grid={'seed': [1, 1, 2]},
        zipped={'a': [1, 2], 'b': [3, 4]},
        sampled={'lr': (1e-5, 1e-1, 'log'), 'n': (1, 3), 'c': ['x', 'y']},
        num_trials=3,
    )
    commands, _ = lines(place, file)
    assert len(commands) == 2 * 2 * 3 and commands == lines(place, file)[0]
    assert all(('--a=1' in line) == ('--b=3' in line) for line in commands)
    rates = {float(line.split('--lr=')[1].split()[0]) for line in commands}
    assert len(rates) == 3 and all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert not (place / 'try').exists()


def test_a_range_is_drawn_from_in_yaml_too(place):
    (place / 'one.yaml').write_text(
        'script: worker.py\nexperiment_name: try\nsampled:\n  lr: [1e-5, 1e-1, log]\nnum_trials: 4\n'
    )
    commands, _ = lines(place, 'one.yaml')
    assert len({line.split('--lr=')[1].split()[0] for line in commands}) == 4


def test_yaml_and_json_of_other_systems_mean_the_same_runs(place):
    (place / 'one.yaml').write_text(
        'experiment_name: try\nresults_root: elsewhere\nbase_args:\n  lr: 1e-5\n'
        '  batch-size: 20\ngrid:\n  sequence_length: [100, 50]\n'
        '  target_func: [fn_g, fn_a]\n'
    )
    (place / 'one.json').write_text(
        json.dumps(
            {
                'experiment_name': 'try',
                'base_args': {'lr': 1e-5, 'batch_size': 20},
                'parameters': {'sequence_length': [100, 50], 'target_func': ['fn_g', 'fn_a']},
            }
        )
    )
    yaml, json_ = (lines(place, name, '--script=worker.py')[0] for name in ('one.yaml', 'one.json'))
    assert len(yaml) == 4 and '--lr=1e-05 --batch_size=20 --sequence_length=100' in yaml[0]
    assert (
        yaml == json_ and 'try/79487e796f2a' in yaml[0]
    )  # what is finished stays finished: the name never changes


@pytest.mark.slow
def test_languages_become_runs(place):
    database = {name: {'sentiment': {}} for name in ('rus', 'pol')} | {'eng': {'qa': {}}}
    (place / 'db.json').write_text(json.dumps(database))
    file = write(
        place,
        'languages.py',
        base_args={'task': 'sentiment', 'language_database': 'db.json'},
        languages={'train': 'all', 'eval': 'all'},
        grid={'model_type': ['normal', 'ipa']},
    )
    commands, _ = lines(place, file)
    assert len(commands) == 4 and all('--eval_langs=rus,pol' in line for line in commands)


@pytest.mark.parametrize(
    'settings, part',
    [
        (dict(zipped={'a': [1], 'b': [1, 2]}), 'different lengths: a 1, b 2'),
        (dict(grid={'a': []}), 'a has no values'),
        (dict(num_trials=3), 'need each other'),
        (dict(script='nothing.py'), "no script 'nothing.py'"),
        (dict(grid={'out_dir': ['x']}), 'given by the sweep'),
        (dict(languages={'train': 'all'}), 'needs a task'),
        (dict(languages={'train': 'all'}, base_args={'task': 'sentimnt'}), "has the task 'sentimnt'"),
        (dict(sampled={'lr': (2, 1)}, num_trials=1), 'write [...], (low, high)'),
        (dict(sampled={'lr': (1e-3,)}, num_trials=1), 'write [...], (low, high)'),
        (dict(sampled={'optimizer': ('adamw', 'muon')}, num_trials=1), 'write [...], (low, high)'),
    ],
)
def test_a_mistake_is_a_sentence(place, settings, part):
    status, output = sweep(place, write(place, 'wrong.py', **settings), '--dry_run')
    assert status == 1 and part in output and 'Traceback' not in output


@pytest.mark.faults
@pytest.mark.parametrize(
    'settings, part',
    [
        (dict(grid={'seeed': [1]}), "Unknown key 'seeed'"),
        (dict(base_args={'max_steps': 'many'}), 'gives str where int is wanted'),
        (dict(base_args={'token': 'secret'}), 'HF_TOKEN'),
        (dict(experiment_name='a\nrm -rf b'), 'is no plain name'),
        (dict(experiment_name='../a'), 'is no plain name'),
        (dict(submit='slurm', timeout='1\necho b'), 'is no plain name'),
        (dict(submit='slurm', output_dir='wrong.py'), 'wrong.py could not be written'),
    ],
)
def test_a_key_that_the_script_refuses_or_a_name_that_leads_out_writes_nothing(place, settings, part):
    settings = {'script': str(ROOT / 'train.py'), **settings}
    status, output = sweep(place, write(place, 'wrong.py', **settings), '--dry_run')
    assert status == 1 and part in output and 'Traceback' not in output
    assert [path.name for path in place.iterdir() if path.is_dir()] == []


@pytest.mark.faults
def test_published_grids_run_as_written_and_numpy_counts(place):
    (place / 'grid.json').write_text(
        '{\n // parameters to loop over\n "parameters": {"learning_rate": [1e-3, 5e-4], "epochs": 3}}'
    )
    status, output = sweep(place, 'grid.json', '--dry_run')
    assert status == 0 and output.count('--epochs=3') == 2
    (place / 'numpy.py').write_text(
        'import numpy as np\n'
        "grid = {'seed': np.arange(2), 'learning_rate': [np.float64(0.5)], 'batch_size': range(2, 4)}"
    )
    commands, output = lines(place, 'numpy.py', '--script=train.py')
    assert len(commands) == 4 and '--seed=1 --learning_rate=0.5 --batch_size=3' in output


# ---------------------------------------------------------------------------- slurm


def shipped_template(place):
    """config/slurm.sh without the virtual environment of a cluster's checkout."""
    text = (ROOT / 'config' / 'slurm.sh').read_text()
    assert 'source {root}/.venv/bin/activate\n' in text
    text = text.replace('source {root}/.venv/bin/activate\n', '')
    (place / 'slurm.sh').write_text(text.replace('{launch}', sys.executable))
    return '--template=slurm.sh'


def write_command(place, name, text):
    (place / 'bin').mkdir(exist_ok=True)
    (place / 'bin' / name).write_text('#!/bin/bash\n' + text)
    (place / 'bin' / name).chmod(0o755)
    return {'PATH': f'{place / "bin"}:{os.environ["PATH"]}'}


def test_jobs_are_written_checked_by_bash_and_submitted_as_an_array(place):
    file = write(
        place,
        'jobs.py',
        base_args={'seconds': 0, 'note': "it's a $HOME"},
        grid={'seed': [1, 2, 3], 'lr': [0.1]},
    )
    options = [
        '--submit=slurm',
        '--timeout=02:00:00',
        '--cpus=3',
        '--gpus_per_job=2',
        '--jobs=2',
        shipped_template(place),
    ]
    assert sweep(place, file, '--dry_run', '--output_dir=scripts', *options)[0] == 0
    scripts = sorted((place / 'scripts').glob('*.sh'))
    assert len(scripts) == 4 and all(
        subprocess.run(['bash', '-n', script]).returncode == 0 for script in scripts
    )
    array = (place / 'scripts' / 'array.sh').read_text()
    for line in (
        '--job-name=try\n',
        '--time=02:00:00',
        '--cpus-per-task=3',
        '--gres=gpu:2',
        '--array=0-2%2\n',
        '--requeue',
    ):
        assert f'#SBATCH {line}' in array
    # The stand-in runs the tasks of the array, one after the other.
    environment = write_command(
        place,
        'sbatch',
        'for i in 0 1 2; do SLURM_ARRAY_TASK_ID=$i bash "$1" || exit 1; done\necho "Submitted batch job 7"\n',
    )
    status, output = sweep(place, file, *options, **environment)
    assert status == 0 and 'Submitted batch job 7' in output
    assert len(list(place.glob('try/*/done.json'))) == 3
    config = json.loads(next(place.glob('try/*/config.json')).read_text())
    assert config['note'] == "it's a $HOME" and config['resume_from'] == 'auto'
    assert 'all runs are finished' in sweep(place, file, *options, **environment)[1]
    assert len(rows(place)) == 3  # the same command gathers the results


def test_a_job_starts_a_process_per_gpu_where_the_sweep_was_started(place):
    write(place, 'jobs.py', base_args={'lr': 1}, grid={'seed': [1]})
    for gpus, launch in ((1, 'python'), (4, 'torchrun --standalone --nproc_per_node=4')):
        assert sweep(place, 'jobs.py', '--submit=slurm', '--dry_run', f'--gpus_per_job={gpus}')[0] == 0
        [script] = [path for path in place.glob('try/jobs/*.sh') if path.name != 'array.sh']
        text = script.read_text()
        assert f'\n{launch} {place}/worker.py ' in text and f'\ncd {place}\n' in text
        assert f'OMP_NUM_THREADS={16 // gpus}\n' in text


@pytest.mark.parametrize('last, done', [('stopped at step 1 of 2', 0), ('$ again\ndone', 1)])
def test_a_job_whose_run_alone_was_told_to_stop_is_not_finished(place, last, done):
    (place / 'worker.py').write_text('import sys\n')  # ends with status 0
    file = write(place, 'jobs.py', base_args={'lr': 1}, grid={'seed': [1]})
    assert sweep(place, file, '--dry_run', '--submit=slurm', shipped_template(place))[0] == 0
    [script] = [path for path in place.glob('try/jobs/*.sh') if path.name != 'array.sh']
    [folder] = [path for path in place.glob('try/*') if path.name != 'jobs']
    (folder / 'logs.log').write_text(f'$ train.py\nstopped at step 1 of 2\n{last}\n')
    assert subprocess.run(['bash', script]).returncode == 0
    said = sweep(place, file, '--dry_run', '--submit=slurm', shipped_template(place))[1]
    assert ('all runs are finished' in said) == done and len(list(place.glob('try/*/done.json'))) == done


@pytest.mark.parametrize('number', [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_told_to_stop_saves_and_goes_on_when_requeued(place, number):
    file = write(place, 'jobs.py', base_args={'lr': 1, 'seconds': 100}, grid={'seed': [1]})
    assert sweep(place, file, '--dry_run', '--submit=slurm', shipped_template(place))[0] == 0
    [script] = [path for path in place.glob('try/jobs/*.sh') if path.name != 'array.sh']
    environment = {
        **os.environ,
        **write_command(place, 'scontrol', f'echo "$@" >> {place}/requeued\n'),
        'SLURM_JOB_ID': '7',
    }
    job = subprocess.Popen(['bash', script], env=environment)
    wait_until(lambda: list(place.glob('try/*/started')))
    job.send_signal(number)
    job.wait(timeout=60)
    assert (place / 'requeued').exists() == (
        number == signal.SIGUSR1
    )  # after a preemption Slurm does it itself
    assert not list(place.glob('try/*/done.json'))
    assert subprocess.run(['bash', script], env=environment).returncode == 0
    assert list(place.glob('try/*/done.json')) and (next(place.glob('try/*/work'))).read_text() == 'once'


def test_a_job_is_requeued_before_its_time_is_up_where_the_run_goes_on(place):
    text = 'import os, signal, time\nsignal.signal(signal.SIGTERM, lambda *_: 0)\n'
    text += 'open("started", "w").write(str(os.getpid()))\ntime.sleep(60)'
    (place / 'worker.py').write_text(text)
    file = write(place, 'jobs.py', base_args={'lr': 1}, grid={'seed': [1]})
    assert sweep(place, file, '--dry_run', '--submit=slurm', shipped_template(place))[0] == 0
    [script] = [path for path in place.glob('try/jobs/*.sh') if path.name != 'array.sh']
    script.write_text(script.read_text().replace('sleep 150', 'sleep 1'))  # as in an evaluation
    command = write_command(place, 'scontrol', f'echo "$@" >> {place}/requeued\n')
    job = subprocess.Popen(['bash', script], env={**os.environ, **command, 'SLURM_JOB_ID': '7'})
    wait_until((place / 'started').exists)
    job.send_signal(signal.SIGUSR1)
    wait_until((place / 'requeued').exists)
    assert job.poll() is None
    job.kill()
    os.kill(int((place / 'started').read_text()), signal.SIGKILL)


@pytest.mark.faults
def test_of_an_array_only_the_task_that_was_told_to_stop_is_requeued(place):
    file = write(place, 'jobs.py', base_args={'lr': 1, 'seconds': 100}, grid={'seed': [1]})
    assert sweep(place, file, '--dry_run', '--submit=slurm', shipped_template(place))[0] == 0
    command = write_command(place, 'scontrol', f'echo "$@" >> {place}/requeued\n')
    array = {
        'SLURM_JOB_ID': '7',
        'SLURM_ARRAY_JOB_ID': '7',
        'SLURM_ARRAY_TASK_ID': '0',
    }  # of the first or last task
    job = subprocess.Popen(['bash', place / 'try/jobs/array.sh'], env={**os.environ, **command, **array})
    wait_until(lambda: list(place.glob('try/*/started')))
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=60)
    assert (place / 'requeued').read_text() == 'requeue 7_0\n'


@pytest.mark.faults
def test_a_garbled_result_is_named_and_the_table_has_the_others(place):
    file = write(place, 'three.py', base_args={'seconds': 0, 'lr': 0.5}, grid={'seed': [1, 2, 3]})
    assert sweep(place, file)[0] == 0
    paths = sorted(place.glob('try/*/eval_results.json'))
    paths[0].write_text('{"step": 3, "te')
    paths[1].write_text('[1]')
    status, output = sweep(place, file)
    assert status == 0 and output.count('is damaged') == 2 and 'Traceback' not in output
    assert sum(bool(row['test.accuracy']) for row in rows(place)) == 1


def test_an_unknown_field_or_a_missing_sbatch_is_a_sentence(place):
    file = write(place, 'jobs.py', base_args={'lr': 1}, grid={'seed': [1]})
    (place / 'mine.sh').write_text('#!/bin/bash\n#SBATCH --partition={partition}\necho {args}\n')
    status, output = sweep(place, file, '--submit=slurm', '--template=mine.sh', '--dry_run')
    assert (
        status == 1 and '{partition}' in output and 'Traceback' not in output and not (place / 'try').exists()
    )
    options = '--submit=slurm', '--template=mine.sh', "--fields={'partition': 'a'}"
    assert sweep(place, file, '--dry_run', *options)[0] == 0
    status, output = sweep(place, file, *options, PATH='/nowhere')
    assert status == 1 and 'no sbatch' in output and 'Traceback' not in output


def test_six_directions_between_two_languages_for_both_model_types(place):
    commands, _ = lines(place, str(ROOT / 'config' / 'language_pairs.py'))
    pairs = {
        tuple(line.split(f'--{key}=')[1].split()[0] for key in ('train_langs', 'eval_langs', 'model_type'))
        for line in commands
    }
    assert len(commands) == 12 and ('rus,pol', 'rus', 'ipa') in pairs and ('pol', 'rus', 'normal') in pairs
