#!/usr/bin/env bash
# Make the environment that TRL runs in: benches/make_peer_env.sh FOLDER. Its python is FOLDER/bin/python.
# torch goes first and pinned: an open range can pull gigabytes of CUDA packages onto a machine without a GPU.
set -euo pipefail
folder=${1:?usage: make_peer_env.sh FOLDER}
python3 -m venv "$folder"
"$folder/bin/python" -m pip install --quiet "torch==2.13.0"
"$folder/bin/python" -m pip install --quiet \
  "trl==1.16.0" "transformers==5.23.0" "peft==0.21.2" accelerate datasets numpy pydantic
"$folder/bin/python" -c 'import trl; print("trl", trl.__version__)'
