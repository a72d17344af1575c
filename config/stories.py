# Children's stories from a grammar, on a CPU: a minute on two cores.
dataset = 'stories'
model_size = 'tiny'
block_size = 256
batch_size = 16
optimizer = 'muon'
learning_rate = 8e-3
schedule = 'linear'
max_steps = 500
eval_every = 250
eval_batches = 10
