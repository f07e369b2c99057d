# ---- synth
#!/bin/bash

# Parameters
#SBATCH --chdir=/home/me
#SBATCH --cpus-per-task=8
#SBATCH --job-name=tiny.synth
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/tiny/synth/logs/job_%j.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=24:00:00

# setup
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
settings=$(/home/me/.venv/bin/python -m launch.slurm.begin_end begin synth) || exit $?
eval "$settings"
srun --unbuffered --kill-on-bad-exit=1 --wait=0 --open-mode=append --output=/home/me/runs/tiny/synth/logs/job_%j_%t.out --cpus-per-task=8 --nodes=1 --ntasks=1 apptainer exec --bind /data spresso.sif python3 -u -m launch.slurm.job_task synth
/home/me/.venv/bin/python -m launch.slurm.begin_end end synth $? || exit $?
exit 0

# ---- prepare
#!/bin/bash

# Parameters
#SBATCH --array=0-7
#SBATCH --chdir=/home/me
#SBATCH --cpus-per-task=8
#SBATCH --dependency='afterok:<synth>'
#SBATCH --job-name=tiny.prepare
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/tiny/prepare/logs/job_%A_%a.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=24:00:00

# setup
export PYTHONSAFEPATH=1
export SPRESSO_RUN=/home/me/runs/tiny
export SPRESSO_SUBMISSION=/home/me/runs/tiny/submissions/0001
export SPRESSO_GRACE=120
export SPRESSO_PARTS=8
export SPRESSO_TASKS_PER_NODE=1
export PYTHONPATH=/home/me/runs/tiny/submissions/0001/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm

# prepare
settings=$(/home/me/.venv/bin/python -m launch.slurm.begin_end begin prepare) || exit $?
eval "$settings"
srun --unbuffered --kill-on-bad-exit=1 --wait=0 --open-mode=append --output=/home/me/runs/tiny/prepare/logs/job_%A_%a_%t.out --cpus-per-task=8 --nodes=1 --ntasks=1 apptainer exec --nv --bind /data spresso.sif python3 -u -m launch.slurm.job_task prepare
/home/me/.venv/bin/python -m launch.slurm.begin_end end prepare $? || exit $?
exit 0

# ---- pretrain
#!/bin/bash

# Parameters
#SBATCH --chdir=/home/me
#SBATCH --cpus-per-task=8
#SBATCH --dependency='afterok:<prepare>'
#SBATCH --gpus-per-node=8
#SBATCH --job-name=tiny.pretrain
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/tiny/pretrain/logs/job_%j.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=24:00:00

# setup
export PYTHONSAFEPATH=1
export SPRESSO_RUN=/home/me/runs/tiny
export SPRESSO_SUBMISSION=/home/me/runs/tiny/submissions/0001
export SPRESSO_GRACE=120
export SPRESSO_PARTS=1
export SPRESSO_TASKS_PER_NODE=8
export PYTHONPATH=/home/me/runs/tiny/submissions/0001/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm

# pretrain
settings=$(/home/me/.venv/bin/python -m launch.slurm.begin_end begin pretrain) || exit $?
eval "$settings"
srun --unbuffered --kill-on-bad-exit=1 --wait=0 --open-mode=append --output=/home/me/runs/tiny/pretrain/logs/job_%j_%t.out --cpus-per-task=8 apptainer exec --nv --bind /data spresso.sif python3 -u -m launch.slurm.job_task pretrain
/home/me/.venv/bin/python -m launch.slurm.begin_end end pretrain $? || exit $?
exit 0

# ---- autoencode
#!/bin/bash

# Parameters
#SBATCH --chdir=/home/me
#SBATCH --cpus-per-task=8
#SBATCH --dependency='afterok:<pretrain>'
#SBATCH --gpus-per-node=8
#SBATCH --job-name=tiny.autoencode
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/tiny/autoencode/logs/job_%j.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=24:00:00

# setup
export PYTHONSAFEPATH=1
export SPRESSO_RUN=/home/me/runs/tiny
export SPRESSO_SUBMISSION=/home/me/runs/tiny/submissions/0001
export SPRESSO_GRACE=120
export SPRESSO_PARTS=1
export SPRESSO_TASKS_PER_NODE=8
export PYTHONPATH=/home/me/runs/tiny/submissions/0001/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm

# autoencode
settings=$(/home/me/.venv/bin/python -m launch.slurm.begin_end begin autoencode) || exit $?
eval "$settings"
srun --unbuffered --kill-on-bad-exit=1 --wait=0 --open-mode=append --output=/home/me/runs/tiny/autoencode/logs/job_%j_%t.out --cpus-per-task=8 apptainer exec --nv --bind /data spresso.sif python3 -u -m launch.slurm.job_task autoencode
/home/me/.venv/bin/python -m launch.slurm.begin_end end autoencode $? || exit $?
exit 0

