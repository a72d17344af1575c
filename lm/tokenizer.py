"""Text to token ids and back: tokenizers built here and those of pretrained models, each one JSON text."""

import json
import re
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lm.configurator import UserError, require
from lm.files import as_sentence

ENDOFTEXT = '<|endoftext|>'  # ends each document
MASK = '<|mask|>'  # a position that a diffusion model has to fill
IGNORE = '<|ignore|>'  # padding that a bidirectional model predicts and that decodes to nothing
SPECIAL_TOKENS = (ENDOFTEXT, MASK, IGNORE)
STARTOFTEXT = '<|startoftext|>'  # before a text, of a tokenizer that has a token of its own for it
DIFFUSION_FAMILIES = ('llada', 'Dream', 'a2d-qwen2', 'a2d-qwen3')  # of lm/families.py
KINDS = ('char', 'bytes', 'gpt2', 'bpe')  # what `build` builds


class Tokenizer:
    """Encode text to token ids and decode them; the text of a `tokenizer.json` is the whole state.

    Special tokens that it lacks are appended. Text that contains the name of a special token is never encoded as
    that token. `end`: the name or id of what serves as <|endoftext|> in a pretrained vocabulary; it is recorded.
    `start`: the same of what stands before a text, `start_id`; by default what the tokenizer puts there, or the end.
    `mask`: the same of <|mask|>, where a released diffusion model has one; as it was trained, the end is its padding.
    """

    def __init__(self, json_text, name='The tokenizer', end=None, start=None, mask=None):
        require(json_text is not None, 'This model came without a tokenizer.json; import it again with one.')
        with as_sentence(f'{name} could not be read', 'give a tokenizer.json'):
            inner = tokenizers.Tokenizer.from_str(json_text)
            ids = recorded_in(json.loads(json_text).get('post_processor'))
            end, start, mask = (known_id(inner, token) for token in (end, start, mask))
            told = {ENDOFTEXT: end, STARTOFTEXT: start, MASK: mask} if mask is not None else {ENDOFTEXT: end}
            if not ids and (mask is not None or end not in (None, inner.token_to_id(ENDOFTEXT))):
                ids = {token: i for token, i in told.items() if i is not None}
                record(inner, ids)
            needed = [token for token in SPECIAL_TOKENS[: 2 if MASK in ids else 3] if token not in ids]
            self.added = [token for token in needed if inner.token_to_id(token) is None]
            inner.add_special_tokens(self.added)
            inner.encode_special_tokens = True  # not part of the JSON text: set at every load
            inner.no_truncation()
            inner.no_padding()
            self._json = inner.to_str()
            serving = {*ids.values(), *map(inner.token_to_id, SPECIAL_TOKENS), end, start}
            added = inner.get_added_tokens_decoder().items()
            plain = [token.content for i, token in added if i in serving and not token.special]
            inner.add_special_tokens(plain)  # not in the text either: no user can type them

            self.inner = inner  # a tokenizers.Tokenizer
            self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
            self.endoftext_id, self.mask_id = (ids.get(x, inner.token_to_id(x)) for x in (ENDOFTEXT, MASK))
            self.ignore_id = self.endoftext_id if MASK in ids else inner.token_to_id(IGNORE)
            added = inner.get_added_tokens_decoder().items()
            self.special_ids = {token.content: i for i, token in added if token.special}  # by name
            told = [i for i in (start, ids.get(STARTOFTEXT)) if i in self.special_ids.values()]
            self.start_id = [*told, *inner.encode('').ids, self.endoftext_id][0]
            # A character vocabulary is the only one that cannot spell every text.
            is_char = isinstance(inner.model, models.WordLevel)
            self._characters = set(inner.get_vocab(with_added_tokens=False)) if is_char else None

    @classmethod
    def load(cls, path):
        """Load a `tokenizer.json`, or that of a folder: a prepared one, or Hugging Face's."""
        path = Path(path)
        folder, path = (path, path / 'tokenizer.json') if path.is_dir() else (path.parent, path)
        told = pretrained_tokens(folder)
        if not path.is_file() and (folder / 'merges.txt').is_file():
            return cls(json_of_pair(folder), folder, *told)
        require(path.is_file(), f'There is no tokenizer at {path}; give a tokenizer.json or its folder.')
        # What is no UTF-8 is no JSON either, which the library says:
        return cls(path.read_text(encoding='utf-8', errors='surrogateescape'), path, *told)

    def to_json(self):
        return self._json

    @cached_property
    def takes_pieces(self):
        """Say whether the `pieces` of a text have the ids of the whole: of characters, and of GPT-2's word pattern."""
        parts, own = json.loads(self.to_json()), json.loads(byte_level({}, []).to_str())['pre_tokenizer']
        splits = parts['pre_tokenizer'] or {}
        splits = [one for one in splits.get('pretokenizers', [splits]) if one.get('type') != 'Digits']
        is_plain = not parts['normalizer'] and all(token['special'] for token in parts['added_tokens'])
        return self._characters is not None or is_plain and splits == [own]

    def encode(self, text):
        """Return the token ids of `text`, with nothing added before or after it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """Return the token ids of each text; raise UserError for a character that the vocabulary lacks."""
        for text in texts if self._characters is not None else ():
            if unknown := sorted(set(text) - self._characters):
                place = text.index(unknown[0])
                near = text[max(0, place - 20) : place + 20]
                problem = f'The character {unknown[0]!r} of {near!r} is not in the vocabulary'
                raise UserError(f'{problem}; leave it out, or prepare data with --tokenizer=bytes or bpe.')
        return [row.ids for row in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_behind(self, text, is_text=True):
        """Return the token ids of a text that stands behind another, or (is_text=False) behind a special token: without
        what some tokenizers, as SentencePiece's, put before the first word of a text."""
        if self._characters is not None or not (is_text or self.unprefixed[1]):
            return self.encode(text)
        return self.unprefixed[0].encode(text, add_special_tokens=False).ids

    @cached_property
    def unprefixed(self):
        """The tokenizers.Tokenizer that puts nothing there, and whether this one does so behind a special token too."""
        parts = json.loads(self.inner.to_str())
        schemes = []

        def strip(part):
            for name in {'normalizers', 'pretokenizers'} & part.keys():
                part[name] = [one for one in map(strip, part[name]) if one]
            if 'prepend_scheme' in part:
                schemes.append(part['prepend_scheme'])
                part['prepend_scheme'] = 'never'
            if part.get('type') == 'ByteLevel':
                part['add_prefix_space'] = False
            return None if part.get('type') == 'Prepend' else part

        parts |= {name: strip(parts[name]) for name in ('normalizer', 'pre_tokenizer') if parts[name]}
        inner = tokenizers.Tokenizer.from_str(json.dumps(parts))
        inner.encode_special_tokens = True
        return inner, 'first' in schemes

    @property
    def joins_spaces(self):
        """True where a word's token begins with the space before it."""
        return self._characters is None and len(self.encode_behind(' a')) == 1

    def decode(self, ids, show_special=False):
        """Return the text of `ids`; special tokens decode to nothing, or to their names."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=not show_special)


PIECE = 2**16  # characters that are encoded at once
LONGEST = 2**20  # characters without a BOUNDARY that stay together
QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
QWEN_WORDS += r'|\s*[\r\n]+|\s+(?!\S)|\s+'
BOUNDARY = re.compile(r'(?<=\S)[ \n]')
GPT2_FILES = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'

# How byte-level vocabularies write bytes: printable ones as they are, the n-th other as chr(256 + n).
PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != ' ']
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
CHARACTERS = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(OTHERS)}


def build(kind, texts=(), vocab_size=None):
    """Return the Tokenizer of one of KINDS; `char`, of the characters that occur, and `bpe`, of at most
    `vocab_size` entries with the special tokens, learn theirs from the iterable `texts`."""
    if kind == 'char':
        vocab = {character: i for i, character in enumerate(sorted(set(chain.from_iterable(texts))))}
        inner = tokenizers.Tokenizer(models.WordLevel(vocab))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        inner.decoder = decoders.Fuse()
    elif kind == 'bpe':
        inner, size = byte_level({}, []), vocab_size - len(SPECIAL_TOKENS)
        parts = (text[i : i + PIECE] for text in texts for i in range(0, len(text), PIECE))  # none is endless
        options = dict(min_frequency=2, show_progress=False, initial_alphabet=list(CHARACTERS.values()))
        inner.train_from_iterator(parts, trainers.BpeTrainer(vocab_size=size, **options))
    elif kind == 'gpt2':
        inner = gpt2()
    else:
        inner = byte_level({CHARACTERS[byte]: byte for byte in range(256)}, [])
    return Tokenizer(inner.to_str())


def byte_level(vocab, merges):
    """Return a BPE over bytes with GPT-2's word pattern: it encodes every text without loss."""
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def gpt2():
    """Return GPT-2's tokenizer, of the two files that tiktoken downloads, checks and keeps."""
    from tiktoken.load import read_file_cached

    gpt2_encoding()
    vocab = json.loads(read_file_cached(GPT2_FILES + 'encoder.json'))
    merges = read_file_cached(GPT2_FILES + 'vocab.bpe').decode().split('\n')[1:-1]  # after the version
    del vocab[ENDOFTEXT]  # becomes a special token, of the same id
    return byte_level(vocab, [tuple(line.split(' ')) for line in merges])


