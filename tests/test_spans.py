"""Answers that are spans: where they lie in tokens, the loss, the metrics, and runs of classify.py on them."""
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import letter_tokenizer, random_model
from test_classify import ROOT, TINY, assert_a_killed_run_ends_the_same, classify

import classification
import data
import prepare.tokenizer
import spans
from configurator import UserError
from prepare import languages

SHAPE = dict(vocab_size=10, block_size=16, n_layer=2, n_head=2, n_embd=16, mask_id=8, ignore_id=9)
LETTERS = 'абвгдежзик'
CONTEXT = ' Столица — Москва 🎉, naïve “Łódź”.\nВ 1990-х: конец'
QA = ['--task=qa', '--language_database=db.py', '--tokenizer=char', '--block_size=16', '--train_langs=rus']


def entry_of(dataset, **changes):
    return {'dataset': dataset, 'train_features': ['question', 'context'], 'eval_feature': 'answers',
            'splits': ['train', 'test'], 'task_type': 'qa', **changes}


def records(count, seed, itself=False):
    """Letters without repetition; the answer is the one or two behind the one that is asked for, or it itself."""
    draw = random.Random(seed)
    for _ in range(count):
        context, place = ''.join(draw.sample(LETTERS, 8)), draw.randrange(6)
        start, end = (place, place + 1) if itself else (place + 1, place + 1 + draw.randint(1, 2))
        yield {'question': context[place], 'context': context,
               'answers': {'text': [context[start:end]], 'answer_start': [start]}}


