# Claims about blocks that are no attention of a causal model: tokens -> latents -> tokens, and an
# SVD of the value activations inside forward. See docs/claims.md.

title = "Claims: blocks"
measure = "three_step svd_forward"
max_iters = 0
dataset = "shakespeare_char"
block_size = 64
