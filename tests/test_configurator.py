"""Configuration, on a script of a few lines."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from lm import configurator
from lm.configurator import UserError, restore

SCRIPT = '''"""Train a small
model.

What the first paragraph does not say."""
import math
from lm.configurator import UserError, configure
from math import pi

# ------------------------------------------------ data
dataset = 'shakespeare_char'   # a name under data/, or a path
prompt = ''                    # é: what the text starts with
batch_size = 12                # rows in C#
k_schedule = (1, 2,
              4)  # how many candidates
stop_words = []
window = (
    'all'  # as a formatter (ruff) wraps it
)

# ------------------------------------------------ model and run
block_size = 256               # tokens
model_size = 'small'           # a preset
max_steps = 5000               # optimizer steps
num_epochs = 0                 # 0 = max_steps decides
learning_rate = 1e-3           # peak
min_lr = 1e-4                  # floor
gradient_accumulation_steps = 1   # micro-steps per rank
gradient_checkpointing = False    # recompute blocks
compile = False                # torch.compile
dtype = 'auto'                 # bfloat16, float16, float32 or auto
out_dir = ''                   # the run folder
init_from: str = None          # weights to start from
top_k: int = None              # cut-off
temperature: float | None = None  # of sampling
options = {}                   # of the optimizer
eval_every = 100               # steps
eval_tokens = 20               # tokens
log_every = 10                 # steps
save_every = 0                 # steps
no_wandb = False               # nothing to W&B
wandb_run_name = ''            # default: the run folder
_private = 1
helper = math.sqrt
def function(): pass
config = configure(globals())
later = 1
'''


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script in this process with the given words; returns its variables."""
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT, encoding='utf-8')
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, 'argv', [str(path), *words])
        return runpy.run_path(str(path), run_name='__main__')

    return run


def fails(run, *words):
    with pytest.raises(UserError) as caught:
        run(*words)
    return str(caught.value)


def write(name, text):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return str(name)


# ---------------------------------------------------------------------------- keys


def test_the_defaults_stand_where_nothing_is_given(run):
    variables = run()
    assert variables['batch_size'] == 12 and variables['config'] == {
        key: variables[key] for key in variables['config']
    }
    assert variables['config'].given == set()


def test_keys_are_the_public_simple_variables_above_the_call_in_the_order_of_the_source(run):
    names = list(run()['config'])
    assert names[:4] == ['dataset', 'prompt', 'batch_size', 'k_schedule'] and names[-1] == 'wandb_run_name'
    assert not {'math', 'pi', 'configure', '_private', 'helper', 'function', 'later'} & set(names)


def test_config_is_plain_data(run):
    assert json.loads(json.dumps(dict(run()['config'])))['batch_size'] == 12


def test_a_default_of_none_needs_an_annotation(tmp_path):
    path = write(
        tmp_path / 's.py', 'from lm.configurator import configure\nx = None\nconfigure(globals(), [])'
    )
    with pytest.raises(UserError, match='default of x is None.*annotate'):
        runpy.run_path(path)


# ---------------------------------------------------------------------------- command line


def test_options_set_variables_and_config_alike(run):
    variables = run('--batch_size=8')
    assert variables['batch_size'] == variables['config']['batch_size'] == 8
    assert variables['config'].given == {'batch_size'}


def test_arguments_apply_in_order_and_the_last_wins(run):
    write('a.py', 'batch_size = 1; max_steps = 1')
    write('b.py', 'batch_size = 2')
    variables = run('--batch_size=3', '--max_steps=3', 'a.py', 'b.py', '--max_steps=4')
    assert (variables['batch_size'], variables['max_steps']) == (2, 4)


@pytest.mark.parametrize('words', ['--batch_size=8', '--batch-size=8', '--batch_size 8', '--batch-size 8'])
def test_spellings_of_an_option_mean_the_same(run, words):
    assert run(*words.split())['batch_size'] == 8


def test_a_value_may_be_negative_or_hold_spaces(run):
    variables = run('--prompt', 'x y', '--batch_size', '-1')
    assert (variables['prompt'], variables['batch_size']) == ('x y', -1)


