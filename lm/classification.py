"""Classifying sequences: labelled rows, a head on a trunk, the metrics, and whether two runs really differ."""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lm import data, rng
from lm.configurator import UserError
from model import Isolated

WINDOW = 16  # steps whose rows are sorted by length
BEST_BY = ('loss', 'accuracy', 'macro_f1')  # figures by which the best weights can be chosen


# ---------------------------------------------------------------------------- labelled rows


class Examples(NamedTuple):
    rows: list  # of token ids (length,), the start token first
    labels: np.ndarray  # (N,) int64, from 0

    def __len__(self):
        return len(self.rows)

    def take(self, places):
        return Examples([self.rows[place] for place in places], self.labels[places])


def joined(parts):
    return Examples(
        [row for part in parts for row in part.rows], np.concatenate([part.labels for part in parts])
    )


def hold_out(examples, size, seed):
    """(the rest, `size` examples of its classes in their proportions); which ones depends on the seed only."""
    if not 0 < size < len(examples):
        raise UserError(f'val_set_size is {size}, but there are {len(examples)} training rows; choose fewer.')
    shuffled = np.random.default_rng(seed).permutation(len(examples))
    by_class = shuffled[np.argsort(examples.labels[shuffled], kind='stable')]
    held = by_class[np.arange(size) * len(examples) // size]  # evenly through the classes
    return examples.take(np.setdiff1d(np.arange(len(examples)), held)), examples.take(np.sort(held))


def batch_of(examples, places, device):
    """Tokens (B, T), lengths (B,) or None where none is padded, labels (B,) of some examples, on the device."""
    rows = [examples.rows[place] for place in places]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.from_numpy(np.asarray(row, np.int64))
    lengths = None if (lengths == lengths[0]).all() else lengths
    return data.to_device((tokens, lengths, torch.from_numpy(examples.labels[places])), device)


def places_of_step(step, rows_per_step, num_rows, seed, lengths=None):
    """Which rows (rows_per_step,) a step trains on: each once per epoch, a function of (seed, step) only.

    lengths: (num_rows,) tokens. With them the rows of WINDOW steps, or of an epoch, are sorted, so that a step's are
    of like length and hardly padded; which of the window's steps gets the long ones is drawn.
    """
    window = 1 if lengths is None else max(1, min(WINDOW, num_rows // rows_per_step))
    epoch, place = np.divmod(
        (step // window * window) * rows_per_step + np.arange(window * rows_per_step), num_rows
    )
    places = np.concatenate(
        [rng.permuted(place[epoch == e], num_rows, rng.PERMUTE, seed, int(e)) for e in np.unique(epoch)]
    )
    if lengths is not None:
        places = places[np.argsort(lengths[places], kind='stable')]
    turn = np.random.default_rng((seed, step // window)).permutation(window)[step % window]
    return places.reshape(window, rows_per_step)[turn]


# ---------------------------------------------------------------------------- the model


class Classifier(nn.Module):
    """A trunk, its last states pooled over a row's true length, dropout, and a linear head.

    num_classes: outputs of the head; 1 is one logit with binary cross-entropy, for two classes.
    pool: 'last', the state of the last token, or 'mean'. class_weights: (classes,) what an example weighs.
    token_dropout: share of the tokens that `hide` hides in each row while training.
    """

    def __init__(
        self,
        trunk,
        num_classes,
        pool,
        dropout=0.0,
        class_weights=None,
        label_smoothing=0.0,
        token_dropout=0.0,
    ):
        super().__init__()
        self.trunk, self.pool, self.label_smoothing = trunk, pool, label_smoothing
        self.token_dropout, self.width = token_dropout, num_classes
        if getattr(trunk, 'unembedding', None) is not None:  # a head for tokens takes no part
            trunk.unembedding.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(getattr(trunk.config, 'embedding_width', trunk.config.n_embd), num_classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        weights = np.ones(max(2, num_classes)) if class_weights is None else class_weights
        self.register_buffer('class_weights', torch.as_tensor(weights).float(), persistent=False)

    def logits(self, tokens, lengths=None):
        """(B, num_classes) in float32. Padding changes no row: the causal trunk ends before it, others are told."""
        if lengths is None:
            states = self.trunk.hidden(tokens)  # (B, T, C)
            pooled = states[:, -1] if self.pool == 'last' else states.mean(1)
        else:
            inside = torch.arange(tokens.size(1), device=tokens.device) < lengths[:, None]  # (B, T)
            states = self.trunk.hidden(tokens, None if self.trunk.causal else Isolated(inside, causal=False))
            last = states[torch.arange(len(tokens), device=tokens.device), lengths - 1]
            pooled = (
                last
                if self.pool == 'last'
                else (states.masked_fill(~inside[..., None], 0).sum(1) / lengths[:, None])
            )
        return self.head(self.dropout(pooled)).float()

    def outputs(self, tokens, lengths, labels):
        """(B, width) in float32: what `evaluate_predictions` has to know about each row."""
        return self.logits(tokens, lengths)

    def forward(self, tokens, lengths, labels):
        """The weighted sum of the rows' losses in nats, the sum of their weights, and sums of metrics."""
        if self.training and self.token_dropout:
            tokens = hide(tokens, self.token_dropout, self.trunk.config.mask_id)
        logits = self.logits(tokens, lengths)
        weights = self.class_weights[labels]
        correct = predicted_classes(logits) == labels
        return (
            (weights * losses(logits, labels, self.label_smoothing)).sum(),
            weights.sum(),
            {'correct': correct.sum(), 'predicted': torch.tensor(len(labels), device=tokens.device)},
        )


def hide(tokens, share, mask_id):
    """Token ids (B, T) of which that share is <|mask|>, never a row's first: no single word decides (Iyyer 2015)."""
    hidden = torch.rand(tokens.shape, device=tokens.device) < share
    hidden[:, 0] = False
    return tokens.masked_fill(hidden, mask_id)


def make_classifier(
    trunk, examples, num_classes, pool, dropout, class_weights, label_smoothing, token_dropout
):
    """The Classifier that the settings of classify.py ask for, and what each of the examples weighs (N,)."""
    weights = weights_of_classes(class_weights, examples.labels, max(2, num_classes))
    return Classifier(
        trunk,
        num_classes,
        pool or ('last' if trunk.causal else 'mean'),
        dropout,
        weights,
        label_smoothing,
        token_dropout,
    ), weights[examples.labels]


def restore(classifier, checkpoint):
    """The weights of a checkpoint of classify.py into its classifier, adapters apart from what they adapt."""
    classifier.trunk.load_state_dict(checkpoint.get('adapted_state_dict') or checkpoint['model_state_dict'])
    classifier.head.load_state_dict(checkpoint['head_state_dict'])


def losses(logits, labels, label_smoothing=0.0):
    """Nats (B,) of the labels; smoothing spreads that share of each label evenly over the classes."""
    if logits.size(1) > 1:
        return F.cross_entropy(logits, labels, reduction='none', label_smoothing=label_smoothing)
    target = labels.float() * (1 - label_smoothing) + label_smoothing / 2
    return F.binary_cross_entropy_with_logits(logits[:, 0], target, reduction='none')


def predicted_classes(logits):
    return logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()


def weights_of_classes(wanted, labels, num_classes):
    """(num_classes,) what a row of each class weighs: '' alike, 'balanced', or numbers as in '1,2.5'.

    balanced: N / (classes · rows of the class), so that each class weighs the same (King & Zeng 2001).
    """
    if not wanted:
        return np.ones(num_classes)
    if wanted == 'balanced':
        counts = np.bincount(labels, minlength=num_classes)
        return np.where(counts > 0, len(labels) / (num_classes * np.maximum(counts, 1)), 0.0)
    try:
        weights = np.array([float(number) for number in wanted.split(',')])
    except ValueError:
        weights = np.zeros(0)
    if len(weights) != num_classes or not (weights >= 0).all() or not weights.any():
        raise UserError(
            f'class_weights is {wanted!r}; give balanced, or {num_classes} numbers with commas between '
            'them, one per class.'
        )
    return weights


def train_only(classifier, num_layers, train_final_norm):
    """Freezes the trunk but for its top `num_layers` blocks, and its last norm where that is wanted."""
    trunk = classifier.trunk
    if not 0 <= num_layers <= len(trunk.blocks):
        raise UserError(f'num_layers_to_finetune is {num_layers}; the model has {len(trunk.blocks)} layers.')
    trunk.requires_grad_(False)
    trunk.blocks[len(trunk.blocks) - num_layers :].requires_grad_(True)
    trunk.norm.requires_grad_(train_final_norm)


# ---------------------------------------------------------------------------- metrics


def confusion_matrix(labels, predictions, num_classes):
    """(num_classes, num_classes) counts: rows are the labels, columns the predictions."""
    return np.bincount(labels * num_classes + predictions, minlength=num_classes**2).reshape(num_classes, -1)


def divided(a, b):
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=np.asarray(b) != 0)


def figures_of(confusion):
    """Accuracy, precision, recall and F1, macro and micro, and MCC of a confusion matrix, as fractions.

    Macro is the mean over the classes that occur as a label or a prediction; what has 0 below is 0. Micro
    pools the decisions, so with one label per row each micro figure is the accuracy. MCC: Gorodkin 2004.
    """
    right, actual, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    total = confusion.sum()
    occurring = actual + predicted > 0
    per_class = {
        'precision': divided(right, predicted),
        'recall': divided(right, actual),
        'f1': divided(2 * right, actual + predicted),
    }
    accuracy = float(divided(right.sum(), total))
    figures = {'accuracy': accuracy}
    for name, values in per_class.items():
        figures[f'macro_{name}'] = float(values[occurring].mean()) if occurring.any() else 0.0
        figures[f'micro_{name}'] = accuracy
    covariance = right.sum() * total - actual @ predicted
    spread = np.sqrt(float(total**2 - predicted @ predicted)) * np.sqrt(float(total**2 - actual @ actual))
    figures['mcc'] = float(divided(covariance, spread))
    return figures


def auroc(labels, scores):
    """The chance that a row of class 1 scores higher than one of class 0, ties half; None if a class is absent."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1, those of ties averaged
    positives = int((labels == 1).sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return None
    return float((ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def evaluate_predictions(labels, logits):
    """All figures of a set: loss, those of `figures_of`, auroc where there are two classes, the confusion matrix.

    labels: (N,) int; logits: (N, C) float32, or (N, 1) for two classes by one logit.
    """
    predictions = predicted_classes(torch.from_numpy(logits)).numpy()
    confusion = confusion_matrix(labels, predictions, max(2, logits.shape[1]))
    figures = {
        'loss': losses(torch.from_numpy(logits), torch.from_numpy(labels)).double().mean().item(),
        **figures_of(confusion),
    }
    if logits.shape[1] <= 2:
        figures['auroc'] = auroc(labels, logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0))
    return {**figures, 'rows': len(labels), 'confusion': confusion.tolist()}


def gold_of(labels):
    """What predictions.npz holds of the labels."""
    return labels


def arrays_of(labels, logits):
    """What predictions.npz holds of a set, by name."""
    return {'labels': labels, 'preds': predicted_classes(torch.from_numpy(logits)).numpy(), 'logits': logits}


def load_predictions(run, source):
    """{set: (labels, predictions)} of the predictions.npz of a run folder; none if its rows have another source."""
    path = Path(run) / 'predictions.npz'
    try:
        with np.load(path) as saved:
            return {
                name.removesuffix('_labels'): (saved[name], saved[name.removesuffix('labels') + 'preds'])
                for name in saved.files
                if name.endswith('_labels') and saved['source'] == source
            }
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f'{path} cannot be read ({type(error).__name__}); give the folder of a run of classify.py that '
            'has finished.'
        ) from error


def randomisation_test(labels, one, other, draws=10_000, seed=0):
    """Whether the predictions of two runs on the same rows differ by more than chance (Noreen 1989; Yeh 2000).

    Each draw exchanges the two predictions of each row with probability 1/2; p is the share of draws, the
    observed one counted in, whose difference is at least as large. {figure: {'difference': one - other, 'p'}}
    """
    num_classes = int(max(labels.max(), one.max(), other.max())) + 1
    same = one == other  # exchanging these changes nothing
    base = confusion_matrix(labels[same], one[same], num_classes)
    rest = labels[~same], one[~same], other[~same]

    def difference(exchanged):
        first, second = np.where(exchanged, rest[2], rest[1]), np.where(exchanged, rest[1], rest[2])
        a, b = (figures_of(base + confusion_matrix(rest[0], part, num_classes)) for part in (first, second))
        return np.array([a[name] - b[name] for name in ('accuracy', 'macro_f1')])

    draw = np.random.default_rng(seed)
    observed = difference(np.zeros(len(rest[0]), bool))
    extreme = sum(
        np.abs(difference(draw.random(len(rest[0])) < 0.5)) >= np.abs(observed) - 1e-12 for _ in range(draws)
    )
    return {
        name: {'difference': float(observed[i]), 'p': float((extreme[i] + 1) / (draws + 1))}
        for i, name in enumerate(('accuracy', 'macro_f1'))
    }
