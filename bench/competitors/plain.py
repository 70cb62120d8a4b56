"""(a) Plain diffusers: one process that uses all cores."""

import json
import time

from common import draw, load, parse_options, read_jobs

if __name__ == "__main__":
    options = parse_options()
    jobs = read_jobs(options)
    pipe = load(options)
    started = time.perf_counter()
    draw(pipe, jobs, options)
    if options.times:
        with open(options.times, "w") as file:
            json.dump({"loop_seconds": time.perf_counter() - started}, file)
