"""GPTQ (gptq_v2): packed integer codes, one width for all layers or a width for each."""
