"""What ddinfer costs and gains, measured: `launch/bench`. Each module that `bench.parts` names is a part."""
