"""Answers that are spans of a text: where they lie in tokens, two outputs per token, SQuAD's metrics.

What classify.py calls here has the names and arguments that it has in classification.py, so that one loop trains both.
A label is an `Answer`. The question comes first, so that causal states of the context know it.
"""
import json
import re
import string
from collections import Counter
from typing import NamedTuple
from unicodedata import category

import numpy as np
import torch
import torch.nn.functional as F

import classification
from classification import Examples
from configurator import UserError
from model import Isolated

BEST_BY = ('loss', 'accuracy', 'exact_match', 'f1')


# ---------------------------------------------------------------------------- answers

class Answer(NamedTuple):
    """Where the answer to a row lies, and what its evaluation needs. No span: it is -1."""
    begin: int            # the context's first token in the row
    start: int            # the answer's first token in the row, or -1
    end: int              # its last token, or -1
    context: str
    offsets: np.ndarray   # (tokens of the context, 2) int32: their first character, the one after their last
    texts: tuple          # all right answers; the first is the one that is trained

    def text_of(self, start, end):
        """What the tokens from `start` to `end` of the row say; nothing where none of the context was kept."""
        if not len(self.offsets):
            return ''
        return self.context[self.offsets[start - self.begin, 0]:self.offsets[end - self.begin, 1]].strip()


def read_answers(value, where):
    """((right answers), (their first characters)) of {'text': [...], 'answer_start': [...]}; none: unanswerable."""
    try:
        texts, starts = tuple(map(str, value['text'])), tuple(map(int, value['answer_start']))
        right = len(texts) == len(starts) and not isinstance(value['text'], str)
    except (TypeError, KeyError, ValueError):
        right = False
    if not right:
        raise UserError(f'{where}: the answers are {str(value)[:60]!r}, not of the form {{"text": ["..."], '
                        '"answer_start": [0]}; correct the data, or eval_feature in the database.')
    pairs = [pair for pair in zip(texts, starts) if pair[0].strip()]
    return tuple(text for text, _ in pairs), tuple(start for _, start in pairs)


def from_squad(whole, where):
    """The records of SQuAD's own file: articles of paragraphs of questions."""
    try:
        return [{'question': question['question'], 'context': paragraph['context'],
                 'answers': {key: [answer[key] for answer in question.get('answers') or ()]
                             for key in ('text', 'answer_start')}}
                for article in whole['data'] for paragraph in article['paragraphs'] for question in paragraph['qas']]
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where} holds neither a list of records nor SQuAD's {{\"data\": [...]}} ({error!r}); write "
                        'one record per line as .jsonl.') from error


def located(labelled, features, tokenizer, block_size):
    """The Answers (N,) of rows: their texts and answers, the token ids of their features, the tokens that are kept."""
    contexts = [texts[-1] for texts in labelled.texts]
    offsets = {context: np.array(tokenizer.offsets(context), np.int32).reshape(-1, 2) for context in set(contexts)}
    begins = [1 + sum(len(part) + 1 for part in ids[:-1]) for ids in zip(*features)]  # behind start and separators
    return np.fromiter((locate(context, answers, offsets[context][:max(0, block_size - begin)], begin)
                        for context, answers, begin in zip(contexts, labelled.labels, begins)), object)


def locate(context, answers, offsets, begin):
    """The Answer in a context that begins at the token `begin` of its row; offsets: of the tokens that are kept.

    It has no span if the row has no answer, if the answer's text is not in the context, or if it is cut away.
    An answer that is not where it is said to be is looked for.
    """
    texts, starts = answers
    answer = Answer(begin, -1, -1, context, offsets, texts)
    if not texts:
        return answer
    first = starts[0] if starts[0] >= 0 and context.startswith(texts[0], starts[0]) else context.find(texts[0])
    after = first + len(texts[0])
    inside = np.flatnonzero((offsets[:, 1] > first) & (offsets[:, 0] < after))
    if first < 0 or not len(inside) or offsets[-1, 1] < after:
        return answer
    return answer._replace(start=begin + int(inside[0]), end=begin + int(inside[-1]))


