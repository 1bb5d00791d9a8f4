"""Face three: the rewritten graph in a format that other runtimes load.

python samples/edge_export.py MODEL DIR
"""

import argparse
import json

import torch

import graphwright

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model")
parser.add_argument("directory")
arguments = parser.parse_args()

path = graphwright.export(
    arguments.model, "torch-export", arguments.directory, recipe="int8", verify=True, overwrite=True
)
program = torch.export.load(path / "model.pt2")
verified = json.loads((path / "manifest.json").read_text())["export"]["verified"]
print(f"{path}: {len(program.graph.nodes)} nodes, relative error {verified['relative_error']:.1e}")
