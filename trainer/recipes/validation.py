"""Checks the values of a recipe: all problems at once, each as a line that names the key and a value that works."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.backbones.pretrained import AUTOENCODERS, EMBEDDED, latent_timing
from models.backbones.releases import missing
from models.diffusion import make_diffusion
from models.hub import is_remote, locate
from models.prior import LARGEST_SIZE
from models.quantizers.quantizer import QUANTIZER_KINDS
from models.sizes import LORA_VARIANTS
from trainer.data.locate import audio_troubles
from trainer.data.order import SHUFFLES
from trainer.data.remote import is_url
from trainer.data.text_embeddings import TEXT_KINDS
from trainer.file_names import as_unicode, printable
from trainer.recipes.privacy import unknown_private_keys
from trainer.recipes.ranges import out_of_range, value_at
from trainer.recipes.schema import Config
from trainer.recipes.values import flatten
from trainer.recipes.watching import watching_problems
from trainer.stages import STAGES
from trainer.stores.protocols import UNWRITABLE, unknown_protocol
from trainer.urls import has_credentials, without_credentials


def value_problems(values: Mapping[str, Any]) -> list[str]:
    """Return a line for each value that is wrong by itself; `values` are a recipe's as nested tables.

    The checks of `problems` compute with these values, and some values make the models' sizes raise.
    """
    choices = [
        f"{key}={value} is none of {', '.join(known)}"
        for key, known in _CHOICES.items()
        if (value := value_at(values, key)) not in known
    ]
    empty = [f"{key} is empty: give {key}=…" for key in ("name", "run_dir") if not values[key]]
    return [*empty, *choices, *out_of_range(values)]


def problems(config: Config, *, released: bool = True) -> list[str]:
    """Return a line for each problem of a recipe whose values are right by themselves.

    Args:
        config: the recipe.
        released: whether to check that the folders of pretrained weights exist.
    """
    return [
        *_contradictions(config),
        *_strategy(config),
        *_base_precision(config),
        *_graph(config),
        *config.cluster.problems(),
        *unknown_private_keys(config),
        *config.latent_encoder.problems(),
        *_crops(config),
        *_codebooks(config),
        *_formulation(config),
        *_distilled_steps(config),
        *_folders(config),
        *watching_problems(config.log),
        *_evaluation(config),
        *_stores(config),
        *(_released(config) if released else ()),
    ]


_CHOICES = {
    "autoencoder.kind": AUTOENCODERS,
    "data.shuffle": SHUFFLES,
    "text.kind": TEXT_KINDS,
    "quantizer.kind": QUANTIZER_KINDS,
    "lora.variant": LORA_VARIANTS,
    "parallel.strategy": ("ddp", "zero1", "zero2", "zero3", "fsdp2"),
    "parallel.precision": ("fp32", "bf16", "fp16"),
    "parallel.base_precision": ("same", "fp8"),
    "parallel.gradient_precision": ("fp32", "bf16"),
    "parallel.offload": ("none", "optimizer", "all"),
    "parallel.device": ("auto", "cpu", "cuda"),
    "sampling.sampler": ("euler", "heun", "dpmpp"),
}

_RELEASED = {"woosh": (48000, 480), "oobleck": (44100, 2048), "same": (44100, 4096)}
"""Sample rate in Hz and hop in samples of the public releases, used if their folder is missing."""


def _contradictions(config: Config) -> list[str]:
    """Return the problems of numbers that are in their ranges, but do not fit to another number."""
    found = []
    if config.evaluate.clips == 1:
        found.append("evaluate.clips=1 must be at least 2, because each clip is also decoded from another clip's z")
    kind = config.autoencoder.kind
    if config.latent_encoder.magnitudes and kind.startswith("magnitude"):
        found.append(
            f"latent_encoder.magnitudes=true is for signed latents, and autoencoder.kind={kind} has none: set "
            "latent_encoder.magnitudes=false"
        )
    if kind in EMBEDDED and "pretrain" in config.stages and config.dit.channels != EMBEDDED[kind].latent_channels:
        found.append(
            f"dit.channels={config.dit.channels} must be the number of channels of autoencoder.kind={kind}: set "
            f"dit.channels={EMBEDDED[kind].latent_channels}"
        )
    least = config.data.block * config.data.lanes
    if config.data.window is not None and config.data.window < least:
        found.append(f"data.window={config.data.window} must hold a block in each lane: set at least {least}")
    for name in _trained(config):
        if len(config.stage(name).betas) != 2:
            found.append(f"{name}.betas={config.stage(name).betas} must be two numbers, such as [0.9, 0.99]")
        found += [*_profiles(config, name), *_cut(config, name)]
    return found


def _profiles(config: Config, name: str) -> list[str]:
    widths = config.stage(name).ema_profiles
    if not widths or (len(widths) == 2 and widths[0] < widths[1]):
        return []
    return [f"{name}.ema_profiles={widths} must be two widths, narrow then wide, such as [0.05, 0.1], or [] for none"]


def _trained(config: Config) -> list[str]:
    """Return the trained stages that this recipe runs; the settings of other stages have no effect."""
    return [name for name in config.stages if STAGES[name].trained]


def _strategy(config: Config) -> list[str]:
    parallel, found = config.parallel, []
    if parallel.offload != "none" and not parallel.strategy.startswith("zero"):
        found.append(
            f"parallel.offload={parallel.offload} works with zero1, zero2 and zero3, not {parallel.strategy}: set "
            f"parallel.strategy=zero2, or remove parallel.offload"
        )
    if parallel.offload == "all" and parallel.strategy in ("zero1", "zero2"):
        found.append(f"parallel.offload=all needs parallel.strategy=zero3: {parallel.strategy} does not shard weights")
    if parallel.compile and parallel.strategy == "zero3":
        found.append(
            "parallel.compile=true does not work with parallel.strategy=zero3, whose hooks inside each block cannot be "
            "compiled: set parallel.strategy=fsdp2 with parallel.shard_base=true, or remove parallel.compile"
        )
    for key, value, unset in (("replicas", parallel.replicas, 1), ("shard_base", parallel.shard_base, False)):
        if value != unset and parallel.strategy != "fsdp2":
            found.append(f"parallel.{key}={value} needs parallel.strategy=fsdp2, not {parallel.strategy}")
    if parallel.strategy == "fsdp2" and parallel.processes > 1 and parallel.processes % parallel.replicas:
        found.append(f"parallel.replicas={parallel.replicas} does not divide {parallel.processes} ranks: set a divisor")
    return found


def _base_precision(config: Config) -> list[str]:
    parallel = config.parallel
    if parallel.base_precision == "same":
        return []
    chosen, found = f"parallel.base_precision={parallel.base_precision}", []
    if parallel.precision != "bf16":
        found.append(
            f"{chosen} needs parallel.precision=bf16, in which its products come out, not {parallel.precision}: set "
            f"parallel.precision=bf16, or remove parallel.base_precision"
        )
    if parallel.strategy == "zero3" or parallel.shard_base:
        cut, mend = (
            ("parallel.strategy=zero3", "parallel.strategy=fsdp2")
            if parallel.strategy == "zero3"
            else ("parallel.shard_base=true", "parallel.shard_base=false")
        )
        found.append(
            f"{chosen} holds the base whole on each rank, and {cut} cuts it: set {mend}, or remove "
            f"parallel.base_precision"
        )
    if config.lora.variant == "dora":
        found.append(
            f"{chosen} does not work with lora.variant=dora, which computes with D's weights themselves: set another "
            f"lora.variant, or remove parallel.base_precision"
        )
    return found


def _graph(config: Config) -> list[str]:
    """Return what CUDA graphs do not go with."""
    parallel, found = config.parallel, []
    if not parallel.graph:
        return []
    if parallel.strategy != "ddp":
        found.append(
            f"parallel.graph=true needs parallel.strategy=ddp, which leaves weights and gradients at their places in "
            f"memory, not {parallel.strategy}: set parallel.strategy=ddp, or remove parallel.graph"
        )
    if parallel.checkpoint_activations:
        found.append(
            "parallel.graph=true does not work with parallel.checkpoint_activations=true, which asks torch for the "
            "state of its random generator in each block: remove one of them; a smaller parallel.micro_batch saves "
            "memory, too"
        )
    if parallel.device == "cpu":
        found.append("parallel.graph=true needs a GPU: set parallel.device=cuda, or remove parallel.graph")
    return found


def _cut(config: Config, name: str) -> list[str]:
    batch = config.stage(name).global_batch
    ranks, micro = config.parallel.processes, config.parallel.micro_batch
    if batch % ranks or (micro and batch % (ranks * micro)):
        unit = ranks * (micro or 1)
        return [
            f"{name}.global_batch={batch} does not divide into {ranks} rank(s) with micro batches of "
            f"{micro or 'any size'}: set a multiple of {unit}, such as {max(unit, batch // unit * unit)}"
        ]
    return []


def _crops(config: Config) -> list[str]:
    found, flat = [], flatten(config)
    clip_frames = int(config.data.clip_seconds * _latent_rate(config))
    for name in _trained(config):
        frames = config.stage(name).crop_frames
        key = STAGES[name].crop_unit
        unit = flat[key]
        if frames > clip_frames and not config.data.buckets:
            found.append(
                f"{name}.crop_frames={frames} is longer than a clip of data.clip_seconds={config.data.clip_seconds:g}, "
                f"which has {clip_frames} frames: set {max(unit, clip_frames // unit * unit)}"
            )
        if frames % unit:
            near = max(unit, frames // unit * unit)
            found.append(f"{name}.crop_frames={frames} is not a multiple of {key}={unit}: set {near} or {near + unit}")
    pooling = config.latent_encoder.pooling
    for frames in config.data.buckets:
        if frames < 1 or frames % pooling:
            near = max(pooling, frames // pooling * pooling)
            found.append(f"data.buckets holds {frames}, not a multiple of latent_encoder.pooling={pooling}: set {near}")
    if config.latent_encoder.pooling % config.dit.patch_size:
        found.append(
            f"dit.patch_size={config.dit.patch_size} does not divide "
            f"latent_encoder.pooling={config.latent_encoder.pooling}: set a divisor of it"
        )
    return found


def _latent_rate(config: Config) -> float:
    """Return the frames of x0 per second."""
    kind = config.autoencoder.kind
    try:
        sample_rate, hop = latent_timing(kind, config.autoencoder.folder)
    except ValueError:  # the folder is missing or incomplete, which `_released` and the loader report
        sample_rate, hop = _RELEASED[kind]
    return sample_rate / hop


def _codebooks(config: Config) -> list[str]:
    quantizer, found = config.quantizer, []
    if quantizer.size < 2 or quantizer.size & (quantizer.size - 1):
        near = 2 ** max(1, quantizer.size.bit_length() - 1)
        found.append(f"quantizer.size={quantizer.size} is not a power of two: set {near} or {2 * near}")
    if quantizer.vectors < quantizer.size:
        found.append(
            f"quantizer.vectors={quantizer.vectors} cannot fill codebooks of {quantizer.size}: set at least "
            f"{40 * quantizer.size}"
        )
    if quantizer.kind == "qinco2" and quantizer.candidates < quantizer.beam:
        found.append(f"quantizer.candidates={quantizer.candidates} must be at least quantizer.beam={quantizer.beam}")
    if quantizer.kind == "fsq" and (width := config.latent_encoder.z_channels) % quantizer.books:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        found.append(
            f"quantizer.books={quantizer.books} of fsq does not divide {width} z_channels: set one of {divisors}"
        )
    if config.stage("prior").samples and quantizer.size > LARGEST_SIZE:
        found.append(
            f"quantizer.size={quantizer.size} is too large for a prior: set at most {LARGEST_SIZE}, or prior.samples=0"
        )
    for rate in quantizer.rates:
        if not 1 <= rate <= quantizer.books:
            found.append(f"quantizer.rates holds {rate}, which is not between 1 and quantizer.books={quantizer.books}")
    return found


def _formulation(config: Config) -> list[str]:
    try:
        make_diffusion(config.diffusion.name, **config.diffusion.options)
    except ValueError as error:
        return [f"diffusion: {error}"]
    return []


def _distilled_steps(config: Config) -> list[str]:
    if not config.stage("distill").samples:
        return []
    steps, of = config.distillation.steps, config.sampling.steps
    if not steps:
        return ["distillation.steps is empty: set it to [4, 2, 1], or distill.samples=0"]
    return [
        f"distillation.steps holds {count}, which is not below sampling.steps={of}: remove it"
        for count in steps
        if count >= of
    ]


def _folders(config: Config) -> list[str]:
    found = []
    if config.autoencoder.kind not in EMBEDDED and config.autoencoder.folder is None:
        found.append(
            f"autoencoder.kind={config.autoencoder.kind} needs autoencoder.folder: the folder of the release, with its "
            f"config and weights"
        )
    if config.text.kind != "none" and config.text.folder is None:
        found.append(f"text.kind={config.text.kind} needs text.folder: where its files are")
    if config.data.audio is None and config.data.synth_hours <= 0:
        found.append("there is no sound to train on: set data.audio=FOLDER or data.synth_hours=0.5")
    found += audio_troubles(config.data.audio) if config.data.audio is not None else []
    if config.data.audio is not None and is_url(config.data.latents):
        found.append(
            f"data.latents={config.data.latents} is a URL, to which `prepare` cannot write: remove data.audio, or set "
            f"data.latents=FOLDER and upload that folder"
        )
    found += [
        f"data.mix: {folder} is not a set and has no train/"
        for folder in config.data.mix
        if not is_url(folder) and not any((Path(folder) / name).exists() for name in ("train", "set.json"))
    ]
    found += [
        f"{key}={printable(value)} is not UTF-8, which config.yaml has to be: rename it, or make a link to it"
        for key, value in flatten(config).items()
        if isinstance(value, str) and as_unicode(value) != value
    ]
    latents = Path(config.data.latents)
    if latents.is_dir() and any(latents.glob("*.tar")):
        found.append(
            f"data.latents={latents} holds shards itself: move them to its train/, and held-out ones to "
            f"its test/, then run `spresso index {latents}`; or name the folder in data.mix"
        )
    return found


def _stores(config: Config) -> list[str]:
    """Return what is wrong with the URLs of checkpoints; no line shows a credential."""
    found, chosen = [], config.checkpoint
    for key, url in (("upload", chosen.upload), ("resume", chosen.resume), ("start_from", chosen.start_from)):
        if url is not None and is_url(url) and has_credentials(url):
            found.append(
                f"checkpoint.{key}={without_credentials(url)} holds credentials, which configs and logs would show: "
                f"leave them out, and give them in the store's own environment, such as AWS_ACCESS_KEY_ID"
            )
    if chosen.upload is None:
        return found
    if not is_url(chosen.upload):
        return [*found, f"checkpoint.upload={chosen.upload} is no URL: give one, such as s3://bucket/{config.name}"]
    protocol = chosen.upload.partition("://")[0].lower()
    if problem := UNWRITABLE.get(protocol) or unknown_protocol(protocol):
        found.append(f"checkpoint.upload={without_credentials(chosen.upload)}: {problem}")
    return found


def _evaluation(config: Config) -> list[str]:
    from trainer.evaluate import baselines, embeddings
    from trainer.evaluate.baselines.baseline import why_not_installed

    chosen = config.evaluate
    found = baselines.problems_of(chosen.baselines, chosen.weights)
    if problem := embeddings.problem_of(chosen.embedding):
        found.append(problem)
    if chosen.visqol and (
        missing := why_not_installed("visqol", "pip install 'spresso[visqol]', or remove evaluate.visqol")
    ):
        found.append(f"evaluate.visqol=true: {missing}")
    return found + [
        f"evaluate.codecs: {title}={folder} is not an export: give a folder such as runs/NAME/finetune/export"
        for title, folder in chosen.codecs.items()
        if not is_remote(folder) and not (Path(folder) / "codec.json").is_file()
    ]


def _released(config: Config) -> list[str]:
    folders = {
        f"{key}.folder": getattr(config, key).folder
        for key in ("autoencoder", "pretrained", *(["text"] if config.text.kind != "none" else []))
    }
    return [
        f"{key}={missing(folder)}"
        for key, folder in folders.items()
        if folder is not None and not locate(folder).is_dir()
    ]
