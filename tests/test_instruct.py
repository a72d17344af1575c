"""prepare/instruct.py makes examples of records of every usual shape; only their answers have a loss."""

import json
import string

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import hf_model, write_llama_tokenizer, write_small_checkpoint

from lm import checkpoints, data, prompts
from lm.configurator import UserError
from lm.folder import Folder
from lm.tokenizer import ENDOFTEXT
from prepare import writer
from prepare.examples import Examples, conversation


@pytest.fixture
def instruct(prepare, tmp_path):
    """Runs prepare/instruct.py in this process on records; returns the folder, opened."""

    def run(records, *arguments, file='records.json', folder='out'):
        if records is not None:
            (tmp_path / file).write_text(json.dumps(records))
        settings = [f'--source={tmp_path / file}', '--tokenizer=bytes', '--val_fraction=0.5']
        return Folder(prepare('instruct.py', *settings, *arguments, output_dir=tmp_path / folder))

    return run


def examples_of(folder):
    """[(untrained text, trained text)] of all examples, special tokens spelled out, sorted."""
    found = []
    for split in ('train', 'val'):
        index = folder.index[split].astype(int)
        for start, end in zip(index, index[1:]):
            ids, mask = folder.tokens[split][start:end], folder.masks[split][start:end]
            found.append(
                tuple(folder.tokenizer.decode(ids[mask == part], show_special=True) for part in (0, 1))
            )
    return sorted(found)


def alpaca(count=20):
    return [
        {'instruction': f'Say {i}.', 'input': 'Please.' * (i % 2), 'output': f'It is {i}!'}
        for i in range(count)
    ]


@pytest.mark.faults
def test_an_example_that_a_character_vocabulary_cannot_spell_is_left_out(instruct, prepare, tmp_path):
    (tmp_path / 'letters.txt').write_text(string.printable * 9)
    words = ['text.py', f'--input={tmp_path}/letters.txt', '--tokenizer=char', '--val_fraction=0.5']
    prepare(*words, output_dir=tmp_path / 'letters')
    records = [*alpaca(), {'instruction': 'Say é.', 'input': '', 'output': 'It is é!'}]
    words = [f'--tokenizer={tmp_path}/letters', '--prompt_format=qa', '--on_error=skip']
    assert instruct(records, *words).config['examples']['refused'] == 1


ODD = [
    {'model_type': 'llama', 'max_position_embeddings': '2048'},
    {'model_type': 'llama', 'model_config': None},
    {'model_type': 'mixtral', 'max_position_embeddings': [1]},
]


@pytest.mark.faults
@pytest.mark.parametrize('c', ODD)
def test_a_folder_of_no_model_of_ours_gives_its_tokenizer_alone(tmp_path, c):
    write_llama_tokenizer(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(c))
    tokenizer, block_size, _ = writer.model_at(str(tmp_path))
    assert tokenizer and block_size is None


@pytest.mark.faults
def test_rows_are_no_longer_than_the_window_that_a_model_attends_to(tmp_path):
    hf_model('mistral', tmp_path)
    write_llama_tokenizer(tmp_path)
    path = tmp_path / 'config.json'
    c = json.loads(path.read_text())
    assert writer.model_at(str(tmp_path))[1] == c['max_position_embeddings']
    path.write_text(json.dumps({**c, 'sliding_window': 8}))
    assert writer.model_at(str(tmp_path))[1] == 8


# ---------------------------------------------------------------------------- records

