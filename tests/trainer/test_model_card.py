"""The card of an export: the run's name stands in it as it is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from trainer.tasks import CodecTask


@pytest.mark.parametrize(
    "name", ["![a](https://b.c)", "{model}", "a\n# b", "<img src=x onerror=alert(1)>", "`a` *b* _c_"]
)
def test_the_name_is_text_in_the_card(name: str):
    markdown_it = pytest.importorskip("markdown_it")
    sizes = SimpleNamespace(latent_encoder=SimpleNamespace(z_channels=4))
    codec = SimpleNamespace(config=sizes, z_rate=1.0, compression=2.0)
    config = SimpleNamespace(name=name, autoencoder=SimpleNamespace(kind="spectral"))
    task = SimpleNamespace(config=config, stage="finetune", codec=codec, _rates=list)
    card = CodecTask._card(task).replace("{model}", "a91f03")  # as `SPresso.save_pretrained` does
    heading = markdown_it.MarkdownIt().parse(card)[1]
    assert {child.type for child in heading.children} <= {"text", "text_special"}
    shown = "".join(child.content for child in heading.children)
    assert shown == f"{' '.join(name.split())}: an S-PRESSO codec, model a91f03"
