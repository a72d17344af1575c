"""Stories from a small grammar, and their exact probabilities.

Of most text nobody can say how likely it was. Of these stories it is known, and any text can be judged: a language
model trained on them cannot do better than the truth but by chance, and each of its samples is a story or is not.
They take a memory: what is lost in the third sentence is found in the ninth, whoever helped is thanked, and "she"
stays "she" to the end.

    from prepare import grammar
    text = grammar.story(random.Random(1))          # "... A frog saw her ..."
    grammar.log_prob(text)                          # in nats
    grammar.log_prob(text.replace("her", "his"))    # −inf: no story

RULES are written like this: `{hero=heroes}` draws a row of the table `heroes`, binds it to `hero` and says it.
`{hero}` says it again, `{hero.them}` says another form of it (its cell in the column `them`), and `{Hero}`
begins with a capital. `{spot=place.spots}` draws from that cell of the place, so that the place decides what is
there; `{hero.kind=heroes}` draws a hero, but says only the kind. `<plot>` is another rule, `[one|two]` is one or
two, and `(Perhaps.)` is said or left out. Every choice follows Zipf's law: its r-th possibility has weight
1 / (r + 1), so that no weights have to be written down.
"""

import math
import random
import re
from functools import cache

import numpy as np

# Recorded in prepared folders, which are reused for the same stories only: change it with any of them.
VERSION = {'prepare/grammar.py': '8daa642a586c4c61bb0c1afede843bdc0f01b16b9a0071e759a2f6ba3bcae937'}

