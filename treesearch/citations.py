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
    "rejection": (
        "incollection{vonneumann1951various",
        "Various techniques used in connection with random digits",
        "von Neumann, John",
        "Monte Carlo Method, National Bureau of Standards Applied Mathematics Series 12",
        1951,
    ),
    "svdd": (
        "article{li2024derivative",
        "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding",
        "Li, Xiner and Zhao, Yulai and Wang, Chenyu and Scalia, Gabriele and Eraslan, Gokcen and Nair, Surag and "
        "Biancalani, Tommaso and Ji, Shuiwang and Regev, Aviv and Levine, Sergey and Uehara, Masatoshi",
        "arXiv preprint arXiv:2408.08252",
        2024,
    ),
    "uct": (
        "inproceedings{kocsis2006bandit",
        "Bandit based Monte-Carlo Planning",
        "Kocsis, Levente and Szepesv{\\'a}ri, Csaba",
        "European Conference on Machine Learning",
        2006,
    ),
    "widening": (
        "inproceedings{couetoux2011continuous",
        "Continuous Upper Confidence Trees",
        'Cou{\\"e}toux, Adrien and Hoock, Jean-Baptiste and Sokolovska, Nataliya and Teytaud, Olivier and '
        "Bonnard, Nicolas",
        "Learning and Intelligent Optimization",
        2011,
    ),
    "mctd": (
        "inproceedings{yoon2025monte",
        "Monte Carlo Tree Diffusion for System 2 Planning",
        "Yoon, Jaesik and Cho, Hyeonseo and Baek, Doojin and Bengio, Yoshua and Ahn, Sungjin",
        "International Conference on Machine Learning",
        2025,
    ),
    "noise": (
        "article{ramesh2025test",
        "Test-Time Scaling of Diffusion Models via Noise Trajectory Search",
        "Ramesh, Vignav and Mardani, Morteza",
        "arXiv preprint arXiv:2506.03164",
        2025,
    ),
    "classical": (
        "article{zhang2025inference",
        "Inference-time Scaling of Diffusion Models through Classical Search",
        "Zhang, Xiangcheng and Lin, Haowei and Ye, Haotian and Zou, James and Ma, Jianzhu and Liang, Yitao and "
        "Du, Yilun",
        "arXiv preprint arXiv:2505.23614",
        2025,
    ),
    "scaling": (
        "article{ma2025inference",
        "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps",
        "Ma, Nanye and Tong, Shangyuan and Jia, Haolin and Hu, Hexiang and Su, Yu-Chuan and Zhang, Mingda and "
        "Yang, Xuan and Li, Yandong and Jaakkola, Tommi and Jia, Xuhui and Xie, Saining",
        "arXiv preprint arXiv:2501.09732",
        2025,
    ),
    "iapf": (
        "article{guarniero2017iterated",
        "The Iterated Auxiliary Particle Filter",
        "Guarniero, Pieralberto and Johansen, Adam M. and Lee, Anthony",
        "Journal of the American Statistical Association",
        2017,
    ),
    "square_root": (
        "article{owen2020square",
        "The Square Root Rule for Adaptive Importance Sampling",
        "Owen, Art B. and Zhou, Yi",
        "ACM Transactions on Modeling and Computer Simulation",
        2020,
    ),
    "improvement": (
        "article{jones1998efficient",
        "Efficient Global Optimization of Expensive Black-Box Functions",
        "Jones, Donald R. and Schonlau, Matthias and Welch, William J.",
        "Journal of Global Optimization",
        1998,
    ),
    "believer": (
        "incollection{ginsbourger2010kriging",
        "Kriging Is Well-Suited to Parallelize Optimization",
        "Ginsbourger, David and Le Riche, Rodolphe and Carraro, Laurent",
        "Computational Intelligence in Expensive Optimization Problems",
        2010,
    ),
    "rbf": (
        "inproceedings{kim2025inference",
        "Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing",
        "Kim, Jaihoon and Yoon, Taehoon and Hwang, Jisung and Sung, Minhyuk",
        "Advances in Neural Information Processing Systems",
        2025,
    ),
}
_USED = {
    "BestOfN": (),
    "Rejection": ("rejection",),
    "FeynmanKac": ("fk", "smc", "variance"),
    "DiffusionTreeSampling": ("dts",),
    "DiffusionTreeSearch": ("dts",),
    "TreeSearch": ("improvement", "believer"),
    "TreeSampling": ("smc", "iapf", "square_root", "variance"),
    "BeamSearch": ("beam",),
    "SVDD": ("svdd",),
    "LookaheadBeam": ("beam",),
    "MCTS": ("uct", "widening", "mctd", "noise"),
    "DepthFirst": ("classical",),
    "RolloverBudget": ("rbf",),
    "NoiseSearch": ("scaling",),
}


def bibtex(methods: Sequence[str]) -> str:
    """Entries for this library and the papers of the given methods."""
    keys = dict.fromkeys(key for name in methods for key in _USED[name])
    own = (
        "@software{treesearch,\n  title = {treesearch: inference-time search for diffusion models},\n  year = {2026}\n}"
    )
    return "\n\n".join([own, *(_entry(*_PAPERS[key]) for key in keys)])


def _entry(head: str, title: str, authors: str, where: str, year: int) -> str:
    venue = "booktitle" if head.startswith("in") else "journal"
    fields = {"title": title, "author": authors, venue: where, "year": year}
    return f"@{head},\n" + ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items()) + "\n}"
