"""The folders of a preparation: finished ones are reused or refused, unfinished ones continued.

Everything is written to a hidden folder beside the target, `.NAME.partial`, which takes the target's name when it
is complete. After each shard of the source its journal.json says how many documents are done and how large each
file was. A restart truncates the files to these sizes and goes on after these documents.
"""

import contextlib
import fcntl
import json
import shutil

from lm.configurator import ROOT, UserError, require
from lm.files import write_json
from lm.folder import Folder

FORMAT = 1
# In an unfinished folder, no part of the result:
HELPERS = ('lock', 'journal.json', 'journal.json.tmp', 'replaced')


def finished_folder(target, command, overwrite):
    """Return the config of a finished folder that fits the command; None where one is to be written.

    command: {'format', 'arguments', 'inputs'}. Raises UserError for a folder of another command, unless it may be
    overwritten, and always for any other folder.
    """
    if not target.exists() or target.is_dir() and not any(target.iterdir()):
        return None
    try:
        recorded = json.loads((target / 'config.json').read_text(encoding='utf-8'))
        differing = differences(recorded, command)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # whatever else lies there
        raise UserError(
            f'{target} exists and was not prepared here; move it away, or give another --name.'
        ) from error
    if overwrite:
        return None
    words = '; '.join(differing)
    require(
        not words, f'{shown(target)} was prepared otherwise: {words}. Give --overwrite, or another --name.'
    )
    Folder(target)  # checks the sizes of its files
    remove(target / name for name in HELPERS)  # a run was killed right after it had finished
    return recorded


def differences(recorded, command):
    """Return what distinguishes the command from the recorded one, in words; inputs are compared by content."""
    before, now = recorded['arguments'], json.loads(json.dumps(command['arguments']))
    changed = [key for key in now | before if before.get(key) != now.get(key)]
    words = [f'{key} was {before.get(key)} and is {now.get(key)}' for key in changed]
    old, new = recorded['inputs'], command['inputs']
    if [*old.values()] != [*new.values()]:
        common = {*old.values()} & {*new.values()}
        names = [name for name, digest in (old | new).items() if digest not in common]
        words.append(f'the input is not the same ({", ".join(names) or "another order"})')
    if recorded['format'] != command['format']:
        words.append(f'format was {recorded["format"]} and is {command["format"]}')
    return words


@contextlib.contextmanager
def unfinished_folder(target, command, overwrite):
    """Give the Journal of a hidden folder beside `target`, which takes the target's place if the block succeeds.

    If the block fails, the folder vanishes, unless a shard is done: then the same command goes on from there.
    """
    journal = Journal(target, command)
    folder = journal.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / 'lock', 'w') as lock:
            lock_or_refuse(lock, target)
            journal.open(overwrite)
            try:
                yield journal
                if target.exists():
                    target.rename(folder / 'replaced')
                folder.rename(target)
                remove(target / name for name in HELPERS)
            except BaseException:  # a keyboard interrupt too
                if not journal.state:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
    except OSError as error:
        problem = f'{target} could not be written ({error}); make room, or choose another --output_dir.'
        raise UserError(problem + journal.outlook()) from error
    except UserError as error:
        raise UserError(f'{error}{journal.outlook()}') from error


def lock_or_refuse(lock, target):
    """Take a record lock, which ends with this process and is not inherited by its workers."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f'Another process is preparing {target}; wait for it, or choose another --name.'
        ) from error


class Journal:
    """How far an unfinished folder has come: `state`, which the writer saves after each shard, None before.

    state: {'source': {'documents': how many are done, ...}, 'sizes': {file name: bytes}, ...}
    """

    def __init__(self, target, command):
        self.folder, self.target, self.command = target.with_name(f'.{target.name}.partial'), target, command
        self.path, self.state = self.folder / 'journal.json', None

    def open(self, overwrite):
        """Continue what a killed run of the same command left, refuse what another left, or clear the folder."""
        recorded = json.loads(self.path.read_text(encoding='utf-8')) if self.path.exists() else None
        words = '; '.join(differences(recorded, self.command)) if recorded else ''
        require(
            overwrite or not words,
            f'An unfinished preparation of {shown(self.target)} was begun otherwise: {words}. Give what it was begun '
            'with, or start afresh with --overwrite.',
        )
        if recorded and not words and 'sizes' in recorded['state']:
            self.state = recorded['state']
            print(f'going on where an unfinished preparation stopped, {self.documents()} in')
        else:
            remove(path for path in self.folder.iterdir() if path.name != 'lock')

    def save(self, state):
        """Record the state, whose files must be on the disk."""
        write_json(self.path, {**self.command, 'state': state})
        self.state = state

    def documents(self):
        return f'{self.state["source"]["documents"]:,} documents'

    def outlook(self):
        """Return what a message of failure ends with."""
        if not self.state:
            return ''
        return (
            f' What is done so far, {self.documents()}, is kept in {shown(self.folder)}: the same command goes on from '
            'there; --overwrite with other settings or another input starts afresh.'
        )


def remove(paths):
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def shown(target):
    return target.relative_to(ROOT) if target.is_relative_to(ROOT) else target
