"""What evaluate.py found, for people: one aligned table, and a page that needs nothing but itself."""

import csv
import math
import textwrap
from html import escape

# Title, key of the figure, key of its interval, how a number is written. A column that no row has is left out.
COLUMNS = (
    ('nats/token', 'nats_per_token', 'ci95', '.4f'),
    ('bound', 'bound', None, ''),
    ('minus the first', 'difference', 'difference_ci95', '+.4f'),
    ('perplexity', 'perplexity', 'perplexity_ci95', '.2f'),
    ('bits/byte', 'bpb', 'bpb_ci95', '.4f'),
    ('k = 0', 'k0.nats_per_token', 'k0.ci95', '.4f'),
    ('minus the first', 'k0.difference', 'k0.difference_ci95', '+.4f'),
    ('in steps', 'steps.nats_per_token', 'steps.ci95', '.4f'),
    ('minus the first', 'steps.difference', 'steps.difference_ci95', '+.4f'),
    ('left to right', 'exact.nats_per_token', 'exact.ci95', '.4f'),
    ('accuracy', 'accuracy', 'accuracy_ci95', '.3f'),
    ('choices', 'choices_accuracy', 'choices_ci95', '.3f'),
    ('self-BLEU-4', 'self_bleu_4', None, '.3f'),
    ('distinct-1', 'distinct_1', None, '.3f'),
    ('distinct-4', 'distinct_4', None, '.3f'),
    ('rep-4', 'rep_4', None, '.3f'),
    ('entropy', 'entropy', None, '.3f'),
    ('judge nats', 'judge_nats', None, '.3f'),
    ('stories', 'valid_stories', 'valid_stories_ci95', '.3f'),
    ('story nats/byte', 'story_nats_per_byte', None, '.4f'),
    ('ROUGE-L', 'rouge_l', 'rouge_l_ci95', '.3f'),
    ('token F1', 'token_f1', 'token_f1_ci95', '.3f'),
    ('exact match', 'exact_match', 'exact_match_ci95', '.3f'),
    ('format', 'format_compliance', None, '.3f'),
    ('followed', 'followed', 'followed_ci95', '.3f'),
    ('tokens/s', 'tokens_per_sec', None, ',.0f'),
    ('in a batch', 'tokens_per_sec_batch', None, ',.0f'),
    ('first token s', 'seconds_to_first_token', None, '.4f'),
    ('passes/token', 'passes_per_token', None, '.3f'),
    ('peak MB', 'peak_memory_mb', None, ',.0f'),
)
NOTES = (
    '± is half a 95 % interval. exact: -log p itself; upper: a bound that it does not exceed, so that an upper '
    'one below an exact one is better, and one above it leaves the question open. For sdd it is the bound '
    'of writing one token at a time, each after two passes; k = 0: the same without beliefs; in steps: the bound '
    "of sampler='ancestral' at temperature 1 in bound_steps steps, which other samplers void. Left to right: the "
    'exact value of a diffusion model that writes in this order, on fewer rows. Accuracy: of the next token '
    'for ar, of hidden tokens for the others, so the two do not compare. Figures of samples depend on their '
    'number and length: read them beside those of held-out text. n/a: cannot be computed.'
)


# ---------------------------------------------------------------------------- table


def floor_row(floor):
    """The last row, where the data's true distribution is known (prepare/stories.py): what no model beats."""
    if floor is None:
        return None
    return {
        'name': 'entropy floor',
        'bound': 'exact',
        'nats_per_token': floor['nats_per_token'],
        'perplexity': math.exp(floor['nats_per_token']),
        'bpb': floor['bits_per_byte'],
        'valid_stories': 1.0,
        'story_nats_per_byte': floor['nats_per_byte'],
    }


def rows_of(results):
    """The table's rows: models, the held-out text that their samples are read beside, the floor."""
    models, rows = results['models'], list(results['models'])
    heldout = [model['heldout'] for model in models if 'heldout' in model]
    if heldout and all(one == heldout[0] for one in heldout):
        rows.append({'name': 'held-out text', **heldout[0]})
    elif heldout:  # samples differ in length, and so does what they are compared with
        rows += [
            {'name': f'held-out for {model["name"]}', **model['heldout']}
            for model in models
            if 'heldout' in model
        ]
    return rows + [row for row in [results['floor']] if row]


def lookup(row, key):
    """The value at a key such as 'exact.nats_per_token', and whether there is one."""
    for part in key.split('.'):
        if not isinstance(row, dict) or part not in row:
            return None, False
        row = row[part]
    return row, True


def cell(row, key, ci_key, form):
    value, found = lookup(row, key)
    if not found:
        return ''
    if value is None:
        return 'n/a'
    text = format(value, form)
    ci = lookup(row, ci_key)[0] if ci_key else None
    return f'{text} ± {format((ci[1] - ci[0]) / 2, form.lstrip("+"))}' if ci else text


def cells(results):
    """Titles, and a list of texts per row, of the columns that any row fills."""
    rows = rows_of(results)
    columns = [column for column in COLUMNS if any(lookup(row, column[1])[1] for row in results['models'])]
    return (
        ['model'] + [column[0] for column in columns],
        [[row['name']] + [cell(row, *column[1:]) for column in columns] for row in rows],
    )


