"""Stage 3: pretraining on conversations, mixed with web text, the personal voice and exercises.

python train_chat_pretrain.py              from stage 2's latest checkpoint, or continue
"""

from __future__ import annotations

from hamner.errors import run
from hamner.stage import open_stage, stage_parser, stream_task


def main() -> int:
    start = open_stage("chat", stage_parser(__doc__).parse_args())
    return start.run(stream_task(start)) if start else 0


if __name__ == "__main__":
    run(main)
