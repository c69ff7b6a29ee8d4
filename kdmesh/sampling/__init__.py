"""What draws tokens from logits, whoever computes them."""
