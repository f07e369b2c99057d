"""Text encoders: a caption → a sequence of vectors that D reads, by models of transformers, from their own layouts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones.released import find_part, locate, missing, open_part, read_config, require_package
from models.backbones.stable_audio import PROJECTION_SETTINGS, text_tokens
from models.weights import hash_state, listed, read

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")


class TextEncoder:
    """A frozen encoder and its tokenizer; captions are encoded one by one, so that none depends on its neighbours."""

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
        """`tokens`: the most of a caption; `layer`: whose hidden states; `projection`: applied to them."""
        self.model, self.tokenizer, self.projection = model.eval().requires_grad_(False), tokenizer, projection
        self.tokens, self.layer = tokens, layer
        settings: Any = model.config
        self.width: int = settings.hidden_size if projection is None else projection.out_features
        self._identity = identity

    @torch.inference_mode()
    def encode(self, caption: str) -> Tensor:
        """`(n, width)` in float32, n ≤ tokens; the tokenizer's own special tokens are among them."""
        ids = self.tokenizer(caption, truncation=True, max_length=self.tokens, return_tensors="pt").input_ids
        hidden_ND = self.model(input_ids=ids, output_hidden_states=True).hidden_states[self.layer][0]
        return hidden_ND if self.projection is None else self.projection(hidden_ND)

    def identity(self) -> str:
        """Short hash of weights, tokenizer and settings: the same for what gives the same vectors."""
        parts = {"encoder": self.model, **({"projection": self.projection} if self.projection is not None else {})}
        state = {
            f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()
        }
        return hash_state({"tokens": self.tokens, "layer": self.layer, "tokenizer": self._identity}, state)[:12]


def load_stable_audio_text(folder: str | Path) -> TextEncoder:
    """T5 and the projection of a Stable Audio Open release, by its folder or its name on the hub.

    Raises:
        ValueError: a part is missing, damaged or a pickle.
    """
    from transformers import T5EncoderModel

    release = find_part(folder, "text_encoder").parent
    model = _pretrained(T5EncoderModel, release / "text_encoder")
    tokenizer, identity = _tokenizer(release / "tokenizer")
    projection = _projection(find_part(folder, "projection_model"))
    return TextEncoder(model, tokenizer, tokens=text_tokens(folder), projection=projection, identity=identity)


def load_text_encoder(folder: str | Path, *, tokens: int, layer: int) -> TextEncoder:
    """Any encoder that transformers' `AutoModel` knows, with its tokenizer in the same folder.

    Raises:
        ValueError: it is not there, not whole, or a pickle.
    """
    require_package("transformers", "text", "a text encoder")
    from transformers import AutoModel

    path = locate(folder)
    if not path.is_dir():
        raise ValueError(missing(folder))
    tokenizer, identity = _tokenizer(path)
    return TextEncoder(_pretrained(AutoModel, path), tokenizer, tokens=tokens, layer=layer, identity=identity)


def _pretrained(kind: Any, path: Path) -> nn.Module:
    from transformers.utils import logging

    open_part(path)  # refuses a pickle, and names what is missing
    logging.disable_progress_bar()
    options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        model, loading = kind.from_pretrained(str(path), **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} can't be loaded as a text encoder: {str(error).splitlines()[0]}") from error
    # transformers draws what a file lacks; only the pooler, which no hidden state depends on, may be lacking
    if absent := sorted(name for name in loading["missing_keys"] if "pooler" not in name):
        raise ValueError(f"{path} lacks weights of its text encoder: {listed(absent)}")
    return model.get_encoder() if model.config.is_encoder_decoder else model


def _tokenizer(path: Path) -> tuple[Any, str]:
    """A tokenizer, and a hash of its files."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} holds no whole tokenizer: {str(error).splitlines()[0]}") from error
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (path / name).is_file():
            digest.update(json.dumps(name).encode() + (path / name).read_bytes())
    return tokenizer, digest.hexdigest()


def _projection(path: Path) -> nn.Linear | None:
    """The layer between text encoder and D; none where both have the same width."""
    sizes = read_config(path, "StableAudioProjectionModel", PROJECTION_SETTINGS)
    if sizes["text_encoder_dim"] == sizes["conditioning_dim"]:
        return None
    stored = open_part(path)
    layer = nn.Linear(sizes["text_encoder_dim"], sizes["conditioning_dim"]).requires_grad_(False)
    try:
        layer.load_state_dict({name: read(stored[f"text_projection.{name}"]) for name in ("weight", "bias")})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} holds no text_projection of {sizes}: fetch the release again") from error
    return layer
