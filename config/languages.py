# The language database of classify.py: language -> task -> data set; lm/languages.py says what the fields mean.
# A folder stands under data/ or is given as a path; what is none is looked for on the hub.
#   python classify.py --task=sentiment --train_langs=eng --eval_langs=eng
_glue = {  # columns and classes of nyu-mll/glue, whose sst2 is 'sentiment'
    'cola': (['sentence'], ['unacceptable', 'acceptable']),
    'mrpc': (['sentence1', 'sentence2'], ['not_equivalent', 'equivalent']),
    'qnli': (['question', 'sentence'], ['entailment', 'not_entailment']),
    'qqp': (['question1', 'question2'], ['not_duplicate', 'duplicate']),
    'rte': (['sentence1', 'sentence2'], ['entailment', 'not_entailment']),
    'wnli': (['sentence1', 'sentence2'], ['not_entailment', 'entailment']),
    'mnli': (['premise', 'hypothesis'], ['entailment', 'neutral', 'contradiction']),
}
LANGUAGES = {
    'eng': {  # SST-2: data/sst2/{train,dev,test}.tsv, a text and its label per line
        'sentiment': {
            'dataset': 'sst2',
            'columns': ['text', 'label'],
            'train_features': ['text'],
            'eval_feature': 'label',
            'splits': ['train', 'dev', 'test'],
            'task_type': 'classification',
            'classes': ['negative', 'positive'],
        },
        'entailment': {
            'dataset': 'facebook/xnli',
            'config': 'en',
            'train_features': ['premise', 'hypothesis'],
            'eval_feature': 'label',
            'splits': ['train', 'validation', 'test'],
            'task_type': 'classification',
            'classes': ['entailment', 'neutral', 'contradiction'],
        },
        **{
            name: {
                'dataset': 'nyu-mll/glue',
                'config': name,
                'train_features': features,
                'eval_feature': 'label',
                'splits': ['train', 'validation_matched' if name == 'mnli' else 'validation'],
                'task_type': 'classification',
                'classes': classes,
            }
            for name, (features, classes) in _glue.items()
        },
    },
    'spa': {
        'sentiment': {
            'dataset': 'cardiffnlp/tweet_sentiment_multilingual',
            'config': 'spanish',
            'train_features': ['text'],
            'eval_feature': 'label',
            'splits': ['train', 'validation', 'test'],
            'task_type': 'classification',
            'classes': ['negative', 'neutral', 'positive'],
        },
        'entailment': {
            'dataset': 'facebook/xnli',
            'config': 'es',
            'train_features': ['premise', 'hypothesis'],
            'eval_feature': 'label',
            'splits': ['train', 'validation', 'test'],
            'task_type': 'classification',
            'classes': ['entailment', 'neutral', 'contradiction'],
        },
    },
    'rus': {  # data/rus-sentiment/{train,test}.csv with the columns text, text-phoneme and label
        'sentiment': {
            'dataset': 'rus-sentiment',
            'train_features': ['text'],
            'eval_feature': 'label',
            'splits': ['train', 'test'],
            'task_type': 'classification',
            'classes': 2,
        },
        'entailment': {
            'dataset': 'facebook/xnli',
            'config': 'ru',
            'train_features': ['premise', 'hypothesis'],
            'eval_feature': 'label',
            'splits': ['train', 'validation', 'test'],
            'task_type': 'classification',
            'classes': ['entailment', 'neutral', 'contradiction'],
        },
    },
    'pol': {  # data/pol-sentiment/{train,test}.csv, as above
        'sentiment': {
            'dataset': 'pol-sentiment',
            'train_features': ['text'],
            'eval_feature': 'label',
            'splits': ['train', 'test'],
            'task_type': 'classification',
            'classes': 2,
        },
        'entailment': {
            'dataset': 'pol-entailment',
            'train_features': ['sentence_A', 'sentence_B'],
            'eval_feature': 'entailment_judgment',
            'splits': ['train', 'validation', 'test'],
            'task_type': 'classification',
            'classes': ['NEUTRAL', 'CONTRADICTION', 'ENTAILMENT'],
        },
    },
}
