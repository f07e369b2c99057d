"""Text encoders, which turn a caption into a sequence of vectors for D; the models are those of transformers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones.released import find_part, open_part, read_config, require_package
from models.backbones.releases import missing
from models.backbones.stable_audio import ProjectionSettings, text_tokens
from models.backbones.stable_audio_3 import stable_audio_3_text_tokens
from models.disk_errors import patiently, require_sound_disk
from models.hub import locate
from models.weights import hash_state, listed, read

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")


class TextEncoder:
    """A frozen encoder and its tokenizer; it encodes captions one by one, so that no caption depends on its batch."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        tokens: int,
        layer: int = -1,
        projection: nn.Linear | None = None,
        identity: str,
    ):
        """Wrap a model and its tokenizer.

        Args:
            model: the encoder.
            tokenizer: its tokenizer.
            tokens: longer captions are truncated to this number of tokens.
            layer: index of the layer whose hidden states are returned.
            projection: a layer that is applied to the hidden states, if any.
            identity: a hash of the tokenizer's files.
        """
        self.model, self.tokenizer, self.projection = model.eval().requires_grad_(False), tokenizer, projection
        self.tokens, self.layer = tokens, layer
        settings: Any = model.config
        self.width: int = settings.hidden_size if projection is None else projection.out_features
        self._identity = identity

    @torch.inference_mode()
    def encode(self, caption: str) -> Tensor:
        """Encode a caption to `(n, width)` in float32, n ≤ tokens, including the tokenizer's special tokens."""
        ids = self.tokenizer(caption, truncation=True, max_length=self.tokens, return_tensors="pt").input_ids
        hidden_ND = self.model(input_ids=ids, output_hidden_states=True).hidden_states[self.layer][0]
        return hidden_ND if self.projection is None else self.projection(hidden_ND)

    def identity(self) -> str:
        """Return a short hash of weights, tokenizer and settings; encoders with equal vectors have equal hashes."""
        parts = {"encoder": self.model, **({"projection": self.projection} if self.projection is not None else {})}
        state = {
            f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()
        }
        return hash_state({"tokens": self.tokens, "layer": self.layer, "tokenizer": self._identity}, state)[:12]


def load_stable_audio_text(folder: str | Path) -> TextEncoder:
    """Load T5 and its projection from a Stable Audio Open release, given by its folder or its hub name.

    Raises:
        ValueError: a part is missing, damaged or a pickle.
    """
    from transformers import T5EncoderModel

    release = find_part(folder, "text_encoder").parent
    model = _load_model(T5EncoderModel, release / "text_encoder")
    tokenizer, identity = _load_tokenizer(release / "tokenizer")
    projection = _load_projection(find_part(folder, "projection_model"))
    return TextEncoder(model, tokenizer, tokens=text_tokens(folder), projection=projection, identity=identity)


def load_stable_audio_3_text(folder: str | Path) -> TextEncoder:
    """Load the T5Gemma encoder from a Stable Audio 3 release, given by its folder or its hub name.

    Raises:
        ValueError: a part is missing, damaged or a pickle.
    """
    from transformers import T5GemmaEncoderModel

    release = find_part(folder, "text_encoder").parent
    model: Any = _load_model(T5GemmaEncoderModel, release / "text_encoder")
    tokenizer, identity = _load_tokenizer(release / "tokenizer")
    return TextEncoder(model.encoder, tokenizer, tokens=stable_audio_3_text_tokens(folder), identity=identity)


def load_text_encoder(folder: str | Path, *, tokens: int, layer: int) -> TextEncoder:
    """Load any encoder that transformers' `AutoModel` supports, with its tokenizer, from a folder or a hub name.

    Args:
        folder: the encoder's folder, which also holds its tokenizer, or its hub name.
        tokens: longer captions are truncated to this number of tokens.
        layer: index of the layer whose hidden states are used.

    Raises:
        ValueError: the encoder or its tokenizer is missing or incomplete, or the weights are a pickle.
    """
    require_package("transformers", "text", "a text encoder")
    from transformers import AutoModel

    path = locate(folder)
    if not path.is_dir():
        raise ValueError(missing(folder))
    tokenizer, identity = _load_tokenizer(path)
    return TextEncoder(_load_model(AutoModel, path), tokenizer, tokens=tokens, layer=layer, identity=identity)


def _load_model(kind: Any, path: Path) -> nn.Module:
    from transformers.utils import logging

    open_part(path)  # raises a clear error if the weights are missing or a pickle
    logging.disable_progress_bar()
    options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        model, loading = patiently(lambda: kind.from_pretrained(str(path), trust_remote_code=False, **options))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        require_sound_disk(error)
        raise ValueError(f"{path} can't be loaded as a text encoder: {_reason(error)}") from error
    # transformers initialises missing weights at random. Only the pooler may be missing: no hidden state depends on it.
    if absent := sorted(name for name in loading["missing_keys"] if "pooler" not in name):
        raise ValueError(f"{path} lacks weights of its text encoder: {listed(absent)}")
    return model.get_encoder() if model.config.is_encoder_decoder else model


def _load_tokenizer(path: Path) -> tuple[Any, str]:
    """Load a tokenizer; return it and a hash of its files."""
    from transformers import AutoTokenizer

    try:
        tokenizer = patiently(
            lambda: AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        )
    except (OSError, ValueError, KeyError) as error:
        require_sound_disk(error)
        raise ValueError(f"{path} holds no complete tokenizer: {_reason(error)}") from error
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (path / name).is_file():
            digest.update(json.dumps(name).encode() + patiently((path / name).read_bytes))
    return tokenizer, digest.hexdigest()


def _reason(error: Exception) -> str:
    """Return the first line of an error of transformers; its advice to run a folder's own code is not passed on."""
    lines = str(error).splitlines() or [type(error).__name__]
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is never run: give one that transformers itself has a class for"
    return lines[0]


def _load_projection(path: Path) -> nn.Linear | None:
    """Load the projection from the text encoder's width to D's; return None if both widths are equal."""
    sizes = read_config(path, "StableAudioProjectionModel", ProjectionSettings)
    if sizes["text_encoder_dim"] == sizes["conditioning_dim"]:
        return None
    stored = open_part(path)
    layer = nn.Linear(sizes["text_encoder_dim"], sizes["conditioning_dim"]).requires_grad_(False)
    try:
        layer.load_state_dict({name: read(stored[f"text_projection.{name}"]) for name in ("weight", "bias")})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} holds no text_projection of {sizes}: download the release again") from error
    return layer
