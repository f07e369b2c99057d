"""The schema of a recipe: dataclasses, filled by `recipes.reading` and looked at by `recipes.validation`."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

from models.sizes import DiTConfig, LatentEncoderConfig, Sampling
from trainer.data.remote import CacheSettings
from trainer.recipes.cluster import ClusterConfig
from trainer.stages import STAGES, trained_stages

ADDED_LATER = {"added_later": True}
"""Metadata of a setting that older runs did not have: at its default it is left out of the hash of a run's settings, so
that older checkpoints keep the hash that they were saved with."""


@dataclass
class DataConfig:
    """From sound files to latents."""

    audio: str | None = None
    """Folder of sound files (wav, flac, ogg, mp3), or a manifest (.jsonl or .csv with `file` and `caption`). None:
    `synth` makes some under the run directory."""
    synth_hours: float = 0.5
    """Hours of sound that `synth` makes where `audio` is None."""
    latents: str = "${run_dir}/latents"
    """Folder of the shards: `train/` and `test/`; several runs may share it. Or its URL: http(s)://, s3://, gs:// …"""
    cache: CacheSettings = field(default_factory=CacheSettings)
    """Where a node keeps the shards that it fetched from a URL."""
    clip_seconds: float = 5.0
    """Length of a clip in seconds: 5 in the paper."""
    holdout: float = 0.1
    """Fraction of the files that no stage sees, by a hash of their names; `evaluate` scores these."""
    workers: int = 2
    """Processes that `synth` and `prepare` use; the outcome does not depend on it."""
    shard_mb: float = 64.0
    """Size in MiB at which a new shard begins."""
    mix: dict[str, int] = field(default_factory=dict)
    """Folder or URL of latents, or of a set without `train/` and `test/`, → its share in a batch, a whole number:
    trained on instead of `latents`, whose `test/` stays what is evaluated. Empty: `latents` alone."""
    shuffle: str = "windowed"
    """`windowed`: blocks over the whole set, then samples within windows of many blocks, which keeps reads together;
    `global`: a true shuffle; `none`: as they lie."""
    block: int = 64
    """Consecutive samples that stay together on their way into a window."""
    window_mib: float = 2048.0
    """Size in MiB of the latents that a batch is drawn from."""
    window: int | None = None
    """The same in samples; None: from `window_mib`."""
    lanes: int = 64
    """Parts of the order that share no block: as many nodes, or a divisor of it, each read only their own."""
    readers: int = 1
    """Threads of each rank that read and check batches ahead; 0: each when it is needed."""
    buckets: list[int] = field(default_factory=list)
    """For clips of different lengths: frames, below a stage's `crop_frames`, to which batches of shorter clips are
    padded; what is padded counts in no loss. Empty: no clip may be shorter than a crop."""
    max_damaged: float = 0.01
    """Fraction of a set's samples that may be damaged, and are replaced and named, before a run stops."""


@dataclass
class AutoencoderConfig:
    """The AudioAE: audio ↔ x0."""

    kind: str = "spectral"
    """`spectral` (no weights), `woosh` (that release's Vocos autoencoder) or `oobleck` (Stable Audio Open's)."""
    folder: str | None = None
    """Folder of the release; `oobleck` also takes its name on the Hugging Face hub. `spectral` needs none."""


@dataclass
class TextConfig:
    """What makes captions into what D reads. `prepare` does, once; no stage after it holds a text encoder."""

    kind: str = "none"
    """`none`; `stable_audio` (that release's T5 and its projection); `transformers` (any text encoder of that package);
    `files` (embeddings made elsewhere: `NAME.npy` for each sound file NAME, its suffix left out)."""
    folder: str | None = None
    """Folder of it; of `stable_audio` and `transformers` also a name on the Hugging Face hub."""
    tokens: int = 77
    """Text tokens that D takes; longer captions are cut. `stable_audio` knows its own."""
    layer: int = -1
    """`transformers` only: whose hidden states are taken; -1 is the last, -2 the one before."""


@dataclass
class PretrainedConfig:
    """A pretrained decoder D in place of the `pretrain` stage."""

    folder: str | None = None
    """Folder of a Woosh-Flow release, folder or hub name of Stable Audio Open's, or an `export/` of a `pretrain` stage.
    None: D is pretrained here."""


@dataclass
class DiffusionConfig:
    """Formulation and noise levels."""

    name: str = "flow_matching"
    """`flow_matching` (rectified flow, as Woosh), `edm` (Karras et al. 2022, as the S-PRESSO paper) or `v_prediction`
    (as Stable Audio Open)."""
    options: dict[str, float] = field(default_factory=dict)
    """Fields of that formulation in `models/diffusion.py`, such as `logit_mean` or `log_std`."""