def answerable(examples, name, note):
    """The examples, in training those that have a span, and the note with how many have none."""
    there = np.array([answer.start >= 0 for answer in examples.labels])
    if not there.any():
        raise UserError(f'No row of {name} has its answer in its context; choose a larger block_size, or correct the '
                        'data.')
    lost = np.count_nonzero(~there)
    if lost:
        note += f'{", " if note else ""}{lost} without an answer in what is left, ' + (
            'left out' if name == 'train' else 'counted as wrong')
    return examples.take(np.flatnonzero(there)) if name == 'train' else examples, note


def hold_out(examples, size, seed):
    """(the rest, `size` examples); questions about one context may come to stand on both sides."""
    places = Examples(list(range(len(examples))), np.zeros(len(examples), np.int64))
    return tuple(examples.take(part.rows) for part in classification.hold_out(places, size, seed))


def batch_of(examples, places, device):
    """Tokens (B, T), lengths (B,) or None, and begin, start and end (B, 3) of some examples, on the device."""
    rows, answers = examples.take(places)
    where = np.array([answer[:3] for answer in answers], np.int64)
    return classification.batch_of(Examples(rows, where), np.arange(len(rows)), device)


# ---------------------------------------------------------------------------- the model

class Classifier(classification.Classifier):
    """A trunk and a head of two logits for each token of the context: that an answer starts, or ends, with it.

    longest: the most tokens of an answer that it gives.
    """

    def __init__(self, trunk, longest, dropout=0.0, token_dropout=0.0):
        super().__init__(trunk, 2, '', dropout, token_dropout=token_dropout)
        self.width, self.longest = 3, longest

    def logits(self, tokens, lengths, begin):
        """(B, T, 2) in float32; -inf at the start token, the question and padding."""
        place = torch.arange(tokens.size(1), device=tokens.device)
        inside = place < (tokens.size(1) if lengths is None else lengths[:, None])  # (T,) or (B, T)
        told = None if lengths is None or self.trunk.causal else Isolated(inside, causal=False)
        logits = self.head(self.dropout(self.trunk.hidden(tokens, told))).float()
        return logits.masked_fill(~(inside & (place >= begin[:, None]))[..., None], -torch.inf)

    def forward(self, tokens, lengths, where):
        """As classification.Classifier; a row's loss is the mean of the cross-entropies of its start and its end."""
        if self.training and self.token_dropout:
            tokens = classification.hide(tokens, self.token_dropout, self.trunk.config.mask_id)
        logits = self.logits(tokens, lengths, where[:, 0])
        count = torch.tensor(len(where), device=tokens.device)
        correct = (best_spans(logits, self.longest) == where[:, 1:]).all(1).sum()
        return losses(logits, where[:, 1:]).sum(), count, {'correct': correct, 'predicted': count}

    def outputs(self, tokens, lengths, where):
        """(B, 3) in float32: the first and the last token of the best span, and the loss, nan where none is right."""
        logits = self.logits(tokens, lengths, where[:, 0])
        lost = torch.where(where[:, 1] < 0, torch.nan, losses(logits, where[:, 1:].clamp(min=0)))
        return torch.cat([best_spans(logits, self.longest).float(), lost[:, None]], 1)


def losses(logits, spans):
    """Nats (B,) of the spans (B, 2) by logits (B, T, 2)."""
    return F.cross_entropy(logits, spans, reduction='none').mean(1)


def best_spans(logits, longest):
    """(B, 2): start and end of the best sum of two logits, of all spans of at most `longest` tokens."""
    start, end = logits.unbind(2)
    longest = min(longest, logits.size(1))
    best, last = F.max_pool1d(F.pad(end, (0, longest - 1), value=-torch.inf)[:, None], longest, 1, return_indices=True)
    first = (start + best[:, 0]).argmax(1, keepdim=True)  # each start with the best end in its reach
    return torch.cat([first, last[:, 0].gather(1, first)], 1)


