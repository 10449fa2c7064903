"""How the demo checkpoint is made: text, tokenizer, training, quantisation. Needs the extra `train`."""
