"""Attention masks and rotary positions."""

import math

import pytest
import torch
from conftest import random_model

from lm import optim
from lm.layers import AttentionMask, DocumentMask, ModelConfig, TwoStreams, make_norm, rope_table

SHAPE = dict(vocab_size=30, block_size=16, n_layer=1, n_head=2, n_embd=16, mask_id=28, ignore_id=29)
CAUSAL = torch.ones(16, 16, dtype=torch.bool).tril()


def visible(mask):
    """The mask (T, T) that a layer gets of a single row."""
    return mask.extend(None, None, None)[2][0, 0]


def test_documents_begin_at_position_0_and_do_not_see_each_other():
    doc_ids = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 1, 2, 2, 2, 2]])
    mask = DocumentMask(doc_ids, True)
    assert mask.positions(6).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]
    together = doc_ids[0, :, None] == doc_ids[0]
    assert torch.equal(visible(mask), together.tril())
    assert torch.equal(visible(DocumentMask(doc_ids, False)), together)


def test_on_the_way_from_ar_a_document_sees_what_is_visible_within_it():
    doc_ids = torch.tensor([0] * 5 + [1] * 7)[None]
    together = doc_ids[0, :, None] == doc_ids[0]
    annealed = optim.annealed_mask(2, 4, 12, seed=0)
    mask = visible(DocumentMask(doc_ids, annealed))
    assert torch.equal(mask, annealed & together)
    assert 0 < mask.triu(1).sum() < together.triu(1).sum()
    first = optim.annealed_mask(0, 4, 12, seed=0)
    assert torch.equal(visible(DocumentMask(doc_ids, first)), visible(DocumentMask(doc_ids, True)))


def test_without_documents_nothing_is_masked_but_what_follows():
    assert AttentionMask(True).extend(None, 1, 2) == (1, 2, None, True)
    assert AttentionMask(False).extend(None, 1, 2) == (1, 2, None, False)
    assert AttentionMask(CAUSAL).extend(None, 1, 2)[2:] == (CAUSAL, False)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_training_sees_the_annealed_mask_and_evaluation_everything(checkpointing):
    model = random_model('diffusion', 0.4, **SHAPE, gradient_checkpointing=checkpointing)
    tokens = torch.randint(0, 28, (3, 16), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 9] = (other[:, 9] + 1) % 28
    model.attn_mask = CAUSAL

    def changed():
        difference = (model.logits(tokens) - model.logits(other))[..., :28].abs().amax((0, 2))
        return (difference > 1e-5).tolist()

    model.train()
    assert changed() == [False] * 9 + [True] * 7
    model.eval()
    assert all(changed())


def test_scaled_rotary_frequencies_by_hand():
    plain = rope_table(100.0, 4, 8)  # frequencies 1 and 0.1
    linear = rope_table(100.0, 4, 8, {'rope_type': 'linear', 'factor': 2.0})
    torch.testing.assert_close(linear[:, ::2], plain[:, :4])
    scaling = dict(rope_type='llama3', factor=4.0, original_max_position_embeddings=20)
    angle = rope_table(100.0, 4, 2, scaling)[0, 1, :2].acos()  # of position 1
    turns = torch.tensor([20 / (2 * math.pi), 2 / (2 * math.pi)])  # in such a text: 3.2 and 0.3
    kept = ((turns - 1) / 3).clamp(0, 1)
    torch.testing.assert_close(
        angle, torch.tensor([1.0, 0.1]) * (kept + (1 - kept) / 4), atol=1e-4, rtol=1e-4
    )
    assert 0 < kept[0] < 1 and kept[1] == 0


def test_positions_stay_in_float32_where_weights_are_bfloat16():
    model = random_model('ar', 0.1, **SHAPE)
    before = model.rope.clone()
    assert torch.equal(model.bfloat16().rope, before)


@pytest.mark.faults
@pytest.mark.parametrize('norm', ['layer', 'rms_gain'])
def test_norms_keep_the_precision_of_the_residual_stream(norm):
    config = ModelConfig(vocab_size=9, n_head=2, n_embd=8, norm=norm, bias=True)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    whole, half = make_norm(config), make_norm(config).bfloat16()  # as a sharded model gathers its own
    assert torch.equal(half(x), whole(x)) and half(x.bfloat16()).dtype == torch.bfloat16


def beside_by_hand(streams, doc_ids, block_length, offset):
    """List what stands `offset` away from each position of two streams, numbers from 1 to 2T; 0 where nothing does."""
    length = len(doc_ids)
    starts = [doc_ids.index(doc) for doc in doc_ids]  # of each token's document
    blocks = [(start, (i - start) // block_length) for i, start in enumerate(starts)]
    expected = []
    for slot in [*streams.noisy.tolist(), *range(length, 2 * length)]:
        i, there = slot % length, slot % length + offset
        in_document = 0 <= there < length and doc_ids[there] == doc_ids[i]
        if slot < length and in_document and blocks[there] == blocks[i]:
            expected.append(1 + there)
        else:
            expected.append(1 + length + there if in_document and offset < 0 else 0)
    return expected


@pytest.mark.parametrize('offset', [-4, -1, 1, 2])
@pytest.mark.parametrize(
    'every, doc_ids', [(1, 10 * [0]), (2, 10 * [0]), (1, [0, 0, 0, 1, 1, 1, 1, 1, 1, 2])]
)
def test_a_noisy_token_stands_beside_its_block_and_the_clean_text_before_it(every, doc_ids, offset):
    tokens, several = torch.zeros(1, 10, dtype=torch.long), len(set(doc_ids)) > 1
    streams = TwoStreams(tokens, 3, torch.tensor([doc_ids]) if several else None, every, 0.5, neighbours=4)
    numbers = torch.cat([streams.noisy, torch.arange(10, 20)]) + 1.0  # of the positions of the streams
    (beside,) = streams.near(numbers[None, :, None], (offset,))
    found = 0 * numbers if beside is None else beside[0, :, 0]
    assert found.tolist() == beside_by_hand(streams, doc_ids, 3, offset)


@pytest.mark.parametrize('offset', [-4, -1, 1, 2])
def test_documents_of_a_row_do_not_stand_beside_each_other(offset):
    doc_ids = [0, 0, 0, 1, 1, 1, 2]
    for mask in (DocumentMask(torch.tensor([doc_ids]), False), DocumentMask(torch.tensor([doc_ids]), True)):
        (beside,) = mask.near(torch.arange(1.0, 8)[None, :, None], (offset,))
        there = [i + offset for i in range(7)]
        expected = [j + 1 if 0 <= j < 7 and mask.mask[0, 0, i, j] else 0 for i, j in enumerate(there)]
        assert beside[0, :, 0].tolist() == expected
