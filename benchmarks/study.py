"""Gather the runs of config/sweep_repeats.py, and say when repeating text pays: python benchmarks/study.py
out/sweeps/repeats

Their evaluations are added to docs/study.csv, a line each, so that parts of the sweep can be run on other days or
machines; without a folder the file is taken as it is. Then, per kind: its lowest val/loss and where it was; when a
diffusion model is below the best that `ar` ever reaches, in minutes of training at the speed of its kind, and in
epochs by a fit. Curves: docs/study.svg, with matplotlib.
"""

import csv
import io
import itertools
import json
import statistics
import sys
from operator import itemgetter
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder
from lm.configurator import ROOT, require
from lm.files import save_atomically
from lm.report import new_figure

STUDY = ROOT / 'docs' / 'study.csv'
COLUMNS = 'unique_tokens kind seed tokens tokens_per_sec loss'.split()
PLAIN = dict(dropout=0.0, weight_decay=0.1, token_dropout=0.0, block_length=[0], ar_weight=0.0)
PLAIN |= dict(p_belief=[[0.5, 0.5]])
OWN = 'architecture unique_tokens seed max_steps warmup_steps eval_every out_dir resume_from save_every log_every'
OWN = {*OWN.split(), 'device', 'dtype', 'compile', *PLAIN}  # settings in which the runs of a study may differ
AS_AR = ', as ar'  # of the name of the second line of a model of two kinds
LOSS = itemgetter(2)  # of a point of a curve
EXPONENTS = np.linspace(0.05, 2, 40)


def kind_of(settings):
    """Name the kind of a run by its architecture and by those settings of the sweep that differ from PLAIN."""
    given = [f'--{key}={settings[key]}'.replace(' ', '') for key, x in PLAIN.items() if settings[key] != x]
    return ' '.join([settings['architecture'], *given])


def read_run(folder, settings):
    """Yield the columns of each evaluation of a run; a model of two kinds has two lines."""
    with open(folder / 'metrics.csv', newline='') as file:
        rows = [row for row in csv.DictReader(file) if int(row['step'])]  # a model that has learned something
    if not rows:
        return
    speed = round(statistics.median(float(x) for row in rows if (x := row['train/tokens_per_sec'])))
    unique, seed, kind = settings['unique_tokens'], settings['seed'], kind_of(settings)
    rows_per_step = settings['batch_size'] * settings['gradient_accumulation_steps']
    for row in rows:
        tokens = int(row['step']) * rows_per_step * settings['block_size']
        for name, metric in ((kind, 'val/loss'), (kind + AS_AR, 'val/ar_loss')):
            if row.get(metric):
                yield [unique, name, seed, tokens, speed, float(row[metric])]


def gather(folder):
    """Add the runs under a folder to docs/study.csv, in place of what it has of the same ones; return all its lines."""
    runs = [path.parent for path in Path(folder).glob('*/metrics.csv')] if folder else []
    require(runs or not folder, f'{folder} has no runs; sweep.py config/sweep_repeats.py makes some.')
    lines = list(csv.reader(STUDY.open(newline='')))[1:] if STUDY.exists() else []
    lines = [[int(u), kind, *map(int, numbers), float(loss)] for u, kind, *numbers, loss in lines]
    settings = [json.loads((run / 'config.json').read_text()) for run in runs]
    for run, now in zip(runs, settings):
        limited, first = now.get('unique_tokens'), settings[0]
        require(limited, f'{run} went through all of its data; the study is of runs with --unique_tokens.')
        keys = sorted(first.keys() & now.keys() - OWN)  # versions may have others
        other = {key: (first[key], now[key]) for key in keys if first[key] != now[key]}
        require(not other, f'{runs[0]} and {run} differ in {other}; one study has one size, rate and data.')
        lines += read_run(run, now)
    lines = sorted({tuple(line[:4]): line for line in lines}.values())
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([COLUMNS, *lines])
    if runs:
        save_atomically(STUDY, lambda file: file.write(text.getvalue().encode()))
    return lines


def read_curves(lines):
    """Return {unique tokens: {kind: {seed: [(minutes of training, epoch, loss)]}}}."""
    speeds, curves = {}, {}
    for unique, kind, _, _, speed, _ in lines:  # the first seed is of one machine
        speeds.setdefault((unique, kind), speed)
    for unique, kind, seed, tokens, _, loss in lines:
        seeds = curves.setdefault(unique, {}).setdefault(kind, {})
        seeds.setdefault(seed, []).append((tokens / speeds[unique, kind] / 60, tokens / unique, loss))
    return curves


