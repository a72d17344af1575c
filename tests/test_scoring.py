"""Figures agree with values worked out by hand and with plain code; intervals cover what they promise."""

import json
import math
import statistics

import numpy as np
import pytest

from lm import scoring
from lm.configurator import ROOT, UserError
from lm.scoring import check, distinct, entropy, mean_ci, rep, rouge_l, share_ci

PROMPTS = json.loads((ROOT / 'config' / 'instructions.json').read_text(encoding='utf-8'))


# ---------------------------------------------------------------------------- diversity


def test_distinct_counts_over_all_samples():
    samples = ['a b a b'.split(), 'a b c'.split()]
    assert distinct(samples, 1) == 3 / 7
    assert distinct(samples, 2) == 3 / 5  # ab ba ab | ab bc
    assert distinct(samples, 4) == 1.0  # only the first sample has four words


def test_rep_counts_what_the_same_sample_said_before():
    assert rep([[1, 2, 1, 2, 1]], n=2) == 2 / 4  # 12 21 12 21
    assert rep([[1, 2, 3], [1, 2, 3]], n=2) == 0.0  # repeats another sample, not itself
    assert rep([[5] * 7, [1, 2, 3, 4]], n=4) == 3 / 5  # 4 and 1 four-grams, 3 of them repeats


def test_entropy_is_of_the_pooled_tokens_in_nats():
    assert entropy([[1, 2], [3, 4]]) == pytest.approx(math.log(4))
    assert entropy([[1, 1], [1, 2]]) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert math.copysign(1, entropy([[7, 7]])) == 1 and entropy([[7, 7]]) == 0


def test_diversity_of_nothing_is_none():
    for samples in ([], [[]], [[], []]):
        assert distinct(samples, 1) is rep(samples, 1) is entropy(samples) is None
    assert distinct([[1, 2]], 3) is rep([[1, 2]], 3) is None


# ---------------------------------------------------------------------------- overlap


def test_rouge_l_by_hand():
    # Lin 2004: "police kill the gunman" shares "police the gunman" with the reference, in order.
    assert rouge_l('Police kill the gunman.', 'police killed the gunman') == 2 * 3 / 8
    assert rouge_l('the gunman kill police', 'police killed the gunman') == 2 * 2 / 8
    assert rouge_l('', 'a word') == 0.0
    assert rouge_l('a word', ' ... ') is None


def test_the_longest_common_subsequence_is_the_longest_of_all():
    def subsequences(words):
        kept = [[bool(number >> i & 1) for i in range(len(words))] for number in range(2 ** len(words))]
        return {tuple(word for word, keep in zip(words, keeps) if keep) for keeps in kept}

    random = np.random.default_rng(0)
    for _ in range(20):
        a, b = (random.choice(list('xyz'), random.integers(1, 8)).tolist() for _ in range(2))
        longest = max(map(len, subsequences(a) & subsequences(b)))
        assert rouge_l(' '.join(a), ' '.join(b)) == 2 * longest / (len(a) + len(b))


# ---------------------------------------------------------------------------- intervals


@pytest.mark.parametrize('n, quantile', [(10, 2.262157), (30, 2.045230), (1000, 1.962341)])
def test_equal_weights_give_students_interval(n, quantile):
    values = np.random.default_rng(n).normal(size=n)
    mean, (low, high) = mean_ci(values)
    assert (low + high) / 2 == pytest.approx(mean) == pytest.approx(values.mean())
    half = quantile * statistics.stdev(values) / math.sqrt(n)
    assert (high - low) / 2 == pytest.approx(half, rel=0.02 if n < 30 else 0.003)


def test_three_documents_have_no_interval():
    assert mean_ci([1, 2, 3]) == (2, None)  # of 95 % it would cover 89


def test_the_weighted_interval_by_hand():
    # Mean 15/5 = 3; residuals 1, -1, 0, 0 (of 4, 2, 6, 3 with weights 1, 1, 2, 1), shares 1/5, 1/5, 2/5, 1/5; t with 3
    # degrees.
    half = (1.96 + (1.96**3 + 1.96) / 12) * math.sqrt((1 / 25 + 1 / 25) / (4 / 5))
    mean, ci = mean_ci([4, 2, 6, 3], [1, 1, 2, 1])
    assert mean == 3 and ci == pytest.approx([3 - half, 3 + half], rel=1e-4)


