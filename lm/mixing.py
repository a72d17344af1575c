"""Several prepared folders as one: dataset='openwebtext:0.7,tinystories:0.3'."""

from fractions import Fraction

from lm.configurator import UserError


def parse(dataset):
    """The names and the weights, which add up to 1, of NAME:WEIGHT,NAME:WEIGHT."""
    names, weights = zip(*(weighted(part.strip(), dataset) for part in dataset.split(',')))
    return names, [weight / sum(weights) for weight in weights]


def weighted(part, dataset):
    """(name, weight) of NAME:WEIGHT."""
    name, _, number = part.rpartition(':')
    try:
        weight = Fraction(number)
    except (ValueError, ZeroDivisionError):
        weight = 0
    if not name or weight <= 0:
        raise UserError(
            f'{part!r} in dataset={dataset} is no name with a weight above 0; write '
            'NAME:WEIGHT,NAME:WEIGHT, as in openwebtext:0.7,tinystories:0.3.'
        )
    return name, weight


class Mix:
    """Several folders of one tokenizer, of which rows are drawn in proportion to their weights.

    `dataset` is NAME:WEIGHT,NAME:WEIGHT; weights count relative to their sum. What a Folder is asked for as a whole
    (config, tokenizer, fingerprint, tokens_per_byte) a Mix answers too.
    """

    def __init__(self, dataset, folders, weights):
        self.path, self.folders, self.weights = dataset, folders, weights
        first, *others = folders
        self.tokenizer = first.tokenizer
        for folder in others:
            if folder.tokenizer.to_json() != first.tokenizer.to_json():
                raise UserError(
                    f'{first.path} and {folder.path} have different tokenizers, of '
                    f'{first.tokenizer.vocab_size} and {folder.tokenizer.vocab_size} tokens, so the same '
                    f'id means different text; prepare the second with --tokenizer={first.path}.'
                )
        if len({folder.path.resolve() for folder in folders}) < len(folders):
            raise UserError(
                f'dataset={dataset} names a folder twice; give it once, with the sum of its weights.'
            )
        configs = [folder.config for folder in folders]
        self.config = {
            'name': '+'.join(config['name'] for config in configs),
            'start_token': configs[0]['start_token'],
            'prompt_format': next(filter(None, (config['prompt_format'] for config in configs)), None),
            'max_seq_len': max(config.get('max_seq_len') or 0 for config in configs),
        }

    def release(self):
        for folder in self.folders:
            folder.release()

    @property
    def fingerprint(self):
        return ','.join(
            f'{folder.fingerprint}:{weight}' for folder, weight in zip(self.folders, self.weights)
        )

    def tokens_per_byte(self, split):
        """Of a text that has of each folder so many tokens as its weight says."""
        return 1 / float(
            sum(
                weight / Fraction(folder.tokens_per_byte(split))
                for folder, weight in zip(self.folders, self.weights)
            )
        )


class MixedRows:
    """The rows of several folders, dealt out evenly: among any first n, of each as many as its weight says.

    Which folder a number belongs to, and how many of that folder came before, are exact and need no state: the
    first folder has floor(n * weight) of n rows, and the others share the rest among them in the same way.
    """

    def __init__(self, parts, weights, training):
        self.parts, self.row_length = parts, parts[0].row_length
        self.masked = any(part.masked for part in parts)
        self.shares = [
            weight / sum(weights[i:]) for i, weight in enumerate(weights)
        ]  # of what earlier parts leave
        if training:
            self.num_rows = sum(part.num_rows for part in parts)
        else:  # as many as there are in these proportions, none of them twice
            self.num_rows = int(min(part.num_rows / weight for part, weight in zip(parts, weights)))
            while any(count > part.num_rows for count, part in zip(self.counts(self.num_rows), parts)):
                self.num_rows -= 1
            self.taken = self.counts(self.num_rows)

    def counts(self, number):
        """How many of the first `number` rows are of each part."""
        counts = []
        for share in self.shares:
            counts.append(number * share.numerator // share.denominator)
            number -= counts[-1]
        return counts

    def place(self, number):
        """The part that row `number` is of, and how many rows of that part come before it."""
        before = self.counts(number)
        after = self.counts(number + 1)
        return next((part, count) for part, count in enumerate(before) if after[part] > count)

    def read(self, row, key=None):
        """An evaluation row; those of a part are spread over its split."""
        part, count = self.place(int(row))
        rows = self.parts[part]
        return rows.read(count * rows.num_rows // self.taken[part], ())