SHAPES = {
    'alpaca': ({'instruction': 'Add.', 'input': '2 3', 'output': '5'}, 'Add.', '2 3', '5'),
    'no input': ({'instruction': 'Add.', 'input': '', 'output': '5'}, 'Add.', '', '5'),
    'dolly': (
        {'instruction': 'Add.', 'context': '2 3', 'response': '5', 'category': 'x'},
        'Add.',
        '2 3',
        '5',
    ),
    'completion': ({'prompt': 'Add.', 'completion': '5'}, 'Add.', '', '5'),
    'messages': (
        {
            'messages': [
                {'role': 'user', 'content': 'Add.'},
                {'role': 'assistant', 'content': '5'},
                {'role': 'user', 'content': 'Thanks'},
            ]
        },
        'Add.',
        '',
        '5',
    ),
    'conversation': (
        {
            'prompt': [{'role': 'user', 'content': 'Add.'}],
            'completion': [{'role': 'assistant', 'content': '5'}],
        },
        'Add.',
        '',
        '5',
    ),
    'sharegpt': (
        {'conversations': [{'from': 'human', 'value': 'Add.'}, {'from': 'gpt', 'value': '5'}]},
        'Add.',
        '',
        '5',
    ),
}


@pytest.mark.parametrize('shape', SHAPES)
def test_records_of_each_shape_are_the_same_example(shape):
    record, instruction, given, answer = SHAPES[shape]
    example, _ = conversation(record, 'here')
    text = Examples(prompts.DEFAULT, 100, 'stop').text(json.dumps(example))
    assert text == prompts.prompt_of(prompts.DEFAULT, instruction, given) + answer


@pytest.mark.parametrize('shape, ending', [('alpaca', 'json'), ('dolly', 'jsonl'), ('messages', 'parquet')])
def test_records_are_read_from_each_kind_of_file(instruct, tmp_path, shape, ending):
    record, instruction, given, answer = SHAPES[shape]
    records = [json.loads(json.dumps(record).replace('Add.', f'Add {n}.')) for n in range(9)]
    file = tmp_path / f'records.{ending}'
    if ending == 'parquet':
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    else:
        file.write_text('\n'.join(map(json.dumps, records)) if ending == 'jsonl' else json.dumps(records))
    folder = instruct(None, file=file.name)
    expected = prompts.prompt_of(prompts.DEFAULT, instruction, given)
    assert examples_of(folder) == [
        (expected.replace('Add.', f'Add {n}.'), answer + ENDOFTEXT) for n in range(9)
    ]
    assert folder.config['prompt_format'] == prompts.DEFAULT


def test_plain_text_is_trained_as_a_whole(instruct):
    folder = instruct([{'text': f'Text {i}.'} for i in range(6)], '--field=text')
    assert examples_of(folder) == [('', f'Text {i}.{ENDOFTEXT}') for i in range(6)]


@pytest.mark.faults
def test_a_plain_text_longer_than_a_row_becomes_several_and_loses_nothing(instruct, capsys):
    texts = [f'{i}: ' + 'abcdefghij' * i for i in range(1, 12)]
    folder = instruct([{'text': text} for text in texts], '--field=text', '--max_seq_len=32')
    assert folder.config['examples']['whole'] == 11 and folder.config['examples']['too long'] == 0
    parts = [text for _, text in examples_of(folder)]
    assert sum(map(len, parts)) == sum(len(text + ENDOFTEXT) for text in texts) and len(parts) > 20
    assert sum(sizes['bytes'] for sizes in folder.splits.values()) == sum(map(len, texts))
    assert all(np.diff(folder.index[split].astype(int)).max() <= 31 for split in ('train', 'val'))


@pytest.mark.faults
def test_system_and_the_switches_of_answers_are_read_and_other_fields_named(instruct, capsys):
    talk = [
        {'role': 'user', 'content': 'A', 'weight': 0},
        {'role': 'assistant', 'content': 'no', 'weight': 0},
        {'role': 'user', 'content': 'B', 'train': True, 'name': ''},
        {'role': 'assistant', 'content': 'yes', 'train': True, 'tool_calls': [{'id': 1}]},
    ]
    more = {'tools': [{'name': 'f'}], 'id': 7, 'history': []}
    records = [{'messages': talk, 'system': f'Be kind, {i}.', **more} for i in range(9)]
    records.append({'instruction': 'C', 'output': 'D', 'system': 'Be brief.', 'history': [['a', 'b']]})
    folder = instruct(records, '--prompt_format=chatml')
    expected = {'tools': 9, 'id': 9, 'tool_calls of a message': 9, 'train of a message': 9, 'history': 1}
    assert folder.config['unread'] == expected
    said = capsys.readouterr().out
    assert 'fields that were not read: ' in said and 'tools (9)' in said and 'history (1)' in said
    found = examples_of(folder)
    assert {answer for _, answer in found} == {'yes' + ENDOFTEXT, 'D' + ENDOFTEXT}
    assert all('no' in prompt and f'Be kind, {i}.' in prompt for i, (prompt, _) in enumerate(found[1:]))
    assert 'Be brief.' in found[0][0]


