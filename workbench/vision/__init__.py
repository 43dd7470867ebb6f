"""Pictures and sounds: towers read alone, prompts built, features kept."""

from .build import build_multimodal, build_prompt
from .families import Features
from .features import FeatureStore
from .flows import compare_flows, flows_table
from .tower import VisionTower, load_vision_tower

__all__ = [
    "FeatureStore",
    "Features",
    "VisionTower",
    "build_multimodal",
    "build_prompt",
    "compare_flows",
    "flows_table",
    "load_vision_tower",
]
