"""Draw the README's pictures from the models of `make tour`, or better ones in their place: python docs/figures.py

docs/writing.svg    a text of each kind of model being written, an animation
docs/curves.svg     val/loss of the runs (needs matplotlib)

docs/page.png is taken by hand: the page of serve.py with two models, each in the middle of a text.
"""

import sys
from html import escape
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder
from lm import checkpoints, prompts, report
from lm.configurator import ROOT
from lm.tokenizer import Tokenizer
from lm.watch import AGAIN, DOT, HIDDEN, Frames, wrap
from sampling import generate

MODELS = {  # what the picture says of it: run, options of `generate`
    'ar: from left to right': ('demo-ar', {}),
    'diffusion in blocks of four': ('demo-blocks', {'sampler': 'confidence'}),
    'diffusion of whole rows: anywhere': ('demo-diffusion', {'sampler': 'confidence'}),
}
COLUMNS, WIDTH, LINE = 64, 8.4, 19  # of the text; pixels of a letter and of a line
SECONDS, REST = 9.0, 3.0  # of writing, and with all written
SEED, TOKENS, TEMPERATURE = 5, 145, 0.8


def written(run, options):
    """Return the steps of a text that the model of a run writes."""
    state = checkpoints.load(ROOT / 'out' / run)
    model, tokenizer = checkpoints.load_model(state, 'cpu'), Tokenizer(state['tokenizer'])
    stops, start = prompts.stop_tokens(state, tokenizer), [state['start_token']]
    frames = Frames(tokenizer, stops=stops)
    frames.begin(start)
    options = {'temperature': TEMPERATURE, 'seed': SEED, 'stop_tokens': stops, 'watch': frames, **options}
    generate(model, [start], TOKENS, **options)
    return frames.steps


def places(cells):
    """Return {position: (column, line)} of the first letter of each cell, of a text that is wrapped between words, and
    the number of its lines."""
    cells = [(cell[0], cell[1].replace('\n', ' ')) for cell in cells]
    lines = wrap([(text, '') for _, text in cells], COLUMNS)
    spots, found = iter([(column, row) for row, line in enumerate(lines) for column in range(len(line))]), {}
    for position, text in cells:
        letters = [next(spots) for _ in text]
        if text.strip():
            found[position] = letters[len(text) - len(text.lstrip())]
    return found, len(lines)


def animate(title, steps, top):
    """Return SVG elements in which each token appears when it was written, and how many lines they take."""
    cells = [(i, cell) for i, step in enumerate(steps) for cell in step]
    last = {cell[0]: (i, cell) for i, cell in cells if cell[2] not in (HIDDEN, AGAIN)}
    masked = {cell[0] for _, cell in cells if cell[2] == HIDDEN}
    spots, lines = places([last[position][1] for position in sorted(last)])
    parts = [f'<text x="0" y="{top}" class="title">{escape(title)}</text>']
    for position, (column, row) in spots.items():
        i, (_, text, _, sure, *_) = last[position]
        place = f'x="{column * WIDTH:.1f}" y="{top + LINE * (row + 1.3):.1f}"'
        begin = f'begin="loop.begin+{SECONDS * i / len(steps):.2f}s"'
        appears = f'<set attributeName="visibility" to="visible" {begin} end="loop.end"/>'
        vanishes = f'<set attributeName="visibility" to="hidden" {begin} end="loop.end"/>'
        colour = f'from="hsl({int(120 * sure)},90%,38%)" to="#777"'
        fades = f'<animate attributeName="fill" {colour} {begin} dur="1.5s"/>'
        parts.append(f'<text {place} visibility="hidden">{escape(text.strip())}{appears}{fades}</text>')
        if position in masked:
            parts.append(f'<text {place} class="dot">{DOT * len(text.strip())}{vanishes}</text>')
    return parts, lines


def draw_writing(path):
    parts, top = [], 20
    for title, (run, options) in MODELS.items():
        more, lines = animate(title, written(run, options), top)
        parts, top = parts + more, top + LINE * (lines + 2.4)
    times = f'begin="0s;loop.end" dur="{SECONDS + REST}s"'
    loop = f'<rect width="0" height="0"><animate id="loop" attributeName="x" from="0" to="1" {times}/></rect>'
    style = 'text{font:14px ui-monospace,monospace;fill:#777}.title{font-weight:700;fill:#2a6fdb}.dot{opacity:.45}'
    size = f'width="{COLUMNS * WIDTH + 10:.0f}" height="{top:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>'
    svg = f'{head}{loop}{"".join(parts)}</svg>\n'
    path.write_text(svg, encoding='utf-8')
    print(f'{path}: {len(svg):,} bytes')


def main():
    draw_writing(ROOT / 'docs' / 'writing.svg')
    runs = [ROOT / 'out' / run for run, _ in MODELS.values()]
    report.draw(runs, 'val/loss', ROOT / 'docs' / 'curves')


if __name__ == '__main__':
    main()
