"""What a CLIP model is for: zero-shot classification and retrieval."""
