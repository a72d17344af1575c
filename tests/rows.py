"""Rows and batches of a prepared folder, as tests read them."""

from types import SimpleNamespace

import torch

from lm import data
from model import ARCHITECTURES


def rank(rank, world_size):
    return SimpleNamespace(rank=rank, world_size=world_size, device=torch.device('cpu'))


def batches(folder, architecture='ar', batch_size=4, micro_steps=1, seed=0, mode='packed', dist=data.LOCAL):
    return data.Batches(folder, ARCHITECTURES[architecture], 16, batch_size, micro_steps, seed, mode, dist)


def make_rows(folder, architecture, block_size=16, mode='packed', split='train', training=True):
    return data.make_rows(folder, split, ARCHITECTURES[architecture], block_size, mode, training)


def rows_of_step(folder, step, ranks=1, micro_steps=1, **settings):
    """The rows of a global step in their order, as (tokens, loss_mask, noise), whoever reads them."""
    parts = [
        batches(folder, micro_steps=micro_steps, dist=rank(number, ranks), **settings).read(step)[0]
        for number in range(ranks)
    ]
    in_order = [parts[number][i] for i in range(micro_steps) for number in range(ranks)]
    return [
        tuple(None if x is None else tuple(x[row].tolist()) for x in batch[:3])
        for batch in in_order
        for row in range(len(batch.tokens))
    ]


def evaluation_batches(folder, architecture, batch_size=3, mode='packed', max_tokens=0, dist=data.LOCAL):
    return data.EvaluationBatches(
        folder, 'val', ARCHITECTURES[architecture], 16, batch_size, mode, max_tokens, dist
    )


def evaluated(folder, architecture, ranks=1, **settings):
    """Each row of the validation split as (tokens, loss_mask, noise), over all ranks."""
    return [
        tuple(None if x is None else x[row] for x in batch[:3])
        for number in range(ranks)
        for batch in evaluation_batches(folder, architecture, dist=rank(number, ranks), **settings)
        for row in range(len(batch.tokens))
        if batch.loss_mask is None or batch.loss_mask[row].any()  # a rank may have none that counts
    ]
