"""What parameters are called here, and in the programs that their authors released: one table a program.

A table maps our names to a program's. It holds all that the program may have: a checkpoint has those of its own
backbone and switches. ``norm.running_*`` are running statistics, not parameters. Shapes are the same on both sides, but
for Reptile: TensorFlow keeps convolutions as [3, 3, in, out], linear layers as [in, out], and in the place of
``adam_steps`` t the number ``beta2_power`` = 0.999^(t + 1).
"""

from __future__ import annotations

from collections.abc import Mapping

Table = dict[str, str]

BLOCKS = range(4)
_NORM = ("weight", "bias", "running_mean", "running_var")
_AFFINE = ("weight", "bias")


def _norm(ours: str, theirs: str, parts: tuple[str, ...] = _NORM) -> Table:
    return {f"{ours}.norm.{part}": f"{theirs}.{part}" for part in parts}


def _affine(ours: str, theirs: str) -> Table:
    return {f"{ours}.{part}": f"{theirs}.{part}" for part in _AFFINE}


def _conv4(convolution: str, norm: str) -> Table:
    """Names with ``{}`` in the place of the block."""
    table: Table = {}
    for block in BLOCKS:
        table |= _affine(f"features.{block}", convolution.format(block))
        table |= _norm(f"features.{block}", norm.format(block))
    return table


def _two_layers(ours: str, theirs: str) -> Table:
    """Linear, activation, linear."""
    return _affine(f"{ours}.0", f"{theirs}.0") | _affine(f"{ours}.2", f"{theirs}.2")


def _family() -> Table:
    """The network that MAML++, ALFA, L2F and CxGrad share: Conv-4, and ALFA's ResNet-12."""
    network = "classifier.layer_dict"
    table = _conv4(f"{network}.conv{{}}.conv", f"{network}.conv{{}}.norm_layer")
    for block in BLOCKS:
        ours, theirs = f"features.{block}", f"{network}.layer{block}"
        for index in (0, 1):
            table |= _affine(f"{ours}.{index}", f"{theirs}.conv{index + 1}.conv")
            table |= _norm(f"{ours}.{index}", f"{theirs}.conv{index + 1}.norm_layer")
        table |= _affine(f"{ours}.2", f"{theirs}.conv3") | _norm(f"{ours}.2", f"{theirs}.norm_layer")
        table |= _affine(f"{ours}.shortcut", f"{theirs}.shortcut_conv")
        table |= _norm(f"{ours}.shortcut", f"{theirs}.shortcut_norm_layer")
    return table | {"head.weight": f"{network}.linear.weights", "head.bias": f"{network}.linear.bias"}


def _per_tensor(ours: str, theirs: str) -> Table:
    """What the family's inner-loop optimizers hold for every adapted tensor: its name with dots turned to dashes."""
    adapted = {name: there for name, there in FAMILY.items() if ".norm." not in name}
    return {
        f"{ours}.{name}": f"inner_loop_optimizer.{theirs}.{there.removeprefix('classifier.').replace('.', '-')}"
        for name, there in adapted.items()
    }


def _learn2learn(module: str, head: str) -> Table:
    return _conv4(f"{module}features.{{}}.conv", f"{module}features.{{}}.normalize") | _affine("head", head)


def _metasgd() -> Table:
    """learn2learn's MetaSGD; its rates are numbered in the order of the module's parameters."""
    table = _learn2learn("module.", "module.classifier")
    parts = ("norm.weight", "norm.bias", "weight", "bias")
    rated = [f"features.{block}.{part}" for block in BLOCKS for part in parts] + ["head.weight", "head.bias"]
    return table | {f"rates.{name}": f"lrs.{index}" for index, name in enumerate(rated)}


def _cavia() -> Table:
    table: Table = _affine("head", "fc1")
    for block in BLOCKS:
        layer = block + 1
        table |= _affine(f"features.{block}", f"conv{layer}") | _norm(f"features.{block}", f"bn{layer}")
        table |= _affine(f"film.{block}.0", f"film{layer}") | _affine(f"film.{block}.2", f"film{layer}{layer}")
    return table | {"context": "context_params"}


