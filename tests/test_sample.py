"""sample.py as a user runs it, from nothing but a ckpt.pt."""

import json
import re
import runpy
import shutil
import sys

import pytest
import torch
from conftest import letter_tokenizer, random_model, write_small_checkpoint
from helpers import GPT2_SWITCHES, run, special_ids
from test_classify import nanogpt_state

import sampling
from lm import checkpoints
from lm.configurator import ROOT, UserError
from lm.tokenizer import Tokenizer

ARCHITECTURES = ('ar', 'diffusion', 'sdd')


@pytest.fixture
def checkpoint_of(tmp_path):
    return lambda architecture: write_small_checkpoint(
        tmp_path / f'{architecture}.pt', architecture, letter_tokenizer()
    )


@pytest.fixture
def sample(capsys, monkeypatch):
    """A function that runs the script and returns the samples that it prints, without the lines between them."""

    def run(*options):
        arguments = ['sample.py', '--device=cpu', '--stop_at_end=False', *map(str, options)]
        monkeypatch.setattr(sys, 'argv', arguments)
        runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
        header, *samples = capsys.readouterr().out.split('-' * 80 + '\n')
        assert 'step 7' in header
        return [text.removesuffix('\n') for text in samples or [header]]

    return run


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_a_prompt_is_continued_the_same_way_for_the_same_seed(architecture, checkpoint_of, sample):
    options = [f'--checkpoint={checkpoint_of(architecture)}', '--num_samples=2', '--max_new_tokens=9']
    texts = sample(*options, '--prompt=the cat')
    assert len(texts) == 2 and all(text.startswith('the cat') and len(text) > 7 for text in texts)
    assert texts == sample(*options, '--prompt=the cat') != sample(*options, '--prompt=the cat', '--seed=1')


@pytest.mark.faults
def test_a_checkpoint_of_nanogpt_is_read_and_settings_of_other_samplers_are_reported(
    tmp_path, monkeypatch, capsys
):
    shape = dict(n_layer=1, n_head=2, n_embd=16, block_size=32)
    model = random_model('ar', 0.3, **shape, **special_ids(letter_tokenizer()), **GPT2_SWITCHES)
    model_args = {**shape, 'bias': True, 'dropout': 0.0, 'vocab_size': model.config.padded_vocab_size}
    torch.save({'model': nanogpt_state(model), 'model_args': model_args, 'iter_num': 5}, tmp_path / 'ckpt.pt')
    (tmp_path / 'letters.json').write_text(letter_tokenizer().to_json())
    words = [f'--checkpoint={tmp_path}', f'--tokenizer={tmp_path}/letters.json', '--prompt=the', '--steps=3']
    run('sample.py', *words, '--max_new_tokens=4', '--num_samples=1', '--device=cpu')
    output = capsys.readouterr().out
    assert '\nthe' in output and 'note: steps=3 has no effect on ar.' in output


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_the_checkpoint_is_all_that_it_needs(architecture, checkpoint_of, tmp_path, sample, monkeypatch):
    folder = tmp_path / 'elsewhere'
    folder.mkdir()
    shutil.move(checkpoint_of(architecture), folder / 'ckpt.pt')
    monkeypatch.chdir(folder)
    assert len(sample(f'--checkpoint={folder}', '--max_new_tokens=50')) == 3  # past the block


def test_a_prompt_comes_from_a_file(checkpoint_of, tmp_path, sample):
    (tmp_path / 'prompt.txt').write_text('a small bird')
    options = ['--num_samples=1', '--max_new_tokens=3', f'--prompt=FILE:{tmp_path}/prompt.txt']
    (text,) = sample(f'--checkpoint={checkpoint_of("ar")}', *options)
    assert text.startswith('a small bird')


@pytest.mark.faults
def test_what_a_model_writes_cannot_steer_the_terminal(tmp_path, sample):
    checkpoint = write_small_checkpoint(tmp_path / 'ckpt.pt', 'ar', letter_tokenizer('\x1b\x9b'))
    (text,) = sample(f'--checkpoint={checkpoint}', '--num_samples=1', '--max_new_tokens=30')
    assert text.startswith('\\x') and text.isprintable()


@pytest.mark.faults
def test_a_prompt_that_begins_with_a_byte_order_mark_or_is_no_utf8(checkpoint_of, tmp_path, sample):
    (tmp_path / 'prompt.txt').write_text('a bird', encoding='utf-8-sig')
    options = [f'--checkpoint={checkpoint_of("ar")}', '--num_samples=1', '--max_new_tokens=3']
    (text,) = sample(*options, f'--prompt=FILE:{tmp_path}/prompt.txt')
    assert text.startswith('a bird')
    with pytest.raises(UserError, match='--prompt is no valid UTF-8'):
        sample(*options, '--prompt=a\udcff')  # as Python reads the byte


