"""The schema of a recipe: dataclasses that `recipes.reading` fills and `recipes.validation` checks."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

from models.later_fields import added_later, since
from models.ranges import ranged
from models.sizes import LARGEST_SIZE, DiTConfig, LatentEncoderConfig, Sampling
from trainer.data.remote import CacheSettings
from trainer.recipes.cluster import ClusterConfig
from trainer.recipes.parallel import ParallelConfig
from trainer.stages import STAGES, trained_stages


@dataclass
class DataConfig:
    """Where the sounds and latents are, and the order in which training reads them."""

    audio: str | None = None
    """Folder of sounds, manifest (.jsonl or .csv with `file` and `caption`), tar, table (.parquet, .arrow), folder of
    tars or tables, or a URL of one; braces name several: `a-{00..99}.tar`. None: `synth` makes sounds in the run."""
    audio_column: str | None = since(None, before=None)
    caption_column: str | None = since(None, before=None)
    """Columns of a table. None: its only column of sounds; `caption`, `captions`, `text`, `description` or `prompt`."""
    synth_hours: float = ranged(0.5, least=0, most=100_000)
    """Hours of sound that `synth` makes if `audio` is None."""
    latents: str = "${run_dir}/latents"
    """Folder that holds the shards in `train/` and `test/`, or its URL (http(s)://, s3://, gs:// …). Several runs may
    share one folder."""
    cache: CacheSettings = field(default_factory=CacheSettings)
    """Local cache in which each node keeps the shards that it downloads from a URL."""
    clip_seconds: float = ranged(5.0, above=0, most=86_400)
    """Length of a clip in seconds; 5 as in the paper."""
    holdout: float = ranged(0.1, above=0, below=1)
    """Fraction of the files that no stage trains on and that `evaluate` scores. A hash of the name selects them, or
    of the folder's name where many folders hold the same names."""
    workers: int = ranged(2, least=1)
    """Processes that `synth` and `prepare` use. The result does not depend on their number."""
    shard_mb: float = ranged(64.0, above=0, most=2**30)
    """Size in MiB at which a new shard begins."""
    mix: dict[str, int] = ranged(dict, least=1)
    """Sets of latents to train on instead of `latents`: folder or URL → its share of a batch, a whole number. A folder
    holds `train/` and `test/`, or is a set itself. `evaluate` still uses the `test/` of `latents`. Empty: `latents`
    alone."""
    shuffle: str = "windowed"
    """`windowed`: shuffle the blocks of the whole set, then the samples within windows of many blocks, so that reads
    stay sequential; `global`: shuffle all samples; `none`: keep the order on disk."""
    block: int = ranged(64, least=1)
    """Consecutive samples that `windowed` moves together into a window."""
    window_mib: float = ranged(2048.0, above=0, most=2**30)
    """MiB of latents in a shuffle window, from which each batch is drawn."""
    window: int | None = ranged(None, least=1)
    """Samples in a shuffle window; None: as many as fit into `window_mib`."""
    lanes: int = ranged(64, least=1)
    """Parts of the order that share no block. If the number of ranks divides it, each rank reads only its own lanes."""
    readers: int = ranged(1, least=0, note="0: no thread")
    """Threads of each rank that read and check batches ahead; 0: read each batch when it is needed."""
    buckets: list[int] = ranged(list, least=1)
    """Lengths in x0 frames, below a stage's `crop_frames`, to which batches of shorter clips are padded; no loss counts
    the padding. Empty: no clip may be shorter than a crop."""
    max_damaged: float = ranged(0.01, least=0, most=1)
    """Largest fraction of damaged samples in a set: the run logs and replaces each, and stops beyond this fraction."""


@dataclass
class AutoencoderConfig:
    """The AudioAE, which turns audio into latents x0 and back."""

    kind: str = "magnitude"
    """`magnitude` (STFT magnitudes), `magnitude_stereo` (the same for both channels together) and `spectral` (signed
    MDCT coefficients) need no weights. `woosh` is the Vocos autoencoder of Woosh, `oobleck` is that of Stable Audio
    Open, and `same`, also of both channels together, is that of Stable Audio 3."""
    folder: str | None = None
    """Folder of the released weights, or for `oobleck` and `same` their name on the Hugging Face hub."""


@dataclass
class TextConfig:
    """The text encoder whose embeddings of captions D reads. Only `prepare` runs it; later stages do not load it."""

    kind: str = "none"
    """`none`; `stable_audio` (the T5 of Stable Audio Open and its projection); `stable_audio_3` (the T5Gemma of Stable
    Audio 3); `transformers` (any text encoder of that package); `files` (embeddings made elsewhere: `door.npy` for the
    sound file `door.wav`)."""
    folder: str | None = None
    """Folder of the encoder or the embeddings. All kinds but `files` also take a Hugging Face name."""
    tokens: int = ranged(77, least=1)
    """Text tokens that D reads; longer captions are cut. Stable Audio's encoders use their own number instead."""
    layer: int = ranged(-1, least=-1_000, most=1_000)
    """`transformers` only: index of the layer whose hidden states are used; -1 is the last layer, -2 the one before."""


@dataclass
class PretrainedConfig:
    """A pretrained decoder D that replaces the `pretrain` stage."""

    folder: str | None = None
    """Folder of Woosh-Flow, folder or Hugging Face name of Stable Audio Open or 3, or the `export/` of a `pretrain`
    stage. None: the `pretrain` stage trains D."""


@dataclass
class DiffusionConfig:
    """The diffusion formulation and its noise levels."""

    name: str = "flow_matching"
    """`flow_matching` (rectified flow, as Woosh and Stable Audio 3), `edm` (Karras et al. 2022, as the S-PRESSO paper)
    or `v_prediction` (as Stable Audio Open)."""
    options: dict[str, float] = ranged(dict)
    """Fields of the formulation's class in `models/diffusion.py`, such as `logit_mean` or `log_std`."""


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA) on D (arXiv 2106.09685)."""

    rank: int = ranged(32, least=1, most=LARGEST_SIZE)
    """Rank r of the adapters."""
    alpha: float = ranged(32.0, above=0)
    """The adapters' output is scaled by alpha / rank; with `rslora`, by alpha / √rank."""
    variant: str = since("plain", before="plain")
    """`plain`; `rslora` (arXiv 2312.03732), whose scale suits large ranks; `dora` (arXiv 2402.09353), which also trains
    the norm of each row of D's weights; `pissa` (arXiv 2404.02948), which starts from D's largest singular vectors."""

    def description(self) -> dict[str, Any]:
        """Return the `lora` of a codec's config. A plain LoRA has no `variant`, so it equals that of older exports."""
        plain = {"rank": self.rank, "alpha": self.alpha}
        return plain if self.variant == "plain" else plain | {"variant": self.variant}


