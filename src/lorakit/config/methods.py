"""Settings of the methods: what is trained, and how it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from lorakit.config.base import AnyDType, Names, PositiveFloat, PositiveInt, Settings
from lorakit.config.block_ranges import block_order, layer_numbers
from lorakit.config.marks import OfBase
from lorakit.errors import ConfigError, did_you_mean

TokenId = Annotated[int, Field(ge=0)]
Activation = Literal["relu", "gelu", "silu", "tanh"]


class MethodConfig(Settings):
    """The base class of the settings of all methods."""

    modules_to_save: Names = ("auto",)
    """Modules trained as full copies, by the end of their path. auto: a freshly made task head (a
    classifier), nothing else."""

    dtype: AnyDType = cast(Any, "float32")
    """Precision of what is trained, whatever the base's. float32 keeps small steps from being
    lost."""

    @property
    def method(self) -> str:
        """The method's name."""
        raise NotImplementedError


class LoRAConfig(MethodConfig):
    """How to adapt a model with LoRA (Hu et al. 2021, section 4.1).

    Examples:
        >>> config = lk.LoRAConfig(rank=8, alpha=16, targets=["q", "v"], layers="0-9")
        >>> lk.plan(model, config).parameters
        153600
    """

    rank: PositiveInt = 8
    """Inner width r of the update B·A. The paper tries 1 to 64 (Table 6)."""

    alpha: PositiveFloat | None = None
    """Numerator of the scale α/r (section 4.1). None: equal to the rank, so the scale is 1."""

    targets: Names = ("q", "v")
    """Layers to adapt: roles (q k v o gate up down embed head attention mlp all-linear), the end of
    a module's dotted path, a glob such as model.layers.*.mlp.*, or re:REGEX over the whole path."""

    exclude: Names = ()
    """Layers to leave alone, in the same words as targets."""

    layers: str | None = None
    """Blocks to adapt, counted from 0, such as "0-5,11". None: every block."""

    layer_replication: OfBase[str | None] = None
    """Blocks in the order in which the base runs them, such as "0-3,2-4": repeated ones share their
    weights, and each has an adapter of its own. None: each block once."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that an input element of A·x is dropped in training."""

    bias: Literal["none", "lora", "all"] = "none"
    """Bias vectors to train as well: none, those of the adapted layers, or all in the model."""

    rank_pattern: dict[str, PositiveInt] = {}
    """Other ranks for some layers, in the words of targets; the last match counts."""

    alpha_pattern: dict[str, PositiveFloat] = {}
    """Other alphas for some layers, in the words of targets; the last match counts."""

    use_rslora: bool = False
    """Scale by α/√r in place of α/r (Kalajdzievski 2023)."""

    use_dora: bool = False
    """Train the length of each row of W₀ + scale·B·A as well (DoRA, Liu 2024): linear
    layers, convolutions, whose rows are output channels, and embeddings, whose rows are those of
    the transposed weight."""

    trainable_token_indices: dict[str, list[TokenId]] | list[TokenId] = {}
    """Tokens whose rows of the embedding are trained as they are, such as new ones: their ids, or
    {MODULE: ids} with embed for the input embedding. A head with the embedding's weight follows."""

    lora_bias: bool = False
    """Train a bias of B as well: the update is scale·(B·A·x + b). For linear layers and
    convolutions; merged only into layers that have a bias."""

    ensure_weight_tying: bool = False
    """Give all layers that have a target's weight one A and B, and full copies of them one copy: a
    head has its embedding's, transposed, so that the merged weights are one weight still."""

    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "eva"] = "kaiming"
    """How A starts; B starts at zero. kaiming: uniform, as the authors' code and PEFT do, so that
    learning rates carry over; gaussian: normal with variance 1/d_in, as the paper's text says;
    orthogonal: orthonormal rows, scaled to kaiming's norm (PEFT's start of that name differs); eva:
    the main directions of the layer's inputs in the data. pissa: A and B start as the main part of
    the weight, which a frozen copy of them takes off again; the adapter has twice the rank."""

    svd_iterations: Annotated[int, Field(ge=0)] | None = None
    """Iterations of a randomised singular value decomposition for init pissa, quicker for large
    layers. None: the exact one."""

    eva_rho: Annotated[float, Field(ge=1)] = 1.0
    """How many times its rank a layer may get in init eva, which then moves ranks, as many as there
    are, to the directions that explain most of their layer's variance; each keeps one at least, and
    its scale. 1: ranks stay."""

    freeze_a: bool = False
    """Train B alone (LoRA-FA, Zhang 2023): of a layer's input only A·x is kept for the backward
    pass."""

    @property
    def method(self) -> str:
        """The method's name."""
        return "lora"

    @property
    def tokens_by_module(self) -> dict[str, list[int]]:
        """The trained tokens of each module that is named; those of a list are of embed."""
        given = self.trainable_token_indices
        return given if isinstance(given, dict) else {"embed": given} if given else {}

    @property
    def copies_named(self) -> bool:
        """Whether modules to copy in full are named, beside a fresh task head."""
        return self.modules_to_save not in ((), ("auto",))

    @model_validator(mode="after")
    def _check(self) -> LoRAConfig:
        beside = self.copies_named or self.trainable_token_indices or self.bias != "none"
        if not self.targets and not beside:
            raise ValueError(
                "targets is empty, so no layer would be adapted: name some, such as q,v "
                "(a head or norm alone is trained by its name in modules_to_save)"
            )
        if self.eva_rho > 1 and self.init != "eva":
            raise ValueError(f"eva_rho moves ranks in init eva, and init is {self.init}")
        for module, tokens in self.tokens_by_module.items():
            if not tokens or len(set(tokens)) < len(tokens):
                raise ValueError(
                    f"trainable_token_indices names some tokens of {module} twice, or none"
                )
        if self.ensure_weight_tying and (self.use_dora or self.init in ("pissa", "eva")):
            with_what = "use_dora" if self.use_dora else f"init {self.init}"
            raise ValueError(f"ensure_weight_tying can't be combined with {with_what}")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias and use_dora can't be combined: leave one out")
        for blocks in (self.layers, self.layer_replication):
            if blocks is not None:
                block_order(blocks)
        return self


