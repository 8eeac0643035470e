"""config.json of a Phi-3-V checkpoint: the published fields, checked, and written in the published form.

`Phi3VConfig` keeps `rope_scaling` as published (type `su`, exactly three keys), because other loaders of the
published model accept nothing else. The published format assumes CLIP ViT-L/14-336; the optional
`clip_vision_config` gives other sizes.
"""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, PretrainedConfig

from phi3v_dist.processor.preprocessor_config import CODE_REPOSITORY
from shards.common.errors import BadInputError

CLIP_L_14_336: dict[str, Any] = {  # constants in the published modelling code
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}
AUTO_MAP = {
    "AutoConfig": f"{CODE_REPOSITORY}--configuration_phi3_v.Phi3VConfig",
    "AutoModelForCausalLM": f"{CODE_REPOSITORY}--modeling_phi3_v.Phi3VForCausalLM",
}
_EMBD_LAYER = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}


class Phi3VConfig(PretrainedConfig):
    """The published fields (defaults: Phi-3-vision-128k-instruct, without its RoPE factors).

    rope_scaling: {"type": "su" ("longrope" is read as su), "short_factor", "long_factor"}, each factor a list
        of head_dim / 2 numbers; None for plain RoPE.
    img_processor, embd_layer: the published dicts; only the published architecture is supported.
    clip_vision_config: fields of CLIPVisionConfig that differ from ViT-L/14-336; image_size is the side of a
        tile in px.

    Raises BadInputError, naming the field, if the config describes another architecture or is contradictory.
    """

    model_type = "phi3_v"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    resid_pdrop: float | int = 0.0
    embd_pdrop: float | int = 0.0
    attention_dropout: float | int = 0.0
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    original_max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_theta: float | int = 10000.0
    rope_scaling: dict | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 32000
    sliding_window: int | None = None
    embd_layer: dict | None = None
    img_processor: dict | None = None
    clip_vision_config: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # The published file asks for flash_attention_2; this model has its own attention.
        kwargs.pop("_attn_implementation", None)
        kwargs.pop("auto_map", None)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name in ("clip_vision_config", "rope_scaling", "img_processor", "embd_layer"):
            if not isinstance(getattr(self, name), dict | None):
                raise BadInputError(f"config: {name} is {getattr(self, name)!r}, expected its fields")
        clip = {**CLIP_L_14_336, **(self.clip_vision_config or {})}
        scaling = self.rope_scaling
        if scaling is not None and scaling.get("type", scaling.get("rope_type")) in ("su", "longrope"):
            factors = {name: scaling.get(name) for name in ("long_factor", "short_factor")}
            self.rope_scaling = {**factors, "type": "su"}
        self._check(clip)
        if self.img_processor is None:
            self.img_processor = {
                "image_dim_out": clip["hidden_size"],
                "model_name": "openai/clip-vit-large-patch14-336",
                "name": "clip_vision_model",
                "num_img_tokens": (clip["image_size"] // clip["patch_size"] // 2) ** 2,
            }
        if self.embd_layer is None:
            self.embd_layer = dict(_EMBD_LAYER)
        super().__post_init__(**kwargs)

    def _check(self, clip: dict[str, Any]) -> None:
        sizes = {name: getattr(self, name) for name in _SIZES}
        sizes |= {f"clip_vision_config.{name}": clip[name] for name in _CLIP_SIZES}
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadInputError(f"config: {name} is {value!r}, expected a whole number from 1")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or value <= 0:
                raise BadInputError(f"config: {name} is {value!r}, expected a number above 0")
        for name in ("pad_token_id", "sliding_window"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise BadInputError(f"config: {name} is {value!r}, expected a whole number or null")
        for name in ("attention_dropout", "embd_pdrop"):
            if getattr(self, name):
                raise BadInputError(f"config: {name} is {getattr(self, name)!r}, only 0 is supported")
        heads, groups = self.num_attention_heads, self.num_key_value_heads or 1
        if self.hidden_size % heads or heads % groups:
            raise BadInputError(
                f"config: hidden_size {self.hidden_size} must be a multiple of num_attention_heads {heads}, "
                f"and that of num_key_value_heads {groups}; correct one of them"
            )
        self._check_rope(self.hidden_size // heads)
        if self.sliding_window is not None and self.sliding_window < self.max_position_embeddings:
            raise BadInputError(
                f"config: sliding_window {self.sliding_window} is shorter than max_position_embeddings "
                f"{self.max_position_embeddings}; this model attends to all positions, set it to null"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise BadInputError(
                f"config: pad_token_id {self.pad_token_id} is outside the vocabulary of {self.vocab_size}; "
                "set it to the tokenizer's <|endoftext|>"
            )
        if self.tie_word_embeddings:
            raise BadInputError(
                "config: tie_word_embeddings is true, Phi-3-V has its own lm_head; set it to false"
            )
        for key, value in _EMBD_LAYER.items():
            found = (self.embd_layer or {}).get(key, value)
            if found != value:
                raise BadInputError(f"config: embd_layer.{key} is {found!r}, only {value!r} is supported")
        width = (self.img_processor or {}).get("image_dim_out", clip["hidden_size"])
        if width != clip["hidden_size"]:
            raise BadInputError(
                f"config: img_processor.image_dim_out {width} is not the CLIP width {clip['hidden_size']}; "
                "give clip_vision_config with the sizes of the tower"
            )
        if clip["image_size"] % (2 * clip["patch_size"]):
            raise BadInputError(
                f"config: clip_vision_config.image_size {clip['image_size']} is not a multiple of two "
                f"patches of {clip['patch_size']} px"
            )

    def _check_rope(self, head_dim: int) -> None:
        if self.rope_scaling is None:
            return
        kind = self.rope_scaling.get("type")
        if kind != "su":
            raise BadInputError(
                f"config: rope_scaling.type is {kind!r}, Phi-3-V has 'su'; use the model's own config.json"
            )
        for name in ("short_factor", "long_factor"):
            factor = self.rope_scaling[name]
            if not isinstance(factor, list | tuple) or len(factor) != head_dim // 2:
                found = f"{len(factor)} values" if isinstance(factor, list | tuple) else repr(factor)
                raise BadInputError(
                    f"config: rope_scaling.{name} has {found}, head_dim {head_dim} needs {head_dim // 2}"
                )
            if not all(isinstance(each, int | float) and each > 0 for each in factor):
                raise BadInputError(f"config: rope_scaling.{name} must hold only numbers above 0")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a dict, as in transformers. Raises BadInputError if it is of another model type."""
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise BadInputError(
                f"config: model_type is {found!r}, expected 'phi3_v'; not a Phi-3-V checkpoint"
            )
        return super().from_dict(config_dict, **kwargs)

    def clip_config(self) -> CLIPVisionConfig:
        """The CLIPVisionConfig of the vision tower: ViT-L/14-336 with the changes of `clip_vision_config`."""
        return CLIPVisionConfig(**{**CLIP_L_14_336, **(self.clip_vision_config or {})})

    @property
    def tile(self) -> int:
        """The side of a tile in px."""
        return int({**CLIP_L_14_336, **(self.clip_vision_config or {})}["image_size"])

    def to_dict(self) -> dict[str, Any]:
        """The published fields: also torch_dtype and auto_map, but none of transformers' own."""
        fields = super().to_dict()
        kept = {name: fields[name] for name in _PUBLISHED if name in fields}
        kept["architectures"] = ["Phi3VForCausalLM"]
        kept["auto_map"] = dict(AUTO_MAP)
        kept["model_type"] = self.model_type
        kept["torch_dtype"] = fields.get("dtype") or "bfloat16"
        kept["transformers_version"] = fields["transformers_version"]
        if kept["clip_vision_config"] is None:
            del kept["clip_vision_config"]
        return kept

    def to_diff_dict(self) -> dict[str, Any]:
        """All published fields, also those with default values: other loaders have other defaults."""
        return self.to_dict()


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "original_max_position_embeddings",
)
_CLIP_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
_PUBLISHED = (
    "attention_dropout",
    "bos_token_id",
    "clip_vision_config",
    "embd_layer",
    "embd_pdrop",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "img_processor",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "pad_token_id",
    "resid_pdrop",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)
