"""Face two: compile ahead of time, save, load, generate.

    python samples/ahead_of_time.py MODEL DIRECTORY [--recipe int4]

MODEL is a Hugging Face directory, a GGUF file, a hub id, or `package.module:factory`.
"""

import argparse

import graphwright

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model")
parser.add_argument("directory")
parser.add_argument("--recipe", default="int4")
arguments = parser.parse_args()

compiled = graphwright.compile(arguments.model, recipe=arguments.recipe)
compiled.save(arguments.directory, overwrite=True)

loaded = graphwright.load(arguments.directory)
prompt = [[1, 2, 3, 4]]
print(loaded.generate(prompt, max_new_tokens=8).tokens[0])
