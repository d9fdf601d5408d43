"""Names of the axes of a device mesh, for every room that speaks of them."""

DATA = "data"  # rows of a batch; copies of the parameters
FSDP = "fsdp"  # rows of a batch; parts of the parameters, gathered layer by layer
EXPERT = "expert"  # rows of a batch; parts as of `fsdp`, or whole experts to which tokens travel
SEQUENCE = "sequence"  # tokens of a row; parts as of `fsdp`
TENSOR = "tensor"  # heads and hidden units

AXES = (DATA, FSDP, EXPERT, SEQUENCE, TENSOR)
BATCH_AXES = (DATA, FSDP, EXPERT)
WEIGHT_AXES = (FSDP, EXPERT, SEQUENCE)  # those that hold parts which are gathered for use

# How a user makes a mesh over which the compiler lays arrays; by default its axes are Explicit.
MAKE_AUTO = "jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))"