@dataclass
class QuantizerConfig:
    """The quantizer, which turns z into codes: M codebooks of K vectors each."""

    kind: str = "qinco2"
    """`residual`: plain residual codebooks, fitted by faiss; `qinco2`: codebooks that start as `residual` and that
    networks then adapt to the preceding codes, trained for `quantize.samples` (arXiv 2501.03078); `fsq`: rounds each
    number of z to a fixed level; only z's mean and standard deviations are fitted (arXiv 2309.15505)."""
    books: int = ranged(15, least=1, most=LARGEST_SIZE)
    """Number of codebooks M. The bit rate is (z rate) · M · log2 K."""
    size: int = ranged(256, least=2, most=LARGEST_SIZE)
    """Vectors per codebook K, a power of two."""
    rates: list[int] = ranged(list, least=1)
    """Numbers of codebooks for which the codec is finetuned and evaluated, as any prefix of the codes can be decoded.
    Empty: `books` alone."""
    vectors: int = ranged(65_536, least=2, most=2**32)
    """At most so many z vectors are used to fit the codebooks, before any training by gradient."""
    gain_db: float = ranged(0.0, least=0, most=100, note="0: none")
    """Gain augmentation in `quantize`: each clip's gain is uniform between minus and plus this many dB, which gives
    more z vectors from few sounds but decodes and encodes each clip with the autoencoder. 0: none."""
    beam: int = ranged(16, least=1)
    """Code sequences that the beam search keeps, in training and in encoding; not for `fsq`."""
    candidates: int = ranged(32, least=1)
    """`qinco2`: candidates per codebook, over the whole beam, that the networks evaluate; at least `beam`."""
    depth: int = ranged(2, least=0)
    """`qinco2`: residual MLPs in the network of each codebook."""
    embedding: int = ranged(128, least=1)
    """`qinco2`: width between the residual MLPs."""
    hidden: int = ranged(256, least=1)
    """`qinco2`: width inside the residual MLPs."""

    def description(self, width: int) -> dict[str, Any]:
        """Return the description of the quantizer that `make_quantizer` builds for z with `width` channels."""
        own = {"residual": ("beam",), "qinco2": ("beam", "candidates", "depth", "embedding", "hidden"), "fsq": ()}
        sizes = {"kind": self.kind, "width": width, "books": self.books, "size": self.size}
        return sizes | {name: getattr(self, name) for name in own[self.kind]}


