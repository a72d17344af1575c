"""Check a prepared folder byte by byte and print its card: python -m lm.verify data/NAME"""

import sys

from lm.files import checksum, sha256_of
from lm.folder import Folder


def main(arguments):
    """Check a folder and return the exit status: 1 if anything is damaged. Raises UserError for what is no folder."""
    if len(arguments) != 1 or arguments[0].startswith('-'):
        print('usage: python -m lm.verify data/NAME    checks a prepared folder and prints its card')
        return 0 if arguments in (['--help'], ['-h']) else 2
    folder = Folder(arguments[0])  # refuses files of another size than the counts in config.json ask for
    damages = [*check_hashes(folder), *check_contents(folder)]
    if damages:
        print(*(f'error: {damage}' for damage in damages), sep='\n', file=sys.stderr)
        print(f'Prepare {folder.path} again with --overwrite, or take it from a copy.', file=sys.stderr)
        return 1
    print(*card(folder), sep='\n')
    return 0


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
    """Yield a sentence for each file whose numbers cannot be right; they are mapped into memory, not read into it."""
    for split, tokens in folder.tokens.items():
        index, masks, start = folder.index[split], folder.masks[split], f'{folder.path}/{split}'
        last, largest = folder.tokenizer.vocab_size - 1, tokens.max(initial=0)
        if largest > last:
            yield f'{start}_tokens.bin has the token id {largest}, and the vocabulary ends at {last}.'
        if index[0] != 0 or index[-1] != len(tokens) or (index[1:] < index[:-1]).any():
            yield f'{start}_index.bin does not lead from 0 up to {len(tokens)} tokens without a step back.'
        if masks is not None and masks.max(initial=0) > 1:
            yield f'{start}_masks.bin has numbers that are neither 0 nor 1.'


def card(folder):
    """Yield the lines: where the text comes from, and how much it is."""
    config = folder.config
    yield f'{config["name"]}: all is as it was written'
    yield f'  source     {config.get("source", "unknown")}'
    yield f'  settings   {", ".join(f"{key}={value}" for key, value in config.get("arguments", {}).items())}'
    yield f'  tokenizer  {folder.tokenizer.vocab_size:,} tokens, ids in {config["dtype"]}'
    yield f'  left out   {config.get("blank", 0):,} blank documents, {config.get("skipped", 0):,} unreadable ones'
    for split, sizes in folder.splits.items():
        counts = ', '.join(f'{count:,} {unit}' for unit, count in sizes.items())
        yield f'  {split:<10} {counts}, {sizes["bytes"] / max(1, sizes["tokens"]):.2f} bytes per token'


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
