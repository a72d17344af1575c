# A medium model on OpenWebText, 41.5M parameters at a 32k vocabulary.
include('owt.py')
model_size = 'medium'
batch_size = 32
gradient_accumulation_steps = 2
learning_rate = 8e-4
min_lr = learning_rate / 10
max_steps = 80000
