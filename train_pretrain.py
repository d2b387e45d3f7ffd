"""Stages 1 and 2: base pretraining, and the anneal on code and math that is its decay.

python train_pretrain.py --fresh           begin stage 1 from nothing
python train_pretrain.py                   continue it
python train_pretrain.py --stage anneal    stage 2, from stage 1's latest checkpoint
"""

from __future__ import annotations

from hamner.errors import run
from hamner.stage import carry_on, open_stage, stage_parser, stream_task


def main() -> int:
    parser = stage_parser(__doc__)
    parser.add_argument("--stage", choices=("base", "anneal"), default="base")
    arguments = parser.parse_args()
    start = open_stage(arguments.stage, arguments)
    if start is None:
        return 0
    # The anneal is the base run's decay: it keeps the optimizer's momenta and the loss scale.
    return start.run(stream_task(start), inherit=carry_on(start.previous, ("optimizer", "scaler")))


if __name__ == "__main__":
    run(main)
