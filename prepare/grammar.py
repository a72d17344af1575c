"""Stories from a small grammar, and their exact probabilities.

A language model trained on them cannot do better than their known probability but by chance, and each of its samples
is a story or is not. They take a memory: what is lost in the third sentence is found in the ninth, whoever helped is
thanked, and "she" stays "she" to the end.

    from prepare import grammar
    text = grammar.story(random.Random(1))          # "... A frog saw her ..."
    grammar.log_prob(text)                          # in nats
    grammar.log_prob(text.replace("her", "his"))    # −inf: no story
    grammar.faults(text.replace("her", "his"))      # where it stops being one: [Fault(position, kind, said, expected)]

The grammar is stories.txt beside this file, which says how it is written; another such text makes another language.
Every choice follows Zipf's law: its r-th possibility has weight 1 / (r + 1), so that no weights are written down.
"""

import heapq
import itertools
import math
import random
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Recorded in prepared folders, which are reused for the same stories only: change it with stories.txt.
VERSION = {'prepare/grammar.py': '8daa642a586c4c61bb0c1afede843bdc0f01b16b9a0071e759a2f6ba3bcae937'}

_, TABLES, RULES = Path(__file__).with_name('stories.txt').read_text('utf-8').split('\n---\n')
KINDS = {  # of words that agree with what was said before, by form or variable; the others are things
    'pronoun': {'they', 'them', 'their', 'were'},
    'name': {'hero', 'pal'},
    'place': {'place', 'spot', 'trap'},
}
BLOCKS = r'\n(?! )'  # what is indented belongs to what stands above it


def make_row(word):
    return {'word': word, 'a': ('an ' if word[0].lower() in 'aeiou' else 'a ') + word}


def read_tables(text):
    """Return {table: {word: row}} of a text like TABLES; a row is {form: text}."""
    tables = {}
    for block in re.split(BLOCKS, text.strip()):
        (name, *columns), *lines = [[cell.strip() for cell in line.split('|')] for line in block.split('\n')]
        tables[name] = {}
        for words, *cells in lines:
            forms = dict(zip(columns, cells, strict=True))
            tables[name] |= {word: make_row(word) | forms for word in words.split(', ')}
    for row in [row for table in tables.values() for row in table.values()]:
        for column in [column for column in row if row[column] in tables.get(column, {})]:
            row |= tables[column][row[column]] | row  # Lily is a "she", so she has her "her"
    return tables


def read_rules(text):
    """Return {rule: text} of a text like RULES. What stands in brackets becomes a rule, with a number for a name."""
    rules = {}
    for block in re.split(BLOCKS, text.strip()):
        name, _, body = block.partition(':')
        body = re.sub(r'\s*\|\s*', '|', ' '.join(body.split()))
        body = body.replace(' (', '[ ').replace(')', '|]')  # what "(perhaps)" is short for
        while inner := re.search(r'\[([^][]*)\]', body):
            number = str(len(rules))
            rules[number] = inner[1]
            body = body.replace(inner[0], f'<{number}>')
        rules[name] = body
    return rules


def zipf(options):
    """Return [(probability, option), ...]: the r-th option, r = 1, 2, ..., has weight 1 / (r + 1)."""
    weights = [1 / (rank + 1) for rank in range(1, len(options) + 1)]
    return [(weight / sum(weights), option) for weight, option in zip(weights, options)]


class Node:
    """A state of the story: it says `text`, then goes on at one of the nodes `options`; one without any is the end."""

    def __init__(self, text, options):
        self.text, self.options = text, zipf(options)
        self.needs = set().union(*(option.needs for option in options))  # variables that must be bound here

    def transitions(self, bindings):
        """Return [(probability, text, next node, next bindings), ...], given bindings {variable: row}."""
        return [(p, self.text, option, bindings) for p, option in self.options]


class Slot(Node):
    """{hero.them} says a form of a row that is bound; {friend.a=place.friends} draws the row and binds it first."""

    def __init__(self, variable, form, parent, source, rows_of, then):
        super().__init__('', [then])
        self.variable, self.form = variable[0].lower() + variable[1:], form or 'word'
        self.capital, self.then = variable[0].isupper(), then
        kinds = [kind for kind, words in KINDS.items() if {self.form, self.variable} & words]
        self.kind = kinds[0] if kinds else 'thing'
        self.parent, self.source, self.rows_of = parent, source, rows_of
        self.needs = self.needs - {self.variable} | ({parent} - {None} if source else {self.variable})

    def text_of(self, row):
        text = row[self.form]
        return text[0].upper() + text[1:] if self.capital else text

    def transitions(self, bindings):
        cell = self.parent and bindings[self.parent][self.source]
        rows = self.rows_of(self.source, cell) if self.source else [(1.0, bindings[self.variable])]
        return [(p, self.text_of(row), self.then, {**bindings, self.variable: row}) for p, row in rows]


class Fault(NamedTuple):
    """Where a text is no story: `said` stands at a position where one of `expected` must stand.

    kind: what does not agree with what was said before: a pronoun, name, place or thing; '' where the text goes on as
    no story does.
    """

    position: int  # in characters
    kind: str
    said: str
    expected: tuple


