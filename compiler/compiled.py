"""The compiler's one chain, and what it returns.

    compiled = compile(model, recipe="int4", target="cpu")
    print(compiled.generate("The capital of France is", max_new_tokens=20))
    compiled.save("smollm2-int4");  compiled = load("smollm2-int4")
"""

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphwright import artifact, registry
from graphwright.backend import Backend, Executable, Progress, coverage
from graphwright.capture import DimNames, capture
from graphwright.contract import Contract
from graphwright.engine.generate import Generator
from graphwright.errors import BackendError
from graphwright.manager import Observer, PassManager, plan_passes
from graphwright.pass_ import Context
from graphwright.program import Metadata, Program, load_weights
from graphwright.recipe import Recipe
from graphwright.report.collect import Recorder, Report
from graphwright.sources import Source, open_model
from graphwright.target import Target
