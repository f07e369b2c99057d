# ---- synth
#!/bin/bash

# Parameters
#SBATCH --account=audio
#SBATCH --chdir=/home/me
#SBATCH --cpus-per-task=12
#SBATCH --gres-flags=enforce-binding
#SBATCH --job-name=tiny.synth
#SBATCH --mail-type=FAIL,END
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/tiny/synth/logs/job_%j.out
#SBATCH --partition=cpu
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=4:00:00

# setup
module load cuda/13.0 nccl
export NCCL_SOCKET_IFNAME=ib0
export HF_HUB_OFFLINE=1
export PYTHONSAFEPATH=1
export SPRESSO_RUN=/home/me/runs/tiny
export SPRESSO_SUBMISSION=/home/me/runs/tiny/submissions/0001
export SPRESSO_GRACE=120
export SPRESSO_PARTS=1
export SPRESSO_TASKS_PER_NODE=1
export PYTHONPATH=/home/me/runs/tiny/submissions/0001/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm

# synth
settings=$(python3 -m launch.slurm.begin_end begin synth) || exit $?
eval "$settings"
srun --unbuffered --kill-on-bad-exit=1 --wait=0 --open-mode=append --output=/home/me/runs/tiny/synth/logs/job_%j_%t.out --cpus-per-task=12 --nodes=1 --ntasks=1 --container-image=/images/spresso.sqsh --container-mounts=/data:/data,/home:/home python3 -u -m launch.slurm.job_task synth
python3 -m launch.slurm.begin_end end synth $? || exit $?
exit 0

# ---- prepare
#!/bin/bash

# Parameters
#SBATCH --account=audio
#SBATCH --array=0-15
#SBATCH --chdir=/home/me
#SBATCH --cpus-per-task=12
#SBATCH --dependency='afterok:<synth>'
#SBATCH --gres-flags=enforce-binding
#SBATCH --job-name=tiny.prepare
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mail-type=FAIL,END
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/tiny/prepare/logs/job_%A_%a.out
#SBATCH --partition=cpu
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=4:00:00

# setup
module load cuda/13.0 nccl
export NCCL_SOCKET_IFNAME=ib0
export HF_HUB_OFFLINE=1
export PYTHONSAFEPATH=1
export SPRESSO_RUN=/home/me/runs/tiny
export SPRESSO_SUBMISSION=/home/me/runs/tiny/submissions/0001
export SPRESSO_GRACE=120
export SPRESSO_PARTS=16
export SPRESSO_TASKS_PER_NODE=1
export PYTHONPATH=/home/me/runs/tiny/submissions/0001/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm

# prepare
settings=$(python3 -m launch.slurm.begin_end begin prepare) || exit $?
eval "$settings"
srun --unbuffered --kill-on-bad-exit=1 --wait=0 --open-mode=append --output=/home/me/runs/tiny/prepare/logs/job_%A_%a_%t.out --cpus-per-task=12 --nodes=1 --ntasks=1 --container-image=/images/spresso.sqsh --container-mounts=/data:/data,/home:/home python3 -u -m launch.slurm.job_task prepare
python3 -m launch.slurm.begin_end end prepare $? || exit $?
exit 0

# ---- pretrain
#!/bin/bash

# Parameters
#SBATCH --account=audio
#SBATCH --chdir=/home/me
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=12
#SBATCH --dependency='afterok:<prepare>'
#SBATCH --gpus-per-node=4
#SBATCH --gres-flags=enforce-binding
#SBATCH --job-name=tiny.pretrain
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mail-type=FAIL,END
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/tiny/pretrain/logs/job_%j.out
#SBATCH --partition=short
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=4:00:00

# setup
module load cuda/13.0 nccl
export NCCL_SOCKET_IFNAME=ib0
export HF_HUB_OFFLINE=1
export PYTHONSAFEPATH=1
export SPRESSO_RUN=/home/me/runs/tiny
export SPRESSO_SUBMISSION=/home/me/runs/tiny/submissions/0001
export SPRESSO_GRACE=120
export SPRESSO_PARTS=1
export SPRESSO_TASKS_PER_NODE=4
export PYTHONPATH=/home/me/runs/tiny/submissions/0001/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm

