"""Prepared folders: their tokenizer, their memory maps, their batches."""
from pathlib import Path

import tokenizers

from configurator import UserError

ROOT = Path(__file__).resolve().parent

ENDOFTEXT = '<|endoftext|>'  # ends each document
MASK = '<|mask|>'            # a position that a diffusion model has to fill
IGNORE = '<|ignore|>'        # filler that a bidirectional model predicts and that decodes to nothing
SPECIAL_TOKENS = (ENDOFTEXT, MASK, IGNORE)


# ---------------------------------------------------------------------------- tokenizer

class Tokenizer:
    """Text to token ids and back; the text of a `tokenizer.json` is its whole state.

    The special tokens that the text lacks are appended to its vocabulary. Text that merely
    contains the name of a special token is never encoded as that token.
    """

    def __init__(self, json_text):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f'The tokenizer could not be read ({error}); '
                            'give a tokenizer.json in the format of the tokenizers library.') from error
        self._tokenizer.add_special_tokens(
            [token for token in SPECIAL_TOKENS if self._tokenizer.token_to_id(token) is None])
        self._tokenizer.encode_special_tokens = True  # not part of the JSON text: set at every load
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.endoftext_id, self.mask_id, self.ignore_id = map(self._tokenizer.token_to_id, SPECIAL_TOKENS)
        # A character vocabulary is the only one that cannot spell every text.
        is_char = isinstance(self._tokenizer.model, tokenizers.models.WordLevel)
        self._characters = set(self._tokenizer.get_vocab(with_added_tokens=False)) if is_char else None

    @classmethod
    def load(cls, path):
        """From a `tokenizer.json` or a folder that holds one."""
        path = Path(path)
        path = path / 'tokenizer.json' if path.is_dir() else path
        if not path.is_file():
            raise UserError(f'There is no tokenizer at {path}; give a tokenizer.json or a prepared folder.')
        return cls(path.read_text(encoding='utf-8'))

    def to_json(self):
        return self._tokenizer.to_str()

    def encode(self, text):
        """Token ids of `text`, with nothing added before or after it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        if self._characters is not None:
            unknown = sorted(set().union(*texts) - self._characters)
            if unknown:
                raise UserError(f'The character {unknown[0]!r} is not in the vocabulary of this character '
                                'tokenizer; leave it out, or prepare the data with --tokenizer=bytes or bpe.')
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids):
        """The text of `ids`; special tokens decode to nothing."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
