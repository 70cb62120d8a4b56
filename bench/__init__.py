"""What ddinfer costs and gains, measured: `launch/bench`."""