@dataclass
class DistillationConfig:
    """What `distill` teaches D: to decode in few steps what D decodes with the recipe's `sampling`."""

    steps: list[int] = ranged(lambda: [4, 2, 1], least=1)
    """Numbers of steps in which D learns to decode, each below `sampling.steps`."""


@dataclass
class TrainConfig:
    """How one stage is trained. All lengths are in samples, so they hold for any batch size."""

    samples: int = ranged(100_000, least=0)
    """Length of the stage: clips that it trains on."""
    global_batch: int = ranged(32, least=1)
    """Clips per optimizer step, over all ranks and gradient accumulation steps."""
    lr: float = ranged(3e-4, least=0)
    """Peak learning rate of AdamW."""
    warmup: int = ranged(1_000, least=0)
    """Samples over which the learning rate rises from zero."""
    decay: float = ranged(0.3, least=0, most=1)
    """Last fraction of the samples, over which the learning rate falls linearly to zero; 0: it stays constant."""
    weight_decay: float = ranged(0.01, least=0)
    """Weight decay of AdamW, applied to matrices alone."""
    betas: list[float] = ranged(lambda: [0.9, 0.99], least=0, below=1)
    """The two betas of AdamW."""
    clip_norm: float | None = ranged(1.0, above=0, note="null turns clipping off", unlimited=True)
    """Global gradient norm above which gradients are clipped; None: they are never clipped."""
    ema_halflife: float = ranged(2_000.0, least=0, note="0 turns averaging off")
    """Half-life in samples of the exponential moving average (EMA) of the trained weights, which the export holds;
    0: no averaging."""
    ema_profiles: list[float] = ranged(list, above=0, most=0.288, metadata=added_later([]))
    """Two relative widths σ_rel, narrow then wide, such as [0.05, 0.1]: two averages with power-function profiles
    (arXiv 2312.02696) replace the one of `ema_halflife`. After training, averages of further widths are computed from
    them, and the one with the lowest held-out loss is exported. Empty: `ema_halflife`."""
    condition_dropout: float = ranged(0.1, least=0, below=1)
    """Fraction of the clips whose z is dropped, which classifier-free guidance and unconditional sampling need."""
    text_dropout: float = ranged(0.9, least=0, most=1)
    """Fraction of the clips whose text is dropped, if the set holds text and D reads it. The default is high because
    the codec has no text at inference; the paper gives no value. In `pretrain`, where D learns to read, it is 0.1."""
    crop_frames: int = ranged(495, least=1, most=LARGEST_SIZE)
    """Length of a training crop in x0 frames, a multiple of `latent_encoder.pooling`."""
    loss_weights: dict[str, float] = ranged(dict, least=0, metadata=added_later({}))
    """Name of a loss term → its weight; 1 for a term that is not named. The log has a curve for each term."""