def write_jsonl(path, lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text('\n'.join(json.dumps(line, ensure_ascii=False) for line in lines), encoding='utf-8')


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a database of two languages."""
    monkeypatch.chdir(tmp_path)
    for language, seed in (('rus', 0), ('eng', 10)):
        write_jsonl(tmp_path / language / 'train.jsonl', records(24, seed))
        write_jsonl(tmp_path / language / 'test.jsonl', records(12, seed + 1))
    Path('db.py').write_text(f'LANGUAGES = {({name: {"qa": entry_of(name)} for name in ("rus", "eng")})!r}')
    return tmp_path


def encoded(tokenizer, question, context, answers):
    """The row of one question, and its Answer."""
    labelled = languages.Labelled([(question, context)], np.fromiter([answers], object))
    examples, notes = languages.encode_sets({'test': [(entry_of('x'), labelled)]}, tokenizer, tokenizer.endoftext_id,
                                            999)
    assert notes == {'test': ''}
    return examples['test'].rows[0], examples['test'].labels[0]


# ---------------------------------------------------------------------------- where answers lie

def tokenizer_of(kind):
    if kind != 'prefixed':
        try:
            return prepare.tokenizer.build(kind, [CONTEXT * 3], 300)
        except UserError as error:  # no network, no cache
            pytest.skip(str(error))
    bpe = tokenizers.ByteLevelBPETokenizer(add_prefix_space=True)
    bpe.train_from_iterator([CONTEXT] * 3, vocab_size=300, show_progress=False)
    return data.Tokenizer(bpe.to_str())


@pytest.mark.parametrize('kind', ['char', 'bytes', 'bpe', 'gpt2', 'prefixed'])
def test_the_tokens_of_an_answer_say_the_answer(kind):
    tokenizer = tokenizer_of(kind)
    for text in ('Столица', 'Москва', '🎉', 'naïve', 'Łódź', '1990', 'конец', 'Москва 🎉, naïve'):
        row, answer = encoded(tokenizer, 'Столица', CONTEXT, ((text,), (CONTEXT.index(text),)))
        assert tokenizer.decode(row[answer.begin:]).strip() == CONTEXT.strip()
        assert row[answer.begin - 1] == tokenizer.endoftext_id
        said = tokenizer.decode(row[answer.start:answer.end + 1])
        assert text in said and answer.text_of(answer.start, answer.end).strip('“ ,-х') == text
        for start, end in ((answer.start + 1, answer.end), (answer.start, answer.end - 1)):  # none too many
            assert start > end or text not in tokenizer.decode(row[start:end + 1])


def test_an_answer_is_looked_for_where_it_is_not_where_it_should_be():
    tokenizer = letter_tokenizer()
    for start in (9, -1, 0):
        _, answer = encoded(tokenizer, 'q', 'ab cd ab', (('cd', 'ab'), (start, 0)))
        assert answer.text_of(answer.start, answer.end) == 'cd'
    _, again = encoded(tokenizer, 'q', 'ab cd ab', (('ab',), (6,)))
    assert (again.begin, again.start, again.end) == (3, 9, 10)


@pytest.mark.parametrize('value, block_size, cut', [
    ({'text': ['cd'], 'answer_start': [3]}, 7, '1 too long for 7 tokens, '),
    ({'text': ['xy'], 'answer_start': [0]}, 99, ''), ({'text': [], 'answer_start': []}, 99, ''),
    ({'text': [''], 'answer_start': [-1]}, 99, '')])
def test_a_row_without_its_answer_is_wrong_in_a_test_and_no_row_of_training(value, block_size, cut):
    tokenizer = letter_tokenizer()
    answers = [spans.read_answers(value, ''), (('e',), (0,)), (('f',), (0,))]
    labelled = languages.Labelled([('q', 'ab cd'), ('q', 'e'), ('', 'f')], np.fromiter(answers, object))
    for name, left, words in (('train', 2, 'left out'), ('rus', 3, 'counted as wrong')):
        examples, notes = languages.encode_sets({name: [(entry_of('x'), labelled)]}, tokenizer, tokenizer.endoftext_id,
                                                block_size)
        assert len(examples[name]) == left
        assert notes[name] == f'{cut}1 without an answer in what is left, {words}'
    outputs = np.array([[3, 3, np.nan], [3, 3, 0.5], [2, 2, 0.1]], np.float32)
    figures = spans.evaluate_predictions(examples['rus'].labels, outputs)
    assert figures['exact_match'] == figures['accuracy'] == pytest.approx(2 / 3) and figures['without_span'] == 1
    assert figures['loss'] == pytest.approx(0.3)


def test_a_context_that_is_not_there_at_all_has_no_text():
    tokenizer = letter_tokenizer()
    labelled = languages.Labelled([('abcdef', 'gh'), ('a', 'b')],
                                  np.fromiter([(('gh',), (0,)), (('b',), (0,))], object))
    examples, _ = languages.encode_sets({'rus': [(entry_of('x'), labelled)]}, tokenizer, tokenizer.endoftext_id, 5)
    model = spans.Classifier(random_model('ar', 0.3, **{**SHAPE, 'vocab_size': 40}), 3).eval()
    outputs = model.outputs(*spans.batch_of(examples['rus'], [0, 1], 'cpu')).detach().numpy()
    assert spans.texts_of(examples['rus'].labels, outputs).tolist() == ['', 'b'] and np.isnan(outputs[0, 2])


# ---------------------------------------------------------------------------- loss and best span

@pytest.mark.parametrize('architecture', ['ar', 'diffusion', 'sdd'])
def test_the_loss_is_that_of_the_context_alone(architecture):
    model = spans.Classifier(random_model(architecture, 0.3, **SHAPE), 3)
    torch.nn.init.normal_(model.head.weight)
    draw = np.random.default_rng(0)
    begins, sizes, places = [2, 5, 3, 1], [9, 16, 4, 2], [(4, 6), (5, 15), (3, 3), (1, 1)]
    labels = [spans.Answer(begin, *place, '', None, ()) for begin, place in zip(begins, places)]
    examples = classification.Examples([draw.integers(0, 8, size) for size in sizes], np.fromiter(labels, object))
    for chosen in ([0, 1, 2, 3], [1]):  # with and without padding
        loss, count, sums = model.train()(*spans.batch_of(examples, chosen, 'cpu'))
        outputs = model.eval().outputs(*spans.batch_of(examples, chosen, 'cpu'))
        expected, right = [], 0
        for i, output in zip(chosen, outputs):
            states = model.trunk.hidden(torch.from_numpy(examples.rows[i])[None])[0]
            scores = (states @ model.head.weight.T + model.head.bias)[begins[i]:]
            start, end = (place - begins[i] for place in places[i])
            expected.append(-(torch.log_softmax(scores[:, 0], 0)[start] + torch.log_softmax(scores[:, 1], 0)[end]) / 2)
            assert torch.isclose(output[2], expected[-1], atol=1e-5)
            best = max(((a, b) for a in range(len(scores)) for b in range(a, min(a + 3, len(scores)))),
                       key=lambda span: scores[span[0], 0] + scores[span[1], 1])
            assert tuple(output[:2].int().tolist()) == (best[0] + begins[i], best[1] + begins[i])
            right += best == (start, end)
        assert torch.isclose(loss, sum(expected), atol=1e-4) and count == len(chosen)
        assert sums['correct'] == right and sums['predicted'] == len(chosen)


def test_only_the_context_gets_gradient_from_the_head():
    model = spans.Classifier(random_model('ar', 0.3, **SHAPE), 3)
    logits = model.logits(torch.randint(0, 8, (2, 6)), torch.tensor([6, 5]), torch.tensor([2, 3]))
    assert (logits > -torch.inf)[..., 0].tolist() == [[False] * 2 + [True] * 4, [False] * 3 + [True] * 2 + [False]]


# ---------------------------------------------------------------------------- metrics

@pytest.mark.parametrize('text, right, exact, f1', [
    ('The Cat!', ['cat'], 1, 1), ('a big cat', ['the cat'], 0, 2 / 3), ('dog', ['cat', 'Dog.'], 1, 1),
    ('cat cat dog', ['cat dog dog'], 0, 2 / 3), ('', ['cat'], 0, 0), ('the', ['a'], 1, 1), ('x', [], 0, 0),
    ('«В Москве» —', ['Москве', 'в  москве'], 1, 1), ('5 $', ['5'], 1, 1),
    ('анна и её кот', ['кот анны', 'её кот'], 0, 2 / 3)])
def test_exact_match_and_f1_are_squads(text, right, exact, f1):
    assert spans.score(text, right) == pytest.approx((exact, f1))


def test_the_randomisation_test_gives_the_exact_p_of_a_sign_test():
    labels = np.fromiter((spans.Answer(0, 0, 0, '', None, ('cat',)) for _ in range(20)), object)
    one, other = np.array(['cat'] * 20), np.array(['dog'] * 6 + ['the cat'] * 14)  # p = 2 / 2⁶
    for result in spans.randomisation_test(labels, one, other, draws=20_000).values():
        assert result['difference'] == pytest.approx(0.3) and abs(result['p'] - 2 / 64) < 0.005
    assert spans.randomisation_test(labels, other, other, draws=100)['f1'] == {'difference': 0.0, 'p': 1.0}


# ---------------------------------------------------------------------------- runs

@pytest.mark.slow
@pytest.mark.parametrize('architecture', ['ar', 'diffusion'])
def test_a_backbone_learns_to_find_an_answer(place, architecture):
    write_jsonl(place / 'rus' / 'train.jsonl', records(1000, 5, itself=True))
    write_jsonl(place / 'rus' / 'test.jsonl', records(100, 6, itself=True))
    classify(*QA, f'--architecture={architecture}', '--n_embd=32', '--batch_size=50', '--max_steps=300',
             '--learning_rate=5e-3', '--optimizer=muon', '--schedule=linear', '--eval_every=300', '--eval_batches=1',
             '--out_dir=run')
    results = json.loads((place / 'run' / 'eval_results.json').read_text())
    assert results['rus']['exact_match'] >= 0.9 and results['rus']['f1'] >= results['rus']['exact_match']
    with np.load(place / 'run' / 'predictions.npz') as saved:
        right = [text in json.loads(texts) for text, texts in zip(saved['rus_preds'], saved['rus_labels'])]
    assert np.mean(right) == pytest.approx(results['rus']['exact_match'])


@pytest.mark.parametrize('options', [
    ['--token_dropout=0.3', '--dropout=0.1', '--gradient_accumulation_steps=2', '--val_set_size=4'],
    ['--architecture=diffusion', '--eval_langs=rus,eng', '--lora_rank=2']])
def test_resume_is_bit_identical(place, options):
    settings = [*QA, '--batch_size=5', '--max_steps=5', '--eval_every=2', '--log_every=1', *options]
    assert_a_killed_run_ends_the_same(place, settings, '--resume_from=killed', tiny=[])
    with np.load(place / 'whole' / 'predictions.npz') as predictions:
        assert 'rus_spans' in predictions.files


def test_the_best_by_f1_stops_early_and_is_compared(place):
    classify(*QA, '--batch_size=8', '--num_epochs=1', '--out_dir=one')
    run = classify(*QA, '--batch_size=8', '--num_epochs=40', '--learning_rate=0.02', '--val_set_size=8',
                   '--eval_every=2', '--early_stopping=3', '--best_by=f1', '--num_layers_to_finetune=1',
                   '--compare_to=one', '--out_dir=two')
    one, two = (json.loads((place / name / 'eval_results.json').read_text()) for name in ('one', 'two'))
    assert run['step'] == run['best_step'] + 6 < 120 and two['step'] == run['best_step']
    assert two['val']['f1'] == pytest.approx(run['best_score']) and two['train']['rows'] == 16
    for name in ('exact_match', 'f1'):
        compared = two['compare_to']['rus'][name]
        assert compared['difference'] == pytest.approx(two['rus'][name] - one['rus'][name]) and 0 < compared['p'] <= 1
    with pytest.raises(UserError, match='no predictions for the rows of eng'):
        classify(*QA, '--eval_langs=eng', '--compare_to=one', '--out_dir=three')


@pytest.mark.slow
def test_two_ranks_end_where_one_does(place):
    settings = [*TINY, *QA, '--num_epochs=2', '--block_size=8']  # some answers are cut away
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    subprocess.run([*torchrun, ROOT / 'classify.py', *settings, '--batch_size=2', '--out_dir=two'], check=True,
                   stdout=subprocess.DEVNULL)
    classify(*settings[len(TINY):], '--batch_size=4', '--out_dir=one')
    one, two = (json.loads((place / name / 'eval_results.json').read_text()) for name in ('one', 'two'))
    assert one['rus']['without_span'] == two['rus']['without_span'] > 0
    assert one['rus']['loss'] == pytest.approx(two['rus']['loss'], abs=1e-4)


# ---------------------------------------------------------------------------- data and mistakes

def test_every_form_of_the_file_reads_the_same(place):
    asked = list(records(5, 3))
    import pyarrow.parquet
    (place / 'x').mkdir()
    write_jsonl(place / 'x' / 'lines.jsonl', asked)
    (place / 'x' / 'list.json').write_text(json.dumps(asked))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(asked), place / 'x' / 'table.parquet')
    expected = [((row['answers']['text'][0],), (row['answers']['answer_start'][0],)) for row in asked]
    articles = [{'title': '', 'paragraphs': [{'context': row['context'], 'qas': [
        {'question': row['question'], 'id': '', 'answers': [{'text': text, 'answer_start': start}]}]}]}
        for row, ((text,), (start,)) in zip(asked, expected)]
    (place / 'x' / 'squad.json').write_text(json.dumps({'version': '1.1', 'data': articles}))
    for split in ('lines', 'list', 'table', 'squad'):
        got = languages.read(entry_of('x'), split)
        assert got.labels.tolist() == expected and got.texts == [(row['question'], row['context']) for row in asked]
    phonemes = [{**row, 'question-phoneme': 'q', 'context-phoneme': 'qab', 'answers-phoneme': {
        'text': ['b'], 'answer_start': [2]}} for row in asked]
    write_jsonl(place / 'x' / 'ipa.jsonl', phonemes)
    got = languages.read(entry_of('x'), 'ipa', model_type='ipa')
    assert got.labels[0] == (('b',), (2,)) and got.texts[0] == ('q', 'qab')


@pytest.mark.parametrize('options, answers, part', [
    (['--pool=mean'], None, 'pool=mean says nothing about answers'), (['--num_classes=2'], None, 'num_classes=2 says'),
    (['--class_weights=balanced'], None, 'class_weights=balanced says'),
    (['--label_smoothing=0.1'], None, 'label_smoothing=0.1 says'), (['--best_by=macro_f1'], None, 'best_by'),
    (['--model_type=ipa'], None, "there is no 'question-phoneme'"), (['--block_size=4'], None, 'larger block_size'),
    (['--train_langs=rus,pol'], None, "need the same number of classes"),
    ([], {'text': ['x'], 'answer_start': []}, 'rus, train, row 1: the answers are'),
    ([], {'text': 'x', 'answer_start': [0]}, 'not of the form'), ([], ['x'], 'not of the form'),
    ([], {'text': [], 'answer_start': []}, 'No row of train has its answer')])
def test_a_mistake_is_named(place, options, answers, part):
    if answers is not None:
        write_jsonl(place / 'rus' / 'train.jsonl', [{**row, 'answers': answers} for row in records(3, 0)])
    database = languages.load_database('db.py')
    database['pol'] = {'qa': {**entry_of('rus'), 'task_type': 'classification', 'classes': 2}}
    Path('db.py').write_text(f'LANGUAGES = {database!r}')
    with pytest.raises(UserError) as error:
        classify(*QA, *options, '--out_dir=run')
    assert part in str(error.value) and not (place / 'run').exists()


def test_phonemes_need_answers_of_their_own(place):
    row = next(records(1, 0))
    write_jsonl(place / 'rus' / 'train.jsonl', [{**row, 'question-phoneme': 'q', 'context-phoneme': 'p'}])
    with pytest.raises(UserError, match="there is no 'answers-phoneme'"):
        classify(*QA, '--model_type=ipa', '--out_dir=run')


def test_a_file_that_is_not_squads_is_named(place):
    for whole in ({'rows': []}, {'data': [{'paragraphs': 3}]}, 'text', {'data': ['x']}):
        (place / 'rus' / 'dev.json').write_text(json.dumps(whole))
        with pytest.raises(UserError, match='holds neither a list of records'):
            languages.read(entry_of('rus'), 'dev')


def test_glue_is_in_the_database_with_labels_as_the_hub_has_them(monkeypatch):
    given = {}
    monkeypatch.setattr(languages, 'from_hub', lambda name, config, split: given.setdefault((name, config, split), [
        {'sentence1': 'one', 'sentence2': 'two', 'premise': 'p', 'hypothesis': 'h', 'label': i} for i in (1, 0)]))
    database = languages.load_database('config/languages.py')
    assert {'cola', 'mrpc', 'qnli', 'qqp', 'rte', 'wnli', 'mnli'} < set(database['eng'])
    sets, num_labels = languages.read_sets(database, 'rte', 'eng', '', 'normal')
    assert num_labels == 2 and sets['eng'][0][1].labels.tolist() == [1, 0]
    assert sets['train'][0][1].texts[0] == ('one', 'two')
    sets, num_labels = languages.read_sets(database, 'mnli', 'eng', '', 'normal')
    assert num_labels == 3 and list(given) == [
        ('nyu-mll/glue', 'rte', 'train'), ('nyu-mll/glue', 'rte', 'validation'),
        ('nyu-mll/glue', 'mnli', 'train'), ('nyu-mll/glue', 'mnli', 'validation_matched')]
