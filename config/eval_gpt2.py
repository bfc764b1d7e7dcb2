# The loss of GPT-2 (124M parameters), as published, on OpenWebText or another dataset in its
# tokens.
#   python train.py config/eval_gpt2.py --dataset=shakespeare

init_from = "gpt2"
dataset = "openwebtext"

batch_size = 8
eval_iters = 500
eval_only = True
