"""Watching a text being written: frames, the terminal, the page."""

import io
import json
import re
import runpy

import pytest
import tokenizers
import torch
from conftest import letter_tokenizer, write_small_checkpoint
from test_sampling import MASK, tiny

from lm.configurator import ROOT
from lm.tokenizer import Tokenizer, build
from lm.watch import DOT, Frames, Terminal, save_page, wrap
from sampling import generate

TOKENIZER = build('char', ['abcdefgh'])


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def letters(monkeypatch):
    """Makes the tokenizer's ids those of test_sampling's tiny models."""
    monkeypatch.setattr(TOKENIZER, 'mask_id', MASK)
    monkeypatch.setattr(TOKENIZER, 'decode', lambda ids: ''.join(chr(97 + i % 26) for i in ids))
    return TOKENIZER


def text_of(cells):
    return ''.join(cell[1] for cell in cells)


def test_a_character_of_several_tokens_is_shown_when_all_are_there():
    tokenizer = build('bytes')
    text, mask = 'Zoë’s', tokenizer.mask_id
    ids = tokenizer.encode(text)
    frames = Frames(tokenizer)
    frames.begin(ids)
    assert text_of(frames.cells) == text_of(frames.steps[0]) == text and len(ids) == 8

    frames.begin([ids[0], *[mask] * 7])
    steps = {(3, 5): 'Zo\ufffd\ufffd\ufffds', (5,): 'Zoë\ufffd\ufffds', (): text, (3,): 'Zo\ufffd’s'}
    for hidden, shown in steps.items():
        row = [mask if i in hidden else token for i, token in enumerate(ids)]
        frames(0, torch.tensor([row]), torch.ones(1, 8), None)
        assert text_of(frames.cells) == shown
    cells = {cell[0]: cell for step in frames.steps for cell in step}
    assert [cells[i] for i in range(8)] == frames.cells  # the page has what the terminal has


@pytest.mark.parametrize(
    'architecture, options, length',
    [
        ('ar', {}, 7),
        ('diffusion', {}, 7),
        ('diffusion', {'sampler': 'confidence', 'steps': 3}, 3),
        ('diffusion', {'sampler': 'entropy', 'threshold': 2.0}, None),
        ('sdd', {}, 7),
    ],
    ids=str,
)
def test_the_frames_end_in_the_text_and_say_how_sure_the_model_was(architecture, options, length, letters):
    frames = Frames(letters)
    frames.begin([1, 2, 3])
    (row,) = generate(tiny(architecture), [[1, 2, 3]], 7, watch=frames, **options)
    assert text_of(frames.cells) == letters.decode(row)
    first, *steps = frames.steps
    assert [cell[:3] for cell in first] == [[0, 'b', 'g'], [1, 'c', 'g'], [2, 'd', 'g']]
    assert length is None or len(steps) == length
    written = [cell for step in steps for cell in step if cell[2] == 'w']
    assert len(written) == 7 and all(0 < cell[3] <= 1 for cell in written)
    json.dumps(frames.steps)


def test_hidden_positions_of_an_sdd_hold_candidates_with_their_probabilities(letters):
    frames = Frames(letters)
    frames.begin([1])
    generate(tiny('sdd', k=3), [[1]], 5, watch=frames)
    cells = [cell for step in frames.steps[1:-1] for cell in step if cell[2] == 'h']
    assert cells and all(len(cell[4]) == 3 for cell in cells)
    assert all(0 < sum(p for _, p in cell[4]) <= 1.002 for cell in cells)


def test_what_is_hidden_again_is_marked(letters):
    frames = Frames(letters)
    frames.begin([1])
    generate(tiny('diffusion'), [[1]], 12, sampler='remdm', eta=0.9, steps=30, watch=frames)
    kinds = [(cell[0], cell[2]) for step in frames.steps for cell in step]
    again = [i for i, (_, kind) in enumerate(kinds) if kind == 'r']
    assert again and all((kinds[i][0], 'w') in kinds[:i] for i in again)
    assert {cell[2] for cell in frames.cells} == {'g', 'w'}


def test_a_block_model_shows_the_text_so_far(letters):
    frames = Frames(letters)
    frames.begin([1, 2])
    model = tiny('diffusion', block_length=(4,), ar_weight=1.0)
    (row,) = generate(model, [[1, 2]], 8, watch=frames)
    assert text_of(frames.cells[: len(row)]) == letters.decode(row)
    spoken = Frames(letters)
    spoken.begin([1, 2])
    (row,) = generate(model, [[1, 2]], 8, sampler='speculative', watch=spoken)
    assert text_of(spoken.cells[: len(row)]) == letters.decode(row)