@dataclass
class LogConfig:
    """What training logs. Intervals are in samples."""

    every: int = ranged(1_000, least=1)
    """Samples between two lines of the log, or `least_steps` if that is longer."""
    least_steps: int = ranged(10, least=1)
    """Least steps between two lines of the log, because for each line all ranks exchange figures."""
    samples_every: int = ranged(20_000, least=0, note="0: only at the end")
    """Samples between two decodings of held-out clips (audio and spectrograms in TensorBoard), or
    `checkpoint.least_steps` if that is longer; 0: only at the end."""
    clips: int = ranged(3, least=1)
    """Number of held-out clips to decode, the same each time."""
    held_out: int = ranged(64, least=1)
    """Held-out clips whose loss is computed at each checkpoint, with the same noise each time."""
    bins: int = ranged(8, least=1, most=1_000)
    """Noise level bins, equally populated, for each of which the loss is logged."""
    profile_steps: int = ranged(0, least=0, most=20, note="0: none")
    """Steps to trace once, a few steps after a stage's start, as `spresso profile` does for a run that trains already;
    0: none."""
    memory_history: int = ranged(0, least=0, most=1_000_000, note="0: no stacks")
    """Newest allocations and releases of a GPU, with the stack of each allocation, that the snapshot of its memory
    holds if it runs out; 0: the snapshot shows only sizes. torch states 2 µs an allocation, several KB an entry."""

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers that show the curves, spectrograms and sounds: `tensorboard`, `wandb` (Weights & Biases), `mlflow`,
    `trackio`; all but the first need `pip install 'spresso[trackers]'`. Empty: only `metrics.jsonl` has the curves."""
    project: str = "spresso"
    """Name of the project (wandb, trackio) or the experiment (mlflow) to which the run belongs."""
    prometheus: str | None = None
    """File for the textfile collector of a Prometheus node exporter, such as
    `/var/lib/node_exporter/${name}.prom`: the newest figures, at each line of the log. None: no file."""
    notify: str | None = None
    """URL of a webhook, or command with its arguments (run without a shell), to call when a run is done, has failed, or
    is requeued without progress. A word that is `$NAME`, or `$NAME` in a URL, is replaced by that environment variable.
    Never published. None: nothing is called."""


@dataclass
class CheckpointConfig:
    """Checkpoints. Each is written atomically, and a killed run resumes from the last one."""

    every: int = ranged(20_000, least=1)
    """Samples between two checkpoints, or `least_steps` if that is longer."""
    least_steps: int = ranged(100, least=1)
    """Least steps between two checkpoints: with a global batch of 2,048, 20,000 samples are only ten steps, and a run
    would do little but measure and save."""
    keep_last: int = ranged(2, least=1)
    """Number of newest checkpoints to keep."""
    keep_best: int = ranged(0, least=0)
    """Number of checkpoints with the lowest held-out loss to keep in addition."""
    keep_every: int | None = ranged(None, least=0, note="null: no others")
    """Also keep the checkpoints at multiples of this many samples; None: no others."""
    resume: str = "auto"
    """`auto`: resume from the run's newest complete checkpoint, if there is one; `never`: refuse a folder that already
    holds a run; or the path or URL of a checkpoint, of this run or of another run with the same config."""
    start_from: str | None = None
    """Checkpoint, or `export/` of a stage, or the URL of one, from which a new run takes only its initial weights: the
    run has its own schedule and fresh moments."""
    upload: str | None = None
    """URL of a folder for this run only (s3://, gs://, webdav://, or another protocol that fsspec writes) to which
    checkpoints and exports are uploaded. A run with an empty directory resumes from there. None: no upload."""


@dataclass
class HealthConfig:
    """How a run reacts to losses that are not finite, to gradient spikes, and to ranks that hang."""

    spike: float = ranged(10.0, least=0, note="0: never", unlimited=True)
    """Skip a step whose gradient norm exceeds this many times the running median of the accepted steps; 0: never."""
    spike_window: int = ranged(128, least=1)
    """Steps over which the median is taken. No step counts as a spike before a quarter of the window is filled."""
    rewind_after: int = ranged(5, least=1)
    """Consecutive skipped steps after which the run rewinds to the last checkpoint and leaves out the data that it has
    read since."""
    max_rewinds: int = ranged(3, least=0)
    """Rewinds that a run may make; it then ends with an error instead of rewinding forever."""
    hang_seconds: float = ranged(600.0, least=0, most=10**9, note="0: never")
    """Seconds after which a step counts as hung: each rank's log shows its stack, and all ranks end. 0: never."""


@dataclass
class EvaluateConfig:
    """The scores and the listening page, on held-out clips."""

    clips: int = ranged(24, least=0, note="0: all")
    """Held-out clips to score, spread evenly over the set; 0: all."""
    page_clips: int = ranged(10, least=1)
    """Number of the scored clips that the page plays."""
    decodes: int = ranged(5, least=1)
    """Times that the same codes are decoded with different seeds, to hear and measure the variability; for the page's
    clips, at up to four rates. 5 as on the paper's page."""
    curve: int = ranged(12, least=0, note="0: no curve", metadata=added_later(12))
    """Prefixes of the codes from which the page's clips are decoded, for the curve of log-mel against bits per vector:
    all if the quantizer has no more codebooks, else spread geometrically. Each that is not in `rates` costs a decode of
    each clip on the page. 0: no curve."""
    seconds: float | None = ranged(None, least=0.1, most=86_400, note="null: whole clips")
    """Seconds of each clip to use, from its start; None: whole clips."""
    batch: int = ranged(8, least=1)
    """Clips per batch. The parts of an array job take batches in turn."""
    codecs: dict[str, str] = field(default_factory=dict)
    """Title → `export/` of another run's `finetune`, or a codec's name on the hub, scored next to this run: continuous
    z and each of its rates."""
    baselines: list[str] = field(default_factory=list)
    """Codecs by others to compare with, by name and kbps: `[opus@6, dac@1.7, encodec@1.5, semanticodec@1.4,
    stable_audio, music2latent]`. If one or its weights are not installed, its row of the table says so."""
    weights: dict[str, str] = field(default_factory=dict)
    """Name of a baseline codec → folder of its weights. Weights without a folder come from the Hugging Face hub."""
    embedding: str = "auto"
    """Embedding for distances between sets and for retrieval: `aisfx` (of sound effects; see docs/evaluation.md for how
    to install it), `mel-stat` (needs nothing), or `clap:` and a folder or a name in the Hugging Face cache. `auto` is
    aisfx where it is installed, otherwise mel-stat."""
    visqol: bool = False
    """Also compute ViSQOL, which takes seconds per clip on a CPU and needs `pip install 'spresso[visqol]'`."""


@dataclass
class Config:
    """A recipe. `recipe_schema()` adds a `TrainConfig` for each trained stage, under the stage's name."""

    name: str = "unnamed"
    """Name of the run: of its directory, its jobs and its page."""
    run_dir: str = "runs/${name}"
    """Run directory: everything that a run writes, in one folder per stage."""
    seed: int = ranged(0, least=0, most=2**64 - 1)
    """Seed of the initial weights, the data order, the crops and the noise."""
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    pretrained: PretrainedConfig = field(default_factory=PretrainedConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    latent_encoder: LatentEncoderConfig = field(default_factory=LatentEncoderConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    sampling: Sampling = field(default_factory=Sampling)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    private: list[str] = field(default_factory=list, metadata=added_later([]))
    """Keys that pages and trackers leave out, such as `data.audio`, besides `cluster` and `log.notify`. Each key whose
    value holds an environment variable (`${oc.env:NAME}`) is added here."""

    def stage(self, name: str) -> TrainConfig:
        """Return the settings of a trained stage."""
        return getattr(self, name)

    @property
    def rates(self) -> list[int]:
        """Numbers of codebooks to finetune and evaluate, largest first."""
        return sorted(set(self.quantizer.rates or [self.quantizer.books]), reverse=True)

    @property
    def stages(self) -> list[str]:
        """The stages that this recipe needs, in order."""
        return [name for name, stage in STAGES.items() if stage.needed(self)]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the values alone: pickle cannot find a class that `recipe_schema` makes by its name."""
        return _config_of, (vars(self),)


def recipe_schema() -> type[Config]:
    """Return the class of a recipe, with the settings of every trained stage in `STAGES`."""
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
