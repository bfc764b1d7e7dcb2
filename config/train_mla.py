# The main example: MLA on Shakespeare, one token per character. It takes less than a minute on two
# CPU cores, and runs on a GPU without further flags. The cache has 32 numbers per token and layer;
# ordinary attention of this width needs 256.

out_dir = "out-mla"
dataset = "shakespeare_char"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 64

pos_emb = "rope"  # with MLA's decoupled rotary key it learns faster than learned positions
use_mla = True
mla_latent_dim = 16
mla_rope_dim = 16

batch_size = 6
gradient_accumulation_steps = 2  # over all processes: one process and two make the same run
max_iters = 700
eval_interval = 250
eval_iters = 40
log_interval = 25

optimizer = "muon"
muon_learning_rate = 0.01
learning_rate = 6e-3
min_lr = 3e-4
beta2 = 0.99
warmup_iters = 50
