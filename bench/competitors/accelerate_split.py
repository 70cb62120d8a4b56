"""(c) Accelerate's ``split_between_processes``, as in the diffusers guides, under torchrun.

``accelerate launch`` starts one rank where there is no GPU, so torchrun starts them.
"""

from accelerate import PartialState
from common import draw, load, parse_options, read_jobs

if __name__ == "__main__":
    options = parse_options()
    distributed_state = PartialState(cpu=True)
    assert distributed_state.num_processes == options.ranks, distributed_state.num_processes
    pipe = load(options, distributed_state.device)
    with distributed_state.split_between_processes(read_jobs(options)) as jobs:
        draw(pipe, jobs, options)
    distributed_state.destroy_process_group()