def gpt2_encoding():
    """Return tiktoken's own encoding, from its cache or the network."""
    import tiktoken  # only where it is wanted

    try:
        return tiktoken.get_encoding('gpt2')
    except (OSError, ValueError) as error:  # no network; a download that was cut short
        problem = f'The GPT-2 vocabulary could not be downloaded ({type(error).__name__})'
        raise UserError(f'{problem}; give a TIKTOKEN_CACHE_DIR that holds it, or --tokenizer=bpe.') from error


def fast_gpt2(tokenizer):
    """Return an encode_batch for GPT-2's `tokenizer` through tiktoken: the same ids, four times as fast. What
    pieces() could not cut goes the slow way: tiktoken's stack overflows on half a million spaces."""
    encode = partial(gpt2_encoding().encode_to_numpy, disallowed_special=())
    return lambda texts: [encode(text) if len(text) < 2 * PIECE else tokenizer.encode(text) for text in texts]


def pieces(text):
    """Cut a long text into pieces that, encoded one by one where `takes_pieces`, give the ids of the whole.

    In GPT-2's pattern no token continues at a BOUNDARY. Where none comes for LONGEST characters, the text is cut all
    the same, because encoding a word takes a hundred times its length in memory; the ids around that cut may differ.
    """
    start = 0
    while len(text) - start > PIECE:
        boundary = BOUNDARY.search(text, start + PIECE, start + LONGEST)
        end = boundary.start() if boundary else start + LONGEST
        if end >= len(text):
            break
        yield text[start:end]
        start = end
    yield text[start:]


