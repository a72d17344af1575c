# Instruction tuning of a small model on a CPU, ten minutes on two cores.
#   python prepare/text.py --input=books.jsonl --name=books
#   python train.py config/books.py --block_size=384
#   python prepare/instruct.py --source=alpaca_1k.json --name=alpaca --tokenizer=out/ar-books-tiny-v1
#   python finetune.py config/finetune_alpaca.py --init_from=out/ar-books-tiny-v1
dataset = 'alpaca'
num_epochs = 6
batch_size = 8
learning_rate = 1e-3  # of so small a model; 2e-5 is for pretrained ones of a billion parameters
eval_every = 60
