"""The folder of a run: where it is, what it is called, and which copies of its checkpoint it keeps."""

import contextlib
import os
import re
import shutil
from pathlib import Path

from lm.configurator import ROOT, require
from lm.files import lock, save_atomically, writing
from lm.tokenizer import settings_of

RESULTS = ['best.pt', 'eval_results.json', 'predictions.npz']  # that come after the first ckpt.pt
RUN_FILES = [*'config.json ckpt.pt metrics.csv metrics.py checkpoints sharded adapter'.split(), *RESULTS]


def run_of(checkpoint_path):
    """Return the run folder that a checkpoint stands in: beside it, or above checkpoints/checkpoint-N/."""
    folder = Path(checkpoint_path).resolve().parent
    return folder.parent.parent if folder.parent.name == 'checkpoints' else folder


def copies_of(folder):
    """Return {step: path} of the complete copies of ckpt.pt under checkpoints/, by their steps."""
    paths = Path(folder).glob('checkpoints/checkpoint-*/ckpt.pt')
    steps = {path.parent.name.removeprefix('checkpoint-'): path for path in paths}
    return {int(step): path for step, path in steps.items() if step.isdigit()}


def newest_checkpoint(folder):
    """Return the path of a run's ckpt.pt, or where it is lost of its newest copy."""
    path, copies = Path(folder) / 'ckpt.pt', copies_of(folder)
    return copies[max(copies)] if copies and not path.exists() else path


def newest_run():
    """Return the ckpt.pt under out/ that was written last, of a language model: a classifier writes no text."""
    runs = sorted((ROOT / 'out').glob('*/ckpt.pt'), key=lambda path: path.stat().st_mtime)
    runs = [run for run in runs if 'num_classes' not in settings_of(run.parent, 'config.json')]
    require(runs, 'There is no language model under out/; train one, or give --checkpoint=PATH.')
    return runs[-1]


def name_of(path):
    """Return the name by which people know the checkpoint at a path: its run's, its folder's or its own."""
    path = Path(path)
    run = path.resolve().parent.name
    return {'ckpt.pt': run, 'best.pt': f'{run}-best'}.get(path.name, path.name.removesuffix('.pt'))


def open_run_folder(out_dir, name, suffix='', run_dir=None, overwrite=False, init_from=''):
    """Return the run's folder, empty but for a run to continue: `out_dir`, or out/{name}-v{n} with the next free n.

    A folder that holds a run is refused, unless it is the `run_dir` to continue, or `overwrite` deletes it; but
    not where the new run starts from it, `init_from`.
    """
    n = 0
    while not out_dir:
        n += 1
        numbered = f'{name}-v{n}' + (f'-{suffix}' if suffix else '')
        folder = ROOT / 'out' / re.sub(r'[^\w.+=-]', '-', numbered)  # a name of data leads nowhere else
        with writing(folder), contextlib.suppress(FileExistsError):  # another run may take it just now
            folder.mkdir(parents=True)
            return folder
    folder = Path(out_dir)
    is_data = (folder / 'tokenizer.json').exists()
    require(not is_data, f'{folder} is a prepared data folder, no place for a run; choose another out_dir.')
    if folder.resolve() != run_dir and any((folder / name).exists() for name in [*RUN_FILES, 'logs.log']):
        remedy = 'continue it with --resume_from=auto, delete it with --overwrite, or choose another out_dir'
        require(overwrite, f'{folder} already holds a run; {remedy}.')
        is_base = Path(init_from or os.devnull).resolve().is_relative_to(folder.resolve())
        require(not is_base, f'{folder} holds what the run starts from, {init_from}; choose another out_dir.')
        with lock(folder) as log:
            for path in (folder / file for file in RUN_FILES):
                is_folder = path.is_dir() and not path.is_symlink()
                shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)
            log.truncate(0)
    return folder


def copy_if_due(folder, step, best_step, config, dist):
    """Copy ckpt.pt, and a sharded state, to checkpoints/checkpoint-{step}/ on rank 0 where save_every says so. The
    newest save_total_limit copies stay (None: all), and the best; later steps, which the run went back behind, go."""
    every, limit = config['save_every'], config['save_total_limit']
    if not (dist.is_main and step and every) or step % every or limit == 0:
        return
    copy, sharded = folder / 'checkpoints' / f'checkpoint-{step}', folder / 'sharded'
    if sharded.is_dir():  # holds one state, whose files are written once and never changed
        shutil.rmtree(copy, ignore_errors=True)  # an earlier one; ckpt.pt, written last, makes it whole
        with writing(copy):
            shutil.copytree(sharded, copy / 'sharded', copy_function=os.link)
    with open(folder / 'ckpt.pt', 'rb') as source:
        save_atomically(copy / 'ckpt.pt', lambda file: shutil.copyfileobj(source, file))
    copies = copies_of(folder)
    earlier = sorted(s for s in copies if s <= step)
    too_many = max(0, len(earlier) - (limit or len(earlier)))
    surplus = [s for s in earlier if s not in (step, best_step)][:too_many]
    for old in [s for s in copies if s > step] + surplus:
        shutil.rmtree(copies[old].parent)