def make_classifier(trunk, examples, num_classes, pool, dropout, class_weights, label_smoothing, token_dropout):
    """The Classifier, and what each of the examples weighs (N,): all the same. Its answers are as long as theirs."""
    for name, value in {'num_classes': num_classes, 'pool': pool, 'class_weights': class_weights,
                        'label_smoothing': label_smoothing}.items():
        if value:
            raise UserError(f'{name}={value} says nothing about answers that are spans of a text; leave it out.')
    longest = max(answer.end - answer.start + 1 for answer in examples.labels)
    return Classifier(trunk, longest, dropout, token_dropout), np.ones(len(examples))


# ---------------------------------------------------------------------------- metrics

def words_of(text):
    """The words of a text as SQuAD compares them: lower case, without punctuation and English articles.

    Punctuation is that of every script, as in MLQA (Lewis 2020); SQuAD's own rule knows no “ or «.
    """
    text = ''.join(char for char in text.lower() if char not in string.punctuation and category(char)[0] != 'P')
    return re.sub(r'\b(a|an|the)\b', ' ', text).split()


def score(text, right):
    """Exact match and F1 of words, each the best over the right answers (Rajpurkar 2016); no right one: 0."""
    got, pairs = words_of(text), [(0.0, 0.0)]
    for wanted in map(words_of, right):
        common = sum((Counter(got) & Counter(wanted)).values())
        f1 = 2 * common / (len(got) + len(wanted)) if got or wanted else 1.0
        pairs.append((float(got == wanted), f1))
    return tuple(map(max, zip(*pairs)))


def scores(texts, labels):
    """(N, 2): those two of each row's predicted text."""
    return np.array([score(text, answer.texts) for text, answer in zip(texts, labels)])


def texts_of(labels, outputs):
    """The text (N,) of each predicted span."""
    return np.array([answer.text_of(int(start), int(end)) for answer, (start, end, _) in zip(labels, outputs)])


def gold_of(labels):
    """What predictions.npz holds of the labels: lists of the right answers as JSON (N,)."""
    return np.array([json.dumps(answer.texts, ensure_ascii=False) for answer in labels])


def arrays_of(labels, outputs):
    """What predictions.npz holds of a set, by name. spans: first and last token in the row."""
    return {'labels': gold_of(labels), 'preds': texts_of(labels, outputs), 'spans': outputs[:, :2].astype(np.int64),
            'losses': outputs[:, 2]}


def evaluate_predictions(labels, outputs):
    """All figures of a set: loss, of the rows that have a span; exact match, also as accuracy, and F1, of all rows."""
    exact, f1 = np.mean(scores(texts_of(labels, outputs), labels), 0).tolist()
    return {'loss': float(np.nanmean(outputs[:, 2], dtype=np.float64)), 'accuracy': exact, 'exact_match': exact,
            'f1': f1, 'rows': len(labels), 'without_span': int(np.isnan(outputs[:, 2]).sum())}


def randomisation_test(labels, one, other, draws=10_000, seed=0):
    """As classification.randomisation_test, of exact match and F1 of the predicted texts (N,) of two runs."""
    apart = scores(one, labels) - scores(other, labels)  # (N, 2)
    differing = apart[apart.any(1)] / len(labels)  # exchanging the others changes nothing
    draw = np.random.default_rng(seed)
    observed = np.abs(differing.sum(0)) - 1e-12
    extreme = sum(np.abs(draw.choice((-1, 1), len(differing)) @ differing) >= observed for _ in range(draws))
    return {name: {'difference': float(apart[:, i].mean()), 'p': float((extreme[i] + 1) / (draws + 1))}
            for i, name in enumerate(('exact_match', 'f1'))}
