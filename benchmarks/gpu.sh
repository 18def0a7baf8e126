#!/usr/bin/env bash
# All that only a machine with a GPU can show, in stages of less than ten minutes each:
#
#     bash benchmarks/gpu.sh FOLDER [tests] [training] [latency] [study]
#
# FOLDER holds CIFAR-10's images as train/<class>/ and test/<class>/; without names, all stages run.
# Figures come last in each; results belong to benchmarks/results/ and studies/README.md.
set -u
cd "$(dirname "$0")/.."
folder=$(realpath "$1")
shift
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm --format=csv
python -c "import torch; print('torch', torch.__version__, 'CUDA', torch.version.cuda)"
for stage in "${@:-tests training latency study}"; do
    for each in $stage; do
        echo "== $each"
        case $each in
        tests) python -m pytest -q -m gpu --durations=10 ;;
        training) python -m benchmarks.training --device cuda --data "$folder" --seconds 240 ;;
        latency) python -m benchmarks.latency_model --device cuda ;;
        study)
            made=$(mktemp -d)
            sed "s|folder: data/cifar10|folder: $folder|" studies/cifar10_resnet20.yaml >"$made/study.yaml"
            time python -m widthsearch run "$made/study.yaml" --runs "$made/runs" \
                && python -m widthsearch pareto cifar10_resnet20 --runs "$made/runs" --families
            ;;
        *) echo "no such stage: $each" && exit 2 ;;
        esac || echo "== $each failed"
    done
done