# pretrain
settings=$(python3 -m launch.slurm.begin_end begin pretrain) || exit $?
eval "$settings"
srun --unbuffered --kill-on-bad-exit=1 --wait=0 --open-mode=append --output=/home/me/runs/tiny/pretrain/logs/job_%j_%t.out --cpus-per-task=12 --container-image=/images/spresso.sqsh --container-mounts=/data:/data,/home:/home python3 -u -m launch.slurm.job_task pretrain
python3 -m launch.slurm.begin_end end pretrain $? || exit $?
exit 0

# ---- autoencode
#!/bin/bash

# Parameters
#SBATCH --account=audio
#SBATCH --chdir=/home/me
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=12
#SBATCH --dependency='afterok:<pretrain>'
#SBATCH --gpus-per-node=4
#SBATCH --gres-flags=enforce-binding
#SBATCH --job-name=tiny.autoencode
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mail-type=FAIL,END
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/tiny/autoencode/logs/job_%j.out
#SBATCH --partition=short
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=4:00:00

# setup
module load cuda/13.0 nccl
export NCCL_SOCKET_IFNAME=ib0
export HF_HUB_OFFLINE=1
export PYTHONSAFEPATH=1
export SPRESSO_RUN=/home/me/runs/tiny
export SPRESSO_SUBMISSION=/home/me/runs/tiny/submissions/0001
export SPRESSO_GRACE=120
export SPRESSO_PARTS=1
export SPRESSO_TASKS_PER_NODE=4
export PYTHONPATH=/home/me/runs/tiny/submissions/0001/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm

# autoencode
settings=$(python3 -m launch.slurm.begin_end begin autoencode) || exit $?
eval "$settings"
srun --unbuffered --kill-on-bad-exit=1 --wait=0 --open-mode=append --output=/home/me/runs/tiny/autoencode/logs/job_%j_%t.out --cpus-per-task=12 --container-image=/images/spresso.sqsh --container-mounts=/data:/data,/home:/home python3 -u -m launch.slurm.job_task autoencode
python3 -m launch.slurm.begin_end end autoencode $? || exit $?
exit 0

# ---- quantize
#!/bin/bash

# Parameters
#SBATCH --account=audio
#SBATCH --chdir=/home/me
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=12
#SBATCH --dependency='afterok:<autoencode>'
#SBATCH --gpus-per-node=4
#SBATCH --gres-flags=enforce-binding
#SBATCH --job-name=tiny.quantize
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mail-type=FAIL,END
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/tiny/quantize/logs/job_%j.out
#SBATCH --partition=short
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=4:00:00

# setup
module load cuda/13.0 nccl
export NCCL_SOCKET_IFNAME=ib0
export HF_HUB_OFFLINE=1
export PYTHONSAFEPATH=1
export SPRESSO_RUN=/home/me/runs/tiny
export SPRESSO_SUBMISSION=/home/me/runs/tiny/submissions/0001
export SPRESSO_GRACE=120
export SPRESSO_PARTS=1
export SPRESSO_TASKS_PER_NODE=4
export PYTHONPATH=/home/me/runs/tiny/submissions/0001/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm

# quantize
settings=$(python3 -m launch.slurm.begin_end begin quantize) || exit $?
eval "$settings"
srun --unbuffered --kill-on-bad-exit=1 --wait=0 --open-mode=append --output=/home/me/runs/tiny/quantize/logs/job_%j_%t.out --cpus-per-task=12 --container-image=/images/spresso.sqsh --container-mounts=/data:/data,/home:/home python3 -u -m launch.slurm.job_task quantize
python3 -m launch.slurm.begin_end end quantize $? || exit $?
exit 0

# ---- finetune
#!/bin/bash

# Parameters
#SBATCH --account=audio
#SBATCH --chdir=/home/me
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=12
#SBATCH --dependency='afterok:<quantize>'
#SBATCH --gpus-per-node=4
#SBATCH --gres-flags=enforce-binding
#SBATCH --job-name=tiny.finetune
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mail-type=FAIL,END
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/tiny/finetune/logs/job_%j.out
#SBATCH --partition=short
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=4:00:00

