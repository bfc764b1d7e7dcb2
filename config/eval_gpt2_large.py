# The loss of GPT-2 (774M parameters), as published, on OpenWebText or another dataset in its
# tokens.
#   python train.py config/eval_gpt2_large.py --dataset=shakespeare

init_from = "gpt2-large"
dataset = "openwebtext"

batch_size = 8
eval_iters = 500
eval_only = True
