"""`python -m launch VERB` is `esd-jax VERB`, from a checkout that is not installed.

Beside it: the pretraining and the notebooks; `benchmark` and `device_check`, with `benchmarks/`; what
measures the figures of the documents, in `experiments/`; and how one erasure starts on several hosts (`tpu_pod.sh`,
`slurm.sbatch`, `gke.yaml`).
"""
