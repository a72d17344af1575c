# A small model on TinyStories, 23.4M parameters at a 32k vocabulary.
include('tinystories.py')
model_size = 'small'
batch_size = 64
learning_rate, min_lr = 1e-3, 1e-3 / 10
max_steps = 10000
