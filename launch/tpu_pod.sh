#!/usr/bin/env bash
# One erasure on all hosts of a Cloud TPU slice; every host runs the same command and JAX finds the others.
#
#   TPU=my-v5e-16 ZONE=us-west4-a PACKAGE='/mnt/nfs/esd_jax[tpu]' launch/tpu_pod.sh --config=sd14_style \
#     --config.concept="Van Gogh" --config.base=gs-or-nfs/stable-diffusion-v1-4 \
#     --config.output_dir=/mnt/nfs/van_gogh --config.batch_size=16
#
# PACKAGE is what pip installs on each host: a clone of this repository or a wheel, with [tpu]. It, base and output_dir
# must lie where all hosts see them (Filestore, or a bucket mounted by gcsfuse). batch_size must be a multiple of the
# slice's chips. A slice that is preempted goes on with the same command and --resume, on any slice.
set -euo pipefail
: "${TPU:?the slice: TPU=NAME}" "${ZONE:?its zone: ZONE=us-west4-a}"
: "${PACKAGE:?what pip installs on each host: PACKAGE='/mnt/nfs/esd_jax[tpu]'}"

quoted=$(printf ' %q' "$@") package=$(printf '%q' "$PACKAGE")
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  python3 -m venv --upgrade-deps \$HOME/esd && \$HOME/esd/bin/pip install --quiet $package &&
  exec \$HOME/esd/bin/esd-jax erase --multihost$quoted"
