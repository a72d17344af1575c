"""Score texts without a model: diversity, overlap with a reference, intervals, checks of answers.

Samples are lists of token ids or of words. A figure that cannot be computed is None. Diversity depends on the
number and the length of the samples: compare it with that of similar held-out text.
"""

import json
import math
import re
from collections import Counter

import numpy as np

from lm.configurator import UserError, require

Z = 1.959964  # the 97.5 % quantile of the normal distribution


def ngrams(samples, n):
    """Return the list of n-grams of each sample."""
    return [list(zip(*(sample[i:] for i in range(n)))) for sample in samples]


def distinct(samples, n):
    """Return distinct-n, the different n-grams over all n-grams of all samples (Li et al. 2016)."""
    grams = [gram for of_sample in ngrams(samples, n) for gram in of_sample]
    return len(set(grams)) / len(grams) if grams else None


def rep(samples, n):
    """Return rep-n, the share of n-grams that occurred earlier in the same sample (Welleck et al. 2020)."""
    grams = ngrams(samples, n)
    total = sum(map(len, grams))
    return 1 - sum(len(set(of_sample)) for of_sample in grams) / total if total else None


def entropy(samples):
    """Return the entropy in nats of the tokens of all samples pooled, -Σ p ln p."""
    counts = Counter(token for sample in samples for token in sample)
    p = np.array(list(counts.values())) / max(1, counts.total())
    return float(abs(p @ np.log(p))) if counts else None  # abs instead of minus: never -0


def rouge_l(text, reference):
    """Return ROUGE-L (Lin 2004), the F1 of the longest common subsequence of words in lower case."""
    text, reference = (re.findall(r'\w+', words.lower()) for words in (text, reference))
    common = [0] * (len(reference) + 1)  # common[j]: of reference[:j] and what was read of the text
    for word in text:
        diagonal = 0
        for j, other in enumerate(reference, 1):
            longer = diagonal + 1 if word == other else max(common[j], common[j - 1])
            diagonal, common[j] = common[j], longer
    return 2 * common[-1] / (len(text) + len(reference)) if reference else None


def mean_ci(values, weights=1):
    """Return Σ values / Σ weights over independent documents and its 95 % interval [low, high].

    values: (N,), a document's total, such as its nll; weights: (N,), such as its number of tokens.
    The interval is None for fewer than 4 documents with weight. It is that of a linearised ratio, mean ± t · se. A
    few long documents may carry most of the weight, so each squared residual is divided by 1 - h, h the document's
    share of the weight, and t has Satterthwaite's degrees of freedom (Bell & McCaffrey 2002): in simulations of 30
    to 1000 documents of log-normal or Pareto length it covers 95 to 96 %, where a normal quantile covers 90 to 94.
    """
    values, weights = np.broadcast_arrays(np.asarray(values, float), np.asarray(weights, float))
    values, weights = values[weights != 0], weights[weights != 0]
    if len(values) == 0 or not math.isfinite(values.sum()):
        return None, None

    mean, h = float(values.sum() / weights.sum()), weights / weights.sum()  # h: (N,)
    if len(values) < 4:
        return mean, None
    se = math.sqrt(((values / weights.sum() - mean * h) ** 2 / (1 - h)).sum())
    freedom = max(3, (h**2).sum() ** 2 / (h**4).sum() - 1)
    margin = float(Z + (Z**3 + Z) / (4 * freedom)) * se  # Fisher's expansion of Student's quantile
    return mean, [mean - margin, mean + margin]


def share_ci(passed):
    """Return the share of true values and its 95 % interval (Wilson 1927), no point even for 0 and 1."""
    n = len(passed)
    if n == 0:
        return None, None
    p = float(sum(passed) / n)
    centre, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + (Z / (2 * n)) ** 2)
    return p, [(centre - half) / (1 + Z * Z / n), (centre + half) / (1 + Z * Z / n)]


LABEL = re.compile(r'^([ \t]*)(?:(\(?\d{1,2}[.)])|([-*•–]))\s+', re.M)  # of an item: "1. ", "2) ", "- "
TITLE = re.compile(r'\b(Mr|Mrs|Ms|Dr|Prof|St|[A-HJ-Z])\.')  # a full stop that ends no sentence
SENTENCE_END = re.compile(r'(?<=[.!?…])["”\')\]]*\s+(?![a-z\s])|\n')


def words_in(text):
    return re.findall(r'\S*\w\S*', text)  # a dash alone is no word


def count_sentences(text):
    pieces = SENTENCE_END.split(TITLE.sub(r'\1', LABEL.sub('', text)))
    return sum(bool(words_in(piece)) for piece in pieces)


