"""Gather the runs of config/sweep_repeats.py, and say when repeating text pays: python benchmarks/study.py out/sweeps/repeats

Their evaluations are added to docs/study.csv, a line each, so that parts of the sweep can be run on other days or machines; without a
folder the file is taken as it is. Then: the lowest val/loss of each kind and where it was, and from when on a diffusion model is
below the best that `ar` ever reaches, in minutes of training at the median speed of its kind; docs/study.svg, with matplotlib.
"""

import csv
import itertools
import json
import math
import statistics
import sys
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder
from lm.configurator import ROOT, require
from lm.report import new_figure

STUDY = ROOT / 'docs' / 'study.csv'
COLUMNS = 'kind unique_tokens seed step tokens epoch tokens_per_sec loss'.split()
KEY = COLUMNS[:4]
LOSS = attrgetter('loss')


def kind_of(settings):
    """Say of which kind a run is, by the settings that the sweep varies."""
    if settings['architecture'] == 'ar':
        return (
            'ar, masked inputs'
            if settings['token_dropout']
            else 'ar, dropout'
            if settings['dropout']
            else 'ar'
        )
    if not any(settings['block_length']):
        return settings['architecture']
    name = 'diffusion in blocks' if settings['architecture'] == 'diffusion' else 'sdd in blocks'
    return f'{name} and ar' if settings['ar_weight'] else name


def read_run(folder):
    """Return a line {column: value} per evaluation of a run; a model that is both kinds has two."""
    settings = json.loads((folder / 'config.json').read_text())
    tokens, speed, lines = settings['batch_size'] * settings['block_size'], [], []
    with open(folder / 'metrics.csv', newline='') as file:
        for row in csv.DictReader(file):
            speed += [float(row['train/tokens_per_sec'])] if row['train/tokens_per_sec'] else []
            losses = {
                kind_of(settings): row['val/loss'],
                f'{kind_of(settings)}, as ar': row.get('val/ar_loss'),
            }
            for kind, loss in losses.items():
                if loss and int(row['step']):
                    line = {
                        'kind': kind,
                        'step': row['step'],
                        'tokens': int(row['step']) * tokens,
                        'loss': loss,
                    }
                    lines.append({**line, **{key: settings[key] for key in ('unique_tokens', 'seed')}})
    for line in lines:
        epoch = line['tokens'] / settings['unique_tokens']
        line.update(epoch=round(epoch, 2), tokens_per_sec=round(statistics.median(speed)))
    return [{column: str(line[column]) for column in COLUMNS} for line in lines]


def gather(folder):
    """Add the runs under a folder to docs/study.csv; an evaluation that is there already is replaced. Returns all lines."""
    known = list(csv.DictReader(STUDY.open(newline=''))) if STUDY.exists() else []
    runs = [path.parent for path in sorted(Path(folder).glob('*/metrics.csv'))] if folder else []
    require(
        runs or not folder, f'{folder} has no runs; `python sweep.py config/sweep_repeats.py` makes them.'
    )
    lines = {tuple(line[key] for key in KEY): line for line in known}
    lines |= {tuple(line[key] for key in KEY): line for run in runs for line in read_run(run)}
    lines = sorted(
        lines.values(), key=lambda x: (int(x['unique_tokens']), x['kind'], int(x['seed']), int(x['step']))
    )
    if runs:
        with STUDY.open('w', newline='') as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
            writer.writeheader()
            writer.writerows(lines)
    return lines


class Point(NamedTuple):
    """An evaluation of a run."""

    minutes: float  # of training, at the median speed of its kind
    epoch: float
    loss: float


def read_curves(lines):
    """Return {unique tokens: {kind: {seed: [Point]}}}."""
    speeds, curves = {}, {}
    for line in lines:
        speeds.setdefault(line['kind'], []).append(float(line['tokens_per_sec']))
    for line in lines:
        minutes = int(line['tokens']) / statistics.median(speeds[line['kind']]) / 60
        kinds = curves.setdefault(int(line['unique_tokens']), {})
        curve = kinds.setdefault(line['kind'], {}).setdefault(line['seed'], [])
        curve.append(Point(minutes, float(line['epoch']), float(line['loss'])))
    return curves


def table(kinds):
    """Return a line per kind: by seed its lowest loss, after how many epochs, and when it is below the best `ar`."""
    bests = {kind: [min(curve, key=LOSS) for curve in seeds.values()] for kind, seeds in kinds.items()}
    means = {kind: statistics.mean(map(LOSS, found)) for kind, found in bests.items()}
    best_ar = min((means[kind] for kind in kinds if kind.startswith('ar')), default=-math.inf)
    lines = []
    for kind in sorted(kinds, key=means.get):
        seeds, epochs, below = kinds[kind].values(), [], []
        for best, curve in zip(bests[kind], seeds):
            epochs.append(f'{best.epoch:g}' + ', the last' * (best is curve[-1]))
            below.append(next((f'{point.minutes:.0f}' for point in curve if point.loss < best_ar), 'never'))
        below = [] if kind.startswith('ar') else below
        cells = [' '.join(f'{best.loss:.4f}' for best in bests[kind]), ' · '.join(epochs), ' · '.join(below)]
        lines.append(f'| {kind} | {" | ".join(cells)} |')
    return lines


def draw(curves, path):
    """Draw the lowest loss so far of each kind over minutes of training, a panel per number of unique tokens."""
    figure = new_figure(4.5 * len(curves), 4)
    for axes, (unique, kinds) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for color, kind in enumerate(sorted({kind for of in curves.values() for kind in of})):
            for curve in kinds.get(kind, {}).values():
                best = itertools.accumulate(map(LOSS, curve), min)
                axes.plot([point.minutes for point in curve], list(best), color=f'C{color}', label=kind)
        axes.set(xscale='log', xlabel='minutes', ylabel='lowest val/loss so far', title=f'{unique:,} tokens')
        axes.xaxis.set_major_formatter('{x:g}')
        axes.legend(fontsize='small')
        axes.grid(alpha=0.3, which='both')
    figure.savefig(path)


def main():
    curves = read_curves(gather(sys.argv[1] if sys.argv[1:] else ''))
    require(curves, f'{STUDY} has no evaluations yet; name the folder of a sweep.')
    for unique, kinds in curves.items():
        print(f'\n{unique:,} tokens of books\n')
        print('| | lowest val/loss | after epochs | below the best ar after minutes |\n|---|---|---|---|')
        print('\n'.join(table(kinds)))
    draw(curves, STUDY.with_suffix('.svg'))


if __name__ == '__main__':
    main()
