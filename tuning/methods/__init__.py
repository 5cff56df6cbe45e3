"""Ways of tuning a network. To add one: write its file and add its line here."""

from tuning.core.parts import Part
from tuning.methods.adalora import adalora
from tuning.methods.beside import beside
from tuning.methods.bottleneck import bottleneck
from tuning.methods.full import full
from tuning.methods.ia3 import ia3
from tuning.methods.loha import loha
from tuning.methods.lokr import lokr
from tuning.methods.lora import lora
from tuning.methods.p_tuning import p_tuning
from tuning.methods.partial import partial
from tuning.methods.prefix import prefix
from tuning.methods.prompt import prompt
from tuning.methods.rates import rated
from tuning.methods.tokens import tokens
from tuning.methods.vera import vera

# These add to a network, and leave it as it is but for what their key `also` names.
ADDING: dict[str, Part] = {
    "lora": lora,
    "adalora": adalora,
    "vera": vera,
    "loha": loha,
    "lokr": lokr,
    "ia3": ia3,
    "bottleneck": bottleneck,
    "prompt": prompt,
    "p_tuning": p_tuning,
    "prefix": prefix,
    "tokens": tokens,
}

METHODS: dict[str, Part] = {
    name: rated(part) for name, part in {"full": full, "partial": partial, **{name: beside(part) for name, part in ADDING.items()}}.items()
}
