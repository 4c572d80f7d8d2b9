"""The numbers of a Qwen3-VL: read from and written to the released `config.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

MODEL_TYPE = "qwen3_vl"
DTYPES = ("float32", "bfloat16", "float16")
_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


class ConfigError(ValueError):
    """A configuration that cannot be a Qwen3-VL; the message names the file and the field."""


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder.

    Attributes:
        depth: number of blocks.
        hidden_size, intermediate_size, num_heads: of every block.
        patch_size, temporal_patch_size: a patch is temporal_patch_size x patch_size x patch_size pixels.
        spatial_merge_size: m x m patches become one token of the text model.
        out_hidden_size: the text model's hidden size.
        num_position_embeddings: a square grid of learned positions, resampled to every image.
        deepstack_visual_indexes: blocks whose output also enters the first text layers, one each.
    """

    depth: int = 24
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    out_hidden_size: int = 2048
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (5, 11, 17)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class TextConfig:
    """The language model.

    Attributes:
        num_attention_heads, num_key_value_heads, head_dim: query heads Hq, key and value heads Hkv, their dimension D.
        max_position_embeddings: longest sequence.
        rope_theta: base of the rotary frequencies.
        mrope_section: how many of the D / 2 frequencies belong to time, height and width.
        attention_bias: whether the attention projections have biases (the released models have none).
    """

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 262144
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    attention_bias: bool = False


@dataclass(frozen=True)
class Qwen3VLConfig:
    """A complete model: text, vision, and the ids of the tokens that stand for images and videos.

    Attributes:
        attention, vision_attention: the attention of every text layer and every vision block
            (`qvl_model.attention`) that the weights were trained with; none is "fused" for all.
        weights: the format of packed weights (`qvl_model.packing`), or none.

    >>> Qwen3VLConfig.qwen3_vl_2b().text.num_hidden_layers
    28
    """

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tie_word_embeddings: bool = True
    dtype: str = "bfloat16"
    attention: tuple[str, ...] = ()
    vision_attention: tuple[str, ...] = ()
    weights: str = ""

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def qwen3_vl_2b(cls) -> Qwen3VLConfig:
        """The released Qwen3-VL-2B."""
        return cls()

    @classmethod
    def qwen3_vl_4b(cls) -> Qwen3VLConfig:
        """The released Qwen3-VL-4B: the 2B's vision encoder, a wider and deeper text model."""
        text = replace(
            TextConfig(), hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32
        )
        return cls(text, replace(VisionConfig(), out_hidden_size=2560))

    @classmethod
    def qwen3_vl_8b(cls) -> Qwen3VLConfig:
        """The released Qwen3-VL-8B: a larger vision encoder with heads of 72, an untied head."""
        text = replace(
            TextConfig(), hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32
        )
        vision = VisionConfig(
            depth=27,
            hidden_size=1152,
            intermediate_size=4304,
            out_hidden_size=4096,
            deepstack_visual_indexes=(8, 16, 24),
        )
        return cls(text, vision, tie_word_embeddings=False)

    @classmethod
    def full_capacity_2b(cls) -> Qwen3VLConfig:
        """The 2B with 32 text layers and 32 query heads (8 key and value heads, head_dim 128)."""
        return cls(text=replace(TextConfig(), num_hidden_layers=32, num_attention_heads=32))

    @classmethod
    def digits(cls, vocab_size: int = 512) -> Qwen3VLConfig:
        """The shape of the small checkpoint that ships; its own `config.json` has the vocabulary and token ids."""
        text = TextConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=4096,
            rope_theta=1e4,
            mrope_section=(6, 5, 5),
        )
        vision = VisionConfig(
            depth=4,
            hidden_size=128,
            intermediate_size=384,
            num_heads=4,
            patch_size=12,
            out_hidden_size=192,
            num_position_embeddings=64,
            deepstack_visual_indexes=(1, 2),
        )
        return cls(text, vision, 5, 6, 3, 4, dtype="float32")

    @classmethod
    def from_json(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> Qwen3VLConfig:
        """Reads a `config.json`, a folder that has one, or its parsed content.

        Raises:
            FileNotFoundError: there is no such file.
            ConfigError: it is not JSON, not a Qwen3-VL, or inconsistent; the message names the file and the field.
        """
        if isinstance(source, Mapping):
            return _parse(source, "config")
        path = Path(source)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: must be a JSON object, got {type(content).__name__}")
        return _parse(content, str(path))

    def to_dict(self) -> dict[str, Any]:
        """The content of the released `config.json`."""
        text = {name: value for name, value in vars(self.text).items() if name not in ("rope_theta", "mrope_section")}
        text |= {
            "model_type": "qwen3_vl_text",
            "hidden_act": "silu",
            "rope_theta": self.text.rope_theta,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": list(self.text.mrope_section),
                "rope_type": "default",
            },
        }
        vision = {**vars(self.vision), "model_type": "qwen3_vl", "hidden_act": "gelu_pytorch_tanh"}
        vision["deepstack_visual_indexes"] = list(self.vision.deepstack_visual_indexes)
        kinds = {"text": list(self.attention), "vision": list(self.vision_attention)}
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": MODEL_TYPE,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "tie_word_embeddings": self.tie_word_embeddings,
            "dtype": self.dtype,
            "text_config": text,
            "vision_config": vision,
            **({"qvl_attention": kinds} if any(kinds.values()) else {}),
            **({"qvl_weights": self.weights} if self.weights else {}),
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes `config.json` in the released format."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def num_parameters(self) -> int:
        """Number of parameters, computed from the shapes alone; a tied head counts once."""
        from .parameters import count

        return count(self)