# ---- quantize
#!/bin/bash

# Parameters
#SBATCH --chdir=/home/me
#SBATCH --cpus-per-task=8
#SBATCH --dependency='afterok:<autoencode>'
#SBATCH --gpus-per-node=8
#SBATCH --job-name=tiny.quantize
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/tiny/quantize/logs/job_%j.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=24:00:00

# setup
export PYTHONSAFEPATH=1
export SPRESSO_RUN=/home/me/runs/tiny
export SPRESSO_SUBMISSION=/home/me/runs/tiny/submissions/0001
export SPRESSO_GRACE=120
export SPRESSO_PARTS=1
export SPRESSO_TASKS_PER_NODE=8
export PYTHONPATH=/home/me/runs/tiny/submissions/0001/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm

# quantize
settings=$(/home/me/.venv/bin/python -m launch.slurm.begin_end begin quantize) || exit $?
eval "$settings"
srun --unbuffered --kill-on-bad-exit=1 --wait=0 --open-mode=append --output=/home/me/runs/tiny/quantize/logs/job_%j_%t.out --cpus-per-task=8 apptainer exec --nv --bind /data spresso.sif python3 -u -m launch.slurm.job_task quantize
/home/me/.venv/bin/python -m launch.slurm.begin_end end quantize $? || exit $?
exit 0

# ---- finetune
#!/bin/bash

# Parameters
#SBATCH --chdir=/home/me
#SBATCH --cpus-per-task=8
#SBATCH --dependency='afterok:<quantize>'
#SBATCH --gpus-per-node=8
#SBATCH --job-name=tiny.finetune
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/tiny/finetune/logs/job_%j.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=24:00:00

# setup
export PYTHONSAFEPATH=1
export SPRESSO_RUN=/home/me/runs/tiny
export SPRESSO_SUBMISSION=/home/me/runs/tiny/submissions/0001
export SPRESSO_GRACE=120
export SPRESSO_PARTS=1
export SPRESSO_TASKS_PER_NODE=8
export PYTHONPATH=/home/me/runs/tiny/submissions/0001/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm

# finetune
settings=$(/home/me/.venv/bin/python -m launch.slurm.begin_end begin finetune) || exit $?
eval "$settings"
srun --unbuffered --kill-on-bad-exit=1 --wait=0 --open-mode=append --output=/home/me/runs/tiny/finetune/logs/job_%j_%t.out --cpus-per-task=8 apptainer exec --nv --bind /data spresso.sif python3 -u -m launch.slurm.job_task finetune
/home/me/.venv/bin/python -m launch.slurm.begin_end end finetune $? || exit $?
exit 0

# ---- evaluate
#!/bin/bash

# Parameters
#SBATCH --chdir=/home/me
#SBATCH --cpus-per-task=8
#SBATCH --dependency='afterok:<finetune>'
#SBATCH --gpus-per-node=1
#SBATCH --job-name=tiny.evaluate
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/tiny/evaluate/logs/job_%j.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=4:00:00

# setup
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
settings=$(/home/me/.venv/bin/python -m launch.slurm.begin_end begin evaluate) || exit $?
eval "$settings"
srun --unbuffered --kill-on-bad-exit=1 --wait=0 --open-mode=append --output=/home/me/runs/tiny/evaluate/logs/job_%j_%t.out --cpus-per-task=8 --nodes=1 --ntasks=1 apptainer exec --nv --bind /data spresso.sif python3 -u -m launch.slurm.job_task evaluate
/home/me/.venv/bin/python -m launch.slurm.begin_end end evaluate $? || exit $?
exit 0

# ---- page
#!/bin/bash

# Parameters
#SBATCH --chdir=/home/me
#SBATCH --cpus-per-task=2
#SBATCH --dependency='afterok:<evaluate>'
#SBATCH --job-name=tiny.page
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/tiny/page/logs/job_%j.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1:00:00

# setup
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
settings=$(/home/me/.venv/bin/python -m launch.slurm.begin_end begin page) || exit $?
eval "$settings"
srun --unbuffered --kill-on-bad-exit=1 --wait=0 --open-mode=append --output=/home/me/runs/tiny/page/logs/job_%j_%t.out --cpus-per-task=2 --nodes=1 --ntasks=1 apptainer exec --bind /data spresso.sif python3 -u -m launch.slurm.job_task page
/home/me/.venv/bin/python -m launch.slurm.begin_end end page $? || exit $?
exit 0
