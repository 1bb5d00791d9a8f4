"""Scales that are chosen on calibration data, site by site, and folded at once, as SmoothQuant and AWQ do."""

from collections.abc import Callable

from torch import Tensor

from graphwright import calibration, structure
from graphwright.calibration import Channels, Stop
from graphwright.folding import Site, fold_scale, scale_sites, value_of
from graphwright.pass_ import Context
from graphwright.rewrite import Editor

Choose = Callable[[Site, list[Tensor], Channels], tuple[float, Tensor | None]]
"""(site, weights of its readers [outputs, K], its activations) -> migration strength, and scales or None for none."""


def fold_chosen(editor: Editor, context: Context, rows: int, choose: Choose) -> dict[str, float]:
    """Folds what `choose` says at every tensor that linear layers other than the vocabulary head read.

    Args:
        editor: of the pass that folds.
        context: with the calibration data; later sites see the folds of those before them, which change nothing.
        rows: calibration tokens that are kept for `choose`.
        choose: called once per site, in graph order.

    Returns:
        The strengths by the name of the tensor's node.

    Raises:
        PassError: there is nothing to calibrate on, or activations are not finite.
    """
    program, head = editor.program, structure.head(editor.program)
    sites = [site for site in scale_sites(program) if head not in site.readers]
    strengths: dict[str, float] = {}

    def visit(index: int, collected: Channels) -> dict[object, Tensor]:
        site = sites[index]
        if editor.allow(site.source):
            weights = [
                value_of(program, operand).float().movedim(operand.axis, -1).flatten(0, -2) for operand in site.weights
            ]
            strengths[site.source.name], scale = choose(site, weights, collected)
            if scale is not None:
                fold_scale(editor, site, scale)
        return {}

    stops = [Stop(site.source, f"{editor.origin} scales {site.source.name}") for site in sites]
    batches = calibration.samples(program, context)
    calibration.walk(program, batches, stops, lambda: Channels(rows), visit, context.progress)
    return strengths