def _parse(content: Mapping[str, Any], where: str) -> Qwen3VLConfig:
    kind = content.get("model_type")
    if kind != MODEL_TYPE:
        raise ConfigError(f"{where}: model_type must be {MODEL_TYPE!r}, got {kind!r}")
    text = _section(content.get("text_config"), f"{where}: text_config")
    vision = _section(content.get("vision_config"), f"{where}: vision_config")
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):  # the second is the newer name, and then has rope_theta inside
        if text.get(name) is not None:
            rope |= _section(text[name], f"{where}: text_config.{name}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ConfigError(f"{where}: text_config.rope_scaling.rope_type must be 'default', got {kind!r}")
    if rope.get("mrope_interleaved", True) is not True:
        raise ConfigError(f"{where}: text_config.rope_scaling.mrope_interleaved must be true")
    extra = {"rope_theta": text.get("rope_theta", rope.get("rope_theta")), "mrope_section": rope.get("mrope_section")}
    for section, activation in ((text, "silu"), (vision, "gelu_pytorch_tanh")):
        if section.get("hidden_act", activation) != activation:
            raise ConfigError(f"{where}: hidden_act must be {activation!r}, got {section['hidden_act']!r}")
    ids = {name: _integer(content[name], f"{where}: {name}") for name in _TOKEN_IDS if name in content}
    tied = content.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    dtype = content.get("dtype") or content.get("torch_dtype") or text.get("dtype") or "bfloat16"
    try:
        return Qwen3VLConfig(
            text=_build(TextConfig, {**text, **extra}, f"{where}: text_config"),
            vision=_build(VisionConfig, vision, f"{where}: vision_config"),
            tie_word_embeddings=_boolean(tied, f"{where}: tie_word_embeddings"),
            dtype=dtype,
            attention=_names(content, "text", where),
            vision_attention=_names(content, "vision", where),
            weights=str(content.get("qvl_weights", "")),
            **ids,
        )
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(where) else f"{where}: {message}") from None


def _names(content: Mapping[str, Any], part: str, where: str) -> tuple[str, ...]:
    """The entry of "qvl_attention", which released checkpoints do not have."""
    where = f"{where}: qvl_attention"
    names = _section(content.get("qvl_attention", {}), where).get(part, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}.{part} must be a list of names, got {names!r}")
    return tuple(names)


