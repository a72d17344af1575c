# A medium model on TinyStories, 42.6M parameters at a 32k vocabulary.
include('tinystories.py')
model_size = 'medium'
batch_size = 64
learning_rate, min_lr = 8e-4, 8e-4 / 10
max_steps = 15000