# A table begins with its name and its columns. "Lily, Mia | girl" is two rows. Every row also has a form `a`
# ("an owl"). A column called after a table names rows of that table, and a row that names just one has all of
# that one's forms as well: Lily, being a "she", has her "her".
TABLES = """
pronouns | they | them | their | were
  she    | she  | her  | her   | was
  he     | he   | him  | his   | was
  it     | it   | it   | its   | was
  they   | they | them | their | were
heroes      | kind     | pronouns
  Lily, Mia | girl     | she
  Tom, Max  | boy      | he
  Pip       | mouse    | he
  Clover    | rabbit   | she
  Ruby, Zoe | girl     | she
  Beep      | robot    | it
  Bruno     | bear     | he
  Robin     | child    | they
  Hazel     | hedgehog | she
  Noodle    | dragon   | they
  Ben, Leo  | boy      | he
traits
  little, curious, small, cheerful, shy, clever, kind, young, silly, gentle, tiny, sleepy, odd, very polite
loves                  | doing
  to sing              | singing
  to jump in puddles   | jumping in puddles
  to count the stars   | counting the stars
  to chase butterflies | chasing butterflies
  to tell jokes        | telling jokes
  to bake tiny cakes   | baking tiny cakes
  to look for rainbows | looking for rainbows
  to talk to clouds    | talking to clouds
weathers | night
  sunny  | the stars came out one by one
  rainy  | the rain stopped at last
  windy  | the wind went to sleep
  snowy  | the snow fell softly on the roof
  foggy  | the fog tucked in all the houses
  frosty | the frost drew flowers on the window
places    | at             | spots                          | traps                       | friends
  forest  | in the forest  | under a fern, in a hollow tree | in a thorn bush, in a pine  | owl, squirrel, crow
  park    | in the park    | under the slide, on a bench    | in a fence, in a drain      | dog, duck, squirrel
  garden  | in the garden  | under a big leaf, by the gate  | in a net, in a flower pot   | snail, bee, frog
  beach   | at the beach   | in a tide pool, under a towel  | in a hole, in a bucket      | crab, dog
  farm    | on the farm    | in the hay, under the tractor  | in the mud, in a milk can   | cow, goat, pig
  pond    | by the pond    | among the reeds, on a lily pad | in the mud, in a hollow log | frog, duck, goose
  market  | at the market  | behind the pumpkins, in a cart | in a sack, under a crate    | cat, goose, pig
  hill    | on the hill    | behind a rock, under a bush    | on a ledge, in a deep crack | goat, crow
  library | in the library | on a shelf, between two books  | in a drawer, in a vase      | cat, owl, snail
friends    | pronouns | sound       | names           | search
  dog      | he       | Woof        | Biscuit, Scout  | sniffed all over the ground
  owl      | she      | Hoo hoo     | Olive, Luna     | flew up high to look around
  frog     | he       | Ribbit      | Hopper, Lumpy   | hopped from stone to stone
  cat      | she      | Meow        | Misty, Pepper   | looked with two green eyes
  duck     | she      | Quack       | Puddle, Daisy   | paddled around in a circle
  squirrel | he       | Chit chit   | Nutty, Dash     | ran up and down every tree
  goat     | he       | Maa         | Billy, Clogs    | climbed on a barrel to see
  cow      | she      | Moo         | Bella, Butter   | peered over the bushes
  crow     | she      | Caw         | Inky, Jet       | peeked into an empty nest
  goose    | she      | Honk        | Greta, Mabel    | stretched out a long, long neck
  pig      | he       | Oink        | Truffle, Hamlet | dug and dug with a pink snout
  bee      | she      | Bzzz        | Honey, Fuzz     | asked every single flower
  crab     | he       | Click clack | Pinch, Sideways | looked left, then left again
  snail    | it       | Hmm         | Speedy, Turbo   | searched one whole leaf, very slowly
elders                | pronouns
  mom, grandma, aunt  | she
  dad, grandpa, uncle | he
colors
  red, blue, yellow, green, orange, purple, golden, pink, silver, spotted
toys
  ball, kite, teddy bear, hat, drum, toy train, boat, mitten, book, bell, balloon, spoon, button
lows      | joys
  sad     | happy, glad, full of joy
  worried | calm, cheerful
  grumpy  | smiling, giggling
games
  tag, hide and seek, catch, leapfrog, follow the leader
snacks
  cookie, apple, sandwich, pancake, pear, muffin, orange, waffle, egg
babies     | mother
  kitten   | cat
  duckling | duck
  puppy    | dog
  lamb     | sheep
  chick    | hen
  piglet   | pig
tools        | used
  rope       | tied a good knot
  long stick | pushed as hard as a giant
  ladder     | climbed up step by step
  shovel     | dug a little path
fears       | when                           | truth                               | deed
  the dark  | the lamp went out              | The dark is only the day asleep     | walked down the dark hall
  thunder   | the sky began to rumble        | Thunder is only clouds clapping     | clapped right back
  the wind  | the wind howled at the door    | The wind just wants to play         | opened the door to it
  spiders   | a spider came down on a thread | A spider is a very small knitter    | told it all about wool
  the bath  | the tub was full to the top    | A bath is a pond that came to visit | jumped in with a splash
  the broom | the broom fell with a bang     | A broom is a horse that cannot run  | rode it around the table
gifts     | from              | made    | mess   | thanks
  cake    | flour and honey   | baked   | flour  | ate every crumb
  card    | paper and glue    | made    | glue   | put it above the fireplace
  scarf   | fluffy wool       | knitted | wool   | wore it all week, even in bed
  picture | every color       | painted | paint  | hung it on the wall
  hat     | felt and feathers | sewed   | fluff  | wore it to breakfast
  kite    | silk and string   | made    | string | flew it over the rooftops
charges       | do    | did     | well
  rose        | water | watered | had three new buds
  goldfish    | feed  | fed     | was blowing happy bubbles
  apple tree  | water | watered | had its very first apple
  pony        | brush | brushed | was shining like the moon
  baby turtle | feed  | fed     | had grown as big as a bun
woes     | cure
  cold   | a warm blanket
  hungry | a bowl of soup
  tired  | a soft pillow
  lost   | a map of the whole town
  bored  | a book about trains
goals                   | craft     | from                | flop      | fixes           | far
 fly to the moon        | rocket    | boxes and a pot     | fell over | wings, a hat    | the apple tree
 sail to the sunset     | boat      | a tub and a sheet   | sank      | a sail, a cork  | the next pond
 ride to the North Pole | sled      | a ladder and spoons | got stuck | wax, a flag     | the corner
 dive to the sea floor  | submarine | a barrel and a hose | filled up | a lid, a window | the end of the pool
"""

