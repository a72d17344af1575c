"""Configuration: the defaults at the top of a script, then config files and --key=value over them.

    batch_size = 12            # rows per micro-step and rank
    resume_from: str = None    # where the default is None, the annotation says the type
    config = configure(globals())

    $ python train.py config/shakespeare_char.py --batch_size=8 --compile

Arguments apply from left to right. A config file is plain Python that sees the values so far, so it may say
`max_steps = 2 * max_steps`, and include('base.py') runs a file beside it first.
"""

import ast
import builtins
import difflib
import json
import math
import os
import re
import sys
import traceback
import types
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = ('.py', '.json', '.yaml', '.yml')  # of config files
TYPES = {kind.__name__: kind for kind in (bool, int, float, str, tuple, list, dict)}


class UserError(ValueError):
    """A mistake of the user's in one sentence: what was wrong, the offending value, the remedy."""


def require(condition, message):
    """Raise a UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def user_errors():
    """Turn ValueErrors, by which model.py and sampling.py refuse settings, into UserErrors."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def printable(text):
    """Return a text with its control characters spelled out: what data or models say must not steer a terminal."""
    control = r'[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]|\r(?!\n)'
    return re.sub(control, lambda match: repr(match[0])[1:-1], text)


def print_without_traceback(kind, error, trace, previous=sys.excepthook):
    if issubclass(kind, UserError):
        print(f'error: {printable(str(error))}', file=sys.stderr)  # Python then exits with status 1
    elif issubclass(kind, KeyboardInterrupt):
        print('\nstopped by Ctrl-C', file=sys.stderr, flush=True)
        os._exit(130)
    elif not (issubclass(kind, BrokenPipeError) and output_is_cut()):
        previous(kind, error, trace)


