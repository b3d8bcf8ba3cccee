"""Looking inside ΔW: its spectrum, its subspaces, what it amplifies, and arithmetic with it.

    import lorakit as lk

    spectra = lk.analysis.spectrum("out/places")

Every function takes an adapter as an `Adapter`, its folder or its hub id, and computes in float64
on the factors A and B: a matrix of the layer's size is formed only where a docstring says so.

Examples:
    >>> phi = lk.analysis.subspace_similarity("out/places", "out/sql")
    >>> phi["model.layers.0.self_attn.q_proj"].shape
    torch.Size([8, 8])
"""

from lorakit.analysis.amplifying import Amplification, amplification
from lorakit.analysis.checks import left_out
from lorakit.analysis.combining import combine
from lorakit.analysis.comparing import Comparison, SiteComparison, compare
from lorakit.analysis.compressing import compress
from lorakit.analysis.from_full import from_checkpoint
from lorakit.analysis.intruder_dimensions import Intruders, intruders
from lorakit.analysis.spectra import Spectrum, spectrum
from lorakit.analysis.subspaces import principal_angles, random_control, subspace_similarity
from lorakit.analysis.tracing import Trace, traces

__all__ = [
    "Amplification",
    "Comparison",
    "Intruders",
    "SiteComparison",
    "Spectrum",
    "Trace",
    "amplification",
    "combine",
    "compare",
    "compress",
    "from_checkpoint",
    "intruders",
    "left_out",
    "principal_angles",
    "random_control",
    "spectrum",
    "subspace_similarity",
    "traces",
]
