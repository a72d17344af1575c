"""The folders of a preparation: finished ones are reused or refused, unfinished ones continued.

The hidden folder `.NAME.partial` takes the name of the target beside it when it is complete. After each shard of the
source its .work/journal.json says how many documents are done and how large each file was: a restart truncates the
files to these sizes and goes on after these documents.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path

from lm.configurator import ROOT, UserError, require
from lm.files import as_sentence, keep_others, lock, write_json
from lm.folder import Folder
from lm.tokenizer import settings_of

FORMAT = 1
WORK = '.work'  # a folder within the unfinished one, which no user's folder is named as


def finished_folder(target, command, overwrite):
    """Return the config of a finished folder that fits the command {'format', 'arguments', 'inputs'}, if there is one.

    Raises UserError for a folder of another command, unless it may be overwritten, and always for any other folder.
    """
    if not target.exists() or target.is_dir() and not any(target.iterdir()):
        return None
    with as_sentence(f'{target} was not prepared here', 'move it away, or give another --name'):
        recorded = json.loads((target / 'config.json').read_text(encoding='utf-8'))
        words = differences(recorded, command)
    if overwrite:
        return None
    require(not words, f'{shown(target)} was prepared otherwise: {words}. Give --overwrite, or another name.')
    Folder(target)  # checks the sizes of its files
    shutil.rmtree(target / WORK, ignore_errors=True)  # a run was killed right after it had finished
    return recorded


def differences(recorded, command):
    """Return in words what distinguishes the command from the recorded one; inputs are compared by content."""
    before, now = ({**each['arguments'], 'format': each['format']} for each in (recorded, command))
    changed = [key for key in now | before if before.get(key) != now.get(key)]
    words = [f'{key} was {before.get(key)} and is {now.get(key)}' for key in changed]
    old, new = recorded['inputs'], command['inputs']
    if [*old.values()] != [*new.values()]:
        common = {*old.values()} & {*new.values()}
        names = [name for name, digest in (old | new).items() if digest not in common]
        words.append(f'the input is not the same ({", ".join(names) or "another order"})')
    return '; '.join(words)


@contextlib.contextmanager
def unfinished_folder(target, command, overwrite):
    """Give the Journal of a hidden folder beside `target`, which takes its place if the block succeeds; if it
    fails, the folder vanishes, unless a shard is done: then the same command goes on from there."""
    folder = target.with_name(f'.{target.name}.partial')
    try:
        busy = f'Another process is preparing {target}; wait, or change --name.'
        with lock(folder / WORK, 'lock', busy):  # which is no part of the result
            journal = Journal(folder, command, overwrite)
            try:
                yield journal
                if target.exists():
                    keep_others(target, folder, '*.bin')
                    target.rename(folder / WORK / 'replaced')
                folder.rename(target)
                shutil.rmtree(target / WORK)
            except BaseException:  # a keyboard interrupt too
                if journal.state:
                    kept = f'{journal.documents()}, is kept in {shown(folder)}'
                    print(f'What is done, {kept}; the same command goes on from there.', file=sys.stderr)
                else:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
    except OSError as error:
        remedy = 'make room, get write permission, or change the path'
        raise UserError(f'{target} could not be written ({error}); {remedy}.') from error


class Journal:
    """How far an unfinished folder has come: `state`, which the writer saves after each shard, None before.
    It continues what a killed run of the same command left, refuses what another left, or clears the folder."""

    def __init__(self, folder, command, overwrite):
        self.folder, self.command, self.state = folder, command, None
        recorded = settings_of(folder / WORK, 'journal.json')
        words = differences(recorded, command) if recorded else ''
        problem = f'The unfinished preparation of {shown(folder)} was begun otherwise: {words}'
        require(overwrite or not words, f'{problem}. Give what it was begun with, or --overwrite.')
        if recorded and not words:
            self.state = recorded['state']
            print(f'going on where an unfinished preparation stopped, {self.documents()} in')
        else:
            for path in (*filter(Path.is_file, folder.iterdir()), folder / WORK / 'journal.json'):
                path.unlink(missing_ok=True)

    def save(self, state):
        """Record {'source': {'documents': how many are done, ...}, 'sizes': {file name: bytes on the disk}, ...}."""
        write_json(self.folder / WORK / 'journal.json', {**self.command, 'state': state})
        self.state = state

    def documents(self):
        return f'{self.state["source"]["documents"]:,} documents'


def shown(target):
    return target.relative_to(ROOT) if target.is_relative_to(ROOT) else target
