"""Ways of tuning a network. To add one: write its file and add its line here."""

from tuning.core.parts import Part
from tuning.methods.full import full
from tuning.methods.lora import lora
from tuning.methods.partial import partial

METHODS: dict[str, Part] = {"full": full, "partial": partial, "lora": lora}
