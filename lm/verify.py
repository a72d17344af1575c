"""
Check a prepared folder byte by byte and print its card: python -m lm.verify data/NAME

It reads a part at a time, so that a folder may be larger than the memory.
"""

import sys

import numpy as np

from lm import data
from lm.files import checksum, sha256_of

CHUNK = 2**20  # numbers that are looked at together
EXCERPT = 50  # tokens of a document that the card shows
EXCERPTS = 3


def main(words):
    """The exit status: 0 if all is well, 1 after naming each damage. Raises UserError if there is nothing to open."""
    if len(words) != 1 or words[0].startswith('-'):
        print('usage: python -m lm.verify data/NAME    checks a prepared folder and prints its card')
        return 0 if words in (['--help'], ['-h']) else 2
    folder = data.Folder(words[0])
    damages = [*check_hashes(folder), *check_contents(folder)]
    if damages:
        print(*(f'error: {damage}' for damage in damages), sep='\n', file=sys.stderr)
        print(f'Prepare {folder.path} again with --overwrite, or take it from a copy.', file=sys.stderr)
        return 1
    print(*card(folder), sep='\n')
    return 0


# ---------------------------------------------------------------------------- checks
# That the files have the sizes that the counts in config.json ask for is known: the folder could be opened.


def check_hashes(folder):
    """Yields a sentence for each file that is not the one that was written."""
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
    """Yields a sentence for each file whose numbers cannot be right."""
    for split, tokens in folder.tokens.items():
        index, masks = folder.index[split], folder.masks[split]
        largest = max((int(part.max()) for part in chunks(tokens)), default=0)
        if largest >= folder.tokenizer.vocab_size:
            yield (
                f'{folder.path}/{split}_tokens.bin has the token id {largest}, and the vocabulary ends at '
                f'{folder.tokenizer.vocab_size - 1}.'
            )
        if (
            index[0] != 0
            or index[-1] != len(tokens)
            or any((part[1:] < part[:-1]).any() for part in chunks(index, overlap=1))
        ):
            yield (
                f'{folder.path}/{split}_index.bin does not lead from 0 up to {len(tokens)}, the number of tokens, '
                'without a step back.'
            )
        if masks is not None and any(part.max() > 1 for part in chunks(masks)):
            yield f'{folder.path}/{split}_masks.bin has numbers that are neither 0 nor 1.'


def chunks(array, overlap=0):
    for start in range(0, len(array), CHUNK):
        yield array[start : start + CHUNK + overlap]


# ---------------------------------------------------------------------------- the card


def card(folder):
    """Yields the lines: where the text comes from, how much it is, how it reads."""
    config, splits = folder.config, folder.splits
    settings = ', '.join(f'{key}={value}' for key, value in config.get('arguments', {}).items())
    yield f'{config["name"]}: all is as it was written'
    yield f'  source     {config.get("source", "unknown")}'
    yield f'  settings   {settings}'
    yield f'  tokenizer  {folder.tokenizer.vocab_size:,} tokens, ids in {config["dtype"]}'
    yield f'  left out   {config.get("blank", 0):,} blank documents, {config.get("skipped", 0):,} unreadable ones'
    yield f'  {"":<10} {"documents":>16} {"tokens":>16} {"bytes":>16} {"bytes per token":>16}'
    for split, sizes in splits.items():
        yield (
            f'  {split:<10} {sizes["documents"]:>16,} {sizes["tokens"]:>16,} {sizes["bytes"]:>16,} '
            f'{1 / folder.tokens_per_byte(split) if sizes["tokens"] else 0:>16.2f}'
        )
    for split in splits:
        if not splits[split]['documents']:
            continue
        shortest, longest = extremes(folder.index[split])
        some = sorted({splits[split]['documents'] * i // EXCERPTS for i in range(EXCERPTS)})
        for title, number in (
            ('shortest', shortest),
            ('longest', longest),
            *(('', number) for number in some),
        ):
            yield f'  {split} document {number:,} {title}'.rstrip() + f': {excerpt(folder, split, number)}'


def extremes(index):
    """Numbers of the shortest and the longest document, the first of each."""
    found = []
    for start in range(0, len(index) - 1, CHUNK):
        lengths = np.diff(index[start : start + CHUNK + 1]).astype(np.int64)
        found += [
            (int(lengths[place]), -start - int(place)) for place in (lengths.argmin(), lengths.argmax())
        ]
    return -min(found, key=lambda document: document[0])[1], -max(found)[1]


def excerpt(folder, split, number):
    start, end = map(int, folder.index[split][number : number + 2])
    text = folder.tokenizer.decode(folder.tokens[split][start : min(end, start + EXCERPT)])
    return f'{end - start:,} tokens, {text!r}' + ' ...' * (end - start > EXCERPT)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