# A rule is its name, a colon and a template, indented where it goes on; what it binds may be used from there on.
RULES = """
story: <birth> <love> <plot> <ending>
birth: Once upon a time there was {trait.a=traits} {hero.kind=heroes} named {hero}.
  | {Hero=heroes} was {trait.a=traits} {hero.kind}.
  | In a house [by the sea|made of stone] lived {trait.a=traits} {hero.kind=heroes} named {hero}.
love: {Hero.they} loved {love=loves}. | What {hero} liked best was {love.doing=loves}.
plot: <lost> | <friend> | <rescue> | <sharing> | <fear> | <surprise> | <promise> | <noise> | <invention>
day: One {weather=weathers} [day|morning|afternoon],
She: {Hero.they} | {Hero}
lost: <day> {hero} took {hero.their} {color=colors} {toy=toys} to the {place=places}.
  But on the way home, the {toy} was gone! <She> felt very {low=lows}.
  {Friend.a=place.friends} saw {hero.them}. "{friend.sound}! I will help you," said the {friend}.
  {Friend.they} {friend.search}, and {hero} looked [everywhere|high and low|in all the wrong places].
  At last they found the {color} {toy} {spot=place.spots}.
  "Thank you, {friend}!" said {hero} (and gave {friend.them} a hug).
  {Hero} was not {low} anymore. {Hero.they} {hero.were} {joy=low.joys}.
friend: But {hero} had no one to play with and often felt lonely.
  <day> {hero.they} sat [alone|on a stone] {place.at=places}.
  "{friend.sound=place.friends}!" said [a small voice|somebody]. It was {friend.a}!
  "My name is {pal=friend.names}. Do you want to play {game=games}?" asked the {friend}.
  <She> [nodded|said yes right away]. They played until [supper|it was dark|their legs were tired].
  ({Pal} won every time, but {hero} did not mind.)
  "Come back to the {place} tomorrow," said {pal}. And {hero} was never lonely again.
rescue: <day> {hero} was {place.at=places} when {hero.they} heard a tiny voice.
  "Help! [Please help!|Help!]" It was {baby.a=babies}, stuck {trap=place.traps}.
  "Do not be afraid, little {baby}," said {hero}. {Hero} [ran to get|quickly found] {tool.a=tools}.
  {Hero.they} {tool.used}, and [pop|hop|one, two, three], the {baby} was free!
  "You saved my {baby}!" [cried|laughed] the mother {baby.mother}. ({Hero} blushed.)
  From then on, the {baby} said hello whenever {hero} came to the {place}.
sharing: <day> {hero} sat {place.at=places} with {snack.a=snacks}.
  Just then {friend.a=place.friends} came by. "{friend.sound}! I am so hungry," said the {friend}.
  {Hero} looked at the {snack}. It was [a very small|the last|such a good] {snack}. (<She> thought hard.)
  Then {hero} broke the {snack} in two and gave the [bigger|first] half to the {friend}.
  "[Thank you, {hero}|You are the kindest {hero.kind} {place.at}]," said the {friend}.
  {Friend.they} ate it [in one bite|with {friend.their} eyes closed].
  (Half {snack.a} tasted better than a whole one.)
fear: There was just one thing: {hero} was afraid of {fear=fears}.
  One {weather=weathers} evening, {fear.when}. <She> hid [under the bed|behind the sofa|inside a big coat].
  (Only {hero.their} toes stuck out.) {Hero.their} {elder=elders} sat down beside {hero.them}.
  "{fear.truth}," said {hero.their} {elder} (and held {hero.their} hand).
  {Hero} took a deep breath. Then {hero.they} [stood up|counted to three] and {fear.deed}.
  "[Bravo|Look at you], {hero}!" said {hero.their} {elder}. "I am not afraid of {fear} anymore," said {hero}.
surprise: <day> {hero} had a secret. It was almost {hero.their} {elder=elders}'s birthday!
  So {hero} {gift.made=gifts} {gift.a} from {gift.from}.
  (There was {gift.mess} on the floor and {gift.mess} on {hero.their} nose.)
  "What are you doing in there?" [asked|called] {hero.their} {elder}. "Nothing!" [said|sang] {hero}.
  The next morning {hero} held out the {gift}. "[Surprise|Happy birthday]!"
  "You {gift.made} this {gift} for me?" {Hero.their} {elder} [was so happy|had to sit down].
  {Elder.they} hugged {hero.them} and {gift.thanks}.
promise: <day> {hero.their} {elder=elders} had to go away.
  "Will you {charge.do=charges} my {charge}?" {elder.they} asked. "I promise," said {hero}.
  Soon {friend.a=friends} came to the door. "{friend.sound}! Come and play {game=games}," said the {friend}.
  "First I have to {charge.do} the {charge}," said {hero}. "A promise is a promise."
  So {hero.they} {charge.did} the {charge}, and the {friend} [helped|waited]. Then they played {game}.
  When {hero.their} {elder} came home, the {charge} {charge.well}. ({Hero} felt as tall as a tower.)
noise: <day> {hero} was taking a nap when a strange noise woke {hero.them}.
  "{friend.sound=friends}! {friend.sound}!" It came from [under the bed|the closet|behind the curtain].
  "Is it a [ghost|monster|pirate]?" whispered {hero}. ({Hero.they} picked up a [pillow|broom|boot].)
  Step by step, {hero.they} crept closer. It was only {friend.a}! "I am so {woe=woes}," said the {friend}.
  So {hero} brought {friend.them} {woe.cure}. The {friend} was not {woe} anymore.
  Soon {friend.they} [was snoring|curled up] in {hero}'s [slipper|bed|sock drawer]. "{friend.sound}!"
invention: <day> {hero} wanted to {goal=goals}.
  <She> built a {goal.craft} out of {goal.from}. "Three, two, one, go!" [shouted|cried] {hero}.
  But the {goal.craft} {goal.flop}. (<She> kicked a bucket. The bucket did not mind.)
  {Friend.a=friends} looked it over. "{friend.sound}! It needs {fix=goal.fixes}," said the {friend}.
  So they added {fix} and tried again.
  The {goal.craft} did not {goal}, but it did reach {goal.far}. "We did it, {friend}!" said {hero}.
ending: That night {weather.night}, and {hero} dreamed of {love.doing}.
  | When {hero} went to bed, {weather.night}. "Good night, {trait} {hero}," [said|whispered] the moon.
  | And the next day? The next day {hero} went back to {love.doing}. (The end.)
"""


