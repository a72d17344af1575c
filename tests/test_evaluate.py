"""What evaluate.py promises, seen from outside: runs of the script on tiny models, without network."""

import json
import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import letter_tokenizer, signals_kept, write_folder

from lm import checkpoints, data, report
from lm.configurator import UserError
from prepare import grammar

ROOT = Path(__file__).resolve().parent.parent
SHAPE = dict(block_size=32, n_layer=1, n_head=2, n_embd=16)
FIGURES = (
    'self_bleu_1',
    'self_bleu_2',
    'self_bleu_3',
    'self_bleu_4',
    'distinct_1',
    'distinct_2',
    'distinct_3',
    'distinct_4',
    'rep_4',
    'entropy',
)


def evaluate(*arguments):
    """Runs the script in this process; returns its variables."""
    with pytest.MonkeyPatch.context() as patch, signals_kept():
        patch.setattr(sys, 'argv', ['evaluate.py', '--device=cpu', '--num_samples=6', *map(str, arguments)])
        return runpy.run_path(str(ROOT / 'evaluate.py'), run_name='__main__')


def write_model(path, folder, architecture, mode='packed', seed=0, **shape):
    """A run folder with a checkpoint of random weights for a prepared folder."""
    folder, shape = data.Folder(folder), {**SHAPE, **shape}
    tokenizer = folder.tokenizer
    shape.update(vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id, ignore_id=tokenizer.ignore_id)
    model = checkpoints.make_model(architecture, **shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    path.mkdir(exist_ok=True)
    checkpoints.save(
        path / 'ckpt.pt',
        {
            'architecture': architecture,
            'global_step': 7,
            'model_state_dict': model.state_dict(),
            'model_config': vars(model.config),
            'train_config': {'dataset': str(folder.path), 'mode': mode},
            'tokenizer': tokenizer.to_json(),
            'start_token': folder.config['start_token'],
            'prompt_format': None,
        },
    )
    (path / 'metrics.csv').write_text('step,train/loss,val/loss\n0,3.5,3.4\n10,2.5,\n20,2.1,2.3\n')
    return path


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with prepared letters/ and models of them, ar/, diffusion/ and sdd/."""
    path = tmp_path_factory.mktemp('evaluate')
    write_folder(path / 'letters')
    for architecture in ('ar', 'diffusion', 'sdd'):
        write_model(path / architecture, path / 'letters', architecture)
    return path


@pytest.fixture(scope='module')
def finished(place):
    """What a run with everything leaves: results.json as a dict, report.html, what it printed."""
    captured = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('builtins.print', lambda *words, **settings: captured.append(' '.join(map(str, words))))
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
    return (
        json.loads((place / 'results.json').read_text()),
        (place / 'report.html').read_text(),
        '\n'.join(captured),
    )


def results_of(place, *arguments):
    evaluate(*arguments, f'--output={place}/some.json')
    return json.loads((place / 'some.json').read_text())


# ---------------------------------------------------------------------------- what is written


def test_bounds_of_sdd_are_told_apart_and_compared_with_their_own_kind(place):
    models = results_of(
        place, f'--checkpoint={place}/diffusion,{place}/sdd', '--metrics=perplexity', '--bound_steps=4'
    )['models']
    assert 'k0' not in models[0] and 'difference' not in models[0]['steps']
    two_pass, k0, steps = models[1], models[1]['k0'], models[1]['steps']
    assert len({round(one['nats_per_token'], 6) for one in (two_pass, k0, steps)}) == 3
    for one, other in ((two_pass, models[0]), (k0, models[0]), (steps, models[0]['steps'])):
        assert abs(one['difference'] - (one['nats_per_token'] - other['nats_per_token'])) < 1e-5
        assert one['difference_ci95'][0] <= one['difference'] <= one['difference_ci95'][1]
    (plain,) = results_of(place, f'--checkpoint={place}/sdd', '--metrics=perplexity', '--k=0')['models']
    assert 'k0' not in plain and abs(plain['nats_per_token'] - k0['nats_per_token']) < 1e-6


def test_k_is_for_sdd_and_leaves_the_others_as_they_are(place):
    (place / 'k.jsonl').write_text(
        '{"question": "the cat", "choices": ["sat", "ran away"], "answer": 0}\n' * 3
    )
    arguments = [
        f'--checkpoint={place}/ar,{place}/diffusion,{place}/sdd',
        '--metrics=perplexity,generation',
        f'--choices={place}/k.jsonl',
        '--num_samples=2',
        '--max_tokens=60',
    ]
    own, other = (results_of(place, *arguments, *more)['models'] for more in ([], ['--k=2']))
    for before, after in zip(own[:2], other[:2]):
        assert before == after
    assert own[2]['nats_per_token'] != other[2]['nats_per_token'] and own[2]['k0'] == other[2]['k0']


def test_what_is_asked_for_beside_the_metrics_is_measured_without_them_too(place):
    (model,) = results_of(
        place,
        f'--checkpoint={place}/sdd',
        '--metrics=accuracy',
        '--bound_steps=3',
        '--exact',
        '--exact_rows=1',
        '--max_tokens=60',
    )['models']
    assert (
        {'exact', 'steps', 'accuracy'} <= set(model) and 'nats_per_token' not in model and 'k0' not in model
    )


def test_json_has_every_figure_for_every_model(finished):
    results, _, _ = finished
    assert [model['name'] for model in results['models']] == ['ar', 'diffusion']
    for model, bound in zip(results['models'], ('exact', 'upper')):
        assert model['bound'] == bound
        for name in (
            *FIGURES,
            'nats_per_token',
            'perplexity',
            'bpb',
            'accuracy',
            'judge_nats',
            'judge_bpb',
            'tokens_per_sec',
            'tokens_per_sec_batch',
            'seconds_to_first_token',
            'passes_per_token',
        ):
            assert np.isfinite(model[name]), name
        for name, interval in (
            ('nats_per_token', 'ci95'),
            ('perplexity', 'perplexity_ci95'),
            ('bpb', 'bpb_ci95'),
            ('accuracy', 'accuracy_ci95'),
        ):
            assert model[interval][0] < model[name] < model[interval][1]
        assert len(model['samples']) == 6 and set(FIGURES) < set(model['heldout'])
        assert all(model['heldout'][name] is not None for name in FIGURES)
    ar, diffusion = results['models']
    assert 'accuracy_by_level' not in ar and len(diffusion['accuracy_by_level']) == 10
    assert 'exact' not in ar and diffusion['exact']['tokens'] == 2 * 31
    assert set(FIGURES) < set(results['heldout']) and results['floor'] is None
    assert results['settings']['draws'] == 8 and results['versions']['torch'] == torch.__version__


def test_the_exact_value_stands_beside_the_bound_of_the_same_rows(finished, place):
    figures = finished[0]['models'][1]['exact']
    same = results_of(place, f'--checkpoint={place}/diffusion', '--metrics=perplexity', '--max_tokens=62')[
        'models'
    ][0]
    assert figures['tokens'] == same['tokens'] and figures['nats_per_token'] != same['nats_per_token']
    assert figures['upper_nats_per_token'] == pytest.approx(same['nats_per_token'], rel=1e-5)


def test_passes_per_token_count_forward_passes(finished):
    ar, diffusion = finished[0]['models']
    assert ar['passes_per_token'] == 1 and 0 < diffusion['passes_per_token'] <= 1
    assert ar['seconds_to_first_token'] < 31 / ar['tokens_per_sec']
    assert diffusion['seconds_to_first_token'] == pytest.approx(31 / diffusion['tokens_per_sec'])


def test_with_blocks_the_first_token_is_there_with_the_first_block(place):
    (model,) = results_of(
        place, f'--checkpoint={place}/diffusion', '--metrics=speed', '--sampler=blocks', '--block_length=8'
    )['models']
    assert model['seconds_to_first_token'] * model['tokens_per_sec'] == pytest.approx(8)


def test_a_cell_says_half_its_interval():
    row = {
        'name': 'a',
        'nats_per_token': 2.0,
        'ci95': [1.9, 2.1],
        'accuracy': None,
        'exact': {'nats_per_token': 1.0},
    }
    (titles, (cells,)) = report.cells({'models': [row], 'floor': None})
    assert dict(zip(titles, cells)) == {
        'model': 'a',
        'nats/token': '2.0000 ± 0.1000',
        'left to right': '1.0000',
        'accuracy': 'n/a',
    }


def test_models_are_compared_on_the_same_tokens(finished):
    ar, diffusion = finished[0]['models']
    assert 'difference' not in ar
    assert diffusion['difference'] == pytest.approx(diffusion['nats_per_token'] - ar['nats_per_token'])
    low, high = diffusion['difference_ci95']
    assert low < diffusion['difference'] < high


def test_the_table_is_aligned_and_shows_intervals(finished):
    results, _, printed = finished
    lines = report.table(results).split('\n')
    assert report.table(results) in printed
    rows = lines[: lines.index('')]
    assert len(rows) == 5 and len({len(row) for row in rows}) == 1
    assert re.search(r'^ar +\d\.\d{4} ± \d\.\d{4} +exact', lines[2]) and 'upper' in lines[3]
    assert lines[4].startswith('held-out text')


def test_an_empty_figure_is_said_and_never_a_number(place):
    results = results_of(
        place, f'--checkpoint={place}/ar', '--metrics=generation', '--num_samples=1', '--sample_tokens=2'
    )
    model = results['models'][0]
    assert model['self_bleu_1'] is None and model['distinct_3'] is None and model['rep_4'] is None
    assert model['distinct_1'] is not None and 'nats_per_token' not in model
    assert re.search(r'^ar .* n/a', report.table(results), re.M)


def test_too_little_heldout_text_is_none(place):
    results = results_of(place, f'--checkpoint={place}/ar', '--metrics=generation', '--num_samples=100')
    assert results['heldout'] == dict.fromkeys(FIGURES) and results['models'][0]['entropy'] > 0


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
        if tag not in ('meta', 'line', 'br'):
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
    assert page.tags.count('polyline') == 4 and html.count('<pre>') == 12  # two curves, six samples per model
    assert 'held-out text' in page.text and report.NOTES in page.text


def test_html_shows_what_a_model_wrote_and_does_not_run_it(finished):
    results = json.loads(json.dumps(finished[0]))
    evil = '<script>alert("&amp;")</script>'
    results['models'][0].update(name=evil, samples=[evil] * 2, answers=[[evil, evil, evil]])
    page = Page(report.page({**results, 'dataset': evil}, {evil: {'val/loss': [(0, 2.0), (5, 1.0)]}}))
    assert 'script' not in page.tags and page.text.count(evil) >= 7 and page.open == []


def test_curves_of_odd_runs_do_not_break_the_page(tmp_path):
    assert report.read_curves(tmp_path / 'metrics.csv') == {}
    assert 'svg' not in report.chart({'a': {}})
    assert 'polyline' in report.chart({'a': {'val/loss': [(3, 1.0)]}})
    assert 'nan' not in report.chart({'a': {'val/loss': [(3, 1.0), (4, float('nan')), (5, 2.0)]}})


# ---------------------------------------------------------------------------- the same numbers


def without_times(results):
    return [
        {name: value for name, value in model.items() if name not in ('name', 'path')}
        for model in results['models']
    ]


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
    both = f'--checkpoint={place}/ar,{place}/diffusion'
    one, other = (
        results_of(place, both, '--metrics=perplexity,accuracy', f'--batch_size={size}') for size in (3, 50)
    )
    assert_same(without_times(one), without_times(other))


@pytest.mark.slow
def test_two_ranks_give_the_same_numbers(place):
    questions = place / 'questions.jsonl'
    questions.write_text('{"question": "the cat sees a", "choices": ["dog", "zzz"], "answer": 0}\n')
    arguments = [
        f'--checkpoint={place}/ar,{place}/diffusion',
        '--exact',
        '--exact_rows=3',
        '--batch_size=4',
        f'--judge={place}/diffusion',
        f'--choices={questions}',
    ]
    one = results_of(place, *arguments)
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        ROOT / 'evaluate.py',
        '--device=cpu',
        '--num_samples=6',
        *arguments,
        f'--output={place}/two.json',
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert_same(without_times(one), without_times(json.loads((place / 'two.json').read_text())))


# ---------------------------------------------------------------------------- stories


def test_the_grammars_verdict_and_the_floor(tmp_path, monkeypatch):
    stories = list(grammar.stories(4, seed=3))
    letters = sorted(set(''.join(stories)))
    write_folder(tmp_path / 'stories', train=stories, val=stories, letters=letters)
    config = json.loads((tmp_path / 'stories' / 'config.json').read_text())
    config['floor'] = {
        'nats_per_token': 0.2,
        'nats_per_byte': 0.05,
        'bits_per_byte': 0.072,
        'nats_per_story': 24.0,
    }
    (tmp_path / 'stories' / 'config.json').write_text(json.dumps(config))
    write_model(tmp_path / 'ar', tmp_path / 'stories', 'ar', block_size=64)
    script = evaluate(f'--checkpoint={tmp_path}/ar', '--metrics=perplexity,generation', '--max_tokens=500')
    assert script['results']['models'][0]['valid_stories'] == 0
    lines = report.table(script['results']).split('\n')
    last = lines[lines.index('') - 1]
    assert last.startswith('entropy floor') and '0.2000' in last and '0.0720' in last and 'exact' in last

    tokenizer, end = script['folder'].tokenizer, script['folder'].tokenizer.endoftext_id
    told = tokenizer.encode(stories[0])
    rows = [told + [end], told + [end] + told[:9], told, tokenizer.encode(stories[1][:-1]) + [end]]
    verdict = script['grammar_verdict'](rows, tokenizer)
    assert verdict['valid_stories'] == 0.5 and verdict['finished_stories'] == 0.75
    assert verdict['story_nats_per_byte'] == pytest.approx(
        -grammar.log_prob(stories[0]) / len(stories[0].encode())
    )


# ---------------------------------------------------------------------------- multiple choice


def test_multiple_choice_by_likelihood_per_byte(place):
    file = place / 'choices.jsonl'
    file.write_text(
        '{"question": "the cat\u2028", "choices": ["sees", "zqxj"], "answer": 0}\n\n'
        '{"question": "a dog", "choices": ["qqqq vvvv", "sings"], "answer": "sings"}\n'
    )
    results = results_of(
        place, f'--checkpoint={place}/ar,{place}/diffusion', '--metrics=accuracy', f'--choices={file}'
    )
    for model in results['models']:
        assert model['choices_accuracy'] in (0, 0.5, 1) and model['choices_chance'] == 0.5
        assert model['choices_ci95'][0] > -1e-9 and model['choices_ci95'][1] - model['choices_ci95'][0] > 0.4


# ---------------------------------------------------------------------------- instructions

ANSWERS = ('yes it is', 'a small bird', 'the cat and the dog', 'no')


@pytest.fixture(scope='module')
def taught(tmp_path_factory):
    """A prepared instruction folder, and an ar model of it; prompts are masked 0, responses 1."""
    path = tmp_path_factory.mktemp('taught')
    letters = sorted(
        set('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n#:.,?!"\'()-+/&;%$')
    )
    wish = ('Answer in at most three words: what', 'What')  # every second example states a check
    pairs = [
        (f'### Instruction:\n{wish[i % 2]} is {i}?\n\n### Response:\n', answer)
        for i, answer in enumerate(ANSWERS * 10)
    ]
    texts = [prompt + answer for prompt, answer in pairs]
    folder = write_folder(path / 'taught', train=texts, val=texts, train_on='a', letters=letters)
    tokenizer = letter_tokenizer(letters)
    masks = [[0] * len(tokenizer.encode(prompt)) + [1] * (len(answer) + 1) for prompt, answer in pairs]
    for split in ('train', 'val'):
        np.array(sum(masks, []), np.uint8).tofile(folder / f'{split}_masks.bin')
    for architecture in ('ar', 'diffusion'):
        write_model(path / architecture, folder, architecture, mode='documents', block_size=128)
    (path / 'checks.json').write_text(
        json.dumps(
            [
                {'instruction': 'say yes', 'input': '', 'checks': [{'contains': 'yes'}]},
                {'instruction': 'say less', 'input': 'more', 'checks': [{'max_words': 500}]},
            ]
        )
    )
    return path


def test_instruction_models_are_measured_on_responses(taught):
    script = evaluate(
        f'--checkpoint={taught}/ar,{taught}/diffusion',
        '--metrics=perplexity,instructions',
        f'--instructions={taught}/checks.json',
    )
    for model in script['results']['models']:
        assert model['tokens'] == 10 * sum(len(answer) + 1 for answer in ANSWERS)  # their ends as well
        assert model['bpb'] == pytest.approx(
            model['nats_per_token'] / np.log(2) * model['tokens'] / (10 * sum(map(len, ANSWERS)))
        )
        for name in ('rouge_l', 'token_f1', 'exact_match', 'format_compliance', 'format_ended', 'followed'):
            assert 0 <= model[name] <= 1
        stated = sum('at most' in prompt for prompt, _, _ in model['answers'])
        assert (
            model['examples'] == 6 and 0 < stated < 6 and model['followed_of'] == stated + 2
        )  # and the file's
        prompt, _, reference = model['answers'][0]
        assert (
            prompt.startswith('### Instruction:')
            and prompt.endswith('### Response:\n')
            and reference in ANSWERS
        )


def test_perfect_answers_score_one(taught, monkeypatch):
    script = evaluate(
        f'--checkpoint={taught}/ar', '--metrics=instructions', f'--instructions={taught}/checks.json'
    )
    folder = script['folder']
    examples = script['heldout_examples'](folder)
    monkeypatch.setitem(
        script['evaluate_instructions'].__globals__,
        'write_texts',
        lambda model, prompts, stop: [reference for _, reference in examples],
    )
    state = {'prompt_format': None}
    figures = script['evaluate_instructions'](script['model'], state, folder, [])
    assert all(figures[name] == 1 for name in ('rouge_l', 'token_f1', 'format_compliance', 'format_ended'))
    assert figures['exact_match'] == 1 and figures['followed'] < 1  # "the cat and the dog" has too many words


def test_examples_end_with_their_first_response_and_fit_the_block(taught):
    script = evaluate(
        f'--checkpoint={taught}/ar', '--metrics=perplexity', '--max_tokens=100', '--block_size=8'
    )
    folder = SimpleNamespace(
        config={'start_token': 99},
        index={'val': np.array([0, 5, 15, 18])},
        tokens={'val': np.arange(18)},
        masks={'val': np.array([0, 1, 1, 0, 1] + [0] * 9 + [1] + [0] * 3)},
    )
    assert script['heldout_examples'](folder) == [([99, 0], [1, 2])]


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
        (['--checkpoint={place}/ar', '--judge={place}/ar', '--metrics=accuracy'], 'generation'),
        (['--checkpoint={place}/ar', '--metrics=instructions'], 'val_masks.bin'),
        (['--checkpoint={place}/ar', '--choices={place}/none.jsonl'], 'none.jsonl'),
        (['--checkpoint={place}/ar', '--choices={place}/ar/metrics.csv'], 'metrics.csv'),
        (['--checkpoint={place}/ar', '--output={place}/no/where.json'], 'where.json'),
        (['--checkpoint={place}/ar', '--architecture=rnn'], 'rnn'),
        (['--checkpoint={place}/ar', '--metrics=generation', '--sampler=magic', '--max_tokens=50'], 'magic'),
    ],
)
def test_mistakes_are_one_sentence(place, arguments, named):
    with pytest.raises(UserError) as error:
        evaluate(*[argument.format(place=place) for argument in arguments])
    assert named in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    'line',
    [
        'not json',
        '[1]',
        '{"question": "a", "choices": ["b"], "answer": 0}',
        '{"question": "a", "choices": ["b", "c"], "answer": 2}',
        '{"question": "a", "choices": ["b", " "], "answer": 0}',
        '',
    ],
)
def test_bad_choices_are_refused(place, line):
    file = place / 'bad.jsonl'
    file.write_text(line)
    with pytest.raises(UserError):
        evaluate(f'--checkpoint={place}/ar', '--metrics=accuracy', f'--choices={file}')


def test_a_checkpoint_of_another_vocabulary_is_refused(place, tmp_path):
    write_folder(tmp_path / 'others', letters='etaoin shrdlubcfgjkmpqvwxyz')
    write_model(tmp_path / 'other', tmp_path / 'others', 'ar')
    with pytest.raises(UserError, match='other/ckpt.pt has another vocabulary'):
        evaluate(f'--checkpoint={place}/ar,{tmp_path}/other')


def test_a_judge_of_another_vocabulary_reads_the_text(place, tmp_path):
    write_folder(tmp_path / 'others', letters='etaoin shrdlubcfgjkmpqvwxyz')
    write_model(tmp_path / 'other', tmp_path / 'others', 'ar')
    results = results_of(
        place, f'--checkpoint={place}/ar', '--metrics=generation', f'--judge={tmp_path}/other'
    )
    assert results['models'][0]['judge_nats'] > 0 and results['heldout']['judge_bpb'] > 0
