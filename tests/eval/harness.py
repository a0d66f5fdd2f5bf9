"""lm-evaluation-harness for several evaluations, in its own environment: each line read asks for one.

The command line of the harness reads 14,000 tasks of its own and imports transformers for each evaluation.  This
is its Python interface instead, with the tasks of tests/eval alone, and imports what it needs once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TASKS = Path(__file__).parent / "tasks"


def answer(asked: str) -> None:
    """Evaluate what `asked` says (`model`, `model_args`, `tasks`), and write what is found to its file `out`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    given = json.loads(asked)
    found = lm_eval.simple_evaluate(
        model=given["model"],
        model_args=given["model_args"],
        tasks=given["tasks"],
        device="cpu",
        bootstrap_iters=0,  # errors of metrics would be drawn; the values that they are of are compared
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
    )
    kept = {"results": found["results"], "samples": found["samples"]}
    Path(given["out"]).write_text(json.dumps(kept, default=str))


if __name__ == "__main__":
    for line in sys.stdin:
        answer(line)
        print("done", flush=True)
