"""What a bag of words gets on SST-2, to read beside classify.py: logistic regression, its strength chosen on dev.

python tests/bag_of_words.py data/sst2
"""

import sys
from pathlib import Path

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression


def read(path):
    texts, labels = zip(*(line.split('\t') for line in path.read_text(encoding='utf-8').splitlines()))
    return texts, [int(label) for label in labels]


def accuracies(folder):
    """{split: accuracy} of train, dev and test."""
    sets = {split: read(Path(folder) / f'{split}.tsv') for split in ('train', 'dev', 'test')}
    words = CountVectorizer(binary=True, token_pattern=r'\S+').fit(sets['train'][0])
    rows = {split: words.transform(texts) for split, (texts, _) in sets.items()}
    models = [
        LogisticRegression(C=c, max_iter=1000).fit(rows['train'], sets['train'][1])
        for c in (0.03, 0.1, 0.3, 1, 3)
    ]
    best = max(models, key=lambda model: model.score(rows['dev'], sets['dev'][1]))
    return {split: best.score(rows[split], labels) for split, (_, labels) in sets.items()}


if __name__ == '__main__':
    print(', '.join(f'{split} {accuracy:.4f}' for split, accuracy in accuracies(sys.argv[1]).items()))
