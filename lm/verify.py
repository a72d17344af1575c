"""Check a prepared folder byte by byte and print its card: python -m lm.verify data/NAME"""

import sys

from lm.configurator import printable
from lm.files import checksum, sha256_of
from lm.folder import Folder


def main(arguments):
    """Check a folder and return the exit status: 1 if anything is damaged. Raises UserError for what is no folder."""
    if len(arguments) != 1 or arguments[0].startswith('-'):
        print('usage: python -m lm.verify data/NAME    checks a prepared folder and prints its card')
        return 0 if arguments in (['--help'], ['-h']) else 2
    folder = Folder(arguments[0])  # refuses files of another size than the counts in config.json ask for
    if damages := [*check_hashes(folder)]:
        print(*(f'error: {damage}' for damage in damages), sep='\n', file=sys.stderr)
        print(f'Prepare {folder.path} again with --overwrite, or take it from a copy.', file=sys.stderr)
        return 1
    print(*map(printable, card(folder)), sep='\n')
    return 0


def check_hashes(folder):
    """Yield a sentence for each file that is not the one that was written."""
    if folder.config.get('checksum') not in (None, checksum(folder.config)):
        yield f'{folder.path / "config.json"} was changed after it was written.'
    for name in sorted({'tokenizer.json', *folder.fingerprint, *(p.name for p in folder.path.glob('*.bin'))}):
        path = folder.path / name
        if not path.is_file():
            yield f'{path} is missing.'
        elif name not in folder.fingerprint:
            yield f'{path} has no hash in config.json that it could be checked by.'
        elif sha256_of(path) != folder.fingerprint[name]:
            yield f'{path} is not the file that was written: config.json has another sha256.'


def card(folder):
    """Yield the lines: where the text comes from, and how much it is."""
    yield f'{folder.config["name"]}: all is as it was written'
    for key in 'source arguments vocab_size dtype blank skipped'.split():
        yield f'  {key:<10} {folder.config.get(key)}'
    for split, sizes in folder.splits.items():
        counts = ', '.join(f'{count:,} {unit}' for unit, count in sizes.items())
        yield f'  {split:<10} {counts}, {sizes["bytes"] / max(1, sizes["tokens"]):.2f} bytes per token'


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