@pytest.mark.faults
@pytest.mark.parametrize('sampler', ['', 'speculative', 'ar'])
def test_what_is_shown_is_the_first_text_up_to_its_end(sampler, letters):
    model = tiny('ar') if sampler == 'ar' else tiny('diffusion', block_length=(4,), ar_weight=1.0)
    options = {'seed': 8} if sampler == 'ar' else {'seed': 8, 'sampler': sampler}
    (plain, *_) = generate(model, [[1, 2]] * 3, 24, **options)
    options['stop_tokens'] = stops = [plain[5]]
    frames = Frames(letters, stops=stops)
    frames.begin([1, 2])
    first, *others = generate(model, [[1, 2]] * 3, 24, watch=frames, **options)
    assert first == plain[: plain.index(stops[0], 2) + 1] and max(map(len, others)) > len(first)
    assert text_of(frames.cells[: len(first)]) == letters.decode(first)
    assert len(frames.cells) <= len(first) + 3  # to the end of its block
    frames.end(len(first))
    shown = {cell[0]: cell[1] for step in frames.steps for cell in step}
    assert text_of(frames.cells) == letters.decode(first) == ''.join(shown[i] for i in sorted(shown))


@pytest.mark.faults
def test_words_keep_the_spaces_that_they_begin_with():
    inner = tokenizers.Tokenizer(
        tokenizers.models.Unigram([('<unk>', 0), ('\u2581a', -1), ('\u2581bc', -1), ('d', -1)], 0)
    )
    inner.pre_tokenizer, inner.decoder = (
        tokenizers.pre_tokenizers.Metaspace(),
        tokenizers.decoders.Metaspace(),
    )
    frames = Frames(Tokenizer(inner.to_str()))
    frames.begin(frames.tokenizer.encode('bc a bcd'))
    assert text_of(frames.cells).strip() == 'bc a bcd'


def test_watching_changes_no_text():
    for architecture in ('ar', 'diffusion', 'sdd'):
        model = tiny(architecture)
        plain, watched = (generate(model, [[1, 2]], 6, seed=3, watch=f) for f in (None, lambda *_: None))
        assert plain == watched


@pytest.mark.faults
def test_who_shows_no_beliefs_does_not_make_a_model_compute_them(monkeypatch):
    model, calls = tiny('sdd'), []
    compute = model.chunk_top_k
    monkeypatch.setattr(model, 'chunk_top_k', lambda *args: calls.append(1) or compute(*args))
    counts = []
    for watch in (None, lambda *_: None):
        generate(model, [[1, 2]], 6, watch=watch)
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0]


def step(frames, ids, sure):
    frames(0, torch.tensor([ids]), torch.tensor([sure]), None)


def test_a_terminal_is_written_over_and_a_file_gets_a_line_per_step(letters):
    screen, file = Screen(), io.StringIO()
    for out in (screen, file):
        frames = Frames(letters, Terminal(out))
        frames.begin([1])
        step(frames, [1, MASK, MASK], [0.0, 0.0, 0.0])
        step(frames, [1, MASK, 3], [0.0, 0.0, 0.95])
    assert file.getvalue() == f'step 1: b{DOT}{DOT}\nstep 2: b{DOT}d\n'
    first, second = screen.getvalue().split('\033[1F\033[J')
    assert re.sub(r'\033\[[\d;]*m', '', second) == f'b{DOT}d\n'
    assert '\033[38;5;83md' in second and '\033[38;5;83m' not in first  # green: it was sure


def test_lines_break_between_words_and_colours_take_no_room():
    assert wrap([('one two', ''), (' three', '')], 8) == ['one two ', 'three']
    assert wrap([('a\nbcdefghijk', '')], 5) == ['a', 'bcdef', 'ghijk']
    assert wrap([('ab', 'C')], 5) == ['Ca\033[0mCb\033[0m']


def test_a_text_cannot_leave_the_data_of_the_page(tmp_path):
    save_page(tmp_path / 'w.html', '</script><script>alert(1)', [[[0, '</script>', 'g', 0.0]]])
    page = (tmp_path / 'w.html').read_text()
    assert '</script><script>alert' not in page and 'const DATA = {"title"' in page


def test_a_terminal_is_not_steered_by_what_a_model_writes(letters, monkeypatch):
    monkeypatch.setattr(letters, 'decode', lambda ids: '\033[2J' * len(ids))
    screen = Screen()
    frames = Frames(letters, Terminal(screen))
    frames.begin([1])
    step(frames, [1, 2], [0.0, 0.9])
    assert '\033[2J' not in screen.getvalue() and r'\x1b[2J' in re.sub(
        r'\033\[[\d;]*m', '', screen.getvalue()
    )


@pytest.mark.faults
def test_the_picture_of_the_readme_is_drawn(tmp_path, monkeypatch):
    figures = runpy.run_path(str(ROOT / 'docs/figures.py'))
    monkeypatch.setitem(figures['written'].__globals__, 'ROOT', tmp_path)
    for run, architecture in (('ar', 'ar'), ('blocks', 'diffusion'), ('diffusion', 'diffusion')):
        path = tmp_path / 'out' / f'demo-{run}' / 'ckpt.pt'
        path.parent.mkdir(parents=True)
        write_small_checkpoint(path, architecture, letter_tokenizer())
    figures['draw_writing'](tmp_path / 'writing.svg')
    picture = (tmp_path / 'writing.svg').read_text()
    assert all(title in picture for title in figures['MODELS']) and picture.count('<set ') > 100