@pytest.mark.parametrize('text', ['a=b', '1', 'None', "'quoted'", '--x', ''])
def test_a_string_key_takes_its_text_verbatim(run, text):
    assert run(f'--prompt={text}')['prompt'] == text


@pytest.mark.parametrize(
    'words, value',
    [
        (['--compile'], True),
        (['--compile', '--no_wandb'], True),
        (['--compile', 'a.py'], True),
        (['--compile=True'], True),
        (['--compile', 'true'], True),
        (['--compile', 'False'], False),
        (['--compile', '--compile=false'], False),
        (['--compile', 'no'], False),
    ],
)
def test_booleans_are_bare_flags_or_literals(run, words, value):
    write('a.py', '')
    assert run(*words)['compile'] is value


def test_an_int_is_accepted_where_a_float_is_meant(run):
    value = run('--learning_rate=1')['learning_rate']
    assert value == 1.0 and type(value) is float


def test_lists_tuples_and_dicts_are_literals(run):
    assert run('--k_schedule=(1,2,4,8)')['k_schedule'] == (1, 2, 4, 8)
    assert run('--k_schedule=[1,2]')['k_schedule'] == (1, 2)
    assert run("--stop_words='a','b'")['stop_words'] == ['a', 'b']
    assert run("--options={'eps': 1e-8}")['options'] == {'eps': 1e-8}


def test_the_annotation_is_the_type_where_the_default_is_none(run):
    variables = run('--init_from=1', '--top_k=5', '--temperature=1')
    assert (variables['init_from'], variables['top_k']) == ('1', 5)
    assert type(variables['temperature']) is float
    variables = run('--init_from=a', '--top_k=5', '--init_from=None', '--top_k=None')
    assert variables['init_from'] is None and variables['top_k'] is None
    assert fails(run, '--top_k=x') == '--top_k=x gives str where int is wanted or None.'


@pytest.mark.parametrize(
    'option, given, wanted',
    [
        ('--max_steps=1e3', 'float', 'int'),
        ('--max_steps=many', 'str', 'int'),
        ('--max_steps=', 'str', 'int'),
        ('--max_steps=True', 'bool', 'int'),
        ('--compile=1', 'int', 'bool'),
        ('--learning_rate=x', 'str', 'float'),
        ('--learning_rate=None', 'NoneType', 'float'),
        ('--options=[1]', 'list', 'dict'),
    ],
)
def test_a_wrong_type_names_key_value_and_wanted_type(run, option, given, wanted):
    assert f'{option} gives {given} where {wanted} is wanted, such as ' in fails(run, option)


def test_an_unknown_key_suggests_the_nearest(run):
    assert "Unknown key 'learning_rat' (--learning-rat=1); the nearest is 'learning_rate'" in fails(
        run, '--learning-rat=1'
    )
    assert '--help' in fails(run, '--zzz')
    assert 'Unknown key' in fails(run, '--_private=2') and 'Unknown key' in fails(run, '--later=2')


@pytest.mark.parametrize('words', [['--batch_size'], ['--prompt'], ['--prompt', '--compile']])
def test_a_missing_value_is_an_error_that_says_so(run, words):
    assert f'{words[0]} is missing its value' in fails(run, *words)


@pytest.mark.parametrize('word', ['shakespeare', 'batch_size=8', '-b'])
def test_a_stray_word_is_an_error_that_says_what_to_write(run, word):
    assert f"'{word}' is neither a config file" in fails(run, word) and '--key=value' in fails(run, word)


# ---------------------------------------------------------------------------- config files


def test_a_file_sees_the_values_so_far_also_in_its_functions(run):
    write('a.py', 'max_steps *= 2\ndef total(): return batch_size + max_steps\nbatch_size = total()')
    variables = run('--max_steps=10', 'a.py', 'a.py')
    assert variables['max_steps'] == 40 and variables['batch_size'] == 12 + 20 + 40


def test_what_a_file_assigns_is_given_even_if_it_is_the_default(run):
    write('a.py', 'batch_size = 12\nif max_steps == 0:\n    block_size = 1')
    assert run('a.py')['config'].given == {'batch_size'}


