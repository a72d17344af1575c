"""Show what evaluate.py found: an aligned table, and a page that loads nothing else."""

import math
from html import escape

# Key, format and title of each column, a line per metric; a column that no model has is left out.
COLUMNS = """
nats_per_token .4f nats/token | ci_over s interval over | bound s bound | order s written | difference +.4f minus the first
perplexity .2f perplexity | bpb .4f bits/byte
k0.nats_per_token .4f k = 0 | k0.difference +.4f minus the first
steps.steps d S | steps.nats_per_token .4f in S steps | steps.difference +.4f minus the first
exact.nats_per_token .4f left to right | carried.nats_per_token .4f beliefs carried | exact.ci_over s interval over
accuracy .3f accuracy
distinct_1 .3f distinct-1 | distinct_4 .3f distinct-4 | rep_4 .3f rep-4 | entropy .3f entropy
samples_empty d empty | judge_nats .3f judge nats | valid_stories .3f stories | right_share .3f right
wrong_words.name .2f wrong names | wrong_words.pronoun .2f pronouns | wrong_words.place .2f places | wrong_words.thing .2f things
rouge_l .3f ROUGE-L | format_compliance .3f format | followed .3f followed | followed_new_words .3f in new words
infilled.one .3f one gap | infilled.several .3f several | infilled.best_one .3f best of 8: one | infilled.best_several .3f several
tokens_per_sec ,.0f tokens/s | tokens_per_sec_batch ,.0f in a batch | passes_per_token .3f passes/token
"""
COLUMNS = [column.split(maxsplit=2) for line in COLUMNS.strip().split('\n') for column in line.split(' | ')]
NOTES = """\
± is half a 95 % interval, over documents or, where there are fewer than 30 or several per window, over windows,
which is somewhat too narrow where neighbouring windows are alike. exact: the nll itself; upper: an upper bound
of it, so that an upper figure below an exact one is better, and one above it leaves the question open; no bound:
neither, so that it does not compare. Each is of texts written as the table says, at temperature 1: what sample.py
does unless told otherwise. k = 0: the same without beliefs; in S steps: of sampler='ancestral' with steps=S, and
of no other. Left to right: the exact nll of a diffusion model that samples in this order (sampler='blocks' of
length 1, fresh_beliefs=True; beliefs carried: False), on fewer rows.
Accuracy: of the next token for ar, of masked tokens for the others, so the two do not compare. Diversity is
of the samples that are not empty; it depends on their number and length: compare it with that of held-out
text. Stories: the share of samples that are stories of the grammar; right: the share of a sample's text before its
first fault; wrong words: per sample, that do not agree with what was said before. n/a: cannot be computed."""


def entropy_row(floor):
    """Return the figures of the data's true distribution, which no model beats; None if unknown."""
    nll = floor and floor['nats_per_token']
    figures = {'name': 'true entropy', 'bound': 'exact', 'valid_stories': 1.0}
    figures |= {'nats_per_token': nll, 'perplexity': floor and math.exp(nll)}
    return floor and {**figures, 'bpb': floor['bits_per_byte']}


def cells(results):
    """Return the titles of the columns that any model fills, and a list of texts per row.

    Rows: the models, held-out text to compare their samples with, the true entropy.
    """
    models = results['models']
    heldout = {f'held-out for {model["name"]}': model['heldout'] for model in models if 'heldout' in model}
    if len({str(figures) for figures in heldout.values()}) == 1:
        heldout = {'held-out text': results['heldout']}
    rows = [*models, *({'name': name, **figures} for name, figures in heldout.items())]
    rows = [dict(flat(row)) for row in rows + [results['floor']] * bool(results['floor'])]

    columns = [column for column in COLUMNS if any(column[0] in row for row in rows[: len(models)])]
    titles = ['model'] + [title for *_, title in columns]
    return titles, [[row['name']] + [cell(row, key, form) for key, form, _ in columns] for row in rows]


def flat(figures, prefix=''):
    """Yield (name, value) of nested figures, the names joined by dots, as 'exact.nats_per_token'."""
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f'{prefix}{key}.')
        else:
            yield prefix + key, value


def cell(row, key, form):
    """Return a value, and half its interval, as text."""
    value = row.get(key, '')
    ci = row.get(key.replace('nats_per_token', 'ci95') if 'nats_per_token' in key else key + '_ci95')
    if value is None:
        return 'n/a'
    if isinstance(value, str):
        return value.replace('none', 'no bound')
    return format(value, form) + (f' ± {format((ci[1] - ci[0]) / 2, form.lstrip("+"))}' if ci else '')


def table(results):
    """Return the aligned table, names on the left and numbers on the right, with its notes."""
    titles, rows = cells(results)
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    lines = []
    for name, *texts in [titles, *rows]:
        lines.append('  '.join([name.ljust(widths[0]), *map(str.rjust, texts, widths[1:])]))
    return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:], '', NOTES])


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; }
pre { background: #f6f6f4; padding: .7rem; overflow-x: auto; }
.samples { display: flex; gap: 1rem; }
.samples div { flex: 1; }
.samples pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def page(results, shown=10):
    """Return the whole report as one HTML page, with the first samples and answers of each model."""
    title = f'Models on {escape(results["dataset"])}'
    versions = ', '.join(f'{name} {version}' for name, version in results['versions'].items())
    columns = []
    for model in results['models']:
        texts = [escape(text) for text in model.get('samples', [])[:shown]]
        for i, faults in enumerate(model.get('faults', [])[:shown]):
            texts[i] += ''.join(f'\n<i>{escape(fault)}</i>' for fault in faults)
        answers = model.get('answers', [])[:shown]
        texts += [f'{escape(prompt)}<b>{escape(answer)}</b>' for prompt, answer, _ in answers]
        texts = ''.join(f'<pre>{text}</pre>' for text in texts)
        columns.append(f'<div><h3>{escape(model["name"])}</h3>{texts}</div>')
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<pre>{escape(table(results))}</pre>
<div class="samples">{''.join(columns)}</div>
<p>Rows of {results['block_size']} tokens, {escape(results['mode'])}; {escape(versions)}.</p>
</body></html>
"""