def test_an_interval_that_cannot_be_computed_is_none():
    assert mean_ci([]) == mean_ci([0.0, 0.0], [0, 0]) == mean_ci([1.0, math.nan]) == (None, None)
    assert mean_ci([6.0], [2]) == mean_ci([6.0, 0.0], [2, 0]) == (3, None)
    assert mean_ci([3 * 2.0**99, 1.0], [2.0**99, 1]) == (3, None)  # a share of 1 in float64
    assert share_ci([]) == (None, None)


def lengths(kind, shape, random):
    if kind == 'lognormal':
        return np.exp(random.normal(5, 1, shape))
    return 50 * (1 + random.pareto(2.2, shape))


def share_that_covers(intervals, truth):
    return np.mean([low <= truth <= high for _, (low, high) in intervals])


@pytest.mark.parametrize('kind', ['lognormal', 'pareto'])
@pytest.mark.parametrize('n', [30, 150])
def test_the_interval_covers_under_heavy_tailed_lengths(kind, n):
    random = np.random.default_rng(n)
    weights = lengths(kind, (2000, n), random)
    of_document, of_tokens = random.normal(size=(2, *weights.shape))
    # Long documents are easier, so that the ratio is not the mean of the documents.
    nll = weights * (3.5 - 0.1 * np.log(weights / 150) + of_document / 2 + 2 * of_tokens / np.sqrt(weights))
    everything = lengths(kind, 4_000_000, np.random.default_rng(0))
    truth = 3.5 - 0.1 * (everything @ np.log(everything / 150)) / everything.sum()
    assert 0.92 <= share_that_covers(map(mean_ci, nll, weights), truth) <= 0.98


def test_pairing_covers_and_tells_apart_what_overlaps():
    random = np.random.default_rng(0)
    weights = lengths('lognormal', (500, 60), random)
    hardness = 3.5 + random.normal(size=weights.shape)  # common to both models
    a, b = (weights * (hardness + shift + 0.1 * random.normal(size=weights.shape)) for shift in (0.1, 0.0))
    pairs = [mean_ci(x - y, w) for x, y, w in zip(a, b, weights)]
    assert 0.92 <= share_that_covers(pairs, 0.1) <= 0.98
    assert np.mean([low > 0 for _, (low, _) in pairs]) > 0.8
    alone = [(mean_ci(x, w)[1], mean_ci(y, w)[1]) for x, y, w in zip(a, b, weights)]
    assert np.mean([of_a[0] > of_b[1] for of_a, of_b in alone]) < 0.01


def test_figures_of_intervals_are_plain_numbers():
    mean, ci = mean_ci(np.random.default_rng(1).normal(size=40))
    share, share_interval = share_ci([np.True_, np.False_])
    assert all(type(number) is float for number in (mean, *ci, share, *share_interval))


def test_a_share_leaves_doubt_about_all_and_none():
    assert share_ci([True] * 10) == (1.0, [pytest.approx(0.7225, abs=1e-4), pytest.approx(1.0)])
    value, (low, high) = share_ci([True] * 50 + [False] * 50)  # by Wilson's formula: 0.4038, 0.5962
    assert value == 0.5 and low == pytest.approx(0.4038, abs=1e-4) and high == pytest.approx(0.5962, abs=1e-4)


# ---------------------------------------------------------------------------- checks of answers


@pytest.mark.parametrize(
    'answer, reference, ended, broken',
    [
        ('one two', 'a b c d', True, None),
        ('1 2 3 4 5 6 7 8', 'a b c d', True, None),
        ('one', 'a b c d', True, 'format_length'),
        ('one two', 'a b', False, 'format_ended'),
        ('a <|user|>', 'a b', True, 'format_no_markers'),
    ],
)
def test_an_answer_has_the_form_of_one(answer, reference, ended, broken):
    kept = scoring.format_compliance(answer, reference, ended, ['### Instruction:', '<|user|>'])
    failed = {name for name, is_kept in kept.items() if not is_kept}
    assert failed == ({broken, 'format_compliance'} if broken else set()) and len(kept) == 4


