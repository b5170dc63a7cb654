"""What can be wrong with a model or with what is put into it."""


class EncoderError(ValueError):
    """A model, tokenizer or preprocessing cannot be built or loaded as asked."""
