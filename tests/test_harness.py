"""lm-evaluation-harness gets from our checkpoints what its own model gets, or bounds that depend on nothing else."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import hf_model, letter_tokenizer, write_llama_tokenizer, write_small_checkpoint

pytest.importorskip('lm_eval', reason='lm_eval is not installed')
import lm_eval.__main__
from lm_eval import simple_evaluate
from lm_eval._cli.harness import HarnessCLI
from lm_eval.tasks import TaskManager

import hf
from lm import checkpoints, harness, prompts
from lm.configurator import ROOT, UserError

REAL = ROOT / 'data' / 'smollm2'
TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def requests(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


KINDS = {  # name: architecture, what its shape has beside
    'ar': ('ar', {}),
    'diffusion': ('diffusion', {}),
    'sdd': ('sdd', {}),
    'diffusion and ar': ('diffusion', {'ar_weight': 1.0}),
    'blocks': ('diffusion', {'block_length': (2,)}),
}
OF_WHOLE_ROWS = ['diffusion', 'sdd', 'diffusion and ar']


@pytest.fixture(params=KINDS)
def checkpoint(request, tmp_path):
    architecture, shape = KINDS[request.param]
    return write_small_checkpoint(tmp_path / 'run' / 'ckpt.pt', architecture, letter_tokenizer(), shape=shape)


def test_a_hugging_face_model_gets_what_the_harness_own_model_gives_it(tmp_path):
    from lm_eval.models.huggingface import HFLM

    hf_model('smollm', tmp_path, vocab_size=258, bos_token_id=256, eos_token_id=257)
    write_llama_tokenizer(tmp_path)
    settings = {'bos_token': '<s>', 'eos_token': '</s>', 'tokenizer_class': 'PreTrainedTokenizerFast'}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
    ours = harness.Checkpoint(tmp_path, batch_size=3, device='cpu')
    theirs = HFLM(str(tmp_path), device='cpu', dtype='float32', batch_size=3)

    pairs = requests(('The cat', ' sat'), ('', 'on the mat'), ('On ', 'it'), ('x' * 200, 'yz'))
    for one, other in zip(ours.loglikelihood(pairs, True), theirs.loglikelihood(pairs, True)):
        assert one == pytest.approx(other, abs=1e-4) and one[1] is other[1]
    long = requests(('a long text ' * 30,), ('short',))
    assert ours.loglikelihood_rolling(long, True) == pytest.approx(
        theirs.loglikelihood_rolling(long, True), abs=1e-3
    )
    greedy = requests(*[(text, {'until': ['q'], 'max_gen_toks': 12}) for text in ('The cat', 'on')])
    assert ours.generate_until(greedy, True) == theirs.generate_until(greedy, True)


@pytest.mark.skipif(not REAL.is_dir(), reason=f'there is no {REAL}, a folder of SmolLM2-135M-Instruct')
def test_a_real_model_gets_what_the_harness_own_model_gives_it():
    from lm_eval.models.huggingface import HFLM

    ours = harness.Checkpoint(REAL, batch_size=4, device='cpu')
    theirs = HFLM(str(REAL), device='cpu', dtype='float32', batch_size=4)
    words = (ROOT / 'docs' / 'guide.md').read_text().split()
    parts = [' '.join(words[i : i + 30]) for i in range(0, 60 * 40, 60)]  # 40 of them
    pairs = requests(*[(one, f' {other[:40]}') for one, other in zip(parts, parts[1:])])
    for one, other in zip(ours.loglikelihood(pairs, True), theirs.loglikelihood(pairs, True)):
        assert one == pytest.approx(other, abs=1e-4) and one[1] is other[1]
    whole = requests(*[(' '.join(parts[i : i + 5]),) for i in range(0, 40, 10)])
    assert ours.loglikelihood_rolling(whole, True) == pytest.approx(
        theirs.loglikelihood_rolling(whole, True), abs=1e-3
    )
    question = [{'role': 'user', 'content': 'What is the capital of France?'}]
    asked = requests(
        *[(model.apply_chat_template(question), {'max_gen_toks': 16}) for model in (ours, theirs)]
    )
    assert ours.generate_until(asked[:1], True) == theirs.generate_until(asked[1:], True)


def test_an_answer_depends_on_its_request_alone_and_not_on_its_batch(checkpoint):
    pairs = requests(('abc', 'de'), ('b', 'dd'), ('fghb', 'abab'), ('abc', 'a'), ('abc', 'de'))
    texts = requests(('abcab' * 12,), ('a',))
    together, alone = (harness.Checkpoint(checkpoint, batch_size=n, device='cpu', draws=4) for n in (4, 1))
    for call, some in (('loglikelihood', pairs), ('loglikelihood_rolling', texts)):
        answers = getattr(together, call)(some, True)
        reversed_answers = getattr(alone, call)(some[::-1], True)[::-1]
        for one, other in zip(answers, reversed_answers):
            assert one == pytest.approx(other, abs=1e-4)
    assert together.get_model_info()['draws'] == (4 if together.model.needs_noise else None)


def test_a_greedy_text_depends_on_its_request_alone(checkpoint):
    asked = [('abc', {'max_gen_toks': 9, 'until': []}), ('ab', {'max_gen_toks': 9, 'until': []})] * 2
    together, alone = (harness.Checkpoint(checkpoint, batch_size=n, device='cpu') for n in (3, 1))
    texts = together.generate_until(requests(*asked), True)
    assert texts[:2] == texts[2:] and texts == alone.generate_until(requests(*asked), True)


def test_settings_of_the_harness_without_effect_are_reported(checkpoint, capsys):
    model = harness.Checkpoint(checkpoint, device='cpu', draws=7, steps=3)
    assert ('draws, steps has no effect on ar' in capsys.readouterr().out) == model.model.causal
    asked = {'max_gen_toks': 4, 'until': [], 'num_beams': 4, 'do_sample': False}
    model.generate_until(requests(('abc', asked), ('ab', asked)), True)
    assert capsys.readouterr().out.count('note: num_beams of a task has no effect here.') == 1


@pytest.mark.parametrize('checkpoint', OF_WHOLE_ROWS, indirect=True)
def test_the_bound_of_a_continuation_is_the_mean_over_orders(checkpoint):
    """Of two tokens: -(nll of one, both hidden, + nll of the other then), over which of them comes first."""
    model = harness.Checkpoint(checkpoint, device='cpu', draws=200)
    start, (first, second) = model.tok_encode('ab'), model.tok_encode('cd', add_special_tokens=False)
    mask = model.model.config.mask_id
    given = [*start, mask, mask], [*start, first, mask], [*start, mask, second]
    with torch.no_grad():
        rows = torch.tensor(given)
        logits = model.model.head(model.model.denoiser(rows)[0]).log_softmax(-1)
    both = logits[0, -2, first] + logits[0, -1, second]
    expected = (both + logits[1, -1, second] + logits[2, -2, first]).item() / 2
    [(value, _)] = model.loglikelihood(requests(('ab', 'cd')), True)
    assert value == pytest.approx(expected, abs=0.1)


def test_a_continuation_of_one_token_has_the_same_bound_at_each_draw(checkpoint):
    values = []
    for draws in (1, 3):
        model = harness.Checkpoint(checkpoint, device='cpu', draws=draws)
        values.append(model.loglikelihood(requests(('abc', 'd')), True)[0][0])
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_what_the_harness_may_ask_for_at_the_edges(checkpoint):
    model = harness.Checkpoint(checkpoint, device='cpu', draws=1)
    assert model._loglikelihood_tokens([(None, [3], [])], True) == [(0.0, True)]
    assert model.loglikelihood_rolling(requests(('abc',)), True) == [
        pytest.approx(model.loglikelihood(requests(('', 'abc')), True)[0][0], abs=1e-4)
    ]
    drawn, read, readings = {'until': [''], 'temperature': 1.0, 'max_tokens': 8}, model.read_settings, []
    model.read_settings = lambda settings: readings.append(settings) or read(settings)
    texts = model.generate_until(requests(*[('a', drawn)] * 3), True)
    assert len(readings) == 1  # of equal settings once: it reads the whole vocabulary
    assert len(set(texts)) == 3 and max(map(len, texts)) <= 8
    alone = harness.Checkpoint(checkpoint, device='cpu', batch_size=1)
    assert len(set(alone.generate_until(requests(*[('a', drawn)] * 3), True))) > 1
    _, _, options = model.read_settings({'until': '<|mask|>', 'max_gen_toks': 8})
    assert model.text.mask_id in options['stop_tokens']


def test_an_export_gets_what_its_checkpoint_gets(checkpoint, tmp_path):
    hf.main(['export', str(checkpoint), f'--out={tmp_path / "exported"}'])
    ours, exported = (
        harness.Checkpoint(path, device='cpu', draws=2) for path in (checkpoint, tmp_path / 'exported')
    )
    pair = requests(('abc', 'de'))
    assert exported.loglikelihood(pair, True)[0] == pytest.approx(ours.loglikelihood(pair, True)[0], abs=1e-4)


@pytest.mark.faults
@pytest.mark.parametrize('is_ours', [True, False])
def test_an_export_says_whether_it_was_trained_here_and_in_which_rows(tmp_path, is_ours):
    settings = {'dataset': 'own', 'block_size': 8, 'mode': 'documents'} if is_ours else {}
    saved = dict(came_with={'added_tokens': []}, train_config=settings)
    path = write_small_checkpoint(tmp_path / 'ckpt.pt', 'ar', letter_tokenizer(), **saved)
    hf.main(['export', str(path), f'--out={tmp_path / "exported"}'])
    hf.main(['import', str(tmp_path / 'exported'), f'--out={tmp_path / "again.pt"}'])
    for source in (path, tmp_path / 'exported', tmp_path / 'again.pt'):
        assert harness.Checkpoint(source, device='cpu').is_ours == is_ours
        told = checkpoints.load(source)['train_config']  # by which evaluate.py chooses its rows
        assert [told.get(key) for key in ('block_size', 'mode')] == (
            [8, 'documents'] if is_ours else [None] * 2
        )


def test_a_bound_says_its_draws_and_empty_settings_say_nothing(tmp_path, capsys):
    for name in ('diffusion', 'ar'):
        path = write_small_checkpoint(tmp_path / f'{name}.pt', name, letter_tokenizer())
        harness.Checkpoint(path, device='cpu', draws=2 if name == 'diffusion' else 128, sampler='')
    said = capsys.readouterr()
    assert (said.out + said.err).count('2 draws each') == 1 and 'no effect' not in said.out + said.err


def test_greedy_means_the_text_that_is_written_at_temperature_0(checkpoint):
    model = harness.Checkpoint(checkpoint, device='cpu', draws=1, sampler='confidence')
    written = model.generate_until(requests(('abc', {'max_gen_toks': 2})), True)[0]
    assert len(written) == 2
    answers = model.loglikelihood(
        requests(('abc', written), ('abc', 'aa' if written != 'aa' else 'ab')), True
    )
    assert [is_greedy for _, is_greedy in answers] == [True, False]


def test_a_conversation_is_encoded_as_a_chat_is(tmp_path):
    tokenizer = letter_tokenizer('abcdefgh #:InstrucioRep\n')
    path = write_small_checkpoint(
        tmp_path / 'run' / 'ckpt.pt', 'ar', tokenizer, prompt_format=prompts.DEFAULT
    )
    model = harness.Checkpoint(path, device='cpu')
    text = model.apply_chat_template([{'role': 'user', 'content': 'abc'}])
    expected, _ = prompts.encode(tokenizer, prompts.DEFAULT, [('abc', '', None)])
    assert model.tok_encode(text) == [tokenizer.endoftext_id, *expected]
    told = [{'role': 'user', 'content': 'abc'}, {'role': 'assistant', 'content': 'ab'}]
    assert model.apply_chat_template(told, add_generation_prompt=False) == f'{text}ab'


@pytest.mark.parametrize(
    'options, said',
    [
        ({}, 'No checkpoint is given'),
        ({'checkpoint': 'CHECKPOINT', 'drawz': 3}, 'drawz, which is unknown'),
        ({'checkpoint': 'CHECKPOINT', 'draws': 0}, 'draws is 0'),
        ({'checkpoint': 'CHECKPOINT', 'batch_size': '0'}, 'batch_size is 0'),
    ],
)
def test_a_mistake_in_model_args_is_one_sentence(options, said, checkpoint):
    options = {name: checkpoint if value == 'CHECKPOINT' else value for name, value in options.items()}
    with pytest.raises(UserError, match=said):
        harness.Checkpoint(**options, device='cpu')


def test_a_task_of_local_files_says_which_bound_it_is(tmp_path, monkeypatch):
    path = write_small_checkpoint(tmp_path / 'run' / 'ckpt.pt', 'diffusion', letter_tokenizer())
    records = [{'q': 'abc', 'choices': ['a', 'b'], 'gold': i % 2} for i in range(4)]
    (tmp_path / 'data.json').write_text(json.dumps(records))
    (tmp_path / 'letters.yaml').write_text(TASK % (tmp_path / 'data.json'))
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = harness.Checkpoint(path, device='cpu', draws=2, batch_size='auto')
    results = simple_evaluate(model=model, tasks=['letters'], task_manager=manager, bootstrap_iters=0)
    assert results['results']['letters']['acc,none'] == 0.5  # the same two choices, each right twice
    assert results['config']['bound'] == 'upper' and results['config']['draws'] == 2


def test_tasks_that_import_evaluate_get_the_package_and_not_our_script():
    import evaluate

    assert hasattr(evaluate, 'load') and not hasattr(evaluate, 'checkpoint')


def test_the_command_gives_the_harness_our_model_and_the_users_words_last(monkeypatch):
    words = ['--model_args', 'checkpoint=a.pt', '--tasks', 'letters', '--batch_size', '2']
    given = []
    monkeypatch.setattr(sys, 'argv', ['harness.py', *words])
    monkeypatch.setattr(lm_eval.__main__, 'cli_evaluate', lambda: given.append(HarnessCLI().parse_args()))
    harness.main()
    (given,) = given
    assert (given.model, given.device, given.batch_size) == ('diffusion-lm', 'auto', '2')
    assert given.model_args == {'checkpoint': 'a.pt'}


def test_a_prefilled_answer_is_continued_where_a_template_trims_it(tmp_path):
    form = '{% for m in messages %}{{ m.content | trim }}#{% endfor %}'
    path = write_small_checkpoint(tmp_path / 'run' / 'ckpt.pt', 'ar', letter_tokenizer(), prompt_format=form)
    told = [{'role': 'user', 'content': 'abc'}, {'role': 'assistant', 'content': ' ab '}]
    assert harness.Checkpoint(path, device='cpu').apply_chat_template(told, False) == 'abc#ab'