def blocks_of(text):
    return re.split(r'\n(?! )', text.strip())  # what is indented belongs to what stands above it


def make_row(word):
    return {'word': word, 'a': ('an ' if word[0].lower() in 'aeiou' else 'a ') + word}


def read_tables(text):
    """Return {table: {word: row}} of a text like TABLES; a row is {form: text}."""
    tables = {}
    for block in blocks_of(text):
        (name, *columns), *lines = [[cell.strip() for cell in line.split('|')] for line in block.split('\n')]
        tables[name] = {
            word: {**make_row(word), **dict(zip(columns, cells, strict=True))}
            for words, *cells in lines
            for word in words.split(', ')
        }
    for row in [row for table in tables.values() for row in table.values()]:
        for column in [column for column in row if row[column] in tables.get(column, {})]:
            row.update({**tables[column][row[column]], **row})  # Lily is a "she", so she has her "her"
    return tables


def read_rules(text):
    """Return {rule: text} of a text like RULES. What stands in brackets becomes a rule, with a number for a name."""
    rules = {}
    for block in blocks_of(text):
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
    total = sum(1 / (rank + 2) for rank in range(len(options)))
    return [(1 / (rank + 2) / total, option) for rank, option in enumerate(options)]


class Node:
    """A state of the story: it says `text`, then goes on at one of the nodes `options`; one without any is the end.

    `needs` are the variables that must be bound here, since the rest refers to them.
    """

    def __init__(self, text, options):
        self.text, self.options = text, zipf(options)
        self.needs = set().union(*(option.needs for option in options))

    def transitions(self, bindings):
        """Return [(probability, text, next node, next bindings), ...], given bindings {variable: row}."""
        return [(p, self.text, option, bindings) for p, option in self.options]