def count_bullets(text):
    labels = [(indent, bullet) for indent, _, bullet in LABEL.findall(text)]
    return labels.count(labels[0]) if labels else 0  # points below points do not count


def count_items(text):
    """Return how many items a list has: labelled lines, else lines, else parts between commas and "and"."""
    lines = [line for line in text.splitlines() if line.strip() and not line.rstrip().endswith(':')]
    if count_bullets(text) or len(lines) > 1:
        return count_bullets(text) or len(lines)
    return sum(bool(words_in(part)) for part in re.split(r'[,;]\s|\band\b|\bor\b|&', text))


def is_json(text):
    """Return whether the text, or the code block that it consists of, is a JSON object or array."""
    fenced = re.fullmatch(r'```(?:json)?\n(.*?)\n?```', text.strip(), re.S | re.I)
    try:  # `int` refuses NaN and Infinity, which Python reads and JSON does not have
        return isinstance(json.loads(fenced[1] if fenced else text, parse_constant=int), (dict, list))
    except (ValueError, RecursionError):  # a model that is stuck writes a thousand brackets
        return False


def has_phrase(text, phrase):
    """Return whether the phrase stands in the text in whole words, upper or lower case."""
    before, after = (r'\b' if re.match(r'\w', end) else '' for end in (phrase[:1], phrase[-1:]))
    return bool(re.search(before + re.escape(phrase) + after, text, re.I))


def forms(text):
    """Return the text in lower case: as it is, without quotation marks around it, without its last stop too."""
    plain = text.casefold().strip()
    bare = plain.strip(' "\'“”‘’*')
    return plain, bare, bare.rstrip('.!?')


CHECKS = {  # name: (type of its value, whether an answer passes)
    'contains': (str, has_phrase),
    'not_contains': (str, lambda text, phrase: not has_phrase(text, phrase)),
    'starts_with': (str, lambda text, start: any(form.startswith(start.casefold()) for form in forms(text))),
    'ends_with': (str, lambda text, end: any(form.endswith(end.casefold()) for form in forms(text))),
    'one_of': (list, lambda text, choices: any(choice.casefold() in forms(text) for choice in choices)),
    'regex': (str, lambda text, pattern: bool(re.search(pattern, text))),  # the only one that sees case
    'words': (int, lambda text, n: len(words_in(text)) == n),
    'min_words': (int, lambda text, n: len(words_in(text)) >= n),
    'max_words': (int, lambda text, n: len(words_in(text)) <= n),
    'sentences': (int, lambda text, n: count_sentences(text) == n),
    'max_sentences': (int, lambda text, n: count_sentences(text) <= n),
    'lines': (int, lambda text, n: sum(bool(line.strip()) for line in text.splitlines()) == n),
    'bullets': (int, lambda text, n: count_bullets(text) == n),
    'items': (int, lambda text, n: count_items(text) == n),
    'contains_number': (bool, lambda text, wanted: bool(re.search(r'\d', text)) == wanted),
    'is_json': (bool, lambda text, wanted: is_json(text) == wanted),
    'lowercase': (bool, lambda text, wanted: text.islower() == wanted),  # needs a letter
    'uppercase': (bool, lambda text, wanted: text.isupper() == wanted),
}
VALUES = {str: 'a text', list: 'a list of texts', int: 'a whole number', bool: 'true or false'}


def check(answer, checks):
    """Return a bool for each of `checks`, such as {'max_words': 20}: whether the answer passes. One without a
    word passes none, because silence would keep to every upper limit. UserError: what is not a check."""
    passed = []
    for one in checks:
        is_one = isinstance(one, dict) and len(one) == 1
        require(is_one, f'{one!r} is no check; write one as {{"max_words": 20}}.')
        ((name, value),) = one.items()
        require(name in CHECKS, f'There is no check {name!r}; there are: {", ".join(CHECKS)}.')
        kind, passes = CHECKS[name]
        texts = value if kind is list else [value] if kind is str else ['a word']
        valid = type(value) is kind and texts and all(isinstance(x, str) and x.strip() for x in texts)
        require(valid, f'The check {name!r} wants {VALUES[kind]}, not {value!r}.')
        try:
            passed.append(passes(answer, value) and bool(words_in(answer)))
        except re.error as error:
            raise UserError(f'The check "regex" has {value!r}, which is no pattern: {error}.') from None
    return passed


def format_compliance(answer, reference, ended, markers):
    """Return bools: it ended, repeats no marker of the prompt, has half to twice the words of the reference."""
    words, wanted = len(words_in(answer)), len(words_in(reference))
    no_markers, length = not any(marker in answer for marker in markers), wanted / 2 <= words <= 2 * wanted
    kept = {'format_ended': ended, 'format_no_markers': no_markers, 'format_length': length}
    return {**kept, 'format_compliance': all(kept.values())}
