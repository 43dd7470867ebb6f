"""Images and sounds as injected embeddings: load a model's vision tower alone, build prompts, store features."""

from .architectures import Features
from .feature_store import FeatureStore
from .prompt_builder import build_multimodal, build_prompt
from .tower import VisionTower, load_vision_tower

__all__ = [
    "FeatureStore",
    "Features",
    "VisionTower",
    "build_multimodal",
    "build_prompt",
    "load_vision_tower",
]
