"""The workshop: concepts, stimuli, directions, polarity, SAE training, atom names and evaluation, as stages of one recipe."""
