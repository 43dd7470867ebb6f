"""Transformers as an engine: the reference, and the whole multimodal model."""
