"""The format `aoti`: an artifact compiled for this machine's CPU by AOTInductor, which needs no modelling code.

graphwright export MODEL --format aoti --recipe int8 --verify -o DIR; graphwright run DIR "Hello"
"""

from graphwright.lowered_format import LoweredFormat


class Aoti(LoweredFormat):
    """Compiles with the backend `inductor`."""

    name = "aoti"
    lowering = "inductor"


FORMAT = Aoti()
