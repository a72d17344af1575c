"""The losses: their bounds, enumerated; their memory; and what a newcomer changes in them."""

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from conftest import random_model
from test_model import MASK, SHAPE, assert_same, gradients, hiding, some_noise, some_tokens, tiny

import model as model_module
from model import ARCHITECTURES, Diffusion, ModelConfig

# ---------------------------------------------------------------------------- the bound, enumerated

LENGTH, LETTERS = 3, 3  # what follows the given first token: 27 texts


def toy_joint():
    """(27, 1 + 3) rows and their probabilities (27,): the last letter is most often the sum of the others."""
    texts = torch.tensor(list(product(range(LETTERS), repeat=LENGTH)))
    likely = (texts[:, 2] == (texts[:, 0] + texts[:, 1]) % LETTERS).double()
    p = (0.05 + 0.9 * likely) * torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)[texts[:, 0]]
    return torch.cat([torch.zeros(len(texts), 1, dtype=torch.long), texts], 1), p / p.sum()


def toy_model(**changes):
    return tiny('diffusion', vocab_size=LETTERS + 1, mask_id=LETTERS, ignore_id=None, block_size=4, **changes)


@torch.no_grad()
def exact_bound(model, rows):
    """The model's NELBO (B,): Gauss-Legendre over the level (a polynomial), all choices of what is hidden."""
    total = torch.zeros(len(rows), dtype=torch.float64)
    nodes, weights = np.polynomial.legendre.leggauss(4)
    for u, du in zip((nodes + 1) / 2, weights / 2):
        level = torch.full((len(rows), 1), u, dtype=torch.float32)
        t = model.mask_ratio(level).double()[0, 0]
        for choice in product((0, 1), repeat=LENGTH):
            masked = torch.tensor((0, *choice)).expand(len(rows), -1)
            chance = t ** sum(choice) * (1 - t) ** (LENGTH - sum(choice))
            total += du * chance * model.nll(rows, None, hiding(masked, level)).double()
    return total


@torch.no_grad()
def chain_rule(model, rows, order):
    """-log p (B,) when the positions are filled one by one in this order."""
    canvas, nats = rows.clone(), torch.zeros(len(rows), dtype=torch.float64)
    canvas[:, 1:] = model.config.mask_id
    for i in order:
        log_p = model.logits(canvas)[:, i].double().log_softmax(-1)
        nats -= log_p.gather(1, rows[:, i : i + 1]).squeeze(1)
        canvas[:, i] = rows[:, i]
    return nats


def test_bound_is_the_mean_over_all_orders_of_the_chain_rule(monkeypatch):
    monkeypatch.setattr(model_module, 'T_MIN', 0.0)
    model, (rows, _) = toy_model(), toy_joint()
    orders = torch.stack([chain_rule(model, rows, order) for order in permutations(range(1, 1 + LENGTH))])
    bound = exact_bound(model, rows)
    torch.testing.assert_close(bound, orders.mean(0), atol=1e-4, rtol=1e-5)
    likelihood = -(torch.logsumexp(-orders, 0) - math.log(len(orders)))  # of the mixture over orders
    assert (orders.std(0) > 1e-3).any()
    assert (bound >= likelihood - 1e-6).all() and (bound > likelihood + 1e-3).any()


