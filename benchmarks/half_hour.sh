#!/usr/bin/env bash
# The whole architecture through all five stages in half an hour of one H100, and what it gave.
#
#     benchmarks/half_hour.sh FOLDER [OPTIONS]     FOLDER as in data/README.md, for recipe small
#     benchmarks/half_hour.sh FOLDER --device cpu --set base.steps=2 ...    a try-out
#
# OPTIONS go to every stage. Metrics and samples lie in logs/h100/, the rest in logs/h100/report/.
# Last comes base training with the original recipe's settings (AdamW at 2e-4, 24 sequences a step,
# fp16), over as many tokens as the first 400 steps had: the metrics of both, with tokens and hours
# in every row, tell which is ahead at equal tokens and at equal time.
set -eu
data=${1:?say where the data lie: benchmarks/half_hour.sh FOLDER}
shift
cd "$(dirname "$0")/.."
options=(--recipe h100 --set "data_dir=$data")
report=logs/h100/report
mkdir -p data/small "$report"

python generate_sft_v3.py --out data/small/al.jsonl
python prepare_sft_data.py "${options[@]}"
python train_pretrain.py "${options[@]}" --fresh "$@"
python train_pretrain.py "${options[@]}" --stage anneal "$@"
python train_chat_pretrain.py "${options[@]}" "$@"
python train_sft.py "${options[@]}" "$@"
python train_dpo.py "${options[@]}" "$@"

python train_pretrain.py "${options[@]}" --fresh --set base.steps=2133 \
    --set base.folder=checkpoints/h100/original --set base.log=logs/h100/original \
    --set base.sequences_per_step=24 --set base.micro_batch=24 --set precision=fp16 \
    --set base.optimizer.kind=adamw --set base.optimizer.learning_rate=2e-4 "$@"

python evaluate_model.py --set "data_dir=$data" --tasks none --json "$report/evaluation.json" \
    --checkpoint checkpoints/h100/{base,anneal,chat,sft,dpo,original}/latest.pt
python benchmarks/trained_prompts.py "${options[@]}" --temp 0 0.7 --count 1000 \
    --checkpoint checkpoints/h100/{sft,dpo}/latest.pt --json "$report/trained_prompts.json"
for stage in sft dpo; do
    python test_ood.py --recipe h100 --checkpoint "checkpoints/h100/$stage/latest.pt" \
        --json "$report/ood_$stage.json"
done
python plot_training.py --recipe h100 --out "$report"
