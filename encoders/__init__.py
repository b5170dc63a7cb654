"""The CLIP model: towers, tokenizer, preprocessing, objectives, import and export."""
