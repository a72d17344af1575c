"""Show what evaluate.py found: an aligned table, and a page that loads nothing else."""

import csv
import math
import textwrap
from html import escape
from itertools import cycle

COLUMNS = (  # title, key, format of the numbers; a column that no model has is left out
    ('nats/token', 'nats_per_token', '.4f'),
    ('interval over', 'ci_over', ''),
    ('bound', 'bound', ''),
    ('minus the first', 'difference', '+.4f'),
    ('perplexity', 'perplexity', '.2f'),
    ('bits/byte', 'bpb', '.4f'),
    ('k = 0', 'k0.nats_per_token', '.4f'),
    ('minus the first', 'k0.difference', '+.4f'),
    ('in steps', 'steps.nats_per_token', '.4f'),
    ('minus the first', 'steps.difference', '+.4f'),
    ('left to right', 'exact.nats_per_token', '.4f'),
    ('interval over', 'exact.ci_over', ''),
    ('accuracy', 'accuracy', '.3f'),
    ('choices', 'choices_accuracy', '.3f'),
    ('self-BLEU-4', 'self_bleu_4', '.3f'),
    ('distinct-1', 'distinct_1', '.3f'),
    ('distinct-4', 'distinct_4', '.3f'),
    ('rep-4', 'rep_4', '.3f'),
    ('entropy', 'entropy', '.3f'),
    ('empty', 'samples_empty', 'd'),
    ('judge nats', 'judge_nats', '.3f'),
    ('stories', 'valid_stories', '.3f'),
    ('story nats/byte', 'story_nats_per_byte', '.4f'),
    ('ROUGE-L', 'rouge_l', '.3f'),
    ('token F1', 'token_f1', '.3f'),
    ('exact match', 'exact_match', '.3f'),
    ('format', 'format_compliance', '.3f'),
    ('followed', 'followed', '.3f'),
    ('tokens/s', 'tokens_per_sec', ',.0f'),
    ('in a batch', 'tokens_per_sec_batch', ',.0f'),
    ('first token s', 'seconds_to_first_token', '.4f'),
    ('passes/token', 'passes_per_token', '.3f'),
    ('peak MB', 'peak_memory_mb', ',.0f'),
)
CI_KEYS = {'nats_per_token': 'ci95', 'choices_accuracy': 'choices_ci95'}  # others: key + '_ci95'
NOTES = """\
± is half a 95 % interval, over documents or, where there are fewer than 30, over windows, which is
somewhat too narrow where neighbouring windows are alike. exact: the nll itself; upper: an upper bound of
it, so that an upper figure below an exact one is better, and one above it leaves the question open; no
bound: neither, so that it does not compare. For sdd the bound is of sampling one token at a time, each
after two passes; k = 0: the same without beliefs; in steps: of sampler='ancestral' at temperature 1 in
bound_steps steps, and of no other sampler. Left to right: the exact nll of a diffusion model that samples
in this order, on fewer rows. Accuracy: of the next token for ar, of masked tokens for the others, so the
two do not compare. Diversity is of the samples that are not empty; it depends on their number and length:
compare it with that of held-out text. n/a: cannot be computed."""


def entropy_row(floor):
    """Return the figures of the data's true distribution, which no model beats; None if unknown."""
    return floor and {
        'name': 'true entropy',
        'bound': 'exact',
        'nats_per_token': floor['nats_per_token'],
        'perplexity': math.exp(floor['nats_per_token']),
        'bpb': floor['bits_per_byte'],
        'valid_stories': 1.0,
        'story_nats_per_byte': floor['nats_per_byte'],
    }


def cells(results):
    """Return the titles of the columns that any model fills, and a list of texts per row.

    Rows: the models, held-out text to compare their samples with, the true entropy.
    """
    models = results['models']
    heldout = {f'held-out for {model["name"]}': model['heldout'] for model in models if 'heldout' in model}
    if len({str(figures) for figures in heldout.values()}) == 1:
        heldout = {'held-out text': results['heldout']}
    rows = [*models, *({'name': name, **figures} for name, figures in heldout.items())]
    rows += [results['floor']] if results['floor'] else []

    columns = [column for column in COLUMNS if any(lookup(model, column[1]) != '' for model in models)]
    titles = ['model'] + [title for title, *_ in columns]
    return titles, [[row['name']] + [cell(row, key, form) for _, key, form in columns] for row in rows]


