"""Watch a text being written: its steps as frames, shown in place in a terminal or on a page that needs nothing else.

frames = Frames(tokenizer, Terminal())
frames.begin(prompt_ids)
generate(model, [prompt_ids], 100, watch=frames)
save_page('watch.html', 'a title', frames.steps)
"""

import json
import shutil
import sys
from functools import cache
from itertools import islice, zip_longest
from pathlib import Path
from textwrap import TextWrapper

from lm.configurator import printable
from lm.files import save_atomically

PAGE = Path(__file__).with_name('page.html')  # of serve.py, which shows only the steps where it holds some
GIVEN, WRITTEN, HIDDEN, AGAIN = 'gwhr'  # kinds of a position: of the prompt, written, hidden, hidden again
DOT = '·'
SURENESS = 203, 215, 227, 155, 83  # of 256 colours, from red to green, by the probability of a new token
DIM, MAGENTA, RESET = '\033[38;5;{}m', '\033[38;5;201m', '\033[0m'


class Frames:
    """Keeps the steps in which `generate` writes the first row, as its `watch`.

    steps: for each the cells that changed, [position, text, kind, probability, candidates]; candidates: [[text,
    probability], ...] of what an `sdd` believes about a hidden position, left out otherwise.
    """

    shows_beliefs = True

    def __init__(self, tokenizer, show=None, stops=()):
        """show: called with all cells and the positions that changed, after each step; stops: tokens that end a row."""
        self.tokenizer, self.show, self.stops = tokenizer, show, {*stops}
        self.steps, self.cells, self.kept, self.tokens, self.start, self.ended = [], [], [], [], 0, False
        self.text_of = cache(self.text_of)
        ids = range(tokenizer.vocab_size)  # behind some text a word keeps the space that it begins with
        self.before = next(([i] for i in ids if tokenizer.decode([i]).strip()), [])

    def begin(self, ids):
        """Start with a prompt, a list of token ids."""
        self.cells, self.tokens = [self.cell(i, token, GIVEN) for i, token in enumerate(ids)], list(ids)
        self.steps, self.kept = [], []
        self.keep()

    def __call__(self, start, x, confidence, belief):
        """Take a step: tokens x (B, L) from position `start` on, how sure the model is of new ones (B, L), a belief."""
        self.ended |= start < self.start  # a speculative sampler comes to the next row
        if self.ended:
            return
        row, sure, self.start = x[0].tolist(), confidence[0].tolist(), start
        ids, probabilities = ([], []) if belief is None else (part[0].tolist() for part in belief)
        for i, token in enumerate(row):
            position, is_hidden = start + i, token == self.tokenizer.mask_id
            known = self.cells[position] if position < len(self.cells) else [position, '', HIDDEN]
            if not is_hidden and known[2] in (GIVEN, WRITTEN) and not sure[i]:
                continue
            cell = self.cell(position, token, WRITTEN, sure[i], known[2])
            if is_hidden and ids:
                likely = [(t, p) for t, p in zip(ids[i], probabilities[i]) if p > 0]
                cell.append([[self.text_of(t), round(p, 3)] for t, p in likely])
            self.cells[position : position + 1] = [cell]
            self.tokens[position : position + 1] = [token]
        written = [token for i, token in enumerate(row, start) if self.cells[i][2] != GIVEN]
        self.ended = not self.stops.isdisjoint(written) and self.tokenizer.mask_id not in row
        self.keep()

    def end(self, length):
        """Take away what stands behind the `length` tokens of the text, as to the end of a block."""
        self.tokens = self.tokens[:length]
        for cell in self.cells[length:]:
            cell[1:] = ['', WRITTEN, 0.0]
        if self.cells != self.kept:
            self.keep()

    def keep(self):
        """Keep the cells that have changed as a step, and show it, unless it is the prompt."""
        self.join_parts()
        changed = [cell for cell, before in zip_longest(self.cells, self.kept) if cell != before]
        self.steps.append([list(cell) for cell in changed])
        self.kept = [list(cell) for cell in self.cells]
        if self.show and len(self.steps) > 1:
            self.show(self.cells, {cell[0] for cell in changed})

    def cell(self, position, token, kind, probability=0.0, before=HIDDEN):
        """Return a cell; its kind is given for a token that shows, and else follows from the kind before."""
        if token == self.tokenizer.mask_id:
            return [position, '', AGAIN if before in (WRITTEN, AGAIN) else HIDDEN, round(probability, 3)]
        return [position, self.text_of(token), kind, round(probability, 3)]

    def text_of(self, *tokens):
        return self.tokenizer.decode([*self.before, *tokens])[len(self.tokenizer.decode(self.before)) :]

    def join_parts(self):
        """Give a character of several tokens to the last of them."""
        texts, parts = [], []
        for cell, token in zip(self.cells, self.tokens):
            texts.append(self.text_of(token) if cell[2] in (GIVEN, WRITTEN) else '')
            parts = [*parts[-3:], token] if '\ufffd' in texts[-1] else []
            for size in range(2, len(parts) + 1):
                text = self.text_of(*parts[-size:])
                if '\ufffd' not in text:
                    texts[-size:], parts = [''] * (size - 1) + [text], []
                    break
        for cell, text in zip(self.cells, texts):
            cell[1] = text


class Terminal:
    """Shows the cells in place, the last lines that fit; plain steps, one per line, where the output is no terminal."""

    def __init__(self, file=sys.stdout):
        self.file, self.lines, self.step = file, 0, 0

    def __call__(self, cells, changed):
        self.step += 1
        if not self.file.isatty():
            text = ''.join(DOT if cell[2] in (HIDDEN, AGAIN) else cell[1] for cell in cells)
            print(f'step {self.step}: {printable(text)}', file=self.file)
            return
        columns, rows = shutil.get_terminal_size()
        lines = wrap([piece(cell, cell[0] in changed) for cell in cells], columns)[2 - rows :]
        up = f'\033[{self.lines}F\033[J' if self.lines else ''
        print(up + '\n'.join(lines), file=self.file, flush=True)
        self.lines = len(lines)


def piece(cell, is_new):
    """Return the text of a cell and the escape sequence of its colour."""
    _, text, kind, probability, *candidates = cell
    if kind in (GIVEN, WRITTEN):
        sureness = SURENESS[min(4, int(5 * probability))]
        return printable(text), DIM.format(sureness) if is_new else ''
    if candidates and candidates[0]:
        text, probability = candidates[0][0]
        return printable(text) or DOT, DIM.format(236 + int(18 * probability))
    return DOT, MAGENTA if kind == AGAIN else DIM.format(240)


def wrap(pieces, columns):
    """Break coloured pieces of text into lines of at most so many columns, between words."""
    lines, shown = [], iter([f'{colour}{x}{RESET}' if colour else x for text, colour in pieces for x in text])
    wrapper = TextWrapper(columns, expand_tabs=False, replace_whitespace=False, drop_whitespace=False)
    for paragraph in ''.join(text for text, _ in pieces).split('\n'):
        for line in wrapper.wrap(paragraph) or ['']:
            lines.append(''.join(islice(shown, len(line))))
        next(shown, None)  # the line break
    return lines


def save_page(path, title, steps):
    """Write one HTML file with a slider and a play button over the steps."""
    data = json.dumps({'title': title, 'frames': steps}, ensure_ascii=False).replace('<', '\\u003c')
    page = PAGE.read_text(encoding='utf-8').replace('const DATA = null', f'const DATA = {data}', 1)
    save_atomically(path, lambda file: file.write(page.encode()))