@pytest.mark.parametrize('architecture', ['diffusion', 'sdd'])
@pytest.mark.parametrize('sampler', ['ancestral', 'confidence', 'blocks', 'threshold', 'remdm'])
def test_gaps_are_filled_and_the_rest_stays(sampler, architecture, checkpoint_of, sample):
    options = ['--infill=the <mask:4> sat<mask:2>', '--num_samples=1', '--top_k=9', f'--sampler={sampler}']
    (text,) = sample(f'--checkpoint={checkpoint_of(architecture)}', *options)
    assert text.startswith('the ') and ' sat' in text and '<mask' not in text


def test_an_ar_model_fills_gaps_as_often_as_it_takes_and_shows_the_likeliest_first(checkpoint_of, sample):
    path = checkpoint_of('ar')
    texts = sample(
        f'--checkpoint={path}', '--infill=the <mask:4> sat<mask:2>', '--top_k=9', '--num_samples=8'
    )
    assert all(re.fullmatch('the .{0,4} sat.{0,2}', text) for text in texts) and len(set(texts)) > 1
    texts = [text for text in texts if len(text) == 14]  # the others have special tokens in their gaps
    assert len(texts) > 1
    state = checkpoints.load(path)
    tokenizer, model = Tokenizer(state['tokenizer']), checkpoints.load_model(state, 'cpu')
    rows = torch.tensor([[state['start_token'], *tokenizer.encode(text)] for text in texts])
    assert model.nll(rows).diff().min() >= 0
    assert len(sample(f'--checkpoint={path}', '--infill=the <mask:4>', '--weights=float16')) == 3


def test_a_text_that_begins_with_a_gap_begins_after_the_start_token(tmp_path, sample):
    checkpoint = write_small_checkpoint(
        tmp_path / 'ckpt.pt', 'ar', letter_tokenizer(), start_token=3
    )  # a letter
    (text,) = sample(f'--checkpoint={checkpoint}', '--infill=<mask:2>ab', '--num_samples=1')
    assert text.endswith('ab')


def test_a_gap_in_an_answer_is_filled_after_its_prompt(tmp_path, sample):
    tokenizer = letter_tokenizer(sorted(set('abcdefghijklmnopqrstuvwxyz ### Instruction:\n\nResponse')))
    checkpoint = write_small_checkpoint(
        tmp_path / 'ckpt.pt', 'diffusion', tokenizer, shape={'block_size': 128}
    )
    options = [f'--checkpoint={checkpoint}', '--seed=3', '--num_samples=1', '--temperature=0']
    (text,) = sample(*options, '--chat', '--prompt=say yes', '--infill=y<mask:3>s')
    prompt = '### Instruction:\nsay yes\n\n### Response:\n'
    (whole,) = sample(*options, f'--infill={prompt}y<mask:3>s')
    assert whole.removeprefix(prompt) == text and re.fullmatch('y.{3}s', text)


def test_an_instruction_is_answered_in_the_prompt_format(tmp_path, sample, capsys):
    tokenizer = letter_tokenizer(sorted(set('abcdefghijklmnopqrstuvwxyz ### Instruction:\n\nResponse')))
    checkpoint = write_small_checkpoint(tmp_path / 'ckpt.pt', 'ar', tokenizer, shape={'block_size': 128})
    options = [f'--checkpoint={checkpoint}', '--max_new_tokens=5', '--seed=3', '--num_samples=1']
    (text,) = sample(*options, '--chat', '--prompt=say yes')
    prompt = '### Instruction:\nsay yes\n\n### Response:\n'
    (whole,) = sample(*options, f'--prompt={prompt}')
    assert whole.removeprefix(prompt).strip() == text != ''
    run('sample.py', *options, '--chat', f'--prompt={"say yes " * 20}', '--device=cpu')
    assert 'tokens, of which the model reads the last' in capsys.readouterr().out


def test_a_conversation_goes_on_until_ctrl_d(tmp_path, sample, monkeypatch):
    tokenizer = letter_tokenizer(sorted(set('abcdefghijklmnopqrstuvwxyz ### Instruction:\n\nResponse')))
    checkpoint = write_small_checkpoint(tmp_path / 'ckpt.pt', 'ar', tokenizer, shape={'block_size': 128})
    options = [f'--checkpoint={checkpoint}', '--chat', '--max_new_tokens=5', '--seed=3']
    (text,) = sample(*options, '--prompt=say yes', '--num_samples=1')
    save = f'/save {tmp_path}/conversation.json'
    typed = iter(
        ['say yes', 'say no', save, KeyboardInterrupt, '/reset', 'say yes', 'what?', save, '/undo', EOFError]
    )

    def type_in(prompt):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr('builtins.input', type_in)
    (conversation,) = sample(*options)
    answers = re.findall(r'Model: (.*)\n\[\d+ tokens, [\d.]+ tokens/s\]', conversation)
    assert len(answers) == 3 and answers[0] == answers[2] == text
    assert (
        "'?'" in conversation and 'is there already' in conversation and 'There is no /undo' in conversation
    )
    (saved,) = json.loads((tmp_path / 'conversation.json').read_text())
    assert [one['content'] for one in saved['messages']] == ['say yes', answers[0], 'say no', answers[1]]