def _modgrad() -> Table:
    table = _conv4("cnn.encoder.{}.0", "cnn.encoder.{}.1") | _affine("head", "classifier")
    for block in BLOCKS:
        for ours, theirs in (("u", "uu"), ("v", "vv"), ("bias", "bb")):
            table |= _two_layers(f"masks.{block}.{ours}", f"pcg.{theirs}_{block + 1}")
    return table


def _lstm(ours: str, theirs: str) -> Table:
    """A cell's weights and biases; ``{}`` is the part's name."""
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return {f"{ours}.{part}": theirs.format(part) for part in parts}


def _matchingnet(features: Table, support: str, query: str) -> Table:
    table = features | _lstm("support_lstm", f"{support}.{{}}_l0")
    return table | _lstm("support_lstm.reverse", f"{support}.{{}}_l0_reverse") | _lstm("query_lstm", f"{query}.{{}}")


def _relationnet(features: str, first: int, relation: str, convolution: str, norm: str) -> Table:
    table: Table = {}
    for block in BLOCKS:
        theirs = f"{features}{block + first}"
        table |= _affine(f"features.{block}", f"{theirs}.{convolution}")
        table |= _norm(f"features.{block}", f"{theirs}.{norm}")
    for block in (0, 1):
        theirs = f"{relation}.layer{block + 1}"
        table |= _affine(f"relation.{block}", f"{theirs}.{convolution}")
        table |= _norm(f"relation.{block}", f"{theirs}.{norm}")
    return table | _affine("relation.hidden", f"{relation}.fc1") | _affine("relation.score", f"{relation}.fc2")


def _reptile() -> Table:
    table: Table = {"head.weight": "dense/kernel", "head.bias": "dense/bias"}
    for block in BLOCKS:
        ours, end = f"features.{block}", f"_{block}" if block else ""
        table |= {f"{ours}.weight": f"conv2d{end}/kernel", f"{ours}.bias": f"conv2d{end}/bias"}
        norm = f"batch_normalization{end}"
        table |= {f"{ours}.norm.weight": f"{norm}/gamma", f"{ours}.norm.bias": f"{norm}/beta"}
        table |= {
            f"{ours}.norm.running_mean": f"{norm}/moving_mean",
            f"{ours}.norm.running_var": f"{norm}/moving_variance",
        }
    slots = {f"moments.{name}": f"{theirs}/Adam_1" for name, theirs in table.items() if ".running_" not in name}
    return table | slots | {"count": "adam_steps"}


FAMILY = _family()
CXGRAD = FAMILY | _two_layers("scaler", "gamma_generator")
L2F = FAMILY | _two_layers("attenuator", "attenuator") | {"fixed_rates": "task_learning_rate"}
MAMLPP = FAMILY | _per_tensor("rates", "names_learning_rates_dict")
ALFA = (
    FAMILY
    | _per_tensor("rates", "names_alpha_dict")
    | _per_tensor("decays", "names_beta_dict")
    | _per_tensor("decay_elements", "names_beta_dict_per_param")
    | _two_layers("generator", "regularizer")
    | _two_layers("attenuator", "attenuator")  # of its L2F switch
)
BOIL = _conv4("features.{}.0", "features.{}.1") | _affine("head", "classifier")
ANIL = _learn2learn("", "classifier.module")
METASGD = _metasgd()
CAVIA = _cavia()
MODGRAD = _modgrad()
REPTILE = _reptile()
PROTONET = _conv4("encoder.{}.0", "encoder.{}.1")
EASYFSL = _matchingnet(  # ProtoNet's is the backbone alone
    _conv4("backbone.{}.0", "backbone.{}.1"), "support_features_encoder", "query_features_encoding_cell"
)
CLOSERLOOK_MATCHINGNET = _matchingnet(_conv4("feature.trunk.{}.C", "feature.trunk.{}.BN"), "G_encoder", "FCE.lstmcell")
CLOSERLOOK_RELATIONNET = _relationnet("feature.trunk.", 0, "relation_module", "C", "BN")
RELATIONNET = _relationnet("feature_encoder.layer", 1, "relation_network", "0", "1")


def ours(table: Mapping[str, str]) -> Table:
    """The table the other way: a program's names -> ours."""
    return {theirs: name for name, theirs in table.items()}
