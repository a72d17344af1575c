"""Text comes back from its ids, and the tokenizers that are built agree with their models."""

import json
from itertools import islice

import pytest
import tiktoken
from conftest import SHARED, TIKTOKEN_CACHE, make_texts
from requests import ConnectionError
from tokenizers import AddedToken
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

import hf
from lm import tokenizer as tokenizers
from lm.configurator import UserError
from lm.tokenizer import IGNORE, MASK, Tokenizer, build

NASTY = "Äh… naïve  \r\n\t“日本語”\u200d👩‍🚀\x00 1234567 don't  \n\n\n stop!! <|endoftext|> <|mask|>   \n"


@pytest.mark.parametrize('kind', ['char', 'bytes', 'bpe'])
def test_decoding_restores_the_text_and_special_names_stay_text(kind):
    tokenizer = build(kind, [NASTY, *make_texts(50)], 400)
    assert tokenizer.decode(tokenizer.encode(NASTY)) == NASTY
    reloaded = Tokenizer(tokenizer.to_json())
    assert reloaded.encode(NASTY) == tokenizer.encode(NASTY)
    assert not {tokenizer.endoftext_id, tokenizer.mask_id} & set(reloaded.encode(NASTY))
    if kind == 'bytes':
        assert tokenizer.encode(NASTY) == list(NASTY.encode())


@pytest.mark.parametrize('alone', [True, False])
@pytest.mark.parametrize('template', ['<s> $A', '$A </s>', '<s> $A </s>'])
def test_a_tokenizer_that_puts_tokens_around_a_text_is_read(template, alone):
    inner = build('bytes', [], 300).inner
    inner.add_special_tokens(['<s>', '</s>'])
    ends = [(name, inner.token_to_id(name)) for name in ('<s>', '</s>')]
    own = TemplateProcessing(template, special_tokens=ends)
    inner.post_processor = own if alone else Sequence([own, ByteLevel(trim_offsets=False)])
    tokenizer = Tokenizer(inner.to_str(), end='</s>')
    for one in (tokenizer, Tokenizer(tokenizer.to_json())):
        assert one.endoftext_id == ends[1][1] and one.decode(one.encode(NASTY)) == NASTY
        assert len(one.inner.encode('a', 'b').ids) >= 2
        exported = hf.without_own_tokens(one.to_json(), 1000, {MASK, IGNORE})
        assert json.loads(exported)['post_processor'] == json.loads(inner.to_str())['post_processor']


@pytest.mark.parametrize('end', ['<|im_end|>', '<|endoftext|>'])
def test_an_end_that_is_no_special_token_is_none_that_a_user_can_type(end):
    plain = json.loads(build('bytes', [], 300).to_json()) | {'added_tokens': []}
    inner = tokenizers.tokenizers.Tokenizer.from_str(json.dumps(plain))
    inner.add_tokens([AddedToken(end, special=False)])
    tokenizer = Tokenizer(inner.to_str(), end=end)
    again = Tokenizer(tokenizer.to_json())  # as of an earlier version, where the text says the same
    assert tokenizer.to_json() == again.to_json()
    for one in (tokenizer, again):
        assert one.endoftext_id not in one.encode(f'a {end} b')
        assert one.decode([97, one.endoftext_id]) == 'a'


@pytest.mark.parametrize('kind', ['char', 'bytes', 'bpe'])
def test_pieces_give_the_ids_of_the_whole(kind, monkeypatch):
    texts = [NASTY * 20, ''.join(make_texts(30)), 'no-space-at-all' * 20, ' \n ' * 100]
    tokenizer = build(kind, texts, 400)
    for size in (1, 7, 64):
        monkeypatch.setattr(tokenizers, 'PIECE', size)
        for text in texts:
            pieces = list(tokenizers.pieces(text))
            assert ''.join(pieces) == text
            assert sum(tokenizer.encode_batch(pieces), []) == tokenizer.encode(text)


@pytest.mark.skipif(not TIKTOKEN_CACHE.is_dir(), reason=f'the GPT-2 vocabulary is not in {TIKTOKEN_CACHE}')
def test_gpt2_ids_are_tiktokens_both_ways_of_encoding(monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(TIKTOKEN_CACHE))
    tokenizer = build('gpt2')
    assert (tokenizer.endoftext_id, tokenizer.mask_id, tokenizer.vocab_size) == (50256, 50257, 50259)
    texts = make_texts(30) + [NASTY, 'a' + ' ' * 300_000 + 'b']
    if (SHARED / 'web.jsonl').exists():
        texts += [
            json.loads(line)['text'] for line in islice(open(SHARED / 'web.jsonl', encoding='utf-8'), 60)
        ]
    expected = tiktoken.get_encoding('gpt2').encode_ordinary_batch(texts)
    assert tokenizer.encode_batch(texts) == expected
    fast = tokenizers.fast_gpt2(tokenizer)(texts)
    assert all(list(ids) == known for ids, known in zip(fast, expected))


def test_gpt2_without_its_vocabulary_says_what_to_do(monkeypatch):
    def offline(name):
        raise ConnectionError('no network')

    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    with pytest.raises(UserError, match='could not be downloaded .ConnectionError.; .*TIKTOKEN_CACHE_DIR'):
        build('gpt2')


def test_a_character_that_is_unknown_is_named():
    with pytest.raises(UserError, match="'z' of 'az' is not in the vocabulary"):
        build('char', ['abc']).encode('az')


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match='There is no tokenizer at'):
        Tokenizer.load(tmp_path)
    (tmp_path / 'tokenizer.json').write_bytes(b'\xff{')
    with pytest.raises(UserError, match='tokenizer.json could not be read'):
        Tokenizer.load(tmp_path)
