"""Check a prepared folder byte by byte and print its card: python -m lm.verify data/NAME

Tokens and masks are read a part at a time, so that a folder may be larger than the memory.
"""

import sys

import numpy as np

from lm.files import checksum, sha256_of
from lm.folder import Folder

CHUNK = 2**20  # numbers that are read together
EXCERPT = 50  # tokens of a document that the card shows


def main(arguments):
    """Check a folder and return the exit status: 1 if anything is damaged. Raises UserError for what is no folder."""
    if len(arguments) != 1 or arguments[0].startswith('-'):
        print('usage: python -m lm.verify data/NAME    checks a prepared folder and prints its card')
        return 0 if arguments in (['--help'], ['-h']) else 2
    folder = Folder(arguments[0])
    damages = [*check_hashes(folder), *check_contents(folder)]
    if damages:
        print(*(f'error: {damage}' for damage in damages), sep='\n', file=sys.stderr)
        print(f'Prepare {folder.path} again with --overwrite, or take it from a copy.', file=sys.stderr)
        return 1
    print(*card(folder), sep='\n')
    return 0


# ---------------------------------------------------------------------------- checks
# Files of another size than the counts in config.json ask for could not have been opened.


def check_hashes(folder):
    """Yield a sentence for each file that is not the one that was written."""
    recorded = folder.config.get('sha256', {})
    if folder.config.get('checksum') not in (None, checksum(folder.config)):
        yield f'{folder.path / "config.json"} was changed after it was written.'
    for name in sorted({'tokenizer.json', *recorded, *(path.name for path in folder.path.glob('*.bin'))}):
        path = folder.path / name
        if not path.is_file():
            yield f'{path} is missing.'
        elif name not in recorded:
            yield f'{path} has no hash in config.json that it could be checked by.'
        elif sha256_of(path) != recorded[name]:
            yield f'{path} is not the file that was written: config.json has another sha256.'


def check_contents(folder):
    """Yield a sentence for each file whose numbers cannot be right."""
    for split, tokens in folder.tokens.items():
        index, masks, start = folder.index[split], folder.masks[split], f'{folder.path}/{split}'
        last_id = folder.tokenizer.vocab_size - 1
        if largest(tokens) > last_id:
            yield f'{start}_tokens.bin has the token id {largest(tokens)}, and the vocabulary ends at {last_id}.'
        if index[0] != 0 or index[-1] != len(tokens) or (index[1:] < index[:-1]).any():
            yield f'{start}_index.bin does not lead from 0 up to {len(tokens)} tokens without a step back.'
        if masks is not None and largest(masks) > 1:
            yield f'{start}_masks.bin has numbers that are neither 0 nor 1.'


def largest(array):
    parts = (array[start : start + CHUNK] for start in range(0, len(array), CHUNK))
    return max((int(part.max()) for part in parts), default=0)


# ---------------------------------------------------------------------------- the card


def card(folder):
    """Yield the lines: where the text comes from, how much it is, how it reads."""
    config = folder.config
    settings = ', '.join(f'{key}={value}' for key, value in config.get('arguments', {}).items())
    yield f'{config["name"]}: all is as it was written'
    yield f'  source     {config.get("source", "unknown")}'
    yield f'  settings   {settings}'
    yield f'  tokenizer  {folder.tokenizer.vocab_size:,} tokens, ids in {config["dtype"]}'
    yield f'  left out   {config.get("blank", 0):,} blank documents, {config.get("skipped", 0):,} unreadable ones'
    yield f'  {"":<10} {"documents":>16} {"tokens":>16} {"bytes":>16} {"bytes per token":>16}'
    for split, sizes in folder.splits.items():
        ratio = sizes['bytes'] / max(1, sizes['tokens'])
        counts = ' '.join(f'{sizes[unit]:>16,}' for unit in ('documents', 'tokens', 'bytes'))
        yield f'  {split:<10} {counts} {ratio:>16.2f}'
    for split, sizes in folder.splits.items():
        if sizes['documents']:
            lengths = np.diff(folder.index[split].astype(np.int64))
            chosen = {'shortest': lengths.argmin(), 'longest': lengths.argmax(), 'first': 0}
            for title, number in chosen.items():
                yield f'  {split} document {number:,}, the {title}: {excerpt(folder, split, number)}'


def excerpt(folder, split, number):
    start, end = map(int, folder.index[split][number : number + 2])
    text = folder.tokenizer.decode(folder.tokens[split][start : min(end, start + EXCERPT)])
    return f'{end - start:,} tokens, {text!r}' + ' ...' * (end - start > EXCERPT)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
