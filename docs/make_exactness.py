"""Measures what is exact, and writes the table into one-image.md.

python -m docs.make_exactness
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "one-image.md"
BEGIN, END = "<!-- exactness: made by make_exactness.py -->", "<!-- end of exactness -->"
RANKS = (2, 3, 4)


def measure_on_rank(world: Any) -> dict[str, str]:
    """Family → largest difference of one call's output from the whole model's, or why not."""
    import torch

    from ddinfer.distributed.process_group import process_group

    torch.set_num_threads(1)
    with process_group(world):
        return measure()


def measure() -> dict[str, str]:
    """The same, in a process group that is there."""
    import torch

    from ddinfer.errors import RankError, UsageError
    from ddinfer.parallel.communicator import Communicator
    from ddinfer.parallel.team.team import Team, check_models
    from tests.transformers import TRANSFORMERS

    found = {}
    for family, build in TRANSFORMERS.items():
        torch.manual_seed(0)
        model, arguments = build()
        model.eval()
        comm = Communicator.of()
        try:
            check_models({"transformer": model}, comm.size)
            team = Team({"transformer": model}, comm, sequence_parallel=comm.size)
            if not team.is_leader:
                team.serve()
                continue
            with team.leading():
                made = [model(**arguments, return_dict=False)[0] for _ in range(2)]
            team.detach()
        except (UsageError, RankError) as error:
            found[family] = f"refused: {str(error).partition(': ')[2]}"
            continue
        with torch.no_grad():
            whole = _flat(model(**arguments, return_dict=False)[0])
        difference = max(float((_flat(m) - whole).abs().max()) for m in made)
        found[family] = f"{difference / float(whole.abs().max()):.0e}" if difference else "0"
    return found


def _flat(output: Any) -> Any:
    import torch

    tensors = output if isinstance(output, (list, tuple)) else [output]
    return torch.cat([t.reshape(-1) for t in tensors])


def table(measured: dict[int, dict[str, str]]) -> str:
    lines = [
        BEGIN, "",
        "Tokens: the largest difference of one call's output from one rank's, in parts of its "
        "largest value; tiny models, float32, one thread a rank, on a CPU.", "",
        "| | " + " | ".join(f"{n} ranks" for n in measured) + " |",
        "|---|" + "---|" * len(measured),
    ]  # fmt: skip
    refused = []
    for family in next(iter(measured.values())):
        cells = [measured[n][family] for n in measured]
        reasons = [cell.partition(": ")[2] for cell in cells if cell.startswith("refused")]
        refused += [f"- {family}: {reason}" for reason in reasons[:1]]
        cells = ["refused" if cell.startswith("refused") else cell for cell in cells]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Why some are refused:", "", *refused, "", END])


def page_with_table(page: str, measured: dict[int, dict[str, str]]) -> str:
    head, _, rest = page.partition(BEGIN)
    return head + table(measured) + rest.partition(END)[2]


def main() -> None:
    from ddinfer import launch

    os.environ["OMP_NUM_THREADS"] = "1"
    measured = {n: launch(measure_on_rank, nproc_per_node=n, device="cpu")[0] for n in RANKS}
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page_with_table(page, measured), encoding="utf-8")


if __name__ == "__main__":
    main()