class Slot(Node):
    """{hero.them} says a form of a row that is bound; {friend.a=place.friends} draws the row and binds it first."""

    def __init__(self, variable, form, parent, source, rows_of, then):
        super().__init__('', [then])
        self.variable, self.form = variable[0].lower() + variable[1:], form or 'word'
        self.capital, self.then = variable[0].isupper(), then
        self.parent, self.source, self.rows_of = parent, source, rows_of
        self.needs = self.needs - {self.variable} | ({parent} - {None} if source else {self.variable})

    def text_of(self, row):
        text = row[self.form]
        return text[0].upper() + text[1:] if self.capital else text

    def transitions(self, bindings):
        if self.source:
            rows = self.rows_of(self.source, bindings[self.parent][self.source] if self.parent else None)
        else:
            rows = [(1.0, bindings[self.variable])]
        return [(p, self.text_of(row), self.then, {**bindings, self.variable: row}) for p, row in rows]


class Grammar:
    """A distribution over stories, from texts like RULES and TABLES.

    It is a Markov chain, whose state is a node and the bindings. To draw a story is to walk along it; the
    probability of a text is summed over the walks that say just that.
    """

    def __init__(self, rules, tables):
        self.rules, self.tables = read_rules(rules), read_tables(tables)
        self.rows_of = cache(self.rows_of)
        self.start = self.link('story', Node('', []))
        for name in sorted(self.start.needs):
            raise ValueError(f'The rules can refer to {name!r} before a {{{name}=...}} has introduced it.')

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
            return Slot(*slot.groups(), self.rows_of, then)
        if re.search(r'[][<>{}()]', piece):
            raise ValueError(f'The rules have a slot that cannot be read or a stray bracket in {piece!r}.')
        return Node(piece, [then])

    def rows_of(self, source, cell):
        """Return [(probability, row), ...] of the table `source`, or of those that a cell of a column `source` names."""
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
        """Yield (log-probability in nats, text) of each way to tell just this text; without one, of all stories."""
        agenda = [(0.0, '', self.start, {})]
        while agenda:
            log_p, prefix, node, bindings = agenda.pop()
            transitions = node.transitions(bindings)
            if not transitions and text in (None, prefix):
                yield log_p, prefix
            for p, more, then, bound in transitions:
                if text is None or text.startswith(more, len(prefix)):
                    agenda.append((log_p + math.log(p), prefix + more, then, bound))

    def log_prob(self, text):
        """Return the log-probability in nats that a story is exactly this text; -inf if none is."""
        return float(np.logaddexp.reduce([log_p for log_p, _ in self.derivations(text)]))


GRAMMAR = Grammar(RULES, TABLES)
story, log_prob = GRAMMAR.story, GRAMMAR.log_prob


def stories(num_stories, seed=0):
    """Yield stories; story i depends on (seed, i) only, so that a longer list begins with the shorter one."""
    for i in range(num_stories):
        yield story(random.Random(f'{seed}/{i}'))
