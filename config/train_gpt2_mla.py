# train_gpt2.py with MLA: a latent and a rotary key, 192 + 32 cached numbers per token and layer
# instead of 1,536.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_mla.py

out_dir = "out-gpt2-mla"
dataset = "openwebtext"

pos_emb = "rope"
use_mla = True
mla_latent_dim = 192
mla_rope_dim = 32

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
