"""What is lowered. To add an objective: write its file and add its line here."""

from tuning.core.parts import Part
from tuning.objectives.labels import labels
from tuning.objectives.tokens import next_token

OBJECTIVES: dict[str, Part] = {"labels": labels, "next_token": next_token}
