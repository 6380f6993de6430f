"""Training: pictures, the tokenizer, its tokens, the transformer, and the loop they share."""
