"""Check what evaluate.py promises, seen from outside: runs of the script on tiny models, without network."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import write_folder
from helpers import evaluate, write_run

from lm import checkpoints, report
from lm.configurator import ROOT, UserError
from lm.tokenizer import Tokenizer

DIVERSITY = [f'distinct_{n}' for n in range(1, 5)] + ['rep_4', 'entropy']


def models_of(*arguments):
    return evaluate(*arguments)['results']['models']


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with prepared letters/ and models of them, ar/, diffusion/ and sdd/."""
    path = tmp_path_factory.mktemp('evaluate')
    write_folder(path / 'letters')
    for architecture in ('ar', 'diffusion', 'sdd'):
        write_run(path / architecture, path / 'letters', architecture)
    return path


@pytest.fixture(scope='module')
def finished(place):
    """Return what a run with everything leaves: results.json as a dict, report.html, what it printed."""
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('builtins.print', lambda *words, **settings: printed.append(' '.join(map(str, words))))
        evaluate(
            f'--checkpoint={place}/ar,{place}/diffusion',
            '--metrics=perplexity,accuracy,generation,speed',
            '--exact',
            '--exact_rows=2',
            f'--judge={place}/ar',
            f'--output={place}/results.json',
            f'--html={place}/report.html',
            '--batch_size=4',
        )
    results = json.loads((place / 'results.json').read_text())
    return results, (place / 'report.html').read_text(), '\n'.join(printed)


# ---------------------------------------------------------------------------- likelihood


def test_bounds_of_sdd_are_told_apart_and_compared_with_their_own_kind(place):
    arguments = ['--metrics=perplexity', '--max_tokens=200', '--draws=2']
    models = models_of(f'--checkpoint={place}/diffusion,{place}/sdd', '--bound_steps=4', *arguments)
    assert 'k0' not in models[0] and 'difference' not in models[0]['steps']
    two_pass, k0, steps = models[1], models[1]['k0'], models[1]['steps']
    assert len({round(one['nats_per_token'], 6) for one in (two_pass, k0, steps)}) == 3
    for one, other in ((two_pass, models[0]), (k0, models[0]), (steps, models[0]['steps'])):
        assert abs(one['difference'] - (one['nats_per_token'] - other['nats_per_token'])) < 1e-5
        assert one['difference_ci95'][0] <= one['difference'] <= one['difference_ci95'][1]
    (plain,) = models_of(f'--checkpoint={place}/sdd', '--k=0', *arguments)
    assert (
        two_pass['order'] == 'in random order, two passes per token' and plain['order'] == 'in random order'
    )
    assert 'k0' not in plain and abs(plain['nats_per_token'] - k0['nats_per_token']) < 1e-6


def test_k_is_for_sdd_and_leaves_the_others_as_they_are(place):
    arguments = ['--metrics=perplexity,generation', '--num_samples=2', '--max_tokens=60', '--draws=2']
    arguments += [f'--checkpoint={place}/ar,{place}/diffusion,{place}/sdd']
    own, other = models_of(*arguments), models_of(*arguments, '--k=2')
    assert own[:2] == other[:2]
    assert own[2]['nats_per_token'] != other[2]['nats_per_token'] and own[2]['k0'] == other[2]['k0']


def test_what_is_asked_for_beside_the_metrics_is_measured_without_them_too(place):
    more = ['--bound_steps=3', '--exact', '--exact_rows=1', '--max_tokens=60']
    (model,) = models_of(f'--checkpoint={place}/sdd', '--metrics=accuracy', *more)
    assert {'exact', 'steps', 'accuracy'} <= set(model)
    assert 'nats_per_token' not in model and 'k0' not in model


def test_the_exact_value_stands_beside_the_bound_of_the_same_rows(finished, place):
    figures = finished[0]['models'][1]['exact']
    (same,) = models_of(f'--checkpoint={place}/diffusion', '--metrics=perplexity', '--max_tokens=62')
    assert figures['tokens'] == same['tokens'] and figures['nats_per_token'] != same['nats_per_token']
    assert figures['upper_nats_per_token'] == pytest.approx(same['nats_per_token'], rel=1e-5)


def test_models_are_compared_on_the_same_tokens(finished):
    ar, diffusion = finished[0]['models']
    assert 'difference' not in ar
    assert diffusion['difference'] == pytest.approx(diffusion['nats_per_token'] - ar['nats_per_token'])
    low, high = diffusion['difference_ci95']
    assert low < diffusion['difference'] < high