@pytest.mark.parametrize(
    'one, kept, broken',
    [
        ({'contains': 'blue'}, 'It is Blue.', 'It is bluer.'),
        ({'not_contains': 'red'}, 'A hundred.', 'A red one.'),
        ({'starts_with': 'Once upon'}, '"once upon a time', 'It was once upon'),
        ({'ends_with': 'the end'}, 'That is the end."', 'the end of it'),
        ({'ends_with': '?'}, 'Who?', 'Me.'),
        ({'one_of': ['yes', 'no']}, ' **No.** ', 'no way'),
        ({'regex': r'^\d{4}$'}, '2024', '2024!'),
        ({'words': 3}, 'red – green blue', 'red green'),
        ({'min_words': 2}, 'two words', 'one'),
        ({'max_words': 2}, 'two words', 'now three words'),
        ({'sentences': 2}, 'Dr. A. Smith paid 3.50 today. "Really?" she asked', 'One. Two. Three.'),
        ({'sentences': 3}, '1. One.\n2. Two... or so.\n3. Three, e.g. this', 'Only one.'),
        ({'max_sentences': 1}, 'Just "one!"', 'First. Second.'),
        ({'lines': 2}, 'a\n\nb\n', 'a b'),
        ({'bullets': 2}, 'Here:\n1. **a**\n   - deep\n2. b', '**a**\n**b**'),
        ({'items': 3}, 'They are red, green, and blue.', 'red and green'),
        ({'items': 3}, 'Here they are:\n- a\n- b\n- c', 'a\nb'),
        ({'is_json': True}, '```json\n{"a": [1]}\n```', '{"a": NaN}'),
        ({'is_json': True}, '[1, 2]', '[' * 100_000 + '1'),
        ({'is_json': False}, '5', '[5]'),
        ({'contains_number': True}, '7 up', 'seven'),
        ({'lowercase': True}, 'a 1.', 'A'),
        ({'uppercase': True}, 'A 1.', 'a'),
    ],
)
def test_each_check_tells_kept_from_broken(one, kept, broken):
    assert check(kept, [one]) == [True] and check(broken, [one]) == [False]


def test_every_check_has_a_prompt_and_silence_passes_none():
    used = {name for prompt in PROMPTS for one in prompt['checks'] for name in one}
    assert used == set(scoring.CHECKS)
    for nothing in ('', ' \n', '...'):
        assert not any(any(check(nothing, prompt['checks'])) for prompt in PROMPTS)


@pytest.mark.parametrize(
    'one, words',
    [
        ({'max_wrods': 3}, "no check 'max_wrods'; there are: contains, .*max_words"),
        ({'max_words': '3'}, 'a whole number'),
        ({'max_words': True}, 'a whole number'),
        ({'is_json': 1}, 'true or false'),
        ({'contains': ' '}, 'a text'),
        ({'one_of': 'yes'}, 'a list of texts'),
        ({'one_of': []}, 'a list of'),
        ({'one_of': [1]}, 'a list of'),
        ({'regex': '('}, 'no pattern'),
        ({'lines': 1, 'words': 2}, 'no check'),
        ('max_words', 'no check'),
        ({}, 'no check'),
    ],
)
def test_what_is_no_check_is_refused(one, words):
    for answer in ('An answer.', ''):
        with pytest.raises(UserError, match=words):
            check(answer, [one])


def test_each_shipped_prompt_can_be_followed_and_not_by_repeating_it():
    assert len({prompt['instruction'] for prompt in PROMPTS}) == len(PROMPTS) >= 60
    assert sum(len(prompt['checks']) >= 2 for prompt in PROMPTS) >= len(PROMPTS) / 2
    for prompt in PROMPTS:
        assert list(prompt) == ['instruction', 'input', 'checks', 'output'], prompt
        assert all(check(prompt['output'], prompt['checks'])), prompt
        for echo in (prompt['instruction'], prompt['input'], prompt['instruction'] + '\n' + prompt['input']):
            assert not all(check(echo, prompt['checks'])), prompt
