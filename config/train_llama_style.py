# Llama's block on the works of Shakespeare, one token per character: RMSNorm, SwiGLU, rotary
# positions, grouped key/value heads (4 query heads share 2), no biases. The token embedding is the
# output matrix too, as in the small Llama 3.2 models. An export of it is a LlamaForCausalLM.
# Validation loss 1.74 after about a minute on two CPU cores.

out_dir = "out-llama-style"
dataset = "shakespeare_char"

n_layer = 2
n_head = 4
n_kv_head = 2
n_embd = 128
block_size = 128

pos_emb = "rope"
norm = "rmsnorm"
mlp = "swiglu"
bias = False
tie_weights = True

batch_size = 12  # sequences an iteration: one process and two make the same run
gradient_accumulation_steps = 1
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