# ---------------------------------------------------------------------------- what is written


@pytest.mark.faults
def test_settings_of_texts_have_no_effect_on_a_bound(place, capsys):
    models_of(
        f'--checkpoint={place}/sdd', '--metrics=perplexity', '--k=1', '--temperature=0.5', '--num_samples=3'
    )
    notes = re.findall('note: (.*)', capsys.readouterr().out)
    idle = ('temperature=0.5', 'num_samples=3')
    assert sorted(notes) == sorted(f'{setting} has no effect without metrics of texts.' for setting in idle)
    models_of(f'--checkpoint={place}/sdd', '--metrics=generation', '--num_samples=1', '--eval_tokens=99')
    assert 'note: max_tokens=99 has no effect without perplexity or accuracy.' in capsys.readouterr().out


@pytest.mark.faults
def test_the_table_says_what_texts_were_sampled_with_where_it_is_not_as_the_bound(place):
    arguments = [
        f'--checkpoint={place}/ar,{place}/diffusion',
        '--temperature=0',
        '--sampler=confidence',
        '--k=2',
    ]
    results = evaluate(*arguments, '--metrics=perplexity,generation', '--num_samples=2', '--max_tokens=60')[
        'results'
    ]
    ar, diffusion = results['models']
    assert ar['sampled_with'] == 'temperature=0.0'  # it has no sampler
    assert diffusion['sampled_with'] == 'temperature=0.0, sampler=confidence'
    for text in (report.table(results), report.table(results, wide=True), report.page(results)):
        assert 'temperature=0.0, sampler=confidence' in text
    assert 'sampled_with' not in models_of(*arguments, '--metrics=accuracy', '--max_tokens=60')[1]


def test_json_has_every_figure_for_every_model(finished):
    results, _, _ = finished
    assert [model['name'] for model in results['models']] == ['ar', 'diffusion']
    others = 'judge_nats judge_bpb tokens_per_sec tokens_per_sec_batch passes_per_token'
    for model, bound in zip(results['models'], ('exact', 'upper')):
        assert model['bound'] == bound and model['ci_over'] == 'windows'
        for name in (*DIVERSITY, *others.split()):
            assert np.isfinite(model[name]), name
        intervals = {name: name + '_ci95' for name in ('perplexity', 'bpb', 'accuracy')}
        for name, interval in {'nats_per_token': 'ci95', **intervals}.items():
            assert model[interval][0] < model[name] < model[interval][1]
        assert len(model['samples']) == 6 and set(DIVERSITY) < set(model['heldout'])
        assert all(model['heldout'][name] is not None for name in DIVERSITY)
    ar, diffusion = results['models']
    assert 'exact' not in ar and diffusion['exact']['tokens'] == 2 * 31
    assert set(DIVERSITY) < set(results['heldout']) and results['floor'] is None
    assert results['settings']['draws'] == 8 and results['versions']['torch'] == torch.__version__


def test_the_table_is_aligned_and_shows_intervals(finished):
    results, _, printed = finished
    lines = report.table(results, wide=True).split('\n')
    rows = lines[: lines.index('')]
    assert len(rows) == 5 and len({len(row) for row in rows}) == 1
    assert re.search(r'^ar +\d\.\d{4} ± \d\.\d{4} +windows +exact', lines[2]) and 'upper' in lines[3]
    assert lines[4].startswith('held-out text')

    assert report.table(results) in printed
    lines = report.table(results).split('\n')
    assert max(map(len, lines)) <= 100
    assert lines[0].split('  ')[0] == 'model' and len(re.split(r' {2,}', lines[3])) == 6
    assert '≤ ' in lines[3] and any(line.startswith('diffusion: at most ') for line in lines)


def test_long_names_leave_the_table_narrow(finished):
    results = json.loads(json.dumps(finished[0]))
    for model in results['models']:
        model['name'] = 'a-very-long-name-of-a-run-that-nobody-would-type-' * 2
    lines = report.table(results).split('\n')
    assert max(map(len, lines[: lines.index('')])) <= 100 and '…' in lines[2]


def test_an_empty_figure_is_said_and_never_a_number(place):
    arguments = ['--metrics=generation', '--num_samples=1', '--sample_tokens=2']
    results = evaluate(f'--checkpoint={place}/ar', *arguments)['results']
    model = results['models'][0]
    assert model['distinct_3'] is None and model['rep_4'] is None
    assert model['distinct_1'] is not None and 'nats_per_token' not in model
    assert re.search(r'^ar .* n/a', report.table(results, wide=True), re.M)


