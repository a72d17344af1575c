"""Files that are complete or not there, and the lock of a folder that one process writes at a time."""

import fcntl
import glob
import hashlib
import json
import os
import socket
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lm.configurator import UserError, require


@contextmanager
def writing(path):
    """Turn what keeps a file or folder from being written, such as a full disk, into a UserError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = error.__context__ if type(error) is RuntimeError else error  # torch.save's, after an OSError
        raise UserError(f'{path} could not be written ({reason}); what was there before still is.') from error


def save_atomically(path, write):
    """Call `write(file)` with a file beside `path`, then put it in its place: a crash leaves the old or the new."""
    path = Path(path)
    own = f'{path.name}.{socket.gethostname()}.'
    beside = path.with_name(f'{own}{os.getpid()}.tmp')  # no other process writes that one
    for left in path.parent.glob(f'{glob.escape(own)}*.tmp'):  # by processes of this machine that were killed
        if left != beside and not is_running(left.name.split('.')[-2]):
            left.unlink(missing_ok=True)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, 'wb') as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
    finally:
        with suppress(OSError):  # where it took its place, or never was
            beside.unlink()


def require_folder(path):
    """Raise a UserError where the folder that a file is to be written to is not there."""
    exists = Path(path).absolute().parent.is_dir()
    require(exists, f'{path} lies in a folder that does not exist; make it, or choose another path.')


def require_file_path(path):
    """Raise a UserError where no file can be written to a path that was given."""
    require_folder(path)
    require(not path or not Path(path).is_dir(), f'{path} is a folder; give the path of a file.')


def keep_others(old, new, own):
    """Move to the folder `new`, which takes the place of `old`, what is not there and has no name of `own`."""
    for path in old.iterdir() if old.is_dir() else ():
        if not any(map(path.match, own.split())) and not (new / path.name).exists():
            path.rename(new / path.name)


def is_running(pid):
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def write_json(path, value):
    save_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + '\n').encode()))


def lock(folder, name='logs.log', busy='', wait=False):
    """Make this process the only one that writes a folder until it closes the file that it gets, or ends: the
    lock is the kernel's, on a file that is never replaced, so that no way to end leaves one behind. Where another
    process has it, wait for that one, or raise a UserError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / name, 'a', buffering=1, encoding='utf-8')
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # the second on some systems
        require(False, busy or f'Another process writes {folder}; let it end, or choose another out_dir.')
    except OSError:  # some file systems have no locks
        pass
    return file


def sha256_of(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def checksum(config):
    """Return the sha256 of what config.json says, apart from itself."""
    rest = {key: value for key, value in config.items() if key != 'checksum'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@contextmanager
def as_sentence(problem, remedy='download it again', kinds=Exception):
    """Raise a UserError in place of whatever damaged bytes, values that cannot be or a network make a library raise."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:  # libraries fail in a dozen ways, which have no common class
        raise UserError(f'{problem} ({first_line(error)[:200]}); {remedy}.') from error


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