class FullSettings(MethodConfig):
    """How a model's own weights are trained."""

    top: PositiveInt = 2
    """Blocks that top-k trains, counted from the output (FT^Top2 of the paper has 2)."""

    blocks: Names = ()
    """Blocks of the model in order, as globs or re:REGEX over paths, where lorakit does not find
    them by itself."""


class FullConfig(FullSettings):
    """Full fine-tuning (FT), or that of the last blocks alone (FT^Top2; section 5.1).

    Examples:
        >>> lk.plan(model, lk.FullConfig(only_top=True, top=1)).parameters
        3540096
    """

    only_top: bool = False
    """Train the last `top` blocks alone."""

    @property
    def method(self) -> str:
        """The method's name."""
        return "top-k" if self.only_top else "full"


class BitFitConfig(MethodConfig):
    """BitFit: the bias vectors alone are trained (Ben Zaken et al. 2021; section 5.1).

    Examples:
        >>> lk.plan(model, lk.BitFitConfig(add_missing=True)).parameters  # the model has no biases
        155520
    """

    add_missing: bool = False
    """Give the linear layers that have no bias one that starts at zero, as Llama needs it."""

    @property
    def method(self) -> str:
        """The method's name."""
        return "bitfit"


class PrefixSettings(MethodConfig):
    """Virtual tokens before and after the prompt."""

    prefix: Annotated[int, Field(ge=0)] = 8
    """Virtual tokens l_p before the prompt."""

    infix: Annotated[int, Field(ge=0)] = 8
    """Virtual tokens l_i right after the prompt."""

    init: Literal["tokens", "random"] = "tokens"
    """How they start. tokens: as randomly drawn tokens of the vocabulary, and for prefix-layer as
    what the base makes of those after each block; random: normal, as spread as the embeddings."""

    blocks: Names = ()
    """Blocks of the model in order, as globs or re:REGEX over paths, where lorakit does not find
    them by itself."""

    @model_validator(mode="after")
    def _check(self) -> PrefixSettings:
        if not self.prefix and not self.infix:
            raise ValueError("prefix and infix are both 0, so nothing would be trained")
        return self


class PrefixConfig(PrefixSettings):
    """PreEmbed and PreLayer: embeddings of special tokens are trained (section 5.1).

    Examples:
        >>> lk.plan(model, lk.PrefixConfig(prefix=8, infix=8)).parameters
        9216
    """

    every_layer: bool = False
    """PreLayer: train what these tokens are after every block, too."""

    @property
    def method(self) -> str:
        """The method's name."""
        return "prefix-layer" if self.every_layer else "prefix-embedding"