def test_a_file_is_found_in_the_working_directory_or_else_the_repository(run, tmp_path, monkeypatch):
    monkeypatch.setattr(configurator, 'ROOT', tmp_path / 'repository')
    write('repository/config/a.py', 'batch_size = 1')
    assert run('config/a.py')['batch_size'] == 1
    write('config/a.py', 'batch_size = 2')
    assert run('config/a.py')['batch_size'] == 2
    assert run(str(tmp_path / 'repository/config/a.py'))['batch_size'] == 1


def test_a_missing_file_is_an_error_that_says_where_it_was_sought(run, tmp_path):
    message = fails(run, 'config/none.py')
    assert "no config file 'config/none.py'" in message and str(tmp_path) in message


def test_modules_functions_and_underscored_names_are_the_files_own_business(run):
    write('a.py', 'import math\nfrom math import sqrt\ndef f(): pass\n_x = 3\nbatch_size = _x')
    assert run('a.py')['batch_size'] == 3


def test_an_unknown_name_in_a_file_is_an_error(run):
    write('a.py', 'batchsize = 3')
    message = fails(run, 'a.py')
    assert "Unknown key 'batchsize' (batchsize=3 in a.py); the nearest is 'batch_size'" in message
    assert 'start with _' in message


def test_a_wrong_type_in_a_file_names_the_file(run):
    write('a.py', "max_steps = '10'")
    assert fails(run, 'a.py') == "max_steps='10' in a.py gives str where int is wanted, such as 5000."
    write('a.py', 'def dataset(): pass')
    assert 'gives function where str is wanted' in fails(run, 'a.py')


def test_types_convert_in_a_file_as_on_the_command_line(run):
    write('a.py', 'learning_rate = 1; k_schedule = [1]; init_from = None')
    variables = run('a.py')
    assert variables['k_schedule'] == (1,) and type(variables['learning_rate']) is float


@pytest.mark.parametrize(
    'text, message',
    [
        ('batch_size = 1\nx = = 2', 'a.py, line 2: SyntaxError: invalid syntax'),
        ('\nmax_steps = 1 / 0', 'a.py, line 2: ZeroDivisionError: division by zero'),
        ('def f():\n    raise ValueError("no")\nf()', 'a.py, line 2: ValueError: no'),
        ('batch_size = nothing', "a.py, line 1: NameError: name 'nothing' is not defined"),
    ],
)
def test_a_broken_file_is_one_sentence_with_file_line_and_message(run, text, message):
    write('a.py', text)
    assert fails(run, 'a.py').startswith(message)


def test_nothing_changes_where_something_is_wrong(tmp_path):
    namespace = {'__file__': write(tmp_path / 's.py', 'a = 1\nconfigure(globals())'), 'a': 1}
    with pytest.raises(UserError):
        configurator.configure(namespace, ['--a=2', '--b=3'])
    assert namespace['a'] == 1


@pytest.mark.faults
def test_a_script_that_an_editor_saved_with_a_byte_order_mark_is_read(tmp_path):
    namespace = {'__file__': write(tmp_path / 's.py', '\ufeffa = 1\nconfigure(globals())'), 'a': 1}
    assert configurator.configure(namespace, ['--a=2'])['a'] == 2


def test_a_file_includes_another_that_stands_beside_it(run):
    write('config/base.py', 'max_steps = 10\nbatch_size = max_steps + 1\n_own = 2')
    write('config/a.py', "include('base.py')\nmax_steps = _own * max_steps")
    config = run('config/a.py')['config']
    assert (config['max_steps'], config['batch_size']) == (20, 11)
    assert config.given == {'max_steps', 'batch_size'}
    write('config/c.py', "num_epochs = 3\ninclude('a.py')")
    write('config/d.py', "include('c.py')\nnum_epochs = 7")  # of two that compete the later assignment counts
    assert run('config/c.py')['config'].given == {'max_steps', 'batch_size'}
    assert run('config/d.py')['config'].given == {'num_epochs', 'batch_size'}
    write('config/e.py', 'lr = 1.0\nlearning_rate = 2.0\nlr = 3.0')
    assert run('config/e.py')['learning_rate'] == 3
    write('mine/base.py', 'max_steps = 1')
    write('mine/f.py', "include('../config/a.py')\nbatch_size = 5")  # whose base.py is its neighbour
    config = run('mine/f.py')['config']
    assert (config['max_steps'], config['batch_size']) == (20, 5)
    write(
        'mine/g.py',
        "try:\n    include('none/none.py')\nexcept FileNotFoundError:\n    pass\ninclude('base.py')",
    )
    assert run('mine/g.py')['config']['max_steps'] == 1
    write('config/b.py', "include('none.py')")
    assert 'config/b.py, line 1: FileNotFoundError' in fails(run, 'config/b.py')


