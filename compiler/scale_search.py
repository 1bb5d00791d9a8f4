"""Scales that are chosen on calibration data, site by site, and folded at once, as SmoothQuant and AWQ do."""

from collections.abc import Callable

import torch
from torch import Tensor

from graphwright import calibration, structure
from graphwright.calibration import Channels, Stop
from graphwright.folding import Site, fold_scale, scale_sites, value_of
from graphwright.pass_ import Context, Pass
from graphwright.rewrite import Editor

Choose = Callable[[Site, list[Tensor], Channels], tuple[float, Tensor | None]]
"""(site, weights of its readers [outputs, K], its activations) -> migration strength, and scales or None for none."""


def fold_chosen(one: Pass, editor: Editor, context: Context, rows: int, choose: Choose) -> dict[str, float]:
    """Folds what `choose` says at every tensor that linear layers other than the vocabulary head read.

    Args:
        one: the pass that folds.
        editor: its editor.
        context: with the calibration data.
        rows: calibration tokens that are kept for `choose`.
        choose: called once per site, in graph order, before anything is folded.

    Returns:
        The strengths by the name of the tensor's node.

    Raises:
        PassError: there is nothing to calibrate on, or activations are not finite.
    """
    program, head = editor.program, structure.head(editor.program)
    sites = [site for site in scale_sites(program) if head not in site.readers]

    def reduce(index: int, collected: Channels) -> dict[str, Tensor]:
        site = sites[index]
        weights = [
            value_of(program, operand).float().movedim(operand.axis, -1).flatten(0, -2) for operand in site.weights
        ]
        strength, scale = choose(site, weights, collected)
        made = {"strength": torch.tensor(strength, dtype=torch.float64)}
        return made if scale is None else {**made, "scale": scale}

    stops = [Stop(site.source, f"{editor.origin} scales {site.source.name}") for site in sites]
    found = calibration.measure(one, program, context, stops, lambda: Channels(rows), reduce)
    strengths: dict[str, float] = {}
    for site, chosen in zip(sites, found, strict=True):
        if editor.allow(site.source):
            strengths[site.source.name] = float(chosen["strength"])
            if "scale" in chosen:
                fold_scale(editor, site, chosen["scale"])
    return strengths