@dataclass
class LoraConfig:
    """Low-rank adapters on D (arXiv 2106.09685)."""

    rank: int = 32
    """Rank r of the adapters."""
    alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank."""


@dataclass
class QuantizerConfig:
    """z → codes, M codebooks of K vectors each."""

    kind: str = "qinco2"
    """`qinco2`: codebooks that a network computes from what the codes before decode to, fitted as `residual` and then
    learned for `quantize.samples` (arXiv 2501.03078); `residual`: plain codebooks fitted by faiss; `fsq`: each number
    of z rounded, nothing fitted (arXiv 2309.15505)."""
    books: int = 15
    """M. The bit rate is z rate · M · log2 K."""
    size: int = 256
    """K, a power of two."""
    rates: list[int] = field(default_factory=list)
    """Numbers of codebooks at which the codec is finetuned and evaluated, as any prefix of the codes decodes; empty:
    all of them."""
    vectors: int = 65_536
    """Upper bound of the number of z vectors that codebooks are fitted on, before what is learned by gradient."""
    gain_db: float = 0.0
    """Other gains at which `quantize` hears a clip, evenly drawn between minus and plus so many dB: more vectors from
    few sounds. Each costs a pass through the autoencoder and back; 0: none."""
    beam: int = 16
    """Sequences of codes that the search keeps, in training and in use; not for `fsq`."""
    candidates: int = 32
    """`qinco2`: continuations of all of them that the networks are asked about, at each book."""
    depth: int = 2
    """`qinco2`: residual MLPs in the network of each book."""
    embedding: int = 128
    """`qinco2`: width between them."""
    hidden: int = 256
    """`qinco2`: width inside them."""

    def description(self, width: int) -> dict[str, Any]:
        """What `models.quantizers.quantizer.make_quantizer` builds for z of this width."""
        own = {"residual": ("beam",), "qinco2": ("beam", "candidates", "depth", "embedding", "hidden"), "fsq": ()}
        sizes = {"kind": self.kind, "width": width, "books": self.books, "size": self.size}
        return sizes | {name: getattr(self, name) for name in own[self.kind]}


@dataclass
class TrainConfig:
    """How one stage is optimized."""

    samples: int = 100_000
    """Clips that the stage sees: its length, and the unit in which all else below is counted."""
    global_batch: int = 32
    """Clips to one step of the optimizer, over all ranks and accumulation steps."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    warmup: int = 1_000
    """Samples over which the learning rate rises from zero."""
    decay: float = 0.3
    """Last fraction of the samples over which it falls to zero (linearly); 0: constant."""
    weight_decay: float = 0.01
    """AdamW's, on matrices alone."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """AdamW's."""
    clip_norm: float = 1.0
    """Upper bound of the global gradient norm."""
    ema_halflife: float = 2_000.0
    """Half-life in samples of the moving average of the trained weights; the export holds the average."""
    condition_dropout: float = 0.1
    """Fraction of the clips whose z is dropped, so that classifier-free guidance and unconditional samples work."""
    text_dropout: float = 0.9
    """Fraction of the clips whose text is dropped, where the set holds text and D reads it. High, as the codec in use
    knows of no text; the paper does not say how high. `pretrain` has 0.1: there D learns to read."""
    crop_frames: int = 495
    """x0 frames to a training crop: a multiple of `latent_encoder.pooling`."""
    loss_weights: dict[str, float] = field(default_factory=dict, metadata=ADDED_LATER)
    """Name of a loss term → how much it counts. A term that is not named counts once; the log has a curve of each."""


@dataclass
class ParallelConfig:
    """Where the work is done. None of it changes what is learned."""

    strategy: str = "ddp"
    """How ranks share the work: `ddp` (all held by each), `zero1`, `zero2`, `zero3` (DeepSpeed: moments; and gradients;
    and weights cut among ranks) or `fsdp2` (all three cut, by torch)."""
    processes: int = 1
    """Ranks on this machine. Started by torchrun or SLURM: theirs count."""
    replicas: int = 1
    """`fsdp2` only: so many groups of ranks each hold all that is trained, cut within the group; the number of nodes
    keeps the traffic of weights within each (HSDP)."""
    micro_batch: int | None = None
    """Clips to one forward pass of one rank; None: global batch / ranks. The rest is gradient accumulation."""
    precision: str = "fp32"
    """What is computed in: `fp32`, `bf16` or `fp16` (with loss scaling). The trained weights stay float32, and a frozen
    base is held in what is computed in."""
    shard_base: bool = False
    """`fsdp2` only: the frozen base is cut among ranks too, not held by each. `zero3` always does."""
    offload: str = "none"
    """`zero1` to `zero3`: `optimizer` keeps moments and master weights in host memory; `all`, `zero3` only, the cut
    weights too."""
    checkpoint_activations: bool = False
    """Compute each block's activations again in the backward pass: far less memory, a third more compute."""
    compile: bool = False
    """torch.compile each block: a slow first step, faster ones after."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu` or `cuda`."""
    threads: int | None = None
    """CPU threads to a rank; None: cores / ranks."""
    gpu_gib: float = 80.0
    """Memory of a GPU in GiB, for what `plan` says on a machine without one."""


