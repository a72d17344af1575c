"""Show what evaluate.py and runs found: tables, a page that loads nothing else, curves.

python -m lm.report out/                                       # the runs: steps, best loss, age, size
python -m lm.report out/a out/b --metric=val/loss --out=curves # curves.svg, curves.png (pip install matplotlib)
"""

import argparse
import csv
import math
import sys
import time
from pathlib import Path

from jinja2 import Environment

from lm.configurator import printable, require
from lm.files import as_sentence, require_folder
from lm.tokenizer import settings_of

# Key, format and title of each column, a group per line; a column that no model has is left out.
COLUMNS = """
Likelihood: nats_per_token .4f nats/token | ci_over s interval over | bound s bound | order s its order
  | difference +.4f minus the first | perplexity .2f perplexity | bpb .4f bits/byte
Other bounds: k0.nats_per_token .4f k = 0 | k0.difference +.4f minus the first | steps.steps d S
  | steps.nats_per_token .4f in S steps | steps.difference +.4f minus the first
  | exact.nats_per_token .4f left to right | carried.nats_per_token .4f beliefs carried | exact.ci_over s interval over
Predictions: accuracy .3f accuracy
Sampling: sampled_with s sampled with
Stories: valid_stories .3f stories | right_share .3f right | wrong_words.name .2f wrong names
  | wrong_words.pronoun .2f pronouns | wrong_words.place .2f places | wrong_words.thing .2f things
Requests: followed .3f followed | followed_new_words .3f in new words | format_compliance .3f format
  | rouge_l .3f ROUGE-L
Infilling: infilled.one .3f one gap | infilled.several .3f several
  | infilled.best_one .3f best of 8: one | infilled.best_several .3f best: several
Samples: judge_nats .3f judge nats | entropy .3f entropy | distinct_1 .3f distinct-1 | distinct_4 .3f distinct-4
  | rep_4 .3f rep-4 | samples_empty d empty
Speed: tokens_per_sec ,.0f tokens/s | tokens_per_sec_batch ,.0f in a batch | passes_per_token .3f passes/token
"""
GROUPS = {}
for group, columns in (line.split(': ', 1) for line in COLUMNS.replace('\n  |', ' |').strip().split('\n')):
    GROUPS[group] = [column.split(maxsplit=2) for column in columns.split(' | ')]
# The five first of these that there are make the table that fits a terminal.
FIRST = 'nats_per_token steps.nats_per_token exact.nats_per_token carried.nats_per_token difference valid_stories '
FIRST += 'followed followed_new_words infilled.one infilled.several judge_nats tokens_per_sec entropy accuracy bpb '
FIRST = (FIRST + 'rep_4 format_compliance passes_per_token').split()
PAGE = Path(__file__).with_name('report.html')
WIDTH, BOUNDS = 100, {'upper': '≤ ', 'none': '? '}
SAID = {'valid_stories': 'of its texts are whole stories', 'followed': 'of the requests are followed'}
OF_BOUND = 'nats_per_token perplexity bpb k0.nats_per_token steps.nats_per_token'.split()
SHORT_NOTES = """\
≤: an upper bound of the nll; ±: to the farther end of a 95 % interval. All figures, and what they
mean: --wide, or --html=FILE as a page, --output=FILE as JSON."""
NOTES = """\
± goes to the farther end of a 95 % interval, over documents or, where there are fewer than 30 or several per
window, over windows, which is somewhat too narrow where neighbouring windows are alike. exact: the nll itself;
upper: an upper bound of it, so that an upper figure below an exact one is better, and one above it leaves the
question open; no bound: it does not compare. Each is of texts sampled in its order at temperature 1, whatever
the samples here were written with. k = 0: the same without beliefs; in S steps: of sampler='ancestral' with
steps=S for a whole row, and of no other. Left to right: the exact nll of a diffusion model that samples in this
order (of whole rows: sampler='blocks' of length 1, fresh_beliefs=True; beliefs carried: False), on fewer rows.
Accuracy: of the next token for ar, of masked tokens for the others, so the two do not compare. Diversity depends
on the number and length of the samples: compare it with that of texts that were held out. Right: the share of a
sample's text before its first fault; wrong words: per sample, that do not agree with what was said before.
Diversity is of samples that are not empty. n/a: cannot be computed."""


def entropy_row(floor):
    """Return the figures of the data's true distribution, which no model beats."""
    nll, bpb = floor['nats_per_token'], floor['bits_per_byte']
    figures = {'name': 'true entropy', 'bound': 'exact', 'valid_stories': 1.0}
    return figures | {'nats_per_token': nll, 'perplexity': math.exp(nll), 'bpb': bpb}


def rows_of(results):
    """Return the rows as flat dicts: the models, held-out text to compare their samples with, the true entropy."""
    models = results['models']
    heldout = {f'held-out for {model["name"]}': model['heldout'] for model in models if 'heldout' in model}
    if len({str(figures) for figures in heldout.values()}) == 1:
        heldout = {'held-out text': results['heldout']}
    rows = [*models, *({'name': name, **figures} for name, figures in heldout.items())]
    return [dict(flat(row)) for row in rows + [results['floor']] * bool(results['floor'])]


