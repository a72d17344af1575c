"""Classification: the metrics against scikit-learn, rows and the head."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from sklearn import metrics as sk

from lm import classification as c
from lm.configurator import UserError

SHAPE = dict(vocab_size=10, block_size=16, n_layer=3, n_head=2, n_embd=16, mask_id=8, ignore_id=9)


@pytest.mark.parametrize('num_classes, outputs', [(2, 1), (2, 2), (3, 3), (5, 5)])
@pytest.mark.parametrize('rows', [2, 40, 500])
def test_every_metric_is_that_of_scikit_learn(num_classes, outputs, rows):
    draw = np.random.default_rng(rows + outputs)
    labels = draw.integers(0, num_classes, rows)
    labels[:2] = 0, 1
    logits = (draw.integers(-4, 5, (rows, outputs)) / 2).astype(np.float32)  # with ties
    logits[np.arange(rows), labels % outputs] += 0.5
    figures = c.evaluate_predictions(labels, torch.from_numpy(logits))
    predictions = (logits[:, 0] > 0).astype(int) if outputs == 1 else logits.argmax(1)
    for average in ('macro', 'micro'):
        expected = sk.precision_recall_fscore_support(labels, predictions, average=average, zero_division=0)
        got = [figures[f'{average}_{name}'] for name in ('precision', 'recall', 'f1')]
        assert got == pytest.approx(expected[:3], abs=1e-12)
    assert figures['accuracy'] == pytest.approx(sk.accuracy_score(labels, predictions))
    assert figures['mcc'] == pytest.approx(sk.matthews_corrcoef(labels, predictions), abs=1e-12)
    assert (
        figures['confusion'] == sk.confusion_matrix(labels, predictions, labels=range(num_classes)).tolist()
    )
    if num_classes == 2:
        scores = logits[:, 0] if outputs == 1 else logits[:, 1] - logits[:, 0]
        assert figures['auroc'] == pytest.approx(sk.roc_auc_score(labels, scores))
    probabilities = (
        torch.softmax(torch.from_numpy(logits).double(), 1).numpy()
        if outputs > 1
        else np.stack([1 / (1 + np.exp(logits[:, 0])), 1 / (1 + np.exp(-logits[:, 0]))], 1)
    )
    assert figures['loss'] == pytest.approx(
        sk.log_loss(labels, probabilities, labels=range(num_classes)), rel=1e-5
    )


@pytest.mark.faults
def test_the_figures_of_many_classes_grow_with_the_rows_only():
    labels, classes = np.array([99_999, 5, 7, 5]), torch.tensor([99_999, 5, 5, 5])
    logits = 9.0 * F.one_hot(classes, 100_000)
    figures = c.evaluate_predictions(labels, logits)
    assert figures['accuracy'] == 0.75 and figures['macro_f1'] == pytest.approx((1 + 0 + 0.8) / 3)
    assert figures['mcc'] == pytest.approx(sk.matthews_corrcoef(labels, classes.numpy()))
    assert 'confusion' not in figures


def test_auroc_of_one_class_is_none():
    assert c.auroc(np.zeros(3, int), np.arange(3.0)) is None


@pytest.mark.parametrize('architecture', ['ar', 'diffusion'])
@pytest.mark.parametrize('pool', ['last', 'mean'])
def test_padding_changes_no_row(architecture, pool):
    model = c.Classifier(random_model(architecture, 0.3, **SHAPE), 2, pool).eval()
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 8, length) for length in (3, 9, 16, 1)]
    examples = c.Examples(rows, np.zeros(4, int))
    tokens, lengths, _ = c.collate(examples, np.arange(4), 'cpu')
    together = model.logits(tokens, lengths)
    alone = torch.cat([model.logits(*c.collate(examples, [i], 'cpu')[:2]) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    tokens[torch.arange(16) >= lengths[:, None]] = 5  # whatever the padding is
    torch.testing.assert_close(together, model.logits(tokens, lengths), atol=1e-6, rtol=0)


@pytest.mark.parametrize('num_layers, norm', [(0, False), (2, False), (2, True), (3, True)])
def test_exactly_the_top_blocks_get_gradient_with_checkpointing_on(num_layers, norm):
    trunk = random_model('ar', 0.1, **SHAPE, norm='layer', gradient_checkpointing=True)
    model = c.Classifier(trunk, 3, 'last').train()
    c.train_top_layers(model, num_layers, norm)
    loss, count, _ = model(torch.randint(0, 8, (4, 7)), None, torch.tensor([0, 1, 2, 1]))
    (loss / count).backward()
    top = tuple(f'trunk.blocks.{i}.' for i in range(3 - num_layers, 3))
    for name, weight in model.named_parameters():
        wanted = name.startswith('head.') or name.startswith(top) or (norm and name == 'trunk.norm.weight')
        assert (weight.grad is not None and weight.grad.abs().sum() > 0) == wanted, name
    with pytest.raises(UserError, match='has 3 layers'):
        c.train_top_layers(model, 4, False)


def test_losses_are_torchs_with_weights_and_with_smoothing():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 2])
    weights = np.array([1.0, 0.5, 3.0])
    model = c.Classifier(random_model('ar', 0.1, **SHAPE), 3, 'last', class_weights=weights)
    model.logits = lambda tokens, lengths: logits
    loss, count, _ = model(torch.zeros(6, 2), None, labels)
    assert torch.isclose(loss / count, F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 0.5, 3.0])))
    model.class_weights[:], model.label_smoothing = 1.0, 0.2
    loss, count, _ = model(torch.zeros(6, 2), None, labels)
    assert torch.isclose(loss / count, F.cross_entropy(logits, labels, label_smoothing=0.2))
    logits, labels = logits[:, :1], labels.clamp(max=1)
    loss, count, _ = model(torch.zeros(6, 2), None, labels)
    smooth = 0.8 * labels + 0.1
    assert torch.isclose(loss / count, F.binary_cross_entropy_with_logits(logits[:, 0], smooth))


def test_tokens_are_masked_while_training_only_and_never_the_first():
    torch.manual_seed(0)
    tokens = torch.randint(0, 8, (200, 16))
    model = c.Classifier(random_model('ar', 0.3, **SHAPE), 2, 'mean', token_dropout=0.3)
    mask_id, seen = model.trunk.config.mask_id, []
    model.logits = lambda tokens, lengths: seen.append(tokens) or torch.zeros(200, 2)
    model(tokens, None, torch.zeros(200, dtype=int))
    masked = seen[0] == mask_id
    assert not masked[:, 0].any() and abs(masked[:, 1:].float().mean() - 0.3) < 0.04
    assert torch.equal(seen[0][~masked], tokens[~masked])
    model = c.Classifier(random_model('ar', 0.3, **SHAPE), 2, 'mean', token_dropout=0.5)
    labels = torch.zeros(200, dtype=int)

    def loss():
        return model(tokens, None, labels)[0]

    assert model.eval() and torch.equal(loss(), loss())
    assert model.train() and not torch.isclose(loss(), loss(), rtol=1e-4)


def test_balanced_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array([0, 0, 0, 1, 2, 2])
    expected = compute_class_weight('balanced', classes=np.arange(3), y=labels)
    assert c.weights_of_classes('balanced', labels, 3) == pytest.approx(expected)
    assert c.weights_of_classes('balanced', labels, 4)[3] == 0
    assert c.weights_of_classes('1,2.5,0', labels, 3).tolist() == [1, 2.5, 0]
    for wrong in ('1,2', 'heavy', '-1,1,1', '0,0,0', '1..5,1,1'):
        with pytest.raises(UserError, match='class_weights is'):
            c.weights_of_classes(wrong, labels, 3)


def test_held_out_rows_keep_the_proportions_and_leave_the_training_rows():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    examples = c.Examples([np.array([i]) for i in range(100)], labels)
    rest, held = c.hold_out(examples, 20, seed=1)
    assert np.bincount(held.labels).tolist() == [12, 6, 2] and len(rest) == 80
    assert {int(row[0]) for row in rest.rows}.isdisjoint({int(row[0]) for row in held.rows})
    with pytest.raises(UserError, match='val_set_size is 100'):
        c.hold_out(examples, 100, seed=1)


def test_each_row_comes_once_per_epoch():
    steps = [c.rows_of_step(step, 4, 10, seed=3) for step in range(5)]  # two epochs of ten rows
    seen = np.concatenate(steps)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and list(seen[:10]) != list(seen[10:])


def test_grouped_by_length_a_step_has_rows_of_like_length_and_none_is_left_out():
    lengths = np.random.default_rng(0).integers(1, 1000, 2 * c.WINDOW * 8)
    steps = [c.rows_of_step(step, 8, len(lengths), 3, lengths) for step in range(2 * c.WINDOW)]
    assert sorted(np.concatenate(steps)) == list(range(len(lengths)))
    ranges = [(lengths[step].min(), lengths[step].max()) for step in steps[: c.WINDOW]]
    rows, size, epochs = 229, 8, 2  # the 29th step has 5 rows of an epoch, and 3 of the next
    index = np.concatenate([c.rows_of_step(step, size, rows, 3, lengths[:rows]) for step in range(58)])
    assert np.bincount(index).min() == epochs and np.bincount(index).sum() == epochs * rows + 6
    assert ranges != sorted(ranges) and all(a[1] <= b[0] for a, b in zip(sorted(ranges), sorted(ranges)[1:]))
