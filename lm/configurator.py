"""Configuration: the defaults at the top of a script, then config files and --key=value over them.

    batch_size = 12            # rows per micro-step and rank
    resume_from: str = None    # where the default is None, the annotation says the type
    config = configure(globals())

    $ python train.py config/shakespeare_char.py --batch_size=8 --compile

Arguments apply from left to right. A config file is plain Python that sees the values so far, so it
may say `max_steps = 2 * max_steps`, and include('base.py') runs a file beside it first. The source of
the script is the only list of its keys.
"""

import ast
import builtins
import difflib
import json
import math
import os
import re
import sys
import tokenize
import traceback
import types
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
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


def require_without(setting, **others):
    """Raise a UserError if a setting is combined with one of the others that are true."""
    for name, given in others.items():
        require(not given, f'{setting} does not go with {name}; leave one of them out.')


def print_without_traceback(kind, error, trace, previous=sys.excepthook):
    if issubclass(kind, UserError):
        print(f'error: {error}', file=sys.stderr)  # Python then exits with status 1
    elif not (issubclass(kind, BrokenPipeError) and output_is_cut()):
        previous(kind, error, trace)


def output_is_cut():
    """Whether what read this process's output has ended, as in `| head`."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it exits
        return True
    return False


sys.excepthook = print_without_traceback


# ---------------------------------------------------------------------------- aliases


def only_without_reentrant(options: dict):
    """Accepts the wish for what `gradient_checkpointing` does anyway, and no other."""
    if options not in ({}, {'use_reentrant': False}):
        raise UserError(
            f'gradient_checkpointing_kwargs={options} is refused: blocks are always recomputed '
            'with use_reentrant=False, because reentrant checkpointing gives no gradient to a '
            'block whose input needs none, as over frozen embeddings; leave this setting out.'
        )


def no_remote_code(trust: bool):
    """Accepts that no code of a model's own is run."""
    if trust:
        raise UserError(
            'trust_remote_code=True is refused: pretrained weights run through model.py, which never loads '
            'code that comes with them; leave this setting out, and choose a family that hf.py lists.'
        )


PRECISIONS = {'bf16': 'bfloat16', 'fp16': 'float16', 'fp32': 'float32'}
PRECISIONS.update({dtype: dtype for dtype in ('bfloat16', 'float16', 'float32', 'auto')})

# Names that published scripts use: alias, key, how the value converts (None: it stays as it is, a dict:
# looked up, a function: checked only). A row counts in a script that has the key and not the alias.
ALIASES = [
    ('lr', 'learning_rate', None),
    ('eta_min', 'min_lr', None),
    ('n_epochs', 'num_epochs', None),
    ('num_train_epochs', 'num_epochs', None),
    ('max_iters', 'max_steps', None),
    ('grad_accum_steps', 'gradient_accumulation_steps', None),
    ('gradient_checkpointing_kwargs', 'gradient_checkpointing', only_without_reentrant),
    ('trust_remote_code', 'revision', no_remote_code),
    ('precision', 'dtype', PRECISIONS),
    ('bf16', 'dtype', {True: 'bfloat16', False: 'float32'}),
    ('data_dir', 'dataset', None),
    ('context_length', 'block_size', None),
    ('seq_length', 'block_size', None),
    ('max_seq_length', 'block_size', None),
    ('model_config', 'model_size', None),
    ('pretrained_checkpoint', 'init_from', None),
    ('base_model', 'init_from', None),
    ('model_name', 'init_from', None),
    ('results_path', 'out_dir', None),
    ('output_dir', 'out_dir', None),
    ('eval_interval', 'eval_every', None),
    ('eval_steps', 'eval_every', None),
    ('eval_iters', 'eval_batches', None),
    ('log_interval', 'log_every', None),
    ('logging_steps', 'log_every', None),
    ('save_steps', 'save_every', None),
    ('save_every_n_steps', 'save_every', None),
    ('experiment_name', 'wandb_run_name', None),
    ('wandb', 'no_wandb', {True: False, False: True}),
]


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
        self.given = set()  # names that a file or the command line set, even if to the default


