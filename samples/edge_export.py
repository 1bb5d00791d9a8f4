"""Face three: the rewritten graph in a format that other runtimes load.

python samples/edge_export.py MODEL FILE.pt2
"""

import argparse

import torch

import graphwright

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model")
parser.add_argument("file")
arguments = parser.parse_args()

path = graphwright.export(arguments.model, "torch-export", arguments.file, recipe="int8", overwrite=True)
program = torch.export.load(path)
print(f"{path}: {len(program.graph.nodes)} nodes, {path.stat().st_size / 1e6:.1f} MB")
