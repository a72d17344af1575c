# A medium model on TinyStories, 41.5M parameters at a 32k vocabulary.
include('tinystories.py')
model_size = 'medium'
batch_size = 64
gradient_accumulation_steps = 1
learning_rate = 8e-4
min_lr = learning_rate / 10
max_steps = 15000