@pytest.mark.parametrize(
    'name, text',
    [
        (
            'a.json',
            '{"batch-size": 3, // rows\n "_note": 1, "prompt": "http://x", "top_k": null, "k_schedule": [1, 2]}',
        ),
        ('a.yaml', 'batch-size: 3  # rows\n_note: mine\nprompt: http://x\ntop_k: null\nk_schedule: [1, 2]\n'),
    ],
)
def test_json_and_yaml_are_read_as_python_files_are(run, name, text):
    write(name, text)
    config = run(name)['config']
    values = {key: config[key] for key in ('batch_size', 'prompt', 'top_k', 'k_schedule')}
    assert values == {'batch_size': 3, 'prompt': 'http://x', 'top_k': None, 'k_schedule': (1, 2)}
    assert config.given == set(values) - {'top_k'}
    write('rates.yaml', 'lr: 1e-5\nout_dir: null')  # YAML reads the first as a text
    config = run('rates.yaml')['config']
    assert (config['learning_rate'], config['out_dir']) == (1e-5, '')
    write('list.yaml', '- 1')
    assert fails(run, 'list.yaml') == 'list.yaml holds a list, not keys and values; correct the file.'
    write('cut.json', '{"batch_size": 3')
    assert fails(run, 'cut.json').startswith('cut.json cannot be read (Expecting')


@pytest.mark.faults
def test_yaml_texts_stay_texts_and_numpy_numbers_are_numbers(run):
    write(
        'a.yaml',
        'prompt: no\ncompile: yes\ndataset: 2024-01-01\nlearning_rate: 1e-5\nwandb_run_name: 04:00:00',
    )
    config = run('a.yaml')['config']
    assert [config[key] for key in ('prompt', 'compile', 'dataset', 'learning_rate', 'wandb_run_name')] == [
        'no', True, '2024-01-01', 1e-5, '04:00:00'
    ]  # fmt: skip
    write('b.py', 'import numpy as np\nbatch_size = np.int64(3)\nlearning_rate = np.float32(0.5)')
    variables = run('b.py')
    assert (variables['batch_size'], variables['learning_rate']) == (3, 0.5)
    assert type(variables['batch_size']) is int