@pytest.mark.faults
def test_what_stands_behind_the_end_of_an_answer_is_not_counted(checkpoint_of, capsys):
    script = run('sample.py', f'--checkpoint={checkpoint_of("ar")}', '--max_new_tokens=1', '--device=cpu')
    (end, *_), printer = script['options']['stop_tokens'], script['Printer']()
    for new in ([1, 2], [3, end, end, end]):
        printer([new])
    printer.end()
    assert '[4 tokens, ' in capsys.readouterr().out


@pytest.mark.faults
def test_gaps_are_refused_by_a_model_that_sees_nothing_behind_them(tmp_path):
    shape = dict(block_length=(4,), ar_weight=1.0)
    path = write_small_checkpoint(tmp_path / 'ckpt.pt', 'diffusion', letter_tokenizer(), shape=shape)
    words = [f'--checkpoint={path}', '--infill=a<mask:2>b', '--device=cpu']
    with pytest.raises(UserError, match='sees nothing behind a gap; choose --sampler=ar'):
        run('sample.py', *words)
    run('sample.py', *words, '--sampler=ar')


@pytest.mark.faults
def test_options_without_effect_are_reported(checkpoint_of, capsys):
    words = [
        '--threshold=0.5',
        '--eta=0.2',
        '--temperature=0',
        '--top_k=3',
        '--infill=a<mask:2>',
        '--max_new_tokens=4',
        '--block_length=2',
    ]
    run(
        'sample.py', f'--checkpoint={checkpoint_of("diffusion")}', *words, '--sampler=entropy', '--device=cpu'
    )
    output = capsys.readouterr().out
    assert (
        "note: eta=0.2 has no effect with sampler='entropy'." in output and 'threshold=0.5 has' not in output
    )
    for said in (
        'top_k=3 has no effect at temperature=0.',
        'max_new_tokens=4 has no effect with infill.',
        'block_length=2 has no effect on whole rows.',
    ):
        assert f'note: {said}' in output


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(tmp_path, sample, monkeypatch):
    tokenizer = letter_tokenizer(sorted(set('abcdefghijklmnopqrstuvwxyz ### Instruction:\n\nResponse')))
    checkpoint = write_small_checkpoint(tmp_path / 'ckpt.pt', 'ar', tokenizer, shape={'block_size': 128})
    typed, steps = iter(['say yes', '/save ' + str(tmp_path / 'said.json')]), iter(range(9))
    decode_step = sampling.decode_step

    def interrupted(*arguments):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return decode_step(*arguments)

    def type_in(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sampling, 'decode_step', interrupted)
    monkeypatch.setattr('builtins.input', type_in)
    sample(f'--checkpoint={checkpoint}', '--chat', '--max_new_tokens=9', '--seed=3')
    (saved,) = json.loads((tmp_path / 'said.json').read_text())
    assert 1 <= len(saved['messages'][1]['content']) <= 4


@pytest.mark.parametrize(
    'architecture, shape', [('ar', {}), ('diffusion', {}), ('diffusion', {'block_length': (4,)})]
)
def test_a_stream_is_told_what_is_written(architecture, shape):
    model, told = (
        random_model(
            architecture, 0.3, vocab_size=32, block_size=16, mask_id=30, ignore_id=31, n_embd=32, **shape
        ),
        [],
    )
    row = sampling.generate(model, [[1, 2, 3]], 30, stream=told.append)[0]
    assert [token for (new,) in told for token in new] == row[3:]


@pytest.mark.parametrize(
    'options, said',
    [
        (['--html=no/where.html'], 'lies in a folder that does not exist'),
        (['--chat', '--watch'], 'A conversation is not watched'),
        (['--k=-1'], 'k is -1'),
        (['--checkpoint=nowhere.pt'], 'nowhere.pt'),
        (['--prompt=' + 40 * 'a'], 'has 41 tokens'),
        (['--prompt=what?'], "'?'"),
        (['--prompt=FILE:nowhere.txt'], 'nowhere.txt'),
        (['--infill=the cat'], '<mask:12>'),
        (['--infill=a <mask:1000000000000>'], '<mask:1000000000000> is longer than any row'),
        (['--infill=a<mask:1>', '--watch'], 'are not watched'),
        (['--infill=a<mask:1>', '--prompt=b'], 'leave one out'),
        (['--chat', '--infill=a<mask:1>'], 'give the --prompt'),
        (['--system=be kind'], '--chat'),
        (['--num_samples=0'], 'num_samples is 0'),
        (['--temperature=-1.0'], 'temperature is -1.0'),
    ],
)
def test_a_mistake_is_one_sentence(options, said, checkpoint_of, sample):
    with pytest.raises(UserError, match='(?s)' + re.escape(said)):
        sample(f'--checkpoint={checkpoint_of("ar")}', *options)


def test_an_unknown_sampler_is_refused(checkpoint_of, sample):
    with pytest.raises(UserError, match="sampler is 'best'"):
        sample(f'--checkpoint={checkpoint_of("diffusion")}', '--sampler=best')
