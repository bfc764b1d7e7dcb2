# The baby GPT of train_shakespeare_char.py with MLA: a latent and a rotary key, 96 + 32 cached
# numbers per token and layer instead of 768. Everything else is the same.

out_dir = "out-shakespeare-mla"
dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2

pos_emb = "rope"
use_mla = True
mla_latent_dim = 96
mla_rope_dim = 32

batch_size = 64
gradient_accumulation_steps = 1
max_iters = 5000
eval_interval = 250
eval_iters = 200
log_interval = 10

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
