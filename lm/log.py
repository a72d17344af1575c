"""The run's folder and its log: console, logs.log, metrics.csv and W&B under one set of names."""

import contextlib
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path

import torch

from lm import report, run_folder
from lm.configurator import ROOT, output_is_cut, printable, require
from lm.files import lock, save_atomically, write_json
from lm.kernels import CPU

PATIENCE = 60  # seconds that W&B has to answer, once
METRICS = (
    'train/loss train/accuracy train/perplexity train/lr train/tokens_per_sec train/grad_norm train/mfu train/epoch '
    'val/loss val/accuracy val/perplexity val/bpb val/loss_k0 train/k train/ignore_acc train/ignore_precision '
    'val/loss_without_padding'
).split()


def start_run(dist, config, name, resumed, init_from):
    """Make the run folder, write its config.json and open its log; returns both. init_from: what it starts from."""
    out_dir = config['out_dir'] or resumed.run_dir
    options = config['run_suffix'], resumed.run_dir, config['overwrite'], init_from
    out = Path(dist.from_main(lambda: run_folder.open_run_folder(out_dir, name, *options)))
    checkpoint = resumed.checkpoint or {'global_step': -1}
    again = checkpoint.get('pending') is not None  # its step is still to be evaluated and logged
    check = lambda: require(resumed.is_current(out), f'Another process wrote {out} meanwhile; start again.')
    log = Logger(out, dist.is_main, checkpoint['global_step'] - again, check)
    if dist.is_main:
        for name in run_folder.RUN_FILES:  # what a killed process had begun to write
            for path in (*out.glob(f'{name}.*.tmp'), *out.glob(f'{name}/**/*.*.tmp')):
                path.unlink(missing_ok=True)
        write_json(out / 'config.json', config)
        log.write(log.log_file, describe_origin(dist.device))
    if out.resolve() == resumed.run_dir:  # elsewhere it is a run of its own
        log.wandb_run_id = checkpoint.get('wandb_run_id')
    if not config['no_wandb']:
        about = dict(name=config['wandb_run_name'] or out.name, id=log.wandb_run_id, config=dict(config))
        log.start_wandb(project=config['wandb_project'], **about)
    for key, before, now in resumed.overrides:
        log.print(f'resumed with {key}={now!r}, which was {before!r}')
    return out, log


def describe_origin(device):
    """Return two lines that say what made a run: its command; commit, version of PyTorch and machine."""
    command = shlex.join(['python', Path(sys.argv[0]).name, *sys.argv[1:]])
    git = shlex.join(['git', '-C', str(ROOT), *'describe --always --dirty --exclude=* --abbrev=12'.split()])
    found = subprocess.run(git, shell=True, capture_output=True, text=True)  # by a shell: there may be no git
    return f'$ {command}\ncommit {found.stdout.strip() or "unknown"}, {describe_machine(device)}\n'


def describe_machine(device):
    """Return the version of PyTorch, the processor, its threads in use, and the GPU where one is used."""
    gpu = f', {torch.cuda.get_device_name(device)}' if device.type == 'cuda' else ''
    cpu = CPU.get('cpu_name') or platform.machine()
    return f'torch {torch.__version__}, {torch.get_num_threads()} of {os.cpu_count()} cores of {cpu}{gpu}'