# setup
module load cuda/13.0 nccl
export NCCL_SOCKET_IFNAME=ib0
export HF_HUB_OFFLINE=1
export PYTHONSAFEPATH=1
export SPRESSO_RUN=/home/me/runs/tiny
export SPRESSO_SUBMISSION=/home/me/runs/tiny/submissions/0001
export SPRESSO_GRACE=120
export SPRESSO_PARTS=1
export SPRESSO_TASKS_PER_NODE=4
export PYTHONPATH=/home/me/runs/tiny/submissions/0001/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm

# finetune
settings=$(python3 -m launch.slurm.begin_end begin finetune) || exit $?
eval "$settings"
srun --unbuffered --kill-on-bad-exit=1 --wait=0 --open-mode=append --output=/home/me/runs/tiny/finetune/logs/job_%j_%t.out --cpus-per-task=12 --container-image=/images/spresso.sqsh --container-mounts=/data:/data,/home:/home python3 -u -m launch.slurm.job_task finetune
python3 -m launch.slurm.begin_end end finetune $? || exit $?
exit 0

# ---- evaluate
#!/bin/bash

# Parameters
#SBATCH --account=audio
#SBATCH --chdir=/home/me
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=12
#SBATCH --dependency='afterok:<finetune>'
#SBATCH --gpus-per-node=1
#SBATCH --gres-flags=enforce-binding
#SBATCH --job-name=tiny.evaluate
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mail-type=FAIL,END
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/tiny/evaluate/logs/job_%j.out
#SBATCH --partition=short
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=4:00:00

# setup
module load cuda/13.0 nccl
export NCCL_SOCKET_IFNAME=ib0
export HF_HUB_OFFLINE=1
export PYTHONSAFEPATH=1
export SPRESSO_RUN=/home/me/runs/tiny
export SPRESSO_SUBMISSION=/home/me/runs/tiny/submissions/0001
export SPRESSO_GRACE=120
export SPRESSO_PARTS=1
export SPRESSO_TASKS_PER_NODE=1
export PYTHONPATH=/home/me/runs/tiny/submissions/0001/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm

# evaluate
settings=$(python3 -m launch.slurm.begin_end begin evaluate) || exit $?
eval "$settings"
srun --unbuffered --kill-on-bad-exit=1 --wait=0 --open-mode=append --output=/home/me/runs/tiny/evaluate/logs/job_%j_%t.out --cpus-per-task=12 --nodes=1 --ntasks=1 --container-image=/images/spresso.sqsh --container-mounts=/data:/data,/home:/home python3 -u -m launch.slurm.job_task evaluate
python3 -m launch.slurm.begin_end end evaluate $? || exit $?
exit 0

# ---- page
#!/bin/bash

# Parameters
#SBATCH --account=audio
#SBATCH --chdir=/home/me
#SBATCH --cpus-per-task=12
#SBATCH --dependency='afterok:<evaluate>'
#SBATCH --gres-flags=enforce-binding
#SBATCH --job-name=tiny.page
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mail-type=FAIL,END
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/tiny/page/logs/job_%j.out
#SBATCH --partition=cpu
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=4:00:00

# setup
module load cuda/13.0 nccl
export NCCL_SOCKET_IFNAME=ib0
export HF_HUB_OFFLINE=1
export PYTHONSAFEPATH=1
export SPRESSO_RUN=/home/me/runs/tiny
export SPRESSO_SUBMISSION=/home/me/runs/tiny/submissions/0001
export SPRESSO_GRACE=120
export SPRESSO_PARTS=1
export SPRESSO_TASKS_PER_NODE=1
export PYTHONPATH=/home/me/runs/tiny/submissions/0001/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm

# page
settings=$(python3 -m launch.slurm.begin_end begin page) || exit $?
eval "$settings"
srun --unbuffered --kill-on-bad-exit=1 --wait=0 --open-mode=append --output=/home/me/runs/tiny/page/logs/job_%j_%t.out --cpus-per-task=12 --nodes=1 --ntasks=1 --container-image=/images/spresso.sqsh --container-mounts=/data:/data,/home:/home python3 -u -m launch.slurm.job_task page
python3 -m launch.slurm.begin_end end page $? || exit $?
exit 0
