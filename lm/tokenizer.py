"""Text to token ids and back: native tokenizers and those of pretrained models, one text of JSON each."""

import json
from pathlib import Path

import tokenizers

from lm.configurator import UserError

ENDOFTEXT = '<|endoftext|>'  # ends each document
MASK = '<|mask|>'  # a position that a diffusion model has to fill
IGNORE = '<|ignore|>'  # filler that a bidirectional model predicts and that decodes to nothing
SPECIAL_TOKENS = (ENDOFTEXT, MASK, IGNORE)


class Tokenizer:
    """Text to token ids and back; the text of a `tokenizer.json` is its whole state.

    The special tokens that the text lacks are appended to its vocabulary. Text that merely
    contains the name of a special token is never encoded as that token. `end`: the name or id of the token
    that is <|endoftext|> in a pretrained vocabulary; the text remembers it.
    """

    def __init__(self, json_text, name='The tokenizer', end=None):
        if json_text is None:
            raise UserError(
                'This model came without a tokenizer.json, so it can neither read nor write text; put one '
                'into its folder and import it again.'
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f'{name} could not be read ({error}); '
                'give a tokenizer.json in the format of the tokenizers library.'
            ) from error
        remembered = remembered_end(self._tokenizer)
        end = self._tokenizer.token_to_id(end) if isinstance(end, str) else end
        if remembered is None and end not in (None, self._tokenizer.token_to_id(ENDOFTEXT)):
            remember_end(self._tokenizer, end)
            remembered = end
        self._tokenizer.add_special_tokens(
            [
                token
                for token in SPECIAL_TOKENS
                if self._tokenizer.token_to_id(token) is None
                and not (token == ENDOFTEXT and remembered is not None)
            ]
        )
        self._tokenizer.encode_special_tokens = True  # not part of the JSON text: set at every load
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.endoftext_id, self.mask_id, self.ignore_id = map(self._tokenizer.token_to_id, SPECIAL_TOKENS)
        self.endoftext_id = self.endoftext_id if remembered is None else remembered
        self.special_ids = {
            token.content: i
            for i, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }  # by name
        # A character vocabulary is the only one that cannot spell every text.
        is_char = isinstance(self._tokenizer.model, tokenizers.models.WordLevel)
        self._characters = set(self._tokenizer.get_vocab(with_added_tokens=False)) if is_char else None

    @classmethod
    def load(cls, path):
        """From a `tokenizer.json`, or a folder that holds one: a prepared one, or Hugging Face's."""
        path = Path(path)
        folder, path = (path, path / 'tokenizer.json') if path.is_dir() else (path.parent, path)
        end = pretrained_token(folder, 'eos')
        if not path.is_file() and (folder / 'merges.txt').is_file() and (folder / 'vocab.json').is_file():
            return cls(text_of_pair(folder), folder, end)
        if not path.is_file():
            raise UserError(f'There is no tokenizer at {path}; give a tokenizer.json or a prepared folder.')
        return cls(
            path.read_text(encoding='utf-8', errors='surrogateescape'), path, end
        )  # no UTF-8: refused there

    def to_json(self):
        return self._tokenizer.to_str()

    def encode(self, text):
        """Token ids of `text`, with nothing added before or after it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        if self._characters is not None:
            unknown = sorted(set().union(*texts) - self._characters)
            if unknown:
                raise UserError(
                    f'The character {unknown[0]!r} is not in the vocabulary of this character '
                    'tokenizer; leave it out, or prepare the data with --tokenizer=bytes or bpe.'
                )
        return [
            encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def offsets(self, text):
        """Where each token that `encode` gives stands in the text: (first character, the one after its last)."""
        return self._tokenizer.encode(text, add_special_tokens=False).offsets

    @property
    def own_start(self):
        """Ids that a pretrained tokenizer puts before a text by itself; `encode` leaves that to its caller."""
        return self._tokenizer.encode('', add_special_tokens=True).ids

    def id_of(self, token):
        return self._tokenizer.token_to_id(token)

    def name_of(self, token_id):
        return self._tokenizer.id_to_token(token_id)

    @property
    def joins_spaces(self):
        """Whether a word's token begins with the space before it."""
        return self._characters is None and len(self.encode(' a')) == 1

    def decode(self, ids, show_special=False):
        """The text of `ids`; special tokens decode to nothing, or to their names."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=not show_special)


# ---------------------------------------------------------------------------- of pretrained models


def text_of_pair(folder):
    """The text of a tokenizer.json for vocab.json and merges.txt, the older form, in which OPT's still is."""
    try:
        model = tokenizers.models.BPE.from_file(str(folder / 'vocab.json'), str(folder / 'merges.txt'))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(
            f'vocab.json and merges.txt of {folder} could not be read ({error}); download them again.'
        ) from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            token
            for token in ('<s>', '<pad>', '</s>', '<unk>', ENDOFTEXT)
            if tokenizer.token_to_id(token) is not None
        ]
    )
    return tokenizer.to_str()


def remember_end(tokenizer, end):
    """Writes into a tokenizer that the token with the id `end` is <|endoftext|>, where its format has a place for
    names of special tokens: a template that adds nothing to a text."""
    template = tokenizers.processors.TemplateProcessing(
        single='$A', pair='$A $B:1', special_tokens=[(ENDOFTEXT, end)]
    )
    own = [] if tokenizer.post_processor is None else [tokenizer.post_processor]
    tokenizer.post_processor = tokenizers.processors.Sequence([*own, template])


def remembered_end(tokenizer):
    """The id that remember_end wrote, or None."""
    return (
        None
        if tokenizer.post_processor is None
        else end_in(json.loads(tokenizer.post_processor.__getstate__()))
    )


def end_in(post_processor):
    """The same for the post_processor of a tokenizer.json."""
    *_, last = (post_processor or {}).get('processors') or [{}]
    names = last.get('special_tokens', {}) if last.get('type') == 'TemplateProcessing' else {}
    return names[ENDOFTEXT]['ids'][0] if list(names) == [ENDOFTEXT] and len(last['single']) == 1 else None


def pretrained_token(folder, kind):
    """The name or id of the 'bos' or 'eos' token of a Hugging Face folder; None where it says none."""
    for name, key in (
        ('tokenizer_config.json', f'{kind}_token'),
        ('special_tokens_map.json', f'{kind}_token'),
        ('config.json', f'{kind}_token_id'),
    ):
        try:
            token = json.loads((folder / name).read_text(encoding='utf-8')).get(key)
        except (OSError, ValueError, AttributeError):  # no such file, or no JSON object: nothing is said
            continue
        token = token.get('content') if isinstance(token, dict) else token
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, (str, int)):
            return token
    return None