def flat(figures, prefix=''):
    """Yield (name, value) of nested figures, the names joined by dots, as 'exact.nats_per_token'."""
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f'{prefix}{key}.')
        else:
            yield prefix + key, value


def present(results, columns):
    """Return those columns that a model has a figure of."""
    models = rows_of(results)[: len(results['models'])]
    return [column for column in columns if any(column[0] in row for row in models)]


def cells(results, columns):
    """Return the titles, and a list of texts per row that has any of the columns."""
    rows = [[row['name'], *(cell(row, key, form) for key, form, _ in columns)] for row in rows_of(results)]
    return ['model', *(title for *_, title in columns)], [row for row in rows if any(row[1:])]


def cell(row, key, form):
    """Return a value, and how far its interval goes from it, as text."""
    value = row.get(key, '')
    ci = row.get(key.replace('nats_per_token', 'ci95') if 'nats_per_token' in key else key + '_ci95')
    if value is None:
        return 'n/a'
    if isinstance(value, str):
        return value.replace('none', 'no bound')
    sign = BOUNDS.get(row.get('bound'), '') if key in OF_BOUND else ''
    far = ci and max(ci[1] - value, value - ci[0])
    return sign + format(value, form) + (f' ± {format(far, form.lstrip("+"))}' if ci else '')


def table(results, wide=False):
    """Return the aligned table, names on the left and numbers on the right, with its notes: five columns of at most
    100 characters and a sentence for each model, or all."""
    known = {column[0]: column for columns in GROUPS.values() for column in columns}
    columns = present(results, known.values()) if wide else present(results, map(known.get, FIRST))[:5]
    titles, rows = cells(results, columns)
    rows = rows if wide else [row for row in rows if not row[0].startswith('held-out')]
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    if not wide:
        widths[0] = max(12, min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(columns)))
    lines = []
    for name, *texts in [titles, *rows]:
        name = name if len(name) <= widths[0] else name[: widths[0] - 1] + '…'
        lines.append('  '.join([name.ljust(widths[0]), *map(str.rjust, texts, widths[1:])]))
    sentences = [sentence_of(model, results['floor']) for model in results['models']]
    notes = [NOTES] if wide else [*sentences, '', SHORT_NOTES]
    return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:], '', *notes])


def sentence_of(model, floor):
    """Return one sentence that says how good a model is; floor: the figures of the true entropy, or None."""
    parts, nll = [], model.get('nats_per_token')
    if nll is not None:
        kind = {'exact': '', 'upper': 'at most ', 'none': 'by no bound '}[model['bound']]
        above = f', {nll - floor["nats_per_token"]:.4f} above the true entropy' if floor else ''
        parts.append(f'{kind}{nll:.4f} nats per token{above}')
    for key, what in SAID.items():
        if model.get(key) is not None:
            parts.append(f'{100 * model[key]:.1f} % {what}')
    settings = f' ({model["sampled_with"]})' if 'sampled_with' in model else ''
    return f'{model["name"]}{settings}: {"; ".join(parts) or "see the table"}.'


# ---------------------------------------------------------------------------- the page


def page(results, shown=10):
    """Return the whole report as one HTML page, with the first samples and answers of each model."""
    groups = {name: present(results, columns) for name, columns in GROUPS.items()}
    tables = {name: cells(results, columns) for name, columns in groups.items() if columns}
    template = Environment(autoescape=True).from_string(PAGE.read_text(encoding='utf-8'))
    functions = {'place': place_in(results), 'sentence_of': sentence_of, 'marked': marked}
    return template.render(results, tables=tables, notes=NOTES, shown=shown, **functions)


def place_in(results):
    """Return a function that gives the x of nats per token in the chart of the models, on a log axis."""
    rows = [*results['models'], results['floor'] or {}]
    values = [row['nats_per_token'] for row in rows if row.get('nats_per_token')]
    ends = [row['ci95'][1] for row in rows if row.get('nats_per_token') and row.get('ci95')]
    low, high = min(values, default=1) / 1.1, max(values + ends, default=1) * 1.1
    return lambda nats: round(260 + 540 * math.log(max(low, min(nats, high)) / low) / math.log(high / low), 1)


def marked(text, faults):
    """Return the parts of a text with what the grammar objects to in each, [(part, objection or '')]."""
    parts, end = [], 0
    for fault in faults:
        start = min(fault['position'], len(text))
        stop = start + max(1, len(fault['said']))
        expected = ' or '.join(fault['expected'][:3]) or 'the end'
        objection = f'{fault["kind"] or "text"}; expected: {expected}'
        parts += [(text[end:start], ''), (text[start:stop] or '∅', objection)]
        end = stop
    return [*parts, (text[end:], '')]


# ---------------------------------------------------------------------------- curves of runs