@dataclass
class LogConfig:
    """What is written down while training, in samples seen."""

    every: int = 1_000
    """Samples between two lines of the log."""
    samples_every: int = 20_000
    """Samples between two listening samples (audio and spectrograms in TensorBoard); 0: only at the end."""
    clips: int = 3
    """Held-out clips that are decoded for them, always the same."""
    held_out: int = 64
    """Held-out clips whose loss is taken with each checkpoint, with noise that is always the same."""
    bins: int = 8
    """Noise levels, equally populated, by which the loss is told apart."""


@dataclass
class CheckpointConfig:
    """Checkpoints: whole or not there at all; a killed run goes on from the last."""

    every: int = 20_000
    """Samples between two checkpoints."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_best: int = 0
    """Also keep so many with the lowest loss on held-out clips."""
    keep_every: int | None = None
    """Also keep those at multiples of so many samples."""
    resume: str = "auto"
    """`auto`: from the run's newest whole checkpoint, if there is one; `never`: an older run in its folder is refused;
    or a checkpoint's path, of this run or of another of the same config."""
    start_from: str | None = None
    """A checkpoint, or a stage's `export/`, whose weights alone a new run begins with; it has its own schedule and
    fresh moments."""


@dataclass
class HealthConfig:
    """What a run does about losses that are no longer finite, spikes, and ranks that hang."""

    spike: float = 10.0
    """A step is skipped whose gradient norm is so many times the running median of the accepted ones; 0: never."""
    spike_window: int = 128
    """Steps over which that median is taken; before a quarter of them were seen, nothing counts as a spike."""
    rewind_after: int = 5
    """After so many skipped steps in a row the run goes back to the last checkpoint and passes over this window of
    the data."""
    max_rewinds: int = 3
    """Of them a run ends with an error, as it would go on for ever."""
    hang_seconds: float = 600.0
    """A step that takes longer ends the job with every rank's stack in its log; 0: never."""


@dataclass
class EvaluateConfig:
    """Figures and page, on held-out clips."""

    clips: int = 24
    """Held-out clips to score, spread evenly over the set; 0: all."""
    page_clips: int = 10
    """How many of them the page plays."""
    decodes: int = 5
    """Decodes of the same codes, of the page's clips at up to four rates, to hear and measure the variability; 5 on the
    paper's page."""
    seconds: float | None = None
    """Only the first so many seconds of each clip; None: whole clips."""
    batch: int = 8
    """Clips that go through a model at once. Parts of an array take such blocks in turn."""
    codecs: dict[str, str] = field(default_factory=dict)
    """Title → `export/` of another run's `finetune`, to be scored beside this run's: continuous z and each rate."""
    baselines: list[str] = field(default_factory=list)
    """Codecs by others, by name and kbps: `[opus@6, dac@1.7, encodec@1.5, semanticodec@1.4, stable_audio,
    music2latent]`. One that is not installed, or whose weights are not here, is a row that says so."""
    weights: dict[str, str] = field(default_factory=dict)
    """Name of such a codec → a folder of its weights; else the hub's cache."""
    embedding: str = "mel-stat"
    """What distances between sets are taken over: `mel-stat`, or `clap:` and a folder or a name in the hub's cache."""
    visqol: bool = False
    """Also ViSQOL, which takes seconds a clip on a CPU; needs `pip install 'spresso[visqol]'`."""


@dataclass
class Config:
    """A recipe. `recipe_schema` adds a `TrainConfig` for each trained stage, under the stage's name."""

    name: str = "unnamed"
    """Names the run directory and the page."""
    run_dir: str = "runs/${name}"
    """Holds all there is to know of a run, a folder a stage."""
    seed: int = 0
    """Of initial weights, data order, crops and noise."""
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    pretrained: PretrainedConfig = field(default_factory=PretrainedConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    latent_encoder: LatentEncoderConfig = field(default_factory=LatentEncoderConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    sampling: Sampling = field(default_factory=Sampling)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def stage(self, name: str) -> TrainConfig:
        """The settings of a trained stage."""
        return getattr(self, name)

    @property
    def rates(self) -> list[int]:
        """Numbers of codebooks to finetune and evaluate at, the most first."""
        return sorted(set(self.quantizer.rates or [self.quantizer.books]), reverse=True)

    @property
    def stages(self) -> list[str]:
        """The stages that this recipe needs, in order."""
        return [name for name, stage in STAGES.items() if stage.needed(self)]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the values: a class that `recipe_schema` makes cannot be found by its name."""
        return _config_of, (vars(self),)


def recipe_schema() -> type[Config]:
    """The class of a recipe with the settings of all trained stages that there are now."""
    return _schema_of(trained_stages())


@functools.cache
def _schema_of(trained: tuple[str, ...]) -> type[Config]:
    settings = [
        (name, TrainConfig, field(default_factory=functools.partial(TrainConfig, **STAGES[name].defaults)))
        for name in trained
    ]
    return dataclasses.make_dataclass("Recipe", settings, bases=(Config,))


def _config_of(values: dict[str, Any]) -> Config:
    return recipe_schema()(**values)