def test_draws_of_the_bound_are_unbiased():
    model, (rows, _) = toy_model(), toy_joint()
    row = rows[14:15].expand(60000, -1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(60000, 5, generator=generator)
    noise[:, 0] = (torch.arange(60000) + noise[:, 0]) / 60000  # stratified levels
    with torch.no_grad():
        draws = model.nll(row, None, noise).double()
    assert abs(draws.mean() - exact_bound(model, rows[14:15])) < 4 * draws.std() / 60000**0.5
    assert draws.std() / 60000**0.5 < 0.05


# ---------------------------------------------------------------------------- memory


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_logits_in_chunks_give_the_same_loss_and_gradient(architecture, monkeypatch):
    model, tokens = tiny(architecture), some_tokens()
    batch = tokens, None, some_noise(tokens)
    whole = model(*batch)
    expected = gradients(model, whole[0])
    monkeypatch.setattr(model_module, 'LOGITS_PER_CHUNK', 5 * 64)
    chunked = model(*batch)
    torch.testing.assert_close(chunked[0], whole[0])
    assert chunked[2] == whole[2]
    assert_same(gradients(model, chunked[0]), expected, 1e-4)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('dropout', [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(architecture, dropout):
    tokens, found = some_tokens(), []
    for checkpointing in (False, True):
        model = tiny(architecture, dropout=dropout, gradient_checkpointing=checkpointing).train()
        torch.manual_seed(1)
        loss = model(tokens, None, some_noise(tokens))[0]
        found.append((loss.detach(), gradients(model, loss)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    assert_same(found[0][1], found[1][1], 1e-6)


def test_gradient_checkpointing_keeps_less():
    kept = []
    for checkpointing in (False, True):
        model, sizes = tiny('ar', n_layer=6, gradient_checkpointing=checkpointing).train(), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x
        ):
            model(some_tokens())
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


# ---------------------------------------------------------------------------- a newcomer's edits


class Weighted(Diffusion):
    """Twice the weight on every second position."""

    def loss_weights(self, masked, t):
        return super().loss_weights(masked, t) * (1 + torch.arange(masked.size(1)) % 2)


class Smoothed(Diffusion):
    """`Diffusion.forward` with one line changed."""

    def forward(self, tokens, loss_mask=None, noise=None, doc_ids=None, reduction='sum'):
        maskable, counted = self.loss_positions(tokens, loss_mask)
        t = self.mask_ratio(noise)
        x_t, masked = self.corrupt(tokens, maskable, noise, t)
        h = self.hidden(x_t, doc_ids)
        weights = self.loss_weights(masked, t)
        loss, nll, pred = self.weighted_nll(h, tokens, weights, label_smoothing=0.3)
        return self.outputs(reduction, loss, weights * nll, pred, tokens, masked, counted)


def plain_loss(model, tokens, noise, weight_of=lambda i: 1, smoothing=0.0):
    """The same loss from whole logits, as the formula says it."""
    t = model.mask_ratio(noise)
    masked = noise[:, 1:] < t
    masked[:, 0] = False
    log_p = model.logits(tokens.masked_fill(masked, MASK)).log_softmax(-1)
    nll = -log_p.gather(2, tokens.unsqueeze(-1)).squeeze(-1)
    nll = (1 - smoothing) * nll - smoothing * log_p[..., :MASK].mean(
        -1
    )  # <|mask|> and padding are impossible
    weights = torch.tensor([float(weight_of(i)) for i in range(tokens.size(1))])
    return (masked / t * weights * nll).sum()


@pytest.mark.parametrize(
    'kind, formula',
    [(Weighted, {'weight_of': lambda i: 1 + i % 2}), (Smoothed, {'smoothing': 0.3}), (Diffusion, {})],
)
def test_what_forward_says_is_what_is_trained(kind, formula):
    """The loss that one reads is the loss that trains, for any upstream gradient."""
    model, tokens = random_model('diffusion', 0.4, **SHAPE), some_tokens()
    model.__class__ = kind
    noise = some_noise(tokens)
    loss = model(tokens, None, noise)[0]
    expected = plain_loss(model, tokens, noise, **formula)
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-5)
    assert_same(gradients(model, 0.3 * loss**2), gradients(model, 0.3 * expected**2), 1e-3)


def test_an_edit_of_the_loss_trains_other_weights():
    trained = {}
    for kind in (Diffusion, Weighted, Smoothed):
        torch.manual_seed(0)
        model = kind(ModelConfig(**SHAPE))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            tokens = some_tokens(seed=step)
            loss, count, _ = model(tokens, None, some_noise(tokens, step))
            (loss / count).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained[kind] = model.embedding.weight.detach()
    assert not torch.allclose(trained[Diffusion], trained[Weighted], atol=1e-5)
    assert not torch.allclose(trained[Diffusion], trained[Smoothed], atol=1e-5)


@pytest.mark.parametrize('architecture', ['ar', 'diffusion'])
def test_the_loss_of_tokens_is_differentiable_one_by_one(architecture, monkeypatch):
    """For losses that are no weighted sum, as focal loss."""
    monkeypatch.setattr(model_module, 'LOGITS_PER_CHUNK', 5 * 64)
    model, tokens = tiny(architecture), some_tokens()
    where = tokens % 3 == 0
    found = []
    for log_p in (model.logits(tokens).log_softmax(-1), None):
        if log_p is None:
            nll, pred = model.token_nll(model.hidden(tokens), tokens, where)
        else:
            nll = torch.where(where, -log_p.gather(2, tokens.unsqueeze(-1)).squeeze(-1), 0.0)
            expected = torch.where(where, log_p.argmax(-1), -1)
        found.append(gradients(model, (nll**3).sum()))
    assert torch.equal(pred, expected)
    assert_same(*found, 1e-4)


def test_token_dropout_hides_its_share_of_what_ar_reads_and_nothing_that_it_predicts(monkeypatch):
    model, tokens, read = tiny('ar', mask_id=MASK), some_tokens(), []
    plain, hidden = model(tokens)[0], model.hidden
    monkeypatch.setattr(model, 'hidden', lambda x, *rest: read.append(x) or hidden(x, *rest))
    model.token_dropout = 0.5
    assert torch.equal(model.eval()(tokens)[0], plain)  # in training only
    torch.manual_seed(0)
    loss, count, _ = model.train()(tokens)
    visible = read[-1]
    masked = visible == MASK
    assert 0.3 < masked.float().mean() < 0.7 and not masked[:, 0].any()
    assert torch.equal(visible[~masked], tokens[:, :-1][~masked]) and count == model.eval()(tokens)[1]
    logits = model.head(hidden(visible))  # the targets are the tokens as they were
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction='sum')
    torch.testing.assert_close(loss, nll)
