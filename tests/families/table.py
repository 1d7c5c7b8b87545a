"""All families, in the order in which the documents name them."""

from tests.families.decoders import DECODERS
from tests.families.others import ENCODER_DECODERS, ENCODERS, SEEING

FAMILIES = {family.name: family for family in (*DECODERS, *ENCODERS, *ENCODER_DECODERS, *SEEING)}
