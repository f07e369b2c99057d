"""Uploads: whole or not there, each file once, kept by the local rule, by one run and one start of it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.checkpoints.test_checkpoint import META, flip_a_byte, loaded, same, save, state
from trainer.checkpoints import checkpoint
from trainer.checkpoints.names import checkpoints, folder_name
from trainer.checkpoints.retention import Retention
from trainer.ranks.flat_ranges import whole_ranges
from trainer.stores.download import DamagedCopyError, copy_checkpoint, copy_files
from trainer.stores.layout import new_claim, read_claim, read_done
from trainer.stores.store import Store, trouble
from trainer.stores.upload import RefusedError, Upload

STEP, ALL = folder_name(8), Retention(9)


def uploader(place: Any, folder: Path, *, run: str = "a", keep: Retention = ALL, begins: int = 99) -> Upload:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "inputs.json").write_text("{}")
    claim = new_claim(run, "tiny", {})
    return Upload(Store(place.url, patience=0), folder, claim, "name: tiny\n", keep, begins=begins)


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    return tmp_path / "run" / "pretrain"


def copied(place: Any, tmp_path: Path, name: str = STEP) -> Path:
    into = tmp_path / "copy" / name
    copy_checkpoint(Store(place.url, patience=0), f"pretrain/checkpoints/{name}", into)
    return into


def test_what_is_uploaded_comes_back_equal(place, stage, tmp_path, files_of):
    save(stage / "checkpoints", 8, state(3))
    uploader(place, stage).checkpoint(STEP)
    assert same(loaded(copied(place, tmp_path)), state(3))
    there = files_of(place)
    assert {"owner.json", "pretrain/config.yaml", "pretrain/inputs.json"} < there.keys()
    manifest = (stage / "checkpoints" / STEP / "manifest.json").read_bytes()
    assert there[f"pretrain/checkpoints/{STEP}/manifest.json"] == manifest


def test_the_manifest_comes_last_and_goes_first(s3, stage):
    for samples in (8, 16):
        save(stage / "checkpoints", samples)
    upload = uploader(s3, stage, keep=Retention(1))
    upload.checkpoint(STEP)
    assert "manifest.json" in s3.proxy.asked(f"PUT .*{STEP}/")[-1]
    upload.checkpoint(folder_name(16))
    deleted = s3.proxy.asked(f"DELETE .*{STEP}/")
    assert "manifest.json" in deleted[0]
    assert len(deleted) == 3  # with the file of the rank, and begun.json
    newest = s3.proxy.requests.index(s3.proxy.asked(f"PUT .*{folder_name(16)}/manifest")[0])
    assert newest < s3.proxy.requests.index(deleted[0])  # the older one stays until the newer one is whole


def test_what_was_cut_off_goes_on_with_the_files_that_are_missing(s3, stage, tmp_path):
    save(stage / "checkpoints", 8)
    save(stage / "averages", 8, state(2))
    s3.proxy.fault = lambda method, name: "cut" if method == "PUT" and f"checkpoints/{STEP}/rank" in name else ""
    with pytest.raises(Exception, match=r".+"):
        uploader(s3, stage).checkpoint(STEP)
    with pytest.raises(DamagedCopyError, match=r"manifest\.json is missing"):
        copied(s3, tmp_path)
    assert not s3.proxy.asked(f"PUT .*checkpoints/{STEP}/manifest")
    s3.proxy.fault = lambda method, name: ""
    before = len(s3.proxy.requests)
    uploader(s3, stage).checkpoint(STEP)  # another process goes on
    again = [request for request in s3.proxy.requests[before:] if request.startswith("PUT")]
    assert not [request for request in again if "/averages/" in request]
    assert same(loaded(copied(s3, tmp_path)), state())


def test_a_whole_checkpoint_is_not_sent_again(s3, stage):
    save(stage / "checkpoints", 8)
    uploader(s3, stage).checkpoint(STEP)
    before = len(s3.proxy.requests)
    uploader(s3, stage).checkpoint(STEP)
    assert not [request for request in s3.proxy.requests[before:] if "PUT" in request and STEP in request]


def test_a_file_that_arrived_damaged_is_sent_again(s3, stage, tmp_path):
    """The store tells its checksum, and the size alone would not show the damage."""
    path = save(stage / "checkpoints", 8)
    upload, store = uploader(s3, stage), Store(s3.url, patience=0)
    s3.proxy.fault = lambda method, name: "500" if method == "PUT" and "rank_" in name else ""
    with pytest.raises(OSError, match="internal error"):
        upload.checkpoint(STEP)
    s3.proxy.fault = lambda method, name: ""
    content = bytearray((path / "rank_00000.safetensors").read_bytes())
    content[-1] ^= 1
    store.write(f"pretrain/checkpoints/{STEP}/rank_00000.safetensors", bytes(content))
    upload.checkpoint(STEP)
    assert same(loaded(copied(s3, tmp_path)), state())


def test_files_of_another_checkpoint_of_that_name_are_not_taken(place, stage, tmp_path):
    """A rewound run comes to the same number of samples again, with other weights in files of the same sizes."""
    save(stage / "checkpoints", 8, state(1))
    upload = uploader(place, stage)
    upload.checkpoint(STEP)
    Store(place.url, patience=0).remove(f"pretrain/checkpoints/{STEP}/manifest.json")
    save(stage / "checkpoints", 8, state(2))
    upload.checkpoint(STEP)
    assert same(loaded(copied(place, tmp_path)), state(2))


def test_a_file_in_parts_is_compared_with_the_sum_of_its_parts(s3, tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * (160 << 10))  # 40 MiB: three parts
    store, moved = Store(s3.url, patience=0), []
    store.write("small", b"so that it is known what the store's tags are")
    assert store.md5_tags
    store.send("large", path, moved.append)
    assert sum(moved) == 40 << 20
    assert store.holds("large", path)
    flip_a_byte(path, 7)
    assert not store.holds("large", path)


@pytest.mark.parametrize("rule", [Retention(1), Retention(2, best=1), Retention(1, every=16)])
def test_the_store_keeps_what_the_run_directory_keeps(disk, stage, files_of, rule):
    upload, losses = uploader(disk, stage, keep=rule), {8: 0.1, 16: 0.5, 24: 0.4, 32: 0.6, 40: 0.7}
    for samples, loss in losses.items():
        checkpoint.save(stage / "checkpoints", samples, whole_ranges(state()), META | {"held_out_loss": loss})
        upload.checkpoint(folder_name(samples))
        checkpoint.prune(stage / "checkpoints", last=rule.last, best=rule.best, every=rule.every)
        there = {name.split("/")[2] for name in files_of(disk) if "checkpoints/" in name}
        assert there == {path.name for path in checkpoints(stage / "checkpoints")}


def test_a_rewound_run_takes_its_later_checkpoints_off_the_store(place, stage, files_of):
    upload = uploader(place, stage)
    for samples in (8, 16):
        save(stage / "checkpoints", samples)
        upload.checkpoint(folder_name(samples))
    upload.went_back(STEP)
    assert {name.split("/")[2] for name in files_of(place) if "checkpoints/" in name} == {STEP}


def test_a_rewound_run_leaves_what_it_goes_on_from(disk, stage, files_of):
    """The checkpoint to which it goes back may have been left out, as a newer one came while it waited."""
    upload = uploader(disk, stage)
    for samples in (8, 16):
        save(stage / "checkpoints", samples)
    upload.checkpoint(folder_name(16))
    upload.went_back(STEP)
    there = files_of(disk)
    assert {name.split("/")[2] for name in there if "checkpoints/" in name} == {STEP}
    assert f"pretrain/checkpoints/{STEP}/manifest.json" in there


def test_a_rewound_run_whose_checkpoint_is_gone_by_now_does_not_wait_for_it(disk, stage, files_of):
    upload = uploader(disk, stage)
    save(stage / "checkpoints", 16)
    upload.checkpoint(folder_name(16))
    upload.went_back(STEP)
    assert not [name for name in files_of(disk) if "checkpoints/" in name]


def test_another_process_of_the_same_start_goes_on(disk, stage):
    """The process that uploads was killed, such as for its memory."""
    first = uploader(disk, stage, begins=0)
    save(stage / "checkpoints", 8)
    first.checkpoint(STEP)
    second = uploader(disk, stage, begins=0)
    second.claim = first.claim
    save(stage / "checkpoints", 16)
    second.checkpoint(folder_name(16))
    assert Store(disk.url, patience=0).sizes(f"pretrain/checkpoints/{folder_name(16)}").keys() >= {"manifest.json"}


def test_a_damaged_checkpoint_on_the_store_is_replaced_by_what_is_whole(disk, stage, files_of):
    """The run goes on from the one before, and comes to the same number of samples again."""
    save(stage / "checkpoints", 8)
    save(stage / "checkpoints", 16)
    first = uploader(disk, stage)
    first.checkpoint(STEP)
    first.checkpoint(folder_name(16))
    damaged = f"pretrain/checkpoints/{folder_name(16)}/rank_00000.safetensors"
    content = files_of(disk)[damaged]
    first.store.write(damaged, bytes(len(content)))
    second = uploader(disk, stage, begins=8)
    second.damaged = {folder_name(16)}
    second.begin()
    second.checkpoint(folder_name(16))
    assert files_of(disk)[damaged] == content
    assert not second.damaged


def export_of(stage: Path, content: bytes) -> None:
    (stage / "export").mkdir(parents=True, exist_ok=True)
    (stage / "export" / "dit.safetensors").write_bytes(content)


def test_an_export_that_was_made_again_takes_the_place_of_the_older_one(place, stage, tmp_path):
    """A longer training exports files of the same sizes."""
    upload = uploader(place, stage)
    for content in (b"older", b"newer"):
        export_of(stage, content)
        upload.export()
    files = read_done(upload.store, "pretrain")["files"]
    (tmp_path / "copy").mkdir()
    copy_files(upload.store, "pretrain", tmp_path / "copy", files)
    assert (tmp_path / "copy/export/dit.safetensors").read_bytes() == b"newer"


def test_an_export_that_was_cut_off_goes_on_with_the_files_that_are_missing(s3, stage):
    export_of(stage, b"weights")
    (stage / "export" / "codec.json").write_bytes(b"{}")
    s3.proxy.fault = lambda method, name: "500" if method == "PUT" and "dit." in name else ""
    with pytest.raises(OSError, match="internal error"):
        uploader(s3, stage).export()
    s3.proxy.fault = lambda method, name: ""
    uploader(s3, stage).export()
    assert len(s3.proxy.asked(r"PUT .*codec\.json")) == 1
    assert s3.proxy.asked(r"PUT .*done\.json")


def test_another_run_is_refused_and_nothing_of_the_first_is_touched(place, stage, tmp_path, files_of):
    save(stage / "checkpoints", 8)
    uploader(place, stage).checkpoint(STEP)
    before = files_of(place)
    save(tmp_path / "other" / "pretrain" / "checkpoints", 8, state(5))
    with pytest.raises(RefusedError, match=r"holds another run \(the run tiny.*give another checkpoint.upload"):
        uploader(place, tmp_path / "other" / "pretrain", run="b").checkpoint(STEP)
    assert files_of(place) == before


def test_a_damaged_claim_is_no_reason_to_try_again(place, stage):
    Store(place.url, patience=0).write("owner.json", b"")
    with pytest.raises(RefusedError, match=r"owner\.json is damaged .*give another checkpoint\.upload"):
        uploader(place, stage).begin()


def test_a_document_on_a_disk_is_replaced_whole(disk, monkeypatch):
    """A process that is killed while it writes leaves the document before, not the beginning of the new one."""
    store, replace = Store(disk.url, patience=0), Path.replace
    store.write("owner.json", b"before")

    def killed(path: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.write("owner.json", b"after")
    monkeypatch.setattr(Path, "replace", replace)
    assert store.content("owner.json", most=100) == b"before"


def test_what_a_killed_process_was_writing_is_nobodys(disk, stage):
    store = Store(disk.url, patience=0)
    store.write(".owner.json.host-4026531836-77.partial", b"{")
    uploader(disk, stage).begin()
    assert read_claim(store) is not None


def test_a_probe_that_could_not_be_deleted_is_nobodys(s3, stage):
    s3.proxy.fault = lambda method, name: "403" if method == "DELETE" else ""
    assert "can't be written" in trouble(s3.url)
    s3.proxy.fault = lambda method, name: ""
    uploader(s3, stage).begin()
    assert read_claim(Store(s3.url, patience=0)) is not None


def test_files_that_no_run_wrote_are_left_alone(place, stage):
    Store(place.url, patience=0).write("notes.txt", b"mine")
    with pytest.raises(RefusedError, match="holds files that no run wrote: give an empty folder"):
        uploader(place, stage).begin()


def test_a_start_that_was_replaced_writes_no_more(place, stage):
    save(stage / "checkpoints", 8)
    first, second = uploader(place, stage), uploader(place, stage)
    first.begin()
    second.begin()
    with pytest.raises(RefusedError, match=r"another start of this run, on .*, has taken"):
        first.checkpoint(STEP)
    assert read_claim(Store(place.url, patience=0)).token == second.claim.token


def test_a_start_that_is_replaced_meanwhile_leaves_no_manifest(s3, stage, files_of):
    save(stage / "checkpoints", 8)
    first, second = uploader(s3, stage), uploader(s3, stage)
    first.documents = second.begin
    with pytest.raises(RefusedError):
        first.checkpoint(STEP)
    assert f"pretrain/checkpoints/{STEP}/manifest.json" not in files_of(s3)


def test_a_store_that_is_ahead_of_the_run_is_refused(disk, stage):
    """A disk of an earlier node comes back, while the run has gone on elsewhere."""
    save(stage / "checkpoints", 16)
    uploader(disk, stage).checkpoint(folder_name(16))
    with pytest.raises(RefusedError, match="holds step_000000000016, which is newer"):
        uploader(disk, stage, begins=8).begin()


def test_a_damaged_checkpoint_on_the_store_is_named(place, stage, tmp_path):
    save(stage / "checkpoints", 8)
    uploader(place, stage).checkpoint(STEP)
    store, name = Store(place.url, patience=0), f"pretrain/checkpoints/{STEP}/rank_00000.safetensors"
    content = bytearray(store.content(name, most=1 << 20))
    content[-1] ^= 1
    store.write(name, bytes(content))
    with pytest.raises(DamagedCopyError, match=rf"{STEP}/rank_00000.safetensors has a wrong checksum"):
        copied(place, tmp_path)
    store.write(name, bytes(content[:-8]))
    with pytest.raises(DamagedCopyError, match=r"rank_00000\.safetensors has fewer"):
        copied(place, tmp_path)
    store.remove(name)
    with pytest.raises(DamagedCopyError, match=r"rank_00000\.safetensors is missing"):
        copied(place, tmp_path)
    store.write(f"pretrain/checkpoints/{STEP}/manifest.json", b"{}")
    with pytest.raises(DamagedCopyError, match="its checksum is wrong"):
        copied(place, tmp_path)


def test_a_download_that_was_cut_off_goes_on_where_it_was(disk, stage, tmp_path, monkeypatch):
    path = save(stage / "checkpoints", 8)
    uploader(disk, stage).checkpoint(STEP)
    into, fetched, append = tmp_path / "copy" / STEP, [], Store.append
    into.mkdir(parents=True)
    (into / "rank_00000.safetensors").write_bytes((path / "rank_00000.safetensors").read_bytes()[:100])

    def watched(store, name, file, size):
        fetched.append(file.seek(0, 2))
        return append(store, name, file, size)

    monkeypatch.setattr(Store, "append", watched)
    assert same(loaded(copied(disk, tmp_path)), state())
    assert fetched == [100]


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "export/../../evil", ""])
def test_a_name_that_leads_out_of_the_folder_is_refused(disk, tmp_path, name):
    with pytest.raises(DamagedCopyError, match="is not the name of a file of a run"):
        copy_files(Store(disk.url, patience=0), "pretrain", tmp_path, {name: {"bytes": 1}})


def test_no_more_is_fetched_than_the_disk_holds(disk, tmp_path):
    with pytest.raises(ValueError, match="free some space, or set another run_dir"):
        copy_files(Store(disk.url, patience=0), "pretrain", tmp_path, {"export/a": {"bytes": 1 << 60}})


def test_a_store_that_can_be_written_gives_no_trouble_and_keeps_nothing(place, files_of):
    assert trouble(place.url) == ""
    assert files_of(place) == {}


@pytest.mark.parametrize(("status", "words"), [("403", "PermissionError"), ("503", "OSError")])
def test_a_store_that_cannot_be_written_is_named_in_one_line(s3, status, words):
    s3.proxy.fault = lambda method, name: status if method == "PUT" else ""
    said = trouble(s3.url)
    assert said.startswith(f"checkpoint.upload={s3.url} can't be written: {words}")
    assert "Check the bucket's name" in said
    assert "\n" not in said


def test_a_bucket_that_is_missing_is_trouble(s3):
    assert "can't be written: FileNotFoundError" in trouble("s3://no-such-bucket/run")