def table(kinds):
    """Yield a line per kind: by seed its lowest loss, after how many epochs, and when it is below the best `ar`."""
    means = {kind: statistics.mean(min(map(LOSS, x)) for x in kinds[kind].values()) for kind in kinds}
    goal = min((means[kind] for kind in kinds if kind.startswith('ar')), default=0)
    for kind in sorted(kinds, key=means.get):
        cells = []
        for curve in kinds[kind].values():
            _, epoch, loss = min(curve, key=LOSS)
            cell = [f'{loss:.4f}', f'{round(epoch, 1):g}' + ', the last' * (epoch == curve[-1][1]), '', '']
            if not kind.startswith('ar'):
                below = (f'{minutes:.0f}' for minutes, _, loss in curve if loss < goal)
                cell[2:] = next(below, 'never'), crossing(curve, goal)
            cells.append(cell)
        yield ' | '.join(['| ' + f'`{kind}`', *map(' · '.join, zip(*cells))]) + ' |'


def crossing(curve, goal, redraws=200):
    """Say after how many epochs a + b epochs^-c is at a goal, with its 95 % interval, or why there is no saying.

    curve: [(minutes, epoch, loss)], fitted from an eighth of the way to its lowest loss on. The interval is of fits to
    redrawn residuals, as if these were independent, so it is somewhat narrow.
    """
    last = min(range(len(curve)), key=lambda i: LOSS(curve[i]))
    _, x, y = np.array(curve[last // 8 : last + 1]).T
    if last + 1 < len(curve) and y[-1] > goal:
        return 'overfits before'
    if len(x) < 8:
        return 'too few'

    def fit(y):
        """Fit each column of y (N, M): return the epochs at which it is at the goal (M,), and its curve (N, M)."""
        fits, errors = zip(*(np.polyfit(x**-c, y, 1, full=True)[:2] for c in EXPONENTS))
        best = np.argmin(errors, axis=0)  # (M,)
        b, a = np.array(fits)[best, :, range(len(best))].T
        c, reached = EXPONENTS[best], (goal > a) & (b > 0)
        gap, slope = np.where(reached, (goal - a, b), 1)
        return np.where(reached, (gap / slope) ** (-1 / c), np.inf), a + b * x[:, None] ** -c

    (found,), fitted = fit(y[:, None])
    residuals = np.random.default_rng(0).choice(y - fitted[:, 0], (len(x), redraws))
    low, high = np.quantile(fit(y[:, None] + residuals)[0], [0.025, 0.975], method='nearest')
    found, low, high = (f'{x:.3g}' if x < np.inf else 'never' for x in (found, low, high))
    return found if found == low == high else f'{found} ({low} to {high})'


def draw(curves, path):
    """Draw the lowest loss so far of each kind over minutes of training, a panel per number of unique tokens."""
    figure, lines = new_figure(max(10, 4.5 * len(curves)), 7), {}
    models = sorted({kind.removesuffix(AS_AR) for kinds in curves.values() for kind in kinds})
    for axes, (unique, kinds) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for kind, curve in [(kind, curve) for kind, seeds in kinds.items() for curve in seeds.values()]:
            minutes, _, losses = zip(*curve)
            style = '-' if kind.startswith('ar') or kind.endswith(AS_AR) else '--'
            color = f'C{models.index(kind.removesuffix(AS_AR))}'
            (lines[kind],) = axes.plot(minutes, list(itertools.accumulate(losses, min)), style, color=color)
        lowest = min(line.get_ydata()[-1] for line in axes.lines)
        axes.set(xscale='log', ylim=(lowest - 0.05, lowest + 1), title=f'{unique:,} tokens')
        axes.set(xlabel='minutes of training', ylabel='lowest val/loss so far (dashed: of an upper bound)')
        axes.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.xaxis.set_major_formatter('{x:g}')
        axes.xaxis.set_minor_formatter('')
        axes.grid(alpha=0.3, which='both')
    figure.legend(lines.values(), lines.keys(), loc='outside lower center', ncols=2, fontsize='small')
    figure.savefig(path)


def main():
    curves = read_curves(gather(sys.argv[1] if sys.argv[1:] else ''))
    require(curves, f'{STUDY} has no evaluations yet; name the folder of a sweep.')
    for unique, kinds in curves.items():
        print(f'\n{unique:,} tokens of books\n')
        print('| | lowest val/loss | after epochs | below the best ar: minutes | epochs, by a fit |')
        print('|---' * 5 + '|')
        print('\n'.join(table(kinds)))
    draw(curves, STUDY.with_suffix('.svg'))


if __name__ == '__main__':
    main()