@pytest.mark.faults
def test_paths_are_not_empty_and_know_the_home_folder(run, monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    variables = run('--init_from=~/a', '--dataset=~/b:1, ~/c:2', '--prompt=~/d')
    assert [variables[key] for key in ('init_from', 'dataset', 'prompt')] == [
        '/home/me/a', '/home/me/b:1, /home/me/c:2', '~/d'
    ]  # fmt: skip
    monkeypatch.setenv('HOME', str(Path.cwd()))
    write('own/exp.py', 'max_steps = 7')
    assert run('~/own/exp.py')['max_steps'] == 7
    for key in ('init_from', 'out_dir', 'dataset'):
        assert fails(run, f'--{key}=') == f'--{key}= is empty; give a value, or leave it out.'


# ---------------------------------------------------------------------------- aliases


@pytest.mark.parametrize(
    'options, key, value',
    [
        ('--lr=1', 'learning_rate', 1.0),
        ('--eta_min=0', 'min_lr', 0.0),
        ('--n_epochs=3 --num_train_epochs=3', 'num_epochs', 3),
        ('--precision=bf16 --bf16 --bf16=True', 'dtype', 'bfloat16'),
        ('--precision=fp16 --precision=float16', 'dtype', 'float16'),
        ('--precision=fp32 --bf16=False', 'dtype', 'float32'),
        ('--results_path=x --output_dir=x', 'out_dir', 'x'),
        ('--max_iters=3', 'max_steps', 3),
        ('--eval_interval=3 --eval_steps=3', 'eval_every', 3),
        ('--eval_iters=3 --eval_batches=3', 'eval_tokens', 3 * 8192),
        ('--logging_steps=3 --log_interval=3', 'log_every', 3),
        ('--save_steps=3 --save_every_n_steps=3', 'save_every', 3),
        ('--grad_accum_steps=3', 'gradient_accumulation_steps', 3),
        ('--data_dir=x', 'dataset', 'x'),
        ('--context_length=3 --seq_length=3 --max-seq-length=3', 'block_size', 3),
        ('--pretrained_checkpoint=x --base_model=x --model_name=x', 'init_from', 'x'),
        ('--model_config=x', 'model_size', 'x'),
        ('--experiment_name=x', 'wandb_run_name', 'x'),
        ('--wandb=False', 'no_wandb', True),
        ('--wandb --wandb=true', 'no_wandb', False),
    ],
)
def test_names_of_published_scripts_are_aliases(run, options, key, value):
    for option in options.split():
        config = run(option)['config']
        assert config[key] == value and type(config[key]) is type(value) and config.given == {key}


def test_aliases_work_in_files(run):
    write('a.py', "lr = 1\nwandb = False\nprecision = 'bf16'")
    variables = run('a.py')
    assert (variables['learning_rate'], variables['no_wandb'], variables['dtype']) == (1.0, True, 'bfloat16')


def test_an_alias_gives_way_to_a_key_of_its_name_and_needs_its_target(tmp_path):
    path = write(
        tmp_path / 'script.py',
        'from lm.configurator import configure\n'
        "out_dir = 'a'\noutput_dir = 'b'\nconfig = configure(globals(), WORDS)",
    )
    variables = runpy.run_path(path, {'WORDS': ['--output_dir=c']})
    assert (variables['out_dir'], variables['output_dir']) == ('a', 'c')
    with pytest.raises(UserError, match="Unknown key 'lr'"):
        runpy.run_path(path, {'WORDS': ['--lr=1']})


def test_an_alias_with_a_wrong_value_says_what_it_takes(run):
    assert 'choose from bf16, fp16, fp32' in fails(run, '--precision=int8')
    assert '--wandb=0 gives int where bool is wanted' in fails(run, '--wandb=0')


def test_reentrant_checkpointing_is_refused_with_the_reason(run):
    message = fails(run, "--gradient_checkpointing_kwargs={'use_reentrant': True}")
    assert 'gives no gradient' in message and 'leave this setting out' in message
    config = run("--gradient_checkpointing_kwargs={'use_reentrant': False}")['config']
    assert config['gradient_checkpointing'] is False and config.given == set()


# ---------------------------------------------------------------------------- help, resuming, processes


@pytest.mark.parametrize('words', [['--help'], ['broken.py', '-h']])
def test_help_prints_keys_defaults_and_comments_of_the_source(run, capsys, words):
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert 'Train a small\nmodel.' in text and 'does not say' not in text
    lines = text.splitlines()
    column = next(line.index('torch.compile') for line in lines if 'torch.compile' in line)
    for setting, comment in [
        ("--prompt=''", 'é: what the text starts with'),
        ('--batch_size=12', 'rows in C#'),
        ('--k_schedule=(1, 2, 4)', 'how many candidates'),
        ('--init_from=None', 'weights to start from'),
        ("--window='all'", 'as a formatter (ruff) wraps it'),
    ]:
        assert f'  {setting}'.ljust(column) + comment in lines
    assert '  --stop_words=[]' in lines and 'data' in lines and 'model and run' in lines
    assert '_private' not in text and 'later' not in text


def test_restore_takes_what_was_not_given_from_the_saved_run_and_lists_what_differs(run):
    variables = run('--batch_size=8', '--max_steps=7')
    config = variables['config']
    saved = {**config, 'batch_size': 4, 'min_lr': 0.5, 'k_schedule': [8], 'gone': 1}
    assert restore(variables, config, saved) == [('batch_size', 4, 8)]
    assert variables['batch_size'] == config['batch_size'] == 8
    assert variables['min_lr'] == config['min_lr'] == 0.5
    assert variables['k_schedule'] == config['k_schedule'] == (8,)
    assert 'gone' not in config and 'gone' not in variables
