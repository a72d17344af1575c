# Shakespeare by characters on a CPU: two minutes on two cores.
dataset = 'shakespeare_char'
block_size = 64
batch_size = 32
optimizer = 'muon'
learning_rate = 8e-3
schedule = 'linear'
max_steps = 1200
eval_every = 300
