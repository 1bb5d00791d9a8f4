"""CPU kernels as TIR, one family a file, built by Python functions that take shapes and return a `PrimFunc`.

Letters: M rows (tokens of all sequences), N output features, K input features, G groups along K. A weight is read in
tiles of 16 rows (see `tiles`); every instruction set works on the same tiles.
"""
