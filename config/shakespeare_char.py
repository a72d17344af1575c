# Shakespeare by characters on a CPU: ten minutes on two cores.
dataset = 'shakespeare_char'
block_size = 256
batch_size = 8
optimizer = 'muon'
learning_rate = 8e-3
schedule = 'linear'
max_steps = 2440
decay_embedding = True  # of five epochs: 0.015 nats, where stories that never repeat want none
eval_every = 500
