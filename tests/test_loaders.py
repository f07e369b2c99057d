"""No file that is loaded can run code: loaders of other packages are told so wherever they are called."""

from __future__ import annotations

import ast
import builtins
import json
from pathlib import Path

import pytest
import torch

from models.text_encoder import load_text_encoder
from tests import stable_audio as release
from tests.trainer.tiny_codecs import save_tiny_codecs
from trainer.evaluate.baselines import make_baseline
from trainer.evaluate.embeddings import Clap

ROOT = Path(__file__).parents[1]
FILES = [path for room in ("models", "trainer", "launch", "benchmarks") for path in sorted((ROOT / room).rglob("*.py"))]
OURS = {"SPresso", "codec", "cls"}  # whose `from_pretrained` reads JSON and safetensors
SAFE = {
    # a loader → keywords that it must be given
    "from_pretrained": {"trust_remote_code": False},
    "torch.load": {"weights_only": True},
    "np.load": {"allow_pickle": False},
    "numpy.load": {"allow_pickle": False},
}
UNSAFE = {"pickle.load", "pickle.loads", "yaml.load", "torch.hub.load", "marshal.load", "joblib.load", "eval", "exec"}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
REMOTE_CODE = 'open({marker!r}, "w").close()\nraise RuntimeError("the code of a folder was run")\n'


def calls_of(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text())
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_loader_is_told_to_run_no_code(path: Path):
    for name, call in calls_of(path):
        assert name not in UNSAFE, f"line {call.lineno} calls {name}"
        owner, _, method = name.rpartition(".")
        if method == "from_pretrained" and owner.rpartition(".")[2] in OURS:
            continue
        wanted = SAFE.get(name) or SAFE.get(method if method == "from_pretrained" else "", {})
        given = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg in wanted}
        assert given == wanted, f"line {call.lineno}: {name} needs {wanted}"


def test_the_search_finds_loaders():
    found = {str(path.relative_to(ROOT)) for path in FILES for name, _ in calls_of(path) if "from_pretrained" in name}
    assert found >= {
        "models/text_encoder.py",
        "trainer/evaluate/embeddings/clap.py",
        "trainer/evaluate/baselines/huggingface.py",
    }


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that a folder's own code would write; whoever asks whether to run the code is answered yes."""
    monkeypatch.setattr(builtins, "input", lambda *unused: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "the code was run"


def with_code(folder: Path, marker: Path, file: str, **values: object) -> Path:
    """Add to a folder a module of its own, to which the JSON file refers."""
    folder.mkdir(exist_ok=True)
    known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    classes = ("AutoConfig", "AutoModel", "AutoFeatureExtractor")
    map_ = {name: f"own.{name}" for name in classes} | {"AutoTokenizer": ["own.AutoTokenizer", None]}
    (folder / file).write_text(json.dumps(known | {"auto_map": map_} | values))
    (folder / "own.py").write_text(REMOTE_CODE.format(marker=str(marker)))
    return folder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A text encoder of a class of transformers, with its tokenizer."""
    from transformers import RobertaConfig, RobertaModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    RobertaModel(RobertaConfig(vocab_size=32, **sizes), add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    release.tokenizer().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_an_encoder_with_code_of_its_own_is_refused(encoder: Path, marker: Path):
    with_code(encoder, marker, "config.json", model_type="nobodys")
    with pytest.raises(ValueError, match="it brings code of its own, which is never run"):
        load_text_encoder(encoder, tokens=8, layer=-1)
    assert not marker.exists()


def test_code_beside_a_known_class_is_not_run(encoder: Path, marker: Path):
    before = load_text_encoder(encoder, tokens=8, layer=-1).encode("a dog")
    with_code(encoder, marker, "config.json")
    with_code(encoder, marker, "tokenizer_config.json", tokenizer_class="Nobodys")
    assert torch.equal(load_text_encoder(encoder, tokens=8, layer=-1).encode("a dog"), before)
    assert not marker.exists()


def test_no_codec_or_embedding_runs_the_code_of_its_folder(tmp_path: Path, marker: Path):
    from transformers import ClapAudioConfig, ClapConfig, ClapFeatureExtractor, ClapModel, ClapTextConfig

    cpu = torch.device("cpu")
    weights = save_tiny_codecs(tmp_path)
    for name in ("dac", "encodec", "stable_audio"):
        with_code(Path(weights[name]), marker, "config.json")
        make_baseline(name, weights[name]).load(cpu)
    audio = ClapAudioConfig(
        window_size=2, num_mel_bins=16, spec_size=64, patch_size=4, patch_stride=[4, 4], depths=[1, 1],
        num_attention_heads=[1, 1], hidden_size=16, patch_embeds_hidden_size=8, num_hidden_layers=2,
    )  # fmt: skip
    text = ClapTextConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict())).save_pretrained(tmp_path / "clap")
    ClapFeatureExtractor().save_pretrained(tmp_path / "clap")
    with_code(tmp_path / "clap", marker, "preprocessor_config.json")
    assert Clap(str(with_code(tmp_path / "clap", marker, "config.json")), cpu)._parts
    assert not marker.exists()