class BottleneckSettings(MethodConfig):
    """Small networks between the layers: down to a few dimensions, nonlinearity, and up again."""

    size: PositiveInt | None = None
    """Inner width r. None: the variant's own, 16 for adapter-h, 48 for adapter-d, 32 for the
    others, or the layer's width where that is less."""

    activation: Activation | None = None
    """Nonlinearity. None: the variant's own, gelu for adapter-h and relu for the others."""

    layer_norm: bool | None = None
    """Whether the bottleneck has a LayerNorm of its own for its input. None: only adapter-l has."""

    train_norms: bool = False
    """Train the base's norms inside the adapted blocks too, as full copies: 2·d values for a
    LayerNorm, d for an RMSNorm."""

    layers: str | None = None
    """Blocks to adapt, counted from 0, such as "0-5,11". None: every block."""

    dropped: Annotated[int, Field(ge=0)] | None = None
    """Lowest blocks that adapter-d leaves out. None: 5 in 12 of them."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that an element of the inner width is dropped in training."""

    at: Names = ()
    """Modules whose output goes through a bottleneck, as globs or re:REGEX over paths, where
    lorakit does not find the method's places by itself."""

    @model_validator(mode="after")
    def _check(self) -> BottleneckSettings:
        if self.layers is not None:
            layer_numbers(self.layers)
        beside = {"layers": self.layers, "dropped": self.dropped, "train_norms": self.train_norms}
        given = [name for name, value in beside.items() if value not in (None, False)]
        if self.at and given:
            raise ValueError(
                f"at says exactly where bottlenecks are, so {' and '.join(given)} can't be used "
                "beside it (modules_to_save trains norms that are named)"
            )
        return self


class BottleneckConfig(BottleneckSettings):
    """Adapter layers (section 5.1): Houlsby, Lin, Pfeiffer, and AdapterDrop.

    Examples:
        >>> lk.plan(model, lk.BottleneckConfig(variant="p", size=16)).parameters
        570720
    """

    variant: Literal["h", "l", "p", "d"] = "h"
    """h: after attention and after the MLP (Houlsby 2019); l: after the block, with a LayerNorm of
    its own (Lin 2020); p: after the MLP (Pfeiffer 2021); d: as p, without the lower blocks (Rücklé
    2020)."""

    @property
    def method(self) -> str:
        """The method's name."""
        return f"adapter-{self.variant}"

    @model_validator(mode="after")
    def _check_dropped(self) -> BottleneckConfig:
        if self.dropped is not None and self.variant != "d":
            raise ValueError(f"dropped goes with adapter-d alone, and this is {self.method}")
        return self


METHODS: dict[str, tuple[type[MethodConfig], Mapping[str, Any]]] = {
    "lora": (LoRAConfig, {}),
    "full": (FullConfig, {"only_top": False}),
    "top-k": (FullConfig, {"only_top": True}),
    "bitfit": (BitFitConfig, {}),
    "prefix-embedding": (PrefixConfig, {"every_layer": False}),
    "prefix-layer": (PrefixConfig, {"every_layer": True}),
    "adapter-h": (BottleneckConfig, {"variant": "h"}),
    "adapter-l": (BottleneckConfig, {"variant": "l"}),
    "adapter-p": (BottleneckConfig, {"variant": "p"}),
    "adapter-d": (BottleneckConfig, {"variant": "d"}),
}
"""The settings of each method by its name, and the values that the name implies."""


def config_of(method: str, settings: Mapping[str, Any]) -> MethodConfig:
    """The settings of a method by its name.

    Raises:
        ConfigError: there is no such method, or the settings are wrong.
    """
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise ConfigError(
            f"there is no method {method!r}{did_you_mean(method, METHODS)}; the methods are {known}"
        )
    kind, implied = METHODS[method]
    return kind(**{**settings, **implied})


def combination_problems(methods: Sequence[str]) -> list[str]:
    """The reasons why methods can't be combined; empty where they can."""
    problems = []
    if not methods:
        problems.append("no method is given")
    problems += [
        f"{name} is named twice" for name in dict.fromkeys(methods) if methods.count(name) > 1
    ]
    whole = [name for name in methods if name == "full"]
    if whole and len(methods) > 1:
        problems.append("full trains every weight already, so it goes with no other method")
    for family, words in (("prefix-", "virtual tokens"), ("adapter-", "bottlenecks")):
        named = list(dict.fromkeys(name for name in methods if name.startswith(family)))
        if len(named) > 1:
            problems.append(f"{' and '.join(named)} both put {words} into the model: choose one")
    return problems