def test_many_turns_are_one_example_and_leading_answers_are_kept(instruct):
    talk = [
        {'from': 'gpt', 'value': 'Hello.'},
        {'from': 'human', 'value': 'A'},
        {'from': 'human', 'value': 'B'},
        {'from': 'gpt', 'value': 'C'},
    ]
    folder = instruct([{'conversations': talk}, {'conversations': talk[1:]}], '--prompt_format=qa')
    assert ('Question: A\n\nB\n\nAnswer:\n', 'C<|endoftext|>') in examples_of(folder)
    assert (
        'Question: \n\nAnswer:\nQuestion: A\n\nB\n\nAnswer:\n',
        'Hello.<|endoftext|>C<|endoftext|>',
    ) in examples_of(folder)


def test_long_prompts_are_cut_long_answers_and_empty_ones_left_out_and_counted(instruct, capsys):
    records = alpaca(10) + [
        {'instruction': 'long ' * 50, 'input': '', 'output': 'Short.'},
        {'instruction': 'Hm?', 'input': '', 'output': 'long ' * 50},
        {'instruction': 'Hm?', 'input': '', 'output': ' \n'},
    ]
    folder = instruct(records, '--max_seq_len=80')
    assert folder.config['examples'] == {'whole': 10, 'cut': 1, 'too long': 1, 'empty': 1, 'refused': 0}
    assert 'examples: 10 whole, 1 cut, 1 too long, 1 empty, 0 refused' in capsys.readouterr().out
    (cut,) = (prompt for prompt, answer in examples_of(folder) if answer.startswith('Short.'))
    assert (
        cut.endswith('long \n\n### Response:\n') and len(cut) + len('Short.') + 1 == 79
    )  # and the start token
    assert all(np.diff(folder.index[split].astype(int)).max() <= 79 for split in ('train', 'val'))
    for split, counts in folder.splits.items():  # each token a byte, but for what is no text
        assert counts['bytes'] == int((folder.tokens[split] < folder.tokenizer.endoftext_id).sum())


def test_max_examples_are_the_first(instruct):
    assert len(examples_of(instruct(alpaca(20), '--max_examples=7'))) == 7


@pytest.mark.parametrize('name', ['records.jsonl', 'records.parquet'])
def test_a_stopped_preparation_goes_on_and_gives_the_same_bytes(
    instruct, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr(writer, 'SHARD', 500)
    records = alpaca(90) + [{'instruction': 'Hm?', 'input': '', 'output': 'long ' * 90}] * 3 + alpaca(20)
    records[70]['output'] = None  # of no known kind of record
    if name.endswith('parquet'):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / name, row_group_size=40)
    else:
        (tmp_path / name).write_text('\n'.join(map(json.dumps, records)))
    arguments = ['--max_seq_len=300', '--max_examples=110']
    whole = instruct(None, *arguments, '--on_error=skip', file=name, folder='whole').config
    assert whole['examples']['too long'] == 3 and whole['skipped'] == 1
    with pytest.raises(UserError, match="71: the field 'output' holds null"):
        instruct(None, *arguments, file=name)
    again = instruct(None, *arguments, '--on_error=skip', file=name).config
    assert 'going on where an unfinished preparation stopped' in capsys.readouterr().out
    for key in ('sha256', 'splits', 'examples', 'skipped'):
        assert again[key] == whole[key], key


