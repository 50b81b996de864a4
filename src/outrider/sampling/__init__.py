"""From logits to a token: settings and grammar, the law they make, the numbers that draw."""