def json_of_pair(folder):
    """Return a tokenizer.json's text made of vocab.json and merges.txt, the older form (OPT's)."""
    with as_sentence(f'The tokenizer of {folder} could not be read', 'download it again'):
        tokenizer = byte_level(*models.BPE.read_file(f'{folder}/vocab.json', f'{folder}/merges.txt'))
        special = ('<s>', '<pad>', '</s>', '<unk>', ENDOFTEXT)
        tokenizer.add_special_tokens([token for token in special if tokenizer.token_to_id(token) is not None])
        settings = settings_of(folder, 'tokenizer_config.json')
        if settings.get('tokenizer_class') in ('DreamTokenizer', 'Qwen2Tokenizer'):
            words = pre_tokenizers.Split(Regex(QWEN_WORDS), 'isolated')
            parts = [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizers.Sequence(parts), normalizers.NFC()

        added = {i: (token, True) for token, i in settings_of(folder, 'added_tokens.json').items()}
        for i, token in settings.get('added_tokens_decoder', {}).items():  # the newer form
            added[int(i)] = token['content'], token['special']
        for i, (token, is_special) in sorted(added.items()):
            tokenizer.add_tokens([AddedToken(token, special=is_special, normalized=False)])
            require(tokenizer.token_to_id(token) == i, f'{token} of {folder} cannot be token {i}.')
        return tokenizer.to_str()


def known_id(tokenizer, token):
    """Return the id of a token given by its name or id; None where the vocabulary lacks it."""
    token = tokenizer.token_to_id(token) if isinstance(token, str) else token
    is_id = type(token) is int and 0 <= token < 2**31
    return token if is_id and tokenizer.id_to_token(token) is not None else None


def record(tokenizer, ids):
    """Record which ids serve as our special tokens, {token: id}, in a template that adds nothing to a text."""
    template = processors.TemplateProcessing(single='$A', pair='$A $B:1', special_tokens=[*ids.items()])
    own = [] if tokenizer.post_processor is None else [tokenizer.post_processor]
    state = json.loads(own[0].__getstate__()) if own else {}
    kinds = {part.get('type') for part in state.get('processors') or [state]}
    # A template that stands behind another, of two tokens, panics.
    is_first = 'TemplateProcessing' in kinds and len(tokenizer.encode('').ids) > 1
    tokenizer.post_processor = processors.Sequence([template, *own] if is_first else [*own, template])


def recorded_in(post_processor):
    """Return what `record` recorded in the post_processor of a tokenizer.json, {} where there is nothing."""
    parts = (post_processor or {}).get('processors') or []
    names = next((part['special_tokens'] for part in reversed(parts) if is_record(part)), {})
    return {token: names[token]['ids'][0] for token in names}


def is_record(part):
    """Say whether a part of a post_processor is the template of `record`."""
    is_template = part.get('type') == 'TemplateProcessing' and len(part.get('single', ())) == 1
    return is_template and part.get('special_tokens', {}).keys() <= {ENDOFTEXT, STARTOFTEXT, MASK}


def pretrained_token(folder, kind):
    """Return the name or id of the 'bos', 'eos' or 'pad' token of a Hugging Face folder; None where none is given."""
    keys = {'tokenizer_config.json': 'token', 'special_tokens_map.json': 'token', 'config.json': 'token_id'}
    for name, key in keys.items():
        token = settings_of(folder, name).get(f'{kind}_{key}')
        token = token.get('content') if isinstance(token, dict) else token
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, (str, int)):
            return token


def pretrained_tokens(folder):
    """Return the names or ids of the end of a text, of what is before it and of the mask, as a folder of ours or of
    Hugging Face's says, None for what it does not say. What an `ar` model calls its mask is none."""
    config, settings = (settings_of(folder, name) for name in ('config.json', 'tokenizer_config.json'))
    mask = pretrained_token(folder, 'mask') if config.get('model_type') in DIFFUSION_FAMILIES else None
    jinja = folder / 'chat_template.jinja'
    template = jinja.read_text('utf-8', 'replace') if jinja.is_file() else str(settings.get('chat_template'))
    # Diffusion models are trained with it.
    adds_bos = mask is not None or settings.get('add_bos_token') or 'bos_token' in template
    bos = pretrained_token(folder, 'bos') if adds_bos else None
    return pretrained_token(folder, 'eos'), config.get('start_token', bos), mask


def settings_of(folder, name):
    """Return the JSON object in a file of a folder; {} where there is none."""
    try:
        content = json.loads((folder / name).read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