def output_is_cut():
    """Say whether the reader of this process's output has ended, as in `| head`."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it exits
        return True
    return False


sys.excepthook = print_without_traceback
if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(errors='backslashreplace')  # where it is not UTF-8


# ---------------------------------------------------------------------------- aliases


DTYPES = {'bf16': 'bfloat16', 'fp16': 'float16', 'fp32': 'float32'}
DTYPES |= {dtype: dtype for dtype in ('bfloat16', 'float16', 'float32', 'auto')}
PUBLISHED_NAMES = {  # key: names that published scripts use
    'learning_rate': 'lr',
    'min_lr': 'eta_min',
    'num_epochs': 'epochs n_epochs num_train_epochs',
    'batch_size': 'per_device_train_batch_size',
    'max_steps': 'max_iters',
    'gradient_accumulation_steps': 'grad_accum_steps',
    'dataset': 'data_dir dataset_name',
    'field': 'dataset_text_field',
    'block_size': 'context_length seq_length max_seq_length',
    'model_size': 'model_config',
    'init_from': 'pretrained_checkpoint base_model model_name',
    'out_dir': 'results_path output_dir',
    'eval_every': 'eval_interval eval_steps',
    'log_every': 'log_interval logging_steps',
    'save_every': 'save_steps save_every_n_steps',
    'wandb_run_name': 'experiment_name',
    'seed': 'random_seed',
    'checkpoint_prefix': 'checkpoints_prefix',
}
# Alias, key, how the value converts: None: not at all; a dict: looked up; a number: so many times it, since no
# evaluation depends on a batch size; a list: what it may say, because it is so anyway. A row counts in a script
# that has the key and not the alias.
ALIASES = [
    *((alias, key, None) for key, names in PUBLISHED_NAMES.items() for alias in names.split()),
    ('precision', 'dtype', DTYPES),
    ('bf16', 'dtype', {True: 'bfloat16', False: 'float32'}),
    ('wandb', 'no_wandb', {True: False, False: True}),
    *((f'eval_{x}', key, 32 * 256) for x in ('batches', 'iters') for key in ('eval_tokens', 'max_tokens')),
    *((f'eval_{x}', 'eval_examples', 256) for x in ('batches', 'iters')),
    ('eval_tokens', 'max_tokens', None),  # of evaluate.py
    ('cpu_only', 'device', {True: 'cpu', False: 'auto'}),
    ('training_method', 'use_peft', {'full': False, 'lora': True}),
    ('gradient_checkpointing_kwargs', 'gradient_checkpointing', [{}, {'use_reentrant': False}]),
    ('trust_remote_code', 'revision', [False]),
]
REFUSED = dict(trust_remote_code="no model's code is ever run")
REFUSED |= dict(gradient_checkpointing_kwargs='it gives no gradient to a block over frozen embeddings')
ELSEWHERE = dict(use_auth_token='HF_TOKEN or `hf auth login`', num_processes='torchrun --nproc_per_node')
ELSEWHERE |= dict.fromkeys(['push_to_hub', 'hub_model_id'], '`hf upload`')
ELSEWHERE |= dict(hf_cache='HF_HOME', wandb_entity='WANDB_ENTITY', tokenizers_prefix='--tokenizer')
ELSEWHERE |= dict(checkpoints_training='--out_dir', checkpoints_is_medium='the checkpoint')  # published names
COMPETING = dict(max_steps='num_epochs', num_epochs='max_steps')  # the later wins, unless it is 0 or -1
COMPETING |= dict(warmup_steps='warmup_ratio', warmup_ratio='warmup_steps')
BOOLS = {'true': True, 'True': True, 'yes': True, 'false': False, 'False': False, 'no': False, 'None': None}
TEXTS = ('prompt', 'infill', 'input', 'system')  # which may be empty, and ~ in them is a character
LISTS = 'train_langs eval_langs checkpoint metrics peft_targets'.split()  # also words without commas


# ---------------------------------------------------------------------------- what a script calls


class Key(NamedTuple):
    default: object
    type: type  # of its values; None is one too where it is the default
    comment: str = ''
    section: str = ''  # the title of the last `# --- title ---` above it


class Config(dict):
    """The resolved settings in the order of the source; `dict(config)` is plain data to save."""

    def __init__(self, keys):
        super().__init__((name, key.default) for name, key in keys.items())
        self.known = keys  # name -> Key
        # What may be set, aliases too: name -> (key that it sets, Key to check the value by, how that converts).
        self.settable = {name: (name, key, None) for name, key in keys.items()}
        for alias, name, how in ALIASES:
            if name in keys and alias not in keys:
                key = keys[name]
                if how:
                    kind = int if isinstance(how, int) else type(next(iter(how)))
                    key = Key(kind(), kind)
                self.settable[alias] = name, key, how
        self.given = set()  # names that a file or the command line set, even if to the default
        self.displaced = set()  # names of settings that compete with those, and lost


def configure(namespace, argv=None):
    """Apply `argv` (default: the command line) to `namespace`, the globals() of a script; return the Config of the
    names of simple types that it assigns above this call. After a UserError the namespace is as it was."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = Config(keys_of(Path(namespace['__file__']).read_text(encoding='utf-8-sig'), namespace))
    if '--help' in words or '-h' in words:
        print_help(namespace, config.known)
        sys.exit(0)
    while words:
        word = words.pop(0)
        if word.startswith('--'):
            apply_option(config, word[2:], words)
        else:
            apply_file(config, word)
    namespace.update(config)
    config.pop('token', None)  # a secret is recorded nowhere, not even with the command line, as by W&B
    if argv is None:
        pairs = zip(['', *sys.argv], sys.argv)
        sys.argv[:] = [word for before, word in pairs if '--token' not in (before, word.partition('=')[0])]
    return config


