"""A look at the machine: GPUs through their driver, host memory, disk; never a crash where there is no driver."""
