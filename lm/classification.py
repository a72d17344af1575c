"""Classifying sequences: labelled rows, a head on a trunk, and the metrics."""

import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lm.configurator import require
from lm.rng import PERMUTE, permuted
from model import drop_tokens

WINDOW = 16  # steps whose rows are sorted by length
MATRIX = 100  # classes at most of which the confusion matrix is written


class Examples(NamedTuple):
    rows: list  # of token ids (length,), the start token first
    labels: np.ndarray  # (N,) int64, from 0

    def __len__(self):
        return len(self.rows)

    def take(self, index):
        return Examples([self.rows[i] for i in index], self.labels[index])


def hold_out(examples, size, seed):
    """Split off `size` examples of the classes in their proportions: (the rest, held out), by the seed only."""
    room = len(examples)
    require(0 < size < room, f'val_set_size is {size} of {room} training rows; choose fewer.')
    shuffled = np.random.default_rng(seed).permutation(len(examples))
    by_class = shuffled[np.argsort(examples.labels[shuffled], kind='stable')]
    held = by_class[np.arange(size) * len(examples) // size]  # evenly through the classes
    return examples.take(np.setdiff1d(np.arange(len(examples)), held)), examples.take(np.sort(held))


def collate(examples, index, device):
    """Return tokens (B, T), lengths (B,) or None where none is padded, and labels (B,) of some examples."""
    rows = [torch.from_numpy(examples.rows[i].astype(np.int64)) for i in index]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    padded = bool((lengths != lengths[0]).any())
    labels = torch.from_numpy(examples.labels[index])
    return tokens.to(device), lengths.to(device) if padded else None, labels.to(device)


def rows_of_step(step, rows_per_step, num_rows, seed, lengths=None):
    """Return which rows (rows_per_step,) a step trains on: each once per epoch, a function of (seed, step) only.

    lengths: (num_rows,) tokens. With them the rows of WINDOW steps, or of what an epoch has left, are sorted, so that a
    step's are of like length and hardly padded; which of the window's steps gets the long ones is drawn.
    """
    first, window = step, 1
    if lengths is not None:
        epoch = step * rows_per_step // num_rows
        begin, end = (-(-e * num_rows // rows_per_step) for e in (epoch, epoch + 1))  # its steps
        first = step - (step - begin) % WINDOW
        window = min(WINDOW, end - first)
    epoch, position = np.divmod(first * rows_per_step + np.arange(window * rows_per_step), num_rows)
    parts = [permuted(position[epoch == e], num_rows, PERMUTE, seed, int(e)) for e in np.unique(epoch)]
    index = np.concatenate(parts)
    if lengths is not None:
        index = index[np.argsort(lengths[index], kind='stable')]
    turn = np.random.default_rng((seed, first)).permutation(window)[step - first]
    return index.reshape(window, rows_per_step)[turn]


class Classifier(nn.Module):
    """A trunk, its last hidden states pooled over a row's true length, dropout, and a linear head.

    width: outputs of the head; 1 is one logit, as in binary cross-entropy. pool: 'last', the state of the
    last token, or 'mean'. class_weights: (classes,) the weight of an example. token_dropout: fraction of a row's
    tokens that are masked in training (Iyyer et al. 2015).
    """

    def __init__(self, trunk, width, pool, dropout=0, class_weights=None, label_smoothing=0, token_dropout=0):
        super().__init__()
        self.trunk, self.pool, self.width = trunk, pool, width
        self.label_smoothing, self.token_dropout = label_smoothing, token_dropout
        if trunk.unembedding is not None:  # a head for tokens takes no part
            trunk.unembedding.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(trunk.config.embedding_width, width)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        weights = np.ones(max(2, width)) if class_weights is None else class_weights
        self.register_buffer('class_weights', torch.as_tensor(weights).float(), persistent=False)

    def logits(self, tokens, lengths=None):
        """Compute logits (B, width) in float32; padding changes none of them."""
        needs_mask = lengths is not None and not self.trunk.causal
        if lengths is None:
            lengths = torch.full((len(tokens),), tokens.size(1), device=tokens.device)
        inside = torch.arange(tokens.size(1), device=tokens.device) < lengths[:, None]  # (B, T)
        hidden = self.trunk.hidden(tokens, inside.long() if needs_mask else None)  # (B, T, C)
        if self.pool == 'last':
            pooled = hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1]
        else:
            pooled = hidden.masked_fill(~inside[..., None], 0).sum(1) / lengths[:, None]
        return self.head(self.dropout(pooled)).float()

    def forward(self, tokens, lengths, labels):
        """Compute the weighted sum of the rows' losses in nats, the sum of their weights, and metric sums."""
        if self.training:
            tokens = drop_tokens(tokens, self.token_dropout, self.trunk.config.mask_id)
        logits = logits_by_class(self.logits(tokens, lengths))
        weights = self.class_weights[labels]
        nll = F.cross_entropy(logits, labels, reduction='none', label_smoothing=self.label_smoothing)
        metrics = {'correct': (logits.argmax(1) == labels).sum(), 'predicted': torch.tensor(len(labels))}
        return (weights * nll).sum(), weights.sum(), metrics


def load_state(classifier, checkpoint):
    """Load a checkpoint of classify.py into its classifier, with adapters that are not merged."""
    classifier.trunk.load_state_dict(checkpoint.get('adapted_state_dict') or checkpoint['model_state_dict'])
    classifier.head.load_state_dict(checkpoint['head_state_dict'])


def logits_by_class(logits):
    """Return logits (B, 2 or more): one alone, z, becomes 0 and z, since σ(z) is the softmax of these."""
    return logits if logits.size(1) > 1 else F.pad(logits, (1, 0))


def weights_of_classes(wanted, labels, num_classes):
    """Return the weight (num_classes,) of an example of each class: '' 1, 'balanced', or numbers as in '1,2.5'.

    balanced: N / (classes · examples of the class), so that each class weighs the same (King & Zeng 2001).
    """
    if not wanted:
        return np.ones(num_classes)
    if wanted == 'balanced':
        counts = np.bincount(labels, minlength=num_classes)
        return np.where(counts > 0, len(labels) / (num_classes * np.maximum(counts, 1)), 0.0)
    fits = re.fullmatch(r'\d+\.?\d*(,\d+\.?\d*)*', wanted) and wanted.count(',') == num_classes - 1
    weights = np.array(wanted.split(',') if fits else [], float)
    remedy = f'give balanced, or {num_classes} numbers with commas between them'
    require(weights.any(), f'class_weights is {wanted!r}; {remedy}.')
    return weights


def train_top_layers(classifier, num_layers, train_final_norm):
    """Freeze the trunk but for its top `num_layers` blocks, and its final norm unless that is to train."""
    trunk = classifier.trunk
    most = len(trunk.blocks)
    require(0 <= num_layers <= most, f'num_layers_to_finetune is {num_layers}; the model has {most} layers.')
    trunk.requires_grad_(False)
    trunk.blocks[len(trunk.blocks) - num_layers :].requires_grad_(True)
    trunk.norm.requires_grad_(train_final_norm)


def class_metrics(labels, predictions, num_classes):
    """Compute accuracy, precision, recall and F1, macro and micro, and MCC of predicted classes (N,), as fractions.

    Macro is the mean over the classes that occur as a label or a prediction; a ratio of 0 to 0 is 0. Micro pools the
    decisions, so with one label per row each micro metric is the accuracy. MCC: Gorodkin 2004.
    """
    parts = labels[labels == predictions], labels, predictions
    right, actual, predicted = (np.bincount(part, minlength=num_classes) for part in parts)
    total, occurring = len(labels), actual + predicted
    ratios = {'precision': (right, predicted), 'recall': (right, actual), 'f1': (2 * right, occurring)}
    metrics = {'accuracy': float(right.sum() / total)}
    for name, (a, b) in ratios.items():
        metrics[f'macro_{name}'] = float((a / np.maximum(b, 1))[occurring > 0].mean())
        metrics[f'micro_{name}'] = metrics['accuracy']
    covariance = right.sum() * total - actual @ predicted
    spread = np.sqrt(float(total**2 - predicted @ predicted)) * np.sqrt(float(total**2 - actual @ actual))
    return {**metrics, 'mcc': float(covariance / max(spread, 1))}


def auroc(labels, scores):
    """Compute the chance that a row of class 1 scores higher than one of class 0, ties half; None without both."""
    positive, negative = scores[labels == 1], np.sort(scores[labels == 0])
    if not len(positive) or not len(negative):
        return None
    below, up_to = (np.searchsorted(negative, positive, side) for side in ('left', 'right'))
    return float((below + up_to).mean() / (2 * len(negative)))


def evaluate_predictions(labels, logits):
    """Compute the loss in nats, `class_metrics`, auroc where there are two classes, and the confusion matrix of a set.

    labels: (N,) int; logits: (N, C), or (N, 1) for two classes. The matrix has a row per label and a column per
    prediction; of more than a hundred classes there is none.
    """
    by_class = logits_by_class(logits)
    nll = F.cross_entropy(by_class, torch.from_numpy(labels), reduction='none')
    predictions, num_classes = by_class.argmax(1).numpy(), by_class.size(1)
    metrics = {'loss': nll.double().mean().item(), **class_metrics(labels, predictions, num_classes)}
    if num_classes == 2:
        metrics['auroc'] = auroc(labels, (by_class[:, 1] - by_class[:, 0]).numpy())
    metrics['rows'] = len(labels)
    if num_classes <= MATRIX:
        cells = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
        metrics['confusion'] = cells.reshape(num_classes, -1).tolist()
    return metrics
