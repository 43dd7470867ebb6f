"""Configuration of a model that brings its own code: patches through two linear maps."""

from transformers import LlamaConfig, PretrainedConfig


class TinyVisionConfig(PretrainedConfig):
    model_type = "tiny_vision"

    def __init__(self, hidden_size=32, patch_size=14, **kwargs):
        self.hidden_size, self.patch_size = hidden_size, patch_size
        super().__init__(**kwargs)


class TinyConfig(PretrainedConfig):
    model_type = "tiny_vlm"
    sub_configs = {"vision_config": TinyVisionConfig, "text_config": LlamaConfig}  # noqa: RUF012 - Transformers reads it from the class

    def __init__(self, vision_config=None, text_config=None, **kwargs):
        self.vision_config = (
            TinyVisionConfig(**(vision_config or {}))
            if not isinstance(vision_config, PretrainedConfig)
            else vision_config
        )
        self.text_config = (
            LlamaConfig(**(text_config or {})) if not isinstance(text_config, PretrainedConfig) else text_config
        )
        super().__init__(**kwargs)
