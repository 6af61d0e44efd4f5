"""The methods of structural pruning by name."""

from topiarist.structured.activation import Activation
from topiarist.structured.methods import Magnitude, Method, Random
from topiarist.structured.metrics import BlockInfluence, Flap, WandaSP
from topiarist.structured.occlusion import Occlusion
from topiarist.structured.policy_search import PolicyGradient
from topiarist.structured.reap import Reap
from topiarist.structured.taylor import Taylor

METHODS: dict[str, type[Method]] = {
    "policy-gradient": PolicyGradient,
    "taylor": Taylor,
    "occlusion": Occlusion,
    "activation": Activation,
    "flap": Flap,
    "wanda-sp": WandaSP,
    "block-influence": BlockInfluence,
    "reap": Reap,
    "magnitude": Magnitude,
    "random": Random,
}
