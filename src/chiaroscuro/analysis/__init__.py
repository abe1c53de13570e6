"""What one measures on a model: perplexity, operation counts, where the routing went."""