def configure(namespace, argv=None):
    """Applies `argv` (default: the command line) to `namespace`, the globals() of a script.

    The keys are the public names of simple types that the script assigns above this call.
    Returns the Config, to which `namespace` is updated; raises UserError before touching it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with tokenize.open(namespace['__file__']) as file:  # in the encoding that Python reads it in
        source = file.read()
    config = Config(keys_of(source, namespace))
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
    return config


def restore(namespace, config, saved):
    """Sets each key that the user did not give to its value in `saved`, the config of an earlier run.

    Returns [(key, saved value, given value)] where the user gave something else: that value stands,
    and it is for the caller to report or refuse it. Names that only one side has are left alone.
    """
    differing = []
    for name in [name for name in config if name in saved]:
        value = checked(config.known[name], saved[name], f'{name}={saved[name]!r} in the checkpoint')
        if name not in config.given:
            namespace[name] = config[name] = value
        elif config[name] != value:
            differing.append((name, value, config[name]))
    return differing


def check_choice(config, key, choices):
    if config[key] not in choices:
        raise UserError(f'{key} is {config[key]!r}; choose {" or ".join(choices)}.')


def check_range(config, low, high, *keys):
    """A UserError unless each of `keys` is None or at least `low` and below `high`."""
    for key in keys:
        if config[key] is not None and not low <= config[key] < high:
            limit = '' if high == math.inf else f' and below {high}'
            raise UserError(f'{key} is {config[key]}; it must be at least {low}{limit}.')


# ---------------------------------------------------------------------------- files and options


def apply_file(config, word):
    """Runs a config file over the values so far; what it assigns is given. JSON and YAML are read instead."""
    path = find_config(word)
    if path.suffix != '.py':
        for name, value in read_values(path, word).items():
            name = str(name).replace('-', '_')
            key = resolve(config.known, name, f'{name}={value!r} in {word}')[1]
            value = parsed(value, key) if isinstance(value, str) else value  # YAML reads 1e-5 as a text
            assign(config, name, value, f'{name}={value!r} in {word}')
        return
    # The values are the file's builtins, so that it can read them, and its globals end up holding
    # what it assigned and nothing else.
    assigned = {'__file__': str(path), '__builtins__': {**vars(builtins), **config}}

    def include(name):
        """Run a file that stands beside this one, as if its lines stood here."""
        included = path.parent / name
        exec(compile(included.read_bytes(), str(included), 'exec'), assigned)

    assigned['__builtins__']['include'] = include
    try:
        exec(compile(path.read_bytes(), str(path), 'exec'), assigned)
    except Exception as error:  # whatever the user's code raises is the user's to hear
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = frames[-1].lineno if frames else getattr(error, 'lineno', 1)  # no frame: a syntax error
        message = f'{type(error).__name__}: {getattr(error, "msg", error)}'
        raise UserError(f'{word}, line {line}: {message}; correct the file.') from error
    for name, value in assigned.items():
        is_helper = isinstance(value, types.ModuleType) or callable(value) and name not in config
        if not name.startswith('_') and not is_helper:
            assign(config, name, value, f'{name}={value!r} in {word}')


def read_values(path, word):
    """The {key: value} of a JSON or YAML file."""
    try:
        text = path.read_text(encoding='utf-8')
        values = json.loads(text) if path.suffix == '.json' else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f'{word} cannot be read ({" ".join(str(error).split())}); correct the file.'
        ) from error
    if not isinstance(values, dict):
        raise UserError(f'{word} holds a {type(values).__name__}, not keys and values; correct the file.')
    return values


def find_config(word):
    """The path of a config file, relative to the working directory or else to the repository."""
    if not word.endswith(('.py', '.json', '.yaml', '.yml')):
        raise UserError(
            f"'{word}' is neither a config file (*.py, *.json, *.yaml) nor --key=value; write one of them."
        )
    for folder in (Path.cwd(), ROOT):
        if (folder / word).is_file():
            return folder / word
    raise UserError(f"There is no config file '{word}' in {Path.cwd()} or {ROOT}; correct the path.")


def apply_option(config, option, words):
    """Sets `key=value`, or `key` with its value in the `words` that follow, or a bare flag."""
    name, equals, text = option.partition('=')
    name = name.replace('-', '_')
    _, key, _ = resolve(config.known, name, f'--{option}')
    if not equals and key.type is bool:
        text = words.pop(0) if words and words[0] in ('True', 'False', 'true', 'false') else 'True'
    elif not equals:
        if not words or words[0].startswith('--'):
            raise UserError(f'--{name} is missing its value; write --{name}=VALUE ({key.type.__name__}).')
        text = words.pop(0)
    assign(config, name, parsed(text, key), f'--{name}={text}')


def parsed(text, key):
    """The Python value of a word on the command line."""
    if key.type is str:
        return None if key.default is None and text == 'None' else text
    if key.type is bool:
        text = {'true': 'True', 'false': 'False'}.get(text, text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text  # a str, which is the wrong type: `checked` says so


def assign(config, name, value, source):
    """Sets a key by its name or an alias; `source` says in an error what was set to what, and where."""
    target, key, conversion = resolve(config.known, name, source)
    value = checked(key, value, source)
    if callable(conversion):
        return conversion(value)
    if conversion and value not in conversion:
        raise UserError(f'{source} is not understood; choose from {", ".join(map(str, conversion))}.')
    config[target] = conversion[value] if conversion else value
    config.given.add(target)


def resolve(known, name, source):
    """What a name stands for: the name of the key to set, a Key to check the value by, its conversion."""
    if name in known:
        return name, known[name], None
    aliases = {alias: (key, how) for alias, key, how in ALIASES if key in known and alias not in known}
    if name not in aliases:
        nearest = difflib.get_close_matches(name, [*known, *aliases], n=1, cutoff=0)
        remedy = '--help lists them all' if source.startswith('--') else 'names of your own start with _'
        raise UserError(f"Unknown key '{name}' ({source}); the nearest is '{''.join(nearest)}'; {remedy}.")
    target, conversion = aliases[name]
    if conversion is None:
        return target, known[target], None
    kind = [*conversion.__annotations__.values()][0] if callable(conversion) else type(next(iter(conversion)))
    return target, Key(kind(), kind), conversion


def checked(key, value, source):
    """`value` as the type of `key`, or a UserError that starts with `source`."""
    if type(value) is key.type or value is None and key.default is None:
        return value
    if key.type is float and type(value) is int:
        return float(value)
    if {type(value), key.type} == {tuple, list}:  # JSON knows only lists
        return key.type(value)
    example = ' or None' if key.default is None else f', such as {key.default!r}'
    raise UserError(f'{source} gives {type(value).__name__} where {key.type.__name__} is wanted{example}.')


# ---------------------------------------------------------------------------- the script's own source

SECTION = re.compile(r'# ?-{2,} *(.*?)[ -]*')  # `# --- title ---`, where the title may be missing


def keys_of(source, namespace):
    """{name: Key} for the assignments at the top level of a script, down to its call of configure()."""
    keys, section, last_line = {}, '', 0
    lines = source.split('\n')
    for node in ast.parse(source).body:
        if calls_configure(node):
            break
        above = lines[last_line : node.lineno - 1]  # between two statements: comments and blank lines
        for rule in filter(None, map(SECTION.fullmatch, above)):
            section = rule[1]
        last_line = node.end_lineno
        for name in assigned_names(node):
            value = namespace.get(name, NotImplemented)  # an instance of no type that a key may have
            if value is None or type(value) in TYPES.values():
                keys[name] = Key(value, type_of(node, name, value), comment_of(node, lines, above), section)
    return keys


def calls_configure(node):
    return any(
        isinstance(part, ast.Call) and ast.unparse(part.func).split('.')[-1] == 'configure'
        for part in ast.walk(node)
    )


def assigned_names(node):
    """The public names in `name = ...`, `name = other = ...` and `name: type = ...`."""
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return [target.id for target in targets if isinstance(target, ast.Name) and not target.id.startswith('_')]


def type_of(node, name, default):
    """The type in the annotation, `str` or `str | None`, or else that of the default."""
    annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ''
    declared = TYPES.get(annotation.removesuffix(' | None'))
    if declared is None and default is None:
        raise UserError(
            f'The default of {name} is None and does not say the type; annotate it, '
            f'as in `{name}: str = None` ({", ".join(TYPES)}).'
        )
    return declared or type(default)


def comment_of(node, lines, above):
    """The comment at the end of an assignment, or else the lines of comment directly above it."""
    rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()  # ast counts bytes
    if rest.startswith('#'):
        return rest.lstrip('# ')
    comment = []
    for line in reversed(above):
        if not line.startswith('#') or SECTION.fullmatch(line):
            break
        comment.insert(0, line.lstrip('# '))
    return ' '.join(comment)


def print_help(namespace, keys):
    """The first paragraph of the script's docstring, then a line for each key: default and comment."""
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
