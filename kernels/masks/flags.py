"""What the host knows of a key mask: the places of its four flags, bool ``[4]`` on the CPU."""

READABLE = 0  #: the mask is *causal and valid keys*
CONTIGUOUS = 1  #: every row's valid keys are one range, its bounds
ALL_VALID = 2  #: every key of every row is valid
LONG_ROWS = 3  #: every row has `LONG_ROW` valid keys or more

COUNT = 4
LONG_ROW = 128  # a block of keys of the Hopper kernels