def test_too_little_heldout_text_is_none(place):
    results = evaluate(f'--checkpoint={place}/ar', '--metrics=generation', '--num_samples=100')['results']
    assert results['heldout'] == dict.fromkeys(DIVERSITY) and results['models'][0]['entropy'] > 0


def test_runs_of_one_name_are_told_apart_by_their_paths(place, tmp_path):
    write_run(tmp_path / 'ar', place / 'letters', 'ar')
    arguments = [
        f'--checkpoint={place}/ar,{tmp_path}/ar,{place}/sdd',
        '--metrics=accuracy',
        '--max_tokens=50',
    ]
    names = [model['name'] for model in models_of(*arguments)]
    assert names == [f'{place}/ar/ckpt.pt', f'{tmp_path}/ar/ckpt.pt', 'sdd']


# ---------------------------------------------------------------------------- page


class Page(HTMLParser):
    """Tags that are open, and every attribute that could load something."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.text, self.tags = [], [], '', []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ('src', 'href', 'data', 'srcset')]
        if tag not in ('meta', 'br'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text


def test_html_is_one_page_that_loads_nothing(finished):
    results, html, _ = finished
    page = Page(html)
    assert page.open == [] and page.loads == [] and 'script' not in page.tags and 'link' not in page.tags
    assert not re.search(r'https?:|url\(|@import', html)
    assert html.count('<pre>') == 12 and '<svg' in html and page.text.count('held-out text') == 1
    assert all(report.sentence_of(model, None) in page.text for model in results['models'])
    assert len(html) < 100_000  # light enough to mail


def test_html_shows_what_a_model_wrote_and_does_not_run_it(finished):
    results = json.loads(json.dumps(finished[0]))
    evil = '<script>alert("&amp;")</script>'
    results['models'][0].update(name=evil, samples=[evil] * 2, answers=[[evil, evil, evil]])
    page = Page(report.page({**results, 'dataset': evil}))
    assert 'script' not in page.tags and page.text.count(evil) >= 6 and page.open == []


# ---------------------------------------------------------------------------- the same numbers


def assert_same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_same(a, b)
    else:
        assert one == (pytest.approx(other, rel=1e-4) if isinstance(one, float) else other)


def test_likelihood_is_the_same_for_any_batch_size(place):
    arguments = [f'--checkpoint={place}/ar,{place}/diffusion', '--metrics=perplexity,accuracy', '--draws=2']
    assert_same(*(models_of(*arguments, f'--batch_size={size}') for size in (3, 50)))


@pytest.mark.slow
def test_two_ranks_give_the_same_numbers(place):
    arguments = [
        f'--checkpoint={place}/ar,{place}/diffusion',
        '--exact',
        '--exact_rows=3',
        '--batch_size=4',
        '--draws=2',
        '--device=cpu',
        '--num_samples=6',
        f'--judge={place}/ar',
    ]
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command += [ROOT / 'evaluate.py', *arguments, f'--output={place}/two.json']
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert_same(models_of(*arguments), json.loads((place / 'two.json').read_text())['models'])


# ---------------------------------------------------------------------------- speed


def test_passes_per_token_count_forward_passes(finished):
    ar, diffusion = finished[0]['models']
    assert ar['passes_per_token'] == 1 and 0 < diffusion['passes_per_token'] <= 1


# ---------------------------------------------------------------------------- stories


# ---------------------------------------------------------------------------- instructions

ANSWERS = ('yes it is', 'a small bird', 'the cat and the dog', 'no')
LETTERS = sorted(set('abcdefghijklmnopqrstuvwxyz WIR0123456789\n#:?'))
CHECKS = [
    {'instruction': 'say yes', 'input': '', 'checks': [{'contains': 'yes'}]},
    {'instruction': 'say less', 'input': 'more', 'checks': [{'max_words': 500}]},
]


def write_instructions(path, answers):
    """Write a prepared instruction folder of ten examples per answer; return it."""
    pairs = [
        (f'### Instruction:\nWhat is {i}?\n\n### Response:\n', one) for i, one in enumerate(answers * 10)
    ]
    texts = [prompt + answer for prompt, answer in pairs]
    folder = write_folder(path, train=texts, val=texts, train_on='a', letters=LETTERS)
    loss_mask = [[0] * len(prompt) + [1] * (len(answer) + 1) for prompt, answer in pairs]
    for split in ('train', 'val'):
        np.array(sum(loss_mask, []), np.uint8).tofile(folder / f'{split}_masks.bin')
    return folder


@pytest.fixture(scope='module')
def taught(tmp_path_factory):
    """A folder with instructions, models of them, and a file of checks."""
    path = tmp_path_factory.mktemp('taught')
    folder = write_instructions(path / 'taught', ANSWERS)
    for architecture in ('ar', 'diffusion'):
        write_run(path / architecture, folder, architecture, mode='documents', block_size=128)
    (path / 'checks.json').write_text(json.dumps(CHECKS))
    return path


def test_an_interval_goes_to_its_farther_end_and_what_follows_from_a_bound_is_one():
    row = {'bound': 'upper', 'perplexity': 2.0, 'valid_stories': 1.0, 'valid_stories_ci95': [0.722, 1.0]}
    assert report.cell(row, 'valid_stories', '.3f') == '1.000 ± 0.278'
    assert report.cell(row, 'perplexity', '.2f') == '≤ 2.00'


@pytest.mark.faults
def test_answers_do_not_depend_on_what_else_is_in_a_batch(taught):
    arguments = [f'--checkpoint={taught}/ar,{taught}/diffusion', '--metrics=instructions', '--temperature=0']
    arguments += [f'--instructions={taught}/checks.json', '--sampler=confidence', '--block_size=64']
    one, many = (models_of(*arguments, f'--batch_size={size}') for size in (1, 32))
    assert [model['answers'] for model in one] == [model['answers'] for model in many]


def test_instruction_models_are_measured_on_responses(taught):
    arguments = ['--metrics=perplexity,instructions', f'--instructions={taught}/checks.json', '--draws=2']
    for model in models_of(f'--checkpoint={taught}/ar,{taught}/diffusion', '--sample_tokens=9', *arguments):
        assert model['tokens'] == 10 * sum(len(answer) + 1 for answer in ANSWERS)  # their ends as well
        assert model['ci_over'] == 'documents'
        per_byte = model['nats_per_token'] * model['tokens'] / (10 * sum(map(len, ANSWERS)))
        assert model['bpb'] == pytest.approx(per_byte / np.log(2))
        for name in ('rouge_l', 'format_compliance', 'format_ended', 'followed'):
            assert 0 <= model[name] <= 1
        assert model['examples'] == 6 and model['followed_of'] == 2
        prompt, _, reference = model['answers'][0]
        assert prompt.startswith('### Instruction:') and prompt.endswith('### Response:\n')
        assert reference in ANSWERS


def test_perfect_answers_score_one(tmp_path):
    run = write_run(tmp_path / 'ar', write_instructions(tmp_path / 'one', ['b']), 'ar', block_size=128)
    state = checkpoints.load(run)
    weights, tokenizer = state['model_state_dict'], Tokenizer(state['tokenizer'])
    for name, weight in weights.items():
        weight.fill_(name == 'residual_scale')
    newline, letter = tokenizer.encode('\nb')
    weights['embedding.weight'][newline, :2] = torch.tensor(
        [1.0, 0.0]
    )  # blocks do nothing, so the likeliest next
    weights['embedding.weight'][letter, :2] = torch.tensor(
        [3.0, 1.0]
    )  # token is that of the largest product:
    weights['embedding.weight'][tokenizer.endoftext_id, :2] = torch.tensor(
        [2.0, 8.0]
    )  # b after \n, then the end
    checkpoints.save(run / 'ckpt.pt', state)
    (tmp_path / 'checks.json').write_text(json.dumps([CHECKS[1], {**CHECKS[0], 'checks': [{'words': 1}]}]))
    arguments = ['--metrics=instructions', f'--instructions={tmp_path}/checks.json', '--temperature=0']
    (model,) = models_of(f'--checkpoint={run}', *arguments)
    figures = ('rouge_l', 'format_compliance', 'format_ended', 'followed')
    assert [model[name] for name in figures] == [1] * 4, model['answers']


def test_a_model_is_measured_in_rows_of_the_length_that_it_was_trained_at(taught, tmp_path, capsys):
    state = checkpoints.load(taught / 'ar')  # of a block of 128, tuned in rows of 90
    checkpoints.save(
        tmp_path / 'ckpt.pt', {**state, 'train_config': {**state['train_config'], 'block_size': 90}}
    )
    words = ['--metrics=instructions', f'--instructions={taught}/checks.json', '--sample_tokens=2']
    results = evaluate(f'--checkpoint={tmp_path}', *words)['results']
    assert results['block_size'] == 90 and results['models'][0]['followed_of'] == 1
    assert (
        '1 of 2 requests do not fit into half of block_size=90; give a larger one' in capsys.readouterr().out
    )
    results = evaluate(f'--checkpoint={tmp_path}', '--block_size=128', *words)['results']
    assert results['models'][0]['followed_of'] == 2


def test_examples_end_with_their_first_response_and_fit_the_block(tmp_path, taught):
    texts = ['Wabba', 'ccccccccaa', 'ddd', 'Wcab']  # with its first response; too long; without any; fits
    folder = write_folder(tmp_path / 'some', train=texts, val=texts, train_on='ab', letters=LETTERS)
    run = write_run(tmp_path / 'ar', folder, 'ar', block_size=8)
    arguments = ['--metrics=instructions', f'--instructions={taught}/checks.json', '--sample_tokens=2']
    (model,) = models_of(f'--checkpoint={run}', *arguments)
    assert model['examples'] == 2
    assert [(prompt, reference) for prompt, _, reference in model['answers']] == [
        ('W', 'abba'),
        ('Wc', 'ab'),
    ] and model['followed_of'] == 0


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    'arguments, named',
    [
        ([], 'No checkpoint'),
        (['--checkpoint={place}/nowhere.pt'], 'nowhere.pt'),
        (['--checkpoint={place}/ar', '--metrics=perplexity,mauve'], 'mauve'),
        (['--checkpoint={place}/ar', '--dataset=no/such/data'], 'no/such/data'),
        (['--checkpoint={place}/ar', '--mode=rows'], 'rows'),
        (['--checkpoint={place}/ar', '--block_size=64'], '64'),
        (['--checkpoint={place}/ar', '--num_samples=0'], 'num_samples'),
        (['--checkpoint={place}/ar', '--judge={place}/nobody'], 'nobody'),
        (['--checkpoint={place}/ar', '--judge={place}/diffusion'], 'no exact likelihood'),
        (['--checkpoint={place}/ar', '--judge={place}/ar', '--metrics=accuracy'], 'generation'),
        (['--checkpoint={place}/ar', '--metrics=instructions'], 'val_masks.bin'),
        (['--checkpoint={place}/ar', '--output={place}/no/where.json'], 'where.json'),
        (['--checkpoint={place}/ar', '--html={place}'], 'is a folder'),
        (['--checkpoint={place}/ar', '--html=a.json', '--output=a.json'], 'both a.json'),
        (['--checkpoint={place}/diffusion', '--metrics=generation', '--sampler=magic'], 'magic'),
    ],
)
def test_mistakes_are_one_sentence(place, arguments, named):
    with pytest.raises(UserError) as error:
        evaluate(*[argument.format(place=place) for argument in arguments])
    assert named in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    'text',
    [
        'not json',
        '{"a": 1}',
        '[1]',
        '[{"instruction": "a"}]',
        '[{"instruction": "a", "checks": []}]',
        '[{"instruction": "a", "checks": [{"word": 1}]}]',
        '5',
    ],
)
def test_a_bad_file_of_instructions_is_refused(place, tmp_path, text):
    (tmp_path / 'bad.json').write_text(text)
    with pytest.raises(UserError, match="bad.json|There is no check 'word'"):
        evaluate(f'--checkpoint={place}/ar', '--metrics=instructions', f'--instructions={tmp_path}/bad.json')


@pytest.mark.faults
def test_a_wrong_option_of_any_model_is_refused_before_anything_is_measured(place, capsys):
    for option, said in (('--top_p=2', 'top_p is 2'), ('--sampler=speculative', 'needs an ar model')):
        with pytest.raises(UserError, match=said):
            evaluate(f'--checkpoint={place}/ar,{place}/diffusion', option)
        assert '…' not in capsys.readouterr().out


def test_a_checkpoint_of_another_vocabulary_is_refused_and_as_a_judge_reads_the_text(place, tmp_path):
    write_folder(tmp_path / 'others', letters='etaoin shrdlubcfgjkmpqvwxyz')
    write_run(tmp_path / 'other', tmp_path / 'others', 'ar')
    with pytest.raises(UserError, match='other/ckpt.pt has another vocabulary'):
        evaluate(f'--checkpoint={place}/ar,{tmp_path}/other')
    arguments = ['--metrics=generation', f'--judge={tmp_path}/other']
    results = evaluate(f'--checkpoint={place}/ar', *arguments)['results']
    assert results['models'][0]['judge_nats'] > 0 and results['heldout']['judge_bpb'] > 0
