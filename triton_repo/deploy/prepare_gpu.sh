#!/bin/bash
# TensorRT plans for this GPU into a cache that is kept, then the model repository that is served from them.
#
#   prepare_gpu.sh ARTEFACTS ENGINES REPOSITORY [f16|f32|int8]
#
# Both manifests are verified: the artefacts' and the engines'. What was built before for this GPU, TensorRT and ONNX is
# taken again, so a restart costs seconds. The lock lets several pods share one cache.
set -euo pipefail
artefacts=${1:?ARTEFACTS} engines=${2:?ENGINES} repository=${3:?REPOSITORY} precision=${4:-f16}
mkdir -p "$engines"
flock "$engines/.lock" \
    python3 -m scaphoid.export.tensorrt_engines.build_engines "$artefacts" "$engines" --precision "$precision"
python3 -m scaphoid.triton_repo.assemble "$artefacts" "$repository" \
    --target gpu --engines "$engines" --precision "$precision"
