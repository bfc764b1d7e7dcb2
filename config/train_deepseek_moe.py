# DeepSeek-V3's block with experts on the works of Shakespeare, one token per character: the model
# of config/train_deepseek_style.py, in whose second layer a token passes 2 of 16 routed experts and
# a shared one. An export of it is a DeepseekV3ForCausalLM. Evaluations print the smallest and the
# largest load of an expert, as a share of the load of all.
# Validation loss 1.74 in 70 seconds of one CPU core.

out_dir = "out-deepseek-moe"
dataset = "shakespeare_char"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 128

pos_emb = "rope"
use_mla = True
mla_latent_dim = 32  # DeepSeek's kv_lora_rank
mla_q_latent_dim = 64  # q_lora_rank
mla_nope_dim = 32  # qk_nope_head_dim; a value head has 128 / 4 = 32 too
mla_rope_dim = 16  # qk_rope_head_dim

moe_experts = 16  # n_routed_experts
moe_active = 2  # num_experts_per_tok
moe_shared = 1  # n_shared_experts
moe_hidden = 96  # moe_intermediate_size
moe_groups = 4  # n_group
moe_active_groups = 2  # topk_group
moe_scale = 2.5  # routed_scaling_factor
moe_dense_layers = 1  # first_k_dense_replace
moe_balance_step = 0.01  # 0.001 is for the many more steps of large models

norm = "rmsnorm"
norm_eps = 1e-6
mlp = "swiglu"
bias = False
tie_weights = False

batch_size = 12  # sequences an iteration: one process and two make the same run
gradient_accumulation_steps = 1
max_iters = 500
eval_interval = 250
eval_iters = 40
log_interval = 25

optimizer = "muon"
muon_learning_rate = 0.01
learning_rate = 6e-3
min_lr = 3e-4
beta2 = 0.99
warmup_iters = 50
