# Children's stories from a grammar, one per row: 6 minutes on two slow cores.
dataset = 'stories'
mode = 'documents'
model_size = 'tiny'
block_size = 160
batch_size = 24
optimizer = 'muon'
learning_rate = 6e-3
schedule = 'linear'
max_steps = 600
eval_every = 300
eval_tokens = 76_800
log_every = 20