def _section(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        raise ConfigError(f"{where} is missing")
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be an object, got {value!r}")
    return value


def _build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """The dataclass from the values of its fields: integers must be integers, all but `attention_bias` must be
    there."""
    chosen: dict[str, Any] = {}
    for name, definition in kind.__dataclass_fields__.items():  # type: ignore[attr-defined]
        value = values.get(name)
        if value is None:
            if name in ("attention_bias", "mrope_section", "in_channels"):
                continue
            raise ConfigError(f"{where}.{name} is missing")
        if definition.type == "int":
            value = _integer(value, f"{where}.{name}")
        elif definition.type == "float":
            value = _number(value, f"{where}.{name}")
        elif definition.type == "bool":
            value = _boolean(value, f"{where}.{name}")
        elif definition.type.startswith("tuple"):
            if not isinstance(value, (list, tuple)):
                raise ConfigError(f"{where}.{name} must be a list of integers, got {value!r}")
            value = tuple(_integer(item, f"{where}.{name}") for item in value)
        chosen[name] = value
    return kind(**chosen)


def _integer(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{where} must be a non-negative integer, got {value!r}")
    return value


def _number(value: Any, where: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ConfigError(f"{where} must be a positive number, got {value!r}")
    return float(value)


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{where} must be true or false, got {value!r}")
    return value


def _check_sizes(config: Qwen3VLConfig) -> None:
    """Every size is at least 1 and, as an index of a tensor, below 2^31; every special token is in the vocabulary."""
    for section in ("text", "vision"):
        for name, value in vars(getattr(config, section)).items():
            if type(value) is int and not 0 < value < 2**31:
                raise ConfigError(f"{section}_config.{name} must be from 1 to 2^31 - 1, got {value}")
    for name in _TOKEN_IDS:
        token, vocabulary = getattr(config, name), config.text.vocab_size
        if not 0 <= token < vocabulary:
            raise ConfigError(f"{name} ({token}) must be below text_config.vocab_size ({vocabulary})")
    if config.dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {config.dtype!r}")


def _check(config: Qwen3VLConfig) -> None:
    """The relations between the numbers that the model relies on."""
    _check_sizes(config)
    text, vision = config.text, config.vision
    side = round(vision.num_position_embeddings**0.5)
    layers = range(vision.depth)
    rules = [
        (
            text.num_attention_heads % text.num_key_value_heads == 0,
            "text_config.num_attention_heads",
            f"({text.num_attention_heads}) must be a multiple of num_key_value_heads ({text.num_key_value_heads})",
        ),
        (
            len(text.mrope_section) == 3 and 2 * sum(text.mrope_section) == text.head_dim,
            "text_config.rope_scaling.mrope_section",
            f"{list(text.mrope_section)} must be three numbers whose sum is half of head_dim ({text.head_dim})",
        ),
        (
            vision.hidden_size % (4 * vision.num_heads) == 0,
            "vision_config.hidden_size",
            f"({vision.hidden_size}) must be a multiple of 4 num_heads ({vision.num_heads})",
        ),
        (
            side * side == vision.num_position_embeddings,
            "vision_config.num_position_embeddings",
            f"({vision.num_position_embeddings}) must be a square",
        ),
        (
            vision.out_hidden_size == text.hidden_size,
            "vision_config.out_hidden_size",
            f"({vision.out_hidden_size}) must be text_config.hidden_size ({text.hidden_size})",
        ),
        (
            all(index in layers for index in vision.deepstack_visual_indexes)
            and len(set(vision.deepstack_visual_indexes)) == len(vision.deepstack_visual_indexes),
            "vision_config.deepstack_visual_indexes",
            f"{list(vision.deepstack_visual_indexes)} must be different blocks below depth ({vision.depth})",
        ),
        (
            len(vision.deepstack_visual_indexes) <= text.num_hidden_layers,
            "vision_config.deepstack_visual_indexes",
            f"has more entries than there are text layers ({text.num_hidden_layers})",
        ),
    ]
    for holds, name, problem in rules:
        if not holds:
            raise ConfigError(f"{name} {problem}")
