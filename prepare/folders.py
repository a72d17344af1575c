"""
The folders around a preparation: finished ones are reused or refused, unfinished ones continued.

Everything is written to a hidden folder beside the target, `.NAME.partial`, which takes the target's name when
it is complete. Its journal says how far the files there are known to be good: it is written, after them, each
time a shard of the source is done.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil

import numpy as np

from lm import data, files
from lm.configurator import ROOT, UserError
from lm.files import checksum, sha256_of

FORMAT = 1
HELPERS = ('lock', 'journal.json', 'journal.json.tmp')  # in an unfinished folder, no part of the result


def finished_folder(target, arguments, inputs, overwrite):
    """The recorded config of a finished folder that fits; None where one is to be written."""
    restore(target)
    if not target.exists() or target.is_dir() and not any(target.iterdir()):
        return None
    try:
        recorded = json.loads((target / 'config.json').read_text(encoding='utf-8'))
        sizes = {}
        for split, count in recorded['splits'].items():
            width = np.dtype(recorded['dtype']).itemsize
            sizes |= {
                f'{split}_{name}.bin': size
                for name, size in sizes_of(count, width, 'examples' in recorded).items()
            }
        differing = differences(recorded, arguments, inputs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # whatever else lies there
        raise UserError(
            f'{target} exists and is no folder that was prepared here; move it away, '
            'or choose another --name or --output_dir.'
        ) from error
    if overwrite:
        return None
    if differing:
        raise UserError(
            f'{shown(target)} was prepared otherwise: {"; ".join(differing)}. '
            'Replace it with --overwrite, or choose another --name.'
        )
    for name, size in sizes.items():
        if not (target / name).is_file() or (target / name).stat().st_size != size:
            raise UserError(
                f'{target / name} is damaged: it should have {size} bytes. '
                'Prepare the folder again with --overwrite.'
            )
    forget_helpers(target)  # a run was killed right after it had finished
    return recorded


def sizes_of(count, width, has_masks):
    """Bytes of a split's files, from its counts."""
    return {
        'tokens': count['tokens'] * width,
        'index': (count['documents'] + 1) * 8,
        **({'masks': count['tokens']} if has_masks else {}),
    }


def differences(recorded, arguments, inputs):
    """What distinguishes the command from the recorded one, in words; inputs are compared by content."""
    before, now = recorded['arguments'], json.loads(json.dumps(arguments))
    words = [
        f'{key} was {before.get(key)} and is {now.get(key)}'
        for key in now | before
        if before.get(key) != now.get(key)
    ]
    if recorded['format'] != FORMAT:
        words.append(f'format was {recorded["format"]} and is {FORMAT}')
    if list(recorded['inputs'].values()) != list(inputs.values()):
        gone = [name for name, digest in recorded['inputs'].items() if digest not in inputs.values()]
        new = [name for name, digest in inputs.items() if digest not in recorded['inputs'].values()]
        words.append(
            'the input is not the same'
            + f' (before: {", ".join(gone)})' * bool(gone)
            + f' (now: {", ".join(new)})' * bool(new)
        )
    return words


# ---------------------------------------------------------------------------- unfinished folders


@contextlib.contextmanager
def replacing(target, arguments, inputs, overwrite):
    """
    A hidden folder beside `target`, and its Journal; it takes the target's place if the block succeeds.

    If the block fails, the folder vanishes, unless a shard is done: then the same command goes on from there.
    The lock keeps two runs apart; it is a record lock, which ends with this process and is not inherited by
    the workers.
    """
    folder, old = beside(target, 'partial'), beside(target, 'old')
    journal = Journal(folder, arguments, inputs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / 'lock', 'w') as lock:
            lock_or_refuse(lock, target)
            journal.open(target, overwrite)
            try:
                yield folder, journal
                for path in (*folder.iterdir(), folder):
                    sync(path)
                shutil.rmtree(old, ignore_errors=True)
                if target.exists():
                    target.rename(old)
                folder.rename(target)
                forget_helpers(target)
                shutil.rmtree(old, ignore_errors=True)
                sync(target.parent)
            except BaseException:  # a keyboard interrupt too
                if not journal.state:
                    shutil.rmtree(folder, ignore_errors=True)
                restore(target)
                raise
    except OSError as error:
        raise UserError(
            f'{target} could not be written ({error}); make room, check the permissions, '
            f'or choose another --output_dir.{journal.outlook()}'
        ) from error
    except UserError as error:
        raise UserError(f'{error}{journal.outlook()}') from error


class Journal:
    """How far an unfinished folder has come: `state`, None before the first shard is done."""

    def __init__(self, folder, arguments, inputs):
        self.path, self.folder, self.state, self.ours = folder / 'journal.json', folder, None, False
        self.command = json.loads(json.dumps({'format': FORMAT, 'arguments': arguments, 'inputs': inputs}))

    def open(self, target, overwrite):
        """Take up what a killed run left, refuse what another command left, or clear the folder."""
        recorded = self.read()
        differing = recorded and differences(recorded, self.command['arguments'], self.command['inputs'])
        if differing and not overwrite:
            raise UserError(
                f'An unfinished preparation of {shown(target)} was begun otherwise: '
                f'{"; ".join(differing)}. Give what it was begun with, or start afresh with --overwrite.'
            )
        self.ours = True
        if recorded and not differing:
            self.state = recorded['state']
            print(f'going on where an unfinished preparation stopped, {self.documents():,} documents in')
            return
        for leftover in self.folder.iterdir():
            if leftover.name != 'lock':
                leftover.unlink()

    def read(self):
        """What was recorded, if the files still hold as much; None otherwise."""
        try:
            recorded = json.loads(self.path.read_text(encoding='utf-8'))
            state = recorded['state']
            for split, count in state['splits'].items():
                for name, size in sizes_of(count, state['width'], state['has_masks']).items():
                    if (self.folder / f'{split}_{name}.bin').stat().st_size < size:
                        return None
            data.Tokenizer.load(self.folder)
            return recorded
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, state):
        """To be called when all that `state` counts is on the disk."""
        files.write_json(self.path, {**self.command, 'state': state})
        self.state = state

    def documents(self):
        return sum(count['documents'] for count in self.state['splits'].values())

    def outlook(self):
        """What a message of failure ends with."""
        if not (self.ours and self.state):
            return ''
        return (
            f' What is done so far, {self.documents():,} documents, is kept in {shown(self.folder)}: the same '
            'command goes on from there; --overwrite with other settings or another input starts afresh.'
        )


def beside(target, state):
    return target.with_name(f'.{target.name}.{state}')


def restore(target):
    """Undo half of a replacement: the old folder had made room, the new one had not taken it."""
    old = beside(target, 'old')
    if old.exists() and not target.exists():
        old.rename(target)


def forget_helpers(target):
    for name in HELPERS:
        (target / name).unlink(missing_ok=True)


def lock_or_refuse(lock, target):
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f'Another process is preparing {target}; wait for it, or choose another --name.'
        ) from error


def sync(path):
    """Force a file or folder onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def shown(target):
    return target.relative_to(ROOT) if target.is_relative_to(ROOT) else target
