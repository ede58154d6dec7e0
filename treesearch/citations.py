"""BibTeX of the papers that a method comes from."""

from __future__ import annotations

from collections.abc import Sequence

_PAPERS = {
    "dts": (
        "inproceedings{jain2025diffusion",
        "Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models",
        "Jain, Vineet and Sareen, Kusha and Pedramfar, Mohammad and Ravanbakhsh, Siamak",
        "Advances in Neural Information Processing Systems",
        2025,
    ),
    "fk": (
        "inproceedings{singhal2025general",
        "A General Framework for Inference-time Scaling and Steering of Diffusion Models",
        "Singhal, Raghav and Horvitz, Zachary and Teehan, Ryan and Ren, Mengye and Yu, Zhou and McKeown, Kathleen "
        "and Ranganath, Rajesh",
        "International Conference on Machine Learning",
        2025,
    ),
    "smc": (
        "article{delmoral2006sequential",
        "Sequential Monte Carlo Samplers",
        "Del Moral, Pierre and Doucet, Arnaud and Jasra, Ajay",
        "Journal of the Royal Statistical Society: Series B",
        2006,
    ),
    "variance": (
        "article{lee2018variance",
        "Variance estimation in the particle filter",
        "Lee, Anthony and Whiteley, Nick",
        "Biometrika",
        2018,
    ),
    "beam": (
        "article{oshima2025inference",
        "Inference-Time Text-to-Video Alignment with Diffusion Latent Beam Search",
        "Oshima, Yuta and Suzuki, Masahiro and Matsuo, Yutaka and Furuta, Hiroki",
        "arXiv preprint arXiv:2501.19252",
        2025,
    ),
}
_USED = {
    "BestOfN": (),
    "FeynmanKac": ("fk", "smc", "variance"),
    "DiffusionTreeSampling": ("dts",),
    "DiffusionTreeSearch": ("dts",),
    "BeamSearch": ("beam",),
}


def bibtex(methods: Sequence[str]) -> str:
    """Entries for this library and the papers of the given methods."""
    keys = dict.fromkeys(key for name in methods for key in _USED[name])
    own = (
        "@software{treesearch,\n  title = {treesearch: inference-time search for diffusion models},\n  year = {2026}\n}"
    )
    return "\n\n".join([own, *(_entry(*_PAPERS[key]) for key in keys)])


def _entry(head: str, title: str, authors: str, where: str, year: int) -> str:
    venue = "booktitle" if head.startswith("inproceedings") else "journal"
    fields = {"title": title, "author": authors, venue: where, "year": year}
    return f"@{head},\n" + ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items()) + "\n}"
