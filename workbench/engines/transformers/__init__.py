"""Transformers as an engine: its language model as the reference for comparisons, and its whole multimodal model."""
