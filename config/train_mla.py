# The main job: MLA on Shakespeare, one token per character. Under a minute on two CPU cores; a GPU needs no flag.
# The cache holds 32 numbers per token and layer where ordinary attention of this width needs 256.

out_dir = "out-mla"
dataset = "shakespeare_char"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 64

pos_emb = "rope"  # rotary positions with MLA's decoupled rotary key learn fastest
use_mla = True
mla_latent_dim = 16
mla_rope_dim = 16

batch_size = 6
gradient_accumulation_steps = 2  # over all processes: the same run on one as under torchrun on two
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