def configs_of(path, runs):
    """Return the Config that a script would make of each of `runs`, lists of words, by its source alone; none for a
    script of another kind. Raises UserError for the first that it would refuse."""
    source, defaults = Path(path).read_text(encoding='utf-8'), {'__file__': path}
    for node in ast.parse(source).body:
        with suppress(ValueError, AttributeError):  # no assignment, or none of a literal: no setting
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            defaults[ast.unparse(target)] = ast.literal_eval(node.value)
    return [configure(dict(defaults), words) for words in (runs if 'configure(' in source else ())]


def note(text):
    if os.environ.get('RANK', '0') == '0':
        print(f'note: {text}')


def report_idle(config, where, names):
    """Report those of `names`, in one text, that were given, because they have no effect `where`."""
    for name in config.given.intersection(names.split()):
        note(f'{name}={config[name]!r} has no effect {where}.')


def restore(namespace, config, saved):
    """Set each key that was not given to its value in `saved`, the config of an earlier run; return [(key, saved
    value, given value)] where something else was given, which stands, for the caller to report or refuse."""
    differing = []
    for name in [name for name in config if name in saved and name not in config.displaced]:
        value = check_type(config.known[name], saved[name], f'{name}={saved[name]!r} in the checkpoint')
        if name not in config.given:
            namespace[name] = config[name] = value
        elif config[name] != value:
            differing.append((name, value, config[name]))
    return differing


def check_choice(config, key, choices):
    require(config[key] in choices, f'{key} is {config[key]!r}; choose {" or ".join(choices)}.')


def check_range(config, low, high, *keys):
    """Raise a UserError unless each of `keys` is not there, None, or at least `low` and below `high`."""
    limit = '' if high == math.inf else f' and below {high}'
    for key in keys:
        value = config.get(key)
        require(value is None or low <= value < high, f'{key} is {value}; it must be at least {low}{limit}.')


# ---------------------------------------------------------------------------- files and options


def apply_file(config, word):
    """Run a config file over the values so far; JSON and YAML are read instead."""
    require(word.endswith(SUFFIXES), f"'{word}' is neither a config file nor --key=value; write one.")
    path = find('config file', word)
    if path.suffix == '.py':
        for name, value in run_file(path, word, config).items():
            assign(config, name, value, f'{name}={value!r} in {word}')
    else:
        apply_values(config, read_values(path, word), word)


def apply_values(config, values, word, section=''):
    """Set the keys of a JSON or YAML file, also of its sections, {'wandb': {'project': ...}}; null sets nothing."""
    for name, value in values.items():
        name, source = str(name).replace('-', '_'), f'{name}={value!r} in {word}'
        if name.startswith('_') or value is None:  # the file's own business, or as it was
            continue
        name = name if name in config.settable or not section else f'{section}_{name}'
        takes_dict = name in config.settable and config.settable[name][1].type is dict
        if name in ELSEWHERE:
            note(f'{source} has no effect here; {ELSEWHERE[name]} is for that.')
        elif isinstance(value, dict) and not takes_dict:
            apply_values(config, value, word, name)
        else:
            key = resolve(config, name, source)[1]
            assign(config, name, parse(value, key) if isinstance(value, str) else value, source)


class Assigned(dict):
    """The globals of a config file, in the order of their last assignments: of settings that compete the later wins."""

    def __setitem__(self, name, value):
        self.pop(name, None)
        super().__setitem__(name, value)


def run_file(path, word, config):
    """Return what a Python file assigns, but for names that start with _, modules and functions. The values
    so far are its builtins, so that it can read them and its globals hold only what it assigned."""
    assigned, folders = Assigned(__file__=str(path)), [path.parent]

    def include(name):
        """Run a file that stands beside the one that says so, as if its lines stood there."""
        included = folders[-1] / name
        folders.append(included.parent)
        try:
            exec(compile(included.read_bytes(), str(included), 'exec'), assigned)
        finally:
            folders.pop()

    assigned['__builtins__'] = {**vars(builtins), **config, 'include': include}
    try:
        include(path.name)
    except Exception as error:  # whatever the user's code raises is the user's to hear
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = frames[-1].lineno if frames else getattr(error, 'lineno', 1)  # no frame: a syntax error
        message = f'{type(error).__name__}: {getattr(error, "msg", error)}'
        raise UserError(f'{word}, line {line}: {message}; correct the file.') from error
    is_helper = lambda name, x: name not in config and (callable(x) or isinstance(x, types.ModuleType))
    return {name: x for name, x in assigned.items() if not (name.startswith('_') or is_helper(name, x))}


