# The loss of GPT-2 (1,558M parameters), as published, on OpenWebText or another dataset in its
# tokens.
#   python train.py config/eval_gpt2_xl.py --dataset=shakespeare

init_from = "gpt2-xl"
dataset = "openwebtext"

batch_size = 8
eval_iters = 500
eval_only = True
