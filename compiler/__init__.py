"""Graphwright: a PyTorch graph compiler that makes large language models smaller and faster on your own hardware.

    compiled = graphwright.compile("model.gguf", recipe="int4", target="cpu")
    print(compiled.generate("The capital of France is", max_new_tokens=8).texts[0])
    compiled.save("model-int4")

The way of the data, one module per arrow:

    what the user names ─ sources ─▶ nn.Module ─ capture ─▶ Program (ATen) ─ raising passes ─▶ Program (semantic ops)
        ─ the recipe's passes ─▶ Program (rewritten) ─ backend ─▶ Executable ─ artifact ─▶ a directory that runs alone
"""

from graphwright.capture import capture
from graphwright.compiled import Compiled, CompileOptions, compile, load, rewrite
from graphwright.errors import GraphwrightError
from graphwright.exporting import export
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target

__all__ = [
    "CompileOptions",
    "Compiled",
    "GraphwrightError",
    "Program",
    "Recipe",
    "Target",
    "capture",
    "compile",
    "export",
    "load",
    "rewrite",
]
