#!/bin/bash
# ddinfer, machines: @nodes@, ranks on each: @ranks@. Run this file on each of them.
# The ranks are started again up to @max_restarts@ times when one dies; a machine that is lost may come back.
set -u
status=@status@
# Without this, torchrun cannot take back a machine that was lost: its agents wait for one another.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

torchrun @rendezvous@ --nproc_per_node=@ranks@ --max-restarts=@max_restarts@ \
    -m ddinfer @command@
code=$?

# torchrun says 1 whatever happened, so the job itself is asked. One that was killed says nothing.
if [ $code -ne 0 ] && [ -f "$status" ]; then
    code=$(python -c 'import json, sys; print(json.load(open(sys.argv[1])).get("exit_code", 75))' "$status")
fi
exit "$code"
