"""Files that are complete or not there."""

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

from lm.configurator import UserError


def save_atomically(path, write):
    """`write(file)` into a file beside `path`, then puts it in its place: a crash leaves the old or the new."""
    path = Path(path)
    beside = path.with_name(path.name + '.tmp')
    try:
        with open(beside, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f'{path} could not be written ({error}); what was there before still is.') from error
    os.replace(beside, path)


def write_json(path, value):
    save_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + '\n').encode()))


def sha256_of(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def checksum(config):
    """The sha256 of what config.json says, apart from itself."""
    rest = {key: value for key, value in config.items() if key != 'checksum'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@contextmanager
def as_sentence(problem, remedy='download it again'):
    """Raise a UserError in place of whatever damaged bytes, values that cannot be or a network make a library raise."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # they fail in a dozen ways, and have no common class
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f'{problem} ({reason[:200]}); {remedy}.') from error