def read_metric(run, metric):
    """Return [(step, value)] of a column of a run's metrics.csv."""
    with open(Path(run) / 'metrics.csv', encoding='utf-8', newline='') as file:
        rows = [row for row in csv.DictReader(file) if row.get(metric)]
    return [(int(row['step']), float(row[metric])) for row in rows]


def text_curve(run, width=78, height=12):
    """Return train/loss (·) and val/loss (o) of a run as lines of at most 78 characters; '' where there are too few."""
    signs = {'train/loss': '·', 'val/loss': 'o'}
    points = [(step, value, sign) for name, sign in signs.items() for step, value in read_metric(run, name)]
    points = [point for point in points if point[0] > 0 and 0 < point[1] < math.inf]
    low, high = (f((value for _, value, _ in points), default=1) for f in (min, max))
    if len(points) < 4 or low == high:
        return ''
    last, columns = max(step for step, *_ in points), width - 9
    grid = [[' '] * columns for _ in range(height)]
    for step, value, sign in points:
        row = round((height - 1) * math.log(high / value) / math.log(high / low))
        grid[row][min(columns - 1, columns * step // last)] = sign
    marks = {i: high * (low / high) ** (i / (height - 1)) for i in (0, height // 2, height - 1)}
    lines = [f'{marks[i]:7.3f} ┤' if i in marks else '        │' for i in range(height)]
    lines = [(line + ''.join(cells)).rstrip() for line, cells in zip(lines, grid)]
    legend = f'{"· train/loss  o val/loss, nats":>38}' + f'step {last:,}'.rjust(width - 38)
    return '\n'.join([*lines, f'        └{"─" * columns}', legend])


def new_figure(width, height):
    """Return a figure of so many inches to draw in."""
    with as_sentence('Curves are drawn by matplotlib, which cannot be imported', 'pip install matplotlib'):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout='constrained')


def draw(runs, metric, out):
    """Write the curves of a metric of several runs as SVG and PNG, with the entropy floor where all share one."""
    require_folder(out)
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    for run in runs:
        curve = [(step, value) for step, value in read_metric(run, metric) if step > 0]
        require(curve, f'{run} has no {metric}; its metrics.csv says what there is.')
        axes.plot(*zip(*curve), marker='.', label=Path(run).name)
    floors = {floor_of(run) for run in runs}
    if metric == 'val/loss' and len(floors) == 1 and None not in floors:
        axes.axhline(floors.pop(), color='gray', linestyle='--', label='true entropy')
    unit = ' (nats per token)' * metric.endswith('loss')
    axes.set(xscale='log', yscale='log', xlabel='step', ylabel=metric + unit)
    for axis in (axes.xaxis, axes.yaxis):  # numbers as people write them
        axis.set_major_formatter('{x:g}')
        axis.set_minor_formatter('{x:g}')
    axes.grid(alpha=0.3, which='both')
    axes.legend()
    for suffix in ('.svg', '.png'):
        figure.savefig(f'{out}{suffix}', dpi=150)
    print(f'{out}.svg, {out}.png: {metric} of {len(runs)} runs')


def floor_of(run):
    """Return the entropy in nats per token of the data that a run was trained on, where it is known."""
    name = settings_of(Path(run), 'config.json').get('dataset') or ''
    folder = Path(name) if Path(name).is_dir() else Path(run).parent.parent / 'data' / name
    return (settings_of(folder, 'config.json').get('floor') or {}).get('nats_per_token')


def list_runs(folder):
    """Return a line per run under a folder: its last step, best val/loss, age and size."""
    lines = []
    for path in sorted(Path(folder).glob('*/metrics.csv'), key=lambda path: path.stat().st_mtime):
        run, results = path.parent, settings_of(path.parent, 'eval_results.json')
        size = sum(file.stat().st_size for file in run.rglob('*') if file.is_file()) / 1e6
        hours = (time.time() - path.stat().st_mtime) / 3600
        age = f'{hours:.1f} h' if hours < 48 else f'{hours / 24:.0f} days'
        step, loss = results.get('step', '-'), results.get('best_val_loss')
        best = '-' if loss is None else f'{loss:.4f} at {results["best_step"]}'
        lines.append(f'{run.name:<40.40}  {step:>8}  {best:>18}  {age:>9}  {size:>8,.0f} MB')
    head = f'{"run":<40}  {"step":>8}  {"best val/loss":>18}  {"age":>9}  {"size":>11}'
    return '\n'.join([head, '-' * len(head), *lines])


def main(words):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument('runs', nargs='+')
    parser.add_argument('--metric', default='val/loss')
    parser.add_argument('--out', default='curves')
    args = parser.parse_args(words)
    others = [run for run in args.runs if not (Path(run) / 'metrics.csv').is_file()]
    if others and len(args.runs) == 1:
        require(Path(others[0]).is_dir(), f'There is no folder {others[0]}; correct the path.')
        print(printable(list_runs(others[0])))
    else:
        require(not others, f'{", ".join(others)} is no folder of a run: it has no metrics.csv.')
        draw(args.runs, args.metric, args.out)


if __name__ == '__main__':
    main(sys.argv[1:])
