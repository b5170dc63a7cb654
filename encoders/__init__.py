"""The CLIP model: towers, tokenizer, preprocessing, objectives, import and export."""

# Before anything of this package, so that one thread does it: Flower's simulation loads both apps at the same
# time, and transformers and peft import each other.
import peft  # noqa: F401