def read_values(path, word):
    """Read the {key: value} of a JSON (with // comments) or YAML file."""
    try:
        text = path.read_text(encoding='utf-8')
        if path.suffix == '.json':  # without what follows // outside of strings
            values = json.loads(re.sub(r'("(?:\\.|[^"\\])*")|//[^\n]*', lambda match: match[1] or '', text))
        else:
            values = yaml.load(text, CoreLoader)
    except (ValueError, yaml.YAMLError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(f'{word} cannot be read ({reason}); correct the file.') from error
    kind = type(values).__name__
    require(isinstance(values, dict), f'{word} holds a {kind}, not keys and values; correct the file.')
    return values


SCALARS = dict(bool='true|True|false|False', null='~|null|', int='[-+]?(0|[1-9][0-9]*)')
SCALARS['float'] = r'[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?'


class CoreLoader(yaml.SafeLoader):  # of YAML 1.2, where 1e-5 is a number, and no and 04:00:00 are texts
    scalars = [(f'tag:yaml.org,2002:{kind}', re.compile(f'({form})$')) for kind, form in SCALARS.items()]
    yaml_implicit_resolvers = {None: scalars}


def find(kind, name):
    """Return the path of a file, relative to the working directory or else to the repository."""
    paths = [folder / os.path.expanduser(name) for folder in (Path.cwd(), ROOT)]
    found = next(filter(Path.is_file, paths), None)
    require(found, f'There is no {kind} {str(name)!r} in {Path.cwd()} or {ROOT}; correct the path.')
    return found


def apply_option(config, option, words):
    """Set `key=value`, or `key` with its value in the `words` that follow, or a bare flag."""
    name, equals, text = option.partition('=')
    name = name.replace('-', '_')
    target, key, _ = resolve(config, name, f'--{option}')
    if not equals and key.type is bool:
        text = words.pop(0) if words and words[0] in BOOLS else 'True'
    elif not equals:
        follows = words and not words[0].startswith('--')
        require(follows, f'--{name} is missing its value; write --{name}=VALUE ({key.type.__name__}).')
        text = words.pop(0)
        while target in LISTS and words and not words[0].startswith('--') and not words[0].endswith(SUFFIXES):
            text += ',' + words.pop(0)
    is_said = text or key.type is not str or target in TEXTS or target in config.given  # which it takes back
    require(is_said, f'--{name}= is empty; give a value, or leave it out.')
    assign(config, name, parse(text, key), f'--{name}={text}')


def parse(text, key):
    """Return the Python value of a word on the command line."""
    if key.type is str:
        return None if key.default is None and text == 'None' else text
    if key.type is bool and text in BOOLS:
        return BOOLS[text]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text  # a str, which is the wrong type: check_type says so


def assign(config, name, value, source):
    """Set a key by its name or an alias; `source` says in an error what was set to what, and where."""
    target, key, conversion = resolve(config, name, source)
    value = check_type(key, value.tolist() if hasattr(value, 'tolist') else value, source)  # of numpy
    if isinstance(conversion, list):
        require(value in conversion, f'{source} is refused: {REFUSED[name]}; leave this setting out.')
        return
    if isinstance(conversion, int):
        value *= conversion
        note(f'{source} is taken as --{target}={value}, for any batch size.')
    elif conversion:
        choices = ', '.join(map(str, conversion))
        require(value in conversion, f'{source} is not understood; choose from {choices}.')
        value = conversion[value]
    if isinstance(value, str) and target not in TEXTS:
        value = re.sub(r'(^|, *)~(?=/|$)', lambda match: match[1] + os.path.expanduser('~'), value)
    config[target] = value
    config.given.add(target)
    config.displaced.discard(target)
    rival = COMPETING.get(target)
    if rival in config and value is not None and (value > 0 or target.startswith('warmup')):
        config[rival] = None if config.known[rival].default is None else config.known[rival].type(0)
        config.given.discard(rival)
        config.displaced.add(rival)


def resolve(config, name, source):
    """Return the name of the key to set, a Key to check the value by, and its conversion."""
    if name not in config.settable:
        nearest = ''.join(difflib.get_close_matches(name, config.settable, n=1, cutoff=0))
        remedy = '--help lists them all' if source.startswith('--') else 'names of your own start with _'
        raise UserError(f"Unknown key '{name}' ({source}); the nearest is '{nearest}'; {remedy}.")
    return config.settable[name]


def check_type(key, value, source):
    """Return `value` as the type of `key`, or raise a UserError that starts with `source`."""
    if type(value) is key.type or value is None and key.default is None:
        return value
    if key.type is float and type(value) is int:
        return float(value)
    if key.type is tuple and type(value) in (int, float):
        return (value,)
    if {type(value), key.type} == {tuple, list}:  # JSON knows only lists
        return key.type(value)
    example = ' or None' if key.default is None else f', such as {key.default!r}'
    raise UserError(f'{source} gives {type(value).__name__} where {key.type.__name__} is wanted{example}.')


# ---------------------------------------------------------------------------- the script's own source

SECTION = re.compile(r'# ?-{2,} *(.*?)[ -]*')  # `# --- title ---`, where the title may be missing


def keys_of(source, namespace):
    """Return {name: Key} of the assignments at the top level of a script, down to its call of configure()."""
    keys, lines = {}, source.split('\n')
    titles = [(i, rule[1]) for i, line in enumerate(lines, 1) if (rule := SECTION.fullmatch(line))]
    for node in ast.parse(source).body:
        value = getattr(node, 'value', None)
        if isinstance(value, ast.Call) and ast.unparse(value.func).split('.')[-1] == 'configure':
            break
        section = next((title for i, title in reversed(titles) if i < node.lineno), '')
        targets = getattr(node, 'targets', [getattr(node, 'target', None)])
        names = [target.id for target in targets if isinstance(target, ast.Name) and target.id[0] != '_']
        end = value or node  # ruff puts a value into brackets, with its comment, where the line is long
        rest = lines[end.end_lineno - 1].encode()[end.end_col_offset :].decode()  # ast counts bytes
        comment = rest.partition('#')[2].strip()
        annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ''
        declared = TYPES.get(annotation.removesuffix(' | None'))
        for name in names:
            default = namespace.get(name, NotImplemented)  # an instance of no type that a key may have
            example = f'annotate its type, as in `{name}: str = None` ({", ".join(TYPES)})'
            require(declared or default is not None, f'The default of {name} is None; {example}.')
            if default is None or type(default) in TYPES.values():
                keys[name] = Key(default, declared or type(default), comment, section)
    return keys


def print_help(namespace, keys):
    """Print the first paragraph of the script's docstring, then a line for each key: default and comment."""
    print(f'usage: python {Path(namespace["__file__"]).name} [config/NAME.py ...] [--key=value ...]\n')
    print((namespace.get('__doc__') or '').strip().split('\n\n')[0])
    settings = [f'--{name}={key.default!r}' for name, key in keys.items()]
    width = min(48, max(map(len, settings), default=0))  # one long default does not push all comments away
    section = None
    for setting, key in zip(settings, keys.values()):
        if key.section != section:
            section = key.section
            print('\n' + section if section else '')
        print(f'  {setting:<{width}}  {key.comment}'.rstrip())
