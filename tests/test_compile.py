"""torch.compile sees the same few graphs in every step, whole, and computes the same."""

import pytest
import torch
from conftest import random_model
from helpers import special_ids
from torch._dynamo.utils import counters

from lm import data, optim, runtime
from lm.folder import Folder

pytestmark = pytest.mark.slow
STEPS = 20


def training_steps(model, folder, mode):
    """Return the losses of some steps, and after each how many graphs there are by then."""
    batches = data.Batches(folder, type(model), 32, 16, mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, graphs = [], []
    for step in range(STEPS):
        (batch,), count = batches.get(step)
        beliefs = optim.draw_beliefs(model, step, STEPS, 0, ((0.0, 0.7),), (1, 2, 4, 8), 0)
        loss, *_ = model(*batch, **beliefs)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        graphs.append(counters['stats']['unique_graphs'])
    return losses, graphs


def evaluate(model, folder, mode):
    rows = data.EvaluationBatches(folder, 'train', type(model), 32, 16, mode, max_tokens=3 * 16 * 32)
    runtime.evaluate(model, rows, runtime.Runtime('cpu', 'float32'))


@pytest.mark.faults
def test_rows_of_other_lengths_are_not_compiled_anew():
    torch._dynamo.reset()
    counters.clear()
    model = random_model('ar', 0.4, block_size=32, n_layer=1, n_head=2, n_embd=16, vocab_size=40)
    model.compile(backend='eager')
    for length in range(20, 32):
        model(torch.ones(2, length, dtype=torch.long))[0].backward()
    assert counters['stats']['unique_graphs'] <= 6, counters['stats']


@pytest.mark.parametrize(
    'architecture, mode', [('ar', 'packed'), ('diffusion', 'documents'), ('sdd', 'packed')]
)
def test_compiled_steps_have_no_graph_breaks_no_recompiles_and_the_same_loss(architecture, mode, make_folder):
    folder = Folder(make_folder())
    torch._dynamo.reset()
    counters.clear()
    shape = dict(block_size=32, n_layer=1, n_head=2, n_embd=16, **special_ids(folder.tokenizer))
    model, plain = (random_model(architecture, 0.4, **shape) for _ in range(2))
    model.compile(backend='eager')
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # it would fall back in silence
        evaluate(model, folder, mode)
        losses, graphs = training_steps(model, folder, mode)
        evaluate(model, folder, mode)
    assert not counters['graph_break'], dict(counters['graph_break'])
    assert graphs[0] >= 2 and graphs[STEPS // 2] == graphs[-1], graphs
    assert losses == pytest.approx(training_steps(plain, folder, mode)[0], rel=1e-4)