def table(results):
    """The aligned table as text, names on the left and numbers on the right, and what it means."""
    titles, rows = cells(results)
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    lines = [
        '  '.join(
            [line[0].ljust(widths[0])] + [text.rjust(width) for text, width in zip(line[1:], widths[1:])]
        )
        for line in [titles, *rows]
    ]
    return '\n'.join(
        [lines[0], '-' * len(lines[0]), *lines[1:], '', *textwrap.wrap(NOTES, 110), *remarks(results)]
    )


def remarks(results):
    """What a reader has to know beside the table."""
    return [
        f'{model["samples_empty"]} of {len(model["samples"])} samples of {model["name"]} are empty; figures of '
        'samples leave them out.'
        for model in results['models']
        if model.get('samples_empty')
    ]


# ---------------------------------------------------------------------------- loss curves

WIDTH, HEIGHT, MARGIN = 640, 280, 44
COLOURS = ('#1b6ca8', '#c8553d', '#3a7d44', '#7b4b94', '#b8860b', '#444444')


def read_curves(path):
    """{'train/loss': [(step, loss)], 'val/loss': [...]} of a run's metrics.csv; empty where there is none."""
    curves = {'train/loss': [], 'val/loss': []}
    if path.is_file():
        with open(path, newline='', encoding='utf-8') as file:
            for row in csv.DictReader(file):
                for name, points in curves.items():
                    if row.get(name):
                        points.append((int(row['step']), float(row[name])))
    return {name: points for name, points in curves.items() if points}


def ticks(low, high):
    """About five round numbers within [low, high]."""
    rough = (high - low) / 5 or 1.0
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(curves):
    """Losses over steps as SVG: each model a colour, validation drawn through, training thin."""
    points = [point for of_model in curves.values() for line in of_model.values() for point in line]
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if not points:
        return '<p>None of the runs has a metrics.csv beside its checkpoint.</p>'
    (left, right), (low, high) = ((min(column), max(column)) for column in zip(*points))

    def place(x, y):
        return (
            MARGIN + (x - left) / ((right - left) or 1) * (WIDTH - 2 * MARGIN),
            HEIGHT - MARGIN + (low - y) / ((high - low) or 1) * (HEIGHT - 2 * MARGIN),
        )

    parts = []
    for x in ticks(left, right):
        parts.append(
            f'<text x="{place(x, low)[0]:.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{x:g}</text>'
        )
    for y in ticks(low, high):
        at = place(left, y)[1]
        parts.append(
            f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>'
            f'<text x="{MARGIN - 6}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>'
        )
    for i, (model, of_model) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        for name, line in of_model.items():
            path = ' '.join(
                '{:.1f},{:.1f}'.format(*place(*point)) for point in line if math.isfinite(point[1])
            )
            width, opacity = (2, 1) if name == 'val/loss' else (1, 0.45)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" '
                f'stroke-opacity="{opacity}"><title>{escape(model)}: {name}</title></polyline>'
            )
        parts.append(
            f'<text x="{WIDTH - MARGIN}" y="{MARGIN + 16 * i}" text-anchor="end" fill="{colour}">'
            f'{escape(model)}</text>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss over steps">{"".join(parts)}</svg>'
    )


# ---------------------------------------------------------------------------- page

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }
h1, h2 { font-weight: 600; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #888; }
svg { max-width: 44rem; font-size: 11px; } .grid { stroke: #e4e4e4; } .notes { color: #555; max-width: 60rem; }
.samples { display: grid; gap: 1rem; grid-auto-flow: column; grid-auto-columns: minmax(20rem, 1fr); overflow-x: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: .7rem; border-radius: 4px; }
"""


def page(results, curves, shown=10):
    """The whole report as one HTML page without external resources; `curves` is {model: read_curves()}."""
    titles, rows = cells(results)
    head = ''.join(f'<th>{escape(title)}</th>' for title in titles)
    body = ''.join('<tr>' + ''.join(f'<td>{escape(text)}</td>' for text in row) + '</tr>\n' for row in rows)
    title = f'Models on {escape(results["dataset"])}'
    versions = ', '.join(f'{name} {version}' for name, version in results['versions'].items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<div class="scroll"><table><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table></div>
<p class="notes">{escape(' '.join([NOTES, *remarks(results)]))}</p>
<h2>Loss while training</h2>
<p class="notes">Thick: validation. Thin: training. A diffusion model's loss is an upper bound.</p>
{chart(curves)}
{samples(results['models'], shown)}
<p class="notes">Rows of {results['block_size']} tokens, {escape(results['mode'])}; {escape(versions)}.</p>
</body></html>
"""


def samples(models, shown):
    """The first samples of each model, side by side; for an instruction model its answers."""
    columns = []
    for model in models:
        texts = [escape(text) for text in model.get('samples', [])[:shown]]
        texts += [
            f'{escape(prompt)}<b>{escape(answer)}</b>'
            for prompt, answer, _ in model.get('answers', [])[:shown]
        ]
        if texts:
            columns.append(
                f'<div><h3>{escape(model["name"])}</h3>'
                + ''.join(f'<pre>{text}</pre>' for text in texts)
                + '</div>'
            )
    return f'<h2>Samples</h2><div class="samples">{"".join(columns)}</div>' if columns else ''