def lookup(row, key):
    """Return the value at a key such as 'exact.nats_per_token', '' where there is none."""
    for part in key.split('.'):
        row = row.get(part, '') if isinstance(row, dict) else ''
    return row


def cell(row, key, form):
    """Return a value, and half its interval, as text."""
    value, (*group, name) = lookup(row, key), key.split('.')
    ci = lookup(row, '.'.join([*group, CI_KEYS.get(name, name + '_ci95')]))
    if value is None:
        return 'n/a'
    if isinstance(value, str):
        return value.replace('none', 'no bound')
    return format(value, form) + (f' ± {format((ci[1] - ci[0]) / 2, form.lstrip("+"))}' if ci else '')


def table(results):
    """Return the aligned table, names on the left and numbers on the right, with its notes."""
    titles, rows = cells(results)
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    lines = [
        '  '.join([name.ljust(widths[0]), *map(str.rjust, texts, widths[1:])])
        for name, *texts in [titles, *rows]
    ]
    return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:], '', *textwrap.wrap(NOTES, 110)])


# ---------------------------------------------------------------------------- page

COLOURS = ('#1b6ca8', '#c8553d', '#3a7d44', '#7b4b94', '#b8860b', '#444444')
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; }
pre { background: #f6f6f4; padding: .7rem; overflow-x: auto; }
svg { width: 100%; height: 18rem; border: 1px solid #ddd; }
polyline { fill: none; vector-effect: non-scaling-stroke; }
.samples { display: flex; gap: 1rem; }
.samples div { flex: 1; min-width: 0; }
.samples pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def read_loss_curves(path):
    """Return {'train/loss': [(step, loss)], 'val/loss': [...]} of a metrics.csv, {} without one."""
    if not path.is_file():
        return {}
    with open(path, newline='', encoding='utf-8') as file:
        metrics = list(csv.DictReader(file))
    return {
        name: [(int(row['step']), float(row[name])) for row in metrics if row.get(name)]
        for name in ('train/loss', 'val/loss')
    }


def loss_chart(curves):
    """Return losses over steps as SVG in their own units: a colour per model, validation thick."""
    points = [point for lines in curves.values() for line in lines.values() for point in line]
    steps, losses = zip(*[(0, math.nan), *points])
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return '<p>None of the runs has a metrics.csv beside its checkpoint.</p>'

    low, high, last = min(finite), max(finite), max(steps)
    legend, polylines = [], []
    for colour, (model, lines) in zip(cycle(COLOURS), curves.items()):
        legend.append(f'<b style="color: {colour}">{escape(model)}</b>')
        for name, line in lines.items():
            path = ' '.join(f'{step},{high - loss:.6g}' for step, loss in line if math.isfinite(loss))
            width = 2 if name == 'val/loss' else 0.5
            polylines.append(f'<polyline points="{path}" stroke="{colour}" stroke-width="{width}"/>')
    return (
        f'<p>{", ".join(legend)}: from {low:.4g} at the bottom to {high:.4g}, steps 0 to {last}; thick: '
        f'validation, thin: training.</p>\n<svg viewBox="0 0 {last or 1} {high - low or 1:.6g}" '
        f'preserveAspectRatio="none" role="img" aria-label="loss over steps">{"".join(polylines)}</svg>'
    )


def page(results, curves, shown=10):
    """Return the whole report as one HTML page; curves: {model: read_loss_curves(path)}."""
    title = f'Models on {escape(results["dataset"])}'
    versions = ', '.join(f'{name} {version}' for name, version in results['versions'].items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<pre>{escape(table(results))}</pre>
<h2>Loss</h2>
{loss_chart(curves)}
<h2>Samples</h2>
<div class="samples">{''.join(sample_column(model, shown) for model in results['models'])}</div>
<p>Rows of {results['block_size']} tokens, {escape(results['mode'])}; {escape(versions)}.</p>
</body></html>
"""


def sample_column(model, shown):
    """Return the first samples of a model, and its answers to instructions."""
    texts = [escape(text) for text in model.get('samples', [])[:shown]]
    answers = model.get('answers', [])[:shown]
    texts += [f'{escape(prompt)}<b>{escape(answer)}</b>' for prompt, answer, _ in answers]
    return f'<div><h3>{escape(model["name"])}</h3>{"".join(f"<pre>{text}</pre>" for text in texts)}</div>'
