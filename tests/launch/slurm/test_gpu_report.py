"""What nvidia-smi says of GPUs, by a command of that name that answers as drivers do."""

from __future__ import annotations

import pytest

from launch.slurm import gpu_report
from launch.slurm.gpu_report import look_at_gpus

REBOOT = "<gpu_recovery_action>Reboot</gpu_recovery_action>"
HEAD = '<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n'


def gpu(
    *,
    used: str = "615 MiB",
    pending: str = "No",
    failed: str = "No",
    errors: str = "0",
    action: str = "<gpu_recovery_action>None</gpu_recovery_action>",
) -> str:
    """An H100 as driver 570 shows it."""
    return f"""<gpu id="00000000:19:00.0"><product_name>NVIDIA H100 80GB HBM3</product_name>
    <fb_memory_usage><total>81559 MiB</total><reserved>561 MiB</reserved><used>{used}</used></fb_memory_usage>
    <ecc_errors><volatile><sram_correctable>0</sram_correctable><dram_uncorrectable>{errors}</dram_uncorrectable>
    </volatile></ecc_errors><retired_pages><pending_retirement>N/A</pending_retirement></retired_pages>
    <remapped_rows><remapped_row_unc>1</remapped_row_unc><remapped_row_pending>{pending}</remapped_row_pending>
    <remapped_row_failure>{failed}</remapped_row_failure></remapped_rows>{action}</gpu>"""


def old_gpu(*, pending: str = "No", errors: str = "0") -> str:
    """A V100 as driver 450 shows it, without rows that are remapped."""
    return f"""<gpu id="00000000:00:07.0"><fb_memory_usage><total>32510 MiB</total><used>4 MiB</used></fb_memory_usage>
    <ecc_errors><volatile><double_bit><total>{errors}</total></double_bit></volatile></ecc_errors>
    <retired_pages><pending_blacklist>{pending}</pending_blacklist></retired_pages></gpu>"""


@pytest.fixture
def says(slurm):
    """Makes nvidia-smi say something, after which the arguments it was called with are known."""
    slurm.command("nvidia-smi")

    def say(text: str, *, status: int = 0) -> None:
        (slurm.folder / "said").write_text(text)
        slurm.answer("nvidia-smi", f"cat {slurm.folder}/said; exit {status}")

    return say


def log(*gpus: str) -> str:
    return f"{HEAD}<nvidia_smi_log>{''.join(gpus)}</nvidia_smi_log>"


def test_healthy_gpus(says, slurm):
    says(log(gpu(), gpu(errors="3"), old_gpu()))  # the driver has replaced the row with the errors
    assert look_at_gpus(3) == ([], [])
    assert slurm.calls("nvidia-smi") == ["-q -x"]  # one query, as each takes seconds on some nodes


@pytest.mark.parametrize(
    ("shown", "fault"),
    [
        (gpu(used="40000 MiB"), "has 40,000 of 81,559 MiB in use before the job begins"),
        (gpu(pending="Yes"), "has damaged memory (ECC) that waits to be replaced"),
        (gpu(failed="Yes"), "has damaged memory (ECC) that can't be replaced"),
        (old_gpu(pending="Yes"), "has damaged memory (ECC) that waits to be replaced"),
        (old_gpu(errors="2"), "has 2 uncorrectable ECC errors"),
        (
            gpu(action="<gpu_recovery_action>Reboot</gpu_recovery_action>"),
            "needs recovery after an error (Xid): Reboot",
        ),
    ],
)
def test_a_gpu_that_is_not_well_is_named(says, shown, fault):
    says(log(gpu(), shown))
    [found] = look_at_gpus(2).faults
    assert found.startswith(f"GPU 1 {fault}")


def test_a_gpu_that_is_missing(says):
    says(log(gpu()))
    assert look_at_gpus(2).faults[0].startswith("1 of 2 GPUs are there")


def test_other_jobs_gpus_are_none_of_our_business(says, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,2")
    says(log(gpu(), gpu(used="70000 MiB"), gpu()))
    assert look_at_gpus(2).faults == []
    monkeypatch.setenv("SLURM_JOB_GPUS", "1")
    assert len(look_at_gpus(1).faults) == 1
    monkeypatch.setenv("SLURM_STEP_GPUS", "2")  # on this node; the job's variable is that of the first node
    assert look_at_gpus(1).faults == []


def test_what_is_not_told_is_passed_over(says):
    says(log(gpu(used="[N/A]", pending="N/A", errors="N/A", action="")))
    assert look_at_gpus(1) == ([], ["GPU 0: memory in use", "GPU 0: pages and rows that wait for a reset"])


@pytest.mark.parametrize(
    "words",
    [
        "Unable to determine the device handle for GPU 0000:19:00.0: GPU is lost.  Reboot the system",
        "Unable to determine the device handle for GPU3: 0000:5D:00.0: Unknown Error",
    ],
)
def test_a_gpu_that_has_fallen_off_the_bus(says, words):
    says(f"{words}\n", status=15)
    [fault] = look_at_gpus(8).faults
    assert words in fault


@pytest.mark.parametrize("text", ["", "\x00\x01garbage", log(gpu())[:-40], "<html>502</html>", "<nvidia_smi_log>" * 3])
def test_an_answer_that_is_not_understood_is_no_fault(says, text):
    says(text, status=9)
    found = look_at_gpus(1)
    assert found.passed_over == ["nvidia-smi's answer is not understood (status 9)"]
    assert found.faults == []


def test_a_driver_that_hangs(slurm, monkeypatch):
    monkeypatch.setattr(gpu_report, "_PATIENCE", 0.5)
    slurm.command("nvidia-smi")
    slurm.answer("nvidia-smi", "exec sleep 1000")
    assert "gives no answer" in look_at_gpus(1).faults[0]


def test_without_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert look_at_gpus(1) == ([], ["there is no nvidia-smi"])
