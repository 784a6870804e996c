"""The workshop: concepts, stimuli, directions, polarity, SAEs, atoms, evaluation: stages of one recipe."""
