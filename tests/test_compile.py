"""torch.compile sees the same few graphs in every step, whole, and the device is never asked what is where."""

import pytest
import torch
from conftest import random_model
from torch._dynamo.utils import counters

from lm import data, runtime
from model import ARCHITECTURES

pytestmark = pytest.mark.slow

MASK, IGNORE = 10, 9
SHAPE = dict(vocab_size=11, block_size=32, n_layer=1, n_head=2, n_embd=16, mask_id=MASK, ignore_id=IGNORE)


def training_steps(model, architecture, folder, padded, steps, mode='packed'):
    """The losses of some steps, and after each how many graphs there are by then."""
    batches = data.Batches(folder, architecture, 32, 16, mode=mode, predicted=model.predicted, padded=padded)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, graphs = [], []
    for step in range(steps):
        (batch,), count = batches.get(step)
        beliefs = (
            data.draw_belief(step, steps, 0, ((0.0, 0.7),), (1, 2, 4, 8), 0) if architecture == 'sdd' else {}
        )
        loss, *_ = model(*batch, **beliefs)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        graphs.append(counters['stats']['unique_graphs'])
    return losses, graphs


def evaluate(model, architecture, folder):
    rows = data.evaluation_batches(folder, 'train', architecture, 32, 16, num_batches=3)
    runtime.evaluate(model, rows, runtime.Runtime('cpu', 'float32'), 1.0)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_compiled_steps_have_no_graph_breaks_and_no_recompiles(architecture, make_folder):
    folder = data.Folder(make_folder())
    torch._dynamo.reset()
    counters.clear()
    shape = {
        **SHAPE,
        'vocab_size': folder.tokenizer.vocab_size,
        'mask_id': folder.tokenizer.mask_id,
        'ignore_id': folder.tokenizer.ignore_id,
    }
    model = random_model(architecture, 0.4, **shape)
    plain = random_model(architecture, 0.4, **shape)
    model.compile(backend='eager')
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # it would fall back in silence
        evaluate(model, architecture, folder)
        losses, graphs = training_steps(model, architecture, folder, True, 30)
        evaluate(model, architecture, folder)
    assert not counters['graph_break'], dict(counters['graph_break'])
    assert graphs[0] >= 2 and graphs[15] == graphs[-1], graphs
    expected, _ = training_steps(plain, architecture, folder, False, 30)
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('mode', ['packed', 'documents'])
def test_positions_that_come_with_the_batch_change_nothing(architecture, mode, make_folder):
    folder = data.Folder(make_folder())
    model = random_model(
        architecture,
        0.4,
        **{
            **SHAPE,
            'vocab_size': folder.tokenizer.vocab_size,
            'mask_id': folder.tokenizer.mask_id,
            'ignore_id': folder.tokenizer.ignore_id,
        },
    )
    found, lengths = [], set()
    for options in ({}, {'predicted': model.predicted}, {'predicted': model.predicted, 'padded': True}):
        batches = data.Batches(folder, architecture, 32, 16, mode=mode, **options)
        for step in range(3):
            (batch,), _ = batches.get(step)
            if options.get('padded') and batch[4] is not None:
                lengths.add(len(batch[4]))
            model.zero_grad()
            loss, count, metrics = model(*batch)
            loss.backward()
            found.append(
                (
                    loss.item(),
                    count.item(),
                    {name: value.item() for name, value in metrics.items()},
                    model.embedding.weight.grad.clone(),
                )
            )
    for one, *others in zip(found[:3], found[3:6], found[6:]):
        for other in others:
            assert one[:3] == other[:3]  # bit by bit
            torch.testing.assert_close(one[3], other[3])
    assert len(lengths) <= 1 if mode == 'packed' else len(lengths) <= 3
