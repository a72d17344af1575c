# Children's stories from a grammar, one per row: as many steps as two slow cores make in four minutes.
dataset = 'stories'
mode = 'documents'
model_size = 'tiny'
block_size = 160
batch_size = 12
optimizer = 'muon'
learning_rate = 1e-2
schedule = 'linear'
max_steps = 930
decay_embedding = True  # of so few steps; False for longer runs
eval_every = 500
eval_tokens = 76_800
log_every = 20
