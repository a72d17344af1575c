"""lm/report.py: what is said of evaluated models; curves of runs, in the terminal and as pictures, and their list."""

import json
import sys

import pytest

from lm import report
from lm.configurator import UserError

HEAD = 'step,train/loss,val/loss\n'
RESULTS = dict(dataset='letters', mode='packed', block_size=8, versions={'torch': '2'}, floor=None)


def write_run(folder, rows, **results):
    folder.mkdir(parents=True)
    (folder / 'metrics.csv').write_text(
        HEAD + ''.join(f'{step},{train},{val}\n' for step, train, val in rows)
    )
    (folder / 'config.json').write_text(json.dumps({'dataset': 'nothing'}))
    if results:
        (folder / 'eval_results.json').write_text(json.dumps(results))
    return folder


@pytest.fixture
def run(tmp_path):
    rows = [(0, '', 7.0), *((step, 700 / (100 + step), '') for step in range(10, 200, 10)), (200, 2.2, 2.4)]
    return write_run(tmp_path / 'out' / 'a', rows, step=200, best_step=200, best_val_loss=2.4)


def test_a_curve_fits_80_columns_and_falls(run):
    lines = report.text_curve(run).splitlines()
    assert len(lines) == 14 and max(map(len, lines)) < 80
    marks = [(i, line.index('·')) for i, line in enumerate(lines[:-2]) if '·' in line]
    assert marks == sorted(marks, key=lambda mark: mark[1]) and marks[0][0] == 0  # down and to the right
    assert 'o' in lines[-4] and '6.364' in lines[0] and 'step 200' in lines[-1]


def test_a_run_with_too_little_to_draw_draws_nothing(tmp_path):
    assert report.text_curve(write_run(tmp_path / 'b', [(0, '', 7.0), (1, 7.0, '')])) == ''
    assert report.text_curve(write_run(tmp_path / 'c', [(i, 1.0, '') for i in range(1, 9)])) == ''


def test_runs_are_listed_with_their_best_loss_and_size(run, tmp_path, capsys):
    write_run(tmp_path / 'out' / 'just-begun', [(0, '', 7.0)])
    report.main([str(tmp_path / 'out')])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert 'best val/loss' in head and len(lines) == 2
    (line,) = (line for line in lines if line.startswith('a '))
    assert line.split()[1:5] == ['200', '2.4000', 'at', '200'] and line.endswith('0 MB')


def test_curves_become_pictures(run, tmp_path, capsys):
    pytest.importorskip('matplotlib', reason='matplotlib is not installed')
    other = write_run(tmp_path / 'out' / 'b', [(10, '', 3.0), (20, '', 2.0)])
    report.main([str(run), str(other), f'--out={tmp_path}/curves'])
    assert '2 runs' in capsys.readouterr().out
    assert (
        '<svg' in (tmp_path / 'curves.svg').read_text()
        and (tmp_path / 'curves.png').read_bytes()[1:4] == b'PNG'
    )
    with pytest.raises(UserError, match='has no nothing; its metrics.csv'):
        report.main([str(run), '--metric=nothing'])


def test_without_matplotlib_a_sentence_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(UserError, match='pip install matplotlib'):
        report.main([str(run)])


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match='no folder .*nowhere'):
        report.main([str(tmp_path / 'nowhere')])
    with pytest.raises(UserError, match='is no folder of a run'):
        report.main([str(tmp_path), str(tmp_path)])


# ---------------------------------------------------------------------------- models


def test_a_cell_says_half_its_interval_and_what_a_loss_bounds():
    row = {
        'name': 'a',
        'nats_per_token': 2.0,
        'ci95': [1.9, 2.1],
        'bound': 'none',
        'accuracy': None,
        'exact': {'nats_per_token': 1.0},
    }
    results = {'models': [row], 'floor': None}
    columns = report.present(results, [column for group in report.GROUPS.values() for column in group])
    (titles, (cells,)) = report.cells(results, columns)
    assert dict(zip(titles, cells)) == {
        'model': 'a',
        'nats/token': '? 2.0000 ± 0.1000',
        'bound': 'no bound',
        'left to right': '1.0000',
        'accuracy': 'n/a',
    }
    assert 'left to right' in report.table(results).split('\n')[0]  # in the short table: it was asked for


@pytest.mark.faults
def test_a_chart_is_drawn_of_an_interval_that_reaches_below_zero():
    models = [
        dict(name=name, bound='upper', nats_per_token=1.0, ci95=[low, 2.1])
        for name, low in (('a', 0.9), ('b', -0.1))
    ]
    assert report.page({**RESULTS, 'models': models}).count('<circle') == 2


def test_what_the_grammar_objects_to_is_marked_in_the_page():
    fault = {'position': 5, 'kind': 'pronoun', 'said': 'his', 'expected': ['her']}
    model = {'name': 'a', 'samples': ['took his <hat>'], 'faults': [[fault]]}
    html = report.page({**RESULTS, 'models': [model]})
    assert '<pre>took <mark title="pronoun; expected: her">his</mark> &lt;hat&gt;</pre>' in html