class Grammar:
    """A distribution over stories, from texts like RULES and TABLES.

    It is a Markov chain, whose state is a node and the bindings; the probability of a text is summed over all walks.
    """

    def __init__(self, rules, tables):
        self.rules, self.tables = read_rules(rules), read_tables(tables)
        self.sources = {}  # of each variable: what it is drawn from
        self.rows_of, self.rows_like = cache(self.rows_of), cache(self.rows_like)
        self.start = self.link('story', Node('', []))
        if self.start.needs:
            raise ValueError(f'The rules can refer to {self.start.needs} before {{NAME=...}} introduces it.')

    def link(self, rule, then):
        """Return the node at which `rule` begins and after which comes the node `then`."""
        options = []
        for way in self.rules[rule].split('|'):
            node = then
            for piece in filter(None, reversed(re.split(r'(<\w+>|{.*?})', way))):
                node = self.node_of(piece, node)
            options.append(node)
        return Node('', options)

    def node_of(self, piece, then):
        if rule := re.fullmatch(r'<(\w+)>', piece):
            return self.link(rule[1], then)
        if slot := re.fullmatch(r'{(\w+)(?:\.(\w+))?(?:=(?:(\w+)\.)?(\w+))?}', piece):
            slot = Slot(*slot.groups(), self.rows_of, then)
            self.sources.setdefault(slot.variable, set()).update({slot.source} - {None})
            return slot
        if re.search(r'[][<>{}()]', piece):
            raise ValueError(f'The rules have a slot that cannot be read or a stray bracket in {piece!r}.')
        return Node(piece, [then])

    def rows_of(self, source, cell):
        """Return [(probability, row), ...] of the table `source`, or of those that a cell of that column names."""
        table = self.tables.get(source)  # none of that name: the words of the cell are all there is
        words = cell.split(', ') if cell else self.tables[source]
        return zipf([table[word] if table else make_row(word) for word in words])

    def walk(self, rng):
        """Yield a story step by step: (probability of this step, text, node)."""
        node, bindings = self.start, {}
        while transitions := node.transitions(bindings):
            here, weights = node, [p for p, *_ in transitions]
            p, text, node, bindings = rng.choices(transitions, weights)[0]
            yield p, text, here

    def story(self, rng):
        """Return one story, drawn with `rng`, a random.Random."""
        return ''.join(text for _, text, _ in self.walk(rng))

    def derivations(self, text=None):
        """Yield (log-probability in nats, text, bindings) of each way to tell a text; without one, of all stories."""
        agenda = [(0.0, '', self.start, {})]
        while agenda:
            log_p, prefix, node, bindings = agenda.pop()
            transitions = node.transitions(bindings)
            if not transitions and text in (None, prefix):
                yield log_p, prefix, bindings
            for p, more, then, bound in transitions:
                if text is None or text.startswith(more, len(prefix)):
                    agenda.append((log_p + math.log(p), prefix + more, then, bound))

    def log_prob(self, text):
        """Return the log-probability in nats that a story is exactly this text; -inf if none is."""
        return float(np.logaddexp.reduce([log_p for log_p, *_ in self.derivations(text)]))

    def parse(self, text):
        """Return the choices of a story, {variable: row}, of the likeliest way to tell it; None if the text is none."""
        ways = sorted(self.derivations(text), key=lambda way: way[0])
        return ways[-1][2] if ways else None

    def faults(self, text):
        """Return the Faults of a text, as few as there can be, in its order; [] if it is a story.

        A word that does not agree is a fault, after which the text may go on as if it did; what no story says, the
        last.
        """
        agenda, number, seen = [(0, 0, 0, (), self.start, {})], itertools.count(1), set()
        # Where the text stops being a story, the faults up to there, and what had to follow.
        furthest, told, expected = -1, (), []
        while agenda:  # fewest faults first, then furthest
            _, back, _, faults, node, bindings = heapq.heappop(agenda)
            position, transitions = -back, node.transitions(bindings)
            if not transitions and position == len(text):
                return [*faults]
            ways = [(more, then, bound, faults) for _, more, then, bound in transitions]
            right = tuple(dict.fromkeys(more for more, *_ in ways))
            for row in self.rows_like(node.variable, node.form) if isinstance(node, Slot) else ():
                if (said := node.text_of(row)) not in right:
                    fault = Fault(position, node.kind, said, right)
                    ways.append((said, node.then, {node.variable: row, **bindings}, (*faults, fault)))
            ways = [way for way in ways if text.startswith(way[0], position)]
            if not ways and position > furthest:
                furthest, told, expected = position, faults, []
            if not ways and position == furthest and faults == told:
                expected += right
            for more, then, bound, so_far in ways:
                state = position + len(more), id(then), tuple((name, id(row)) for name, row in bound.items())
                if (state, len(so_far)) not in seen:
                    seen.add((state, len(so_far)))
                    heapq.heappush(agenda, (len(so_far), -state[0], next(number), so_far, then, bound))
        return [*told, Fault(furthest, '', text[furthest : furthest + 40], tuple(expected))]

    def rows_like(self, variable, form):
        """Return the rows, of those that have this form, that a variable could be bound to anywhere."""
        rows = []
        for source in self.sources[variable]:
            cells = [row[source] for table in self.tables.values() for row in table.values() if source in row]
            words = [word for cell in cells for word in cell.split(', ')]
            rows += self.tables[source].values() if source in self.tables else map(make_row, words)
        return [row for row in rows if form in row]


GRAMMAR = Grammar(RULES, TABLES)
story, log_prob, parse, faults = GRAMMAR.story, GRAMMAR.log_prob, GRAMMAR.parse, GRAMMAR.faults


def stories(num_stories, seed=0, first=0):
    """Yield stories from `first` on; story i depends on (seed, i) only: a longer list begins with the shorter one."""
    for i in range(first, num_stories):
        yield story(random.Random(f'{seed}/{i}'))