def test_a_folder_is_reused_for_the_same_command_and_refused_for_another(instruct, capsys):
    instruct(alpaca())
    instruct(alpaca())
    assert 'is prepared already' in capsys.readouterr().out
    with pytest.raises(UserError, match='prompt_format was default and is qa'):
        instruct(alpaca(), '--prompt_format=qa')
    (instruct(alpaca()).path / 'val_masks.bin').write_bytes(b'1')
    with pytest.raises(UserError, match='val_masks.bin has 1 bytes, config.json says'):
        instruct(alpaca())


@pytest.mark.faults
def test_a_share_for_validation_that_stories_do_not_take_is_refused(prepare, tmp_path):
    with pytest.raises(UserError, match='val_fraction has no effect on stories'):
        prepare('instruct.py', '--source=stories', '--val_fraction=0.3', output_dir=tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_a_bpe_learns_from_the_examples_and_a_checkpoint_gives_its_tokenizer(instruct, tmp_path):
    folder = instruct(alpaca(60), '--tokenizer=bpe', '--vocab_size=300', '--val_fraction=0.2')
    instruction = folder.tokenizer.encode('### Instruction:\n')
    assert len(instruction) < 8 and '{' not in folder.tokenizer.decode(folder.tokens['train'])  # no JSON
    write_small_checkpoint(
        tmp_path / 'ckpt.pt', 'ar', folder.tokenizer, shape={'block_size': 64}, start_token=299
    )
    for path in (tmp_path / 'ckpt.pt', tmp_path):
        again = instruct(alpaca(60), f'--tokenizer={path}', '--overwrite')
        assert again.tokenizer.to_json() == folder.tokenizer.to_json()
        assert again.config['start_token'] == 299 and again.config['arguments']['max_seq_len'] == 64
    write_small_checkpoint(tmp_path / 'long.pt', 'ar', folder.tokenizer, shape={'block_size': 2048})
    again = instruct(alpaca(60), f'--tokenizer={tmp_path}/long.pt', '--overwrite')
    assert again.config['arguments']['max_seq_len'] == 1024  # so that there are steps


@pytest.mark.faults
@pytest.mark.parametrize('says', ['tokenizer.json', 'tokenizer_config.json'])
def test_examples_begin_as_the_model_was_pretrained_whichever_way_it_is_given(says, instruct, tmp_path):
    hf_model('llama', tmp_path / 'model', vocab_size=300, max_position_embeddings=48)
    write_llama_tokenizer(tmp_path / 'model', says)
    checkpoints.save(tmp_path / 'ckpt.pt', checkpoints.load(tmp_path / 'model'))
    for path in (tmp_path / 'model', tmp_path / 'ckpt.pt'):
        folder = instruct(alpaca(60), f'--tokenizer={path}', '--overwrite')
        assert folder.config['start_token'] == 256 and folder.config['arguments']['max_seq_len'] == 48
        rows = data.ExampleRows(folder, 'train', 48, False, packed=False)
        assert [rows.read(row)[0][0] for row in range(3)] == [256] * 3


def test_the_hub_is_asked_for_a_data_set_by_name(instruct, monkeypatch):
    asked = []
    info = type('Info', (), {'sha': 'abc', 'siblings': None})
    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', lambda api, name: asked.append(name) or info)
    monkeypatch.setattr(
        datasets, 'load_dataset', lambda *_, **__: datasets.Dataset.from_list(alpaca()).to_iterable_dataset()
    )
    dolly = 'databricks/databricks-dolly-15k'
    for source, repository in (('dolly', dolly), ('some/data', 'some/data'), ('some/data:part', 'some/data')):
        folder = instruct(None, f'--source={source}', '--overwrite')
        part = '/part' * source.endswith(':part')
        assert asked[-1] == repository and folder.config['inputs'] == {repository + part: 'abc'}
        assert len(examples_of(folder)) == 20
    with pytest.raises(UserError, match='hub was some/data:part and is some/data:rest'):
        instruct(None, '--source=some/data:rest')


@pytest.mark.faults
def test_conversations_that_a_chat_template_refuses_are_named_or_left_out_and_counted(instruct, tmp_path):
    hf_model('llama', tmp_path / 'model', vocab_size=300, max_position_embeddings=480)
    write_llama_tokenizer(tmp_path / 'model')
    said = (
        "{% for one in messages %}{% if one.role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    )
    (tmp_path / 'model/chat_template.jinja').write_text(
        said
        + '{{ one.role }}={{ one.content }};{% endfor %}{% if add_generation_prompt %}assistant={% endif %}'
    )
    roles = ('user', 'assistant')
    told = [[{'role': role, 'content': f'{role} {i}'} for role in roles] for i in range(40)]
    records = [
        {'messages': [{'role': 'system', 'content': 'Be kind.'}] * (i == 9) + one}
        for i, one in enumerate(told)
    ]
    words = [f'--tokenizer={tmp_path}/model']
    with pytest.raises(UserError, match='refuses this conversation .No system.*Be kind.*--on_error=skip'):
        instruct(records, *words)
    folder = instruct(records, *words, '--on_error=skip')
    assert folder.config['examples']['refused'] == 1 and folder.config['examples']['whole'] == 39


# ---------------------------------------------------------------------------- bad input

BAD_RECORDS = {
    'no answer': ([{'instruction': 'Add.'}], "record 1: the fields 'instruction' are of no known example"),
    'no record': (['Add.'], 'record 1: a str .Add.. instead of a record'),
    'no text': ([{'instruction': 'Add.', 'output': 5}], "field 'output' holds a int .5., not text"),
    'null': ([{'prompt': 'Add.', 'completion': None}], "field 'completion' holds null, not text"),
    'a list': ([{'messages': 'hi'}], 'record 1, messages: a str .hi. instead of a list'),
    'no role': ([{'messages': [{'content': 'x'}]}], "message 1: there is no field 'role'"),
    'a strange role': (
        [{'messages': [{'role': 'tool', 'content': 'x'}]}],
        "message 1: the role 'tool' is not known",
    ),
    'a long role': ([{'messages': [{'role': 'x' * 5000, 'content': 'x'}]}], "the role 'x{39} is not known"),
    'nobody answers': ([{'messages': [{'role': 'user', 'content': 'x'}]}], 'messages: nobody answers'),
    'all empty': ([{'instruction': 'Add.', 'output': ''}] * 3, "train split is empty at .*'empty': 3"),
    'all too long': (
        [{'instruction': 'Add.', 'output': 'x' * 2000}],
        "train split is empty at .*'too long': 1",
    ),
    'nothing': ([], 'There is no text in'),
}


@pytest.mark.parametrize('case', BAD_RECORDS)
def test_bad_records_are_refused_with_their_place(instruct, tmp_path, case):
    records, expected = BAD_RECORDS[case]
    with pytest.raises(UserError, match=expected) as error:
        instruct(records)
    assert '\n' not in str(error.value) and len(str(error.value)) < 1000 and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'arguments, expected',
    [
        (['--prompt_format=vicuna'], "prompt_format is 'vicuna'; choose default or alpaca"),
        (['--max_seq_len=2'], 'max_seq_len is 2; it must be at least 8'),
        (['--max_seq_len=0'], 'max_seq_len is 0; it must be at least 8'),
        (['--source=stories', '--field=text'], 'field and val_fraction has no effect on stories'),
        (['--source='], 'There is nothing to read: give --source'),
        (['--source=nowhere.json'], 'No file matches nowhere.json'),
        (['--tokenizer=nowhere'], 'tokenizer=nowhere is none of'),
        (['--field=body'], "there is no field 'body'"),
    ],
)
def test_bad_settings_are_refused(instruct, arguments, expected):
    with pytest.raises(UserError, match=expected):
        instruct(alpaca(), *arguments)
