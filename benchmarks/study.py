"""Gather the runs of config/sweep_repeats.py, and say when repeating text pays: python benchmarks/study.py out/sweeps/repeats

Their evaluations are added to docs/study.csv, a line each, so that parts of the sweep can be run on other days or machines;
without a folder the file is taken as it is. Then, per kind: its lowest val/loss and where it was; when a diffusion model is below
the best that `ar` ever reaches, in minutes of training at the median speed of its kind, and in epochs by a fit. Curves:
docs/study.svg, with matplotlib.
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
AS_AR = ', as ar'  # of the name of the second line of a model of two kinds
LOSS = itemgetter(2)  # of a point of a curve
EXPONENTS = np.linspace(0.05, 2, 40)


def kind_of(settings):
    """Name the kind of a run by the settings that the sweep varies, so that no two share a curve."""
    words, decay = [settings['architecture']], settings['weight_decay']
    words += [f'in blocks of {settings["block_length"][0]}'] * any(settings['block_length'])
    words += [f'with ar_weight {settings["ar_weight"]:g}'] * bool(settings['ar_weight'])
    words += [f'with dropout {settings["dropout"]:g}, decay {decay:g}'] * bool(settings['dropout'])
    words += [f'with {settings["token_dropout"]:g} of its inputs masked'] * bool(settings['token_dropout'])
    return ' '.join(words)


def read_run(folder):
    """Yield the columns of each evaluation of a run; a model of two kinds has two lines."""
    settings = json.loads((folder / 'config.json').read_text())
    with open(folder / 'metrics.csv', newline='') as file:
        rows = [row for row in csv.DictReader(file) if int(row['step'])]  # a model that has learned something
    speed = round(statistics.median(float(x) for row in rows if (x := row['train/tokens_per_sec'])))
    unique, seed, kind = settings['unique_tokens'], settings['seed'], kind_of(settings)
    for row in rows:
        tokens = int(row['step']) * settings['batch_size'] * settings['block_size']
        for name, metric in ((kind, 'val/loss'), (kind + AS_AR, 'val/ar_loss')):
            if row.get(metric):
                yield [unique, name, seed, tokens, speed, float(row[metric])]


def gather(folder):
    """Add the runs under a folder to docs/study.csv, in place of what it has of the same ones; return all its lines."""
    runs = [path.parent for path in Path(folder).glob('*/metrics.csv')] if folder else []
    remedy = '`python sweep.py config/sweep_repeats.py` makes some'
    require(runs or not folder, f'{folder} has no runs; {remedy}.')
    lines = list(csv.reader(STUDY.open(newline='')))[1:] if STUDY.exists() else []
    lines = [[int(u), kind, *map(int, numbers), float(loss)] for u, kind, *numbers, loss in lines]
    lines += [line for run in runs for line in read_run(run)]
    lines = sorted({tuple(line[:4]): line for line in lines}.values())
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([COLUMNS, *lines])
    if runs:
        save_atomically(STUDY, lambda file: file.write(text.getvalue().encode()))
    return lines


def read_curves(lines):
    """Return {unique tokens: {kind: {seed: [(minutes of training, epoch, loss)]}}}."""
    curves = {}
    for unique, kind, seed, tokens, _, loss in lines:
        speed = statistics.median(line[4] for line in lines if line[1] == kind)
        seeds = curves.setdefault(unique, {}).setdefault(kind, {})
        seeds.setdefault(seed, []).append((tokens / speed / 60, tokens / unique, loss))
    return curves


def table(kinds):
    """Yield a line per kind: by seed its lowest loss, after how many epochs, and when it is below the best `ar`."""
    ends = {kind: [min(curve, key=LOSS) for curve in seeds.values()] for kind, seeds in kinds.items()}
    means = {kind: statistics.mean(map(LOSS, found)) for kind, found in ends.items()}
    goal = min((means[kind] for kind in kinds if kind.startswith('ar')), default=0)
    for kind in sorted(kinds, key=means.get):
        epochs, below = [], []
        for curve, (_, epoch, _) in zip(kinds[kind].values(), ends[kind]):
            epochs.append(f'{epoch:.3g}' + ', the last' * (epoch == curve[-1][1]))
            below.append(next((f'{minutes:.0f}' for minutes, _, loss in curve if loss < goal), 'never'))
        cells = [[f'{end[2]:.4f}' for end in ends[kind]], epochs]
        cells += (
            [[], []] if kind.startswith('ar') else [below, [crossing(x, goal) for x in kinds[kind].values()]]
        )
        yield f'| {kind} | ' + ' | '.join(map(' · '.join, cells)) + ' |'


def crossing(curve, goal, redraws=200):
    """Say after how many epochs a + b epochs^-c is at a goal, and the 95 % of that when what the fit leaves is redrawn.

    curve: [(minutes, epoch, loss)], fitted from an eighth of the way to its lowest loss on, least squares for each c.
    """
    last = min(range(len(curve)), key=lambda i: LOSS(curve[i]))
    _, x, y = np.array(curve[last // 8 : last + 1]).T
    if last + 1 < len(curve) and y[-1] > goal:
        return 'overfits before'
    if len(x) < 8:
        return 'too few'

    def fit(y):  # (N, M): so many curves at once
        designs = [np.stack([x**0, x**-c], 1) for c in EXPONENTS]
        found = np.stack([np.linalg.lstsq(design, y, rcond=None)[0] for design in designs])  # (C, 2, M)
        errors = ((np.stack(designs) @ found - y) ** 2).sum(1)  # (C, M)
        best, columns = errors.argmin(0), np.arange(y.shape[1])
        return *found[best, :, columns].T, EXPONENTS[best]

    def meet(a, b, c):
        with np.errstate(divide='ignore', invalid='ignore'):
            return np.where((goal > a) & (b > 0), ((goal - a) / b) ** (-1 / c), np.inf)

    a, b, c = fit(y[:, None])
    curve_fitted = a + b * x**-c
    residuals = np.random.default_rng(0).choice(y - curve_fitted, (redraws, len(x))).T
    ends = np.quantile(meet(*fit(curve_fitted[:, None] + residuals)), [0.025, 0.975], method='nearest')
    found, *ends = (f'{value:.3g}' if value < np.inf else 'never' for value in (*meet(a, b, c), *ends))
    return f'{found} ({ends[0]} to {ends[1]})' if set(ends) != {found} else found


def draw(curves, path):
    """Draw the lowest loss so far of each kind over minutes of training, a panel per number of unique tokens."""
    figure, lines = new_figure(max(8, 4.5 * len(curves)), 7), {}
    names = [kind.removesuffix(AS_AR) for kinds in curves.values() for kind in kinds]
    names = sorted(set(names))  # a color for the two lines of a model
    for axes, (unique, kinds) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for kind, curve in [(kind, curve) for kind, seeds in kinds.items() for curve in seeds.values()]:
            minutes, _, losses = zip(*curve)
            is_exact = kind.startswith('ar') or kind.endswith(AS_AR)
            style = {
                'color': f'C{names.index(kind.removesuffix(AS_AR))}',
                'linestyle': '-' if is_exact else '--',
            }
            (lines[kind],) = axes.plot(minutes, list(itertools.accumulate(losses, min)), **style)
        lowest = min(line.get_ydata()[-1] for line in axes.lines)
        axes.set(
            xscale='log',
            xlabel='minutes of training',
            ylim=(lowest - 0.05, lowest + 1),
            title=f'{unique:,} tokens',
        )
        axes.set_ylabel('lowest val/loss so far (dashed: of an upper bound)')
        axes.xaxis.set_major_formatter('{x:g}')
        axes.grid(alpha=0.3, which='both')
    figure.legend(lines.values(), lines.keys(), loc='outside lower center', ncols=2, fontsize='small')
    figure.savefig(path)


def main():
    curves = read_curves(gather(sys.argv[1] if sys.argv[1:] else ''))
    require(curves, f'{STUDY} has no evaluations yet; name the folder of a sweep.')
    for unique, kinds in curves.items():
        print(f'\n{unique:,} tokens of books\n')
        print(
            '| | lowest val/loss | after epochs | below the best ar: minutes | epochs, by a fit |\n'
            + '|---' * 5
            + '|'
        )
        print('\n'.join(table(kinds)))
    draw(curves, STUDY.with_suffix('.svg'))


if __name__ == '__main__':
    main()