class Logger:
    """Console, logs.log, metrics.csv and W&B under one set of names. On ranks other than 0 it is silent."""

    def __init__(self, folder, is_main, step, check=lambda: None):
        """step: the last that a resumed run keeps the metrics of; check: called when no one else writes the folder."""
        self.folder, self.is_main, self.columns = folder, is_main, ['step', *METRICS]
        self.wandb, self.wandb_run_id, self.hangs = None, None, False
        self.line_open, self.misses_lines = False, False
        if is_main:
            self.log_file = lock(folder)
            check()
            self.open_csv(step)

    def print(self, *lines):
        for line in map(printable, lines) if self.is_main else ():
            self.write(sys.stdout, ('\n' if self.line_open else '') + line + '\n')
            self.line_open = False
            self.write(self.log_file, line + '\n')

    def write(self, file, text):
        """Write to one of the log's files; the run goes on where it cannot, but saves and ends in `| head`."""
        try:
            file.write(text)
            file.flush()
        except OSError as error:
            if isinstance(error, BrokenPipeError) and output_is_cut():
                signal.raise_signal(signal.SIGHUP)  # as where a terminal is closed
            elif not self.misses_lines:
                self.misses_lines = True
                print(f'warning: the log in {self.folder} misses lines ({error}).', file=sys.stderr)

    def progress(self, step, max_steps, metrics, seconds_per_step):
        """Show a line that the next one replaces on a terminal, and follows elsewhere."""
        if not self.is_main:
            return
        left = timedelta(seconds=int((max_steps - step) * seconds_per_step))
        rates = f'lr {metrics["train/lr"]:.2e}, {metrics["train/tokens_per_sec"]:,.0f} tokens/s'
        line = f'step {step}/{max_steps}: loss {metrics["train/loss"]:.4f}, {rates}, {left} left'
        self.write(self.log_file, line + '\n')
        self.line_open = sys.stdout.isatty()
        self.write(sys.stdout, '\r\033[K' + line if self.line_open else line + '\n')

    def open_csv(self, step, new=()):
        """Open metrics.csv with `new` columns, without what is no row and rows after `step`: they come again."""
        path = self.folder / 'metrics.csv'
        text = path.read_text('utf-8', 'replace') if path.exists() else ''
        header, *lines = text.splitlines(keepends=True) or ['']
        self.columns = [*(header.strip().split(',') if header.strip() else self.columns), *new]
        rows = [line for line in lines if line.endswith('\n') and line.split(',')[0].isdecimal()]
        rows = [line.strip() + ',' * len(new) for line in rows if int(line.split(',')[0]) <= step]
        content = '\n'.join([','.join(self.columns), *rows, ''])
        save_atomically(path, lambda file: file.write(content.encode()))
        self.csv_file = open(path, 'a', buffering=1, newline='', encoding='utf-8')

    def metrics(self, step, values):
        """Write a row of metrics.csv and a step of W&B; values: {name: float}."""
        if not self.is_main:
            return
        if new := [name for name in values if name not in self.columns]:
            self.csv_file.close()
            self.open_csv(step, new)
        cells = step, *(values.get(name, '') for name in self.columns[1:])
        self.write(self.csv_file, ','.join(map(str, cells)) + '\n')
        if self.wandb:
            self.attempt(lambda: self.wandb.log(values, step=step))

    def start_wandb(self, **settings):
        if self.is_main:
            self.wandb = self.attempt(lambda: self.init_wandb(**settings))

    def init_wandb(self, **settings):
        import wandb  # takes seconds to import: only where it is wanted

        mode = os.environ.get('WANDB_MODE')
        if mode is None and not wandb.login(prompt=False):
            mode = 'offline'
            self.print('W&B: not logged in, so the run is kept offline; `wandb login` first, or --no_wandb.')
        quiet = {'silent': mode == 'offline'}  # or it prints 35 lines of its own
        run = wandb.init(resume='allow', dir=self.folder, mode=mode, settings=quiet, **settings)
        if mode == 'offline':
            self.print(f'W&B: offline; `wandb sync {run.dir.removesuffix("/files")}` sends the run later.')
        self.wandb_run_id = run.id  # kept for the next resume, even if W&B fails or is left out
        return run

    def attempt(self, call):
        """Call W&B in a thread; where it fails or hangs, that is reported once, and the training goes on without it."""
        answer = Future()

        def run():
            try:
                answer.set_result(call())
            except Exception as error:  # whatever a service does
                answer.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        try:
            return answer.result(timeout=PATIENCE)
        except Exception as error:
            self.wandb, self.hangs = None, not answer.done()
            reason = f'no answer in {PATIENCE} seconds' if self.hangs else error
            self.print(f'W&B failed ({type(error).__name__}: {reason}); the run goes on without it.')

    def close(self):
        if self.is_main:
            with contextlib.suppress(OSError, ValueError):  # a picture is worth no crash
                self.print(*report.text_curve(self.folder).splitlines())
            if self.wandb:
                self.attempt(self.wandb.finish)
            for file in (self.log_file, self.csv_file):
                with contextlib.suppress(OSError):  # the disk is full, as was said
                    file.close()
            if self.hangs:  # W&B's own exit would wait for ever
                sys.stdout.flush()
                os._exit(0)
