# GPT-2 (124M) on OpenWebText with nanoGPT's recipe: about half a million tokens per iteration.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

out_dir = "out-gpt2"
dataset = "openwebtext"

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8  # over all processes

max_iters = 600000
lr_decay_iters = 600000
warmup_iters = 2000
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
compile = True
