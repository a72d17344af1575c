"""Building the tokenizers of prepared folders; all end as the text of a `tokenizer.json`."""

import re
from functools import partial
from itertools import chain
from pathlib import Path

import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lm import checkpoints, data
from lm.configurator import UserError

KINDS = ('char', 'bytes', 'gpt2', 'bpe')  # else the path of a tokenizer.json, of a folder, of a checkpoint
PIECE = 2**16  # characters that are encoded at once
LONGEST = 2**20  # characters without a BOUNDARY that stay together
BOUNDARY = re.compile(r'(?<=\S)[ \n]')

# How byte-level vocabularies write bytes: printable ones as they are, the n-th other as chr(256 + n).
PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != ' ']
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
CHARACTERS = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(OTHERS)}


def build(kind, texts=(), vocab_size=None):
    """The data.Tokenizer of `kind`; `char` and `bpe` learn theirs from the iterable `texts`."""
    if kind == 'char':
        return data.Tokenizer(char(texts).to_str())
    if kind == 'bytes':
        return data.Tokenizer(byte_level({spell(bytes([byte])): byte for byte in range(256)}, []).to_str())
    if kind == 'gpt2':
        return data.Tokenizer(gpt2().to_str())
    if kind == 'bpe':
        return data.Tokenizer(bpe(texts, vocab_size).to_str())
    if not Path(kind).exists():
        raise UserError(
            f'--tokenizer={kind} is none of {", ".join(KINDS)}, nor is there a file or folder by '
            'that name; choose one of these, or give the path of a tokenizer.json, of a folder '
            'that holds one, or of a checkpoint.'
        )
    if Path(kind).suffix == '.pt' or (Path(kind) / 'ckpt.pt').is_file():
        return data.Tokenizer(checkpoints.load(kind, mmap=True)['tokenizer'])
    return data.Tokenizer.load(kind)


def char(texts):
    """One token per character that occurs, line ends among them."""
    vocab = {character: i for i, character in enumerate(sorted(set(chain.from_iterable(texts))))}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def bpe(texts, vocab_size):
    """Byte-level BPE trained on `texts`; with the special tokens it has at most `vocab_size` entries."""
    tokenizer = byte_level({}, [])
    parts = (text[i : i + PIECE] for text in texts for i in range(0, len(text), PIECE))  # no word is endless
    tokenizer.train_from_iterator(
        parts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(data.SPECIAL_TOKENS),
            min_frequency=2,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


def gpt2():
    """GPT-2's vocabulary from tiktoken; the merges, which tiktoken does not keep, follow from the ranks."""
    ranks = gpt2_encoding()._mergeable_ranks  # bytes of a token -> id; a lower id merges first
    merges = [split(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    return byte_level(
        {spell(token): i for token, i in ranks.items()},
        [(spell(left), spell(right)) for left, right in merges],
    )


def gpt2_encoding():
    """tiktoken's own, from its cache or the network."""
    try:
        return tiktoken.get_encoding('gpt2')
    except (OSError, ValueError) as error:  # no network; a download that was cut short
        raise UserError(
            f'The GPT-2 vocabulary could not be downloaded ({type(error).__name__}); connect to the network '
            'once, set TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer=bpe or the path of a '
            'tokenizer.json.'
        ) from error


def fast_gpt2(tokenizer):
    """
    The encode_batch of `tokenizer`, GPT-2's, through tiktoken: the same ids in arrays, four times as fast.

    What pieces() could not cut goes the slow way, for tiktoken's stack overflows on half a million spaces.
    """
    encode = partial(gpt2_encoding().encode_to_numpy, disallowed_special=())
    return lambda texts: [encode(text) if len(text) < 2 * PIECE else tokenizer.encode(text) for text in texts]


def split(token, ranks):
    """The two parts from which BPE makes `token`: its bytes, merged by rank until two are left."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        _, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def byte_level(vocab, merges):
    """A BPE over bytes with GPT-2's pattern of words; it can spell every text, and decoding restores it."""
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def spell(token):
    return ''.join(map(CHARACTERS.__getitem__, token))


def pieces(text, size=PIECE):
    """
    Cut a long text so that the pieces, encoded one by one with any of KINDS, give the ids of the whole.

    That holds before a space or line end that follows something else: in GPT-2's pattern no token continues
    there. Where no such place comes for LONGEST characters, the text is cut all the same, for the memory that
    a word takes is a hundred times its length; the ids around that cut may differ.
    """
    start = 0
    while len(text) - start > size:
        cut = BOUNDARY.search(text, start + size, start + LONGEST)
        end = cut.start() if cut else start + LONGEST
        if end >= len(text):
            break
        yield text[start:end]
        start = end
    yield text[start:]
